"""``vllm-rfork seeds | leases | key | doctor`` against a planner process as users start it."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from multidict import CIMultiDict, CIMultiDictProxy

from tests.planner.processes import PlannerUnderTest
from tests.planner.redis_server import free_port
from tests.standin import build
from vllm_rfork.cli import doctor_checks, doctor_engines
from vllm_rfork.cli.doctor_engines import Examined
from vllm_rfork.cli.findings import FAIL, NOTE, OK, Finding
from vllm_rfork.cli.main import main
from vllm_rfork.engines.registry import DEFAULT_ENGINE, engine_names
from vllm_rfork.messages import encode_text
from vllm_rfork.net.client import Answer
from vllm_rfork.planner.settings import Settings

TOKEN = "a-token-that-no-output-may-hold"
KEY = "/models/q$prod$kv_both$0$0"


@pytest.fixture(scope="module")
def standin() -> Path:
    """The folder with the host stand-in for the Ascend runtime."""
    return build.build()


@pytest.fixture(scope="module")
def planner() -> Iterator[PlannerUnderTest]:
    """Two seeds under two keys, one of them leased."""
    process = PlannerUnderTest(RFORK_TOKEN=TOKEN).until_ready()
    try:
        add(process, KEY, 5000, RFORK_LABELS="host=a,rack=b")
        add(process, "Ünï[bold]\x1b[2J", 5001)
        ask_planner(process, "GET", "/get_seed", SEED_KEY=KEY)
        yield process
    finally:
        process.kill()


def add(planner: PlannerUnderTest, key: str, port: int, **more: str) -> None:
    seed = {"SEED_IP": "127.0.0.1", "SEED_PORT": str(port), "SEED_RANK": "0", "SEED_REFCNT": "0"}
    ask_planner(planner, "POST", "/add_seed", SEED_KEY=encode_text(key), **seed, **more)


def ask_planner(planner: PlannerUnderTest, method: str, path: str, **headers: str) -> None:
    sent = {name.replace("RFORK_", "RFORK-"): value for name, value in headers.items()}
    request = urllib.request.Request(
        planner.url + path, method=method, headers={**sent, "Authorization": f"Bearer {TOKEN}"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.status == 200


def run(*arguments: str, token: str | None = TOKEN, **environ: str) -> Result:
    env = {"RFORK_TOKEN": token, "RFORK_SCHEDULER_URL": None, **environ}
    return CliRunner().invoke(main, list(arguments), env=env)


def test_seeds_are_listed_with_their_leases(planner: PlannerUnderTest) -> None:
    done = run("seeds", "--url", planner.url)
    assert done.exit_code == 0, done.output
    row = next(line for line in done.output.splitlines() if KEY in line)
    assert "127.0.0.1:5000:0" in row
    assert "1 of 4" in row
    assert "host=a rack=b" in row
    assert "127.0.0.1:5001:0" in done.output


def test_what_others_announce_cannot_steer_the_terminal(planner: PlannerUnderTest) -> None:
    done = run("seeds", "--url", planner.url)
    assert "Ünï[bold]�[2J" in done.output
    assert "\x1b" not in done.output
    as_json = run("seeds", "--url", planner.url, "--json")
    assert as_json.output.isascii()
    assert as_json.output.replace("\n", "").isprintable()
    assert any("\x1b" in each["key"] for each in json.loads(as_json.output))


def test_one_key_can_be_chosen_and_the_address_may_stand_in_the_environment(planner: PlannerUnderTest) -> None:
    done = run("seeds", "--key", KEY, "--json", RFORK_SCHEDULER_URL=planner.url + "/")
    assert [each["port"] for each in json.loads(done.output)] == [5000]


def test_leases_say_who_reads_from_whom_and_hold_no_usable_id(planner: PlannerUnderTest) -> None:
    done = run("leases", "--url", planner.url)
    assert done.exit_code == 0, done.output
    row = next(line for line in done.output.splitlines() if KEY in line)
    assert "127.0.0.1:5000:0" in row
    found = json.loads(run("leases", "--url", planner.url, "--json").output)
    assert set(found) == {"leases", "waiting", "intents"}
    assert [each["lease"].endswith("…") and len(each["lease"]) < 8 for each in found["leases"]] == [True]


def test_tables_in_a_pipe_are_ascii_and_count_in_words(planner: PlannerUnderTest) -> None:
    for command, title in (("seeds", "1 seed"), ("leases", "1 lease")):
        output = run(command, "--url", planner.url, "--key", KEY).output
        assert title in [line.strip() for line in output.splitlines()]
        assert not re.findall("[\u2500-\u257f]", output), "box-drawing characters"


@pytest.mark.parametrize("command", ["seeds", "leases"])
def test_a_planner_that_demands_a_token_is_told_apart(planner: PlannerUnderTest, command: str) -> None:
    for token in (None, "wrong-token-that-no-output-may-hold"):
        done = run(command, "--url", planner.url, token=token)
        assert done.exit_code == 1
        assert "RFORK_TOKEN" in done.output
        assert "no-output-may-hold" not in done.output


@pytest.mark.parametrize("body", [b"[]", b"<html>", b'{"a":' * 100_000, b'{"a": "\xff"}', b'{"seeds": 1}'])
def test_a_snapshot_that_cannot_be_read_is_an_error_without_traceback(body: bytes) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = run("seeds", "--url", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit), done.exception
    assert "JSON object" in done.output or "third-party" in done.output


@pytest.mark.parametrize("command", ["seeds", "leases"])
def test_no_address_and_no_planner_are_said(command: str) -> None:
    done = run(command)
    assert done.exit_code == 2
    assert "RFORK_SCHEDULER_URL" in done.output
    done = run(command, "--url", f"http://user:secret@127.0.0.1:{free_port()}")
    assert done.exit_code == 1
    assert "127.0.0.1" in done.output
    assert "secret" not in done.output


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["/models/q", "prod"], KEY),
        (
            [
                "/models/dsv4",
                "decode",
                "--kv-mode",
                "kv_consumer",
                "--pp-rank",
                "1",
                "--tp-rank",
                "3",
                "--ep-rank",
                "5",
                "--draft",
            ],
            "/models/dsv4$decode$kv_consumer$0$pp1$3$ep5$draft",
        ),
        (["q", "p", "--separator", "@@", "--node-rank", "2"], "q@@p@@kv_both@@2@@0"),
    ],
)
def test_a_key_is_put_together_as_workers_do(arguments: list[str], key: str) -> None:
    assert run("key", *arguments).output == key + "\n"
    assert json.loads(run("key", *arguments, "--json").output) == {"key": key, "SEED_KEY": key}


def test_a_keys_form_on_the_wire_is_shown_and_what_no_planner_takes_is_refused() -> None:
    found = json.loads(run("key", "café", "p", "--json", RFORK_SEED_KEY_SEPARATOR="$").output)
    assert found["SEED_KEY"].startswith("UTF-8''caf%C3%A9")
    assert run("key", "q" * 3000, "p").exit_code == 1
    assert run("key", "q", "p", "--separator", "").exit_code == 2


def states(done: Result) -> dict[str, str]:
    return {each["check"]: each["state"] for each in json.loads(done.output)}


def test_the_doctor_finds_this_machine_and_planner_well(planner: PlannerUnderTest) -> None:
    done = run("doctor", "--url", planner.url, "--json")
    found = states(done)
    assert done.exit_code == 0, done.output
    # Reasons against a lane depend on the machine's RDMA.
    assert [name for name in found if not name.endswith(": nixl")] == [
        "planner",
        "planner ready",
        "planner token",
        *(f"engine {name}" for name in engine_names() if name != "memory"),
        "cross-memory attach",
        "libunwind8",
        "NVIDIA GPUs",
        "Ascend NPUs",
        "RDMA",
        "memlock",
        "namespaces",
        "ptrace scope",
        "allocator",
        "variables",
        "lane cpu, peer in this container",
        "lane cpu, peer in another container of this host",
        "lane cpu, peer on another host",
    ]
    assert [found[name] for name in ("planner", "planner ready", "planner token", "engine nixl")] == ["ok"] * 4


def test_the_doctor_says_what_to_do_about_a_planner_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    only_the_planner(monkeypatch)
    done = run("doctor", "--url", f"http://127.0.0.1:{free_port()}", "--json")
    assert done.exit_code == 1
    first = json.loads(done.output)[0]
    assert (first["check"], first["state"]) == ("planner", "fail")
    assert "vllm-rfork planner" in first["advice"]


def test_every_command_uses_the_replica_that_answers(planner: PlannerUnderTest) -> None:
    urls = f"http://127.0.0.1:{free_port()},{planner.url}"
    assert KEY in run("seeds", "--url", urls).output
    assert KEY in run("leases", RFORK_SCHEDULER_URL=urls).output


def test_the_doctor_reports_each_replica(planner: PlannerUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    only_the_planner(monkeypatch)
    dead = f"http://127.0.0.1:{free_port()}"
    done = run("doctor", "--url", f"{dead},{planner.url}", "--json")
    found = states(done)
    assert done.exit_code == 1
    assert [found[f"planner {dead}"], found[f"planner {planner.url}"], found[f"planner ready {planner.url}"]] == [
        "fail",
        "ok",
        "ok",
    ]


@pytest.mark.parametrize(("leader", "state"), [("http://b", "ok"), ("nobody", "fail")])
def test_a_replica_that_stands_by_is_well_only_beside_a_leader(
    leader: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_the_planner(monkeypatch)

    def ask(url: str, path: str, **_: object) -> Answer:
        leads = url == leader or path == "/healthz"
        return Answer(200 if leads else 503, CIMultiDictProxy(CIMultiDict()), b"another replica leads", url)

    monkeypatch.setattr(doctor_checks, "ask", ask)
    found = states(run("doctor", "--url", "http://a,http://b", "--json", VLLM_HOST_IP=""))
    assert found["planner ready http://a"] == state


def test_the_doctor_says_that_the_token_is_wrong(planner: PlannerUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    only_the_planner(monkeypatch)
    done = run("doctor", "--url", planner.url, token="wrong-token")
    assert done.exit_code == 1
    assert "RFORK_TOKEN" in done.output
    assert "wrong-token" not in done.output


@pytest.mark.parametrize("token", [TOKEN, None])
def test_the_doctor_finds_an_address_that_the_planner_does_not_let_this_host_announce(
    token: str | None, planner: PlannerUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``VLLM_HOST_IP`` of the data network, and a planner on the management network."""
    only_the_planner(monkeypatch)
    tokenless = PlannerUnderTest().until_ready()
    try:
        url = planner.url if token else tokenless.url
        assert "announced address" not in states(run("doctor", "--url", url, "--json", token=token, VLLM_HOST_IP=""))
        done = run("doctor", "--url", url, "--json", token=token, VLLM_HOST_IP="10.9.9.9")
        (found,) = [each for each in json.loads(done.output) if each["check"] == "announced address"]
        if token:
            assert found["state"] == "ok"
        else:
            assert (found["state"], done.exit_code) == ("fail", 1)
            for part in ("VLLM_HOST_IP", "10.9.9.9", "127.0.0.1"):
                assert part in found["found"]
            for part in ("token", "rfork_seed_advertise_host"):
                assert part in found["advice"]
        done = run("doctor", "--url", url, "--json", token=token, VLLM_HOST_IP="0.0.0.0")
        assert states(done)["announced address"] == "note"
    finally:
        tokenless.kill()


