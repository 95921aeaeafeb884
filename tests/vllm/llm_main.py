"""A whole vLLM engine in one process (its worker is this process): answers, reloads and sleeps on order.

Orders come as lines on standard input; each answer is one line of JSON in the pipe whose number
is the second argument.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

PROMPTS = ([5, 9, 77, 130], [200, 3, 3, 8, 41], [17], list(range(40, 60)))


def main() -> None:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import LLM, SamplingParams

    from vllm_rfork.seeding.manager import manager
    from vllm_rfork.vllm_compat.amx import request_amx_tiles

    request_amx_tiles()  # the default loader needs it as well

    arguments: dict[str, Any] = json.loads(sys.argv[1])
    llm = LLM(
        model=arguments["model"],
        load_format=arguments["load_format"],
        model_loader_extra_config=arguments["extra"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=128,
        max_num_seqs=4,
        **arguments.get("changes", {}),
    )
    seeds = [str(seed.address) for seed in manager().seeds(60)]
    say({"seeds": seeds})

    def answers(max_tokens: int) -> list[Any]:
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=3, detokenize=False)
        found = []
        for prompt in PROMPTS:  # one at a time: batches alone can change logprobs
            output = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)[0].outputs[0]
            logprobs = [{str(t): p.logprob for t, p in step.items()} for step in output.logprobs or []]
            found.append([list(output.token_ids), logprobs])
        return found

    for line in sys.stdin:
        order = line.strip()
        if order == "answer":
            say({"answers": answers(12)})
        elif order == "generate for ever":
            say({"generating": True})
            while True:
                answers(60)
        elif order.startswith("call "):
            name, *rest = json.loads(order.removeprefix("call "))
            outcome = "done"
            try:
                llm.collective_rpc(name, args=tuple(rest))
            except Exception as error:  # noqa: BLE001 - whether the method works here is not the question
                outcome = repr(error)
            say({"called": name, "outcome": outcome})
        elif order == "write by a function":
            llm.collective_rpc(add_one)
            say({"written": True})


def add_one(worker: Any) -> None:
    worker.get_model().model.norm.weight.data.add_(1)


def say(what: dict[str, Any]) -> None:
    with os.fdopen(int(sys.argv[2]), "w", closefd=False) as pipe:
        print(json.dumps(what), file=pipe)


if __name__ == "__main__":
    main()
