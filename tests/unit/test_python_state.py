"""Python-side state in the runtime layout: the receiver's, post-processed from other bytes, becomes the seed's."""

from __future__ import annotations

import array
import collections
import enum
import math
import types
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from tests.inventory import apply_state, match_state, state_of
from vllm_rfork.errors import ForkError, ManifestMismatch
from vllm_rfork.manifest.codec import decode_manifest, encode_manifest
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.model import restore, value_codec
from vllm_rfork.model.python_state import changed_state, check_passed_on, gone_state


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


@pytest.mark.parametrize(("scale", "walks"), [(3.0, 1), (0.001, 2)])
def test_the_state_is_looked_at_once_and_once_more_where_something_was_set(
    scale: float, walks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed, receiver = processed(Layer(), 3.0), processed(Layer(), scale)
    state, gone = after(seed)
    walk, walked = restore.walk, list[int]()
    monkeypatch.setattr(restore, "walk", lambda *given: walked.append(1) or walk(*given))
    match_state(receiver, state_of(Layer()), state, gone)
    assert len(walked) == walks


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
    with pytest.raises(ManifestMismatch, match=r"input_scale: only the receiver has it"):
        matched(seed, receiver)
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


def sent(state: dict[str, Any]) -> dict[str, Any]:
    """``state`` as a receiver gets it."""
    identity = {"seed_key": "k", "fingerprint": "f", "epoch": "e", "layout": "checkpoint"}
    manifest = Manifest(**identity, engine="memory", endpoint="x", regions=(), spans=(), tensors=(), state=state)
    return decode_manifest(encode_manifest(manifest)).state


class Odd(nn.Module):
    """Every kind of value beside plain ones, as built."""

    def __init__(self) -> None:
        super().__init__()
        self.offsets = np.zeros(3, np.int64)
        self.table = {"of": [np.zeros((2, 2), np.float32)]}
        self.scale = np.float32(0)
        self.limit = 0.0
        self.loaded: set[Any] = set()
        self.kinds = frozenset({"a"})
        self.raw, self.more, self.codes = b"", bytearray(2), array.array("d", [0.0])
        self.root = 1j
        self.huge = 0


def loaded(model: Odd) -> Odd:
    model.offsets[:] = (1, 2, 3)
    model.table["of"][0][0, 1] = math.nan
    model.scale = np.float32(0.1)
    model.limit = -math.inf
    model.loaded |= {3, "b", (None is None), 1.5}
    model.kinds = frozenset({"c", "d"})
    model.raw, model.more[0], model.codes[0] = b"\x00\xff", 7, 0.3
    model.root = complex(-0.0, math.inf)
    model.huge = 1 << 70
    return model


def test_values_that_json_does_not_know_arrive_as_they_were() -> None:
    seed, receiver = loaded(Odd()), Odd()
    state = changed_state(state_of(Odd()), state_of(seed))
    assert len(state) == 11
    held, alias = receiver.offsets, receiver.loaded
    apply_state(receiver, sent(state))
    assert state_of(receiver) == state_of(seed)
    assert receiver.offsets is held  # whoever else has them sees the change
    assert receiver.loaded is alias
    assert receiver.offsets.tolist() == [1, 2, 3]
    assert receiver.loaded == {3, "b", True, 1.5}
    assert type(receiver.scale) is np.float32
    assert receiver.limit == -math.inf
    assert receiver.huge == 1 << 70
    receiver.offsets[0] = 4  # and they can be written to as before


def test_the_same_in_the_runtime_layout() -> None:
    seed, receiver = loaded(Odd()), loaded(Odd())
    receiver.offsets[:] = 9
    receiver.kinds = frozenset()
    state = changed_state(state_of(Odd()), state_of(seed))
    match_state(receiver, state_of(Odd()), sent(state), ())
    assert state_of(receiver) == state_of(seed)


def test_an_array_of_another_shape_takes_the_place() -> None:
    seed, receiver = Odd(), Odd()
    seed.offsets = np.arange(5, dtype=np.uint8)
    apply_state(receiver, sent(changed_state(state_of(Odd()), state_of(seed))))
    assert receiver.offsets.dtype == np.uint8
    assert receiver.offsets.tolist() == [0, 1, 2, 3, 4]


def test_an_array_that_loading_adds_is_passed_on() -> None:
    seed, receiver = Odd(), Odd()
    seed.added, seed.weight_of = np.ones(2), np.bool_(True)
    apply_state(receiver, sent(changed_state(state_of(Odd()), state_of(seed))))
    assert receiver.added.tolist() == [1, 1]
    assert receiver.weight_of.dtype == np.bool_


@pytest.mark.parametrize("name", ["frozen[0]", "closed.<held>"])
def test_an_array_that_stands_where_nothing_can_be_put_is_a_mismatch(name: str) -> None:
    def made(value: float) -> nn.Module:
        model = nn.Module()
        held = np.full(2, value)
        model.frozen = (held.copy(),)
        model.closed = lambda: held
        return model

    state = changed_state(state_of(made(0)), state_of(made(1)))
    assert name in state
    with pytest.raises(ForkError, match="cannot be written"):
        apply_state(made(0), sent(state))


def test_what_is_too_large_to_travel_is_compared() -> None:
    def made(last: float) -> nn.Module:
        model = nn.Module()
        model.table = np.zeros(value_codec.MAX_PASSED_NBYTES // 8 + 1)
        model.table[-1] = last
        return model

    before, after = state_of(made(0)), state_of(made(1))
    state = changed_state(before, after)
    assert list(state) == ["table.<digest>"]
    with pytest.raises(ForkError, match=r"table\.<digest>, which cannot be passed on"):
        check_passed_on(state)
    match_state(made(1), before, sent(state), ())
    with pytest.raises(ForkError, match="table"):
        match_state(made(0), before, sent(state), ())


def test_what_is_too_large_to_be_compared_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(value_codec, "MAX_COMPARED_NBYTES", 100)
    model = nn.Module()
    model.layer = nn.Module()
    model.layer.rows = np.zeros(101, np.uint8)
    with pytest.raises(ForkError, match=r"layer\.rows is ndarray of 101 bytes"):
        state_of(model)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({("a", 1), ("b", 2)}, {("a", 1), ("b", 3)}),
        (np.array(["a"]), np.array(["b"])),
        (np.datetime64(1, "s"), np.datetime64(2, "s")),
        (type("Name", (str,), {})("a"), type("Name", (str,), {})("b")),
        (np.array([0.5, None]), np.array([0.25, None])),
        ({"x": 1}.keys(), {"y": 1}.keys()),
        (msgspec.json.Encoder(), msgspec.msgpack.Encoder()),
    ],
)
def test_what_is_odd_is_noticed_at_least(one: Any, other: Any) -> None:
    model, changed = nn.Module(), nn.Module()
    model.odd, changed.odd = one, other
    assert state_of(model) != state_of(changed)
    assert state_of(model) == state_of(model)


