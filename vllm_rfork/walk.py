"""Walks everything reachable from a model: the one place that knows where tensors and state hide.

Tensors hide in parameters, buffers, plain attributes, lists, dicts, helper objects that are not modules, and the
closures of functions kept on any of these. The walk is depth-first in an order that depends on registration order
and sorted attribute names only, never on object addresses, so two processes that build the same model give every
leaf the same name. Must not change anything.
"""

from __future__ import annotations

import enum
import functools
import types
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vllm_rfork.errors import ForkError

#: How deep containers and helpers may nest; vLLM's deepest is 4 (module → quant_method → kernel → config → dict).
MAX_DEPTH = 8
#: More leaves than any model has: a walk that leaves the model would otherwise not end.
MAX_LEAVES = 5_000_000

#: Attributes that hold runtime scratch, not weights: they are written while serving, so no seed can vouch for them,
#: and a receiver must allocate its own. Reason by name:
SCRATCH = {
    "kv_cache": "bound to the KV cache after loading",
    "_kv_cache": "bound to the KV cache after loading",
    "workspace": "kernel scratch",
    "workspace_buffer": "kernel scratch",
    "_workspace_buffer": "kernel scratch",
    "topk_indices_buffer": "sparse attention writes its indices there in every step",
    "candidate_block_buffer": "sparse attention writes its candidates there in every step",
    "_mtp_hidden_buffer": "hidden states that the target leaves for its draft in every step",
    "_compress_scratch": "kernel scratch",
    "deepstack_input_embeds": "features of images on their way to deeper layers, written per request",
    "_ds_buffers": "features of images on their way to deeper layers, written per request",
    "per_layer_embeddings": "embeddings of the tokens at hand, written in every step",
    "_fp8_q_amax": "a history of what a vision tower has seen",
    "_fp8_k_amax": "a history of what a vision tower has seen",
    "_fp8_v_amax": "a history of what a vision tower has seen",
    "expert_load_view": "EPLB statistics",
    "logical_to_physical_map": "EPLB bookkeeping",
    "logical_replica_count": "EPLB bookkeeping",
    "key_cache": "vLLM-Ascend binds the KV cache to attention implementations",
    "value_cache": "vLLM-Ascend binds the KV cache to attention implementations",
    "o_proj_full_pool": "vLLM-Ascend gathers into it in every step",
    "o_proj_full_gather_pool": "vLLM-Ascend gathers into it in every step",
    "moe_load": "vLLM-Ascend's EPLB statistics",
    "load_counter": "vLLM-Ascend's EPLB statistics",
}

#: The same under names that others may give to weights: by the module's class, and the reason.
SCRATCH_OF = {
    (kind, name): "inputs of a graph, written in every step (kv_sharing_fast_prefill)"
    for kind in ("Gemma3nTextModel", "Gemma4Model")
    for name in ("positions", "hidden_states", "per_layer_inputs")
}

#: Classes of vLLM that stand where a layer is left out, and keep it on the meta device: another pipeline stage has it,
#: or nothing needs it (the head of an embedding model, the tower of a modality that was switched off).
PLACEHOLDERS = frozenset({"StageMissingLayer", "PPMissingLayer"})

#: nn.Module's own bookkeeping.
_MODULE_INTERNAL = frozenset(vars(nn.Module()))

#: Packages whose objects hold no weights of the model, only machinery; torch's containers that do are modules.
_FOREIGN = frozenset(
    {
        "abc",
        "asyncio",
        "builtins",
        "collections",
        "concurrent",
        "contextlib",
        "ctypes",
        "datetime",
        "enum",
        "functools",
        "inspect",
        "io",
        "itertools",
        "logging",
        "multiprocessing",
        "numpy",
        "os",
        "pathlib",
        "prometheus_client",
        "pydantic",
        "pydantic_core",
        "queue",
        "re",
        "regex",
        "selectors",
        "socket",
        "subprocess",
        "sys",
        "threading",
        "time",
        "tokenizers",
        "torch",
        "torch_npu",
        "tqdm",
        "transformers",
        "triton",
        "types",
        "typing",
        "weakref",
        "zmq",
    }
)

