"""The slots of a process's seeds: their table, and changes and captures of graphs that meet a start."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vllm_rfork.errors import ForkError
from vllm_rfork.seeding import manager as managers
from vllm_rfork.seeding.manager import SeedManager
from vllm_rfork.seeding.publication import Publication
from vllm_rfork.seeding.slot import TRANSITIONS, Slot, SlotEvent, SlotState

REASON = "weights are updated"
STARTING, SERVING, SUSPENDED, GONE = SlotState


class Tensors:
    """Tensors that :attr:`find` finds again, or does not."""

    manifest: Any = None

    def __init__(self, *, recoverable: bool = True) -> None:
        self.keep: object | None = object()
        self.recoverable = recoverable
        self.find: Callable[[], object] = object

    def recheck(self) -> None:
        pass

    def relocate(self) -> Tensors:
        self.find()
        return Tensors(recoverable=self.recoverable)

    def release(self) -> None:
        self.keep = None


class Process:
    """A manager whose seeds do nothing but wait for :attr:`go` and then fail with :attr:`error`, if there is one."""

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self.given_up: list[str] = []
        self.withdrawn: list[str] = []
        self.error: Exception | None = None
        self.go = threading.Event()
        self.go.set()
        process = self

        class Manager(SeedManager):
            @staticmethod
            def _make(publication: Publication, start: Any) -> Any:
                process.begun.append(start)
                return SimpleNamespace(start=lambda: process.start(start), withdraw=process.withdrawn.append)

        self.manager = Manager()

    def start(self, start: Any) -> str:
        self.go.wait(60)
        if self.error is not None:
            raise self.error
        if start.generation != self.manager.generation:
            raise ForkError("withdrawn before it was ready")
        return "10.0.0.1:5000"

    def publication(self, *, captures_graphs: bool = True, recoverable: bool = True, timeout_s: float = 30.0) -> Any:
        return Publication(
            role="target",
            config=cast("Any", SimpleNamespace(ready_timeout_s=timeout_s, request_timeout_s=0.0)),
            tensors=Tensors(recoverable=recoverable),
            engines=cast("Any", SimpleNamespace(close=lambda: self.given_up.append("engine"))),
            intent=cast(
                "Any",
                SimpleNamespace(
                    stop_renewing=lambda: None,
                    withdraw=lambda: self.given_up.append("intent"),
                    id="",
                ),
            ),
            checkpoint=lambda: None,
            set_device=lambda: None,
            captures_graphs=captures_graphs,
        )

    def publish(self, **options: Any) -> Slot:
        self.manager.publish(self.publication(**options))
        slot = self.manager.slots[-1]
        if self.go.is_set():
            self.settle(slot)
        return slot

    def settle(self, slot: Slot) -> None:
        assert slot.thread is not None
        slot.thread.join(60)
        assert not slot.thread.is_alive()

    def change(self) -> None:
        """Begin a change that a return may follow."""
        self.manager.withdraw(REASON, last=False)


@pytest.fixture
def process() -> Iterator[Process]:
    one = Process()
    slots = one.manager.slots
    yield one
    one.go.set()
    for slot in (*slots, *one.manager.slots):
        if slot.thread is not None:
            slot.thread.join(60)


@pytest.mark.parametrize("state", SlotState)
@pytest.mark.parametrize("event", SlotEvent)
def test_each_event_leads_where_the_table_says_and_no_other_is_possible(state: SlotState, event: SlotEvent) -> None:
    slot = Slot(Process().publication(), state=state, seed=cast("Any", object()))
    after = TRANSITIONS.get((state, event))
    if after is None:
        with pytest.raises(ValueError, match=f"{state.value} cannot be {event.value}"):
            slot.move(event)
        assert slot.state is state
        return
    slot.move(event)
    assert slot.state is after
    assert (slot.publication is None) is (after is GONE), "a slot that is gone keeps no memory"
    if after in (SUSPENDED, GONE):
        assert slot.seed is None


def test_gone_is_final_and_every_other_state_leads_there() -> None:
    assert {before for (before, _), after in TRANSITIONS.items() if after is GONE} == {STARTING, SERVING, SUSPENDED}
    assert not [before for before, _ in TRANSITIONS if before is GONE]
    assert {before for (before, _), after in TRANSITIONS.items() if after is SERVING} == {STARTING}


def test_the_state_of_the_seeds_is_reported(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[str] = []
    monkeypatch.setattr(managers.metrics, "seed_state", states.append)

    def reported() -> list[str]:
        found = [state for state, _ in itertools.groupby(states)]
        states.clear()
        return found

    slot = process.publish()
    assert reported() == ["none", "starting", "serving"]
    process.publish()
    assert reported() == ["serving"], "a draft model beside it"
    process.change()
    assert reported() == ["serving", "suspended"]
    process.manager.resume()
    process.settle(slot)
    process.settle(process.manager.slots[1])
    assert reported()[-1] == "serving"
    process.manager.withdraw("the worker shuts down", last=True)
    assert reported()[-1] == "none"


def test_a_seed_serves_is_suspended_and_serves_again(process: Process) -> None:
    slot = process.publish()
    assert slot.state is SERVING
    assert process.manager.seeds() == [slot.seed]
    assert process.begun[0].tensors.keep is None, "the seed alone keeps the memory"
    process.change()
    assert slot.state is SUSPENDED
    assert process.withdrawn == [REASON]
    assert process.manager.seeds() == []
    process.manager.resume()
    process.settle(slot)
    assert slot.state is SERVING
    process.manager.withdraw("the worker shuts down", last=True)
    assert process.manager.slots == ()
    assert slot.state is GONE


def test_a_change_that_begins_while_a_seed_comes_back_keeps_it_away(process: Process) -> None:
    """It did not find that seed to withdraw it, so the seed must see for itself that its time is over."""
    slot = process.publish()
    process.change()
    tensors = slot.publication.tensors  # type: ignore[union-attr]
    tensors.find = process.change
    process.manager.resume()
    assert len(process.begun) == 1, "a seed came in the middle of a change"
    assert slot.state is SUSPENDED

    tensors.find = object
    process.manager.resume()
    process.settle(slot)
    assert len(process.begun) == 2, "no seed came after it"
    assert slot.state is SERVING


@pytest.mark.parametrize("finding", ["found", "not found"])
def test_a_worker_that_is_over_remembers_no_seed(process: Process, finding: str) -> None:
    slot = process.publish()
    process.change()

    def again() -> None:
        process.manager.withdraw("the worker shuts down", last=True)
        if finding == "not found":
            raise ForkError("tensors are gone")

    slot.publication.tensors.find = again  # type: ignore[union-attr]
    process.manager.resume()
    assert process.manager.slots == ()
    assert len(process.begun) == 1


@pytest.mark.parametrize("last", [False, True])
def test_a_change_between_capturing_and_starting_keeps_the_seed_away(process: Process, last: bool) -> None:
    captured = process.manager.generation
    publication = process.publication()
    process.manager.withdraw(REASON, last=last)
    process.manager.publish(publication, captured)
    assert process.begun == []
    assert [slot.state for slot in process.manager.slots] == ([] if last else [SUSPENDED])
    assert process.given_up == ["engine", "intent"], "its engine and its promise to the planner are given back"
    assert publication.tensors.keep is None


def test_a_start_that_fails_is_final_and_gives_back_what_it_has(process: Process) -> None:
    process.error = ForkError("no port is free")
    process.manager.publish(process.publication())
    for slot in process.manager.slots:
        process.settle(slot)
    assert process.manager.slots == ()
    assert process.given_up == ["engine", "intent"]


@pytest.mark.parametrize(("recoverable", "after"), [(True, SUSPENDED), (False, GONE)])
def test_a_return_that_fails_waits_for_the_next_change_unless_memory_would_be_kept(
    process: Process, recoverable: bool, after: SlotState
) -> None:
    slot = process.publish(recoverable=recoverable)
    process.change()
    process.error = ForkError("other bytes")
    process.manager.resume()
    process.settle(slot)
    assert slot.state is after


@pytest.mark.parametrize(("recoverable", "after"), [(True, SUSPENDED), (False, GONE)])
def test_tensors_that_are_not_found_are_looked_for_after_the_next_change_unless_memory_would_be_kept(
    process: Process, recoverable: bool, after: SlotState
) -> None:
    slot = process.publish(recoverable=recoverable)
    process.change()

    def not_there() -> None:
        raise ForkError("a tensor is gone")

    slot.publication.tensors.find = not_there  # type: ignore[union-attr]
    process.manager.resume()
    assert slot.state is after


def test_a_return_does_not_follow_a_start_that_hangs(process: Process) -> None:
    """Both would use the worker's one engine."""
    process.go.clear()
    slot = process.publish(timeout_s=0.1)
    process.change()
    hanging = slot.thread
    process.manager.resume()
    process.settle(slot)
    assert hanging is not None
    assert hanging.is_alive()
    assert slot.state is GONE
    assert len(process.begun) == 1


