"""The built wheel, installed where there is neither torch nor vLLM: what a planner's host gets."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
import tomllib
from markdown_it import MarkdownIt
from packaging.markers import Marker
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", out, ROOT)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with the wheel and its hard dependencies."""
    venv = tmp_path_factory.mktemp("fresh") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / "bin" / "python"
    lock = ROOT / "requirements" / "lock.txt"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--python", python)
    run(*pip, "install", "--quiet", "--no-compile", "--constraint", lock, wheel)
    return python


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tracked = run("git", "ls-files", "vllm_rfork").splitlines()
    shipped = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert {name.split("/")[0] for name in shipped} == {"vllm_rfork"}
    assert set(tracked) <= shipped, "data files that are tracked must travel too"
    assert not [name for name in shipped if "__pycache__" in name]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT)  # the wheel comes from the sdist
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    beside = {name for name in names if not name.startswith("vllm_rfork/")}
    assert beside == {
        *(".gitignore", "CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "SECURITY.md", "pyproject.toml"),
    }


def metadata(wheel: Path) -> Message:
    """The wheel's METADATA, whose body is the page that the package index shows."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        return message_from_bytes(archive.read(name))


def links(markdown: str) -> tuple[list[str], list[str]]:
    """The addresses of links and of pictures."""
    tokens = [child for token in MarkdownIt().parse(markdown) for child in token.children or []]
    return (
        [str(token.attrs["href"]) for token in tokens if token.type == "link_open"],
        [str(token.attrs["src"]) for token in tokens if token.type == "image"],
    )


def test_the_index_shows_links_of_the_release_to_files_that_exist(wheel: Path) -> None:
    described = metadata(wheel)
    urls = dict(str(line).split(", ") for line in described.get_all("Project-URL") or [])
    assert set(urls) == {"Repository", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith(f"{urls['Repository']}/") for name, url in urls.items() if name != "Repository")
    pages, pictures = links(str(described.get_payload()))
    assert len(pages) > 10
    for kind, addresses in (("blob", pages), ("raw", pictures)):
        here = f"{urls['Repository']}/{kind}/v{described['Version']}/"
        assert [address for address in addresses if not address.startswith("https://")] == []
        own = [address.removeprefix(here) for address in addresses if address.startswith(urls["Repository"])]
        assert [path for path in own if not (ROOT / path.partition("#")[0]).exists()] == []


def test_every_kind_of_relative_link_becomes_absolute() -> None:
    text = "[![a](a.svg)](b.md) [c](c.md#d) [e](#e) ![f](https://f.org/f.png) [g](https://g.org) [h](mailto:h@h.org)"
    hook = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    for each in hook["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"], text)
    pages, pictures = links(text.replace("https://github.example/vllm-rfork/vllm-rfork/", "https:").replace("$", ""))
    tag = "vHFPR_VERSION"
    assert pages == [
        *(f"https:blob/{tag}/b.md", f"https:blob/{tag}/c.md#d", f"https:blob/{tag}/README.md#e"),
        *("https://g.org", "mailto:h@h.org"),
    ]
    assert pictures == [f"https:raw/{tag}/a.svg", "https://f.org/f.png"]


def test_entry_points(wheel: Path, installed: Path) -> None:
    (dist,) = importlib.metadata.distributions(name="vllm-rfork", path=[str(site_packages(installed))])
    found = {(point.group, point.name, point.value) for point in dist.entry_points}
    assert found == {
        ("vllm.general_plugins", "rfork", "vllm_rfork.plugin:register"),
        ("console_scripts", "vllm-rfork", "vllm_rfork.cli.main:main"),
    }


def test_the_dashboards_page_travels_and_is_found(wheel: Path, installed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {
        f"vllm_rfork/planner/http/page/{name}" for name in ("index.html", "style.css", "elements.js", "script.js")
    } <= names
    run(
        installed,
        "-c",
        "from vllm_rfork.planner.http.dashboard import load_page; assert load_page().body",
        cwd=tmp_path,
    )


def test_users_of_the_package_see_its_types(installed: Path, tmp_path: Path) -> None:
    """``py.typed`` travels: mypy reads the installed package instead of treating it as untyped."""
    user = tmp_path / "user.py"
    user.write_text("from vllm_rfork.engines.base import EngineConfig\n\nreveal_type(EngineConfig('cpu').timeout_s)\n")
    options = ("--strict", "--cache-dir", tmp_path / "cache", "--python-executable", installed)
    out = run(sys.executable, "-m", "mypy", *options, user, cwd=tmp_path)
    assert 'float"' in out.partition("Revealed type is")[2]
    assert "Success" in out


def site_packages(python: Path) -> Path:
    return Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())


def test_no_hard_dependency_brings_torch_or_vllm(installed: Path) -> None:
    names = {dist.name.lower() for dist in importlib.metadata.distributions(path=[str(site_packages(installed))])}
    assert names & {"torch", "vllm", "numpy", "nixl-cu13", "openyuanrong-transfer-engine"} == set()


def test_every_module_without_tensors_imports(installed: Path, tmp_path: Path) -> None:
    """Imports fail only for want of torch or vLLM, which the import contracts restrict; ``testing`` needs pytest."""
    probe = """
import importlib, json, pkgutil, vllm_rfork
failed = {}
for info in pkgutil.walk_packages(vllm_rfork.__path__, "vllm_rfork."):
    if not info.name.endswith("__main__"):
        try:
            importlib.import_module(info.name)
        except ImportError as error:
            failed[info.name] = error.name
print(json.dumps(failed))
"""
    failed = json.loads(run(installed, "-c", probe, cwd=tmp_path))
    assert all(name.startswith("vllm_rfork.testing") for name, missing in failed.items() if missing == "pytest")
    assert set(failed.values()) <= {"torch", "vllm", "redis", "pytest"}
    light = {"plugin", "cli", "seed_service", "heartbeat", "fork", "clients", "config", "net", "seeding", "engines"}
    assert {name.split(".")[1] for name in failed} & light == set()


def test_the_command_line_starts(installed: Path, tmp_path: Path) -> None:
    out = run(installed.with_name("vllm-rfork"), "--help", cwd=tmp_path)
    assert "selftest" in out
    assert importlib.metadata.version("vllm-rfork") in run(installed.with_name("vllm-rfork"), "--version", cwd=tmp_path)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_no_environment_gets_both_yuanrong_distributions(wheel: Path, python: str, machine: str) -> None:
    environment = {"python_version": python, "platform_machine": machine, "sys_platform": "linux", "extra": "ascend"}
    needed = [Requirement(str(line)) for line in metadata(wheel).get_all("Requires-Dist") or []]
    chosen = [need.name for need in needed if isinstance(need.marker, Marker) and need.marker.evaluate(environment)]
    assert chosen == ["openyuanrong-transfer-engine" if python == "3.11" else "openyuanrong-datasystem"]
