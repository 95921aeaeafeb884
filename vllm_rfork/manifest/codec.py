"""Encoding, decoding and validation of manifests.

A decoded manifest comes from another machine. Its sizes are bounded before it is parsed, and every address passes
:func:`validate_manifest` before native code sees it.
"""

from __future__ import annotations

import itertools

import msgspec

from vllm_rfork.errors import SeedError
from vllm_rfork.manifest.schema import MANIFEST_VERSION, Manifest, Region

#: Longest manifest on the wire, in bytes. 64 MiB holds more than 200,000 tensors at about 300 bytes each; the largest
#: published models have about 100,000.
MAX_MANIFEST_NBYTES = 64 * 1024 * 1024
#: Bounds within those bytes, three of which may make an object of 64: lists and mappings, of which a tensor has five,
#: and values that a comma ends, of which it has about 16.
MAX_CONTAINERS = 2_000_000
MAX_VALUES = 5_000_000
#: Characters of a name; seeds write at most ``traversal.MAX_NAME`` and a suffix.
MAX_NAME_LENGTH = 2048
#: Characters of a header field. The key (``messages.MAX_KEY_LENGTH``) and the engine's endpoint have other bounds.
MAX_TEXT_LENGTH = 256
MAX_DIMENSIONS = 64
#: Engines that one seed offers, and characters of an engine's name.
MAX_ENGINES, MAX_ENGINE_NAME = 16, 64
#: A checkpoint's identity: parts (towers, heads, modules) and characters of a part's name or identity.
MAX_CHECKPOINT_PARTS, MAX_CHECKPOINT_TEXT = 64, 200


def encode_manifest(manifest: Manifest) -> bytes:
    """JSON bytes of ``manifest``."""
    return msgspec.json.encode(manifest)


