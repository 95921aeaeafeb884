"""Every option: default, environment fallback, and the message that fails the start."""

from __future__ import annotations

import traceback

import pytest

from vllm_rfork import messages
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
    "rfork_caches": "safe",
    "rfork_max_batch_bytes": None,
    "rfork_fork_timeout_sec": 600.0,
    "rfork_seed_wait_sec": None,
    "rfork_token": "",
    "rfork_token_file": "",
    "rfork_labels": "",
    "rfork_seed_slots": 0,
    "rfork_tls_ca_file": "",
    "rfork_tls_cert_file": "",
    "rfork_tls_key_file": "",
    "rfork_seed_tls": "off",
    "rfork_seed_tls_name": "",
    "rfork_seed_tls_client_ca_file": "",
}

#: Where any text will not do: what the environment holds, and another value for the extra config.
VALUES = {
    "rfork_seed_timeout_sec": ("7.5", 9),
    "rfork_scheduler_url": ("http://a:1", "http://b:2"),
    "rfork_caches": ("code", "off"),
    "rfork_labels": ("host=a", "host=b"),
    "rfork_seed_slots": ("3", 4),
    "rfork_seed_tls": ("require", "prefer"),
}
#: What an option needs beside it.
BESIDE = {
    "rfork_tls_key_file": {"rfork_tls_cert_file": "c"},
    "rfork_seed_tls": {"rfork_tls_cert_file": "c"},
    "rfork_seed_tls_client_ca_file": {"rfork_tls_cert_file": "c", "rfork_seed_tls": "require"},
}


def test_defaults_are_the_documented_ones() -> None:
    assert parse_config({}, {}).settings.model_dump() == DEFAULTS


@pytest.mark.parametrize("name", sorted(ENVIRONMENT))
def test_the_environment_is_a_fallback_and_the_extra_config_wins(name: str) -> None:
    text, given = VALUES.get(name, ("from-environment", "from-config"))
    environment, beside = {ENVIRONMENT[name]: text}, BESIDE.get(name, {})
    from_environment = getattr(parse_config(beside, environment).settings, name)
    assert str(from_environment) == text
    assert getattr(parse_config({**beside, name: given}, environment).settings, name) == given


