"""One NIXL agent, and the translation of NIXL's errors. The only module that calls NIXL.

It uses the bindings instead of NIXL's Python wrapper, which hard-codes a progress thread that polls without pause (0.93
of a core for each idle agent). ``pthrDelay`` is the time that this thread may wait for an event; events wake it at
once. Without the thread an agent does not answer the first read, so it always runs.
"""

from __future__ import annotations

import importlib
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vllm_rfork.engines.nixl.pace import Pace
from vllm_rfork.engines.nixl.peer import NAME
from vllm_rfork.engines.registry import install_hint
from vllm_rfork.errors import EngineError, EngineUnavailable, Side

#: Tried in this order. ``nixl`` is a thin package over one of the other two.
MODULES = ("nixl_cu13", "nixl_cu12", "nixl")
#: How long the progress thread waits for an event, in microseconds. With 100 ms an idle agent takes 0.05 % of a core;
#: throughput is the same as with 1 ms, because events wake the thread.
PROGRESS_WAIT_US = 100_000
#: The code of the error for a peer that is gone or that UCX has no lane to.
LOST = "nixlRemoteDisconnectError"

Descriptor = tuple[int, int, int]
"""Address, bytes, device number."""


def load_bindings() -> Any:
    """NIXL's native module.

    Raises:
        EngineUnavailable: no NIXL package is installed, or a library that it needs is missing.
    """
    for name in MODULES:
        try:
            return importlib.import_module(f"{name}._bindings")
        except ModuleNotFoundError as error:
            # Try the next package only if this one is missing; NIXL without its numpy is a broken installation.
            if error.name not in {name, f"{name}._bindings"}:
                raise EngineUnavailable(NAME, f"{name} needs {error.name}", hint=install_hint(NAME)) from error
        except ImportError as error:
            raise EngineUnavailable(NAME, f"{name} cannot be loaded: {error}", hint=install_hint(NAME)) from error
    raise EngineUnavailable(NAME, "NIXL is not installed", hint=install_hint(NAME))


def preload() -> None:
    """Load the bindings, UCX and NIXL's plugin for it; a UCX context, which looks at devices, is not created.

    This is most of the time that the first agent of a process takes.

    Raises:
        EngineError: something is missing or does not work.
    """
    native = load_bindings()
    config = native.nixlAgentConfig()
    config.useProgThread = False
    try:
        native.nixlAgent("rfork-preload", config).getPluginParams("UCX")
    except native_errors(native) as error:
        raise EngineError(NAME, "open", _text(error), code=type(error).__name__, side="receiver") from error


def native_errors(bindings: Any) -> tuple[type[BaseException], ...]:
    """Every exception that the bindings raise: NIXL's own, and translated C++ exceptions."""
    own = [value for value in vars(bindings).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*own, RuntimeError, ValueError, TypeError, IndexError, OverflowError, MemoryError, OSError)


@dataclass
class Bound:
    """The end of a wait: ``deadline`` of ``time.monotonic``, or ``stopped`` returns True.

    Attributes:
        posted: a request has been started under this bound, so the peer's connection may be broken after an error.
    """

    deadline: float
    stopped: Callable[[], bool]
    posted: bool = False

    def exceeded(self) -> str | None:
        """The reason to stop waiting; None to go on."""
        if self.stopped():
            return "the engine is closing"
        return "the peer did not deliver in time" if time.monotonic() >= self.deadline else None


