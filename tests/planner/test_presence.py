"""A seed whose presence connection breaks is not granted, until it is heard of again."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.planner.conftest import Fleet, MakeFleet, seed, snapshot
from tests.planner.replicas import Stalls
from tests.planner.test_api import ADD, Client, eventually, planner
from vllm_rfork import messages
from vllm_rfork.net.connection import Phase
from vllm_rfork.planner.http import presence
from vllm_rfork.planner.http.presence import Presence
from vllm_rfork.planner.store.base import Announcement, Granted, Missed, Queued
from vllm_rfork.planner.store.errors import LimitReached, UnknownSeed
from vllm_rfork.planner.wait_queue import Closing

NAME = "127.0.0.1:5000:0"


async def attend(fleet: Fleet, name: int = 1, *, held: bool = True, key: str = "k", **more: Any) -> int:
    return await fleet.store.attend(Announcement(key=key, seed=seed(name), **more), held=held)


async def leave(fleet: Fleet, number: int, *, answered: bool = False) -> None:
    await fleet.store.leave(seed(1), number, answered=answered)


# --- the store -------------------------------------------------------------------------------------------------------


async def test_a_seed_whose_connection_breaks_is_not_granted_from_then_on(fleet: Fleet) -> None:
    await fleet.announce(1)
    number = await attend(fleet)
    assert (await fleet.seed_entry(1))["present"] is True
    await fleet.release(await fleet.lease())
    await leave(fleet, number)
    assert isinstance(await fleet.ask(), Missed)
    entry = await fleet.seed_entry(1)
    assert (entry["absent"], entry["present"]) == (True, False)
    assert (await fleet.store.totals())["k"].absent == 1
    assert (await fleet.store.overview())["fleet"]["absent"] == 1
    assert fleet.kinds()[-1] == "seed_absent"


async def test_an_absent_seed_is_back_with_its_next_request_at_once(fleet: Fleet) -> None:
    await fleet.announce(1)
    await leave(fleet, await attend(fleet))
    await attend(fleet)
    assert isinstance(await fleet.ask(), Granted)
    assert (await fleet.store.totals())["k"].absent == 0
    assert fleet.kinds()[-1] == "seed_returned"


async def test_an_absent_seed_is_back_with_a_heartbeat_unless_the_dead_may_have_sent_it(fleet: Fleet) -> None:
    await fleet.announce(1)
    await leave(fleet, await attend(fleet))
    await fleet.announce(1)  # it was on its way when the process died
    assert isinstance(await fleet.ask(), Missed)
    fleet.clock.pass_(2.0)
    await fleet.announce(1)
    assert isinstance(await fleet.ask(), Granted)


async def test_another_life_at_the_same_address_is_not_absent(fleet: Fleet) -> None:
    await fleet.announce(1, epoch="e1")
    await leave(fleet, await attend(fleet, epoch="e1"))
    await fleet.announce(1, epoch="e2")
    assert isinstance(await fleet.ask(), Granted)


async def test_an_absent_seed_is_dropped_when_it_is_stale_like_any_other(fleet: Fleet) -> None:
    await fleet.announce(1)
    await leave(fleet, await attend(fleet))
    fleet.clock.pass_(60.0)
    await fleet.store.sweep()
    assert (await snapshot(fleet.store))["seeds"] == []
    await fleet.announce(1)
    assert isinstance(await fleet.ask(), Granted)


async def test_an_answered_request_opens_a_grace_for_the_next(fleet: Fleet) -> None:
    await fleet.announce(1)
    await leave(fleet, await attend(fleet), answered=True)
    fleet.clock.pass_(4.9)
    await fleet.release(await fleet.lease())
    number = await attend(fleet)
    fleet.clock.pass_(30.0)
    await fleet.release(await fleet.lease())
    await leave(fleet, number, answered=True)
    fleet.clock.pass_(5.0)
    assert isinstance(await fleet.ask(), Missed)
    assert (await fleet.seed_entry(1))["absent"] is True
    await attend(fleet)
    assert isinstance(await fleet.ask(), Granted)


async def test_the_end_of_an_earlier_connection_says_nothing(fleet: Fleet) -> None:
    await fleet.announce(1)
    earlier, later = await attend(fleet), await attend(fleet)
    await leave(fleet, earlier)
    await leave(fleet, earlier, answered=True)
    fleet.clock.pass_(10.0)
    assert (await fleet.seed_entry(1))["absent"] is False
    await leave(fleet, later)
    assert (await fleet.seed_entry(1))["absent"] is True


async def test_a_seed_whose_request_is_not_held_lives_by_its_heartbeats(fleet: Fleet) -> None:
    await fleet.announce(1)
    await leave(fleet, await attend(fleet))
    await attend(fleet, held=False)
    fleet.clock.pass_(59.0)
    assert isinstance(await fleet.ask(), Granted)


async def test_a_seed_that_never_attended_is_what_it_was(fleet: Fleet) -> None:
    await fleet.announce(1)
    fleet.clock.pass_(59.0)
    assert (await fleet.seed_entry(1))["absent"] is False
    await fleet.lease()


@pytest.mark.parametrize("other", [{"key": "other"}, {"epoch": "e2"}, {"fingerprint": "f2"}])
async def test_presence_adds_no_seed(other: dict[str, str], fleet: Fleet) -> None:
    """So a request that is overtaken by the withdrawal brings nothing back."""
    for name in (1, 2):
        if name == 1:
            await fleet.announce(1, epoch="e1", fingerprint="f1")
        with pytest.raises(UnknownSeed):
            await attend(fleet, name, **{"epoch": "e1", "fingerprint": "f1", **other})
    assert len((await snapshot(fleet.store))["seeds"]) == 1


async def test_presence_counts_as_a_sign_of_life(fleet: Fleet) -> None:
    await fleet.announce(1)
    fleet.clock.pass_(50.0)
    await attend(fleet)
    fleet.clock.pass_(50.0)
    await fleet.lease()


async def test_leases_on_an_absent_seed_stay_and_its_slots_come_back_with_it(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet()
    await fleet.announce(1, slots=2)
    number = await attend(fleet, slots=2)
    lease = await fleet.lease()
    await leave(fleet, number)
    await fleet.store.renew(lease.seed, lease.user_id)
    assert isinstance(await fleet.ask(), Missed)
    await attend(fleet, slots=2)
    await fleet.lease()
    assert isinstance(await fleet.ask(), Missed)


async def test_who_waits_gets_the_seed_when_it_returns_and_is_told_to_load_when_it_does_not(fleet: Fleet) -> None:
    await fleet.announce(1)
    lease = await fleet.lease()
    waiting = await fleet.ask(wait_s=600.0, intent="i1")
    assert isinstance(waiting, Queued)
    number = await attend(fleet)
    await leave(fleet, number)
    await fleet.release(lease)
    fleet.clock.pass_(1.9)
    await fleet.store.sweep()
    assert fleet.settled == [], "a connection may break without the process"
    await attend(fleet)
    assert fleet.settled == [waiting.ticket]
    given = await fleet.store.settle(waiting.ticket, leave=False)
    assert isinstance(given, Granted)
    again = await fleet.ask(wait_s=600.0, intent="i2")
    assert isinstance(again, Queued)
    await leave(fleet, await attend(fleet))
    fleet.clock.pass_(2.0)
    await fleet.store.sweep()
    assert await fleet.store.settle(again.ticket, leave=False) == Missed(intent=True)


async def test_a_draining_seed_that_ends_its_connection_is_no_event(fleet: Fleet) -> None:
    await fleet.announce(1)
    number = await attend(fleet)
    lease = await fleet.lease()
    with contextlib.suppress(Exception):
        await fleet.store.withdraw("k", seed(1))
    await leave(fleet, number)
    assert "seed_absent" not in fleet.kinds()
    await fleet.release(lease)
    assert (await snapshot(fleet.store))["seeds"] == []


async def test_the_absent_come_first_among_what_is_shown(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet()
    for name in range(2, 9):
        await fleet.announce(name)
    await fleet.announce(1)
    await leave(fleet, await attend(fleet))
    shown = await fleet.store.overview(limit=4)
    assert shown["seeds"][0]["seed"] == str(seed(1))


# --- over HTTP -------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def attending(client: Client, **headers: str) -> AsyncIterator[asyncio.StreamWriter]:
    """A connection with a held presence request; the planner has it inside the block."""
    before = len(client.planner.presence)
    _, writer = await asyncio.open_connection("127.0.0.1", client.planner.port)
    lines = "".join(f"{name}: {value}\r\n" for name, value in {**ADD, **headers}.items())
    writer.write(f"POST /rfork_presence HTTP/1.1\r\nHost: x\r\n{lines}Content-Length: 0\r\n\r\n".encode())
    await eventually(lambda: len(client.planner.presence) == before + 1)
    try:
        yield writer
    finally:
        writer.close()


async def absent(client: Client) -> bool:
    (entry,) = (await snapshot(client.planner.store))["seeds"]
    return bool(entry["absent"])


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_broken_connection_is_noticed_at_once(how: str, caplog: pytest.LogCaptureFixture) -> None:
    async with planner() as client:
        assert await client.add() == 200
        async with attending(client) as writer:
            await client.lease()
            if how == "reset":
                writer.transport.abort()
        deadline = asyncio.get_running_loop().time() + 1.0
        while not await absent(client):
            assert asyncio.get_running_loop().time() < deadline, "not granted after one second"
            await asyncio.sleep(0.01)
        assert await client.status("GET", "/get_seed", SEED_KEY="k") == 404
        page = (await client.call("GET", "/metrics"))[2]
        assert 'rfork_planner_seeds{key="k",model="",state="absent",strategy=""} 1.0' in page
        assert 'rfork_planner_seeds{key="k",model="",state="serving",strategy=""} 0.0' in page
        assert 'rfork_planner_events_total{kind="seed_absent"} 1.0' in page
        assert "rfork_planner_presence_connections 0.0" in page
        assert any("Seed absent" in each.getMessage() for each in caplog.records)


async def test_a_request_is_answered_before_proxies_give_up_and_followed_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert presence.SILENT_S <= 20.0
    async with planner() as client:
        monkeypatch.setattr(client.planner.presence, "_silent_s", 0.1)
        assert await client.add() == 200
        for _ in range(3):
            assert await client.call("POST", "/rfork_presence", **ADD) != ()
            assert not await absent(client)
        assert (await client.call("POST", "/rfork_presence", **ADD))[0::2] == (200, "again\n")


@contextlib.asynccontextmanager
async def attending_in_pieces(client: Client) -> AsyncIterator[asyncio.StreamReader]:
    """A presence request whose answer may come in pieces."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.planner.port)
    lines = "".join(f"{name}: {value}\r\n" for name, value in {**ADD, messages.STREAM: "1"}.items())
    writer.write(f"POST /rfork_presence HTTP/1.1\r\nHost: x\r\n{lines}Content-Length: 0\r\n\r\n".encode())
    try:
        yield reader
    finally:
        writer.close()


