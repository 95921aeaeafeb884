"""Facts of this machine that decide which engines and lanes work; no check, no advice.

Every method reads a few small files below ``root`` and raises OSError for one that cannot be read. Nothing native is
loaded here.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: Most bytes read of one file, and most entries of one folder.
_MAX_NBYTES, _MAX_ENTRIES = 64 * 1024, 1024
#: The inodes of the first namespaces of a kernel (``include/linux/proc_ns.h``); newer kernels fix that of net as well.
_FIRST = {"pid": 0xEFFFFFFC, "ipc": 0xEFFFFFFF}
_CAP_IPC_LOCK = 14
#: Files by which a container runtime marks its containers.
_MARKS = {".dockerenv": "docker", "run/.containerenv": "podman"}
#: Variables by which a user selects lanes.
_LANE_VARIABLES = re.compile(
    r"(?:UCX|NCCL|GLOO|HCCL|MC|TRANSFER_ENGINE|YR_TE|RFORK_NIXL|CUDA_VISIBLE|ASCEND_RT_VISIBLE)_[A-Z0-9_]+\Z"
)
_SECRET = re.compile(r"PASS|TOKEN|SECRET|KEY")
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF")
_CANN_VERSION_FILES = ("version.cfg", "version.info", "compiler/version.info", "runtime/version.info")
_CANN_VERSION = re.compile(r"(?im)^[a-z_]*version[a-z_]*\s*=\s*\[?(?:[^:\]\n]*:)?([0-9][\w.+-]*)")


@dataclass(frozen=True)
class DeviceFiles:
    """Device files of one kind, by name, and those of them that this process may not open."""

    names: list[str]
    closed: list[str]


@dataclass(frozen=True)
class RdmaPort:
    """A port of an RDMA device: its name (``mlx5_0/1``), and the kernel's words for its state and its link."""

    name: str
    state: str
    link: str

    @property
    def active(self) -> bool:
        """Return True if the port has a link."""
        return "ACTIVE" in self.state


@dataclass(frozen=True)
class Cann:
    """An installation of CANN; ``version`` is None if no version file is found."""

    home: str
    version: str | None


class Machine:
    """See the module's docstring; ``root`` and ``environ`` are replaced in tests."""

    def __init__(self, root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> None:
        self._root = root
        self._environ = environ

    def device_types(self) -> list[str]:
        """The torch device types of the devices that this container has; ``cpu`` first."""
        found = {"cuda": self.device_files("nvidia[0-9]*"), "npu": self.device_files("davinci[0-9]*")}
        return ["cpu", *(kind for kind, files in found.items() if files.names)]

    def device_files(self, pattern: str) -> DeviceFiles:
        """The files in ``/dev`` that match ``pattern``."""
        found = sorted(self._root.joinpath("dev").glob(pattern))[:_MAX_ENTRIES]
        names = [str(each.relative_to(self._root / "dev")) for each in found]
        closed = [name for name, path in zip(names, found, strict=True) if not os.access(path, os.R_OK | os.W_OK)]
        return DeviceFiles(names, closed)

    def rdma_ports(self) -> list[RdmaPort]:
        """The ports of all RDMA devices of the kernel, whether this container may open them or not."""
        found = sorted(self._root.joinpath("sys/class/infiniband").glob("*/ports/*"))[:_MAX_ENTRIES]
        return [
            RdmaPort(f"{port.parent.parent.name}/{port.name}", _text(port / "state"), _text(port / "link_layer"))
            for port in found
        ]

    def memlock_nbytes(self) -> int | None:
        """Bytes that this process may pin; None if there is no limit."""
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        return None if soft == resource.RLIM_INFINITY or self._has_capability(_CAP_IPC_LOCK) else soft

    def _has_capability(self, number: int) -> bool:
        found = re.search(r"^CapEff:\s*([0-9a-f]+)$", _text(self._root / "proc/self/status"), re.MULTILINE)
        return found is not None and bool(int(found[1], 16) >> number & 1)

    def namespaces(self) -> dict[str, str]:
        """The namespaces that decide about lanes: ``host's``, or their number."""
        found = {}
        for kind in ("pid", "ipc", "net"):
            inode = self._root.joinpath("proc/self/ns", kind).stat().st_ino
            found[kind] = "the host's" if inode == _FIRST.get(kind) else str(inode)
        return found

    def container(self) -> str | None:
        """The kind of container around this process; None if nothing marks one."""
        if "KUBERNETES_SERVICE_HOST" in self._environ:
            return "Kubernetes"
        for mark, kind in _MARKS.items():
            if self._root.joinpath(mark).exists():
                return kind
        return self._environ.get("container") or None

    def ptrace_scope(self) -> str | None:
        """``kernel.yama.ptrace_scope``; None on a kernel without Yama."""
        try:
            return _text(self._root / "proc/sys/kernel/yama/ptrace_scope")
        except FileNotFoundError:
            return None

    def nvidia_driver(self) -> str | None:
        """The version of the NVIDIA driver; None if it is not loaded."""
        try:
            found = re.search(r"Kernel Module\D*([0-9][0-9.]+)", _text(self._root / "proc/driver/nvidia/version"))
        except FileNotFoundError:
            return None
        return found[1] if found else "unknown"

    def cann(self) -> Cann | None:
        """The CANN whose ``set_env.sh`` was sourced; None if none was."""
        home = self._environ.get("ASCEND_TOOLKIT_HOME") or self._environ.get("ASCEND_HOME_PATH")
        if not home:
            return None
        for name in _CANN_VERSION_FILES:
            try:
                found = _CANN_VERSION.search(_text(Path(home, name)))
            except OSError:
                continue  # each release has some of these files
            if found:
                return Cann(home, found[1])
        return Cann(home, None)

    def expandable_segments(self) -> str | None:
        """The variable that turns torch's expandable segments on; None if none does."""
        for name in _ALLOCATOR_VARIABLES:
            settings = self._environ.get(name, "").replace(" ", "").lower().split(",")
            if "expandable_segments:true" in settings:
                return name
        return None

    def lane_variables(self) -> dict[str, str]:
        """The variables that are set and select lanes; those that may be secrets are left out."""
        return {
            name: value
            for name, value in sorted(self._environ.items())
            if _LANE_VARIABLES.match(name) and not _SECRET.search(name)
        }


def _text(path: Path) -> str:
    """The beginning of a small file, stripped."""
    with path.open("rb") as file:
        return file.read(_MAX_NBYTES).decode("utf-8", "replace").strip()
