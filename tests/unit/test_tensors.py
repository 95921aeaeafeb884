"""TensorInventory misses nothing, keeps aliases, and names leaves the same in every process."""

from __future__ import annotations

import dataclasses
import enum
import functools
import os
import subprocess
import sys
import threading
import types
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from torch import nn

from tests.inventory import apply_state, collect, state_of
from vllm_rfork.errors import ForkError, ManifestMismatch
from vllm_rfork.manifest.codec import decode_manifest, encode_manifest, validate_manifest
from vllm_rfork.manifest.pairing import pair
from vllm_rfork.manifest.schema import ManifestHeader
from vllm_rfork.model import traversal
from vllm_rfork.model.build_signature import build_signature
from vllm_rfork.model.python_state import changed_state
from vllm_rfork.model.restore import apply_inline
from vllm_rfork.vllm_compat.model_rules import VLLM_RULES

CPU = torch.device("cpu")
HEADER = ManifestHeader(
    seed_key="k",
    fingerprint="f",
    epoch="e",
    layout="checkpoint",
    engine="memory",
    endpoint="x",
)


class Helper:
    __slots__ = ("__dict__", "__weakref__", "slot")

    def __init__(self) -> None:
        self.slot = torch.ones(2)
        self.in_helper = torch.ones(3)
        self.scale = 0.5

    def use(self) -> None:
        pass


@dataclasses.dataclass(slots=True)
class Record:
    tensor: torch.Tensor
    number: int


class Struct(msgspec.Struct):
    tensor: Any


class Named(NamedTuple):
    tensor: torch.Tensor


HELD, HELD_TOO = Helper(), Helper()


def with_defaults(number: int = 1, cache: Any = (torch.ones(21),), *, more: Any = torch.ones(22)) -> None:  # noqa: B008
    pass


def hook(held: torch.Tensor, *args: Any) -> None:
    pass


