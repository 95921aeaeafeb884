"""Facts about this host that compiled code depends on beside vLLM's key: device, processor, toolchain, packages.

vLLM leaves most of them out of its key, because the folder that it names does not leave the host.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from vllm_rfork.vllm_compat.fingerprint import installed, packages

#: Instruction sets among the flags of an x86 processor: Inductor compiles with ``-march=native``. The others differ
#: between a host and its virtual machines and shape no code.
_INSTRUCTIONS = re.compile(
    r"abm|adx|aes|amx_|avx|bmi|clwb|cmov|cx16|f16c|fma|gfni|lahf|lzcnt|movbe|movdir|mmx|pclmul|popcnt|rdpid|rdrand|rdseed"
    r"|serialize|sha|sse|ssse3|vaes|vpclmul|xsave|3dnow|tbm|xop|fsgsbase|prefetchw|ptwrite|wbnoinvd|cldemote|waitpkg"
)
#: Time in seconds that a compiler has to state its version.
_VERSION_TIMEOUT_S = 5.0
#: Modules whose code is traced, or contains kernels that compiled code calls.
PACKAGES = ("vllm_ascend", *packages.BOTH_LAYOUTS, *packages.RUNTIME_ONLY)
_ABSENT = "not there"


@functools.cache
def device_facts(device: torch.device) -> dict[str, str]:
    """The facts of this process for code on ``device``, as fact → short text. None is a secret or a path.

    Raises:
        RuntimeError: the device cannot be described.
    """
    toolkits = ((name, getattr(torch.version, name, None)) for name in ("cuda", "hip", "cann"))
    facts = {
        "python": str(sys.implementation.cache_tag),
        "machine": platform.machine(),
        # A library that was linked on a host with a newer one cannot be loaded.
        "libc": " ".join(platform.libc_ver()),
        "torch": f"{torch.__version__} {torch.version.git_version or ''}".rstrip(),
        "toolkit": next((f"{name} {version}" for name, version in toolkits if version), "none"),
        "device": device.type,
        "cpu": f"{torch.backends.cpu.get_cpu_capability()} {_instructions()}",
        "compiler": _compiler(),
    }
    if device.type == "cuda":
        facts["capability"] = ".".join(str(part) for part in torch.cuda.get_device_capability(device))
    backend = getattr(torch, device.type, None)
    if backend is not None and hasattr(backend, "get_device_name"):
        facts["device_name"] = str(backend.get_device_name(device))
    return facts


def execution_facts(device: torch.device) -> dict[str, str]:
    """The facts of this process that Inductor writes into code for ``device``: the index, or the number of threads.

    Generated code contains ``cuda:1`` or ``num_threads(8)``, by which reductions are split; vLLM's key has neither. Not
    cached: vLLM sets both while it starts.

    Raises:
        RuntimeError: the device cannot be described.
    """
    if device.type == "cpu":
        return {"threads": str(torch.get_num_threads())}
    return {"device_index": str(torch.accelerator.current_device_index() if device.index is None else device.index)}


def package_facts(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The versions of installed packages that contain or generate kernels, as fact → short text."""
    return {f"package.{name}": " ".join(versions)[:200] for name, versions in installed.modules(names).items()}


def _instructions() -> str:
    """A digest of the instruction sets of the first processor, as Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return _ABSENT
    listed = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    flags = sorted(flag for flag in listed.partition(":")[2].split() if _counts(listed, flag))
    return hashlib.sha256(" ".join(flags).encode()).hexdigest()[:16]


def _counts(listed: str, flag: str) -> bool:
    return listed.startswith("Features") or _INSTRUCTIONS.match(flag) is not None  # Arm lists instruction sets only


def _compiler() -> str:
    """The first line of the C++ compiler's version, as Inductor chooses it."""
    command = [os.environ.get("CXX", "g++"), "--version"]
    try:
        # The operator's own choice of a compiler, which Inductor runs as well.
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return _ABSENT
    return (done.stdout.splitlines() or [_ABSENT])[0][:200]
