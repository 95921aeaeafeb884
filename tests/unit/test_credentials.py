"""Token and TLS from files: what is taken, what is refused by name, and what happens when a file changes."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Any

import pytest

from tests.authority import Authority
from vllm_rfork.config import parse_config
from vllm_rfork.errors import ConfigError
from vllm_rfork.net.credentials import Credentials, Options


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


def options(cert: tuple[Path, Path] | None = None, **more: Any) -> Options:
    own = {} if cert is None else {"cert_file": str(cert[0]), "key_file": str(cert[1])}
    return Options(**own, **{name: str(value) for name, value in more.items()})


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_the_first_token_is_sent_and_both_are_let_in(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("new\n\n  old \n")
    own = Credentials(options(token_file=file))
    assert own.token == "new"
    assert own.admit("Bearer new")
    assert own.admit("bearer  old ")
    for wrong in ("", "new", "Basic new", "Bearer ne", "Bearer newer", "Bearer", "Bearer \udcff"):
        assert not own.admit(wrong), wrong


def test_without_a_token_everybody_is_let_in_and_none_is_sent() -> None:
    assert Credentials().token == ""
    assert Credentials().admit("")
    assert Credentials().admit("Bearer anything")


def test_a_token_that_is_rotated_is_used_within_a_second(tmp_path: Path) -> None:
    file, clock = tmp_path / "token", Clock()
    file.write_text("old")
    own = Credentials(options(token_file=file), clock)
    file.write_text("the new one\n")
    assert own.token == "old"  # looked at a moment ago
    clock.now += 1
    assert own.token == "the new one"
    assert own.admit("Bearer the new one")
    assert not own.admit("Bearer old")


def test_a_secret_that_kubernetes_swaps_by_its_link_is_seen(tmp_path: Path) -> None:
    for name, text in (("1", "old"), ("2", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "token").write_text(text)
    link, clock = tmp_path / "..data", Clock()
    link.symlink_to("1")
    (tmp_path / "token").symlink_to("..data/token")
    own = Credentials(options(token_file=tmp_path / "token"), clock)
    (tmp_path / "new-link").symlink_to("2")
    (tmp_path / "new-link").rename(link)
    clock.now += 1
    assert own.token == "new"


@pytest.mark.parametrize("content", [None, "", "a\nb\nc\n", "s3cret\x00", "café"])
def test_a_token_file_that_cannot_be_used_fails_the_start_and_later_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str | None
) -> None:
    file, clock = tmp_path / "token", Clock()
    file.write_text("good-s3cret")
    own = Credentials(options(token_file=file), clock)
    if content is None:
        file.unlink()
    else:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        Credentials(options(token_file=file))
    assert caught.value.field == "rfork_token_file"
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            clock.now += 1
            assert own.token == "good-s3cret"
    assert len(caplog.records) == 1
    assert "earlier" in caplog.text
    assert "s3cret" not in caplog.text + str(caught.value)
    file.write_text("better")
    clock.now += 1
    assert own.token == "better"


def test_no_token_is_in_the_representation(tmp_path: Path) -> None:
    assert "s3cret" not in repr(Options(token="s3cret"))


def test_settings_become_credentials(authority: Authority) -> None:
    cert, key = authority.issue("worker")
    given = {
        "rfork_token": "t",
        "rfork_tls_ca_file": str(authority.file),
        "rfork_tls_cert_file": str(cert),
        "rfork_tls_key_file": str(key),
        "rfork_seed_tls": "require",
        "rfork_seed_tls_name": "seeds",
        "rfork_seed_tls_client_ca_file": str(authority.file),
    }
    own = Credentials.of(parse_config(given, {}).settings)
    expected = options((cert, key), token="t", ca_file=authority.file, seed_tls="require", seed_name="seeds")
    assert own.options == Options(**{**expected.__dict__, "client_ca_file": str(authority.file)})
    assert own.client_context() is not None
    assert own.server_context() is not None
    plain = Credentials.of(parse_config({}, {}).settings)
    assert (plain.token, plain.client_context(), plain.server_context()) == ("", None, None)


# --- TLS files -------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_used_fail_the_start_by_the_options_name(authority: Authority, tmp_path: Path) -> None:
    good, other = authority.issue("good"), authority.issue("other")
    locked = authority.issue("locked", password=b"s3cret")
    (tmp_path / "empty").touch()
    for wrong, name in (
        (options(ca_file=tmp_path / "none"), "rfork_tls_ca_file"),
        (options(ca_file=good[1]), "rfork_tls_ca_file"),
        (options(ca_file=tmp_path / "empty"), "rfork_tls_ca_file"),
        (options((good[0], other[1])), "rfork_tls_cert_file"),
        (options((tmp_path / "none", good[1])), "rfork_tls_cert_file"),
        (options(locked), "rfork_tls_cert_file"),  # and nobody is asked at the terminal
        (options(good, seed_tls="require", client_ca_file=good[1]), "rfork_seed_tls_client_ca_file"),
    ):
        with pytest.raises(ConfigError) as caught:
            Credentials(wrong)
        assert caught.value.field == name, wrong


def test_the_key_may_stand_in_the_certificates_file(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("worker")
    both = tmp_path / "both.pem"
    both.write_bytes(cert.read_bytes() + key.read_bytes())
    assert Credentials(options(cert_file=both, seed_tls="require")).server_context() is not None


def test_old_versions_of_tls_are_not_spoken(authority: Authority) -> None:
    own = Credentials(options(authority.issue("worker"), ca_file=authority.file, seed_tls="prefer"))
    for context in (own.client_context(), own.server_context()):
        assert context is not None
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_another_ca_is_trusted_from_then_on_and_the_first_no_more(authority: Authority, tmp_path: Path) -> None:
    clock = Clock()
    own = Credentials(options(ca_file=authority.file), clock)
    before = own.client_context()
    later = Authority(tmp_path / "later")
    authority.file.write_bytes(later.file.read_bytes())
    clock.now += 1
    after = own.client_context()
    assert before is not after
    assert after is not None
    clock.now += 1
    assert own.client_context() is after, "made anew for a change alone"
    assert [each["subject"] for each in after.get_ca_certs()] == [((("commonName", "test authority later"),),)]


def test_half_a_renewed_pair_keeps_the_earlier_until_the_other_half_is_there(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    cert, key = authority.issue("worker")
    own = Credentials(options((cert, key), seed_tls="require"), clock)
    before = own.server_context()
    new_cert, new_key = authority.issue("renewed")
    cert.write_bytes(new_cert.read_bytes())
    clock.now += 1
    assert own.server_context() is before
    assert "rfork_tls_cert_file" in caplog.text
    key.write_bytes(new_key.read_bytes())
    clock.now += 1
    assert own.server_context() is not before
