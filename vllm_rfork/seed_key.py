"""Identity of a worker's weights: the seed key, which users declare, and the fingerprint, which they cannot.

Equal seed keys mean "may be paired"; equal fingerprints mean "the bytes are interchangeable". The key's form is that
of legacy workers and pinned by tests. ``vllm_compat`` reads vLLM's configuration objects and passes text and numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Increased whenever a fact of the digest changes its meaning, so that old and new never agree by accident.
FINGERPRINT_VERSION = 3

#: ``kv_mode`` without a KV-transfer configuration.
KV_BOTH = "kv_both"


@dataclass(frozen=True)
class WorkerIdentity:
    """A worker's place in its instance; ranks count from 0.

    Attributes:
        kv_mode: ``kv_transfer_config.kv_role``, or ``kv_both``.
        node_rank: ``parallel_config.node_rank``.
        pp_rank: None without pipeline parallelism.
        ep_rank: None without expert parallelism, or for a model without experts.
        is_draft: the worker loads the draft model of speculative decoding.
        context_rank: rank in prefill context parallelism. The key does not contain it, the fingerprint does.
        local_rank: the worker's number on its node. The key does not contain it; it selects the seed service's port.
    """

    kv_mode: str
    node_rank: int
    tp_rank: int
    pp_rank: int | None = None
    ep_rank: int | None = None
    is_draft: bool = False
    local_rank: int = 0
    context_rank: int = 0


def build_seed_key(model_url: str, strategy: str, identity: WorkerIdentity, *, separator: str = "$") -> str:
    """The documented form: ``model_url$strategy$kv_mode$node_rank$[ppN$]tp_rank[$epN][$draft]``.

    ``model_url`` and ``strategy`` may be any text, as with legacy workers. ``messages.encode_text`` makes the key safe
    for a header.
    """
    return separator.join(seed_key_parts(model_url, strategy, identity).values())


def seed_key_parts(model_url: str, strategy: str, identity: WorkerIdentity) -> dict[str, str]:
    """The parts of the seed key by name, in the key's order; each is a fact of the fingerprint as well.

    The key alone is ambiguous if a part contains the separator: with ``-``, (``q-7b``, ``chat-prod``) and
    (``q-7b-chat``, ``prod``) have one key. The fingerprint tells such workers apart.
    """
    parts = {
        "model_url": model_url,
        "model_deploy_strategy_name": strategy,
        "kv_mode": identity.kv_mode,
        "node_rank": str(identity.node_rank),
    }
    if identity.pp_rank is not None:
        parts["pp_rank"] = f"pp{identity.pp_rank}"
    parts["tp_rank"] = str(identity.tp_rank)
    if identity.ep_rank is not None:
        parts["ep_rank"] = f"ep{identity.ep_rank}"
    if identity.is_draft:
        parts["role"] = "draft"
    return parts


def build_fingerprint(facts: Mapping[str, Any]) -> str:
    """Hexadecimal BLAKE2b-128 over the canonical JSON of ``facts``.

    Args:
        facts: everything that determines the bytes in memory: nested mappings, lists, text, numbers, booleans, None.
            The order of keys does not matter.

    Raises:
        TypeError: a value has no JSON form and so no canonical one.
    """
    canonical = json.dumps(
        {"fingerprint_version": FINGERPRINT_VERSION, "facts": facts},
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=True,
        allow_nan=False,
    )
    return hashlib.blake2b(canonical.encode("ascii"), digest_size=16).hexdigest()
