"""A receiver's model is, tensor by tensor, the default loader's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import LogRecords, Planner, SeedProcess, eventually, extra_for
from tests.vllm.engine_process import load_digested, vllm_config

pytestmark = pytest.mark.vllm


def test_the_seed_loaded_what_the_default_loader_loads(seed: SeedProcess, default_a: Any) -> None:
    assert seed.said["loaded"] == default_a.before
    assert seed.said["processed"] == default_a.after


@pytest.mark.usefixtures("seed")
def test_a_fork_equals_a_default_load_without_weight_files(
    planner: Planner, default_a: Any, model_a_without_weights: Path, rfork_log: LogRecords
) -> None:
    eventually(lambda: planner.seeds() and planner.leases() == 0, "the seed is free")
    extra = extra_for(planner.url, rfork_become_seed=False)
    forked = load_digested(vllm_config(model_a_without_weights, load_format="rfork", extra=extra))
    assert forked.before == default_a.before
    assert forked.after == default_a.after
    assert [line for line in rfork_log.texts() if line.startswith("RFork: forked ")]
    eventually(lambda: planner.leases() == 0, "the lease is released")
