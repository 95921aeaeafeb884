"""Cost of idle presence connections for one planner process: memory, and CPU over an idle minute.

    python -m bench.presence --connections 10000

Seeds are announced first and measured without their connections, so that the difference is the connections' own.
Clients run in other processes, and every connection must get its bytes. Exits with 1 if 10,000 connections cost 100 MB
or more, or 2 % of a core.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import resource
import time
from multiprocessing.connection import Connection

from bench.bench_planner import Server, free_port, server
from vllm_rfork import messages

_PORTS = 60_000  # ports of seeds at one made-up address
#: Descriptors of the planner besides its presence connections.
_SPARE = 200
MAX_MB_PER_10_000 = 100.0
MAX_CORE = 0.02


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=4, help="processes that open them")
    parser.add_argument("--idle-s", type=float, default=60.0)
    arguments = parser.parse_args()
    number, clients = arguments.connections, arguments.clients
    _raise_descriptors(number + _SPARE)
    context = multiprocessing.get_context("spawn")
    port = free_port()
    with _planner(port, number) as planner:
        pipes: list[Connection] = []
        for first in range(clients):
            ours, theirs = context.Pipe()
            mine = range(first, number, clients)
            context.Process(target=_client, args=(theirs, port, mine), daemon=True).start()
            pipes.append(ours)
        _all(pipes, "announced")
        without = _idle(planner, arguments.idle_s)
        started_at = time.monotonic()
        _all(pipes, "open", order="open")
        opening_s = time.monotonic() - started_at
        with_them = _idle(planner, arguments.idle_s)
        fewest = min(_ask(each, "count") for each in pipes)
    mb, core = with_them[0] - without[0], with_them[1] - without[1]
    print(f"{number} seeds without connections: {without[0]:.0f} MB, {without[1]:.2%} of a core")
    print(f"{number} seeds with them:           {with_them[0]:.0f} MB, {with_them[1]:.2%} of a core")
    print(f"the connections: {mb:.0f} MB, {mb * 1e6 / number / 1e3:.1f} kB each, {core:.2%} of a core")
    print(f"opened in {opening_s:.1f} s; each got {fewest} bytes or more in {arguments.idle_s:g} s")
    if fewest < int(arguments.idle_s / 20) or mb * 10_000 / number >= MAX_MB_PER_10_000 or core >= MAX_CORE:
        raise SystemExit("that is more than they may cost")


def _planner(port: int, number: int) -> contextlib.AbstractContextManager[Server]:
    share = number / (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE)
    code = "from vllm_rfork.planner.command import planner; planner()"
    if share > 0.5:
        print(f"descriptors are short: presence gets {share:.2f} of the planner's connections, not half of them")
        code = f"from vllm_rfork.planner.http import presence; presence.SHARE = {share + 0.001}; {code}"
    options = ["--port", str(port), "--trust-announced-address", "--stale-after-sec", "3600", "--log-level", "error"]
    return server("planner", ["-c", code, *options, "--max-connections", str(2 * number + _SPARE)], port)


def _raise_descriptors(needed: int) -> None:
    """Raise the soft limit of this process and of those that it starts to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SystemExit(f"a process may have {hard} descriptors here, {needed} are needed: raise ulimit -Hn")


def _idle(planner: Server, idle_s: float) -> tuple[float, float]:
    """MB of memory, and the share of a core that the planner used in ``idle_s`` seconds, after some to settle."""
    time.sleep(5.0)
    before, started_at = planner.cpu_s(), time.monotonic()
    time.sleep(idle_s)
    return planner.rss_mb(), (planner.cpu_s() - before) / (time.monotonic() - started_at)


def _all(pipes: list[Connection], expected: str, order: str = "") -> None:
    for each in pipes:
        if order:
            each.send(order)
    for each in pipes:
        answer = each.recv()
        if answer != expected:
            raise SystemExit(f"a client failed: {answer}")


def _ask(pipe: Connection, order: str) -> int:
    pipe.send(order)
    return int(pipe.recv())


# --- clients ---------------------------------------------------------------------------------------------------------


def _client(pipe: Connection, port: int, seeds: range) -> None:
    asyncio.run(_run(pipe, port, seeds))


async def _run(pipe: Connection, port: int, seeds: range) -> None:
    loop = asyncio.get_running_loop()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in seeds:
            writer.write(_request(messages.ADD_SEED, number))
            await _answered(reader)
        writer.close()
        pipe.send("announced")
        await loop.run_in_executor(None, pipe.recv)
        # Few at once: the planner's backlog is for all clients together.
        counts: dict[int, int] = {}
        tasks = [asyncio.create_task(_count(await _attend(port, number), counts, number)) for number in seeds]
        pipe.send("open")
    except (OSError, RuntimeError, asyncio.IncompleteReadError) as error:
        pipe.send(repr(error))
        return
    await loop.run_in_executor(None, pipe.recv)
    ended = [task for task in tasks if task.done()]
    pipe.send(0 if ended else min(counts.values()))
    await loop.run_in_executor(None, pipe.poll, None)


async def _attend(port: int, number: int) -> asyncio.StreamReader:
    # One source address has some 28,000 ports for one destination.
    source = (f"127.0.0.{2 + number // 20_000}", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=source, limit=4096)
    writer.write(_request(messages.PRESENCE, number))
    await writer.drain()
    _open.append(writer)
    return reader


#: A writer that nobody refers to closes its connection.
_open: list[asyncio.StreamWriter] = []


async def _count(reader: asyncio.StreamReader, counts: dict[int, int], number: int) -> None:
    """Count the pieces of an answer that does not end."""
    counts[number] = 0
    await reader.readuntil(b"\r\n\r\n")
    while piece := await reader.read(64):
        counts[number] += piece.count(b"\n\r\n")


async def _answered(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise RuntimeError(f"the planner answered {head[:200]!r}")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    await reader.readexactly(int(length.partition(b":")[2]))


def _request(path: str, number: int) -> bytes:
    headers = {
        "Host": "planner",
        "Content-Length": "0",
        messages.SEED_KEY: f"bench{number % 50}",
        messages.SEED_IP: f"10.0.0.{1 + number // _PORTS}",
        messages.SEED_PORT: str(1 + number % _PORTS),
        messages.SEED_RANK: "0",
        messages.SEED_REFCNT: "0",
        messages.EPOCH: "e1",
        messages.STREAM: "1",
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode()


if __name__ == "__main__":
    main()
