"""The Redis store: several planner processes serve one fleet, and any of them may die at any moment.

All decisions are taken inside Redis by ``decisions.lua``, one at a time; nothing is remembered here but which
tickets wait at this process. Redis tells the process of settled tickets over a channel of its own; a message that
is lost costs nothing but time, because after every reconnection all waiting tickets are looked at.

Keep Redis's data on disk (``appendfsync always``) where a lost second matters: a slot whose lease Redis forgot can
be granted again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from vllm_rfork.messages import SeedAddress, decode_text, encode_text
from vllm_rfork.planner import overview, views
from vllm_rfork.planner.policy import buckets, nic_of
from vllm_rfork.planner.redis_calls import ScriptCalls
from vllm_rfork.planner.store import (
    LEASE_ID,
    SEED_NOT_TO_BLAME,
    WAIT_GRACE_S,
    Announcement,
    Ask,
    Event,
    Granted,
    LimitReached,
    Missed,
    Outcome,
    Queued,
    Released,
    Rules,
    StillLeased,
    Store,
    StoreUnavailable,
    Totals,
    UnknownLease,
    UnknownSeed,
    state_of,
)

logger = logging.getLogger(__name__)

_DECLINED: Mapping[str, type[Exception]] = {
    each.__name__: each for each in (LimitReached, StillLeased, UnknownLease, UnknownSeed)
}
#: Entries per list of a snapshot: Redis serves nobody else meanwhile.
MAX_SNAPSHOT = 5000
_RECONNECT_S = 0.5


class RedisStore(Store):
    """The fleet's state in Redis under ``prefix``.

    ``clock`` replaces Redis's own time (tests); ``replica`` names this process and is random where not given.
    """

    def __init__(
        self,
        rules: Rules,
        url: str,
        *,
        prefix: str = "rfork",
        clock: Callable[[], float] | None = None,
        replica: str = "",
    ) -> None:
        super().__init__(rules)
        self._clock = clock
        self._replica = replica or secrets.token_hex(8)
        self._base = f"{{{prefix}}}:"
        # Three connections: for decisions, for listening, and for probes. Timeouts are the callers' (ScriptCalls), and
        # nothing below us retries: a decision whose answer was lost may have been taken.
        self._client = redis.asyncio.Redis.from_url(
            url, protocol=2, socket_connect_timeout=2.0, health_check_interval=15, retry=Retry(NoBackoff(), 0)
        )
        self._calls = ScriptCalls(self._client, f"{self._base}meta")
        self._rules = json.dumps(_rules(rules))
        self._listener: asyncio.Task[None] | None = None
        self._pinging: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect, load the script and listen. Raises :class:`StoreUnavailable`."""
        await self._calls.load()
        await self._decide("sweep", replica=self._replica)
        listening = asyncio.Event()
        self._listener = asyncio.create_task(self._listen_for_ever(listening))
        try:
            await asyncio.wait_for(listening.wait(), 5.0)
        except asyncio.TimeoutError as error:
            raise StoreUnavailable("Redis takes no subscription") from error

    async def close(self) -> None:
        """See the port."""
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
            self._listener = None
            try:
                await self._decide("leave", replica=self._replica)
            except StoreUnavailable as error:
                logger.debug("Redis will find out by itself that this replica is gone: %s", error)
        await self._calls.close()
        await self._client.aclose()

    async def ping(self) -> None:
        """See the port."""
        # One at a time, for all who ask: probes need no token, and must not take the connections of decisions.
        if self._pinging is None or self._pinging.done():
            self._pinging = asyncio.get_running_loop().create_task(self._ping())
            self._pinging.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(self._pinging)

    async def _ping(self) -> None:
        try:
            await asyncio.wait_for(self._client.ping(), 2.0)
        except (redis.exceptions.RedisError, OSError, asyncio.TimeoutError) as error:
            raise StoreUnavailable(f"Redis is not reachable ({type(error).__name__})") from error

    # --- seeds ---------------------------------------------------------------------------------------------------
    async def announce(self, announcement: Announcement) -> str:
        """See the port."""
        seed = announcement.seed
        slots = self.rules.slots if announcement.slots is None else announcement.slots
        result = await self._decide(
            "announce",
            key=_ascii(announcement.key),
            name=str(seed),
            host=seed.host,
            port=seed.port,
            rank=seed.rank,
            fp=_ascii(announcement.fingerprint),
            slots=min(slots, self.rules.max_slots),
            labels=json.dumps(dict(announcement.labels), sort_keys=True),
            buckets=json.dumps(buckets(self.rules.policy, announcement.labels)),
            nic=nic_of(seed.host, announcement.labels),
            epoch=_ascii(announcement.epoch),
            intent=_ascii(announcement.intent),
            known_state=announcement.known_state,
        )
        return str(result["state"])

    async def withdraw(self, key: str, seed: SeedAddress) -> None:
        """See the port."""
        await self._decide("withdraw", key=_ascii(key), name=str(seed))

    # --- leases --------------------------------------------------------------------------------------------------
    async def acquire(self, ask: Ask) -> Granted | Missed | Queued:
        """See the port."""
        result = await self._decide(
            "acquire",
            key=_ascii(ask.key),
            receiver=_ascii(ask.receiver),
            fp=_ascii(ask.fingerprint),
            wait_s=ask.wait_s,
            ticket=ask.ticket,
            exclude=sorted(ask.exclude),
            buckets=buckets(self.rules.policy, ask.labels),
            intent=_ascii(ask.intent),
            replica=self._replica,
        )
        settled = self._settled(result, ask.ticket)
        if settled is None:
            raise StoreUnavailable("Redis lost a request")
        return settled

    async def settle(self, ticket: str, *, leave: bool, loads: bool = True) -> Granted | Missed | Queued | None:
        """See the port."""
        result = await self._decide("settle", ticket=ticket, leave=leave, loads=loads, replica=self._replica)
        return self._settled(result, ticket)

    def _settled(self, result: Mapping[str, Any], ticket: str) -> Granted | Missed | Queued | None:
        if result.get("granted"):
            seed = SeedAddress(result["host"], int(result["port"]), int(result["rank"]))
            return Granted(seed, result["granted"], self.rules.lease_ttl_s)
        if result.get("queued"):
            return Queued(ticket)
        return Missed(bool(result["intent"])) if result.get("missed") else None

    async def release(self, seed: SeedAddress, user_id: str, outcome: Outcome | None) -> Released:
        """See the port."""
        told = None
        if outcome is not None:
            told = {
                "ok": outcome.ok,
                "nbytes": outcome.nbytes,
                "duration_s": outcome.duration_s,
                "cause": _ascii(outcome.cause),
                "blame": outcome.cause not in SEED_NOT_TO_BLAME,
            }
        result = await self._decide("release", name=str(seed), user_id=_ascii(user_id), outcome=told)
        return Released(decode_text(result["key"]), float(result["held_s"]))

    async def renew(self, seed: SeedAddress, user_id: str) -> None:
        """See the port."""
        await self._decide("renew", name=str(seed), user_id=_ascii(user_id), state=state_of(user_id))

    async def intend(self, key: str, intent: str, fingerprint: str, ttl_s: float) -> None:
        """See the port."""
        await self._decide("intend", key=_ascii(key), intent=_ascii(intent), fp=_ascii(fingerprint), ttl_s=ttl_s)

    async def sweep(self) -> float:
        """See the port."""
        next_s = float((await self._decide("sweep", replica=self._replica))["next_s"])
        return float("inf") if next_s < 0 else next_s

    # --- for people ----------------------------------------------------------------------------------------------
    async def totals(self) -> dict[str, Totals]:
        """See the port."""
        found: dict[str, dict[str, float]] = (await self._decide("totals"))["totals"]
        return {decode_text(key): _totals(each) for key, each in found.items()}

    async def snapshot(self, *, key: str | None = None, limit: int = 1000) -> dict[str, Any]:
        """See the port."""
        wanted = {} if key is None else {"key": _ascii(key)}
        return views.snapshot_from_redis(
            await self._decide("snapshot", limit=min(limit, MAX_SNAPSHOT), **wanted), self.rules.policy.name
        )

    async def overview(self, *, key: str | None = None, limit: int = 100) -> dict[str, Any]:
        """See the port."""
        tally, cursor = overview.Tally(), "0"
        while True:
            found = await self._decide("tally", cursor=cursor, count=overview.BATCH)
            for name, totals in found["totals"].items():
                tally.add(decode_text(name), _totals(totals))
            cursor = found["cursor"]
            if cursor == "0":
                break
        choice = overview.choose(tally, key, min(limit, MAX_SNAPSHOT))
        found = await self._decide(
            "overview",
            keys=[_ascii(each) for each in choice.chosen],
            seeds=choice.seeds,
            leases=choice.leases,
            waiting=choice.waiting,
            limit=choice.limit,
            past=overview.LOOK_BACK,
        )
        return overview.overview_from_redis(found, tally, choice, key=key)

    # --- Redis ---------------------------------------------------------------------------------------------------
    async def _decide(self, operation: str, **arguments: Any) -> dict[str, Any]:
        arguments["nonce"] = secrets.token_hex(16)
        if self._clock is not None:
            arguments["now"] = self._clock()
        answer = msgspec.json.decode(await self._calls.run(operation, self._rules, json.dumps(arguments)))
        for kind, key, seed, detail in answer.get("ev") or ():
            self.observe(Event(kind, decode_text(key), seed, detail))
        result: dict[str, Any] = answer["r"] or {}
        if "error" in result:
            raise _DECLINED[result["error"]](result["text"])
        return result

    async def _listen_for_ever(self, listening: asyncio.Event) -> None:
        """Hear of settled tickets; after every break look at all of them."""
        while True:
            try:
                async with self._client.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(f"{self._base}wake:{self._replica}")
                    listening.set()
                    self.notify_all()
                    while True:
                        message = await channel.get_message(timeout=30.0)
                        if message is not None:
                            self.notify(str(message["data"], "ascii"))
            except (redis.exceptions.RedisError, OSError) as error:
                logger.warning("Redis is not reachable, trying again (%s)", type(error).__name__)
                await asyncio.sleep(_RECONNECT_S)


def _ascii(text: str) -> str:
    """``text`` as the script wants it: printable ASCII, and empty where it is empty."""
    return encode_text(text) if text else ""


def _totals(found: Mapping[str, float]) -> Totals:
    counts = {name: int(value) for name, value in found.items() if name != "oldest_wait_s"}
    return Totals(**counts, oldest_wait_s=float(found["oldest_wait_s"]))


def _rules(rules: Rules) -> dict[str, Any]:
    """The rules as the script reads them."""
    named = {name: value for name, value in vars(rules).items() if name != "policy"}
    return named | {"weigh": rules.policy.weigh, "lease_id": LEASE_ID, "wait_grace_s": WAIT_GRACE_S}
