"""Errors that nobody expected, from an allocator, an engine or a model, cost the fork or the seed, not the start."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.vllm.conftest import LogRecords, Planner, SeedProcess, extra_for
from tests.vllm.engine_process import load, load_digested, vllm_config
from tests.vllm.falling_back import falls_back
from tests.vllm.faults import raising, with_attribute
from vllm_rfork.config import parse_config
from vllm_rfork.devices.cpu import CpuBackend
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.memory import MemoryEngine
from vllm_rfork.errors import EngineError, ForkError
from vllm_rfork.fork import engine_handle, session, transfer
from vllm_rfork.fork.engine_set import EngineSet
from vllm_rfork.fork.leases import HeldLease, Leases
from vllm_rfork.fork.session import Destination, ForkSession
from vllm_rfork.fork.stage_times import StageTimes
from vllm_rfork.load import from_fork
from vllm_rfork.load.consensus import Consensus
from vllm_rfork.logs.worker import LoggedTexts
from vllm_rfork.manifest.schema import EngineEndpoint
from vllm_rfork.manifest.segments import Segment

pytestmark = pytest.mark.vllm


def test_an_unexpected_error_in_a_fork_falls_back_and_gives_the_lease_back(
    model_a: Path, default_a: Any, rfork_log: LogRecords, planner: Planner, seed: SeedProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(from_fork._Arrival, "accept", raising(RuntimeError("no memory for a digest")))
    falls_back(model_a, default_a, planner.url, rfork_log, cause="no memory for a digest", leases=planner.leases)


def test_an_unexpected_error_while_opening_an_engine_falls_back(
    model_a: Path, default_a: Any, rfork_log: LogRecords, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryEngine, "open", raising(OSError("libwhatever.so: undefined symbol")))
    falls_back(model_a, default_a, planner.url, rfork_log, cause="undefined symbol", leases=planner.leases)


def test_a_worker_that_cannot_be_described_loads_as_without_us(
    model_a: Path, default_a: Any, rfork_log: LogRecords, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_rfork.load.context.fingerprint_facts", raising(AttributeError("no such configuration")))
    falls_back(model_a, default_a, planner.url, rfork_log, cause="no such configuration", rfork_become_seed=True)


def test_an_allocator_that_cannot_be_asked_costs_the_fork_and_not_the_start(
    model_a: Path, default_a: Any, rfork_log: LogRecords, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CUDA's own asynchronous allocator, which keeps no snapshot."""
    monkeypatch.setattr(CpuBackend, "blocks", raising(RuntimeError("snapshot is not meaningful")))
    falls_back(model_a, default_a, planner.url, rfork_log, cause="is not meaningful", rfork_become_seed=True)
    assert any("not a seed" in line and "is not meaningful" in line for line in rfork_log.warnings)


