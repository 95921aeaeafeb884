"""Factors of compiled code, from real vLLM's configurations: equal for another path, different for anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_rfork.manifest.facts import differences
from vllm_rfork.vllm_compat import key_factors as subject
from vllm_rfork.vllm_compat.key_factors import KeyFactors, key_factors

pytestmark = pytest.mark.vllm

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}


def factors(path: Path, changes: dict[str, Any] | None = None, **options: Any) -> tuple[KeyFactors, str]:
    """The factors of a model at ``path``, and vLLM's own hash."""
    from vllm.engine.arg_utils import EngineArgs

    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **(changes or {})}))
    arguments = {"skip_tokenizer_init": True, "max_model_len": 256, **options}
    config = EngineArgs(model=str(path), **arguments).create_engine_config()
    return key_factors(config), config.compute_hash()


def test_only_what_compiled_code_depends_on_makes_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    here, whole = factors(tmp_path / "here", {"transformers_version": "5.0.0"})
    there, other_whole = factors(tmp_path / "there", {"_name_or_path": "elsewhere"}, seed=5, gpu_memory_utilization=0.4)
    assert here == there
    assert whole != other_whole

    from vllm.config import utils

    assert utils.hash_factors.__module__ == "vllm.config.utils"
    assert "model_config.hf_config" in here.details
    assert len(here.identity) <= 64
    assert all(len(value) <= 120 for value in here.details.values())

    longer, _ = factors(tmp_path / "here", max_model_len=200)
    assert changed(here, longer) == {"config", "model_config"}
    assert differences(here.details, [(longer.details, 1)]) == ["max_model_len: 256 here, 200 on 1 seed"]
    wider, _ = factors(tmp_path / "here", {"hidden_size": 128})
    assert {"config", "model_config"} <= changed(here, wider)

    # Names of hosts and secrets are no factors, and secrets are not even in the details.
    monkeypatch.setenv("VLLM_API_KEY", "hidden")
    monkeypatch.setenv("VLLM_LOOPBACK_IP", "127.0.0.2")
    monkeypatch.setenv("MOONCAKE_REQUESTER_LOCAL_HOSTNAME", "host")
    secret, _ = factors(tmp_path / "here")
    assert changed(here, secret) == set()
    assert "hidden" not in str(secret)
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    disabled, _ = factors(tmp_path / "here")
    assert changed(here, disabled) == {"environment"}


def changed(one: KeyFactors, other: KeyFactors) -> set[str]:
    return {name for name in {*one.identity, *other.identity} if one.identity.get(name) != other.identity.get(name)}


def test_vllms_function_is_put_back_if_its_hash_fails() -> None:
    from vllm.config import utils

    original = utils.hash_factors
    with pytest.raises(RuntimeError, match="broken"), subject._recorded():
        raise RuntimeError("broken")
    assert utils.hash_factors is original
