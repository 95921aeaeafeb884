"""Python-side state in the runtime layout: the receiver's, post-processed from other bytes, becomes the seed's."""

from __future__ import annotations

import enum
import types
from typing import Any

import pytest
import torch
from torch import nn

from vllm_rfork.errors import ForkError, ManifestMismatch
from vllm_rfork.state import changed_state, gone_state, match_state, state_of


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_scale: Any = 0.5
        self.flag = False
        self.name = "layer"
        self._k_scale_float = 1.0


def processed(layer: Layer, scale: float) -> Layer:
    layer._k_scale_float = scale
    layer.is_large = scale > 1
    return layer


def after(seed: nn.Module) -> tuple[dict[str, Any], tuple[str, ...]]:
    built = state_of(Layer())
    now = state_of(seed)
    return changed_state(built, now), gone_state(built, now)


def matched(seed: nn.Module, receiver: nn.Module) -> None:
    state, gone = after(seed)
    match_state(receiver, state_of(Layer()), state, gone)


def test_derived_values_become_the_seeds() -> None:
    seed, receiver = processed(Layer(), 3.0), processed(Layer(), 0.001)
    matched(seed, receiver)
    assert state_of(receiver) == state_of(seed)


def test_a_value_that_only_the_receiver_changed_goes_back() -> None:
    seed, receiver = processed(Layer(), 3.0), processed(Layer(), 0.001)
    receiver.flag = True  # dummies took another branch
    matched(seed, receiver)
    assert receiver.flag is False


def test_a_stamp_of_none_is_carried() -> None:
    seed, receiver = processed(Layer(), 3.0), processed(Layer(), 3.0)
    seed.input_scale = None
    matched(seed, receiver)
    assert receiver.input_scale is None


def test_a_value_that_is_a_tensor_on_one_side_is_a_mismatch() -> None:
    seed, receiver = processed(Layer(), 3.0), processed(Layer(), 3.0)
    seed.input_scale = torch.ones(1)
    with pytest.raises(ManifestMismatch, match=r"input_scale: only the receiver has it") as caught:
        matched(seed, receiver)
    assert caught.value.mutated
    both = processed(Layer(), 3.0)
    both.input_scale = torch.zeros(1)  # the bytes are the tensors' business
    matched(seed, both)


def test_a_value_that_only_the_receiver_has_is_a_mismatch() -> None:
    seed, receiver = processed(Layer(), 3.0), processed(Layer(), 3.0)
    receiver.extra = 1
    with pytest.raises(ManifestMismatch, match=r"extra: only the receiver has it"):
        matched(seed, receiver)


def test_differences_that_cannot_be_set_are_all_told() -> None:

    seed, receiver = processed(Layer(), 3.0), processed(Layer(), 3.0)
    receiver.one, receiver.two = 1, 2
    with pytest.raises(ManifestMismatch) as caught:
        matched(seed, receiver)
    assert len(caught.value.differences) == 2


def test_a_setter_that_does_something_else_is_found_out() -> None:
    class Stubborn(Layer):
        def __setattr__(self, name: str, value: Any) -> None:
            if name != "_k_scale_float" or "_k_scale_float" not in vars(self):
                super().__setattr__(name, value)

    seed = processed(Layer(), 3.0)
    receiver = Stubborn()
    receiver.is_large = True
    with pytest.raises(ManifestMismatch, match=r"_k_scale_float: 3\.0 on the seed, 1\.0 on the receiver"):
        matched(seed, receiver)


class Kernel(enum.Enum):
    FAST = "fast"
    EXACT = "exact"


def test_a_choice_that_differs_is_a_mismatch_and_leaves_the_members_alone() -> None:
    """Members are the process's: what is set on one is set for every model."""
    model, others = nn.Linear(1, 1), nn.Linear(1, 1)
    built = state_of(model)
    others.kernel, others.again = Kernel.FAST, Kernel.FAST
    state = changed_state(built, state_of(others))
    model.kernel = model.again = Kernel.FAST
    match_state(model, built, state, ())
    model.again = Kernel.EXACT
    with pytest.raises(ForkError, match="again"):
        match_state(model, built, state, ())
    del model.again
    with pytest.raises(ForkError, match="again"):
        match_state(model, built, state, ())
    assert [member.value for member in Kernel] == ["fast", "exact"]


def test_a_bare_namespace_is_looked_into() -> None:
    model = nn.Linear(1, 1)
    model.scales = types.SimpleNamespace(k=0.5)
    assert state_of(model)["scales.k"] == 0.5
