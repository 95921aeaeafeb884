"""The order of a load's stages, and how often each is done: at most one look at the model per phase."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from vllm_rfork.fork.stage_times import StageTimes
from vllm_rfork.load import capture, from_fork, from_storage
from vllm_rfork.load.capture import SeedProspect
from vllm_rfork.load.consensus import Consensus
from vllm_rfork.load.from_fork import FromFork
from vllm_rfork.load.from_storage import FromStorage
from vllm_rfork.load.machine import STAGES
from vllm_rfork.load.ranks import RankVote
from vllm_rfork.manifest.checkpoint_identity import CheckpointFiles
from vllm_rfork.manifest.schema import CHECKPOINT, RUNTIME, Manifest, ManifestHeader
from vllm_rfork.messages import SeedAddress
from vllm_rfork.model import digest, restore, snapshot
from vllm_rfork.model.snapshot import Snapshot
from vllm_rfork.vllm_compat import dummy_weights
from vllm_rfork.vllm_compat.rank_groups import RankGroup

CPU = torch.device("cpu")
FIRST = {
    CHECKPOINT: ["built", "walk", "kernels", "storage", "look", "walk", "digests", "post-process"],
    RUNTIME: ["built", "walk", "kernels", "storage", "walk", "post-process", "look", "walk", "digests"],
}
FORK = {
    CHECKPOINT: ["lease", "kernels", "engine", "look", "walk", "built", "read", "digests", "post-process"],
    RUNTIME: [
        *("lease", "kernels", "manifest", "built", "walk", "dummies", "post-process"),
        *("look", "walk", "read", "digests", "walk"),
    ],
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
        self.scale = 1.0


class Load:
    """One load of a small model, by either source; what is done is noted in ``happened``."""

    def __init__(self, layout: str, happened: list[str], seed: Manifest | None = None) -> None:
        self.happened, self.seed, self.model = happened, seed, nn.Sequential(Layer(), Layer())
        header = functools.partial(
            ManifestHeader, seed_key="k", fingerprint="f", layout=layout, engine="memory", digest_algorithm="d"
        )
        self.session: Any = SimpleNamespace(
            times=StageTimes(),
            intent=SimpleNamespace(withdraw=lambda: None),
            engines=SimpleNamespace(close_if_registered=lambda: None),
            reserve=lambda fingerprint: self.note("lease", SeedAddress("10.0.0.7", 4711, 0)),
            await_engine=lambda: self.note("engine"),
            peek=lambda fingerprint: self.note("manifest", self.seed),
            run=self.run,
            left_s=lambda: 60.0,
            seed="10.0.0.7:4711:0",
            engine="memory",
            lane="memory/host",
        )
        self.context: Any = SimpleNamespace(
            settings=SimpleNamespace(
                rfork_verify="full",
                rfork_fork_timeout_sec=60.0,
                rfork_request_timeout_sec=1.0,
                rfork_seed_timeout_sec=1.0,
                rfork_seed_wait_sec=None,
                rfork_fallback_load_format="auto",
            ),
            device=CPU,
            layout=layout,
            fingerprint="f",
            fork_obstacle=None,
            planner_unreachable=None,
            keeps_loaded=True,
            shows_progress=False,
            shared_storages=frozenset(),
            load_config=None,
            files=CheckpointFiles(lambda *sources, main=True: {}),
            header=lambda built: header(built=built, digest_algorithm=digest.ALGORITHM),
        )
        self.prospect = SeedProspect(self.session, None)

    def note(self, what: str, result: Any = None) -> Any:
        self.happened.append(what)
        return result

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        self.note("storage")
        for number, parameter in enumerate(model.parameters()):
            parameter.data.fill_(number + 1.0)

    def run(self, destination: Any) -> Manifest:
        sink = destination.sink()
        self.note("read")
        for number, parameter in enumerate(self.model.parameters()):
            parameter.data.fill_(number + 1.0)
        sink.accept(cast("Manifest", self.seed))
        return cast("Manifest", self.seed)

    def from_storage(self) -> Snapshot:
        source = FromStorage(self.context, self.session, self.prospect, self)
        source.fill(self.model, None)
        self.note("post-process")
        return source.snapshot(self.model)

    def from_fork(self) -> Snapshot:
        vote = RankVote(Consensus(RankGroup(0, (0,), "g")), STAGES[self.context.layout], 1.0)
        source = FromFork(self.context, self.session, vote, self.prospect)
        source.reserve(self.model)
        if self.context.layout == CHECKPOINT:
            source.read(self.model)
            self.note("post-process")
            source.keep()
        else:
            source.fill_with_dummies(self.model, None)
            self.note("post-process")
            source.read(self.model)
        return source.snapshot(self.model)


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []

    def noting(what: str, function: Any) -> Any:
        return lambda *args, **kwargs: (found.append(what), function(*args, **kwargs))[1]

    for where, name, what in (
        (capture, "built_model", "built"),
        (capture, "contents", "look"),
        (dummy_weights, "fill_with_dummies", "dummies"),
        (digest, "digests", "digests"),
        *((module, "walk", "walk") for module in (snapshot, from_storage, restore)),
    ):
        monkeypatch.setattr(where, name, noting(what, getattr(where, name)))
    for module in (from_storage, from_fork):
        monkeypatch.setattr(module, "load_kernels", lambda side: found.append("kernels"))
    monkeypatch.setattr(dummy_weights, "tie_dummies", lambda *args: None)
    return found


@pytest.mark.parametrize("layout", [CHECKPOINT, RUNTIME])
def test_the_stages_of_a_first_instance_and_of_its_fork(layout: str, happened: list[str]) -> None:
    seed = Load(layout, happened).from_storage()
    assert happened == FIRST[layout]
    happened.clear()
    fork = Load(layout, happened, seed.manifest()).from_fork()
    assert happened == FORK[layout]
    assert fork.digests == seed.digests
