"""A load's plan, and what its planner is told by it; no model is built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import LogRecords, extra_for
from tests.vllm.engine_process import distributed, vllm_config
from tests.vllm.models import qwen2
from vllm_rfork.config import parse_config
from vllm_rfork.fork.intent import Intent
from vllm_rfork.load import plan as plans
from vllm_rfork.manifest.facts import MAX_FACTS, differences

PLANNER = "http://10.255.255.1:1"


def make(model: Path, **options: Any) -> plans.LoadPlan:
    extra = extra_for(PLANNER, **options)
    config = vllm_config(model, load_format="rfork", extra=extra)
    with distributed(config):
        return plans.LoadPlan.make(parse_config(extra, {}).settings, config, config.model_config, rank_shows=False)


def test_a_worker_without_an_address_is_no_seed_and_still_reads_from_others(
    model_a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "advertise_host", lambda settings: "")
    plan = make(model_a)
    try:
        assert "rfork_seed_advertise_host" in plan.no_seed_reason
        assert plan.unreachable is None
        assert plan.attempt.intent.id == "", "nobody is to wait for it"
        assert plan.attempt.engine.opened().registered_nbytes == 0
    finally:
        plan.attempt.close()


def test_as_soon_as_it_is_known_that_it_will_be_no_seed_the_intent_is_taken_back(
    model_a: Path, rfork_log: LogRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    take_back = Intent.withdraw
    monkeypatch.setattr(Intent, "withdraw", lambda self: (taken.append(self.id), take_back(self)))
    plan = make(model_a)
    try:
        intent = plan.attempt.intent.id
        assert intent
        assert taken == []
        plan.refuse_to_seed("its weights cannot be accounted for")
        assert taken == [intent]
        assert plan.attempt.intent.id == ""
    finally:
        plan.attempt.close()


def test_what_vllm_reads_out_of_weight_files_is_named_where_it_differs(tmp_path: Path) -> None:
    """The configuration says tied, the checkpoint has an ``lm_head`` of its own, and the receiver has no files."""
    whole = qwen2(tmp_path / "whole", tie_word_embeddings=False)
    described = json.loads((whole / "config.json").read_text()) | {"tie_word_embeddings": True}
    (whole / "config.json").write_text(json.dumps(described))
    bare = tmp_path / "bare"
    shutil.copytree(whole, bare, ignore=shutil.ignore_patterns("*.safetensors*"))
    with_files, without = make(whole), make(bare)
    try:
        assert with_files.seed_key == without.seed_key
        assert with_files.fingerprint != without.fingerprint
        found = differences(without.attempt.facts, [(with_files.attempt.facts, 1)])
        assert "tie_word_embeddings: true here, false on 1 seed" in found
        assert 10 < len(without.attempt.facts) <= MAX_FACTS
    finally:
        with_files.attempt.close()
        without.attempt.close()
