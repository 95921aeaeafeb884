"""The planner's HTTP calls: headers in, one decision of the store, headers out.

Answers every call of the protocol (``messages``) exactly as the installed base expects it, and the additional ones
only to those who ask. Must not decide anything about seeds and leases itself, and must not keep state.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gzip
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from importlib import resources

from aiohttp import web

from vllm_rfork import __version__, messages
from vllm_rfork.messages import BadMessage, header
from vllm_rfork.planner.http import dashboard, valid_json
from vllm_rfork.planner.http.auth import AddressCheck, Tokens, Trust
from vllm_rfork.planner.http.presence import Presence, StreamedAnswer
from vllm_rfork.planner.http.streamed import json_chunks
from vllm_rfork.planner.metrics import Metrics
from vllm_rfork.planner.resolver import Unresolved
from vllm_rfork.planner.settings import Settings
from vllm_rfork.planner.store.base import (
    Announcement,
    Ask,
    Granted,
    LimitReached,
    Outcome,
    Queued,
    StillLeased,
    Store,
    StoreUnavailable,
    UnknownLease,
    UnknownSeed,
)
from vllm_rfork.planner.waiting_room import Closing, WaitingRoom

logger = logging.getLogger(__name__)

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

#: Calls that need no token: probes have none, and neither has a browser until the page has asked for it.
OPEN_PATHS = frozenset({messages.HEALTHZ, messages.READYZ, messages.DASHBOARD})
#: Bounds of the headers that carry free text, in characters.
MAX_ID_LENGTH = 256
MAX_LANE_LENGTH = 64
MAX_EXCLUDED = 256
MAX_SNAPSHOT = 100_000
#: Snapshots that are being read at once.
MAX_SNAPSHOTS = 4


class Refused(Exception):
    """An answer other than 200, with a text for people."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = dict(headers or {})


