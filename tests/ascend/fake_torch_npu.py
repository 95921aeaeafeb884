"""A stand-in for ``torch_npu`` over host memory, with the functions that the package calls and nothing else.

``test_symbols.py`` holds its names and signatures to what the published wheels have. A tensor in NZ format is laid out
as on an NPU: tiles of 16 rows by 32 bytes, column of tiles after column of tiles, padded to whole tiles, while its
shape and strides say nothing about that. So its raw bytes can be copied, and reading it as if it were plain gives
nonsense, as on the device.
"""

from __future__ import annotations

import ctypes
import enum
import types
from typing import Any

import torch

TILE_ROWS = 16
TILE_NBYTES = 32


class Format(enum.IntEnum):
    """The formats that matter here, numbered as torch_npu does."""

    NCHW = 0
    ND = 2
    FRACTAL_NZ = 29


class _Npu(types.ModuleType):
    """``torch_npu.npu``."""

    def __init__(self, segments: list[dict[str, Any]]) -> None:
        super().__init__("torch_npu.npu")
        self.calls: list[tuple[str, Any]] = []
        self.segments = segments
        self.config = types.SimpleNamespace(allow_internal_format=False)

    def synchronize(self, device: Any = None) -> None:
        self.calls.append(("synchronize", device))

    def empty_cache(self) -> None:
        self.calls.append(("empty_cache", None))

    def set_device(self, device: Any) -> None:
        self.calls.append(("set_device", device))

    def current_device(self) -> int:
        return 3

    def memory_snapshot(self, mempool_id: Any = None) -> list[dict[str, Any]]:
        return self.segments


class _C(types.ModuleType):
    """``torch_npu._C``."""

    @staticmethod
    def _weak_ref_tensor(tensor: torch.Tensor) -> torch.Tensor:
        """A tensor over the same memory whose storage is a new one, owns nothing and knows no format."""
        nbytes = tensor.numel() * tensor.element_size()
        memory = (ctypes.c_char * nbytes).from_address(tensor.data_ptr())
        return torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


class FakeTorchNpu(types.ModuleType):
    """``torch_npu``; formats are kept per storage object, as the real one does."""

    def __init__(self, segments: list[dict[str, Any]] | None = None) -> None:
        super().__init__("torch_npu")
        self.npu = _Npu(segments or [])
        self._C = _C("torch_npu._C")
        self.Format = Format
        self._formats: dict[int, Format] = {}
        self._alive: list[torch.Tensor] = []

    def get_npu_format(self, tensor: torch.Tensor) -> Format:
        return self._formats.get(tensor.untyped_storage()._cdata, Format.ND)

    def npu_format_cast(
        self, tensor: torch.Tensor, acl_format: int, customize_dtype: Any = None, input_dtype: Any = None
    ) -> torch.Tensor:
        if acl_format == Format.FRACTAL_NZ:
            result = self.empty_with_format(tensor.shape, dtype=tensor.dtype, acl_format=acl_format)
            _tiles(result).copy_(_padded(tensor, result))
            return result
        if self.get_npu_format(tensor) != Format.FRACTAL_NZ:
            return tensor
        rows, columns = tensor.shape
        tiles = _tiles(tensor)
        return tiles.permute(1, 2, 0, 3).reshape(tiles.shape[1] * TILE_ROWS, -1)[:rows, :columns].contiguous()

    def empty_with_format(
        self,
        size: Any,
        *,
        dtype: torch.dtype | None = None,
        layout: Any = None,
        device: Any = None,
        pin_memory: Any = None,
        acl_format: int = 2,
        base_addr_aligned_kb: Any = None,
    ) -> torch.Tensor:
        if acl_format != Format.FRACTAL_NZ:
            return torch.empty(tuple(size), dtype=dtype)
        rows, columns = size
        of_tile = TILE_NBYTES // torch.empty(0, dtype=dtype).element_size()
        padded = -(-rows // TILE_ROWS) * TILE_ROWS * -(-columns // of_tile) * of_tile
        storage = torch.zeros(padded, dtype=dtype)
        self._formats[storage.untyped_storage()._cdata] = Format.FRACTAL_NZ
        self._alive.append(storage)  # an identity would be used again
        return storage.as_strided((rows, columns), (columns, 1))


def _tiles(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage of an NZ matrix as columns of tiles: ``[tile column, tile row, row, element]``."""
    rows, of_tile = -(-tensor.shape[0] // TILE_ROWS), TILE_NBYTES // tensor.element_size()
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((elements,), (1,), 0).view(-1, rows, TILE_ROWS, of_tile)


def _padded(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    tiles = _tiles(like)
    columns, rows = tiles.shape[0] * tiles.shape[3], tiles.shape[1] * TILE_ROWS
    whole = torch.zeros(rows, columns, dtype=tensor.dtype)
    whole[: tensor.shape[0], : tensor.shape[1]] = tensor
    return whole.view(tiles.shape[1], TILE_ROWS, tiles.shape[0], tiles.shape[3]).permute(2, 0, 1, 3)


def segment(address: int, total_size: int, *, device: int = 0, expandable: bool = False) -> dict[str, Any]:
    """One segment as ``memory_snapshot()`` of torch and torch_npu gives it, with one active block."""
    return {
        "device": device,
        "address": address,
        "total_size": total_size,
        "allocated_size": total_size,
        "active_size": total_size,
        "requested_size": total_size - 100,
        "stream": 0,
        "segment_type": "large" if total_size > 1 << 20 else "small",
        "segment_pool_id": (0, 0),
        "is_expandable": expandable,
        "frames": [],
        "blocks": [
            {
                "address": address,
                "size": total_size,
                "requested_size": total_size - 100,
                "state": "active_allocated",
                "frames": [],
            }
        ],
    }