class Hiding(nn.Module):
    """A tensor in every place where one has been found."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.register_buffer("buffer", torch.ones(5))
        self.register_buffer("scratchless", torch.ones(6), persistent=False)
        self.plain = torch.ones(7)
        self.listed = [torch.ones(8), {"deep": (torch.ones(9),)}]
        self.impl = Helper()
        closed = torch.ones(10)
        self.closure = lambda: closed
        self.partial = functools.partial(torch.add, torch.ones(11))
        self.hidden = [nn.Linear(2, 2, bias=False)]
        self.kv_cache = torch.ones(12)
        self.flag = True
        self.ratio = 1.5
        self.method = Helper().use
        self.native_method = torch.ones(13).add
        self.reference = weakref.ref(HELD)
        self.proxy = weakref.proxy(HELD_TOO)
        self.defaults = with_defaults
        self.weight.aux = {"scale": torch.ones(14), "again": self.weight}
        self.only_one = {Helper()}
        self.values = {"a": torch.ones(15)}.values()
        self.drawn = iter([torch.ones(16)])
        self.record = Record(torch.ones(17), 1)
        self.struct = Struct(torch.ones(18))
        self.named = Named(torch.ones(19))
        self.register_forward_hook(functools.partial(hook, torch.ones(20)))


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        if tie:
            self.head.weight = self.embed.weight
        self.part = self.embed.weight.data[1:3]


def names(model: nn.Module) -> list[str]:
    return [entry.name for entry in collect(model, CPU).entries]


def test_every_hiding_place_is_found_and_scratch_is_left_out() -> None:
    found = {entry.name: entry.shape for entry in collect(Hiding(), CPU).entries}
    assert found == {
        "weight": (4, 4),
        "buffer": (5,),
        "scratchless": (6,),
        "closure.<closed>": (10,),
        "hidden[0].weight": (2, 2),
        "impl.in_helper": (3,),
        "impl.slot": (2,),
        "listed[0]": (8,),
        "listed[1][deep][0]": (9,),
        "partial.<args>[0]": (11,),
        "plain": (7,),
        "method.<self>.in_helper": (3,),
        "method.<self>.slot": (2,),
        "native_method.<self>": (13,),
        "reference.<ref>.in_helper": (3,),
        "reference.<ref>.slot": (2,),
        "proxy.in_helper": (3,),
        "proxy.slot": (2,),
        "defaults.<default 1>[0]": (21,),
        "defaults.<default more>": (22,),
        "weight.aux[scale]": (14,),
        "only_one.<member>.in_helper": (3,),
        "only_one.<member>.slot": (2,),
        "values[0]": (15,),
        "drawn.<held 0>[0]": (16,),
        "record.tensor": (17,),
        "struct.tensor": (18,),
        "named[0]": (19,),
        "<forward_hooks 0>.<args>[0]": (20,),
    }


def test_however_deep_it_lies() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.nest = torch.ones(3)
    for _ in range(100):
        model.nest = [model.nest]
    assert names(model) == ["weight", "nest" + "[0]" * 100]
    for _ in range(300):
        model.nest = [model.nest]
    with pytest.raises(ForkError, match=r"deeper than can be named: nest\[0\]\[0\]"):
        names(model)


def test_what_is_met_far_down_first_is_named_after_the_nearest_place() -> None:
    """Else an attribute that sorts before all others, and that one worker alone has, would give it another name."""
    model = nn.Linear(1, 1, bias=False)
    helper = Helper()
    model.nearest = helper
    model.a_long_way = [[[[[[[[[helper]]]]]]]]]
    assert names(model) == ["weight", "nearest.in_helper", "nearest.slot"]
    del model.nearest
    assert names(model) == ["weight", *(f"a_long_way{'[0]' * 9}.{name}" for name in ("in_helper", "slot"))]
    for long, short in (("a", "z"), ("z", "a")):
        model = nn.Linear(1, 1, bias=False)
        setattr(model, long, [[[[helper]]]])
        setattr(model, short, [[helper]])
        assert names(model) == ["weight", f"{short}[0][0].in_helper", f"{short}[0][0].slot"]


def test_a_walk_that_leaves_the_model_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traversal, "MAX_OBJECTS", 50)
    model = nn.Linear(1, 1)
    model.many = [[] for _ in range(100)]
    with pytest.raises(ForkError, match=r"more than 50 objects .* by way of many\[\d+\]"):
        names(model)


def test_no_two_leaves_have_one_name() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.mixed = {1: torch.ones(1), "1": torch.ones(2)}
    self = torch.ones(3)

    def closed(_: Any) -> Any:
        return self

    model.method = types.MethodType(closed, torch.ones(4))
    shapes = {entry.name: entry.shape for entry in collect(model, CPU).entries}
    assert shapes == {
        "weight": (1, 1),
        "mixed[1]": (1,),
        "mixed[#1]": (2,),
        "method.<self>": (4,),
        "method.<self>'": (3,),
    }


def test_a_hidden_module_does_not_give_its_name_to_registered_ones() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    hidden = nn.Sequential(nn.Linear(2, 2, bias=False))
    hidden.borrowed = model[0]
    model.hidden = [hidden]
    assert names(model) == ["0.weight", "hidden[0].0.weight"]


def test_settings_are_looked_at_last() -> None:
    """A helper that a layer's configuration holds too would otherwise be one of the settings, without its values."""

    class SomeConfig:
        def __init__(self, helper: Helper) -> None:
            self.aside, self.own = helper, 3

    model = nn.Linear(1, 1)
    helper = Helper()
    model.config, model.impl = SomeConfig(helper), [helper]
    assert {name: value for name, value in state_of(model).items() if "scale" in name} == {"impl[0].scale": 0.5}
    assert "config.own" not in state_of(model)


def cached() -> Any:
    @functools.lru_cache
    def kept(number: int) -> torch.Tensor:
        return torch.ones(number)

    kept(2)
    return kept


@pytest.mark.parametrize(
    ("thing", "reason"),
    [
        (lambda: {Helper(), Helper()}, "a set of 2 objects, which have no order"),
        (lambda: torch.ones(2).untyped_storage(), "UntypedStorage"),
        (cached, "results cached by functools.lru_cache"),
    ],
)
def test_what_may_hold_weights_and_cannot_be_named_is_opaque(thing: Any, reason: str) -> None:
    model = nn.Linear(1, 1)
    model.layer = nn.Linear(1, 1)
    model.layer.odd = thing()
    assert collect(model, CPU).opaque == (f"layer.odd ({reason})",)


def test_what_holds_no_weights_is_left_alone() -> None:
    model = nn.Linear(1, 1)
    model.modules_too, model.functions = {model}, {len, print, names}
    model.lock, model.environment, model.kind = threading.Lock(), os.environ, Helper
    model.gone = weakref.ref(Helper())
    assert state_of(model).keys() == state_of(nn.Linear(1, 1)).keys()
    assert collect(model, CPU).opaque == ()


def test_what_serving_writes_to_is_none_of_a_seeds() -> None:
    """Else its digests would be wrong from the first request on, and every fork from it for nothing."""

    class Gemma3nTextModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.positions = torch.zeros(3)
            self.deepstack_input_embeds = [torch.zeros(4)]
            self._mtp_hidden_buffer = torch.empty(5)

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = torch.zeros(3)

    class Derived(Gemma3nTextModel):
        pass

    model = nn.Sequential(Gemma3nTextModel(), Other(), Derived())
    assert names(model) == ["0.weight", "1.positions", "2.weight"]


