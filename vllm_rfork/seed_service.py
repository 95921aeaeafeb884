"""HTTP service of one seed: its manifest, its epoch, its health, its caches, and its worker's metrics.

One service per worker process and role, on a port of its own. It returns addresses of weights and never weights.
Every answer is for one epoch: :meth:`SeedService.suspend` is called before the bytes change, and once it has returned,
no receiver gets an address any more.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
from aiohttp import web

from vllm_rfork import messages
from vllm_rfork.caches.manifest import LEVELS, Offer, encode_offer
from vllm_rfork.caches.offered import Offered
from vllm_rfork.clients import SeedClient
from vllm_rfork.errors import SeedError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.manifest.codec import MAX_MANIFEST_NBYTES, encode_manifest
from vllm_rfork.manifest.schema import MANIFEST_VERSION, Manifest
from vllm_rfork.messages import BadMessage, SeedAddress
from vllm_rfork.metrics import worker as metrics
from vllm_rfork.net.bearer import equal
from vllm_rfork.net.credentials import Credentials
from vllm_rfork.net.server import BoundedServer, Bounds, Reply, tls_for
from vllm_rfork.net.streams import Stream
from vllm_rfork.net.tls_errors import ssl_error

logger = worker_logger(__name__)

_JSON = "application/json"
_PROMETHEUS = "text/plain; version=0.0.4"
#: Longest page of metrics in bytes. All series together take less than half of it.
MAX_METRICS_NBYTES = 256 * 1024
#: The manifest versions that can be written, newest last. A reader states the newest that it reads; one that states
#: none is older than the parameter.
ENCODERS: Mapping[int, Callable[[Manifest], bytes]] = {MANIFEST_VERSION: encode_manifest}
_UNSTATED_VERSION = 1
#: Answers to legacy receivers, which read no manifest: there is nothing for them, and they load from storage.
_LEGACY_ANSWERS = {
    messages.SEED_INFO: '{"rfork_transfer_engine_info":null}',
    messages.SEED_SHAPE_INFO: '{"rfork_transfer_engine_shape_info":null}',
}
#: Artifacts that are sent at once; each costs a thread, a descriptor, and a piece in memory.
MAX_SENDING = 4
#: Small artifacts that are sent beside them, such as model information: a front end asks for it only once.
MAX_SENDING_SMALL = 32
SMALL_NBYTES = 64 * 1024
_PROBE_PAUSE_S = 0.05
#: Packets to an address that this host cannot reach may be dropped without an answer; do not wait long for one.
_ADVERTISED_TIMEOUT_S = 2.0
#: The address at which a service on every address answers its own host.
_OWN_HOST = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}  # noqa: S104


@dataclass(frozen=True)
class _Encoded:
    """A manifest, encoded once: a thousand receivers cost no more than their bytes on the wire."""

    fingerprint: str
    headers: tuple[tuple[str, str], ...]
    manifests: Mapping[int, bytes]
    epoch: bytes

    @classmethod
    def of(cls, manifest: Manifest, encoders: Mapping[int, Callable[[Manifest], bytes]]) -> _Encoded:
        """Encode ``manifest`` in every version. Raises SeedError if it is longer than receivers accept."""
        bodies = {version: encode(manifest) for version, encode in encoders.items()}
        longest_nbytes = max(map(len, bodies.values()))
        if longest_nbytes > MAX_MANIFEST_NBYTES:
            raise SeedError(
                f"the manifest takes {longest_nbytes} bytes, receivers accept {MAX_MANIFEST_NBYTES}",
                retry_elsewhere=False,
            )
        return cls(
            fingerprint=manifest.fingerprint,
            headers=(
                (messages.EPOCH, messages.encode_text(manifest.epoch)),
                (messages.FINGERPRINT, messages.encode_text(manifest.fingerprint)),
            ),
            manifests=bodies,
            epoch=msgspec.json.encode({"status": "ok", "epoch": manifest.epoch}),
        )


@dataclass(frozen=True)
class _Suspended:
    reason: str

    def __str__(self) -> str:
        return f"this seed is suspended: {self.reason}"


class _Calls:
    """Answers the calls of one seed's service.

    ``state`` is replaced as a whole and read once per request, so that no answer is for two states.
    """

    def __init__(
        self,
        seed_key: str,
        encoded: _Encoded,
        credentials: Credentials,
        facts: Mapping[str, str] | None,
        caches: Callable[[], Offered | None] | None,
    ) -> None:
        self.state: _Encoded | _Suspended = encoded
        self._seed_key = seed_key
        self._credentials = credentials
        self._facts = msgspec.json.encode(dict(facts or {}))
        self._paths: dict[str, Callable[[web.BaseRequest], Reply]] = {
            messages.SEED_HEALTH: self._health,
            messages.SEED_MANIFEST: self._manifest,
            messages.SEED_EPOCH: self._epoch,
            messages.SEED_FACTS: self._worker_facts,
        }
        if caches is not None:
            calls = _CacheCalls(caches, credentials)
            self._paths |= {messages.SEED_CACHES: calls.listed, messages.SEED_CACHE: calls.artifact}

    async def answer(self, request: web.BaseRequest) -> Reply:
        """The answer to any request."""
        if not self._credentials.admit(request.headers.get("Authorization", "")):
            return Reply(401, "missing or wrong token", headers=(("WWW-Authenticate", "Bearer"),))
        if request.path == messages.SEED_FETCH:
            return Reply(200, '{"status":"ok"}', _JSON)
        if request.path == messages.METRICS:
            return _metrics()
        if request.path not in self._paths and request.path not in _LEGACY_ANSWERS:
            return Reply(404, "no such call")
        keys = request.query.getall(messages.SEED_KEY_PARAM, [])
        if len(keys) != 1:
            return Reply(400, f"exactly one {messages.SEED_KEY_PARAM} is needed")
        return self._answer_for_key(request, keys[0])

    def _answer_for_key(self, request: web.BaseRequest, key: str) -> Reply:
        if request.path in _LEGACY_ANSWERS:
            return Reply(200, _LEGACY_ANSWERS[request.path], _JSON)
        if not equal(key, self._seed_key):
            return Reply(400, "this is not the seed of that key")
        return self._paths[request.path](request)

    def _health(self, request: web.BaseRequest) -> Reply:
        state = self.state
        return Reply(400, str(state)) if isinstance(state, _Suspended) else Reply(200, "")

    def _worker_facts(self, request: web.BaseRequest) -> Reply:
        """They are the worker's and the same in every epoch: also while it is suspended."""
        return Reply(200, self._facts, _JSON)

    def _epoch(self, request: web.BaseRequest) -> Reply:
        state = self.state
        if isinstance(state, _Suspended):
            return Reply(409, str(state))
        return Reply(200, state.epoch, _JSON, state.headers)

    def _manifest(self, request: web.BaseRequest) -> Reply:
        state = self.state
        if isinstance(state, _Suspended):
            return Reply(409, str(state))
        theirs = messages.header(request.headers, messages.FINGERPRINT)
        if theirs is not None and not equal(theirs, messages.encode_text(state.fingerprint)):
            return Reply(
                409,
                f"this seed's fingerprint is {state.fingerprint}, not the receiver's: versions, dtype, quantization, "
                "sizes or layout differ",
                headers=state.headers,
            )
        stated = request.query.get(messages.MANIFEST_VERSION_PARAM, str(_UNSTATED_VERSION))
        try:
            newest = messages.integer(stated, messages.MANIFEST_VERSION_PARAM, minimum=0, kind="parameter")
        except BadMessage as error:
            return Reply(400, f"{error}: it is the newest manifest version that the receiver reads")
        readable = [version for version in state.manifests if version <= newest]
        if not readable:
            return Reply(406, f"this seed writes manifest versions {sorted(state.manifests)}, not {newest}")
        body = state.manifests[max(readable)]
        return Reply(200, body, _JSON, state.headers, still_true=lambda: self.state is state)