class Api:
    """All calls over one store. :meth:`handle` is what the server runs for every request."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        *,
        room: WaitingRoom,
        presence: Presence,
        metrics: Metrics,
        tokens: Tokens,
    ) -> None:
        self._settings = settings
        self._store = store
        self._room = room
        self._presence = presence
        self._metrics = metrics
        self._tokens = tokens
        self._addresses = AddressCheck(_trust(settings, tokens))
        self._page = dashboard.load_page()
        self._openapi = resources.files(__package__).joinpath("openapi.json").read_bytes()
        self._board = dashboard.Board(self._overview)
        self._snapshots = 0
        #: set by the owner once the planner takes requests, and cleared when it drains
        self.ready = False
        self.routes: dict[str, dict[str, Handler]] = {
            messages.ADD_SEED: {"POST": self.add_seed},
            messages.GET_SEED: {"GET": self.get_seed},
            messages.PUT_SEED: {"POST": self.put_seed},
            messages.RENEW_SEED_LEASE: {"POST": self.renew_seed_lease},
            messages.REMOVE_SEED: {"POST": self.remove_seed},
            messages.ADD_INTENT: {"POST": self.intent},
            messages.PRESENCE: {"POST": self.presence},
            messages.HEALTHZ: {"GET": self.healthz},
            messages.READYZ: {"GET": self.readyz},
            messages.METRICS: {"GET": self.metrics},
            messages.DEBUG_SNAPSHOT: {"GET": self.snapshot},
            messages.OPENAPI: {"GET": self.openapi},
            messages.DASHBOARD: {"GET": self.dashboard},
            messages.DASHBOARD_DATA: {"GET": self.dashboard_data},
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Find the call, let it in, run it, and turn whatever it raises into an answer."""
        started_at = time.perf_counter()
        path = request.path
        methods = self.routes.get(path)
        try:
            if methods is None:
                raise Refused(404, f"no such call: {path[:200]!r}")
            # HEAD is GET without the body, which aiohttp leaves out. get_seed changes the state, so it has no HEAD:
            # nobody would release the lease.
            allowed = [*methods, "HEAD"] if "GET" in methods and path != messages.GET_SEED else list(methods)
            if request.method not in allowed:
                raise Refused(405, f"{path} takes {', '.join(allowed)}", {"Allow": ", ".join(allowed)})
            call = methods["GET" if request.method == "HEAD" else request.method]
            if path not in OPEN_PATHS:
                self._admit(request)
            response: web.StreamResponse = await call(request)
        except Refused as refused:
            response = web.Response(status=refused.status, text=refused.text + "\n", headers=refused.headers)
        except BadMessage as error:
            response = web.Response(status=400, text=f"{error}\n")
        except (UnknownLease, UnknownSeed) as error:
            response = web.Response(status=404, text=f"{error}\n")
        except StillLeased as error:
            response = web.Response(status=409, text=f"{error}\n")
        except LimitReached as error:
            self._metrics.refused("limit")
            response = web.Response(status=429, text=f"{error}\n")
        except (StoreUnavailable, Closing) as error:
            text = str(error) or "the planner is being stopped"
            response = web.Response(status=503, text=text + "\n", headers={"Retry-After": "1"})
        except Exception:
            logger.exception("%s %s failed", request.method, path)  # of a call that is known: nothing of the caller's
            response = web.Response(status=500, text="the planner failed; its log says why\n")
        may_wait = self._settings.seed_wait_sec > 0 or any(
            header(request.headers, name) is not None for name in (messages.WAIT_SEC, messages.TICKET)
        )
        waited = path == messages.PRESENCE or (path == messages.GET_SEED and may_wait)
        duration_s = None if waited else time.perf_counter() - started_at
        self._metrics.request(path if methods else "unknown", response.status, duration_s)
        return response

    def _admit(self, request: web.BaseRequest) -> None:
        if not self._tokens.admit(request.headers.get("Authorization")):
            self._metrics.refused("token")
            raise Refused(401, "a valid bearer token is required", {"WWW-Authenticate": 'Bearer realm="rfork"'})

    async def _check_address(self, request: web.BaseRequest, announced: str) -> None:
        try:
            allowed = await self._addresses.allows(announced, request.remote)
        except Unresolved as error:
            raise Refused(503, str(error), {"Retry-After": "5"}) from error
        if not allowed:
            self._metrics.refused("address")
            raise Refused(
                403,
                f"{request.remote} may not speak for a seed at {announced}: set rfork_seed_advertise_host to "
                f"{request.remote} (VLLM_HOST_IP may name another network's address), or give the planner and the "
                "workers a token, or, for NAT and proxies, start the planner with --trust-announced-address",
            )

    # --- the installed base's calls ------------------------------------------------------------------------------
    async def add_seed(self, request: web.BaseRequest) -> web.Response:
        """Announce a seed; also its heartbeat."""
        announcement = self._announcement(request.headers)
        await self._check_address(request, announcement.seed.host)
        state = await self._store.announce(announcement)
        return web.Response(text="ok\n", headers={messages.STATE: state})

    async def get_seed(self, request: web.BaseRequest) -> web.Response:
        """Lease a seed, wait for one, or be told to load from storage."""
        headers = request.headers
        ticket = _text(headers, messages.TICKET)
        ask = Ask(
            key=self._key(headers),
            receiver=request.remote or "local",
            fingerprint=_text(headers, messages.FINGERPRINT),
            wait_s=self._wait_s(headers),
            exclude=_excluded(headers),
            labels=messages.parse_labels(_text(headers, messages.LABELS, messages.MAX_HEADER_LENGTH)),
            intent=_text(headers, messages.INTENT),
            ticket=ticket,
            keeps=bool(ticket),
            patient=bool(ticket) and header(headers, messages.WAIT_SEC) is None and self._settings.default_wait_sec > 0,
        )
        # Who has hung up by now is noticed at the loop's next turn, and this call is cancelled then.
        await asyncio.sleep(0)
        started_at = time.perf_counter()
        if ask.wait_s > 0 and not ask.keeps and not self.ready:
            raise Closing
        result = await self._room.acquire(ask)
        if isinstance(result, Queued):
            raise Refused(404, "wait: ask again with the same ticket", {messages.WAITING: str(result.place)})
        waited_s = time.perf_counter() - started_at if ask.wait_s > 0 and not ask.keeps else result.waited_s
        if not isinstance(result, Granted):
            self._metrics.missed(ask.key, result.reason, waited_s)
            granted = {messages.INTENT: messages.INTENT_GRANTED} if result.intent else {}
            if result.intent:
                granted[messages.INTENT_TTL_SEC] = messages.seconds_text(self._store.rules.intent_ttl_of(ask))
            if result.reason:
                granted[messages.MISS] = result.reason
            if result.others:
                granted[messages.OTHER_FINGERPRINTS] = messages.other_fingerprints_text(result.others)
            why = f": {result.reason}" if result.reason else ""
            raise Refused(404, result.text or f"no free seed for this key{why}", granted)
        self._metrics.granted(ask.key, waited_s)
        lease = messages.Lease(result.seed, result.user_id, result.ttl_s)
        known = {messages.TICKET: messages.encode_text(ticket)} if ticket else {}
        ttl = {messages.LEASE_TTL_SEC: messages.seconds_text(result.ttl_s)}
        return web.Response(text="ok\n", headers={**lease.headers(), **ttl, **known})

    async def put_seed(self, request: web.BaseRequest) -> web.Response:
        """Release a lease, with or without a word on how the fork went."""
        headers = request.headers
        seed, user_id, outcome = _seed_address(headers), _user_id(headers), _outcome(headers)
        released = await self._store.release(seed, user_id, outcome)
        self._metrics.released(released.held_s, outcome)
        return web.Response(text="ok\n")

    async def renew_seed_lease(self, request: web.BaseRequest) -> web.Response:
        """Give a lease its TTL again."""
        seed, user_id = _seed_address(request.headers), _user_id(request.headers)
        await self._store.renew(seed, user_id)
        return web.Response(
            text="ok\n", headers={messages.LEASE_TTL_SEC: messages.seconds_text(self._settings.lease_ttl_sec)}
        )

    async def remove_seed(self, request: web.BaseRequest) -> web.Response:
        """Withdraw a seed."""
        key, seed = self._key(request.headers), _seed_address(request.headers)
        await self._check_address(request, seed.host)
        await self._store.withdraw(key, seed)
        return web.Response(text="ok\n")

    # --- ours ----------------------------------------------------------------------------------------------------
    async def presence(self, request: web.BaseRequest) -> web.StreamResponse:
        """Hold the request while the seed's process lives, or until the seed should ask again."""
        announcement = self._announcement(request.headers)
        await self._check_address(request, announcement.seed.host)
        if not self.ready:
            raise Closing
        answer = StreamedAnswer(request)
        streams = header(request.headers, messages.STREAM) is not None
        try:
            await self._presence.hold(announcement, request.transport, answer if streams else None)
        except UnknownSeed as error:  # not 404, which an older planner answers that has no such call
            if answer.begun:
                return await answer.end(messages.PRESENCE_UNKNOWN)
            raise Refused(409, str(error)) from error
        except (StoreUnavailable, Closing):
            if answer.begun:
                return await answer.end(messages.PRESENCE_LATER)
            raise
        except LimitReached as error:
            self._metrics.refused("limit")
            raise Refused(429, str(error), {"Retry-After": "60"}) from error
        return await answer.end(messages.PRESENCE_AGAIN)

    async def intent(self, request: web.BaseRequest) -> web.Response:
        """Announce, renew or take back an intent."""
        headers = request.headers
        key, intent = self._key(headers), _text(headers, messages.INTENT)
        if not intent:
            raise BadMessage(f"missing header {messages.INTENT}")
        ttl = header(headers, messages.INTENT_TTL_SEC)
        ttl_s = (
            self._settings.intent_ttl_sec
            if ttl is None
            else messages.seconds(ttl, messages.INTENT_TTL_SEC, maximum=86400.0)
        )
        await self._store.intend(key, intent, _text(headers, messages.FINGERPRINT), min(ttl_s, 3600.0))
        return web.Response(text="ok\n")

    # --- operating -----------------------------------------------------------------------------------------------
    async def healthz(self, _: web.BaseRequest) -> web.Response:
        """The process answers."""
        return _json({"status": "ok"})

    async def readyz(self, _: web.BaseRequest) -> web.Response:
        """The planner takes requests and its store answers."""
        if not self.ready:
            raise Refused(503, "starting or draining")
        await self._store.ping()
        return _json({"status": "ready"})

    async def metrics(self, _: web.BaseRequest) -> web.Response:
        """Prometheus's page; without the fleet's gauges while the store does not answer."""
        self._metrics.open_waits.set(len(self._room))
        self._metrics.presence.set(len(self._presence))
        try:
            totals = await self._store.totals()
        except StoreUnavailable as error:
            logger.debug("/metrics has no gauges of the fleet: %s", error)
            totals = None
        page = self._metrics.page(totals)
        return web.Response(body=page, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def snapshot(self, request: web.BaseRequest) -> web.StreamResponse:
        """The state, of one ``key`` where given, at most ``limit`` entries a list."""
        limit = messages.integer(
            request.query.get("limit", "1000"), "limit", minimum=0, maximum=MAX_SNAPSHOT, kind="parameter"
        )
        if self._snapshots >= MAX_SNAPSHOTS:
            raise Refused(429, "too many snapshots are being read", {"Retry-After": "5"})
        self._snapshots += 1
        try:
            chunks = json_chunks(self._store.snapshot_slices(key=request.query.get("key"), limit=limit))
            first = await anext(chunks)  # a store that cannot be asked says so before the answer begins
            response = web.StreamResponse(headers={"Content-Type": "application/json; charset=utf-8"})
            with contextlib.suppress(ConnectionError):  # the caller left in the middle, and aiohttp ends the connection
                await response.prepare(request)
                if request.method != "HEAD":
                    await response.write(first)
                    async for chunk in chunks:
                        await response.write(chunk)  # waits for a slow reader
                await response.write_eof()
            return response
        finally:
            self._snapshots -= 1

    async def openapi(self, _: web.BaseRequest) -> web.Response:
        """Return the description of all calls for programs."""
        return web.Response(body=self._openapi, content_type="application/json")

    async def dashboard(self, request: web.BaseRequest) -> web.Response:
        """The page for people. It holds nothing of the fleet, and is the same for everybody."""
        return _zipped(request, self._page.body, self._page.headers)

    async def dashboard_data(self, request: web.BaseRequest) -> web.Response:
        """What the page shows: the fleet, or one key of it."""
        key = None if header(request.headers, messages.SEED_KEY) is None else self._key(request.headers)
        try:
            body = await self._board.answer(key)
        except dashboard.TooMany as error:
            raise Refused(429, str(error), {"Retry-After": "5"}) from error
        headers = {"Content-Type": "application/json", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return _zipped(request, body, {**headers, "Content-Encoding": "gzip"})

    async def _overview(self, key: str | None) -> bytes:
        planner = {
            "version": __version__,
            "store": self._settings.store.partition(":")[0],
            "policy": self._settings.policy,
            "ready": self.ready,
            "lease_ttl_s": self._settings.lease_ttl_sec,
            "stale_s": self._settings.stale_after_sec,
            "held_requests": len(self._room),
            "presence_connections": len(self._presence),
            "every_s": dashboard.EVERY_S,
            "limit": dashboard.LIMIT,
        }
        shown = await self._store.overview(key=key, limit=dashboard.LIMIT)
        return valid_json.encode({"planner": planner, "key": key, **shown})

    # --- headers -------------------------------------------------------------------------------------------------
    def _key(self, headers: Mapping[str, str]) -> str:
        key = messages.seed_key(headers)
        if len(key) > self._settings.max_key_length:
            raise BadMessage(
                f"header {messages.SEED_KEY} holds a key longer than {self._settings.max_key_length} characters"
            )
        return key

    def _announcement(self, headers: Mapping[str, str]) -> Announcement:
        key, seed = self._key(headers), _seed_address(headers)
        messages.integer(header(headers, messages.SEED_REFCNT) or "0", messages.SEED_REFCNT, minimum=0)
        slots = header(headers, messages.SLOTS)
        return Announcement(
            key=key,
            seed=seed,
            fingerprint=_text(headers, messages.FINGERPRINT),
            slots=None if slots is None else messages.integer(slots, messages.SLOTS, minimum=1),
            labels=messages.parse_labels(_text(headers, messages.LABELS, messages.MAX_HEADER_LENGTH)),
            epoch=_text(headers, messages.EPOCH),
            intent=_text(headers, messages.INTENT),
            known_state=_text(headers, messages.STATE),
        )

    def _wait_s(self, headers: Mapping[str, str]) -> float:
        wait = header(headers, messages.WAIT_SEC)
        if wait is None:
            return 0.0 if header(headers, messages.TICKET) else self._settings.seed_wait_sec
        return min(messages.seconds(wait, messages.WAIT_SEC, maximum=86400.0), self._settings.max_wait_sec)


def _trust(settings: Settings, tokens: Tokens) -> Trust:
    """Whose word counts for an announced address."""
    if settings.trust_announced_address:
        return Trust.ANYBODY
    return Trust.MEMBERS if tokens.required and not settings.check_announced_address else Trust.OWN_ADDRESS


def _text(headers: Mapping[str, str], name: str, max_length: int = MAX_ID_LENGTH) -> str:
    value = messages.decode_text(header(headers, name) or "")
    if len(value) > max_length:
        raise BadMessage(f"header {name} is longer than {max_length} characters")
    return value


def _seed_address(headers: Mapping[str, str]) -> messages.SeedAddress:
    """The seed that the headers name, its host in one spelling."""
    return messages.canonical(messages.seed_address(headers))


def _user_id(headers: Mapping[str, str]) -> str:
    """The lease id. One that is not even text is a lease that is unknown: clients of the installed base that are
    answered 400 to ``put_seed`` never become a seed."""
    value = messages.required(headers, messages.USER_ID)
    try:
        return messages.decode_text(value)
    except BadMessage as error:
        raise UnknownLease("no such lease") from error


def _excluded(headers: Mapping[str, str]) -> frozenset[str]:
    value = header(headers, messages.EXCLUDE)
    if not value:
        return frozenset()
    names = [each for each in value.split(",") if each.strip()]
    if len(names) > MAX_EXCLUDED:
        raise BadMessage(f"header {messages.EXCLUDE} names more than {MAX_EXCLUDED} seeds")
    return frozenset(str(messages.canonical(messages.parse_seed_address(each))) for each in names)


def _outcome(headers: Mapping[str, str]) -> Outcome | None:
    result = header(headers, messages.RESULT)
    if result not in (messages.RESULT_OK, messages.RESULT_FAILED):
        return None  # another word is a newer client's: the lease ends as if there were no result
    nbytes = header(headers, messages.NBYTES) or "0"
    side = header(headers, messages.SIDE) or ""
    return Outcome(
        result == messages.RESULT_OK,
        messages.integer(nbytes, messages.NBYTES, minimum=0, maximum=10**16 - 1),
        messages.seconds(header(headers, messages.SECONDS) or "0", messages.SECONDS, maximum=1e7),
        _text(headers, messages.CAUSE),
        side if side in messages.SIDES else "",  # another word is a newer client's: as if it had said nothing
        _text(headers, messages.LANE, MAX_LANE_LENGTH),
    )


def _json(data: object) -> web.Response:
    return web.Response(body=valid_json.encode(data), content_type="application/json")


@functools.lru_cache(maxsize=4)
def _plain(body: bytes) -> bytes:
    """``body`` decompressed, once for all who ask: callers that do not read must not hold a copy each."""
    return gzip.decompress(body)


def _zipped(request: web.BaseRequest, body: bytes, headers: Mapping[str, str]) -> web.Response:
    """``body``, which is compressed, as it is, or plain for the rare caller that does not take it so."""
    headers = {**headers, "Vary": "Accept-Encoding"}
    if "gzip" not in request.headers.get("Accept-Encoding", ""):
        del headers["Content-Encoding"]
        body = _plain(body)
    return web.Response(body=body, headers=headers)
