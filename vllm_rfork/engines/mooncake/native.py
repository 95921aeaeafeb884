"""The native engine: its import, its calls with deadlines, and its end. The only module that calls Mooncake.

A call that is given up goes on in its thread until Mooncake's own bound (``MC_TRANSFER_TIMEOUT``, 30 s, and
``MC_TCP_PROGRESS_TIMEOUT_SEC``), and may write meanwhile. Mooncake has no call that closes an engine: its destructor
does, when nothing refers to the object any more. The destructor holds Python's GIL, for up to a second.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import mmap
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_rfork.engines.mooncake import ascend
from vllm_rfork.engines.mooncake.endpoint import NAME
from vllm_rfork.engines.mooncake.wheels import hint_for, installed
from vllm_rfork.errors import EngineError, EngineUnavailable
from vllm_rfork.threads.deadline import start_on_thread

MODULE = "mooncake.engine"
#: Peers find each other by their addresses; no metadata service takes part.
_HANDSHAKE = "P2PHANDSHAKE"
#: How often a wait looks whether the engine is closing, in seconds.
_LOOK_S = 0.05
#: Attributes of the module that are true if the wheel copies memory of torch's device type ``cuda``.
_CUDA_FLAGS = ("SUPPORT_CUDA", "SUPPORT_HIP", "SUPPORT_MUSA")
#: What a library is missing for, by a part of its name, and what to do.
_LIBRARIES = {
    "libibverbs": "on Debian and Ubuntu, apt-get install libibverbs1",
    "libmlx5": "on Debian and Ubuntu, apt-get install ibverbs-providers",
    "libnuma": "on Debian and Ubuntu, apt-get install libnuma1",
    "libcurl": "on Debian and Ubuntu, apt-get install libcurl4",
}


def load_engine_class(device_type: str) -> Callable[[], Any]:
    """Mooncake's ``TransferEngine``, from a wheel that copies memory of ``device_type``.

    Raises:
        EngineUnavailable: no wheel is installed, it is another device's, or a library that it needs is missing; the
            text names the wheel to install.
    """
    try:
        module = importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        text = "Mooncake is not installed"
        if error.name not in (MODULE, MODULE.partition(".")[0]):
            text = f"{MODULE} needs {error.name}"
        raise EngineUnavailable(NAME, text, hint=hint_for(device_type)) from error
    except (ImportError, OSError) as error:
        text = str(error)
        advice = [how for library, how in _LIBRARIES.items() if library in text]
        hint = advice[0] if advice else hint_for(device_type)
        raise EngineUnavailable(NAME, f"{_installed()} cannot be loaded: {text}", hint=hint) from error
    if device_type == "cuda" and not any(getattr(module, flag, False) for flag in _CUDA_FLAGS):
        problem = f"{_installed()} does not copy memory of GPUs"
        raise EngineUnavailable(NAME, problem, hint=hint_for(device_type))
    engine_class: Callable[[], Any] = module.TransferEngine
    return engine_class


def _installed() -> str:
    """The installed wheels, for messages."""
    return " and ".join(f"{name} {version}" for name, version in installed().items()) or MODULE


@dataclass
class Bound:
    """The end of a wait: ``deadline`` of ``time.monotonic``, or ``stopped`` returns True."""

    deadline: float
    stopped: Callable[[], bool]


class NativeEngine:
    """The only reference to Mooncake's object, outside the threads of its calls.

    An exception keeps the local variables of the frames that it passed, so no frame has the object in one.

    Args:
        page: memory of the adapter's own that the engine may write to; kept as long as the object.

    Raises:
        EngineError: its constructor fails.
    """

    def __init__(self, engine_class: Callable[[], Any], device: str, page: mmap.mmap) -> None:
        self._page = page
        self._device = device
        self._calls: list[concurrent.futures.Future[Any]] = []
        self._engine: Any = None
        self._engine = _translated("open", engine_class)
        self._living = weakref.ref(self._engine)

    def initialize(self, host: str, protocol: str, bound: Bound) -> int:
        """Start the engine; returns the port of its handshakes."""
        code = self.call("open", "initialize", host, _HANDSHAKE, protocol, "", bound=bound)
        if code != 0:
            raise EngineError(NAME, "open", f"Mooncake does not start on {host} over {protocol}", code=str(code))
        return int(self.call("open", "get_rpc_port", bound=bound))

    def call(self, operation: str, method: str, *arguments: Any, bound: Bound) -> Any:
        """The result of ``method``, called on a thread of its own.

        Raises:
            EngineError: it raised; or it did not return within ``bound``, then with ``in_flight`` if it may still
                write to registered memory.
        """
        self._calls = [each for each in self._calls if not each.done()]

        def call() -> Any:
            ascend.use_device(self._device)
            return _translated(operation, lambda: getattr(self._engine, method)(*arguments))

        future = start_on_thread(call, f"rfork-{NAME}-{operation}")
        self._calls.append(future)
        while not future.done():
            left_s = bound.deadline - time.monotonic()
            if bound.stopped() or left_s <= 0:
                raise EngineError(
                    NAME,
                    operation,
                    "the engine is closing" if bound.stopped() else "the call did not return in time",
                    code="timeout",
                    in_flight=operation in ("register", "read"),
                    retry_elsewhere=True,
                    side="unknown" if operation in ("connect", "read") and not bound.stopped() else "receiver",
                )
            concurrent.futures.wait([future], min(left_s, _LOOK_S))
        return future.result()

    def destroy(self, timeout_s: float) -> bool:
        """End the engine and every read in it. May be called again.

        Returns:
            False if a call still runs after ``timeout_s`` seconds: the engine ends with it, on its thread.
        """
        concurrent.futures.wait(self._calls, timeout_s)
        self._calls = [each for each in self._calls if not each.done()]
        self._engine = None
        return self._living() is None


def _translated(operation: str, function: Callable[[], Any]) -> Any:
    """Call ``function``; unconvertible arguments and C++ exceptions become :class:`EngineError`."""
    try:
        return function()
    except (TypeError, ValueError, OverflowError, RuntimeError, MemoryError, OSError) as error:
        raise EngineError(
            NAME,
            operation,
            f"{type(error).__name__}: {error}",
            in_flight=operation == "read",
            side="unknown" if operation in ("connect", "read") else "receiver",
        ) from error