@pytest.mark.parametrize(
    ("name", "value", "accepts"),
    [
        ("model_url", 7, "one line of text"),
        ("model_url", "two\nlines", "one line of text"),
        ("rfork_scheduler_url", "planner:1223", "http://"),
        ("rfork_scheduler_url", 1223, "http://"),
        ("rfork_scheduler_url", "http://a:1,", "number 2 is empty"),
        ("rfork_scheduler_url", ",http://a:1", "number 1 is empty"),
        ("rfork_scheduler_url", "http://a:1,,http://b:1", "number 2 is empty"),
        ("rfork_scheduler_url", "http://a:1,b:1", "number 2: not an http"),
        ("rfork_scheduler_url", "http://a:1,http://b:99999", "number 2: after ://"),
        ("rfork_scheduler_url", ",".join(f"http://h{n}" for n in range(9)), "or 8 with commas between"),
        ("rfork_scheduler_url", "http://h:99999", "http://planner:1223"),
        ("rfork_scheduler_url", "http://h:0", "http://planner:1223"),
        ("rfork_scheduler_url", "http://h:", "http://planner:1223"),
        ("rfork_scheduler_url", "http://h:12a", "http://planner:1223"),
        ("rfork_scheduler_url", "http://[::1", "http://planner:1223"),
        ("rfork_scheduler_url", "http://[::1]x:1", "http://planner:1223"),
        ("rfork_scheduler_url", "http://[10.0.0.1]:1", "http://planner:1223"),
        ("rfork_scheduler_url", "http://a..b", "http://planner:1223"),
        ("rfork_scheduler_url", "http://.a", "http://planner:1223"),
        ("rfork_scheduler_url", "http://", "http://planner:1223"),
        ("rfork_scheduler_url", "http://:1223", "http://planner:1223"),
        ("rfork_scheduler_url", "http://10.0.0.300:1223", "http://planner:1223"),
        ("rfork_scheduler_url", "http://a b:1223", "http://planner:1223"),
        ("rfork_scheduler_url", "http://a\tb:1223", "http://planner:1223"),
        ("rfork_scheduler_url", "http://a\\b:1223", "http://planner:1223"),
        ("rfork_scheduler_url", "http://-a:1223", "http://planner:1223"),
        ("rfork_scheduler_url", f"http://{'a' * 64}:1223", "http://planner:1223"),
        ("rfork_scheduler_url", "http://h:1223?x=1", "http://planner:1223"),
        ("rfork_scheduler_url", "http://h:1223#x", "http://planner:1223"),
        ("rfork_scheduler_url", "http:///h", "http://planner:1223"),
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
        ("rfork_engine", ["nixl"], "such as cuda_ipc,nixl"),
        ("rfork_engine", "", "such as cuda_ipc,nixl"),
        ("rfork_engine", "nixl,,memory", "such as cuda_ipc,nixl"),
        ("rfork_engine", "nixl,memory,nixl", "such as cuda_ipc,nixl"),
        ("rfork_engine", "nixl,auto", "such as cuda_ipc,nixl"),
        ("rfork_engine", "auto,auto", "such as cuda_ipc,nixl"),
        ("rfork_engine", ",".join(f"e{number}" for number in range(17)), "such as cuda_ipc,nixl"),
        ("rfork_seed_slots", -1, "0 to 1000"),
        ("rfork_seed_slots", 1001, "0 to 1000"),
        ("rfork_seed_slots", True, "0 to 1000"),
        ("rfork_labels", {"host": "a"}, "host=a,rack=b"),
        ("rfork_labels", "host", "host=a,rack=b"),
        ("rfork_labels", "=a", "host=a,rack=b"),
        ("rfork_labels", "host=a b", "A-Za-z0-9_.-"),
        ("rfork_labels", "host=" + "a" * 64, "1 to 63"),
        ("rfork_labels", ",".join(f"l{number}=x" for number in range(16)), "up to 15"),
        ("rfork_seed_tls", "on", "off, prefer, require"),
        # right alone, wrong together
        ("rfork_tls_key_file", "key.pem", "the certificate's"),
        ("rfork_seed_tls", "prefer", "a certificate beside it"),
        ("rfork_seed_tls_client_ca_file", "ca.pem", "rfork_seed_tls is require"),
    ],
)
def test_a_wrong_value_names_the_field_and_what_it_accepts(name: str, value: object, accepts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({name: value}, {})
    assert caught.value.field == name
    assert str(caught.value).startswith(f"{name}: ")
    assert accepts in str(caught.value)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("http://h:1223 ", "http://h:1223"),
        ("\thttp://h:1223/\n", "http://h:1223"),
        ("http://h", "http://h"),
        ("HTTPS://H:443/planner/", "HTTPS://H:443/planner"),
        ("http://planner.svc.cluster.local.:1223", "http://planner.svc.cluster.local.:1223"),
        ("http://[::1]:1223", "http://[::1]:1223"),
        ("http://[fe80::1%eth0]:1223", "http://[fe80::1%eth0]:1223"),
        ("http://10.0.0.3:1223", "http://10.0.0.3:1223"),
        ("http://user:p%40ss@h:1223", "http://user:p%40ss@h:1223"),
        ("http://rfork_planner-1:1223", "http://rfork_planner-1:1223"),
        ("http://plänner.example:1223", "http://plänner.example:1223"),
        (" ", ""),
        (" http://a:1/ , https://b:2/p/ ", "http://a:1,https://b:2/p"),
        ("http://a:1,http://b,http://a:1/", "http://a:1,http://b"),
    ],
)
def test_a_base_url_is_kept_without_spaces_and_last_slashes(given: str, kept: str) -> None:
    assert parse_config({"rfork_scheduler_url": given}, {}).settings.rfork_scheduler_url == kept
    assert parse_config({}, {"RFORK_SCHEDULER_URL": given}).settings.rfork_scheduler_url == kept


def text_options() -> list[str]:
    """The options that take any line of text."""
    return [
        name
        for name, each in Settings.model_fields.items()
        if each.annotation is str and name not in {"rfork_scheduler_url", "rfork_seed_key_separator", "rfork_labels"}
    ]


@pytest.mark.parametrize("name", text_options())
def test_white_space_around_an_option_does_not_count(name: str) -> None:
    beside = BESIDE.get(name, {})
    assert getattr(parse_config({**beside, name: " value\r\n"}, {}).settings, name) == "value"
    if name in ENVIRONMENT:
        assert getattr(parse_config(beside, {ENVIRONMENT[name]: " value\n"}).settings, name) == "value"


def test_white_space_around_choices_and_numbers_does_not_count() -> None:
    settings = parse_config({"rfork_layout": " runtime\n"}, {"RFORK_SEED_SLOTS": "3\n"}).settings
    assert (settings.rfork_layout, settings.rfork_seed_slots) == ("runtime", 3)


def test_a_separator_is_taken_as_it_is() -> None:
    assert parse_config({"rfork_seed_key_separator": " | "}, {}).settings.rfork_seed_key_separator == " | "


