"""The doctor's facts of machines that are not this one, and checks that fail or hang."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_rfork.cli import doctor_engines, doctor_machine
from vllm_rfork.cli.engine_probe import PLACES, Lane
from vllm_rfork.cli.findings import NOTE, OK, Check, Finding, find_all
from vllm_rfork.cli.machine import Cann, Machine

EVERY_CHECK: list[Callable[[Machine], Finding]] = [
    doctor_machine.nvidia,
    doctor_machine.ascend,
    doctor_machine.rdma,
    doctor_machine.memlock,
    doctor_machine.namespaces,
    doctor_machine.ptrace_scope,
    doctor_machine.allocator,
    doctor_machine.variables,
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine without devices, outside a container."""
    write(tmp_path, "proc/self/status", "Name:\tworker\nCapEff:\t0000000000000000\n")
    for kind in ("pid", "ipc", "net"):
        write(tmp_path, f"proc/self/ns/{kind}", "")
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def port(root: Path, name: str, state: str = "4: ACTIVE") -> None:
    write(root, f"sys/class/infiniband/{name}/ports/1/state", state + "\n")
    write(root, f"sys/class/infiniband/{name}/ports/1/link_layer", "InfiniBand\n")


def limit_memlock(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (nbytes, nbytes))


def test_a_machine_without_devices_has_nothing_to_advise(root: Path) -> None:
    machine = Machine(root, {})
    assert machine.device_types() == ["cpu"]
    assert [each(machine).advice for each in EVERY_CHECK] == [""] * len(EVERY_CHECK)
    assert {each(machine).state for each in EVERY_CHECK} == {OK}


def test_an_empty_root_is_a_finding_for_each_check_and_never_an_error(tmp_path: Path) -> None:
    found = find_all(doctor_machine.checks(Machine(tmp_path, {})))
    assert len(found) == len(EVERY_CHECK)
    assert all(each.found for each in found)


def test_gpus_and_a_driver(root: Path) -> None:
    write(root, "proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun\n")
    found = doctor_machine.nvidia(Machine(root, {}))
    assert (found.state, "580.65.06" in found.found) == (NOTE, True), "a container without the host's GPUs"
    assert "--gpus" in found.advice
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        write(root, f"dev/{name}", "")
    found = doctor_machine.nvidia(Machine(root, {}))
    assert (found.state, found.found) == (OK, "2 device files, driver 580.65.06")
    assert Machine(root, {}).device_types() == ["cpu", "cuda"]


def test_a_device_that_may_not_be_opened_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, "dev/nvidia0", "")
    write(root, "dev/nvidia1", "")
    monkeypatch.setattr("os.access", lambda path, _: not str(path).endswith("nvidia1"))
    found = doctor_machine.nvidia(Machine(root, {}))
    assert (found.state, "no access to /dev/nvidia1" in found.found) == (NOTE, True)


@pytest.mark.parametrize(
    ("file", "text", "version"),
    [
        ("version.cfg", "runtime_running_version=[8.2.RC1:8.2.RC1]\n", "8.2.RC1"),
        ("compiler/version.info", "Version=8.3.RC1\nversion_dir=8.3.RC1\n", "8.3.RC1"),
        ("version.info", "nothing of the kind", None),
        ("other", "", None),
    ],
)
def test_cann_and_its_version(file: str, text: str, version: str | None, root: Path) -> None:
    write(root, f"cann/{file}", text)
    environ = {"ASCEND_TOOLKIT_HOME": str(root / "cann")}
    assert Machine(root, environ).cann() == Cann(str(root / "cann"), version)
    write(root, "dev/davinci0", "")
    write(root, "dev/davinci_manager", "")
    assert doctor_machine.ascend(Machine(root, environ)).found.startswith("1 device file; CANN ")
    without = doctor_machine.ascend(Machine(root, {}))
    assert (without.state, "set_env.sh" in without.advice) == (NOTE, True)
    assert Machine(root, {}).device_types() == ["cpu", "npu"]


def test_rdma_needs_device_files_and_an_active_port(root: Path) -> None:
    port(root, "mlx5_0", "1: DOWN")
    found = doctor_machine.rdma(Machine(root, {}))
    assert (found.state, "/dev/infiniband" in found.advice) == (NOTE, True)
    write(root, "dev/infiniband/uverbs0", "")
    found = doctor_machine.rdma(Machine(root, {}))
    assert (found.state, "no port is active" in found.found) == (NOTE, True)
    port(root, "mlx5_1")
    found = doctor_machine.rdma(Machine(root, {}))
    assert found.state == OK
    assert found.found == "mlx5_0/1 InfiniBand DOWN, mlx5_1/1 InfiniBand ACTIVE; 1 device file"


