"""Collection misses nothing, keeps aliases, and names leaves the same in every process."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vllm_rfork.errors import ForkError, ManifestMismatch
from vllm_rfork.manifest import check_manifest, decode_manifest, encode_manifest
from vllm_rfork.segments import pair
from vllm_rfork.state import apply_state, changed_state, state_of
from vllm_rfork.tensors import apply_inline, collect

CPU = torch.device("cpu")
IDENTITY = {
    "seed_key": "k",
    "fingerprint": "f",
    "epoch": "e",
    "layout": "checkpoint",
    "engine": "memory",
    "endpoint": "x",
}


class Helper:
    __slots__ = ("__dict__", "slot")

    def __init__(self) -> None:
        self.slot = torch.ones(2)
        self.in_helper = torch.ones(3)
        self.scale = 0.5


class Hiding(nn.Module):
    """A tensor in every place where one has been found."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.register_buffer("buffer", torch.ones(5))
        self.register_buffer("scratchless", torch.ones(6), persistent=False)
        self.plain = torch.ones(7)
        self.listed = [torch.ones(8), {"deep": (torch.ones(9),)}]
        self.impl = Helper()
        closed = torch.ones(10)
        self.closure = lambda: closed
        self.partial = functools.partial(torch.add, torch.ones(11))
        self.hidden = [nn.Linear(2, 2, bias=False)]
        self.kv_cache = torch.ones(12)
        self.flag = True
        self.ratio = 1.5


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        if tie:
            self.head.weight = self.embed.weight
        self.part = self.embed.weight.data[1:3]


def names(model: nn.Module) -> list[str]:
    return [entry.name for entry in collect(model, CPU).entries]


def test_every_hiding_place_is_found_and_scratch_is_left_out() -> None:
    assert names(Hiding()) == [
        "weight",
        "buffer",
        "scratchless",
        "closure.<closed>",
        "hidden[0].weight",
        "impl.in_helper",
        "impl.slot",
        "listed[0]",
        "listed[1][deep][0]",
        "partial.<args>[0]",
        "plain",
    ]


def test_what_serving_writes_to_is_none_of_a_seeds() -> None:
    """Else its digests would be wrong from the first request on, and every fork from it for nothing."""

    class Gemma3nTextModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.positions = torch.zeros(3)
            self.deepstack_input_embeds = [torch.zeros(4)]
            self._mtp_hidden_buffer = torch.empty(5)

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = torch.zeros(3)

    assert names(nn.Sequential(Gemma3nTextModel(), Other())) == ["0.weight", "1.positions"]


def test_native_objects_are_seen_in_settings_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Native:
        pass

    monkeypatch.setattr(torch, "ScriptObject", Native)

    class KernelConfig:
        def __init__(self) -> None:
            self.packed, self.size = Native(), 3

    model = nn.Linear(2, 2)
    model.quant_config = KernelConfig()
    assert collect(model, CPU).opaque == ("quant_config.packed (Native)",)


