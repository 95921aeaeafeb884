"""A planner that grants given seeds, and keeps what receivers report of them."""

from __future__ import annotations

import asyncio

from aiohttp import web

from vllm_rfork.messages import SeedAddress


class GrantingPlanner:
    """Grants the seeds of ``granted`` one after another, and none after the last.

    Attributes:
        reports: the ``RFORK-`` headers of each release.
        reported: set with the first.
    """

    def __init__(self) -> None:
        self.granted: list[SeedAddress] = []
        self.reports: list[dict[str, str]] = []
        self.reported = asyncio.Event()

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/get_seed", self._get_seed)
        app.router.add_post("/put_seed", self._put_seed)
        app.router.add_route("*", "/{any}", self._other)
        return app

    async def _get_seed(self, request: web.Request) -> web.Response:
        if not self.granted:
            return web.Response(status=404)
        seed = self.granted.pop(0)
        return web.Response(
            headers={
                "SEED_IP": seed.host,
                "SEED_PORT": str(seed.port),
                "SEED_RANK": "0",
                "USER_ID": f"u{len(self.granted)}",
                "LEASE_TTL_SEC": "60",
            }
        )

    async def _put_seed(self, request: web.Request) -> web.Response:
        self.reports.append({name: value for name, value in request.headers.items() if name.startswith("RFORK-")})
        self.reported.set()
        return web.Response()

    async def _other(self, request: web.Request) -> web.Response:
        return web.Response()
