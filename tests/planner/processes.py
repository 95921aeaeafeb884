"""Planner processes as users start them, and bare calls to whichever of them lives."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import aiohttp

ROOT = Path(__file__).resolve().parents[2]


class PlannerUnderTest:
    """One ``vllm-rfork planner`` process, on a free port or the one it is given."""

    def __init__(self, *flags: str, port: int = 0, open_files: int = 0, **environ: str) -> None:
        command = [sys.executable, "-m", "vllm_rfork.cli.main", "planner", "--port", str(port), *flags]
        if open_files:
            command = ["prlimit", f"--nofile={open_files}", "--", *command]
        self._environ = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=self._environ, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self.port = port
        self.log: list[str] = []

    def until_ready(self) -> PlannerUnderTest:
        """Return once it says where it listens."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"listens on https?://[^ ]*:(\d+)", line):
                self.port = int(found[1])
                return self
        raise AssertionError("the planner ended before it was ready: " + "".join(self.log))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """As a machine that loses power."""
        self.process.kill()
        self._rest()
        self.process.wait()

    def stop(self) -> int:
        """As an orchestrator does; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        self._rest()
        return self.process.wait(30)

    def fails(self) -> tuple[int, str]:
        """Exit status and what was said, for one that does not start."""
        self._rest()
        return self.process.wait(30), "".join(self.log)

    def _rest(self) -> None:
        assert self.process.stderr is not None
        if not self.process.stderr.closed:
            self.log += list(self.process.stderr)
            self.process.stderr.close()


async def call(
    session: aiohttp.ClientSession, method: str, url: str, /, timeout_s: float = 60.0, **headers: str
) -> tuple[int, dict[str, str]]:
    """Status and headers of one call; status 0 where nobody answers."""
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with session.request(method, url, headers=headers, timeout=timeout) as answer:
            await answer.read()
            return answer.status, dict(answer.headers)
    except (aiohttp.ClientError, asyncio.TimeoutError):
        return 0, {}


async def until_status(session: aiohttp.ClientSession, url: str, status: int) -> None:
    """Return once ``GET url`` is answered so."""
    deadline = time.monotonic() + 20
    while (await call(session, "GET", url))[0] != status:
        assert time.monotonic() < deadline, f"{url} never answered {status}"
        await asyncio.sleep(0.02)
