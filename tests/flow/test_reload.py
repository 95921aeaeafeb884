"""A running worker's reload from a real seed, without vLLM: what is forked in place, and what is left to storage."""

from __future__ import annotations

import functools
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn

from tests.open_engines import open_engines
from vllm_rfork.config import parse_config
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.memory import MemoryEngine
from vllm_rfork.errors import EngineError
from vllm_rfork.load import context as contexts
from vllm_rfork.load.context import LoadContext
from vllm_rfork.load.outcome import outcome_of
from vllm_rfork.load.reload import Reloads, reloads
from vllm_rfork.manifest.checkpoint_identity import CheckpointFiles
from vllm_rfork.manifest.schema import RUNTIME
from vllm_rfork.metrics import worker as metrics
from vllm_rfork.model import bounce
from vllm_rfork.model.snapshot import AsBuilt, Contents, Snapshot
from vllm_rfork.seed_key import WorkerIdentity
from vllm_rfork.seeding.manager import SeedManager
from vllm_rfork.seeding.publication import Publication
from vllm_rfork.vllm_compat import checkpoint_files
from vllm_rfork.vllm_compat.model_rules import VLLM_RULES
from vllm_rfork.vllm_compat.rank_groups import RankGroup
from vllm_rfork.vllm_compat.reloading import StoredWeights
from vllm_rfork.vllm_compat.weight_changes import Change, WeightChanges
from zoo.planner import Planner, eventually

CPU = torch.device("cpu")
A, B = 1, 2


class Model(nn.Module):
    """Weights, a table that no checkpoint has, a scale that loading sets, a flag that serving sets."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 32)
        self.register_buffer("table", torch.arange(100.0))
        self.weight_scale = 0.0
        self.served_once = False
        self.is_large = False

    def load(self, folder: Path) -> None:
        """Load from storage, in place."""
        for name, value in load_file(folder / "model.safetensors").items():
            self.get_parameter(name).data.copy_(value)
        self.weight_scale = float(self.first.weight.data.abs().max())
        self.is_large = bool(self.weight_scale > 0.5)


def checkpoint(folder: Path, seed: int, factor: float = 1.0) -> Path:
    """A folder with a checkpoint of :class:`Model`."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    weights = {name: each.data * factor for name, each in Model().named_parameters()}
    save_file(weights, folder / "model.safetensors")
    return folder


class Worker:
    """A worker that has loaded a model from ``folder``, and its seed, if it may be one."""

    def __init__(self, planner: Planner, folder: Path, name: str, **more: Any) -> None:
        pool, fingerprint = more.pop("pool", None), more.pop("fingerprint", "f1")
        forked_from: Worker | None = more.pop("forked_from", None)
        self.folder, self.seeds, self.reloads, self.model = folder, SeedManager(), reloads(), Model()
        self.changes = WeightChanges(self.seeds)
        named = {"model": str(folder), "model_weights": "", "revision": None, **more.pop("configured", {})}
        self.model_config: Any = SimpleNamespace(**named)
        self.load_config: Any = SimpleNamespace(load_format="rfork", download_dir=None)
        self.context = _context(self, planner, name, pool, fingerprint, more)
        built = AsBuilt.of(self.model, VLLM_RULES, kernels=True)
        if forked_from is None:
            self.model.load(folder)
        else:
            self.model.load(forked_from.folder)
            self.context.files.forked_from(forked_from.context.files.published())
        contents = Contents.of(self.model, CPU, VLLM_RULES)
        snapshot = Snapshot.loaded(contents, built, self.context.header(built.signature)).digested()
        self.outcome = outcome_of(self.context, self.context.open_session(), None, snapshot, self.model)
        if isinstance(self.outcome, Publication):
            self.seeds.publish(self.outcome)
            (self.seed,) = self.seeds.seeds(30)
            eventually(lambda: str(self.seed.address) in planner.seeds(), "the seed is announced")

    def change(self, change: Change, write: Callable[[Model], None] = lambda model: None) -> None:
        self.changes.run(change, lambda: write(self.model))

    def reload(self) -> bool:
        """Reload as the hook does; True if the weights were forked."""
        changes = self.changes

        def method() -> bool:
            wanted = StoredWeights(
                self.model, self.model_config, self.load_config, RankGroup(), changes.gone, changes.written
            )
            if self.reloads.fork(wanted):
                changes.settled(written=False)
                return True
            self.model.load(self.folder)
            changes.settled(written=not self.reloads.from_storage(wanted))
            return False

        forked: bool = changes.run(Change("weights are reloaded", writes=False), method)
        return forked

    def state(self) -> dict[str, Any]:
        """Everything that a forward pass depends on."""
        tensors = {name: bytes(each.numpy().tobytes()) for name, each in self.model.state_dict().items()}
        return {**tensors, "scale": self.model.weight_scale, "large": self.model.is_large}


