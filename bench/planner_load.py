"""Load on a planner, from a separate process: plain sockets and prepared bytes, so that it is not the bottleneck.

Run by ``bench_planner``; prints one JSON object. Modes: ``fill`` announces seeds, ``cycles`` leases and releases,
``beats`` sends heartbeats at a rate, ``wait`` holds receivers open until standard input ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import cast

Answer = Callable[[int, bytes], None]


class Connection(asyncio.Protocol):
    """One keep-alive connection; ``on_answer(status, head)`` is called for each answer, in order."""

    def __init__(self, on_answer: Answer) -> None:
        self._on_answer = on_answer
        self._buffer = b""
        self._transport: asyncio.Transport = asyncio.Transport()  # none as yet

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def send(self, request: bytes) -> None:
        """Write a whole request."""
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Take answers out of the stream."""
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[: end + 2]
            length = int(value(head, b"Content-Length") or b"0")
            if len(self._buffer) < end + 4 + length:
                return
            self._buffer = self._buffer[end + 4 + length :]
            self._on_answer(int(head[9:12]), head)


def value(head: bytes, name: bytes) -> bytes:
    """A header of an answer; servers keep the spelling that this looks for."""
    start = head.find(b"\r\n" + name + b": ")
    if start < 0:
        return b""
    start += len(name) + 4
    return head[start : head.index(b"\r\n", start)]


def request(method: str, path: str, **headers: object) -> bytes:
    """A request without a body."""
    lines = "".join(f"{name}: {each}\r\n" for name, each in headers.items())
    return f"{method} {path} HTTP/1.1\r\nHost: planner\r\n{lines}\r\n".encode("ascii")


def announcements(seeds: int, keys: int) -> list[bytes]:
    """``seeds`` announcements over ``keys`` keys."""
    return [
        request(
            "POST",
            "/add_seed",
            SEED_KEY=key_name(number % keys),
            SEED_IP=f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}",
            SEED_PORT=30000,
            SEED_RANK=number % 8,
            SEED_REFCNT=0,
        )
        for number in range(seeds)
    ]


def key_name(number: int) -> str:
    """A key as the worker builds it."""
    return f"/models/bench-{number}$prod$kv_both$0$0"


class Load:
    """Counts and times of one run."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.latencies_s: list[float] = []
        self.statuses: dict[int, int] = {}

    async def connect(self, on_answer: Answer) -> Connection:
        """A new connection."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: Connection(on_answer), "127.0.0.1", self.port)
        return connection

    def count(self, status: int) -> None:
        """One more answer with ``status``."""
        self.statuses[status] = self.statuses.get(status, 0) + 1

    def report(self, started_at: float, cpu_at: float) -> dict[str, object]:
        """Return the results since then."""
        wall_s = time.perf_counter() - started_at
        ordered = sorted(self.latencies_s) or [0.0]
        return {
            "wall_s": wall_s,
            "count": len(self.latencies_s),
            "per_s": len(self.latencies_s) / wall_s,
            "p50_ms": ordered[len(ordered) // 2] * 1e3,
            "p99_ms": ordered[int(len(ordered) * 0.99)] * 1e3,
            "max_ms": ordered[-1] * 1e3,
            "load_cpu": (time.process_time() - cpu_at) / wall_s,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
        }


async def all_at_once(load: Load, requests: list[bytes], clients: int) -> None:
    """Send every request once, as fast as ``clients`` connections allow."""
    pending: Iterator[bytes] = iter(requests)
    done = asyncio.Event()
    left = len(requests)

    async def start() -> None:
        sent_at = 0.0

        def send_next() -> None:
            nonlocal sent_at
            following = next(pending, None)
            if following is not None:
                sent_at = time.perf_counter()
                connection.send(following)

        def answered(status: int, _: bytes) -> None:
            nonlocal left
            load.count(status)
            load.latencies_s.append(time.perf_counter() - sent_at)
            left -= 1
            if not left:
                done.set()
            send_next()

        connection = await load.connect(answered)
        send_next()

    for _ in range(clients):
        await start()
    await done.wait()


async def cycles(load: Load, clients: int, keys: int, seconds: float) -> None:
    """Lease, release, lease, ... on every connection; a latency is that of the whole cycle."""
    asks = [request("GET", "/get_seed", SEED_KEY=key_name(number)) for number in range(keys)]
    over = time.perf_counter() + seconds
    finished: list[asyncio.Future[None]] = []

    async def start(number: int) -> None:
        finish: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        finished.append(finish)
        turn, releasing, started_at = number, False, time.perf_counter()
        connection: Connection

        def answered(status: int, head: bytes) -> None:
            nonlocal turn, releasing, started_at
            load.count(status)
            if not releasing and status == 200:
                releasing = True
                names = ("SEED_IP", "SEED_PORT", "SEED_RANK", "USER_ID")
                lease = {name: value(head, name.encode()).decode() for name in names}
                connection.send(request("POST", "/put_seed", **lease))
                return
            now = time.perf_counter()
            if releasing and status == 200:
                load.latencies_s.append(now - started_at)
            releasing, started_at, turn = False, now, turn + clients
            if now < over:
                connection.send(asks[turn % keys])
            else:
                finish.set_result(None)

        connection = await load.connect(answered)
        connection.send(asks[turn % keys])

    for number in range(clients):
        await start(number)
    await asyncio.gather(*finished)


async def beats(load: Load, prepared: list[bytes], *, clients: int, per_s: float, seconds: float) -> None:
    """Heartbeats at a steady rate, whatever the answers; late ones show as latency from their due time."""
    waiting: list[list[float]] = [[] for _ in range(clients)]

    def answered(number: int) -> Answer:
        def on_answer(status: int, _: bytes) -> None:
            load.count(status)
            load.latencies_s.append(time.perf_counter() - waiting[number].pop(0))

        return on_answer

    connections = [await load.connect(answered(number)) for number in range(clients)]
    started_at, sent = time.perf_counter(), 0
    while (passed := time.perf_counter() - started_at) < seconds:
        while sent < passed * per_s:
            number = sent % clients
            waiting[number].append(started_at + sent / per_s)
            connections[number].send(prepared[sent % len(prepared)])
            sent += 1
        await asyncio.sleep(0.002)
    deadline = time.perf_counter() + 10
    while any(waiting) and time.perf_counter() < deadline:  # noqa: ASYNC110 - the end of a measurement
        await asyncio.sleep(0.005)


async def wait(load: Load, receivers: int, key: str) -> None:
    """Hold ``receivers`` requests open until standard input ends."""
    ask = request("GET", "/get_seed", **{"SEED_KEY": key, "RFORK-WAIT-SEC": 600})
    for _ in range(receivers):
        (await load.connect(lambda status, _: load.count(status))).send(ask)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def main() -> None:
    """Run one mode."""
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["fill", "cycles", "beats", "wait"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=500)
    parser.add_argument("--keys", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=1000.0)
    given = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    load = Load(given.port)
    prepared = announcements(given.seeds, given.keys) if given.mode in ("fill", "beats") else []
    started_at, cpu_at = time.perf_counter(), time.process_time()
    if given.mode == "fill":
        await all_at_once(load, prepared, given.clients)
    elif given.mode == "cycles":
        await cycles(load, given.clients, given.keys, given.seconds)
    elif given.mode == "beats":
        await beats(load, prepared, clients=given.clients, per_s=given.rate, seconds=given.seconds)
    else:
        await wait(load, given.seeds, "/models/nobody-has-it$prod$kv_both$0$0")
    print(json.dumps(load.report(started_at, cpu_at)))


if __name__ == "__main__":
    asyncio.run(main())