def test_a_blank_token_in_the_environment_fails_the_start() -> None:
    """Otherwise a Secret that lost its content would open this worker's seed service to everybody."""
    with pytest.raises(ConfigError, match="RFORK_TOKEN"):
        parse_config({}, {"RFORK_TOKEN": " \n"})


@pytest.mark.parametrize(
    ("extra", "environment", "name"),
    [
        ({}, {"RFORK_TOKEN_FILE": " "}, r"rfork_token_file \(from RFORK_TOKEN_FILE\)"),
        ({}, {"RFORK_TOKEN": " ", "RFORK_TOKEN_FILE": "\n"}, "rfork_token_file"),
        ({"rfork_token": " "}, {}, "rfork_token: is blank"),
        ({"rfork_token": "\n"}, {"RFORK_TOKEN": "secret"}, "rfork_token: is blank"),
        ({"rfork_token_file": "\t"}, {"RFORK_TOKEN": "secret"}, "rfork_token_file: is blank"),
    ],
)
def test_a_blank_token_or_name_of_its_file_fails_the_start_wherever_it_stands(
    extra: dict[str, str], environment: dict[str, str], name: str
) -> None:
    with pytest.raises(ConfigError, match=name):
        parse_config(extra, environment)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("rfork_seed_wait", "rfork_seed_wait_sec"),
        ("rfork_verfy", "rfork_verify"),
        ("RFORK_ENGINE", "rfork_engine"),
        ("rfork_sheduler_url", "rfork_scheduler_url"),
    ],
)
def test_a_misspelt_option_names_the_one_that_was_meant(given: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {meant}\\?"):
        parse_config({given: 1}, {})


def test_an_option_that_resembles_none_gets_no_advice() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"rfork_": 1}, {})
    assert "did you mean" not in str(caught.value)


def test_every_option_has_words_for_what_it_accepts() -> None:
    for name in Settings.model_fields:
        with pytest.raises(ConfigError, match=name):
            parse_config({name: object()}, {})


@pytest.mark.parametrize("variable", ["RFORK_SEED_TIMEOUT_SEC", "RFORK_SEED_SLOTS"])
def test_a_wrong_value_in_the_environment_names_the_variable(variable: str) -> None:
    with pytest.raises(ConfigError, match=variable):
        parse_config({}, {variable: "soon"})


def test_a_token_comes_from_one_place() -> None:
    both = {"RFORK_TOKEN": "t", "RFORK_TOKEN_FILE": "/f"}
    with pytest.raises(ConfigError, match="rfork_token_file"):
        parse_config({}, both)
    with pytest.raises(ConfigError, match="rfork_token_file"):
        parse_config({"rfork_token": "t", "rfork_token_file": "/f"}, {})
    settings = parse_config({"rfork_token_file": "/g"}, both).settings
    assert (settings.rfork_token, settings.rfork_token_file) == ("", "/g")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("host=a,rack=b", "host=a,rack=b"),
        (" host = a , rack=b ,", "host=a,rack=b"),
        ("host=node-1,zone=", "host=node-1"),  # the downward API's text for a label that is not there
        ("", ""),
        (",".join(f"label-{number}.x_y={'v' * 63}" for number in range(15)), None),
    ],
)
def test_labels_that_are_taken_are_labels_on_the_wire_and_leave_room_for_the_host(given: str, kept: str | None) -> None:
    labels = parse_config({"rfork_labels": given}, {}).settings.rfork_labels
    assert kept is None or labels == kept
    assert messages.parse_labels(labels) == messages.parse_labels(given)
    messages.parse_labels("added=a," + labels)


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
        parse_config({"rfork_token": "s3cret\ns3cret"}, {})
    assert "s3cret" not in str(caught.value)


def test_only_a_json_object_is_taken() -> None:
    with pytest.raises(ConfigError, match="JSON object"):
        parse_config([("model_url", "m")], {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rfork_token", "hunter2\nhunter2"),
        ("rfork_scheduler_url", "ftp://u:hunter2@host"),
        ("rfork_scheduler_url", "http://u:hunter2@host:port"),
        ("rfork_scheduler_url", "http://u:hunter2@a..b"),
        ("rfork_scheduler_url", "http://u:hunter2@[::1"),
        ("rfork_scheduler_url", "http://u:hunter2[@h"),
    ],
)
def test_no_secret_in_the_traceback_of_a_wrong_setting(option: str, value: str) -> None:
    """vLLM logs the whole chain of a start that fails."""
    with pytest.raises(ConfigError) as caught:
        parse_config({option: value})
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
