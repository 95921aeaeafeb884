"""One WARNING that names what differs between this worker and the seeds of its key with other fingerprints.

Without it, a seed with another dtype or version looks like a cold start: the worker loads from storage and nobody knows
why. Runs in the background, after the load has gone on. Must not decide anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from vllm_rfork.clients import SeedClient
from vllm_rfork.errors import SeedError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.manifest.facts import described, differences
from vllm_rfork.messages import OtherSeeds

logger = worker_logger(__name__)


async def warn_of_other_fingerprints(
    client: SeedClient, seed_key: str, own: Mapping[str, str], others: Sequence[OtherSeeds]
) -> None:
    """Ask one seed of each fingerprint for its facts and log what differs; bounded by the client's time-out.

    Args:
        own: this worker's facts.
        others: at most ``messages.MAX_OTHERS``.
    """
    answers = await asyncio.gather(*(client.facts(each.example, seed_key) for each in others), return_exceptions=True)
    known: list[tuple[Mapping[str, str], int]] = []
    silent: list[str] = []
    for each, answer in zip(others, answers, strict=True):
        if isinstance(answer, SeedError):
            silent.append(f"seed {each.example} does not tell its facts ({answer})")
        elif isinstance(answer, BaseException):
            raise answer
        else:
            known.append((answer, each.seeds))
    texts = differences(own, known)
    if known and not texts:
        silent.append("the facts that differ are not among those that seeds tell")
    count = sum(each.seeds for each in others)
    logger.warning(
        "%d seed%s of key %s cannot be forked from, since %s built with other facts: %s",
        count,
        "" if count == 1 else "s",
        seed_key,
        "it was" if count == 1 else "they were",
        "; ".join(filter(None, [described(texts), *silent])),
    )
