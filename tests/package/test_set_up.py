"""The set-up's own rules: the lock is complete and exact, and damage is noticed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    """A script of scripts/, imported."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LOCK = (ROOT / "requirements" / "lock.txt").read_text(encoding="utf-8")


def test_this_environment_is_what_the_lock_says() -> None:
    assert script("broken_pins").broken(LOCK) == []


def test_what_breaks_transformers_is_not_there() -> None:
    names = {dist.name.lower() for dist in metadata.distributions()}
    assert names & {"torchvision", "torchaudio", "torchcodec"} == set()
    assert "cpu" in metadata.version("vllm")


def test_no_two_yuanrong_generations_and_one_nixl_in_the_lock() -> None:
    pinned = script("broken_pins").pins(LOCK)
    assert sum(name.startswith("openyuanrong") for name in pinned) <= 1
    assert [name for name in pinned if name.startswith("nixl")] == ["nixl-cu13"]


@pytest.mark.parametrize("line", ["aiohttp", "aiohttp>=3", "aiohttp==3.*; python_version < '3.12'", "-r other.txt"])
def test_a_line_that_is_no_exact_pin_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="not an exact pin"):
        script("broken_pins").pins(f"click==8.5.1\n{line}\n")


def test_missing_other_and_damaged_distributions_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_pins = script("broken_pins")
    wheel = script("set_up").write_metadata_wheel(tmp_path, "somedist", "1.0")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert broken_pins.broken("somedist==1.0\n") == []
    assert broken_pins.broken("somedist==1.1\nmissingdist==2\n") == ["somedist==1.1", "missingdist==2"]
    (tmp_path / "somedist-1.0.dist-info" / "WHEEL").unlink()
    assert broken_pins.broken("somedist==1.0\n") == ["somedist==1.0"]


def test_a_pin_for_another_processor_is_left_out() -> None:
    assert script("broken_pins").broken('missingdist==1; platform_machine == "z80"\n') == []


def test_a_wrong_python_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_up = script("set_up")
    monkeypatch.setattr(set_up, "STAMP", tmp_path / "none")
    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    with pytest.raises(set_up.SetUpError, match=r"locked for Python 3\.11.*make PYTHON="):
        set_up.set_up()


def test_missing_system_libraries_are_named_with_their_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_up = script("set_up")
    monkeypatch.setattr(set_up, "LIBRARIES", (("libnosuch.so.7", "libnosuch7", "somebody"),))
    monkeypatch.setattr(set_up, "STAMP", tmp_path / "none")
    with pytest.raises(set_up.SetUpError, match=r"libnosuch\.so\.7, which somebody needs .*libnosuch7"):
        set_up.set_up()


def test_where_pip_finds_no_cpu_build_of_torch_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    set_up = script("set_up")

    def pip(what: str, *arguments: object) -> None:
        raise set_up.SetUpError("pip ended with 1")

    monkeypatch.setattr(set_up, "broken_lines", lambda: ["torch==2.13.0+cpu", "click==8.5.1"])
    monkeypatch.setattr(set_up, "pip", pip)
    with pytest.raises(set_up.SetUpError, match=r"(?s)PyTorch's install page.*PIP_EXTRA_INDEX_URL"):
        set_up.install_lock()


def test_a_step_is_one_line_with_its_duration_and_its_output_goes_to_the_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    set_up = script("set_up")
    monkeypatch.setattr(set_up, "LOG", tmp_path / "build" / "log")
    set_up.run("installing much", sys.executable, "-c", "for line in range(600): print('Collecting', line)")
    assert re.fullmatch(r"set-up: installing much \.\.\. \d+ s\n", capfd.readouterr().out)
    assert len(set_up.LOG.read_text().splitlines()) == 601, "the command itself, and each of its lines"


def test_a_step_is_named_before_its_command_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    set_up = script("set_up")
    monkeypatch.setattr(set_up, "LOG", tmp_path / "log")
    shown: list[str] = []

    def run(*command: object, **options: object) -> subprocess.CompletedProcess[bytes]:
        shown.append(capfd.readouterr().out)
        return subprocess.CompletedProcess([], 0)

    monkeypatch.setattr(set_up.subprocess, "run", run)
    set_up.run("waiting", "anything")
    assert shown == ["set-up: waiting ..."]


def test_a_command_that_fails_is_named_with_the_end_of_its_own_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_up = script("set_up")
    monkeypatch.setattr(set_up, "LOG", tmp_path / "log")
    set_up.run("first", sys.executable, "-c", "print('of the first')")
    fails = "import sys\nfor line in range(600): print('line', line)\nsys.exit('no such package')"
    with pytest.raises(set_up.SetUpError) as raised:
        set_up.run("second", sys.executable, "-c", fails)
    said = str(raised.value)
    assert said.startswith("second: ")
    assert "ended with 1" in said
    assert str(set_up.LOG) in said
    assert "no such package" in said
    assert "of the first" not in said
    assert len(said.splitlines()) < 40


def test_the_tools_of_the_site_and_of_releases_are_pinned() -> None:
    text = (ROOT / "requirements" / "docs.txt").read_text(encoding="utf-8")
    assert {"mkdocs-material", "mkdocs-static-i18n", "twine", "cyclonedx-bom"} <= set(script("broken_pins").pins(text))


def test_tools_are_set_up_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_up = script("set_up")
    made: list[str] = []
    monkeypatch.setattr(set_up, "ROOT", tmp_path)
    monkeypatch.setattr(set_up, "set_up", lambda: made.append(".venv"))
    monkeypatch.setattr(set_up, "side_environment_is_ready", lambda name: False)
    monkeypatch.setattr(set_up, "set_up_side_environment", made.append)
    for arguments in ([], ["docs"]):
        monkeypatch.setattr(sys, "argv", ["set_up.py", *arguments])
        set_up.main()
    assert made == [".venv", ".venv", "docs"]


def test_an_environment_that_does_not_exist_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["set_up.py", "doc"])
    with pytest.raises(SystemExit):
        script("set_up").main()
    assert "no such environment: doc" in capsys.readouterr().err
