"""A receiver's calls to the planner: a lease is acquired, renewed and released."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vllm_rfork import messages
from vllm_rfork.clients.answers import Outcome, miss, outcome, refusal, retry_after_s
from vllm_rfork.clients.calls import PlannerCalls, given, key_headers
from vllm_rfork.errors import PlannerError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.messages import BadMessage, Lease, SeedAddress, Waiting
from vllm_rfork.net.client import Answer, broke_off, went_away

logger = worker_logger(__name__)

#: Seeds named in one ``RFORK-EXCLUDE``; planners may refuse a call that names more than 256.
MAX_EXCLUDED = 64
#: Pauses in seconds before each further attempt to release a lease: a planner's restart fits in between.
RELEASE_PAUSES_S = (0.5, 1.0, 2.0, 4.0)
#: Seconds between two attempts to reach a planner that is away while a receiver waits.
RETURN_PAUSE_S = 1.0
#: Answers to ``find_seed`` of planners without such a seed or without the call.
_NOT_FOUND = (404, 405, 501, 400)


class ReceiverCalls(PlannerCalls):
    """Acquires, renews and releases leases."""

    async def acquire(
        self,
        seed_key: str,
        *,
        fingerprint: str = "",
        wait_s: float = 0.0,
        exclude: Sequence[SeedAddress] = (),
        intent: str = "",
        labels: str = "",
    ) -> Lease:
        """Acquire a lease on a seed of ``seed_key``.

        Args:
            fingerprint: pairs only with a seed that announced the same one, or none.
            wait_s: how long the planner may hold the call until a seed is free, in seconds.
            exclude: seeds that just failed this receiver, the latest last. Only the latest are sent: at most
                ``MAX_EXCLUDED``, and as many as fit into a header.
            intent: id of this loading worker, which the planner remembers if it has no seed.
            labels: this receiver's topology, ``host=a,rack=b``.

        The call is repeated, within its bound, when the planner answers 503 or 429 with ``Retry-After`` (it starts,
        drains, or has lost its state's server for a moment). A receiver that waits also repeats it when the planner
        goes away, for at most ``request_timeout_s`` without any answer.

        Raises:
            NoSeedAvailable: the planner has none (404).
            PlannerError: no usable answer within ``request_timeout_s + wait_s`` seconds.
        """
        wait_s = max(wait_s, 0.0)
        headers = {**self._names, **_question(seed_key, fingerprint, exclude, intent, labels)}
        deadline = self._clock() + self.request_timeout_s + wait_s
        answer = await self._acquired(
            headers, deadline, wait_s if wait_s > 0 else None, patient=wait_s > 0, held_s=wait_s
        )
        return await self._lease(seed_key, answer, deadline)

    async def ask(
        self,
        seed_key: str,
        ticket: str,
        *,
        fingerprint: str = "",
        wait_s: float | None = None,
        in_queue: bool = False,
        exclude: Sequence[SeedAddress] = (),
        intent: str = "",
        labels: str = "",
    ) -> Lease | Waiting:
        """As :meth:`acquire`, with a ticket: a planner that knows tickets queues the caller.

        It holds the call for at most :data:`messages.SLICE_S` seconds, the first one not at all, and answers with a
        :class:`Waiting`: call again at once, with the same ticket. A legacy planner answers as to :meth:`acquire`. A
        call whose connection breaks is repeated once: a ticket is good for one lease.

        Args:
            ticket: unique and unguessable; one for each question.
            wait_s: the longest wait, or the rest of it, in seconds; None: the planner decides.
            in_queue: the last answer to this ticket was a :class:`Waiting`.

        Raises:
            NoSeedAvailable, PlannerError: as :meth:`acquire`.
        """
        headers = {**self._names, **_question(seed_key, fingerprint, exclude, intent, labels)}
        headers[messages.TICKET] = messages.encode_text(ticket)
        longest_s = max(wait_s or 0.0, messages.SLICE_S if in_queue else 0.0)
        deadline = self._clock() + self.request_timeout_s + longest_s
        held_s = messages.SLICE_S if in_queue else 0.0
        answer = await self._acquired(headers, deadline, wait_s, patient=longest_s > 0, held_s=held_s, has_ticket=True)
        waiting = messages.header(answer.headers, messages.WAITING)
        if answer.status != 404 or waiting is None:
            return await self._lease(seed_key, answer, deadline, quote=in_queue)
        try:
            return messages.parse_waiting(waiting)
        except BadMessage as error:
            raise _unusable(answer, error) from error

    async def find_seed(self, seed_key: str) -> SeedAddress | None:
        """One serving seed of ``seed_key``, without a lease: its caches may be read, its weights may not.

        None: the planner has none, or does not have this call.

        Raises:
            PlannerError: no usable answer within ``request_timeout_s``.
        """
        answer = await self.call("GET", messages.FIND_SEED, key_headers(seed_key, ""))
        if answer.status in _NOT_FOUND:
            return None
        if answer.status != 200:
            raise refusal(answer)
        try:
            return messages.seed_address(answer.headers)
        except BadMessage as error:
            raise _unusable(answer, error) from error

    async def renew(self, lease: Lease) -> Outcome:
        """Renew ``lease`` for another TTL. ``UNKNOWN`` (400, 404, 405): it is gone, or the planner renews none.

        Raises:
            PlannerError: no answer in time, or another refusal.
        """
        answer = await self.call("POST", messages.RENEW_SEED_LEASE, lease.headers())
        return outcome(answer, unknown=(400, 404, 405))

    async def renews_leases(self) -> bool:
        """Check if the planner has a call for renewal, by a harmless GET on it.

        Raises:
            PlannerError: no answer in time.
        """
        return (await self.call("GET", messages.RENEW_SEED_LEASE, {})).status != 404

    async def release(
        self,
        lease: Lease,
        *,
        result: str = "",
        nbytes: int = 0,
        seconds: float = 0.0,
        cause: str = "",
        side: str = "",
        lane: str = "",
    ) -> Outcome:
        """Release ``lease``; ``UNKNOWN`` if it was gone already (404, and 400 from one production planner).

        Retries 408, 429, 5xx and network errors, so it may take ``len(RELEASE_PAUSES_S) + 1`` times
        ``request_timeout_s`` and the pauses: run it in the background.

        Args:
            result: ``messages.RESULT_OK`` or ``RESULT_FAILED``.
            nbytes, seconds: bytes read, and the time it took.
            cause: name of the error class that ended the fork.
            side: whose failure it was, one of ``messages.SIDES``.
            lane: engine and lane that the bytes took.

        Raises:
            PlannerError: all attempts failed; a lease with a TTL then ends by itself.
        """
        headers = lease.headers()
        if result:
            headers |= {
                messages.RESULT: result,
                messages.NBYTES: str(nbytes),
                messages.SECONDS: messages.seconds_text(seconds),
                **given(messages.CAUSE, cause),
                **given(messages.SIDE, side),
                **given(messages.LANE, lane),
            }
        answer = await self._retried(messages.PUT_SEED, headers, RELEASE_PAUSES_S, deadline=None)
        return outcome(answer, unknown=(400, 404))

    async def _acquired(
        self,
        headers: Mapping[str, str],
        deadline: float,
        wait_s: float | None,
        *,
        patient: bool,
        held_s: float,
        has_ticket: bool = False,
    ) -> Answer:
        """The answer to ``get_seed``, repeated while the planner is away for a moment; see :meth:`acquire`.

        Args:
            wait_s: the wait that the header states, less the time that has passed; None: no header.
            patient: repeat the call also if the planner cannot be reached.
            held_s: how long a planner with several addresses may hold the call.
            has_ticket: sending the call twice takes one lease.
        """
        started_at = now = self._clock()
        away_since = math.inf
        may_break_off = has_ticket
        while True:
            waiting: dict[str, str] = {}
            left_s = 0.0 if wait_s is None else started_at + wait_s - now
            if left_s > 0 or (wait_s is not None and may_break_off):
                waiting = {messages.WAIT_SEC: messages.seconds_text(max(left_s, 0.0))}
            try:
                answer = await self.call(
                    "GET", messages.GET_SEED, {**headers, **waiting}, deadline, held_s=held_s, repeatable=has_ticket
                )
            except PlannerError as error:
                if may_break_off and broke_off(error):
                    may_break_off = False
                    continue
                if not (patient and went_away(error)):
                    raise
                away_since = min(away_since, self._clock())
                problem, pause_s = error, RETURN_PAUSE_S
                over = min(deadline, away_since + self.request_timeout_s)
            else:
                asked_s = retry_after_s(answer)
                if asked_s is None:
                    return answer
                patient, away_since = True, math.inf
                problem, pause_s, over = refusal(answer), asked_s, deadline
            # Spread out: receivers that were refused together must not return together.
            pause_s *= 1 + self._jitter() / 2
            if self._clock() + pause_s >= over:
                raise problem
            logger.info("%s; asking again in %.1f s", problem, pause_s)
            await self._sleep(pause_s)
            now = self._clock()

    async def _lease(self, seed_key: str, answer: Answer, deadline: float, *, quote: bool = False) -> Lease:
        """The lease in an answer to ``get_seed``. Raises as :meth:`acquire`."""
        if answer.status == 404:
            raise miss(seed_key, answer, quote=quote)
        if answer.status != 200:
            raise refusal(answer)
        try:
            return messages.lease_from_answer(answer.headers)
        except BadMessage as error:
            await self._give_back(answer, deadline)
            raise _unusable(answer, error) from error

    async def _give_back(self, answer: Answer, deadline: float) -> None:
        """Release the lease of an answer whose other headers are unusable, so that it does not block a seed."""
        try:
            seed = messages.seed_address(answer.headers)
            user_id = messages.required(answer.headers, messages.USER_ID)
            await self.call("POST", messages.PUT_SEED, {**seed.headers(), messages.USER_ID: user_id}, deadline)
        except (BadMessage, PlannerError) as error:
            logger.debug("The lease in an unusable answer could not be released: %s", error)


def _question(
    seed_key: str, fingerprint: str, exclude: Sequence[SeedAddress], intent: str, labels: str
) -> dict[str, str]:
    return {
        **key_headers(seed_key, fingerprint),
        **given(messages.EXCLUDE, _latest(exclude)),
        **given(messages.INTENT, intent),
        **given(messages.LABELS, labels),
    }


def _latest(seeds: Sequence[SeedAddress]) -> str:
    """The latest of ``seeds`` that fit into one header, comma-separated."""
    kept: list[str] = []
    length = 0
    for seed in reversed(seeds[-MAX_EXCLUDED:]):
        length += len(str(seed)) + 1
        if length > messages.MAX_HEADER_LENGTH:
            break
        kept.append(str(seed))
    return ",".join(reversed(kept))


def _unusable(answer: Answer, error: BadMessage) -> PlannerError:
    return PlannerError(f"planner {answer.url} sent an unusable answer: {error}")