class Agent:
    """An agent with its UCX backend. Methods raise :class:`EngineError`.

    One caller at a time, except for requests: each worker thread may run one.

    Args:
        name: unique among all agents that ever meet.
        memory: ``DRAM`` or ``VRAM``, the default kind of :meth:`register` and :meth:`prepare`.
        workers: number of threads that may read at once, each through a UCX worker of its own.
        emulation: permit UCX to read over transports without remote memory access (TCP).
    """

    def __init__(self, name: str, memory: str, *, emulation: bool, workers: int = 1) -> None:
        self._native = load_bindings()
        self._errors = native_errors(self._native)
        self._memory = memory
        with self.translated("open"):
            config = self._native.nixlAgentConfig()
            config.useProgThread = True
            config.useListenThread = False
            config.pthrDelay = PROGRESS_WAIT_US
            # Reads run in one thread while another asks for metadata.
            config.syncMode = self._native.NIXL_THREAD_SYNC_RW
            self._agent = self._native.nixlAgent(name, config)
            if "UCX" not in self._agent.getAvailPlugins():
                raise EngineUnavailable(NAME, "this NIXL has no UCX plugin", hint=install_hint(NAME))
            # A UCX setting through NIXL's parameter, not through the environment: other users of UCX in the process
            # keep theirs, and a UCX_PROTO_EMULATION_ENABLE that the user set wins.
            self._agent.createBackend(
                "UCX",
                {"engine_config": f"PROTO_EMULATION_ENABLE={'y' if emulation else 'n'}", "num_workers": str(workers)},
            )

    @contextmanager
    def translated(self, operation: str, **facts: bool) -> Iterator[None]:
        """Turn native errors into :class:`EngineError` of ``operation``."""
        try:
            yield
        except self._errors as error:
            lost = type(error).__name__ == LOST
            facts = {"retry_elsewhere": lost, **facts}
            side = _side(operation, error)
            raise EngineError(NAME, operation, _text(error), code=type(error).__name__, side=side, **facts) from error

    def _kind(self, memory: str) -> Any:
        return self._native.VRAM_SEG if (memory or self._memory) == "VRAM" else self._native.DRAM_SEG

    def _registration(self, regions: Sequence[Descriptor], memory: str) -> Any:
        return self._native.nixlRegDList(self._kind(memory), [(*region, "") for region in regions])

    def register(self, regions: Sequence[Descriptor], memory: str = "") -> None:
        """Register ``regions``: all of them or none."""
        with self.translated("register"):
            self._agent.registerMem(self._registration(regions, memory), [])

    def metadata(self) -> bytes:
        """The address and registrations of this agent, for peers."""
        with self.translated("register"):
            return bytes(self._agent.getLocalMD())

    def add_peer(self, metadata: bytes) -> str:
        """Load a peer's metadata; returns the peer's name."""
        with self.translated("connect"):
            name = self._agent.loadRemoteMD(metadata)
            return str(name.decode() if isinstance(name, bytes) else name)

    def drop_peer(self, name: str, operation: str) -> None:
        """Forget a peer."""
        with self.translated(operation):
            self._agent.invalidateRemoteMD(name)

    def prepare(
        self,
        peer: str,
        local: Sequence[Descriptor],
        remote: Sequence[Descriptor],
        *,
        operation: str = "read",
        memory: str = "",
    ) -> int:
        """A request to copy ``remote`` to ``local``, descriptor by descriptor; it is not started.

        NIXL checks here that registrations contain every descriptor, and binds the request to the worker of the calling
        thread.
        """
        kind = self._kind(memory)
        # The engine has checked its own side of a read: what is wrong is the seed's, and others may be right.
        facts = {"retry_elsewhere": True} if operation == "read" else {}
        with self.translated(operation, **facts):
            return int(
                self._agent.createXferReq(
                    self._native.NIXL_READ,
                    self._native.nixlXferDList(kind, list(local)),
                    self._native.nixlXferDList(kind, list(remote)),
                    peer,
                    "",
                    [],
                )
            )

    def complete(
        self,
        request: int,
        bound: Bound,
        *,
        operation: str = "read",
        quiet_on_error: bool,
        nbytes: int = 0,
        pace: Pace | None = None,
    ) -> None:
        """Start ``request``, wait for all bytes, and release it.

        Args:
            quiet_on_error: on this lane, no byte of a failed read arrives later.
            nbytes, pace: the length of the request, and what is known about the peer's speed.

        Raises:
            EngineError: ``in_flight`` if bytes may still arrive. The request is then not released, because that
                would not stop them.
        """
        with self.translated(operation, in_flight=not quiet_on_error):
            bound.posted = True
            pace = pace or Pace()
            began = time.monotonic()
            state = self._agent.postXferReq(request, "")
            while state == self._native.NIXL_IN_PROG:
                gave_up = bound.exceeded()
                if gave_up:
                    raise EngineError(
                        NAME,
                        operation,
                        gave_up,
                        code="timeout",
                        in_flight=True,
                        retry_elsewhere=True,
                        side="receiver" if bound.stopped() else "unknown",
                    )
                time.sleep(pace.pause_s(nbytes, time.monotonic() - began))
                state = self._agent.getXferStatus(request)
            pace.learn(nbytes, time.monotonic() - began)
        self.release(request, operation)

    def release(self, request: int, operation: str = "read") -> None:
        """Release a request that is done or was never started."""
        with self.translated(operation):
            self._agent.releaseXferReq(request)

    def destroy(self) -> bool:
        """End the agent and every read in it, on this thread; returns False if something still refers to it."""
        gone = weakref.ref(self._agent)
        self._agent = None
        return gone() is None


def _side(operation: str, error: BaseException) -> Side:
    """The side that failed. NIXL does not report it, except for memory or arguments of this process."""
    if operation not in ("connect", "read") or isinstance(error, MemoryError):
        return "receiver"
    return "unknown"


def _text(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    if type(error).__name__ == LOST:
        return f"the peer is gone or cannot be reached ({text})"
    return text
