"""What differs between devices, on the processor, with torch.cuda faked, and with a stand-in for torch_npu."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from tests.ascend.fake_torch_npu import FakeTorchNpu, Format, segment
from vllm_rfork.devices import selfcheck as device_check
from vllm_rfork.devices.base import PLAIN, DeviceBackend
from vllm_rfork.devices.cuda import CudaBackend
from vllm_rfork.devices.npu import NpuBackend
from vllm_rfork.devices.registry import device_backend
from vllm_rfork.errors import ForkError
from vllm_rfork.manifest.schema import Region

MIB = 1 << 20
CPU = torch.device("cpu")


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> FakeTorchNpu:
    fake = FakeTorchNpu([segment(64 * MIB, 64 * MIB, device=1, expandable=True)])
    monkeypatch.setitem(sys.modules, "torch_npu", fake)
    return fake


@pytest.fixture
def npu_backend(npu: FakeTorchNpu) -> NpuBackend:
    return NpuBackend(torch.device("cpu", 1))  # torch knows no device called npu here; the tensors are the processor's


def _cuda(monkeypatch: pytest.MonkeyPatch, segments: list[dict[str, Any]]) -> CudaBackend:
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    return CudaBackend(torch.device("cuda", 0))


def test_each_type_of_device_has_its_side(npu: FakeTorchNpu) -> None:
    assert type(device_backend(torch.device("cuda", 2))) is CudaBackend
    assert type(device_backend(types.SimpleNamespace(type="npu", index=1))) is NpuBackend  # type: ignore[arg-type]
    assert device_backend(CPU).name == "cpu"
    with pytest.raises(ForkError, match="meta"):
        device_backend(torch.device("meta"))


def test_a_missing_torch_npu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(ForkError, match="torch_npu"):
        device_backend(types.SimpleNamespace(type="npu", index=0))  # type: ignore[arg-type]


def test_the_text_names_the_device_as_the_process_counts(monkeypatch: pytest.MonkeyPatch, npu: FakeTorchNpu) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)

    assert CudaBackend(torch.device("cuda", 1)).name == "cuda:1"
    assert CudaBackend(torch.device("cuda")).name == "cuda:5"
    assert NpuBackend(torch.device("cpu", 1)).name == "npu:1"
    assert NpuBackend(CPU).name == "npu:3"


def test_a_device_without_a_number_is_the_asking_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM says ``cuda``; a thread that is begun later would take that for the first device."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)

    assert device_backend(torch.device("cuda")).with_index == torch.device("cuda", 5)
    assert device_backend(torch.device("cuda", 1)).with_index == torch.device("cuda", 1)
    assert device_backend(CPU).with_index == CPU


@pytest.mark.parametrize(
    ("visible", "physical"), [("", "1"), ("3,5", "5"), (" 3 , 5 ,", "5"), ("GPU-aa,GPU-bb", "GPU-bb")]
)
def test_the_physical_number_is_the_hosts(visible: str, physical: str) -> None:
    assert CudaBackend(torch.device("cuda", 1)).physical_id({"CUDA_VISIBLE_DEVICES": visible}) == physical


def test_each_backend_has_its_own_variable(npu_backend: NpuBackend) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "7,6", "ASCEND_RT_VISIBLE_DEVICES": "3,5"}

    assert npu_backend.physical_id(environment) == "5"
    assert device_backend(CPU).physical_id(environment) == "0"


def test_a_device_beyond_the_list_is_an_error() -> None:
    with pytest.raises(ForkError, match="CUDA_VISIBLE_DEVICES=3"):
        CudaBackend(torch.device("cuda", 1)).physical_id({"CUDA_VISIBLE_DEVICES": "3"})


def test_the_backend_is_asked_for_this_very_device(
    monkeypatch: pytest.MonkeyPatch, npu: FakeTorchNpu, npu_backend: NpuBackend
) -> None:
    called: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", called.append)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("emptied"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: called.append(("use", device)))
    cuda = CudaBackend(torch.device("cuda", 1))

    for backend in (cuda, npu_backend, device_backend(CPU)):
        backend.synchronize()
        backend.empty_cache()
        backend.set_current()

    assert called == [torch.device("cuda", 1), "emptied", ("use", 1)]
    assert npu.npu.calls == [("synchronize", 1), ("empty_cache", None), ("set_device", 1)]


@pytest.mark.parametrize("backend", ["cpu", "npu"])
def test_bytes_are_live_and_lie_where_they_are_said_to(backend: str, npu_backend: NpuBackend) -> None:
    chosen: DeviceBackend = npu_backend if backend == "npu" else device_backend(CPU)
    base = torch.arange(100, dtype=torch.int16)
    part = base[10:40].view(5, 6).t()  # not contiguous, in the middle of its storage
    start, end = chosen.extent(part)
    data = chosen.bytes_of(part, start, end)

    base[20] = -2

    assert (start, end) == (base.data_ptr() + 20, base.data_ptr() + 80)
    assert data.data_ptr() == start
    assert data.view(torch.int16).tolist() == base[10:40].tolist()


def test_plain_formats_are_one(npu: FakeTorchNpu, npu_backend: NpuBackend) -> None:
    tensor = torch.ones(4, 4)
    for number in (Format.ND, Format.NCHW):
        npu._formats[tensor.untyped_storage()._cdata] = number
        assert npu_backend.private_format(tensor) == PLAIN
    assert device_backend(CPU).private_format(tensor) == PLAIN


def test_a_view_of_a_private_tensor_is_private_and_occupies_the_whole_storage(
    npu: FakeTorchNpu, npu_backend: NpuBackend
) -> None:
    weight = npu.npu_format_cast(torch.arange(20 * 30, dtype=torch.int16).view(20, 30), Format.FRACTAL_NZ)

    for view in (weight, weight.t()):
        start, end = npu_backend.extent(view)
        assert npu_backend.private_format(view) == 29
        assert (start, end - start) == (weight.data_ptr(), 32 * 32 * 2)  # padded to whole tiles
    with pytest.raises(ForkError, match="private layout"):
        npu_backend.extent(weight[3:])


def test_a_private_tensor_is_copied_as_raw_bytes_into_one_that_was_allocated_in_its_format(
    monkeypatch: pytest.MonkeyPatch, npu: FakeTorchNpu, npu_backend: NpuBackend
) -> None:
    plain = torch.arange(20 * 30, dtype=torch.int16).view(20, 30)
    source = npu.npu_format_cast(plain, Format.FRACTAL_NZ)
    target = npu_backend.empty_in_format(source.shape, source.dtype, npu_backend.private_format(source))
    monkeypatch.setattr(torch.Tensor, "set_", lambda *_: pytest.fail("a private storage was handed to set_"))

    ours, theirs = (npu_backend.bytes_of(tensor, *npu_backend.extent(tensor)) for tensor in (target, source))
    ours.copy_(theirs)

    assert npu_backend.private_format(target) == 29
    assert torch.equal(npu.npu_format_cast(target, Format.ND), plain)
    assert not torch.equal(target, plain)  # read as if it were plain, it is nonsense
    assert npu_backend.private_format(ours) == PLAIN  # the alias does not know the layout, so no kernel converts it


def test_padding_belongs_to_the_bytes(npu: FakeTorchNpu, npu_backend: NpuBackend) -> None:
    weight = npu.npu_format_cast(torch.ones(3, 3, dtype=torch.float32), Format.FRACTAL_NZ)
    data = npu_backend.bytes_of(weight, *npu_backend.extent(weight))

    assert data.numel() == weight.untyped_storage().nbytes() > 9 * 4


def test_no_private_layout_exists_elsewhere() -> None:
    backend = device_backend(CPU)

    assert backend.empty_in_format((2, 3), torch.int8, PLAIN).shape == (2, 3)
    with pytest.raises(ForkError, match="29"):
        backend.empty_in_format((2, 3), torch.int8, 29)


def test_weights_in_expandable_segments_are_refused_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = _cuda(monkeypatch, [segment(64 * MIB, 64 * MIB), segment(256 * MIB, 64 * MIB, expandable=True)])

    assert backend.registration_obstacle([Region(65 * MIB, 512)]) is None
    assert "expandable" in str(backend.registration_obstacle([Region(65 * MIB, 512), Region(260 * MIB, 512)]))


def test_what_the_segments_say_outweighs_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = _cuda(monkeypatch, [segment(64 * MIB, 64 * MIB)])
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}

    assert backend.registration_obstacle([Region(65 * MIB, 512)], environment) is None
    assert "expandable_segments:True" in str(backend.registration_obstacle(environment=environment))


@pytest.mark.parametrize(
    ("environment", "refused"),
    [
        ({}, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, True),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512, expandable_segments : true"}, True),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, False),
        # torch lets the general variable win.
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, False),
        ({"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}, False),
    ],
)
def test_the_allocators_configuration_is_read_as_torch_reads_it(environment: dict[str, str], refused: bool) -> None:
    assert bool(CudaBackend(torch.device("cuda", 0)).registration_obstacle(environment=environment)) is refused


def test_memory_of_another_allocator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def tells_nothing() -> None:
        raise RuntimeError("Calling snapshot with backend:cudaMallocAsync is not meaningful.")

    monkeypatch.setattr(torch.cuda, "memory_snapshot", tells_nothing)
    backend = CudaBackend(torch.device("cuda", 0))

    assert "driver's pool" in str(
        backend.registration_obstacle(environment={"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"})
    )
    with pytest.raises(ForkError, match="cudaMallocAsync"):
        backend.registration_obstacle([Region(4096, 512)])


def test_expandable_segments_are_the_default_on_ascend_and_not_refused(npu_backend: NpuBackend) -> None:
    (block,) = npu_backend.blocks()

    assert block.expandable
    assert npu_backend.registration_obstacle([Region(block.address, 512)]) is None
    assert npu_backend.registration_obstacle(environment={"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}) is None


def test_host_memory_has_no_blocks_and_is_never_refused() -> None:
    backend = device_backend(CPU)

    assert backend.blocks() == []
    assert (
        backend.registration_obstacle([Region(4096, 512)], {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}) is None
    )


# -- the check that somebody with hardware runs ----------------------------------------------------------------------


def test_the_check_finds_this_processor_fine(capsys: pytest.CaptureFixture[str]) -> None:
    assert device_check.main(["cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("ok ") for line in lines)


def test_the_check_asks_an_npu_for_its_private_layouts(npu: FakeTorchNpu, npu_backend: NpuBackend) -> None:
    npu.npu.segments = []
    said: list[str] = []

    assert device_check.check(npu_backend, said.append), said
    assert sum("NZ" in line for line in said) == 3
    assert any("format 29, 6144 bytes for 3500 elements" in line for line in said)  # padded


def test_the_check_says_what_differs(
    npu: FakeTorchNpu, npu_backend: NpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    npu.npu.segments = []
    # An alias that is a copy: what a torch_npu without raw aliases would amount to.
    monkeypatch.setattr(npu._C, "_weak_ref_tensor", lambda tensor: tensor.clone())
    said: list[str] = []

    assert not device_check.check(npu_backend, said.append)
    assert [line for line in said if line.startswith("DIFFERS")] == [
        f"DIFFERS  a {kind} matrix in NZ is copied as raw bytes: Differs: the copy no longer contains the matrix"
        for kind in ("whole", "padded")
    ]


def test_the_check_says_that_there_is_no_such_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert device_check.main(["npu:0"]) == 2
    assert "no device npu:0" in capsys.readouterr().err
