"""Ascend NPUs, by ``torch_npu``, which is imported when the first one is asked for.

A tensor in a private layout (NZ) has its bytes in another order than its shape and strides say, may be padded to whole
tiles, and carries the layout's number on its storage. So it occupies its whole storage; it is read and written as raw
bytes through an alias whose storage does not know the layout; and the storage itself is never handed to ``set_``,
which may overwrite what it says about itself.

Expandable segments are not refused here: vLLM-Ascend turns them on by default, and its own loader registers such
memory with the same engine.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from vllm_rfork.devices.allocator_blocks import HIXL_ALIGNMENT
from vllm_rfork.devices.base import PLAIN, DeviceSide
from vllm_rfork.errors import ForkError

#: ``acl_format`` of "as shape and strides say".
ND = 2
#: Formats that only name what the dimensions mean: undefined, NCHW, NHWC, ND, HWCN, NDHWC, NCDHW, NC, NCL.
_PLAIN_FORMATS = frozenset({-1, 0, 1, ND, 16, 27, 30, 35, 47})


class NpuSide(DeviceSide):
    """One NPU of this process.

    Raises:
        ForkError: ``torch_npu`` is not installed, or does not come up.
    """

    visible_variable: ClassVar[str] = "ASCEND_RT_VISIBLE_DEVICES"
    # torch_npu refuses a process in which both are set.
    allocator_variables: ClassVar[tuple[str, ...]] = ("PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        try:
            self._npu: Any = importlib.import_module("torch_npu")
        except (ImportError, OSError, RuntimeError) as error:  # its libraries fail in their own ways
            raise ForkError(f"torch_npu cannot be imported: {error}") from error

    @property
    def index(self) -> int:
        """The device's number as this process counts."""
        return int(self._npu.npu.current_device() if self.device.index is None else self.device.index)

    @property
    def text(self) -> str:
        """``npu:1``."""
        return f"npu:{self.index}"

    def use(self) -> None:
        """Make this the calling thread's device, context included."""
        self._npu.npu.set_device(self.index)

    def synchronize(self) -> None:
        """Wait for all streams of the device, layout conversions included."""
        self._npu.npu.synchronize(self.index)

    def empty_cache(self) -> None:
        """Give unused memory of the caching allocator back."""
        self._npu.npu.empty_cache()

    def private_format(self, tensor: torch.Tensor) -> int:
        """The private layout's ``acl_format`` (29 is NZ); :data:`~vllm_rfork.devices.base.PLAIN` for all plain ones."""
        if tensor.device.type != self.device.type:
            return PLAIN
        number = int(self._npu.get_npu_format(tensor))
        return PLAIN if number in _PLAIN_FORMATS else number

    def empty_in_format(self, shape: Sequence[int], dtype: torch.dtype, private_format: int) -> torch.Tensor:
        """An uninitialised tensor here; torch_npu sizes its storage for the layout."""
        tensor: torch.Tensor = self._npu.empty_with_format(
            tuple(shape), dtype=dtype, device=self.device, acl_format=private_format or ND
        )
        return tensor

    def extent(self, tensor: torch.Tensor) -> tuple[int, int]:
        """As elsewhere for plain tensors; the whole storage, padding included, for one in a private layout."""
        if self.private_format(tensor) == PLAIN:
            return super().extent(tensor)
        storage = tensor.untyped_storage()
        if tensor.data_ptr() != storage.data_ptr():
            raise ForkError("a view into the middle of a tensor in a private layout has no address of its own")
        return storage.data_ptr(), storage.data_ptr() + storage.nbytes()

    def bytes_of(self, tensor: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Through views alone where the layout is plain; else through an alias that does not know the layout."""
        storage = tensor.untyped_storage()
        whole = tensor.as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
        if self.private_format(tensor) != PLAIN:
            whole = self._npu._C._weak_ref_tensor(whole)
        data: Any = whole.view(torch.uint8)[start - storage.data_ptr() : end - storage.data_ptr()]
        if data.numel() != end - start:
            raise ForkError(f"the last bytes of a storage of {storage.nbytes()} bytes cannot be seen as {tensor.dtype}")
        data._rfork_owner = tensor  # an alias owns nothing
        view: torch.Tensor = data
        return view

    def alignment(self, environment: Mapping[str, str] | None = None) -> int:
        """2 MiB where the engine is told to go over HIXL, whose ``auto`` and ``hccs`` routes want it; else 1."""
        backend = (os.environ if environment is None else environment).get("TRANSFER_ENGINE_BACKEND", "")
        return HIXL_ALIGNMENT if backend.strip().lower() == "hixl" else 1

    def _snapshot(self) -> Iterable[Mapping[str, Any]]:
        segments: list[Mapping[str, Any]] = self._npu.npu.memory_snapshot()
        return segments
