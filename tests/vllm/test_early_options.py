"""A wrong option fails the start in vLLM's front end, before the model is looked at and a process starts."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_rfork import plugin
from vllm_rfork.errors import ConfigError

pytestmark = pytest.mark.vllm


def arguments(**given: Any) -> Any:
    """The arguments of ``vllm serve`` for a folder that contains no model; making them loads the plugins."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(**{"model": "/proc/self/fdinfo", "load_format": "rfork", **given})


@pytest.mark.parametrize("load_format", ["rfork", "RFork"])
def test_a_misspelt_option_is_told_before_the_model_is_looked_at(load_format: str) -> None:
    wrong = arguments(load_format=load_format, model_loader_extra_config={"rfork_seed_wait": 3})
    with pytest.raises(ConfigError, match="did you mean rfork_seed_wait_sec"):
        wrong.create_engine_config()


def test_a_wrong_environment_is_told_as_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RFORK_SCHEDULER_URL", "http://h:99999")
    with pytest.raises(ConfigError, match="rfork_scheduler_url"):
        arguments().create_engine_config()


def test_right_options_and_other_formats_go_on_to_the_model() -> None:
    for given in (
        {"model_loader_extra_config": {"rfork_seed_wait_sec": 3, "num_threads": 4}},
        {"model_loader_extra_config": {"rfork_seed_wait": 3}, "load_format": "auto"},
    ):
        with pytest.raises(Exception, match="fdinfo"):
            arguments(**given).create_engine_config()


def test_registering_again_checks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor import model_loader

    arguments()
    wrapped = EngineArgs.create_engine_config
    monkeypatch.setattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", {})
    plugin.register()
    assert EngineArgs.create_engine_config is wrapped


def test_a_vllm_without_that_method_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine import arg_utils

    from vllm_rfork.vllm_compat.early_settings import check_options_early

    class Without:
        pass

    monkeypatch.setattr(arg_utils, "EngineArgs", Without)
    check_options_early("rfork", lambda given: None)
    assert not hasattr(Without, "create_engine_config")
