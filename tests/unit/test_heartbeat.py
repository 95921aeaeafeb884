"""A seed stays announced through everything, and nothing announces it after it was withdrawn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.unit.interop_planners import load_mock_planner, serve
from tests.unit.virtual_time import VirtualTime, until
from vllm_rfork.clients import Attendance, Attended, Outcome, PlannerClient
from vllm_rfork.errors import PlannerError
from vllm_rfork.heartbeat import Heartbeat
from vllm_rfork.messages import SeedAddress
from vllm_rfork.messages.metering import Served

KEY = "/models/q$prod$kv_both$0$0"
SEED = SeedAddress("10.0.0.1", 8080, 0)
INTERVAL_S = 30.0


class FakePlanner(PlannerClient):
    """Keeps what reaches the planner, and refuses while ``problem`` is set."""

    def __init__(self) -> None:
        super().__init__("http://unused")
        self.problem = ""
        self.mistake: Exception | None = None
        self.calls: list[str] = []
        self.announced_with: dict[str, Any] = {}
        self.gate: asyncio.Event | None = None
        #: presence requests: how many are open, and how many there were; each is held for ever unless answered
        self.attending = 0
        self.attended = 0
        self.answers: list[Attended] = []
        self.open_at_withdrawal: list[int] = []

    async def attend(self, seed_key: str, seed: SeedAddress, **extra: Any) -> Attended:
        assert (seed_key, seed, extra["epoch"]) == (KEY, SEED, "e1")
        self.attended += 1
        self.attending += 1
        try:
            if not self.answers:
                await asyncio.Event().wait()
            return self.answers.pop(0)
        finally:
            self.attending -= 1

    async def announce(self, seed_key: str, seed: SeedAddress, **extra: Any) -> Served | None:
        self.announced_with = {"seed_key": seed_key, "seed": seed, **extra}
        if self.gate is not None:
            await self.gate.wait()
        self.calls.append("announce")
        if self.mistake is not None:
            raise self.mistake
        if self.problem:
            raise PlannerError(self.problem)
        return None

    async def withdraw(self, seed_key: str, seed: SeedAddress) -> Outcome:
        assert (seed_key, seed) == (KEY, SEED)
        self.calls.append("withdraw")
        self.open_at_withdrawal.append(self.attending)
        if self.problem:
            raise PlannerError(self.problem)
        return Outcome.DONE


def heartbeat(planner: PlannerClient, virtual: VirtualTime, **extra: Any) -> Heartbeat:
    extra = {"jitter": lambda: 1.0, **extra}
    return Heartbeat(
        planner,
        KEY,
        SEED,
        interval_s=INTERVAL_S,
        fingerprint="f",
        epoch="e1",
        clock=virtual.clock,
        sleep=virtual.sleep,
        **extra,
    )


@contextlib.asynccontextmanager
async def running(beat: Heartbeat, virtual: VirtualTime) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(beat.run())
    await virtual.settle()
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_it_announces_at_once_and_then_once_an_interval() -> None:
    planner, virtual = FakePlanner(), VirtualTime()
    caches = [""]  # a start's results are known after the first announcement
    origin = {"parent": "10.0.0.2:5000:0", "differs": lambda: "dtype" if caches[-1] else ""}
    beat = heartbeat(planner, virtual, slots=4, labels="host=a", intent="i1", caches=lambda: caches[-1], **origin)
    async with running(beat, virtual):
        assert planner.calls == ["announce"]
        assert planner.announced_with["caches"] == ""
        assert beat.announced
        caches.append("triton=hit;saved=2")
        await virtual.advance(10 * INTERVAL_S)
        assert planner.calls == ["announce"] * 11
    assert planner.announced_with == {
        "seed_key": KEY,
        "seed": SEED,
        "fingerprint": "f",
        "slots": 4,
        "labels": "host=a",
        "epoch": "e1",
        "intent": "i1",
        "caches": "triton=hit;saved=2",
        "parent": "10.0.0.2:5000:0",
        "differs": "dtype",
    }


async def test_what_the_seed_has_served_is_counted_once() -> None:
    """A planner that restarts without its state begins at 0 again."""
    totals = [None, Served(2, 20), Served(2, 20), Served(5, 50), None, Served(1, 10), Served(0, 0)]

    class Reporting(FakePlanner):
        async def announce(self, seed_key: str, seed: SeedAddress, **extra: Any) -> Served | None:
            await super().announce(seed_key, seed, **extra)
            return totals.pop(0) if totals else None

    counted: list[tuple[int, int]] = []
    virtual = VirtualTime()
    async with running(
        heartbeat(Reporting(), virtual, served=lambda forks, nbytes: counted.append((forks, nbytes))), virtual
    ):
        await virtual.advance(10 * INTERVAL_S)
    assert totals == []
    assert counted == [(2, 20), (3, 30), (1, 10)]


@pytest.mark.parametrize("jitter", [0.0, 0.5, 1.0])
async def test_the_jitter_stays_inside_the_interval(jitter: float) -> None:
    planner, virtual = FakePlanner(), VirtualTime()
    async with running(heartbeat(planner, virtual, jitter=lambda: jitter), virtual):
        await virtual.advance(20 * INTERVAL_S)
    assert all(INTERVAL_S / 2 < delay_s <= INTERVAL_S for delay_s in virtual.asked_s)
    assert 21 <= planner.calls.count("announce") <= 30


async def test_a_slow_planner_does_not_stretch_the_interval() -> None:
    planner, virtual = FakePlanner(), VirtualTime()

    class Slow(FakePlanner):
        async def announce(self, seed_key: str, seed: SeedAddress, **extra: Any) -> None:
            virtual.now_s += 9.0
            await super().announce(seed_key, seed, **extra)

    planner = Slow()
    async with running(heartbeat(planner, virtual), virtual):
        await virtual.advance(INTERVAL_S)
    assert virtual.asked_s[0] == INTERVAL_S - 9.0


async def test_an_outage_costs_one_warning_and_one_line_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="vllm_rfork.heartbeat")
    planner, virtual = FakePlanner(), VirtualTime()
    beat = heartbeat(planner, virtual)
    async with running(beat, virtual):
        planner.problem = "connection refused by the planner's host"
        await virtual.advance(20 * INTERVAL_S)
        assert not beat.announced
        missed = planner.calls.count("announce") - 1
        assert missed >= 20
        planner.problem = ""
        await virtual.advance(2 * INTERVAL_S)
        assert beat.announced
        warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert len(warnings) == 1
        assert "connection refused by the planner's host" in warnings[0]
        recovered = [r.getMessage() for r in caplog.records if "again" in r.getMessage() and r.levelno == logging.INFO]
        assert len(recovered) == 1
        assert str(missed) in recovered[0]
        # The next outage is news again.
        planner.problem = "503"
        await virtual.advance(5 * INTERVAL_S)
        assert sum(r.levelno >= logging.WARNING for r in caplog.records) == 2
        planner.problem = ""


async def test_after_a_missed_beat_the_next_comes_before_the_planner_forgets() -> None:
    planner, virtual = FakePlanner(), VirtualTime()
    async with running(heartbeat(planner, virtual), virtual):
        planner.problem = "away"
        await virtual.advance(INTERVAL_S)
        planner.problem = ""
        await virtual.advance(INTERVAL_S / 2)
        assert planner.calls[-3:] == ["announce"] * 3  # first, missed, made up for
        assert len(planner.calls) == 3


async def test_it_withdraws_however_it_ends() -> None:
    planner, virtual = FakePlanner(), VirtualTime()
    async with running(heartbeat(planner, virtual), virtual):
        pass
    assert planner.calls == ["announce", "withdraw"]


async def test_an_error_that_is_no_planners_ends_it_and_withdraws_too() -> None:
    planner, virtual = FakePlanner(), VirtualTime()
    async with running(heartbeat(planner, virtual), virtual) as task:
        planner.mistake = RuntimeError("a mistake in this package")
        await virtual.advance(INTERVAL_S)
        with pytest.raises(RuntimeError, match="a mistake"):
            await task
    assert planner.calls == ["announce", "announce", "withdraw"]


async def test_presence_follows_the_first_announcement_and_ends_after_the_withdrawal() -> None:
    planner, virtual = FakePlanner(), VirtualTime()
    planner.problem = "away"
    async with running(heartbeat(planner, virtual), virtual):
        assert planner.attended == 0, "nothing to be present for"
        planner.problem = ""
        await virtual.advance(INTERVAL_S / 2)
        assert (planner.attended, planner.attending) == (1, 1)
        await virtual.advance(10 * INTERVAL_S)
        assert planner.attended == 1, "it is held"
    # A connection that broke before the withdrawal would look like a process that died.
    assert planner.open_at_withdrawal == [1]
    assert planner.attending == 0
    assert len(asyncio.all_tasks()) == 1


async def test_presence_ends_where_the_withdrawal_fails_too() -> None:
    planner, virtual = FakePlanner(), VirtualTime()
    beat = heartbeat(planner, virtual)
    async with running(beat, virtual):
        planner.problem = "away"
        with pytest.raises(PlannerError):
            await beat.withdraw()
        assert planner.attending == 0
        planner.problem = ""


async def test_a_cancellation_that_is_lost_holds_no_withdrawal_up() -> None:
    """``asyncio.wait_for`` of Python 3.11 returns a result that comes in the same moment, and nobody was cancelled."""

    class Answering(FakePlanner):
        async def attend(self, seed_key: str, seed: SeedAddress, **extra: Any) -> Attended:
            try:
                return await super().attend(seed_key, seed, **extra)
            except asyncio.CancelledError:
                return Attended(Attendance.NO_SUCH_CALL)

    planner, virtual = Answering(), VirtualTime()
    beat = heartbeat(planner, virtual)
    async with running(beat, virtual):
        assert planner.attending == 1
        assert await asyncio.wait_for(beat.withdraw(), 10) is Outcome.DONE
    assert len(asyncio.all_tasks()) == 1


async def test_what_is_known_later_is_announced_at_once_if_asked() -> None:
    planner, virtual = FakePlanner(), VirtualTime()
    caches = [""]
    beat = heartbeat(planner, virtual, caches=lambda: caches[-1])
    async with running(beat, virtual):
        caches.append("triton=hit")
        beat.soon()
        await virtual.settle()
        assert planner.calls == ["announce", "announce"], "without any time passing"
        assert planner.announced_with["caches"] == "triton=hit"


async def test_a_planner_that_does_not_know_the_seed_is_told_at_once() -> None:
    planner, virtual = FakePlanner(), VirtualTime()
    planner.answers = [Attended(Attendance.NOT_KNOWN)]
    async with running(heartbeat(planner, virtual), virtual):
        await virtual.settle()
        assert planner.calls == ["announce", "announce"], "without any time passing"
        await virtual.advance(1.0)
        assert (planner.attended, planner.attending) == (2, 1)


async def test_a_planner_without_the_call_is_asked_once_and_again_when_it_was_away() -> None:
    planner, virtual = FakePlanner(), VirtualTime()
    planner.answers = [Attended(Attendance.NO_SUCH_CALL)]
    async with running(heartbeat(planner, virtual), virtual):
        await virtual.advance(10 * INTERVAL_S)
        assert planner.attended == 1
        planner.problem = "away"
        await virtual.advance(INTERVAL_S)
        planner.problem = ""
        await virtual.advance(INTERVAL_S)
        assert (planner.attended, planner.attending) == (2, 1), "it may be another planner now"


async def test_withdraw_ends_the_run_and_no_beat_follows() -> None:
    planner, virtual = FakePlanner(), VirtualTime()
    beat = heartbeat(planner, virtual)
    async with running(beat, virtual) as task:
        assert await beat.withdraw() is Outcome.DONE
        await asyncio.wait_for(task, 30)  # without any time passing
        await virtual.advance(10 * INTERVAL_S)
        assert await beat.withdraw() is Outcome.DONE
    assert planner.calls == ["announce", "withdraw"]
    assert not beat.announced
    assert virtual.asleep == 0


async def test_a_beat_under_way_cannot_arrive_after_the_withdrawal() -> None:
    planner, virtual = FakePlanner(), VirtualTime()
    planner.gate = asyncio.Event()
    beat = heartbeat(planner, virtual)
    async with running(beat, virtual):
        withdrawing = asyncio.create_task(beat.withdraw())
        await virtual.settle()
        assert planner.calls == []
        planner.gate.set()
        await withdrawing
        await virtual.advance(10 * INTERVAL_S)
    assert planner.calls == ["announce", "withdraw"]


async def test_a_beat_that_hangs_holds_no_withdrawal_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_rfork.heartbeat._PATIENCE_S", 0.01)
    planner, virtual = FakePlanner(), VirtualTime()
    planner.gate = asyncio.Event()  # nobody opens it
    beat = heartbeat(planner, virtual)
    async with running(beat, virtual) as task:
        assert await asyncio.wait_for(beat.withdraw(), 30) is Outcome.DONE
        await asyncio.wait_for(task, 30)
    assert planner.calls == ["withdraw"]
    assert len(asyncio.all_tasks()) == 1


async def test_cancelled_in_the_middle_of_a_beat_it_still_withdraws_after_it() -> None:
    planner, virtual = FakePlanner(), VirtualTime()
    planner.gate = asyncio.Event()
    async with running(heartbeat(planner, virtual), virtual) as task:
        task.cancel()
        await virtual.settle()
        assert planner.calls == []
        planner.gate.set()
        await asyncio.wait({task})
    assert planner.calls == ["announce", "withdraw"]


async def test_an_error_that_no_planner_explains_ends_the_run() -> None:
    class Broken(FakePlanner):
        async def announce(self, seed_key: str, seed: SeedAddress, **extra: Any) -> None:
            raise ZeroDivisionError

    planner, virtual = Broken(), VirtualTime()
    with pytest.raises(ZeroDivisionError):
        await heartbeat(planner, virtual).run()
    assert planner.calls == ["withdraw"]


async def test_a_withdrawal_that_fails_is_told_tried_again_and_followed_by_no_beat(
    caplog: pytest.LogCaptureFixture,
) -> None:
    planner, virtual = FakePlanner(), VirtualTime()
    beat = heartbeat(planner, virtual)
    async with running(beat, virtual) as task:
        planner.problem = "away for now"
        with pytest.raises(PlannerError, match="away for now"):
            await beat.withdraw()
        await asyncio.wait_for(task, 30)  # its own attempt fails too and is only logged
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        planner.problem = ""
        assert await beat.withdraw() is Outcome.DONE
        await virtual.advance(10 * INTERVAL_S)
    assert planner.calls == ["announce", "withdraw", "withdraw", "withdraw"]


async def test_a_planner_that_restarted_without_its_state_knows_the_seed_again() -> None:
    mock, virtual = load_mock_planner(), VirtualTime()
    planner = mock.Planner()
    async with serve(mock.make_app(planner)) as url:
        beat = heartbeat(PlannerClient(url), virtual)
        task = asyncio.create_task(beat.run())
        await until(lambda: virtual.asleep, "the first beat is over")
        assert [seed.key for seed in planner.seeds.values()] == [KEY]
        planner.seeds.clear()
        advancing = asyncio.create_task(virtual.advance(INTERVAL_S))
        await until(lambda: planner.seeds, "the seed is known again")
        await advancing
        task.cancel()
        await asyncio.wait({task})
        assert planner.seeds == {}
