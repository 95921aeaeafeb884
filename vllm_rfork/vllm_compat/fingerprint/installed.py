"""Installed packages and plugins, as plain data for the fingerprint.

Nothing is imported: importing a kernel library may initialize a device.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from importlib import metadata

from vllm_rfork.vllm_compat.fingerprint import packages

#: Entry points of these groups run inside workers and may change how models are built or processed.
PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.platform_plugins")

#: Where FlashInfer looks for a CUDA toolkit by default.
DEFAULT_CUDA_HOME = "/usr/local/cuda"


@functools.cache
def version_of(distribution: str) -> str | None:
    """The version of ``distribution``, or None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def modules(names: Iterable[str]) -> dict[str, list[str]]:
    """The modules in ``names`` that exist, with their distributions as ``name==version``.

    A module without a distribution (a folder on the path) counts as well, because vLLM finds it, too.
    """
    return {name: list(brought_by) for name in names if (brought_by := _module(name)) is not None}


@functools.cache
def _module(name: str) -> tuple[str, ...] | None:
    try:
        found = importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # ValueError: in sys.modules without a specification
        found = False
    if not found:
        return None
    versions = {dist: version_of(dist) for dist in packages.DISTRIBUTIONS.get(name, (name,))}
    if not any(versions.values()):
        versions = {dist: version_of(dist) for dist in _distributions_with(name)}
    return tuple(sorted(f"{dist}=={version}" for dist, version in versions.items() if version is not None))


@functools.cache
def _distributions_with(name: str) -> tuple[str, ...]:
    """The distributions that contain the top-level module ``name``.

    The same as ``metadata.packages_distributions()[name]``, which also parses every record and, from Python 3.12 on,
    looks for every file: a second of processor time where many packages are installed. vLLM on CUDA makes modules that
    are in no distribution, so it is asked in every load there.
    """
    found = (dist.metadata["Name"] for dist in metadata.distributions() if _contains(dist, name))
    return tuple(dict.fromkeys(found))


def _contains(distribution: metadata.Distribution, name: str) -> bool:
    if declared := (distribution.read_text("top_level.txt") or "").split():
        return name in declared
    files = _files(distribution)
    if f"\n{name}/" in files:
        return True
    alone = re.findall(rf'\n({re.escape(name)}\.[^/,"\r\n]+)', files) if f"\n{name}." in files else []
    return any(inspect.getmodulename(file) == name for file in alone)


def _files(distribution: metadata.Distribution) -> str:
    """The paths of a distribution's files from the folder of modules, each behind a line break."""
    if installed := distribution.read_text("installed-files.txt"):  # an egg's, from its folder of metadata
        return f"\n{installed}".replace("\n../", "\n")
    listed = distribution.read_text("RECORD") or distribution.read_text("SOURCES.txt") or ""
    return f"\n{listed}".replace('\n"', "\n").replace("\n./", "\n")


def read_ahead() -> None:
    """Read the records of what is installed, for a description that follows: a tenth of a second, or a few.

    Which modules exist is not remembered, because that changes until the load: some are made by imports.
    """
    _entry_points()
    for name in (*packages.BOTH_LAYOUTS, *packages.RUNTIME_ONLY):
        _module.__wrapped__(name)


def toolkit_tools(environ: Mapping[str, str]) -> dict[str, bool]:
    """Which of the tools exist that FlashInfer needs to compile kernels.

    Without them, and without precompiled kernels, vLLM does not use FlashInfer.
    """
    path = environ.get("PATH")
    nvcc = shutil.which("nvcc", path=path)
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    if not home:
        home = os.path.dirname(os.path.dirname(nvcc)) if nvcc else DEFAULT_CUDA_HOME
    return {
        "nvcc": shutil.which(os.path.join(home, "bin", "nvcc")) is not None,
        "ninja": shutil.which("ninja", path=path) is not None,
    }


def plugins(environ: Mapping[str, str]) -> dict[str, list[str]]:
    """Distribution and version → names of its plugins that vLLM loads into workers.

    ``VLLM_PLUGINS`` selects those that are loaded; all are if it is not set. This package is not among them, because it
    counts separately, nor are vLLM's own plugins (LoRA resolvers), which shape no weights.
    """
    allowed = environ["VLLM_PLUGINS"].split(",") if "VLLM_PLUGINS" in environ else None
    loaded: dict[str, list[str]] = {}
    for brought_by, name in _entry_points():
        if allowed is None or name in allowed:
            loaded.setdefault(brought_by, []).append(name)
    return loaded


@functools.cache
def _entry_points() -> tuple[tuple[str, str], ...]:
    points = [point for group in PLUGIN_GROUPS for point in metadata.entry_points(group=group)]
    found = {
        (f"{point.dist.name}=={point.dist.version}" if point.dist is not None else str(point.value), point.name)
        for point in points
        if (point.dist is None or point.dist.name != "vllm-rfork") and not is_vllms(point.value)
    }
    return tuple(sorted(found))


def is_vllms(value: str) -> bool:
    """True if an entry point (``module:attribute``) is part of vLLM, whose distribution has several names."""
    return value.partition(":")[0].split(".")[0] == "vllm"
