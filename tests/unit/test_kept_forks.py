"""A fork before post-processing is kept when every rank's post-processing accepted it, or by none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from vllm_rfork.errors import ForkError
from vllm_rfork.load.plan import FORK_STAGE, KEPT_STAGE, LoadPlan
from vllm_rfork.manifest.schema import CHECKPOINT, RUNTIME


class Ranks:
    """The other ranks of an instance, and what they answer: empty for yes."""

    alone = False

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.answer = ""
        self.not_yet = ""

    def refused(self, stage: str) -> str:
        return ""

    def turn(self, stage: str, timeout_s: float) -> str:
        self.asked.append((stage, "turn"))
        return self.not_yet

    def pass_on(self, stage: str) -> None:
        self.asked.append((stage, "pass on"))

    def reach(self, stage: str, reason: str, timeout_s: float) -> str:
        self.asked.append((stage, reason))
        return reason or self.answer


def plan_of(ranks: Ranks, layout: str) -> LoadPlan:
    settings = SimpleNamespace(rfork_fork_timeout_sec=1.0, rfork_request_timeout_sec=1.0)
    return LoadPlan(
        settings=cast("Any", settings),
        device=torch.device("cpu"),
        identity=cast("Any", None),
        files=cast("Any", None),
        seed_key="k",
        fingerprint="f",
        layout=layout,
        attempt=cast("Any", SimpleNamespace(engine=SimpleNamespace(name="memory"), leases=SimpleNamespace())),
        advertise_host="",
        load_config=None,
        shows_progress=False,
        agreement=cast("Any", ranks),
    )


def test_ranks_agree_once_more_when_post_processing_is_over() -> None:
    ranks = Ranks()
    plan = plan_of(ranks, CHECKPOINT)
    assert plan.agreed_fork(lambda: 5) == 5
    assert plan.holds_fork
    plan.keep_fork()
    assert not plan.holds_fork
    plan.tell_others(ValueError("later"))
    assert ranks.asked == [(FORK_STAGE, ""), (KEPT_STAGE, "")]


def test_a_rank_takes_a_lease_in_its_turn_and_then_lets_the_next_one_have_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = Ranks()
    plan = plan_of(ranks, CHECKPOINT)
    plan.settings = cast(
        "Any",
        SimpleNamespace(
            rfork_fork_timeout_sec=1.0,
            rfork_request_timeout_sec=1.0,
            rfork_seed_wait_sec=None,
            rfork_seed_timeout_sec=1.0,
        ),
    )
    plan.attempt = cast(
        "Any", SimpleNamespace(reserve=lambda fingerprint: ranks.asked.append(("", "lease")), leases=SimpleNamespace())
    )
    monkeypatch.setattr(LoadPlan, "collect_empty", lambda plan, model: None)
    monkeypatch.setattr(LoadPlan, "_look_at_built", lambda plan, model: None)
    plan.prepare(torch.nn.Module())
    assert [what for _, what in ranks.asked] == ["turn", "lease", "pass on", ""]
    ranks.asked.clear()
    ranks.not_yet = "rank 0: not ready within 5 s"
    with pytest.raises(ForkError, match="rank 0: not ready"):
        plan.prepare(torch.nn.Module())
    assert [what for _, what in ranks.asked] == ["turn", "ForkError: rank 0: not ready within 5 s"]


def test_a_rank_whose_post_processing_fails_tells_the_others() -> None:
    ranks = Ranks()
    plan = plan_of(ranks, CHECKPOINT)
    plan.agreed_fork(lambda: None)
    for _ in range(2):
        plan.tell_others(ValueError("not with these values"))
    assert ranks.asked == [(FORK_STAGE, ""), (KEPT_STAGE, "ValueError: not with these values")]


def test_no_rank_keeps_a_fork_that_another_could_not_keep() -> None:
    ranks = Ranks()
    plan = plan_of(ranks, CHECKPOINT)
    plan.agreed_fork(lambda: None)
    ranks.answer = "rank 1: ValueError: not with these values"
    with pytest.raises(ForkError, match=r"not every rank .* \(kept\): rank 1: ValueError") as caught:
        plan.keep_fork()
    assert caught.value.mutated
    assert plan.holds_fork, "the loader builds the model again"


def test_in_the_runtime_layout_post_processing_is_over_before_the_fork() -> None:
    ranks = Ranks()
    plan = plan_of(ranks, RUNTIME)
    plan.agreed_fork(lambda: None)
    plan.tell_others(ValueError("later"))
    assert not plan.holds_fork
    assert ranks.asked == [(FORK_STAGE, "")]


def test_a_model_that_is_built_again_holds_nothing_of_the_fork() -> None:
    """Its memory would otherwise be there twice while storage is read."""
    plan = plan_of(Ranks(), CHECKPOINT)
    plan.agreed_fork(lambda: None)
    plan.collection = cast("Any", object())
    plan.digests, plan.state, plan.state_gone = ["d"], {"a": 1}, ("b",)
    plan.forget_fork()
    assert (plan.may_fork, plan.holds_fork, plan.holds_dummies) == (False, False, False)
    assert (plan.collection, plan.digests, plan.state, plan.state_gone) == (None, [], {}, ())
