"""Digests beside the read: nothing is compared too early, too late, or not at all."""

from __future__ import annotations

import gc
import queue
import threading
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.inventory import collect
from vllm_rfork.devices.base import DeviceBackend
from vllm_rfork.devices.cpu import CpuBackend
from vllm_rfork.errors import ForkError, VerificationError
from vllm_rfork.manifest.segments import Segment, batches
from vllm_rfork.model import digest
from vllm_rfork.model.tensors import TensorInventory
from vllm_rfork.model.verification import SAMPLE_EVERY, StreamingVerifier, check_algorithm, load_kernels, spans_to_check

CPU = torch.device("cpu")
SIZES = (1000, 70_001, 8, 300_000, 16, 40_000, 24, 2_100_000, 32, 90_000)


def accelerator() -> DeviceBackend:
    """Host memory behind a device that copies by itself."""
    return DeviceBackend(CPU)


@pytest.fixture
def collection() -> Iterator[TensorInventory]:
    """A model of ten tensors, each a span of its own."""
    model = nn.Module()
    for number, size in enumerate(SIZES):
        generator = torch.Generator().manual_seed(number)
        data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        model.register_buffer(f"weight_{number}", data)
    found = collect(model, CPU)
    assert len(found.spans) == len(SIZES)
    yield found
    assert not [thread for thread in threading.enumerate() if thread.name == "rfork-verify"]


def segments_of(collection: TensorInventory, *, without: frozenset[int] = frozenset()) -> list[Segment]:
    return [
        Segment(span.address, 0, span.nbytes) for number, span in enumerate(collection.spans) if number not in without
    ]


def right_digests(collection: TensorInventory) -> dict[int, str]:
    return dict(enumerate(digest.digests(span.data for span in collection.spans)))


def checked(collection: TensorInventory, side: DeviceBackend, how: str = "full") -> StreamingVerifier:
    return StreamingVerifier(collection, spans_to_check(collection, how), side, 20.0)


@pytest.mark.parametrize("side", [CpuBackend(CPU), accelerator()], ids=["at the end", "beside"])
@pytest.mark.parametrize("max_nbytes", [1 << 30, 4096, 70_000])
def test_what_arrives_in_any_pieces_is_found_right(
    collection: TensorInventory, side: DeviceBackend, max_nbytes: int
) -> None:
    check = checked(collection, side)
    for batch in batches(segments_of(collection)[::-1], max_nbytes=max_nbytes, max_items=3):
        check.arrived(batch)
    check.finish(right_digests(collection))
    check.close()


@pytest.mark.parametrize("side", [CpuBackend(CPU), accelerator()], ids=["at the end", "beside"])
@pytest.mark.parametrize("span", range(len(SIZES)))
def test_a_wrong_byte_in_any_span_is_named(collection: TensorInventory, side: DeviceBackend, span: int) -> None:
    expected = right_digests(collection)
    collection.spans[span].data[-1] ^= 1
    check = checked(collection, side)
    check.arrived(segments_of(collection))
    (name,) = [entry.name for entry in collection.entries if entry.span == span]
    with pytest.raises(VerificationError, match=f"1 of 10 tensors are not the seed's: {name}"):
        check.finish(expected)
    check.close()


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> queue.SimpleQueue[int]:
    """The lengths of the spans whose digests have been queued."""
    lengths: queue.SimpleQueue[int] = queue.SimpleQueue()
    add = digest.Digester.add

    def adding(self: digest.Digester, span: torch.Tensor) -> None:
        add(self, span)
        lengths.put(span.numel())

    monkeypatch.setattr(digest.Digester, "add", adding)
    return lengths


def test_a_span_is_not_digested_before_its_last_byte_is_there(
    collection: TensorInventory, begun: queue.SimpleQueue[int]
) -> None:
    expected = right_digests(collection)
    while not begun.empty():
        begun.get()
    large, *others = sorted(segments_of(collection), key=lambda segment: -segment.nbytes)
    check = checked(collection, accelerator())
    check.arrived([large._replace(nbytes=large.nbytes - 1), *others])
    assert sorted(begun.get(timeout=60) for _ in others) == sorted(segment.nbytes for segment in others)
    assert begun.empty()
    check.arrived([Segment(large.local + large.nbytes - 1, 0, 1)])
    assert begun.get(timeout=60) == large.nbytes
    check.finish(expected)
    check.close()


def test_digests_are_queued_while_bytes_are_still_on_their_way(
    collection: TensorInventory, begun: queue.SimpleQueue[int]
) -> None:
    """This is what the thread is for: after the last byte only the last spans are left."""
    check = checked(collection, accelerator())
    *first, last = segments_of(collection)
    for segment in first:
        check.arrived([segment])
        assert begun.get(timeout=60) == segment.nbytes
    check.arrived([last])
    check.finish(right_digests(collection))
    check.close()


