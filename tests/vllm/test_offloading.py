"""Weights that vLLM keeps in host memory: a fork cannot reach them, and offloaders do not bear a second build."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.vllm.engine_process import vllm_config
from vllm_rfork.vllm_compat import eligibility

pytestmark = pytest.mark.vllm

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("options", [{"cpu_offload_gb": 1.5}, {"offload_group_size": 2}], ids=["by size", "by layer"])
def test_offloaded_weights_are_neither_forked_nor_offered(
    model_a: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ((option, value),) = options.items()
    reason = eligibility.registration_obstacle(vllm_config(model_a, **options), CUDA)
    assert reason.startswith(f"a part of the weights is offloaded to host memory ({option}={value})")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    assert eligibility.registration_obstacle(vllm_config(model_a), CUDA) is None
    assert eligibility.registration_obstacle(vllm_config(model_a, **options), torch.device("cpu")) is None, (
        "nothing is offloaded"
    )


def test_before_there_was_a_configuration_for_it_the_caches_had_the_option() -> None:
    config = SimpleNamespace(
        model_config=SimpleNamespace(), offload_config=None, cache_config=SimpleNamespace(cpu_offload_gb=4)
    )
    assert "cpu_offload_gb=4" in str(eligibility.registration_obstacle(config, CUDA))
