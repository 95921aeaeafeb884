"""The fleet's records in Redis, and the lock that names the replica which may write them.

The lock is one hash: ``token`` (new with every change of the leader), ``owner``, and ``beat``, a number that the
leader changes while it lives. No key expires and no script reads a clock. A replica presumes the leader dead when
``beat`` has not changed for long enough on the replica's own monotonic clock. Every write contains the token it belongs
to; Redis rejects a write under an older token, however late it arrives.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import msgspec
import redis.asyncio
import redis.exceptions

from vllm_rfork.errors import RForkError
from vllm_rfork.planner.store.errors import StoreUnavailable

logger = logging.getLogger(__name__)

#: Seconds that Redis may take for one answer.
TIMEOUT_S = 5.0
#: Records of one script call, and of one answer when they are read: Redis serves nobody else meanwhile.
BATCH = 1000
LOCK = "leader"

# KEYS: the lock, then the hashes to change. ARGV: the token; the beat, or nothing for any; key number, length of the
# field and length of the value of each change, in MessagePack (which has no type for bytes here); and all fields and
# values in turn. Without a value the field is removed, without a field the whole hash.
_WRITE = """
local held = redis.call('HMGET', KEYS[1], 'token', 'beat')
if (held[1] or '') ~= ARGV[1] or (ARGV[2] ~= '' and (held[2] or '') ~= ARGV[2]) then return 0 end
local sizes, done = cmsgpack.unpack(ARGV[3]), 0
local function take(nbytes)
  done = done + nbytes
  return string.sub(ARGV[4], done - nbytes + 1, done)
end
for at = 1, #sizes, 3 do
  local key, field, value = KEYS[sizes[at]], take(sizes[at + 1]), take(sizes[at + 2])
  if field == '' then redis.call('DEL', key)
  elseif value == '' then redis.call('HDEL', key, field)
  else redis.call('HSET', key, field, value) end
end
return 1
"""
#: Kind, field and value. The kind names the hash.
Change = tuple[str, str, bytes]


class Fenced(RForkError):
    """The write was rejected, because another replica holds the lock now."""


@dataclass(frozen=True)
class Lock:
    """The lock as it was read; all fields are empty if no replica ever held it.

    ``now`` is the fleet's clock at the last write, ``state`` the state id, ``born`` when that state began.
    """

    token: str = ""
    owner: str = ""
    beat: str = ""
    now: str = ""
    state: str = ""
    born: str = ""


def lock_changes(**values: str) -> list[Change]:
    """Return changes that set fields of the lock."""
    return [(LOCK, name, value.encode("ascii")) for name, value in values.items()]


class FencedRecords:
    """Hashes under ``base``: the lock and one for each kind of record.

    Every method raises :class:`StoreUnavailable` if Redis does not answer in time. A write may have happened then.
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

    async def write(self, token: str, changes: Sequence[Change] = (), *, beat: str = "") -> None:
        """Apply ``changes`` if ``token`` is the lock's, and ``beat`` its beat if given.

        Raises:
            Fenced: it is not; nothing was changed.
        """
        # A large batch takes more than one call: nothing of it is answered before the last one succeeded.
        for at in range(0, max(len(changes), 1), BATCH):
            kinds = {LOCK: 1}
            sizes: list[int] = []
            texts: list[bytes] = []
            for kind, name, value in changes[at : at + BATCH]:
                field = name.encode("utf-8", "surrogatepass")
                sizes += (kinds.setdefault(kind, len(kinds) + 1), len(field), len(value))
                texts += (field, value)
            arguments: list[str | bytes] = [token, beat, msgspec.msgpack.encode(sizes), b"".join(texts)]
            if not await self._ask(self._script(keys=[self._base + kind for kind in kinds], args=arguments)):
                raise Fenced("another replica leads")

    async def read(self, kind: str) -> AsyncIterator[list[tuple[str, bytes]]]:
        """Yield names and texts of all records of ``kind``, some at a time; a record may come twice."""
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
