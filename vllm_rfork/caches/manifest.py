"""The description of a seed's caches: artifacts, their files with SHA-256, and what they depend on.

It travels as JSON over the connection that a receiver has verified, and the bytes are compared with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from vllm_rfork.caches import bounds
from vllm_rfork.caches.paths import check_tree, relative_parts
from vllm_rfork.errors import CacheError
from vllm_rfork.logs.quoting import printable

#: The newest version that is written and read.
OFFER_VERSION = 1

Level = Literal["safe", "code"]

#: Kind of artifact → its level. ``safe`` ones are JSON with a schema in ``safe/``; bytes of the others are executed.
#: A receiver reads the level here and never from the wire.
LEVELS: Mapping[str, Level] = {
    "startup_plan": "safe",
    "autotune_table": "safe",
    "model_info": "safe",
    "torch_aot": "code",
    "inductor": "code",
    "split_graph": "code",
    "triton": "code",
}

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,160}\Z")


class ArtifactFile(msgspec.Struct, frozen=True):
    """One regular file: its path inside the artifact, its size in bytes, and its SHA-256 in hexadecimal."""

    path: str
    nbytes: int
    sha256: str


class Artifact(msgspec.Struct, frozen=True):
    """Files that are installed together, into one directory.

    Attributes:
        kind: a key of :data:`LEVELS`; newer seeds may send others, which are skipped.
        name: distinguishes the artifacts of one kind: a rank, a compiled module.
        identity: everything that must be equal on the receiver, as fact → short text.
        files: in the order in which their bytes are sent.
        seconds: the time that producing it took, on the seed or where it came from; None if that is not known.
    """

    kind: str
    name: str
    identity: dict[str, str]
    files: tuple[ArtifactFile, ...]
    seconds: float | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


class Offer(msgspec.Struct, frozen=True):
    """All artifacts of one seed.

    Attributes:
        details: facts behind the digests in the artifacts' identities, as path → short text. They explain a miss in the
            log and decide nothing.
    """

    artifacts: tuple[Artifact, ...]
    details: dict[str, str] = {}
    version: int = OFFER_VERSION


def encode_offer(offer: Offer) -> bytes:
    """JSON bytes of ``offer``.

    Raises:
        CacheError: a receiver would refuse it.
    """
    for artifact in offer.artifacts:
        check_artifact(artifact)
    _check_totals(offer.artifacts)
    _check_facts("the list of caches", offer.details, bounds.MAX_DETAILS)
    body = msgspec.json.encode(offer)
    _check_length(body)
    return body


def decode_offer(body: bytes) -> Offer:
    """Parse and validate an offer from the wire, without artifacts of kinds that this version does not have.

    Raises:
        CacheError: not JSON, too large, a field is missing or of the wrong type, or an artifact is unacceptable.
    """
    _check_length(body)
    try:
        offer = msgspec.json.decode(body, type=Offer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CacheError(f"the seed's list of caches cannot be read: {error}") from error
    if not 1 <= offer.version <= OFFER_VERSION:
        raise CacheError(f"the seed's list of caches has version {offer.version}, not 1 to {OFFER_VERSION}")
    known = tuple(each for each in offer.artifacts if each.kind in LEVELS)
    for artifact in known:
        check_artifact(artifact)
    _check_totals(known)
    _check_facts("the list of caches", offer.details, bounds.MAX_DETAILS)
    names = {(each.kind, each.name) for each in known}
    if len(names) < len(known):
        raise CacheError("the seed's list of caches names an artifact twice")
    return msgspec.structs.replace(offer, artifacts=known)


def check_artifact(artifact: Artifact) -> None:
    """Check one artifact against the bounds.

    Raises:
        CacheError: a name, path, size, digest or fact is unacceptable.
    """
    if not _NAME.match(artifact.name):
        raise CacheError(f"the artifact name {artifact.name!r} is not acceptable")
    if not 1 <= len(artifact.files) <= bounds.MAX_FILES:
        raise CacheError(f"{artifact} has {len(artifact.files)} files, not 1 to {bounds.MAX_FILES}")
    for file in artifact.files:
        if not 0 <= file.nbytes <= bounds.MAX_FILE_NBYTES:
            raise CacheError(f"{artifact}: {file.path!r} has {file.nbytes} bytes, not 0 to {bounds.MAX_FILE_NBYTES}")
        if not _SHA256.match(file.sha256):
            raise CacheError(f"{artifact}: {file.path!r} has no SHA-256")
    if artifact.nbytes > bounds.MAX_ARTIFACT_NBYTES:
        raise CacheError(f"{artifact} has {artifact.nbytes} bytes, more than {bounds.MAX_ARTIFACT_NBYTES}")
    check_tree(relative_parts(file.path) for file in artifact.files)
    if not artifact.identity:
        raise CacheError(f"{artifact} has no identity")
    _check_facts(artifact, artifact.identity, bounds.MAX_FACTS)
    if artifact.seconds is not None and not 0 <= artifact.seconds <= bounds.MAX_SECONDS:
        raise CacheError(f"{artifact} took {artifact.seconds} s, which is not possible")


def identity_differences(own: Mapping[str, str], artifact: Artifact) -> list[str]:
    """The facts in which this worker differs from the artifact: ``triton: 3.6.0 here, 3.5.1 on the seed``.

    Facts of both sides are compared: a fact that only one side has is a difference.
    """
    texts = []
    for name in sorted({*own, *artifact.identity}):
        here, there = own.get(name, "not set"), artifact.identity.get(name, "not set")
        if here != there:
            texts.append(f"{printable(name)}: {printable(here)} here, {printable(there)} on the seed")
    return texts


def _check_length(body: bytes) -> None:
    if len(body) > bounds.MAX_MANIFEST_NBYTES:
        raise CacheError(f"the list of caches has {len(body)} bytes, more than {bounds.MAX_MANIFEST_NBYTES}")


def _check_totals(artifacts: Sequence[Artifact]) -> None:
    files = sum(len(artifact.files) for artifact in artifacts)
    nbytes = sum(artifact.nbytes for artifact in artifacts)
    if len(artifacts) > bounds.MAX_ARTIFACTS or files > bounds.MAX_OFFER_FILES or nbytes > bounds.MAX_OFFER_NBYTES:
        raise CacheError(
            f"the list of caches has {len(artifacts)} artifacts, {files} files and {nbytes} bytes; the bounds are "
            f"{bounds.MAX_ARTIFACTS}, {bounds.MAX_OFFER_FILES} and {bounds.MAX_OFFER_NBYTES}"
        )


def _check_facts(what: object, facts: Mapping[str, str], most: int) -> None:
    if len(facts) > most:
        raise CacheError(f"{what} has {len(facts)} facts, more than {most}")
    for name, value in facts.items():
        if not 1 <= len(name) <= bounds.MAX_FACT_NAME or len(value) > bounds.MAX_FACT_VALUE:
            raise CacheError(f"{what} has a fact with a name or value that is too long: {name!r}")


def seconds_in_all(artifacts: Sequence[Artifact]) -> float:
    """The seconds that seeds spent on producing these artifacts, as far as they state it."""
    return math.fsum(each.seconds for each in artifacts if each.seconds is not None)
