"""A load's plan, and what its planner is told by it; no model is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import LogRecords, extra_for
from tests.vllm.engine_process import distributed, vllm_config
from vllm_rfork import plan as plans
from vllm_rfork.attempt import Attempt
from vllm_rfork.config import parse_config

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
        assert plan.attempt.intent == "", "nobody is to wait for it"
        assert plan.attempt.engine().registered_nbytes == 0
    finally:
        plan.attempt.close()


def test_as_soon_as_it_is_known_that_it_will_be_no_seed_the_intent_is_taken_back(
    model_a: Path, rfork_log: LogRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    take_back = Attempt.take_back_intent
    monkeypatch.setattr(Attempt, "take_back_intent", lambda self: (taken.append(self.intent), take_back(self)))
    plan = make(model_a)
    try:
        intent = plan.attempt.intent
        assert intent
        assert taken == []
        plan.refuse_to_seed("its weights cannot be accounted for")
        assert taken == [intent]
        assert plan.attempt.intent == ""
    finally:
        plan.attempt.close()
