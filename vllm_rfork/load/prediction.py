"""Key, fingerprint and facts of the first worker that ``vllm serve`` would start, for ``vllm-rfork explain``.

``python -m vllm_rfork.load.prediction ARGUMENTS`` prints a :class:`Prediction` as its last line. It runs in a process
of its own: vLLM's configuration changes process-wide state, and on an accelerator a context is created.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import msgspec

from vllm_rfork.config import parse_config
from vllm_rfork.devices.registry import device_backend
from vllm_rfork.errors import ConfigError
from vllm_rfork.load.context import layout_for, worker_facts
from vllm_rfork.manifest.facts import short_facts
from vllm_rfork.seed_key import build_fingerprint, build_seed_key
from vllm_rfork.vllm_compat import storage_loader
from vllm_rfork.vllm_compat.serve_arguments import with_configuration
from vllm_rfork.vllm_compat.worker_identity import first_identity

REFUSED = 3


class Prediction(msgspec.Struct):
    """The worker, and the planner's URL in its options."""

    key: str
    fingerprint: str
    facts: dict[str, str]
    planner: str


def predict(vllm_config: Any) -> Prediction:
    """Describe the first worker of an instance.

    Raises:
        ConfigError: an option is wrong, or one is missing without which a worker does not fork.
    """
    model_config = vllm_config.model_config
    settings = parse_config(vllm_config.load_config.model_loader_extra_config).settings
    if settings.missing:
        raise ConfigError(settings.missing[0], "is not set, so the worker loads from storage", "a value")
    device = device_backend(storage_loader.target_device(vllm_config)).with_index
    identity = first_identity(vllm_config, model_config)
    layout = layout_for(settings, device)
    facts = worker_facts(settings, vllm_config, model_config, device=device, identity=identity, layout=layout)
    named = (settings.model_url, settings.model_deploy_strategy_name, identity)
    return Prediction(
        build_seed_key(*named, separator=settings.rfork_seed_key_separator),
        build_fingerprint(facts),
        short_facts(facts),
        settings.rfork_scheduler_url,
    )


def _report(vllm_config: Any) -> NoReturn:
    try:
        _end(0, msgspec.json.encode(predict(vllm_config)).decode())
    except ConfigError as error:
        _end(REFUSED, str(error))


def _end(status: int, line: str) -> NoReturn:
    """Print ``line`` and end the process, in which vLLM has begun to start a server."""
    print(f"\n{line}", flush=True)
    os._exit(status)


if __name__ == "__main__":
    try:
        with_configuration(sys.argv[1:], "rfork", _report)
    except ConfigError as error:
        _end(REFUSED, str(error))
