"""The planner's calls, as a receiver and a seed make them.

Works against every planner of the installed base: what an older one does not know is ignored by it, or answered
with 404 or 405, and reported here as an :class:`Outcome`, never as an error. Must not decide what a failure means
for the fork; must not hold a thread or a loop of its own.
"""

from __future__ import annotations

import asyncio
import enum
import math
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from vllm_rfork import messages
from vllm_rfork.errors import NoSeedAvailable, PlannerError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.messages import BadMessage, Lease, SeedAddress, Waiting
from vllm_rfork.net.client import Answer, BoundedHttp, broke_off, was_sent, went_away, without_credentials
from vllm_rfork.net.credentials import Credentials, Options

logger = worker_logger(__name__)

#: Bound of a JSON answer (``/healthz``, ``/debug/snapshot``) in bytes; 50,000 seeds take about 20 MB.
MAX_JSON_NBYTES = 64 * 1024 * 1024
#: Seeds named in one ``RFORK-EXCLUDE``; planners may refuse a call that names more than 256.
MAX_EXCLUDED = 64
#: Pauses in seconds before each further attempt to release a lease: a planner's restart fits in between.
RELEASE_PAUSES_S = (0.5, 1.0, 2.0, 4.0)
#: The same for a withdrawal, which somebody waits for.
WITHDRAW_PAUSES_S = (0.1, 0.3)

#: Bound of a presence request in seconds: planners answer within a minute.
ATTEND_TIMEOUT_S = 900.0
#: Bytes of a presence request's answer: one every 20 s, and a word.
_MAX_ATTEND_NBYTES = 4096

#: Seconds between two questions to a planner that is away while a receiver waits.
RETURN_PAUSE_S = 1.0

#: What each of ``messages.MISSES`` means, for the log.
_WHY = {
    "": "",
    "none": " (none: no seed has it yet)",
    "busy": " (busy: no seed has a free slot now)",
    "quarantined": " (quarantined: every seed failed other receivers; the planner's log lists the causes)",
    "fingerprint": " (fingerprint: the seeds of this key were built with other versions, settings or a checkpoint)",
    "excluded": " (excluded: every seed failed this worker before)",
}

_MAX_STATE_LENGTH = 256
#: A proxy answers these when the planner behind it was gone before it could answer.
_FROM_A_PROXY = (502, 504)
#: With ``Retry-After``: come back. The least pause holds for a planner that says 0.
_PATIENCE = frozenset({429, 503})
_LEAST_PAUSE_S = 0.2
_RETRIED = frozenset({408, 429})


class Attendance(enum.Enum):
    """What the planner answered a presence request."""

    #: Ask again, at once.
    AGAIN = "again"
    #: The planner does not know the seed: announce it, then ask again.
    NOT_KNOWN = "not known"
    #: The planner holds as many as it may: the seed lives by its heartbeats.
    FULL = "full"
    #: The planner has no such call.
    NO_SUCH_CALL = "no such call"


class Outcome(enum.Enum):
    """What the planner made of a call that it may decline without anything being wrong."""

    DONE = "done"
    #: The planner knows no such seed or lease, or, in the installed base, no such call.
    UNKNOWN = "unknown"
    #: ``remove_seed`` while leased: no new leases, the seed goes when the last one ends.
    DRAINING = "draining"


@dataclass(frozen=True)
class Attended:
    """How a presence request ended. ``retry_after_s`` is what the planner asks for; None where it does not."""

    answer: Attendance
    retry_after_s: float | None = None


