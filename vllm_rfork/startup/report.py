"""The report of one start: what became of each kind of cache, as one log line and for the announcement."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from vllm_rfork.logs.quoting import counted, printable
from vllm_rfork.messages import CacheResults, SeedAddress

#: Characters of one reason in the log line.
_MAX_REASON = 400
#: Reasons that are shown for one kind.
_REASONS = 2
_LEAST_SAVED_S = 0.05


@dataclass
class _Kind:
    """The results of one kind.

    Attributes:
        files: new ones, of artifacts of the seed that vLLM has not refused.
        there: artifacts whose files were there already.
        used: artifacts of the seed that vLLM has used.
        seconds: the time that the used ones took the seed, less the time of loading them here.
    """

    files: int = 0
    there: int = 0
    used: int = 0
    seconds: float = 0.0
    missed: dict[str, str] = field(default_factory=dict)

    def text(self, kind: str) -> str:
        """``torch_aot used (12.5 s saved)``, ``triton 214 files``."""
        if self.used:
            return f"{kind} used" + (f" ({self.seconds:.1f} s saved)" if self.seconds >= _LEAST_SAVED_S else "")
        if self.files:
            return f"{kind} {counted(self.files, 'file')}"
        return f"{kind} there already"

    @property
    def hit(self) -> bool:
        return self.files > 0


@dataclass(frozen=True)
class _Installed:
    files: int
    seconds: float | None


class Results:
    """Collects the results of one start; all methods may be called by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kinds: dict[str, _Kind] = {}
        self._installed: dict[tuple[str, str], _Installed] = {}
        self._counted: set[tuple[str, str]] = set()

    def installed(self, kind: str, name: str, files: int, seconds: float | None) -> None:
        """Take note that the seed's artifact was installed.

        Args:
            files: new ones; 0 if all of them were there already.
            seconds: the time that it took the seed.
        """
        with self._lock:
            each = self._of(kind)
            each.files += files
            each.missed.pop(name, None)  # it was late once; the hook on Triton asks again
            if files:
                self._installed[kind, name] = _Installed(files, seconds)
            else:
                each.there += 1

    def missed(self, kind: str, name: str, reason: str) -> None:
        """Take note that an artifact was not installed; the first word of ``reason`` is its class.

        The first reason stays, but for ``late``: a hook that asks again finds out more.
        """
        with self._lock:
            missed = self._of(kind).missed
            if missed.get(name, "late") == "late":
                missed[name] = reason

    def outcome(self, kind: str, name: str, used: bool, seconds: float | None, reason: str | None) -> None:
        """Take note of whether vLLM used an artifact; it counts if it was the seed's."""
        with self._lock:
            if (kind, name) not in self._installed or (kind, name) in self._counted:
                return
            self._counted.add((kind, name))
            installed, each = self._installed[kind, name], self._of(kind)
            if used:
                each.used += 1
                each.seconds += max(0.0, (installed.seconds or 0.0) - (seconds or 0.0))
            else:
                each.missed[name] = f"refused: {reason or 'vLLM did not use it'}"
                each.files -= installed.files

    def seconds_of(self, kind: str, name: str) -> float | None:
        """The time that an installed artifact took the seed; None if it is not known, or was not installed."""
        with self._lock:
            installed = self._installed.get((kind, name))
        return None if installed is None else installed.seconds

    def results(self) -> CacheResults:
        """The same in single words, for the planner."""
        with self._lock:
            kinds = {
                kind: "hit" if each.hit else _word(next(iter(each.missed.values())))
                for kind, each in self._kinds.items()
                if each.hit or each.missed
            }
            saved_s = sum(each.seconds for each in self._kinds.values())
        return CacheResults(kinds, saved_s if saved_s >= _LEAST_SAVED_S else None)

    def line(self, seed: SeedAddress, nbytes: int, seconds: float) -> str:
        """The log line, for caches of which ``nbytes`` were received in ``seconds``."""
        with self._lock:
            taken = [each.text(kind) for kind, each in self._kinds.items() if each.hit or each.there]
            missed = [f"{kind} ({_reasons(each.missed.values())})" for kind, each in self._kinds.items() if each.missed]
            saved_s = sum(each.seconds for each in self._kinds.values())
        parts = [", ".join(taken) or "nothing was used"]
        if missed:
            parts.append(f"missed {', '.join(missed)}")
        parts.append(f"{nbytes / 1e6:.1f} MB in {seconds:.2f} s")
        if saved_s >= _LEAST_SAVED_S:
            parts.append(f"saved about {saved_s:.1f} s")
        return f"caches from seed {seed}: {'; '.join(parts)}"

    def _of(self, kind: str) -> _Kind:
        return self._kinds.setdefault(kind, _Kind())


def _word(reason: str) -> str:
    return reason.partition(":")[0]


def _reasons(reasons: Iterable[str]) -> str:
    different = list(dict.fromkeys(reasons))
    more = len(different) - _REASONS
    shown = ", ".join(printable(each, _MAX_REASON) for each in different[:_REASONS])
    return shown + (f", and {more} more" if more > 0 else "")


class _Slot:
    lock = threading.Lock()
    results = CacheResults()
    seed_key = ""
    announcing: tuple[Callable[[], None], ...] = ()


def announce(results: CacheResults, seed_key: str = "") -> None:
    """Make ``results`` those that this process announces, at once, as a seed of ``seed_key``, and of no other key."""
    with _Slot.lock:
        changed = results != _Slot.results
        _Slot.results, _Slot.seed_key = results, seed_key
        announcing = _Slot.announcing if changed else ()
    for again in announcing:
        again()


def begin_announcing(again: Callable[[], None]) -> None:
    """Call ``again``, which must return at once, whenever there are other results."""
    with _Slot.lock:
        _Slot.announcing += (again,)


def end_announcing(again: Callable[[], None]) -> None:
    """Undo :func:`begin_announcing`, if there was one."""
    with _Slot.lock:
        _Slot.announcing = tuple(each for each in _Slot.announcing if each != again)


def announced(seed_key: str) -> str:
    """The results of this process's start as text, for the announcement of its seed of ``seed_key``.

    Empty until there are some, and for its other seeds: a start with a draft model would be counted twice.
    """
    with _Slot.lock:
        return str(_Slot.results) if seed_key == _Slot.seed_key else ""
