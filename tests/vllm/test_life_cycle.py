"""A seed withdraws before its bytes change, and comes back under a new epoch when they are what they were."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm.conftest import LogRecords, Planner, eventually, extra_for
from tests.vllm.engine_process import digests_of, free_port, load, load_digested, vllm_config
from tests.vllm.faults import held_up_recheck
from vllm_rfork.clients import PlannerClient, SeedClient
from vllm_rfork.errors import SeedError
from vllm_rfork.load import context
from vllm_rfork.seeding.manager import manager
from vllm_rfork.seeding.seed import Seed
from vllm_rfork.vllm_compat.worker_hooks import Change, WeightChanges

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("no_seeds")]

NORM = "model.norm.weight"


@pytest.fixture
def changes() -> WeightChanges:
    """What a worker's wrapped methods tell."""
    return WeightChanges(manager())


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on accelerators: post-processing leaves the weights where they are, and nothing is kept beside the model."""
    from vllm.model_executor.model_loader import base_loader

    monkeypatch.setattr(context, "KEEPS_LOADED", frozenset())
    monkeypatch.setattr(base_loader, "process_weights_after_loading", lambda *args: None)


def only_seed() -> Seed:
    """The one seed of this process, once it is announced."""
    found = eventually(lambda: [seed for seed in manager().seeds(30) if seed.address], "there is a seed")
    (seed,) = found
    return seed


def loaded(model: Path, planner: Planner, key: str) -> tuple[Any, Seed]:
    it = load(vllm_config(model, load_format="rfork", extra=extra_for(planner.url, model_url=key)))
    return it, only_seed()


def nothing() -> None:
    pass


def contents(seed: Seed) -> dict[str, str]:
    return {entry.name: seed.manifest.spans[entry.span].digest for entry in seed.manifest.tensors if entry.span != -1}


def confirm(seed: Seed, address: Any, epoch: str) -> None:
    asyncio.run(SeedClient(request_timeout_s=10.0).confirm_epoch(address, seed.manifest.seed_key, epoch))


@pytest.mark.parametrize("where", ["kept beside the model", "in the model"])
def test_after_a_change_that_left_the_bytes_it_is_a_seed_again_in_another_epoch(
    where: str, model_a: Path, default_a: Any, planner: Planner, changes: WeightChanges, request: pytest.FixtureRequest,
    rfork_log: LogRecords,
) -> None:  # fmt: skip
    if where == "in the model":
        request.getfixturevalue("in_place")
    key = f"unchanged, {where}"
    model, old = loaded(model_a, planner, key)  # a seed's model lives: it serves
    address, epoch = old.address, old.manifest.epoch
    confirm(old, address, epoch)
    during: list[Any] = []

    def look() -> None:
        during.append((manager().seeds(1), key in str(planner.snapshot())))
        with pytest.raises(SeedError):
            confirm(old, address, epoch)

    changes.run(Change("weights are updated"), look)
    assert during == [([], False)]
    new = only_seed()
    assert new.manifest.epoch not in ("", epoch)
    assert contents(new) == contents(old)
    eventually(lambda: str(new.address) in planner.seeds(), "it is announced")
    confirm(new, new.address, new.manifest.epoch)
    with pytest.raises(SeedError):
        confirm(old, new.address, epoch)
    assert any("a seed again" in line for line in rfork_log.texts())
    assert rfork_log.warnings == []
    if where == "kept beside the model":
        forked = load_digested(vllm_config(model_a, load_format="rfork", extra=extra_for(planner.url, model_url=key)))
        assert any(f"from seed {new.address}" in line for line in rfork_log.texts())
        assert forked.before == default_a.before
    assert model is not None


def test_a_seed_with_two_engines_returns_with_both_and_each_of_them_carries_a_fork(
    model_a: Path, default_a: Any, planner: Planner, changes: WeightChanges, rfork_log: LogRecords
) -> None:
    def extra(engines: str, **more: Any) -> dict[str, Any]:
        return extra_for(planner.url, model_url="two engines", rfork_engine=engines, **more)

    model = load(vllm_config(model_a, load_format="rfork", extra=extra("nixl,memory")))
    before = only_seed().manifest
    changes.run(Change("weights are updated"), nothing)
    after = only_seed()
    assert [each.engine for each in after.manifest.endpoints] == ["nixl", "memory"]
    assert not set(after.manifest.endpoints) & set(before.endpoints)
    eventually(lambda: str(after.address) in planner.seeds(), "it is announced")
    for engine in ("memory", "nixl"):
        receiver = extra(engine, rfork_become_seed=False)
        forked = load_digested(vllm_config(model_a, load_format="rfork", extra=receiver))
        assert forked.before == default_a.before
        assert any(f"engine={engine} " in line and f"from seed {after.address}" in line for line in rfork_log.texts())
    assert rfork_log.warnings == []
    assert model is not None


def test_a_fixed_port_is_taken_again_and_a_lease_of_the_old_epoch_does_not_keep_it(
    model_a: Path, planner: Planner, changes: WeightChanges, rfork_log: LogRecords
) -> None:
    """Planners know a seed by address, port and rank. The oldest let one drain until its receiver has let go of it."""
    extra = extra_for(
        planner.url, model_url="fixed port", rfork_seed_port_base=free_port(), rfork_heartbeat_interval_sec=0.5
    )
    model = load(vllm_config(model_a, load_format="rfork", extra=extra))
    old = only_seed()
    address, key = str(old.address), old.manifest.seed_key
    eventually(lambda: address in planner.seeds(), "it is announced")
    client = PlannerClient(planner.url, request_timeout_s=10.0)
    lease = asyncio.run(client.acquire(key))
    changes.run(Change("weights are updated"), nothing)
    assert str(only_seed().address) == address

    def free() -> bool:
        return any(
            f"{s['ip']}:{s['port']}:{s['rank']}" == address and not s["draining"] for s in planner.snapshot()["seeds"]
        )

    assert not free()
    asyncio.run(client.release(lease))
    eventually(free, "the next beat announces it")
    assert rfork_log.warnings == []
    assert model is not None


def test_changed_bytes_stay_away_and_keep_no_memory(
    model_a: Path, planner: Planner, changes: WeightChanges, rfork_log: LogRecords
) -> None:
    """On CPU the loaded tensors are kept beside the model's packed ones."""
    model, old = loaded(model_a, planner, "changed")
    linear = next(e for e in old.keep.entries if e.name == "model.layers.0.mlp.down_proj.weight")
    kept = weakref.ref(old.keep.spans[linear.span].data)
    changes.run(Change("weights are updated"), lambda: model.get_parameter(NORM).data.add_(1))
    eventually(lambda: rfork_log.warnings, "it is said")
    assert manager().seeds(30) == []
    (warning,) = rfork_log.warnings
    assert "not a seed again" in warning
    assert NORM in warning
    assert "changed" not in str(planner.snapshot())
    eventually(lambda: gc.collect() is not None and kept() is None, "the loaded tensors are let go")
    changes.run(Change("weights are updated"), lambda: model.get_parameter(NORM).data.sub_(1))
    assert manager().seeds(30) == []
    assert len(rfork_log.warnings) == 1, "said once"


