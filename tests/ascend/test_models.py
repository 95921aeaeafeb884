"""A fork carries what vLLM-Ascend's post-processing makes: derived tensors, private layouts, Python-side state."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.ascend import models
from tests.ascend.fake_torch_npu import FakeTorchNpu, segment
from tests.inventory import collect, match_state, sizes_of, state_of
from vllm_rfork.devices import registry
from vllm_rfork.devices.npu import NpuBackend
from vllm_rfork.errors import ForkError, ManifestMismatch, VerificationError
from vllm_rfork.manifest.codec import validate_manifest
from vllm_rfork.manifest.pairing import pair
from vllm_rfork.manifest.schema import ManifestHeader
from vllm_rfork.model.coverage import check_accounted
from vllm_rfork.model.digest import digests
from vllm_rfork.model.python_state import changed_state, gone_state
from vllm_rfork.model.tensors import TensorInventory
from vllm_rfork.vllm_compat import ascend, eligibility
from vllm_rfork.vllm_compat.registries import Registries

CPU = torch.device("cpu")
HEADER = ManifestHeader(
    seed_key="k",
    fingerprint="f",
    epoch="e",
    layout="runtime",
    engine="memory",
    endpoint="x",
)


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTorchNpu]:
    """The processor's tensors, seen as an NPU's."""
    fake = FakeTorchNpu()
    monkeypatch.setitem(sys.modules, "torch_npu", fake)
    monkeypatch.setitem(registry._BACKENDS, "cpu", NpuBackend)
    yield fake
    models.SfaImpl.q_hadamard = None


def _fork(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A seed with real weights, and a receiver that was post-processed from dummies and then forked."""
    seed, receiver = make(), make()
    models.fill(seed, real=True)
    built, loaded = state_of(seed), sizes_of(seed)
    models.post_process(seed)
    check_accounted(loaded, sizes_of(seed))
    offered, after = collect(seed, CPU), state_of(seed)
    remote = offered.manifest(HEADER, state=changed_state(built, after), state_gone=gone_state(built, after))
    validate_manifest(remote)

    own = state_of(receiver)
    models.fill(receiver, real=False)
    checks = ascend.postpone_checks(receiver)
    models.post_process(receiver)
    target = collect(receiver, CPU)
    for piece in pair(target.manifest(HEADER), remote):
        ctypes.memmove(piece.local, piece.remote, piece.nbytes)
    match_state(receiver, own, dict(remote.state), remote.state_gone)
    checks.run()
    assert _digests(target) == _digests(offered)
    return seed, receiver


def _digests(collection: TensorInventory) -> dict[str, str]:
    of_span = digests(span.data for span in collection.spans)
    return {entry.name: of_span[entry.span] for entry in collection.entries if entry.span != -1}


def _only(layer: Callable[[], nn.Module]) -> nn.Module:
    model = nn.Module()
    model.layer = layer()
    return model


def test_tensors_that_a_static_w8a8_layer_derives_are_carried(npu: FakeTorchNpu) -> None:
    make = functools.partial(
        models.Linear, 8, 8, models.w8a8_static, input_scale=(1,), input_offset=(1,), weight_scale=(8, 1)
    )
    seed, receiver = _fork(lambda: _only(make))

    for name in ("weight", "aclnn_input_scale", "aclnn_input_scale_reciprocal", "aclnn_input_offset", "weight_scale"):
        assert torch.equal(getattr(receiver.layer, name), getattr(seed.layer, name)), name


def test_chunks_that_replace_a_weight_are_carried(npu: FakeTorchNpu) -> None:
    seed, receiver = _fork(lambda: _only(lambda: models.Linear(8, 8, models.w8a8_dynamic, weight_scale=(8, 1))))

    assert torch.equal(receiver.layer.weight_2, seed.layer.weight_2)
    assert torch.equal(receiver.layer.weight_2_scale_fp32, seed.layer.weight_2_scale_fp32)
    assert receiver.layer._chunk_size == 4


def test_a_number_that_was_taken_from_a_weight_is_the_seeds(npu: FakeTorchNpu) -> None:
    make = functools.partial(models.Linear, 4, 4, models.flatquant, left_trans=(4, 4), clip_ratio=(1,))
    seed, receiver = _fork(lambda: _only(make))

    assert receiver.layer.aclnn_clip_ratio == seed.layer.aclnn_clip_ratio > 0
    assert torch.equal(receiver.layer.weight_packed, seed.layer.weight_packed)


