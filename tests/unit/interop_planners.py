"""Planners as they are found in the field, for the clients to prove themselves on.

Each is written from its description in the protocol, on its own, so that a mistake in the package's headers is not
repeated here. A planner is an aiohttp application; :func:`serve` puts it on a free port.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import ModuleType

from aiohttp import web
from aiohttp.test_utils import TestServer

MOCK_PLANNER = Path(__file__).parents[2] / "examples" / "rfork_planner.py"


def load_mock_planner() -> ModuleType:
    """The example as a module; it lies outside the package."""
    spec = importlib.util.spec_from_file_location("rfork_planner", MOCK_PLANNER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


@contextlib.asynccontextmanager
async def serve(app: web.Application) -> AsyncIterator[str]:
    """The base URL of ``app`` on a free port of 127.0.0.1."""
    server = TestServer(app)
    await server.start_server()
    try:
        yield str(server.make_url("/")).rstrip("/")
    finally:
        await server.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class OldPlanner:
    """Knows ``add_seed``, ``get_seed`` and ``put_seed`` and nothing more; its leases never expire."""

    def __init__(self) -> None:
        self.seeds: dict[tuple[str, str, str], str] = {}
        self.leases: dict[str, tuple[str, str, str]] = {}
        self.granted = 0
        self.seen_headers: list[dict[str, str]] = []

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/add_seed", self.add_seed)
        app.router.add_get("/get_seed", self.get_seed)
        app.router.add_post("/put_seed", self.put_seed)
        return app

    def _get(self, request: web.Request, name: str) -> str:
        value = request.headers.get(name)
        if not value:
            raise web.HTTPBadRequest(text=f"missing header {name}")
        return value

    def _seed(self, request: web.Request) -> tuple[str, str, str]:
        seed = (self._get(request, "SEED_IP"), self._get(request, "SEED_PORT"), self._get(request, "SEED_RANK"))
        if not (seed[1].isdigit() and int(seed[1]) >= 1 and seed[2].isdigit()):
            raise web.HTTPBadRequest(text="bad SEED_PORT or SEED_RANK")
        return seed

    async def add_seed(self, request: web.Request) -> web.Response:
        self.seen_headers.append(dict(request.headers))
        key = self._get(request, "SEED_KEY")
        if not self._get(request, "SEED_REFCNT").isdigit():
            raise web.HTTPBadRequest(text="bad SEED_REFCNT")
        self.seeds[self._seed(request)] = key
        return web.Response()

    async def get_seed(self, request: web.Request) -> web.Response:
        self.seen_headers.append(dict(request.headers))
        key = self._get(request, "SEED_KEY")
        for seed, of_key in self.seeds.items():
            if of_key == key and seed not in self.leases.values():
                self.granted += 1
                self.leases[str(self.granted)] = seed
                return web.Response(headers=self.answer(seed, str(self.granted)))
        raise web.HTTPNotFound

    def answer(self, seed: tuple[str, str, str], user_id: str) -> dict[str, str]:
        return {"SEED_IP": seed[0], "SEED_PORT": seed[1], "SEED_RANK": seed[2], "USER_ID": user_id}

    async def put_seed(self, request: web.Request) -> web.Response:
        seed, user_id = self._seed(request), self._get(request, "USER_ID")
        if self.leases.get(user_id) != seed:
            raise web.HTTPNotFound
        del self.leases[user_id]
        return web.Response()


class ProductionPlanner(OldPlanner):
    """Leases with a TTL and renewal; answers 400, not 404, for a lease that it no longer has."""

    def app(self) -> web.Application:
        app = super().app()
        app.router.add_post("/renew_seed_lease", self.renew)
        return app

    def answer(self, seed: tuple[str, str, str], user_id: str) -> dict[str, str]:
        return {**super().answer(seed, user_id), "LEASE_TTL_SEC": "60"}

    def expire_all(self) -> None:
        self.leases.clear()

    async def renew(self, request: web.Request) -> web.Response:
        if self.leases.get(self._get(request, "USER_ID")) != self._seed(request):
            raise web.HTTPBadRequest(text="lease expired")
        return web.Response()

    async def put_seed(self, request: web.Request) -> web.Response:
        if self.leases.get(self._get(request, "USER_ID")) != self._seed(request):
            raise web.HTTPBadRequest(text="lease expired")
        return await super().put_seed(request)


class TtlWithoutRenewal(OldPlanner):
    """States a TTL and has no call to renew it."""

    def answer(self, seed: tuple[str, str, str], user_id: str) -> dict[str, str]:
        return {**super().answer(seed, user_id), "LEASE_TTL_SEC": "60"}


class HyphenPlanner(OldPlanner):
    """Sees hyphenated names alone: what is left of the old planner behind nginx."""

    def _get(self, request: web.Request, name: str) -> str:
        return super()._get(request, name.replace("_", "-"))


def behind_nginx(app: web.Application) -> web.Application:
    """``app`` as it looks through an nginx that drops request headers with underscores in their names."""

    @web.middleware
    async def drop(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        kept = {name: value for name, value in request.headers.items() if "_" not in name}
        return await handler(request.clone(headers=kept))

    app.middlewares.append(drop)
    return app


@contextlib.asynccontextmanager
async def raw_server(reply: bytes, *, then: str = "close", chunk_pause_s: float = 0.0) -> AsyncIterator[str]:
    """A TCP server that answers every connection with ``reply`` after reading what was asked.

    ``then``: ``close`` the connection, ``hang`` with it open, or ``endless``: repeat the reply for ever.
    """
    open_writers: set[asyncio.StreamWriter] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_writers.add(writer)
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await reader.readuntil(b"\r\n\r\n")
            if chunk_pause_s:
                for byte in reply:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(chunk_pause_s)
            else:
                writer.write(reply)
                await writer.drain()
            while then == "endless":
                writer.write(reply)
                await writer.drain()
            if then == "hang":
                await reader.read()  # until the client goes away
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, limit=1 << 20)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in open_writers:
            writer.close()
