"""GET calls to the services of workers, over http or https as ``rfork_seed_tls`` says."""

from __future__ import annotations

import time
from collections.abc import Mapping

from vllm_rfork.errors import SeedError
from vllm_rfork.net.client import Answer, BoundedHttp, Sink
from vllm_rfork.net.credentials import Credentials
from vllm_rfork.net.tls_errors import speaks_no_tls


class SeedHttp:
    """Client of such services.

    Args:
        service: name of the other side in messages.
        credentials: its token is sent. With ``seed_tls`` ``off``, calls use http; with ``require``, https; with
            ``prefer``, https and then http if the other side does not support TLS.
        certified_name: name that its certificate must contain, unless ``seed_name`` is set; empty: its address.
    """

    def __init__(self, service: str, credentials: Credentials, *, certified_name: str = "") -> None:
        self._tls = credentials.options.seed_tls
        self._certified_name = credentials.options.seed_name or certified_name
        self._http = BoundedHttp(service, SeedError, credentials)

    async def get(
        self,
        authority: str,
        path: str,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
        max_body_nbytes: int = 0,
        sink: Sink | None = None,
    ) -> Answer:
        """The answer of ``authority`` (``host:port``), whatever the status; ``sink`` gets the body of a 200 in pieces.

        Raises:
            SeedError: no answer within ``timeout_s`` seconds, or a body larger than ``max_body_nbytes``.
        """
        deadline = time.monotonic() + timeout_s

        async def get(tls: bool) -> Answer:
            return await self._http.exchange(
                "GET",
                f"{'https' if tls else 'http'}://{authority}{path}",
                headers=headers,
                params=params,
                timeout_s=max(0.0, deadline - time.monotonic()),
                max_body_nbytes=max_body_nbytes,
                sink=sink,
                certified_name=self._certified_name if tls else "",
            )

        try:
            return await get(self._tls != "off")
        except SeedError as error:
            if self._tls != "prefer" or not speaks_no_tls(error.__cause__):
                raise
        return await get(False)
