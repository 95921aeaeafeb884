"""A worker without a model: seed services and heartbeats, as a loader composes them. Obeys lines.

    python seed_worker.py '{"planner": url, "keys": [key, ...], "interval_s": s}'

answers each line on standard input with a line of JSON: ``state``, ``suspend``, ``resume EPOCH``, ``withdraw``,
``fork``, ``descriptors LIMIT``.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
from typing import Any

from vllm_rfork.clients import PlannerClient
from vllm_rfork.heartbeat import Heartbeat
from vllm_rfork.manifest.schema import Manifest, Region, Span, TensorEntry
from vllm_rfork.messages import SeedAddress
from vllm_rfork.net.credentials import Credentials, Options
from vllm_rfork.net.event_loop import BackgroundTask, background
from vllm_rfork.seed_service import SeedService


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

    def __init__(self, planner: str, key: str, interval_s: float, options: Options) -> None:
        self.key, self.interval_s = key, interval_s
        credentials = Credentials(options)
        self.client = PlannerClient(planner, request_timeout_s=5.0, credentials=credentials)
        self.service = SeedService(manifest(key, "epoch-1"), bind_host="127.0.0.1")
        self.address = SeedAddress("127.0.0.1", background().call(self.service.start(), 30), 0)
        self.beats: list[tuple[Heartbeat, BackgroundTask]] = []
        self.announce("epoch-1")

    def announce(self, epoch: str) -> None:
        beat = Heartbeat(self.client, self.key, self.address, interval_s=self.interval_s, fingerprint="f1", epoch=epoch)
        self.beats.append((beat, background().spawn(beat.run(), f"heartbeat {self.address}")))

    def suspend(self) -> None:
        self.service.suspend("the weights are about to change")
        beat, task = self.beats.pop()
        background().call(beat.withdraw(), 10)
        task.wait(10)

    def resume(self, epoch: str) -> None:
        background().call(self.service.stop(), 10)
        self.service = SeedService(manifest(self.key, epoch), bind_host="127.0.0.1", port=self.address.port)
        background().call(self.service.start(), 30)
        self.announce(epoch)

    def withdraw(self) -> None:
        self.suspend()
        background().call(self.service.stop(), 10)


def know_names(names: dict[str, str]) -> None:
    """Let ``names`` resolve to addresses, as if a name server knew them."""
    look_up = socket.getaddrinfo

    def found(host: str, *arguments: Any, **named: Any) -> Any:
        return look_up(names.get(host, host), *arguments, **named)

    setattr(socket, "getaddrinfo", found)  # noqa: B010 - mypy refuses the plain assignment


def fork() -> None:
    """A child without an exec, as vLLM and torch make them; it lives until its standard input ends."""
    if os.fork() == 0:
        os.read(0, 1)
        os._exit(0)


def allow_descriptors(soft: int) -> None:
    """Let every new descriptor have a number below ``soft``; 3 allows none."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def main() -> None:
    options = json.loads(sys.argv[1])
    know_names(options.get("names", {}))
    own = Options(ca_file=options.get("ca_file", ""), token=options.get("token", ""))
    roles = [Role(options["planner"], key, options["interval_s"], own) for key in options["keys"]]
    for line in sys.stdin:
        order, _, argument = line.strip().partition(" ")
        for role in roles:
            if order == "suspend":
                role.suspend()
            elif order == "resume":
                role.resume(argument)
            elif order == "withdraw":
                role.withdraw()
        if order == "fork":
            fork()
        elif order == "descriptors":
            allow_descriptors(int(argument))
        state = {
            "pid": os.getpid(),
            "seeds": [[role.address.host, role.address.port, role.address.rank] for role in roles],
            "heavy": sorted({"torch", "vllm", "numpy"} & set(sys.modules)),
        }
        print(json.dumps(state), flush=True)


if __name__ == "__main__":
    main()
