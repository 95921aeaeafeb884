"""A receiver's calls to the HTTP services of seeds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from vllm_rfork import messages
from vllm_rfork.clients.seed_http import SeedHttp
from vllm_rfork.errors import SeedError
from vllm_rfork.logs.quoting import printable
from vllm_rfork.manifest.codec import MAX_MANIFEST_NBYTES, decode_manifest
from vllm_rfork.manifest.facts import MAX_FACTS, MAX_NAME, MAX_VALUE
from vllm_rfork.manifest.schema import MANIFEST_VERSION, Manifest
from vllm_rfork.messages import SeedAddress
from vllm_rfork.net.client import Answer
from vllm_rfork.net.credentials import Credentials, Options

_MAX_SMALL_NBYTES = 64 * 1024
#: ``facts.MAX_FACTS`` names and values, with room for JSON's escapes.
MAX_FACTS_NBYTES = 2 * 1024 * 1024


class _Epoch(msgspec.Struct):
    epoch: str


class SeedIdentity(NamedTuple):
    """The fingerprint of a seed's worker, and the seed's epoch."""

    fingerprint: str
    epoch: str


class SeedClient:
    """Client of the HTTP services of all seeds.

    Args:
        request_timeout_s: bound of every call in seconds, from name resolution to the last byte.
        token: sent as ``Authorization: Bearer``.
        credentials: token and TLS, instead of ``token``; see :class:`~vllm_rfork.clients.seed_http.SeedHttp`.
        certified_name: name that a seed's certificate must contain, unless ``seed_name`` is set; empty: its address.
    """

    def __init__(
        self,
        *,
        request_timeout_s: float = 10.0,
        token: str | None = None,
        credentials: Credentials | None = None,
        certified_name: str = "",
    ) -> None:
        self.request_timeout_s = request_timeout_s
        credentials = credentials or Credentials(Options(token=token or ""))
        self._http = SeedHttp("seed", credentials, certified_name=certified_name)

    async def manifest(self, address: SeedAddress, seed_key: str, fingerprint: str) -> Manifest:
        """The seed's validated manifest, of ``seed_key`` and ``fingerprint``.

        Raises:
            SeedError: the seed is gone, hangs, has another key or fingerprint, is a legacy seed without a manifest, or
                its manifest is malformed or larger than ``MAX_MANIFEST_NBYTES``.
        """
        answer = await self._get(
            address,
            messages.SEED_MANIFEST,
            seed_key,
            headers={messages.FINGERPRINT: messages.encode_text(fingerprint)} if fingerprint else {},
            params={messages.MANIFEST_VERSION_PARAM: str(MANIFEST_VERSION)},
            max_body_nbytes=MAX_MANIFEST_NBYTES,
        )
        if answer.status == 404:
            raise SeedError(
                f"seed {address} has no {messages.SEED_MANIFEST}: it is a legacy seed, whose metadata is not "
                f"enough to verify the weights; it answered {answer}"
            )
        if answer.status != 200:
            raise SeedError(
                f"seed {address} refused its manifest: {answer}",
                other_fingerprint=_other_fingerprint(answer, fingerprint),
            )
        manifest = decode_manifest(answer.body)
        if manifest.seed_key != seed_key:
            raise SeedError(f"seed {address} has key {manifest.seed_key[:200]!r}, not {seed_key!r}")
        if manifest.fingerprint != fingerprint:
            raise SeedError(
                f"seed {address} has fingerprint {manifest.fingerprint[:80]!r}, this receiver {fingerprint!r}: "
                "versions, dtype, quantization, sizes or layout differ",
                other_fingerprint=manifest.fingerprint,
            )
        return manifest

    async def confirm_epoch(self, address: SeedAddress, seed_key: str, epoch: str) -> None:
        """Check that the seed is still in ``epoch``: before the first byte is read, and after the last.

        Raises:
            SeedError: unreachable, withdrawn, or in another epoch.
        """
        answer = await self._get(address, messages.SEED_EPOCH, seed_key, max_body_nbytes=_MAX_SMALL_NBYTES)
        if answer.status != 200:
            raise SeedError(f"seed {address} is suspended: {answer}")
        try:
            current = msgspec.json.decode(answer.body, type=_Epoch).epoch
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise SeedError(f"seed {address} sent an unusable answer to {messages.SEED_EPOCH}: {error}") from error
        if current != epoch:
            raise SeedError(f"seed {address} is in epoch {current[:80]!r}, but its manifest was of epoch {epoch!r}")

    async def identify(self, address: SeedAddress, seed_key: str) -> SeedIdentity:
        """Fingerprint and epoch of the seed at ``address``.

        Raises:
            SeedError: unreachable, suspended, of another key, or it sends no usable identity.
        """
        answer = await self._get(address, messages.SEED_EPOCH, seed_key, max_body_nbytes=_MAX_SMALL_NBYTES)
        if answer.status != 200:
            raise SeedError(f"seed {address}: {messages.SEED_EPOCH} answered {answer}")
        try:
            stated = messages.required(answer.headers, messages.FINGERPRINT)
            return SeedIdentity(messages.decode_text(stated), msgspec.json.decode(answer.body, type=_Epoch).epoch)
        except (messages.BadMessage, msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise SeedError(f"seed {address} sent an unusable answer to {messages.SEED_EPOCH}: {error}") from error

    async def facts(self, address: SeedAddress, seed_key: str) -> dict[str, str]:
        """The facts behind the seed's fingerprint, for the log: path → short, printable text.

        Raises:
            SeedError: no usable answer in time; a seed that is older than this call answers 404.
        """
        answer = await self._get(address, messages.SEED_FACTS, seed_key, max_body_nbytes=MAX_FACTS_NBYTES)
        if answer.status != 200:
            raise SeedError(f"seed {address}: {messages.SEED_FACTS} answered {answer}")
        try:
            facts = msgspec.json.decode(answer.body, type=dict[str, str])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise SeedError(f"seed {address} sent an unusable answer to {messages.SEED_FACTS}: {error}") from error
        bounded = itertools.islice(facts.items(), MAX_FACTS)
        return {printable(name, MAX_NAME): printable(value, MAX_VALUE) for name, value in bounded}

    async def healthy(self, address: SeedAddress, seed_key: str) -> bool:
        """Check if the service at ``address`` is the seed of ``seed_key``.

        Raises:
            SeedError: no answer in time, or neither 200 (it is) nor 400 (it is not).
        """
        answer = await self._get(address, messages.SEED_HEALTH, seed_key)
        if answer.status not in (200, 400):
            raise SeedError(f"seed {address}: {messages.SEED_HEALTH} answered {answer}")
        return answer.status == 200

    async def _get(
        self,
        address: SeedAddress,
        path: str,
        seed_key: str,
        *,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
        max_body_nbytes: int = 0,
    ) -> Answer:
        return await self._http.get(
            address.base_url.removeprefix("http://"),
            path,
            headers=headers,
            params={messages.SEED_KEY_PARAM: seed_key, **(params or {})},
            timeout_s=self.request_timeout_s,
            max_body_nbytes=max_body_nbytes,
        )


def _other_fingerprint(answer: Answer, fingerprint: str) -> str:
    """The seed's fingerprint from a refusal because of it; empty for any other refusal."""
    stated = messages.header(answer.headers, messages.FINGERPRINT)
    if answer.status != 409 or stated is None:
        return ""
    try:
        its = messages.decode_text(stated)
    except messages.BadMessage:
        return ""
    return "" if its == fingerprint else its
