"""Token files and their comparison: one implementation, so planner and workers agree on every byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_rfork.config import parse_config
from vllm_rfork.errors import ConfigError
from vllm_rfork.net.credentials import Credentials, Options
from vllm_rfork.planner.http.auth import Tokens

Admit = Callable[[str], bool]


def of_planner(file: Path) -> Admit:
    return Tokens(file, {}).admit


def of_worker(file: Path) -> Admit:
    return Credentials(Options(token_file=str(file))).admit


SIDES = pytest.mark.parametrize("side", [of_planner, of_worker])


@SIDES
@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        (b"one", ["one"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"\xef\xbb\xbfone\n", ["one"]),
        (b"# rotated monthly\n\n \tone \n  # the earlier one:\ntwo", ["one", "two"]),
        (b"one#two", ["one#two"]),
        (b"with a blank", ["with a blank"]),
    ],
    ids=repr,
)
def test_a_token_file_means_the_same_to_planner_and_worker(
    side: Callable[[Path], Admit], content: bytes, tokens: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    admit = side(file)
    assert [admit(f"Bearer {token}") for token in tokens] == [True] * len(tokens)
    for line in content.decode("latin-1").splitlines():
        if line.strip() not in tokens:
            assert not admit(f"Bearer {line.strip()}"), line
    assert not admit("")


@SIDES
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b" \n\t\n",
        b"# nothing but a comment\n",
        b"one\ntwo\nthree",
        b"s3cret\x00",
        b"s3\x0bcret",
        b"s3\x0ccret",
        b"s3cret\x1b[0m",
        "s3crét".encode(),
        "s3cret\u2028".encode(),
        "s3cret\ufeff".encode(),
        b"s3cret\xff",
        b"s3cret".ljust(64 * 1024 + 1, b"x"),
        b"s3cret\x85",
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_token_file_that_cannot_be_used_is_refused_by_both(
    side: Callable[[Path], Admit], content: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        side(file)
    assert caught.value.field in ("token_file", "rfork_token_file")
    assert "s3cr" not in str(caught.value)


@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_a_blank_variable_opens_neither_planner_nor_seed(blank: str) -> None:
    with pytest.raises(ConfigError, match="RFORK_TOKEN"):
        Tokens(None, {"RFORK_TOKEN": blank})
    with pytest.raises(ConfigError, match="RFORK_TOKEN"):
        parse_config({}, {"RFORK_TOKEN": blank})
    assert parse_config({"rfork_token": "given"}, {"RFORK_TOKEN": blank}).settings.rfork_token == "given"
    assert parse_config({}, {"RFORK_TOKEN": blank, "RFORK_TOKEN_FILE": "f"}).settings.rfork_token_file == "f"


def test_the_earlier_token_may_be_blank_while_nothing_is_rotated() -> None:
    tokens = Tokens(None, {"RFORK_TOKEN": "one\n", "RFORK_TOKEN_PREVIOUS": " "})
    assert tokens.required
    assert [tokens.admit(f"Bearer {each}") for each in ("one", "", " ")] == [True, False, False]
    assert not Tokens(None, {}).required


def test_a_problem_that_lasts_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, now = tmp_path / "token", [0.0]
    file.write_text("one")
    tokens = Tokens(file, {}, lambda: now[0])
    file.write_text("")
    for _ in range(5):
        now[0] += 2
        assert tokens.admit("Bearer one")
    assert len([record for record in caplog.records if "cannot be used" in record.message]) == 1
