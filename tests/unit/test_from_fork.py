"""A fork that is kept passes the seed's checkpoint on; one that is given up leaves no trace of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from vllm_rfork.load.capture import SeedProspect
from vllm_rfork.load.from_fork import FromFork
from vllm_rfork.load.ranks import RankVote
from vllm_rfork.manifest.checkpoint_identity import CheckpointFiles
from vllm_rfork.manifest.schema import CHECKPOINT, RUNTIME, ManifestHeader
from vllm_rfork.messages import SeedAddress
from vllm_rfork.model.rules import ModelRules
from vllm_rfork.model.snapshot import Contents

OWN, SEEDS = None, {"weights": "safetensors-1:of the seed's files"}
CPU = torch.device("cpu")


@pytest.mark.parametrize("layout", [CHECKPOINT, RUNTIME])
def test_the_seeds_checkpoint_is_published_once_the_fork_is_the_end_of_the_load(layout: str) -> None:
    header = ManifestHeader(seed_key="k", fingerprint="f", layout=layout, engine="memory", checkpoint=SEEDS)
    session: Any = SimpleNamespace(intent=SimpleNamespace(withdraw=lambda: None))
    context: Any = SimpleNamespace(
        settings=SimpleNamespace(rfork_verify="off"),
        device=CPU,
        layout=layout,
        fork_obstacle=None,
        keeps_loaded=True,
        files=CheckpointFiles(lambda *sources, main=True: {}),
        header=lambda signature: header,
    )
    model = nn.Linear(2, 2)
    tensors = Contents.of(model, CPU, ModelRules()).tensors
    fork = FromFork(context, session, cast("RankVote", None), SeedProspect(session, None))
    fork._forked = fork._capture(tensors, tensors.manifest(header))
    # Post-processing comes next, and may end in a rebuild: the weights then come from this machine's files.
    assert context.files.published() == OWN
    assert fork.snapshot(model).tensors.entries == tensors.entries
    assert context.files.published() == SEEDS


def test_the_seed_of_the_lease_is_known_before_anything_is_read_from_it() -> None:
    seed, happened = SeedAddress("10.0.0.7", 4711, 0), list[Any]()
    session: Any = SimpleNamespace(
        reserve=lambda fingerprint: seed,
        peek=lambda fingerprint: happened.append("manifest"),
        intent=SimpleNamespace(withdraw=lambda: None),
    )
    context: Any = SimpleNamespace(
        settings=SimpleNamespace(rfork_verify="off"),
        device=CPU,
        layout=RUNTIME,
        fingerprint="f",
        fork_obstacle=None,
        planner_unreachable=None,
    )
    vote: Any = SimpleNamespace(take_turn=lambda bound_s: None, end_turn=lambda: None)
    fork = FromFork(context, session, vote, SeedProspect(session, None), happened.append)
    fork._reserve(nn.Linear(2, 2), 1.0)
    assert happened == [seed, "manifest"]
