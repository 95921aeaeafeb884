"""The caches of this worker's start: the listener of the hooks on vLLM, for the receiver and for the seed."""

from __future__ import annotations

import atexit
import fnmatch
import threading
from collections.abc import Callable, Container, Mapping
from pathlib import Path, PurePosixPath

from vllm_rfork.caches.installer import install, install_file, is_there
from vllm_rfork.caches.manifest import Artifact, identity_differences
from vllm_rfork.caches.paths import relative_parts
from vllm_rfork.caches.rewriting import MAX_INDEX_NBYTES
from vllm_rfork.caches.staging import Staged
from vllm_rfork.errors import CacheError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.manifest.facts import described, differences
from vllm_rfork.messages import CacheResults, SeedAddress
from vllm_rfork.metrics import worker as metrics
from vllm_rfork.startup import offers, report
from vllm_rfork.startup.arrivals import Arrivals, Body, Missed
from vllm_rfork.startup.collecting import Collection
from vllm_rfork.startup.fetch import Fetch
from vllm_rfork.startup.settings import ORDER, VOTE_S, CacheSettings
from vllm_rfork.vllm_compat.start_up.listener import CachePlace, JsonPlace, Place, listen
from vllm_rfork.vllm_compat.start_up.roots import cache_root

logger = worker_logger(__name__)

Vote = Callable[[str, str | None, float], str | None]


class WorkerCaches:
    """Implements :class:`~vllm_rfork.vllm_compat.start_up.listener.CacheListener` for one start of this worker.

    Args:
        root: returns the directory of a kind of cache, as the operator configured it.

    Attributes:
        vote: a vote of all ranks: stage, obstacle, bound in seconds → the common rejection or None. Set by the first
            load; a draft model is loaded by the same ranks.
    """

    def __init__(self, settings: CacheSettings, root: Callable[[str], Path]) -> None:
        self.vote: Vote | None = None
        self._settings, self._root = settings, root
        self._arrivals = Arrivals()
        self._collection = Collection(settings)
        self._results = report.Results()
        self._fetch: Fetch | None = None
        self._seed_key = ""
        self._lock = threading.Lock()
        self._warm = False
        offers.begin(self, expected=settings.offers)
        report.announce(CacheResults())
        atexit.register(self._arrivals.close)

    @property
    def is_warm(self) -> bool:
        """True once warm-up is over; another load needs another object."""
        return self._warm

    def seed_known(self, seed: SeedAddress, seed_key: str) -> None:
        """Begin to fetch the caches of ``seed``, in the background; only the first seed of a start counts."""
        with self._lock:
            if self._fetch is not None or self._warm:
                return
            self._fetch = Fetch(self._settings, seed, seed_key, self._arrivals, self._root)
            self._seed_key = seed_key
        if self._settings.level == "code" and (obstacle := self._settings.taking_obstacle) is not None:
            logger.info("caches of code are not taken: %s", obstacle)
        try:
            self._fetch.start()
        except RuntimeError as error:  # the limit of threads
            logger.warning("caches of seed %s were not taken because of %s", seed, error)

    def explain(self, details: Mapping[str, str]) -> None:
        """See :class:`CacheListener`."""
        self._collection.explain(details)

    def about_to_read(self, place: Place) -> bool:
        """See :class:`CacheListener`."""
        if self._fetch is None:
            return False
        try:
            return self._install(place)
        except Missed as missed:
            self._results.missed(place.kind, place.name, str(missed))
        except CacheError as error:
            self._results.missed(place.kind, place.name, f"refused: {error}")
        return False

    def outcome(
        self, kind: str, name: str, *, used: bool, seconds: float | None = None, reason: str | None = None
    ) -> None:
        """See :class:`CacheListener`."""
        self._results.outcome(kind, name, used, seconds, reason)

    def produced(self, place: Place, seconds: float | None, body: bytes | None = None) -> None:
        """See :class:`CacheListener`."""
        received_s = self._results.seconds_of(place.kind, place.name)
        self._collection.add(place, received_s if seconds is None else seconds, body)

    def agree(self, stage: str, obstacle: str | None) -> str | None:
        """See :class:`CacheListener`; takes at most :data:`VOTE_S` and the votes' grace."""
        if self.vote is None:
            return obstacle or "no load of this worker votes"
        return self.vote(stage, obstacle, VOTE_S)

    def warm(self) -> None:
        """See :class:`CacheListener`. Idempotent."""
        if not self.end():
            return
        fetch = self._fetch
        if fetch is not None:
            logger.info("%s", self._results.line(fetch.seed, fetch.nbytes, fetch.seconds))
            results = self._results.results()
            metrics.caches(results)
            report.announce(results, self._seed_key)
        if self._settings.offers:
            offers.collecting(self._collection.stop)
            threading.Thread(target=self._offer, name="rfork-caches-offer", daemon=True).start()

    def end(self) -> bool:
        """Take and install nothing more; False if that was so before."""
        with self._lock:
            if self._warm:
                return False
            self._warm = True
        if self._fetch is not None:
            self._fetch.stop()
        self._arrivals.close()
        atexit.unregister(self._arrivals.close)
        return True

    def _install(self, place: Place) -> bool:
        """Install the seed's artifact for ``place``; False if there is one of this host already.

        Raises:
            Missed: it has not arrived, or was made by a worker that differs.
            CacheError: it cannot be installed.
        """
        ready = place.file if isinstance(place, JsonPlace) else place.last
        if ready is not None and is_there(place.root, place.directory, ready):
            return False
        if not self._settings.takes(place.kind):
            raise Missed("trust")
        received = self._arrivals.take((place.kind, place.name))
        artifact = received.artifact
        try:
            self._check_identity(place, artifact)
            if isinstance(place, JsonPlace):
                if not isinstance(received, Body):
                    raise CacheError(f"{artifact} is not JSON")
                new = int(install_file(place.root, place.directory, place.file, place.check(bytes(received.content))))
            else:
                new = _install_files(place, received)
        finally:
            received.discard()
        self._results.installed(place.kind, place.name, new, artifact.seconds)
        return new > 0

    def _check_identity(self, place: Place, artifact: Artifact) -> None:
        """Raise Missed if the seed's artifact was made by a worker that differs; the text names the facts."""
        texts = identity_differences(place.identity, artifact)
        if not texts:
            return
        facts = {text.partition(":")[0] for text in texts}
        # Most facts are digests; these texts say what is behind them.
        own, theirs = (_of(facts, each) for each in (self._collection.details, self._arrivals.details))
        explained = differences(own, [(theirs, 1)]) if own and theirs else []
        raise Missed(f"identity: {described(explained or texts)}")

    def _offer(self) -> None:
        """The outermost frame of the seed's thread: a seed without caches is a seed."""
        try:
            if self._settings.level == "code" and (obstacle := self._settings.offering_obstacle) is not None:
                logger.info("caches of code are not offered: %s", obstacle)
            offered = self._collection.collected()
            if offered is None:
                return
            offers.replace(self, offered)
            nbytes = sum(each.artifact.nbytes for each in offered.artifacts)
            names = ", ".join(str(each.artifact) for each in offered.artifacts) or "none"
            logger.info("caches that this worker offers: %s; %.1f MB", names, nbytes / 1e6)
        except Exception as error:  # noqa: BLE001 - a thread of its own, beside a worker that serves
            logger.warning("this worker offers no caches because of %s: %s", type(error).__name__, error)


