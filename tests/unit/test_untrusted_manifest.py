"""Whatever a seed sends as its manifest: an error that the loader falls back on, in bounds, or the right model."""

from __future__ import annotations

import copy
import ctypes
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.inventory import collect, state_of
from vllm_rfork.errors import ForkError, ManifestMismatch, SeedError
from vllm_rfork.fork.stage_times import StageTimes
from vllm_rfork.load.capture import contents
from vllm_rfork.load.context import LoadContext
from vllm_rfork.load.from_fork import _Arrival
from vllm_rfork.manifest.codec import decode_manifest, encode_manifest
from vllm_rfork.manifest.pairing import pair
from vllm_rfork.manifest.schema import CHECKPOINT, RUNTIME, Manifest, ManifestHeader, Region, Span, TensorEntry
from vllm_rfork.model import digest, value_codec
from vllm_rfork.model.python_state import changed_state, gone_state
from vllm_rfork.model.tensors import TensorInventory
from vllm_rfork.model.traversal import walk
from vllm_rfork.vllm_compat.model_rules import VLLM_RULES
from vllm_rfork.vllm_compat.rank_groups import RankGroup

CPU = torch.device("cpu")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 8), requires_grad=False)
        self.view = self.weight.data[1:]
        self.scale: Any = 1.0
        self.note: Any = None
        self.groups: Any = {1, 2}
        self.raw = bytearray(b"abcd")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T  # not with the scale: a seed may send any number, and None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(8, 2, dtype=torch.bfloat16)
        self.impl = SimpleNamespace(scale=1.0, table=[1, 2])


def loaded() -> Model:
    """As a seed's: bytes, and what loading sets beside them."""
    model = Model()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(False).copy_(torch.arange(parameter.numel()).view(parameter.shape) + number)
    for layer in model.layers:
        layer.scale, layer.note = 0.5, "loaded"
        layer.groups, layer.raw = {3, float("inf")}, bytearray(b"efgh")
        layer.is_final = True
    model.impl.scale, model.impl.table[1] = float("nan"), 1 << 70
    return model


SEED = loaded()
BUILT = state_of(Model())
COLLECTION = collect(SEED, CPU)


def manifest_of(
    collection: TensorInventory, state: Any = None, state_gone: tuple[str, ...] = (), **fields: Any
) -> Manifest:
    identity = {"seed_key": "k", "fingerprint": "f", "epoch": "e", "layout": CHECKPOINT, "engine": "memory"}
    fields = {"endpoint": "memory:1", "digest_algorithm": digest.ALGORITHM, **identity, **fields}
    digests = digest.digests(span.data for span in collection.spans)
    return collection.manifest(ManifestHeader(**fields), digests=digests, state=state, state_gone=state_gone)


GOOD = json.loads(
    encode_manifest(
        manifest_of(
            COLLECTION,
            state=changed_state(BUILT, state_of(SEED)),
            state_gone=gone_state(BUILT, state_of(SEED)),
            built={"layers.*.scale": "1"},
        )
    )
)


def arrival_of(layout: str, model: Model, left_s: Callable[[], float] = lambda: 10.0) -> _Arrival:
    settings = SimpleNamespace(rfork_fork_timeout_sec=10.0, rfork_verify="full")
    context = LoadContext(
        settings=cast("Any", settings),
        device=CPU,
        identity=cast("Any", None),
        seed_key="k",
        fingerprint="f",
        facts={},
        layout=layout,
        engine_order=("memory",),
        engine_config=cast("Any", None),
        advertise_host="",
        load_config=None,
        source=cast("Any", None),
        shows_progress=False,
        rank_group=RankGroup(),
        files=cast("Any", None),
    )
    session = SimpleNamespace(times=StageTimes(), left_s=left_s)
    return _Arrival(
        context,
        cast("Any", session),
        model,
        contents(context, model).tensors,
        context.header({"layers.*.scale": "1"}),
        built=BUILT if layout == RUNTIME else None,
        settle=lambda: None,
    )


