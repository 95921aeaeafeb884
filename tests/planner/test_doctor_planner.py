"""``vllm-rfork doctor --role planner``: what a planner with this environment would find at its start."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.authority import Authority
from tests.planner.processes import PlannerUnderTest
from tests.planner.redis_server import RedisServer, free_port
from vllm_rfork.cli import doctor_planner
from vllm_rfork.cli.main import main
from vllm_rfork.planner.settings import ENVIRONMENT_PREFIX


def doctor(*flags: str, token: str | None = None, **variables: str) -> Result:
    env: dict[str, str | None] = dict.fromkeys(("RFORK_SCHEDULER_URL", "RFORK_TOKEN_PREVIOUS"))
    env |= {"RFORK_TOKEN": token, "RFORK_PLANNER_PORT": str(free_port())}
    env |= {ENVIRONMENT_PREFIX + name: value for name, value in variables.items()}
    return CliRunner().invoke(main, ["doctor", "--role", "planner", "--json", *flags], env=env)


def found(done: Result) -> dict[str, tuple[str, str]]:
    return {each["check"]: (each["state"], each["found"]) for each in json.loads(done.stdout)}


def test_a_planner_of_one_replica_needs_nothing() -> None:
    done = doctor()
    assert done.exit_code == 0, done.output
    states = {name: state for name, (state, _) in found(done).items()}
    assert states == {"planner settings": "ok", "token": "note", "TLS files": "note", "store": "ok", "port": "ok"}


def test_wrong_settings_are_the_only_finding() -> None:
    done = doctor(SLOTS="many")
    assert done.exit_code == 1
    (finding,) = found(done).values()
    assert "RFORK_PLANNER_SLOTS" in finding[1]
    assert "RFORK_PLANNER_SLOTZ" in found(doctor(SLOTZ="1"))["planner settings"][1]


def test_a_token_is_counted_and_never_printed(tmp_path: Path) -> None:
    done = doctor(token="hunter2")
    assert found(done)["token"] == ("ok", "1 token")
    assert "hunter2" not in done.output
    missing = doctor(TOKEN_FILE=str(tmp_path / "none"))
    assert (missing.exit_code, found(missing)["token"][0]) == (1, "fail")


def test_tls_files_are_loaded(tmp_path: Path) -> None:
    cert, key = Authority(tmp_path / "a").issue("planner")
    assert found(doctor(TLS_CERT=str(cert), TLS_KEY=str(key)))["TLS files"][0] == "ok"
    _, other = Authority(tmp_path / "b").issue("planner")
    done = doctor(TLS_CERT=str(cert), TLS_KEY=str(other))
    assert (done.exit_code, found(done)["TLS files"][0]) == (1, "fail")


def test_redis_must_answer(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(doctor(STORE=redis_server.url))["store"] == ("ok", "Redis answers")
    monkeypatch.setattr(doctor_planner, "_STORE_S", 1.0)
    done = doctor(STORE=f"redis://:hunter2@127.0.0.1:{free_port()}/0")
    assert (done.exit_code, found(done)["store"][0]) == (1, "fail")
    assert "hunter2" not in done.output
    assert found(doctor(STORE="redis://127.0.0.1/no-number"))["store"][0] == "fail"


def test_a_port_in_use_is_a_failure_unless_a_planner_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        done = doctor(PORT=str(other.getsockname()[1]))
    assert (done.exit_code, found(done)["port"][0]) == (1, "fail")
    running = PlannerUnderTest().until_ready()
    try:
        done = doctor("--url", running.url, PORT=str(running.port))
        assert found(done)["port"] == ("ok", f"a planner listens on 127.0.0.1:{running.port} already")
        assert found(done)["planner ready"][0] == "ok"
    finally:
        running.kill()


def test_a_program_on_the_port_gets_no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str | None] = []

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Authorization"])
            self.send_error(404)

    monkeypatch.setenv("RFORK_TOKEN_FILE", str(tmp_path / "none"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever).start()
        unreadable = doctor(PORT=str(server.server_port))
        monkeypatch.delenv("RFORK_TOKEN_FILE")
        doctor(token="hunter2", PORT=str(server.server_port))
        server.shutdown()
    assert (unreadable.exit_code, found(unreadable)["port"][0]) == (1, "fail")
    assert asked == [None, None]


def test_a_planner_has_no_engine() -> None:
    assert doctor("--engine", "nixl").exit_code == 2
