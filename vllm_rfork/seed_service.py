"""A seed's HTTP service: where its weights lie, whose they are, and whether that is still true.

One service per worker process and role, on a port of its own. It hands out addresses and never weights. What it
says holds for one epoch: :meth:`SeedService.suspend` is called before the bytes change, and from the moment it
returns no address is given out any more. Must not import torch or vLLM, nor know what makes a seed trustworthy.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
from aiohttp import web

from vllm_rfork import messages
from vllm_rfork.clients import SeedClient
from vllm_rfork.errors import SeedError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.manifest.legacy import InstalledBase, info_payload, shape_payload
from vllm_rfork.manifest.schema import MANIFEST_VERSION, MAX_MANIFEST_NBYTES, Manifest, encode_manifest
from vllm_rfork.messages import BadMessage
from vllm_rfork.net.bearer import equal
from vllm_rfork.net.credentials import Credentials, Options
from vllm_rfork.net.server import BoundedServer, Bounds, Reply, Tls
from vllm_rfork.net.tls_errors import ssl_error

logger = worker_logger(__name__)

_JSON = "application/json"
#: The manifest versions that can be written, newest last. A reader states the newest that it reads; one that
#: states none is of the time before it was stated.
ENCODERS: Mapping[int, Callable[[Manifest], bytes]] = {MANIFEST_VERSION: encode_manifest}
_UNSTATED_VERSION = 1
_PROBE_PAUSE_S = 0.05
#: Packets to an address that this host cannot reach may simply vanish; nobody should wait long for them.
_ADVERTISED_TIMEOUT_S = 2.0
#: Where a service on every address answers its own host.
_OWN_HOST = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}  # noqa: S104


@dataclass(frozen=True)
class Offer:
    """What a seed has to give in one epoch.

    ``installed_base`` is for receivers that know no manifest; None turns them away, and they load from storage.
    """

    manifest: Manifest
    installed_base: InstalledBase | None = None


@dataclass(frozen=True)
class _Offered:
    """An offer, encoded once: a thousand receivers cost no more than their bytes on the wire."""

    fingerprint: str
    headers: tuple[tuple[str, str], ...]
    manifests: Mapping[int, bytes]
    epoch: bytes
    info: bytes
    shapes: bytes


@dataclass(frozen=True)
class _Suspended:
    reason: str


class SeedService:
    """The service of one seed. ``start`` and ``stop`` belong to one event loop; the rest to any thread.

    Args:
        seed_key: the only key it answers to.
        offer: what it serves from the start.
        bind_host: address or name to listen on.
        port: 0 takes a free one.
        other_ports: tried in this order where ``port`` is in use; after the last a free one is taken.
        token: demanded as ``Authorization: Bearer`` on every call; the installed base sends none.
        credentials: token and TLS, in place of ``token``.
        advertised_host: where receivers reach it; its certificate must be good for that, or for ``seed_name``.
        ready_timeout_s: ``rfork_seed_timeout_sec``.
        bounds: what callers may take.
        facts: what is behind the fingerprint, for people; bounded by who made them (``manifest/facts.py``).
        encoders: replaced in tests.
    """

    def __init__(
        self,
        *,
        seed_key: str,
        offer: Offer,
        bind_host: str = "0.0.0.0",  # noqa: S104 - rfork_seed_bind_host's documented default: peers are elsewhere
        port: int = 0,
        other_ports: Sequence[int] = (),
        token: str | None = None,
        credentials: Credentials | None = None,
        advertised_host: str = "",
        ready_timeout_s: float = 30.0,
        bounds: Bounds | None = None,
        facts: Mapping[str, str] | None = None,
        encoders: Mapping[int, Callable[[Manifest], bytes]] = ENCODERS,
    ) -> None:
        self.seed_key = seed_key
        self.bind_host = bind_host
        self.port = port
        self._other_ports = other_ports
        self._credentials = credentials or Credentials(Options(token=token or ""))
        self._advertised_host = advertised_host
        self._ready_timeout_s = ready_timeout_s
        self._encoders = encoders
        self._facts = msgspec.json.encode(dict(facts or {}))
        self._server = BoundedServer(self._handle, bounds or Bounds(), _tls(self._credentials))
        # Replaced as a whole and read once per request, so that no answer mixes two epochs.
        self._state: _Offered | _Suspended = self._encoded(offer)
        self._paths: dict[str, Callable[[web.BaseRequest, bool], Reply]] = {
            messages.SEED_HEALTH: self._health,
            messages.SEED_INFO: self._info,
            messages.SEED_SHAPE_INFO: self._shape_info,
            messages.SEED_MANIFEST: self._manifest,
            messages.SEED_EPOCH: self._epoch,
            messages.SEED_FACTS: self._tell_facts,
        }

    # --- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> int:
        """Listen, and return the port once the service answers its own health check.

        Raises:
            SeedError: the address is taken or not ours, or there is no answer within ``ready_timeout_s``;
                nothing is left listening.
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

    async def stop(self) -> None:
        """Stop listening and drop every connection. Stopping twice does nothing."""
        self.suspend("the seed has stopped")
        await self._server.stop()

    def suspend(self, reason: str) -> None:
        """Refuse every receiver from now on; answers that are being written break off."""
        self._state = _Suspended(reason)

    def resume(self, offer: Offer) -> None:
        """Serve ``offer``, which must be of a new epoch."""
        self._state = self._encoded(offer)

    async def check_advertised(self) -> None:
        """Ask oneself under the announced address, once, and log a WARNING where that does not work.

        Not an error: behind NAT, peers may reach an address that this host itself does not.
        """
        host = self._advertised_host
        if not host or self._answers_as(host):
            return
        client = SeedClient(
            request_timeout_s=min(_ADVERTISED_TIMEOUT_S, self._ready_timeout_s), credentials=self._credentials
        )
        try:
            healthy = await client.healthy(messages.SeedAddress(host, self.port, 0), self.seed_key)
            problem = "" if healthy else "another service answers there"
        except SeedError as error:
            problem = str(error)
        if problem:
            logger.warning(
                "The seed service cannot be reached at its announced address %s, port %d, from this host: %s. If other "
                "hosts cannot reach it either, set rfork_seed_advertise_host and rfork_seed_bind_host",
                host,
                self.port,
                problem,
            )

    def _answers_as(self, host: str) -> bool:
        """The health check of the start has asked at ``host`` already."""
        return host == _OWN_HOST.get(self.bind_host, self.bind_host)

    async def _wait_until_ready(self) -> None:
        """Ask oneself over TCP, as a receiver would."""
        host = _OWN_HOST.get(self.bind_host, self.bind_host)
        deadline = time.monotonic() + self._ready_timeout_s
        last: SeedError | None = None
        while (left_s := deadline - time.monotonic()) > 0:
            client = SeedClient(
                request_timeout_s=left_s, credentials=self._credentials, certified_name=self._advertised_host
            )
            try:
                if await client.healthy(messages.SeedAddress(host, self.port, 0), self.seed_key):
                    return
            except SeedError as error:
                last = error
                if ssl_error(error) is not None:  # receivers would see the same, and waiting does not change it
                    raise SeedError(
                        f"the seed service's TLS would be refused by receivers: {error}", retry_elsewhere=False
                    ) from error
            await asyncio.sleep(_PROBE_PAUSE_S)
        raise SeedError(
            f"the seed service on {self.bind_host}:{self.port} did not answer its own health check within "
            f"{self._ready_timeout_s:g} s (rfork_seed_timeout_sec)" + (f": {last}" if last else ""),
            retry_elsewhere=False,
        ) from last

    def _encoded(self, offer: Offer) -> _Offered:
        manifest = offer.manifest
        if manifest.seed_key != self.seed_key:
            raise ValueError(f"an offer of key {manifest.seed_key!r} to the service of {self.seed_key!r}")
        bodies = {version: encode(manifest) for version, encode in self._encoders.items()}
        longest_nbytes = max(map(len, bodies.values()))
        if longest_nbytes > MAX_MANIFEST_NBYTES:
            raise SeedError(
                f"the manifest takes {longest_nbytes} bytes, receivers accept {MAX_MANIFEST_NBYTES}",
                retry_elsewhere=False,
            )
        return _Offered(
            fingerprint=manifest.fingerprint,
            headers=(
                (messages.EPOCH, messages.encode_text(manifest.epoch)),
                (messages.FINGERPRINT, messages.encode_text(manifest.fingerprint)),
            ),
            manifests=bodies,
            epoch=msgspec.json.encode({"status": "ok", "epoch": manifest.epoch}),
            info=info_payload(offer.installed_base),
            shapes=shape_payload(offer.installed_base),
        )

    # --- answers -------------------------------------------------------------------------------------------------

    async def _handle(self, request: web.BaseRequest) -> Reply:
        if not self._credentials.admit(request.headers.get("Authorization", "")):
            return Reply(401, "missing or wrong token", headers=(("WWW-Authenticate", "Bearer"),))
        if request.path == messages.SEED_FETCH:
            return Reply(200, '{"status":"ok"}', _JSON)
        answer = self._paths.get(request.path)
        if answer is None:
            return Reply(404, "no such call")
        keys = request.query.getall(messages.SEED_KEY_PARAM, [])
        if len(keys) != 1:
            return Reply(400, f"exactly one {messages.SEED_KEY_PARAM} is needed")
        return answer(request, equal(keys[0], self.seed_key))

    def _health(self, request: web.BaseRequest, ours: bool) -> Reply:
        if not ours:
            return _not_ours()
        state = self._state
        return Reply(400, _refusal(state)) if isinstance(state, _Suspended) else Reply(200, "")

    def _info(self, request: web.BaseRequest, ours: bool) -> Reply:
        state = self._state
        if not ours or isinstance(state, _Suspended):
            return Reply(200, info_payload(None), _JSON)
        return Reply(200, state.info, _JSON, still_true=lambda: self._state is state)

    def _shape_info(self, request: web.BaseRequest, ours: bool) -> Reply:
        state = self._state
        if not ours or isinstance(state, _Suspended):
            return Reply(200, shape_payload(None), _JSON)
        return Reply(200, state.shapes, _JSON, still_true=lambda: self._state is state)

    def _tell_facts(self, request: web.BaseRequest, ours: bool) -> Reply:
        """They are the worker's, whatever its epoch: also while it is suspended."""
        return Reply(200, self._facts, _JSON) if ours else _not_ours()

    def _epoch(self, request: web.BaseRequest, ours: bool) -> Reply:
        state = self._state
        if not ours:
            return _not_ours()
        if isinstance(state, _Suspended):
            return Reply(409, _refusal(state))
        return Reply(200, state.epoch, _JSON, state.headers)

    def _manifest(self, request: web.BaseRequest, ours: bool) -> Reply:
        state = self._state
        if not ours:
            return _not_ours()
        if isinstance(state, _Suspended):
            return Reply(409, _refusal(state))
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
        return Reply(200, body, _JSON, state.headers, still_true=lambda: self._state is state)


def _not_ours() -> Reply:
    return Reply(400, "this is not the seed of that key")


def _refusal(state: _Suspended) -> str:
    return f"this seed no longer vouches for its weights: {state.reason}"


def _tls(credentials: Credentials) -> Tls | None:
    options = credentials.options
    if options.seed_tls == "off":
        return None
    return Tls(
        credentials.needed_server_context,
        plain_too=options.seed_tls == "prefer",
        wants_certificate=bool(options.client_ca_file),
    )
