"""The serving side of a self-test between two hosts: seeds of random bytes, offered over HTTP for a limited time."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
from aiohttp import web

from vllm_rfork.logs.quoting import counted, printable
from vllm_rfork.net.credentials import Credentials
from vllm_rfork.net.server import BoundedServer, Bounds, Reply, tls_for
from vllm_rfork.selftest import offer, roles
from vllm_rfork.selftest.children import Child, ChildFailed, Late
from vllm_rfork.selftest.offer import Offer, Seed
from vllm_rfork.selftest.report import CODES, FAILED, GOOD, TOO_LATE, WRONG_BYTES
from vllm_rfork.selftest.roles import Trial

_JSON = "application/json"
_WATCH_S = 0.2
#: Bound of opening all engines and filling their buffers, in seconds.
_OPENING_S = 120.0
_BOUNDS = Bounds(max_connections=8, answer_timeout_s=120.0)


@dataclass(frozen=True)
class Service:
    """The bounds of the serving side.

    Attributes:
        host: the address on which it listens and that the other host connects to.
        port: None takes :data:`vllm_rfork.selftest.offer.PORT`, or a free one if that is in use.
        clients: the number of runs after which it ends.
        timeout_s: it ends this many seconds after it has begun to answer, in any case.
        credentials: the token that every call needs, and TLS.
    """

    host: str
    port: int | None
    clients: int
    timeout_s: float
    credentials: Credentials


def serve(
    trial: Trial, engines: Sequence[str], service: Service, invite: Callable[[int], str], say: Callable[[str], None]
) -> int:
    """Hold a seed of every engine that opens until the bounds of ``service`` are reached; returns the exit status.

    Args:
        trial: its engine is replaced by each of ``engines``.
        invite: the text to print for a port, with the other host's command.
        say: prints one line at once.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends the children as Ctrl-C does
    with contextlib.ExitStack() as children, contextlib.suppress(KeyboardInterrupt):
        seeds = _opened([replace(trial, engine=engine) for engine in engines], children, say)
        if not any(seed.published for seed, _ in seeds):
            say("no engine opens here, so there is nothing to serve")
            return FAILED
        desk = _Desk(trial, seeds, service, say)
        try:
            return asyncio.run(_until_done(desk, service, invite, say))
        except OSError as error:
            say(f"this address cannot be used: {service.host}: {error}; --host and --port select another one")
            return FAILED
    say("stopped before it served because a signal arrived")
    return GOOD


def _opened(
    trials: Sequence[Trial], children: contextlib.ExitStack, say: Callable[[str], None]
) -> list[tuple[Seed, Child]]:
    """A seed for each trial, all of them at once; the reason of one that does not open is part of the offer."""
    started = []
    for trial in trials:
        child = Child("seed", roles.seed, trial)
        children.callback(child.end)
        started.append((trial.engine, child))
    deadline = time.monotonic() + _OPENING_S
    opened = []
    for engine, child in started:
        try:
            seed = Seed(engine, child.receive(deadline))
            say(f"serving {engine}")
        except (ChildFailed, Late) as error:
            seed = Seed(engine, reason=str(error))
            say(f"not serving {engine}: {error}")
        opened.append((seed, child))
    return opened


async def _until_done(desk: _Desk, service: Service, invite: Callable[[int], str], say: Callable[[str], None]) -> int:
    """Answer until every client is done, the time is up or a signal arrives. Raises OSError if it cannot listen."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    server = BoundedServer(desk.answer, _BOUNDS, tls_for(service.credentials))
    try:
        say(invite(await _listen(server, service)))
        until = time.monotonic() + service.timeout_s
        while not stop.is_set() and not desk.done and (left_s := until - time.monotonic()) > 0:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stop.wait(), min(_WATCH_S, left_s))
            desk.watch()
    finally:
        await server.stop()
    return desk.close("a signal arrived" if stop.is_set() else None)


async def _listen(server: BoundedServer, service: Service) -> int:
    """Listen; returns the port."""
    if service.port is not None:
        return await server.start(service.host, service.port)
    try:
        return await server.start(service.host, offer.PORT)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return await server.start(service.host, 0)


class _Desk:
    """Answers the calls, and counts the clients."""

    def __init__(
        self, trial: Trial, seeds: Sequence[tuple[Seed, Child]], service: Service, say: Callable[[str], None]
    ) -> None:
        self._credentials = service.credentials
        self._device = trial.seed_device
        self._seeds = list(seeds)
        self._most = service.clients
        self._say = say
        self._host = offer.Host.here()
        self._reading: set[str] = set()
        self._codes: list[int] = []
        self._died = False

    @property
    def done(self) -> bool:
        """True once as many clients as allowed have reported their end."""
        return len(self._codes) >= self._most

    async def answer(self, request: web.BaseRequest) -> Reply:
        """The answer to any request."""
        if not self._credentials.admit(request.headers.get("Authorization", "")):
            return Reply(401, "missing or wrong token", headers=(("WWW-Authenticate", "Bearer"),))
        if request.path == offer.OFFER:
            return self._offer(request.remote)
        if request.path == offer.DONE:
            return self._ended(request)
        return Reply(404, "no such call")

    def _offer(self, remote: str | None) -> Reply:
        if len(self._reading) + len(self._codes) >= self._most:
            return Reply(409, f"this self-test serves {counted(self._most, 'client')}: start it again, with --clients")
        client = secrets.token_hex(8)
        self._reading.add(client)
        self._say(f"{remote} connects")
        seeds = [seed for seed, _ in self._seeds]
        return Reply(200, msgspec.json.encode(Offer(offer.VERSION, client, self._device, self._host, seeds)), _JSON)

    def _ended(self, request: web.BaseRequest) -> Reply:
        client, code, lane = (request.query.get(name, "") for name in ("client", "code", "lane"))
        if client not in self._reading or not code.isdecimal() or int(code) not in CODES:
            return Reply(400, "no such client, or no such code")
        self._reading.remove(client)
        self._codes.append(int(code))
        self._say(f"{request.remote} is done: {CODES[int(code)]}" + (f" over {printable(lane, 64)}" if lane else ""))
        return Reply(200, "{}", _JSON)

    def watch(self) -> None:
        """Take the seeds out of the offer whose process has died: a reader must not be able to end a seed."""
        for number, (seed, child) in enumerate(self._seeds):
            if seed.published is not None and not child.process.is_alive():
                reason = f"the seed {child.ending} while it served"
                self._seeds[number] = (Seed(seed.engine, reason=reason), child)
                self._died = True
                self._say(f"FAILED: {seed.engine}: {reason}")

    def close(self, interrupted: str | None) -> int:
        """Print the end; returns the exit status."""
        because = interrupted or ("every client is done" if self.done else "the time is up")
        self._say(f"stopped serving because {because}; {counted(len(self._codes), 'client')} reported an end")
        if self._reading:
            self._say(f"{counted(len(self._reading), 'client')} reported nothing")
        if WRONG_BYTES in self._codes:
            return WRONG_BYTES
        if self._died or FAILED in self._codes:
            return FAILED
        unfinished = bool(self._reading) or not self._codes
        return TOO_LATE if TOO_LATE in self._codes or (unfinished and interrupted is None) else GOOD
