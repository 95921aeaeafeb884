"""The planner's HTTP calls: the route, the token and the answer of every request.

Each call is one method of ``protocol_calls``, ``operator_calls`` or ``operating_calls``. aiohttp's own router with
middlewares costs more for each request than this table; ``docs/benchmarks.md`` has the numbers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from vllm_rfork import messages
from vllm_rfork.messages import header
from vllm_rfork.planner.http.auth import AddressCheck, Tokens, Trust
from vllm_rfork.planner.http.operating_calls import OperatingCalls
from vllm_rfork.planner.http.operator_calls import OperatorCalls
from vllm_rfork.planner.http.presence import Presence
from vllm_rfork.planner.http.protocol_calls import ProtocolCalls
from vllm_rfork.planner.http.refused import Refused, refusal
from vllm_rfork.planner.metrics import Metrics
from vllm_rfork.planner.settings import Settings
from vllm_rfork.planner.store.base import Store
from vllm_rfork.planner.store.errors import LimitReached
from vllm_rfork.planner.wait_queue import WaitQueue

logger = logging.getLogger(__name__)

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

#: Calls without a token: probes have none, and a browser has none before the page asked for it.
OPEN_PATHS = frozenset({messages.HEALTHZ, messages.READYZ, messages.DASHBOARD})


class Api:
    """All calls over one store. :meth:`handle` is what the server runs for every request."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        *,
        queue: WaitQueue,
        presence: Presence,
        metrics: Metrics,
        tokens: Tokens,
    ) -> None:
        self._metrics = metrics
        self._tokens = tokens
        self._may_wait_by_default = settings.seed_wait_sec > 0
        #: set by the owner once the planner accepts requests, and cleared when it drains
        self.ready = False
        addresses = AddressCheck(_trust(settings, tokens))
        calls = ProtocolCalls(settings, store, queue=queue, presence=presence, metrics=metrics, addresses=addresses)
        orders = OperatorCalls(settings, store, metrics=metrics, tokens=tokens)
        self.operating = operating = OperatingCalls(
            settings,
            store,
            metrics=metrics,
            is_ready=lambda: self.ready,
            load=lambda: (len(queue), len(presence)),
            takes_orders=lambda: tokens.required,
        )
        self.routes: dict[str, dict[str, Handler]] = {
            messages.ADD_SEED: {"POST": calls.add_seed},
            messages.GET_SEED: {"GET": calls.get_seed},
            messages.FIND_SEED: {"GET": calls.find_seed},
            messages.PUT_SEED: {"POST": calls.put_seed},
            messages.RENEW_SEED_LEASE: {"POST": calls.renew_seed_lease},
            messages.REMOVE_SEED: {"POST": calls.remove_seed},
            messages.ADD_INTENT: {"POST": calls.intent},
            messages.PRESENCE: {"POST": calls.presence},
            messages.DRAIN: {"POST": orders.drain},
            messages.LIFT: {"POST": orders.lift},
            messages.HEALTHZ: {"GET": operating.healthz},
            messages.READYZ: {"GET": operating.readyz},
            messages.METRICS: {"GET": operating.metrics},
            messages.DEBUG_SNAPSHOT: {"GET": operating.snapshot},
            messages.OPENAPI: {"GET": operating.openapi},
            messages.DASHBOARD: {"GET": operating.dashboard},
            messages.DASHBOARD_DATA: {"GET": operating.dashboard_data},
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Find the call, check the token, run it, and turn what it raises into an answer."""
        started_at = time.perf_counter()
        path = request.path
        try:
            response = await self._call(request, path)(request)
        except Exception as error:
            refused = refusal(error)
            if refused is None:
                logger.exception("%s %s failed", request.method, path)  # a known path: no text of the caller's
                refused = web.Response(status=500, text="the planner failed; see its log\n")
            elif isinstance(error, LimitReached):
                self._metrics.refused("limit")
            response = refused
        duration_s = None if self._may_have_waited(request, path) else time.perf_counter() - started_at
        self._metrics.request(path if path in self.routes else "unknown", response.status, duration_s)
        return response

    def _call(self, request: web.BaseRequest, path: str) -> Handler:
        """Return the call that ``request`` may make. Raises :class:`Refused`."""
        methods = self.routes.get(path)
        if methods is None:
            raise Refused(404, f"no such call: {path[:200]!r}")
        call = methods.get("GET" if request.method == "HEAD" else request.method)
        # HEAD is GET without the body, which aiohttp omits. get_seed changes the state, so it has no HEAD: nobody would
        # release the lease.
        if call is None or (request.method == "HEAD" and path == messages.GET_SEED):
            allowed = ", ".join([*methods, "HEAD"] if "GET" in methods and path != messages.GET_SEED else methods)
            raise Refused(405, f"{path} accepts {allowed}", {"Allow": allowed})
        if path not in OPEN_PATHS and not self._tokens.admit(request.headers.get("Authorization")):
            self._metrics.refused("token")
            raise Refused(401, "a valid bearer token is required", {"WWW-Authenticate": 'Bearer realm="rfork"'})
        return call

    def _may_have_waited(self, request: web.BaseRequest, path: str) -> bool:
        if path == messages.PRESENCE:
            return True
        return path == messages.GET_SEED and (
            self._may_wait_by_default
            or header(request.headers, messages.WAIT_SEC) is not None
            or header(request.headers, messages.TICKET) is not None
        )


def _trust(settings: Settings, tokens: Tokens) -> Trust:
    """Return which callers may announce other addresses than their own."""
    if settings.trust_announced_address:
        return Trust.ANYBODY
    return Trust.MEMBERS if tokens.required and not settings.check_announced_address else Trust.OWN_ADDRESS
