"""Memory for tests of engines, on any device.

The self-test and the engine contract suite transfer random bytes, not models, and need no torch on the CPU. On ``cuda``
and ``npu`` torch is imported when the first buffer is made.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any


class Buffer:
    """``nbytes`` of zeroed memory on ``device`` (``cpu``, ``cuda:1``, ``npu:0``).

    On the CPU it is page-aligned anonymous memory that returns to the system when the buffer is closed.

    Raises:
        ValueError: ``nbytes`` is not positive.
        ImportError: a device other than ``cpu`` needs torch, and ``npu`` torch_npu, which is not installed.
    """

    def __init__(self, device: str, nbytes: int) -> None:
        if nbytes <= 0:
            raise ValueError(f"a buffer needs a positive length, got {nbytes}")
        self.device = device
        self.nbytes = nbytes
        self._map: mmap.mmap | None = None
        self._tensor: Any = None
        if device == "cpu":
            self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            # The export is dropped at once: a live one would keep the map from closing.
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        else:
            torch = _torch(device)
            self._tensor = torch.zeros(nbytes, dtype=torch.uint8, device=device)
            self.synchronize()
            self.address = int(self._tensor.data_ptr())

    def write(self, offset: int, data: bytes) -> None:
        """Write ``data`` at ``offset`` bytes; returns when the device has it."""
        if self._map is not None:
            self._map[offset : offset + len(data)] = data
            return
        torch = _torch(self.device)
        self._tensor[offset : offset + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
        self.synchronize()

    def read(self, offset: int, nbytes: int) -> bytes:
        """``nbytes`` bytes from ``offset``, copied to the host."""
        if self._map is not None:
            return self._map[offset : offset + nbytes]
        self.synchronize()
        return bytes(self._tensor[offset : offset + nbytes].cpu().numpy().tobytes())

    def synchronize(self) -> None:
        """Wait for the device's queue; does nothing on the CPU."""
        if self._map is None:
            getattr(_torch(self.device), self.device.partition(":")[0]).synchronize()

    def close(self) -> None:
        """Free the memory. Nothing may still be writing to it."""
        if self._map is not None:
            self._map.close()
        self._tensor = None


def _torch(device: str) -> Any:
    """Torch with the backend that ``device`` needs."""
    import importlib

    torch = importlib.import_module("torch")
    if device.startswith("npu"):
        importlib.import_module("torch_npu")
    return torch
