"""Pairing finds every difference at once; batching covers every byte once and keeps its bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_rfork.errors import ManifestMismatch
from vllm_rfork.manifest.pairing import pair, paired_digests
from vllm_rfork.manifest.schema import Manifest, Region, Span, TensorEntry
from vllm_rfork.manifest.segments import Segment, batches


def manifest(groups: Sequence[Sequence[tuple[str, int]]], base: int, **fields: Any) -> Manifest:
    """One span of 64 bytes per group of (name, offset); two spans to a region, the regions apart."""
    regions, spans, tensors = [], [], []
    for number, group in enumerate(groups):
        if number % 2 == 0:
            regions.append(Region(base + number * 1000, 128))
        region = regions[-1]
        spans.append(Span(len(regions) - 1, region.address + 64 * (number % 2), 64, f"digest of {sorted(group)}"))
        tensors += [TensorEntry(name, "uint8", (4,), (1,), number, offset) for name, offset in group]
    facts: dict[str, Any] = {
        "seed_key": "k",
        "fingerprint": "f",
        "epoch": "e",
        "layout": "checkpoint",
        "engine": "memory",
        "endpoint": "",
        "regions": tuple(regions),
        "spans": tuple(spans),
        "tensors": tuple(tensors),
    }
    return Manifest(**{**facts, **fields})


names = st.lists(st.text("abc.", min_size=1, max_size=6), unique=True, min_size=1, max_size=12)


@st.composite
def groupings(draw: st.DrawFn) -> list[list[tuple[str, int]]]:
    """Names cut into alias groups."""
    groups: list[list[tuple[str, int]]] = []
    for name in draw(names):
        if groups and draw(st.booleans()):
            groups[-1].append((name, draw(st.integers(0, 60))))
        else:
            groups.append([(name, draw(st.integers(0, 60)))])
    return groups


@given(groupings(), st.data())
def test_equal_models_pair_span_by_span_in_any_order(groups: list[list[tuple[str, int]]], data: st.DataObject) -> None:
    local = manifest(groups, 1 << 20)
    remote = manifest(data.draw(st.permutations(groups)), 1 << 30)
    segments = pair(local, remote)
    assert [segment.local for segment in segments] == [span.address for span in local.spans]
    assert sorted(segment.remote for segment in segments) == sorted(span.address for span in remote.spans)
    remote_span_at = {span.address: span for span in remote.spans}
    digests = paired_digests(local, remote)
    for number, segment in enumerate(segments):
        assert local.spans[number].digest == remote_span_at[segment.remote].digest == digests[number]
        for side, address in ((local, segment.local), (remote, segment.remote)):
            assert any(
                region.address <= address and address + segment.nbytes <= region.address + region.nbytes
                for region in side.regions
            ), "a segment left its registration"


@given(groupings(), st.data())
def test_all_differences_are_reported_at_once(groups: list[list[tuple[str, int]]], data: st.DataObject) -> None:
    local = manifest(groups, 1 << 20)
    wrong = data.draw(st.sets(st.sampled_from([tensor.name for tensor in local.tensors]), min_size=1))
    changes: dict[str, Any] = {"dtype": "int8", "shape": (2, 2), "stride": (3,), "format": 29}
    field = data.draw(st.sampled_from(sorted(changes)))
    tensors = tuple(
        msgspec.structs.replace(tensor, **{field: changes[field]}) if tensor.name in wrong else tensor
        for tensor in local.tensors
    )
    with pytest.raises(ManifestMismatch) as caught:
        pair(local, msgspec.structs.replace(local, tensors=tensors))
    assert {line.partition(":")[0] for line in caught.value.differences} == wrong
    assert all(field in line for line in caught.value.differences)


@given(names, st.data())
def test_a_tensor_on_one_side_only_is_a_difference_on_either_side(all_names: list[str], data: st.DataObject) -> None:
    mine = data.draw(st.sets(st.sampled_from(all_names)))
    theirs = data.draw(st.sets(st.sampled_from(all_names)).filter(lambda chosen: chosen != mine))
    local = manifest([[(name, 0)] for name in sorted(mine)], 1 << 20)
    remote = manifest([[(name, 0)] for name in sorted(theirs)], 1 << 30)
    with pytest.raises(ManifestMismatch) as caught:
        pair(local, remote)
    assert sorted(caught.value.differences) == sorted(
        [f"{name}: only the receiver has it" for name in mine - theirs]
        + [f"{name}: only the seed has it" for name in theirs - mine]
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([[("a", 0), ("b", 0)]], [[("a", 0)], [("b", 0)]]),
        ([[("a", 0), ("b", 4)]], [[("a", 0), ("b", 8)]]),
        ([[("a", 0), ("b", 0)], [("c", 0)]], [[("a", 0)], [("b", 0), ("c", 0)]]),
    ],
)
def test_another_alias_structure_is_a_difference(ours: Any, theirs: Any) -> None:
    with pytest.raises(ManifestMismatch, match="shares memory"):
        pair(manifest(ours, 1 << 20), manifest(theirs, 1 << 30))


def test_another_layout_or_length_is_a_difference() -> None:
    local = manifest([[("a", 0)]], 1 << 20)
    with pytest.raises(ManifestMismatch, match="layout"):
        pair(local, manifest([[("a", 0)]], 1 << 30, layout="runtime"))
    longer = manifest([[("a", 0)]], 1 << 30)
    longer = msgspec.structs.replace(longer, spans=(msgspec.structs.replace(longer.spans[0], nbytes=65),))
    with pytest.raises(ManifestMismatch, match="65 bytes on the seed, 64 bytes on the receiver"):
        pair(local, longer)


def test_a_tensor_without_memory_pairs_with_its_like_alone() -> None:
    empty = TensorEntry("e", "uint8", (0,), (1,), -1)
    local = msgspec.structs.replace(manifest([], 1 << 20), tensors=(empty,))
    assert pair(local, local) == []
    remote = manifest([[("x", 0)]], 1 << 30)
    remote = msgspec.structs.replace(remote, tensors=(msgspec.structs.replace(empty, span=0),))
    with pytest.raises(ManifestMismatch, match="memory"):
        pair(local, remote)


def test_a_long_list_of_differences_is_cut_in_the_text_only() -> None:
    local = manifest([[(f"t{number}", 0)] for number in range(100)], 1 << 20)
    with pytest.raises(ManifestMismatch, match=r"100 differences.*and 80 more") as caught:
        pair(local, manifest([], 1 << 30))
    assert len(caught.value.differences) == 100


segment_lists = st.lists(
    st.tuples(st.integers(1, 10_000), st.integers(1, 10_000), st.integers(1, 500)).map(lambda t: Segment(*t)),
    max_size=30,
)


@given(segment_lists, st.integers(1, 600), st.integers(1, 10))
def test_batches_cover_every_byte_once_in_order_within_bounds(
    segments: list[Segment], max_nbytes: int, max_items: int
) -> None:
    cut = list(batches(segments, max_nbytes=max_nbytes, max_items=max_items))
    for batch in cut:
        assert 1 <= len(batch) <= max_items
        assert sum(piece.nbytes for piece in batch) <= max_nbytes
        assert all(piece.nbytes > 0 for piece in batch)
    rest = iter([piece for batch in cut for piece in batch])
    for local, remote, nbytes in segments:
        done = 0
        while done < nbytes:
            piece = next(rest)
            assert (piece.local, piece.remote) == (local + done, remote + done), "out of order, or not the same offset"
            done += piece.nbytes
        assert done == nbytes, "a piece reaches beyond its segment, and so perhaps beyond its registration"
    assert next(rest, None) is None


@given(segment_lists, st.integers(1, 600))
def test_batches_are_full(segments: list[Segment], max_nbytes: int) -> None:
    """No call is made that an earlier one had room for."""
    cut = list(batches(segments, max_nbytes=max_nbytes, max_items=1 << 30))
    assert all(sum(piece.nbytes for piece in batch) == max_nbytes for batch in cut[:-1])


@pytest.mark.parametrize(("max_nbytes", "max_items"), [(0, 1), (1, 0), (-1, 1)])
def test_bounds_that_allow_nothing_are_refused(max_nbytes: int, max_items: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        list(batches([Segment(1, 1, 1)], max_nbytes=max_nbytes, max_items=max_items))
