"""Lets vLLM copy this package's environment variables to the workers that Ray starts.

vLLM copies the variables whose names it knows from the driver to Ray's workers, and a user can name more in
``VLLM_RAY_EXTRA_ENV_VARS_TO_COPY`` (read in vLLM 0.17 to 0.32). Without them a worker on another node has neither
``MODEL_URL``, and never forks, nor ``RFORK_SEED_TLS=require``, and serves in plain text.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import MutableMapping

from vllm_rfork.config import ENVIRONMENT
from vllm_rfork.engines.nixl.peer import ALLOW_TCP

#: vLLM's option: names between commas, in addition to those that it copies anyway.
EXTRA = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"

#: They say where one machine stands; the driver's would be wrong on every other node.
OF_ONE_HOST = frozenset({"RFORK_LABELS"})

#: Read by workers, whatever the extra config says.
COPIED = tuple(sorted({*ENVIRONMENT.values(), ALLOW_TCP} - OF_ONE_HOST))


def copy_to_ray_workers(environ: MutableMapping[str, str] = os.environ) -> None:
    """Add this package's variables to those that vLLM copies, beside what the user has named. Idempotent."""
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
