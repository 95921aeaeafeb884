"""The value of ``RFORK-CACHES``: the result of each kind of cache at a worker's start."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_rfork.messages.values import BadMessage, seconds, seconds_text

#: Characters of the whole value.
MAX_LENGTH = 400
#: Longest time in seconds that a worker may state as saved.
MAX_SAVED_S = 86_400.0
HIT = "hit"
#: Results that have metric series of their own: :data:`HIT`, and the reasons of misses.
RESULTS = frozenset({HIT, "none", "late", "trust", "identity", "refused"})
_MISS = "miss"
_SAVED = "saved"
_WORD = re.compile(r"[a-z_]{1,24}\Z")


@dataclass(frozen=True)
class CacheResults:
    """Kinds of caches and their results; it informs people and decides nothing.

    Attributes:
        kinds: kind → :data:`HIT`, or the reason of a miss in one word (``none``, ``late``, ``trust``, ``identity``,
            ``refused``), which is empty if the worker states none.
        saved_s: seconds that the hits have saved, as far as the seed stated them.
    """

    kinds: Mapping[str, str] = field(default_factory=dict)
    saved_s: float | None = None

    def __str__(self) -> str:
        """``torch_aot=hit,triton=miss:identity;saved=38.2``, without what is not a word of ``[a-z_]`` or does not fit.

        Empty for no results.
        """
        saved = ""
        if self.saved_s is not None and 0 <= self.saved_s <= MAX_SAVED_S:
            saved = f";{_SAVED}={seconds_text(round(self.saved_s, 1))}"
        text = ""
        for kind, result in self.kinds.items():
            if not _WORD.match(kind) or (result and not _WORD.match(result)):
                continue
            each = f"{kind}={HIT}" if result == HIT else f"{kind}={_MISS}:{result}".rstrip(":")
            longer = f"{text},{each}" if text else each
            text = longer if len(longer) + len(saved) <= MAX_LENGTH else text
        return text + saved


def parse_cache_results(text: str) -> CacheResults:
    """The inverse of ``str(CacheResults)``. Unknown fields, unusable words and a text that is too long are ignored."""
    listed, *fields = text.split(";") if len(text) <= MAX_LENGTH else ("",)
    kinds: dict[str, str] = {}
    for each in listed.split(","):
        kind, _, result = each.strip().partition("=")
        word, _, reason = result.partition(":")
        if not _WORD.match(kind):
            continue
        if result == HIT:
            kinds[kind] = HIT
        elif word == _MISS and reason != HIT and (not reason or _WORD.match(reason)):
            kinds[kind] = reason
    saved_s = None
    for each in fields:
        name, _, value = each.strip().partition("=")
        if name == _SAVED:
            try:
                saved_s = seconds(value, "RFORK-CACHES", maximum=MAX_SAVED_S)
            except BadMessage:
                continue
    return CacheResults(kinds, saved_s)
