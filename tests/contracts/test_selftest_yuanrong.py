"""The command that an Ascend user runs first, on both YuanRong wheels over the host stand-in."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.contracts.engine_suite import ROOT
from tests.standin import build, wheels
from vllm_rfork.selftest import GOOD, WRONG_BYTES


@pytest.mark.parametrize("wheel", ["transfer-engine", "datasystem"])
@pytest.mark.parametrize(("extra", "status"), [([], GOOD), (["--corrupt"], WRONG_BYTES)])
def test_selftest_tells_right_bytes_from_wrong_ones(wheel: str, extra: list[str], status: int) -> None:
    build.build()
    installed = wheels.installed(wheel)
    environment = {**os.environ, **installed.environment, **build.environment()}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [installed.python, "-m", "vllm_rfork.cli", "selftest", "--engine", "yuanrong", "--size", "8M", *extra],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "GB/s" in done.stdout + done.stderr
