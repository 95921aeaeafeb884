"""Runs the decisions script on Redis: many callers, one connection, answers in order.

Calls that come up while a batch is under way are sent together as the next batch, so that the cost of a round
trip is shared under load and nobody waits for it alone. Every call is bounded in time; a call whose answer was
lost is not repeated here, because it may have been carried out.
"""

from __future__ import annotations

import asyncio
import logging
from importlib import resources
from typing import Any

import redis.asyncio
import redis.exceptions

from vllm_rfork.planner.store import StoreUnavailable

logger = logging.getLogger(__name__)

#: One script in two files.
SCRIPT = ("decisions.lua", "views.lua")
TIMEOUT_S = 5.0
_MAX_BATCH = 64
_MAX_WAITING = 50_000

_Call = tuple[tuple[str, ...], "asyncio.Future[bytes]"]


class ScriptCalls:
    """The script's callers' side. ``key`` is what the script gets as ``KEYS[1]``."""

    def __init__(self, client: redis.asyncio.Redis, key: str) -> None:
        self._client = client
        self._key = key
        folder = resources.files(__package__)
        self._source = "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in SCRIPT)
        self._sha = ""
        self._waiting: list[_Call] = []
        self._sender: asyncio.Task[None] | None = None

    async def load(self) -> None:
        """Make the script known to Redis. Raises :class:`StoreUnavailable`."""
        try:
            self._sha = await asyncio.wait_for(self._client.script_load(self._source), TIMEOUT_S)
        except (redis.exceptions.RedisError, OSError, asyncio.TimeoutError) as error:
            raise _unavailable(error) from error

    async def run(self, *arguments: str) -> bytes:
        """One decision; its JSON.

        Raises:
            StoreUnavailable: Redis did not answer in time, or not at all. The decision may have been taken.
        """
        if len(self._waiting) >= _MAX_WAITING:
            raise StoreUnavailable("too many calls wait for Redis")
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting.append((arguments, answer))
        if self._sender is None or self._sender.done():
            self._sender = asyncio.get_running_loop().create_task(self._send_all())
        return await answer

    async def close(self) -> None:
        """Let go of calls that are still under way."""
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)

    async def _send_all(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:_MAX_BATCH], self._waiting[_MAX_BATCH:]
            try:
                answers = await asyncio.wait_for(self._send(batch), TIMEOUT_S)
            except (redis.exceptions.RedisError, OSError, asyncio.TimeoutError) as error:
                answers = [error] * len(batch)
            except asyncio.CancelledError:
                for _, waiting in batch + self._waiting:
                    waiting.cancel()
                raise
            for (_, waiting), answer in zip(batch, answers, strict=True):
                if waiting.done():
                    continue  # its caller has gone away
                if isinstance(answer, BaseException):
                    waiting.set_exception(_unavailable(answer))
                else:
                    waiting.set_result(answer)

    async def _send(self, batch: list[_Call]) -> list[Any]:
        answers = await self._pipelined(batch)
        # A Redis that was restarted has forgotten the script; a decision it did not know was not taken.
        unknown = [place for place, each in enumerate(answers) if isinstance(each, redis.exceptions.NoScriptError)]
        if unknown:
            await self.load()
            for place, answer in zip(unknown, await self._pipelined([batch[each] for each in unknown]), strict=True):
                answers[place] = answer
        return answers

    async def _pipelined(self, batch: list[_Call]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for arguments, _ in batch:
            pipeline.evalsha(self._sha, 1, self._key, *arguments)
        return list(await pipeline.execute(raise_on_error=False))


def _unavailable(error: BaseException) -> StoreUnavailable:
    if isinstance(error, StoreUnavailable):
        return error
    if isinstance(error, redis.exceptions.ResponseError):
        logger.error("Redis refused a decision: %s", error)
        return StoreUnavailable("Redis refused the decision")
    failure = StoreUnavailable(f"Redis is not reachable ({type(error).__name__})")
    failure.__cause__ = error
    return failure
