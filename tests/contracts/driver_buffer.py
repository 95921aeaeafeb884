"""A buffer from the CUDA driver, without torch; same interface as ``vllm_rfork.selftest.buffers.Buffer``.

Works on a GPU and on the host stand-in for the driver.
"""

from __future__ import annotations

from pathlib import Path

from vllm_rfork.engines.cuda_ipc.driver import Driver

#: The checkout, for processes that the contract tests start.
ROOT = Path(__file__).resolve().parents[2]


class DriverBuffer:
    """``nbytes`` of zeroed memory, an allocation of its own on ``device`` (``cuda:1``)."""

    def __init__(self, device: str, nbytes: int) -> None:
        self._driver = Driver(int(device.partition(":")[2] or 0))
        self.nbytes = nbytes
        with self._driver.current("open"):
            self.address = self._driver.allocate(nbytes)
            self._driver.write(self.address, bytes(nbytes))

    def write(self, offset: int, data: bytes) -> None:
        with self._driver.current("open"):
            self._driver.write(self.address + offset, data)

    def read(self, offset: int, nbytes: int) -> bytes:
        with self._driver.current("read"):
            return self._driver.fetch(self.address + offset, nbytes)

    def close(self) -> None:
        with self._driver.current("close"):
            self._driver.free(self.address)
