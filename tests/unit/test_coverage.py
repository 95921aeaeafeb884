"""What a seed must account for before it offers post-processed memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.inventory import collect, sizes_of, state_of
from vllm_rfork.errors import ForkError
from vllm_rfork.model.coverage import check_accounted
from vllm_rfork.model.pointers import check_no_addresses

CPU = torch.device("cpu")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kv_b_proj = nn.Linear(64, 64, bias=False)
        self.o_proj = nn.Linear(64, 64)


def model() -> nn.Module:
    root = nn.Module()
    root.layers = nn.ModuleList([Attention(), Attention()])
    return root


def emptied(module: nn.Module) -> None:
    module.weight = nn.Parameter(torch.empty(0), requires_grad=False)


def test_what_nobody_touched_is_accounted_for() -> None:
    one = model()
    check_accounted(sizes_of(one), sizes_of(one))


def test_a_weight_that_left_nothing_behind_is_not() -> None:
    one = model()
    loaded = sizes_of(one)
    emptied(one.layers[0].o_proj)  # its bias stays, and stands for nothing
    with pytest.raises(ForkError, match=r"emptied layers\.0\.o_proj\.weight, and no other tensor"):
        check_accounted(loaded, sizes_of(one))


def test_a_weight_that_was_deleted_is_not_either() -> None:
    one = model()
    loaded = sizes_of(one)
    del one.layers[1].o_proj.weight
    with pytest.raises(ForkError, match=r"layers\.1\.o_proj\.weight"):
        check_accounted(loaded, sizes_of(one))


def test_a_replacement_beside_it_or_above_it_counts() -> None:
    one = model()
    loaded = sizes_of(one)
    emptied(one.layers[0].o_proj)
    one.layers[0].o_proj.packed = torch.zeros(32, 64)
    emptied(one.layers[0].kv_b_proj)
    one.layers[0].impl = type("Impl", (), {})()
    one.layers[0].impl.W_UV = torch.zeros(32, 64)
    one.layers[0].impl.W_UK_T = torch.zeros(32, 64)
    check_accounted(loaded, sizes_of(one))


def test_a_scale_does_not_count_as_a_replacement() -> None:
    one = model()
    loaded = sizes_of(one)
    emptied(one.layers[0].o_proj)
    one.layers[0].o_proj.scale = torch.ones(64)
    with pytest.raises(ForkError):
        check_accounted(loaded, sizes_of(one))


def test_single_numbers_may_go() -> None:
    """Else no model with FP8 weights would be offered: placeholders of KV cache scales are deleted."""
    one = model()
    one.layers[0].k_scale = nn.Parameter(torch.tensor(1.0))
    one.layers[0].v_scale = nn.Parameter(torch.ones(1))
    loaded = sizes_of(one)
    del one.layers[0].k_scale, one.layers[0].v_scale
    check_accounted(loaded, sizes_of(one))


def test_a_neighbour_that_was_repacked_does_not_pay_for_a_loss() -> None:
    one = model()
    loaded = sizes_of(one)
    one.layers[0].o_proj.weight = nn.Parameter(torch.zeros(64 * 64), requires_grad=False)
    emptied(one.layers[0].kv_b_proj)
    emptied(one.layers[1].kv_b_proj)
    emptied(one.layers[1].o_proj)
    with pytest.raises(ForkError, match=r"layers\.1\.kv_b_proj\.weight, layers\.1\.o_proj\.weight"):
        check_accounted(loaded, sizes_of(one))


def test_another_layer_does_not_pay() -> None:
    one = model()
    loaded = sizes_of(one)
    emptied(one.layers[0].o_proj)
    one.layers[1].extra = torch.zeros(640, 64)
    with pytest.raises(ForkError, match=r"layers\.0"):
        check_accounted(loaded, sizes_of(one))


def test_tables_of_addresses_are_refused() -> None:
    one = model()
    one.layers[0].pointers = torch.tensor([0, one.layers[0].o_proj.weight.data_ptr() + 128])
    with pytest.raises(ForkError, match=r"layers\.0\.pointers contains addresses"):
        check_no_addresses(collect(one, CPU), {})


def test_an_address_among_the_values_is_refused() -> None:
    one = model()
    state = {"layers.0.size": 4096, "layers.0.pointer": one.layers[0].o_proj.weight.data_ptr()}
    with pytest.raises(ForkError, match=r"layers\.0\.pointer is an address"):
        check_no_addresses(collect(one, CPU), state)


def test_an_address_in_an_array_of_numpy_is_refused_too() -> None:
    one = model()
    one.layers[0].pointers = np.array([0, one.layers[0].o_proj.weight.data_ptr() + 8])
    with pytest.raises(ForkError, match=r"layers\.0\.pointers is an address"):
        check_no_addresses(collect(one, CPU), state_of(one))


def test_numbers_are_no_addresses() -> None:
    one = model()
    one.layers[0].table = torch.arange(100)
    check_no_addresses(collect(one, CPU), {"layers.0.size": 1 << 20, "layers.0.flag": True})