def only_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the slower checks out."""
    well = Finding("as if", OK, "")
    monkeypatch.setattr(doctor_engines, "engine", lambda name, **_: Examined(well, []))
    monkeypatch.setattr(doctor_checks, "cross_memory_attach", lambda: well)


def test_an_engine_that_is_not_installed_fails_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    hide = "import sys; sys.modules['yr'] = None"
    monkeypatch.setattr(doctor_engines, "_EXAMINE", f"{hide}\n{doctor_engines._EXAMINE}")
    found = doctor_engines.engine("yuanrong", wanted=True).finding
    assert found.state == FAIL
    assert "vllm-rfork[ascend]" in found.advice
    assert doctor_engines.engine("yuanrong", wanted=False).finding.state == NOTE


def test_an_engine_outside_auto_is_recommended_only_for_being_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hide = "import sys; sys.modules['mooncake'] = None"
    monkeypatch.setattr(doctor_engines, "_EXAMINE", f"{hide}\n{doctor_engines._EXAMINE}")
    assert "only if rfork_engine is to name it" in doctor_engines.engine("mooncake", wanted=False).finding.advice
    assert doctor_engines.engine("mooncake", wanted=True).finding.advice.startswith("install one of its wheels")


def test_yuanrong_without_the_ascend_runtime_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel imports without CANN, and every read would fail."""
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    found = doctor_engines.engine("yuanrong", wanted=True).finding
    assert found.state == FAIL
    assert "libascendcl.so" in found.found
    assert "set_env.sh" in found.advice


