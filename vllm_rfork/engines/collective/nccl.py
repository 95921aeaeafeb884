"""Groups of two over NCCL, for CUDA memory: a communicator and a stream of their own for each receiver.

NCCL's kernels run on the seed's GPU. They get a stream of the lowest priority and few thread blocks; torch's own
streams have the same priority, so what limits the effect on inference is the number of blocks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from vllm_rfork.engines.collective.channel import Channel
from vllm_rfork.engines.collective.cuda import Cuda
from vllm_rfork.engines.collective.group import RECEIVER, SEED, STALL_S, Backend, Group, GroupFailed
from vllm_rfork.engines.collective.messages import Share, receive, send
from vllm_rfork.engines.collective.nccl_library import ID_NBYTES, UINT8, Nccl
from vllm_rfork.engines.collective.plan import Piece
from vllm_rfork.manifest.segments import Segment, batches
from vllm_rfork.threads.deadline import DeadlineExceeded, call_with_deadline

#: Thread blocks of a kernel: two H200 transfer more than any network with them, and 128 others stay free.
MAX_CTAS = 4
#: Pieces and bytes of one group of NCCL calls.
_MAX_PIECES = 256
_MAX_NBYTES = 64 * 1024 * 1024
#: Between two looks at the device, in seconds.
_PAUSE_S = 0.0002
#: Bound of an abort, and of the kernels' end after it, in seconds.
_ABORT_S = 10.0


class NcclBackend(Backend):
    """NCCL and the driver on one device.

    Raises:
        ImportError, OSError: NCCL, the driver or torch is missing.
        GroupFailed: there is no such device.
    """

    name: ClassVar[str] = "nccl"
    captures: ClassVar[bool] = True

    def __init__(self, index: int) -> None:
        self._nccl = Nccl()
        self._cuda = Cuda(index)

    def create(self, rank: int, channel: Channel, deadline: float) -> Group:
        """The receiver makes the group's identity, and the seed joins it."""
        with self._cuda.current():
            if rank == RECEIVER:
                unique = self._nccl.unique_id()
                send(channel, Share("id", unique), deadline)
            else:
                unique = receive(channel, Share, deadline).value
                if len(unique) != ID_NBYTES:
                    raise GroupFailed(f"the peer's identity of the group has {len(unique)} bytes")
            return NcclGroup(self._nccl, self._cuda, rank, unique, deadline)

    def close(self) -> None:
        """Release the device's context."""
        self._cuda.release()


class NcclGroup(Group):
    """See the module's docstring. All calls of NCCL come from the thread that uses the group."""

    def __init__(self, nccl: Nccl, cuda: Cuda, rank: int, unique: bytes, deadline: float) -> None:
        self._nccl, self._cuda = nccl, cuda
        self._peer = SEED if rank == RECEIVER else RECEIVER
        self._stopped = threading.Event()
        self._stream: Any = cuda.new_stream()
        self._communicator: Any = None
        with self._closing_on_failure():
            self._communicator = nccl.communicator(unique, rank, MAX_CTAS)
            self._wait(lambda: nccl.is_ready(self._communicator), deadline)

    def send(self, pieces: Sequence[Piece], deadline: float) -> None:
        """Send groups of pieces, one after the other."""
        self._transfer("ncclSend", pieces, deadline)

    def receive(self, pieces: Sequence[Piece], deadline: float) -> None:
        """Receive groups of pieces, one after the other."""
        self._transfer("ncclRecv", pieces, deadline)

    def abort(self) -> None:
        """Let the thread that waits give up."""
        self._stopped.set()

    def close(self) -> None:
        """Abort the communicator, whose kernels then end, and destroy the stream."""
        self._stopped.set()
        if self._stream is None:
            return
        try:
            call_with_deadline(self._destroy, _ABORT_S * 2, "rfork-nccl-abort")
        except DeadlineExceeded as error:
            raise GroupFailed("NCCL does not end a group", in_flight=True, late=True) from error

    # -- inside ------------------------------------------------------------------------------------------------------

    def _transfer(self, name: str, pieces: Sequence[Piece], deadline: float) -> None:
        with self._cuda.current(), self._closing_on_failure():
            segments = (Segment(address, 0, nbytes) for address, nbytes in pieces)
            for together in batches(segments, max_nbytes=_MAX_NBYTES, max_items=_MAX_PIECES):
                bound = min(deadline, time.monotonic() + STALL_S)
                self._check()
                self._nccl.call("ncclGroupStart")
                try:
                    for address, _, nbytes in together:
                        self._nccl.call(name, address, nbytes, UINT8, self._peer, self._communicator, self._stream)
                finally:
                    self._nccl.call("ncclGroupEnd")
                self._wait(lambda: self._nccl.is_ready(self._communicator), bound)
                self._wait(self._is_done, bound)

    def _is_done(self) -> bool:
        """The kernels have ended. Raises GroupFailed if the peer or the device failed."""
        return self._nccl.is_ready(self._communicator) and self._cuda.is_idle(self._stream)

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
                error.in_flight = stuck.in_flight
            raise

    def _destroy(self) -> None:
        """End the kernels, then drop the stream. Runs on a thread of its own."""
        with self._cuda.current():
            communicator, self._communicator = self._communicator, None
            if communicator is not None:
                self._nccl.call("ncclCommAbort", communicator)
            deadline = time.monotonic() + _ABORT_S
            while not self._cuda.is_idle(self._stream):
                if time.monotonic() >= deadline:
                    raise GroupFailed("the kernels of a group do not end", in_flight=True, late=True)
                time.sleep(_PAUSE_S)
            stream, self._stream = self._stream, None
            self._cuda.destroy_stream(stream)