#: vLLM's settings, and the groups of ranks with their buffers and sockets: shared by the whole process, and describing
#: weights without holding any. vLLM-Ascend hangs them on MoE layers' configurations and on attention implementations.
_PROCESS_WIDE = ("vllm.config", "vllm.distributed", "vllm_ascend.distributed")

#: Plain values that may travel as state.
Plain = bool | int | float | str | None


@dataclass(frozen=True)
class Opaque:
    """Stands for a native object whose memory cannot be seen: packed weights may lie in it."""

    kind: str


@dataclass(frozen=True)
class Leaf:
    """A tensor, a plain value or :class:`Opaque`: where it is called ``name``, and the ``owner`` and ``key`` under
    which it is held.
    """

    name: str
    owner: Any
    key: Any
    value: Any


def walk(model: nn.Module) -> Iterator[Leaf]:
    """Every tensor and plain value reachable from ``model``.

    Aliased parameters and buffers come once per name; helper objects and hidden modules once, under the first
    name that reaches them.

    Raises:
        ForkError: there is more than ``MAX_LEAVES``: the walk has left the model; or an object of the model's
            raised while it was looked at.
    """
    leaves = enumerate(_Walker(model).modules(model, ""))
    while True:
        try:
            count, leaf = next(leaves)
        except StopIteration:
            return
        except Exception as error:
            # Mappings, slots and wrapper tensors run their own code, and a model that loads must not fail for it.
            raise ForkError(f"the model's attributes cannot be read: {type(error).__name__}: {error}") from error
        if count > MAX_LEAVES:
            raise ForkError(f"more than {MAX_LEAVES} tensors and values are reachable from the model")
        yield leaf


def assign(leaf: Leaf, value: Plain) -> None:
    """Put ``value`` where ``leaf`` is held.

    Raises:
        ForkError: the place cannot be written (a closure, a tuple, a read-only attribute).
    """
    try:
        if isinstance(leaf.owner, (dict, list)):
            leaf.owner[leaf.key] = value
        elif isinstance(leaf.owner, (tuple, types.CellType)):
            raise TypeError(f"a {type(leaf.owner).__name__} cannot be written")
        else:
            setattr(leaf.owner, leaf.key, value)
    except Exception as error:
        # Setters run their own code, and a module raises KeyError for a name that it has otherwise.
        raise ForkError(f"state {leaf.name} of the seed cannot be set here: {error}") from error


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


