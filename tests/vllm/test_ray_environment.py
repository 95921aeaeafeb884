"""Options from the environment reach workers that Ray starts on other nodes; vLLM's own functions choose them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import vllm_rfork
from vllm_rfork import config
from vllm_rfork.vllm_compat.ray_environment import COPIED, EXTRA, OF_ONE_HOST, copy_to_ray_workers

pytestmark = pytest.mark.vllm

#: Not a worker's: tokens that planners take, and faults of the engine for tests.
NOT_WORKERS = {"RFORK_TOKEN_PREVIOUS", "RFORK_PLANNER_", "RFORK_MEMORY_FAULT"}


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's environment, with every option in it, and one variable that the user has named."""
    for name in (*COPIED, *OF_ONE_HOST):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("RFORK_SEED_TLS", "require")
    monkeypatch.setenv(EXTRA, "MINE, RFORK_TOKEN")
    copy_to_ray_workers()
    copy_to_ray_workers()


def test_the_ray_executor_copies_every_option_but_those_of_one_host() -> None:
    from vllm.ray.ray_env import get_env_vars_to_copy

    copied = get_env_vars_to_copy(destination="RayWorkerWrapper")
    assert set(COPIED) <= copied
    assert {"MODEL_URL", "MODEL_DEPLOY_STRATEGY_NAME", "RFORK_SEED_TLS", "RFORK_NIXL_ALLOW_TCP", "MINE"} <= copied
    assert not OF_ONE_HOST & copied


def test_the_newer_ray_executor_leaves_a_worker_its_own_place() -> None:
    from vllm.v1.executor.ray_env_utils import get_driver_env_vars

    copied = get_driver_env_vars(set())
    assert copied["RFORK_SEED_TLS"] == "require"
    assert copied["MODEL_URL"] == "x"
    assert not OF_ONE_HOST & set(copied)


def test_what_the_user_has_named_stays_and_nothing_is_named_twice() -> None:
    names = os.environ[EXTRA].split(",")
    assert names[:2] == ["MINE", "RFORK_TOKEN"]
    assert len(names) == len(set(names))


def test_every_variable_that_workers_read_is_copied() -> None:
    """A new option in the environment fails here until it is in one of the lists."""
    root = Path(vllm_rfork.__file__).parent
    sources = [file for file in root.rglob("*.py") if file.relative_to(root).parts[0] not in ("planner", "cli")]
    read = {name for file in sources for name in re.findall(r"\"(RFORK_[A-Z_]+)\"", file.read_text())}
    assert set(config.ENVIRONMENT.values()) - {"MODEL_URL", "MODEL_DEPLOY_STRATEGY_NAME"} <= read
    assert read - {*COPIED, *OF_ONE_HOST} - NOT_WORKERS == set()
