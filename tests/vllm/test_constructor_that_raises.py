"""A model whose constructor raises: the process ends with that error, although the engine is still being opened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.conftest import ROOT, extra_for

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(900)]


def test_an_activation_that_the_model_does_not_have_is_the_last_thing_said(model_a: Path) -> None:
    """``--hf-overrides '{"hidden_act": "gelu"}'`` on a Qwen2."""
    arguments = {
        "model": str(model_a),
        "load_format": "rfork",
        "extra": extra_for("http://127.0.0.1:9", rfork_engine="nixl"),
        "changes": {"hf_overrides": {"hidden_act": "gelu"}},
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm.llm_main", json.dumps(arguments)],
        cwd=ROOT,
        env=os.environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert "Unsupported activation: gelu" in done.stdout, done.stdout[-5000:]
    assert done.returncode == 1, done.stdout[-5000:]
    assert "terminate called" not in done.stdout
