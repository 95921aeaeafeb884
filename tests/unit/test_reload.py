"""Reloads by a fork without vLLM: ranks that go the same way, the bounce buffer, and what is known of the weights."""

from __future__ import annotations

import concurrent.futures
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import nn

from vllm_rfork.config import parse_config
from vllm_rfork.errors import ForkError
from vllm_rfork.load import reload
from vllm_rfork.load.consensus import Consensus
from vllm_rfork.load.reload import Reloads, StorageDecides
from vllm_rfork.manifest.checkpoint_identity import Files
from vllm_rfork.manifest.segments import Segment
from vllm_rfork.model import bounce
from vllm_rfork.model.bounce import BounceBuffer
from vllm_rfork.model.rules import ModelRules
from vllm_rfork.model.snapshot import Contents
from vllm_rfork.vllm_compat.checkpoint_files import Source, elsewhere, stamps_of
from vllm_rfork.vllm_compat.rank_groups import RankGroup
from vllm_rfork.vllm_compat.reloading import OtherSource, StoredWeights, wants_own_files
from vllm_rfork.vllm_compat.weight_changes import Change, WeightChanges
from vllm_rfork.vllm_compat.worker_hooks import CHANGES_WEIGHTS
from zoo.planner import eventually

CPU = torch.device("cpu")

# --- ranks -----------------------------------------------------------------------------------------------------------


class Fork:
    """A fork that works, or fails while it reads."""

    def __init__(self, error: Exception | None, runs: list[str]) -> None:
        self.error, self.runs = error, runs
        self.session, self.read_nbytes = SimpleNamespace(lane="memory", leased=False), 0

    def run(self) -> str:
        self.runs.append("read")
        if self.error is not None:
            raise self.error
        return "the seed's manifest"

    def log(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("stage", "error"),
    [
        ("none", None),
        ("reserving", StorageDecides("the files have changed")),
        ("reserving", KeyError("a mistake")),
        ("reading", ForkError("the seed is gone")),
        ("reading", KeyError("a mistake")),
    ],
)
def test_both_ranks_fork_or_both_read_storage(
    stage: str, error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = torch.distributed.HashStore()
    monkeypatch.setattr(reload, "Consensus", lambda group: Consensus(group, connect=lambda: store))
    options = {"rfork_scheduler_url": "http://127.0.0.1:1", "rfork_fork_timeout_sec": 30.0}
    settings, runs = parse_config(options, {}).settings, list[str]()
    context: Any = SimpleNamespace(settings=settings, layout="runtime", identity=SimpleNamespace(is_draft=False))

    def reserved(self: Any) -> Any:
        here = self._wanted.ranks.rank == 1
        if here and stage == "reserving":
            raise error  # type: ignore[misc]
        return Fork(error if here and stage == "reading" else None, runs)

    monkeypatch.setattr(reload._Reload, "_reserved", reserved)
    reloads = Reloads()
    reloads.load_ended(context, None, {})

    def rank(number: int) -> bool:
        ranks = RankGroup(number, (0, 1), "g")
        return reloads.fork(StoredWeights(nn.Linear(1, 1), None, None, ranks, gone=True, written=False))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(rank, (0, 1), timeout=60)) == [error is None] * 2
    assert len(runs) == (0 if stage == "reserving" else 2), "nothing is written before both have a seed"


def test_a_worker_that_cannot_describe_its_model_rejects_at_once(caplog: pytest.LogCaptureFixture) -> None:
    settings = parse_config({"rfork_scheduler_url": "http://127.0.0.1:1"}, {}).settings
    context: Any = SimpleNamespace(settings=settings, layout="runtime", identity=SimpleNamespace(is_draft=False))
    reloads = Reloads()
    wanted = StoredWeights(nn.Linear(1, 1), None, None, RankGroup(), gone=True, written=False)
    assert not reloads.fork(wanted), "nothing was loaded"
    reloads.load_ended(context, None, {})
    with caplog.at_level("INFO", "vllm_rfork"):
        assert not reloads.fork(wanted)
    assert "was not described when it was loaded" in caplog.text
    assert not reloads.from_storage(wanted)


@pytest.mark.parametrize("error", [StorageDecides("other files"), KeyError("a mistake")])
def test_a_reload_from_storage_succeeds_whatever_its_files_do_afterwards(error: Exception) -> None:
    def checkpoint(wanted: StoredWeights) -> Any:
        raise error

    reloads, model = Reloads(), nn.Linear(1, 1)
    loaded: Any = SimpleNamespace(tensors=SimpleNamespace(model=model), checkpoint=checkpoint)
    reloads._loaded.append(loaded)
    assert not reloads.from_storage(StoredWeights(model, None, None, RankGroup(), gone=True, written=False))


# --- the bounce buffer -----------------------------------------------------------------------------------------------


def test_batches_reach_their_places_by_way_of_the_buffer() -> None:
    model = nn.Linear(64, 64)
    tensors = Contents.of(model, CPU, ModelRules()).tensors
    buffer = BounceBuffer(tensors, CPU, 4096)
    span = max(tensors.spans, key=lambda each: each.nbytes)
    other = min(tensors.spans, key=lambda each: each.nbytes)
    batch = [Segment(span.address + 1000, 1, 3000), Segment(other.address, 2, other.nbytes)]
    (first, second) = buffer.redirected(batch)
    (region,) = buffer.regions
    assert (first.local, second.local) == (region.address, region.address + 3000)
    assert second.local + second.nbytes <= region.address + region.nbytes
    before = span.data.clone()
    buffer.memory.copy_(torch.arange(4096).to(torch.uint8))
    buffer.deliver(batch)
    assert torch.equal(span.data[1000:4000], buffer.memory[:3000])
    assert torch.equal(other.data, buffer.memory[3000 : 3000 + other.nbytes])
    assert torch.equal(span.data[:1000], before[:1000])
    assert torch.equal(span.data[4000:], before[4000:])