class PlannerClient:
    """Client of one planner; safe to use for several calls at once, on any event loop.

    Args:
        base_url: such as ``http://planner:1223``; may have a path.
        request_timeout_s: bound of every call in seconds, from name resolution to the last byte.
        token: sent as ``Authorization: Bearer``.
        credentials: token and TLS, in place of ``token``.
        sleep: waits between retries; replaced in tests, as are ``clock`` and ``jitter`` (a number from 0 to 1).
    """

    def __init__(
        self,
        base_url: str,
        *,
        request_timeout_s: float = 10.0,
        token: str | None = None,
        credentials: Credentials | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._name = f"planner {without_credentials(self.base_url)}"
        self.request_timeout_s = request_timeout_s
        self._http = BoundedHttp("planner", PlannerError, credentials or Credentials(Options(token=token or "")))
        self._sleep = sleep
        self._clock = clock
        self._jitter = jitter
        self._hyphens = False
        self._states: dict[SeedAddress, str] = {}

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
        """Ask for a lease on a seed of ``seed_key``.

        Args:
            fingerprint: pairs only with a seed that announced the same one, or none.
            wait_s: let the planner hold the call for up to so many seconds until a seed is free.
            exclude: seeds that just failed this receiver, the latest last; the earliest are left out where they
                are more than ``MAX_EXCLUDED`` or do not fit into a header.
            intent: id of this loading worker: "remember that I load if you have no seed for me".
            labels: this receiver's topology, ``host=a,rack=b``.

        A planner that asks for patience (503 or 429 with ``Retry-After``: it starts, drains, or has lost its state's
        server for a moment) is asked again, and so is one that goes away under a receiver that waits: as long as the
        bound below allows, but no longer than ``request_timeout_s`` without any answer.

        Raises:
            NoSeedAvailable: the planner has none (404).
            PlannerError: no usable answer within ``request_timeout_s + wait_s`` seconds.
        """
        wait_s = max(wait_s, 0.0)
        headers = self._question(seed_key, fingerprint, exclude, intent, labels)
        deadline = self._clock() + self.request_timeout_s + wait_s
        answer = await self._acquired(headers, deadline, wait_s if wait_s > 0 else None, patient=wait_s > 0)
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
        """Ask for a lease by ``ticket``: as :meth:`acquire`, but a planner that knows tickets lets the caller wait.

        It holds the call for :data:`messages.SLICE_S` at most, the first one not at all, and answers with a
        :class:`Waiting`: ask again at once, with the same ticket. An older planner answers as it answers
        :meth:`acquire`. A call whose connection breaks is repeated, once: a ticket is good for one lease.

        Args:
            ticket: unique and unguessable; one for each question.
            wait_s: the longest wait, or what is left of it, in seconds; None leaves it to the planner.
            in_queue: the last answer to this ticket was a :class:`Waiting`.

        Raises:
            NoSeedAvailable, PlannerError: as :meth:`acquire`.
        """
        headers = self._question(seed_key, fingerprint, exclude, intent, labels)
        headers[messages.TICKET] = messages.encode_text(ticket)
        held_s = max(wait_s or 0.0, messages.SLICE_S if in_queue else 0.0)
        deadline = self._clock() + self.request_timeout_s + held_s
        answer = await self._acquired(headers, deadline, wait_s, patient=in_queue or bool(wait_s), repeatable=True)
        waiting = messages.header(answer.headers, messages.WAITING)
        if answer.status != 404 or waiting is None:
            return await self._lease(seed_key, answer, deadline, explained=in_queue)
        try:
            return messages.parse_waiting(waiting)
        except BadMessage as error:
            raise PlannerError(f"{self._name}: {messages.GET_SEED} answered nonsense: {error}") from error

    def _question(
        self, seed_key: str, fingerprint: str, exclude: Sequence[SeedAddress], intent: str, labels: str
    ) -> dict[str, str]:
        return {
            **self._key(seed_key, fingerprint),
            **_given(messages.EXCLUDE, _joined(exclude)),
            **_given(messages.INTENT, intent),
            **_given(messages.LABELS, labels),
        }

    async def _lease(self, seed_key: str, answer: Answer, deadline: float, *, explained: bool = False) -> Lease:
        """The lease in an answer to ``get_seed``; ``explained``: an error quotes the text of a 404. Raises as above."""
        if answer.status == 404:
            granted = messages.header(answer.headers, messages.INTENT) == messages.INTENT_GRANTED
            reason = messages.header(answer.headers, messages.MISS) or ""
            reason = reason if reason in _WHY else ""
            problem = f"the planner has no free seed for key {seed_key!r}{_WHY[reason]}"
            if explained and answer.body:
                problem += f": {answer.text}"
            raise NoSeedAvailable(
                problem,
                intent_granted=granted,
                reason=reason,
                others=messages.other_fingerprints(answer.headers),
            )
        if answer.status != 200:
            raise self._refused(messages.GET_SEED, answer)
        try:
            return messages.lease_from_answer(answer.headers)
        except BadMessage as error:
            await self._give_back(answer.headers, deadline)
            raise PlannerError(f"{self._name}: {messages.GET_SEED} answered nonsense: {error}") from error

    async def renew(self, lease: Lease) -> Outcome:
        """Renew ``lease`` for another TTL. ``UNKNOWN`` (400, 404, 405): it is gone, or the planner renews none.

        Raises:
            PlannerError: no answer in time, or another refusal.
        """
        answer = await self._call("POST", messages.RENEW_SEED_LEASE, lease.headers(), self._deadline())
        return self._outcome(messages.RENEW_SEED_LEASE, answer, unknown=(400, 404, 405))

    async def renews_leases(self) -> bool:
        """Whether the planner has a call for renewal at all, asked with a harmless GET on it.

        Raises:
            PlannerError: no answer in time.
        """
        return (await self._call("GET", messages.RENEW_SEED_LEASE, {}, self._deadline())).status != 404

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
        """Release ``lease``; ``UNKNOWN`` where it was gone already (404, and 400 from one production planner).

        Retries 408, 429, 5xx and network errors, so it may take ``len(RELEASE_PAUSES_S) + 1`` times
        ``request_timeout_s`` and the pauses: run it in the background.

        Args:
            result: ``messages.RESULT_OK`` or ``RESULT_FAILED``, with the bytes read, the seconds it took and the
                name of the error class that ended the fork.
            side: whose failure it was, one of ``messages.SIDES``.
            lane: engine and lane that the bytes took.

        Raises:
            PlannerError: all attempts failed; a lease with a TTL ends by itself then.
        """
        headers = lease.headers()
        if result:
            headers |= {
                messages.RESULT: result,
                messages.NBYTES: str(nbytes),
                messages.SECONDS: messages.seconds_text(seconds),
                **_given(messages.CAUSE, cause),
                **_given(messages.SIDE, side),
                **_given(messages.LANE, lane),
            }
        answer = await self._retried(messages.PUT_SEED, headers, RELEASE_PAUSES_S, deadline=None)
        return self._outcome(messages.PUT_SEED, answer, unknown=(400, 404))

    async def announce(
        self,
        seed_key: str,
        seed: SeedAddress,
        *,
        fingerprint: str = "",
        slots: int | None = None,
        labels: str = "",
        epoch: str = "",
        intent: str = "",
    ) -> None:
        """Announce ``seed`` under ``seed_key``; the same call is the heartbeat.

        Args:
            slots: leases that the seed carries at once; None leaves it to the planner.
            intent: the id under which this worker said that it loads; fulfilled with this.

        Raises:
            PlannerError: refused, or no answer in time.
        """
        headers = {
            **self._key(seed_key, fingerprint),
            **seed.headers(),
            messages.SEED_REFCNT: "0",
            **_given(messages.SLOTS, "" if slots is None else str(slots)),
            **_given(messages.LABELS, labels),
            **_given(messages.EPOCH, epoch),
            **_given(messages.INTENT, intent),
            **_given(messages.STATE, self._states.get(seed, "")),
        }
        try:
            answer = await self._call("POST", messages.ADD_SEED, headers, self._deadline())
        except PlannerError as error:
            if was_sent(error):
                self._states.setdefault(seed, messages.STATE_UNANSWERED)
            raise
        if answer.status in _FROM_A_PROXY:
            self._states.setdefault(seed, messages.STATE_UNANSWERED)
        self._outcome(messages.ADD_SEED, answer)
        self._remember_state(seed, answer)

    def state_of(self, seed: SeedAddress) -> str:
        """Id of the planner's memory at the last announcement of ``seed``; empty for planners that send none."""
        return self._states.get(seed, "")

    async def attend(
        self, seed_key: str, seed: SeedAddress, *, fingerprint: str = "", labels: str = "", epoch: str = ""
    ) -> Attended:
        """Keep a request open while this process lives; returns when the planner answers it.

        Planners answer within some minutes, and at once if they do not hold it. Cancelling closes the connection, as
        the end of the process does: the planner then stops granting the seed.

        Raises:
            PlannerError: the connection broke, could not be made within ``request_timeout_s``, or was silent for
                ``MAX_SILENCE_S`` (``net/client.py``); there was no answer within ``ATTEND_TIMEOUT_S`` seconds; or the
                planner refused, or asks to come later.
        """
        headers = {
            **self._key(seed_key, fingerprint),
            **seed.headers(),
            messages.SEED_REFCNT: "0",
            **_given(messages.LABELS, labels),
            **_given(messages.EPOCH, epoch),
            messages.STREAM: "1",
        }
        deadline = self._clock() + ATTEND_TIMEOUT_S
        answer = await self._call("POST", messages.PRESENCE, headers, deadline, self.request_timeout_s)
        found = {
            200: Attendance.AGAIN,
            # The last: what planners of other makes answer to a path that they do not have.
            **dict.fromkeys((404, 405, 501, 400), Attendance.NO_SUCH_CALL),
            409: Attendance.NOT_KNOWN,
            429: Attendance.FULL,
        }.get(answer.status)
        if found is None:
            raise self._refused(messages.PRESENCE, answer)
        if found is Attendance.AGAIN and answer.body:  # it may have come in pieces, after which no status can be sent
            word = answer.body.split()[-1:]
            if word in ([], [messages.PRESENCE_LATER.encode()]):
                raise PlannerError(f"{self._name}: {messages.PRESENCE} ended, to be sent again later")
            if word == [messages.PRESENCE_UNKNOWN.encode()]:
                found = Attendance.NOT_KNOWN
        return Attended(found, _retry_after_s(answer))

    async def withdraw(self, seed_key: str, seed: SeedAddress) -> Outcome:
        """Take ``seed`` back. ``UNKNOWN``: not there, or an older planner, which forgets it a minute after its
        last heartbeat. ``DRAINING``: a receiver is still reading from it.

        Raises:
            PlannerError: refused, or no answer within ``request_timeout_s``, retries included.
        """
        headers = {**self._key(seed_key, ""), **seed.headers()}
        answer = await self._retried(messages.REMOVE_SEED, headers, WITHDRAW_PAUSES_S, deadline=self._deadline())
        if answer.status == 409:
            return Outcome.DRAINING
        return self._outcome(messages.REMOVE_SEED, answer, unknown=(404, 405))

    async def intend(self, seed_key: str, intent: str, *, ttl_s: float, fingerprint: str = "") -> Outcome:
        """Say that worker ``intent`` loads ``seed_key`` from storage, for up to ``ttl_s`` seconds; 0 takes it back.

        ``UNKNOWN``: the planner keeps no intents.

        Raises:
            PlannerError: refused, or no answer in time.
        """
        headers = {
            **self._key(seed_key, fingerprint),
            messages.INTENT: messages.encode_text(intent),
            messages.INTENT_TTL_SEC: messages.seconds_text(ttl_s),
        }
        answer = await self._call("POST", messages.ADD_INTENT, headers, self._deadline())
        return self._outcome(messages.ADD_INTENT, answer, unknown=(404, 405))

    async def healthz(self) -> dict[str, Any]:
        """The planner's health as it states it.

        Raises:
            PlannerError: not healthy, or no usable answer in time.
        """
        return await self._json(messages.HEALTHZ)

    async def snapshot(self) -> dict[str, Any]:
        """The planner's whole state as JSON; its form is the planner's own.

        Raises:
            PlannerError: no usable answer in time.
        """
        return await self._json(messages.DEBUG_SNAPSHOT)

    async def close(self) -> None:
        """Nothing is kept open between calls; this is the end that a client with connections of its own needs."""

    async def _acquired(
        self,
        headers: Mapping[str, str],
        deadline: float,
        wait_s: float | None,
        *,
        patient: bool,
        repeatable: bool = False,
    ) -> Answer:
        """The answer to ``get_seed``, asked again while the planner is away for a moment; see :meth:`acquire`.

        Args:
            wait_s: the wait that is stated, less what has passed of it; None: none is.
            patient: ask again as well where nobody is there, as long as the bound allows.
            repeatable: asking twice takes one lease.
        """
        started_at = now = self._clock()
        away_since = math.inf
        while True:
            waiting: dict[str, str] = {}
            left_s = 0.0 if wait_s is None else started_at + wait_s - now
            if left_s > 0 or (wait_s is not None and repeatable):
                waiting = {messages.WAIT_SEC: messages.seconds_text(max(left_s, 0.0))}
            try:
                answer = await self._call("GET", messages.GET_SEED, {**headers, **waiting}, deadline)
            except PlannerError as error:
                if repeatable and broke_off(error):
                    repeatable = False
                    continue
                if not (patient and went_away(error)):
                    raise
                away_since = min(away_since, self._clock())
                problem, pause_s = error, RETURN_PAUSE_S
                over = min(deadline, away_since + self.request_timeout_s)
            else:
                asked_s = _retry_after_s(answer)
                if asked_s is None:
                    return answer
                patient, away_since = True, math.inf
                problem, pause_s, over = self._refused(messages.GET_SEED, answer), asked_s, deadline
            # Spread out: all who were sent away were sent away at once.
            pause_s *= 1 + self._jitter() / 2
            if self._clock() + pause_s >= over:
                raise problem
            logger.info("%s; asking again in %.1f s", problem, pause_s)
            await self._sleep(pause_s)
            now = self._clock()

    # --- how a call is made -----------------------------------------------------------------------------------

    async def _call(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        deadline: float,
        connect_timeout_s: float | None = None,
    ) -> Answer:
        """One call, and once more with the other spelling of the names where the planner answers 400.

        A proxy such as nginx drops names with underscores, and the planner then misses a header. The spelling
        that worked is kept for later calls.
        """
        hyphens = self._hyphens
        answer = await self._exchange(
            method, path, _spelled(headers, hyphens=hyphens), deadline, connect_timeout_s=connect_timeout_s
        )
        if answer.status != 400 or not any("_" in name for name in headers):
            return answer
        other = await self._exchange(
            method, path, _spelled(headers, hyphens=not hyphens), deadline, connect_timeout_s=connect_timeout_s
        )
        if other.status == 400:
            return answer
        logger.info("the %s wants header names with %s", self._name, "underscores" if hyphens else "hyphens")
        self._hyphens = not hyphens
        return other

    async def _exchange(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        deadline: float,
        *,
        max_body_nbytes: int = 0,
        connect_timeout_s: float | None = None,
    ) -> Answer:
        for name, value in headers.items():
            if len(value) > messages.MAX_HEADER_LENGTH:
                raise PlannerError(
                    f"header {name} would be {len(value)} characters long, more than {messages.MAX_HEADER_LENGTH}"
                )
        left_s = deadline - self._clock()
        return await self._http.exchange(
            method,
            self.base_url + path,
            headers=headers,
            timeout_s=left_s,
            max_body_nbytes=max_body_nbytes if connect_timeout_s is None else _MAX_ATTEND_NBYTES,
            connect_timeout_s=connect_timeout_s,
        )

    async def _retried(
        self, path: str, headers: Mapping[str, str], pauses_s: Sequence[float], *, deadline: float | None
    ) -> Answer:
        """POST, again after each pause while the planner is away or overloaded; at the end the last outcome."""
        for pause_s in pauses_s:
            try:
                answer = await self._call("POST", path, headers, deadline or self._deadline())
            except PlannerError as error:
                logger.debug("%s; trying again in %g s", error, pause_s)
            else:
                if answer.status not in _RETRIED and answer.status < 500:
                    return answer
            if deadline is not None and self._clock() + pause_s >= deadline:
                break
            await self._sleep(pause_s)
        return await self._call("POST", path, headers, deadline or self._deadline())

    async def _json(self, path: str) -> dict[str, Any]:
        answer = await self._exchange("GET", path, {}, self._deadline(), max_body_nbytes=MAX_JSON_NBYTES)
        if answer.status != 200:
            raise self._refused(path, answer)
        try:
            return msgspec.json.decode(answer.body, type=dict[str, Any])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise PlannerError(f"{self._name}: {path} did not answer with a JSON object: {error}") from error

    async def _give_back(self, headers: Mapping[str, str], deadline: float) -> None:
        """Release the lease of an answer that is unusable in some other header, so that it does not block a seed."""
        try:
            seed, user_id = messages.seed_address(headers), messages.required(headers, messages.USER_ID)
            await self._call("POST", messages.PUT_SEED, {**seed.headers(), messages.USER_ID: user_id}, deadline)
        except (BadMessage, PlannerError) as error:
            logger.debug("the lease in an unusable answer could not be given back: %s", error)

    def _remember_state(self, seed: SeedAddress, answer: Answer) -> None:
        """Keep the planner's state id for the next beat, by which it sees whether it has lost its state since."""
        try:
            state = messages.decode_text(messages.header(answer.headers, messages.STATE) or "")
        except BadMessage:
            state = ""
        if 0 < len(state) <= _MAX_STATE_LENGTH:
            self._states[seed] = state
        else:
            self._states.pop(seed, None)

    def _outcome(self, path: str, answer: Answer, *, unknown: tuple[int, ...] = ()) -> Outcome:
        if answer.status == 200:
            return Outcome.DONE
        if answer.status in unknown:
            return Outcome.UNKNOWN
        raise self._refused(path, answer)

    def _refused(self, path: str, answer: Answer) -> PlannerError:
        return PlannerError(f"{self._name}: {path} answered {answer}")

    def _deadline(self) -> float:
        return self._clock() + self.request_timeout_s

    @staticmethod
    def _key(seed_key: str, fingerprint: str) -> dict[str, str]:
        return {
            messages.SEED_KEY: messages.encode_text(seed_key),
            **_given(messages.FINGERPRINT, fingerprint),
        }


def _retry_after_s(answer: Answer) -> float | None:
    """How long the planner asks to be left alone; None where it does not, or says so in no number of seconds."""
    text = answer.headers.get("Retry-After", "").strip()
    if answer.status not in _PATIENCE or not re.fullmatch(r"[0-9]{1,6}", text):
        return None
    return max(float(text), _LEAST_PAUSE_S)


def _given(name: str, value: str) -> dict[str, str]:
    """The header, or nothing where there is no value: an absent header is what older planners expect."""
    return {name: messages.encode_text(value)} if value else {}


def _joined(seeds: Sequence[SeedAddress]) -> str:
    """The latest of ``seeds`` that fit into one header, comma-separated."""
    kept: list[str] = []
    length = 0
    for seed in reversed(seeds[-MAX_EXCLUDED:]):
        length += len(str(seed)) + 1
        if length > messages.MAX_HEADER_LENGTH:
            break
        kept.append(str(seed))
    return ",".join(reversed(kept))


def _spelled(headers: Mapping[str, str], *, hyphens: bool) -> dict[str, str]:
    return {name.replace("_", "-") if hyphens else name: value for name, value in headers.items()}
