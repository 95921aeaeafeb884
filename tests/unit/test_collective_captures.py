"""A seed of the collective engine while graphs are captured."""

from __future__ import annotations

import threading
import time

import pytest

from tests.recorded_groups import (
    SECRET,
    START,
    Backends,
    backend,
    connected,
    eventually,
    joined,
    read,
    seed,
    soon,
)
from vllm_rfork.engines import capture_gate
from vllm_rfork.engines.collective import messages, sender
from vllm_rfork.engines.collective.channel import Channel
from vllm_rfork.engines.collective.group import Group, GroupFailed
from vllm_rfork.engines.collective.messages import Join, Joined, Refusal, Sent
from vllm_rfork.engines.collective.plan import PART_PIECES
from vllm_rfork.engines.collective.sender import Sender

__all__ = ["backend", "seed"]  # fixtures


def test_while_graphs_are_captured_nothing_is_sent_and_the_receiver_is_told(seed: Sender, backend: Backends) -> None:
    opened = joined(seed)
    with capture_gate.gate.capturing() as idle:
        assert idle
        with pytest.raises(Refusal, match="captures") as caught:
            read(opened, (START, 10), timeout_s=0.1)
        assert caught.value.code == "busy"
        assert backend.sent == []
    read(opened, (START, 10))
    messages.receive(opened, Sent, soon())
    opened.close()


def test_a_seed_stops_while_a_receiver_waits_for_the_end_of_a_capture(seed: Sender, backend: Backends) -> None:
    opened = connected(seed)
    with capture_gate.gate.capturing():
        messages.send(opened, Join(messages.VERSION, "recorded", "", 30.0), soon())
        time.sleep(0.5)
        try:
            seed.stop(3.0)
        finally:
            opened.close()


class Slow(Backends):
    """A group that is not created before its deadline: the receiver was stopped after it had joined."""

    def create(self, rank: int, channel: Channel, deadline: float) -> Group:
        while time.monotonic() < deadline:
            time.sleep(0.01)
        raise GroupFailed("not created in time", late=True)


def test_a_receiver_that_stops_while_it_joins_does_not_hold_up_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sender._CREATE_S < capture_gate.CAPTURE_WAITS_S
    monkeypatch.setattr(sender, "_CREATE_S", 0.5)
    serving = Sender(Slow(), "127.0.0.1", SECRET, lambda at, n: True)
    opened = connected(serving)
    try:
        messages.send(opened, Join(messages.VERSION, "recorded", "", 60.0), soon())
        messages.receive(opened, Joined, soon())
        with capture_gate.gate.capturing(5.0) as idle:
            assert idle
    finally:
        opened.close()
        serving.stop(60.0)


def test_a_send_that_fails_while_a_capture_waits_lets_the_capture_begin(seed: Sender, backend: Backends) -> None:
    backend.held.set()
    opened = joined(seed)
    read(opened, (START, 10))
    result: list[bool] = []

    def capture() -> None:
        with capture_gate.gate.capturing() as idle:
            result.append(idle)

    thread = threading.Thread(target=capture)
    thread.start()
    time.sleep(0.3)
    opened.close()  # the send fails at once
    thread.join(20.0)
    assert result == [True]


def test_a_capture_goes_first_between_the_parts_of_a_batch(seed: Sender, backend: Backends) -> None:
    backend.held.set()
    opened = joined(seed)
    read(opened, *[(START, 1)] * (PART_PIECES + 1))
    assert backend.sending.acquire(timeout=20.0)
    before: list[int] = []

    def capture() -> None:
        with capture_gate.gate.capturing() as idle:
            before.append(len(backend.sent) if idle else -1)

    thread = threading.Thread(target=capture)
    thread.start()
    eventually(lambda: capture_gate.gate._capturing > 0)
    backend.held.clear()
    thread.join(20.0)
    messages.receive(opened, Sent, soon())
    assert before == [PART_PIECES]
    assert len(backend.sent) == PART_PIECES + 1
    opened.close()
