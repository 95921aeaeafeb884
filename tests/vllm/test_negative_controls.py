"""Each guard on its own: what it stops, and the wrong model that starts where that one guard is switched off.

A guard that lets nothing wrong through when it is missing guards nothing, and a test that cannot fail says nothing.
So every control forks twice from a seed that differs in one way: with all guards, when the fork is refused and the
default loader makes the right model; and with one guard missing, when the fork succeeds and exactly the named tensors
or values are wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from tests.inventory import apply_state
from tests.vllm.conftest import LogRecords, Planner, extra_for
from tests.vllm.engine_process import digests_of, load, load_digested, vllm_config
from vllm_rfork.clients import SeedClient
from vllm_rfork.engines.memory import MemoryEngine
from vllm_rfork.errors import ForkError
from vllm_rfork.load import context, from_fork, from_storage
from vllm_rfork.manifest import pairing
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.model import digest, restore, snapshot
from vllm_rfork.seeding.manager import manager
from vllm_rfork.vllm_compat.model_rules import VLLM_RULES

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("no_seeds")]

NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@dataclass
class Outcome:
    """One receiver: whether it forked, what its log warns of, and the tensors that a default load has otherwise."""

    forked: bool
    warnings: list[str]
    wrong: set[str]
    model: nn.Module


class Fleet:
    """A seed and receivers of one key, in this process; ``extra`` are more options for all of them."""

    def __init__(self, planner: Planner, log: LogRecords, model: Path, key: str, **extra: Any) -> None:
        self._extra = extra_for(planner.url, model_url=key, **extra)
        self._model, self._log = model, log
        self._defaults: dict[str, dict[str, str]] = {}

    def seed(self, **changes: Any) -> nn.Module:
        model: nn.Module = load(vllm_config(self._model, load_format="rfork", extra=self._extra, **changes))
        (seed,) = manager().seeds(30)
        assert seed.address, self._log.warnings
        return model

    def no_seed(self, cause: str) -> None:
        """A worker that loads and does not offer what it has; it says why in one WARNING."""
        self._log.records.clear()
        load(vllm_config(self._model, load_format="rfork", extra=self._extra))
        assert manager().seeds(30) == []
        (warning,) = self._log.warnings
        assert "not a seed" in warning
        assert cause in warning

    def fork(self, **changes: Any) -> Outcome:
        default = self._default(**changes)
        self._log.records.clear()
        extra = {**self._extra, "rfork_become_seed": False}
        with fresh_rotary_tables():
            loaded = load_digested(vllm_config(self._model, load_format="rfork", extra=extra, **changes))
        wrong = {name for name in default.keys() | loaded.before if default.get(name) != loaded.before.get(name)}
        forked = any(line.startswith("RFork: forked ") for line in self._log.texts())
        return Outcome(forked, self._log.warnings, wrong, loaded.model)

    def _default(self, **changes: Any) -> dict[str, str]:
        """What vLLM's default loader makes; once, since a test alters all its receivers alike."""
        which = repr(changes)
        if which not in self._defaults:
            with fresh_rotary_tables():
                self._defaults[which] = load_digested(vllm_config(self._model, **changes)).before
        return self._defaults[which]


@contextlib.contextmanager
def fresh_rotary_tables() -> Iterator[None]:
    """Each load computes its own, as in a process of its own."""
    from vllm.model_executor.layers import rotary_embedding

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotary_embedding, "_ROPE_DICT", {})
        yield


@pytest.fixture
def fleet(planner: Planner, model_a: Path, rfork_log: LogRecords) -> Callable[..., Fleet]:
    return functools.partial(Fleet, planner, rfork_log, model_a)


@contextlib.contextmanager
def altered(
    *, built: Callable[[Any], None] | None = None, loaded: Callable[[Any], None] | None = None
) -> Iterator[None]:
    """Models of this class are changed when they have been built, and when storage has been read into them."""
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    def after(method: Any, change: Callable[[Any], None]) -> Any:
        @functools.wraps(method)
        def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
            returned = method(self, *args, **kwargs)
            change(self)
            return returned

        return changed

    with pytest.MonkeyPatch.context() as patch:
        if built is not None:
            patch.setattr(Qwen2ForCausalLM, "__init__", after(Qwen2ForCausalLM.__init__, built))
        if loaded is not None:
            patch.setattr(Qwen2ForCausalLM, "load_weights", after(Qwen2ForCausalLM.load_weights, loaded))
        yield