def test_scales_that_a_tower_computes_while_serving_are_none_of_a_seeds() -> None:
    class Tower(nn.Module):
        def __init__(self, *, dynamic: bool) -> None:
            super().__init__()
            self._fp8_dynamic_scale = dynamic
            self.register_buffer("_fp8_q_scale", torch.ones(1))
            self.register_buffer("_fp8_q_amax", torch.zeros(16))

    assert names(nn.Sequential(Tower(dynamic=True), Tower(dynamic=False))) == ["1._fp8_q_scale"]


def test_objects_that_are_scratch_are_left_out_whole() -> None:
    class DirectCPWorkspace:
        def __init__(self) -> None:
            self.shared = torch.ones(3)

    class DirectDCPA2AWorkspace(DirectCPWorkspace):
        pass

    model = nn.Linear(1, 1, bias=False)
    model.manager = [DirectDCPA2AWorkspace()]
    assert names(model) == ["weight"]


def test_native_objects_are_seen_in_settings_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Native:
        pass

    monkeypatch.setattr(torch, "ScriptObject", Native)

    class KernelConfig:
        def __init__(self) -> None:
            self.packed, self.size = Native(), 3

    model = nn.Linear(2, 2)
    model.quant_config = KernelConfig()
    assert collect(model, CPU).opaque == ("quant_config.packed (Native)",)


def test_a_layer_that_is_left_out_is_not_looked_for_behind_its_placeholder() -> None:
    """As in an embedding model made of a decoder: vLLM keeps the head that nothing uses, without memory."""

    class StageMissingLayer(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.__dict__["module"] = module

    model = nn.Sequential(nn.Linear(2, 2), StageMissingLayer(nn.Linear(2, 2, device="meta")))
    assert [entry.name for entry in collect(model, CPU).entries] == ["0.weight", "0.bias"]
    model.append(nn.Sequential(nn.Linear(2, 2, device="meta")))
    with pytest.raises(ForkError, match=r"2\.0\.weight has no memory"):
        collect(model, CPU)


def test_names_are_the_same_in_another_process_with_another_hash_seed() -> None:
    code = (
        "from tests.unit.test_tensors import Hiding, names, state_of\nprint(names(Hiding()), list(state_of(Hiding())))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_tied_weights_and_views_share_one_span() -> None:
    found = collect(Tied(), CPU)
    spans = {entry.name: (entry.span, entry.offset) for entry in found.entries}
    assert spans == {"part": (0, 16), "embed.weight": (0, 0), "head.weight": (0, 0)}
    assert found.nbytes == 6 * 4 * 4
    validate_manifest(found.manifest(HEADER))


def test_alias_structure_is_part_of_the_identity() -> None:
    tied, untied = collect(Tied(), CPU).manifest(HEADER), collect(Tied(tie=False), CPU).manifest(HEADER)
    with pytest.raises(ManifestMismatch, match=r"head\.weight: shares memory with"):
        pair(untied, tied)


def test_strided_views_are_copied_as_the_bytes_they_span() -> None:
    model = nn.Module()
    base = torch.arange(24.0).view(4, 6)
    model.slanted = base[:, 1:3].t()
    found = collect(model, CPU)
    assert [(entry.shape, entry.stride) for entry in found.entries] == [((2, 4), (1, 6))]
    assert found.nbytes == (3 * 6 + 2) * 4


def test_zero_size_and_scalar_tensors_are_accounted_for() -> None:
    model = nn.Module()
    model.empty, model.scalar = torch.empty(0, 3), torch.tensor(2.0)
    entries = {entry.name: entry for entry in collect(model, CPU).entries}
    assert entries["empty"].span == -1
    assert entries["empty"].shape == (0, 3)
    assert entries["scalar"].shape == ()
    assert entries["scalar"].span == 0


def test_references_survive_the_replacement_of_parameters() -> None:
    model = nn.Linear(3, 3)
    found = collect(model, CPU)
    before = found.spans[0].data.clone()
    model.weight = nn.Parameter(torch.empty(0))
    model.bias.data = torch.zeros(7)
    assert torch.equal(found.spans[0].data, before)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.empty(3, device="meta"), "no memory"),
        (torch.ones(3, 3).to_sparse(), "strided"),
        (nn.parameter.UninitializedParameter(), "no shape"),
    ],
)
def test_what_cannot_be_accounted_for_is_refused_by_name(tensor: Any, reason: str) -> None:
    model = nn.Module()
    model.layer = nn.Module()
    model.layer.odd = tensor
    with pytest.raises(ForkError, match=rf"layer\.odd.*{reason}"):
        collect(model, CPU)


