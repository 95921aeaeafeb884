"""What the manifest says besides the engine's memory: small tensors elsewhere, and how the model was built."""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import functools
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import torch
from torch import nn

from tests.inventory import collect, match_state, state_of
from vllm_rfork.devices.registry import device_backend
from vllm_rfork.errors import ForkError, ManifestMismatch, VerificationError
from vllm_rfork.fork.stage_times import StageTimes
from vllm_rfork.load.capture import SeedProspect
from vllm_rfork.load.context import LoadContext
from vllm_rfork.load.from_fork import FromFork, _Arrival
from vllm_rfork.load.from_storage import FromStorage
from vllm_rfork.manifest.codec import decode_manifest, encode_manifest
from vllm_rfork.manifest.pairing import built_differences, pair
from vllm_rfork.manifest.schema import Manifest, ManifestHeader
from vllm_rfork.model.build_signature import LARGEST_INT, build_signature
from vllm_rfork.model.pointers import check_no_addresses, memory_of
from vllm_rfork.model.python_state import changed_state, gone_state
from vllm_rfork.model.restore import apply_inline, check_inline
from vllm_rfork.model.tensors import TensorInventory, with_inline
from vllm_rfork.vllm_compat.model_rules import VLLM_RULES
from vllm_rfork.vllm_compat.rank_groups import RankGroup

#: Where the engine would work: nothing here lies there, so that all tensors are inline.
ELSEWHERE, CPU = torch.device("cuda"), torch.device("cpu")


def manifest_of(
    collection: TensorInventory, state: Any = None, state_gone: tuple[str, ...] = (), **more: Any
) -> Manifest:
    """As it comes from the wire."""
    identity = {name: name for name in ("seed_key", "fingerprint", "epoch", "engine", "endpoint")}
    header = ManifestHeader(**identity, layout="runtime", **more)
    return decode_manifest(encode_manifest(collection.manifest(header, state=state, state_gone=state_gone)))


def holding(**tensors: torch.Tensor) -> nn.Module:
    model = nn.Module()
    for name, tensor in tensors.items():
        setattr(model, name, tensor)
    return model


def scales(aliased: bool) -> nn.Module:
    k = torch.tensor([1.0])
    return holding(k=k, v=k if aliased else torch.tensor([2.0]))


@pytest.fixture(autouse=True)
def without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_rfork.model.tensors.device_backend", lambda device: device_backend(CPU))


@pytest.mark.parametrize("seed_is", [True, False])
def test_small_tensors_that_share_memory_on_one_side_only_are_a_difference(seed_is: bool) -> None:
    ours, theirs = (collect(scales(aliased), ELSEWHERE) for aliased in (not seed_is, seed_is))
    with pytest.raises(ManifestMismatch, match="k: shares memory with") as caught:
        pair(manifest_of(ours), manifest_of(theirs))
    assert len(caught.value.differences) == 2
    pair(manifest_of(ours), manifest_of(collect(scales(not seed_is), ELSEWHERE)))