def test_flags_and_shapes_beside_the_weights_are_the_seeds(npu: FakeTorchNpu) -> None:
    seed, receiver = _fork(lambda: _only(lambda: models.Linear(4, 4, models.mxfp8, weight_scale=(4, 4))))

    assert receiver.layer._mxfp8_transformed
    assert receiver.layer._mxfp8_original_shapes == seed.layer._mxfp8_original_shapes
    assert torch.equal(receiver.layer.weight_scale, seed.layer.weight_scale)


def test_a_layer_that_is_marked_as_transformed_and_is_not_does_not_fork(npu: FakeTorchNpu) -> None:
    """A seed whose weights were reloaded without the flag would offer what the receiver does not have."""
    seed, receiver = (models.Linear(4, 4, models.mxfp8, weight_scale=(4, 6)) for _ in range(2))
    for layer in (seed, receiver):
        models.post_process(layer)
    seed._mxfp8_original_shapes["weight"] = (1, 16)

    with pytest.raises(ForkError, match="_mxfp8_original_shapes"):
        match_state(receiver, {}, changed_state({}, state_of(seed)), ())


@pytest.mark.parametrize("consumer", [True, False])
def test_the_kv_role_that_is_stamped_on_layers_is_kept(npu: FakeTorchNpu, consumer: bool) -> None:
    process = functools.partial(models.pdmix, is_kv_consumer=consumer)
    make = functools.partial(models.Linear, 4, 4, process, input_scale=(1,), input_offset=(1,), weight_scale=(4, 1))
    _, receiver = _fork(lambda: _only(make))

    assert receiver.layer.is_kv_consumer is consumer


@pytest.mark.parametrize("dynamic_eplb", [False, True])
def test_experts_are_carried_transposed_or_as_lists(npu: FakeTorchNpu, dynamic_eplb: bool) -> None:
    seed, receiver = _fork(lambda: _only(lambda: models.Experts(dynamic_eplb=dynamic_eplb)))

    name = "w13_weight_list" if dynamic_eplb else "w13_weight"
    ours, theirs = getattr(receiver.layer, name), getattr(seed.layer, name)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_statistics_of_experts_are_no_weights(npu: FakeTorchNpu) -> None:
    assert not [entry for entry in collect(models.Experts(), CPU).entries if "moe_load" in entry.name]


def test_what_latent_attention_holds_outside_of_modules_is_carried(npu: FakeTorchNpu) -> None:
    seed, receiver = _fork(lambda: _only(lambda: models.Attention(models.MlaImpl, npu)))

    ours, theirs = (model.layer.mla_attn.mla_attn.impl for model in (receiver, seed))
    assert torch.equal(ours.W_UV, theirs.W_UV)
    assert torch.equal(ours.W_UK_T, theirs.W_UK_T)
    assert ours.enable_mlapo is False


def test_fused_projections_are_carried_in_their_private_layout_and_with_their_aliases(npu: FakeTorchNpu) -> None:
    seed, receiver = _fork(lambda: _only(lambda: models.Attention(models.MlaImpl, npu, mlapo_possible=True)))

    ours, theirs = (model.layer.mla_attn.mla_attn.impl for model in (receiver, seed))
    assert npu.get_npu_format(ours.wd_qkv) == 29
    assert torch.equal(npu.npu_format_cast(ours.wd_qkv, 2), npu.npu_format_cast(theirs.wd_qkv, 2))
    assert ours.gamma1.data_ptr() == receiver.layer.q_a_layernorm.weight.data_ptr()
    assert ours.enable_mlapo is True


@pytest.mark.parametrize("consumer", [True, False])
def test_projections_that_sparse_attention_empties_are_accounted_for(npu: FakeTorchNpu, consumer: bool) -> None:
    options = {"mlapo_possible": True, "is_kv_consumer": consumer}
    seed, receiver = _fork(lambda: _only(lambda: models.Attention(models.SfaImpl, npu, **options)))

    ours, theirs = (model.layer.mla_attn.mla_attn.impl for model in (receiver, seed))
    assert ours.kv_b_proj.weight.numel() == 0
    assert (ours.fused_qkv_a_proj.weight is None) is consumer
    assert torch.equal(ours.W_UV, theirs.W_UV)


def test_a_transposed_view_of_a_private_tensor_is_carried_with_its_padding(npu: FakeTorchNpu) -> None:
    seed, receiver = _fork(lambda: _only(lambda: models.Nz(npu)))

    (entry,) = collect(receiver, CPU).entries
    assert (entry.format, entry.shape) == (29, (50, 40))
    assert torch.equal(npu.npu_format_cast(receiver.layer.weight.t(), 2), npu.npu_format_cast(seed.layer.weight.t(), 2))


