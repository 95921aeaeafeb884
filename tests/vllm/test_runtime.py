"""The runtime layout in real vLLM: the fork goes over what post-processing made of dummy weights.

On a processor vLLM packs weights into native objects, which is why the layout is refused there. These tests switch
that packing off, as it is on an accelerator, and give the model post-processing of the kinds that accelerators have.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.inventory import state_of
from tests.vllm.conftest import LogRecords, Planner, eventually, extra_for
from tests.vllm.engine_process import digests_of, load, vllm_config
from vllm_rfork.devices.cpu import CpuBackend
from vllm_rfork.load import context, machine
from vllm_rfork.seeding.manager import manager
from vllm_rfork.vllm_compat import dummy_weights, eligibility

pytestmark = pytest.mark.vllm


class Folded:
    """A helper that is no module and holds what post-processing derived, as attention backends do."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.W_UV = weight[:8].clone()
        self.W_UK_T = weight[8:16].t().clone().t()  # strided otherwise than its shape
        self.packed = [weight[16:20].clone(), {"scale": weight.abs().amax(dim=1)}]
        self._k_scale_float = float(weight.abs().max())


def process_like_an_accelerator(model: nn.Module) -> None:
    """Transposes, replaces, derives, stamps and deletes."""
    for module in model.modules():
        if type(module).__name__ != "Qwen2MLP":
            continue
        module.impl = Folded(module.gate_up_proj.weight.data)
        down = module.down_proj
        down.weight = nn.Parameter(down.weight.data.t().contiguous(), requires_grad=False)
        down.input_scale = None
        scale = down.weight.data.float().abs().max()
        down.apply_scaled = lambda x, scale=scale: x * scale
        down.is_large = bool(scale > 0.1)  # false for dummies, true for the checkpoint
        down._k_scale_cpu = torch.tensor(float(scale))


