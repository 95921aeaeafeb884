"""``vllm-rfork selftest --serve`` and ``--connect``, as two commands and in two network namespaces."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import psutil
import pytest
from click.testing import CliRunner

from tests.authority import Authority
from vllm_rfork.cli.main import main
from vllm_rfork.selftest import connecting as connecting_side
from vllm_rfork.selftest import offer
from vllm_rfork.selftest.attempts import Attempt
from vllm_rfork.selftest.offer import Host, Offer, Seed, UnusableOffer
from vllm_rfork.selftest.report import FAILED, GOOD, TOO_LATE, WRONG_BYTES
from vllm_rfork.selftest.roles import Published, Result

COMMAND = [sys.executable, "-m", "vllm_rfork.cli.main", "selftest"]
PATIENCE_S = 120.0


class Serving:
    """A serving command and its output."""

    def __init__(self, *arguments: str, before: Sequence[str] = (), token: str | None = None, **environ: str) -> None:
        env = {**os.environ, **environ, "PYTHONUNBUFFERED": "1"}
        env.pop("RFORK_TOKEN", None)
        if token is not None:
            env["RFORK_TOKEN"] = token
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [*before, *COMMAND, "--serve", *arguments],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def until(self, pattern: str) -> re.Match[str]:
        """The first match in a line of the output."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if match := re.search(pattern, line):
                return match
        pytest.fail(f"no {pattern!r} in {self.lines}")

    def invitation(self) -> tuple[dict[str, str], list[str]]:
        """Environment and arguments of the printed command."""
        printed = shlex.split(self.until(r"^  (.*--connect .*)$")[1])
        assignments = [each for each in printed if each.startswith("RFORK_TOKEN=")]
        return dict(each.split("=", 1) for each in assignments), printed[len(assignments) + 2 :]

    def end(self) -> int:
        """The exit status; all output has been read."""
        assert self.process.stdout is not None
        self.lines += self.process.stdout.readlines()
        return self.process.wait(PATIENCE_S)

    @property
    def output(self) -> str:
        return "".join(self.lines)


