"""A worker in a process of its own: loads a model, becomes a seed, reports it, waits for its end.

Writes one JSON line with the seeds' addresses and the digests of the loaded tensors to the pipe whose number is its
second argument, then serves until standard input ends.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    from tests.vllm import engine_process
    from vllm_rfork.seeding.manager import manager

    arguments: dict[str, Any] = json.loads(sys.argv[1])
    model = Path(arguments["model"])
    config = engine_process.vllm_config(
        model, load_format="rfork", extra=arguments["extra"], **arguments.get("changes", {})
    )
    loaded = engine_process.load_digested(config)
    seeds = manager().seeds(60)
    said = {"seeds": [str(seed.address) for seed in seeds], "loaded": loaded.before, "processed": loaded.after}
    with os.fdopen(int(sys.argv[2]), "w") as answers:
        print(json.dumps(said), file=answers, flush=True)
    sys.stdin.read()
    manager().withdraw("told to end", last=True)


if __name__ == "__main__":
    main()