def test_a_private_layout_on_one_side_alone_is_a_mismatch(npu: FakeTorchNpu) -> None:
    seed, receiver = models.Nz(npu), models.Nz(npu)
    models.post_process(seed)
    receiver.weight.data = receiver.weight.data.t()

    with pytest.raises(ManifestMismatch, match="format"):
        pair(collect(receiver, CPU).manifest(HEADER), collect(seed, CPU).manifest(HEADER))


def test_the_caches_that_serving_binds_are_no_weights(npu: FakeTorchNpu) -> None:
    model = _only(lambda: models.Attention(models.MlaImpl, npu))
    before = [entry.name for entry in collect(model, CPU).entries]
    model.layer.mla_attn.mla_attn.impl.key_cache = torch.zeros(100)
    model.layer.mla_attn.mla_attn.impl.o_proj_full_gather_pool = torch.zeros(100)

    assert [entry.name for entry in collect(model, CPU).entries] == before


@pytest.mark.parametrize("module", ["vllm.distributed.parallel_state", "vllm_ascend.distributed.parallel_state"])
def test_groups_of_ranks_are_no_part_of_the_model(npu: FakeTorchNpu, module: str) -> None:
    group = type("GroupCoordinator", (), {"__module__": module})()
    group.buffer, group.unique_name = torch.zeros(100), "tp:0"
    model = models.Experts()
    model.moe_config = type("FusedMoEConfig", (), {})()
    model.moe_config.tp_group = model.tp_group = group

    assert [entry.name for entry in collect(model, CPU).entries] == ["w13_weight", "w2_weight"]
    assert not [name for name in state_of(model) if "group" in name]


def test_regions_are_as_few_as_the_allocators_blocks(npu: FakeTorchNpu) -> None:
    model = nn.Module()
    block = torch.zeros(1 << 20, dtype=torch.uint8)
    npu.npu.segments = [segment(block.data_ptr(), block.numel(), device=3)]
    # Tensors of one allocator's block have storages of their own.
    model.listed = [npu._C._weak_ref_tensor(block[start : start + 1000]) for start in range(0, 100_000, 2048)]

    collection = collect(model, CPU)

    assert len(collection.spans) == 49
    assert [(region.address, region.nbytes) for region in collection.regions] == [(block.data_ptr(), 48 * 2048 + 1000)]
    validate_manifest(collection.manifest(HEADER))


