"""The command that an Ascend user runs first, on both YuanRong wheels over the host stand-in."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.contracts.driver_buffer import ROOT
from tests.standin import build, wheels
from vllm_rfork.selftest.report import FAILED, GOOD, WRONG_BYTES


@pytest.mark.parametrize("wheel", ["transfer-engine", "datasystem"])
@pytest.mark.parametrize(("extra", "status"), [([], GOOD), (["--corrupt"], WRONG_BYTES)])
def test_selftest_tells_right_bytes_from_wrong_ones(wheel: str, extra: list[str], status: int) -> None:
    done = selftest(wheel, *extra)
    assert done.returncode == status, done.stdout + done.stderr
    assert "GB/s" in done.stdout + done.stderr


@pytest.mark.parametrize(("host", "status"), [("127.0.0.9", GOOD), ("10.9.9.9", FAILED)])
def test_selftest_listens_on_the_host_that_it_is_given(host: str, status: int) -> None:
    """Any address of 127.0.0.0/8 is this machine's, the other is nobody's."""
    done = selftest("transfer-engine", "--host", host)
    assert done.returncode == status, done.stdout + done.stderr
    assert status == GOOD or host in done.stderr


def selftest(wheel: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with ``wheel`` on the stand-in."""
    build.build()
    installed = wheels.installed(wheel)
    environment = {**os.environ, **installed.environment, **build.environment()}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    return subprocess.run(
        [installed.python, "-m", "vllm_rfork.cli.main", "selftest", "--engine", "yuanrong", "--size", "8M", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
