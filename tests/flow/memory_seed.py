"""A seed without a model: some bytes in memory, offered as a loader offers weights, with the loader's own options.

    python -m tests.flow.memory_seed '{"rfork_scheduler_url": url, ...}'

fills its memory with what :func:`contents` gives, says its address in a line of JSON, and ends with its input.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys

from vllm_rfork.config import Settings, parse_config
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.registry import AUTO
from vllm_rfork.fork.engine_set import EngineSet
from vllm_rfork.fork.session import ForkSession
from vllm_rfork.manifest.schema import Manifest, Region, Span, TensorEntry
from vllm_rfork.seeding.engines import SeedEngines
from vllm_rfork.seeding.publication import SeedConfig
from vllm_rfork.seeding.seed import Seed
from vllm_rfork.selftest.buffers import Buffer

KEY = "/models/q$prod$kv_both$0$0"
NBYTES = 1_000_003


def contents() -> bytes:
    return random.Random(7).randbytes(NBYTES)


def digest_of(buffer: Buffer) -> str:
    return hashlib.sha256(buffer.read(0, NBYTES)).hexdigest()


def manifest_of(buffer: Buffer, digest: str = "") -> Manifest:
    return Manifest(
        seed_key=KEY,
        fingerprint="f1",
        epoch="",
        layout="checkpoint",
        engine="memory",
        endpoint="",
        regions=(Region(buffer.address, NBYTES),),
        spans=(Span(0, buffer.address, NBYTES, digest),),
        tensors=(TensorEntry("w", "uint8", (NBYTES,), (1,), 0),),
        digest_algorithm="sha256",
    )


def session_of(settings: Settings) -> ForkSession:
    order = ["memory"] if settings.rfork_engine == AUTO else settings.rfork_engine.split(",")
    return ForkSession(settings, KEY, EngineSet(order, EngineConfig(device="cpu")))


def seed_of(settings: Settings, session: ForkSession, buffer: Buffer) -> Seed:
    """The seed, not started yet, of the bytes in ``buffer``, which ``session``'s engine has registered or will."""
    config = SeedConfig(
        planner_url=settings.rfork_scheduler_url,
        credentials=session.credentials,
        bind_host=settings.rfork_seed_bind_host,
        advertise_host=settings.rfork_seed_advertise_host,
        port=0,
        rank=0,
        request_timeout_s=settings.rfork_request_timeout_sec,
        ready_timeout_s=settings.rfork_seed_timeout_sec,
        heartbeat_interval_s=settings.rfork_heartbeat_interval_sec,
        labels=session.labels,
        slots=settings.rfork_seed_slots or None,
    )
    manifest = manifest_of(buffer, digest_of(buffer))
    engines = SeedEngines(session.engines.hand_over())
    return Seed(config, manifest, engines, buffer, lambda: None, session.intent.id)


def main() -> None:
    settings = parse_config(json.loads(sys.argv[1])).settings
    buffer = Buffer("cpu", NBYTES)
    buffer.write(0, contents())
    session = session_of(settings)
    seed = seed_of(settings, session, buffer)
    print(json.dumps({"address": str(seed.start())}), flush=True)
    for order in sys.stdin:
        if order == "withdraw\n":
            seed.withdraw("the test says so")
            print("{}", flush=True)


if __name__ == "__main__":
    main()