def decode_manifest(body: bytes) -> Manifest:
    """Parse and validate a manifest from the wire.

    Raises:
        SeedError: not JSON, a field is missing or of the wrong type, an unsupported version, or inconsistent contents
            (a span outside its region, a tensor outside its span).
    """
    if (obstacle := size_obstacle(body)) is not None:
        raise SeedError(f"the seed's manifest {obstacle}")
    try:
        manifest = msgspec.json.decode(body, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SeedError(f"the seed's manifest cannot be read: {error}") from error
    validate_manifest(manifest)
    return manifest


def size_obstacle(body: bytes) -> str | None:
    """The reason why receivers refuse ``body`` before they parse it: it would take many times its length in memory."""
    for what, marks, most in (("lists and mappings", b"[{", MAX_CONTAINERS), ("values", b",", MAX_VALUES)):
        count = sum(body.count(mark) for mark in marks)
        if len(body) > MAX_MANIFEST_NBYTES or count > most:
            return f"has {len(body)} bytes and {count} {what}; receivers read {MAX_MANIFEST_NBYTES} and {most}"
    return None


def validate_manifest(manifest: Manifest) -> None:
    """Raise :class:`SeedError` if ``manifest`` is inconsistent.

    Every address that a receiver passes to native code is checked here first.
    """
    if not 1 <= manifest.version <= MANIFEST_VERSION:
        raise SeedError(
            f"the seed's manifest has version {manifest.version}, this receiver reads 1 to {MANIFEST_VERSION}"
        )
    _check_texts(manifest)
    _check_endpoints(manifest)
    parts = manifest.checkpoint or {}
    if len(parts) > MAX_CHECKPOINT_PARTS or any(
        len(text) > MAX_CHECKPOINT_TEXT for pair in parts.items() for text in pair
    ):
        raise SeedError("the seed's manifest has an impossible identity of its checkpoint")
    _check_regions(manifest.regions)
    _check_spans(manifest)
    _check_tensors(manifest)


def _check_texts(manifest: Manifest) -> None:
    """Check the lengths of names and texts, and the sizes of numbers."""
    for name in ("fingerprint", "epoch", "layout", "engine", "digest_algorithm"):
        if len(getattr(manifest, name)) > MAX_TEXT_LENGTH:
            raise SeedError(f"the seed's manifest has a {name} of more than {MAX_TEXT_LENGTH} characters")
    built = manifest.built or {}
    tensors = (tensor.name for tensor in manifest.tensors)
    for name in itertools.chain(tensors, manifest.state, manifest.state_gone, built, built.values()):
        if len(name) > MAX_NAME_LENGTH:
            raise SeedError(f"the seed's manifest has a name of more than {MAX_NAME_LENGTH} characters: {name[:80]!r}")
    if both := manifest.state.keys() & set(manifest.state_gone):
        raise SeedError(f"state {min(both)!r} of the seed's manifest is both present and gone")
    for name, value in manifest.state.items():
        if type(value) is int and not _in_64_bits(value):
            raise SeedError(f"state {name!r} of the seed's manifest is too large a number")
    if any(len(span.digest) > MAX_TEXT_LENGTH for span in manifest.spans):
        raise SeedError(f"the seed's manifest has a digest of more than {MAX_TEXT_LENGTH} characters")


def _check_endpoints(manifest: Manifest) -> None:
    if (obstacle := engines_obstacle(manifest)) is not None:
        raise SeedError(f"the seed's manifest {obstacle}")


def engines_obstacle(manifest: Manifest) -> str | None:
    """The reason why receivers refuse the engines of ``manifest``: their number, or their names."""
    names = [each.engine for each in manifest.endpoints]
    if len(names) > MAX_ENGINES:
        return f"has endpoints of {len(names)} engines; receivers read {MAX_ENGINES}"
    if not all(0 < len(name) <= MAX_ENGINE_NAME for name in names):
        return f"has an engine with a name of no or more than {MAX_ENGINE_NAME} characters"
    if len(set(names)) < len(names):
        return "has two endpoints of one engine"
    return None


def _in_64_bits(number: int) -> bool:
    return -(1 << 63) <= number < 1 << 63


def _check_regions(regions: tuple[Region, ...]) -> None:
    ordered = sorted(regions, key=lambda region: region.address)
    for region in ordered:
        if region.address <= 0 or region.nbytes <= 0 or region.address + region.nbytes > 1 << 63:
            raise SeedError(f"the seed's manifest has an impossible region {region}")
    for before, after in itertools.pairwise(ordered):
        if before.address + before.nbytes > after.address:
            raise SeedError(f"the seed's manifest has overlapping regions {before} and {after}")


def _check_spans(manifest: Manifest) -> None:
    for number, span in enumerate(manifest.spans):
        if not 0 <= span.region < len(manifest.regions):
            raise SeedError(f"span {number} of the seed's manifest names region {span.region}, which does not exist")
        region = manifest.regions[span.region]
        inside = region.address <= span.address and span.address + span.nbytes <= region.address + region.nbytes
        if span.nbytes <= 0 or not inside:
            raise SeedError(f"span {number} of the seed's manifest is outside its region: {span} in {region}")


def _check_tensors(manifest: Manifest) -> None:
    seen: set[str] = set()
    for tensor in manifest.tensors:
        if tensor.name in seen:
            raise SeedError(f"the seed's manifest names tensor {tensor.name!r} twice")
        seen.add(tensor.name)
        numbers = (*tensor.shape, *tensor.stride, tensor.offset, tensor.format)
        possible = len(tensor.shape) == len(tensor.stride) <= MAX_DIMENSIONS and len(tensor.dtype) <= MAX_TEXT_LENGTH
        if not possible or any(size < 0 for size in tensor.shape) or not all(map(_in_64_bits, numbers)):
            raise SeedError(f"tensor {tensor.name!r} of the seed's manifest has an impossible shape or stride")
        if tensor.inline_group is not None and (tensor.inline is None or tensor.span != -1 or tensor.inline_group < 0):
            raise SeedError(f"tensor {tensor.name!r} of the seed's manifest is in an inline group and not inline")
        if tensor.span == -1:
            continue
        if not 0 <= tensor.span < len(manifest.spans):
            raise SeedError(f"tensor {tensor.name!r} names span {tensor.span}, which does not exist")
        if not 0 <= tensor.offset < manifest.spans[tensor.span].nbytes:
            raise SeedError(f"tensor {tensor.name!r} starts outside its span")