def test_graphs_wait_for_seeds_that_still_need_the_device(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = process.manager
    assert manager.device_is_idle(), "no seed is being started"

    process.go.clear()
    process.publish(captures_graphs=False)
    assert manager.device_is_idle(), "a processor captures nothing"

    process.publish()
    monkeypatch.setattr(managers, "LEAVES_DEVICE_WITHIN_S", 0.05)
    assert not manager.device_is_idle()

    monkeypatch.setattr(managers, "LEAVES_DEVICE_WITHIN_S", 20.0)
    threading.Timer(0.05, process.go.set).start()
    assert manager.device_is_idle(), "it has what it needs"


def test_a_second_change_does_not_begin_before_the_seed_is_withdrawn(process: Process) -> None:
    """It finds no seed that it could withdraw: the first change has taken it out of the slot."""
    slot = process.publish()
    may_end, withdrawing = threading.Event(), threading.Event()

    def withdraw(reason: str) -> None:
        withdrawing.set()
        may_end.wait(60)
        process.withdrawn.append(reason)

    cast("Any", slot.seed).withdraw = withdraw
    first = threading.Thread(target=process.change, daemon=True)
    second = threading.Thread(target=process.change, daemon=True)
    first.start()
    assert withdrawing.wait(60)
    second.start()
    second.join(0.1)
    assert second.is_alive(), "bytes may change, and receivers still get their addresses"
    may_end.set()
    for thread in (first, second):
        thread.join(60)
        assert not thread.is_alive()
    assert process.withdrawn == [REASON]


def test_a_process_without_threads_to_spare_can_still_change_its_weights(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No method of the listener may raise: it would fail the worker's own method."""
    slot = process.publish()
    process.change()

    class Refused(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(managers, "native_thread", lambda target, name, args: Refused(target=target, args=args))
    process.manager.resume()
    assert slot.state is GONE
    with pytest.raises(RuntimeError):
        process.manager.publish(process.publication())
    assert process.manager.slots == ()
    process.change()


def test_an_engine_is_not_handed_over_to_a_seed_that_is_never_made() -> None:
    """Whoever has been handed an engine closes it; nobody would close this one."""
    handed: list[str] = []

    def unreadable() -> None:
        raise RuntimeError("the storage is gone")

    process = Process()
    publication = dataclasses.replace(
        process.publication(),
        engines=cast("Any", SimpleNamespace(hand_over=lambda: handed.append("engine"))),
        checkpoint=unreadable,
    )
    start = SimpleNamespace(tensors=SimpleNamespace(manifest=None))
    with pytest.raises(RuntimeError, match="storage"):
        SeedManager._make(publication, cast("Any", start))
    assert handed == []