def test_a_device_with_little_memory_has_a_smaller_buffer_and_one_without_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def empty(nbytes: int, **more: Any) -> Any:
        asked.append(nbytes)
        if nbytes > room:
            raise torch.OutOfMemoryError("full")
        return "memory"

    monkeypatch.setattr(bounce.torch, "empty", empty)
    room = 2**26
    assert bounce._allocated(CPU, 2**28) == "memory"
    assert asked == [2**28, 2**27, 2**26]
    room = 0
    with pytest.raises(ForkError, match="no memory for a buffer"):
        bounce._allocated(CPU, 2**28)


# --- which weights storage has ---------------------------------------------------------------------------------------


def written_with_its_times(file: Path) -> bool:
    status = file.stat()
    with file.open("r+b") as opened:
        opened.write(b"w")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    return file.stat().st_mtime_ns == status.st_mtime_ns


def test_a_file_that_was_replaced_or_written_has_another_stamp(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    parts = {"weights": Files([file])}
    first = stamps_of(parts)
    assert stamps_of(parts) == first
    status = file.stat()
    other = tmp_path / "other"
    other.write_bytes(b"WEIGHTS")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(file)
    replaced = stamps_of(parts)
    assert replaced != first
    eventually(
        lambda: written_with_its_times(file) and stamps_of(parts) != replaced, "the clock of the file system has ticked"
    )
    written = stamps_of(parts)
    os.utime(file, ns=(0, 0))
    assert stamps_of(parts) not in (first, replaced, written)
    file.unlink()
    with pytest.raises(OSError, match="No such file"):
        stamps_of(parts)


@pytest.mark.parametrize(
    ("loaded_from", "model", "load_format", "reason"),
    [
        (Source("s3://bucket/model", None, None), "s3://bucket/model", "rfork", "named by a URL"),
        (Source("/model", None, None), "/model", "auto", "load format is auto"),
        (Source("/model", None, None), "/another", "rfork", "loaded from /model, and is at /another now"),
        (Source("o/m", "1", None), "o/m", "rfork", "loaded from o/m revision=1, and is at o/m now"),
        (Source("/model", None, "/d"), "/model", "rfork", "loaded from /model download_dir=/d, and"),
    ],
)
def test_weights_from_elsewhere_are_not_compared(
    loaded_from: Source, model: str, load_format: str, reason: str
) -> None:
    config = SimpleNamespace(model=model, model_weights="", revision=None)
    load = SimpleNamespace(load_format=load_format, download_dir=None)
    wanted = StoredWeights(nn.Linear(1, 1), config, load, RankGroup(), gone=True, written=False)
    with pytest.raises(OtherSource, match=reason):
        wanted.files("auto", loaded_from)


@pytest.mark.parametrize(
    ("name", "revision", "offline", "place"),
    [
        ("s3://bucket/model", None, True, "a URL"),
        ("/no/such/folder", None, False, None),
        ("tests", None, False, None),  # a folder here
        ("org/name", None, False, "a hub's repository without a commit"),
        ("org/name", "main", False, "a hub's repository without a commit"),
        ("org/name", "0a" * 19, False, "a hub's repository without a commit"),
        ("org/name", "0a" * 20, False, None),
        ("org/name", None, True, None),
    ],
)
def test_places_whose_weights_may_be_newer(
    name: str, revision: str | None, offline: bool, place: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.chdir(Path(__file__).parents[2])
    assert elsewhere(Source(name, revision, None)) == place


def test_a_tower_from_a_hub_may_be_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    model: Any = nn.Linear(1, 1)
    model.secondary_weights = [SimpleNamespace(model_or_path="org/tower", revision=None)]
    config = SimpleNamespace(model="/model", model_weights="", revision=None)
    load = SimpleNamespace(load_format="rfork", download_dir=None)
    wanted = StoredWeights(model, config, load, RankGroup(), gone=True, written=False)
    with pytest.raises(OtherSource, match="the weights of org/tower"):
        wanted.files("auto", Source("/model", None, None))


@pytest.mark.parametrize(
    ("arguments", "own"),
    [((), True), ((None, None, True), True), ((iter(()),), False), ((None, "/other"), False), ((None, None, 0), False)],
)
def test_arguments_that_name_other_weights(arguments: tuple[Any, ...], own: bool) -> None:
    assert wants_own_files(*arguments) is own


#: Calls in order, and whether weights are then gone, and written by something other than a load.
HISTORIES = {
    "": (False, False),
    "sleep:2 wake_up": (True, False),
    "sleep wake_up": (False, False),
    "discard": (True, False),
    "reset_weights update_config": (True, False),
    "sleep:2 wake_up apply_model": (False, True),
    "start_weight_update update_weights finish_weight_update": (False, True),
    "apply_model sleep:2 wake_up": (True, True),
}


@pytest.mark.parametrize("history", HISTORIES)
def test_what_is_in_memory(history: str) -> None:
    listener: Any = SimpleNamespace(withdraw=lambda *args, **more: None, resume=lambda: None)
    changes = WeightChanges(listener)
    for call in history.split():
        name, _, level = call.partition(":")
        change = CHANGES_WEIGHTS[name]
        changes.run(Change("deep sleep", writes=False, discards=True) if level else change, lambda: None)
    assert (changes.gone, changes.written) == HISTORIES[history]
    changes.settled(written=False)
    assert (changes.gone, changes.written) == (False, False)
