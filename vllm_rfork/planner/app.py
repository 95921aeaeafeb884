"""One planner process: store, queue, calls, server and sweeper, from start to drained stop.

:class:`PlannerProcess` is the piece to embed (tests and the demo do); :func:`run` is what the command runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.http import HttpProcessingError

from vllm_rfork import messages
from vllm_rfork.errors import ConfigError
from vllm_rfork.logs.quoting import counted
from vllm_rfork.net import descriptors
from vllm_rfork.net.connection import Limits, Phase
from vllm_rfork.net.connections import ConnectionLimiter, Tls
from vllm_rfork.net.listener import Listener, listen
from vllm_rfork.net.seldom import Seldom, SeldomFilter
from vllm_rfork.planner.http.api import Api
from vllm_rfork.planner.http.auth import ServerTls, Tokens, tokens_from
from vllm_rfork.planner.http.presence import Presence
from vllm_rfork.planner.metrics import Metrics
from vllm_rfork.planner.settings import Settings
from vllm_rfork.planner.store.base import Event, Store
from vllm_rfork.planner.store.errors import StoreError
from vllm_rfork.planner.store.lease_ids import LeaseIds
from vllm_rfork.planner.store.timed import TimedStore
from vllm_rfork.planner.store_opening import StoreOpening
from vllm_rfork.planner.wait_queue import WaitQueue

logger = logging.getLogger(__name__)

#: Events that are logged at INFO or above.
_LOGGED = {
    "seed_added": (logging.INFO, "Seed added"),
    "seed_dropped": (logging.INFO, "Seed dropped"),
    "seed_absent": (logging.WARNING, "Seed absent: not granted until its next heartbeat or presence request"),
    "seed_returned": (logging.INFO, "Seed returned"),
    "seed_aside": (logging.WARNING, "Seed quarantined after failed forks of several receivers"),
    "quarantine_lifted": (logging.INFO, "Quarantine lifted by an operator"),
    "seed_drained": (logging.INFO, "Seed drained by an operator: not granted until that is undone"),
    "seed_undrained": (logging.INFO, "Drain of a seed undone by an operator"),
    "fork_ok": (logging.INFO, "Fork completed"),
    "caches_reported": (logging.INFO, "Start reported its caches"),
    "fork_failed": (logging.WARNING, "Fork failed"),
    "lease_expired": (logging.WARNING, "Lease expired: not renewed within its TTL"),
    "lease_dropped": (logging.WARNING, "Lease dropped with its seed"),
    "lease_adopted": (logging.INFO, "Lease of an earlier state taken over"),
    "state_lost": (logging.WARNING, "Seed was known to an earlier state: not granted for one lease TTL"),
}
_requests = logging.getLogger(__name__ + ".requests")


def _is_not_the_callers(record: logging.LogRecord) -> bool:
    """Return False for errors that callers cause, which could fill the log with tracebacks.

    That of a malformed request quotes the line, which may contain the token.
    """
    return not (record.exc_info and isinstance(record.exc_info[1], (HttpProcessingError, ConnectionError)))


_requests.addFilter(_is_not_the_callers)
_requests.addFilter(SeldomFilter())
_BACKLOG = 4096
#: Kernel buffer for answers that a caller does not read, per connection (the kernel doubles it).
_SENT_NBYTES = 64 * 1024
#: Limit on all unwritten answers together; a large one beyond it is refused. Snapshots can be 60 MB each.
_MAX_UNSENT_NBYTES = 128 * 1024 * 1024
_LARGE_NBYTES = 256 * 1024
#: Maximum size of a request. Bodies are not read; three long headers and a few short ones fit.
_REQUEST_NBYTES = 32 * 1024
#: Descriptors for everything else: Redis, name look-ups, files, and connections that are being closed.
_KEPT_DESCRIPTORS = 96
#: Calls that may be held for long.
_HELD = frozenset({messages.GET_SEED, messages.PRESENCE})
#: Maximum duration of such a call beyond the longest wait.
_HELD_MARGIN_S = 60.0
#: How long older workers of this package wait for an answer if they state no wait.
_PATIENCE_S = 10.0


class PlannerProcess:
    """The planner as an asynchronous context: it serves inside the block, and drains and closes after it.

    Args:
        store: the state to serve, closed at the end; made from ``settings.store`` if None.
        tokens: the bearer tokens; from ``settings.token_file`` or the environment if None.
    """

    def __init__(self, settings: Settings, *, store: Store | None = None, tokens: Tokens | None = None) -> None:
        self.settings = settings
        self.store = make_store(settings) if store is None else store
        self.metrics = Metrics(settings.max_metric_keys)
        measured = self._measured = TimedStore(self.store, self.metrics.store)
        self.queue = WaitQueue(measured)
        self.tokens = tokens_from(settings.token_file) if tokens is None else tokens
        self.presence = Presence(measured, settings.max_connections)
        self.api = Api(
            settings, measured, queue=self.queue, presence=self.presence, metrics=self.metrics, tokens=self.tokens
        )
        self._tls = (
            ServerTls(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
            if settings.tls_cert is not None and settings.tls_key is not None
            else None
        )
        measured.observe = self._observe
        measured.lease_ids = LeaseIds(self.tokens.current)
        self._seldom = Seldom(logger)
        #: set by a caller that wants the planner to stop
        self.stop = asyncio.Event()
        self.opening = StoreOpening(measured, settings.store_wait_sec, self.stop.set)
        #: None while the planner does not listen.
        self.connections: ConnectionLimiter | None = None
        self.port = settings.port

    @property
    def url(self) -> str:
        """The planner's URL for a process on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.settings.host, self.settings.host)  # noqa: S104
        return f"{'https' if self._tls else 'http'}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[PlannerProcess]:
        """Serve inside the block; leaving it drains.

        While the store is unavailable, the planner serves probes and metrics, and answers 503 to every other call.

        Raises:
            OSError: the planner cannot listen on the address.
        """
        await self.opening.begin()
        web_server = web.Server(
            self._handle,
            handler_cancellation=True,  # a waiting receiver that hangs up leaves the queue at once
            access_log=None,
            logger=_requests,
            keepalive_timeout=Limits.idle_s,
            lingering_time=1.0,
        )
        server_tls = self._tls
        tls = None if server_tls is None else Tls(lambda: server_tls.context)
        limits = self._limits()
        self.presence.share(limits.connections, limits.held_s - _HELD_MARGIN_S / 6)
        self.connections = ConnectionLimiter(web_server, limits, self._seldom, tls)
        sweeper: asyncio.Task[None] | None = None
        try:
            listener = await self._listen(self.connections)
            sweeper = asyncio.create_task(self._sweep_for_ever())
            self.api.ready = True
            logger.info("Planner listens on %s (%s)", self.url, self.settings.store.partition("://")[0])
            try:
                yield self
            finally:
                await self._drain(listener, self.connections, web_server)
        finally:
            if sweeper is not None:
                sweeper.cancel()
                await asyncio.gather(sweeper, return_exceptions=True)
            await self.opening.close()
            await self.store.close()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if self.connections is None:
            raise ConnectionResetError("the planner has stopped")
        phase = Phase.HELD if request.path in _HELD else Phase.ANSWER
        return await self.connections.answer(request, self._answer, phase)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        response = await self.api.handle(request)
        nbytes = response.content_length or 0
        unsent_nbytes = 0 if self.connections is None else self.connections.unsent_nbytes
        if nbytes > _LARGE_NBYTES and unsent_nbytes and unsent_nbytes + nbytes > _MAX_UNSENT_NBYTES:
            self.metrics.refused("limit")
            text = "too many large answers are being read; try again later\n"
            return web.Response(status=503, text=text, headers={"Retry-After": "5"})
        return response

    def _limits(self) -> Limits:
        wanted = self.settings.max_connections
        held_s = self.settings.max_wait_sec + _HELD_MARGIN_S
        return Limits(
            descriptors.connections(wanted, kept=_KEPT_DESCRIPTORS), request_nbytes=_REQUEST_NBYTES, held_s=held_s
        )

    async def _listen(self, connections: ConnectionLimiter) -> Listener:
        sockets = await listen(
            self.settings.host,
            self.settings.port,
            backlog=_BACKLOG,
            every_address=True,
            sent_nbytes=_SENT_NBYTES,
        )
        listener = Listener(sockets, connections.accepted, self._seldom)
        self.port = listener.port
        return listener

    async def _drain(self, listener: Listener, connections: ConnectionLimiter, web_server: web.Server) -> None:
        """Accept no connections, send away those who wait, and let open requests finish."""
        self.api.ready = False
        listener.close()
        logger.info("Planner drains: %s here", counted(len(self.queue), "waiting receiver"))
        self.presence.close()
        await self.queue.close(self.settings.drain_sec)
        web_server.pre_shutdown()  # idle connections close now, busy ones after their answer
        await web_server.shutdown(self.settings.drain_sec)
        await connections.close()

    async def _sweep_for_ever(self) -> None:
        while True:
            pause_s = self.settings.sweep_every_sec
            try:
                pause_s = min(pause_s, max(0.02, await self._measured.sweep()))
            except StoreError as error:
                logger.warning("A sweep failed, trying again: %s", error)
            except Exception:  # without sweeps a planner would look healthy, but no lease would expire
                logger.exception("A sweep failed, trying again")
            if self._tls is not None:
                self._tls.refresh()
            await asyncio.sleep(pause_s)

    def _observe(self, event: Event) -> None:
        self.metrics.event(event)
        if event.kind == "seed_dropped":
            self.presence.seed_dropped(event.seed)
        level, text = _LOGGED.get(event.kind, (logging.DEBUG, event.kind))
        if logger.isEnabledFor(level):
            fields = {"key": event.key, "seed": event.seed, "detail": event.detail, **event.facts}
            logger.log(level, text, extra={name: value for name, value in fields.items() if value != ""})


