"""The memory engines of this process that are open now: what a test looks at for leaks."""

from __future__ import annotations

import weakref

from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.memory import MemoryEngine

_opened: weakref.WeakSet[MemoryEngine] = weakref.WeakSet()
_open = MemoryEngine.open


def _record(engine: MemoryEngine, config: EngineConfig) -> None:
    _open(engine, config)
    _opened.add(engine)


MemoryEngine.open = _record  # type: ignore[method-assign]


def open_engines() -> list[MemoryEngine]:
    return [engine for engine in _opened if engine._identity]
