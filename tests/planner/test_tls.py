"""TLS on the planner: its own certificate, and callers' certificates where they are asked for."""

from __future__ import annotations

import ssl
from pathlib import Path

import aiohttp
import pytest
from click.testing import CliRunner

from tests.authority import Authority
from tests.planner.processes import PlannerUnderTest
from vllm_rfork.cli.main import main
from vllm_rfork.errors import ConfigError
from vllm_rfork.planner.app import PlannerProcess
from vllm_rfork.planner.http.auth import ServerTls, Tokens
from vllm_rfork.planner.settings import settings_from


async def status(url: str, context: ssl.SSLContext) -> int:
    async with aiohttp.ClientSession() as session, session.get(url, ssl=context) as answer:
        return answer.status


async def test_callers_need_the_certificate_that_is_asked_for(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("planner")
    settings = settings_from(
        {"host": "localhost", "port": 0, "tls_cert": cert, "tls_key": key, "tls_client_ca": authority.file}
    )
    async with PlannerProcess(settings, tokens=Tokens(None, {})).running() as planner:
        url = planner.url + "/healthz"
        assert url.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(authority.file))
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await status(url, trusting)
        trusting.load_cert_chain(*authority.issue("seed"))
        assert await status(url, trusting) == 200
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await status(url, ssl.create_default_context())


async def test_a_certificate_that_is_replaced_on_disk_is_used_from_then_on(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("planner")
    settings = settings_from(
        {"host": "localhost", "port": 0, "tls_cert": cert, "tls_key": key, "sweep_every_sec": 0.05}
    )
    async with PlannerProcess(settings, tokens=Tokens(None, {})).running() as planner:
        (tmp_path / "later").mkdir()
        later = Authority(tmp_path / "later")
        new_cert, new_key = later.issue("planner")
        trusting = ssl.create_default_context(cafile=str(later.file))
        cert.write_bytes(new_cert.read_bytes())  # half a pair: the old one stays in use
        key.write_bytes(new_key.read_bytes())
        for _ in range(200):
            try:
                assert await status(planner.url + "/healthz", trusting) == 200
                break
            except aiohttp.ClientConnectorCertificateError:
                continue
        else:
            raise AssertionError("the new certificate was never used")


async def test_a_client_ca_that_is_exchanged_lets_its_clients_in(tmp_path: Path) -> None:
    authority, later = Authority(tmp_path / "first"), Authority(tmp_path / "later")
    cert, key = authority.issue("planner")
    asked_of_clients = tmp_path / "clients.pem"
    asked_of_clients.write_bytes(authority.file.read_bytes())
    tls = ServerTls(cert, key, asked_of_clients)
    asked_of_clients.write_bytes(later.file.read_bytes())
    tls.refresh()
    subjects = {each["subject"][0][0][1] for each in tls.context.get_ca_certs()}
    assert subjects == {"test authority first", "test authority later"}
    assert tls.context.verify_mode is ssl.CERT_REQUIRED


def test_unusable_files_are_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("planner")
    for given, field in (
        ((key, cert, None), "tls_cert"),
        ((tmp_path / "none", key, None), "tls_cert"),
        ((cert, key, key), "tls_client_ca"),
        ((*authority.issue("locked", password=b"s3cret"), None), "tls_cert"),  # and nobody is asked at the terminal
    ):
        with pytest.raises(ConfigError, match=field):
            ServerTls(*given)


def test_the_terminals_commands_have_token_and_certificate_from_the_environment(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = map(str, authority.issue("planner"))
    token = tmp_path / "token"
    token.write_text("s3cret-of-the-fleet\n")
    flags = ("--tls-cert", cert, "--tls-key", key, "--tls-client-ca", str(authority.file), "--token-file", str(token))
    planner = PlannerUnderTest(*flags).until_ready()
    try:
        url = f"https://localhost:{planner.port}"
        own_cert, own_key = map(str, authority.issue("operator"))
        whole = {
            "RFORK_TOKEN": None,
            "RFORK_TOKEN_FILE": str(token),
            "RFORK_TLS_CA_FILE": str(authority.file),
            "RFORK_TLS_CERT_FILE": own_cert,
            "RFORK_TLS_KEY_FILE": own_key,
        }
        done = CliRunner().invoke(main, ["seeds", "--url", url, "--json"], env=whole)
        assert (done.exit_code, done.output.strip()) == (0, "[]")
        for missing, advice in (
            ("RFORK_TOKEN_FILE", "RFORK_TOKEN_FILE"),
            ("RFORK_TLS_CA_FILE", "rfork_tls_ca_file"),
            ("RFORK_TLS_KEY_FILE", "rfork_tls_cert_file"),
        ):
            done = CliRunner().invoke(main, ["seeds", "--url", url], env={**whole, missing: None})
            assert done.exit_code != 0
            assert advice in done.output
            assert "s3cret" not in done.output
    finally:
        planner.stop()