def test_yuanrong_with_a_runtime_is_found_working(standin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(standin))
    found = doctor_engines.engine("yuanrong", wanted=True).finding
    assert (found.state, found.advice) == (OK, "")
    assert "stand-in" in found.found


def test_a_planners_host_needs_no_engine(monkeypatch: pytest.MonkeyPatch, planner: PlannerUnderTest) -> None:
    absent = Finding("engine", NOTE, "not installed", "install it")
    monkeypatch.setattr(doctor_engines, "engine", lambda name, **_: Examined(absent, []))
    monkeypatch.setattr(doctor_checks, "is_worker_host", lambda: False)
    done = run("doctor", "--url", planner.url)
    assert done.exit_code == 0, done.output
    assert "planner's host" in done.output
    monkeypatch.setattr(doctor_checks, "is_worker_host", lambda: True)
    assert run("doctor", "--url", planner.url).exit_code == 1


def test_vllm_is_installed_here() -> None:
    assert doctor_checks.is_worker_host()


@pytest.mark.parametrize(
    ("status", "third_party"), [(503, False), (500, False), (429, False), (404, True), (405, True)]
)
def test_only_a_missing_call_tells_of_a_third_party_planner(status: int, third_party: bool) -> None:
    found = doctor_checks._admission(status)
    assert found.state == NOTE
    assert str(status) in found.found
    assert ("third-party" in found.advice) == third_party
    assert ("log" in found.advice) != third_party