def make_store(settings: Settings) -> Store:
    """Make the store that ``settings`` name.

    Raises:
        ConfigError: the Redis client is not installed, or the URL cannot be used.
    """
    if settings.store == "memory":
        from vllm_rfork.planner.store.memory import MemoryStore

        return MemoryStore(settings.rules())
    try:
        from vllm_rfork.planner.store import redis_url
        from vllm_rfork.planner.store.redis import RedisStore
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "redis":
            raise
        problem = "the Redis client is missing: pip install 'vllm-rfork[planner]'"
        raise ConfigError("store", problem, "memory") from error
    redis_url.check(settings.store)
    return RedisStore(
        settings.rules(), settings.store, prefix=settings.redis_prefix, leader_ttl_s=settings.leader_ttl_sec
    )


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Raises:
        OSError: the planner cannot listen on the address.
        StoreUnavailable: the store was unavailable for ``settings.store_wait_sec``.
    """
    planner = PlannerProcess(settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, planner.stop.set)
    async with planner.running():
        if not planner.tokens.required:
            logger.warning(
                "No bearer token is configured: every caller that reaches %s may use this planner", planner.url
            )
        accepted = settings.max_connections if planner.connections is None else planner.connections.limits.connections
        if accepted < settings.max_connections:
            logger.warning(
                "--max-connections is %d, but this process may have only %d open files: it accepts %d connections at "
                "once; raise the limit (ulimit -n, LimitNOFILE=, or that of the container)",
                settings.max_connections,
                descriptors.limit(),
                accepted,
            )
        if settings.seed_wait_sec > _PATIENCE_S:
            logger.warning(
                "--seed-wait-sec is %g: an older worker that states no wait (rfork_seed_wait_sec) hangs up after its "
                "rfork_request_timeout_sec, %g by default, and loads from storage",
                settings.seed_wait_sec,
                _PATIENCE_S,
            )
        await planner.stop.wait()
        planner.opening.check()


def run(settings: Settings) -> None:
    """Run the planner until it is stopped, with uvloop if that is installed.

    Raises:
        ConfigError, OSError, StoreUnavailable: the planner could not start.
    """
    _raise_file_limit()
    try:
        import uvloop
    except ModuleNotFoundError:
        asyncio.run(serve(settings))
        return
    uvloop.run(serve(settings))


def _raise_file_limit() -> None:
    """Raise the limit of open files as far as possible: every waiting receiver is an open connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