def _metrics() -> Reply:
    page = metrics.page()
    if len(page) > MAX_METRICS_NBYTES:
        return Reply(503, f"the metrics take {len(page)} bytes, more than {MAX_METRICS_NBYTES}")
    return Reply(200, page, _PROMETHEUS)


class _CacheCalls:
    """Answers the calls for caches, in every epoch and also while the seed is suspended: weights do not change them."""

    def __init__(self, offered: Callable[[], Offered | None], credentials: Credentials) -> None:
        self._offered = offered
        self._credentials = credentials
        self._encoded: tuple[Offered, dict[bool, bytes]] | None = None
        self._sending: Counter[str] = Counter()

    def listed(self, _: web.BaseRequest) -> Reply:
        """The list, encoded once for all callers."""
        offered = self._offered()
        if offered is None:
            return Reply(200, encode_offer(Offer(())), _JSON, (("Retry-After", str(messages.CACHES_PAUSE_S)),))
        if self._encoded is None or self._encoded[0] is not offered:
            self._encoded = (offered, {})
        bodies, code = self._encoded[1], self._code_refusal() is None
        if code not in bodies:
            bodies[code] = encode_offer(offered.offer(code=code))
        return Reply(200, bodies[code], _JSON)

    def artifact(self, request: web.BaseRequest) -> Reply:
        """All bytes of one artifact."""
        kinds = request.query.getall(messages.CACHE_KIND_PARAM, [])
        names = request.query.getall(messages.CACHE_NAME_PARAM, [])
        if len(kinds) != 1 or len(names) != 1:
            return Reply(400, f"exactly one {messages.CACHE_KIND_PARAM} and {messages.CACHE_NAME_PARAM} are needed")
        if LEVELS.get(kinds[0]) == "code" and (refusal := self._code_refusal()) is not None:
            return refusal
        offered = self._offered()
        found = None if offered is None else offered.find(kinds[0], names[0], code=True)
        if found is None:
            return Reply(404, "this seed does not offer that cache")
        size, places = ("small", MAX_SENDING_SMALL) if found.artifact.nbytes <= SMALL_NBYTES else ("large", MAX_SENDING)
        if self._sending[size] >= places:
            return Reply(503, "too many caches are being sent; try again", headers=(("Retry-After", "1"),))
        self._sending[size] += 1
        stream = Stream(found.artifact.nbytes, found.pieces, ended=lambda: self._sending.subtract((size,)))
        return Reply(200, b"", "application/octet-stream", stream=stream)

    def _code_refusal(self) -> Reply | None:
        """The refusal of code; None if all callers that get this far have proven themselves over TLS."""
        obstacle = self._credentials.code_serving_obstacle()
        return None if obstacle is None else Reply(403, f"this seed sends no code: {obstacle}")


