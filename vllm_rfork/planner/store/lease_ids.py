"""Lease ids: unguessable names, which a planner that lost its state can recognize as its own.

An id is ``rf1.``, the id of the state that granted the lease, and a random part. If callers need a bearer token, a MAC
follows, made with a key that is derived from the token: it proves that a planner of this fleet granted the lease, on
that seed. During a rotation the first token makes ids, and both verify them.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Sequence

_PREFIX = "rf1."
_RANDOM_NBYTES = 12
_MAC_NBYTES = 16
_ID = re.compile(re.escape(_PREFIX) + r"([0-9a-f]{8})\.[0-9a-f]{24}(\.[0-9a-f]{32})?\Z")
#: Random parts that are drawn at once: a system call costs more than the rest of a decision.
_DRAWN = 64


class LeaseIds:
    """Makes and verifies lease ids. ``tokens`` returns the bearer tokens, the present one first."""

    def __init__(self, tokens: Callable[[], Sequence[str]] = tuple) -> None:
        self._tokens = tokens
        self._random: list[str] = []

    @property
    def provable(self) -> bool:
        """Ids contain a MAC."""
        return bool(self._tokens())

    def new(self, state_id: str, seed: str) -> str:
        """Return an id for a lease on ``seed``. It is the right to release the lease."""
        if not self._random:
            drawn = secrets.token_hex(_RANDOM_NBYTES * _DRAWN)
            size = 2 * _RANDOM_NBYTES
            self._random = [drawn[at : at + size] for at in range(0, len(drawn), size)]
        user_id = f"{_PREFIX}{state_id}.{self._random.pop()}"
        tokens = self._tokens()
        return f"{user_id}.{_mac(tokens[0], user_id, seed)}" if tokens else user_id

    def is_proven(self, user_id: str, seed: str) -> bool:
        """Return whether a planner with one of the tokens granted this lease on ``seed``."""
        bare, _, mac = user_id.rpartition(".")
        # All are compared, so that the time does not depend on the first result.
        matches = [hmac.compare_digest(_mac(each, bare, seed).encode(), mac.encode()) for each in self._tokens()]
        return any(matches)


def state_of(user_id: str) -> str:
    """Return the id of the state that granted a lease; empty if no planner made ``user_id``."""
    match = _ID.match(user_id)
    return match[1] if match else ""


def _mac(token: str, user_id: str, seed: str) -> str:
    key = hashlib.sha256(b"rfork lease ids\0" + token.encode("utf-8", "surrogatepass")).digest()
    return hmac.digest(key, f"{user_id} {seed}".encode("utf-8", "surrogatepass"), "sha256")[:_MAC_NBYTES].hex()