def test_a_layer_that_is_left_out_is_not_looked_for_behind_its_placeholder() -> None:
    """As in an embedding model made of a decoder: vLLM keeps the head that nothing uses, without memory."""

    class StageMissingLayer(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.__dict__["module"] = module

    model = nn.Sequential(nn.Linear(2, 2), StageMissingLayer(nn.Linear(2, 2, device="meta")))
    assert [entry.name for entry in collect(model, CPU).entries] == ["0.weight", "0.bias"]
    model.append(nn.Sequential(nn.Linear(2, 2, device="meta")))
    with pytest.raises(ForkError, match=r"2\.0\.weight has no memory"):
        collect(model, CPU)


def test_names_are_the_same_in_another_process_with_another_hash_seed() -> None:
    code = (
        "from tests.unit.test_tensors import Hiding, names, state_of\nprint(names(Hiding()), list(state_of(Hiding())))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_tied_weights_and_views_share_one_span() -> None:
    found = collect(Tied(), CPU)
    spans = {entry.name: (entry.span, entry.offset) for entry in found.entries}
    assert spans == {"part": (0, 16), "embed.weight": (0, 0), "head.weight": (0, 0)}
    assert found.nbytes == 6 * 4 * 4
    check_manifest(found.manifest(**IDENTITY))


def test_alias_structure_is_part_of_the_identity() -> None:
    tied, untied = collect(Tied(), CPU).manifest(**IDENTITY), collect(Tied(tie=False), CPU).manifest(**IDENTITY)
    with pytest.raises(ManifestMismatch, match=r"head\.weight: shares memory with"):
        pair(untied, tied)


def test_strided_views_are_copied_as_the_bytes_they_span() -> None:
    model = nn.Module()
    base = torch.arange(24.0).view(4, 6)
    model.slanted = base[:, 1:3].t()
    found = collect(model, CPU)
    assert [(entry.shape, entry.stride) for entry in found.entries] == [((2, 4), (1, 6))]
    assert found.nbytes == (3 * 6 + 2) * 4


def test_zero_size_and_scalar_tensors_are_accounted_for() -> None:
    model = nn.Module()
    model.empty, model.scalar = torch.empty(0, 3), torch.tensor(2.0)
    entries = {entry.name: entry for entry in collect(model, CPU).entries}
    assert entries["empty"].span == -1
    assert entries["empty"].shape == (0, 3)
    assert entries["scalar"].shape == ()
    assert entries["scalar"].span == 0


def test_references_survive_the_replacement_of_parameters() -> None:
    model = nn.Linear(3, 3)
    found = collect(model, CPU)
    before = found.spans[0].data.clone()
    model.weight = nn.Parameter(torch.empty(0))
    model.bias.data = torch.zeros(7)
    assert torch.equal(found.spans[0].data, before)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.empty(3, device="meta"), "no memory"),
        (torch.ones(3, 3).to_sparse(), "strided"),
        (nn.parameter.UninitializedParameter(), "no shape"),
    ],
)
def test_what_cannot_be_accounted_for_is_refused_by_name(tensor: Any, reason: str) -> None:
    model = nn.Module()
    model.layer = nn.Module()
    model.layer.odd = tensor
    with pytest.raises(ForkError, match=rf"layer\.odd.*{reason}"):
        collect(model, CPU)


def test_small_tensors_off_the_device_travel_inside_the_manifest_and_large_ones_are_refused() -> None:
    model = nn.Module()
    model.scale = torch.tensor([1.5, 2.5])
    sent = collect(model, torch.device("cuda"))
    manifest = decode_manifest(encode_manifest(sent.manifest(**IDENTITY)))
    assert manifest.nbytes == 0
    receiver = nn.Module()
    receiver.scale = torch.zeros(2)
    apply_inline(collect(receiver, torch.device("cuda")), manifest)
    assert receiver.scale.tolist() == [1.5, 2.5]
    model.scale = torch.zeros(1_000_000)
    with pytest.raises(ForkError, match=r"scale.*cannot reach"):
        collect(model, torch.device("cuda"))


def test_state_that_loading_set_is_carried_and_set() -> None:
    seed, receiver = Hiding(), Hiding()
    before = state_of(seed)
    seed.flag = False
    seed.impl.scale = 0.25
    seed.has_own_lm_head = True
    seed.ratio = float("nan")
    changed = changed_state(before, state_of(seed))
    assert set(changed) == {"flag", "impl.scale", "has_own_lm_head", "ratio"}
    apply_state(receiver, changed)
    assert (receiver.flag, receiver.impl.scale, receiver.has_own_lm_head) == (False, 0.25, True)


@pytest.mark.parametrize("name", ["nowhere.flag", "listed[7].flag"])
def test_state_that_has_no_place_is_refused(name: str) -> None:
    with pytest.raises(ForkError, match="no place"):
        apply_state(Hiding(), {name: True})


def test_differences_are_reported_together() -> None:
    one, other = nn.Module(), nn.Module()
    one.a, one.b, one.only_here = torch.ones(2), torch.ones(3), torch.ones(1)
    other.a, other.b, other.only_there = torch.ones(2, dtype=torch.float16), torch.ones(4), torch.ones(1)
    with pytest.raises(ManifestMismatch) as caught:
        pair(collect(one, CPU).manifest(**IDENTITY), collect(other, CPU).manifest(**IDENTITY))
    text = str(caught.value)
    for part in (
        "a: dtype float16 on the seed, float32",
        "b: shape [4]",
        "only_here: only the rec",
        "only_there: only the se",
    ):
        assert part in text
