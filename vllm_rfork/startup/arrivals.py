"""The seed's caches as far as they have arrived. Filled by one thread, used by the hooks of another."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping

from vllm_rfork.caches.manifest import Artifact, Offer
from vllm_rfork.caches.staging import Staged
from vllm_rfork.errors import CacheError
from vllm_rfork.startup.settings import JSON_NBYTES

Key = tuple[str, str]
"""Kind and name."""


class Missed(Exception):
    """A cache that is not there when vLLM asks for it; ``str()`` is the reason of the miss, for the report."""


class Body:
    """The bytes of a JSON cache in memory, verified piece by piece.

    Raises:
        CacheError: the artifact is not one small file.
    """

    def __init__(self, artifact: Artifact) -> None:
        max_nbytes = JSON_NBYTES.get(artifact.kind, 0)
        if len(artifact.files) != 1 or artifact.nbytes > max_nbytes:
            raise CacheError(f"{artifact} is not one file of at most {max_nbytes} bytes")
        self.artifact = artifact
        self.content = bytearray()

    def write(self, data: bytes) -> None:
        """Append the next bytes.

        Raises:
            CacheError: more than the artifact has.
        """
        if len(self.content) + len(data) > self.artifact.nbytes:
            raise CacheError(f"{self.artifact} came with more than its {self.artifact.nbytes} bytes")
        self.content += data

    def finish(self) -> None:
        """Compare what has arrived with the artifact.

        Raises:
            CacheError: the SHA-256 differs.
        """
        if hashlib.sha256(self.content).hexdigest() != self.artifact.files[0].sha256:
            raise CacheError(f"the bytes of {self.artifact} do not have the SHA-256 of the list")

    def discard(self) -> None:
        """Drop the bytes."""
        self.content.clear()


Received = Staged | Body


class Arrivals:
    """See the module's docstring.

    Attributes:
        details: the seed's facts behind digests; they explain differences.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._expected: Mapping[Key, Artifact] | None = None
        self._arrived: dict[Key, Received] = {}
        self._reasons: dict[Key, str] = {}
        self._reason_for_all: str | None = None
        self._asked = False
        self._closed = False
        self._process = os.getpid()
        self.details: Mapping[str, str] = {}

    def asked(self) -> None:
        """Take note that a seed has been asked for its list."""
        self._asked = True

    def failed(self, reason: str, key: Key | None = None) -> None:
        """Take note that the artifact of ``key``, or all of them without a key, do not come because of ``reason``."""
        with self._lock:
            if key is None:
                self._reason_for_all = reason
            else:
                self._reasons[key] = reason

    def listed(self, offer: Offer) -> None:
        """Take note of the seed's list."""
        with self._lock:
            self.details = offer.details
            self._expected = {(each.kind, each.name): each for each in offer.artifacts}

    def add(self, received: Received) -> None:
        """Add a complete artifact; it is discarded if warm-up is over."""
        with self._lock:
            if not self._closed:
                self._arrived[received.artifact.kind, received.artifact.name] = received
                return
        received.discard()

    def take(self, key: Key) -> Received:
        """The artifact of ``key``, which belongs to the caller from now on.

        Raises:
            Missed: it has not arrived.
        """
        with self._lock:
            if key in self._arrived:
                return self._arrived.pop(key)
            if (reason := self._reasons.get(key, self._reason_for_all)) is not None:
                raise Missed(reason)
            may_come = self._asked if self._expected is None else key in self._expected
            raise Missed("late" if may_come else "none")

    def close(self) -> None:
        """Discard what has arrived and was not taken. Idempotent, and without effect in a forked child."""
        if os.getpid() != self._process:  # the files are the parent's, and a thread of it may hold the lock
            return
        with self._lock:
            self._closed = True
            left, self._arrived = list(self._arrived.values()), {}
        for received in left:
            received.discard()
