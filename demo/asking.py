"""The demo's prompts, sent to a server through the OpenAI API, and the whole answers.

One prompt at a time, because a batch can change log-probabilities in their last digits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import httpx

from demo.processes import DemoError

PROMPTS = (
    "Bral toren stilo ver.",
    "Kelis dan motrum falen",
    "Wor zena",
    "Stalum, grin hol tenari! 1 2 3",
    "Napel driso",
)
ANSWER_TOKENS = 16
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Answer:
    """One answer: the text, its token ids, and each token's log-probability as the server computed it."""

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


def ask(base_url: str, model: str, prompt: str) -> Answer:
    """Complete one prompt, greedily.

    Raises:
        DemoError: the server did not answer, or left something out.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "logprobs": 1,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    try:
        # trust_env=False: a proxy set for the internet must not see a request to this machine
        reply = httpx.post(f"{base_url}/v1/completions", json=body, timeout=TIMEOUT_S, trust_env=False)
        reply.raise_for_status()
        choice = reply.json()["choices"][0]
        return Answer(prompt, choice["text"], tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]))
    except (httpx.HTTPError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DemoError(f"{base_url} did not answer {prompt!r}: {error!r}") from error


def ask_all(base_url: str, model: str, prompts: Sequence[str] = PROMPTS) -> list[Answer]:
    """Ask every prompt, one after the other."""
    return [ask(base_url, model, prompt) for prompt in prompts]


def sha256(answers: Sequence[Answer]) -> str:
    """A digest of every answer, log-probabilities to their last bit: JSON writes a float so that it reads back."""
    return hashlib.sha256(json.dumps([asdict(answer) for answer in answers]).encode()).hexdigest()
