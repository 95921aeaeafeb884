"""Groups over device libraries: the order of calls, and the end of a group whose transfers do not end."""

from __future__ import annotations

import ctypes
import importlib
import sys
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from vllm_rfork.engines.collective import device_group, hccl
from vllm_rfork.engines.collective.device_group import DeviceGroup
from vllm_rfork.engines.collective.group import RECEIVER, SEED, GroupFailed
from vllm_rfork.engines.collective.hccl import HcclBackend
from vllm_rfork.engines.collective.nccl_library import Nccl
from vllm_rfork.engines.collective.plan import PART_NBYTES, Piece


class Device:
    """A device whose stream is busy until its transfers are let go."""

    def __init__(self) -> None:
        self.busy = False
        self.ends_when_aborted = True
        self.error: GroupFailed | None = None
        self.abort_error: GroupFailed | None = None
        self.calls: list[Any] = []

    # -- the device

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    def new_stream(self) -> Any:
        return "stream"

    def is_idle(self, stream: Any) -> bool:
        return not self.busy

    def destroy_stream(self, stream: Any) -> None:
        assert not self.busy
        self.calls.append("destroyed")

    # -- the library

    id_nbytes = 4

    def unique_id(self) -> bytes:
        return b"four"

    def communicator(self, unique: bytes, rank: int, deadline: float) -> Any:
        return "communicator"

    def is_ready(self, communicator: Any) -> bool:
        if self.error is not None:
            raise self.error
        return True

    def queue(self, *, sends: bool, pieces: Sequence[Piece], peer: int, communicator: Any, stream: Any) -> None:
        self.calls.append((sends, list(pieces), peer))

    def abort(self, communicator: Any, stream: Any) -> None:
        self.calls.append("aborted")
        if self.abort_error is not None:
            raise self.abort_error
        self.busy = self.busy and not self.ends_when_aborted


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(device_group, "_ABORT_S", 0.05)
    return Device()


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


def test_both_sides_queue_the_same_batches_in_opposite_directions(device: Device) -> None:
    pieces = [Piece(1000, PART_NBYTES + 5), Piece(9 * 10**9, 7)]
    for rank, peer in ((SEED, RECEIVER), (RECEIVER, SEED)):
        device.calls.clear()
        group = DeviceGroup(device, device, rank, b"four", soon())
        (group.send if rank == SEED else group.receive)(pieces, soon())
        first, second = [Piece(1000, PART_NBYTES)], [Piece(1000 + PART_NBYTES, 5), pieces[1]]
        assert device.calls == [(rank == SEED, first, peer), (rank == SEED, second, peer)]
        group.close()
        group.close()
        assert device.calls[2:] == ["aborted", "destroyed"]


@pytest.mark.parametrize("why", ["late", "failed", "aborted"])
def test_a_transfer_that_fails_ends_its_kernels_before_it_is_reported(device: Device, why: str) -> None:
    group = DeviceGroup(device, device, RECEIVER, b"four", soon())
    device.busy = True
    if why == "failed":
        device.error = GroupFailed("the peer is gone")
    if why == "aborted":
        group.abort()
    with pytest.raises(GroupFailed) as caught:
        group.receive([Piece(1000, 5)], soon(0.02))
    assert not caught.value.in_flight
    assert caught.value.late is (why == "late")
    assert device.calls[-2:] == ["aborted", "destroyed"]


def test_kernels_that_do_not_end_are_reported_as_in_flight(device: Device) -> None:
    group = DeviceGroup(device, device, RECEIVER, b"four", soon())
    device.busy, device.ends_when_aborted = True, False
    with pytest.raises(GroupFailed) as caught:
        group.receive([Piece(1000, 5)], soon(0.02))
    assert caught.value.in_flight
    with pytest.raises(GroupFailed) as caught:
        group.close()
    assert caught.value.in_flight
    device.busy = False
    group.close()
    assert device.calls.count("aborted") == 1


def test_only_a_group_that_was_never_complete_is_unfinished(device: Device) -> None:
    """Libraries keep what they had taken for one, so a seed counts them."""
    device.error = GroupFailed("the peer is gone")
    with pytest.raises(GroupFailed) as caught:
        DeviceGroup(device, device, SEED, b"four", soon())
    assert caught.value.unfinished
    assert device.calls == ["aborted", "destroyed"]
    device.error = None
    group = DeviceGroup(device, device, SEED, b"four", soon())
    device.error = GroupFailed("the peer is gone")
    with pytest.raises(GroupFailed) as caught:
        group.send([Piece(1000, 5)], soon())
    assert not caught.value.unfinished


@pytest.mark.parametrize("busy", [True, False])
def test_an_abort_that_fails_leaves_the_group_in_flight_until_its_stream_is_idle(device: Device, busy: bool) -> None:
    group = DeviceGroup(device, device, RECEIVER, b"four", soon())
    device.busy, device.abort_error = busy, GroupFailed("ncclCommAbort failed")
    group.abort()
    with pytest.raises(GroupFailed) as caught:
        group.receive([Piece(1000, 5)], soon())
    assert caught.value.in_flight is busy


def test_a_device_that_cannot_be_asked_leaves_the_group_in_flight(device: Device) -> None:
    group = DeviceGroup(device, device, RECEIVER, b"four", soon())

    @contextmanager
    def lost() -> Iterator[None]:
        raise GroupFailed("cuCtxPushCurrent_v2 failed")
        yield

    device.current = lost  # type: ignore[method-assign]
    with pytest.raises(GroupFailed) as caught:
        group.close()
    assert caught.value.in_flight


def test_hccl_is_called_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and order only; no Ascend runtime has run this."""
    made: list[tuple[str, tuple[Any, ...]]] = []

    class Calls:
        def __init__(self, library: str, signatures: dict[str, tuple[Any, ...]]) -> None:
            self.signatures = signatures

        def __call__(self, name: str, *arguments: Any) -> None:
            assert len(arguments) == len(self.signatures[name])
            made.append((name, arguments))

    monkeypatch.setattr(hccl, "_Calls", Calls)
    monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
    backend = HcclBackend(1)
    library, ascend = backend._hccl, backend._ascend
    group = DeviceGroup(library, ascend, SEED, library.unique_id(), soon())
    group.send([Piece(1000, 5), Piece(2000, 6)], soon())
    group.close()
    names = [name for name, _ in made if name not in ("aclrtSetDevice", "aclrtStreamQuery", "HcclGetCommAsyncError")]
    assert names == [
        "HcclGetRootInfo",
        "aclrtCreateStream",
        "HcclCommInitRootInfo",
        "HcclSend",
        "HcclSend",
        "HcclCommDestroy",
        "aclrtDestroyStream",
    ]
    sends = [arguments[:4] for name, arguments in made if name == "HcclSend"]
    assert sends == [(1000, 5, 0, RECEIVER), (2000, 6, 0, RECEIVER)]


def test_a_missing_or_old_nccl_is_an_error_that_the_engine_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    class Old:
        def __getattr__(self, name: str) -> Any:
            raise AttributeError(f"undefined symbol: {name}")

    importlib.import_module("torch")  # before its own libraries cannot be loaded
    for library in (missing, lambda name: Old()):
        monkeypatch.setattr(ctypes, "CDLL", library)
        with pytest.raises(OSError, match=r"libnccl\.so\.2"):
            Nccl()
