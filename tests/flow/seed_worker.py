"""A worker without a model: seed services, heartbeats and a watcher, as a loader composes them. Obeys lines.

    python seed_worker.py '{"planner": url, "keys": [key, ...], "interval_s": s}'

answers each line on standard input with a line of JSON: ``state``, ``suspend``, ``resume EPOCH``, ``withdraw``.
"""

from __future__ import annotations

import json
import os
import sys

from vllm_rfork.background import BackgroundTask, background
from vllm_rfork.clients import PlannerClient
from vllm_rfork.heartbeat import Heartbeat
from vllm_rfork.manifest import Manifest, Region, Span, TensorEntry
from vllm_rfork.messages import SeedAddress
from vllm_rfork.seed_service import Offer, SeedService
from vllm_rfork.watcher import Watcher


def manifest(key: str, epoch: str) -> Manifest:
    return Manifest(
        seed_key=key,
        fingerprint="f1",
        epoch=epoch,
        layout="checkpoint",
        engine="memory",
        endpoint="nowhere",
        regions=(Region(4096, 4096),),
        spans=(Span(0, 4096, 12),),
        tensors=(TensorEntry("w", "bfloat16", (2, 3), (3, 1), 0),),
    )


class Role:
    """One seed of this worker: the target's or the draft's."""

    def __init__(self, planner: str, key: str, interval_s: float, watcher: Watcher) -> None:
        self.key, self.interval_s, self.watcher = key, interval_s, watcher
        self.client = PlannerClient(planner, request_timeout_s=5.0)
        self.service = SeedService(seed_key=key, offer=Offer(manifest(key, "epoch-1")), bind_host="127.0.0.1")
        self.address = SeedAddress("127.0.0.1", background().call(self.service.start(), 30), 0)
        self.beats: list[tuple[Heartbeat, BackgroundTask]] = []
        self.announce("epoch-1")

    def announce(self, epoch: str) -> None:
        self.watcher.watch(self.key, self.address, epoch=epoch)
        beat = Heartbeat(self.client, self.key, self.address, interval_s=self.interval_s, fingerprint="f1", epoch=epoch)
        self.beats.append((beat, background().spawn(beat.run(), f"heartbeat {self.address}")))

    def suspend(self) -> None:
        self.service.suspend("the weights are about to change")
        beat, task = self.beats.pop()
        background().call(beat.withdraw(), 10)
        task.wait(10)
        self.watcher.forget(self.key, self.address)

    def resume(self, epoch: str) -> None:
        self.service.resume(Offer(manifest(self.key, epoch)))
        self.announce(epoch)

    def withdraw(self) -> None:
        self.suspend()
        background().call(self.service.stop(), 10)


def main() -> None:
    options = json.loads(sys.argv[1])
    watcher = Watcher.start(options["planner"], None, 5.0)
    roles = [Role(options["planner"], key, options["interval_s"], watcher) for key in options["keys"]]
    for line in sys.stdin:
        order, _, argument = line.strip().partition(" ")
        for role in roles:
            if order == "suspend":
                role.suspend()
            elif order == "resume":
                role.resume(argument)
            elif order == "withdraw":
                role.withdraw()
        state = {
            "pid": os.getpid(),
            "watcher": watcher.pid,
            "seeds": [[role.address.host, role.address.port, role.address.rank] for role in roles],
            "heavy": sorted({"torch", "vllm", "numpy"} & set(sys.modules)),
        }
        print(json.dumps(state), flush=True)


if __name__ == "__main__":
    main()
