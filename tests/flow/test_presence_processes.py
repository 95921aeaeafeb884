"""A seed process that ends is not granted any more, in whatever way it ends, and no other process lives for it."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.authority import Authority
from tests.flow.test_seed_and_heartbeat import DRAFT_KEY, KEY, Planner, Worker, planner, until, working
from vllm_rfork.errors import NoSeedAvailable

__all__ = ["planner"]  # the fixture

#: A process that starts another one and waits for it alone: as the first of a pid namespace it reaps no orphans.
STARTS_ANOTHER = (sys.executable, "-c", "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))")


def unshare() -> tuple[str, ...]:
    """A command that runs another one in a pid namespace of its own."""
    found = shutil.which("unshare")
    for flags in ((), ("--user", "--map-root-user")):
        command = (found or "", *flags, "--pid", "--fork", "--kill-child")
        if found and subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return command
    pytest.fail(
        "this test kills the first process of a pid namespace, and this machine has none for it: run as root, or allow "
        "user namespaces (sysctl kernel.unprivileged_userns_clone=1, or --security-opt seccomp=unconfined for docker)"
    )


async def present(planner: Planner, worker: Worker) -> None:
    await until(lambda: planner.knows(*worker.seeds), "the seeds are announced")
    await until(planner.attended, "the seeds have their connections")


async def absent_after_s(planner: Planner, killed_at: float) -> float:
    """Seconds from the kill until the planner grants nothing."""
    await until(planner.knows, "the seeds are absent")
    took_s = time.monotonic() - killed_at
    with pytest.raises(NoSeedAvailable):
        await planner.lease()
    return took_s


#: Starts of a worker that may be needed to see one death within a second: other tests share this machine's processors.
ATTEMPTS = 5


async def test_a_container_that_is_killed_with_its_first_process_is_no_seed_after_a_second(planner: Planner) -> None:
    """The kernel ends every process of the pid namespace at once: whatever should tell the planner is dead as well."""
    await planner.start()
    took_s: list[float] = []
    while len(took_s) < ATTEMPTS and (not took_s or min(took_s) > 1.0):
        with working(planner, KEY, DRAFT_KEY, interval_s=30.0, before=(*unshare(), *STARTS_ANOTHER)) as worker:
            await present(planner, worker)
            (first,) = psutil.Process(worker.process.pid).children()
            assert worker.pid != first.pid, "in its own namespace, and not the first there"
            killed_at = time.monotonic()
            first.kill()
            took_s.append(await absent_after_s(planner, killed_at))
        assert {seed["absent"] for seed in (await planner.seeds()).values()} == {True}, "known, and not granted"
    assert max(took_s) < 20.0, "far below the 60 s after which a seed is stale"
    assert min(took_s) < 1.0


async def test_a_process_that_is_killed_is_no_seed_after_a_second_and_comes_back_as_another(planner: Planner) -> None:
    await planner.start()
    took_s: list[float] = []
    while len(took_s) < ATTEMPTS and (not took_s or min(took_s) > 1.0):
        with working(planner, interval_s=30.0) as worker:
            await present(planner, worker)
            killed_at = time.monotonic()
            worker.process.kill()
            took_s.append(await absent_after_s(planner, killed_at))
    assert max(took_s) < 20.0
    assert min(took_s) < 1.0
    with working(planner, interval_s=30.0) as worker:
        await present(planner, worker)
        assert (await planner.lease()).seed == worker.seeds[0]


async def test_a_process_that_is_only_stopped_is_not_absent(planner: Planner) -> None:
    await planner.start()
    with working(planner, interval_s=30.0) as stopped, working(planner, DRAFT_KEY, interval_s=30.0) as killed:
        await until(lambda: planner.knows(*stopped.seeds, *killed.seeds), "both are announced")
        await until(planner.attended, "both have their connections")
        os.kill(stopped.process.pid, signal.SIGSTOP)
        killed.process.kill()
        await until(lambda: planner.knows(*stopped.seeds), "the killed one alone is absent")
        (seed,) = [each for each in (await planner.seeds()).values() if not each["absent"]]
        assert seed["present"]
        os.kill(stopped.process.pid, signal.SIGCONT)


async def test_a_child_that_lives_on_does_not_hide_its_parents_death(planner: Planner) -> None:
    await planner.start()
    with working(planner, interval_s=30.0) as worker:
        await present(planner, worker)
        worker.obey("fork")
        (child,) = psutil.Process(worker.process.pid).children()
        worker.process.kill()
        worker.process.wait()
        await until(planner.knows, "the seed is absent")
        assert child.is_running()
        child.kill()


@pytest.mark.parametrize("environ", [{"LD_PRELOAD": "/nowhere/library.so"}, {"PYTHONVERBOSE": "1"}])
async def test_lines_on_stderr_before_python_starts_keep_nobody_from_being_a_seed(
    environ: dict[str, str], planner: Planner
) -> None:
    await planner.start()
    with working(planner, interval_s=30.0, environ=environ) as worker:
        await present(planner, worker)
        worker.process.kill()
        await until(planner.knows, "the seed is absent")


async def test_a_worker_that_had_no_descriptors_left_is_a_seed_once_it_has(planner: Planner) -> None:
    await planner.start()
    with working(planner) as worker:
        await present(planner, worker)
        worker.obey("descriptors 3")
        planner.kill()
        await planner.start()
        worker.obey("state")  # it lives, and can neither announce itself nor make its connection
        assert await planner.knows()
        worker.obey("descriptors 110")
        await present(planner, worker)


async def test_suspending_and_resuming_leaves_no_process_behind(planner: Planner) -> None:
    """Under a first process that reaps no orphans each would stay as a zombie."""
    await planner.start()
    with working(planner, before=(*unshare(), *STARTS_ANOTHER)) as worker:
        for number in range(20):
            worker.obey("suspend")
            worker.obey(f"resume epoch-{number}")
        (first,) = psutil.Process(worker.process.pid).children()
        (only,) = first.children(recursive=True)
        assert only.children() == []
        await present(planner, worker)


async def test_a_planner_whose_name_ends_with_a_dot_sees_the_end_too(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("planner", names=("planner.svc.cluster.local", "127.0.0.1"))
    planner = TlsPlanner(authority.file, "--tls-cert", str(cert), "--tls-key", str(key))
    await planner.start()
    try:
        names = dict.fromkeys(("planner.svc.cluster.local.", "planner.svc.cluster.local"), "127.0.0.1")
        options: dict[str, Any] = {"names": names, "ca_file": str(authority.file), "interval_s": 30.0}
        planner.url, own_url = f"https://planner.svc.cluster.local.:{planner.port}", planner.url
        with working(planner, **options) as worker:
            planner.url = own_url
            await present(planner, worker)
            worker.process.kill()
            await until(planner.knows, "the seed is absent")
    finally:
        planner.kill()
        planner.reserved.close()


class TlsPlanner(Planner):
    """One that serves https."""

    def __init__(self, ca_file: Path, *options: str) -> None:
        super().__init__(*options)
        self.url = self.url.replace("http:", "https:")
        self._context = ssl.create_default_context(cafile=str(ca_file))

    def session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self._context))
