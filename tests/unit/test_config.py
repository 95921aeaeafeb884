"""Every option: default, environment fallback, and the message that fails the start."""

from __future__ import annotations

import pytest

from vllm_rfork.config import ENVIRONMENT, Settings, parse_config
from vllm_rfork.errors import ConfigError

DEFAULTS = {
    "model_url": "",
    "model_deploy_strategy_name": "",
    "rfork_scheduler_url": "",
    "rfork_seed_timeout_sec": 30.0,
    "rfork_seed_key_separator": "$",
    "rfork_request_timeout_sec": 10.0,
    "rfork_heartbeat_interval_sec": 30.0,
    "rfork_seed_bind_host": "0.0.0.0",
    "rfork_seed_advertise_host": "",
    "rfork_seed_port_base": 0,
    "rfork_engine": "auto",
    "rfork_layout": "auto",
    "rfork_verify": "full",
    "rfork_fallback_load_format": "auto",
    "rfork_become_seed": True,
    "rfork_max_batch_bytes": None,
    "rfork_fork_timeout_sec": 600.0,
    "rfork_seed_wait_sec": 0.0,
    "rfork_token": "",
}


def test_defaults_are_the_documented_ones() -> None:
    assert parse_config({}, {}).settings.model_dump() == DEFAULTS


@pytest.mark.parametrize("name", sorted(ENVIRONMENT))
def test_the_environment_is_a_fallback_and_the_extra_config_wins(name: str) -> None:
    text = {"rfork_seed_timeout_sec": "7.5", "rfork_scheduler_url": "http://a:1"}.get(name, "from-environment")
    given = {"rfork_seed_timeout_sec": 9, "rfork_scheduler_url": "http://b:2"}.get(name, "from-config")
    environment = {ENVIRONMENT[name]: text}
    from_environment = getattr(parse_config({}, environment).settings, name)
    assert str(from_environment) == text
    assert getattr(parse_config({name: given}, environment).settings, name) == given


@pytest.mark.parametrize(
    ("name", "value", "accepts"),
    [
        ("model_url", 7, "one line of text"),
        ("model_url", "two\nlines", "one line of text"),
        ("rfork_scheduler_url", "planner:1223", "http://"),
        ("rfork_scheduler_url", 1223, "http://"),
        ("rfork_seed_timeout_sec", 0, "greater than 0"),
        ("rfork_seed_timeout_sec", -1, "greater than 0"),
        ("rfork_seed_timeout_sec", float("nan"), "finite"),
        ("rfork_seed_timeout_sec", float("inf"), "finite"),
        ("rfork_seed_timeout_sec", "30", "number of seconds"),
        ("rfork_seed_timeout_sec", True, "number of seconds"),
        ("rfork_request_timeout_sec", 0, "greater than 0"),
        ("rfork_heartbeat_interval_sec", None, "greater than 0"),
        ("rfork_seed_wait_sec", -0.5, "0 or more"),
        ("rfork_seed_key_separator", "", "1 to 16 characters"),
        ("rfork_seed_port_base", -1, "0 to 65000"),
        ("rfork_seed_port_base", "8000", "0 to 65000"),
        ("rfork_seed_port_base", True, "0 to 65000"),
        ("rfork_layout", "nz", "auto, checkpoint, runtime"),
        ("rfork_verify", True, "full, sample, off"),
        ("rfork_become_seed", "yes", "true or false"),
        ("rfork_become_seed", 1, "true or false"),
        ("rfork_max_batch_bytes", 0, "greater than 0"),
        ("rfork_max_batch_bytes", 1.5, "greater than 0"),
        ("rfork_engine", 3, "one line of text"),
    ],
)
def test_a_wrong_value_names_the_field_and_what_it_accepts(name: str, value: object, accepts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({name: value}, {})
    assert caught.value.field == name
    assert str(caught.value).startswith(f"{name}: ")
    assert accepts in str(caught.value)


def test_every_option_has_words_for_what_it_accepts() -> None:
    for name in Settings.model_fields:
        with pytest.raises(ConfigError, match=name):
            parse_config({name: object()}, {})


def test_a_wrong_value_in_the_environment_names_the_variable() -> None:
    with pytest.raises(ConfigError, match="RFORK_SEED_TIMEOUT_SEC"):
        parse_config({}, {"RFORK_SEED_TIMEOUT_SEC": "soon"})


@pytest.mark.parametrize("name", ["rfork_seed_timeout", "rfork_", "RFORK_ENGINE", "rfork_seed_timeout_secs"])
def test_an_unknown_rfork_option_fails_the_start(name: str) -> None:
    with pytest.raises(ConfigError, match="rfork_seed_timeout_sec"):
        parse_config({name: 1}, {})


def test_other_keys_are_the_fallback_loaders() -> None:
    parsed = parse_config({"model_url": "m", "enable_multithread_load": True, "num_threads": 4}, {})
    assert parsed.passed_through == {"enable_multithread_load": True, "num_threads": 4}


@pytest.mark.parametrize("missing", ["model_url", "model_deploy_strategy_name", "rfork_scheduler_url"])
def test_what_is_needed_and_missing_is_named(missing: str) -> None:
    whole = {"model_url": "m", "model_deploy_strategy_name": "s", "rfork_scheduler_url": "http://p:1"}
    assert parse_config(whole, {}).settings.missing == []
    del whole[missing]
    assert parse_config(whole, {}).settings.missing == [missing]


def test_the_token_is_not_in_the_representation() -> None:
    settings = parse_config({"rfork_token": "s3cret"}, {}).settings
    assert "s3cret" not in repr(settings)
    with pytest.raises(ConfigError) as caught:
        parse_config({"rfork_token": "s3cret\n"}, {})
    assert "s3cret" not in str(caught.value)


def test_only_a_json_object_is_taken() -> None:
    with pytest.raises(ConfigError, match="JSON object"):
        parse_config([("model_url", "m")], {})  # type: ignore[arg-type]
