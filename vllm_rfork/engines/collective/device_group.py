"""Groups of two over NCCL and over HCCL, for device memory: a communicator and a stream of their own for each receiver.

The libraries differ in their calls, not in their use: communicators are created with an identity that the first member
makes, transfers are queued on a stream, and an abort ends what was queued.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from vllm_rfork.engines.collective.channel import Channel
from vllm_rfork.engines.collective.group import RECEIVER, SEED, STALL_S, Group, GroupFailed
from vllm_rfork.engines.collective.messages import Share, receive, send
from vllm_rfork.engines.collective.plan import Piece, parts
from vllm_rfork.threads.deadline import DeadlineExceeded, call_with_deadline

#: Between two looks at the device, in seconds.
_PAUSE_S = 0.0002
#: Bound of an abort, and of the kernels' end after it, in seconds.
_ABORT_S = 10.0


class Library(Protocol):
    """NCCL or HCCL. Every call may raise GroupFailed."""

    @property
    def id_nbytes(self) -> int:
        """Length of a group's identity."""

    def unique_id(self) -> bytes:
        """The identity of a new group."""

    def communicator(self, unique: bytes, rank: int, deadline: float) -> Any:
        """A communicator of two, which may still be in creation."""

    def is_ready(self, communicator: Any) -> bool:
        """Return True if the communicator's last call has done its work."""

    def queue(self, *, sends: bool, pieces: Sequence[Piece], peer: int, communicator: Any, stream: Any) -> None:
        """Queue transfers to or from the peer."""

    def abort(self, communicator: Any, stream: Any) -> None:
        """End what is queued, and destroy the communicator."""


class Device(Protocol):
    """The device of the memory. Every call may raise GroupFailed."""

    def current(self) -> AbstractContextManager[None]:
        """Make the device this thread's for the block."""

    def new_stream(self) -> Any:
        """A stream of its own, of the lowest priority that there is."""

    def is_idle(self, stream: Any) -> bool:
        """Return True if the stream has nothing to do."""

    def destroy_stream(self, stream: Any) -> None:
        """Destroy a stream that is idle."""


def create(library: Library, device: Device, rank: int, channel: Channel, deadline: float) -> DeviceGroup:
    """Create this side of a group: the receiver makes the group's identity, and the seed joins it.

    Raises:
        GroupFailed, Lost: it cannot be created, or not in time.
    """
    with device.current():
        if rank == RECEIVER:
            unique = library.unique_id()
            send(channel, Share("id", unique), deadline)
        else:
            unique = receive(channel, Share, deadline).value
            if len(unique) != library.id_nbytes:
                raise GroupFailed(f"the peer's identity of the group has {len(unique)} bytes")
        return DeviceGroup(library, device, rank, unique, deadline)


class DeviceGroup(Group):
    """See the module's docstring. All calls of the library come from the thread that uses the group."""

    def __init__(self, library: Library, device: Device, rank: int, unique: bytes, deadline: float) -> None:
        self._library, self._device = library, device
        self._peer = SEED if rank == RECEIVER else RECEIVER
        self._stopped = threading.Event()
        self._stream: Any = device.new_stream()
        self._communicator: Any = None
        try:
            with self._closing_on_failure():
                self._communicator = library.communicator(unique, rank, deadline)
                self._wait(lambda: library.is_ready(self._communicator), deadline)
        except GroupFailed as error:
            error.unfinished = True
            raise

    def send(self, pieces: Sequence[Piece], deadline: float) -> None:
        """Send groups of pieces, one after the other."""
        self._transfer(pieces, deadline, sends=True)

    def receive(self, pieces: Sequence[Piece], deadline: float) -> None:
        """Receive groups of pieces, one after the other."""
        self._transfer(pieces, deadline, sends=False)

    def abort(self) -> None:
        """Let the thread that waits give up."""
        self._stopped.set()

    def close(self) -> None:
        """Abort the communicator, whose kernels then end, and destroy the stream."""
        self._stopped.set()
        if self._stream is None:
            return
        try:
            call_with_deadline(self._destroy, _ABORT_S * 2, "rfork-group-abort")
        except DeadlineExceeded as error:
            raise GroupFailed("the library does not end a group", in_flight=True, late=True) from error
        except RuntimeError as error:  # no thread
            raise GroupFailed(f"a group cannot be ended: {error}", in_flight=True) from error

    # -- inside ------------------------------------------------------------------------------------------------------

    def _transfer(self, pieces: Sequence[Piece], deadline: float, *, sends: bool) -> None:
        with self._device.current(), self._closing_on_failure():
            for together in parts(pieces):
                bound = min(deadline, time.monotonic() + STALL_S)
                self._check()
                self._library.queue(
                    sends=sends, pieces=together, peer=self._peer, communicator=self._communicator, stream=self._stream
                )
                self._wait(lambda: self._library.is_ready(self._communicator), bound)
                self._wait(self._is_done, bound)

    def _is_done(self) -> bool:
        """The kernels have ended. Raises GroupFailed if the peer or the device failed."""
        return self._library.is_ready(self._communicator) and self._device.is_idle(self._stream)

    def _wait(self, done: Callable[[], bool], deadline: float) -> None:
        while not done():
            self._check()
            if time.monotonic() >= deadline:
                raise GroupFailed("the peer made no progress in time", late=True)
            time.sleep(_PAUSE_S)

    def _check(self) -> None:
        if self._stopped.is_set():
            raise GroupFailed("the group was aborted")

    @contextmanager
    def _closing_on_failure(self) -> Iterator[None]:
        """Close the group if the block fails; the failure then says whether its kernels have ended."""
        try:
            yield
        except GroupFailed as error:
            try:
                self.close()
            except GroupFailed as stuck:
                error.in_flight = error.in_flight or stuck.in_flight
            raise

    def _destroy(self) -> None:
        """End the kernels, then drop the stream. Runs on a thread of its own."""
        idle = False
        try:
            with self._device.current():
                communicator, self._communicator = self._communicator, None
                try:
                    if communicator is not None:
                        self._library.abort(communicator, self._stream)
                finally:
                    idle = self._device.is_idle(self._stream)
                deadline = time.monotonic() + _ABORT_S
                while not idle:
                    if time.monotonic() >= deadline:
                        raise GroupFailed("the kernels of a group do not end", late=True)
                    time.sleep(_PAUSE_S)
                    idle = self._device.is_idle(self._stream)
                stream, self._stream = self._stream, None
                self._device.destroy_stream(stream)
        except GroupFailed as error:
            error.in_flight = not idle  # only an idle stream proves that nothing is
            raise
