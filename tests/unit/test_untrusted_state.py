"""A seed's Python-side state can set what a walk lists, to values of the same family, and nothing else."""

from __future__ import annotations

import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.inventory import apply_state, match_state, state_of
from vllm_rfork.errors import ForkError
from vllm_rfork.model import value_codec
from vllm_rfork.model.value_codec import MAX_INT_DIGITS, MAX_PASSED_NBYTES, decode


class PPMissingLayer(nn.Module):
    """As vLLM's, which stands for another stage's layer."""


class Layer(nn.Module):
    has_own_head = False
    kinds = ("a", "b")

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("mask", torch.ones(2))
        self.register_parameter("bias", None)
        self.scale: Any = 0.5
        self.name = "layer"
        self.flags = {1, 2}
        self.impl = SimpleNamespace(scale=1.0)
        self.table = [1, 2]
        self.handler = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight

    @property
    def derived(self) -> float:
        return 1.0


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.missing = PPMissingLayer()


def everything(model: nn.Module) -> dict[str, Any]:
    """All that hangs on each module, by identity if it is not a plain value."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            found[f"{name}.{key}"] = value if value_codec.is_plain(value) else id(value)
            if isinstance(value, (dict, list, set)):
                found[f"{name}.{key}[]"] = repr(value)
    return found


FORBIDDEN: list[tuple[str, Any]] = [
    ("_modules", 5),
    ("eval", 1),
    ("__class__", "x"),
    ("__dict__", None),
    ("training", True),
    ("layers", None),
    ("layers.0", None),
    ("layers.0._parameters", None),
    ("layers.0._forward_hooks", None),
    ("layers.0.forward", "x"),
    ("layers.0._compiled_call_impl", "x"),
    ("_compiled_call_impl", 5),
    ("layers.0.call_super_init", True),
    ("layers.0.weight", None),
    ("layers.0.mask", 1.0),
    ("layers.0.bias", 1.0),
    ("layers.0.impl", None),
    ("layers.0.impl.other", 1.0),
    ("layers.0.handler", 1),
    ("layers.0.derived", 2.0),
    ("layers.0.kinds", 1),
    ("layers.0.table", 1),
    ("layers.0.table[2]", 1),
    ("layers.0.table[0", 1),
    ("layers.0.no such", 1),
    ("layers.0.", 1),
    ("layers.0.weight.data", None),
    ("layers.2.scale", 1.0),
    ("missing.scale", 1.0),
    ("", 1),
    (".", 1),
    ("layers.0.scale", "x"),
    ("layers.0.name", 1),
    ("layers.0.flags", {"bytes": "", "hex": ""}),
    ("layers.0.flags", 1),
    ("layers.0.has_own_head", "x"),
]


@pytest.mark.parametrize(("name", "value"), FORBIDDEN, ids=[f"{name}={value}" for name, value in FORBIDDEN])
@pytest.mark.parametrize("layout", ["checkpoint", "runtime"])
def test_what_a_walk_would_not_list_is_never_set(layout: str, name: str, value: Any) -> None:
    """And of a state that holds one such name nothing is set at all."""
    model = Model()
    built, before = state_of(model), everything(model)
    state = {"layers.1.scale": 0.75, name: value}
    set_it = partial(apply_state, model, state)
    if layout == "runtime":
        set_it = partial(match_state, model, built, state, ())
    with pytest.raises(ForkError):
        set_it()
    assert everything(model) == before
    assert model.eval() is model
    assert model.layers[0](torch.ones(2)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers.0.scale", 2),
        ("layers.0.scale", None),
        ("layers.0.scale", {"float": "inf"}),
        ("layers.0.flags", {"set": [7]}),
        ("layers.0.impl.scale", 3.0),
        ("layers.0.table[1]", 5),
        ("layers.0.has_own_head", True),
        ("layers.0.has_own_embeddings", True),
        ("own_flag", "x"),
    ],
)
def test_what_loading_sets_can_be_set(name: str, value: Any) -> None:
    model = Model()
    apply_state(model, {name: value})
    assert state_of(model)[name] == value


def test_what_was_plain_when_built_can_be_plain_again() -> None:
    """Post-processing of other bytes may have put an object in its place; the receiver knows it from its own model."""
    model = Model()
    built = state_of(model)
    model.layers[0].name = object()  # type: ignore[assignment]
    match_state(model, built, {}, ())
    assert model.layers[0].name == "layer"
    model.layers[0].name = object()  # type: ignore[assignment]
    with pytest.raises(ForkError, match="no place here"):
        apply_state(model, {"layers.0.name": "layer"})


@pytest.mark.parametrize(
    "data",
    [
        {"int": "12"},
        {"int": "0x" + "f" * (MAX_INT_DIGITS + 1)},
        {"int": "0x1", "more": 1},
        {"int": 1},
        {"float": "1_0"},
        {"float": "１"},
        {"float": "1e3"},
        {"complex": ["0x1.0p+0"]},
        {"complex": ["1", "2"]},
        {"set": [{"int": "0x1"}] * (MAX_PASSED_NBYTES // 8 + 1)},
        {"set": [[1]]},
        {"set": {"a": 1}},
        {"frozenset": [{"set": []}]},
        {"bytes": "", "hex": "0"},
        {"bytes": "", "hex": "00" * (MAX_PASSED_NBYTES + 1)},
        {"bytes": ""},
        {"hex": "00", "bytes": ""},
        {"bytearray": "", "hex": None},
        {"array": "u", "hex": "00"},
        {"array": "dd", "hex": ""},
        {"numpy": "<f4,<f4", "shape": [0], "scalar": False, "hex": ""},
        {"numpy": "(9,)<f4", "shape": [1], "scalar": False, "hex": "00" * 36},
        {"numpy": "<f4", "shape": [-1], "scalar": False, "hex": "00" * 4},
        {"numpy": "<f4", "shape": [True], "scalar": False, "hex": "00" * 4},
        {"numpy": "<f4", "shape": [1 << 70], "scalar": False, "hex": ""},
        {"numpy": "<f4", "shape": [1] * 65, "scalar": False, "hex": "00" * 4},
        {"numpy": "<f4", "shape": [1], "scalar": True, "hex": "00" * 4},
        {"numpy": "<f4", "shape": [], "scalar": "yes", "hex": "00" * 4},
        {"numpy": "<f4", "shape": 1, "scalar": False, "hex": "00" * 4},
        {1: 2},
        {None: 2},
        [],
        (1,),
        object(),
    ],
)
def test_what_no_seed_writes_is_no_value(data: Any) -> None:
    with pytest.raises(ForkError, match="is not an encoded value") as caught:
        decode(data)
    assert len(str(caught.value)) < 200


#: Integers with one hash, as many as a set may have: Python adds the n-th in n steps.
SAME_HASH = [{"int": hex(((1 << 61) - 1) * number)} for number in range(1 << 30, (1 << 30) + MAX_PASSED_NBYTES // 8)]


def test_a_set_of_numbers_with_one_hash_costs_no_time() -> None:
    """As many as fit into a manifest: before there was a bound, one of 1.3 MB took 25 s."""
    assert len({hash(int(each["int"], 16)) for each in SAME_HASH}) == 1
    model = Model()
    started = time.process_time()
    for kind in ("set", "frozenset"):
        with pytest.raises(ForkError, match="is not an encoded value"):
            apply_state(model, {"layers.0.flags": {kind: SAME_HASH}})
    assert time.process_time() - started < 0.5  # of this thread's work; building one of the sets takes longer


def test_numbers_that_share_a_hash_by_chance_pass() -> None:
    assert decode({"set": [-1, -2, 1.5, {"int": hex((1 << 64) + 5)}]}) == {-1, -2, 1.5, (1 << 64) + 5}


def test_the_time_for_state_is_bounded() -> None:
    """Each name asks whether there is time left; nothing was set when it ran out before the first."""
    model = Model()
    before = everything(model)
    asked = []

    def in_time() -> None:
        asked.append(1)
        if len(asked) > 20:
            raise ForkError("no time left")

    state = {f"layers.0.flag_{number}": number for number in range(100)}
    with pytest.raises(ForkError, match="no time left"):
        apply_state(model, state, in_time)
    with pytest.raises(ForkError, match="no time left"):
        match_state(model, state_of(model), state, (), in_time)
    assert everything(model) == before