def test_what_may_hold_weights_unseen_is_not_passed_on() -> None:
    """In the checkpoint layout too: a receiver would compute without it."""

    class Native:
        __slots__ = ()

    model = nn.Module()
    built = state_of(model)
    model.nothing = Native()
    assert state_of(model) == built
    model.kernel = {nn.Linear(1, 1), nn.Linear(1, 1)}
    state = changed_state(built, state_of(model))
    assert list(state) == ["kernel.<opaque>"]
    with pytest.raises(ForkError, match=r"loading set kernel\.<opaque>, which cannot be passed on"):
        check_passed_on(state)
    check_passed_on({"kernel.scale": 0.5})


def test_elements_of_other_containers_are_set_as_elements() -> None:
    """Not as attributes of the container, which nobody would ever look at."""
    for container in (collections.deque([1]), collections.UserList([1]), collections.UserDict({0: 1})):
        model = nn.Module()
        model.held = container
        apply_state(model, {"held[0]": 2})
        assert container[0] == 2


@pytest.mark.parametrize(
    "value",
    [
        {"numpy": "O", "shape": [1], "scalar": False, "hex": "00" * 8},
        {"numpy": "<f4", "shape": [3], "scalar": False, "hex": "00"},
        {"set": [{"set": []}]},
        {"unknown": 1},
        {},
        [1],
    ],
)
def test_nonsense_from_a_seed_is_refused(value: Any) -> None:
    with pytest.raises(ForkError, match="offsets of the seed is not a plain value"):
        apply_state(Odd(), {"offsets": value})


def test_scales_on_tensors_count_and_what_loaders_keep_there_does_not() -> None:
    model = nn.Linear(1, 1)
    model.weight.output_dim, model.weight.scale, model.weight.shards = 0, 0.5, np.ones(2)
    assert state_of(model).keys() - state_of(nn.Linear(1, 1)).keys() == {"weight.scale", "weight.shards"}
    apply_state(model, {"weight.scale": 0.25})
    assert model.weight.scale == 0.25


def test_state_inside_a_container_that_is_not_here_is_refused() -> None:
    """Setting an attribute called ``scales[0]`` would look like success."""
    with pytest.raises(ForkError, match="no place here"):
        apply_state(nn.Linear(2, 2), {"scales[0]": 1.0})
