"""The doctor's examination of one engine, in a process of its own: a native package may crash or hang.

``engine_probe ENGINE DEVICE_TYPE...`` prints an :class:`Examination` as JSON, or a :class:`Refusal` with the exit
status 3 if something is not installed, 4 if something does not work.
"""

from __future__ import annotations

import os
import sys
import typing
from collections.abc import Sequence

import msgspec

from vllm_rfork.engines.base import Place, TransferEngine
from vllm_rfork.engines.registry import engine_class
from vllm_rfork.errors import EngineError, EngineUnavailable

UNAVAILABLE, BROKEN = 3, 4
PLACES: tuple[Place, ...] = typing.get_args(Place)


class Lane(msgspec.Struct, frozen=True):
    """An engine's lane to a peer at ``place``, or the reason why there is none."""

    engine: str
    device_type: str
    place: Place
    lane: str | None = None
    reason: str = ""


class Examination(msgspec.Struct, frozen=True):
    """The parts of an engine that work, and its lanes for the device types of this machine."""

    works: str
    lanes: list[Lane]


class Refusal(msgspec.Struct, frozen=True):
    """The reason why an engine does not work, and the remedy if it has one."""

    reason: str
    remedy: str = ""


def examine(name: str, device_types: Sequence[str]) -> Examination:
    """Examine engine ``name``. Raises EngineError."""
    cls = engine_class(name)
    works = cls.self_check()
    own = [kind for kind in device_types if kind in cls.device_types]
    return Examination(works, [_lane(cls, kind, place) for kind in own for place in PLACES])


def _lane(cls: type[TransferEngine], device_type: str, place: Place) -> Lane:
    try:
        return Lane(cls.name, device_type, place, cls.lane_to(place, device_type))
    except EngineError as error:
        return Lane(cls.name, device_type, place, reason=error.text)


def main() -> None:
    """Examine the engine that the command line names; ends the process."""
    # UCX warns on its own about every transport that a machine lacks.
    os.environ.setdefault("UCX_LOG_LEVEL", "fatal")
    found: Examination | Refusal
    status = 0
    try:
        found = examine(sys.argv[1], sys.argv[2:])
    except EngineUnavailable as error:
        status, found = UNAVAILABLE, Refusal(error.text.removesuffix(f"; {error.hint}"), error.hint)
    except EngineError as error:
        status, found = BROKEN, Refusal(str(error).removeprefix(f"engine {error.engine}: "))
    print(msgspec.json.encode(found).decode(), flush=True)
    os._exit(status)  # some native libraries crash when the interpreter ends


if __name__ == "__main__":
    main()
