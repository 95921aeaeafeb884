"""What goes wrong on purpose in these tests."""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import pytest

from vllm_rfork.engines.memory import MemoryEngine
from vllm_rfork.model.relocation import PublishedSnapshot


def raising(error: BaseException) -> Any:
    """A callable that raises ``error``, whatever it is given."""

    def raises(*args: Any, **kwargs: Any) -> Any:
        raise error

    return raises


def held_up_recheck(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Seeds stop in the check of their bytes, which sets the first event, and go on once the second is set."""
    checking, go_on = threading.Event(), threading.Event()
    recheck = PublishedSnapshot.recheck

    def slowly(tensors: PublishedSnapshot) -> None:
        checking.set()
        assert go_on.wait(60)
        recheck(tensors)

    monkeypatch.setattr(PublishedSnapshot, "recheck", slowly)
    return checking, go_on


def scrambled(read: Any) -> Any:
    """``MemoryEngine.read`` that reports success and has written other bytes than the seed's."""

    def scrambling(self: MemoryEngine, endpoint: str, segments: Any, timeout_s: float) -> None:
        read(self, endpoint, segments, timeout_s)
        for segment in segments:
            ctypes.memset(segment.local, 0x55, segment.nbytes)

    return scrambling


def with_attribute(init: Any, name: str, value: Any) -> Any:
    """A constructor that leaves one more attribute; vLLM looks at its signature, which stays."""

    @functools.wraps(init)
    def initialised(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        setattr(self, name, value)

    return initialised
