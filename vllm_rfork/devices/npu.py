"""Ascend NPUs, through ``torch_npu``, which is imported with the first one.

The bytes of a tensor in a private layout (NZ) are in another order than its shape and strides describe. They may be
padded to whole tiles, and its storage carries the layout's number. Such a tensor occupies its whole storage. It is read
and written as raw bytes through an alias without a layout; its own storage is never passed to ``set_``, which may
overwrite that number.

Expandable segments are accepted here: vLLM-Ascend enables them by default, and its own loader registers such memory
with the same engine.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from vllm_rfork.devices.base import PLAIN, DeviceBackend
from vllm_rfork.errors import ForkError
from vllm_rfork.manifest.alignment import ALIGNED_ROUTES, HIXL_ALIGNMENT, ROUTE_VARIABLE

#: The ``acl_format`` of a layout that shape and strides describe.
ND = 2
#: Formats that only name the dimensions: undefined, NCHW, NHWC, ND, HWCN, NDHWC, NCDHW, NC, NCL.
_PLAIN_FORMATS = frozenset({-1, 0, 1, ND, 16, 27, 30, 35, 47})


class NpuBackend(DeviceBackend):
    """One NPU of this process.

    Raises:
        ForkError: ``torch_npu`` is not installed, or does not start.
    """

    visible_variable: ClassVar[str] = "ASCEND_RT_VISIBLE_DEVICES"
    # torch_npu refuses a process in which both are set.
    allocator_variables: ClassVar[tuple[str, ...]] = ("PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        try:
            self._npu: Any = importlib.import_module("torch_npu")
        except (ImportError, OSError, RuntimeError) as error:  # its libraries raise each of these
            raise ForkError(f"torch_npu cannot be imported: {error}") from error

    @property
    def index(self) -> int:
        """The device's number within the process."""
        return int(self._npu.npu.current_device() if self.device.index is None else self.device.index)

    @property
    def name(self) -> str:
        """``npu:1``."""
        return f"npu:{self.index}"

    def set_current(self) -> None:
        """Make this the calling thread's current device and create its context."""
        self._npu.npu.set_device(self.index)

    def synchronize(self) -> None:
        """Wait for all streams of the device, layout conversions included."""
        self._npu.npu.synchronize(self.index)

    def empty_cache(self) -> None:
        """Return the caching allocator's unused memory."""
        self._npu.npu.empty_cache()

    def private_format(self, tensor: torch.Tensor) -> int:
        """The ``acl_format`` of a private layout (29 is NZ); :data:`~vllm_rfork.devices.base.PLAIN` otherwise."""
        if tensor.device.type != self.device.type:
            return PLAIN
        number = int(self._npu.get_npu_format(tensor))
        return PLAIN if number in _PLAIN_FORMATS else number

    def empty_in_format(self, shape: Sequence[int], dtype: torch.dtype, private_format: int) -> torch.Tensor:
        """An uninitialised tensor on this device; torch_npu sizes its storage for the layout."""
        tensor: torch.Tensor = self._npu.empty_with_format(
            tuple(shape), dtype=dtype, device=self.device, acl_format=private_format or ND
        )
        return tensor

    def extent(self, tensor: torch.Tensor) -> tuple[int, int]:
        """As in the base class for plain tensors; the whole storage with its padding for a private layout."""
        if self.private_format(tensor) == PLAIN:
            return super().extent(tensor)
        storage = tensor.untyped_storage()
        if tensor.data_ptr() != storage.data_ptr():
            raise ForkError("a view into the middle of a tensor in a private layout has no address of its own")
        return storage.data_ptr(), storage.data_ptr() + storage.nbytes()

    def bytes_of(self, tensor: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Through views if the layout is plain; otherwise through an alias without a layout."""
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
        """2 MiB if the engine uses HIXL, whose ``auto`` and ``hccs`` routes require it; otherwise 1.

        The newest generation always uses HIXL, on the route in ``YR_TE_HIXL_ROUTE`` or RoCE.
        """
        given = os.environ if environment is None else environment
        backend, route = (given.get(name, "").strip().lower() for name in ("TRANSFER_ENGINE_BACKEND", ROUTE_VARIABLE))
        return HIXL_ALIGNMENT if backend == "hixl" or route in ALIGNED_ROUTES else 1

    def _snapshot(self) -> Iterable[Mapping[str, Any]]:
        segments: list[Mapping[str, Any]] = self._npu.npu.memory_snapshot()
        return segments
