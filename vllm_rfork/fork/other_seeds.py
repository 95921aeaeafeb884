"""One WARNING that names the differences between this worker and the seeds of its key with other fingerprints.

Without it, a seed with another dtype or version looks like a cold start, and the log does not show why the worker
loaded from storage. Only logs, in the background, after the load has continued.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from vllm_rfork.clients import SeedClient
from vllm_rfork.errors import SeedError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.manifest.facts import described, differences
from vllm_rfork.messages import OtherSeeds
from vllm_rfork.net.event_loop import background

logger = worker_logger(__name__)


class OtherFingerprints:
    """Logs the differences of one worker, once.

    Args:
        facts: this worker's facts, as ``facts.short_facts`` returns them.
    """

    def __init__(self, client: SeedClient, seed_key: str, facts: Mapping[str, str]) -> None:
        self._client, self._seed_key, self._facts = client, seed_key, facts
        self._warned = False
        self._text = ""

    def warn(self, others: Sequence[OtherSeeds]) -> None:
        """Ask ``others`` for their facts in the background and log what differs; later calls do nothing."""
        if others and not self._warned:
            self._warned = True
            background().spawn(self._warn(others), "rfork-differing-facts")

    def known(self) -> str:
        """The differences as they were logged; empty if there are none, or not yet."""
        return self._text

    async def _warn(self, others: Sequence[OtherSeeds]) -> None:
        self._text = await warn_of_other_fingerprints(self._client, self._seed_key, self._facts, others)


async def warn_of_other_fingerprints(
    client: SeedClient, seed_key: str, own: Mapping[str, str], others: Sequence[OtherSeeds]
) -> str:
    """Ask one seed of each fingerprint for its facts, log what differs and return it; bounded by the client's timeout.

    Args:
        own: this worker's facts.
        others: at most ``messages.MAX_OTHERS``.
    """
    answers = await asyncio.gather(*(client.facts(each.example, seed_key) for each in others), return_exceptions=True)
    known: list[tuple[Mapping[str, str], int]] = []
    unknown: list[str] = []
    for each, answer in zip(others, answers, strict=True):
        if isinstance(answer, SeedError):
            unknown.append(f"seed {each.example} did not return its facts ({answer})")
        elif isinstance(answer, BaseException):
            raise answer
        else:
            known.append((answer, each.seeds))
    texts = differences(own, known)
    if known and not texts:
        unknown.append("the facts that differ are not among those that seeds publish")
    count, text = sum(each.seeds for each in others), "; ".join(filter(None, [described(texts), *unknown]))
    logger.warning(
        "%d seed%s of key %s cannot be forked from, because %s built with other facts: %s",
        count,
        "" if count == 1 else "s",
        seed_key,
        "it was" if count == 1 else "they were",
        text,
    )
    return text
