"""Verification of a fork's bytes against the seed's digests, while the rest is still being read.

A copy engine moves bytes at the speed of a link, and a digest reads them at the speed of memory. So the digests cost a
fork little more than those of its last batch. The expected digests arrive with :meth:`StreamingVerifier.finish`, after
the seed has confirmed its epoch once more.
"""

from __future__ import annotations

import bisect
import queue
import threading
import time
from collections.abc import Mapping, Sequence

import torch

from vllm_rfork.devices.base import DeviceBackend
from vllm_rfork.errors import ForkError, VerificationError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.manifest.segments import Segment
from vllm_rfork.model import digest
from vllm_rfork.model.tensors import TensorInventory, names_in
from vllm_rfork.threads.native import native_thread

logger = worker_logger(__name__)

#: ``rfork_verify=sample`` compares one span in this number.
SAMPLE_EVERY = 8
#: How long :meth:`StreamingVerifier.close` waits for digests in progress, in seconds: those of a few batches.
CLOSE_S = 5.0


def spans_to_check(inventory: TensorInventory, how: str) -> list[int]:
    """Numbers of the spans to compare for an ``rfork_verify`` of ``full``, ``sample`` or ``off``."""
    every = {"full": 1, "sample": SAMPLE_EVERY}
    return list(range(0, len(inventory.spans), every[how])) if how in every else []


def check_algorithm(seed: Manifest, remedy: str) -> None:
    """Check that the digests in ``seed`` are of this worker's algorithm.

    Args:
        remedy: the end of the message.

    Raises:
        VerificationError: they are of another one, or missing.
    """
    if seed.digest_algorithm != digest.ALGORITHM:
        raise VerificationError(
            f"the seed's digests are {seed.digest_algorithm or 'missing'}, this worker checks {digest.ALGORITHM}; "
            f"{remedy}"
        )


def load_kernels(side: DeviceBackend) -> threading.Thread | None:
    """Load the digests' kernels in the background, on a device that has any; returns the thread that does it.

    The first use takes 25 to 90 ms on a GPU, much beside a read. While a model is built it delays the construction,
    which needs the driver, too; while dummies are filled or storage is read it does not.
    """
    if not side.has_copy_engine:
        return None

    def digest_something() -> None:
        try:
            side.set_current()
            nbytes = digest.ROWS * digest.COLUMNS * 8 + 1  # a whole block and a remainder
            digest.digest(torch.zeros(nbytes, dtype=torch.uint8, device=side.device))
        except Exception as error:  # noqa: BLE001 - the digests that a fork needs will report it
            logger.debug("%s cannot digest yet: %s: %s", side.name, type(error).__name__, error)

    thread = native_thread(digest_something, "rfork-verify-ready")
    thread.start()
    return thread


class StreamingVerifier:
    """Digests of the spans that one fork reads.

    Args:
        numbers: the spans to compare, as indices into ``collection.spans``.
        side: the device. If it has a copy engine, a thread queues a span's digest as soon as all its bytes are there.
            A processor uses the same cores for both, and computes the digests at the end.
        timeout_s: how long :meth:`finish` waits for that thread; a device may hang.
    """

    def __init__(
        self, inventory: TensorInventory, numbers: Sequence[int], side: DeviceBackend, timeout_s: float
    ) -> None:
        self.inventory = inventory
        self._side = side
        self._timeout_s = timeout_s
        self.numbers = numbers
        self._found: dict[int, str] = {}
        self._failures: list[BaseException] = []
        self._batches: queue.SimpleQueue[Sequence[Segment] | None] = queue.SimpleQueue()
        self._given_up = False
        self._thread: threading.Thread | None = None

    def arrived(self, segments: Sequence[Segment]) -> None:
        """Record segments that have been read; returns at once."""
        if not self._side.has_copy_engine or not self.numbers:
            return
        if self._thread is None:
            self._thread = native_thread(self._run, "rfork-verify")
            self._thread.start()
        self._batches.put(segments)

    def finish(self, expected: Mapping[int, str], timeout_s: float | None = None) -> None:
        """Compare all digests with ``expected``, by number of the span.

        Args:
            timeout_s: how long to wait for digests in progress, if less than this object's bound.

        Raises:
            VerificationError: bytes differ, or ``expected`` has no digest of a span.
            ForkError: digests could not be computed, or not in time.
        """
        if unknown := [number for number in self.numbers if not expected.get(number)]:
            raise VerificationError(f"the seed has no digests of {names_in(self.inventory, unknown)}")
        if self._thread is None:
            self._found = dict(
                zip(
                    self.numbers,
                    digest.digests(self.inventory.spans[number].data for number in self.numbers),
                    strict=True,
                )
            )
        else:
            self._batches.put(None)
            bound_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)
            self._thread.join(bound_s)
            if self._thread.is_alive():
                text = f"{self._side.name} has not finished its digests after {bound_s:g} s"
                raise ForkError(text)
            for failure in self._failures:
                # It is this device's fault and would occur with another seed, too.
                text = f"no digests: {type(failure).__name__}: {failure}"
                raise ForkError(text) from failure
        wrong = digest.differing(self._found, {number: expected[number] for number in self.numbers})
        if wrong:
            raise VerificationError(
                f"the bytes of {len(wrong)} of {len(self.numbers)} tensors are not the seed's: "
                f"{names_in(self.inventory, wrong)}"
            )

    def close(self) -> None:
        """Release the spans: start no more digests, and wait for those in progress. Idempotent."""
        self._given_up = True
        if self._thread is not None:
            self._batches.put(None)
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                logger.warning("digests on %s have not ended; their memory stays allocated", self._side.name)

    def _run(self) -> None:
        try:
            self._side.set_current()
            self._digest_arrivals()
        except BaseException as error:  # noqa: BLE001 - raised again by finish()
            self._failures.append(error)

    def _digest_arrivals(self) -> None:
        spans = self.inventory.spans
        by_address = sorted((spans[number].address, number) for number in self.numbers)
        starts = [address for address, _ in by_address]
        missing = {number: spans[number].nbytes for number in self.numbers}
        digester, order = digest.Digester(), []
        started, busy_s = time.perf_counter(), 0.0
        while (batch := self._batches.get()) is not None and not self._given_up:
            began = time.perf_counter()
            for segment in batch:
                place = bisect.bisect_right(starts, segment.local) - 1
                if place < 0:
                    continue
                number = by_address[place][1]
                if segment.local >= spans[number].address + spans[number].nbytes:
                    continue  # in a span that is not compared
                missing[number] -= segment.nbytes
                if not missing[number]:
                    digester.add(spans[number].data)
                    order.append(number)
            busy_s += time.perf_counter() - began
        if self._given_up:
            return
        # Spans that were not read are compared, too: another model's use of them must not have changed them.
        for number in sorted(missing):
            if missing[number]:
                digester.add(spans[number].data)
                order.append(number)
        self._found = dict(zip(order, digester.finish(), strict=True))
        logger.debug(
            "digests of %d spans in %.3f s beside the read, %.3f s of them to queue them",
            len(order),
            time.perf_counter() - started,
            busy_s,
        )
