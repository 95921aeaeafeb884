"""Where the promises are thin: races around withdrawal, memory that two models share, errors nobody expected."""

from __future__ import annotations

import ctypes
import functools
import gc
import threading
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.vllm.conftest import LogRecords, Planner, SeedProcess, eventually, extra_for
from tests.vllm.engine_process import load, vllm_config
from tests.vllm.test_failures import falls_back
from vllm_rfork import attempt, receiver, seeding
from vllm_rfork.attempt import Attempt, Target
from vllm_rfork.config import parse_config
from vllm_rfork.devices.cpu import CpuSide
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.memory import MemoryEngine, open_engines
from vllm_rfork.errors import ConfigError, EngineError, ForkError
from vllm_rfork.plan import LoadPlan
from vllm_rfork.segments import Segment
from vllm_rfork.state import apply_state
from vllm_rfork.vllm_compat.fingerprint import fingerprint_facts
from vllm_rfork.vllm_compat.registries import Registries

pytestmark = pytest.mark.vllm


@pytest.fixture
def no_seeds() -> Iterator[None]:
    seeding.withdraw_all("a test begins")
    yield
    seeding.withdraw_all("a test is over")


# --- withdrawal while a seed is being started -----------------------------------------------------------------------


def test_no_seed_comes_after_a_withdrawal_that_met_it_while_it_was_made(
    model_a: Path, planner: Planner, monkeypatch: pytest.MonkeyPatch, no_seeds: None
) -> None:
    """The bytes may have changed since: what was captured before the withdrawal must never be announced."""
    making, go_on = threading.Event(), threading.Event()
    make = seeding._make

    def slowly(plan: LoadPlan) -> Any:
        making.set()
        assert go_on.wait(30)
        return make(plan)

    monkeypatch.setattr(seeding, "_make", slowly)
    extra = extra_for(planner.url, model_url="withdrawn while made")
    load(vllm_config(model_a, load_format="rfork", extra=extra))
    assert making.wait(30)
    starting = list(seeding._starting)
    seeding.withdraw_all("weights are updated")
    go_on.set()
    for each in starting:
        each.thread.join(30)
    assert seeding.wait_until_started(1) == []
    eventually(lambda: not open_engines(), "the engine is closed")


def test_a_withdrawal_does_not_wait_for_all_of_a_start(
    model_a: Path, planner: Planner, monkeypatch: pytest.MonkeyPatch, no_seeds: None
) -> None:
    """It meets the start in the check of the bytes: nothing is served or announced after that."""
    checking, go_on = threading.Event(), threading.Event()
    recheck = LoadPlan.recheck

    def slowly(plan: LoadPlan) -> None:
        checking.set()
        assert go_on.wait(30)
        recheck(plan)

    monkeypatch.setattr(LoadPlan, "recheck", slowly)
    monkeypatch.setattr("vllm_rfork.seed.SeedService", lambda **_: pytest.fail("a service was made"))
    load(vllm_config(model_a, load_format="rfork", extra=extra_for(planner.url, model_url="withdrawn while checked")))
    assert checking.wait(30)
    # It is in the list by now, where the withdrawal finds it.
    (seed,) = seeding._seeds
    withdrawal = threading.Thread(target=seeding.withdraw_all, args=("weights are updated",))
    withdrawal.start()
    eventually(seed._withdrawing.is_set, "the withdrawal has begun")
    go_on.set()
    withdrawal.join(30)
    assert seeding.wait_until_started(5) == []
    eventually(lambda: not open_engines(), "the engine is closed")


def test_a_withdrawal_is_bounded_where_a_start_never_ends(
    model_a: Path, planner: Planner, monkeypatch: pytest.MonkeyPatch, no_seeds: None, rfork_log: LogRecords
) -> None:
    """A native call that hangs must not take the worker with it; and what comes after it must not be served."""
    registering, go_on = threading.Event(), threading.Event()
    register = MemoryEngine.register

    def hanging(self: MemoryEngine, regions: Any) -> None:
        registering.set()
        assert go_on.wait(60)
        register(self, regions)

    monkeypatch.setattr(MemoryEngine, "register", hanging)
    bounds = {"rfork_request_timeout_sec": 0.5, "rfork_seed_timeout_sec": 0.5}
    extra = extra_for(planner.url, model_url="hangs while registering", **bounds)
    load(vllm_config(model_a, load_format="rfork", extra=extra))
    assert registering.wait(30)
    starting = list(seeding._starting)
    withdrawal = threading.Thread(target=seeding.withdraw_all, args=("weights are updated",), daemon=True)
    withdrawal.start()
    withdrawal.join(20)
    returned = not withdrawal.is_alive()
    go_on.set()
    for each in starting:
        each.thread.join(30)
    assert returned
    assert seeding.wait_until_started(1) == []
    assert not any("announced" in line for line in rfork_log.texts())
    eventually(lambda: not open_engines(), "the engine is closed")


