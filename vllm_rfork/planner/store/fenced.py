"""The fleet's records in Redis, and the lock that says which replica may write them.

The lock is one hash: ``token`` (new with every change of the leader), ``owner``, and ``beat``, a number that the
leader changes while it lives. No key expires and no script asks for the time: a replica finds the leader dead when
``beat`` has stayed the same for long enough on the replica's own monotonic clock, and every write names the token that
it belongs to. A write under an older token changes nothing, whoever sent it and however late it arrives.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import redis.asyncio
import redis.exceptions

from vllm_rfork.errors import RForkError
from vllm_rfork.planner.store.base import StoreUnavailable

logger = logging.getLogger(__name__)

#: Seconds that Redis may take for one answer.
TIMEOUT_S = 5.0
#: Records of one script call, and of one answer when they are read: Redis serves nobody else meanwhile.
BATCH = 1000
LOCK = "leader"

# KEYS: the lock, then the hashes to change. ARGV: the token; the beat, or nothing for any; then triples of key number,
# field and value. Without a value the field is removed, without a field the whole hash.
_WRITE = """
local held = redis.call('HMGET', KEYS[1], 'token', 'beat')
if (held[1] or '') ~= ARGV[1] or (ARGV[2] ~= '' and (held[2] or '') ~= ARGV[2]) then return 0 end
for at = 3, #ARGV, 3 do
  local key, field, value = KEYS[tonumber(ARGV[at])], ARGV[at + 1], ARGV[at + 2]
  if field == '' then redis.call('DEL', key)
  elseif value == '' then redis.call('HDEL', key, field)
  else redis.call('HSET', key, field, value) end
end
return 1
"""
#: Kind, field and value. The kind names the hash.
Change = tuple[str, str, str]


class Fenced(RForkError):
    """The write was rejected, because another replica holds the lock now."""


@dataclass(frozen=True)
class Lock:
    """The lock as it was read; all fields are empty where nobody ever held it.

    ``now`` is the fleet's clock at the last write, ``state`` the state id, ``born`` when that state began.
    """

    token: str = ""
    owner: str = ""
    beat: str = ""
    now: str = ""
    state: str = ""
    born: str = ""


class FencedRecords:
    """Hashes under ``base``: the lock and one for each kind of record.

    Every method raises :class:`StoreUnavailable` if Redis does not answer, or not in time. A write may have happened.
    """

    def __init__(self, client: redis.asyncio.Redis, base: str) -> None:
        self._client = client
        self._base = base
        self._script = client.register_script(_WRITE)

    async def read_lock(self) -> Lock:
        """Read the lock."""
        found: dict[bytes, bytes] = await self._ask(self._client.hgetall(self._base + LOCK))
        texts = {str(name, "ascii"): str(value, "ascii") for name, value in found.items()}
        return Lock(**{name: texts.get(name, "") for name in (each.name for each in fields(Lock))})

    async def write(self, token: str, changes: Iterable[Change] = (), *, beat: str = "") -> None:
        """Apply ``changes`` if ``token`` still is the lock's, and its beat ``beat`` where given.

        Raises:
            Fenced: it is not; nothing was changed.
        """
        left = list(changes)
        while True:
            # More than one call for a large batch: nothing of it has been answered before the last one is through.
            now, left = left[:BATCH], left[BATCH:]
            kinds = list(dict.fromkeys([LOCK, *(kind for kind, _, _ in now)]))
            arguments: list[bytes | str] = [token, beat]
            for kind, field, value in now:
                arguments += [str(kinds.index(kind) + 1), field.encode("utf-8", "surrogatepass"), value]
            if not await self._ask(self._script(keys=[self._base + kind for kind in kinds], args=arguments)):
                raise Fenced("another replica leads")
            if not left:
                return

    async def read(self, kind: str) -> AsyncIterator[list[tuple[str, bytes]]]:
        """Names and texts of all records of ``kind``, some at a time; a record may come twice."""
        cursor = 0
        while True:
            cursor, found = await self._ask(self._client.hscan(self._base + kind, cursor, count=BATCH))
            yield [(str(name, "utf-8", "surrogatepass"), text) for name, text in found.items()]
            if cursor == 0:
                return

    async def _ask(self, answer: Awaitable[Any]) -> Any:
        try:
            return await asyncio.wait_for(answer, TIMEOUT_S)
        except redis.exceptions.ResponseError as error:
            logger.error("Redis refused a call: %s", error)
            raise StoreUnavailable("Redis refused the call; the planner's log contains its answer") from error
        except (redis.exceptions.RedisError, OSError, asyncio.TimeoutError) as error:
            raise StoreUnavailable(f"Redis is not reachable ({type(error).__name__})") from error
