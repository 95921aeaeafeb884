"""The example engine, found by its entry point, keeps the port's contract."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from tests.contracts.driver_buffer import ROOT
from vllm_rfork.engines.registry import engine_names
from vllm_rfork.testing import EngineContract

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip would install: the metadata, with the entry point that the example's docstring shows."""
    text = (EXAMPLES / "procmem_engine.py").read_text()
    found = re.search(r'entry-points\."(?P<group>[^"]+)"\]\n\s*(?P<name>\w+) = "(?P<value>[^"]+)"', text)
    assert found is not None
    info = tmp_path_factory.mktemp("site") / "procmem-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: procmem\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{found['group']}]\n{found['name']} = {found['value']}\n")
    return info.parent


class TestExampleEngine(EngineContract):
    engine: ClassVar[str] = "procmem"
    path: ClassVar[str]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _installed(cls, distribution: Path) -> None:
        cls.path = os.pathsep.join(map(str, (ROOT, EXAMPLES, distribution)))

    def environment(self) -> Mapping[str, str]:
        return {"PYTHONPATH": self.path}


def test_it_is_among_the_engines_where_it_is_installed(distribution: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "procmem" not in engine_names()
    monkeypatch.syspath_prepend(str(distribution))
    assert "procmem" in engine_names()
