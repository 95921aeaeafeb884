"""The inventory of a model's tensors, as regions, spans and entries: what a seed publishes and a receiver fills.

An inventory describes a model at one moment and keeps that memory alive, so that the spans stay valid when vLLM
replaces parameters later. A tensor that it cannot describe is an error and never left out.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec
import torch
from torch import nn

from vllm_rfork.devices.allocator_blocks import merge_into_blocks
from vllm_rfork.devices.base import DeviceBackend
from vllm_rfork.devices.registry import device_backend
from vllm_rfork.errors import ForkError
from vllm_rfork.manifest.schema import Manifest, ManifestHeader, Region, Span, StateValue, TensorEntry
from vllm_rfork.model.traversal import Leaf, Opaque

#: A tensor off the engine's device travels inside the manifest up to this size, in bytes: scales and index tables.
MAX_INLINE_NBYTES = 256 * 1024


@dataclass(frozen=True)
class LocalSpan:
    """One span of this process: ``data`` is a 1-D uint8 tensor over exactly its bytes and keeps them alive."""

    address: int
    nbytes: int
    data: torch.Tensor


@dataclass(frozen=True)
class TensorInventory:
    """Every tensor of a model at one moment; made by :func:`collect`.

    ``entries[i].span`` indexes ``spans``; ``span_regions[j]`` is span ``j``'s index into ``regions``; ``inline``
    maps the names of inline tensors to the tensors; ``opaque`` names native objects whose memory cannot be seen;
    ``integers`` are the tensors that may be tables of addresses.
    """

    entries: tuple[TensorEntry, ...]
    spans: tuple[LocalSpan, ...]
    regions: tuple[Region, ...]
    span_regions: tuple[int, ...]
    inline: dict[str, torch.Tensor] = field(default_factory=dict)
    opaque: tuple[str, ...] = ()
    integers: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes in all spans."""
        return sum(span.nbytes for span in self.spans)

    def manifest(
        self,
        header: ManifestHeader,
        *,
        digests: Iterable[str] | None = None,
        state: dict[str, StateValue] | None = None,
        state_gone: tuple[str, ...] = (),
    ) -> Manifest:
        """The inventory as plain data, under ``header``."""
        given = [""] * len(self.spans) if digests is None else list(digests)
        return header.manifest(
            regions=self.regions,
            spans=tuple(
                Span(region, span.address, span.nbytes, digest)
                for span, region, digest in zip(self.spans, self.span_regions, given, strict=True)
            ),
            tensors=self.entries,
            state=state,
            state_gone=state_gone,
        )


def collect(leaves: Iterable[Leaf], device: torch.device) -> TensorInventory:
    """Account for every tensor among ``leaves``, as it stands.

    Args:
        leaves: of a walk through a model, before or after post-processing.
        device: where the engine reads and writes; small tensors elsewhere become inline entries.

    Raises:
        ForkError: a tensor has no memory yet, no plain strided memory, or a lot of memory on another device.
    """
    leaves = list(leaves)
    found = [leaf for leaf in leaves if isinstance(leaf.value, torch.Tensor)]
    opaque = tuple(f"{leaf.name} ({leaf.value.kind})" for leaf in leaves if isinstance(leaf.value, Opaque))
    on_device: list[tuple[str, torch.Tensor]] = []
    inline: dict[str, torch.Tensor] = {}
    for leaf in found:
        tensor = _plain(leaf)
        if tensor.numel() == 0:
            continue
        if tensor.device.type == device.type:
            on_device.append((leaf.name, tensor))
        elif tensor.numel() * tensor.element_size() <= MAX_INLINE_NBYTES:
            inline[leaf.name] = tensor
        else:
            raise ForkError(
                f"tensor {leaf.name} has {tensor.numel() * tensor.element_size()} bytes on {tensor.device}, where the "
                f"engine for {device} cannot reach them (offloaded weights cannot be forked)"
            )
    side = device_backend(device)
    spans, span_of = _spans(on_device, side)
    regions, span_regions = _regions(spans, side)
    groups = _inline_groups(inline)
    entries = tuple(_entry(leaf, spans, span_of, inline, groups, side=side) for leaf in found)
    integers = {name: tensor for name, tensor in (*on_device, *inline.items()) if _may_be_addresses(tensor)}
    return TensorInventory(entries, spans, regions, span_regions, inline, opaque, integers)


def names_in(inventory: TensorInventory, spans: Iterable[int]) -> str:
    """The first tensors that lie in ``spans``, for a message."""
    wanted = set(spans)
    return ", ".join([entry.name for entry in inventory.entries if entry.span in wanted][:5])


def with_inline(inventory: TensorInventory, manifest: Manifest) -> TensorInventory:
    """``inventory`` with the inline bytes of ``manifest`` in place of its own."""
    sent = {entry.name: entry.inline for entry in manifest.tensors}
    entries = tuple(
        msgspec.structs.replace(entry, inline=sent.get(entry.name)) if entry.name in inventory.inline else entry
        for entry in inventory.entries
    )
    return dataclasses.replace(inventory, entries=entries)


