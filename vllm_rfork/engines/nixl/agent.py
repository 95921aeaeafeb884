"""One NIXL agent: the only file that touches NIXL, and the place where its errors become ours.

It speaks to the bindings and not to NIXL's Python wrapper, which hard-codes a progress thread that polls without pause
(0.93 of a core for each idle agent); ``pthrDelay`` is the time that thread may wait for an event, and events wake it at
once. An agent without the thread answers no first read, so there always is one.
"""

from __future__ import annotations

import importlib
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vllm_rfork.engines.nixl.peer import NAME
from vllm_rfork.engines.registry import install_hint
from vllm_rfork.errors import EngineError, EngineUnavailable, Side

#: Tried in this order. ``nixl`` is a thin package over one of the other two.
MODULES = ("nixl_cu13", "nixl_cu12", "nixl")
#: How long the progress thread waits for an event, in microseconds. 100 ms: an idle agent takes 0.05 % of a core, and
#: throughput is that of 1 ms, since events wake the thread.
PROGRESS_WAIT_US = 100_000
#: The code of the error that says: the peer is gone, or UCX has no lane to it.
LOST = "nixlRemoteDisconnectError"
_FIRST_PAUSE_S = 0.00005
_LONGEST_PAUSE_S = 0.002

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
            # Only the absence of that package means "try the next"; NIXL without its numpy is a broken install.
            if error.name not in {name, f"{name}._bindings"}:
                raise EngineUnavailable(NAME, f"{name} needs {error.name}", hint=install_hint(NAME)) from error
        except ImportError as error:
            raise EngineUnavailable(NAME, f"{name} cannot be loaded: {error}", hint=install_hint(NAME)) from error
    raise EngineUnavailable(NAME, "NIXL is not installed", hint=install_hint(NAME))


def native_errors(bindings: Any) -> tuple[type[BaseException], ...]:
    """Every exception that the bindings raise: NIXL's own, and what C++ exceptions become."""
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

    def exceeded(self) -> str:
        """Why to wait no longer; empty where waiting goes on."""
        if self.stopped():
            return "the engine is closing"
        return "the peer did not deliver in time" if time.monotonic() >= self.deadline else ""


class Agent:
    """An agent with its UCX backend. Methods raise :class:`EngineError`. One caller at a time, but for
    requests, of which each worker thread may run one.

    Args:
        name: unique among all agents that ever meet.
        memory: ``DRAM`` or ``VRAM``, the kind that :meth:`register` and :meth:`prepare` mean by default.
        workers: how many threads may read at once, each through a UCX worker of its own.
        emulation: let UCX carry reads over transports without remote memory access (TCP).
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
        """Make ``regions`` known; all or none."""
        with self.translated("register"):
            self._agent.registerMem(self._registration(regions, memory), [])

    def metadata(self) -> bytes:
        """How a peer reaches the agent and what it has registered."""
        with self.translated("register"):
            return bytes(self._agent.getLocalMD())

    def add_peer(self, metadata: bytes) -> str:
        """Take a peer's metadata; returns its name."""
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
        """A request to copy ``remote`` to ``local``, descriptor by descriptor; nothing moves yet.

        NIXL checks here that every descriptor lies in a registration, and binds the request to the calling thread's
        worker.
        """
        kind = self._kind(memory)
        with self.translated(operation):
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

    def complete(self, request: int, bound: Bound, *, operation: str = "read", quiet_on_error: bool) -> None:
        """Start ``request``, return when all is there, and release it.

        Args:
            quiet_on_error: a lane on which nothing of a failed read is under way any more.

        Raises:
            EngineError: ``in_flight`` where bytes may still arrive; the request is then kept, not released, since
                a released request's bytes arrive all the same.
        """
        with self.translated(operation, in_flight=not quiet_on_error):
            bound.posted = True
            state = self._agent.postXferReq(request, "")
            pause_s = _FIRST_PAUSE_S
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
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
                state = self._agent.getXferStatus(request)
        self.release(request, operation)

    def release(self, request: int, operation: str = "read") -> None:
        """Forget a request that is done or was never started."""
        with self.translated(operation):
            self._agent.releaseXferReq(request)

    def destroy(self) -> bool:
        """End the agent and every read in it; True when it is gone. Its destructor runs here, in this thread."""
        gone = weakref.ref(self._agent)
        self._agent = None
        return gone() is None


def _side(operation: str, error: BaseException) -> Side:
    """NIXL does not say which end failed, except where memory or arguments of this process are the reason."""
    if operation not in ("connect", "read") or isinstance(error, MemoryError):
        return "receiver"
    return "unknown"


def _text(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    if type(error).__name__ == LOST:
        return f"the peer is gone or cannot be reached ({text})"
    return text