@contextlib.contextmanager
def serving(*arguments: str, before: Sequence[str] = (), token: str | None = None, **environ: str) -> Iterator[Serving]:
    started = Serving(*arguments, before=before, token=token, **environ)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            for process in psutil.Process(started.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            started.process.kill()
        with started.process:  # closes its output
            started.process.wait(PATIENCE_S)


def connecting(*arguments: str, before: Sequence[str] = (), **environ: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environ}
    return subprocess.run(
        [*before, *COMMAND, *arguments], env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


LOCAL = ("--engine", "memory", "--size", "1M", "--host", "127.0.0.1")


def test_the_printed_command_reads_right_bytes_and_once_ends_the_seed() -> None:
    with serving(*LOCAL, "--once") as seed:
        environ, command = seed.invitation()
        assert len(environ["RFORK_TOKEN"]) >= 32, "generated, because none was set"
        done = connecting(*command, **environ)
        assert done.returncode == GOOD, done.stderr
        assert "lane memory" in done.stdout
        assert "every digest is right" in done.stdout
        assert "of memcpy" in done.stdout
        assert seed.end() == GOOD
    assert "is done: the bytes are right over memory" in seed.output
    assert environ["RFORK_TOKEN"] not in done.stdout


def test_bytes_altered_on_the_serving_host_are_exit_1_on_both() -> None:
    with serving(*LOCAL, "--once", "--corrupt") as seed:
        environ, command = seed.invitation()
        done = connecting(*command, **environ)
        assert done.returncode == WRONG_BYTES, done.stdout + done.stderr
        assert seed.end() == WRONG_BYTES


def test_callers_without_the_token_get_nothing_and_clients_are_counted() -> None:
    with serving(*LOCAL, "--once", token="the-right-token") as seed:
        _, command = seed.invitation()
        address = command[command.index("--connect") + 1]
        assert "the-right-token" not in seed.output, "it was set, so the other host has it"
        for given in (None, "Bearer ", "Bearer the-wrong-token", "Basic the-right-token"):
            status, body = get(address, offer.OFFER, given)
            assert (status, b"endpoint" in body) == (401, False), given
        assert get(address, offer.DONE + "?client=x&code=0", None)[0] == 401
        done = connecting(*command, RFORK_TOKEN="the-wrong-token")
        assert done.returncode == FAILED
        assert "set RFORK_TOKEN" in done.stderr
        right = "Bearer the-right-token"
        status, body = get(address, offer.OFFER, right)
        assert status == 200
        assert get(address, offer.OFFER, right)[0] == 409, "one client at most"
        assert get(address, offer.DONE + "?client=another&code=0", right)[0] == 400
        assert get(address, f"{offer.DONE}?client={msgspec.json.decode(body)['client']}&code=77", right)[0] == 400
        assert get(address, "/other", right)[0] == 404


def get(address: str, path: str, authorization: str | None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request("GET", path, headers={} if authorization is None else {"Authorization": authorization})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_calls_use_tls_as_a_worker_s_do(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    certificate, key = authority.issue("seed", names=("127.0.0.1",))
    tls = {
        "RFORK_SEED_TLS": "require",
        "RFORK_TLS_CA_FILE": str(authority.file),
        "RFORK_TLS_CERT_FILE": str(certificate),
        "RFORK_TLS_KEY_FILE": str(key),
    }
    with serving(*LOCAL, "--once", **tls) as seed:
        environ, command = seed.invitation()
        assert "TLS" in seed.output
        in_plain = connecting(*command, **environ)
        assert (in_plain.returncode, "426" in in_plain.stderr) == (FAILED, True), in_plain.stderr
        done = connecting(*command, **environ, **tls)
        assert done.returncode == GOOD, done.stderr
        assert seed.end() == GOOD


def test_a_signal_ends_it_and_its_children() -> None:
    with serving(*LOCAL) as seed:
        seed.invitation()
        children = psutil.Process(seed.process.pid).children(recursive=True)
        assert children
        seed.process.send_signal(signal.SIGTERM)
        assert seed.end() == GOOD
        _, alive = psutil.wait_procs(children, timeout=20)
        assert alive == []
    assert "a signal arrived" in seed.output
    assert "Traceback" not in seed.output


def test_it_ends_by_itself_when_nobody_comes_and_an_engine_that_does_not_open_is_named() -> None:
    with serving(*LOCAL[2:], "--engine", "memory,yuanrong", "--timeout", "1", LD_LIBRARY_PATH="") as seed:
        began = time.monotonic()
        seed.invitation()
        assert seed.end() == TOO_LATE
        assert time.monotonic() - began < 60
    assert re.search(r"not serving yuanrong: .*set_env\.sh", seed.output)
    assert "the time is up" in seed.output


def test_a_seed_that_dies_is_named_and_the_others_are_offered() -> None:
    with serving(*LOCAL[2:], "--engine", "memory,nixl", "--once") as seed:
        environ, command = seed.invitation()
        children = psutil.Process(seed.process.pid).children()
        victim = min((each for each in children if "spawn_main" in str(each.cmdline())), key=lambda each: each.pid)
        victim.kill()
        seed.until("FAILED: memory: .*-9")
        done = connecting(*command, **environ)
        assert done.returncode == GOOD, done.stderr
        assert re.search(r"memory: on the serving host: the seed ended with status -9", done.stdout)
        assert "lane nixl/" in done.stdout
        assert seed.end() == FAILED, "a reader must not be able to end a seed"


def test_an_unreachable_host_and_an_unusable_address_are_errors_of_one_line() -> None:
    done = connecting("--connect", "127.0.0.1:1", RFORK_TOKEN="any")
    assert (done.returncode, "Traceback" in done.stderr) == (FAILED, False)
    assert "serving host http://127.0.0.1:1" in done.stderr
    for address in ("", "a b", "h:99999", "user@h", "h/path"):
        assert CliRunner().invoke(main, ["selftest", "--connect", address]).exit_code == 2, address


@pytest.mark.parametrize(
    "arguments",
    [
        ("--serve", "--connect", "h"),
        ("--port", "1"),
        ("--once",),
        ("--serve", "--all"),
        ("--connect", "h", "--seed-device", "cpu"),
        ("--engine", "nothing"),
        ("--engine", "cuda_ipc", "--device", "cpu"),
    ],
)
def test_options_that_would_be_ignored_are_wrong_usage(arguments: tuple[str, ...]) -> None:
    done = CliRunner().invoke(main, ["selftest", *arguments])
    assert done.exit_code == 2, done.output


# --- two network namespaces -----------------------------------------------------------------------------------------


@pytest.fixture
def two_hosts() -> Iterator[tuple[list[str], list[str]]]:
    """Commands that run another one in one of two network namespaces with a cable between; 10.77.0.1 and 10.77.0.2."""
    if shutil.which("ip") is None:
        pytest.fail("this test needs ip: install iproute2")
    names = [f"rfork{secrets.token_hex(3)}{each}" for each in "ab"]
    cables = [f"v{name[5:]}" for name in names]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cables[0], "netns", names[0], "type", "veth", "peer", "name", cables[1], "netns", names[1])
        for number, (name, cable) in enumerate(zip(names, cables, strict=True), start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield ["ip", "netns", "exec", names[0]], ["ip", "netns", "exec", names[1]]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"this test makes network namespaces, which needs root: ip {' '.join(arguments)}: {done.stderr}")


def test_two_network_namespaces_use_the_first_lane_that_leads_from_one_to_the_other(
    two_hosts: tuple[list[str], list[str]],
) -> None:
    """The boot id is the same on both sides, so the other pid namespace is what refuses the lanes of one host."""
    here, there = two_hosts
    engines = ("--engine", "nixl,memory,collective", "--size", "1M", "--once")
    with serving(*engines, before=here, VLLM_HOST_IP="10.77.0.1") as seed:
        environ, command = seed.invitation()
        assert command[1] == "10.77.0.1:1224", command
        container = [*there, "unshare", "--pid", "--fork", "--kill-child"]
        done = connecting(*command, before=container, **environ)
        assert done.returncode == GOOD, done.stdout + done.stderr
        assert "lane collective/tcp" in done.stdout
        preferred = done.stdout.partition("preferred, but not possible:")[2]
        assert re.search(r"nixl: .*another pid namespace.*RFORK_NIXL_ALLOW_TCP=1", preferred)
        assert re.search(r"memory: .*No such process", preferred)
        assert seed.end() == GOOD
    assert "10.77.0.2 is done: the bytes are right over collective/tcp" in seed.output


# --- offers of a host that lies -------------------------------------------------------------------------------------


def an_offer(*buffers: tuple[int, int, str], version: int = offer.VERSION, engines: int = 1) -> bytes:
    seeds = [Seed(f"e{number}", Published("an endpoint", list(buffers))) for number in range(engines)]
    return msgspec.json.encode(Offer(version, "client", "cpu", Host("boot", None), seeds))


def test_a_usable_offer_is_read() -> None:
    read = offer.decode(an_offer((4096, 100, "digest"), (8192, 100, "digest")), 200)
    assert read.seeds[0].published is not None
    assert read.seeds[0].published.nbytes == 200


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "malformed"),
        (b"[" * 100_000, "malformed"),
        (b'{"v":1}', "malformed"),
        (an_offer((4096, 100, "digest"), version=9), "version 9"),
        (an_offer((4096, 101, "digest")), "--size"),
        (an_offer((4096, -1, "digest"), (1, 50, "")), "-1 bytes"),
        (an_offer((0, 1, "digest")), "address 0"),
        (an_offer((1 << 63, 1, "digest")), "address"),
        (an_offer(engines=17), "17 engines"),
    ],
)
def test_an_offer_that_lies_is_refused_before_memory_is_taken(body: bytes, reason: str) -> None:
    with pytest.raises(UnusableOffer, match=reason):
        offer.decode(body, 100)


@pytest.mark.parametrize(
    ("boot", "obstacle", "lane", "hint"),
    [
        (
            "another",
            "no port is active",
            "collective/tcp",
            "this host: none here; the serving host: no port is active",
        ),
        ("another", None, "collective/tcp", "this host: none here"),
        ("another", None, "nixl/rdma", None),
        ("this", None, "collective/tcp", None),
    ],
)
def test_rdma_is_named_between_hosts_that_read_without_it(
    boot: str, obstacle: str | None, lane: str, hint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Host, "here", classmethod(lambda _: Host("this", "none here")))
    found = Offer(offer.VERSION, "client", "cpu", Host(boot, obstacle), [])
    attempt = Attempt("e", "right", result=Result(lane, [], 1, 100, {}))
    assert connecting_side._hints(found, [attempt]) == ([] if hint is None else [f"RDMA; {hint}"])


def test_iproute2_is_installed_by_ci() -> None:
    script = Path(__file__).resolve().parents[2] / ".ci" / "run"
    assert "need_command ip iproute2" in script.read_text(encoding="utf-8")
