"""The caches that this process has written or used, collected after warm-up for the receivers of its seed.

Files are described by their content where they lie. They are collected once: what vLLM compiles later is not offered.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_rfork.caches import bounds
from vllm_rfork.caches.collector import QuietDirectory, collect, everything
from vllm_rfork.caches.directories import as_cache_error, open_file, opened_below, opened_root
from vllm_rfork.caches.manifest import LEVELS, Artifact, ArtifactFile, check_artifact, encode_offer
from vllm_rfork.caches.offered import Offered, OfferedArtifact
from vllm_rfork.errors import CacheError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.startup import times
from vllm_rfork.startup.settings import JSON_NBYTES, ORDER, QUIET_WITHIN_S, CacheSettings
from vllm_rfork.vllm_compat.start_up.listener import CachePlace, JsonPlace, Place

logger = worker_logger(__name__)

#: Pause between two looks at the directories, in seconds.
_PAUSE_S = 1.0


@dataclass(frozen=True)
class _Produced:
    place: Place
    seconds: float | None
    body: bytes | None


@dataclass(frozen=True)
class OfferedBody:
    """A JSON cache in memory."""

    artifact: Artifact
    body: bytes

    def pieces(self) -> Iterator[bytes]:
        """The bytes."""
        yield self.body


class Collection:
    """The places that hooks have reported, and what is collected from them.

    Args:
        clock, sleep: replaced in tests.
    """

    def __init__(
        self,
        settings: CacheSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self._stopped = threading.Event()
        self._settings, self._clock, self._sleep = settings, clock, sleep or self._stopped.wait
        self._lock = threading.Lock()
        self._produced: dict[tuple[str, str], _Produced] = {}
        self._details: dict[str, str] = {}

    def add(self, place: Place, seconds: float | None, body: bytes | None) -> None:
        """Take note of a cache; the latest report of a kind and name counts, and a time that is known stays."""
        key = (place.kind, place.name)
        with self._lock:
            before = self._produced.get(key)
            if before is None and len(self._produced) >= bounds.MAX_ARTIFACTS:
                return
            if seconds is None and before is not None:
                seconds = before.seconds
            self._produced[key] = _Produced(place, seconds, body)

    def explain(self, details: Mapping[str, str]) -> None:
        """Take note of the texts behind digests. The first text of a path stays; those out of bounds are dropped."""
        with self._lock:
            for name, text in details.items():
                short = 1 <= len(name) <= bounds.MAX_FACT_NAME and len(text) <= bounds.MAX_FACT_VALUE
                if short and len(self._details) < bounds.MAX_DETAILS:
                    self._details.setdefault(name, text)

    @property
    def details(self) -> dict[str, str]:
        """The texts so far."""
        with self._lock:
            return dict(self._details)

    def stop(self) -> None:
        """End :meth:`collected` soon: the process ends, and others may remove its files. Returns at once."""
        self._stopped.set()

    def collected(self) -> Offered | None:
        """Wait until the directories are quiet, for :data:`QUIET_WITHIN_S` at most, and describe what they contain.

        An artifact that cannot be offered, or that would make the list longer than receivers accept, is left out.
        None after :meth:`stop`.
        """
        with self._lock:
            produced = sorted(self._produced.values(), key=lambda each: ORDER.index(each.place.kind))
        produced = [each for each in produced if self._may_offer(each.place.kind)]
        noisy = self._wait_until_quiet([each.place for each in produced if isinstance(each.place, CachePlace)])
        artifacts: list[OfferedArtifact] = []
        details = self.details
        for each in produced:
            if self._stopped.is_set():
                return None
            try:
                made = _json(each, each.place) if isinstance(each.place, JsonPlace) else _files(each, each.place, noisy)
                encode_offer(Offered((*artifacts, made), details).offer(code=True))
                artifacts.append(made)
            except CacheError as error:
                if self._stopped.is_set():
                    return None
                logger.info("caches: %s %s is not offered: %s", each.place.kind, each.place.name, error)
        return None if self._stopped.is_set() else Offered(tuple(artifacts), details)

    def _may_offer(self, kind: str) -> bool:
        return LEVELS[kind] == "safe" or self._settings.offering_obstacle is None

    def _wait_until_quiet(self, places: list[CachePlace]) -> dict[Path, str]:
        """Wait; returns the directories that are not quiet or cannot be read, each with the reason."""
        directories = {_directory(each): each.only or everything for each in places}
        watched = {each: QuietDirectory(each, only=only, clock=self._clock) for each, only in directories.items()}
        failed: dict[Path, str] = {}
        deadline = self._clock() + QUIET_WITHIN_S
        while watched and not self._stopped.is_set():
            for each, directory in list(watched.items()):
                try:
                    if directory.look():
                        del watched[each]
                except CacheError as error:
                    failed[each] = str(error)
                    del watched[each]
            if self._clock() >= deadline:
                break
            if watched:
                self._sleep(_PAUSE_S)
        return failed | {each: f"{each} was still changing after {QUIET_WITHIN_S:g} s" for each in watched}


def _directory(place: CachePlace) -> Path:
    return place.root.joinpath(*place.directory)


def _files(each: _Produced, place: CachePlace, noisy: Mapping[Path, str]) -> OfferedArtifact:
    directory = _directory(place)
    if directory in noisy:
        raise CacheError(noisy[directory])
    seconds = times.noted(place) if each.seconds is None else each.seconds
    made = collect(
        directory,
        kind=place.kind,
        name=place.name,
        identity=dict(place.identity),
        seconds=seconds,
        only=place.only or everything,
    )
    if seconds is not None:
        times.note(place, seconds)
    return made


def _json(each: _Produced, place: JsonPlace) -> OfferedBody:
    body = place.check(_content(place) if each.body is None else each.body)
    file = ArtifactFile(place.file, len(body), hashlib.sha256(body).hexdigest())
    artifact = Artifact(place.kind, place.name, dict(place.identity), (file,), each.seconds)
    check_artifact(artifact)
    return OfferedBody(artifact, body)


def _content(place: JsonPlace) -> bytes:
    """The file at ``place``. Raises CacheError if it cannot be read, or is too large."""
    path = place.root.joinpath(*place.directory, place.file)
    with as_cache_error(f"{path} cannot be read"), opened_root(place.root) as top:
        with opened_below(top, place.directory) as directory:
            descriptor = open_file(place.file, directory)
        with os.fdopen(descriptor, "rb") as file:
            content = file.read(JSON_NBYTES[place.kind] + 1)
    if len(content) > JSON_NBYTES[place.kind]:
        raise CacheError(f"{path} has more than {JSON_NBYTES[place.kind]} bytes")
    return content
