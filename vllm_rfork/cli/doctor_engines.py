"""The doctor's checks of the engines, and the lanes that workers would use from here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import msgspec

from vllm_rfork.cli.engine_probe import BROKEN, PLACES, UNAVAILABLE, Examination, Lane, Refusal
from vllm_rfork.cli.findings import FAIL, NOTE, OK, Finding
from vllm_rfork.engines.base import Place
from vllm_rfork.engines.registry import AUTO_ORDER, ENGINES, engine_names
from vllm_rfork.logs.quoting import printable

#: Bound of one engine's examination, in seconds.
BOUND_S = 60.0
#: The engine of tests and demos, which works everywhere and is never selected by ``auto``.
_TESTS_ONLY = "memory"
#: The beginning of the names of findings about lanes.
LANE = "lane "
#: Lanes on which one process reads another's memory, or proves by it that the other is alive.
_NEED_ATTACH = frozenset({"memory", "nixl/cma", "nixl/cuda_ipc"})
_NO_FORK = "workers neither fork nor become seeds with expandable segments, see allocator"
_EXAMINE = "from vllm_rfork.cli.engine_probe import main\nmain()"
_PLACES: dict[Place, str] = {
    "container": "in this container",
    "host": "in another container of this host",
    "elsewhere": "on another host",
}


@dataclass(frozen=True)
class Examined:
    """The finding about one engine, and its lanes; none if it does not work here."""

    finding: Finding
    lanes: list[Lane]


def names(wanted: str | None) -> list[str]:
    """The engines to examine: all but the one of tests, unless it is ``wanted``."""
    return [name for name in engine_names() if name != _TESTS_ONLY or name == wanted]


def engine(name: str, *, wanted: bool, device_types: Sequence[str] = ("cpu",)) -> Examined:
    """The state of engine ``name`` on this host; ``wanted`` makes its absence a failure."""
    check = f"engine {name}"
    command = [sys.executable, "-c", _EXAMINE, name, *device_types]
    try:
        done = subprocess.run(  # noqa: S603 - this very Python, and a constant
            command, capture_output=True, text=True, errors="replace", check=False, timeout=BOUND_S
        )
    except subprocess.TimeoutExpired:
        return Examined(Finding(check, FAIL, f"its start did not end within {BOUND_S:g} s", "reinstall it"), [])
    if done.returncode not in (0, UNAVAILABLE, BROKEN):
        return Examined(_crashed(name, done), [])
    last = (done.stdout.splitlines() or [""])[-1]
    found: Examination | Refusal
    try:
        if done.returncode:
            found = msgspec.json.decode(last, type=Refusal)
        else:
            found = msgspec.json.decode(last, type=Examination)
    except msgspec.MsgspecError:
        return Examined(_crashed(name, done), [])
    if isinstance(found, Examination):
        return Examined(Finding(check, OK, f"{printable(found.works)}{_versions(name)}"), found.lanes)
    remedy = found.remedy or f"vllm-rfork selftest --engine {name} shows more"
    if not wanted and not any(name in order for order in AUTO_ORDER.values()):
        remedy = f"only if rfork_engine is to name it: {remedy}"
    return Examined(Finding(check, FAIL if wanted else NOTE, f"{found.reason}{_versions(name)}", remedy), [])


def _crashed(name: str, done: subprocess.CompletedProcess[str]) -> Finding:
    """The finding about an examination that has no result."""
    said = printable((done.stderr.strip().splitlines() or ["no message"])[-1])
    if done.returncode < 0:
        said = f"its start ended by signal {-done.returncode}: {said}"
    advice = "reinstall it for this Python and this processor"
    return Finding(f"engine {name}", FAIL, f"{said}{_versions(name)}", advice)


def _versions(name: str) -> str:
    """The installed packages of an engine of this distribution, with their versions, in brackets."""
    found = []
    for package in ENGINES[name].packages if name in ENGINES else ():
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f" ({', '.join(found)})" if found else ""


def lanes(
    examined: Mapping[str, Sequence[Lane]], device_types: Sequence[str], *, attach: bool, expandable: bool
) -> list[Finding]:
    """The lane to a peer at each place, for each device type of this machine, in the order of ``rfork_engine=auto``.

    The reasons against engines that work here but have no lane to a place follow.

    Args:
        examined: lanes by engine; none for an engine that does not work here.
        attach: one process may read another's memory here.
        expandable: torch's allocator uses expandable segments.
    """
    blocked = {} if attach else dict.fromkeys(_NEED_ATTACH, "see cross-memory attach")
    known = [_checked(each, blocked, expandable=expandable) for found in examined.values() for each in found]
    used, refused = [], []
    for device_type in device_types:
        for place in PLACES:
            here = {each.engine: each for each in known if (each.device_type, each.place) == (device_type, place)}
            ordered = [here[name] for name in AUTO_ORDER[device_type] if name in here]
            check = f"{LANE}{device_type}, peer {_PLACES[place]}"
            used.append(_used(check, [each.lane for each in ordered if each.lane is not None]))
            refused += [
                Finding(f"{check}: {each.engine}", NOTE, f"not possible: {each.reason}")
                for each in ordered
                if each.lane is None
            ]
    return used + refused


def _used(check: str, possible: Sequence[str]) -> Finding:
    """The lane that a fork takes, and those that it tries next."""
    if not possible:
        return Finding(check, NOTE, "none: workers load from storage", "make one of the engines above work")
    return Finding(check, OK, ", then ".join(possible))


def _checked(lane: Lane, blocked: Mapping[str, str], *, expandable: bool) -> Lane:
    """``lane``, or the reason against it from another check."""
    if lane.lane is None:
        return lane
    reason = _NO_FORK if expandable and lane.device_type == "cuda" else blocked.get(lane.lane)
    return lane if reason is None else Lane(lane.engine, lane.device_type, lane.place, reason=reason)