async def test_a_client_that_reads_pieces_gets_bytes_in_place_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with planner() as client:
        monkeypatch.setattr(client.planner.presence, "_silent_s", 0.5)
        assert await client.add() == 200
        async with attending_in_pieces(client) as reader:
            head = await reader.readuntil(b"1\r\n\n\r\n")
            first_at = asyncio.get_running_loop().time()
            async with Stalls() as stalls:
                await reader.readuntil(b"1\r\n\n\r\n")
            assert asyncio.get_running_loop().time() - first_at <= 0.5 + 2 * stalls.stalled_s
            assert head.startswith(b"HTTP/1.1 200")
            assert b"X-Accel-Buffering: no" in head, "nginx passes the bytes on"
            assert not await absent(client)
        await eventually(lambda: len(client.planner.presence) == 0)
        await until_absent(client)


async def test_a_held_connection_keeps_none_of_the_http_servers_objects() -> None:
    """They take 13 kB for each; and it still counts among the planner's connections."""
    async with planner() as client:
        assert await client.add() == 200
        async with attending_in_pieces(client) as reader:
            await reader.readuntil(b"\r\n\r\n")
            connections = client.planner.connections
            assert connections is not None
            await eventually(lambda: connections.count(Phase.HELD) == 1)
            await eventually(lambda: len(connections._server.connections) == len(connections) - 1)
            assert len(connections._by_protocol) == len(connections) - 1