@pytest.mark.parametrize("url", ["http://h:99999", "ftp://h", "http://a..b"])
def test_an_unusable_url_is_told_by_every_command(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only_the_planner(monkeypatch)
    done = run("doctor", "--url", url)
    assert (done.exit_code, "unusable URL" in done.output) == (1, True)
    done = run("seeds", "--url", url)
    assert (done.exit_code, "unusable" in done.output) == (2, True)


def test_an_engine_whose_start_crashes_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_engines, "_EXAMINE", "import os; os.kill(os.getpid(), 11)")
    found = doctor_engines.engine("nixl", wanted=False).finding
    assert found.state == FAIL
    assert "signal 11" in found.found


def test_an_engine_that_does_not_work_is_a_finding_with_its_package_and_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = (
        "from vllm_rfork.engines.nixl import engine\n"
        "from vllm_rfork.errors import EngineError\n"
        "def agent(*_, **__): raise EngineError('nixl', 'open', 'no network')\n"
        "engine.Agent = agent\n"
    )
    monkeypatch.setattr(doctor_engines, "_EXAMINE", refuse + doctor_engines._EXAMINE)
    found = doctor_engines.engine("nixl", wanted=False).finding
    assert found.state == NOTE
    assert found.found.startswith("open failed: no network (nixl")
    assert "selftest --engine nixl" in found.advice


def test_engines_are_examined_without_torch(standin: Path) -> None:
    """And so the doctor works on a host that has none."""
    code = "import sys; sys.modules['torch'] = None"
    for name in dict.fromkeys(DEFAULT_ENGINE.values()):
        done = subprocess.run(
            [sys.executable, "-c", f"{code}\n{doctor_engines._EXAMINE}", name],
            env={**os.environ, "LD_LIBRARY_PATH": str(standin)},
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, (name, done.stderr)


def test_a_library_that_is_missing_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "UNWIND", "libthere-is-none.so.9")
    assert doctor_checks.libunwind(wanted=True).state == FAIL
    found = doctor_checks.libunwind(wanted=False)
    assert found.state == NOTE
    assert "libunwind8" in found.advice


def test_memory_that_cannot_be_read_is_a_finding_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_checks.cross_memory_attach().state == OK
    monkeypatch.setattr(doctor_checks, "_HOLDER", doctor_checks._HOLDER.replace("ctypes.addressof(secret)", "4096"))
    found = doctor_checks.cross_memory_attach()
    assert found.state == NOTE
    assert "Bad address" in found.found
    assert "pid namespace" in found.advice


def test_the_documented_port_is_the_planners() -> None:
    assert f":{Settings().port}" in run("seeds").output
    assert Path(doctor_checks.__file__).read_text(encoding="utf-8").count(f"host:{Settings().port}") >= 1