def _context(worker: Worker, planner: Planner, name: str, pool: Any, fingerprint: str, more: Any) -> LoadContext:
    options = {
        "rfork_scheduler_url": planner.url,
        "rfork_seed_advertise_host": "127.0.0.1",
        "rfork_seed_bind_host": "127.0.0.1",
        "rfork_engine": "memory",
        "rfork_request_timeout_sec": 10.0,
        "rfork_max_batch_bytes": 4096,
    }
    settings = parse_config({**options, **more}, {}).settings
    find = functools.partial(checkpoint_files.files_of, worker.model_config, worker.load_config, "auto")
    return LoadContext(
        settings=settings,
        device=CPU,
        identity=WorkerIdentity("kv_both", 0, 0),
        seed_key=f"{name}$reload$kv_both$0$0",
        fingerprint=fingerprint,
        facts={},
        layout=RUNTIME,
        engine_order=("memory",),
        engine_config=EngineConfig("cpu"),
        advertise_host="127.0.0.1",
        load_config=worker.load_config,
        source=checkpoint_files.source_of(worker.model_config, worker.load_config),
        shows_progress=False,
        rank_group=RankGroup(),
        files=CheckpointFiles(find),
        pool_obstacle=pool,
    )


DEEP_SLEEP = Change("the worker goes to sleep", writes=False, discards=True)
FUNCTION = Change("a function is called on the worker")


def discarded(model: Model) -> None:
    """Memory after a sleep of level 2; vLLM brings registered buffers back."""
    for parameter in model.parameters():
        parameter.data.view(torch.uint8).fill_(0xA5)


@pytest.fixture(scope="module")
def planner() -> Iterator[Planner]:
    running = Planner()
    yield running
    running.stop()


@pytest.fixture
def start(planner: Planner, monkeypatch: pytest.MonkeyPatch, request: Any) -> Iterator[Callable[..., Worker]]:
    """Starts workers of one key, which are ended with the test."""
    monkeypatch.setattr(contexts, "KEEPS_LOADED", frozenset())  # as on accelerators
    started: list[Worker] = []

    def start(folder: Path, **more: Any) -> Worker:
        started.append(Worker(planner, folder, request.node.name, **more))
        return started[-1]

    yield start
    for worker in started:
        worker.seeds.withdraw("a test is over", last=True)
    eventually(lambda: not open_engines(), "every engine is closed")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "model", A)


Start = Callable[..., Worker]


