"""A receiver's calls for the caches of seeds."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_rfork import messages
from vllm_rfork.caches import bounds
from vllm_rfork.caches.manifest import LEVELS, Artifact, Offer, decode_offer
from vllm_rfork.clients.seed_http import SeedHttp
from vllm_rfork.errors import CacheError, SeedBusy, SeedError
from vllm_rfork.messages import SeedAddress
from vllm_rfork.net.client import Answer, Sink
from vllm_rfork.net.credentials import Credentials


class SeedCaches:
    """Client for the caches of all seeds.

    Args:
        request_timeout_s: bound of the call for the list in seconds.
        credentials: token and TLS. Without those that :meth:`Credentials.code_obstacle` demands, caches of code are
            neither listed nor fetched.
    """

    def __init__(self, *, request_timeout_s: float = 10.0, credentials: Credentials | None = None) -> None:
        self.request_timeout_s = request_timeout_s
        self._credentials = credentials or Credentials()
        self._http = SeedHttp("seed", self._credentials)

    async def offer(self, address: SeedAddress, seed_key: str) -> Offer | None:
        """The seed's list, of the kinds that this worker may take.

        None: the seed has not collected its caches yet; ask again after :data:`messages.CACHES_PAUSE_S` seconds. The
        list of a seed without this call is empty.

        Raises:
            SeedError: the seed is gone, hangs, or refuses.
            CacheError: the list is malformed or larger than the bounds.
        """
        answer = await self._get(address, messages.SEED_CACHES, seed_key, max_body_nbytes=bounds.MAX_MANIFEST_NBYTES)
        if answer.status == 404:
            return Offer(())
        if answer.status != 200:
            raise SeedError(f"seed {address} refused its list of caches: {answer}")
        offer = decode_offer(answer.body)
        if not offer.artifacts and "Retry-After" in answer.headers:
            return None
        if self._credentials.code_obstacle() is None:
            return offer
        return Offer(tuple(each for each in offer.artifacts if LEVELS[each.kind] == "safe"), offer.details)

    async def fetch(
        self,
        address: SeedAddress,
        seed_key: str,
        artifact: Artifact,
        sink: Sink,
        *,
        timeout_s: float,
    ) -> None:
        """Pass all bytes of ``artifact`` to ``sink``, such as ``Staged.write``, on this event loop.

        The loop must be one on which a disk may be waited for. What arrives is compared with the artifact by the sink.

        Raises:
            SeedBusy: the seed sends other artifacts; ask again.
            SeedError: the seed is gone or too slow, no longer has the artifact, sends another number of bytes, or
                breaks off.
            CacheError: bytes of this kind must not be taken with these credentials; or raised by ``sink``.
        """
        if LEVELS.get(artifact.kind) != "safe" and (obstacle := self._credentials.code_obstacle()) is not None:
            raise CacheError(f"{artifact} is code, and is not taken: {obstacle}")
        received_nbytes = 0

        def counted(piece: bytes) -> None:
            nonlocal received_nbytes
            received_nbytes += len(piece)
            sink(piece)

        answer = await self._get(
            address,
            messages.SEED_CACHE,
            seed_key,
            params={messages.CACHE_KIND_PARAM: artifact.kind, messages.CACHE_NAME_PARAM: artifact.name},
            timeout_s=timeout_s,
            max_body_nbytes=artifact.nbytes,
            sink=counted,
        )
        if answer.status != 200:
            refusal = SeedBusy if answer.status == 503 else SeedError
            raise refusal(f"seed {address} refused {artifact}: {answer}")
        if received_nbytes != artifact.nbytes:
            raise SeedError(f"seed {address} sent {received_nbytes} of the {artifact.nbytes} bytes of {artifact}")

    async def _get(
        self,
        address: SeedAddress,
        path: str,
        seed_key: str,
        *,
        params: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        max_body_nbytes: int,
        sink: Sink | None = None,
    ) -> Answer:
        return await self._http.get(
            address.base_url.removeprefix("http://"),
            path,
            params={messages.SEED_KEY_PARAM: seed_key, **(params or {})},
            timeout_s=self.request_timeout_s if timeout_s is None else timeout_s,
            max_body_nbytes=max_body_nbytes,
            sink=sink,
        )
