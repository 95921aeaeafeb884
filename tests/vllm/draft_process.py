"""A whole engine with a target and a draft; where it forks, the draft's fork fails after it has written.

It is one of the zoo's roles, with a fork that is made up: every byte that may be written to is, and then it fails.
"""

from __future__ import annotations

import dataclasses
import hashlib
from multiprocessing.connection import Connection
from typing import Any

from zoo import workers
from zoo.workers import Order, Report


@dataclasses.dataclass
class Seen:
    """What vLLM's process-wide registries held before the draft was loaded, and after it.

    Attributes:
        layers: name of each layer that attends to a cache -> the object's ``id``.
        rotary: rotary table by number -> its ``id`` and a digest of its content.
        strangers: entries of ``layers_after`` that are neither the target's nor of the draft that serves.
        built: how many models were built.
        written: how many spans the draft's fork wrote to.
    """

    layers_before: dict[str, int] = dataclasses.field(default_factory=dict)
    layers_after: dict[str, int] = dataclasses.field(default_factory=dict)
    rotary_before: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    rotary_after: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    strangers: list[str] = dataclasses.field(default_factory=list)
    built: int = 0
    written: int = 0


class _With:
    """The connection that a role reports over, with what else was seen."""

    def __init__(self, connection: Connection, seen: Seen) -> None:
        self._connection, self._seen = connection, seen

    def send(self, report: Report) -> None:
        self._connection.send((report, self._seen))

    def recv(self) -> Any:
        return self._connection.recv()


def play(order: Order, connection: Connection) -> None:
    """Follow ``order`` as the zoo does; send its report and :class:`Seen`."""
    seen = Seen()
    _look(seen)
    _fail_drafts(seen)
    workers.play(order, _With(connection, seen))  # type: ignore[arg-type]


def _look(seen: Seen) -> None:
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    from vllm_rfork.loader import RForkModelLoader

    load, create = RForkModelLoader.load_model, BaseModelLoader.create_model

    def loading(self: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
        layers = vllm_config.compilation_config.static_forward_context
        seen.layers_before, seen.rotary_before = _ids(layers), _tables()
        target = set(seen.layers_before.values())
        model = load(self, vllm_config, model_config, prefix)
        seen.layers_after, seen.rotary_after = _ids(layers), _tables()
        ours = {id(module) for module in model.modules()} | target
        seen.strangers = [name for name, number in seen.layers_after.items() if number not in ours]
        return model

    def creating(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.built += 1
        return create(self, *args, **kwargs)

    RForkModelLoader.load_model = loading  # type: ignore[method-assign]
    BaseModelLoader.create_model = creating


def _ids(layers: dict[str, Any]) -> dict[str, int]:
    return {name: id(layer) for name, layer in layers.items()}


def _tables() -> dict[str, tuple[int, str]]:
    import torch
    from vllm.model_executor.layers import rotary_embedding

    return {
        str(number): (
            id(module),
            hashlib.sha256(module.cos_sin_cache.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(),
        )
        for number, module in enumerate(rotary_embedding._ROPE_DICT.values())
    }


def _fail_drafts(seen: Seen) -> None:
    """There is no seed for a target; a draft's is found, and breaks off when it has been read."""
    from vllm_rfork.errors import ForkError, NoSeedAvailable
    from vllm_rfork.fork.session import ForkSession

    def reserve(self: Any, fingerprint: str) -> None:
        if not self.seed_key.endswith("$draft"):
            raise NoSeedAvailable("no seed for a target")

    def run(self: Any, target: Any) -> Any:
        self.has_written = True  # as the session records it before the first read
        for span in target.memory.spans:
            if span.address not in target.untouched:
                span.data.fill_(0x55)
                seen.written += 1
        raise ForkError("the seed died")

    ForkSession.reserve, ForkSession.run = reserve, run  # type: ignore[method-assign]
