"""Reads of one batch by two threads.

Cross-memory attach copies on the calling thread. The kernel's first touch of the receiver's fresh pages also happens
there, and costs more than the copy. Two threads nearly halve both on two cores. NIXL binds a request to the worker of
the thread that prepares it, so the threads live as long as the reader and each keeps its worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from vllm_rfork.engines.nixl.agent import Agent, Bound
from vllm_rfork.engines.nixl.pace import Pace
from vllm_rfork.engines.process_memory import touch
from vllm_rfork.errors import EngineError
from vllm_rfork.manifest.segments import Segment

THREADS = 2
#: For fewer bytes, starting the other thread costs more than it saves.
SPLIT_NBYTES = 4 * 1024 * 1024
_PAGE = 4096


def halves(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """``segments`` split into two parts of about equal length, in order, at a multiple of the page size."""
    total = sum(segment.nbytes for segment in segments)
    room = total // 2 // _PAGE * _PAGE
    first: list[Segment] = []
    rest: list[Segment] = []
    for local, remote, nbytes in segments:
        take = min(nbytes, room)
        if take:
            first.append(Segment(local, remote, take))
        if take < nbytes:
            rest.append(Segment(local + take, remote + take, nbytes - take))
        room -= take
    yield first
    yield rest


def runs(segments: Sequence[Segment]) -> Iterator[tuple[int, int]]:
    """Local address and length of each contiguous stretch of memory in ``segments``, in their order."""
    start = end = 0
    for local, _, nbytes in segments:
        if local != end:
            if end > start:
                yield start, end - start
            start = local
        end = local + nbytes
    if end > start:
        yield start, end - start


class Reader:
    """Reads batches through ``agent``, which has :data:`THREADS` workers.

    Args:
        device: number of the local device in NIXL's terms.
    """

    def __init__(self, agent: Agent, device: int) -> None:
        self._agent = agent
        self._device = device
        # One thread to an executor: a pool of two would give a request to whichever thread is free.
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=f"rfork-nixl-{n}") for n in range(THREADS)]

    def read(
        self, peer: str, device: int, segments: Sequence[Segment], bound: Bound, pace: Pace, *, attach: bool
    ) -> None:
        """Copy ``segments`` from ``peer``'s device number ``device``.

        No copy starts before NIXL has accepted every part.

        Args:
            pace: the peer's.
            attach: the lane copies on the calling thread, and no byte of a failed read arrives later.

        Raises:
            EngineError: see :meth:`Agent.complete`; if several parts fail, one with ``in_flight`` first.
        """
        nbytes = sum(segment.nbytes for segment in segments)
        if not attach or nbytes < SPLIT_NBYTES:
            # Other lanes copy elsewhere, and CUDA needs the caller's thread, which has its context.
            request = self._prepare(peer, device, segments)
            self._agent.complete(request, bound, quiet_on_error=attach, nbytes=nbytes, pace=pace)
            return
        parts = list(halves(segments))
        prepared = [
            thread.submit(self._prepare, peer, device, part) for thread, part in zip(self._threads, parts, strict=True)
        ]
        try:
            requests = [future.result() for future in prepared]
        except EngineError:
            for future in prepared:
                self._release(future)
            raise
        running = [
            thread.submit(self._touch_and_complete, part, request, bound)
            for thread, part, request in zip(self._threads, parts, requests, strict=True)
        ]
        failures = [error for future in running if (error := future.exception()) is not None]
        if failures:
            raise max(failures, key=lambda error: getattr(error, "in_flight", False))

    def close(self) -> None:
        """End the threads; their calls are bounded by their own deadlines."""
        for thread in self._threads:
            thread.shutdown(wait=True)

    def _prepare(self, peer: str, device: int, part: Sequence[Segment]) -> int:
        return self._agent.prepare(
            peer,
            [(segment.local, segment.nbytes, self._device) for segment in part],
            [(segment.remote, segment.nbytes, device) for segment in part],
        )

    def _touch_and_complete(self, part: Sequence[Segment], request: int, bound: Bound) -> None:
        for address, nbytes in runs(part):
            touch(address, nbytes)
        self._agent.complete(request, bound, quiet_on_error=True)

    def _release(self, prepared: Future[int]) -> None:
        with suppress(EngineError):
            self._agent.release(prepared.result())