def _plain(leaf: Leaf) -> torch.Tensor:
    """The leaf's tensor without its subclass, sharing memory.

    A parameter's ``data`` is bound now: when vLLM later points the parameter elsewhere, this still holds what was
    there before.
    """
    tensor: torch.Tensor = leaf.value
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        raise ForkError(f"tensor {leaf.name} has no shape yet (its format decides while loading)")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise ForkError(f"tensor {leaf.name} is {tensor.layout}, not plain strided memory")
    if tensor.is_meta:
        raise ForkError(f"tensor {leaf.name} has no memory yet (meta device: online quantization or deferred loading)")
    plain = tensor.detach().as_subclass(torch.Tensor)
    if plain.is_conj() or plain.is_neg():
        raise ForkError(f"tensor {leaf.name} is a lazy conjugate or negative view")
    return plain


def _may_be_addresses(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.uint64)


def _spans(
    tensors: list[tuple[str, torch.Tensor]], side: DeviceBackend
) -> tuple[tuple[LocalSpan, ...], dict[str, int]]:
    """Merge overlapping tensors into spans, numbered in the order in which the walk first meets them."""
    spans: list[LocalSpan] = []
    span_of: dict[str, int] = {}
    for index, (start, end, members) in enumerate(_overlapping([side.extent(tensor) for _, tensor in tensors])):
        data = _bytes_of([tensors[number] for number in members], start, end, side)
        spans.append(LocalSpan(start, end - start, data))
        span_of.update({tensors[number][0]: index for number in members})
    return tuple(spans), span_of


def _inline_groups(inline: dict[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Inline tensor → the number of the overlapping ones it is among, and its offset there in bytes."""
    by_device: dict[torch.device, list[str]] = {}
    for name, tensor in inline.items():
        by_device.setdefault(tensor.device, []).append(name)
    groups: dict[str, tuple[int, int]] = {}
    count = 0
    for device, names in by_device.items():
        side = device_backend(device)
        for start, _, members in _overlapping([side.extent(inline[name]) for name in names]):
            for number in members:
                groups[names[number]] = count, inline[names[number]].data_ptr() - start
            count += 1
    return groups


def _overlapping(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int, list[int]]]:
    """Start, end and members of each group of extents that overlap, in the order of the groups' first members."""
    groups: list[tuple[int, int, list[int]]] = []
    for (start, end), number in sorted((extent, number) for number, extent in enumerate(extents)):
        if groups and start < groups[-1][1]:
            before, until, members = groups[-1]
            groups[-1] = (before, max(until, end), [*members, number])
        else:
            groups.append((start, end, [number]))
    return sorted(groups, key=lambda group: min(group[2]))


def _bytes_of(members: list[tuple[str, torch.Tensor]], start: int, end: int, side: DeviceBackend) -> torch.Tensor:
    for _, tensor in members:
        storage = tensor.untyped_storage()
        base = storage.data_ptr()
        if base <= start and end <= base + storage.nbytes():
            return side.bytes_of(tensor, start, end)
    raise ForkError("tensors " + ", ".join(name for name, _ in members) + " overlap without sharing one storage")


def _regions(spans: tuple[LocalSpan, ...], side: DeviceBackend) -> tuple[tuple[Region, ...], tuple[int, ...]]:
    """Few regions for many spans: registering is paid per region.

    Where an allocator keeps blocks, spans that lie close together in one; elsewhere those of one storage.
    """
    regions, span_regions = _of_storages(spans)
    blocks = side.blocks() if regions else []
    if not blocks:
        return regions, span_regions
    merged, index = merge_into_blocks(regions, blocks, alignment=side.alignment())
    return merged, tuple(index[region] for region in span_regions)


def _of_storages(spans: tuple[LocalSpan, ...]) -> tuple[tuple[Region, ...], tuple[int, ...]]:
    """One region per storage, from its first to its last span."""
    bounds: dict[int, tuple[int, int]] = {}
    for span in spans:
        base = span.data.untyped_storage().data_ptr()
        low, high = bounds.get(base, (span.address, span.address + span.nbytes))
        bounds[base] = min(low, span.address), max(high, span.address + span.nbytes)
    order = {base: number for number, base in enumerate(bounds)}
    regions = tuple(Region(low, high - low) for low, high in bounds.values())
    for before, after in itertools.pairwise(sorted(regions, key=lambda region: region.address)):
        if before.address + before.nbytes > after.address:
            raise ForkError("two storages of the model overlap in memory")
    return regions, tuple(order[span.data.untyped_storage().data_ptr()] for span in spans)


def _entry(
    leaf: Leaf,
    spans: tuple[LocalSpan, ...],
    span_of: dict[str, int],
    inline: dict[str, torch.Tensor],
    groups: dict[str, tuple[int, int]],
    *,
    side: DeviceBackend,
) -> TensorEntry:
    tensor: torch.Tensor = leaf.value
    name = leaf.name
    number = span_of.get(name, -1)
    group, within = groups.get(name, (None, 0))
    return TensorEntry(
        name=name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        span=number,
        offset=tensor.data_ptr() - spans[number].address if number != -1 else within,
        format=side.private_format(tensor.detach()) if number != -1 else 0,
        inline=raw_bytes(inline[name]) if name in inline else None,
        inline_group=group,
    )


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of ``tensor``, in its shape's order."""
    return bytes(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).tolist())
