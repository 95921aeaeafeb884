"""The planner starts on a machine that has neither torch nor vLLM, nor Redis's client unless it is asked for."""

from __future__ import annotations

import subprocess
import sys


def test_the_planner_imports_nothing_heavy() -> None:
    code = (
        "import sys; import vllm_rfork.planner.command, vllm_rfork.planner.app, vllm_rfork.planner.store.memory\n"
        "print(sorted({'torch', 'vllm', 'redis', 'numpy', 'vllm_rfork.clients'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout.strip() == "[]"


def test_asking_for_redis_without_its_client_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['redis'] = None\n"
        "from vllm_rfork.planner.command import planner; planner(['--store', 'redis://127.0.0.1:1'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 2
    assert "vllm-rfork[planner]" in done.stderr