async def until_absent(client: Client) -> None:
    while not await absent(client):
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("how", "word"), [("held long", "again"), ("dropped", "unknown"), ("closed", "later"), ("lost", "later")]
)
async def test_a_streamed_answer_ends_with_the_word_that_the_status_would_have_said(
    how: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with planner(drain_sec=5) as client:
        room = client.planner.presence
        monkeypatch.setattr(room, "_silent_s", 0.2)
        monkeypatch.setattr(room, "_hold_s", 0.6 if how == "held long" else 60.0)
        assert await client.add() == 200
        asking = asyncio.create_task(client.call("POST", "/rfork_presence", **ADD, **{messages.STREAM: "1"}))
        await eventually(lambda: len(room._due) == 1)
        if how == "dropped":
            assert await client.status("POST", "/remove_seed", **ADD) == 200
        elif how == "closed":
            client.planner.api.ready = False
            room.close()
        elif how == "lost":
            room._lost()
        status, _, text = await asyncio.wait_for(asking, 30)
        assert status == 200
        assert text.split() == [word]
        assert room._due == {}


async def test_no_request_is_held_for_longer_than_its_connection_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    async with planner(max_wait_sec=0) as client:
        assert client.planner.connections is not None
        assert client.planner.presence._hold_s < client.planner.connections.limits.held_s


async def test_an_unknown_seed_is_to_be_announced_first() -> None:
    async with planner() as client:
        assert await client.status("POST", "/rfork_presence", **ADD) == 409
        assert await client.status("POST", "/rfork_presence", **{**ADD, "SEED_IP": "10.1.2.3"}) == 403
        assert await client.status("POST", "/rfork_presence", SEED_KEY="k") == 400
        assert await client.status("GET", "/rfork_presence") == 405
        assert (await snapshot(client.planner.store))["seeds"] == []


async def test_a_seed_that_is_dropped_meanwhile_is_to_be_announced_again() -> None:
    async with planner() as client:
        assert await client.add() == 200
        asking = asyncio.create_task(client.status("POST", "/rfork_presence", **ADD))
        await eventually(lambda: len(client.planner.presence) == 1)
        assert await client.status("POST", "/remove_seed", **ADD) == 200
        assert await asyncio.wait_for(asking, 30) == 409


async def test_a_second_connection_takes_over_from_the_first() -> None:
    async with planner() as client:
        assert await client.add() == 200
        first = asyncio.create_task(client.status("POST", "/rfork_presence", **ADD))
        await eventually(lambda: len(client.planner.presence) == 1)
        async with attending_instead(client):
            assert await asyncio.wait_for(first, 30) == 200
            await asyncio.sleep(0)
            assert not await absent(client)


@contextlib.asynccontextmanager
async def attending_instead(client: Client) -> AsyncIterator[None]:
    second = asyncio.create_task(client.status("POST", "/rfork_presence", **ADD))
    try:
        yield
        assert not second.done()
    finally:
        second.cancel()
        await asyncio.wait({second})


async def test_presence_never_takes_all_connections() -> None:
    async with planner(max_connections=6) as client:
        assert client.planner.presence.limit == 3
        async with contextlib.AsyncExitStack() as held:
            for number in range(3):
                assert await client.add(5000 + number) == 200
                await held.enter_async_context(attending(client, SEED_PORT=str(5000 + number)))
            assert await client.add(5009) == 200
            status, headers, _ = await client.call("POST", "/rfork_presence", **{**ADD, "SEED_PORT": "5009"})
            assert (status, headers["Retry-After"]) == (429, "60")
            assert await client.status("GET", "/healthz") == 200
            leased = {(await client.lease())["SEED_PORT"] for _ in range(4)}
            assert leased == {"5000", "5001", "5002", "5009"}, "the one beyond the bound is granted as well"
        await eventually(lambda: len(client.planner.presence) == 0)


async def test_the_share_is_of_the_connections_that_the_process_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of open files may allow fewer than ``--max-connections``."""
    monkeypatch.setattr("vllm_rfork.planner.app.descriptors.connections", lambda wanted, **_: min(wanted, 100))
    async with planner(max_connections=30_000) as client:
        assert client.planner.presence.limit == 50


async def test_a_planner_that_stops_sends_its_seeds_away_with_a_pause() -> None:
    async with planner(drain_sec=5) as client:
        assert await client.add() == 200
        asking = asyncio.create_task(client.call("POST", "/rfork_presence", **ADD))
        await eventually(lambda: len(client.planner.presence) == 1)
        client.planner.api.ready = False
        client.planner.presence.close()
        status, headers, _ = await asyncio.wait_for(asking, 30)
        assert (status, headers["Retry-After"]) == (503, "1")
        assert await client.status("POST", "/rfork_presence", **ADD) == 503


async def test_the_kernel_is_asked_whether_the_other_host_is_there() -> None:
    """A host that loses its power closes nothing."""
    async with planner() as client:
        assert await client.add() == 200
        async with attending(client):
            bounds = []
            for handler in client.planner.connections._server.connections:
                assert handler.transport is not None
                found = handler.transport.get_extra_info("socket")
                idle_s, every_s, times = (
                    found.getsockopt(socket.IPPROTO_TCP, option)
                    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                )
                assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                unacknowledged_ms = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
                bounds.append((idle_s + every_s * times, unacknowledged_ms / 1000))
            silence_s, unacknowledged_s = min(bounds)
            assert silence_s <= 30
            # Bytes on their way stop the probes: an unacknowledged one must not hide the other host's end.
            assert 0 < unacknowledged_s <= 40 - presence.SILENT_S


async def test_a_connection_that_breaks_while_the_store_decides_counts() -> None:
    """With Redis a decision is answered once it is written."""

    class Slow:
        def __init__(self) -> None:
            self.written = asyncio.Event()
            self.left: list[tuple[int, bool]] = []

        async def attend(self, announcement: Announcement, *, held: bool) -> int:
            await self.written.wait()
            return 7

        async def leave(self, seed_: object, number: int, *, answered: bool) -> None:
            self.left.append((number, answered))

    store = Slow()
    room = Presence(store, 10)  # type: ignore[arg-type]
    holding = asyncio.create_task(room.hold(Announcement(key="k", seed=seed(1)), None))
    await asyncio.sleep(0)
    holding.cancel()
    await asyncio.wait({holding})
    store.written.set()
    await eventually(lambda: store.left == [(7, False)])
    assert len(room) == 0


class SlowStore:
    """As Redis: a decision is answered once it is written."""

    def __init__(self) -> None:
        self.written = asyncio.Event()
        self.held: list[bool] = []

    async def attend(self, announcement: Announcement, *, held: bool) -> int:
        self.held.append(held)
        await self.written.wait()
        return len(self.held)

    async def leave(self, seed_: object, number: int, *, answered: bool) -> None: ...


async def test_seeds_that_come_together_get_no_more_than_the_share() -> None:
    """After a takeover all seeds send their requests while the first ones are still being written."""
    store = SlowStore()
    room = Presence(store, 10)  # type: ignore[arg-type]
    holding = [asyncio.create_task(room.hold(Announcement(key="k", seed=seed(each)), None)) for each in range(20)]
    await eventually(lambda: len(store.held) == 20)
    store.written.set()
    done, held = await asyncio.wait(holding, timeout=0.2)
    assert len(held) == len(room) == room.limit
    assert all(isinstance(each.exception(), LimitReached) for each in done)
    room.close()
    ended = await asyncio.wait_for(asyncio.gather(*held, return_exceptions=True), 30)
    assert [type(each) for each in ended] == [Closing] * room.limit
    assert len(room) == 0


async def test_a_request_that_the_store_accepts_after_the_end_is_sent_away() -> None:
    store = SlowStore()
    room = Presence(store, 10)  # type: ignore[arg-type]
    holding = asyncio.create_task(room.hold(Announcement(key="k", seed=seed(1)), None))
    await eventually(lambda: len(store.held) == 1)
    room.close()
    store.written.set()
    with pytest.raises(Closing):
        await asyncio.wait_for(holding, 5)


async def test_a_closed_room_takes_nobody() -> None:
    async with planner() as client:
        room = Presence(client.planner.store, 1)
        room.close()
        with pytest.raises(Closing):
            await room.hold(Announcement(key="k", seed=seed(1)), None)
        with pytest.raises((LimitReached, UnknownSeed)):
            await Presence(client.planner.store, 1).hold(Announcement(key="k", seed=seed(1)), None)