@pytest.mark.parametrize(("pool", "buffer"), [(None, 2**31), ("weights lie in a pool", 1000)])
def test_weights_that_are_gone_come_from_a_seed(
    pool: str | None, buffer: int, start: Start, model: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(bounce, "MAX_NBYTES", buffer)
    source, worker = start(model), start(model, pool=pool)
    before, places = worker.state(), [each.data_ptr() for each in worker.model.parameters()]
    assert isinstance(worker.outcome, Publication) is (pool is None)
    worker.change(DEEP_SLEEP, discarded)
    assert worker.state() != before
    with caplog.at_level("INFO", "vllm_rfork"):
        assert worker.reload()
    assert worker.state() == before == source.state()
    assert places == [each.data_ptr() for each in worker.model.parameters()]
    assert "into the running model in " in caplog.text
    assert f"from seed {source.seed.address}" in caplog.text
    if pool is None:
        assert worker.seed.address is None, "withdrawn meanwhile"
        (again,) = worker.seeds.seeds(30)
        assert again.address, "a seed again"


def test_only_the_bytes_that_differ_are_read(
    start: Start, model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, worker = start(model), start(model)
    counted: list[tuple[str, int, str]] = []
    monkeypatch.setattr(
        metrics, "loaded", lambda source, *, nbytes, seconds, lane: counted.append((source, nbytes, lane))
    )
    caplog.set_level("INFO", "vllm_rfork")
    assert worker.reload()
    assert "bytes are the seed's already" in caplog.text
    worker.change(FUNCTION, lambda model: model.second.bias.data.zero_())
    assert worker.state() != source.state()
    assert worker.reload()
    assert worker.state() == source.state()
    assert "forked 128 of " in caplog.text
    assert counted == [("memory", 0, ""), ("seed", 128, "memory")]


def test_a_value_that_loading_sets_is_set_again_and_another_means_storage(
    start: Start, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Something wrote to the model: nobody knows which of its Python values still are those of the load."""
    source, worker = start(model), start(model)
    caplog.set_level("INFO", "vllm_rfork")
    worker.change(DEEP_SLEEP, lambda model: setattr(model, "served_once", True))
    assert worker.reload(), "serving sets flags"
    worker.change(FUNCTION, lambda model: setattr(model, "weight_scale", 7.0))
    worker.model.served_once = False
    assert worker.reload()
    assert worker.state() == source.state()
    worker.change(FUNCTION, lambda model: setattr(model, "is_large", True))
    assert not worker.reload()
    assert "Python values have changed since the load: is_large" in caplog.text
    assert worker.state() == source.state()
    assert worker.reload(), "storage has the weights of the load"


def test_without_files_here_only_weights_that_are_gone_are_forked(start: Start, model: Path, tmp_path: Path) -> None:
    """As a worker that forked when it started."""
    source = start(model)
    worker = start(tmp_path / "nothing", forked_from=source)
    worker.change(DEEP_SLEEP, discarded)
    assert worker.reload()
    assert worker.state() == source.state()
    with pytest.raises(FileNotFoundError):
        worker.reload()  # storage's own error


def test_another_model_that_is_not_on_this_machine_is_not_the_old_one(
    start: Start, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``update_config``: storage would download it, or fail."""
    source = start(model)
    worker = start(tmp_path / "nothing", forked_from=source)
    worker.model_config.model = str(tmp_path / "another")
    worker.change(DEEP_SLEEP, discarded)
    with caplog.at_level("INFO", "vllm_rfork"), pytest.raises(FileNotFoundError):
        worker.reload()
    assert f"and is at {tmp_path / 'another'} now" in caplog.text


@pytest.mark.parametrize(
    ("revision", "offline", "forked"), [(None, False, False), ("f" * 40, False, True), (None, True, True)]
)
def test_a_hub_may_have_a_newer_commit(
    revision: str | None, offline: bool, forked: bool, start: Start, model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """vLLM asks the hub in every reload; the copy on this machine stays as it is."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(checkpoint_files, "local_folder", lambda *source: model)
    start(model)
    worker = start(model, configured={"model": "org/name", "revision": revision})
    worker.change(DEEP_SLEEP, discarded)
    worker.folder = model if forked else checkpoint(tmp_path / "newer", B)
    assert worker.reload() is forked


def renamed(worker: Worker, other: Path) -> None:
    """The usual way to replace a file."""
    (other / "model.safetensors").replace(worker.folder / "model.safetensors")


def written(worker: Worker, other: Path) -> None:
    """In place, with the old file's times."""
    file = worker.folder / "model.safetensors"
    status = file.stat()
    file.write_bytes((other / "model.safetensors").read_bytes())
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def touched(worker: Worker, other: Path) -> None:
    """The samples of two checkpoints may be equal."""
    os.utime(worker.folder / "model.safetensors", ns=(0, 0))


def elsewhere(worker: Worker, other: Path) -> None:
    """``update_config``, or an earlier reload with a path."""
    worker.model_config.model = str(other)
    worker.folder = other


def outside_the_samples(worker: Worker, other: Path) -> None:
    """In place, with the old file's times, in bytes that are in no sample of the checkpoint's identity."""
    file = worker.folder / "model.safetensors"
    status, content = file.stat(), bytearray(file.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    end = header_end + json.loads(content[8:header_end])["first.weight"]["data_offsets"][1]
    content[end - 4 : end] = struct.pack("<f", 123.0)
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def by_another_loader(worker: Worker, other: Path) -> None:
    """``update_config`` of the load format."""
    elsewhere(worker, other)
    worker.load_config.load_format = "auto"


@pytest.mark.parametrize("replace", [renamed, written, outside_the_samples, touched, elsewhere, by_another_loader])
def test_other_files_are_read_although_a_seed_has_the_old_weights(
    replace: Callable[[Worker, Path], None], start: Start, model: Path, tmp_path: Path
) -> None:
    """As reinforcement learning saves them between a sleep and a reload."""
    start(model)
    own = checkpoint(tmp_path / "own", A)
    worker = start(own)
    worker.change(DEEP_SLEEP, discarded)
    replace(worker, checkpoint(tmp_path / "other", B, 8.0))
    assert not worker.reload()
    wanted = Model()
    wanted.load(worker.folder)
    assert torch.equal(worker.model.first.weight, wanted.first.weight)
    assert (worker.model.weight_scale, worker.model.is_large) == (wanted.weight_scale, wanted.is_large)


def nobody(patch: pytest.MonkeyPatch, source: Worker) -> str:
    source.seeds.withdraw("the test ends it", last=True)
    return "NoSeedAvailable"


def dies_half_way(patch: pytest.MonkeyPatch, source: Worker) -> str:
    read, calls = MemoryEngine.read, list[int]()

    def dying(self: MemoryEngine, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise EngineError("memory", "read", "the seed's process is gone", side="seed")
        read(self, *arguments)

    patch.setattr(MemoryEngine, "read", dying)
    return "the seed's process is gone"


def sends_other_bytes(patch: pytest.MonkeyPatch, source: Worker) -> str:
    source.model.first.weight.data.view(-1)[5] += 1.0  # behind the seed's back
    source.model.table += 1.0
    return "VerificationError"


def has_no_memory(patch: pytest.MonkeyPatch, source: Worker) -> str:
    def full(*args: Any, **more: Any) -> Any:
        raise torch.OutOfMemoryError("no memory is left")

    patch.setattr(bounce.torch, "empty", full)
    return "no memory is left"


def fails_unexpectedly(patch: pytest.MonkeyPatch, source: Worker) -> str:
    def broken(*args: Any) -> None:
        raise KeyError("a mistake")

    patch.setattr("vllm_rfork.load.reload._Reload.forked", broken)
    return "KeyError"


@pytest.mark.parametrize("fault", [nobody, dies_half_way, sends_other_bytes, has_no_memory, fails_unexpectedly])
def test_a_fork_that_fails_ends_in_storage(
    fault: Callable[[pytest.MonkeyPatch, Worker], str], start: Start, model: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source, worker = start(model), start(model)
    before = worker.state()
    worker.change(DEEP_SLEEP, discarded)
    text = fault(monkeypatch, source)
    reasons: list[str] = []
    monkeypatch.setattr(metrics, "fell_back", reasons.append)
    with caplog.at_level("INFO", "vllm_rfork"):
        assert not worker.reload()
    monkeypatch.undo()
    assert text in caplog.text
    assert worker.state() == before, "the table, which no checkpoint has, included"
    assert len(reasons) == 1


def of_other_facts(start: Start, model: Path) -> str:
    start(model, fingerprint="f2")
    return "fingerprint is f2, not the receiver's"  # from a planner that does not compare them


def of_other_bytes(start: Start, model: Path) -> str:
    """Its weights are not those of its files, or the samples of two checkpoints are equal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "load", lambda self, folder: None)
        start(model)
    return "other bytes than those that this worker has loaded"


def of_other_values(start: Start, model: Path) -> str:
    load = Model.load

    def other(self: Model, folder: Path) -> None:
        load(self, folder)
        self.weight_scale *= 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "load", other)
        start(model)
    return "other Python values on the seed"


def of_an_unknown_checkpoint(start: Start, model: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointFiles, "published", lambda self: None)
        start(model)
    return "of checkpoint None"


def of_another_checkpoint(start: Start, model: Path) -> str:
    start(checkpoint(model.parent / "another", B))
    return "ManifestMismatch"


@pytest.mark.parametrize(
    "other", [of_other_facts, of_other_bytes, of_other_values, of_an_unknown_checkpoint, of_another_checkpoint]
)
def test_a_seed_with_other_weights_is_not_read(
    other: Callable[[Start, Path], str], start: Start, model: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    text = other(start, model)
    worker = start(model)
    before = worker.state()
    worker.change(DEEP_SLEEP, discarded)
    monkeypatch.setattr(MemoryEngine, "read", lambda *args: pytest.fail("a byte was read"))
    with caplog.at_level("INFO", "vllm_rfork"):
        assert not worker.reload()
    assert text in caplog.text
    assert worker.state() == before


def test_a_model_that_was_loaded_again_is_another_one(start: Start, model: Path) -> None:
    start(model)
    worker = start(model)
    worker.model = Model()
    worker.reloads = Reloads()
    assert not worker.reload()