@pytest.mark.parametrize("side", [CpuBackend(CPU), accelerator()], ids=["at the end", "beside"])
def test_what_was_not_read_is_compared_all_the_same(collection: TensorInventory, side: DeviceBackend) -> None:
    """Spans that an earlier model uses are not written, and a fork must not take them for right unseen."""
    expected = right_digests(collection)
    collection.spans[3].data[7] ^= 1
    check = checked(collection, side)
    check.arrived(segments_of(collection, without=frozenset({3})))
    with pytest.raises(VerificationError, match="weight_3"):
        check.finish(expected)
    check.close()


@pytest.mark.parametrize("side", [CpuBackend(CPU), accelerator()], ids=["at the end", "beside"])
def test_a_sample_looks_at_its_spans_only(collection: TensorInventory, side: DeviceBackend) -> None:
    expected = right_digests(collection)
    collection.spans[1].data[0] ^= 1
    check = checked(collection, side, "sample")
    check.arrived(segments_of(collection))
    check.finish(expected)
    check.close()
    collection.spans[SAMPLE_EVERY].data[0] ^= 1
    check = checked(collection, side, "sample")
    check.arrived(segments_of(collection))
    with pytest.raises(VerificationError, match=f"1 of 2 tensors are not the seed's: weight_{SAMPLE_EVERY}"):
        check.finish(expected)
    check.close()


def test_nothing_is_asked_for_where_nothing_is_compared(collection: TensorInventory) -> None:
    assert spans_to_check(collection, "off") == []


def test_a_device_that_fails_is_a_failed_verification(
    collection: TensorInventory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, span: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("no room for sums")

    monkeypatch.setattr(digest.Digester, "add", fail)
    check = checked(collection, accelerator())
    check.arrived(segments_of(collection))
    with pytest.raises(ForkError, match="no digests: OutOfMemoryError: no room for sums"):
        check.finish(dict.fromkeys(range(len(SIZES)), "any"))
    check.close()


def test_a_span_that_the_seed_did_not_vouch_for_is_refused(collection: TensorInventory) -> None:
    for missing in ({}, {4: ""}):
        expected = {**right_digests(collection), **missing}
        if not missing:
            del expected[4]
        check = checked(collection, accelerator())
        check.arrived(segments_of(collection))
        with pytest.raises(VerificationError, match="the seed has no digests of weight_4"):
            check.finish(expected)
        check.close()


def test_a_device_that_hangs_does_not_hang_the_start(collection: TensorInventory) -> None:
    waits = threading.Event()

    class Hanging(DeviceBackend):
        def set_current(self) -> None:
            waits.wait(60)

    check = StreamingVerifier(collection, [0], Hanging(CPU), 0.05)
    check.arrived(segments_of(collection))
    with pytest.raises(ForkError, match=r"has not finished its digests after 0\.05 s"):
        check.finish({0: "any"})
    waits.set()
    check.close()


def test_getting_ready_runs_every_kind_of_sum_and_never_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    digested: list[int] = []
    monkeypatch.setattr(digest, "digest", lambda span: digested.append(span.numel()))
    load_kernels(accelerator()).join(60)
    (nbytes,) = digested
    whole, rest = divmod(nbytes, digest.ROWS * digest.COLUMNS * 8)
    assert whole
    assert rest

    class Failing(DeviceBackend):
        def set_current(self) -> None:
            raise RuntimeError("the device is lost")

    with caplog.at_level("DEBUG", "vllm_rfork"):
        load_kernels(Failing(CPU)).join(60)
    assert "cannot digest yet: RuntimeError: the device is lost" in caplog.text


def test_a_processor_has_no_kernels_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "digest", lambda span: pytest.fail("it would compete with the load"))
    assert load_kernels(CpuBackend(CPU)) is None


def test_a_read_that_fails_lets_go_of_the_memory() -> None:
    model = nn.Module()
    model.register_buffer("weight", torch.zeros(100_000, dtype=torch.uint8))
    collection = collect(model, CPU)
    alive = weakref.ref(collection.spans[0])
    check = checked(collection, accelerator())
    check.arrived([Segment(collection.spans[0].address, 0, 5)])
    check.close()
    check.close()
    del model, collection, check
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(("algorithm", "named"), [("sha1", "sha1"), ("", "missing")])
def test_digests_of_another_algorithm_are_refused_with_the_remedy(algorithm: str, named: str) -> None:
    seed: Any = SimpleNamespace(digest_algorithm=algorithm)
    with pytest.raises(VerificationError, match=f"{named}, .*{digest.ALGORITHM}; use equal versions"):
        check_algorithm(seed, "use equal versions")
    seed.digest_algorithm = digest.ALGORITHM
    check_algorithm(seed, "use equal versions")
