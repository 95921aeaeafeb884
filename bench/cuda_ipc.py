"""``python -m bench.cuda_ipc``: the engine cuda_ipc and a raw copy, across GPUs and namespaces of one host.

The parent process is the seed: tensors on the first GPU. Each receiver is a process of its own, in the namespaces and
with the visible GPUs that its row names. It reports the seconds to open, register, connect and read, the equality of
the bytes, the rate of a second read, and that of one raw copy of the same length in the same process. With
``RFORK_BENCH_ONE_BY_ONE=1`` in the environment the driver gets no copies in batches. Needs torch with CUDA, and root
for the rows with ``unshare``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.cuda_ipc.driver import Driver
from vllm_rfork.engines.cuda_ipc.endpoint import decode
from vllm_rfork.engines.cuda_ipc.engine import CudaIpcEngine
from vllm_rfork.errors import EngineError
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment, batches

#: Moves a folder with the last GPU's device file and those that no GPU owns over ``/dev``, in a mount namespace.
HIDE = (
    "dev=$(mktemp -d) && mount -t tmpfs none $dev && mkdir $dev/shm && "
    "for file in nvidia{last} nvidiactl nvidia-uvm nvidia-uvm-tools nvidia-modeset nvidia-caps null zero urandom; do "
    "[ ! -e /dev/$file ] || cp -a /dev/$file $dev/; done && mount --move $dev /dev && "
)
#: The row in which a connection must be refused.
REFUSED = "the seed's GPU without a device file"
#: Row → wrapper of the receiver's command. ``{last}`` is the number of the last GPU.
ROWS: dict[str, tuple[str, ...]] = {
    "both GPUs visible": (),
    "the seed's GPU hidden by CUDA_VISIBLE_DEVICES": ("env", "CUDA_VISIBLE_DEVICES={last}"),
    "another pid namespace": ("unshare", "--pid", "--fork", "--mount-proc"),
    "another ipc namespace": ("unshare", "--ipc"),
    "pid, ipc, uts and mount namespaces": ("unshare", "--pid", "--ipc", "--uts", "--mount", "--fork", "--mount-proc"),
    "the same GPU": ("env", "CUDA_VISIBLE_DEVICES=0"),
    REFUSED: ("unshare", "--mount", "sh", "-c", HIDE + 'exec "$0" "$@"'),
}


def tensors(count: int, nbytes: int, device: str, *, random: bool) -> list[Any]:
    """``count`` tensors of different lengths, about ``nbytes`` together."""
    import torch

    torch.manual_seed(1)
    each = nbytes // count
    sizes = [each + (number % 7) * 512 for number in range(count)]
    make = torch.randint if random else None
    return [
        make(0, 255, (size,), dtype=torch.uint8, device=device)
        if make
        else torch.zeros(size, dtype=torch.uint8, device=device)
        for size in sizes
    ]


def sums(of: Sequence[Any]) -> list[int]:
    """One checksum a tensor, over its 64-bit words."""
    import torch

    return [int(each[: each.numel() // 8 * 8].view(torch.int64).sum()) for each in of]


def regions(of: Sequence[Any]) -> list[Region]:
    """The memory of tensors."""
    return [Region(each.data_ptr(), each.numel()) for each in of]


def receive(path: Path) -> dict[str, Any]:
    """Measure as one receiver; ``path`` is the file that the seed wrote."""
    import torch

    setting = json.loads(path.read_text())
    device = f"cuda:{torch.cuda.device_count() - 1}"
    torch.cuda.set_device(device)
    local = tensors(setting["count"], setting["nbytes"], device, random=False)
    torch.cuda.synchronize()
    limits = CudaIpcEngine.limits
    pairs = zip(regions(local), setting["regions"], strict=True)
    segments = [Segment(here.address, address, nbytes) for here, (address, nbytes) in pairs]
    cut = batches(segments, max_nbytes=limits.max_batch_nbytes, max_items=limits.max_batch_items)
    prepared = list(cut)
    engine, marks = CudaIpcEngine(), [time.perf_counter()]
    engine.open(EngineConfig(device=device))
    if os.environ.get("RFORK_BENCH_ONE_BY_ONE") == "1" and engine._driver is not None:
        engine._driver._copy_batch = None
    marks.append(time.perf_counter())
    engine.register(regions(local))
    marks.append(time.perf_counter())
    try:
        engine.connect(setting["endpoint"], 30.0)
    except EngineError as error:
        return {"refused": str(error), "driver": drivers_refusal(setting["endpoint"], device)}
    marks.append(time.perf_counter())
    for batch in prepared:
        engine.read(setting["endpoint"], batch, 60.0)
    marks.append(time.perf_counter())
    total = sum(nbytes for _, nbytes in setting["regions"])
    names = ("open_s", "register_s", "connect_s", "read_s")
    result: dict[str, Any] = {name: marks[n + 1] - marks[n] for n, name in enumerate(names)}
    result |= {"gb_s": total / result["read_s"] / 1e9, "equal": sums(local) == setting["sums"]}
    started = time.perf_counter()
    for batch in prepared:
        engine.read(setting["endpoint"], batch, 60.0)
    result["again_gb_s"] = total / (time.perf_counter() - started) / 1e9
    engine.close()
    result["raw_gb_s"] = raw_rate(setting, device)
    return result


def drivers_refusal(endpoint: str, device: str) -> str:
    """The driver's own error for the first handle, which the engine's obstacle may keep from being tried."""
    driver = Driver(int(device.partition(":")[2]))
    try:
        with driver.current("connect"):
            driver.open_handle(decode(endpoint).page.handle)
    except EngineError as error:
        return str(error)
    return "none"


def raw_rate(setting: dict[str, Any], device: str) -> float:
    """GB/s of the best of three copies of one large allocation, by the driver alone."""
    import torch

    into = torch.empty(setting["raw_nbytes"], dtype=torch.uint8, device=device)
    driver = Driver(int(device.partition(":")[2]))
    best = 0.0
    with driver.current("read"):
        address, stream = driver.open_handle(bytes.fromhex(setting["raw_handle"])), driver.new_stream()
        for _ in range(3):
            started = time.perf_counter()
            driver.copy(stream, into.data_ptr(), address, setting["raw_nbytes"])
            while not driver.is_idle(stream):
                pass
            best = max(best, setting["raw_nbytes"] / (time.perf_counter() - started) / 1e9)
        driver.close_handle(address)
        driver.destroy_stream(stream)
    return best


def main() -> int:
    """Print one JSON line a row; 1 if the bytes of a row differ or its receiver failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_ipc", description=__doc__)
    parser.add_argument("--gib", type=float, default=14.0, help="bytes of all tensors together, in GiB")
    parser.add_argument("--counts", default="200,2000", help="numbers of tensors, separated by commas")
    parser.add_argument("--rows", default="", help="part of the names of the rows to measure; all if not given")
    parser.add_argument("--work", type=Path, default=Path("build/cuda_ipc.json"), help="file between the processes")
    parser.add_argument("--receive", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.receive:
        print(json.dumps(receive(arguments.receive)))
        return 0
    import torch

    failed = 0
    last = torch.cuda.device_count() - 1
    for count in map(int, arguments.counts.split(",")):
        nbytes = int(arguments.gib * 2**30)
        own, raw = tensors(count, nbytes, "cuda:0", random=True), tensors(1, nbytes, "cuda:0", random=False)
        torch.cuda.synchronize()
        engine = CudaIpcEngine()
        started = time.perf_counter()
        engine.open(EngineConfig(device="cuda:0"))
        opened = time.perf_counter()
        engine.register(regions(own))
        endpoint = engine.endpoint
        seed = {"open_s": opened - started, "register_s": time.perf_counter() - opened, "endpoint": len(endpoint)}
        print(json.dumps({"tensors": count, "seed": seed}), flush=True)
        driver = Driver(0)
        with driver.current("open"):
            base, _ = driver.allocation_of(raw[0].data_ptr())
            handle = driver.export(base)
        setting = {
            "count": count,
            "nbytes": nbytes,
            "endpoint": endpoint,
            "regions": [(each.address, each.nbytes) for each in regions(own)],
            "sums": sums(own),
            "raw_handle": handle.hex(),
            "raw_nbytes": raw[0].numel(),
        }
        arguments.work.parent.mkdir(parents=True, exist_ok=True)
        arguments.work.write_text(json.dumps(setting))
        for name in (name for name in ROWS if arguments.rows in name):
            wrapper = ROWS[name]
            command = [part.format(last=last) for part in wrapper]
            command += [sys.executable, "-m", "bench.cuda_ipc", "--receive", str(arguments.work)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180, env=os.environ)
            try:
                row = json.loads(done.stdout.splitlines()[-1])
            except (IndexError, ValueError):
                row = {"failed": done.stderr.strip().splitlines()[-3:]}
            failed += "refused" not in row if name == REFUSED else not row.get("equal")
            print(json.dumps({"tensors": count, "receiver": name, **row}), flush=True)
        engine.close()
        del own, raw
        torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
