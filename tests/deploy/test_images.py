"""The Dockerfiles, which cannot be built here: a linter, and that they fit the package, the chart and the checkout."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest
from packaging.version import Version

from tests.deploy.rendering import container, of_kind, pods, rendered
from tests.deploy.tools import ROOT, hadolint, run

FILES = sorted((ROOT / "deploy" / "images").glob("*.Dockerfile"))
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def text_of(name: str) -> str:
    return (ROOT / "deploy" / "images" / f"{name}.Dockerfile").read_text(encoding="utf-8")


def arguments(name: str) -> dict[str, str]:
    return dict(re.findall(r"^ARG (\w+)=(\S+)$", text_of(name), re.MULTILINE))


def test_there_is_an_image_for_each_role() -> None:
    assert [each.stem for each in FILES] == ["ascend", "cpu", "cuda", "planner"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_dockerfiles_are_linted(file: Path) -> None:
    done = run(hadolint(), "--no-color", file)
    assert done.returncode == 0, done.stdout


def test_the_linter_finds_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text("FROM python:latest\nRUN pip install vllm-rfork\n", encoding="utf-8")
    done = run(hadolint(), "--no-color", file)
    assert done.returncode != 0
    assert {"DL3007", "DL3013"} <= set(re.findall(r"DL[0-9]+", done.stdout))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_copied_exists_and_is_in_the_builds_context(file: Path) -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    admitted = [each.removeprefix("!") for each in ignored if each.startswith("!")]
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", file.read_text(encoding="utf-8"), re.MULTILINE)
    sources = [source for line in copies for source in line.split()]
    assert "pyproject.toml" in sources
    for source in sources:
        assert (ROOT / source).exists()
        assert any(fnmatch.fnmatch(source, each) for each in admitted), source
    # The build reads these, too.
    assert {re.findall(r'^fragments = \[\{ path = "(.+)" \}\]$', PROJECT, re.MULTILINE)[0], "LICENSE"} <= set(sources)


@pytest.mark.parametrize("file", [each for each in FILES if each.stem != "cpu"], ids=lambda file: file.stem)
def test_extras_are_extras(file: Path) -> None:
    extras = set(re.findall(r"^([a-z0-9-]+) = \[", PROJECT.partition("optional-dependencies]")[2], re.MULTILINE))
    text = file.read_text(encoding="utf-8")
    used = {each for each in re.findall(r"(?:vllm-rfork|\.)\[([a-z0-9-]+)\]", text)}
    used |= {value for name, value in arguments(file.stem).items() if name == "EXTRA"}
    assert used
    assert used <= extras


def test_the_base_images_are_of_releases_that_were_read() -> None:
    """versions/recorded has what this package needs of each."""
    recorded = {each.stem for each in (ROOT / "versions" / "recorded").glob("*.json")}
    for name, argument, distribution in (
        ("cpu", "VLLM", "vllm"),
        ("cuda", "VLLM", "vllm"),
        ("ascend", "VLLM_ASCEND", "vllm-ascend"),
    ):
        version = Version(arguments(name)[argument].removeprefix("v"))
        assert f"{distribution}-{version}" in recorded


def test_the_planners_image_runs_as_the_user_of_the_chart() -> None:
    text = text_of("planner")
    (statefulset,) = [each for each in of_kind(rendered("memory"), "StatefulSet")]
    pod = statefulset["spec"]["template"]
    user, group = re.findall(r"^USER ([0-9]+):([0-9]+)$", text, re.MULTILINE)[0]
    assert (int(user), int(group)) == (
        pod["spec"]["securityContext"]["runAsUser"],
        pod["spec"]["securityContext"]["runAsGroup"],
    )
    assert container(pod)["command"] == ["vllm-rfork", "planner"]
    assert 'ENTRYPOINT ["vllm-rfork"]' in text
    assert "EXPOSE 1223" in text


def test_the_images_have_the_names_that_the_chart_uses() -> None:
    built = {
        name for file in FILES for name in re.findall(r"docker build .* -t (\S+) ", file.read_text(encoding="utf-8"))
    }
    used = {
        container(pod)["image"].partition("/")[2]
        for example in ("cuda", "ascend-a2", "ascend-a3")
        for _, pod in pods(rendered(example))
    }
    assert built - {"vllm-rfork-cpu:0.1.0"} == used, "the one for CPUs is compose.yaml's"


@pytest.mark.parametrize("name", ["cpu", "cuda", "ascend"])
def test_workers_images_keep_the_entry_point_and_versions_of_vllm(name: str) -> None:
    text = text_of(name)
    assert not re.search(r"^(ENTRYPOINT|CMD|USER)\b", text, re.MULTILINE)
    assert "--constraint /tmp/constraints.txt" in text
