"""Copies this package's environment variables to the workers that Ray starts.

vLLM copies a list of variables from the driver to Ray's workers, and ``VLLM_RAY_EXTRA_ENV_VARS_TO_COPY`` adds to it
(read in vLLM 0.17 to 0.32). Otherwise a worker on another node lacks ``MODEL_URL``, and never forks, and
``RFORK_SEED_TLS=require``, and serves in plain text.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import MutableMapping

from vllm_rfork.config import ENVIRONMENT
from vllm_rfork.engines.nixl.peer import ALLOW_TCP
from vllm_rfork.metrics.front_end import OWN_DIRECTORY

#: vLLM's option: more names, separated by commas.
EXTRA = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"

#: They describe one machine; the driver's values would be wrong on every other node.
OF_ONE_HOST = frozenset({"RFORK_LABELS"})

#: The variables that workers read. On another host than the driver's there is no directory for metrics, and none is
#: written.
COPIED = tuple(sorted({*ENVIRONMENT.values(), ALLOW_TCP, OWN_DIRECTORY} - OF_ONE_HOST))


def copy_to_ray_workers(environ: MutableMapping[str, str] = os.environ) -> None:
    """Add this package's variables to those that vLLM copies and the user has named. Idempotent."""
    named = [name.strip() for name in environ.get(EXTRA, "").split(",") if name.strip()]
    environ[EXTRA] = ",".join([*named, *(name for name in COPIED if name not in named)])
    try:
        ray_env = importlib.import_module("vllm.ray.ray_env")
    except ImportError:
        return
    # The newer of vLLM's two executors for Ray copies everything that is not in this set.
    not_copied = getattr(ray_env, "RAY_NON_CARRY_OVER_ENV_VARS", None)
    if isinstance(not_copied, set):
        not_copied.update(OF_ONE_HOST)
