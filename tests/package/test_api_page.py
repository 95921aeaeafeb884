"""docs/api.md names every public option, variable, command and port member that exists, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from vllm_rfork import testing
from vllm_rfork.cli.main import COMMANDS
from vllm_rfork.config import ENVIRONMENT, Settings
from vllm_rfork.engines import base
from vllm_rfork.engines.nixl import peer
from vllm_rfork.testing import engine_setup

DOCS = Path(__file__).resolve().parents[2] / "docs"
SECTIONS = dict(
    re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", (DOCS / "api.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
)


def test_every_option_and_every_variable_is_named() -> None:
    names = set(re.findall(r"`(\w+)`", SECTIONS["Options"]))
    assert {name for name in names if name.islower()} == set(Settings.model_fields)
    assert {name for name in names if name.isupper()} == {*ENVIRONMENT.values(), peer.ALLOW_TCP}


def test_every_command_is_named() -> None:
    assert set(re.findall(r"`vllm-rfork (\w+)`", SECTIONS["Commands"])) == set(COMMANDS)


def test_every_member_of_the_engine_port_is_named() -> None:
    members = {name for name in vars(base.TransferEngine) if not name.startswith("_")}
    members |= {name for name in base.TransferEngine.__annotations__ if not name.startswith("_")}
    assert set(re.findall(r"^\| `TransferEngine\.(\w+)`", SECTIONS["Engine port"], re.MULTILINE)) == members
    defined = {name for name, value in vars(base).items() if getattr(value, "__module__", "") == base.__name__}
    assert set(re.findall(r"^\| `(\w+)[`.]", SECTIONS["Engine port"], re.MULTILINE)) == defined


def test_every_name_of_the_contract_suite_is_named() -> None:
    section = SECTIONS["`vllm_rfork.testing`"]
    names = {
        name
        for row in re.findall(r"^\| (`\w+`(?:, `\w+`)*) ", section, re.MULTILINE)
        for name in re.findall(r"\w+", row)
    }
    assert names == set(testing.__all__)
    settings = {name for name in engine_setup.ContractSetup.__annotations__ if not name.startswith("_")}
    settings |= {"environment", "python", "config"}
    assert set(re.findall(r"^\| `EngineContract\.(\w+)`", section, re.MULTILINE)) == settings
    assert all(hasattr(engine_setup.ContractSetup, name) for name in settings - {"engine"})


def test_every_name_with_a_path_exists() -> None:
    for module, name in re.findall(r"`(vllm_rfork(?:\.\w+)+)\.([A-Z]\w+)`", "".join(SECTIONS.values())):
        assert hasattr(__import__(module, fromlist=[name]), name), f"{module}.{name}"
