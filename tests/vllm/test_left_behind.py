"""What a fork leaves behind in its process, failed or not: nothing for another model or an engine to stumble on."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.open_engines import open_engines
from tests.vllm.conftest import LogRecords, Planner, SeedProcess, extra_for
from tests.vllm.engine_process import load, vllm_config
from tests.vllm.falling_back import falls_back
from tests.vllm.faults import raising, scrambled
from vllm_rfork.engines.memory import MemoryEngine
from vllm_rfork.errors import ForkError
from vllm_rfork.fork import transfer
from vllm_rfork.load.machine import LoadMachine
from vllm_rfork.vllm_compat.registries import Registries

pytestmark = pytest.mark.vllm


def test_a_failed_fork_does_not_touch_what_an_earlier_model_uses(
    model_a: Path, default_a: Any, rfork_log: LogRecords, planner: Planner, seed: SeedProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Rotary tables are shared by all models of a process: a draft's fork that goes wrong must spare the target's."""
    target = load(vllm_config(model_a))
    table = target.model.layers[0].self_attn.rotary_emb.cos_sin_cache
    before = table.clone()
    try:
        monkeypatch.setattr(MemoryEngine, "read", scrambled(MemoryEngine.read))
        falls_back(model_a, default_a, planner.url, rfork_log, cause="VerificationError")
        assert torch.equal(table, before)
    finally:
        table.copy_(before)


def test_a_failed_model_is_freed_when_it_would_have_been_compiled(
    model_a: Path, planner: Planner, seed: SeedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's compile wrapper hands torch a hook that holds the model."""
    built: list[weakref.ref[Any]] = []
    fill = LoadMachine.fill

    def looking(self: LoadMachine, model: nn.Module, model_config: Any) -> None:
        built.append(weakref.ref(model))
        fill(self, model, model_config)

    monkeypatch.setattr(LoadMachine, "fill", looking)
    monkeypatch.setattr(MemoryEngine, "read", scrambled(MemoryEngine.read))
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


@pytest.mark.parametrize("seedless", [True, False])
def test_an_engine_lets_go_of_memory_before_post_processing_may_free_it(
    seedless: bool, model_a: Path, planner: Planner, seed: SeedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registered without anyone who keeps it alive: after a fork by a worker that is no seed, and after a failure."""
    from vllm.model_executor.model_loader import base_loader

    if not seedless:
        monkeypatch.setattr(transfer, "pair", raising(ForkError("told to fail after registering")))
    seen: list[int] = []
    process = base_loader.process_weights_after_loading

    def looking(*args: Any, **kwargs: Any) -> Any:
        seen.append(sum(engine.registered_nbytes for engine in open_engines()))
        return process(*args, **kwargs)

    monkeypatch.setattr(base_loader, "process_weights_after_loading", looking)
    load(vllm_config(model_a, load_format="rfork", extra=extra_for(planner.url, rfork_become_seed=False)))
    assert seen == [0]


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
