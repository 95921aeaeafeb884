"""What seeds of the installed base tell of their weights: name, address, count, element size, and little more.

The forms differ from generation to generation and are not compatible with each other (``docs/interop.md``):
receivers of vLLM-Ascend 0.18 take entries of exactly three items, 0.23 to 0.28 of three or four and ask for shapes
separately, 0.29 and newer of exactly five, with a protocol version and a format for every name. Only the first two
generations use the documented seed key, so theirs is the default.

Must not import torch: it reads the manifest.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from vllm_rfork.manifest.schema import Manifest, TensorEntry

PROTOCOL_VERSION = 1

INFO = "rfork_transfer_engine_info"
SHAPE_INFO = "rfork_transfer_engine_shape_info"
FORMAT_INFO = "rfork_transfer_engine_format_info"
VERSION = "rfork_protocol_version"

#: torch's dtype names → bytes per element. A dtype that is not here cannot be told to the installed base.
_ELEMENT_NBYTES = {
    "bool": 1, "uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1, "uint16": 2, "int16": 2, "float16": 2, "bfloat16": 2, "uint32": 4, "int32": 4, "float32": 4,
    "uint64": 8, "int64": 8, "float64": 8, "complex64": 8, "complex128": 16,
}  # fmt: skip


class Generation(enum.Enum):
    """Which receivers are spoken to; none of the forms can be read by both."""

    #: vLLM-Ascend 0.18 to 0.28: entries ``[ptr, numel, element_size]``, shapes by a call of their own.
    PLAIN = "plain"
    #: vLLM-Ascend 0.29 and newer: entries ``[ptr, numel, element_size, shape, dtype]``, version and formats.
    TYPED = "typed"


@dataclass(frozen=True)
class InstalledTensor:
    """One tensor as the installed base reads it: ``numel * element_nbytes`` bytes from ``address`` on."""

    address: int
    numel: int
    element_nbytes: int
    shape: tuple[int, ...]
    dtype: str
    format: int = 0


@dataclass(frozen=True)
class InstalledBase:
    """A seed's weights for receivers of the installed base.

    Nothing of it says in which layout the bytes are: make one only where the weights before and after vLLM's
    post-load processing are the same bytes under the same names.

    Attributes:
        session: ``host:port`` of the YuanRong engine.
        tensors: by the name that receivers ask for, which is the parameter's.
    """

    session: str
    tensors: Mapping[str, InstalledTensor]
    generation: Generation = Generation.PLAIN

    @classmethod
    def from_manifest(
        cls, manifest: Manifest, session: str, generation: Generation = Generation.PLAIN
    ) -> InstalledBase:
        """All tensors of ``manifest`` that occupy one gapless run of memory; the others cannot be told."""
        told = {tensor.name: _told(manifest, tensor) for tensor in manifest.tensors}
        return cls(session, {name: tensor for name, tensor in told.items() if tensor is not None}, generation)


def _told(manifest: Manifest, tensor: TensorEntry) -> InstalledTensor | None:
    """``tensor`` as an entry, None where an entry would let a receiver read other bytes than the tensor's."""
    element_nbytes = _ELEMENT_NBYTES.get(tensor.dtype)
    if element_nbytes is None or tensor.span < 0 or not _gapless(tensor):
        return None
    return InstalledTensor(
        address=manifest.spans[tensor.span].address + tensor.offset,
        numel=math.prod(tensor.shape),
        element_nbytes=element_nbytes,
        shape=tensor.shape,
        dtype=tensor.dtype,
        format=tensor.format,
    )


def _gapless(tensor: TensorEntry) -> bool:
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(tensor.stride, tensor.shape, strict=True) if si != 1):
        if stride != expected:
            return False
        expected *= size
    return expected > 0


def info_payload(offered: InstalledBase | None) -> bytes:
    """JSON for ``/get_rfork_transfer_engine_info``; None gives the null payload."""
    if offered is None:
        return msgspec.json.encode({INFO: None})
    typed = offered.generation is Generation.TYPED
    entries = {name: _entry(tensor, typed=typed) for name, tensor in offered.tensors.items()}
    payload: dict[str, Any] = {INFO: [offered.session, entries]}
    if typed:  # the version promises five items, so the plain form must not carry it
        payload[VERSION] = PROTOCOL_VERSION
        payload[FORMAT_INFO] = {name: tensor.format for name, tensor in offered.tensors.items()}
    return msgspec.json.encode(payload)


def _entry(tensor: InstalledTensor, *, typed: bool) -> list[Any]:
    plain: list[Any] = [tensor.address, tensor.numel, tensor.element_nbytes]
    return [*plain, list(tensor.shape), tensor.dtype] if typed else plain


def shape_payload(offered: InstalledBase | None) -> bytes:
    """JSON for ``/get_rfork_transfer_engine_shape_info``; None gives the null payload."""
    shapes = None if offered is None else {name: list(tensor.shape) for name, tensor in offered.tensors.items()}
    return msgspec.json.encode({SHAPE_INFO: shapes})