def test_bytes_that_were_not_checked_are_not_passed_on(
    model_a: Path, planner: Planner, seed: SeedProcess, monkeypatch: pytest.MonkeyPatch, no_seeds: None,
    rfork_log: LogRecords,
) -> None:  # fmt: skip
    """Whoever switches the check off runs a risk of their own, not of others."""
    monkeypatch.setattr(MemoryEngine, "read", _scrambling(MemoryEngine.read))
    load(vllm_config(model_a, load_format="rfork", extra=extra_for(planner.url, rfork_verify="off")))
    assert seeding.wait_until_started(30) == []
    assert any("forked" in line for line in rfork_log.texts())


# --- what a failed fork may leave behind ----------------------------------------------------------------------------


def _scrambling(read: Any) -> Any:
    def scrambled(self: MemoryEngine, endpoint: str, segments: Any, timeout_s: float) -> None:
        read(self, endpoint, segments, timeout_s)
        for segment in segments:
            ctypes.memset(segment.local, 0x55, segment.nbytes)

    return scrambled


def test_a_failed_fork_does_not_touch_what_an_earlier_model_uses(
    model_a: Path, default_a: Any, rfork_log: LogRecords, planner: Planner, seed: SeedProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Rotary tables are shared by all models of a process: a draft's fork that goes wrong must spare the target's."""
    target = load(vllm_config(model_a))
    table = target.model.layers[0].self_attn.rotary_emb.cos_sin_cache
    before = table.clone()
    try:
        monkeypatch.setattr(MemoryEngine, "read", _scrambling(MemoryEngine.read))
        falls_back(model_a, default_a, planner.url, rfork_log, cause="VerificationError")
        assert torch.equal(table, before)
    finally:
        table.copy_(before)


def test_a_failed_model_is_freed_when_it_would_have_been_compiled(
    model_a: Path, planner: Planner, seed: SeedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's compile wrapper hands torch a hook that holds the model."""
    built: list[weakref.ref[Any]] = []
    fill = _loader_class()._fill

    def looking(self: Any, plan: LoadPlan, model: nn.Module, model_config: Any) -> None:
        built.append(weakref.ref(model))
        fill(self, plan, model, model_config)

    monkeypatch.setattr(_loader_class(), "_fill", looking)
    monkeypatch.setattr(MemoryEngine, "read", _scrambling(MemoryEngine.read))
    hooks: Any = torch._dynamo.convert_frame._bytecode_hooks
    before = len(hooks)
    extra = extra_for(planner.url, rfork_become_seed=False)
    model = load(vllm_config(model_a, load_format="rfork", extra=extra, enforce_eager=False))
    try:
        assert len(built) == 2
        assert len(hooks) == before + 1, "the test is about compiled models"
        gc.collect()
        assert [each() is not None for each in built] == [False, True]
    finally:
        model.model.cleanup()


def _loader_class() -> Any:
    from vllm_rfork.loader import RForkModelLoader

    return RForkModelLoader


@pytest.mark.parametrize("seedless", [True, False])
def test_an_engine_lets_go_of_memory_before_post_processing_may_free_it(
    seedless: bool, model_a: Path, planner: Planner, seed: SeedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registered without anyone who keeps it alive: after a fork by a worker that is no seed, and after a failure."""
    from vllm.model_executor.model_loader import base_loader

    if not seedless:
        monkeypatch.setattr(receiver, "pair", _raising(ForkError("told to fail after registering")))
    seen: list[int] = []
    process = base_loader.process_weights_after_loading

    def looking(*args: Any, **kwargs: Any) -> Any:
        seen.append(sum(engine.registered_nbytes for engine in open_engines()))
        return process(*args, **kwargs)

    monkeypatch.setattr(base_loader, "process_weights_after_loading", looking)
    load(vllm_config(model_a, load_format="rfork", extra=extra_for(planner.url, rfork_become_seed=False)))
    assert seen == [0]


def _raising(error: BaseException) -> Any:
    def raises(*args: Any, **kwargs: Any) -> Any:
        raise error

    return raises


# --- errors that nobody expected ------------------------------------------------------------------------------------


def test_an_unexpected_error_in_a_fork_falls_back_and_gives_the_lease_back(
    model_a: Path, default_a: Any, rfork_log: LogRecords, planner: Planner, seed: SeedProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(LoadPlan, "accept", _raising(RuntimeError("no memory for a digest")))
    falls_back(model_a, default_a, planner.url, rfork_log, cause="no memory for a digest", leases=planner.leases)


def test_an_unexpected_error_while_opening_an_engine_falls_back(
    model_a: Path, default_a: Any, rfork_log: LogRecords, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryEngine, "open", _raising(OSError("libwhatever.so: undefined symbol")))
    falls_back(model_a, default_a, planner.url, rfork_log, cause="undefined symbol", leases=planner.leases)


def test_a_worker_that_cannot_be_described_loads_as_without_us(
    model_a: Path, default_a: Any, rfork_log: LogRecords, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_rfork.plan.fingerprint_facts", _raising(AttributeError("no such configuration")))
    falls_back(model_a, default_a, planner.url, rfork_log, cause="no such configuration", rfork_become_seed=True)


def test_an_allocator_that_cannot_be_asked_costs_the_fork_and_not_the_start(
    model_a: Path, default_a: Any, rfork_log: LogRecords, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CUDA's own asynchronous allocator, which keeps no snapshot."""
    monkeypatch.setattr(CpuSide, "blocks", _raising(RuntimeError("snapshot is not meaningful")))
    falls_back(model_a, default_a, planner.url, rfork_log, cause="is not meaningful", rfork_become_seed=True)
    assert any("not a seed" in line and "is not meaningful" in line for line in rfork_log.warnings)


def test_no_memory_for_digests_costs_the_seed_and_not_the_start(
    model_a: Path, planner: Planner, rfork_log: LogRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_rfork.verify.digests", _raising(torch.OutOfMemoryError("out of memory")))
    load(vllm_config(model_a, load_format="rfork", extra=extra_for(planner.url, model_url="no room")))
    assert any("not a seed" in line and "OutOfMemoryError" in line for line in rfork_log.warnings)


def test_state_that_cannot_be_set_rebuilds_the_model(planner: Planner) -> None:
    """The bytes are there by then, and part of the state may be."""
    with pytest.raises(ForkError) as caught:
        _run(planner, _raising(ForkError("state x of the seed cannot be set here")))
    assert caught.value.mutated


def _run(planner: Planner, accept: Any) -> None:
    settings = parse_config(extra_for(planner.url)).settings
    one = Attempt(settings, "key", "memory", EngineConfig(device="cpu"))
    local = SimpleNamespace(fingerprint="f", regions=())
    lease = SimpleNamespace(seed="127.0.0.1:1:0", ttl_s=None)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attempt, "fork", lambda *args: SimpleNamespace(nbytes=0))
            patch.setattr(Attempt, "_grant", lambda *args: SimpleNamespace(lease=lease, keeper=None))
            patch.setattr(Attempt, "_end_grant", lambda *args: None)
            taking = SimpleNamespace(accept=accept, arrived=lambda segments: None, close=lambda: None)
            one.run(Target(local, lambda: taking, None, lambda nbytes: None))  # type: ignore[arg-type]
    finally:
        one.close()


def test_a_read_in_flight_is_not_forgotten_where_disconnecting_fails_too() -> None:
    """Its buffers belong to the engine; the disconnect's own error says nothing of that."""

    class Stuck(MemoryEngine):
        def connect(self, endpoint: str, timeout_s: float) -> None:
            pass

        def read(self, *args: Any) -> None:
            raise EngineError("stuck", "read", "no return", mutated=True, in_flight=True)

        def disconnect(self, endpoint: str) -> None:
            raise EngineError("stuck", "connect", "another call does not return")

    remote = SimpleNamespace(engine="memory", endpoint="e", epoch="1", nbytes=8)
    request: Any = SimpleNamespace(
        local=SimpleNamespace(engine="memory", seed_key="k", fingerprint="f"),
        engine=Stuck(),
        seeds=SimpleNamespace(manifest=lambda *args: None, confirm_epoch=lambda *args: None),
        request_timeout_s=1.0,
        timeout_s=5.0,
        max_batch_nbytes=None,
        untouched=frozenset(),
        progress=lambda nbytes: None,
    )
    keeper: Any = SimpleNamespace(lease=SimpleNamespace(seed="s"), check=lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(receiver, "_wait", lambda request, call: remote)
        patch.setattr(receiver, "pair", lambda local, remote: [Segment(8, 8, 8)])
        with pytest.raises(EngineError) as caught:
            receiver.fork(request, keeper, receiver.StageTimes())
    assert caught.value.in_flight


class _Hostile(dict[str, int]):
    def items(self) -> Any:
        raise RuntimeError("not now")


def test_a_model_that_cannot_be_walked_loads_all_the_same(
    model_a: Path, default_a: Any, rfork_log: LogRecords, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    monkeypatch.setattr(
        Qwen2ForCausalLM, "__init__", _with_attribute(Qwen2ForCausalLM.__init__, "hostile", _Hostile(a=1))
    )
    extra = extra_for(planner.url, model_url="cannot be walked")
    load(vllm_config(model_a, load_format="rfork", extra=extra))
    assert any("not a seed" in line and "not now" in line for line in rfork_log.warnings), rfork_log.warnings


def _with_attribute(init: Any, name: str, value: Any) -> Any:
    @functools.wraps(init)
    def initialised(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        setattr(self, name, value)

    return initialised


# --- state and identity ---------------------------------------------------------------------------------------------


def test_state_inside_a_container_that_is_not_here_is_refused() -> None:
    """Setting an attribute called ``scales[0]`` would look like success."""
    with pytest.raises(ForkError, match="no place here"):
        apply_state(nn.Linear(2, 2), {"scales[0]": 1.0})


def test_where_experts_are_placed_is_part_of_the_fingerprint(model_a: Path) -> None:
    """Equal ranks and shapes, other experts."""
    config = vllm_config(model_a)

    def facts() -> dict[str, Any]:
        return fingerprint_facts(
            config, config.model_config, layout="checkpoint", engine="memory", device=torch.device("cpu"), dummy=False
        )

    before = facts()
    config.parallel_config.expert_placement_strategy = "round_robin"
    assert facts() != before


@pytest.mark.parametrize(
    ("option", "value"), [("rfork_token", "hunter2\n"), ("rfork_scheduler_url", "ftp://u:hunter2@host")]
)
def test_no_secret_in_the_traceback_of_a_wrong_setting(option: str, value: str) -> None:
    """vLLM logs the whole chain of a start that fails."""
    with pytest.raises(ConfigError) as caught:
        parse_config({option: value})
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_name_server_that_hangs_costs_one_request_timeout_in_total(
    model_a: Path, rfork_log: LogRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking up the planner's name is part of reaching it."""
    over = threading.Event()
    lookup = __import__("socket").getaddrinfo

    def hanging(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host != "planner.invalid":
            return lookup(host, *args, **kwargs)
        over.wait(20)
        raise OSError("no answer from the name server")

    monkeypatch.setattr("socket.getaddrinfo", hanging)
    extra = extra_for("http://planner.invalid:1", rfork_request_timeout_sec=0.5, rfork_become_seed=False)
    del extra["rfork_seed_advertise_host"]
    monkeypatch.delenv("VLLM_HOST_IP", raising=False)
    loading_thread = threading.Thread(
        target=load, args=(vllm_config(model_a, load_format="rfork", extra=extra),), daemon=True
    )
    loading_thread.start()
    try:
        eventually(lambda: any("falling back" in line for line in rfork_log.warnings), "the fallback", 15)
    finally:
        over.set()
        loading_thread.join(30)


def test_a_value_that_loading_replaces_by_an_object_is_not_offered(
    model_a: Path, planner: Planner, no_seeds: None, rfork_log: LogRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Receivers would go on with what construction put there."""
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    load_weights = Qwen2ForCausalLM.load_weights

    def replacing(self: Any, weights: Any) -> Any:
        self.scheme = object()
        return load_weights(self, weights)

    monkeypatch.setattr(Qwen2ForCausalLM, "__init__", _with_attribute(Qwen2ForCausalLM.__init__, "scheme", None))
    monkeypatch.setattr(Qwen2ForCausalLM, "load_weights", replacing)
    load(vllm_config(model_a, load_format="rfork", extra=extra_for(planner.url, model_url="replaces a value")))
    assert seeding.wait_until_started(30) == []
    assert any("not a seed" in line and "scheme" in line for line in rfork_log.warnings), rfork_log.warnings


def test_names_that_a_failed_model_has_translated_or_remembered_are_put_back() -> None:
    """Translated twice, a quantization misses the layers that it must leave alone; and ids are given again."""
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config
    from vllm.model_executor.models import utils

    quantization = Fp8Config(ignored_layers=["layers.0.mlp"])
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}), quant_config=quantization)
    remembered = dict(utils._model_to_pp_missing_layer_names)
    registries = Registries.capture(config)
    mapper = utils.WeightsMapper(orig_to_new_prefix={"": "model."})
    quantization.apply_vllm_mapper(mapper)
    quantization.packed_modules_mapping.update(qkv_proj=["q_proj"])
    utils.get_pp_missing_layer_names(nn.ModuleDict({"lm_head": utils.PPMissingLayer()}))
    registries.restore()
    assert quantization.ignored_layers == ["layers.0.mlp"]
    assert quantization.packed_modules_mapping == {}
    assert utils._model_to_pp_missing_layer_names == remembered
    quantization.apply_vllm_mapper(mapper)
    assert quantization.ignored_layers == ["model.layers.0.mlp"]