@pytest.mark.usefixtures("in_place")
def test_on_accelerators_a_withdrawn_seed_holds_no_memory_and_finds_the_tensors_anew(
    model_a: Path, planner: Planner, changes: WeightChanges, rfork_log: LogRecords
) -> None:
    """vLLM may replace every tensor during a change; what it frees must be free, and what is there then counts."""
    model, old = loaded(model_a, planner, "replaced")
    norm = model.get_parameter(NORM)
    before = weakref.ref(norm.data.untyped_storage())
    address, value = norm.data_ptr(), norm.data.clone()

    def replace() -> None:
        norm.data = torch.zeros(4)
        gc.collect()
        assert before() is None or before().data_ptr() != address  # type: ignore[union-attr]
        assert old.keep is None
        norm.data = value

    changes.run(Change("weights are updated"), replace)
    new = only_seed()
    assert contents(new) == contents(old)
    assert value.data_ptr() in {region.address for region in new.manifest.regions}
    assert rfork_log.warnings == []


@pytest.mark.usefixtures("in_place")
def test_a_later_change_may_bring_the_bytes_back(
    model_a: Path, planner: Planner, changes: WeightChanges, rfork_log: LogRecords
) -> None:
    """After the deepest sleep memory is there again and weights are not, until they are loaded again."""
    model, old = loaded(model_a, planner, "asleep")
    norm = model.get_parameter(NORM)
    right = norm.data.clone()

    def lose() -> None:
        norm.data.zero_()

    changes.run(Change("the worker goes to sleep", begins="asleep"), lose)
    changes.run(Change("weights are reloaded"), nothing)
    assert manager().seeds(30) == []
    assert rfork_log.warnings == [], "it sleeps: nobody looks at its memory"
    changes.run(Change("the worker wakes up", ends=("asleep",)), nothing)
    eventually(lambda: rfork_log.warnings, "the bytes are not there yet")
    assert manager().seeds(30) == []
    changes.run(Change("weights are reloaded"), lambda: norm.data.copy_(right))
    assert contents(only_seed()) == contents(old)


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda model: setattr(model.model.norm, "weight", None), f"{NORM}: is gone"),
        (lambda model: _reshape(model.get_parameter(NORM)), f"{NORM}: shape"),
        (lambda model: setattr(model.lm_head.weight, "data", model.model.embed_tokens.weight.data), "shares memory"),
    ],
    ids=["gone", "other shape", "aliased"],
)
def test_tensors_that_are_not_what_they_were_are_named(
    spoil: Callable[[Any], None],
    said: str,
    model_a: Path,
    planner: Planner,
    changes: WeightChanges,
    rfork_log: LogRecords,
) -> None:
    model, _ = loaded(model_a, planner, "other tensors")
    changes.run(Change("weights are reloaded"), spoil, model)
    eventually(lambda: rfork_log.warnings, "it is said")
    assert manager().seeds(30) == []
    assert said in rfork_log.warnings[0]


