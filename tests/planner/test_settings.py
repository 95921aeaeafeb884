"""The planner's settings: what a wrong one says, and which URLs of Redis are none."""

from __future__ import annotations

import pytest

from vllm_rfork.errors import ConfigError
from vllm_rfork.planner.command import planner
from vllm_rfork.planner.settings import Settings, accepted, check_environment, settings_from
from vllm_rfork.planner.store import redis_url


def said(**values: str) -> str:
    with pytest.raises(ConfigError) as caught:
        settings_from(values, {name: f"RFORK_PLANNER_{name.upper()}" for name in values})
    return str(caught.value)


def test_a_wrong_value_is_quoted_with_its_source_and_what_is_accepted() -> None:
    assert said(port="abc") == (
        "port (from RFORK_PLANNER_PORT): cannot be 'abc'; it accepts an integer from 0 to 65535"
    )
    with pytest.raises(ConfigError, match=r"slots \(from --slots\): cannot be '0'; it accepts an integer from 1"):
        settings_from({"slots": "0"}, {"slots": "--slots"})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("port", "an integer from 0 to 65535"),
        ("max_keys", "an integer from 1"),
        ("lease_ttl_sec", "a number of seconds from 0.1 to 86400"),
        ("log_format", "one of text, json"),
        ("trust_announced_address", "true or false"),
        ("token_file", "a path"),
    ],
)
def test_what_a_setting_accepts_is_said_in_words(name: str, words: str) -> None:
    assert accepted(name) == words


def test_what_a_setting_accepts_is_never_its_description() -> None:
    for name, field in Settings.model_fields.items():
        assert accepted(name) != field.description


def test_a_variable_that_kubernetes_sets_is_recognized() -> None:
    text = said(port="tcp://10.96.0.7:1223")
    for words in (
        "RFORK_PLANNER_PORT",
        "tcp://10.96.0.7:1223",
        "an integer from 0 to 65535",
        "enableServiceLinks: false",
    ):
        assert words in text
    for name in (
        "RFORK_PLANNER_SERVICE_HOST",
        "RFORK_PLANNER_SERVICE_PORT_HTTP",
        "RFORK_PLANNER_PORT_1223_TCP",
        "RFORK_PLANNER_PORT_1223_TCP_ADDR",
    ):
        with pytest.raises(ConfigError, match="enableServiceLinks: false") as caught:
            check_environment([name])
        assert caught.value.field == name
    with pytest.raises(ConfigError) as caught:
        check_environment(["RFORK_PLANNER_PROT"])
    assert "Kubernetes" not in str(caught.value)
    assert "Kubernetes" not in said(port="abc")


def test_flags_and_variables_are_told_apart() -> None:
    from click.testing import CliRunner

    by_flag = CliRunner().invoke(planner, ["--port", "abc"])
    assert (by_flag.exit_code, "port (from --port): cannot be 'abc'" in by_flag.output) == (2, True)
    by_variable = CliRunner().invoke(planner, [], env={"RFORK_PLANNER_PORT": "tcp://10.96.0.7:1223"})
    assert (by_variable.exit_code, "port (from RFORK_PLANNER_PORT)" in by_variable.output) == (2, True)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3cret@h:6379/0?foo=bar",
        "rediss://:s3cret@h:6379/0?ssl_cert_reqs=sometimes",
        "redis://:s3cret@h:6379/0?socket_timeout=soon",
        "redis://:s3cret@h:6379/0?encoding=none",
        "redis://:s3cret@h:6379/zero",
        "redis://:s3cret@h:99999/0",
        "redis://:s3cret@h:port/0",
        "redis://[::1",
        "redis://h:s3cret/0",
    ],
)
def test_a_url_that_redis_cannot_use_names_the_setting_and_no_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        redis_url.check(url)
    assert caught.value.field == "store"
    assert ":s3cret@" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["redis://:s3cret@h:6379/0", "rediss://h/1?ssl_cert_reqs=none", "unix:///run/redis?db=1", "redis://[::1]:1"]
)
def test_usable_urls_of_redis_are_accepted(url: str) -> None:
    redis_url.check(url)