def test_no_memory_for_digests_costs_the_seed_and_not_the_start(
    model_a: Path, planner: Planner, rfork_log: LogRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_rfork.model.digest.digests", raising(torch.OutOfMemoryError("out of memory")))
    load(vllm_config(model_a, load_format="rfork", extra=extra_for(planner.url, model_url="no room")))
    assert any("not a seed" in line and "OutOfMemoryError" in line for line in rfork_log.warnings)


@pytest.mark.parametrize(
    "where", ["vllm_rfork.loader.LoadMachine.outcome", "vllm_rfork.loader.withdraw_before_changes"]
)
def test_an_unexpected_error_after_the_load_costs_the_seed_and_not_the_start(
    where: str, model_a: Path, default_a: Any, planner: Planner, rfork_log: LogRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, raising(RuntimeError("no such attribute any more")))
    extra = extra_for(planner.url, model_url="unexpected")
    assert load_digested(vllm_config(model_a, load_format="rfork", extra=extra)).after == default_a.after
    assert any("not a seed" in line and "no such attribute any more" in line for line in rfork_log.warnings)
    assert planner.leases() == 0


def test_a_property_that_raises_costs_the_fork_and_the_seed_and_not_the_start(
    model_a: Path, default_a: Any, rfork_log: LogRecords, planner: Planner, seed: SeedProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Models compute some attributes when asked, and may not be ready for that; the other ranks hear of it too."""
    told: list[tuple[str, str]] = []

    class Telling(Consensus):
        """An instance of one rank whose words are noted."""

        def decide(self, stage: str, obstacle: str | None, timeout_s: float) -> str | None:
            told.append((stage, obstacle or ""))
            return obstacle

    monkeypatch.setattr(
        "vllm_rfork.load.capture.eligibility.quantizes_online", raising(RuntimeError("not before warm-up"))
    )
    monkeypatch.setattr("vllm_rfork.load.machine.Consensus", Telling)
    falls_back(model_a, default_a, planner.url, rfork_log, cause="RuntimeError: not before warm-up")
    assert [stage for stage, reason in told if "not before warm-up" in reason] == ["seed"]
    load(vllm_config(model_a, load_format="rfork", extra=extra_for(planner.url, model_url="raises")))
    assert any("not a seed" in line and "not before warm-up" in line for line in rfork_log.warnings)


class _Hostile(dict[str, int]):
    def items(self) -> Any:
        raise RuntimeError("not now")


def test_a_model_that_cannot_be_walked_loads_all_the_same(
    model_a: Path, default_a: Any, rfork_log: LogRecords, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    monkeypatch.setattr(
        Qwen2ForCausalLM, "__init__", with_attribute(Qwen2ForCausalLM.__init__, "hostile", _Hostile(a=1))
    )
    extra = extra_for(planner.url, model_url="cannot be walked")
    load(vllm_config(model_a, load_format="rfork", extra=extra))
    assert any("not a seed" in line and "not now" in line for line in rfork_log.warnings), rfork_log.warnings


def test_state_that_cannot_be_set_rebuilds_the_model(planner: Planner) -> None:
    """The bytes are there by then, and part of the state may be."""
    settings = parse_config(extra_for(planner.url)).settings
    one = ForkSession(settings, "key", EngineSet(["memory"], EngineConfig(device="cpu")))
    local = SimpleNamespace(fingerprint="f", regions=())
    lease = SimpleNamespace(seed="127.0.0.1:1:0", ttl_s=None, storage_s=None)

    def read(request: Any, *others: Any) -> Any:
        assert not one.has_written
        request.first_write()
        return SimpleNamespace(nbytes=0)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(session, "transfer", read)
            patch.setattr(Leases, "acquire", lambda *args: HeldLease(lease, None))
            patch.setattr(Leases, "release", lambda *args: None)
            accept = raising(ForkError("state x of the seed cannot be set here"))
            taking = SimpleNamespace(accept=accept, arrived=lambda segments: None, close=lambda: None)
            with pytest.raises(ForkError, match="cannot be set here"):
                one.run(Destination(local, lambda: taking, None, lambda nbytes: None))  # type: ignore[arg-type]
    finally:
        one.close()
    assert one.has_written


def test_a_read_in_flight_is_not_forgotten_where_disconnecting_fails_too() -> None:
    """Its buffers belong to the engine; the disconnect's own error says nothing of that."""

    class Stuck(MemoryEngine):
        def connect(self, endpoint: str, timeout_s: float) -> None:
            pass

        def read(self, *args: Any) -> None:
            raise EngineError("stuck", "read", "no return", in_flight=True)

        def disconnect(self, endpoint: str) -> None:
            raise EngineError("stuck", "connect", "another call does not return")

    remote = SimpleNamespace(endpoints=[EngineEndpoint("memory", "e")], epoch="1", nbytes=8, checkpoint=None)
    request: Any = SimpleNamespace(
        local=SimpleNamespace(seed_key="k", fingerprint="f", regions=()),
        engines=EngineSet(["memory"], EngineConfig(device="cpu")),
        memory=None,
        logged=LoggedTexts(),
        seeds=SimpleNamespace(manifest=lambda *args: None, confirm_epoch=lambda *args: None),
        request_timeout_s=1.0,
        timeout_s=5.0,
        max_batch_nbytes=None,
        untouched=frozenset(),
        landing=None,
        progress=lambda nbytes: None,
        checkpoint=lambda: None,
        connected=lambda engine, lane: None,
        first_write=lambda: None,
    )
    keeper: Any = SimpleNamespace(lease=SimpleNamespace(seed="s", user_id="u"), check=lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_handle, "engine_class", lambda name: Stuck)
        patch.setattr(transfer, "_wait", lambda request, call: remote)
        patch.setattr(transfer, "pair", lambda local, remote: [Segment(8, 8, 8)])
        with pytest.raises(EngineError) as caught:
            transfer.transfer(request, keeper, StageTimes())
    assert caught.value.in_flight