def test_small_tensors_off_the_device_travel_inside_the_manifest_and_large_ones_are_refused() -> None:
    model = nn.Module()
    model.scale = torch.tensor([1.5, 2.5])
    sent = collect(model, torch.device("cuda"))
    manifest = decode_manifest(encode_manifest(sent.manifest(HEADER)))
    assert manifest.nbytes == 0
    receiver = nn.Module()
    receiver.scale = torch.zeros(2)
    apply_inline(collect(receiver, torch.device("cuda")), manifest)
    assert receiver.scale.tolist() == [1.5, 2.5]
    model.scale = torch.zeros(1_000_000)
    with pytest.raises(ForkError, match=r"scale.*cannot reach"):
        collect(model, torch.device("cuda"))


def test_state_that_loading_set_is_carried_and_set() -> None:
    seed, receiver = Hiding(), Hiding()
    before = state_of(seed)
    seed.flag = False
    seed.impl.scale = 0.25
    seed.has_own_lm_head = True
    seed.ratio = float("nan")
    changed = changed_state(before, state_of(seed))
    assert set(changed) == {"flag", "impl.scale", "has_own_lm_head", "ratio"}
    apply_state(receiver, changed)
    assert (receiver.flag, receiver.impl.scale, receiver.has_own_lm_head) == (False, 0.25, True)


@pytest.mark.parametrize("name", ["nowhere.flag", "listed[7].flag"])
def test_state_that_has_no_place_is_refused(name: str) -> None:
    with pytest.raises(ForkError, match="no place"):
        apply_state(Hiding(), {name: True})


def test_differences_are_reported_together() -> None:
    one, other = nn.Module(), nn.Module()
    one.a, one.b, one.only_here = torch.ones(2), torch.ones(3), torch.ones(1)
    other.a, other.b, other.only_there = torch.ones(2, dtype=torch.float16), torch.ones(4), torch.ones(1)
    with pytest.raises(ManifestMismatch) as caught:
        pair(collect(one, CPU).manifest(HEADER), collect(other, CPU).manifest(HEADER))
    text = str(caught.value)
    for part in (
        "a: dtype float16 on the seed, float32",
        "b: shape [4]",
        "only_here: only the rec",
        "only_there: only the se",
    ):
        assert part in text


def test_numbers_that_move_between_devices_are_not_weights() -> None:
    """On CUDA, vLLM before 0.30 made them anew on the host in each weight update; no seed came back after one."""
    attention = nn.Module()
    for name in ("q_range", "k_range", "v_range"):
        setattr(attention, name, torch.tensor(200.0))
    attention.weight = nn.Parameter(torch.ones(3))
    assert [entry.name for entry in collect(attention, CPU).entries] == ["weight"]


def test_tokenizers_that_models_keep_are_no_part_of_them() -> None:
    """Those of transformers hang all of their vocabulary on themselves, and vLLM's classes hide whose they are."""
    base = type("PreTrainedTokenizerBase", (), {})
    tokenizer = type("CachedTokenizer", (base,), {"__module__": "vllm.tokenizers.hf"})()
    tokenizer._vocab = {f"token {number}": number for number in range(1000)}
    tokenizer.padding_side = "left"
    model = nn.Linear(2, 2)
    model._tokenizer = tokenizer
    assert [leaf.name for leaf in traversal.walk(model, VLLM_RULES) if "tokenizer" in leaf.name] == []
    assert not any(
        "tokenizer" in name for name in build_signature(model, state_of(model), kernels=True, rules=VLLM_RULES)
    )


class Colour(enum.Enum):
    RED = 1


class Keeping(dict[str, Any]):
    pass


class Private:
    __slots__ = iter(["__own"])  # type: ignore[assignment]  # used up when the class has been made

    def __init__(self) -> None:
        self.__own = torch.ones(3)


def test_what_hangs_on_containers_and_private_slots_is_found() -> None:
    model = nn.Module()
    model.table = Keeping(a=torch.ones(1))
    model.table.beside = torch.ones(2)
    model.private = Private()
    short_lived = Keeping()
    model.gone = weakref.proxy(short_lived)
    del short_lived
    assert sorted(entry.shape for entry in collect(model, CPU).entries) == [(1,), (2,), (3,)]


def test_keys_are_called_the_same_whatever_order_they_came_in() -> None:
    """Two tables whose entries came in another order must not be copied crosswise."""

    def model(*keys: Any) -> nn.Module:
        made = nn.Module()
        made.table = {key: torch.full((2,), float(number)) for number, key in enumerate(keys)}
        return made

    keys = ((1, 0), (0, 1), torch.Size([2, 2]), torch.float16, Colour.RED, ("a", None))
    names = [entry.name for entry in collect(model(*keys), CPU).entries]
    assert len(set(names)) == len(keys)
    assert sorted(names) == sorted(entry.name for entry in collect(model(*reversed(keys)), CPU).entries)
    assert not any("#" in name for name in names)
