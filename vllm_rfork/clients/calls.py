"""The way of one call to a planner: which address, which spelling of header names, how long, how often.

A planner may have several addresses, its replicas. The one that answered last is tried first. A replica that cannot be
reached, or that answers 503 because another one leads, is followed by the next; all of them share the call's bound.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from vllm_rfork import messages
from vllm_rfork.clients.answers import retry_after_s
from vllm_rfork.errors import PlannerError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.messages import SeedAddress, metering
from vllm_rfork.net.client import Answer, BoundedHttp, was_sent
from vllm_rfork.net.credentials import Credentials, Options

logger = worker_logger(__name__)

#: Longest JSON answer (``/healthz``, ``/debug/snapshot``) in bytes; 50,000 seeds take about 20 MB.
MAX_JSON_NBYTES = 64 * 1024 * 1024
#: Statuses of a proxy whose planner was gone before it could answer.
_FROM_A_PROXY = frozenset({502, 504})
#: Statuses on which the next address is tried: a replica that does not lead answers 503.
_ELSEWHERE = _FROM_A_PROXY | {503}
#: Statuses on which a call that changes something is repeated after a pause, besides 5xx.
_RETRIED = frozenset({408, 429})


class PlannerCalls:
    """Base of the planner's clients; safe for several calls at once, on any event loop.

    Args:
        urls: one base URL, such as ``http://planner:1223``, or several, separated by commas. Each may have a path.
        request_timeout_s: bound of every call in seconds, from name resolution to the last byte, whatever the number
            of addresses.
        token: sent as ``Authorization: Bearer``.
        credentials: token and TLS, instead of ``token``.
        model, strategy: behind the seed key, for the planner's metrics.
        sleep: waits between retries; replaced in tests, as are ``clock`` and ``jitter`` (a number from 0 to 1).
    """

    def __init__(
        self,
        urls: str,
        *,
        request_timeout_s: float = 10.0,
        token: str | None = None,
        credentials: Credentials | None = None,
        model: str = "",
        strategy: str = "",
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.urls = tuple(url.strip().rstrip("/") for url in urls.split(","))
        self.request_timeout_s = request_timeout_s
        self._http = BoundedHttp("planner", PlannerError, credentials or Credentials(Options(token=token or "")))
        self._names = metering.names(model, strategy)
        self._sleep = sleep
        self._clock = clock
        self._jitter = jitter
        self._preferred = 0
        self._hyphens: set[str] = set()

    async def call(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        deadline: float | None = None,
        *,
        held_s: float = 0.0,
        repeatable: bool = True,
        repeat_headers: Mapping[str, str] | None = None,
        unanswered: Callable[[], object] = lambda: None,
        connect_timeout_s: float | None = None,
        params: Mapping[str, str] | None = None,
        max_body_nbytes: int = 0,
    ) -> Answer:
        """The answer of the first address that has one; a 503 if none has another.

        Args:
            deadline: of all attempts, by ``clock``; by default ``request_timeout_s`` from now.
            held_s: how long the planner may hold the call before it answers.
            repeatable: the call may be sent to the next address although it may have arrived at this one.
            repeat_headers: added to such a repetition.
            unanswered: called when an attempt may have arrived and has no answer of the planner's.

        Raises:
            PlannerError: no answer; its cause is that of an attempt that may have arrived, if there was one.
        """
        deadline = deadline or self._deadline()
        request = _Request(method, path, headers, params, connect_timeout_s, max_body_nbytes)
        failures: list[Answer | PlannerError] = []
        first, count = self._preferred, len(self.urls)
        for attempt in range(count):
            number = (first + attempt) % count
            left_s = deadline - self._clock()
            share_s = min(left_s, held_s + max(left_s - held_s, 0.0) / (count - attempt))
            result = await self._attempt(self.urls[number], request, share_s)
            if isinstance(result, Answer) and result.status not in _ELSEWHERE:
                self._preferred = number
                return result
            failures.append(result)
            if _may_have_arrived(result):
                unanswered()
                if not repeatable:
                    self._preferred = (number + 1) % count
                    return _best([result])
                request = replace(request, headers={**request.headers, **(repeat_headers or {})})
        return _best(failures)

    async def _attempt(self, url: str, request: _Request, timeout_s: float) -> Answer | PlannerError:
        try:
            return await self._in_either_spelling(url, request, self._clock() + timeout_s)
        except PlannerError as error:
            return error

    async def _in_either_spelling(self, url: str, request: _Request, deadline: float) -> Answer:
        """One exchange; after a 400 a second one with the other spelling of the header names.

        A proxy such as nginx drops names with underscores, and the planner then misses a header. The spelling that
        worked is kept for later calls.
        """
        hyphens = url in self._hyphens
        answer = await self._exchange(url, request, deadline, hyphens=hyphens)
        if answer.status != 400 or not any("_" in name for name in request.headers):
            return answer
        other = await self._exchange(url, request, deadline, hyphens=not hyphens)
        if other.status == 400:
            return answer
        logger.info("planner %s needs header names with %s", other.url, "underscores" if hyphens else "hyphens")
        self._hyphens ^= {url}
        return other

    async def _exchange(self, url: str, request: _Request, deadline: float, *, hyphens: bool) -> Answer:
        for name, value in request.headers.items():
            if len(value) > messages.MAX_HEADER_LENGTH:
                raise PlannerError(
                    f"header {name} would be {len(value)} characters long, more than {messages.MAX_HEADER_LENGTH}"
                )
        return await self._http.exchange(
            request.method,
            url + request.path,
            headers={name.replace("_", "-") if hyphens else name: text for name, text in request.headers.items()},
            timeout_s=deadline - self._clock(),
            params=request.params,
            max_body_nbytes=request.max_body_nbytes,
            connect_timeout_s=request.connect_timeout_s,
        )

    async def _retried(
        self, path: str, headers: Mapping[str, str], pauses_s: Sequence[float], *, deadline: float | None
    ) -> Answer:
        """POST, repeated after each pause while the planner is away or overloaded; the last attempt's result."""
        for pause_s in pauses_s:
            try:
                answer = await self.call("POST", path, headers, deadline)
            except PlannerError as error:
                logger.debug("%s; trying again in %g s", error, pause_s)
            else:
                if answer.status not in _RETRIED and answer.status < 500:
                    return answer
            if deadline is not None and self._clock() + pause_s >= deadline:
                break
            await self._sleep(pause_s)
        return await self.call("POST", path, headers, deadline)

    def _deadline(self) -> float:
        return self._clock() + self.request_timeout_s


