"""The calls of the protocol: headers in, one decision of the store, headers out."""

from __future__ import annotations

import asyncio
import time

from aiohttp import HttpVersion11, web

from vllm_rfork import messages
from vllm_rfork.messages import BadMessage, SeedAddress, header
from vllm_rfork.messages.metering import MAX_STORAGE_S
from vllm_rfork.net.connection import Connection
from vllm_rfork.planner.http import request_headers as read
from vllm_rfork.planner.http.auth import AddressCheck
from vllm_rfork.planner.http.presence import Presence
from vllm_rfork.planner.http.refused import Refused
from vllm_rfork.planner.metrics import Metrics
from vllm_rfork.planner.resolver import Unresolved
from vllm_rfork.planner.settings import Settings
from vllm_rfork.planner.store.base import Granted, Missed, Queued, Store
from vllm_rfork.planner.store.errors import LimitReached, UnknownSeed
from vllm_rfork.planner.wait_queue import WaitQueue


class ProtocolCalls:
    """Answers seeds and receivers, as ``docs/protocol.md`` defines it."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        *,
        queue: WaitQueue,
        presence: Presence,
        metrics: Metrics,
        addresses: AddressCheck,
    ) -> None:
        self._settings = settings
        self._store = store
        self._queue = queue
        self._presence = presence
        self._metrics = metrics
        self._addresses = addresses

    # --- seeds ---------------------------------------------------------------------------------------------------
    async def add_seed(self, request: web.BaseRequest) -> web.Response:
        """Announce a seed; also its heartbeat."""
        announcement = read.announcement(request.headers, self._settings)
        await self._check_address(request, announcement.seed.host)
        state, served = await self._store.announce(announcement)
        return web.Response(text="ok\n", headers={messages.STATE: state, messages.SERVED: str(served)})

    async def remove_seed(self, request: web.BaseRequest) -> web.Response:
        """Withdraw a seed."""
        key = read.seed_key(request.headers, self._settings.max_key_length)
        seed = read.seed_address(request.headers)
        await self._check_address(request, seed.host)
        await self._store.withdraw(key, seed)
        return web.Response(text="ok\n")

    async def find_seed(self, request: web.BaseRequest) -> web.Response:
        """Name one seed of a key, without a lease."""
        seed = await self._store.find(read.seed_key(request.headers, self._settings.max_key_length))
        if seed is None:
            raise Refused(404, "no seed of this key is serving")
        return web.Response(text="ok\n", headers=_address_headers(seed))

    async def presence(self, request: web.BaseRequest) -> web.Response:
        """Hold the request while the seed's process lives, or until the seed should ask again."""
        announcement = read.announcement(request.headers, self._settings)
        await self._check_address(request, announcement.seed.host)
        streams = header(request.headers, messages.STREAM) is not None and request.version >= HttpVersion11
        connection = Connection.of(request) if streams else None
        try:
            await self._presence.hold(announcement, request.transport, connection)
        except UnknownSeed as error:  # not 404: older planners, which lack the call, answer that
            raise Refused(409, str(error)) from error
        except LimitReached as error:
            self._metrics.refused("limit")
            raise Refused(429, str(error), {"Retry-After": "60"}) from error
        if connection is not None:
            self._metrics.request(request.path, 200, None)
            await asyncio.sleep(0)  # the HTTP server has lost the connection to ``Presence`` and cancels this call
        return web.Response(text=f"{messages.PRESENCE_AGAIN}\n")

    async def _check_address(self, request: web.BaseRequest, announced: str) -> None:
        try:
            allowed = await self._addresses.allows(announced, request.remote)
        except Unresolved as error:
            raise Refused(503, str(error), {"Retry-After": "5"}) from error
        if not allowed:
            self._metrics.refused("address")
            raise Refused(
                403,
                f"{request.remote} may not announce a seed at {announced}: set rfork_seed_advertise_host to "
                f"{request.remote} (VLLM_HOST_IP may be the address of another network), or give the planner and the "
                "workers a token, or, for NAT and proxies, start the planner with --trust-announced-address",
            )

    # --- receivers -----------------------------------------------------------------------------------------------
    async def get_seed(self, request: web.BaseRequest) -> web.Response:
        """Lease a seed, wait for one, or be sent to storage."""
        ask = read.ask(request, self._settings)
        # A caller that hung up is noticed at the loop's next turn, and this call is cancelled then.
        await asyncio.sleep(0)
        started_at = time.perf_counter()
        result = await self._queue.acquire(ask)
        if isinstance(result, Queued):
            raise Refused(404, "wait: ask again with the same ticket", {messages.WAITING: str(result.place)})
        waited_s = time.perf_counter() - started_at if ask.wait_s > 0 and not ask.keeps else result.waited_s
        if isinstance(result, Missed):
            self._metrics.missed(ask.key, result.reason, waited_s)
            raise self._sent_to_storage(result, self._store.rules.intent_ttl_of(ask))
        self._metrics.granted(ask.key, waited_s)
        headers = _lease_headers(result)
        if ask.ticket:
            headers[messages.TICKET] = messages.encode_text(ask.ticket)
        return web.Response(text="ok\n", headers=headers)

    def _sent_to_storage(self, missed: Missed, intent_ttl_s: float) -> Refused:
        headers = {}
        if missed.intent:
            headers[messages.INTENT] = messages.INTENT_GRANTED
            headers[messages.INTENT_TTL_SEC] = messages.seconds_text(intent_ttl_s)
        if missed.reason:
            headers[messages.MISS] = missed.reason
        if missed.others:
            headers[messages.OTHER_FINGERPRINTS] = messages.other_fingerprints_text(missed.others)
        reason = f": {missed.reason}" if missed.reason else ""
        return Refused(404, missed.text or f"no free seed for this key{reason}", headers)

    async def renew_seed_lease(self, request: web.BaseRequest) -> web.Response:
        """Renew a lease for its full TTL."""
        seed, user_id = read.seed_address(request.headers), read.user_id(request.headers)
        await self._store.renew(seed, user_id)
        ttl = messages.seconds_text(self._settings.lease_ttl_sec)
        return web.Response(text="ok\n", headers={messages.LEASE_TTL_SEC: ttl})

    async def put_seed(self, request: web.BaseRequest) -> web.Response:
        """Release a lease, with or without a report of the fork."""
        seed, user_id = read.seed_address(request.headers), read.user_id(request.headers)
        outcome = read.outcome(request.headers)
        released = await self._store.release(seed, user_id, outcome)
        self._metrics.released(released, outcome)
        return web.Response(text="ok\n")

    async def intent(self, request: web.BaseRequest) -> web.Response:
        """Announce, renew or withdraw an intent."""
        headers = request.headers
        key = read.seed_key(headers, self._settings.max_key_length)
        intent = read.text(headers, messages.INTENT)
        if not intent:
            raise BadMessage(f"missing header {messages.INTENT}")
        ttl_s = read.intent_ttl_s(headers, self._settings.intent_ttl_sec)
        fingerprint, names = read.text(headers, messages.FINGERPRINT), read.key_names(headers)
        await self._store.intend(key, intent, fingerprint, ttl_s, names=names, address=request.remote or "")
        return web.Response(text="ok\n")


def _address_headers(seed: SeedAddress) -> dict[str, str]:
    return seed.headers()


def _lease_headers(granted: Granted) -> dict[str, str]:
    lease = messages.Lease(granted.seed, granted.user_id, granted.ttl_s)
    headers = {**lease.headers(), messages.LEASE_TTL_SEC: messages.seconds_text(granted.ttl_s)}
    if granted.load_s:
        headers[messages.STORAGE_SEC] = messages.seconds_text(min(granted.load_s, MAX_STORAGE_S))
    return headers
