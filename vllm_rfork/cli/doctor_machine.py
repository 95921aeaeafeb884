"""The doctor's checks of the machine: devices, RDMA, limits, namespaces, allocator, CANN; each returns a Finding."""

from __future__ import annotations

from vllm_rfork.cli.findings import NOTE, OK, Check, Finding
from vllm_rfork.cli.machine import Machine
from vllm_rfork.logs.quoting import counted, printable

_SHOWN = 8
_MIB = 1 << 20


def checks(machine: Machine) -> list[Check]:
    """All checks of the machine, in the order of the report."""
    return [
        Check("NVIDIA GPUs", lambda: nvidia(machine)),
        Check("Ascend NPUs", lambda: ascend(machine)),
        Check("RDMA", lambda: rdma(machine)),
        Check("memlock", lambda: memlock(machine)),
        Check("namespaces", lambda: namespaces(machine)),
        Check("ptrace scope", lambda: ptrace_scope(machine)),
        Check("allocator", lambda: allocator(machine)),
        Check("variables", lambda: variables(machine)),
    ]


def nvidia(machine: Machine) -> Finding:
    """Device files of NVIDIA GPUs, and the driver."""
    check, files, driver = "NVIDIA GPUs", machine.device_files("nvidia[0-9]*"), machine.nvidia_driver()
    if not files.names and driver is None:
        return Finding(check, OK, "none")
    if not files.names:
        advice = "if workers here use GPUs: start the container with --gpus, or ask for nvidia.com/gpu in Kubernetes"
        return Finding(check, NOTE, f"driver {driver}, but no /dev/nvidia* in this container", advice)
    found = f"{counted(len(files.names), 'device file')}, driver {driver or 'unknown'}"
    return _closed(check, files.closed, found, "a seed's GPU must be open to the receiver's container for cuda_ipc")


def ascend(machine: Machine) -> Finding:
    """Device files of Ascend NPUs, and CANN."""
    check, files, cann = "Ascend NPUs", machine.device_files("davinci[0-9]*"), machine.cann()
    version = "CANN is not set up" if cann is None else f"CANN {cann.version or 'of unknown version'} in {cann.home}"
    if not files.names:
        return Finding(check, OK, "none" if cann is None else f"none; {printable(version)}")
    found = f"{counted(len(files.names), 'device file')}; {printable(version)}"
    if cann is None:
        return Finding(check, NOTE, found, "source CANN's set_env.sh before the start of a worker")
    return _closed(check, files.closed, found, "give the container the devices, and the user their group")


def rdma(machine: Machine) -> Finding:
    """RDMA ports of the kernel, and the device files by which a container uses them."""
    check, ports, files = "RDMA", machine.rdma_ports(), machine.device_files("infiniband/uverbs*")
    if not ports:
        return Finding(check, OK, "none; between hosts, only TCP is left")
    shown = ", ".join(
        f"{port.name} {port.link} {port.state.partition(': ')[2] or port.state}" for port in ports[:_SHOWN]
    )
    found = printable(shown + (f" and {len(ports) - _SHOWN} more" if len(ports) > _SHOWN else ""), 400)
    if not files.names:
        advice = "give the container /dev/infiniband (docker: --device /dev/infiniband; Kubernetes: a device plugin)"
        return Finding(check, NOTE, f"{found}; no /dev/infiniband/uverbs* in this container", advice)
    if not any(port.active for port in ports):
        return Finding(check, NOTE, f"{found}; no port is active", "check cables, switch and subnet manager")
    found += f"; {counted(len(files.names), 'device file')}"
    return _closed(check, files.closed, found, "the worker's user needs read and write access")


def _closed(check: str, closed: list[str], found: str, advice: str) -> Finding:
    """A note if this process may not open some of the device files."""
    if not closed:
        return Finding(check, OK, found)
    return Finding(check, NOTE, f"{found}; no access to /dev/{', /dev/'.join(closed[:_SHOWN])}", advice)


def memlock(machine: Machine) -> Finding:
    """Bytes that this process may pin, as RDMA registrations do."""
    limit = machine.memlock_nbytes()
    if limit is None:
        return Finding("memlock", OK, "unlimited")
    found = f"{limit / _MIB:.0f} MiB may be locked"
    if not machine.rdma_ports():
        return Finding("memlock", OK, f"{found}; RDMA alone would need more")
    advice = "RDMA locks all weights in memory: ulimit -l unlimited (docker: --ulimit memlock=-1), or CAP_IPC_LOCK"
    return Finding("memlock", NOTE, found, advice)


def namespaces(machine: Machine) -> Finding:
    """The namespaces that this process shares with its peers, and the container around it."""
    kinds = ", ".join(f"{kind} {which}" for kind, which in machine.namespaces().items())
    container = machine.container()
    where = "no sign of a container" if container is None else f"in a container ({printable(container, 40)})"
    return Finding("namespaces", OK, f"{where}; {kinds}")


def ptrace_scope(machine: Machine) -> Finding:
    """The kernel's setting that can forbid one process to read another's memory."""
    scope = machine.ptrace_scope()
    if scope in (None, "0"):
        return Finding("ptrace scope", OK, "not restricted" if scope is None else "0: not restricted")
    advice = "see cross-memory attach; sysctl kernel.yama.ptrace_scope=0, or CAP_SYS_PTRACE for the workers"
    return Finding("ptrace scope", NOTE, f"kernel.yama.ptrace_scope is {printable(scope, 20)}", advice)


def allocator(machine: Machine) -> Finding:
    """Settings of torch's allocator under which no engine can keep CUDA memory registered."""
    variable = machine.expandable_segments()
    if variable is None:
        return Finding("allocator", OK, "no expandable segments")
    advice = f"remove expandable_segments:True from {variable} to fork; sleep mode has the same effect"
    state = NOTE if "cuda" in machine.device_types() else OK
    return Finding("allocator", state, f"{variable} turns expandable segments on", advice if state == NOTE else "")


def variables(machine: Machine) -> Finding:
    """The variables by which the user selects lanes."""
    found = machine.lane_variables()
    shown = ", ".join(f"{name}={printable(value, 60)}" for name, value in list(found.items())[: 2 * _SHOWN])
    return Finding("variables", OK, shown or "none is set")
