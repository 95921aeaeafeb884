"""A process that fails while native calls run ends with its own error: it waits for them, and not for ever."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from vllm_rfork.threads import native
from vllm_rfork.threads.native import native_thread, wait_for_native_threads

PACKAGE = Path(__file__).parents[2] / "vllm_rfork"

#: Modules with threads that an exit need not wait for, and why.
PYTHON_ONLY = {
    "net/event_loop.py": "an event loop: Python, and C without C++ frames",
    "threads/deadline.py": "for calls that need no wait at exit; only the resolver's is one: C without C++ frames",
    "testing/engine_worker.py": "a worker process of the contract suite, which ends by _exit if need be",
    "planner/resolver.py": "a C call of the resolver, on the planner's side",
    "manifest/checkpoint_identity.py": "file system calls and hashlib: C without C++ frames",
    "engines/yuanrong/relay.py": "a process of its own that only copies between sockets",
    "engines/memory.py": "system calls of Python's ctypes",
    "startup/fetch.py": "an event loop of its own, file system calls and hashlib: C without C++ frames",
    "startup/worker_caches.py": "file system calls and hashlib: C without C++ frames",
}

#: Calls with a deadline that an exit does not wait for. Everything else that has one is native code.
LEFT_BEHIND = {
    "cli/findings.py": "the checks of the doctor, which run native code in processes of their own",
    "load/reload.py": "file system calls",
    "net/advertise.py": "a C call of the resolver",
    "net/streams.py": "file system calls: a seed reads a cache",
    "startup/early_infos.py": "an event loop: Python, and C without C++ frames",
    "threads/daemons.py": "a C call of the resolver, and file system calls and hashlib: C without C++ frames",
}

#: The main thread fails while an engine is being opened, as a model's constructor does; what an object does when Python
#: throws it away gives the native call all the time to return while Python shuts down.
FAILS = """
import threading, time
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.nixl.engine import NixlEngine
from vllm_rfork.engines.nixl.agent import load_bindings
from vllm_rfork.threads.native import native_thread

class Slow:
    def __del__(self):
        time.sleep(3)

slow = Slow()
opening = threading.Event()

def open_and_close():
    load_bindings()
    engine = NixlEngine()
    opening.set()
    engine.open(EngineConfig(device="cpu", timeout_s=20.0))
    engine.close()

native_thread(open_and_close, "rfork-engine").start()
opening.wait()
raise ValueError("Unsupported activation: gelu")
"""

HANGS = """
import threading
from vllm_rfork.threads import native
native.EXIT_WAIT_S = 0.1
native.native_thread(threading.Event().wait, "rfork-hangs").start()
raise ValueError("the start failed")
"""


def ends(code: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    return done.returncode, done.stderr


def test_a_start_that_fails_while_an_engine_opens_ends_with_its_own_error() -> None:
    code, said = ends(FAILS)
    assert code == 1, said
    assert said.splitlines()[-1] == "ValueError: Unsupported activation: gelu"
    assert "terminate called" not in said


def test_a_native_call_that_never_returns_does_not_keep_the_process() -> None:
    code, said = ends(HANGS)
    assert code == 1, said
    assert "ValueError: the start failed" in said
    assert "threads=rfork-hangs" in said.splitlines()[-1]


def test_the_wait_ends_with_the_last_thread() -> None:
    go = threading.Event()
    threads = [native_thread(go.wait, f"rfork-test-{number}") for number in range(3)]
    for thread in threads:
        thread.start()
    native_thread(go.wait, "rfork-never-started")
    waiting = threading.Thread(target=wait_for_native_threads, args=(60.0,), daemon=True)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    go.set()
    waiting.join(60)
    assert not waiting.is_alive()
    assert not any(thread.is_alive() for thread in threads)


def test_the_bound_is_for_all_of_them_together() -> None:
    go = threading.Event()
    for number in range(10):
        native_thread(go.wait, f"rfork-test-{number}").start()
    before = time.monotonic()
    wait_for_native_threads(1.0)
    waited_s = time.monotonic() - before
    go.set()
    wait_for_native_threads(60.0)
    # Ten bounds would be 10 s; a busy machine adds some of its own to one.
    assert 1.0 <= waited_s < 8.0
    assert native.EXIT_WAIT_S <= 30


def test_no_other_thread_runs_native_code() -> None:
    users = [path for path in PACKAGE.rglob("*.py") if "threading.Thread(" in path.read_text()]
    unknown = {str(path.relative_to(PACKAGE)) for path in users} - {"threads/native.py", *PYTHON_ONLY}
    assert not unknown, "start them by native_thread, or say here why an exit need not wait for them"


def test_only_calls_without_native_frames_are_left_behind_at_an_exit() -> None:
    users = [path for path in PACKAGE.rglob("*.py") if "delays_exit=False" in path.read_text()]
    assert sorted(str(path.relative_to(PACKAGE)) for path in users) == sorted(LEFT_BEHIND)
