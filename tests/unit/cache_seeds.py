"""Artifacts, seeds that serve them, and receivers, for tests of the calls for caches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.unit.test_seed_service import KEY
from vllm_rfork.caches.installer import install
from vllm_rfork.caches.manifest import Artifact, ArtifactFile
from vllm_rfork.caches.offered import Offered, OfferedArtifact
from vllm_rfork.caches.staging import Staged
from vllm_rfork.clients.seed_caches import SeedCaches
from vllm_rfork.messages import SeedAddress
from vllm_rfork.net.credentials import Credentials

CONTENTS = {"a/first": b"pickle", "second": b"\x7fELF" * 100_000, "empty": b""}


@dataclass(frozen=True)
class Held:
    """An artifact whose bytes are in memory; ``sent`` are the bytes that a liar sends instead."""

    artifact: Artifact
    sent: tuple[bytes, ...]

    def pieces(self) -> Iterator[bytes]:
        yield from filter(None, self.sent)


def held(
    kind: str = "model_info",
    name: str = "Qwen2ForCausalLM",
    contents: dict[str, bytes] | None = None,
    sent: tuple[bytes, ...] | None = None,
) -> Held:
    contents = CONTENTS if contents is None else contents
    files = tuple(ArtifactFile(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in contents.items())
    return Held(
        Artifact(kind, name, {"vllm": "0.26.0"}, files, 1.5), tuple(contents.values()) if sent is None else sent
    )


def offered(*artifacts: OfferedArtifact) -> Offered:
    return Offered(artifacts, {"options.dtype": "bfloat16"})


async def installed(
    root: Path, address: SeedAddress, credentials: Credentials | None = None, *, timeout_s: float = 20.0
) -> dict[str, bytes]:
    """The files of the first artifact that the seed lists, installed below ``root``."""
    client = SeedCaches(credentials=credentials)
    offer = await client.offer(address, KEY)
    assert offer is not None
    staged = Staged(root, offer.artifacts[0], kept_free_nbytes=0)
    try:
        await client.fetch(address, KEY, offer.artifacts[0], staged.write, timeout_s=timeout_s)
        staged.finish()
        install(staged, ("cache",))
    finally:
        staged.discard()
    return present(root)


def present(root: Path) -> dict[str, bytes]:
    """The files that were installed below ``root``."""
    base = root / "cache"
    return {path.relative_to(base).as_posix(): path.read_bytes() for path in base.rglob("*") if path.is_file()}
