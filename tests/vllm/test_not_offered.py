"""What a worker does not offer: weights that it cannot vouch for, or that will move while it serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.open_engines import open_engines
from tests.vllm.conftest import LogRecords, Planner, SeedProcess, eventually, extra_for
from tests.vllm.engine_process import load, load_digested, vllm_config
from tests.vllm.faults import scrambled, with_attribute
from vllm_rfork.engines.memory import MemoryEngine
from vllm_rfork.load import context
from vllm_rfork.seeding.manager import manager
from vllm_rfork.vllm_compat.eligibility import quantizes_online, seed_obstacle

pytestmark = pytest.mark.vllm


def test_weights_that_post_processing_wrote_to_are_not_offered(
    model_a: Path, planner: Planner, rfork_log: LogRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.model_loader import base_loader

    process = base_loader.process_weights_after_loading

    def writing(model: nn.Module, *args: Any) -> None:
        model.get_parameter("model.norm.weight").data.add_(1)  # through .data: no version counter moves
        process(model, *args)

    monkeypatch.setattr(base_loader, "process_weights_after_loading", writing)
    extra = extra_for(planner.url, model_url="written-to")
    load(vllm_config(model_a, load_format="rfork", extra=extra))
    assert not [seed for seed in manager().seeds(30) if seed.address]
    assert any("not a seed" in line and "model.norm.weight" in line for line in rfork_log.warnings)
    assert "written-to" not in str(planner.snapshot())


def test_models_that_are_quantized_while_loading_refuse_the_checkpoint_layout() -> None:
    class Online:
        uses_meta_device = True

    layer = nn.Linear(2, 2)
    assert not quantizes_online(layer)
    layer.quant_method = Online()
    assert quantizes_online(layer)
    assert quantizes_online(nn.Linear(2, 2, device="meta"))


@pytest.mark.parametrize("how", ["from storage", "forked"])
def test_where_weights_are_not_kept_twice_replaced_ones_mean_no_seed(
    how: str,
    model_a: Path,
    default_a: Any,
    planner: Planner,
    seed: SeedProcess,
    rfork_log: LogRecords,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on accelerators; on CPU post-processing replaces every linear weight."""
    monkeypatch.setattr(context, "KEEPS_LOADED", frozenset())
    eventually(lambda: seed.said["seeds"][0] in planner.seeds() and planner.leases() == 0, "the seed is free")
    key = "tiny" if how == "forked" else "not-kept"
    loaded = load_digested(vllm_config(model_a, load_format="rfork", extra=extra_for(planner.url, model_url=key)))
    assert loaded.before == default_a.before
    assert loaded.after == default_a.after
    assert not [each for each in manager().seeds(30) if each.address]
    assert any("not a seed" in line and "qkv_proj.weight" in line for line in rfork_log.warnings)
    assert not open_engines()


@pytest.mark.parametrize("how", ["from storage", "forked"])
def test_where_weights_are_not_kept_twice_untouched_ones_are_offered(
    how: str, model_a: Path, planner: Planner, seed: SeedProcess, rfork_log: LogRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with unquantized dense models on accelerators, where post-processing leaves the tensors in place."""
    from vllm.model_executor.model_loader import base_loader

    monkeypatch.setattr(context, "KEEPS_LOADED", frozenset())
    monkeypatch.setattr(base_loader, "process_weights_after_loading", lambda *args: None)
    eventually(lambda: seed.said["seeds"][0] in planner.seeds() and planner.leases() == 0, "the seed is free")
    key = "tiny" if how == "forked" else "in-place"
    model = load(vllm_config(model_a, load_format="rfork", extra=extra_for(planner.url, model_url=key)))
    try:
        (mine,) = [each for each in manager().seeds(30) if each.address]
        eventually(lambda: str(mine.address) in planner.seeds(), "it is announced")
        registered = {(region.address, region.nbytes) for region in mine.manifest.regions}
        weight = model.get_parameter("model.norm.weight")
        assert (weight.data_ptr(), weight.nbytes) in registered
        assert rfork_log.warnings == []
    finally:
        manager().withdraw("test is over", last=True)


def test_bytes_that_were_not_checked_are_not_passed_on(
    model_a: Path, planner: Planner, seed: SeedProcess, monkeypatch: pytest.MonkeyPatch, no_seeds: None,
    rfork_log: LogRecords,
) -> None:  # fmt: skip
    """Whoever switches the check off runs a risk of their own, not of others."""
    monkeypatch.setattr(MemoryEngine, "read", scrambled(MemoryEngine.read))
    load(vllm_config(model_a, load_format="rfork", extra=extra_for(planner.url, rfork_verify="off")))
    assert manager().seeds(30) == []
    assert any("forked" in line for line in rfork_log.texts())


def test_a_value_that_loading_replaces_by_an_object_is_not_offered(
    model_a: Path, planner: Planner, no_seeds: None, rfork_log: LogRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Receivers would go on with what construction put there."""
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    load_weights = Qwen2ForCausalLM.load_weights

    def replacing(self: Any, weights: Any) -> Any:
        self.scheme = object()
        return load_weights(self, weights)

    monkeypatch.setattr(Qwen2ForCausalLM, "__init__", with_attribute(Qwen2ForCausalLM.__init__, "scheme", None))
    monkeypatch.setattr(Qwen2ForCausalLM, "load_weights", replacing)
    load(vllm_config(model_a, load_format="rfork", extra=extra_for(planner.url, model_url="replaces a value")))
    assert manager().seeds(30) == []
    assert any("not a seed" in line and "scheme" in line for line in rfork_log.warnings), rfork_log.warnings


# --- experts that move --------------------------------------------------------------------------------------------


def parallel(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """vLLM's own ParallelConfig with its checks, which know no expert load balancing on a processor."""
    from vllm.config import ParallelConfig
    from vllm.platforms import current_platform

    with monkeypatch.context() as patched:
        patched.setattr(type(current_platform), "is_cuda_alike", lambda self: True)
        return ParallelConfig(tensor_parallel_size=2, enable_expert_parallel=True, **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, ""),
        ({"enable_eplb": True}, "enable_eplb"),
        ({"enable_eplb": True, "enable_elastic_ep": True, "eplb_config": {"use_async": False}}, "enable_eplb"),
    ],
    ids=["experts stay", "load balancing", "elastic"],
)
def test_a_configuration_under_which_experts_move_makes_no_seed(
    options: dict[str, Any], reason: str, model_a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own configuration says so, on every platform that has it."""
    config = vllm_config(model_a)
    config.parallel_config = parallel(monkeypatch, **options)
    found = seed_obstacle(config)
    assert bool(found) is bool(reason)
    assert reason in (found or "")


def test_elastic_experts_are_balanced_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So one option tells of both; where this changes, ``seed_obstacle`` has to look at the other one as well."""
    with pytest.raises(ValueError, match="enable_eplb"):
        parallel(monkeypatch, enable_elastic_ep=True)


@pytest.mark.usefixtures("no_seeds")
def test_a_worker_whose_experts_move_loads_and_offers_nothing(
    model_a: Path, default_a: Any, planner: Planner, rfork_log: LogRecords
) -> None:
    config = vllm_config(model_a, load_format="rfork", extra=extra_for(planner.url, model_url="experts move"))
    config.parallel_config.enable_eplb = True  # dense: nothing moves, and the setting alone decides
    loaded = load_digested(config)
    assert loaded.before == default_a.before
    assert manager().seeds(1) == []
    (warning,) = rfork_log.warnings
    assert "not a seed" in warning
    assert "enable_eplb" in warning
    assert "experts move" not in str(planner.snapshot())