def test_locked_memory_matters_where_rdma_is(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memlock(monkeypatch, 8 << 20)
    assert doctor_machine.memlock(Machine(root, {})).state == OK
    port(root, "mlx5_0")
    found = doctor_machine.memlock(Machine(root, {}))
    assert (found.state, found.found) == (NOTE, "8 MiB may be locked")
    assert "memlock" in found.advice
    write(root, "proc/self/status", f"CapEff:\t{1 << 14:016x}\n")
    assert doctor_machine.memlock(Machine(root, {})).found == "unlimited", "CAP_IPC_LOCK"


@pytest.mark.parametrize("scope", ["1", "2", "3"])
def test_a_ptrace_scope_that_forbids_attaching_is_noted(scope: str, root: Path) -> None:
    write(root, "proc/sys/kernel/yama/ptrace_scope", f"{scope}\n")
    found = doctor_machine.ptrace_scope(Machine(root, {}))
    assert (found.state, scope in found.found) == (NOTE, True)


@pytest.mark.parametrize(
    ("mark", "environ", "kind"),
    [
        (".dockerenv", {}, "docker"),
        ("run/.containerenv", {}, "podman"),
        ("none", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "Kubernetes"),
        ("none", {"container": "lxc"}, "lxc"),
    ],
)
def test_a_container_is_recognized(mark: str, environ: dict[str, str], kind: str, root: Path) -> None:
    write(root, mark, "")
    found = doctor_machine.namespaces(Machine(root, environ)).found
    assert f"in a container ({kind})" in found
    assert "pid " in found
    assert "net " in found


def test_expandable_segments_matter_where_a_gpu_is(root: Path) -> None:
    environ = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64, expandable_segments:True"}
    assert doctor_machine.allocator(Machine(root, environ)).state == OK
    write(root, "dev/nvidia0", "")
    found = doctor_machine.allocator(Machine(root, environ))
    assert (found.state, "PYTORCH_CUDA_ALLOC_CONF" in found.advice) == (NOTE, True)
    assert "sleep mode" in found.advice
    off = {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}
    assert doctor_machine.allocator(Machine(root, off)).found == "no expandable segments"


def test_variables_that_select_lanes_are_shown_and_secrets_are_not(root: Path) -> None:
    environ = {"UCX_TLS": "tcp", "MC_REDIS_PASSWORD": "hidden", "RFORK_TOKEN": "hidden", "NCCL_P2P_DISABLE": "1\x1b[2J"}
    found = doctor_machine.variables(Machine(root, environ)).found
    assert "UCX_TLS=tcp" in found
    assert "NCCL_P2P_DISABLE=1" in found
    assert "hidden" not in found
    assert "\x1b" not in found


def test_a_check_that_hangs_or_raises_is_a_finding_and_delays_no_other() -> None:
    never = threading.Event()

    def hang() -> Finding:
        never.wait(60)
        return Finding("late", OK, "")

    def fail() -> Finding:
        raise RuntimeError("an odd\nmachine")

    began = time.monotonic()
    found = find_all(
        [Check("hangs", hang, 0.2), Check("fails", fail), Check("works", lambda: Finding("works", OK, "here"))]
    )
    never.set()
    assert time.monotonic() - began < 20
    assert [(each.check, each.state) for each in found] == [("hangs", NOTE), ("fails", NOTE), ("works", OK)]
    assert "0.2 s" in found[0].found
    assert found[1].found == "cannot be found out: RuntimeError: an odd\\nmachine"


# --- lanes ----------------------------------------------------------------------------------------------------------

NIXL = [
    Lane("nixl", "cpu", "container", "nixl/cma"),
    Lane("nixl", "cpu", "host", reason="another pid namespace"),
    Lane("nixl", "cpu", "elsewhere", "nixl/rdma"),
]


def test_the_lanes_follow_the_order_of_auto_with_the_reasons_against_the_others() -> None:
    third = [Lane("collective", "cpu", place, "collective/tcp") for place in PLACES]
    found = doctor_engines.lanes(
        {"collective": third, "nixl": NIXL, "mooncake": []}, ["cpu"], attach=True, expandable=True
    )
    assert [(each.state, each.found) for each in found] == [
        (OK, "nixl/cma, then collective/tcp"),
        (OK, "collective/tcp"),
        (OK, "nixl/rdma, then collective/tcp"),
        (NOTE, "not possible: another pid namespace"),
    ]
    assert found[-1].check == "lane cpu, peer in another container of this host: nixl"


def test_a_place_without_a_lane_is_noted() -> None:
    found = doctor_engines.lanes({"nixl": NIXL}, ["cpu"], attach=False, expandable=False)
    assert [each.state for each in found] == [NOTE, NOTE, OK, NOTE, NOTE]
    assert "load from storage" in found[0].found
    assert found[3].found == "not possible: see cross-memory attach"


def test_expandable_segments_block_every_lane_of_a_gpu() -> None:
    both = {
        "cuda_ipc": [Lane("cuda_ipc", "cuda", "host", "cuda_ipc")],
        "collective": [Lane("collective", "cuda", "host", "collective/nccl")],
    }
    for expandable, used in ((False, "cuda_ipc, then collective/nccl"), (True, "none: workers load from storage")):
        found = doctor_engines.lanes(both, ["cuda"], attach=True, expandable=expandable)
        assert found[1].found == used
    assert (
        found[-1].found == "not possible: workers neither fork nor become seeds with expandable segments, see allocator"
    )
