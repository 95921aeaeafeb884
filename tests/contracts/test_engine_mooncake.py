"""Mooncake keeps the port's contract over TCP, unmodified, in an environment of its own."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from tests.contracts.driver_buffer import ROOT
from vllm_rfork.engines.mooncake.endpoint import decode, encode
from vllm_rfork.errors import EngineError
from vllm_rfork.selftest.report import GOOD
from vllm_rfork.testing import MIB, PAGE, EngineContract, Processes, pattern

PYTHON = ROOT / ".venv-mooncake" / "bin" / "python"
#: Only TCP on every machine; errors only; and a short wait for a peer that sends nothing, for which close waits.
ENVIRONMENT = {"MC_FORCE_TCP": "1", "GLOG_minloglevel": "2", "MC_TCP_PROGRESS_TIMEOUT_SEC": "2"}


def changed(endpoint: str, **fields: Any) -> str:
    """``endpoint`` as a process with other ``fields`` would have written it, its checksum included."""
    return encode(msgspec.structs.replace(decode(endpoint), **fields))


class TestMooncakeEngine(EngineContract):
    """Host memory over TCP."""

    engine: ClassVar[str] = "mooncake"
    preload: ClassVar[tuple[str, ...]] = ("vllm_rfork.engines.mooncake.engine",)

    def python(self) -> str:
        return str(PYTHON)

    def environment(self) -> Mapping[str, str]:
        return ENVIRONMENT

    # -- registrations -------------------------------------------------------------------------------------------------

    def test_64_thousand_tensors_are_registered_as_one_span(self, processes: Processes) -> None:
        """Mooncake alone would take minutes, and could not describe them to a peer."""
        seed, receiver = processes.two()
        count, step, length = 64_000, 512, 500
        source, target = seed.alloc(count * step, seed=7), receiver.alloc(count * step)
        seed.register(*[[source + i * step, length] for i in range(count)])
        assert seed.elapsed_s < 10.0
        receiver.register([target, count * step])
        endpoint = seed.endpoint()
        receiver.connect(endpoint)
        last = (count - 1) * step
        receiver.read(endpoint, [[target + at, source + at, length] for at in range(0, last + 1, last // 3)])
        assert receiver.peek(target, last, length) == pattern(7, count * step)[last : last + length]
        with pytest.raises(EngineError, match="do not lie in one registered region") as caught:
            receiver.read(endpoint, [[target, source + length - 1, 2]])
        self.check(caught.value, "read", in_flight=False)

    # -- endpoints that lie --------------------------------------------------------------------------------------------

    def test_a_seed_refuses_addresses_that_its_endpoint_invented(self, processes: Processes) -> None:
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, PAGE)
        hidden = seed.alloc(PAGE, seed=8)
        lie = changed(endpoint, regions=sorted([(source, PAGE), (hidden, PAGE)]))
        receiver.connect(lie)
        with pytest.raises(EngineError, match="refuses") as caught:
            receiver.read(lie, [[target, hidden, PAGE]])
        self.check(caught.value, "read", in_flight=True)
        assert caught.value.side == "unknown"
        receiver.close()
        assert receiver.peek(target, 0, PAGE) == bytes(PAGE)
        assert seed.call("ping") == "pong"
        self.still_good(processes, receiver, target, PAGE, closed=True)

    def test_an_address_that_another_process_has_now_is_noticed(self, processes: Processes) -> None:
        seed, receiver, _, _, endpoint = self.seed_and_receiver(processes, PAGE)
        with pytest.raises(EngineError, match="the seed has closed") as caught:
            receiver.connect(changed(endpoint, identity=bytes(range(16))))
        self.check(caught.value, "connect", in_flight=False)
        assert caught.value.retry_elsewhere
        with pytest.raises(EngineError) as caught:
            receiver.connect(changed(endpoint, identity_at=PAGE))
        self.check(caught.value, "connect", in_flight=False)
        assert seed.call("ping") == "pong"
        receiver.connect(endpoint)

    def test_a_seed_that_uses_another_protocol_is_another_lane(self, processes: Processes) -> None:
        _, receiver, source, target, endpoint = self.seed_and_receiver(processes, PAGE)
        with pytest.raises(EngineError, match="MC_FORCE_TCP=1") as caught:
            receiver.connect(changed(endpoint, protocol="rdma"))
        self.check(caught.value, "connect", in_flight=False)
        assert caught.value.code == "lane"
        receiver.read(endpoint, [[target, source, PAGE]])

    # -- peers ---------------------------------------------------------------------------------------------------------

    def test_a_read_given_up_leaves_only_close(self, processes: Processes) -> None:
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, MIB)
        seed.signal(signal.SIGSTOP)
        with pytest.raises(EngineError, match="did not return in time") as caught:
            receiver.read(endpoint, [[target, source, MIB]], timeout_s=0.5)
        self.check(caught.value, "read", in_flight=True)
        with pytest.raises(EngineError, match="given up") as caught:
            receiver.read(endpoint, [[target, source, MIB]])
        assert caught.value.in_flight
        receiver.disconnect(endpoint)
        self.nothing_arrives_after_close(processes, seed, receiver, source, target, MIB)

    def test_a_receiver_stopped_in_the_middle_of_a_read_leaves_its_seed_to_others(self, processes: Processes) -> None:
        nbytes = self.large_nbytes
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, nbytes)
        receiver.send("read_loop", endpoint=endpoint, segments=[[target, source, nbytes]], timeout_s=30.0, seconds=1.0)
        assert receiver.message(60.0) == {"event": "reading"}
        receiver.signal(signal.SIGSTOP)
        self.fence(processes, seed, source, nbytes)
        receiver.signal(signal.SIGCONT)
        assert receiver.result() >= 1
        assert receiver.digest(target) == seed.digest(source)

    def test_memory_that_is_freed_under_a_read_does_not_crash_the_seed(self, processes: Processes) -> None:
        """The seed withdraws first, and no withdrawal waits for a receiver: whatever it reads, its digests decide."""
        nbytes = self.large_nbytes
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, nbytes)
        receiver.send("read_loop", endpoint=endpoint, segments=[[target, source, nbytes]], timeout_s=5.0, seconds=60.0)
        assert receiver.message(60.0) == {"event": "reading"}
        seed.call("free", address=source)
        with pytest.raises(EngineError) as caught:
            receiver.result()
        self.check(caught.value, "read", in_flight=True)
        assert seed.call("ping") == "pong"
        self.still_good(processes, receiver, target, nbytes, closed=True)

    def test_an_idle_engine_burns_no_core(self, processes: Processes) -> None:
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, MIB)
        receiver.read(endpoint, [[target, source, MIB]])
        assert seed.call("cpu_s", seconds=1.0) < 0.05


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``vllm-rfork`` in Mooncake's environment."""
    return subprocess.run(
        [str(PYTHON), "-m", "vllm_rfork.cli.main", *arguments],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_selftest_forks_over_mooncake() -> None:
    done = command("selftest", "--engine", "mooncake", "--size", "8M", "--host", "127.0.0.9")
    assert done.returncode == GOOD, done.stdout + done.stderr
    assert "mooncake/tcp" in done.stdout + done.stderr


def test_leaving_without_close_is_no_crash(tmp_path: Path) -> None:
    """A worker that ends on an error never gets to close its engine."""
    text = (
        "from vllm_rfork.engines.base import EngineConfig\n"
        "from vllm_rfork.engines.mooncake.engine import MooncakeEngine\n"
        "engine = MooncakeEngine()\n"
        "engine.open(EngineConfig(device='cpu'))\n"
        "print(MooncakeEngine.self_check())\n"
    )
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(PYTHON), "-c", text], cwd=tmp_path, env=environment, timeout=240, check=False, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b"an engine opens, over tcp (MC_FORCE_TCP is set)\n"
