"""Planner replicas over one Redis, each through a proxy of its own, and a fleet that forks at whichever leads."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Iterator

import aiohttp

from tests.planner.processes import PlannerUnderTest, call

ADD = {"SEED_IP": "127.0.0.1", "SEED_RANK": "0", "SEED_REFCNT": "0"}
LEASE = ("SEED_IP", "SEED_PORT", "SEED_RANK", "USER_ID")


class Judge:
    """Records who reads which seed until when, as the receivers themselves see it.

    A lease lives for a TTL from the moment it was asked for, or until its receiver releases it. Whoever is given the
    same slot within that time was given it twice, however slow this machine is.
    """

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self.until: dict[str, float] = {}
        self.forks = 0
        self.clashes: list[str] = []

    def begin(self, seed: str, asked_at: float) -> None:
        self.forks += 1
        if self.until.get(seed, 0.0) > time.monotonic():
            self.clashes.append(seed)
        self.until[seed] = asked_at + self.ttl_s

    def end(self, seed: str, asked_at: float) -> None:
        if self.until[seed] == asked_at + self.ttl_s:
            del self.until[seed]


class Fleet:
    """Seeds that send heartbeats and receivers that fork, at whichever planner answers."""

    def __init__(self, session: aiohttp.ClientSession, urls: list[str], ttl_s: float) -> None:
        self.session = session
        self.urls = urls
        self.judge = Judge(ttl_s)
        self.over = asyncio.Event()
        #: a seed of key ``k`` is known to the planner: before that, nobody is told to wait
        self.serves = asyncio.Event()
        #: renewals of kept leases that were answered 200, and answers that such a lease is unknown
        self.renewed = 0
        self.lost: list[str] = []
        #: receivers that were told to load from storage although seeds of their key serve
        self.sent_away: list[dict[str, str]] = []

    async def call_any(self, method: str, path: str, **headers: str) -> tuple[int, dict[str, str]]:
        """As a client with several planner URLs: try another replica if one does not answer or does not lead."""
        waits = "RFORK-TICKET" in headers or headers.get("RFORK-WAIT-SEC", "0") != "0"
        for url in random.sample(self.urls, len(self.urls)):
            # A stopped process accepts connections, and answers nothing.
            status, answer = await call(self.session, method, url + path, 13.0 if waits else 2.0, **headers)
            if status not in (0, 503):
                return status, answer
        return 0, {}

    async def seed(self, port: int, key: str = "k") -> None:
        while not self.over.is_set():
            status, _ = await self.call_any("POST", "/add_seed", SEED_KEY=key, SEED_PORT=str(port), **ADD)
            if status == 200 and key == "k":
                self.serves.set()
            await self._pause(0.3)

    async def receiver(self, number: int) -> None:
        """Fork again and again: at once, or after a wait of at most two seconds. One in ten dies while it reads."""
        rng = random.Random(number)
        while not self.over.is_set():
            asked_at = time.monotonic()
            wait = {"RFORK-WAIT-SEC": rng.choice(["0", "2"])}
            status, answer = await self.call_any("GET", "/get_seed", SEED_KEY="k", **wait)
            if status == 200:
                await self._fork(rng, answer, asked_at)
            else:
                await asyncio.sleep(0.05)

    async def patient_receiver(self, number: int) -> None:
        """Fork again and again, waiting under a ticket for as long as it takes, through any change of the leader."""
        rng, count = random.Random(number), 0
        await self.serves.wait()
        while not self.over.is_set():
            count += 1
            ticket, status, asked_at, answer = {"RFORK-TICKET": f"t{number}.{count}"}, 0, 0.0, {}
            while status != 200 and not self.over.is_set():
                asked_at = time.monotonic()
                status, answer = await self.call_any("GET", "/get_seed", SEED_KEY="k", **ticket)
                if status == 404 and "RFORK-WAITING" not in answer:
                    self.sent_away.append(answer)
                    break
                if status == 0:
                    await asyncio.sleep(0.05)
            if status == 200:
                await self._fork(rng, answer, asked_at)

    async def _fork(self, rng: random.Random, answer: dict[str, str], asked_at: float) -> None:
        lease = {name: answer[name] for name in LEASE}
        self.judge.begin(lease["SEED_PORT"], asked_at)
        await asyncio.sleep(rng.random() * 0.03)
        if rng.random() < 0.9:
            self.judge.end(lease["SEED_PORT"], asked_at)
            await self.call_any("POST", "/put_seed", **lease)

    async def keep(self, port: int) -> None:
        """Lease a seed of its own key, and renew that lease until the end: nobody else may be given it.

        A renewal that this machine kept back for longer than a TTL proves nothing: the lease begins anew then.
        """
        key = f"kept{port}"
        lease: dict[str, str] = {}
        alive_until = 0.0
        beating = asyncio.create_task(self.seed(port, key))
        while not self.over.is_set():
            asked_at = time.monotonic()
            if lease:
                status, _ = await self.call_any("POST", "/renew_seed_lease", **lease)
                self.renewed += status == 200
                if status == 404:
                    lease = {}
                    if time.monotonic() < alive_until:
                        self.lost.append(key)
            else:
                status, answer = await self.call_any("GET", "/get_seed", SEED_KEY=key)
                lease = {name: answer[name] for name in LEASE} if status == 200 else {}
            if status == 200:
                alive_until = asked_at + self.judge.ttl_s
                status, _ = await self.call_any("GET", "/get_seed", SEED_KEY=key)
                if status == 200 and time.monotonic() < alive_until:
                    self.judge.clashes.append(key)
            await self._pause(0.2)
        await beating

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.over.wait(), seconds)

    async def forks(self, more: int) -> None:
        """Return once ``more`` forks have begun and a kept lease was renewed."""
        goal, renewals, deadline = self.judge.forks + more, self.renewed, time.monotonic() + 90
        while self.judge.forks < goal or self.renewed == renewals:
            assert time.monotonic() < deadline, f"stuck at {self.judge.forks} forks, {self.renewed} renewals"
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def fleet_at(urls: list[str], ttl_s: float) -> AsyncIterator[Fleet]:
    """Six seeds, four impatient and three patient receivers, and two that keep their lease; judged at the end."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
        fleet = Fleet(session, urls, ttl_s)
        work = [fleet.seed(5000 + number) for number in range(6)]
        work += [fleet.receiver(number) for number in range(4)]
        work += [fleet.patient_receiver(10 + number) for number in range(3)]
        work += [fleet.keep(6000 + number) for number in range(2)]
        tasks = [asyncio.create_task(each) for each in work]
        try:
            yield fleet
            fleet.over.set()
            await asyncio.wait_for(asyncio.gather(*tasks), 60)
        finally:
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert not fleet.judge.clashes, f"a slot was granted twice: {fleet.judge.clashes}"
        assert not fleet.lost, f"a lease was lost: {fleet.lost}"
        assert not fleet.sent_away, f"a waiting receiver did not go on waiting: {fleet.sent_away}"