def fork(body: bytes, layout: str = CHECKPOINT) -> tuple[Model, Manifest]:
    """A receiver's steps with a manifest: decode, pair, read, accept.

    Raises:
        ForkError: as there.
    """
    model = Model()
    one = arrival_of(layout, model)
    remote = decode_manifest(body)
    segments = pair(one._tensors.manifest(one._header), remote)
    for local, address, nbytes in segments:
        inside = [each for each in COLLECTION.spans if each.address <= address < each.address + each.nbytes]
        if all(address + nbytes > each.address + each.nbytes for each in inside):
            raise ForkError("an engine refuses what is not registered")
        ctypes.memmove(local, address, nbytes)
    before = attributes(model)
    one.accept(remote)
    check_nothing_else_changed(model, before, remote)
    return model, remote


def attributes(model: nn.Module) -> dict[str, object]:
    """Everything that hangs on modules, by identity if it is not a plain value."""
    return {
        f"{name}.{key}".removeprefix("."): value if value_codec.is_plain(value) else id(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


def check_nothing_else_changed(model: nn.Module, before: dict[str, object], remote: Manifest) -> None:
    """Only names in the seed's state are other than before, and they hold what the seed said."""
    after, now = attributes(model), state_of(model)
    changed = {name for name in before.keys() | after.keys() if before.get(name, model) != after.get(name, model)}
    if changed - remote.state.keys():
        raise AssertionError(f"changed beside the state: {changed - remote.state.keys()}")
    for name, value in remote.state.items():
        ours, theirs = now[name], value
        if isinstance(value, dict):
            ours, theirs = value_codec.decode(ours), value_codec.decode(value)
        if type(ours) is not type(theirs) or not (ours == theirs or repr(ours) == repr(theirs)):  # NaN is not itself
            raise AssertionError(f"{name} is {now.get(name)!r}, not {value!r}")
    for leaf in walk(SEED, VLLM_RULES):
        if isinstance(leaf.value, torch.Tensor):
            (ours,) = [each.value for each in walk(model, VLLM_RULES) if each.name == leaf.name]
            if not torch.equal(ours, leaf.value):
                raise AssertionError(f"{leaf.name} has other bytes")


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield from nodes(child, (*path, key))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """``tree`` with ``value`` at ``path``; a copy where that is the root."""
    if not path:
        return value
    at(tree, path[:-1])[path[-1]] = value
    return tree


def check_text(error: ForkError) -> None:
    """It can be logged: printable, and not of a seed's length."""
    assert str(error).isprintable()
    assert len(str(error)) < 10_000


PATHS = list(nodes(GOOD))
BAD_NAMES = [
    "_modules",
    "eval",
    "layers.0._parameters",
    "layers.0.forward",
    "layers.0.weight",
    "head",
    "impl",
    "impl.table",
]
NAMES = st.sampled_from([*BAD_NAMES, "layers.0.scale", "layers.0.added", "a\nb\x1b[1m", "n" * 5000, ""])
SAME_HASH = {"set": [{"int": hex(((1 << 61) - 1) * number)} for number in range(8, 99)]}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.one_of(
    st.none() | st.booleans() | st.text(max_size=20),
    st.sampled_from([0, -1, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64, 1 << 200, -(1 << 63), 1e308, 5e-324, -0.0]),
    st.sampled_from(["x" * 100_000, "\x1b[2J\n" * 1000, "\ud7ff\u202e", "float16", "nan", "ff" * 40]),
    st.sampled_from([[], {}, [[]] * 50, [{}] * 50, [0] * 1000, SAME_HASH]),
    st.recursive(
        SCALARS | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=4),
        max_leaves=20,
    ),
    st.sampled_from([at(GOOD, path) for path in PATHS]).map(copy.deepcopy),  # a second edit may write into it
)


@pytest.mark.parametrize("layout", [CHECKPOINT, RUNTIME])
def test_the_manifest_as_it_is_gives_the_seeds_model(layout: str) -> None:
    model, remote = fork(json.dumps({**GOOD, "layout": layout}).encode(), layout)
    assert state_of(model) == state_of(SEED)
    assert len(remote.state) == 12
    assert (model.layers[0].groups, model.impl.table) == ({3, float("inf")}, [1, 1 << 70])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    edits=st.lists(st.tuples(st.sampled_from(PATHS), VALUES), min_size=1, max_size=3),
    added=st.dictionaries(NAMES, VALUES, max_size=2),
    gone=st.lists(NAMES, max_size=2),
    layout=st.sampled_from([CHECKPOINT, RUNTIME]),
)
@example(edits=[], added={"layers.0.added": 1}, gone=[], layout=CHECKPOINT)
@example(edits=[], added={"layers.0.forward": "x"}, gone=[], layout=RUNTIME)
@example(edits=[], added={}, gone=["layers.0.scale"], layout=RUNTIME)
def test_any_value_anywhere_is_a_fork_error_or_the_seeds_model(
    edits: list[tuple[tuple[Any, ...], Any]], added: dict[str, Any], gone: list[str], layout: str
) -> None:
    tree = json.loads(json.dumps({**GOOD, "layout": layout}))
    tree["state"].update(added)
    tree["state_gone"] += gone
    for path, value in edits:
        try:
            tree = put(tree, path, value)
        except (KeyError, IndexError, TypeError):  # an earlier edit has taken the place away
            continue
    started = time.process_time()
    try:
        model, _ = fork(json.dumps(tree).encode("utf-8", "surrogatepass"), layout)
    except ForkError as error:
        check_text(error)
    else:
        assert model.eval() is model
        assert model.layers[0](torch.ones(1, 8)).shape == (1, 4)
    assert time.process_time() - started < 10.0


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1 << 32))
def test_a_manifest_with_changed_bytes_is_a_fork_error_or_the_seeds_model(seed: int) -> None:
    rng = random.Random(seed)
    body = bytearray(json.dumps(GOOD).encode())
    for _ in range(rng.randrange(1, 4)):
        where = rng.randrange(len(body))
        body[where : where + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    try:
        fork(bytes(body))
    except ForkError as error:
        check_text(error)


def with_state(value: str) -> bytes:
    return json.dumps({**GOOD, "state": {"layers.0.groups": "@"}}).replace('"@"', value).encode()


def with_gone(value: str) -> bytes:
    return json.dumps({**GOOD, "state_gone": "@"}).replace('"@"', value).encode()


def many(unit: str, count: int) -> str:
    return "[" + ",".join([unit] * count) + "]"


#: As large as a manifest may be, or more than half of it; memory before there were bounds: 0.5 to 1.6 GB.
HUGE: dict[str, Callable[[], bytes]] = {
    "a list of lists": lambda: with_state(many("[]", 22_000_000)),
    "a set of mappings": lambda: with_state('{"set":' + many("{}", 22_000_000) + "}"),
    "a set of numbers": lambda: with_state('{"set":' + many("1000", 13_000_000) + "}"),
    "names that are gone": lambda: with_gone(many('"ab"', 13_000_000)),
    "a name of 60 MB": lambda: json.dumps({**GOOD, "state": {"n" * 60_000_000: 1}}).encode(),
    "a fingerprint of 60 MB": lambda: json.dumps({**GOOD, "fingerprint": "n" * 60_000_000}).encode(),
    "a number of 60 MB": lambda: with_state("1" * 60_000_000),
    "more than it may be": lambda: b" " * ((64 << 20) + 1),
    "half a million levels": lambda: with_state('{"a":' * 500_000 + "1" + "}" * 500_000),
}

_MEASURE = """
import sys
from vllm_rfork.errors import SeedError
from vllm_rfork.manifest.codec import decode_manifest
body = sys.stdin.buffer.read()
def peak_mb():
    return next(int(line.split()[1]) / 1000 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak_mb()
try:
    decode_manifest(body)
except SeedError as error:
    print(peak_mb() - before, len(str(error)))
"""


@pytest.mark.parametrize("what", HUGE)
def test_what_no_seed_sends_is_refused_before_it_takes_memory(what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE], input=HUGE[what](), capture_output=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr.decode()
    grown_mb, length = map(float, done.stdout.split())
    assert grown_mb < 150
    assert length < 1000


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"state_gone": ["n" * 2049]}, "a name of more than 2048"),
        ({"built": {"n" * 2049: "1"}}, "a name of more than 2048"),
        ({"built": {"n": "1" * 2049}}, "a name of more than 2048"),
        ({"epoch": "e" * 257}, "epoch of more than 256"),
        ({"layout": "e" * 257}, "layout of more than 256"),
        ({"state": {"a": 1 << 63}}, "too large a number"),
        ({"state": {"a": 1}, "state_gone": ["b", "a"]}, "'a' of the seed's manifest is both present and gone"),
    ],
)
def test_texts_and_numbers_have_bounds(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(SeedError, match=what):
        decode_manifest(json.dumps({**GOOD, **fields}).encode())


@pytest.mark.parametrize(
    "fields",
    [{"shape": [1] * 65, "stride": [1] * 65}, {"shape": [1 << 63], "stride": [1]}, {"offset": -(1 << 64), "span": -1}],
)
def test_shapes_have_bounds(fields: dict[str, Any]) -> None:
    tensors = [{**GOOD["tensors"][0], **fields}, *GOOD["tensors"][1:]]
    with pytest.raises(SeedError, match="impossible shape or stride"):
        decode_manifest(json.dumps({**GOOD, "tensors": tensors}).encode())


def test_tensors_that_a_seed_puts_into_one_span_are_told_in_few_words() -> None:
    """Each difference would name all others: a text as long as the square of their number."""
    count = 3000

    def manifest(shared: bool) -> Manifest:
        spans = tuple(Span(0, 4096 + 64 * number, 64) for number in range(count))
        tensors = tuple(TensorEntry(f"layer.{n}", "uint8", (64,), (1,), 0 if shared else n) for n in range(count))
        identity = {"seed_key": "k", "fingerprint": "f", "epoch": "e", "layout": CHECKPOINT, "engine": "memory"}
        return Manifest(regions=(Region(4096, 64 * count),), spans=spans, tensors=tensors, endpoint="", **identity)

    with pytest.raises(ManifestMismatch, match=r"and 2995 more") as caught:
        pair(manifest(shared=False), manifest(shared=True))
    assert len(caught.value.differences) == count
    assert sum(map(len, caught.value.differences)) < 300 * count


@pytest.mark.parametrize("layout", [CHECKPOINT, RUNTIME])
def test_a_fork_that_has_no_time_left_ends_while_state_is_set(layout: str) -> None:
    """Setting state asks the session for its time: ``rfork_fork_timeout_sec`` covers all that a seed sends."""
    model = Model()
    asked = []

    def left_s() -> float:
        asked.append(1)
        if len(asked) > 3:
            raise ForkError("the fork took longer than 10 s")
        return 10.0

    one = arrival_of(layout, model, left_s)
    remote = decode_manifest(json.dumps({**GOOD, "layout": layout}).encode())
    for local, address, nbytes in pair(one._tensors.manifest(one._header), remote):
        ctypes.memmove(local, address, nbytes)
    with pytest.raises(ForkError, match="took longer than 10 s"):
        one.accept(remote)
    assert state_of(model) == BUILT


@pytest.mark.parametrize(
    "older",
    [
        {"built"},
        {"built", "state_gone"},
        {"built", "state_gone", "digest_algorithm", "state"},
    ],
)
def test_manifests_of_earlier_generations_are_read(older: set[str]) -> None:
    """Fields that came later may be missing, on the manifest, its spans and its tensors."""
    tree = {name: value for name, value in GOOD.items() if name not in older}
    tree["tensors"] = [
        {name: value for name, value in each.items() if name not in {"format", "inline", "inline_group"}}
        for each in GOOD["tensors"]
    ]
    if "digest_algorithm" in older:
        tree["spans"] = [{name: each[name] for name in ("region", "address", "nbytes")} for each in GOOD["spans"]]
    remote = decode_manifest(json.dumps(tree).encode())
    assert [each.name for each in remote.tensors] == [each["name"] for each in GOOD["tensors"]]
    assert remote.state == ({} if "state" in older else GOOD["state"])
