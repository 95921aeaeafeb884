"""The verdict of the demo, as pure functions: answers and sources in, complaints out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from demo.asking import ANSWER_TOKENS, Answer, sha256
from demo.milestones import Weights

EXPECTED_SOURCES = ("storage", "fork", "fork", "storage")


@dataclass(frozen=True)
class ServerResult:
    """The result of one of the four servers.

    Attributes:
        name: A, B, C or D.
        weights: the origin of its weights.
        own_seed: ip:port:rank under which it became a seed itself.
        answers: in the order of the prompts.
    """

    name: str
    weights: Weights
    own_seed: str
    answers: tuple[Answer, ...]


def are_identical(results: Sequence[ServerResult]) -> bool:
    """Return True if all gave the same text, token ids and log-probabilities, to the last bit."""
    return all(result.answers == results[0].answers for result in results)


def complaints(results: Sequence[ServerResult], other: Sequence[Answer]) -> list[str]:
    """All deviations from what the demo must show; empty if there are none.

    Args:
        results: the four servers, in order.
        other: the answers of the fifth, which has other weights.
    """
    found = []
    first = results[0]
    sources = tuple(result.weights.source for result in results)
    if sources != EXPECTED_SOURCES:
        found.append(f"the sources are {', '.join(sources)} instead of {', '.join(EXPECTED_SOURCES)}")
    for seed, receiver in itertools.pairwise(results[:3]):
        if receiver.weights.source == "fork" and receiver.weights.seed != seed.own_seed:
            found.append(f"{receiver.name} forked from {receiver.weights.seed}, and {seed.name} is {seed.own_seed}")
    if len({result.weights.nbytes for result in results}) != 1 or first.weights.nbytes <= 0:
        found.append(f"the servers have {[result.weights.nbytes for result in results]} bytes of weights")
    for result in results:
        found += usable(result.name, result.answers)
    found += [
        f"{result.name} and {first.name} answer {mine.prompt!r} differently: {mine.text!r}, {theirs.text!r}"
        for result in results[1:]
        for mine, theirs in zip(result.answers, first.answers, strict=True)
        if mine != theirs
    ]
    for mine, theirs in zip(other, first.answers, strict=True):
        if mine.token_ids == theirs.token_ids or mine.logprobs == theirs.logprobs:
            found.append(f"a server with other weights gives the same answer to {mine.prompt!r}")
    return found


def usable(name: str, answers: Sequence[Answer]) -> list[str]:
    """Reasons why a server's answers cannot distinguish two models: empty, cut short, or all the same."""
    found = []
    if len({answer.prompt for answer in answers}) < 2:
        found.append(f"{name} received no two different prompts")
    for answer in answers:
        if not answer.text.strip():
            found.append(f"{name} gave an empty answer to {answer.prompt!r}")
        if not len(answer.token_ids) == len(answer.logprobs) == ANSWER_TOKENS:
            found.append(f"{name} answers {answer.prompt!r} with {len(answer.token_ids)} tokens")
    if len({answer.token_ids for answer in answers}) < len(answers):
        found.append(f"{name} gave the same answer to different prompts")
    return found


def why_forks_are_slower(results: Sequence[ServerResult]) -> str | None:
    """One sentence for the table if a fork took longer than the quickest load from storage; ``None`` otherwise."""
    seconds: dict[str, list[float]] = {"fork": [], "storage": []}
    for result in results:
        seconds[result.weights.source].append(result.weights.weights_s)
    if not all(seconds.values()) or max(seconds["fork"]) <= min(seconds["storage"]):
        return None
    return (
        "Forks are not faster here because the files of the small model are in this machine's page cache: both ways "
        "copy memory, and a fork also connects and verifies digests; storage that is really read is much slower."
    )


def report(engine: str, results: Sequence[ServerResult]) -> dict[str, Any]:
    """The content of build/demo.json."""
    return {
        "engine": engine,
        "identical": are_identical(results),
        "servers": [
            {
                "name": result.name,
                "source": result.weights.source,
                "seed": result.weights.seed,
                "nbytes": result.weights.nbytes,
                "weights_s": result.weights.weights_s,
                "answers_sha256": sha256(result.answers),
            }
            for result in results
        ],
    }