@pytest.fixture
def accelerated(runtime_allowed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's processor post-processes as an accelerator would, and the layout is allowed on it."""
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    monkeypatch.setattr(CpuBackend, "has_copy_engine", True)
    monkeypatch.setattr(Qwen2ForCausalLM, "process_weights_after_loading", process_like_an_accelerator, raising=False)


@pytest.fixture
def fleet(planner: Planner) -> Iterator[Planner]:
    """The shared planner without anybody's seeds for this test's key."""
    yield planner
    manager().seeds(30)
    manager().withdraw("test is over", last=True)


def options(planner: Planner, name: str, **more: Any) -> dict[str, Any]:
    return extra_for(planner.url, model_deploy_strategy_name=name, **more)


def seed_in_this_process(model: Path, extra: dict[str, Any]) -> nn.Module:
    loaded: nn.Module = load(vllm_config(model, load_format="rfork", extra=extra))
    (seed,) = [each for each in manager().seeds(30) if each.manifest.seed_key.startswith("tiny")]
    eventually(lambda: seed.address, "the seed is announced")
    return loaded


def test_a_fork_equals_a_default_load_tensor_by_tensor_and_value_by_value(
    accelerated: None, fleet: Planner, model_a: Path, model_a_without_weights: Path, rfork_log: LogRecords
) -> None:
    wanted = load(vllm_config(model_a))
    extra = options(fleet, "runtime")
    seed = seed_in_this_process(model_a, extra)
    assert digests_of(seed) == digests_of(wanted)
    forked = load(
        vllm_config(model_a_without_weights, load_format="rfork", extra={**extra, "rfork_become_seed": False})
    )
    assert [line for line in rfork_log.texts() if line.startswith("RFork: forked ") and "layout=runtime" in line]
    assert not rfork_log.warnings
    assert digests_of(forked) == digests_of(wanted)
    mlp = forked.model.layers[0].mlp
    assert mlp.down_proj.is_large
    assert mlp.impl._k_scale_float == wanted.model.layers[0].mlp.impl._k_scale_float
    ours, theirs = state_of(forked), state_of(wanted)
    assert ours == {**theirs, **{name: ours[name] for name in ours.keys() & theirs.keys() if name.endswith("seed")}}


def test_a_receiver_that_forked_serves_the_next_one(
    accelerated: None, fleet: Planner, model_a: Path, model_a_without_weights: Path, rfork_log: LogRecords
) -> None:
    wanted = load(vllm_config(model_a))
    extra = options(fleet, "runtime chain")
    seed_in_this_process(model_a, extra)
    forked = load(vllm_config(model_a_without_weights, load_format="rfork", extra=extra))
    manager().seeds(30)
    addresses = [line.split(" from seed ")[1].split(",")[0] for line in rfork_log.texts() if " from seed " in line]
    for each in manager().seeds():
        if str(each.address) == addresses[0]:  # the one that read storage
            each.withdraw("it goes first")
    again = load(vllm_config(model_a_without_weights, load_format="rfork", extra=extra))
    forks = [line for line in rfork_log.texts() if line.startswith("RFork: forked ")]
    assert len(forks) == 2
    assert addresses[0] not in forks[1]
    assert digests_of(again) == digests_of(forked) == digests_of(wanted)


@pytest.mark.parametrize(("seed_is_tied", "weights"), [(True, "same"), (False, "other")])
def test_embeddings_that_are_tied_by_value_are_tied_as_the_seed_has_them(
    accelerated: None,
    fleet: Planner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed_is_tied: bool,
    weights: str,
    rfork_log: LogRecords,
) -> None:
    """A configuration that says tied and a checkpoint that has a head of its own, equal or not."""
    from safetensors.torch import load_file, save_file

    from tests.vllm.models import qwen2

    folder = qwen2(tmp_path / "model", tie_word_embeddings=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head if weights == "same" else head * 2}, file, {"format": "pt"})
    extra = options(fleet, f"tied {weights}")
    wanted = load(vllm_config(folder))
    assert (wanted.lm_head.weight.data_ptr() == wanted.model.embed_tokens.weight.data_ptr()) is seed_is_tied
    seed_in_this_process(folder, extra)
    forked = load(vllm_config(folder, load_format="rfork", extra={**extra, "rfork_become_seed": False}))
    assert [line for line in rfork_log.texts() if line.startswith("RFork: forked ")], rfork_log.texts()
    assert digests_of(forked) == digests_of(wanted)
    assert (forked.lm_head.weight.data_ptr() == forked.model.embed_tokens.weight.data_ptr()) is seed_is_tied


