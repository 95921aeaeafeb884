"""Slow names occupy neither the planner's threads nor other callers' look-ups, and are not taken for wrong ones."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest

from vllm_rfork.planner import resolver
from vllm_rfork.planner.http.auth import AddressCheck, Trust
from vllm_rfork.planner.resolver import Resolver, Unresolved


class Names:
    """A resolver's back end: names that begin with ``slow`` are answered once :attr:`open` is set."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.asked: list[str] = []

    def find(self, name: str) -> list[str]:
        self.asked.append(name)
        if name.startswith("slow"):
            self.open.wait()
        if name.startswith("none"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        if "broken" in name:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return ["192.0.2.1"]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    monkeypatch.setattr(resolver, "TIMEOUT_S", 0.05)
    made = Names()
    yield made
    made.open.set()


async def test_slow_names_of_one_caller_leave_the_others_their_lookups(names: Names) -> None:
    found = Resolver(find=names.find)
    slow = await asyncio.gather(
        *(found.addresses(f"slow{number}", "192.0.2.66") for number in range(100)), return_exceptions=True
    )
    assert all(isinstance(each, Unresolved) for each in slow)
    assert len(names.asked) == resolver.MAX_OF_ONE
    assert await found.addresses("own.example", "192.0.2.1") == ["192.0.2.1"]


async def test_slow_names_of_many_callers_are_bounded_and_none_is_called_wrong(names: Names) -> None:
    check = AddressCheck(Trust.OWN_ADDRESS, resolver=Resolver(find=names.find))
    slow = await asyncio.gather(
        *(check.allows(f"slow{number}", f"192.0.2.{number}") for number in range(200)), return_exceptions=True
    )
    assert all(isinstance(each, Unresolved) for each in slow)
    assert len(names.asked) == resolver.MAX_LOOKUPS
    with pytest.raises(Unresolved):  # 503 and not 403: nobody knows whether the name is the caller's
        await check.allows("own.example", "192.0.2.1")
    names.open.set()

    async def own() -> bool:
        try:
            return await check.allows("own.example", "192.0.2.1")
        except Unresolved:
            return False

    while not await own():
        await asyncio.sleep(0.01)


async def test_many_who_ask_for_one_name_share_one_lookup(names: Names) -> None:
    found = Resolver(find=names.find)
    waiting = [asyncio.create_task(found.addresses("slow", f"192.0.2.{number}")) for number in range(50)]
    await asyncio.sleep(0)
    names.open.set()
    assert await asyncio.gather(*waiting) == [["192.0.2.1"]] * 50
    assert names.asked == ["slow"]


async def test_a_name_that_was_slow_is_left_alone_for_a_while_and_then_asked_again(names: Names) -> None:
    now = [0.0]
    found = Resolver(clock=lambda: now[0], find=names.find)
    with pytest.raises(Unresolved, match="not found within"):
        await found.addresses("slow-and-broken", "192.0.2.1")
    names.open.set()
    while found._running:  # its thread ends and notifies the loop
        await asyncio.sleep(0.01)
    with pytest.raises(Unresolved, match="a moment ago"):
        await found.addresses("slow-and-broken", "192.0.2.1")
    now[0] = resolver.SLOW_S + 1
    with pytest.raises(Unresolved, match="Temporary failure"):
        await found.addresses("slow-and-broken", "192.0.2.1")
    assert names.asked == ["slow-and-broken"] * 2


async def test_no_such_name_is_an_answer_and_a_broken_resolver_is_none(names: Names) -> None:
    found = Resolver(find=names.find)
    assert await found.addresses("none.example", "192.0.2.1") == []
    with pytest.raises(Unresolved, match="Temporary failure"):
        await found.addresses("broken.example", "192.0.2.1")
