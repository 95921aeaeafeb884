"""Comparison of two manifests: every difference at once, or the segments to copy."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_rfork.errors import ManifestMismatch
from vllm_rfork.manifest.schema import Manifest, TensorEntry
from vllm_rfork.manifest.segments import Segment

#: Characters of a foreign value in a message.
MAX_SHOWN = 80
#: Tensors that share memory in a message.
MAX_MEMBERS = 5


def pair(local: Manifest, remote: Manifest) -> list[Segment]:
    """One segment per span, in the local manifest's order.

    Spans are paired by the tensors in them, not by their numbers, so the two models may have been traversed in
    different orders. A segment lies in one span on either side and so never crosses a registration.

    Raises:
        ManifestMismatch: layouts, tensors, dtypes, shapes, strides, formats, alias structure or build signatures
            differ; the error lists every difference.
    """
    differences: list[str] = []
    if local.layout != remote.layout:
        differences.append(f"layout: {remote.layout} on the seed, {local.layout} on the receiver")
    ours = {tensor.name: tensor for tensor in local.tensors}
    theirs = {tensor.name: tensor for tensor in remote.tensors}
    for name, tensor in ours.items():
        other = theirs.get(name)
        if other is None:
            differences.append(f"{name}: only the receiver has it")
        else:
            differences.extend(_tensor_differences(tensor, other))
    differences.extend(f"{name}: only the seed has it" for name in theirs if name not in ours)
    if not differences:
        differences.extend(_alias_differences(local, remote))
    differences.extend(built_differences(local.built, remote.built))
    if differences:
        raise ManifestMismatch(differences)

    remote_span_of = {tensor.name: tensor.span for tensor in remote.tensors}
    segments: list[Segment] = []
    done: set[int] = set()
    for tensor in local.tensors:
        if tensor.span == -1 or tensor.span in done:
            continue
        done.add(tensor.span)
        mine, other_span = local.spans[tensor.span], remote.spans[remote_span_of[tensor.name]]
        segments.append(Segment(mine.address, other_span.address, mine.nbytes))
    return segments


def paired_digests(local: Manifest, remote: Manifest) -> dict[int, str]:
    """The seed's digest for each of the receiver's spans, by the receiver's span number.

    Call it only after :func:`pair` has accepted the two.
    """
    remote_span_of = {tensor.name: tensor.span for tensor in remote.tensors}
    return {
        tensor.span: remote.spans[remote_span_of[tensor.name]].digest for tensor in local.tensors if tensor.span != -1
    }


def built_differences(local: dict[str, str] | None, remote: dict[str, str] | None) -> Iterator[str]:
    """Differences of two build signatures (``model/build_signature.py``); none if the receiver has no signature.

    A name that one side lacks is not a difference: the names depend on options that do not affect weights.
    """
    if local is None:
        return
    if remote is None:
        yield "as built: the seed does not report its build signature"
        return
    for name, ours in local.items():
        if (theirs := remote.get(name, ours)) != ours:
            yield f"{name} as built: {theirs[:MAX_SHOWN]} on the seed, {ours[:MAX_SHOWN]} on the receiver"


def _tensor_differences(ours: TensorEntry, theirs: TensorEntry) -> Iterator[str]:
    for field in ("dtype", "shape", "stride", "format"):
        mine, other = getattr(ours, field), getattr(theirs, field)
        if mine != other:
            yield f"{ours.name}: {field} {_shown(other)} on the seed, {_shown(mine)} on the receiver"


def _shown(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _alias_differences(local: Manifest, remote: Manifest) -> Iterator[str]:
    """Differences of the names that share memory, of their offsets, and of its length."""
    ours, theirs = _members(local), _members(remote)
    for name, members in ours.items():
        others = theirs[name]
        if members and others and members != others:
            yield f"{name}: shares memory with {_names(others)} on the seed, with {_names(members)} on the receiver"
    theirs_by_name = {tensor.name: tensor for tensor in remote.tensors}
    for tensor in local.tensors:
        other = theirs_by_name[tensor.name]
        if (tensor.span == -1) != (other.span == -1):
            yield f"{tensor.name}: has memory on one side only"
        elif tensor.inline_group is not None and other.inline is not None and other.inline_group is None:
            yield f"{tensor.name}: the seed does not report which small tensors share memory"
        elif (tensor.inline is None) != (other.inline is None):
            yield f"{tensor.name}: has its bytes in the manifest on one side only"
        elif tensor.span != -1 and ours[tensor.name] == theirs[tensor.name]:
            mine, remotes = local.spans[tensor.span].nbytes, remote.spans[other.span].nbytes
            if mine != remotes:
                yield f"{tensor.name}: {remotes} bytes on the seed, {mine} bytes on the receiver"


def _members(manifest: Manifest) -> dict[str, tuple[tuple[str, int], ...]]:
    """Tensor name → (name, offset) of all tensors in its span or inline group, itself included."""
    of_memory: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for tensor in manifest.tensors:
        if memory := _memory(tensor):
            of_memory.setdefault(memory, []).append((tensor.name, tensor.offset))
    groups = {memory: tuple(sorted(members)) for memory, members in of_memory.items()}
    return {tensor.name: groups[memory] if (memory := _memory(tensor)) else () for tensor in manifest.tensors}


def _memory(tensor: TensorEntry) -> tuple[str, int] | None:
    """The span or inline group of a tensor; None if it has no elements, or its seed does not report groups."""
    if tensor.span != -1:
        return "span", tensor.span
    return None if tensor.inline_group is None else ("inline", tensor.inline_group)


def _names(members: tuple[tuple[str, int], ...]) -> str:
    """The first of ``members``: with all tensors in one span, each message would otherwise list all of them."""
    more = f" and {len(members) - MAX_MEMBERS} more" if len(members) > MAX_MEMBERS else ""
    return ", ".join(f"{name}@{offset}" for name, offset in members[:MAX_MEMBERS]) + more or "nothing"