@pytest.mark.parametrize(
    ("name", "value", "aligned"),
    [
        ("TRANSFER_ENGINE_BACKEND", "hixl", True),
        ("TRANSFER_ENGINE_BACKEND", "", False),
        ("YR_TE_HIXL_ROUTE", "auto", True),
        ("YR_TE_HIXL_ROUTE", "HCCS", True),
        ("YR_TE_HIXL_ROUTE", "roce", False),
    ],
)
def test_regions_begin_at_multiples_of_2_mib_where_the_route_wants_it(
    npu: FakeTorchNpu, monkeypatch: pytest.MonkeyPatch, name: str, value: str, aligned: bool
) -> None:
    monkeypatch.setenv(name, value)
    memory = torch.zeros(6 << 20, dtype=torch.uint8)
    start = -(-memory.data_ptr() // (2 << 20)) * (2 << 20)  # an allocator of large pages begins its blocks there
    npu.npu.segments = [segment(start, 4 << 20, device=3)]
    offset = start - memory.data_ptr() + 12_800
    model = nn.Module()
    model.weight = npu._C._weak_ref_tensor(memory[offset : offset + 1000])

    (region,) = collect(model, CPU).regions

    assert (region.address == start) is aligned
    assert region.address + region.nbytes == model.weight.data_ptr() + 1000


# -- the check of shared experts -------------------------------------------------------------------------------------


def test_dummies_fail_the_check_of_shared_experts() -> None:
    model = models.SharedExperts()
    models.fill(model, real=False)
    with pytest.raises(ValueError, match="split computation"):
        models.post_process(model)


def test_the_check_of_shared_experts_runs_once_on_the_real_weights(npu: FakeTorchNpu) -> None:
    _, receiver = _fork(lambda: _only(models.SharedExperts))

    assert receiver.layer.checked.times == 1
    receiver.layer._validate_shared_expert_consistency()
    assert receiver.layer.checked.times == 2


def test_weights_that_fail_the_check_after_all_are_no_model() -> None:
    model = models.SharedExperts()
    models.fill(model, real=False)
    checks = ascend.postpone_checks(model)
    models.post_process(model)

    with pytest.raises(VerificationError, match="shared experts"):
        checks.run()


def test_a_check_that_nobody_asked_for_does_not_run() -> None:
    model = models.SharedExperts()
    models.fill(model, real=False)
    checks = ascend.postpone_checks(model)

    checks.run()

    assert model.checked.times == 0


def test_postponed_checks_do_not_keep_a_failed_model() -> None:
    model = models.SharedExperts()
    gone = weakref.ref(model)
    checks = ascend.postpone_checks(model)
    models.post_process(model)

    del model
    gc.collect()

    assert gone() is None
    checks.run()


# -- classes, processes, settings ------------------------------------------------------------------------------------


def test_a_class_level_matrix_is_known_and_another_one_is_not(
    npu: FakeTorchNpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, receiver = _fork(lambda: _only(lambda: models.Attention(models.SfaImpl, npu)))

    assert list(ascend.class_tensors(receiver)) == ["SfaImpl.q_hadamard"]
    assert ascend.unknown_class_tensors(receiver) == []
    monkeypatch.setattr(models.MlaImpl, "shared_weight", torch.ones(3), raising=False)
    assert ascend.unknown_class_tensors(receiver) == ["MlaImpl.shared_weight"]


def test_what_construction_enters_process_wide_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    rotary: Any = types.ModuleType("vllm_ascend.ops.rotary_embedding")
    rotary._cos_sin_cache = None
    experts: Any = types.ModuleType("vllm_ascend.ops.fused_moe.fused_moe")
    experts.AscendFusedMoE = type("AscendFusedMoE", (), {"moe_counter": -1})
    adaptor: Any = types.ModuleType("vllm_ascend.eplb.adaptor.vllm_adaptor")
    adaptor.VllmEplbAdaptor = type("VllmEplbAdaptor", (), {"_registered_moe_layers": ["target"]})
    shards: Any = types.ModuleType("vllm_ascend.ops.layer_shard_linear")
    shards._series_dict = {"o_proj": "target"}
    for module in (rotary, experts, adaptor, shards):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    layers, series = adaptor.VllmEplbAdaptor._registered_moe_layers, shards._series_dict
    config = types.SimpleNamespace(compilation_config=types.SimpleNamespace(static_forward_context={}))
    registries = Registries.capture(config)

    rotary._cos_sin_cache = torch.ones(2)
    experts.AscendFusedMoE.moe_counter = 40
    layers.append("failed")
    series["o_proj"], series["other"] = "failed", "failed"
    registries.restore()

    assert rotary._cos_sin_cache is None
    assert experts.AscendFusedMoE.moe_counter == -1
    assert adaptor.VllmEplbAdaptor._registered_moe_layers is layers
    assert layers == ["target"]
    assert series == {"o_proj": "target"}


@pytest.mark.parametrize(
    ("additional", "reason"),
    [
        ({"eplb_config": {"dynamic_eplb": True}}, "expert load"),
        ({"eplb_config": {"expert_map_path": "/map.json"}}, "expert load"),  # switches it on as well
        ({"eplb_config": {"num_redundant_experts": 2}}, ""),
        ({"layer_sharding": ["o_proj"]}, "layer_sharding"),
        ({"layer_sharding": None, "weight_nz_mode": 2}, ""),
        (None, ""),
        ("text", ""),
    ],
)
def test_settings_that_move_weights_make_no_seed(additional: Any, reason: str) -> None:
    config = types.SimpleNamespace(
        additional_config=additional, parallel_config=types.SimpleNamespace(enable_eplb=False)
    )
    found = eligibility.seed_obstacle(config)

    assert bool(found) is bool(reason)
    assert reason in (found or "")


@pytest.mark.parametrize("option", ["enable_sleep_mode", "enable_cumem_allocator"])
def test_weights_in_a_pool_of_their_own_are_refused_on_accelerators(option: str) -> None:
    config = types.SimpleNamespace(model_config=types.SimpleNamespace(**{option: True}))

    assert option in str(eligibility.pool_obstacle(config, torch.device("cuda", 0)))
    assert option in str(eligibility.pool_obstacle(config, types.SimpleNamespace(type="npu", index=0)))  # type: ignore[arg-type]
    assert eligibility.pool_obstacle(config, CPU) is None


def test_an_allocator_that_is_set_to_expandable_segments_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = types.SimpleNamespace(model_config=types.SimpleNamespace(enable_sleep_mode=False))
    assert eligibility.registration_obstacle(config, torch.device("cuda", 0)) is None
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert "expandable" in str(eligibility.registration_obstacle(config, torch.device("cuda", 0)))
