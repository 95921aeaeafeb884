"""A seed's calls to the planner: announced, present, withdrawn; and the intent of a worker that will be one."""

from __future__ import annotations

from typing import Any

from vllm_rfork import messages
from vllm_rfork.clients.answers import Attendance, Attended, Outcome, outcome, refusal, retry_after_s
from vllm_rfork.clients.calls import PlannerCalls, given, key_headers, seed_headers
from vllm_rfork.errors import PlannerError
from vllm_rfork.messages import BadMessage, SeedAddress, metering
from vllm_rfork.messages.metering import Served
from vllm_rfork.messages.values import shortened
from vllm_rfork.net.client import Answer

#: Pauses in seconds before each further attempt to withdraw a seed; the caller waits for it.
WITHDRAW_PAUSES_S = (0.1, 0.3)
#: Bound of a presence request in seconds: planners answer within some minutes.
ATTEND_TIMEOUT_S = 900.0
#: Longest answer to it in bytes: one every 20 s, and a word.
_MAX_ATTEND_NBYTES = 4096
_MAX_STATE_LENGTH = 256

_ATTENDANCE = {
    200: Attendance.AGAIN,
    # 400 last: third-party planners answer it to a path that they do not have.
    **dict.fromkeys((404, 405, 501, 400), Attendance.NO_SUCH_CALL),
    409: Attendance.NOT_KNOWN,
    429: Attendance.FULL,
}


class SeedCalls(PlannerCalls):
    """Announces seeds and keeps them present."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._states: dict[SeedAddress, str] = {}

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
        caches: str = "",
        parent: str = "",
        differs: str = "",
    ) -> Served | None:
        """Announce ``seed`` under ``seed_key``; the same call is the heartbeat.

        Args:
            slots: leases that the seed carries at once; None: the planner decides.
            intent: the id of this worker's intent, which this call fulfils.
            caches: the text of this worker's :class:`~vllm_rfork.messages.CacheResults`.
            parent, differs: the seed that this one was forked from, and its differences to others; for people.

        Returns:
            What receivers reported of this seed in its present epoch; None if the planner does not say.

        Raises:
            PlannerError: refused, or no answer in time.
        """
        headers = {
            **self._names,
            **seed_headers(seed_key, seed, fingerprint=fingerprint, labels=labels, epoch=epoch),
            **given(messages.SLOTS, "" if slots is None else str(slots)),
            **given(messages.INTENT, intent),
            **given(messages.CACHES, caches),
            **given(messages.PARENT, parent),
            **given(messages.DIFFERS, shortened(differs, messages.MAX_DIFFERS_LENGTH)),
            **given(messages.STATE, self._states.get(seed, "")),
        }
        answer = await self.call(
            "POST",
            messages.ADD_SEED,
            headers,
            repeat_headers=given(messages.STATE, self._states.get(seed, messages.STATE_UNANSWERED)),
            unanswered=lambda: self._states.setdefault(seed, messages.STATE_UNANSWERED),
        )
        outcome(answer)
        self._remember_state(seed, answer)
        return metering.served(answer.headers)

    def state_of(self, seed: SeedAddress) -> str:
        """Id of the planner's state at the last announcement of ``seed``; empty if the planner sends none."""
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
        headers = seed_headers(seed_key, seed, fingerprint=fingerprint, labels=labels, epoch=epoch)
        answer = await self.call(
            "POST",
            messages.PRESENCE,
            {**headers, messages.STREAM: "1"},
            self._clock() + ATTEND_TIMEOUT_S,
            held_s=ATTEND_TIMEOUT_S,
            repeatable=False,
            connect_timeout_s=self.request_timeout_s,
            max_body_nbytes=_MAX_ATTEND_NBYTES,
        )
        attendance = _ATTENDANCE.get(answer.status)
        if attendance is None:
            raise refusal(answer)
        if attendance is Attendance.AGAIN and answer.body:  # a streamed answer ends with a word instead of a status
            word = b"".join(answer.body.split()[-1:])
            if word in (b"", messages.PRESENCE_LATER.encode()):
                raise PlannerError(f"planner {answer.url} ended the request, to be sent again later")
            if word == messages.PRESENCE_UNKNOWN.encode():
                attendance = Attendance.NOT_KNOWN
        return Attended(attendance, retry_after_s(answer))

    async def withdraw(self, seed_key: str, seed: SeedAddress) -> Outcome:
        """Withdraw ``seed``.

        ``UNKNOWN``: not announced, or a legacy planner, which forgets it a minute after its last heartbeat.
        ``DRAINING``: a receiver still reads from it.

        Raises:
            PlannerError: refused, or no answer within ``request_timeout_s``, retries included.
        """
        headers = {**key_headers(seed_key, ""), **seed.headers()}
        answer = await self._retried(messages.REMOVE_SEED, headers, WITHDRAW_PAUSES_S, deadline=self._deadline())
        if answer.status == 409:
            return Outcome.DRAINING
        return outcome(answer, unknown=(404, 405))

    async def intend(self, seed_key: str, intent: str, *, ttl_s: float, fingerprint: str = "") -> Outcome:
        """State that worker ``intent`` loads ``seed_key`` from storage, for up to ``ttl_s`` seconds; 0 withdraws it.

        ``UNKNOWN``: the planner keeps no intents.

        Raises:
            PlannerError: refused, or no answer in time.
        """
        headers = {
            **self._names,
            **key_headers(seed_key, fingerprint),
            messages.INTENT: messages.encode_text(intent),
            messages.INTENT_TTL_SEC: messages.seconds_text(ttl_s),
        }
        return outcome(await self.call("POST", messages.ADD_INTENT, headers), unknown=(404, 405))

    def _remember_state(self, seed: SeedAddress, answer: Answer) -> None:
        """Keep the planner's state id for the next beat, by which the planner sees whether it lost its state since."""
        try:
            state = messages.decode_text(messages.header(answer.headers, messages.STATE) or "")
        except BadMessage:
            state = ""
        if 0 < len(state) <= _MAX_STATE_LENGTH:
            self._states[seed] = state
        else:
            self._states.pop(seed, None)