def _reshape(parameter: Any) -> None:
    parameter.data = parameter.data.reshape(2, -1)


@pytest.mark.usefixtures("in_place")
def test_what_serving_adds_to_the_model_does_not_keep_a_seed_away(
    model_a: Path, planner: Planner, changes: WeightChanges, rfork_log: LogRecords
) -> None:
    """Caches; and LoRA, which puts layers inside layers of its own and leaves their bytes alone."""
    model, old = loaded(model_a, planner, "added to")

    class WithLora(torch.nn.Module):
        def __init__(self, base_layer: torch.nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer
            self.lora_a = torch.nn.Parameter(torch.zeros(8))

    def serve() -> None:
        model.model.some_cache = torch.zeros(16)
        mlp = model.model.layers[0].mlp
        mlp.down_proj = WithLora(mlp.down_proj)

    changes.run(Change("weights are updated"), serve)
    assert contents(only_seed()) == contents(old)
    assert rfork_log.warnings == []


def test_a_return_that_meets_the_next_change_waits_for_the_one_after(
    model_a: Path, planner: Planner, changes: WeightChanges, monkeypatch: pytest.MonkeyPatch, rfork_log: LogRecords
) -> None:
    _, old = loaded(model_a, planner, "changed often")
    checking, go_on = held_up_recheck(monkeypatch)
    changes.run(Change("weights are updated"), nothing)
    assert checking.wait(60)

    returning = manager().slots[0].seed
    assert returning is not None
    next_change = threading.Thread(target=changes.run, args=(Change("weights are reloaded"), nothing))
    next_change.start()
    eventually(returning._withdrawing.is_set, "the return is told")
    go_on.set()
    next_change.join(60)
    assert not next_change.is_alive()
    new = only_seed()
    assert new is not returning
    assert contents(new) == contents(old)
    assert rfork_log.warnings == []


@pytest.mark.parametrize("how", ["a last change", "a last change inside another"])
def test_there_is_no_coming_back_after_the_last_change(
    how: str, model_a: Path, planner: Planner, changes: WeightChanges, rfork_log: LogRecords
) -> None:
    model, old = loaded(model_a, planner, "for good")
    down = next(e for e in old.keep.entries if e.name == "model.layers.0.mlp.down_proj.weight")
    kept = weakref.ref(old.keep.spans[down.span].data)
    shut_down = Change("the worker shuts down", last=True)
    if how == "a last change":
        changes.run(shut_down, nothing)
    else:
        changes.run(Change("weights are updated"), lambda: changes.run(shut_down, nothing))
    changes.run(Change("weights are updated"), nothing)
    assert manager().seeds(30) == []
    eventually(lambda: gc.collect() is not None and kept() is None, "the loaded tensors are let go")
    assert "for good" not in str(planner.snapshot())
    assert digests_of(model)


def test_an_error_of_the_change_is_the_callers(model_a: Path, planner: Planner, changes: WeightChanges) -> None:
    _, old = loaded(model_a, planner, "raises")

    def fail() -> None:
        raise ValueError("no such checkpoint")

    with pytest.raises(ValueError, match="no such checkpoint"):
        changes.run(Change("weights are reloaded"), fail)
    assert contents(only_seed()) == contents(old)
