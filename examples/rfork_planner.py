#!/usr/bin/env python3
"""A mock planner in one file: the RFork planner protocol, written to be read.

    pip install aiohttp
    python rfork_planner.py --host 0.0.0.0 --port 1223

The planner pairs starting workers (receivers) with running ones that publish their weights (seeds). The weights never
pass through it. All arguments travel in request headers. A request has no body, and unknown headers are ignored. A
name may be spelled SEED_KEY or SEED-KEY (nginx drops names with underscores by default).

    POST /add_seed           a seed announces itself; repeated every 30 s it is the heartbeat
    GET  /get_seed           a receiver acquires a lease on a seed of its key: 200 with the lease, 404 if none is free
    GET  /rfork_find_seed    one seed of a key, without a lease: for its caches
    POST /renew_seed_lease   the receiver is still reading
    POST /put_seed           the receiver releases its lease
    POST /remove_seed        a seed withdraws: 200 gone, 409 still being read (draining, gets no new lease)
    POST /rfork_presence     a seed keeps this request open; if its connection breaks, its process is dead
    GET  /healthz            {"status": "ok"}
    GET  /debug/snapshot     the planner's state as JSON

State is in memory: after a restart the seeds' next heartbeats restore it. For a fleet, use `vllm-rfork planner`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from aiohttp import web

log = logging.getLogger("rfork_planner")

Address = tuple[str, int, int]  # ip, port, rank: the identity of a seed


@dataclasses.dataclass
class Seed:
    """One worker that publishes its weights. Announcing it under another key moves it to that key."""

    ip: str
    port: int
    rank: int
    key: str
    seen_at: float
    granted_at: float = 0.0
    found_at: float = 0.0
    draining: bool = False
    presence: int = 0  # number of the latest presence request
    absent: bool = False  # its connection broke: not granted until the next heartbeat or presence request
    leases: dict[str, float] = dataclasses.field(default_factory=dict)  # user id -> expires at


class Planner:
    """Seeds and their leases. Each call first removes what has expired."""

    def __init__(
        self,
        lease_ttl_s: float = 60.0,
        slots: int = 4,
        stale_after_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lease_ttl_s = lease_ttl_s  # 0: leases never expire, as with the oldest planners
        self.slots = slots
        self.stale_after_s = stale_after_s
        self.clock = clock
        self.seeds: dict[Address, Seed] = {}

    def sweep(self) -> None:
        """Drop expired leases, stale seeds (with their leases), and drained seeds."""
        now = self.clock()
        for address, seed in list(self.seeds.items()):
            seed.leases = {user: expires for user, expires in seed.leases.items() if expires > now}
            if now - seed.seen_at > self.stale_after_s:
                log.info("seed %s:%d:%d is stale, dropped with %d leases", *address, len(seed.leases))
                del self.seeds[address]
            elif seed.draining and not seed.leases:
                del self.seeds[address]

    def add(self, address: Address, key: str) -> None:
        """Announce or renew. A draining seed remains so: the call may be a heartbeat from before its withdrawal."""
        self.sweep()
        seed = self.seeds.get(address)
        if seed is None:
            log.info("seed %s:%d:%d announced under key %r", *address, key)
            seed = self.seeds[address] = Seed(*address, key=key, seen_at=0.0)
        seed.key, seed.seen_at, seed.absent = key, self.clock(), False

    async def attend(self, address: Address, key: str, held_s: float) -> int:
        """Hold a seed's request. The status: 200 send the next request, 409 announce the seed first.

        The server cancels this coroutine when the connection breaks.
        """
        seed = self.seeds.get(address)
        if seed is None or seed.key != key:
            return 409
        seed.absent, seed.presence = False, seed.presence + 1
        mine = seed.presence
        try:
            await asyncio.sleep(held_s)
        except asyncio.CancelledError:
            seed.absent = seed.presence == mine  # unless a later request has replaced this one
            raise
        return 200

    def get(self, key: str) -> tuple[Seed, str] | None:
        """Grant a lease on a seed of ``key`` with a free slot: on the one with the fewest leases, then the idlest."""
        self.sweep()
        seeds = [s for s in self.seeds.values() if s.key == key and not s.draining and not s.absent]
        free = [seed for seed in seeds if len(seed.leases) < self.slots]
        if not free:
            return None
        seed = min(free, key=lambda s: (len(s.leases), s.granted_at))
        user_id = uuid.uuid4().hex
        seed.granted_at = self.clock()
        seed.leases[user_id] = self._expiry()
        return seed, user_id

    def find(self, key: str) -> Seed | None:
        """The seed of ``key`` that was returned least recently: busy or not, its caches may be read."""
        self.sweep()
        seeds = [s for s in self.seeds.values() if s.key == key and not s.draining and not s.absent]
        if not seeds:
            return None
        seed = min(seeds, key=lambda s: s.found_at)
        seed.found_at = self.clock()
        return seed

    def renew(self, address: Address, user_id: str) -> bool:
        """Renew a lease; False if it is unknown: expired, released, or its seed gone."""
        self.sweep()
        seed = self._leased(address, user_id)
        if seed is None:
            return False
        seed.leases[user_id] = self._expiry()
        return True

    def put(self, address: Address, user_id: str) -> bool:
        """Release a lease; False if it is unknown. In both cases the lease is gone."""
        self.sweep()
        seed = self._leased(address, user_id)
        if seed is None:
            return False
        del seed.leases[user_id]
        self.sweep()
        return True

    def remove(self, address: Address, key: str) -> int:
        """Withdraw a seed. The status: 200 removed, 404 unknown or announced under another key, 409 draining."""
        self.sweep()
        seed = self.seeds.get(address)
        if seed is None or seed.key != key:
            return 404
        if seed.leases:
            seed.draining = True
            return 409
        del self.seeds[address]
        return 200

    def _leased(self, address: Address, user_id: str) -> Seed | None:
        """The seed with this lease. The rank does not count: newer clients may omit it."""
        ip, port, _ = address
        return next((s for s in self.seeds.values() if (s.ip, s.port) == (ip, port) and user_id in s.leases), None)

    def _expiry(self) -> float:
        return self.clock() + self.lease_ttl_s if self.lease_ttl_s else float("inf")


# --- headers ---------------------------------------------------------------------------------------------------------


def bad(text: str) -> web.HTTPBadRequest:
    """The answer to a missing or wrong header, which ``text`` names."""
    return web.HTTPBadRequest(text=text + "\n")


def header(request: web.Request, name: str) -> str:
    """The header in either spelling; answers 400 if it is missing or empty."""
    value = request.headers.get(name, request.headers.get(name.replace("_", "-"), "")).strip()
    if not value:
        raise bad(f"missing header {name}")
    return value


def number(request: web.Request, name: str, low: int, high: int = 2**31 - 1, missing: str = "") -> int:
    """The header as an integer within bounds; otherwise answers 400. ``missing`` replaces a missing header."""
    there = any(request.headers.get(each, "").strip() for each in (name, name.replace("_", "-")))
    value = header(request, name) if there or not missing else missing
    if not re.fullmatch("[0-9]{1,10}", value) or not low <= int(value) <= high:
        raise bad(f"header {name} must be an integer from {low} to {high}")
    return int(value)


def seed_address(request: web.Request) -> Address:
    """The headers that name a seed. The rank is deprecated: newer clients may omit it, which means 0."""
    ip = header(request, "SEED_IP")
    if not re.fullmatch(r"[A-Za-z0-9._:%\[\]-]{1,253}", ip):
        raise bad("header SEED_IP must be a host name or an address")
    return ip, number(request, "SEED_PORT", 1, 65535), number(request, "SEED_RANK", 0, missing="0")


# --- calls -----------------------------------------------------------------------------------------------------------


class Calls:
    """The HTTP calls of ``planner``. A presence request is held for ``presence_s`` seconds."""

    def __init__(self, planner: Planner, presence_s: float) -> None:
        self.planner = planner
        self.presence_s = presence_s

    def routes(self) -> list[web.RouteDef]:
        """The calls by method and path."""
        return [
            web.post("/add_seed", self.add_seed),
            web.get("/get_seed", self.get_seed, allow_head=False),
            web.get("/rfork_find_seed", self.find_seed),
            web.post("/renew_seed_lease", self.renew_seed_lease),
            web.post("/put_seed", self.put_seed),
            web.post("/remove_seed", self.remove_seed),
            web.post("/rfork_presence", self.presence),
            web.get("/healthz", self.healthz),
            web.get("/debug/snapshot", self.snapshot),
        ]

    async def add_seed(self, request: web.Request) -> web.Response:
        """A key that is not printable ASCII arrives escaped (RFC 8187); here it is opaque.

        The call may carry ``RFORK-CACHES``, a report on the seed's own start, which this planner ignores.
        """
        key, address = header(request, "SEED_KEY"), seed_address(request)
        number(request, "SEED_REFCNT", 0, missing="0")  # deprecated, without meaning
        self.planner.add(address, key)
        return web.Response(text="ok\n")

    async def get_seed(self, request: web.Request) -> web.Response:
        """The answer is in its headers."""
        granted = self.planner.get(header(request, "SEED_KEY"))
        if granted is None:
            raise web.HTTPNotFound(text="no free seed for this key\n")
        seed, user_id = granted
        log.info("lease %s on seed %s:%d:%d for %s", user_id, seed.ip, seed.port, seed.rank, request.remote)
        answer = {"SEED_IP": seed.ip, "SEED_PORT": str(seed.port), "SEED_RANK": str(seed.rank), "USER_ID": user_id}
        if self.planner.lease_ttl_s:
            answer["LEASE_TTL_SEC"] = f"{self.planner.lease_ttl_s:g}"
        return web.Response(headers=answer)

    async def find_seed(self, request: web.Request) -> web.Response:
        """The answer is in its headers."""
        seed = self.planner.find(header(request, "SEED_KEY"))
        if seed is None:
            raise web.HTTPNotFound(text="no seed of this key is serving\n")
        return web.Response(
            headers={"SEED_IP": seed.ip, "SEED_PORT": str(seed.port), "SEED_RANK": str(seed.rank)}, text="ok\n"
        )

    async def renew_seed_lease(self, request: web.Request) -> web.Response:
        """A receiver that gets 404 stops reading."""
        if not self.planner.renew(seed_address(request), header(request, "USER_ID")):
            raise web.HTTPNotFound(text="no such lease\n")
        return web.Response(text="ok\n")

    async def put_seed(self, request: web.Request) -> web.Response:
        """The call may carry ``RFORK-RESULT`` and more about the fork, which this planner ignores."""
        if not self.planner.put(seed_address(request), header(request, "USER_ID")):
            raise web.HTTPNotFound(text="no such lease\n")
        return web.Response(text="ok\n")

    async def remove_seed(self, request: web.Request) -> web.Response:
        """A draining seed waits until its receivers have finished."""
        key = header(request, "SEED_KEY")
        status = self.planner.remove(seed_address(request), key)
        return web.Response(status=status, text={200: "removed", 404: "no such seed", 409: "draining"}[status] + "\n")

    async def presence(self, request: web.Request) -> web.Response:
        """Held until the time is up, or until the connection breaks."""
        status = await self.planner.attend(seed_address(request), header(request, "SEED_KEY"), self.presence_s)
        return web.Response(status=status, text={200: "again", 409: "announce it first"}[status] + "\n")

    async def healthz(self, request: web.Request) -> web.Response:
        """Always 200 while the process serves."""
        return web.json_response({"status": "ok"})

    async def snapshot(self, request: web.Request) -> web.Response:
        """Each planner has its own form; this is not part of the protocol."""
        self.planner.sweep()
        now = self.planner.clock()
        return web.json_response({"seeds": [describe(seed, now) for seed in self.planner.seeds.values()]})


def describe(seed: Seed, now: float) -> dict[str, Any]:
    """One seed for the snapshot; times in seconds, a lease that never expires as null."""
    leases = {
        user: None if expires == float("inf") else round(expires - now, 3) for user, expires in seed.leases.items()
    }
    fields = {"key": seed.key, "ip": seed.ip, "port": seed.port, "rank": seed.rank, "draining": seed.draining}
    fields |= {"absent": seed.absent, "present": seed.presence > 0 and not seed.absent}
    return {**fields, "seen_sec_ago": round(now - seed.seen_at, 3), "leases": leases}


def make_app(planner: Planner, sweep_every_s: float = 5.0, presence_s: float = 15.0) -> web.Application:
    """The aiohttp application of ``planner``; run it with ``handler_cancellation``, which presence needs.

    ``presence_s``: at most 20, because proxies close connections that are silent for longer.
    """

    async def sweeping(app: web.Application) -> AsyncIterator[None]:
        async def forever() -> None:
            while True:
                planner.sweep()
                await asyncio.sleep(sweep_every_s)

        task = asyncio.create_task(forever())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    app = web.Application()
    app.add_routes(Calls(planner, presence_s).routes())
    app.cleanup_ctx.append(sweeping)
    return app


def main() -> None:
    """Read the options and serve until interrupted."""
    parser = argparse.ArgumentParser(
        description="mock RFork planner", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=1223, help="port to listen on; 0: any free one")
    parser.add_argument("--lease-ttl-sec", type=float, default=60.0, help="seconds until a lease expires; 0: never")
    parser.add_argument("--slots", type=int, default=4, help="leases per seed at once")
    parser.add_argument("--stale-after-sec", type=float, default=60.0, help="drop a seed unseen for that long")
    parser.add_argument("--sweep-every-sec", type=float, default=5.0, help="seconds between sweeps")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    planner = Planner(args.lease_ttl_sec, args.slots, args.stale_after_sec)
    app = make_app(planner, args.sweep_every_sec)
    web.run_app(app, host=args.host, port=args.port, access_log=None, handler_cancellation=True)


if __name__ == "__main__":
    main()