def post_process(patch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    """Models of this class are changed when vLLM post-processes them."""
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    patch.setattr(Qwen2ForCausalLM, "process_weights_after_loading", change, raising=False)


def refused(outcome: Outcome, cause: str) -> None:
    """The guards at work: no fork, the reason in one WARNING, and the default loader's model."""
    assert not outcome.forked
    (warning,) = [line for line in outcome.warnings if "falling back" in line]
    assert cause in warning
    assert outcome.wrong == set()


def let_through(outcome: Outcome, *wrong: str) -> None:
    """A guard is missing: the fork succeeds without a word, and these tensors are not what they should be."""
    assert outcome.forked
    assert outcome.warnings == []
    assert outcome.wrong == set(wrong)


def without(patch: pytest.MonkeyPatch, difference: str) -> None:
    """Pairing overlooks this kind of difference, and sees all others."""
    find = pairing._tensor_differences
    patch.setattr(
        pairing,
        "_tensor_differences",
        lambda ours, theirs: (line for line in find(ours, theirs) if f": {difference} " not in line),
    )


def test_dtype(fleet: Callable[..., Fleet]) -> None:
    """float16 read as bfloat16: as many bytes, of other numbers."""
    one = fleet("control: dtype")

    def as_float16(model: Any) -> None:
        model.get_parameter(NORM).data = model.get_parameter(NORM).data.to(torch.float16)

    with altered(loaded=as_float16):
        seed = one.seed()
    refused(one.fork(), f"{NORM}: dtype float16 on the seed, bfloat16 on the receiver")
    with pytest.MonkeyPatch.context() as patch:
        without(patch, "dtype")
        outcome = one.fork()
    let_through(outcome, NORM)
    theirs, ours = seed.get_parameter(NORM), outcome.model.get_parameter(NORM)
    assert torch.equal(ours.view(torch.float16), theirs), "every byte is the seed's"
    assert not torch.allclose(ours.float(), theirs.float(), rtol=0.5)


def test_coverage(fleet: Callable[..., Fleet]) -> None:
    """A derived scale that the seed never registered: all registered bytes are equal."""
    one = fleet("control: coverage")

    def with_scale(model: Any) -> None:
        model.derived_scale = torch.zeros(4)

    def derive(model: Any) -> None:
        model.derived_scale.fill_(3.0)

    with altered(built=with_scale, loaded=derive):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(VLLM_RULES.scratch_buffers, "derived_scale", "a hole in what the seed collects")
            assert one.seed() is not None
        refused(one.fork(), "derived_scale: only the receiver has it")
        with pytest.MonkeyPatch.context() as patch:
            pair = pairing.pair

            patch.setattr("vllm_rfork.fork.transfer.pair", lambda ours, theirs: pair(_known_to(theirs, ours), theirs))
            patch.setattr(snapshot, "paired_digests", _of_common(pairing.paired_digests))
            refused(one.fork(), "the seed has no digests of derived_scale")  # a second guard behind the first
            patch.setattr(from_fork, "spans_to_check", lambda collection, how: [])
            outcome = one.fork()
    let_through(outcome, "derived_scale")
    assert outcome.model.derived_scale.tolist() == [0.0] * 4


def test_coverage_in_the_other_direction(fleet: Callable[..., Fleet]) -> None:
    """A derived scale that only the seed has: whatever the receiver has is equal, and its model lacks the scale."""
    one = fleet("control: only the seed has it")

    def derive(model: Any) -> None:
        model.derived_scale = torch.full((4,), 3.0)

    with altered(loaded=derive):
        seed = one.seed()
        refused(one.fork(), "derived_scale: only the seed has it")
        with pytest.MonkeyPatch.context() as patch:
            pair = pairing.pair
            patch.setattr("vllm_rfork.fork.transfer.pair", lambda ours, theirs: pair(ours, _known_to(ours, theirs)))
            outcome = one.fork()
    let_through(outcome, "derived_scale")
    assert seed.derived_scale.tolist() == [3.0] * 4
    assert not hasattr(outcome.model, "derived_scale")


def _known_to(other: Manifest, manifest: Manifest) -> Manifest:
    """``manifest`` without the tensors that ``other`` has none of."""
    names = {entry.name for entry in other.tensors}
    kept = tuple(entry for entry in manifest.tensors if entry.name in names)
    return msgspec.structs.replace(manifest, tensors=kept)


def _of_common(digests: Any) -> Any:
    return lambda local, remote: digests(_known_to(remote, local), remote)


def test_coverage_after_post_processing(
    fleet: Callable[..., Fleet], runtime_allowed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that post-processing packs into something that cannot be seen: what is left is equal on both sides."""
    one = fleet("control: accounting")

    def pack(model: Any) -> None:
        down = model.model.layers[0].mlp.down_proj
        down.packed = types.ModuleType("an extension of torch")  # modules are the process's, and not looked into
        down.packed.rows = down.weight.data.float().numpy()
        down.weight.data = torch.empty(0)

    post_process(monkeypatch, pack)
    one.no_seed("post-processing emptied model.layers.0.mlp.down_proj.weight")

    monkeypatch.setattr(from_storage, "check_accounted", lambda loaded, runtime: None)
    seed = one.seed()
    outcome = one.fork()
    assert outcome.forked
    assert outcome.warnings == []
    theirs, ours = (model.model.layers[0].mlp.down_proj.packed.rows for model in (seed, outcome.model))
    assert theirs.shape == ours.shape
    assert not (theirs == ours).all(), "packed from dummy weights"


def test_alias_structure(fleet: Callable[..., Fleet]) -> None:
    """Two views of one piece of memory, the other way round: the piece is equal, byte by byte."""
    one = fleet("control: alias")

    def views(first: str, second: str) -> Callable[[Any], None]:
        def build(model: Any) -> None:
            model.fused = torch.zeros(2, 8)
            setattr(model, first, model.fused[0])
            setattr(model, second, model.fused[1])

        return build

    def fill(model: Any) -> None:
        model.gain.fill_(1.0)
        model.shift.fill_(2.0)

    with altered(built=views("shift", "gain"), loaded=fill):
        assert one.seed() is not None
    with altered(built=views("gain", "shift"), loaded=fill):
        refused(one.fork(), "shares memory with")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pairing, "_alias_differences", lambda local, remote: [])
            outcome = one.fork()
    let_through(outcome, "fused", "gain", "shift")
    assert (outcome.model.gain[0], outcome.model.shift[0]) == (2.0, 1.0)


def test_python_side_state(fleet: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch) -> None:
    """A float beside the tensors: no copy of memory carries it."""
    one = fleet("control: scalar")

    def with_scale(model: Any) -> None:
        model._k_scale_float = 1.0

    def derive(model: Any) -> None:
        model._k_scale_float = 0.25

    with altered(built=with_scale, loaded=derive):
        assert one.seed() is not None
        carried = one.fork()
        assert carried.forked
        assert carried.model._k_scale_float == 0.25
        monkeypatch.setattr(restore, "apply_state", lambda model, state, *_, **__: None)
        outcome = one.fork()
    let_through(outcome)
    assert outcome.model._k_scale_float == 1.0, "every tensor is right, and the model is not"


def test_python_side_state_that_cannot_be_set(fleet: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no place for it, going on without it would be the same wrong model."""
    one = fleet("control: scalar without a place")

    def derive(model: Any) -> None:
        model.scales = [0.25]

    with altered(built=lambda model: setattr(model, "scales", [1.0]), loaded=derive):
        assert one.seed() is not None
    with altered(built=lambda model: setattr(model, "scales", []), loaded=derive):
        refused(one.fork(), "no place here")

        def where_there_is_a_place(model: Any, state: dict[str, Any], *_: Any, **__: Any) -> None:
            for name, value in state.items():
                with contextlib.suppress(ForkError):
                    apply_state(model, {name: value})

        monkeypatch.setattr(restore, "apply_state", where_there_is_a_place)
        outcome = one.fork()
    let_through(outcome)
    assert outcome.model.scales == [], "every tensor is right, and the scale is missing"


def test_python_side_state_after_post_processing(
    fleet: Callable[..., Fleet], runtime_allowed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float that post-processing derives: the receiver has derived one too, from dummy weights."""
    one = fleet("control: derived scalar")

    def derive(model: Any) -> None:
        model._k_scale_float = float(model.get_parameter(HEAD).float().abs().max())

    post_process(monkeypatch, derive)
    seed = one.seed()
    carried = one.fork()
    assert carried.forked
    assert carried.model._k_scale_float == seed._k_scale_float
    monkeypatch.setattr(restore, "match_state", lambda *args, **kwargs: None)
    outcome = one.fork()
    assert outcome.forked
    assert outcome.warnings == []
    assert digests_of(outcome.model) == digests_of(seed)
    assert outcome.model._k_scale_float != seed._k_scale_float, "every tensor is right, and the model is not"


def test_python_side_state_after_post_processing_that_cannot_be_set(
    fleet: Callable[..., Fleet], runtime_allowed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same in a tuple, which nobody can write to."""
    one = fleet("control: derived scalar without a place")

    def derive(model: Any) -> None:
        model.scales = (float(model.get_parameter(HEAD).float().abs().max()),)

    post_process(monkeypatch, derive)
    seed = one.seed()
    outcome = one.fork()
    assert not outcome.forked
    assert any("falling back" in line and "state scales[0]" in line for line in outcome.warnings), outcome.warnings
    assert outcome.model.scales == seed.scales
    monkeypatch.setattr(restore, "match_state", lambda *args, **kwargs: None)
    outcome = one.fork()
    assert outcome.forked
    assert outcome.warnings == []
    assert digests_of(outcome.model) == digests_of(seed)
    assert outcome.model.scales != seed.scales, "derived from dummy weights"


def test_digests(fleet: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch) -> None:
    """A transfer that reports success and has one bit wrong."""
    one = fleet("control: digest")
    seed = one.seed()
    read, address = MemoryEngine.read, [0]

    def flipping(self: MemoryEngine, endpoint: str, batch: Any, timeout_s: float) -> None:
        read(self, endpoint, batch, timeout_s)
        for segment in batch:
            if segment.remote == address[0]:
                byte = ctypes.c_ubyte.from_address(segment.local + 7)
                byte.value ^= 0x40

    address[0] = seed.get_parameter(NORM).data_ptr()
    monkeypatch.setattr(MemoryEngine, "read", flipping)
    refused(one.fork(), f"tensors are not the seed's: {NORM}")
    monkeypatch.setattr(digest, "differing", lambda found, expected: [])
    let_through(one.fork(), NORM)


def test_epoch(fleet: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed's weights change while they are read.

    Both halves run with ``rfork_verify=off``: digests would find the same bytes wrong, and a control switches off one
    guard at a time. So this shows what the epoch alone is good for; by default there are both.
    """
    one = fleet("control: epoch", rfork_verify="off")
    seed = one.seed()
    read, norm = MemoryEngine.read, seed.get_parameter(NORM)

    def meanwhile(self: MemoryEngine, endpoint: str, batch: Any, timeout_s: float) -> None:
        (offered,) = manager().seeds(1)
        service = offered._parts.service
        assert service is not None
        service.suspend("weights are updated")  # the first step of a withdrawal; the engine is not closed yet
        norm.data.fill_(3.0)
        read(self, endpoint, batch, timeout_s)

    monkeypatch.setattr(MemoryEngine, "read", meanwhile)
    refused(one.fork(), "is suspended")

    manager().withdraw("the next seed", last=True)
    seed = one.seed()
    norm = seed.get_parameter(NORM)

    async def confirmed(*args: Any) -> None:
        pass

    monkeypatch.setattr(SeedClient, "confirm_epoch", confirmed)
    let_through(one.fork(), NORM)


def test_fingerprint(fleet: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch) -> None:
    """One key for two settings: names, types, shapes and digests all agree, and the rotary tables are the other's."""
    one = fleet("control: fingerprint")
    base = {"rope_type": "default", "rope_theta": 10_000.0}
    other = {"hf_overrides": {"rope_parameters": {**base, "rope_theta": 1e6}}}
    assert one.seed() is not None
    refused(one.fork(**other), "fingerprint")

    manager().withdraw("the next seed", last=True)
    monkeypatch.setattr(context, "build_fingerprint", lambda facts: "all the same")
    # A second guard behind the first: what constructors have chosen.
    monkeypatch.setattr(pairing, "built_differences", lambda local, remote: [])
    assert one.seed() is not None
    outcome = one.fork(**other)
    assert outcome.forked
    assert outcome.wrong
    assert all(name.endswith("cos_sin_cache") for name in outcome.wrong), outcome.wrong
