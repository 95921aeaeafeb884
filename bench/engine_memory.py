"""The tensors of the engines' benchmark, on a CPU without torch and on a GPU with it, and raw copies beside them."""

from __future__ import annotations

import abc
import ctypes
import mmap
import random
import time
from pathlib import Path
from typing import Any

#: Tensors begin at multiples of this, as an allocator's do.
ALIGNMENT = 512
#: Tensor number n contains the pool's bytes from n modulo this, so neighbours differ.
SHIFTS = 65_521
_RAW_RUNS = 3


class Tensors(abc.ABC):
    """``count`` tensors of about ``nbytes`` bytes together, with contents that any process can compare."""

    #: Bytes that will be added to the process's resident memory when they are written for the first time.
    untouched_nbytes = 0

    def __init__(self, count: int, nbytes: int) -> None:
        each = max(ALIGNMENT, nbytes // count // ALIGNMENT * ALIGNMENT)
        self._sizes = [each + (number % 7) * 8 for number in range(count)]
        self.nbytes = sum(self._sizes)

    @abc.abstractmethod
    def regions(self) -> list[tuple[int, int]]:
        """Address and length in bytes of each tensor."""

    @abc.abstractmethod
    def fill(self) -> None:
        """Write every tensor's contents."""

    @abc.abstractmethod
    def is_right(self) -> bool:
        """Compare every tensor with its contents."""

    @abc.abstractmethod
    def raw_rates(self, source: Any) -> dict[str, float]:
        """GB/s of one raw copy of as many bytes, by the kind of target memory; the best of some runs."""


class HostTensors(Tensors):
    """Tensors in one anonymous mapping, whose pages are untouched until they are written."""

    def __init__(self, count: int, nbytes: int) -> None:
        super().__init__(count, nbytes)
        self.untouched_nbytes = self.nbytes
        self._offsets: list[int] = []
        end = 0
        for size in self._sizes:
            self._offsets.append(end)
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self._map = mmap.mmap(-1, end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._pool = random.Random(1).randbytes(max(self._sizes) + SHIFTS)  # noqa: S311 - contents, not secrets

    def regions(self) -> list[tuple[int, int]]:
        """Address and length in bytes of each tensor."""
        return [(self._base + offset, size) for offset, size in zip(self._offsets, self._sizes, strict=True)]

    def fill(self) -> None:
        """Write every tensor's contents."""
        pool = memoryview(self._pool)
        for number, (offset, size) in enumerate(zip(self._offsets, self._sizes, strict=True)):
            shift = number % SHIFTS
            self._map[offset : offset + size] = pool[shift : shift + size]
        self.untouched_nbytes = 0

    def is_right(self) -> bool:
        """Compare every tensor with its contents."""
        return all(
            self._map[offset : offset + size] == self._pool[number % SHIFTS : number % SHIFTS + size]
            for number, (offset, size) in enumerate(zip(self._offsets, self._sizes, strict=True))
        )

    def raw_rates(self, source: Any) -> dict[str, float]:
        """GB/s of ``memcpy`` within this process, one thread, into fresh pages and into pages that were written."""
        nbytes = min(self.nbytes, len(self._map))
        rates = dict.fromkeys(("fresh", "touched"), 0.0)
        for _ in range(_RAW_RUNS):
            with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as target:
                to = ctypes.addressof(ctypes.c_char.from_buffer(target))
                for kind, best in rates.items():
                    started = time.perf_counter()
                    ctypes.memmove(to, self._base, nbytes)
                    rates[kind] = max(best, nbytes / (time.perf_counter() - started) / 1e9)
        return rates


class GpuTensors(Tensors):
    """Tensors of torch's caching allocator on one GPU."""

    def __init__(self, device: str, count: int, nbytes: int) -> None:
        import torch

        super().__init__(count, nbytes)
        self._torch = torch
        self._device = device
        torch.cuda.set_device(device)
        self._tensors = [torch.zeros(size, dtype=torch.uint8, device=device) for size in self._sizes]
        generator = torch.Generator(device="cpu").manual_seed(1)
        pool = torch.randint(0, 256, (max(self._sizes) + SHIFTS,), dtype=torch.uint8, generator=generator)
        self._pool = pool.to(device)
        torch.cuda.synchronize()

    def regions(self) -> list[tuple[int, int]]:
        """Address and length in bytes of each tensor."""
        return [(each.data_ptr(), each.numel()) for each in self._tensors]

    def fill(self) -> None:
        """Write every tensor's contents."""
        for number, each in enumerate(self._tensors):
            each.copy_(self._contents(number))
        self._torch.cuda.synchronize()

    def is_right(self) -> bool:
        """Compare every tensor with its contents."""
        return all(bool((each == self._contents(number)).all()) for number, each in enumerate(self._tensors))

    def raw_rates(self, source: Any) -> dict[str, float]:
        """GB/s of the driver's own copy of one allocation of the other process, mapped by its handle."""
        from vllm_rfork.engines.cuda_ipc.driver import Driver

        nbytes = int(source["nbytes"])
        into = self._torch.empty(nbytes, dtype=self._torch.uint8, device=self._device)
        driver = Driver(int(self._device.partition(":")[2] or 0))
        best = 0.0
        with driver.current("read"):
            address, stream = driver.open_handle(bytes.fromhex(source["handle"])), driver.new_stream()
            for _ in range(_RAW_RUNS):
                started = time.perf_counter()
                driver.copy(stream, into.data_ptr(), address, nbytes)
                while not driver.is_idle(stream):
                    pass
                best = max(best, nbytes / (time.perf_counter() - started) / 1e9)
            driver.close_handle(address)
            driver.destroy_stream(stream)
        return {"touched": best}

    def _contents(self, number: int) -> Any:
        shift = number % SHIFTS
        return self._pool[shift : shift + self._sizes[number]]


def tensors(device: str, count: int, nbytes: int) -> Tensors:
    """``count`` tensors on ``device`` (``cpu``, ``cuda:0``)."""
    return HostTensors(count, nbytes) if device == "cpu" else GpuTensors(device, count, nbytes)


def raw_source(device: str, nbytes: int) -> Any:
    """The source of :meth:`Tensors.raw_rates`: one allocation with its handle on a GPU, nothing on a CPU."""
    if device == "cpu":
        return None
    from vllm_rfork.engines.cuda_ipc.driver import Driver

    driver = Driver(int(device.partition(":")[2] or 0))
    with driver.current("open"):
        return {"nbytes": nbytes, "handle": driver.export(driver.allocate(nbytes)).hex()}


def peak_nbytes() -> int:
    """Peak resident bytes of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def device_nbytes(device: str) -> int:
    """Bytes in use of a GPU's memory, of all processes together; 0 for the CPU."""
    if device == "cpu":
        return 0
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)
