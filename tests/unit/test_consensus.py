"""Ranks agree: the same answer for all of them, whoever says no, is late, or is dead."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore, PrefixStore

from tests.unit.interop_planners import free_port
from vllm_rfork.load import consensus
from vllm_rfork.load.consensus import MAX_OBSTACLE_LENGTH, Consensus
from vllm_rfork.vllm_compat.rank_groups import RankGroup, members_of, rank_group

Answers = list[str | None]

#: No test waits that long: it is what a rank would wait that nobody releases.
FOR_EVER_S = 1e6


class Time:
    """One rank's time: sleeping is what makes it pass."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def one_rank(store: Any, rank: int, count: int = 3, name: str = "test", time: Time | None = None) -> Consensus:
    extra: dict[str, Any] = {} if time is None else {"clock": time.clock, "sleep": time.sleep}
    return Consensus(RankGroup(rank, tuple(range(count)), name), lambda: store, **extra)


def all_ranks(store: Any, count: int = 3, name: str = "test") -> list[Consensus]:
    return [one_rank(store, rank, count, name) for rank in range(count)]


def together(calls: Sequence[Callable[[], str | None]]) -> list[str | None]:
    """The answers of ranks that bring their words at the same time."""
    answers: list[str | None] = [None] * len(calls)

    def call(number: int) -> None:
        answers[number] = calls[number]()

    threads = [threading.Thread(target=call, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank waits for ever"
    return answers


def bring(ranks: list[Consensus], stage: str, *obstacles: str | None, timeout_s: float = FOR_EVER_S) -> Answers:
    def word(rank: Consensus, obstacle: str | None) -> Callable[[], str | None]:
        return lambda: rank.decide(stage, obstacle, timeout_s)

    return together([word(rank, obstacle) for rank, obstacle in zip(ranks, obstacles, strict=True)])


def test_when_all_say_yes_all_hear_yes() -> None:
    assert bring(all_ranks(HashStore()), "fork", None, None, None) == [None, None, None]


@pytest.mark.parametrize("who", [0, 1, 2])
def test_when_one_says_no_all_hear_who_and_why_and_nobody_waits(who: int) -> None:
    reasons = ["no seed for it" if rank == who else None for rank in range(3)]
    assert bring(all_ranks(HashStore()), "fork", *reasons) == [f"rank {who}: no seed for it"] * 3


def test_when_several_say_no_all_hear_the_same_one() -> None:
    (answer,) = set(bring(all_ranks(HashStore()), "fork", "a", "b", "c"))
    assert answer in {"rank 0: a", "rank 1: b", "rank 2: c"}


def test_instances_that_start_together_never_hold_the_seeds_that_others_wait_for() -> None:
    """Six instances of four ranks, a seed with two slots for each rank: in any order some would wait for ever."""
    instances, count = 6, 4
    seeds = [threading.BoundedSemaphore(2) for _ in range(count)]
    ready, order = threading.Barrier(instances * count), random.Random(7)

    def start(rank: Consensus) -> str:
        ready.wait(30)
        threading.Event().wait(order.random() / 50)
        if problem := rank.await_turn("seed", FOR_EVER_S):
            return problem
        if not seeds[rank.group.rank].acquire(timeout=20):
            return rank.decide("seed", "no seed is free", FOR_EVER_S)
        rank.end_turn("seed")
        problem = rank.decide("seed", None, FOR_EVER_S)
        seeds[rank.group.rank].release()
        return problem

    ranks = [rank for number in range(instances) for rank in all_ranks(HashStore(), count, f"instance {number}")]
    assert together([lambda rank=rank: start(rank) for rank in ranks]) == [None] * len(ranks)


def test_a_turn_comes_when_the_instance_has_said_no_and_is_not_waited_for_without_bound() -> None:
    store, time = HashStore(), Time()
    first, second, third = (one_rank(store, rank, time=time) for rank in range(3))
    assert first.await_turn("seed", 10.0) is None
    assert second.await_turn("seed", 10.0) == "rank 0: not ready within 10 s, as rank 1 saw it"
    assert 10.0 <= time.now_s < 10.2
    first.end_turn("seed")
    assert second.await_turn("seed", 10.0) is None
    assert third.await_turn("seed", 10.0).startswith("rank 1: not ready")
    assert first.decide("seed", "no seed for it", 10.0) == "rank 0: no seed for it"
    assert third.await_turn("seed", 10.0) is None, "it states its intent and says no"
    assert Consensus(RankGroup(0, (0,), ""), lambda: pytest.fail("nobody is asked")).await_turn("seed", 10.0) is None


def test_a_late_rank_is_waited_for_until_the_bound_and_then_takes_what_was_decided() -> None:
    store, time = HashStore(), Time()
    early = one_rank(store, 0, count=2, time=time)
    assert early.decide("fork", None, 30.0) == "rank 1: no vote within 30 s, as rank 0 saw it"
    assert 30.0 <= time.now_s < 30.2
    late = one_rank(store, 1, count=2)
    assert late.decide("fork", None, FOR_EVER_S) == "rank 1: no vote within 30 s, as rank 0 saw it"


@pytest.mark.parametrize("dead", [0, 1, 2, 3])
def test_a_dead_rank_costs_the_others_one_bound_whichever_it_is(dead: int) -> None:
    store, times = HashStore(), [Time() for _ in range(4)]
    alive = [one_rank(store, rank, 4, time=times[rank]) for rank in range(4) if rank != dead]
    answers = bring(alive, "fork", None, None, None, timeout_s=10.0)
    (answer,) = set(answers)
    assert answer.startswith(f"rank {dead}: no vote") or "ranks" in answer
    assert max(time.now_s for time in times) < 10.2


def test_a_rank_that_gives_up_just_before_the_last_yes_makes_it_a_no_for_all() -> None:
    """The last yes is counted, and before it is written somebody's bound is over."""
    store = HashStore()
    waits, last_yes_counted = threading.Event(), threading.Event()

    class UntilTheLastYes(Time):
        def sleep(self, seconds: float) -> None:
            waits.set()
            assert last_yes_counted.wait(30)
            self.now_s += 30.0

    class Slow:
        """Rank 1's way to the store."""

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def compare_set(self, key: str, expected: str, desired: str) -> bytes:
            assert desired == "yes"
            last_yes_counted.set()
            impatient.join(30)
            return store.compare_set(key, expected, desired)

    heard: list[str] = []
    rank_0 = one_rank(store, 0, count=2, time=UntilTheLastYes())
    impatient = threading.Thread(target=lambda: heard.append(rank_0.decide("fork", None, 30.0)), daemon=True)
    impatient.start()
    assert waits.wait(30)
    heard.append(one_rank(Slow(), 1, count=2).decide("fork", None, FOR_EVER_S))
    assert heard == ["rank 0: it waited 30 s for the others"] * 2


def test_no_two_ranks_hear_different_answers_whatever_the_order() -> None:
    """Bounds so short that giving up and agreeing meet each other; both come out, and never mixed."""
    chance, seen = random.Random(1), set()
    for number in range(150):
        ranks = all_ranks(HashStore(), name=f"round {number}")
        bounds_s = [chance.choice([0.0, 0.0, 0.001, 0.01]) for _ in ranks]
        calls = [lambda r=r, b=b: r.decide("fork", None, b) for r, b in zip(ranks, bounds_s, strict=True)]
        answers = set(together(calls))
        assert len(answers) == 1, answers
        seen.add("yes" if answers == {None} else "no")
    assert seen == {"yes", "no"}, "the test is about both"


def test_stages_loads_and_roles_do_not_meet() -> None:
    store = PrefixStore("default_pg", HashStore())
    first = all_ranks(store)
    assert set(bring(first, "ready", None, None, None)) == {None}
    draft = all_ranks(store, name="draft")
    assert set(bring(draft, "ready", None, "no draft", None)) == {"rank 1: no draft"}
    assert set(bring(first, "forked", None, None, "broken off")) == {"rank 2: broken off"}
    assert set(bring(first, "forked", None, None, None)) == {None}, "the same stage again is another question"
    assert set(bring(draft, "forked", None, None, None)) == {None}
    second = all_ranks(store)
    assert set(bring(second, "ready", "x", "x", "x")) <= {f"rank {rank}: x" for rank in range(3)}
    assert set(bring(second, "forked", None, None, None)) == {None}, "a second load has decisions of its own"


def test_a_reason_is_passed_on_up_to_a_bound() -> None:
    (answer,) = set(bring(all_ranks(HashStore()), "fork", None, "ü" * 10_000, None))
    assert answer.startswith("rank 1: üü")
    assert MAX_OBSTACLE_LENGTH <= len(answer) < MAX_OBSTACLE_LENGTH + 20


def test_one_rank_needs_no_store_and_making_a_consensus_touches_none() -> None:
    def connect() -> Any:
        pytest.fail("a store was asked for")

    alone = Consensus(RankGroup(0, (0,), "test"), connect)
    assert alone.decide("fork", None, 1.0) is None
    assert alone.decide("fork", "no seed", 1.0) == "no seed"
    Consensus(RankGroup(0, (0, 1), "test"), connect)
    config = SimpleNamespace(parallel_config=None, speculative_config=None)
    assert Consensus(rank_group(config, object())).decide("fork", None, 1.0) is None, "where torch has no process group"


def test_a_store_that_fails_is_a_no_that_says_so_and_is_not_asked_again() -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("Connection reset by peer")

    rank = one_rank(Broken(), 1)
    assert rank.decide("fork", None, FOR_EVER_S) == "rank 1: the store of the ranks failed: Connection reset by peer"
    assert "Connection reset" in rank.decide("forked", None, FOR_EVER_S)


def test_a_store_that_hangs_is_a_no_after_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = threading.Event()

    class Hanging:
        def add(self, key: str, amount: int) -> int:
            hanging.wait(60)
            return 1

    monkeypatch.setattr(consensus, "STORE_GRACE_S", 0.05)
    (answer,) = together([lambda: one_rank(Hanging(), 2).decide("fork", None, 0.05)])
    hanging.set()
    assert answer.startswith("rank 2: the store of the ranks did not answer")


# --- who belongs together -------------------------------------------------------------------------------------------


def parallel(tp: int = 1, pp: int = 1, dp: int = 1, pcp: int = 1) -> Any:
    return SimpleNamespace(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        data_parallel_size=dp,
        prefill_context_parallel_size=pcp,
    )


@pytest.mark.parametrize(
    ("sizes", "world_size", "rank", "target", "draft"),
    [
        ({}, 1, 0, [0], [0]),
        ({"tp": 4}, 4, 2, [0, 1, 2, 3], [0, 1, 2, 3]),
        # A draft is loaded at the last stage: the others must not be waited for.
        ({"tp": 2, "pp": 2}, 4, 3, [0, 1, 2, 3], [2, 3]),
        ({"tp": 2, "pp": 2, "pcp": 2}, 8, 6, [0, 1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7]),
        # An MoE model's data parallel ranks are one group ...
        ({"tp": 2, "dp": 2}, 4, 0, [0, 1, 2, 3], [0, 1, 2, 3]),
        ({"tp": 1, "pp": 2, "dp": 2}, 4, 3, [0, 1, 2, 3], [1, 3]),
        # ... with elastic expert parallelism each replica has one of its own.
        ({"tp": 2, "dp": 4}, 2, 1, [0, 1], [0, 1]),
        # Replicas of an external launcher share a group and nothing else.
        ({"tp": 2}, 6, 3, [2, 3], [2, 3]),
        ({"tp": 2, "dp": 2}, 8, 5, [4, 5, 6, 7], [4, 5, 6, 7]),
    ],
)
def test_the_ranks_that_load_a_model_together(
    sizes: dict[str, int], world_size: int, rank: int, target: list[int], draft: list[int]
) -> None:
    assert list(members_of(parallel(**sizes), rank, world_size, draft=False)) == target
    assert list(members_of(parallel(**sizes), rank, world_size, draft=True)) == draft


#: Three ranks as forks of one process: the imports take longer than all that they do.
_RANKS = """
import os, sys
from types import SimpleNamespace
import torch.distributed as dist
from vllm_rfork.load.consensus import Consensus
from vllm_rfork.vllm_compat.rank_groups import rank_group

children = []
for rank in range(3):
    children.append(os.fork())
    if not children[-1]:
        break
else:
    for child in children:
        os.waitpid(child, 0)
    os._exit(0)

def say(*words):  # in one write, since the ranks share the pipe
    os.write(1, f"{rank} {' '.join(words)}\\n".encode())

port = sys.argv[1]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
parallel = SimpleNamespace(tensor_parallel_size=3, pipeline_parallel_size=1, data_parallel_size=1)
draft_config = object()
config = SimpleNamespace(
    parallel_config=parallel, speculative_config=SimpleNamespace(draft_model_config=draft_config)
)
target, draft = Consensus(rank_group(config, object())), Consensus(rank_group(config, draft_config))
say(repr(target.decide("fork", None, 60)), repr(draft.decide("fork", None if rank else "no draft", 60)))
if rank == 2:
    os._exit(0)  # dead, without a word
say(repr(draft.decide("forked", None, 0.5)))
# Rank 0 holds the store: it stays until the other has read its answer.
if rank == 0:
    dist.distributed_c10d._get_default_store().wait(["done"])
else:
    dist.distributed_c10d._get_default_store().set("done", "1")
os._exit(0)
"""


def test_processes_agree_over_the_store_of_their_process_group() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _RANKS, str(free_port())],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as ranks:
        try:
            lines = [line.split(" ", 1) for line in ranks.communicate(timeout=240)[0].splitlines()]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ranks.pid, signal.SIGKILL)
    said = [[text for rank, text in lines if rank == str(number)] for number in range(3)]
    assert [lines[0] for lines in said] == ["None 'rank 0: no draft'"] * 3
    assert said[0][1] == said[1][1]
    assert "rank 2: no vote within 0.5 s" in said[0][1] or "ranks" in said[0][1]