def test_control_without_that_guard_the_last_of_two_names_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, types, shapes and every byte that was sent agree, and ``k`` is ``v``; bytes are then looked at again."""
    remote = manifest_of(collect(scales(False), ELSEWHERE))
    model = scales(True)
    collection = collect(model, ELSEWHERE)
    monkeypatch.setattr("vllm_rfork.manifest.pairing._alias_differences", lambda local, remote: [])
    pair(manifest_of(collection), remote)
    apply_inline(collection, remote)
    assert (float(model.k), float(model.v)) == (2.0, 2.0)
    with pytest.raises(VerificationError, match="1 small tensors do not contain the seed's bytes: k"):
        check_inline(collection, remote)


def test_views_of_one_small_tensor_the_other_way_round_are_a_difference() -> None:
    def views(first: str, second: str) -> TensorInventory:
        both = torch.zeros(2, 8)
        return collect(holding(both=both, **{first: both[0], second: both[1]}), ELSEWHERE)

    with pytest.raises(ManifestMismatch, match=r"gain: shares memory with both@0, gain@32, shift@0 on the seed"):
        pair(manifest_of(views("gain", "shift")), manifest_of(views("shift", "gain")))


def test_small_tensors_that_lie_in_one_storage_and_do_not_overlap_are_no_aliases() -> None:
    both = torch.tensor([1.0, 2.0])
    ours = collect(holding(k=both[:1], v=both[1:]), ELSEWHERE)
    assert pair(manifest_of(ours), manifest_of(collect(scales(False), ELSEWHERE))) == []


def test_a_seed_that_does_not_say_which_small_tensors_share_memory_is_refused() -> None:
    ours = manifest_of(collect(scales(False), ELSEWHERE))
    silent = tuple(msgspec.structs.replace(entry, inline_group=None) for entry in ours.tensors)
    with pytest.raises(ManifestMismatch, match="does not report which small tensors share memory"):
        pair(ours, msgspec.structs.replace(ours, tensors=silent))


def test_what_a_receiver_offers_are_the_bytes_it_was_sent() -> None:
    """And not those that stood there when it looked at its model, before the fork."""
    remote = manifest_of(collect(holding(k=torch.tensor([3.0])), ELSEWHERE))
    model = holding(k=torch.tensor([0.5]))
    collection = collect(model, ELSEWHERE)
    apply_inline(collection, remote)
    check_inline(collection, remote)
    assert manifest_of(with_inline(collection, remote)).tensors == remote.tensors
    assert float(model.k) == 3.0


class Backend(enum.Enum):
    CUTLASS = 1
    TRITON = 2


class Kernel:
    """What a quantization method chooses."""


class OtherKernel(Kernel):
    pass


for kind in (Kernel, OtherKernel):
    kind.__module__ = "vllm.kernels"


class Method:
    def __init__(self, backend: Backend, kernel: type[Kernel]) -> None:
        self.backend = backend
        self.kernel = kernel()


Method.__module__ = "vllm.quantization"


class Experts(nn.Module):  # type: ignore[misc]  # torch is not there when types are checked
    """Its first half is the gate, or, with one backend, its second."""

    def __init__(self, backend: Backend, kernel: type[Kernel] = Kernel) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.zeros(4, 2), requires_grad=False)
        self.method = Method(backend, kernel)
        self.swapped = backend is Backend.CUTLASS

    def process(self) -> None:
        if self.swapped:
            self.w13.data.copy_(self.w13.data.roll(2, 0))

    def gate(self) -> torch.Tensor:
        return self.w13[2:] if self.swapped else self.w13[:2]


def model_of(*arguments: Any) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([Experts(*arguments) for _ in range(3)])
    return model


def marks(model: nn.Module, *, kernels: bool = True) -> dict[str, str]:
    return build_signature(model, state_of(model), kernels=kernels, rules=VLLM_RULES)


def test_another_kernel_as_built_is_a_difference_and_without_the_guard_the_gate_is_wrong() -> None:
    """Equal names, shapes and bytes, and state that agrees with how each was built."""
    seed, ours = model_of(Backend.CUTLASS), model_of(Backend.TRITON)
    built, theirs_built = state_of(ours), state_of(seed)
    seed_marks, our_marks = marks(seed), marks(ours)
    for number, layer in enumerate(seed.layers):
        layer.w13.data.copy_(torch.arange(8.0).view(4, 2) + number)
        layer.process()
    after = state_of(seed)
    remote = manifest_of(
        collect(seed, CPU),
        built=seed_marks,
        state=changed_state(theirs_built, after),
        state_gone=gone_state(theirs_built, after),
    )
    collection = collect(ours, CPU)
    with pytest.raises(ManifestMismatch) as caught:
        pair(manifest_of(collection, built=our_marks), remote)
    assert caught.value.differences == [
        "layers.*.method.backend.<member> as built: Backend.CUTLASS on the seed, Backend.TRITON on the receiver",
        "layers.*.swapped as built: True on the seed, False on the receiver",
    ]
    for segment in pair(manifest_of(collection), remote):  # the receiver does not look
        ctypes.memmove(segment.local, segment.remote, segment.nbytes)
    match_state(ours, built, remote.state, remote.state_gone)
    assert torch.equal(ours.layers[0].w13, seed.layers[0].w13)
    assert not torch.equal(ours.layers[0].gate(), seed.layers[0].gate())


def test_another_class_of_kernel_is_a_difference() -> None:
    ours, theirs = (marks(model_of(Backend.TRITON, kind)) for kind in (Kernel, OtherKernel))
    assert list(built_differences(ours, theirs)) == [
        "layers.*.method.kernel.<class> as built: OtherKernel on the seed, Kernel on the receiver"
    ]


def test_kernels_are_the_receivers_own_choice_where_it_post_processes_for_itself() -> None:
    ours, theirs = (model_of(Backend.TRITON, kind) for kind in (Kernel, OtherKernel))
    theirs.layers[0].method.backend = Backend.CUTLASS
    theirs.layers[1].use_fused_kernel, ours.layers[1].use_fused_kernel = True, False
    assert list(built_differences(marks(ours, kernels=False), marks(theirs, kernels=False))) == []
    theirs.layers[1].is_transposed, ours.layers[1].is_transposed = True, False
    (line,) = built_differences(marks(ours, kernels=False), marks(theirs, kernels=False))
    assert line == "layers.*.is_transposed as built: True on the seed, False on the receiver"


def test_one_layer_that_differs_from_its_like_is_told() -> None:
    ours, theirs = model_of(Backend.TRITON), model_of(Backend.TRITON)
    ours.layers[0].swapped = theirs.layers[2].swapped = True
    (line,) = built_differences(marks(ours), marks(theirs))
    assert line.startswith("layers.*.swapped as built: #")
    theirs.layers[0].swapped, theirs.layers[2].swapped = True, False
    assert list(built_differences(marks(ours), marks(theirs))) == []


#: What two workers that may be paired have each for themselves.
OWN = {
    "a_port": (8000, 8001),
    "device_index": (0, 1),
    "local_rank": (0, 3),
    "seed": (0, 7),
    "where": ("cuda:0", "cuda:1"),
    "created_at": (1_790_000_000, 1_790_000_001),
    "began": (1_790_000_000.5, 1_790_000_001.5),
    "object": (139_637_976_727_552, 139_637_976_727_553),
    "a_number_like_an_address": (LARGEST_INT, LARGEST_INT + 1),
    "request_uuid": ("one", "two"),
    "worker": ("0f1e2d3c4b5a69788796a5b4c3d2e1f0", "1f1e2d3c4b5a69788796a5b4c3d2e1f0"),
    "served_from": ("10.0.0.1", "10.0.0.2"),
    "folder": ("one", "two"),
    "written_to": ("/var/one", "/var/two"),
    "max_num_batched_tokens": (2048, 4096),
    "numThreads": (8, 16),
    "num_sms": (132, 114),
    "do_not_compile": (True, False),
    "block_size": (16, 32),
    "chosen_later": (None, False),
    "rounded": (0.1 + 0.2, 0.3),
    "names": ({"a", "b"}, {"a", "c"}),
}


@pytest.mark.parametrize("name", OWN)
def test_what_is_a_workers_own_is_no_difference(name: str) -> None:
    ours, theirs = model_of(Backend.TRITON), model_of(Backend.TRITON)
    for model, value in zip((ours, theirs), OWN[name], strict=True):
        for holder in (model, model.layers[1], model.layers[1].method):
            setattr(holder, name, value)
        model.layers[0].more = {name: value}
    for kernels in (True, False):
        assert list(built_differences(marks(ours, kernels=kernels), marks(theirs, kernels=kernels))) == []


def test_the_name_of_this_host_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for host in ("one", "two"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        model = model_of(Backend.TRITON)
        model.runs_on = host
        found.append(marks(model))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("is_gated", (True, False)),
        ("activation", ("silu", "gelu")),
        ("group_size", (64, 128)),
        ("scaling", (0.125, 0.25)),
        ("sizes", ([1, 2], [2, 1])),
    ],
)
def test_what_a_constructor_chose_is_a_difference(name: str, values: tuple[Any, Any]) -> None:
    ours, theirs = model_of(Backend.TRITON), model_of(Backend.TRITON)
    for model, value in zip((ours, theirs), values, strict=True):
        model.layers[1].method.__dict__[name] = value
    (line,) = built_differences(marks(ours), marks(theirs))
    assert name in line


def test_what_one_side_alone_has_is_no_difference() -> None:
    """Graphs and adapters add values; what a constructor chooses has a value on both sides."""
    ours, theirs = model_of(Backend.TRITON), model_of(Backend.TRITON)
    theirs.layers[0].evaluate = True
    assert list(built_differences(marks(ours), marks(theirs))) == []
    assert list(built_differences(marks(theirs), marks(ours))) == []


def test_a_seed_that_does_not_say_how_it_was_built_is_refused() -> None:
    assert list(built_differences({}, None)) == ["as built: the seed does not report its build signature"]
    assert list(built_differences(None, {"a": "True"})) == []


def test_many_layers_are_told_in_few_bytes() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([Experts(Backend.TRITON) for _ in range(200)])
    assert len(msgspec.json.encode(marks(model))) < 1_000


def offering(**tensors: torch.Tensor) -> nn.Module:
    return holding(weight=torch.zeros(64), workspace=torch.zeros(1000), **tensors)


def checked(model: nn.Module, state: dict[str, Any], device: torch.device = CPU) -> None:
    collection = collect(model, device)
    check_no_addresses(collection, state, memory_of(model, collection, device_backend(CPU)))


def test_addresses_of_scratch_are_refused_in_tables_and_values() -> None:
    model = offering()
    address = model.workspace.data_ptr()
    checked(model, {"size": 1 << 20})
    with pytest.raises(ForkError, match="state pointer is an address"):
        checked(model, {"pointer": address})
    model.table = torch.tensor([0, address + 8])
    with pytest.raises(ForkError, match="tensor table contains addresses"):
        checked(model, {})
    with pytest.raises(ForkError, match="tensor table contains addresses"):
        checked(model, {}, ELSEWHERE)  # the table is one of the small tensors that travel in the manifest


def test_addresses_of_what_helpers_hold_are_refused() -> None:
    model = offering()
    model.impl = Method(Backend.TRITON, Kernel)
    model.impl.workspace = torch.zeros(500)
    with pytest.raises(ForkError, match="state pointer is an address"):
        checked(model, {"pointer": model.impl.workspace.data_ptr()})


def test_large_tables_are_looked_at_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_rfork.model.pointers.PIECE", 1 << 16)
    model = offering(table=torch.arange(200_000))
    checked(model, {})
    model.table[199_999] = model.weight.data_ptr()
    with pytest.raises(ForkError, match="tensor table contains addresses"):
        checked(model, {})


def test_every_block_of_the_allocator_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_rfork.devices.allocator_blocks import Block

    model = offering()
    collection = collect(model, CPU)
    side = device_backend(CPU)
    monkeypatch.setattr(type(side), "blocks", lambda self: [Block(1 << 40, 4096)])
    memory = memory_of(model, collection, side)
    check_no_addresses(collection, {"pointer": (1 << 40) + 4096}, memory)
    with pytest.raises(ForkError, match="state pointer is an address"):
        check_no_addresses(collection, {"pointer": (1 << 40) + 4095}, memory)


class Vote:
    """A rank that is alone."""

    alone = True

    @staticmethod
    def run(stage: str, action: Any, timeout_s: float) -> Any:
        return action()


def context_of(layout: str, device: torch.device = ELSEWHERE) -> LoadContext:
    return LoadContext(
        settings=cast("Any", SimpleNamespace(rfork_fork_timeout_sec=1.0, rfork_verify="off")),
        device=device,
        identity=cast("Any", None),
        seed_key="seed_key",
        fingerprint="fingerprint",
        facts={},
        layout=layout,
        engine_order=("engine",),
        engine_config=cast("Any", None),
        advertise_host="",
        load_config=None,
        source=cast("Any", None),
        shows_progress=False,
        rank_group=RankGroup(),
        files=cast("Any", SimpleNamespace(look_also_at=lambda sources: None, forked_from=lambda remote: None)),
    )


def session() -> Any:
    intent = SimpleNamespace(withdraw=lambda: None)
    return SimpleNamespace(times=StageTimes(), intent=intent, left_s=lambda: 1.0)


@pytest.fixture
def fork(monkeypatch: pytest.MonkeyPatch) -> FromFork:
    """One fork in the runtime layout, for a device on which nothing here lies."""
    monkeypatch.setattr("vllm_rfork.load.from_fork.device_backend", lambda device: device_backend(CPU))
    one = session()
    return FromFork(context_of("runtime"), one, cast("Any", Vote()), SeedProspect(one, None))


def test_a_receiver_becomes_a_seed_of_the_bytes_it_was_sent(fork: FromFork) -> None:
    remote = manifest_of(collect(holding(k=torch.tensor([3.0])), ELSEWHERE))
    inventory = collect(holding(k=torch.tensor([0.5])), ELSEWHERE)
    assert fork._capture(inventory, remote).manifest().tensors == remote.tensors  # type: ignore[union-attr]


def test_a_load_ends_with_a_look_at_the_small_tensors(fork: FromFork, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = manifest_of(collect(holding(k=torch.tensor([3.0])), ELSEWHERE))
    model = holding(k=torch.tensor([0.5]))
    inventory = collect(model, ELSEWHERE)
    arrival = _Arrival(fork._context, fork._session, model, inventory, fork._header(), built={}, settle=lambda: None)
    arrival.accept(remote)
    model.k.fill_(0.5)
    monkeypatch.setattr("vllm_rfork.model.restore.apply_inline", lambda inventory, manifest: None)
    with pytest.raises(VerificationError, match="small tensors"):
        arrival.accept(remote)


def test_a_model_that_was_built_otherwise_is_refused_before_it_is_touched(
    fork: FromFork, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[nn.Module] = []
    monkeypatch.setattr(
        "vllm_rfork.load.from_fork.dummy_weights.fill_with_dummies", lambda model, *others: filled.append(model)
    )
    for theirs, ours in ((Backend.CUTLASS, Backend.TRITON), (Backend.TRITON, Backend.TRITON)):
        seed = model_of(theirs)
        fork._promised = manifest_of(collect(seed, ELSEWHERE), built=marks(seed))
        if theirs is ours:
            fork.fill_with_dummies(model_of(ours), None)
            assert fork.wrote_dummies
            assert len(filled) == 1
        else:
            with pytest.raises(ManifestMismatch, match=r"backend\.<member> as built"):
                fork.fill_with_dummies(model_of(ours), None)
            assert not fork.wrote_dummies
            assert not filled


@pytest.mark.parametrize("layout", ["checkpoint", "runtime"])
def test_no_layout_is_offered_with_addresses_in_it(layout: str) -> None:
    for held in (None, "table", "pointer"):
        one, model = session(), offering()
        prospect = SeedProspect(one, None)
        address = model.workspace.data_ptr()

        def load_weights(model: nn.Module, model_config: Any, held: Any = held, address: int = address) -> None:
            if held is not None:
                setattr(model, held, torch.tensor([address]) if held == "table" else address)

        loader = SimpleNamespace(load_weights=load_weights)
        context = context_of(layout, CPU)
        context = dataclasses.replace(context, settings=SimpleNamespace(rfork_fallback_load_format="auto"))
        storage = FromStorage(context, one, prospect, loader)
        storage.fill(model, None)
        snapshot = prospect.requires("the loaded model", functools.partial(storage.snapshot, model))
        assert (snapshot is None) is (held is not None)
        assert ("address" in str(prospect.obstacle)) is (held is not None), prospect.obstacle
