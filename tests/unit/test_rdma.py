"""An RDMA device counts if this process can use it, not if the host has it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vllm_rfork.engines import rdma
from vllm_rfork.engines.nixl.peer import this_process


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with one device of two ports, one of them active, and a container that was given its file."""
    monkeypatch.setattr(rdma, "DEVICES", tmp_path / "sys")
    monkeypatch.setattr(rdma, "FILES", tmp_path / "dev")
    for number, state in ((1, "1: DOWN\n"), (2, "4: ACTIVE\n")):
        port = tmp_path / "sys" / "mlx5_0" / "ports" / str(number)
        port.mkdir(parents=True)
        (port / "state").write_text(state)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "uverbs0").touch()
    return tmp_path


def test_a_usable_device_is_in_the_endpoint() -> None:
    assert rdma.rdma_obstacle() is None
    assert this_process("cpu", allow_tcp=False).rdma


def test_a_host_without_devices(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rdma, "DEVICES", host / "nowhere")
    assert rdma.rdma_obstacle() == "there is no RDMA device"


def test_a_container_that_only_sees_the_hosts_list(host: Path) -> None:
    (host / "dev" / "uverbs0").rename(host / "dev" / "rdma_cm")
    assert "not in this container" in str(rdma.rdma_obstacle())
    assert not this_process("cpu", allow_tcp=False).rdma


def test_a_file_that_may_not_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "may not open" in str(rdma.rdma_obstacle())


def test_a_device_without_an_active_port(host: Path) -> None:
    (host / "sys" / "mlx5_0" / "ports" / "2" / "state").write_text("2: INIT\n")
    assert rdma.rdma_obstacle() == "no RDMA port is active"


def test_ports_whose_state_is_unknown_count_as_active(host: Path) -> None:
    (host / "sys" / "mlx5_0" / "ports" / "2" / "state").unlink()
    (host / "sys" / "mlx5_0" / "ports" / "2" / "state").mkdir()
    assert rdma.rdma_obstacle() is None