# --- a rank that waits for something hears of a no before it brings its own word -------------------------------------


def test_a_rank_that_has_not_come_yet_can_see_that_the_answer_is_no() -> None:
    store = HashStore()
    first, waiting = one_rank(store, 0, count=2), one_rank(store, 1, count=2)
    assert waiting.rejection("seed") is None
    first.decide("seed", "no seed for it", FOR_EVER_S)
    assert waiting.rejection("seed") == "rank 0: no seed for it"
    assert waiting.rejection("fork") is None, "another stage"
    assert waiting.decide("seed", None, FOR_EVER_S) == "rank 0: no seed for it"
    assert waiting.rejection("seed") is None, "the stage's next agreement"


def test_a_yes_and_a_rank_alone_are_no_refusal() -> None:
    store = HashStore()
    ranks = all_ranks(store, count=2)
    bring(ranks, "seed", None, None)
    late = one_rank(store, 1, count=2)
    assert late.rejection("seed") is None
    assert one_rank(store, 0, count=1).rejection("seed") is None


def test_a_store_that_does_not_answer_is_a_refusal_within_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consensus, "STORE_GRACE_S", 0.2)
    release = threading.Event()

    class Hangs(HashStore):  # type: ignore[misc]
        def check(self, keys: list[str]) -> bool:
            release.wait(60)
            return False

    rank = one_rank(Hangs(), 0, count=2)
    try:
        assert "did not answer" in rank.rejection("seed")
        assert "did not answer" in rank.decide("seed", None, FOR_EVER_S)
    finally:
        release.set()
