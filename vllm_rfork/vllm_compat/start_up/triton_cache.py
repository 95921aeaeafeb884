"""Hook on Triton's cache of kernels: the keys that this process uses, and the installation of a seed's kernels.

A key is a hash of the kernel's source, Triton's own source, the target and the options, so kernels of a seed may be
installed at any time: Triton finds those that it asks for. ``FileCacheManager`` is constructed for each lookup. Read in
Triton 3.6 and 3.9.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_rfork.caches.bounds import MAX_FILES
from vllm_rfork.caches.paths import Parts
from vllm_rfork.caches.rewriting import triton_group
from vllm_rfork.vllm_compat.start_up.device_facts import device_facts, package_facts
from vllm_rfork.vllm_compat.start_up.guard import guarded
from vllm_rfork.vllm_compat.start_up.listener import CacheListener, CachePlace, listener
from vllm_rfork.vllm_compat.start_up.roots import cache_root

_WHAT = "Triton's cache"
_MARK = "_rfork_carries_caches"
_MODULE = "triton.runtime.cache"
#: The folder of one kernel: a SHA-256 in base 32 (``_base32``).
_FOLDER = re.compile(r"[A-Z2-7]{52}\Z")


class _Kernels:
    """The kernels of this process.

    Args:
        root: Triton's directory at the time of the hook. Inductor changes the variable later, to a directory that is
            part of its own cache.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._keys: set[str] = set()
        self._place: CachePlace | None = None
        # A process may start more than once, each time with another listener.
        self._asked: CacheListener | None = None
        self._reported: CacheListener | None = None
        self._lock = threading.Lock()

    def about_to_look(self) -> None:
        """Install the seed's kernels once they have arrived; another thread that does so is not waited for."""
        present = listener()
        if self._asked is present or not self._lock.acquire(blocking=False):
            return
        try:
            self._asked = present  # also after an error, which would be the same for the next kernel
            if not present.about_to_read(self._described()):
                self._asked = None
        finally:
            self._lock.release()

    def looked(self, manager: Any) -> None:
        """Take note of the key of a lookup in this directory."""
        directory = Path(manager.cache_dir)
        if directory.parent == self._root and _FOLDER.match(directory.name) and len(self._keys) < MAX_FILES:
            self._keys.add(directory.name)
            self.report()

    def report(self) -> None:
        """Report the kernels to the present listener, once: a later start of this process uses those of the first."""
        present = listener()
        if self._keys and self._reported is not present:
            self._reported = present
            present.produced(self._described(), None)

    def _described(self) -> CachePlace:
        if self._place is None:
            accelerator = torch.accelerator.current_accelerator() or torch.device("cpu")
            identity = {**device_facts(accelerator), **package_facts(("triton",))}
            self._place = CachePlace(
                "triton",
                "kernels",
                identity,
                self._root,
                (),
                rewrite={"__grp__*.json": triton_group},
                only=self._is_used,
                accepts=_is_file_of_kernel,
            )
        return self._place

    def _is_used(self, parts: Parts) -> bool:
        return parts[0] in self._keys and len(parts) <= 2


def _is_file_of_kernel(parts: Parts) -> bool:
    """Return True for a file directly in a kernel's folder: other caches may share Triton's root."""
    return len(parts) == 2 and _FOLDER.match(parts[0]) is not None


def install() -> None:
    """Install the hook, with the directory that Triton uses now. Idempotent.

    Raises:
        ImportError: vLLM has not imported Triton, or it has no such module.
        AttributeError: or no such class.
    """
    if "triton" not in sys.modules:
        raise ImportError("Triton is not imported")
    manager = importlib.import_module(_MODULE).FileCacheManager
    original = manager.__init__
    kernels: _Kernels | None = getattr(original, _MARK, None)
    if kernels is None:
        manager.__init__ = _carrying(original, _Kernels(cache_root("triton")))
    else:
        kernels.report()


def _carrying(original: Callable[..., None], kernels: _Kernels) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        with guarded(_WHAT):
            kernels.about_to_look()
        original(self, *args, **kwargs)
        with guarded(_WHAT):
            kernels.looked(self)

    setattr(__init__, _MARK, kernels)
    return __init__