def _of(facts: Container[str], details: Mapping[str, str]) -> dict[str, str]:
    """The details whose path begins with the name of one of ``facts``."""
    return {path: text for path, text in details.items() if path.partition(".")[0] in facts}


def _install_files(place: CachePlace, received: Staged | Body) -> int:
    """Check the paths, rewrite indexes and install; returns the number of new files. Raises CacheError."""
    accepts = place.accepts or place.only
    for file in received.artifact.files:
        if accepts is not None and not accepts(relative_parts(file.path)):
            raise CacheError(f"{received.artifact} contains {file.path!r}, which does not belong in such a cache")
    if not isinstance(received, Staged) or received.root != place.root:
        raise CacheError(f"{received.artifact} was not staged in {place.root}")
    directory = place.root.joinpath(*place.directory)
    paths = [PurePosixPath(file.path) for file in received.artifact.files]
    for path in paths:
        for pattern, rewrite in place.rewrite.items():
            if fnmatch.fnmatchcase(path.name, pattern):
                beside = {each.name for each in paths if each.parent == path.parent and each != path}
                content = received.read(str(path), MAX_INDEX_NBYTES)
                received.replace(str(path), rewrite(content, beside, directory.joinpath(path.parent)))
    return install(received, place.directory, last=place.last, indexes=place.rewrite).new


class _Slot:
    present: WorkerCaches | None = None


def worker_caches(settings: CacheSettings) -> WorkerCaches:
    """The caches of the present start, which become the hooks' listener: one object for all models of a worker."""
    present = _Slot.present
    if present is None or present.is_warm:
        # Now: Inductor sets Triton's variable later, to a directory of its own.
        roots = {kind: cache_root(kind) for kind in ORDER}
        present = _Slot.present = WorkerCaches(settings, root=roots.__getitem__)
        listen(present)
    return present


def no_caches() -> None:
    """End the caches of an earlier start of this process, for one that carries none."""
    earlier, _Slot.present = _Slot.present, None
    if earlier is not None:
        earlier.end()
    listen(None)
    offers.begin(None, expected=False)
    report.announce(CacheResults())
