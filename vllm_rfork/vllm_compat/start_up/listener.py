"""The caches of this worker as its hooks on vLLM describe them, and the one object that they report to.

A hook runs where vLLM is about to read a cache, or has written one. It describes the place; which seed has the same
cache, and how its bytes get there, is the listener's part (``vllm_rfork.startup``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vllm_rfork.caches.paths import Parts

Rewrite = Callable[[bytes, Set[str], Path], bytes]
"""A function of ``caches/rewriting.py``: content, names of the other files of its directory, that directory."""


@dataclass(frozen=True)
class CachePlace:
    """A directory of compiled code, at the moment when vLLM's key for it is final.

    Attributes:
        kind: a key of ``caches.manifest.LEVELS``.
        name: equal on seed and receiver, and different for each artifact of a kind.
        identity: everything that must be equal on both sides, as fact → short text.
        root: the directory that the operator configured, such as ``VLLM_CACHE_ROOT``.
        directory: below ``root``, as this worker's vLLM has computed it.
        last: the file that makes vLLM read the cache; it is installed after all others.
        rewrite: pattern of file names, as a shell's → the function that writes such an index with this worker's paths.
        only: returns True for the path of a file that belongs to this process, and of a directory with such files;
            None for all.
        accepts: returns True for the path of a file that a seed's cache may contain; None for the same as ``only``.
    """

    kind: str
    name: str
    identity: Mapping[str, str]
    root: Path
    directory: Parts
    last: str | None = None
    rewrite: Mapping[str, Rewrite] = field(default_factory=dict)
    only: Callable[[Parts], bool] | None = None
    accepts: Callable[[Parts], bool] | None = None


@dataclass(frozen=True)
class JsonPlace:
    """One JSON file; the attributes of :class:`CachePlace` have the same meaning.

    Attributes:
        file: its name in ``directory``.
        check: parses the bytes against a schema and encodes them again; raises CacheError. Both sides call it.
    """

    kind: str
    name: str
    identity: Mapping[str, str]
    root: Path
    directory: Parts
    file: str
    check: Callable[[bytes], bytes]


Place = CachePlace | JsonPlace


class CacheListener(Protocol):
    """The receiver of all reports. No method raises, or blocks longer than ``installer.LOCK_TIMEOUT_S`` or a vote."""

    def explain(self, details: Mapping[str, str]) -> None:
        """Take note of the short texts behind the digests in identities, as path → text; they name a difference."""

    def about_to_read(self, place: Place) -> bool:
        """Install the seed's cache if it is there and fits; True if files were installed just now."""

    def outcome(
        self, kind: str, name: str, *, used: bool, seconds: float | None = None, reason: str | None = None
    ) -> None:
        """Take note of whether vLLM used a cache.

        Args:
            seconds: the time that loading it took, if known.
            reason: why it was not used, for the log.
        """

    def produced(self, place: Place, seconds: float | None, body: bytes | None = None) -> None:
        """Take note of a cache that this process has written or used, which a seed offers after warm-up.

        Args:
            seconds: the time that it took to produce it; None if it was found or received.
            body: the content of a JSON cache that is not what lies at the place.
        """

    def agree(self, stage: str, obstacle: str | None) -> str | None:
        """The common decision of all ranks of this instance: None if no rank has an obstacle, else one of them."""

    def warm(self) -> None:
        """Take note that warm-up is over: install nothing more, report, and collect what this worker offers."""


class _Nothing:
    """The listener of a process that carries no caches."""

    def explain(self, details: Mapping[str, str]) -> None:
        pass

    def about_to_read(self, place: Place) -> bool:
        return False

    def outcome(
        self, kind: str, name: str, *, used: bool, seconds: float | None = None, reason: str | None = None
    ) -> None:
        pass

    def produced(self, place: Place, seconds: float | None, body: bytes | None = None) -> None:
        pass

    def agree(self, stage: str, obstacle: str | None) -> str | None:
        return obstacle or "this process carries no caches"

    def warm(self) -> None:
        pass


class _Slot:
    present: CacheListener = _Nothing()


def listener() -> CacheListener:
    """The listener of this process; one that does nothing until :func:`listen` has been called."""
    return _Slot.present


def listens() -> bool:
    """Return True if this process carries caches."""
    return not isinstance(_Slot.present, _Nothing)


def listen(new: CacheListener | None) -> None:
    """Make ``new`` the listener of this process; None for the one that does nothing."""
    _Slot.present = _Nothing() if new is None else new
