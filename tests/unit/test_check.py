"""``vllm-rfork check``: every option of a configuration, before a start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from vllm_rfork.cli.main import main
from vllm_rfork.config import ENVIRONMENT, parse_config
from vllm_rfork.errors import ConfigError

WHOLE = {"model_url": "m", "model_deploy_strategy_name": "s", "rfork_scheduler_url": "http://planner:1223"}


def check(config: object, *flags: str, **environ: str) -> Result:
    text = config if isinstance(config, str) else json.dumps(config)
    return CliRunner().invoke(main, ["check", *([text] if text else []), *flags], env={**unset(), **environ})


def unset() -> dict[str, str | None]:
    return dict.fromkeys(ENVIRONMENT.values())


def rows(done: Result) -> dict[str, tuple[str, str]]:
    return {each["option"]: (each["status"], each["text"]) for each in json.loads(done.stdout)}


def test_check_suggests_the_nearest_option() -> None:
    config = {"rfork_scheduler_url": "http://planner:1223", "rfork_enginee": "nixl", "model_deploy_strategy_name": "s"}
    done = check(config)
    assert done.exit_code == 1
    assert done.stdout.splitlines() == [
        "option\tstatus\ttext",
        "model_deploy_strategy_name\tok\ts",
        "rfork_scheduler_url\tok\thttp://planner:1223",
        "rfork_enginee\tERROR\tno such option; did you mean rfork_engine?",
        "model_url\tERROR\trequired, not set (or MODEL_URL)",
    ]
    assert done.stderr == "2 errors\n"


def test_a_configuration_without_errors_ends_with_0() -> None:
    done = check(WHOLE)
    assert (done.exit_code, done.stderr) == (0, "no error\n")


@pytest.mark.parametrize(
    "wrong",
    [
        {"rfork_seed_slots": 1001},
        {"rfork_enginee": "nixl"},
        {"rfork_engine": "nixl,,memory"},
        {"rfork_token": " "},
        {"rfork_tls_key_file": "k"},
        {"rfork_scheduler_url": "planner:1223"},
    ],
)
def test_whatever_fails_a_start_is_an_error(wrong: dict[str, object]) -> None:
    """Both are one code."""
    with pytest.raises(ConfigError) as caught:
        parse_config({**WHOLE, **wrong}, {})
    done = check({**WHOLE, **wrong}, "--json")
    status, text = rows(done)[next(iter(wrong))]
    assert (done.exit_code, status) == (1, "error")
    assert text.startswith(caught.value.problem)


def test_every_error_is_in_one_report() -> None:
    found = rows(check({"rfork_seed_slots": "a", "rfork_verify": "some", "rfork_": 1, "rfork_engine": "nix"}, "--json"))
    wrong = {"rfork_seed_slots", "rfork_verify", "rfork_", "rfork_engine", *WHOLE}
    assert {name for name, (status, _) in found.items() if status == "error"} == wrong
    assert "there is no engine 'nix'" in found["rfork_engine"][1]


def test_a_key_of_the_fallback_loader_is_a_note_without_its_value() -> None:
    found = rows(check({**WHOLE, "seed_slots": "s3cret", "num_threads": 4}, "--json"))
    assert found["seed_slots"][0] == "note"
    assert found["seed_slots"][1].endswith("did you mean rfork_seed_slots?")
    assert "did you mean" not in found["num_threads"][1]
    assert "s3cret" not in str(found)


def test_secrets_are_not_printed() -> None:
    config = {**WHOLE, "rfork_token": "hunter2", "rfork_scheduler_url": "http://u:hunter2@a:1,http://u:hunter2@b:1"}
    found = rows(check(config, "--json"))
    assert found["rfork_token"] == ("ok", "set")
    assert found["rfork_scheduler_url"] == ("ok", "http://a:1,http://b:1")
    assert "hunter2" not in check({**config, "rfork_token": "hunter2\nx"}).output
    assert rows(check({**WHOLE, "model_url": "s3://a:hunter2@b/c"}, "--json"))["model_url"] == ("ok", "s3://b/c")


def test_the_environment_counts_only_if_it_is_asked_for() -> None:
    variables = {"MODEL_URL": "m", "MODEL_DEPLOY_STRATEGY_NAME": "s", "RFORK_SCHEDULER_URL": "http://p:1"}
    assert check("", "--env", **variables).exit_code == 0
    assert rows(check("", "--env", "--json", **variables))["model_url"] == ("ok", "m (from MODEL_URL)")
    assert check("{}", **variables).exit_code == 1
    done = check(WHOLE, "--env", "--json", RFORK_SEED_SLOTS="many")
    assert rows(done)["rfork_seed_slots"][1].startswith("not a number (from RFORK_SEED_SLOTS)")
    assert check("").exit_code == 2


def test_files_are_read_only_if_that_is_asked_for(tmp_path: Path) -> None:
    config = {**WHOLE, "rfork_token_file": str(tmp_path / "token")}
    done = check(config, "--json")
    assert done.exit_code == 0
    assert rows(done)["rfork_token_file"][1].endswith("(not read; --files reads it)")
    done = check(config, "--json", "--files")
    assert (done.exit_code, rows(done)["rfork_token_file"][0]) == (1, "error")
    (tmp_path / "token").write_text("a-token\n")
    done = check(config, "--files")
    assert done.exit_code == 0
    assert "a-token" not in done.output


def test_a_file_the_standard_input_and_the_text_itself_are_the_same(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(WHOLE))
    piped = CliRunner().invoke(main, ["check", "-"], input=json.dumps(WHOLE), env=unset())
    assert check(str(file)).stdout == piped.stdout == check(WHOLE).stdout


@pytest.mark.parametrize("config", ["{", "/no/such/file", '{"a": ' + "[" * 100_000, "{}" + " " * (1 << 20)])
def test_no_json_is_wrong_usage(config: str) -> None:
    done = check(config)
    assert done.exit_code == 2
    assert isinstance(done.exception, SystemExit)


def test_json_that_is_not_an_object_is_an_error_of_the_configuration() -> None:
    assert rows(check("[1]", "--json")) == {
        "model_loader_extra_config": ("error", "is a list; it accepts a JSON object")
    }
