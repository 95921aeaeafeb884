"""All ranks of an instance go the same way: each votes on every stage, also if it fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from vllm_rfork.errors import ForkError, NoSeedAvailable
from vllm_rfork.load import capture, from_fork
from vllm_rfork.load.from_fork import FromFork
from vllm_rfork.load.machine import STAGES
from vllm_rfork.load.ranks import FORK, KEPT, SEED, RankVote
from vllm_rfork.manifest.schema import CHECKPOINT, RUNTIME


class Ranks:
    """The consensus with the other ranks of an instance, and what they answer: None if they accept."""

    alone = False

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []
        self.answer: str | None = None
        self.not_yet: str | None = None

    def rejection(self, stage: str) -> str | None:
        return f"rejected: {stage}"

    def await_turn(self, stage: str, timeout_s: float) -> str | None:
        self.asked.append((stage, "turn"))
        return self.not_yet

    def end_turn(self, stage: str) -> None:
        self.asked.append((stage, "pass on"))

    def decide(self, stage: str, obstacle: str | None, timeout_s: float) -> str | None:
        self.asked.append((stage, obstacle))
        return obstacle or self.answer


def vote_of(ranks: Ranks, layout: str = CHECKPOINT) -> RankVote:
    return RankVote(cast("Any", ranks), STAGES[layout], 1.0)


def fork_of(vote: RankVote, session: Any = None, layout: str = CHECKPOINT, verify: str = "off") -> FromFork:
    settings = SimpleNamespace(
        rfork_fork_timeout_sec=1.0,
        rfork_request_timeout_sec=1.0,
        rfork_seed_wait_sec=None,
        rfork_seed_timeout_sec=1.0,
        rfork_verify=verify,
    )
    context = SimpleNamespace(
        settings=settings,
        device=torch.device("cpu"),
        layout=layout,
        fingerprint="f",
        fork_obstacle=None,
        planner_unreachable=None,
    )
    return FromFork(cast("Any", context), session, vote, cast("Any", None))


def test_ranks_agree_once_more_when_post_processing_is_over() -> None:
    ranks = Ranks()
    vote = vote_of(ranks)
    assert vote.run(FORK, lambda: 5, 1.0) == 5
    fork_of(vote).keep()
    vote.abandon(ValueError("later"))
    assert ranks.asked == [(FORK, None), (KEPT, None)]


def test_in_the_runtime_layout_post_processing_is_over_before_the_fork() -> None:
    ranks = Ranks()
    vote = vote_of(ranks, RUNTIME)
    vote.run(FORK, lambda: None, 1.0)
    fork_of(vote, layout=RUNTIME).keep()
    vote.abandon(ValueError("later"))
    assert ranks.asked == [(FORK, None)]


def session_of(ranks: Ranks, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Any:
    """A session whose steps are noted in order, beside the looks at the model."""

    def step(name: str, result: Any = None) -> Any:
        return lambda *args: ranks.asked.append(("", name)) or result

    monkeypatch.setattr(capture, "contents", step("contents", SimpleNamespace(tensors=None, state={})))
    monkeypatch.setattr(capture, "built_model", step("built"))
    monkeypatch.setattr(from_fork, "load_kernels", step("kernels"))
    steps = {"reserve": step("lease"), "await_engine": step("engine"), "peek": step("manifest")}
    return SimpleNamespace(**{**steps, **more})


@pytest.mark.parametrize("layout", [CHECKPOINT, RUNTIME])
def test_without_a_seed_a_rank_waits_for_no_engine_and_looks_at_no_model(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks()

    def none_left(fingerprint: str) -> None:
        raise NoSeedAvailable("none")

    session = session_of(ranks, monkeypatch, reserve=none_left)
    with pytest.raises(NoSeedAvailable):
        fork_of(vote_of(ranks, layout), session, layout).reserve(torch.nn.Module())
    assert [what for _, what in ranks.asked] == ["turn", "NoSeedAvailable: none"]


def test_in_the_runtime_layout_engines_go_on_opening_while_dummies_are_post_processed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = Ranks()
    fork = fork_of(vote_of(ranks, RUNTIME), session_of(ranks, monkeypatch), RUNTIME, verify="full")
    fork.reserve(torch.nn.Module())
    assert [what for _, what in ranks.asked] == ["turn", "lease", "pass on", "kernels", "manifest", None]


def test_a_rank_takes_a_lease_in_its_turn_and_then_lets_the_next_one_have_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = Ranks()
    session = session_of(ranks, monkeypatch)
    fork_of(vote_of(ranks), session).reserve(torch.nn.Module())
    assert [what for _, what in ranks.asked] == ["turn", "lease", "pass on", "engine", "contents", "built", None]
    ranks.asked.clear()
    ranks.not_yet = "rank 0: not ready within 5 s"
    with pytest.raises(ForkError, match="rank 0: not ready"):
        fork_of(vote_of(ranks), session).reserve(torch.nn.Module())
    assert [what for _, what in ranks.asked] == ["turn", "ForkError: rank 0: not ready within 5 s"]


def test_a_rank_whose_post_processing_fails_tells_the_others_once() -> None:
    ranks = Ranks()
    vote = vote_of(ranks)
    vote.run(FORK, lambda: None, 1.0)
    for _ in range(2):
        vote.abandon(ValueError("not with these values"))
    assert ranks.asked == [(FORK, None), (KEPT, "ValueError: not with these values")]


def test_no_rank_keeps_a_fork_that_another_could_not_keep() -> None:
    ranks = Ranks()
    vote = vote_of(ranks)
    vote.run(FORK, lambda: None, 1.0)
    ranks.answer = "rank 1: ValueError: not with these values"
    with pytest.raises(ForkError, match=r"not every rank .* \(kept\): rank 1: ValueError"):
        fork_of(vote).keep()


@pytest.mark.parametrize("layout", [CHECKPOINT, RUNTIME])
def test_after_each_accepted_stage_the_other_ranks_wait_for_the_next_vote(layout: str) -> None:
    stages = STAGES[layout]
    for number, stage in enumerate(stages):
        ranks = Ranks()
        vote = vote_of(ranks, layout)
        for each in stages[: number + 1]:
            vote.run(each, lambda: None, 1.0)
        ranks.asked.clear()
        vote.abandon(ValueError("gone"))
        following = stages[number + 1 : number + 2]
        assert [asked for asked, _ in ranks.asked] == list(following), stage


def test_nobody_waits_for_a_rank_before_the_first_stage_and_after_a_rejection() -> None:
    ranks = Ranks()
    vote = vote_of(ranks)
    vote.abandon(ValueError("the model cannot be built"))
    assert ranks.asked == []
    vote.run(SEED, lambda: None, 1.0)
    ranks.answer = "rank 1: no seed"
    with pytest.raises(ForkError, match="rank 1: no seed"):
        vote.run(FORK, lambda: None, 1.0)
    ranks.asked.clear()
    vote.abandon(ValueError("later"))
    assert ranks.asked == []


def test_a_foreign_error_is_a_rejection_for_all_ranks() -> None:
    ranks = Ranks()
    with pytest.raises(ForkError, match="this worker cannot fork: RuntimeError: no memory"):
        vote_of(ranks).run(FORK, _no_memory, 1.0)
    assert ranks.asked == [(FORK, "ForkError: this worker cannot fork: RuntimeError: no memory")]


def _no_memory() -> None:
    raise RuntimeError("no memory")


def test_a_rank_that_waits_sees_the_rejection_of_its_own_stage() -> None:
    vote = vote_of(Ranks())
    seen = []
    for stage in (SEED, FORK):
        vote.run(stage, lambda: seen.append(vote.rejection()), 1.0)
    assert seen == ["rejected: seed", "rejected: fork"]