class Proxy:
    """A TCP proxy in front of Redis; ``with`` one of its methods to disturb what passes through it."""

    def __init__(self, port: int) -> None:
        self.port = 0
        self._target = port
        self._delay_s = 0.0
        self._passes = asyncio.Event()
        self._passes.set()
        self._refuses = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> Proxy:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        self._break_all()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refuses:
            writer.transport.abort()
            return
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        with contextlib.suppress(asyncio.CancelledError):  # the test has ended; asyncio would log it
            await asyncio.gather(self._pass(reader, back), self._pass(there, writer))
        self._writers -= {writer, back}

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await asyncio.sleep(self._delay_s)
                await self._passes.wait()
                writer.write(data)
        writer.close()

    def _break_all(self) -> None:
        for each in self._writers:
            each.transport.abort()

    @contextlib.contextmanager
    def slow(self, delay_s: float) -> Iterator[None]:
        """Every packet takes ``delay_s`` longer, in either direction."""
        self._delay_s = delay_s
        yield
        self._delay_s = 0.0

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Connections break, and new ones are refused."""
        self._refuses = True
        self._break_all()
        yield
        self._refuses = False

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Nothing passes any more, and nobody is told; what was sent arrives in the end."""
        self._passes.clear()
        yield
        self._passes.set()


class Stalls:
    """Measures for how long this machine kept the test waiting, so that a bound holds under load, too."""

    def __init__(self) -> None:
        self.stalled_s = 0.0

    async def __aenter__(self) -> Stalls:
        self._task = asyncio.create_task(self._measure())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def _measure(self) -> None:
        while True:
            at = time.monotonic()
            await asyncio.sleep(0.02)
            self.stalled_s += max(0.0, time.monotonic() - at - 0.03)


async def leader_of(session: aiohttp.ClientSession, replicas: list[PlannerUnderTest]) -> PlannerUnderTest:
    """Return the replica that leads, once there is one."""
    deadline = time.monotonic() + 60
    while True:
        for each in replicas:
            status, _ = await call(session, "GET", each.url + "/debug/snapshot?limit=0", 2.0)
            if status == 200:
                return each
        assert time.monotonic() < deadline, "no replica leads"
        await asyncio.sleep(0.02)
