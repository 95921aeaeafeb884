"""The calls for operators: probes, metrics, snapshot, dashboard and the description of all calls."""

from __future__ import annotations

import contextlib
import functools
import gzip
import logging
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from aiohttp import web

from vllm_rfork import __version__, messages
from vllm_rfork.messages import header
from vllm_rfork.planner.http import dashboard, valid_json
from vllm_rfork.planner.http.dashboard import View
from vllm_rfork.planner.http.refused import Refused
from vllm_rfork.planner.http.request_headers import seed_key
from vllm_rfork.planner.http.streamed import json_chunks
from vllm_rfork.planner.metrics import Metrics
from vllm_rfork.planner.settings import Settings
from vllm_rfork.planner.store.base import Store
from vllm_rfork.planner.store.errors import StoreUnavailable
from vllm_rfork.planner.store.key_use import KeyNames

logger = logging.getLogger(__name__)

#: Largest number of entries that may be asked for.
MAX_SNAPSHOT = 100_000
#: Maximum length of a text that is searched for, and of the whole query, in characters.
MAX_FIND, MAX_QUERY = 200, 4096
#: Snapshots that are being read at once.
MAX_SNAPSHOTS = 4


class OperatingCalls:
    """Answers people, probes and Prometheus.

    Args:
        is_ready: whether the planner accepts requests.
        load: the number of waiting requests and of presence connections.
        takes_orders: whether operators' calls are accepted.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        *,
        metrics: Metrics,
        is_ready: Callable[[], bool],
        load: Callable[[], tuple[int, int]],
        takes_orders: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._store = store
        self._metrics = metrics
        self._is_ready = is_ready
        self._load = load
        self._takes_orders = takes_orders
        self._page = dashboard.load_page()
        self._openapi = resources.files(__package__).joinpath("openapi.json").read_bytes()
        self._overviews = dashboard.OverviewCache(self._overview)
        #: snapshots that are being read
        self.snapshots = 0

    async def healthz(self, _: web.BaseRequest) -> web.Response:
        """Answer: the process lives."""
        return _json({"status": "ok"})

    async def readyz(self, _: web.BaseRequest) -> web.Response:
        """Answer 200 while the planner accepts requests and decides."""
        if not self._is_ready():
            raise Refused(503, "starting or draining")
        await self._store.ping()
        return _json({"status": "ready"})

    async def metrics(self, _: web.BaseRequest) -> web.Response:
        """Return the metrics for Prometheus; without the fleet's gauges while the store is unavailable."""
        waiting, present = self._load()
        self._metrics.open_waits.set(waiting)
        self._metrics.presence.set(present)
        try:
            totals = await self._store.totals()
        except StoreUnavailable as error:
            logger.debug("/metrics has no gauges of the fleet: %s", error)
            totals = None
        page = self._metrics.page(totals, self._store.names_of)
        return web.Response(body=page, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def snapshot(self, request: web.BaseRequest) -> web.StreamResponse:
        """Return the state, of one ``key`` if given, with at most ``limit`` entries a list."""
        limit = messages.integer(
            request.query.get("limit", "1000"), "limit", minimum=0, maximum=MAX_SNAPSHOT, kind="parameter"
        )
        if self.snapshots >= MAX_SNAPSHOTS:
            raise Refused(429, "too many snapshots are being read", {"Retry-After": "5"})
        self.snapshots += 1
        try:
            chunks = json_chunks(self._store.snapshot_slices(key=request.query.get("key"), limit=limit))
            first = await anext(chunks)  # a store that is unavailable raises before the answer begins
            response = web.StreamResponse(headers={"Content-Type": "application/json; charset=utf-8"})
            with contextlib.suppress(ConnectionError):  # the caller hung up, and aiohttp closes the connection
                await response.prepare(request)
                if request.method != "HEAD":
                    await response.write(first)
                    async for chunk in chunks:
                        await response.write(chunk)  # waits for a slow reader
                await response.write_eof()
            return response
        finally:
            self.snapshots -= 1

    async def openapi(self, _: web.BaseRequest) -> web.Response:
        """Return the description of all calls for programs."""
        return web.Response(body=self._openapi, content_type="application/json")

    async def dashboard(self, request: web.BaseRequest) -> web.Response:
        """Return the page for people. It contains nothing about the fleet."""
        return _zipped(request, self._page.body, self._page.headers)

    async def dashboard_data(self, request: web.BaseRequest) -> web.Response:
        """Return the data of the page: the fleet, one key or one model of it, or what contains a text."""
        key = names = None
        if header(request.headers, messages.SEED_KEY) is not None:
            key = seed_key(request.headers, self._settings.max_key_length)
        if "model" in request.query:
            names = KeyNames(request.query["model"], request.query.get("strategy", ""))
        find = request.query.get("find", "").strip()
        if len(find) > MAX_FIND or len(request.query_string) > MAX_QUERY:
            raise Refused(400, f"the parameter find has more than {MAX_FIND} characters, or the query is too long")
        try:
            body = await self._overviews.get(View(key, names, find))
        except dashboard.RateLimited as error:
            raise Refused(429, str(error), {"Retry-After": "5"}) from error
        headers = {"Content-Type": "application/json", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return _zipped(request, body, {**headers, "Content-Encoding": "gzip"})

    async def _overview(self, view: View) -> bytes:
        waiting, present = self._load()
        planner: dict[str, Any] = {
            "version": __version__,
            "store": self._settings.store.partition(":")[0],
            "policy": self._settings.policy,
            "ready": self._is_ready(),
            "lease_ttl_s": self._settings.lease_ttl_sec,
            "stale_s": self._settings.stale_after_sec,
            "held_requests": waiting,
            "presence_connections": present,
            "every_s": dashboard.EVERY_S,
            "limit": dashboard.LIMIT,
            "takes_orders": self._takes_orders(),
        }
        shown = await self._store.overview(key=view.key, names=view.names, find=view.find, limit=dashboard.LIMIT)
        asked = {"key": view.key, "view_model": view.names and view.names._asdict(), "find": view.find}
        return valid_json.encode({"planner": planner, **asked, **shown})


def _json(data: object) -> web.Response:
    return web.Response(body=valid_json.encode(data), content_type="application/json")


@functools.lru_cache(maxsize=4)
def _plain(body: bytes) -> bytes:
    """Decompress ``body`` once for all callers: those that do not read must not hold a copy each."""
    return gzip.decompress(body)


def _zipped(request: web.BaseRequest, body: bytes, headers: Mapping[str, str]) -> web.Response:
    """Answer with ``body``, which is compressed, or decompressed for the rare caller that does not accept that."""
    headers = {**headers, "Vary": "Accept-Encoding"}
    if "gzip" not in request.headers.get("Accept-Encoding", ""):
        del headers["Content-Encoding"]
        body = _plain(body)
    return web.Response(body=body, headers=headers)
