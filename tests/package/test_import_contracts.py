"""Each import contract notices what it is there for; that the tree keeps them is `make contracts`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def lint_imports(root: Path) -> str:
    """The verdicts of import-linter on the package under ``root``."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=240)
    return done.stdout + done.stderr


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package and its contracts, to be broken on purpose."""
    shutil.copytree(ROOT / "vllm_rfork", tmp_path / "vllm_rfork", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".importlinter", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("errors.py", "import vllm_rfork.messages", "Imports point down only"),
        ("clients/__init__.py", "import vllm_rfork.heartbeat", "Imports point down only"),
        ("heartbeat.py", "import vllm_rfork.seed_service", "Imports point down only"),
        ("config/settings.py", "import torch", "torch only where tensors are handled"),
        ("engines/nixl/engine.py", "import numpy", "torch only where tensors are handled"),
        ("seed_service.py", "import vllm", "vLLM only in the loader, the plugin and vllm_compat"),
        ("engines/nixl/engine.py", "import vllm_rfork.engines.yuanrong.engine", "Engines do not import each other"),
        ("engines/yuanrong/peer.py", "import vllm_rfork.engines.memory", "Engines do not import each other"),
        ("planner/__init__.py", "import vllm_rfork.clients", "The planner side imports nothing from the worker side"),
        ("fork/transfer.py", "import vllm_rfork.seeding", "Imports point down only"),
        ("clients/planner.py", "import vllm_rfork.planner", "Imports point down only"),
        ("seeding/seed.py", "import vllm_rfork.load", "Imports point down only"),
        ("seeding/seed.py", "import vllm_rfork.devices", "A seed knows no tensor, model or device"),
        (
            "load/outcome.py",
            "import vllm_rfork.seeding.manager",
            "A load knows no seed but the data that it publishes",
        ),
        ("newcomer.py", "", "Imports point down only"),
    ],
)
def test_a_forbidden_import_breaks_its_contract(tree: Path, module: str, line: str, contract: str) -> None:
    path = tree / "vllm_rfork" / module
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    assert f"{contract} BROKEN" in lint_imports(tree)
