"""The factors of vLLM's key for compiled code, without those that only say where files are.

vLLM names the folder of compiled code by a hash over its configuration, the path of the model included. Workers whose
models lie under other paths could use the same code, so caches are matched by these factors and then installed under
the name that the receiver's vLLM has computed. vLLM itself says what counts: its own ``compute_hash`` runs, with the
one function that hashes a mapping replaced by one that leaves such entries out and takes note of the others. Read in
vLLM 0.26 and 0.32 (``config/utils.py``, ``compilation/caching.py``).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vllm_rfork.manifest.facts import short_facts

#: Fields of the model's section: where weights and remote code come from. vLLM compares the source of all traced files.
WHERE = frozenset({"model", "model_weights", "revision", "code_revision"})
#: Entries of a Hugging Face configuration of the same kind, and the version that wrote the file.
WHERE_IN_FILE = frozenset({"_name_or_path", "name_or_path", "_commit_hash", "transformers_version"})
#: Variables that vLLM hashes although they differ from host to host, or are secrets; 0.32 leaves some of them out.
LOCAL_VARIABLES = (
    *("*_API_KEY", "*SECRET*", "*PASSWORD*", "*_TOKEN"),
    *("*_HOST", "*_HOSTNAME", "*_IP", "*_IPS", "*_PORT", "VLLM_PROCESS_NAME_PREFIX", "VLLM_DIST_IDENT"),
    *("VLLM_XLA_CACHE_PATH", "VLLM_CONFIG_ROOT", "VLLM_LORA_RESOLVER_CACHE_DIR", "FORCE_COLOR"),
)

#: The replaced function belongs to the whole process.
_LOCK = threading.Lock()


@dataclass(frozen=True)
class KeyFactors:
    """The factors of one worker.

    Attributes:
        identity: must be equal on both sides: section → digest.
        details: the same as short texts, for the log: ``model_config.dtype`` → ``bfloat16``.
    """

    identity: dict[str, str]
    details: dict[str, str]


def key_factors(vllm_config: Any) -> KeyFactors:
    """The factors of ``vllm_config`` and of the environment, at this moment: the configuration changes during a start.

    Raises:
        Exception: whatever vLLM raises when it computes its key.
    """
    import vllm
    from vllm import envs

    found: dict[str, Any] = {"vllm": str(vllm.__version__)}
    with _recorded() as records:
        # The whole as vLLM composes it, so that nothing is forgotten that belongs to no section.
        found["config"] = str(vllm_config.compute_hash())
        for field in dataclasses.fields(vllm_config):
            compute_hash = getattr(getattr(vllm_config, field.name, None), "compute_hash", None)
            if callable(compute_hash):
                records.clear()
                digest = compute_hash()
                # A section that hashes in another way is one factor.
                found[field.name] = next((kept for key, kept in reversed(records) if key == digest), str(digest))
    found["environment"] = _variables(envs.compile_factors())
    # vLLM adds these only where an artifact contains everything.
    found["inductor"] = inductor_factors() if getattr(envs, "VLLM_USE_MEGA_AOT_ARTIFACT", False) else []
    named = {name: value for name, value in found.items() if name != "config"}  # the sections say it in detail
    return KeyFactors({name: short_digest(value) for name, value in found.items()}, short_facts(named))


@contextmanager
def _recorded() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Replace vLLM's function that hashes a mapping; yields what it has been called with, and its results."""
    from vllm.config import utils

    records: list[tuple[str, dict[str, Any]]] = []
    with _LOCK:
        original = utils.hash_factors

        def hash_factors(items: dict[str, Any]) -> str:
            kept = _without_places(items)
            digest = str(original(kept))
            records.append((digest, kept))
            return digest

        utils.hash_factors = hash_factors
        try:
            yield records
        finally:
            utils.hash_factors = original


def _without_places(items: Mapping[str, Any]) -> dict[str, Any]:
    """The items without what only says where the model is, if they are those of the model's section."""
    if "model" not in items or "hf_config" not in items:
        return dict(items)
    kept = {name: value for name, value in items.items() if name not in WHERE}
    try:
        written = json.loads(kept["hf_config"])
        entries = {name: value for name, value in written.items() if name not in WHERE_IN_FILE}
    except (TypeError, ValueError, AttributeError):  # a configuration of remote code, in vLLM's own form
        return kept
    return {**kept, "hf_config": json.dumps(entries, sort_keys=True)}


def _variables(factors: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in factors.items()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in LOCAL_VARIABLES)
    }


def inductor_factors() -> list[str]:
    """Digests of what Inductor's own key contains: torch's source, its settings, the device.

    Raises:
        Exception: whatever torch raises.
    """
    from vllm.compilation.compiler_interface import get_inductor_factors

    return [short_digest(str(factor)) for factor in get_inductor_factors()]


def short_digest(value: Any) -> str:
    """128 bits of a SHA-256 in hexadecimal, of a text or of ``value`` as JSON."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
