"""The calls by which operators change the fleet: drain a seed, and lift a quarantine.

They need a token, also where every other call is open: without one, any caller could take all seeds away.
"""

from __future__ import annotations

from aiohttp import web

from vllm_rfork import messages
from vllm_rfork.messages import BadMessage, header
from vllm_rfork.planner.http import request_headers as read
from vllm_rfork.planner.http import valid_json
from vllm_rfork.planner.http.auth import Tokens
from vllm_rfork.planner.http.refused import Refused
from vllm_rfork.planner.metrics import Metrics
from vllm_rfork.planner.settings import Settings
from vllm_rfork.planner.store.base import Store


class OperatorCalls:
    """Answers operators. The caller has checked the token, if the planner has one."""

    def __init__(self, settings: Settings, store: Store, *, metrics: Metrics, tokens: Tokens) -> None:
        self._settings = settings
        self._store = store
        self._metrics = metrics
        self._tokens = tokens

    async def drain(self, request: web.BaseRequest) -> web.Response:
        """Drain a seed, or undo that."""
        self._need_token(request)
        key = read.seed_key(request.headers, self._settings.max_key_length)
        seed = read.seed_address(request.headers)
        undo = header(request.headers, messages.UNDO) or "0"
        if undo not in ("0", "1"):
            raise BadMessage(f"header {messages.UNDO} must be 0 or 1, got {undo[:80]!r}")
        leases = await self._store.drain(key, seed, undo=undo == "1")
        return _json({"seed": str(seed), "draining": undo != "1", "leases": leases})

    async def lift(self, request: web.BaseRequest) -> web.Response:
        """End the quarantine of a seed."""
        self._need_token(request)
        key = read.seed_key(request.headers, self._settings.max_key_length)
        seed = read.seed_address(request.headers)
        return _json({"seed": str(seed), "was_quarantined": await self._store.lift(key, seed)})

    def _need_token(self, request: web.BaseRequest) -> None:
        """Raise :class:`Refused` if this planner has no token."""
        if not self._tokens.required:
            self._metrics.refused("token")
            raise Refused(
                403,
                f"{request.path} needs a token, and this planner has none: start it with --token-file or RFORK_TOKEN",
            )


def _json(data: object) -> web.Response:
    return web.Response(body=valid_json.encode(data), content_type="application/json")
