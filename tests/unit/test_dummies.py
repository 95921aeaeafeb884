"""Dummy weights: small numbers in every tensor, each filled once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vllm_rfork.vllm_compat import dummy_weights


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8, 8), torch.nan))
        self.packed = nn.Parameter(torch.full((4,), 7, dtype=torch.int32), requires_grad=False)
        self.eight_bits = nn.Parameter(torch.full((4,), 5.0).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("table", torch.arange(4))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()


def test_every_tensor_is_filled_and_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, filled = Outer(), list[int]()
    fill = dummy_weights._fill
    monkeypatch.setattr(dummy_weights, "_fill", lambda tensor: filled.append(tensor.data_ptr()) or fill(tensor))
    dummy_weights.fill_with_dummies(model, None, None)
    inner = model.inner
    assert sorted(filled) == sorted([inner.weight.data_ptr(), inner.eight_bits.data_ptr()])
    assert bool((inner.weight.abs() <= 1e-3).all())
    assert inner.weight.unique().numel() > 1
    assert bool((inner.eight_bits.to(torch.float32).abs() < 1e-2).all())
    assert inner.packed.tolist() == [0] * 4, "packed weights are used as indices"
    assert inner.table.tolist() == [0, 1, 2, 3], "construction has filled it"


def test_equal_tensors_get_equal_dummies() -> None:
    """On every rank, and in every start."""
    one, other = Outer(), Outer()
    for model in (one, other):
        dummy_weights.fill_with_dummies(model, None, None)
    assert torch.equal(one.inner.weight, other.inner.weight)


def test_weights_that_are_quantized_while_they_are_loaded_are_left_to_vllms_own_loader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(dummy_weights, "storage_loader", lambda *given: asked.append(given) or Loader(asked))
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    dummy_weights.fill_with_dummies(model, "a model", "a load")
    assert asked == [("a load", "dummy", {}), (model, "a model")]


class Loader:
    def __init__(self, asked: list[Any]) -> None:
        self.asked = asked

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        self.asked.append((model, model_config))
