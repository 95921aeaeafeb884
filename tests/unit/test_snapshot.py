"""A snapshot comes from one traversal, and the published tensors are found again or refused."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from vllm_rfork.errors import ForkError
from vllm_rfork.manifest.schema import CHECKPOINT, ManifestHeader
from vllm_rfork.model import relocation, snapshot
from vllm_rfork.model.relocation import PublishedSnapshot
from vllm_rfork.model.rules import ModelRules
from vllm_rfork.model.snapshot import AsBuilt, Contents, Snapshot

CPU, RULES = torch.device("cpu"), ModelRules(wrapped_layer="base_layer")
HEADER = ManifestHeader(seed_key="k", fingerprint="f", layout=CHECKPOINT, engine="memory", digest_algorithm="d")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.scale = 1.0


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """The models that are traversed."""
    seen: list[nn.Module] = []
    for module in (snapshot, relocation):
        walk = module.walk

        def counted(model: nn.Module, rules: ModelRules, walk: Any = walk) -> Any:
            seen.append(model)
            return walk(model, rules)

        monkeypatch.setattr(module, "walk", counted)
    return seen


def published(model: Model, *, keeps: bool = False) -> PublishedSnapshot:
    built = AsBuilt({"scale": 0.5, "gone": 1}, {"a": "b"})
    taken = Snapshot.loaded(Contents.of(model, CPU, RULES), built, HEADER).digested()
    return PublishedSnapshot.of(taken, CPU, model, RULES, keeps=keeps)


def test_each_moment_costs_one_traversal(walks: list[nn.Module]) -> None:
    model = Model()
    contents = Contents.of(model, CPU, RULES)
    AsBuilt.of(model, RULES, kernels=True, state=contents.state)
    assert walks == [model]
    AsBuilt.of(model, RULES, kernels=True)
    assert walks == [model] * 2
    one = published(model)
    assert walks == [model] * 3
    one.recheck()
    assert walks == [model] * 3
    one.relocate()
    assert walks == [model] * 4


def test_a_snapshot_has_the_state_that_loading_changed() -> None:
    manifest = published(Model()).manifest
    assert (manifest.state["scale"], manifest.state_gone) == (1.0, ("gone",))
    assert [entry.name for entry in manifest.tensors] == ["linear.weight", "linear.bias"]
    assert all(span.digest for span in manifest.spans)


def test_written_bytes_are_noticed_by_name() -> None:
    model = Model()
    one = published(model)
    one.recheck()
    with torch.no_grad():
        model.linear.bias.add_(1.0)
    with pytest.raises(ForkError, match=r"checkpoint layout have been written to: linear\.bias"):
        one.recheck()


def test_equal_tensors_at_other_addresses_are_found_again() -> None:
    model = Model()
    one = published(model)
    one.release()
    assert one.keep is None
    with pytest.raises(ForkError, match="released"):
        one.recheck()
    # LoRA wraps the layer, and sleep mode has moved its memory.
    held = model.linear
    model.linear = nn.Module()
    model.linear.base_layer = held
    held.weight = nn.Parameter(held.weight.detach().clone())
    again = one.relocate()
    again.recheck()
    assert again.manifest.spans[0].digest == one.manifest.spans[0].digest
    assert again.manifest.spans[0].address != one.manifest.spans[0].address
    assert again.manifest.state == one.manifest.state
    assert again.recoverable


def test_a_tensor_of_another_shape_is_refused_and_may_come_back() -> None:
    model = Model()
    one = published(model)
    model.linear = nn.Linear(4, 5)
    with pytest.raises(
        ForkError, match=r"not what they were when they were captured: linear\.weight: shape \[3, 4\] then"
    ):
        one.relocate()
    assert one.recoverable


def test_tensors_that_are_kept_outlive_a_release_and_a_failed_return_is_final() -> None:
    model = Model()
    one = published(model, keeps=True)
    one.release()
    del model
    gc.collect()
    again = one.relocate()
    again.recheck()
    assert again.manifest == one.manifest
    assert not one.recoverable


def test_a_model_that_is_gone_is_not_looked_for_again() -> None:
    model = Model()
    one = published(model)
    one.release()
    del model
    gc.collect()
    assert not one.recoverable
    with pytest.raises(ForkError, match="not there any more"):
        one.relocate()
