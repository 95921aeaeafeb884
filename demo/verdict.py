"""The verdict of the demo, as pure functions: answers and sources in, complaints out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from demo import throttle
from demo.asking import ANSWER_TOKENS, Answer, sha256
from demo.milestones import Weights

EXPECTED_SOURCES = ("storage", "fork", "fork", "storage")
#: The log has hundredths of a second, and the weights in memory may have fewer bytes than their file.
THROTTLE_TOLERANCE = 0.95


@dataclass(frozen=True)
class ServerResult:
    """The result of one of the four servers.

    Attributes:
        name: A, B, C or D.
        weights: the origin of its weights.
        own_seed: ip:port:rank under which it became a seed itself.
        answers: in the order of the prompts.
        mb_per_s: the rate to which its storage was throttled; ``None``: not throttled.
    """

    name: str
    weights: Weights
    own_seed: str
    answers: tuple[Answer, ...]
    mb_per_s: float | None = None


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
        found += unthrottled(result)
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


def unthrottled(result: ServerResult) -> list[str]:
    """Reasons why a server whose storage was to be throttled read it faster."""
    weights = result.weights
    if result.mb_per_s is None or weights.source != "storage":
        return []
    least_s = THROTTLE_TOLERANCE * weights.nbytes / (result.mb_per_s * 1e6)
    if weights.load_format == throttle.FORMAT and weights.weights_s >= least_s:
        return []
    return [
        f"{result.name} read storage in {weights.weights_s:.2f} s with the load format {weights.load_format}, and "
        f"{result.mb_per_s:g} MB/s take {least_s:.2f} s"
    ]


def explanation(results: Sequence[ServerResult]) -> str | None:
    """One sentence that explains the table; ``None`` if the sources are not the expected ones."""
    if tuple(result.weights.source for result in results) != EXPECTED_SOURCES:
        return None
    throttled, page_cache = results[0], results[-1]
    fork_s = max(result.weights.weights_s for result in results[1:-1])
    return (
        f"A fork took at most {fork_s:.2f} s: {times(throttled, fork_s)} as fast as storage that delivers "
        f"{throttled.mb_per_s:g} MB/s, and {times(page_cache, fork_s)} as fast as this machine's page cache, which is "
        "empty on a host that starts the model for the first time."
    )


def times(result: ServerResult, fork_s: float) -> str:
    """The time of ``result`` as a multiple of a fork's."""
    return f"{result.weights.weights_s / max(fork_s, 1e-3):.1f} times"


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
                "throttled_mb_per_s": result.mb_per_s,
                "answers_sha256": sha256(result.answers),
            }
            for result in results
        ],
    }
