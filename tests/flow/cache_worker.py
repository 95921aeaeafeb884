"""A worker without a model: its caches, and its seed service. Obeys lines.

    python -m tests.flow.cache_worker '{"root": folder, "folder": name, "max_model_len": "8192"}'

Options come from the environment. Prints its address, then answers each line on standard input with a line of JSON.
``fork HOST:PORT`` begins to fetch, ``fetched`` waits for the end of that, ``forward`` runs a first forward's hooks,
``warm`` ends the warm-up and waits for the offer.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from tests.flow.seed_worker import manifest
from vllm_rfork.caches.collector import QuietDirectory
from vllm_rfork.config import parse_config
from vllm_rfork.messages import SeedAddress
from vllm_rfork.net.credentials import Credentials
from vllm_rfork.net.event_loop import background
from vllm_rfork.seed_service import SeedService
from vllm_rfork.startup import collecting, offers, report
from vllm_rfork.startup.settings import CacheSettings
from vllm_rfork.startup.worker_caches import WorkerCaches
from vllm_rfork.vllm_compat.start_up.listener import CachePlace, JsonPlace, listen, listener

KEY = "q$prod"
#: Two pieces of a transfer and a bit.
COMPILED = b"compiled" * 300_000
TABLE = b'{"_metadata": {"gpu": "H200"}}'


class Worker:
    """One process of the chain."""

    def __init__(self, root: Path, folder: str, max_model_len: str) -> None:
        self.root = root
        settings = parse_config({}).settings
        credentials = Credentials.of(settings)
        carried = CacheSettings.of(settings, credentials)
        assert carried is not None
        self.caches = WorkerCaches(carried, lambda kind: root)
        listen(self.caches)
        service = SeedService(
            manifest(KEY, "epoch-1"),
            bind_host="127.0.0.1",
            credentials=credentials,
            advertised_host="127.0.0.1",
            caches=offers.current,
        )
        self.port = background().call(service.start(), 30)
        identity = {"torch": "2.11.0", "model_config": hashlib.sha256(max_model_len.encode()).hexdigest()[:16]}
        self.details = {"model_config.max_model_len": max_model_len}
        self.aot = CachePlace("torch_aot", "rank_0_0", identity, root, ("aot", folder), last="model")
        self.table = JsonPlace("autotune_table", "rank0", identity, root, ("tables",), f"{folder}.json", bytes)

    def fork(self, seed: str) -> dict[str, Any]:
        host, _, port = seed.rpartition(":")
        self.caches.seed_known(SeedAddress(host, int(port), 0), KEY)
        return {}

    def fetched(self) -> dict[str, Any]:
        assert self.caches._fetch is not None
        assert self.caches._fetch.wait(30)
        return {"asked": self.caches._fetch.nbytes}

    def forward(self) -> dict[str, Any]:
        started = time.monotonic()
        listener().explain(self.details)
        for place, path, content in (
            (self.aot, self.root.joinpath(*self.aot.directory, "model"), COMPILED),
            (self.table, self.root.joinpath(*self.table.directory, self.table.file), TABLE),
        ):
            listener().about_to_read(place)
            used = path.exists()
            if not used:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            assert path.read_bytes() == content
            listener().outcome(place.kind, place.name, used=used, seconds=0.5 if used else None)
            listener().produced(place, None if used else 20.0)
        return {"took_s": time.monotonic() - started}

    def warm(self) -> dict[str, Any]:
        listener().warm()
        while (offered := offers.current()) is None:
            time.sleep(0.01)
        return {"announced": report.announced(KEY), "offers": [str(each.artifact) for each in offered.artifacts]}


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    collecting.QuietDirectory = functools.partial(QuietDirectory, quiet_s=0.05)  # type: ignore[assignment, misc]
    collecting._PAUSE_S = 0.05
    given = json.loads(sys.argv[1])
    worker = Worker(Path(given["root"]), given["folder"], given["max_model_len"])
    print(json.dumps({"address": f"127.0.0.1:{worker.port}"}), flush=True)
    for line in sys.stdin:
        name, *arguments = line.split()
        print(json.dumps(getattr(worker, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
