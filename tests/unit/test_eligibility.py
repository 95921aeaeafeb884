"""Settings under which serving writes to weights: such a worker offers none, and says why."""

from __future__ import annotations

import types

import pytest
import torch

from vllm_rfork.vllm_compat import eligibility


@pytest.mark.parametrize(
    ("eplb", "scales", "reason"),
    [
        (True, False, "enable_eplb"),
        (False, True, "calculate_kv_scales"),
        (False, False, ""),
        (False, None, ""),  # from 0.30 on there is no such option
    ],
)
def test_serving_that_writes_to_weights_makes_no_seed(eplb: bool, scales: bool | None, reason: str) -> None:
    config = types.SimpleNamespace(
        additional_config=None,
        parallel_config=types.SimpleNamespace(enable_eplb=eplb),
        cache_config=types.SimpleNamespace(**({} if scales is None else {"calculate_kv_scales": scales})),
    )
    found = eligibility.seed_obstacle(config)
    assert bool(found) is bool(reason)
    assert reason in (found or "")


@pytest.mark.parametrize("option", ["enable_sleep_mode", "enable_cumem_allocator"])
def test_a_pool_that_is_unmapped_while_the_worker_sleeps_cannot_be_registered(option: str) -> None:
    config = types.SimpleNamespace(model_config=types.SimpleNamespace(**{option: True}))
    assert f"({option})" in str(eligibility.pool_obstacle(config, torch.device("cuda", 0)))
    assert eligibility.pool_obstacle(config, torch.device("cpu")) is None
    config.model_config = types.SimpleNamespace(**{option: False})
    assert eligibility.pool_obstacle(config, torch.device("cuda", 0)) is None
