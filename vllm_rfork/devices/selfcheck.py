"""Does this machine's device behave as the rest of the package takes for granted?

    python -m vllm_rfork.devices.selfcheck npu:0

Prints one line per assumption, ``ok`` or ``DIFFERS``, and ends with 1 where one differs. For whoever has hardware that
the authors have not: what it prints is the answer to send. It needs no model and no peer.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import torch

from vllm_rfork.devices.allocator_blocks import HIXL_ALIGNMENT, BlockMap
from vllm_rfork.devices.base import PLAIN, DeviceSide
from vllm_rfork.devices.npu import NpuSide
from vllm_rfork.devices.registry import device_side
from vllm_rfork.errors import ForkError
from vllm_rfork.manifest.schema import Region

#: NZ: 16 rows by 32 bytes a tile. A matrix that fills no whole number of them is padded.
NZ = 29
WHOLE, PADDED = (64, 64), (50, 70)


class Differs(Exception):
    """An assumption does not hold; the text says what was seen."""


#: How hardware that nobody has seen says no.
_SEEN_BADLY = (Differs, ForkError, RuntimeError, AttributeError, TypeError, ValueError, OSError)


def check(side: DeviceSide, say: Callable[[str], object] = print) -> bool:
    """Look at every assumption; whether all of them hold."""
    questions: dict[str, Callable[[DeviceSide], str]] = {
        "number": _number,
        "a device waits when it is told to": _synchronizes,
        "the allocator's blocks hold a fresh tensor": _blocks,
        "what can be registered": _registrable,
        "bytes are seen without changing the tensor": _plain_bytes,
    }
    if isinstance(side, NpuSide):
        questions["a whole matrix in NZ is copied as raw bytes"] = lambda it: _private(it, WHOLE)
        questions["a padded matrix in NZ is copied as raw bytes"] = lambda it: _private(it, PADDED)
        questions["a transposed view of NZ is still NZ"] = _transposed
    fine = True
    for question, answer in questions.items():
        try:
            say(f"ok       {question}: {answer(side)}")
        except _SEEN_BADLY as error:
            fine = False
            say(f"DIFFERS  {question}: {type(error).__name__}: {error}")
    return fine


def _matrix(side: DeviceSide, shape: tuple[int, int]) -> torch.Tensor:
    return (torch.arange(shape[0] * shape[1]) % 251 - 125).to(torch.int8).view(shape).to(side.device)


def _number(side: DeviceSide) -> str:
    return f"{side.text}, which the host calls {side.physical_id()}"


def _synchronizes(side: DeviceSide) -> str:
    total = _matrix(side, (1024, 1024)).to(torch.int64).sum()
    side.synchronize()
    return f"sum {int(total)}"


def _blocks(side: DeviceSide) -> str:
    tensor = _matrix(side, (2048, 2048))
    blocks = side.blocks()
    start, end = side.extent(tensor)
    if blocks and BlockMap(blocks).holding(Region(start, end - start)) is None:
        raise Differs(f"none of {len(blocks)} blocks holds {start:#x}")
    aligned = sum(block.address % HIXL_ALIGNMENT == 0 for block in blocks)
    return f"{len(blocks)} blocks, {aligned} of them begin at a multiple of 2 MiB"


def _registrable(side: DeviceSide) -> str:
    tensor = _matrix(side, (2048, 2048))
    start, end = side.extent(tensor)
    expandable = sum(block.expandable for block in side.blocks())
    reason = side.unregistrable([Region(start, end - start)])
    return f"{expandable} blocks are expandable; {reason or 'nothing is refused'}"


def _plain_bytes(side: DeviceSide) -> str:
    tensor = _matrix(side, WHOLE)
    wanted, before = tensor.cpu(), side.private_format(tensor)
    data = side.bytes_of(tensor, *side.extent(tensor))
    doubled = data.clone()
    side.synchronize()
    if not torch.equal(doubled.cpu().view(torch.int8).view(WHOLE), wanted):
        raise Differs("the bytes are not the tensor's")
    if side.private_format(tensor) != before or not torch.equal((tensor + tensor.neg()).cpu(), wanted * 0):
        raise Differs("looking at the bytes has changed the tensor")
    return f"{data.numel()} bytes"


def _in_nz(side: DeviceSide, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    torch_npu = importlib.import_module("torch_npu")
    torch_npu.npu.config.allow_internal_format = True  # vLLM-Ascend sets it
    plain = _matrix(side, shape)
    return plain.cpu(), torch_npu.npu_format_cast(plain, NZ)


def _private(side: DeviceSide, shape: tuple[int, int]) -> str:
    wanted, source = _in_nz(side, shape)
    number = side.private_format(source)
    if number == PLAIN:
        raise Differs("a matrix that was cast to NZ is plain")
    target = side.empty_in_format(source.shape, source.dtype, number)
    side.synchronize()
    (one, end), (other, until) = side.extent(source), side.extent(target)
    if end - one != until - other:
        raise Differs(f"{end - one} bytes where it was cast, {until - other} where it was allocated")
    side.bytes_of(target, other, until).copy_(side.bytes_of(source, one, end))
    side.synchronize()
    for tensor, which in ((source, "source"), (target, "copy")):
        back = importlib.import_module("torch_npu").npu_format_cast(tensor, 2)
        if not torch.equal(back.cpu(), wanted):
            raise Differs(f"the {which} does not hold the matrix any more")
    return f"format {number}, {end - one} bytes for {wanted.numel()} elements"


def _transposed(side: DeviceSide) -> str:
    _, source = _in_nz(side, WHOLE)
    if side.private_format(source.t()) != side.private_format(source):
        raise Differs(f"format {side.private_format(source.t())}")
    if side.extent(source.t()) != side.extent(source):
        raise Differs("it lies elsewhere")
    return "same storage"


def main(arguments: list[str]) -> int:
    """The exit status for ``arguments``: 0 fine, 1 something differs, 2 there is no such device."""
    name = arguments[0] if arguments else "cpu"
    try:
        if name.partition(":")[0] == "npu":
            importlib.import_module("torch_npu")  # before it torch knows no such device
        side = device_side(torch.device(name))
    except (ForkError, ImportError, RuntimeError) as error:
        print(f"there is no {name} here: {error}", file=sys.stderr)
        return 2
    return 0 if check(side) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
