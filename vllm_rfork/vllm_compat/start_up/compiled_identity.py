"""The identity of compiled code: vLLM's key without places, Inductor's settings, and facts about this host.

It is taken where vLLM is about to load a compiled forward, because the configuration changes until then. The graphs of
the same forward are compiled or loaded later, with settings that vLLM changes for that time, so they use it as well.
"""

from __future__ import annotations

import re
from typing import Any

from vllm_rfork.caches.bounds import MAX_FACT_VALUE
from vllm_rfork.vllm_compat.key_factors import inductor_factors, key_factors, short_digest
from vllm_rfork.vllm_compat.start_up.device_facts import device_facts, execution_facts, package_facts
from vllm_rfork.vllm_compat.start_up.listener import listener
from vllm_rfork.vllm_compat.storage_loader import target_device

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.:-]")


class _Latest:
    identity: dict[str, str] | None = None


def take_identity(vllm_config: Any, function: str | None = None) -> dict[str, str]:
    """The identity at this moment; remembered for :func:`latest_identity`. The listener gets the texts behind it.

    Args:
        function: the forward's :func:`function_text`; None where no forward is looked for.

    Raises:
        Exception: whatever vLLM or torch raise; nothing is remembered then.
    """
    _Latest.identity = None
    factors = key_factors(vllm_config)
    listener().explain(factors.details)
    inductor = short_digest("\n".join(inductor_factors()))
    device = target_device(vllm_config)
    facts = {**device_facts(device), **execution_facts(device), **package_facts(), "inductor": inductor}
    if function is not None:
        facts["code.forward"] = function[-MAX_FACT_VALUE:]
    _Latest.identity = {**factors.identity, **facts}
    return _Latest.identity


def latest_identity() -> dict[str, str] | None:
    """The identity of the forward that vLLM has looked for last in this process; None before the first one."""
    return _Latest.identity


def function_text(forward: Any) -> str:
    """The module, name and first line of a method: what tells a model's forward from its draft's.

    Both may be called ``LlamaModel.forward`` and have one configuration. vLLM tells them apart by the line as well
    (``_model_hash_key``, read in vLLM 0.26 and 0.32).
    """
    return f"{forward.__module__}:{forward.__qualname__}:{forward.__code__.co_firstlineno}"


def artifact_name(*parts: str) -> str:
    """A name that the list of artifacts accepts, of the rank's folder, the component and its function."""
    return _NOT_IN_NAMES.sub("_", ":".join(parts))[:160]
