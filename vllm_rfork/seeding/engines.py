"""The engines of one seed: the same memory registered with each, all of them offered, and closed together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec

from vllm_rfork.engines.base import TransferEngine
from vllm_rfork.errors import EngineError, ForkError
from vllm_rfork.fork.engine_handle import (
    EngineHangs,
    call_engine,
    call_together,
    close_in_background,
    close_or_quarantine,
)
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.manifest.codec import encode_manifest, engines_obstacle, size_obstacle
from vllm_rfork.manifest.schema import EngineEndpoint, Manifest, Region

logger = worker_logger(__name__)

T = TypeVar("T")


class SeedEngines:
    """Engines that this object owns and closes. One that fails is closed and left out; the others are offered.

    Args:
        opened: open engines, the preferred one first. A worker that forked has registered with some of them.
    """

    def __init__(self, opened: Sequence[TransferEngine]) -> None:
        self._engines = list(opened)
        self._failures: list[EngineError] = []

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the engines that have not failed."""
        return tuple(engine.name for engine in self._engines)

    def register(
        self, regions: Sequence[Region], memory: Any, timeout_s: float, proceed: Callable[[], None] = lambda: None
    ) -> None:
        """Register ``regions`` with every engine.

        Args:
            memory: an object that keeps the regions alive; kept for an engine that cannot be closed.
            timeout_s: bound for each engine, in seconds.
            proceed: called before each engine; what it raises ends the registration.

        Raises:
            ForkError: no engine is left; contains the failures of all.
        """
        for engine in tuple(self._engines):
            proceed()
            self._attempt(engine, memory, timeout_s, partial(_register, engine, regions))
        self._require_one()

    def offer(self, manifest: Manifest, memory: Any, timeout_s: float) -> Manifest:
        """``manifest`` with the endpoints of all engines. That of ``manifest.engine`` remains first, if it is offered.

        An endpoint with which receivers would refuse the manifest is left out.

        Raises:
            ForkError: no engine is left; contains the failures of all.
        """
        offered: list[EngineEndpoint] = []
        for engine in sorted(self._engines, key=lambda each: each.name != manifest.engine):
            text = self._attempt(engine, memory, timeout_s, partial(_endpoint, engine))
            if text is None:
                continue
            endpoints = [*offered, EngineEndpoint(engine.name, text)]
            possible = _with_endpoints(manifest, endpoints)
            obstacle = engines_obstacle(possible) or size_obstacle(encode_manifest(possible))
            if obstacle is None:
                offered = endpoints
            else:
                problem = f"with its endpoint of {len(text)} characters, the manifest {obstacle}"
                self._leave_out(engine, EngineError(engine.name, "register", problem), memory)
        self._require_one()
        return _with_endpoints(manifest, offered)

    def log_failures(self) -> None:
        """Log the engines that are left out, each once."""
        failures, self._failures = self._failures, []
        for failure in failures:
            logger.info("engine %s is not offered to receivers: %s", failure.engine, failure)

    def close(self, memory: Any, timeout_s: float) -> None:
        """Close all engines at the same time, and wait for them up to ``timeout_s`` seconds.

        ``memory`` is kept until each of them has released it, or until the process ends if one cannot.
        """
        engines, self._engines = self._engines, []
        call_together([partial(close_or_quarantine, engine, memory) for engine in engines], timeout_s)

    def _attempt(self, engine: TransferEngine, memory: Any, timeout_s: float, call: Callable[[], T]) -> T | None:
        """The result of ``call``, or None after it failed and the engine was left out."""
        try:
            return call_engine(engine, "register", timeout_s, call)
        except EngineError as error:
            self._leave_out(engine, error, memory)
            return None

    def _leave_out(self, engine: TransferEngine, error: EngineError, memory: Any) -> None:
        self._engines.remove(engine)
        self._failures.append(error)
        if isinstance(error, EngineHangs):
            close_in_background(engine, memory)
        else:
            close_or_quarantine(engine, memory)

    def _require_one(self) -> None:
        if self._engines:
            return
        if len(self._failures) == 1:
            raise self._failures[0]
        raise ForkError(f"no engine can be offered: {'; '.join(map(str, self._failures))}", side="receiver")


def _register(engine: TransferEngine, regions: Sequence[Region]) -> None:
    if not engine.registered_nbytes:  # a worker that forked has registered already, to be written to
        engine.register(regions)


def _endpoint(engine: TransferEngine) -> str:
    text = engine.endpoint
    text.encode()  # fails on what no receiver could be sent
    return text


def _with_endpoints(manifest: Manifest, endpoints: Sequence[EngineEndpoint]) -> Manifest:
    first, *others = endpoints
    return msgspec.structs.replace(manifest, engine=first.engine, endpoint=first.endpoint, more_endpoints=tuple(others))