def test_without_a_seed_the_model_is_loaded_once_into_the_structure_that_was_built(
    accelerated: None, fleet: Planner, model_a: Path, rfork_log: LogRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    built: list[Any] = []
    create = BaseModelLoader.create_model
    monkeypatch.setattr(
        BaseModelLoader, "create_model", lambda self, *args, **kwargs: built.append(1) or create(self, *args, **kwargs)
    )
    load(vllm_config(model_a, load_format="rfork", extra=options(fleet, "nobody", rfork_become_seed=False)))
    assert len(built) == 1
    assert [line for line in rfork_log.texts() if "from storage in" in line]


def fails_to_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RFORK_MEMORY_FAULT", "flip_byte=12345")


def fails_to_post_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    def choosy(model: nn.Module) -> None:
        if float(model.model.embed_tokens.weight.abs().max()) < 0.01:
            raise ValueError("these weights cannot be")
        process_like_an_accelerator(model)

    monkeypatch.setattr(Qwen2ForCausalLM, "process_weights_after_loading", choosy)


def fails_to_match_state(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    def other(model: nn.Module) -> None:
        process_like_an_accelerator(model)
        for module in model.modules():
            if type(module).__name__ == "Qwen2MLP":
                module.frozen = (module.impl._k_scale_float,)  # a tuple cannot be written

    monkeypatch.setattr(Qwen2ForCausalLM, "process_weights_after_loading", other)


def at_every_build(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many models that were built from now on are in memory when the next one is."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    built: list[weakref.ref[nn.Module]] = []
    found: list[int] = []
    create = BaseModelLoader.create_model

    def creating(self: Any, *args: Any, **kwargs: Any) -> nn.Module:
        found.append(sum(model() is not None for model in built))
        model: nn.Module = create(self, *args, **kwargs)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(BaseModelLoader, "create_model", creating)
    return found


@pytest.mark.parametrize(
    ("fault", "cause", "both"),
    [
        (fails_to_verify, "VerificationError", False),
        (fails_to_post_process, "failed on the dummy weights: ValueError: these weights cannot be", True),
        (fails_to_match_state, "cannot be set here", True),
    ],
)
def test_a_fork_that_fails_ends_in_a_default_load(
    accelerated: None,
    fleet: Planner,
    model_a: Path,
    rfork_log: LogRecords,
    monkeypatch: pytest.MonkeyPatch,
    fault: Any,
    cause: str,
    both: bool,
) -> None:
    extra = options(fleet, f"fails {cause}")
    if both:
        fault(monkeypatch)
    wanted = load(vllm_config(model_a))
    seed_in_this_process(model_a, extra)
    if not both:
        fault(monkeypatch)
    still_there = at_every_build(monkeypatch)
    loaded = load(vllm_config(model_a, load_format="rfork", extra={**extra, "rfork_become_seed": False}))
    assert still_there == [0, 0], "an accelerator has no room for two models"
    (warning,) = [line for line in rfork_log.warnings if "asking for another" not in line]
    assert warning.startswith("RFork: falling back to load_format=auto: ")
    assert cause in warning
    assert digests_of(loaded) == digests_of(wanted)
    eventually(lambda: fleet.leases() == 0, "the lease is released")


def packed_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on processors without AMX, and with AMX for weights above 1 MiB."""
    from vllm.model_executor.layers import utils

    monkeypatch.setattr(utils, "check_cpu_sgl_kernel", lambda *args: False)


def packed_into_tensors(monkeypatch: pytest.MonkeyPatch, packing: str) -> None:
    """As on processors with AMX, for weights up to 1 MiB; nothing is computed, so any processor can emulate it."""
    from vllm.model_executor.layers import utils

    if packing == "emulated" or not torch.cpu._is_amx_tile_supported():
        monkeypatch.setattr(utils, "check_cpu_sgl_kernel", lambda *args: True)
        monkeypatch.setattr(torch.ops._C, "convert_weight_packed", pack_by_pairs, raising=False)


def pack_by_pairs(weight: torch.Tensor) -> torch.Tensor:
    """Two rows interleaved, as vLLM's kernel packs for two-byte elements; all that matters is that bytes move."""
    return weight.unflatten(0, (-1, 2)).transpose(1, 2).contiguous().view(weight.shape)


@pytest.fixture
def on_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime layout is allowed, with the post-processing that vLLM has for processors."""
    monkeypatch.setattr(context, "NO_RUNTIME", frozenset())
    monkeypatch.setattr(CpuBackend, "has_copy_engine", True)


def test_weights_packed_into_native_objects_are_not_offered(
    on_this_processor: None, fleet: Planner, model_a: Path, rfork_log: LogRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN: what is left of a linear layer is an empty tensor and a native object."""
    packed_by_onednn(monkeypatch)
    load(vllm_config(model_a, load_format="rfork", extra=options(fleet, "packed")))
    (warning,) = rfork_log.warnings
    assert "not a seed" in warning
    assert "post-processing emptied" in warning
    assert "qkv_proj.weight" in warning


@pytest.mark.parametrize("packing", ["vLLM's own", "emulated"])
def test_weights_packed_into_tensors_are_forked(
    packing: str,
    on_this_processor: None,
    fleet: Planner,
    model_a: Path,
    model_a_without_weights: Path,
    rfork_log: LogRecords,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernels for AMX: what is left of a linear layer is an empty tensor and a packed one that a closure holds."""
    packed_into_tensors(monkeypatch, packing)
    extra = options(fleet, f"packed into tensors, {packing}")
    wanted = load(vllm_config(model_a))
    seed_in_this_process(model_a, extra)
    forked = load(
        vllm_config(model_a_without_weights, load_format="rfork", extra={**extra, "rfork_become_seed": False})
    )
    assert [line for line in rfork_log.texts() if "RFork: forked" in line and "layout=runtime" in line]
    assert not rfork_log.warnings
    digests = digests_of(forked)
    assert digests == digests_of(wanted)
    assert forked.model.layers[0].self_attn.qkv_proj.weight.numel() == 0, "vLLM packed it"
    assert [name for name in digests if "qkv_proj" in name and "packed_weight" in name], list(digests)


def test_the_reserved_lease_ends_with_a_start_that_fails(
    accelerated: None, fleet: Planner, model_a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    extra = options(fleet, "start fails")
    seed_in_this_process(model_a, extra)
    build = BaseModelLoader.load_model

    @functools.wraps(build)
    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        build(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(BaseModelLoader, "load_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(vllm_config(model_a, load_format="rfork", extra={**extra, "rfork_become_seed": False}))
    eventually(lambda: fleet.leases() == 0, "the lease is released")


def test_a_seed_without_a_manifest_is_exchanged_before_the_model_is_touched(
    accelerated: None, fleet: Planner, model_a: Path, rfork_log: LogRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = options(fleet, "no manifest")
    seed_in_this_process(model_a, extra)
    for each in manager().seeds():
        each._parts.service.suspend("the test says so")
    dummies: list[Any] = []
    monkeypatch.setattr(dummy_weights, "fill_with_dummies", lambda *args: dummies.append(args))
    others = OtherRank("")
    monkeypatch.setattr(machine, "Consensus", lambda group: others)
    load(vllm_config(model_a, load_format="rfork", extra={**extra, "rfork_become_seed": False}))
    assert [line for line in rfork_log.warnings if "the test says so" in line and "asking for another" in line]
    assert len([line for line in rfork_log.warnings if "falling back" in line]) == 1
    assert not dummies
    # Before the other ranks go on to post-processing, where they may wait for this one to make communicators with.
    assert [stage for stage, _ in others.words] == ["seed"]
    assert "the test says so" in str(others.words[0][1])


class OtherRank:
    """Stands for the rest of an instance: says no at one stage."""

    def __init__(self, refuses: str) -> None:
        self.refuses = refuses
        self.words: list[tuple[str, str | None]] = []
        self.alone = False

    def decide(self, stage: str, obstacle: str | None, timeout_s: float) -> str | None:
        assert 0 < timeout_s < 1000
        self.words.append((stage, obstacle))
        return obstacle or ("rank 1: it cannot" if stage == self.refuses else None)

    def rejection(self, stage: str) -> str | None:
        """It says nothing ahead of time: this rank finds out at :meth:`decide`."""
        return None

    def await_turn(self, stage: str, timeout_s: float) -> str | None:
        """This rank is the first."""
        return None

    def end_turn(self, stage: str) -> None:
        """Nobody comes after it who would take a lease."""


STAGES = {"checkpoint": ["seed", "fork"], "runtime": ["seed", "dummies", "fork"]}


@pytest.mark.parametrize(
    ("layout", "refuses"), [(layout, stage) for layout, stages in STAGES.items() for stage in stages]
)
def test_where_another_rank_cannot_fork_this_one_does_not_either(
    accelerated: None,
    fleet: Planner,
    model_a: Path,
    rfork_log: LogRecords,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    refuses: str,
) -> None:
    extra = options(fleet, f"ranks {layout} {refuses}", rfork_layout=layout)
    wanted = load(vllm_config(model_a))
    seed_in_this_process(model_a, extra)
    others = OtherRank(refuses)
    monkeypatch.setattr(machine, "Consensus", lambda group: others)
    loaded = load(vllm_config(model_a, load_format="rfork", extra={**extra, "rfork_become_seed": False}))
    assert others.words == [(stage, None) for stage in STAGES[layout][: 1 + STAGES[layout].index(refuses)]]
    (warning,) = rfork_log.warnings
    assert "not every rank of this instance could fork" in warning
    assert "rank 1: it cannot" in warning
    assert digests_of(loaded) == digests_of(wanted)
    eventually(lambda: fleet.leases() == 0, "the lease is released")


@pytest.mark.parametrize(
    ("fault", "words"),
    [(fails_to_verify, STAGES["runtime"]), (fails_to_post_process, STAGES["runtime"]), (None, ["seed"])],
)
def test_every_rank_brings_its_word_whatever_happens_to_it(
    accelerated: None, fleet: Planner, model_a: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, words: list[str]
) -> None:
    """Else the other ranks would wait for it."""
    extra = options(fleet, f"words {fault}")
    if fault is not None:
        seed_in_this_process(model_a, extra)
        fault(monkeypatch)
    others = OtherRank("")
    monkeypatch.setattr(machine, "Consensus", lambda group: others)
    load(vllm_config(model_a, load_format="rfork", extra={**extra, "rfork_become_seed": False}))
    assert [stage for stage, _ in others.words] == words
    assert others.words[-1][1]


def test_a_check_that_dummies_would_fail_runs_on_the_real_weights(
    accelerated: None,
    fleet: Planner,
    model_a: Path,
    model_a_without_weights: Path,
    rfork_log: LogRecords,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As vLLM-Ascend's check of shared experts, at the end of a layer's post-processing."""
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM, Qwen2MLP

    checked: list[float] = []

    def check(layer: nn.Module) -> None:
        checked.append(float(layer.down_proj.weight.data.float().abs().max()))
        if checked[-1] < 0.1:
            raise ValueError("dummies")

    def process(model: nn.Module) -> None:
        process_like_an_accelerator(model)
        for layer in model.modules():
            if isinstance(layer, Qwen2MLP):
                layer._validate_shared_expert_consistency()

    monkeypatch.setattr(Qwen2MLP, "_validate_shared_expert_consistency", check, raising=False)
    monkeypatch.setattr(Qwen2ForCausalLM, "process_weights_after_loading", process, raising=False)
    extra = options(fleet, "a check of its own")
    seed = seed_in_this_process(model_a, extra)
    of_the_seed = list(checked)
    forked = load(
        vllm_config(model_a_without_weights, load_format="rfork", extra={**extra, "rfork_become_seed": False})
    )

    assert not rfork_log.warnings
    assert checked == of_the_seed * 2
    assert digests_of(forked) == digests_of(seed)


def test_memory_that_no_engine_can_register_is_neither_written_to_nor_offered(
    accelerated: None, fleet: Planner, model_a: Path, rfork_log: LogRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = load(vllm_config(model_a))
    extra = options(fleet, "unregistrable")
    # First as settings tell it, then as the allocator does, once the weights lie somewhere.
    with monkeypatch.context() as patched:
        patched.setattr(eligibility, "registration_obstacle", lambda *_: "weights lie in a pool")
        told = load(vllm_config(model_a, load_format="rfork", extra=extra))
    with monkeypatch.context() as patched:
        patched.setattr(
            CpuBackend, "registration_obstacle", lambda _, regions=(): "segments expand" if regions else None
        )
        seen = load(vllm_config(model_a, load_format="rfork", extra=extra))

    assert digests_of(told) == digests_of(seen) == digests_of(wanted)
    assert manager().seeds(30) == []
    assert [line for line in rfork_log.texts() if "falling back" in line and "weights lie in a pool" in line]
    assert len([line for line in rfork_log.texts() if "not a seed" in line and "weights lie in a pool" in line]) == 1
    assert len([line for line in rfork_log.texts() if "not a seed" in line and "segments expand" in line]) == 1
