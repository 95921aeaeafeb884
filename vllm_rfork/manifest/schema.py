"""The manifest: a seed's list of tensors, as plain data.

The seed service sends a manifest, the receiver builds one of its own model, and :mod:`~vllm_rfork.manifest.pairing`
compares the two. It has three levels:

- a **region** is contiguous memory that the engine registers; regions never overlap;
- a **span** is the unit of copying and of digests: the bytes from the first to the last that one tensor, or several
  overlapping tensors (tied weights, views), occupy. A span lies inside one region;
- a **tensor** is a name, a type and a strided view into a span. Two names in one span are aliases, and alias
  structure is part of the identity.

Addresses are valid within one epoch only.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

MANIFEST_VERSION = 1

#: Weights before vLLM's post-load processing, and after it.
Layout = Literal["checkpoint", "runtime"]
CHECKPOINT: Final = "checkpoint"
RUNTIME: Final = "runtime"

_Simple = bool | int | float | str | None
#: A Python-side value on the wire: a JSON value, or a mapping that names its type (``model/value_codec.py``).
StateValue = _Simple | dict[str, _Simple | list[_Simple | dict[str, str]]]


class Region(msgspec.Struct, frozen=True):
    """Contiguous registered memory: ``address`` is an integer pointer, ``nbytes`` its length (> 0)."""

    address: int
    nbytes: int


class Span(msgspec.Struct, frozen=True):
    """One contiguous piece of weights inside region number ``region``.

    ``digest`` is the hexadecimal digest of its bytes (``model/digest.py``), or empty if none was computed.
    """

    region: int
    address: int
    nbytes: int
    digest: str = ""


class TensorEntry(msgspec.Struct, frozen=True):
    """One named tensor: a strided view at ``offset`` bytes into span number ``span``.

    A tensor without elements has ``span`` -1. So has a small tensor outside the engine's device: its bytes travel in
    ``inline``.

    Attributes:
        dtype: torch's name without the prefix (``bfloat16``).
        shape, stride: in elements.
        format: a private layout such as an NPU's NZ; 0: none.
        inline_group: inline tensors that overlap have the same number here, and ``offset`` counts from the group's
            first byte. None: the seed does not report which of them overlap.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    span: int
    offset: int = 0
    format: int = 0
    inline: bytes | None = None
    inline_group: int | None = None


class EngineEndpoint(msgspec.Struct, frozen=True):
    """A seed's address for one engine. The endpoint is opaque text; only that engine can read it."""

    engine: str
    endpoint: str


class ManifestHeader(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a manifest that do not come from the tensors.

    Attributes:
        epoch: one life of the seed with unchanged weights. It and ``endpoint`` are empty until the seed starts.
        layout: a :data:`Layout`; another seed's may be unknown here and then only differs.
        endpoint: the seed's address for ``engine``; opaque text. Older receivers look at this pair only.
        more_endpoints: the seed's other engines, the preferred one first. All engines have the same regions.
        built: kernels and formats that constructors chose (``model/build_signature.py``); None: not reported.
        checkpoint: identity of the checkpoint's files, by part (``manifest/checkpoint_identity.py``); None: unknown.
    """

    version: int = MANIFEST_VERSION
    seed_key: str
    fingerprint: str
    epoch: str = ""
    layout: str
    engine: str
    endpoint: str = ""
    more_endpoints: tuple[EngineEndpoint, ...] = ()
    built: dict[str, str] | None = None
    digest_algorithm: str = ""
    checkpoint: dict[str, str] | None = None

    def manifest(
        self,
        *,
        regions: tuple[Region, ...],
        spans: tuple[Span, ...],
        tensors: tuple[TensorEntry, ...],
        state: dict[str, StateValue] | None = None,
        state_gone: tuple[str, ...] = (),
    ) -> Manifest:
        """A manifest with this header."""
        return Manifest(
            **msgspec.structs.asdict(self),
            regions=regions,
            spans=spans,
            tensors=tensors,
            state=state or {},
            state_gone=state_gone,
        )


class Manifest(ManifestHeader, frozen=True, kw_only=True):
    """Everything a receiver needs to read one seed.

    Attributes:
        state: Python-side state that loading set (``path.attribute`` → plain value).
        state_gone: names that had a plain value before loading and no longer have one.
    """

    epoch: str
    endpoint: str
    regions: tuple[Region, ...]
    spans: tuple[Span, ...]
    tensors: tuple[TensorEntry, ...]
    state: dict[str, StateValue] = {}
    state_gone: tuple[str, ...] = ()

    @property
    def endpoints(self) -> tuple[EngineEndpoint, ...]:
        """One endpoint for each engine that the seed offers."""
        return (EngineEndpoint(self.engine, self.endpoint), *self.more_endpoints)

    @property
    def nbytes(self) -> int:
        """Bytes that a fork of this manifest copies."""
        return sum(span.nbytes for span in self.spans)

    @property
    def header(self) -> ManifestHeader:
        """The fields that do not come from the tensors."""
        return ManifestHeader(**{name: getattr(self, name) for name in ManifestHeader.__struct_fields__})
