"""The directory of each kind of cache, as the operator configured it. A seed's files are staged there."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root(kind: str) -> Path:
    """The root of the caches of ``kind``; see ``caches.manifest.LEVELS``.

    A user without a home directory has the one that Triton and vLLM use then: ``~``, in the working directory.
    """
    if kind == "triton":
        home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
        return Path(os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache"))
    from vllm import envs

    return Path(envs.VLLM_CACHE_ROOT)
