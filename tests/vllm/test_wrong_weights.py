"""Two checkpoints under what looks like one seed key: never does a worker serve the other one's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import LogRecords, Planner, eventually, extra_for
from tests.vllm.engine_process import load, load_digested, vllm_config
from vllm_rfork import seeding

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("no_seeds")]


@pytest.fixture(scope="module")
def default_b(model_b: Path) -> Any:
    """Model B as vLLM's default loader makes it."""
    return load_digested(vllm_config(model_b))


@pytest.mark.parametrize(
    ("separator", "first", "second"),
    [
        ("-", ("qwen-7b", "chat-prod"), ("qwen-7b-chat", "prod")),
        ("$", ("x$s", "t"), ("x", "s$t")),
    ],
)
def test_names_that_give_one_key_do_not_give_one_fingerprint(
    separator: str,
    first: tuple[str, str],
    second: tuple[str, str],
    model_a: Path,
    model_b: Path,
    default_b: Any,
    planner: Planner,
    rfork_log: LogRecords,
) -> None:
    def extra(named: tuple[str, str]) -> dict[str, Any]:
        names = {"model_url": named[0], "model_deploy_strategy_name": named[1]}
        return extra_for(planner.url, rfork_seed_key_separator=separator, **names)

    seed_model = load(vllm_config(model_a, load_format="rfork", extra=extra(first)))
    (seed,) = seeding.wait_until_started(30)
    eventually(lambda: str(seed.address) in planner.seeds(), "the seed is announced")
    loaded = load_digested(vllm_config(model_b, load_format="rfork", extra=extra(second)))
    keys = {str(each.manifest.seed_key) for each in seeding.wait_until_started(30)}
    assert len(keys) == 1, "the keys stay as they are published"
    assert loaded.before == default_b.before, "the second serves its own weights"
    warned = [line for line in rfork_log.warnings if "rfork_seed_key_separator" in line]
    assert len(warned) == 2
    assert repr(first[0]) in warned[0]
    assert seed_model is not None