class _Walker:
    def __init__(self, model: nn.Module) -> None:
        self._seen: set[int] = set()
        self._alive: list[Any] = []  # ids are only unique among living objects
        self._of_model = {id(module) for module in model.modules()}

    def modules(self, root: nn.Module, prefix: str) -> Iterator[Leaf]:
        for name, module in root.named_modules(prefix=prefix):
            if self._first_visit(module):
                yield from self._module(module, name)

    def _first_visit(self, thing: Any) -> bool:
        if id(thing) in self._seen:
            return False
        self._seen.add(id(thing))
        self._alive.append(thing)
        return True

    def _module(self, module: nn.Module, name: str) -> Iterator[Leaf]:
        if type(module).__name__ in PLACEHOLDERS:
            return
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None and key not in SCRATCH:
                    yield from self._tensor(tensor, _join(name, key), module, key)
        for key in sorted(set(vars(module)) - _MODULE_INTERNAL):
            if key not in SCRATCH and (type(module).__name__, key) not in SCRATCH_OF:
                yield from self._value(vars(module)[key], _join(name, key), module, key, 0)

    def _tensor(self, tensor: torch.Tensor, name: str, owner: Any, key: Any) -> Iterator[Leaf]:
        if is_traceable_wrapper_subclass(tensor):
            inner, _ = tensor.__tensor_flatten__()
            for part in inner:
                yield from self._tensor(getattr(tensor, part), f"{name}.{part}", tensor, part)
        else:
            yield Leaf(name, owner, key, tensor)

    def _value(self, value: Any, name: str, owner: Any, key: Any, depth: int) -> Iterator[Leaf]:  # noqa: PLR0912
        if isinstance(value, torch.Tensor):
            yield from self._tensor(value, name, owner, key)
            return
        if value is None or type(value) in (bool, int, float, str):
            yield Leaf(name, owner, key, value)
            return
        if isinstance(value, enum.Enum):
            # Compared and never set: a member belongs to the whole process, and text is not one.
            yield Leaf(f"{name}.<member>", (), "member", f"{type(value).__qualname__}.{value.name}")
            return
        if depth >= MAX_DEPTH or isinstance(value, (type, types.ModuleType)):
            return
        if isinstance(value, nn.Module):
            # One that the model does not register, for instance kept in a list so as to stay out of state_dict.
            if id(value) not in self._of_model:
                yield from self.modules(value, name)
            return
        if not self._first_visit(value):
            return
        if isinstance(value, Mapping):
            for number, (inner_key, inner) in enumerate(value.items()):
                label = inner_key if isinstance(inner_key, (str, int)) else f"#{number}"
                if inner_key not in SCRATCH:
                    yield from self._value(inner, f"{name}[{label}]", value, inner_key, depth + 1)
        elif isinstance(value, (list, tuple, deque)):
            for number, inner in enumerate(value):
                yield from self._value(inner, f"{name}[{number}]", value, number, depth + 1)
        elif isinstance(value, functools.partial):
            parts = {"func": value.func, "args": value.args, "keywords": value.keywords}
            for label, inner in parts.items():
                yield from self._value(inner, f"{name}.<{label}>", (), label, depth + 1)
        elif isinstance(value, types.MethodType):
            yield from self._value(value.__self__, f"{name}.<self>", (), "self", depth + 1)
            yield from self._function(value.__func__, name, depth)
        elif isinstance(value, types.FunctionType):
            yield from self._function(value, name, depth)
        elif isinstance(value, torch.ScriptObject):
            yield Leaf(name, owner, key, Opaque(type(value).__name__))
        elif isinstance(value, types.SimpleNamespace) or self._is_helper(value):
            yield from self._helper(value, name, depth)

    def _function(self, function: Any, name: str, depth: int) -> Iterator[Leaf]:
        code = getattr(function, "__code__", None)
        for label, cell in zip(getattr(code, "co_freevars", ()), function.__closure__ or (), strict=False):
            try:
                inner = cell.cell_contents
            except ValueError:  # an empty cell: the variable is not bound yet
                continue
            yield from self._value(inner, f"{name}.<{label}>", cell, label, depth + 1)
        for number, inner in enumerate(function.__defaults__ or ()):
            if isinstance(inner, torch.Tensor):
                yield from self._value(inner, f"{name}.<default {number}>", (), number, depth + 1)

    @staticmethod
    def _is_helper(value: Any) -> bool:
        kind = type(value)
        module = kind.__module__ or ""
        return module.partition(".")[0] not in _FOREIGN and not module.startswith(_PROCESS_WIDE)

    def _helper(self, value: Any, name: str, depth: int) -> Iterator[Leaf]:
        leaves = self._attributes(value, name, depth)
        if type(value).__name__.endswith("Config"):
            # A layer's quantization may hold its scales; its plain values are settings, which the fingerprint covers.
            leaves = (leaf for leaf in leaves if isinstance(leaf.value, (torch.Tensor, Opaque)))
        yield from leaves

    def _attributes(self, value: Any, name: str, depth: int) -> Iterator[Leaf]:
        attributes = dict(getattr(value, "__dict__", {}))
        for kind in type(value).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                if slot not in attributes and slot not in ("__dict__", "__weakref__"):
                    try:
                        attributes[slot] = getattr(value, slot)
                    except AttributeError:  # a slot that was never filled
                        continue
        for key in sorted(attributes, key=str):
            if key not in SCRATCH:
                yield from self._value(attributes[key], f"{name}.{key}", value, key, depth + 1)
