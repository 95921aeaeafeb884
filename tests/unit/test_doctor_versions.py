"""The doctor's checks of a worker's packages: vLLM, torch, the plugin, and CUDA 12 or 13."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

from vllm_rfork.cli import doctor_checks, doctor_engines, doctor_versions
from vllm_rfork.cli.doctor_engines import Examined
from vllm_rfork.cli.findings import FAIL, NOTE, OK, Finding
from vllm_rfork.cli.main import main

RELEASES = ["0.17.0", "0.23.0", "0.33.0"]


@pytest.mark.parametrize(
    ("found", "state", "text"),
    [
        ("0.33.0", OK, "a release that is checked"),
        ("0.33.0+cu130", OK, "a release that is checked"),
        ("0.24.1", OK, "between releases that are checked (0.17.0 to 0.33.0)"),
        ("0.34.0rc1", NOTE, "newer than 0.33.0"),
        ("1.0", NOTE, "newer than 0.33.0"),
        ("0.9.2", FAIL, "older than 0.17.0"),
    ],
)
def test_a_version_is_compared_with_the_checked_releases(found: str, state: str, text: str) -> None:
    finding = doctor_versions.compared("vLLM version", found, RELEASES)
    assert (finding.state, bool(finding.advice)) == (state, state != OK)
    assert text in finding.found


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    named = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(doctor_versions, "version_of", named.get)


def test_torch_must_be_the_one_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str] | None:
        if name != "vllm":
            raise metadata.PackageNotFoundError(name)
        return ["numpy", 'torch==2.11.0+cpu; platform_machine == "x86_64"', "torchaudio==2.9"]

    monkeypatch.setattr(metadata, "requires", requires)
    installed(monkeypatch, torch="2.11.0+cu130")
    assert doctor_versions.torch_version().state == OK
    installed(monkeypatch, torch="2.9.1+cu130")
    finding = doctor_versions.torch_version()
    assert (finding.state, finding.found) == (NOTE, "2.9.1+cu130, but vLLM requires 2.11.0")


@pytest.mark.parametrize(
    ("environ", "state", "text"),
    [
        ({}, OK, "not set"),
        ({"VLLM_PLUGINS": "rfork"}, OK, "names it"),
        ({"VLLM_PLUGINS": "ascend"}, FAIL, "VLLM_PLUGINS=ascend blocks it"),
        ({"VLLM_PLUGINS": ""}, FAIL, "VLLM_PLUGINS= blocks it"),
        ({"VLLM_PLUGINS": "ascend, rfork"}, FAIL, "blocks it"),
    ],
)
def test_a_plugin_that_vllm_plugins_does_not_name_is_blocked(environ: dict[str, str], state: str, text: str) -> None:
    finding = doctor_versions.plugin(environ)
    assert finding.state == state, finding
    assert text in finding.found


def test_a_plugin_that_is_not_installed_and_others_that_are_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    points: list[metadata.EntryPoint] = []
    monkeypatch.setattr(metadata, "entry_points", lambda group: [each for each in points if each.group == group])
    assert doctor_versions.plugin({}).state == FAIL
    general, platform = doctor_versions.PLUGIN_GROUPS
    points += [
        metadata.EntryPoint("rfork", "vllm_rfork.plugin:register", general),
        metadata.EntryPoint("lora", "vllm.plugins.lora:register", general),
        metadata.EntryPoint("ascend", "vllm_ascend:register", platform),
    ]
    finding = doctor_versions.plugin({"VLLM_PLUGINS": "rfork"})
    assert (finding.state, finding.found) == (NOTE, "VLLM_PLUGINS=rfork blocks other plugins: ascend")


@pytest.mark.parametrize(
    ("cuda", "wheels", "state", "advice"),
    [
        (None, ["nixl_cu13"], OK, ""),
        ("13.0", ["nixl_cu13"], OK, ""),
        ("13.0", ["nixl_cu13", "nixl_cu12"], OK, ""),
        ("13.0", ["nixl_cu12"], NOTE, "pip uninstall nixl-cu12; pip install 'vllm-rfork[nixl]'"),
        ("12.8", ["nixl_cu13", "nixl_cu12"], NOTE, "pip uninstall nixl-cu13; pip install 'vllm-rfork[nixl-cu12]'"),
        ("13.0", ["mooncake_transfer_engine"], NOTE, "'vllm-rfork[mooncake-cuda13]'"),
        ("12.8", [], OK, ""),
    ],
)
def test_wheels_for_another_cuda_are_named(
    cuda: str | None, wheels: list[str], state: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, **dict.fromkeys(wheels, "1.5.1"))
    finding = doctor_versions.cuda_wheels(cuda)
    assert finding.state == state
    assert finding.advice.endswith(advice)


def test_the_cuda_version_is_read_from_torch_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor_versions.torch_cuda() is None, "the CPU build"
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('imported')")
    version = tmp_path / "torch" / "version.py"
    version.write_text("from typing import Optional\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n")
    spec = doctor_versions.importlib.util.spec_from_file_location("torch", tmp_path / "torch" / "__init__.py")
    monkeypatch.setattr(doctor_versions.importlib.util, "find_spec", lambda name: spec)
    assert doctor_versions.torch_cuda() == "13.0"


def test_a_worker_needs_vllm_and_its_packages_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    well = Finding("as if", OK, "")
    monkeypatch.setattr(doctor_engines, "engine", lambda name, **_: Examined(well, []))
    monkeypatch.setattr(doctor_checks, "cross_memory_attach", lambda: well)
    arguments = ["doctor", "--role", "worker", "--json"]
    environ = dict.fromkeys(("RFORK_SCHEDULER_URL", "VLLM_HOST_IP", "VLLM_PLUGINS"))
    done = CliRunner().invoke(main, arguments, env=environ)
    assert done.exit_code == 0, done.output
    states = {each["check"]: each["state"] for each in json.loads(done.stdout)}
    names = ["vLLM version", "vLLM-Ascend version", "torch version", "plugin", "CUDA wheels"]
    assert [name for name in states if name in names] == names
    assert states["vLLM version"] == states["plugin"] == OK
    installed(monkeypatch)
    done = CliRunner().invoke(main, arguments, env=environ)
    assert done.exit_code == 1
    assert "vLLM is not installed for" in done.stdout