class SeedService:
    """The service of one seed. ``start`` and ``stop`` belong to one event loop; ``suspend`` to any thread.

    Args:
        manifest: complete, with endpoint and epoch; the service answers for its seed key only.
        bind_host: address or name to listen on.
        port: 0 takes a free one.
        other_ports: tried in this order if ``port`` is in use; after the last a free one is taken.
        credentials: token, demanded of every caller, and TLS.
        advertised_host: the host that receivers connect to; the certificate must be valid for it, or for
            ``rfork_seed_tls_name``.
        ready_timeout_s: ``rfork_seed_timeout_sec``.
        bounds: limits for callers.
        facts: the facts behind the fingerprint, for people, already bounded (``manifest/facts.py``).
        caches: returns what the seed offers now, the same object until it changes, and None before it has collected
            its caches. Without it the service does not have these calls.
        encoders: replaced in tests.

    Raises:
        SeedError: the manifest is longer than receivers accept.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        bind_host: str = "0.0.0.0",  # noqa: S104 - rfork_seed_bind_host's documented default: peers are elsewhere
        port: int = 0,
        other_ports: Sequence[int] = (),
        credentials: Credentials | None = None,
        advertised_host: str = "",
        ready_timeout_s: float = 30.0,
        bounds: Bounds | None = None,
        facts: Mapping[str, str] | None = None,
        caches: Callable[[], Offered | None] | None = None,
        encoders: Mapping[int, Callable[[Manifest], bytes]] = ENCODERS,
    ) -> None:
        self.seed_key = manifest.seed_key
        self.bind_host = bind_host
        self.port = port
        self._other_ports = other_ports
        self._credentials = credentials or Credentials()
        self._advertised_host = advertised_host
        self._ready_timeout_s = ready_timeout_s
        self._calls = _Calls(self.seed_key, _Encoded.of(manifest, encoders), self._credentials, facts, caches)
        self._server = BoundedServer(self._calls.answer, bounds or Bounds(), tls_for(self._credentials))

    async def start(self) -> int:
        """Listen, and return the port once the service answers its own health check.

        Raises:
            SeedError: the address is taken or belongs to another host, or there is no answer within
                ``ready_timeout_s``; nothing is left listening.
        """
        await self._listen()
        try:
            await self._wait_until_ready()
        except BaseException:
            await self._server.stop()
            raise
        scheme = "http" if self._credentials.server_context() is None else "https"
        logger.info("seed service answers %s on %s:%d for key %s", scheme, self.bind_host, self.port, self.seed_key)
        return self.port

    def suspend(self, reason: str) -> None:
        """Refuse every receiver from now on; answers that are being written break off."""
        self._calls.state = _Suspended(reason)

    async def stop(self) -> None:
        """Stop listening and drop every connection. Stopping twice does nothing."""
        self.suspend("the seed has stopped")
        await self._server.stop()

    async def _listen(self) -> None:
        """Listen on the first port that is free, and set :attr:`port`. Raises SeedError."""
        ports = [self.port, *self._other_ports, *([0] if self._other_ports else [])]
        for port in ports:
            where = f"{self.bind_host}:{port}"
            if not 0 <= port <= 65535:  # a name lookup takes it modulo 65536
                raise SeedError(f"the seed service cannot listen on {where}: no such port", retry_elsewhere=False)
            try:
                self.port = await self._server.start(self.bind_host, port)
            except OSError as error:
                if error.errno == errno.EADDRINUSE and port != ports[-1]:
                    continue
                raise SeedError(f"the seed service cannot listen on {where}: {error}", retry_elsewhere=False) from error
            if port == 0 and len(ports) > 1:
                logger.warning(
                    "The ports %s, which follow from rfork_seed_port_base, are all in use: the seed service listens on "
                    "port %d, which a firewall may not let through",
                    ", ".join(map(str, ports[:-1])),
                    self.port,
                )
            elif port != ports[0]:
                logger.info("Port %d is in use; the seed service listens on port %d", ports[0], port)
            return

    async def _wait_until_ready(self) -> None:
        """Send health checks over TCP, as a receiver would, until one succeeds. Raises SeedError."""
        deadline = time.monotonic() + self._ready_timeout_s
        last: SeedError | None = None
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                if await self._is_healthy(self._own_host, left_s, certified_name=self._advertised_host):
                    return
            except SeedError as error:
                last = error
                if ssl_error(error) is not None:  # receivers would fail alike, and waiting does not change it
                    raise SeedError(
                        f"the seed service's TLS would be refused by receivers: {error}", retry_elsewhere=False
                    ) from error
            if isinstance(state := self._calls.state, _Suspended):  # refuses its own health check, too
                raise SeedError(f"withdrawn before it was ready: {state.reason}", retry_elsewhere=False)
            await asyncio.sleep(_PROBE_PAUSE_S)
        raise SeedError(
            f"the seed service on {self.bind_host}:{self.port} did not answer its own health check within "
            f"{self._ready_timeout_s:g} s (rfork_seed_timeout_sec)" + (f": {last}" if last else ""),
            retry_elsewhere=False,
        ) from last

    async def check_advertised(self) -> None:
        """Send one health check to the announced address, and log a WARNING if it fails.

        This is not an error: behind NAT, peers may reach an address that this host itself does not.
        """
        host = self._advertised_host
        if not host or host == self._own_host:  # the start has sent its health check there
            return
        problem = "another service answers there"
        try:
            if await self._is_healthy(host, min(_ADVERTISED_TIMEOUT_S, self._ready_timeout_s)):
                return
        except SeedError as error:
            problem = str(error)
        logger.warning(
            "The seed service cannot be reached at its announced address %s, port %d, from this host: %s. If other "
            "hosts cannot reach it either, set rfork_seed_advertise_host and rfork_seed_bind_host",
            host,
            self.port,
            problem,
        )

    async def _is_healthy(self, host: str, timeout_s: float, certified_name: str = "") -> bool:
        client = SeedClient(request_timeout_s=timeout_s, credentials=self._credentials, certified_name=certified_name)
        return await client.healthy(SeedAddress(host, self.port, 0), self.seed_key)

    @property
    def _own_host(self) -> str:
        return _OWN_HOST.get(self.bind_host, self.bind_host)