def given(name: str, value: str) -> dict[str, str]:
    """The header, or none for an empty value: legacy planners expect absent headers."""
    return {name: messages.encode_text(value)} if value else {}


def key_headers(seed_key: str, fingerprint: str) -> dict[str, str]:
    """The headers that name a key and a fingerprint."""
    return {messages.SEED_KEY: messages.encode_text(seed_key), **given(messages.FINGERPRINT, fingerprint)}


def seed_headers(
    seed_key: str, seed: SeedAddress, *, fingerprint: str = "", labels: str = "", epoch: str = ""
) -> dict[str, str]:
    """The headers with which a seed describes itself."""
    return {
        **key_headers(seed_key, fingerprint),
        **seed.headers(),
        messages.SEED_REFCNT: "0",
        **given(messages.LABELS, labels),
        **given(messages.EPOCH, epoch),
    }


@dataclass(frozen=True)
class _Request:
    """A request, which may be sent to several addresses in turn."""

    method: str
    path: str
    headers: Mapping[str, str]
    params: Mapping[str, str] | None
    connect_timeout_s: float | None
    max_body_nbytes: int


def _may_have_arrived(result: Answer | PlannerError) -> bool:
    return result.status in _FROM_A_PROXY if isinstance(result, Answer) else was_sent(result)


def _best(failures: Sequence[Answer | PlannerError]) -> Answer:
    """The answer with the shortest ``Retry-After``. Raises one PlannerError for all addresses if none answered."""
    if answers := [each for each in failures if isinstance(each, Answer)]:
        return min(answers, key=lambda answer: retry_after_s(answer) or float("inf"))
    errors = [each for each in failures if isinstance(each, PlannerError)]
    if len(errors) == 1:
        raise errors[0]
    cause = next((each for each in errors if was_sent(each)), errors[-1]).__cause__
    raise PlannerError("no address of the planner answered: " + "; ".join(map(str, errors))) from cause
