"""The artifacts of this process as its seed service serves them: immutable, replaced as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from vllm_rfork.caches.manifest import LEVELS, Artifact, Offer


class OfferedArtifact(Protocol):
    """One artifact, and its bytes. :class:`~vllm_rfork.caches.collector.Collected` is one."""

    @property
    def artifact(self) -> Artifact:
        """The description."""

    def pieces(self) -> Iterator[bytes]:
        """The bytes of all files in the order of the artifact.

        Raises:
            CacheError: they are not there any more, or have changed.
        """


@dataclass(frozen=True)
class Offered:
    """All artifacts of this process, and the short texts behind the digests in their identities."""

    artifacts: tuple[OfferedArtifact, ...]
    details: Mapping[str, str]

    def offer(self, *, code: bool) -> Offer:
        """The list for a caller; ``code``: with artifacts of that level, which only a connection with TLS may get."""
        return Offer(tuple(each.artifact for each in self.artifacts if _may(each, code)), dict(self.details))

    def find(self, kind: str, name: str, *, code: bool) -> OfferedArtifact | None:
        """The artifact of that kind and name in :meth:`offer`; None if there is none."""
        for each in self.artifacts:
            if (each.artifact.kind, each.artifact.name) == (kind, name) and _may(each, code):
                return each
        return None


def _may(each: OfferedArtifact, code: bool) -> bool:
    return code or LEVELS[each.artifact.kind] == "safe"
