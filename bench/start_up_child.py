"""One start of real vLLM, from the start of the process to the first token; marks go to standard output.

``python -m bench.start_up_child JSON``: the order has ``model``, ``llm`` (vLLM's engine arguments), ``started_at``
(``time.time()`` before the process was started) and ``guard`` (see ``tests/vllm/aot_guard.py``). The process serves
until standard input ends.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

#: The first token ends the start; the tokens of the second prompt are compared.
FIRST, SECOND = [1, 2, 3, 4], list(range(5, 40))
TOKENS = 16


def main() -> None:
    """Start, answer, and serve until standard input ends."""
    order: dict[str, Any] = json.loads(sys.argv[1])

    def mark(name: str, value: object = None) -> None:
        print("MARK", name, round(time.time() - order["started_at"], 2) if value is None else value, flush=True)

    mark("python")
    from vllm import LLM, SamplingParams

    if order["guard"]:
        from tests.vllm import aot_guard

        aot_guard.install()
    mark("imported")
    llm = LLM(order["model"], **order["llm"])
    mark("engine")

    def answer(prompt: list[int], tokens: int) -> list[int]:
        params = SamplingParams(max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True)
        (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    answer(FIRST, 1)
    mark("first_token")
    mark("tokens", answer(SECOND, TOKENS))
    sys.stdin.read()


if __name__ == "__main__":
    main()
