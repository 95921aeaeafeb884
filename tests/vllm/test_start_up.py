"""A whole start on CPU: a fork takes its seed's compiled forward although path and cache root differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import start_up

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(2400)]


def test_a_fork_with_code_uses_its_seeds_forward_and_answers_as_a_default_load_does(
    model_a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each start is a process. The seed compiles, the default loader has its cache root, and the fork an empty one."""
    out = tmp_path / "start-up.json"
    arguments = ["--device", "cpu", "--model", str(model_a), "--engine", "nixl", "--out", str(out)]
    status = start_up.main([*arguments, "--rows", "default-warm,fork-code-path"])
    runs = {run["row"]: run for run in json.loads(out.read_text())["runs"]}
    logs = "\n".join(run.get("log", "") for run in runs.values())
    assert status == 0, logs
    assert [runs[row]["aot_loaded"] for row in ("seed", "default-warm", "fork-code-path")] == [False, True, True]
    assert len({run["tokens"] for run in runs.values()}) == 1
    (line,) = [line for line in runs["fork-code-path"]["lines"] if "caches from seed" in line]
    assert "torch_aot used" in line
    assert "saved about" in line
    assert "the same, other model path" in capsys.readouterr().out
