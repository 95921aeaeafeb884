"""Checks the assumptions of the package about this machine's device.

    python -m vllm_rfork.devices.selfcheck npu:0

Prints one line per assumption, ``ok`` or ``DIFFERS``, and exits with 1 if one differs. For hardware that the authors do
not have: please send its output. Needs neither a model nor a peer.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import torch

from vllm_rfork.devices.allocator_blocks import BlockMap
from vllm_rfork.devices.base import PLAIN, DeviceBackend
from vllm_rfork.devices.npu import NpuBackend
from vllm_rfork.devices.registry import device_backend
from vllm_rfork.errors import ForkError
from vllm_rfork.manifest.alignment import HIXL_ALIGNMENT
from vllm_rfork.manifest.schema import Region

#: NZ: tiles of 16 rows by 32 bytes. A matrix that is not a whole number of tiles is padded.
NZ = 29
WHOLE, PADDED = (64, 64), (50, 70)


class Differs(Exception):
    """An assumption does not hold; the text describes what was found."""


#: The ways in which unknown hardware fails.
_FAILURES = (Differs, ForkError, RuntimeError, AttributeError, TypeError, ValueError, OSError)


def check(backend: DeviceBackend, say: Callable[[str], object] = print) -> bool:
    """Check every assumption; returns True if all of them hold."""
    checks: dict[str, Callable[[DeviceBackend], str]] = {
        "number": _number,
        "synchronize waits": _synchronizes,
        "the allocator's blocks contain a new tensor": _blocks,
        "memory can be registered": _registrable,
        "bytes can be read without changing the tensor": _plain_bytes,
    }
    if isinstance(backend, NpuBackend):
        checks["a whole matrix in NZ is copied as raw bytes"] = lambda each: _private(each, WHOLE)
        checks["a padded matrix in NZ is copied as raw bytes"] = lambda each: _private(each, PADDED)
        checks["a transposed view of NZ is still NZ"] = _transposed
    fine = True
    for assumption, examine in checks.items():
        try:
            say(f"ok       {assumption}: {examine(backend)}")
        except _FAILURES as error:
            fine = False
            say(f"DIFFERS  {assumption}: {type(error).__name__}: {error}")
    return fine


def _matrix(backend: DeviceBackend, shape: tuple[int, int]) -> torch.Tensor:
    return (torch.arange(shape[0] * shape[1]) % 251 - 125).to(torch.int8).view(shape).to(backend.device)


def _number(backend: DeviceBackend) -> str:
    return f"{backend.name}, on the host {backend.physical_id()}"


def _synchronizes(backend: DeviceBackend) -> str:
    total = _matrix(backend, (1024, 1024)).to(torch.int64).sum()
    backend.synchronize()
    return f"sum {int(total)}"


def _blocks(backend: DeviceBackend) -> str:
    tensor = _matrix(backend, (2048, 2048))
    blocks = backend.blocks()
    start, end = backend.extent(tensor)
    if blocks and BlockMap(blocks).holding(Region(start, end - start)) is None:
        raise Differs(f"none of {len(blocks)} blocks contains {start:#x}")
    aligned = sum(block.address % HIXL_ALIGNMENT == 0 for block in blocks)
    return f"{len(blocks)} blocks, {aligned} of them begin at a multiple of 2 MiB"


def _registrable(backend: DeviceBackend) -> str:
    tensor = _matrix(backend, (2048, 2048))
    start, end = backend.extent(tensor)
    expandable = sum(block.expandable for block in backend.blocks())
    reason = backend.registration_obstacle([Region(start, end - start)])
    return f"{expandable} blocks are expandable; {reason or 'no obstacle'}"


def _plain_bytes(backend: DeviceBackend) -> str:
    tensor = _matrix(backend, WHOLE)
    wanted, before = tensor.cpu(), backend.private_format(tensor)
    data = backend.bytes_of(tensor, *backend.extent(tensor))
    doubled = data.clone()
    backend.synchronize()
    if not torch.equal(doubled.cpu().view(torch.int8).view(WHOLE), wanted):
        raise Differs("the bytes are not the tensor's")
    if backend.private_format(tensor) != before or not torch.equal((tensor + tensor.neg()).cpu(), wanted * 0):
        raise Differs("reading the bytes changed the tensor")
    return f"{data.numel()} bytes"


def _in_nz(backend: DeviceBackend, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    torch_npu = importlib.import_module("torch_npu")
    torch_npu.npu.config.allow_internal_format = True  # vLLM-Ascend sets it
    plain = _matrix(backend, shape)
    return plain.cpu(), torch_npu.npu_format_cast(plain, NZ)


def _private(backend: DeviceBackend, shape: tuple[int, int]) -> str:
    wanted, source = _in_nz(backend, shape)
    number = backend.private_format(source)
    if number == PLAIN:
        raise Differs("a matrix that was cast to NZ is plain")
    target = backend.empty_in_format(source.shape, source.dtype, number)
    backend.synchronize()
    (one, end), (other, until) = backend.extent(source), backend.extent(target)
    if end - one != until - other:
        raise Differs(f"{end - one} bytes after a cast, {until - other} after an allocation")
    backend.bytes_of(target, other, until).copy_(backend.bytes_of(source, one, end))
    backend.synchronize()
    for tensor, which in ((source, "source"), (target, "copy")):
        back = importlib.import_module("torch_npu").npu_format_cast(tensor, 2)
        if not torch.equal(back.cpu(), wanted):
            raise Differs(f"the {which} no longer contains the matrix")
    return f"format {number}, {end - one} bytes for {wanted.numel()} elements"


def _transposed(backend: DeviceBackend) -> str:
    _, source = _in_nz(backend, WHOLE)
    if backend.private_format(source.t()) != backend.private_format(source):
        raise Differs(f"format {backend.private_format(source.t())}")
    if backend.extent(source.t()) != backend.extent(source):
        raise Differs("its address differs")
    return "same storage"


def main(arguments: list[str]) -> int:
    """The exit status for ``arguments``: 0 all hold, 1 one differs, 2 there is no such device."""
    name = arguments[0] if arguments else "cpu"
    try:
        if name.partition(":")[0] == "npu":
            importlib.import_module("torch_npu")  # without it, torch does not know the device type
        backend = device_backend(torch.device(name))
    except (ForkError, ImportError, RuntimeError) as error:
        print(f"no device {name}: {error}", file=sys.stderr)
        return 2
    return 0 if check(backend) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
