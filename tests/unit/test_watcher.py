"""The watcher: real workers, killed in every way that vLLM and its surroundings know, and a real HTTP planner."""

from __future__ import annotations

import base64
import contextlib
import gc
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from vllm_rfork import watch_main, watcher
from vllm_rfork.errors import SeedError
from vllm_rfork.messages import SeedAddress
from vllm_rfork.watcher import Watcher

KEY = "/models/q$prod$kv_both$0$0"
SEED = SeedAddress("10.0.0.1", 7001, 0)
DRAFT = SeedAddress("10.0.0.1", 7002, 0)
TOKEN = "s3cret-token"
WITHIN_S = 15.0


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, f"it never came true: {what}"
        time.sleep(0.01)


class Planner(http.server.ThreadingHTTPServer):
    """Records every request; answers with ``statuses`` in turn, the last one for ever; None answers nothing."""

    daemon_threads = True

    def __init__(self, *statuses: int | None) -> None:
        self.statuses = list(statuses) or [200]
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def withdrawn(self) -> set[str]:
        return {f"{headers['SEED_IP']}:{headers['SEED_PORT']}:{headers['SEED_RANK']}" for _, _, headers in self.seen}

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        super().__exit__(*args)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        planner = cast(Planner, self.server)
        with planner.lock:
            planner.seen.append((self.command, self.path, dict(self.headers)))
            status = planner.statuses.pop(0) if len(planner.statuses) > 1 else planner.statuses[0]
        if status is None:
            time.sleep(3600)
        self.send_response(status or 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        return


WORKER = """
    import json, os, signal, subprocess, sys
    from pathlib import Path
    from vllm_rfork import watcher
    from vllm_rfork.messages import SeedAddress
    options = json.loads(sys.stdin.readline())
    if options.get("main"):
        watcher._MAIN = Path(options["main"])
    watch = watcher.Watcher.start(options["url"], options.get("token"), 10.0, pauses_s=options.get("pauses_s", [0.1]))
    for host, port, rank in options["seeds"]:
        watch.watch(options["key"], SeedAddress(host, port, rank))
    if options["mode"] == "forget":
        watch.forget(options["key"], SeedAddress(*options["seeds"][0]))
    said = {"watcher": watch.pid, "children": []}
    if options["mode"] in ("fork", "fork inherits"):
        if options["mode"] == "fork inherits":
            os.dup(watch._process.orders_fd)
        child = os.fork()
        if child == 0:
            signal.pause()
        said["children"].append(child)
    if options["mode"] == "exec":
        said["children"].append(subprocess.Popen(["sleep", "3600"]).pid)
    print(json.dumps(said), flush=True)
    if options["mode"] == "returns":
        sys.exit(0)
    if options["mode"] == "closes":
        watch.close()
        sys.exit(0)
    signal.pause()
"""


class WorkerProcess:
    """A worker with a watcher and two seeds, in a session of its own."""

    def __init__(self, url: str, mode: str = "waits", **options: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        seeds = [[SEED.host, SEED.port, SEED.rank], [DRAFT.host, DRAFT.port, DRAFT.rank]]
        order = {"url": url, "mode": mode, "key": KEY, "seeds": seeds, **options}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        said = json.loads(self.process.stdout.readline())
        self.watcher: int = said["watcher"]
        self.children: list[int] = said["children"]
        self.pid = self.process.pid

    def end(self) -> None:
        for pid in [self.pid, *self.children, self.watcher]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@contextlib.contextmanager
def working(url: str, mode: str = "waits", **options: Any) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(url, mode, **options)
    try:
        yield worker
    finally:
        worker.end()


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- the worker's death ----------------------------------------------------------------------------------------------


def kill_9(worker: WorkerProcess) -> None:
    os.kill(worker.pid, signal.SIGKILL)


def kill_9_of_the_group(worker: WorkerProcess) -> None:
    os.killpg(worker.pid, signal.SIGKILL)


def term_to_the_group(worker: WorkerProcess) -> None:
    os.killpg(worker.pid, signal.SIGTERM)


def kill_9_of_the_tree(worker: WorkerProcess) -> None:
    """What vLLM does to its engine core and workers, several times over."""
    root = psutil.Process(worker.pid)
    for process in [*root.children(recursive=True), root]:
        process.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in root.children(recursive=True):
            process.kill()


def signals_to_everything_then_kill(worker: WorkerProcess) -> None:
    """As an init process does that passes signals on to all."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(worker.watcher, number)
    os.kill(worker.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "death",
    [kill_9, kill_9_of_the_group, term_to_the_group, kill_9_of_the_tree, signals_to_everything_then_kill],
)
def test_every_seed_is_withdrawn_when_the_worker_dies_and_the_watcher_ends(
    death: Callable[[WorkerProcess], None],
) -> None:
    with Planner() as planner, working(planner.url, token=TOKEN) as worker:
        assert planner.seen == []
        death(worker)
        until(lambda: planner.withdrawn() == {str(SEED), str(DRAFT)}, "both seeds are withdrawn")
        until(lambda: not alive(worker.watcher), "the watcher ends")
        for method, path, headers in planner.seen:
            assert (method, path, headers["SEED_KEY"]) == ("POST", "/remove_seed", KEY)
            assert headers["Authorization"] == f"Bearer {TOKEN}"
            assert headers["Host"] == planner.url.removeprefix("http://")


def test_a_worker_that_ends_without_a_word_is_withdrawn_too() -> None:
    with Planner() as planner, working(planner.url, "returns"):
        until(lambda: planner.withdrawn() == {str(SEED), str(DRAFT)}, "both seeds are withdrawn")


@pytest.mark.parametrize("mode", ["fork", "exec"])
def test_children_of_the_worker_do_not_hold_its_pipe(mode: str, no_pidfd: Path) -> None:
    with Planner() as planner, working(planner.url, mode, main=str(no_pidfd)) as worker:
        (child,) = worker.children
        orders = os.readlink(f"/proc/{worker.watcher}/fd/0")
        until(lambda: orders not in links(child), "the child has let go of the pipe")
        os.kill(worker.pid, signal.SIGKILL)
        until(lambda: planner.withdrawn() == {str(SEED), str(DRAFT)}, "both seeds are withdrawn")
        assert alive(child)


def test_a_child_that_holds_the_pipe_does_not_hide_the_workers_death() -> None:
    with Planner() as planner, working(planner.url, "fork inherits") as worker:
        (child,) = worker.children
        assert os.readlink(f"/proc/{worker.watcher}/fd/0") in links(child)
        os.kill(worker.pid, signal.SIGKILL)
        until(lambda: planner.withdrawn() == {str(SEED), str(DRAFT)}, "both seeds are withdrawn")
        assert alive(child)


def test_nor_does_it_where_the_kernel_has_no_pidfd(no_pidfd: Path) -> None:
    with Planner() as planner, working(planner.url, "fork inherits", main=str(no_pidfd)) as worker:
        time.sleep(3 * watch_main.POLL_S)  # it looks, and sees a worker that lives
        assert planner.seen == []
        os.kill(worker.pid, signal.SIGKILL)  # and stays a zombie: its parent, this test, has not waited for it
        until(lambda: planner.withdrawn() == {str(SEED), str(DRAFT)}, "both seeds are withdrawn")


def test_another_process_under_the_workers_number_is_not_the_worker() -> None:
    worker = watch_main.Worker(os.getpid())
    try:
        assert not worker.gone()
        worker._begun = "1"
        assert worker.gone()
    finally:
        os.close(worker.pidfd)
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
        assert watch_main.Worker(ended.pid).gone()


@pytest.fixture
def no_pidfd(tmp_path: Path) -> Path:
    main = tmp_path / "watch_main.py"
    source = Path(watch_main.__file__).read_text()
    main.write_text(source.replace("import contextlib\n", "import os\ndel os.pidfd_open\nimport contextlib\n", 1))
    return main


def links(pid: int) -> set[str]:
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(fd))
    return found


# --- the planner at that moment --------------------------------------------------------------------------------------


def test_a_withdrawal_is_sent_twice_since_a_beat_may_still_be_under_way() -> None:
    with Planner() as planner, working(planner.url) as worker:
        kill_9(worker)
        until(lambda: not alive(worker.watcher), "the watcher ends")
        assert len(planner.seen) == 4


@pytest.mark.parametrize("status", [404, 405, 409])
def test_a_planner_that_knows_nothing_or_lets_the_seed_drain_is_not_bothered_again(status: int) -> None:
    with Planner(status) as planner, working(planner.url) as worker:
        kill_9(worker)
        until(lambda: not alive(worker.watcher), "the watcher ends")
        assert len(planner.seen) == 4


@pytest.mark.parametrize("status", [401, 403, 302])
def test_a_planner_that_refuses_is_asked_once(status: int) -> None:
    with Planner(status) as planner, working(planner.url) as worker:
        kill_9(worker)
        until(lambda: not alive(worker.watcher), "the watcher ends")
        assert len(planner.seen) == 2


def test_a_planner_that_is_overloaded_is_asked_again_until_it_answers() -> None:
    with Planner(503, 429, 408, 500, 200) as planner:
        with working(planner.url, pauses_s=[0.01] * 5) as worker:
            kill_9(worker)
            until(lambda: not alive(worker.watcher), "the watcher ends")
        assert planner.withdrawn() == {str(SEED), str(DRAFT)}
        assert len(planner.seen) >= 8


def test_a_planner_that_is_down_is_asked_a_few_times_and_no_more() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        accepted: list[socket.socket] = []
        thread = threading.Thread(target=accept_and_reset, args=(sock, accepted), daemon=True)
        thread.start()
        with working(f"http://127.0.0.1:{sock.getsockname()[1]}", pauses_s=[0.01] * 3) as worker:
            kill_9(worker)
            until(lambda: not alive(worker.watcher), "the watcher ends")
        assert len(accepted) == 2 * 4


def accept_and_reset(listener: socket.socket, accepted: list[socket.socket]) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            accepted.append(connection)
            connection.close()


def test_a_planner_that_comes_back_is_told() -> None:
    with Planner() as planner:
        url = planner.url
        planner.shutdown()
        planner.server_close()
        with working(url, pauses_s=[0.1] * 100) as worker:
            kill_9(worker)
            with socket.socket() as sock:
                until(lambda: sock.connect_ex(planner.server_address) != 0, "nobody listens")
            back = Planner.__new__(Planner)
            back.statuses, back.seen, back.lock = [200], [], threading.Lock()
            http.server.ThreadingHTTPServer.__init__(back, cast(Any, planner.server_address), _Handler)
            threading.Thread(target=back.serve_forever, args=(0.01,), daemon=True).start()
            with back:
                until(lambda: back.withdrawn() == {str(SEED), str(DRAFT)}, "both seeds are withdrawn")


def test_a_planner_that_hangs_does_not_keep_the_watcher(tmp_path: Path) -> None:
    main = tmp_path / "watch_main.py"
    main.write_text(Path(watch_main.__file__).read_text().replace("LONGEST_S = 60.0", "LONGEST_S = 0.5"))
    with Planner(None) as planner, working(planner.url, main=str(main)) as worker:
        kill_9(worker)
        until(lambda: planner.withdrawn() == {str(SEED), str(DRAFT)}, "it tries")
        until(lambda: not alive(worker.watcher), "the watcher ends")


def test_each_attempt_is_bounded() -> None:
    with Planner(None) as planner:
        order = watcher._Planner.parse(planner.url, None).order(KEY, SEED, "")
        with pytest.raises(OSError, match="timed out"):
            watch_main.post(order["host"], order["port"], False, order["requests"][0], 0.2)


def test_an_answer_that_trickles_is_bounded_as_a_whole() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def trickle() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                while True:
                    connection.sendall(b"H")
                    time.sleep(0.05)

        threading.Thread(target=trickle, daemon=True).start()
        with pytest.raises(OSError, match="timed out"):
            watch_main.post("127.0.0.1", listener.getsockname()[1], False, "POST / HTTP/1.1\r\n\r\n", 0.5)


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 xyz\r\n", b"\x00" * 10000])
def test_what_is_no_planner_is_an_attempt_that_failed(answer: bytes) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def once() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(4096)
                connection.sendall(answer)

        threading.Thread(target=once, daemon=True).start()
        with pytest.raises((OSError, ValueError)):
            watch_main.post("127.0.0.1", listener.getsockname()[1], False, "POST / HTTP/1.1\r\n\r\n", 10)


def test_a_planner_behind_a_proxy_that_drops_underscores_gets_hyphens() -> None:
    class Strict(_Handler):
        def do_POST(self) -> None:
            planner = cast(Planner, self.server)
            planner.statuses = [200 if "SEED-KEY" in self.headers else 400]
            super().do_POST()

    with Planner() as planner:
        planner.RequestHandlerClass = Strict
        with working(planner.url) as worker:
            kill_9(worker)
            until(lambda: not alive(worker.watcher), "the watcher ends")
        good = [headers for _, _, headers in planner.seen if "SEED-KEY" in headers]
        assert {headers["SEED-PORT"] for headers in good} == {"7001", "7002"}


# --- an orderly end --------------------------------------------------------------------------------------------------


def test_a_worker_that_closes_has_withdrawn_by_itself() -> None:
    with Planner() as planner, working(planner.url, "closes") as worker:
        until(lambda: not alive(worker.watcher), "the watcher ends")
        assert worker.process.wait(WITHIN_S) == 0
        assert planner.seen == []


def test_a_forgotten_seed_is_not_withdrawn_and_the_others_are() -> None:
    with Planner() as planner, working(planner.url, "forget") as worker:
        kill_9(worker)
        until(lambda: not alive(worker.watcher), "the watcher ends")
        assert planner.withdrawn() == {str(DRAFT)}


def fds() -> set[str]:
    gc.collect()
    return set(os.listdir("/proc/self/fd"))


def test_nothing_is_left_after_close_nor_after_the_last_seed_is_forgotten() -> None:
    before, children = fds(), len(psutil.Process().children())
    with Planner() as planner:
        with_planner = fds()
        for _ in range(3):
            watch = Watcher.start(planner.url, None, 10.0)
            watch.watch(KEY, SEED)
            pid = watch.pid
            assert pid is not None
            assert alive(pid)
            watch.close(10.0)
            watch.close(10.0)
            assert watch.pid is None
            until(lambda pid=pid: not alive(pid), "the watcher is gone")
            assert fds() == with_planner

            watch.watch(KEY, SEED)
            watch.watch(KEY, DRAFT)
            pid = watch.pid
            assert pid is not None
            watch.forget(KEY, SeedAddress("unknown", 1, 0))
            watch.forget(KEY, DRAFT)
            assert alive(pid)
            watch.forget(KEY, SEED)
            assert watch.pid is None
            until(lambda pid=pid: not alive(pid), "the watcher is gone")
            assert fds() == with_planner
        assert planner.seen == []
    assert (fds(), len(psutil.Process().children())) == (before, children)


def test_a_watcher_that_does_not_end_is_killed() -> None:
    with Planner() as planner:
        before = fds()
        watch = Watcher.start(planner.url, None, 10.0)
        watch.watch(KEY, SEED)
        pid = watch.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        watch.close(0.1)
        until(lambda: not alive(pid), "the watcher is gone")
        assert fds() == before
        assert planner.seen == []


def test_a_watcher_that_somebody_killed_is_replaced_and_knows_everything() -> None:
    with Planner() as planner:
        watch = Watcher.start(planner.url, None, 10.0)
        try:
            watch.watch(KEY, SEED)
            first = watch.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            until(lambda: not alive(first), "it is gone")
            watch.watch(KEY, DRAFT)
            second = watch.pid
            assert second not in (None, first)
            process, watch._process = watch._process, None
            assert process is not None
            process.end(WITHIN_S)  # the pipe ends, as if this process had died
            assert planner.withdrawn() == {str(SEED), str(DRAFT)}
        finally:
            watch.close()


def test_a_child_has_nothing_to_do_with_its_parents_seeds() -> None:
    with Planner() as planner:
        watch = Watcher.start(planner.url, None, 10.0)
        try:
            watch.watch(KEY, SEED)
            pid = os.fork()
            if pid == 0:
                with contextlib.suppress(BaseException):
                    watch.forget(KEY, SEED)
                    watch.close()
                    os._exit(0 if watch.pid is None else 1)
                os._exit(2)
            assert os.waitpid(pid, 0)[1] == 0
            assert watch.pid is not None
            assert alive(watch.pid)
            watch.forget(KEY, SEED)
        finally:
            watch.close()
        assert planner.seen == []


# --- what it is ------------------------------------------------------------------------------------------------------


def test_it_is_small_and_alone_and_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "another-secret")
    with Planner() as planner:
        watch = Watcher.start(planner.url, TOKEN, 10.0)
        try:
            watch.watch(KEY, SEED)
            pid = watch.pid
            assert pid is not None
            process = psutil.Process(pid)
            assert TOKEN not in " ".join(process.cmdline())
            assert TOKEN not in json.dumps(process.environ())
            assert "HF_TOKEN" not in process.environ()
            assert process.cwd() == "/"
            assert process.memory_info().rss < 24 * 1024 * 1024
            assert os.getsid(pid) != os.getsid(0)
            assert os.getpgid(pid) != os.getpgid(0)
            assert pid not in [child.pid for child in psutil.Process().children(recursive=True)]
            assert process.num_fds() <= 4  # the two pipes, /dev/null, the pidfd
            maps = Path(f"/proc/{pid}/maps").read_text()
            assert not [word for word in ("torch", "aiohttp", "site-packages") if word in maps]
        finally:
            watch.close()


def test_it_needs_nothing_but_the_standard_library() -> None:
    code = f"import runpy, sys; runpy.run_path({watch_main.__file__!r}); print(*sorted(sys.modules))"
    modules = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"asyncio", "ssl", "http", "http.client", "email", "urllib.request", "logging", "vllm_rfork", "subprocess"}
    assert not heavy & set(modules)


# --- what it is told -------------------------------------------------------------------------------------------------


def request(url: str, token: str | None = None, key: str = KEY, seed: SeedAddress = SEED, epoch: str = "") -> str:
    text: str = watcher._Planner.parse(url, token).order(key, seed, epoch)["requests"][0]
    return text


def test_the_planners_address_may_have_a_path_a_user_and_an_ipv6_host() -> None:
    text = request("http://user:p%40ss@[::1]:1223/rfork/")
    assert text.startswith("POST /rfork/remove_seed HTTP/1.1\r\nHost: [::1]:1223\r\n")
    assert "Authorization: Basic " + base64.b64encode(b"user:p@ss").decode() in text
    assert "Authorization: Bearer t\r\n" in request("http://user:pass@h", "t")
    assert watcher._Planner.parse("https://planner", None).port == 443
    assert watcher._Planner.parse("http://planner", None).port == 80


def test_no_key_can_inject_a_header() -> None:
    for key in ("a\r\nX: 1", "模型$0", " lead", "a\x00b"):
        head, end, rest = request("http://h", key=key).partition("\r\n\r\n")
        assert (end, rest) == ("\r\n\r\n", "")
        names = [line.partition(":")[0] for line in head.split("\r\n")[1:]]
        assert names == ["Host", "SEED_KEY", "SEED_IP", "SEED_PORT", "SEED_RANK", "Content-Length", "Connection"]


def test_the_epoch_travels_along_where_it_is_known() -> None:
    assert "RFORK-EPOCH: e1\r\n" in request("http://h", epoch="e1")
    assert "RFORK-EPOCH" not in request("http://h")


@pytest.mark.parametrize("url", ["planner:1223", "ftp://planner", "http://", "http://h:port", "http://[::1", ""])
def test_an_address_that_is_none_is_a_seed_error_without_the_address(url: str) -> None:
    with pytest.raises(SeedError, match="planner's address"):
        Watcher.start(url, None, 10.0)


def test_a_token_that_no_header_can_hold_is_refused_and_not_shown() -> None:
    with pytest.raises(SeedError) as caught:
        Watcher.start("http://h", "to\nken", 10.0)
    assert "ken" not in str(caught.value).replace("token", "")


def test_a_watcher_that_cannot_start_is_a_seed_error_that_says_why_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before, children = fds(), set(psutil.Process().children())
    monkeypatch.setattr(watcher, "_MAIN", tmp_path / "missing.py")
    with pytest.raises(SeedError, match="No such file"):
        Watcher.start("http://h", None, 10.0)
    silent = tmp_path / "silent.py"
    silent.write_text("import time; time.sleep(3600)")
    monkeypatch.setattr(watcher, "_MAIN", silent)
    watch = Watcher("http://h", None, 10.0)
    watch._start_timeout_s = 0.2
    with pytest.raises(SeedError, match="not ready within"):
        watch.watch(KEY, SEED)
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(SeedError, match="executable"):
        watch.watch(KEY, SEED)
    assert fds() == before
    assert set(psutil.Process().children()) <= children
