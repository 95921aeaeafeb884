"""The cost of digests on a device, compared with a plain sum and a copy: ``python -m bench.digest --device cuda``.

Prints GB/s and the ratio to a plain sum over the same tensors, in the same run, for one span, for spans of 64 MiB, and
for the spans of a dense model of 7B parameters. Before that it checks that the device's digests equal the processor's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table

from vllm_rfork.model import digest

#: Bytes of the weights of one layer: attention in and out, both projections, two norms.
LAYER_NBYTES = (100_663_296, 33_554_432, 180_355_072, 90_177_536, 8192, 8192)


def spans(memory: torch.Tensor) -> dict[str, Sequence[torch.Tensor]]:
    """The same bytes, cut in different ways."""
    layers = [size for _ in range(memory.numel() // sum(LAYER_NBYTES)) for size in LAYER_NBYTES]
    return {
        "one span": [memory],
        "spans of 64 MiB": memory.split(64 << 20),
        "a model's spans": memory[: sum(layers)].split(layers) if layers else [memory],
    }


def check(device: torch.device) -> None:
    """Raise RuntimeError if the device's digests differ from the processor's."""
    here = torch.randint(0, 256, (9_000_001,), dtype=torch.uint8)
    there = here.to(device)
    for offset in (0, 8, 3):
        parts = [here[offset:], here[offset : offset + 70_000], here[offset : offset + 7]]
        if digest.digests(parts) != digest.digests(
            [there[offset:], there[offset : offset + 70_000], there[offset : offset + 7]]
        ):
            raise RuntimeError(f"digests on {device} differ from those on the processor")


def main() -> None:
    """Check, measure, print; ``--json`` prints plain data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="as torch names it; default cpu")
    parser.add_argument("--gib", type=float, default=1.0, help="GiB to digest; the copy takes as much again")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    check(device)
    source = torch.empty(int(arguments.gib * 2**27), dtype=torch.int64, device=device).random_().view(torch.uint8)
    target = torch.empty_like(source)
    backend = getattr(torch, device.type)

    def median_s(action: Callable[[], object]) -> float:
        taken = []
        for run in range(arguments.runs + 1):
            backend.synchronize()
            started = time.perf_counter()
            action()
            backend.synchronize()
            if run:
                taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    copy_s = median_s(lambda: target.copy_(source))
    results = []
    for name, cut in spans(source).items():
        nbytes = sum(span.numel() for span in cut)
        plain_s = median_s(lambda cut=cut: [span.view(torch.int64).sum() for span in cut])  # type: ignore[misc]
        digest_s = median_s(lambda cut=cut: digest.digests(cut))  # type: ignore[misc]
        results.append(
            {
                "spans": f"{name} ({len(cut)})",
                "nbytes": nbytes,
                "digest_gb_per_s": nbytes / digest_s / 1e9,
                "plain_sum_gb_per_s": nbytes / plain_s / 1e9,
                "copy_gb_per_s": source.numel() / copy_s / 1e9,
                "times_plain_sum": digest_s / plain_s,
            }
        )
    if arguments.json:
        print(json.dumps({"device": str(device), "algorithm": digest.ALGORITHM, "results": results}))
        return
    table = Table(f"{device}, {digest.ALGORITHM}", "bytes", "digest GB/s", "plain sum GB/s", "copy GB/s", "× plain sum")
    for row in results:
        rates = (row["digest_gb_per_s"], row["plain_sum_gb_per_s"], row["copy_gb_per_s"], row["times_plain_sum"])
        table.add_row(str(row["spans"]), str(row["nbytes"]), *(f"{rate:.2f}" for rate in rates))
    Console().print(table)


if __name__ == "__main__":
    main()
