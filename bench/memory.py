"""The machine's own rates, for comparison: copies, first touches, digests, plain sums."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from vllm_rfork.model import digest

#: The size of a matrix of a model of 7B parameters.
SPAN_NBYTES = 32 << 20


def median_s(action: Callable[[], object], runs: int) -> float:
    """Median seconds of ``runs`` runs, after one that does not count."""
    action()
    taken = []
    for _ in range(runs):
        started = time.perf_counter()
        action()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def rates(nbytes: int, runs: int) -> dict[str, float]:
    """GB/s on ``nbytes`` bytes of host memory, by operation; one thread unless the name says otherwise."""
    source = torch.empty(nbytes, dtype=torch.uint8).fill_(7)
    target = torch.empty(nbytes, dtype=torch.uint8).fill_(1)
    threads = torch.get_num_threads()

    def fresh() -> None:
        torch.empty(nbytes, dtype=torch.uint8).copy_(source)

    def measured(action: Callable[[], object], number: int) -> float:
        torch.set_num_threads(number)
        return nbytes / median_s(action, runs) / 1e9

    try:
        return {
            "memcpy": measured(lambda: target.copy_(source), 1),
            f"memcpy, {threads} threads": measured(lambda: target.copy_(source), threads),
            "memcpy into fresh pages": measured(fresh, 1),
            f"memcpy into fresh pages, {threads} threads": measured(fresh, threads),
            "plain sum": measured(lambda: source.view(torch.int64).sum(), 1),
            f"plain sum, {threads} threads": measured(lambda: source.view(torch.int64).sum(), threads),
            "digest": measured(lambda: digest.digest(source), 1),
            f"digest, {threads} threads": measured(lambda: digest.digest(source), threads),
            "digests of 32 MiB each": measured(lambda: digest.digests(source.split(SPAN_NBYTES)), 1),
            f"digests of 32 MiB each, {threads} threads": measured(
                lambda: digest.digests(source.split(SPAN_NBYTES)), threads
            ),
        }
    finally:
        torch.set_num_threads(threads)
