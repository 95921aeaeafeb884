"""The Kustomize base and components are what the chart renders, alone and combined."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.deploy import kustomize
from tests.deploy.foreign import VERSIONS, check
from tests.deploy.kustomize import COMPONENTS, FOLDER, MONITORING, REDIS, TLS, WORKERS
from tests.deploy.rendering import Thing, container, objects, pods
from tests.deploy.test_chart import undefined
from tests.deploy.tools import run, tool

#: Components → the values with which the chart renders the same.
COMBINATIONS: dict[tuple[str, ...], dict[str, Any]] = {
    (): {},
    **{(name,): dict(values) for name, values in WORKERS.items()},
    ("redis",): dict(REDIS),
    ("cuda", "cuda-rdma", "redis"): {**WORKERS["cuda"], **WORKERS["cuda-rdma"], **REDIS},
    ("cuda", "redis", "monitoring"): {**WORKERS["cuda"], **REDIS, **MONITORING},
    ("ascend-a2", "redis", "tls"): {**WORKERS["ascend-a2"], **REDIS, **TLS},
    ("cuda", "redis", "monitoring", "tls"): {**WORKERS["cuda"], **REDIS, **MONITORING, **TLS},
}
HASH = re.compile(r"-[0-9a-z]{10}\Z")


def built(folder: Path) -> list[Thing]:
    done = run(tool("kubectl"), "kustomize", folder)
    assert done.returncode == 0, done.stderr
    return objects(done.stdout)


def combined(tmp_path: Path, names: tuple[str, ...], **more: Any) -> list[Thing]:
    """A kustomization of the base with some components; Kustomize demands relative paths."""
    up = "/".join([".."] * len(tmp_path.parts[1:])) + str(FOLDER)
    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": kustomize.NAMESPACE,
        "resources": [f"{up}/base"],
        "components": [f"{up}/components/{name}" for name in names],
        **more,
    }
    (tmp_path / "kustomization.yaml").write_text(json.dumps(content), encoding="utf-8")
    return built(tmp_path)


def plain(thing: Thing) -> Thing:
    """Without the namespace, the hash in a map's name, and the order of lists whose items have names."""

    def sorted_by_name(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: sorted_by_name(value) for name, value in node.items()}
        if isinstance(node, list):
            items = [sorted_by_name(each) for each in node]
            return sorted(items, key=lambda each: str(each["name"])) if all_named(items) else items
        return HASH.sub("", node) if isinstance(node, str) and node.startswith(kustomize.CONFIG) else node

    def all_named(items: list[Any]) -> bool:
        return all(isinstance(each, dict) and "name" in each for each in items)

    made: Thing = sorted_by_name(copy.deepcopy(thing))
    made["metadata"].pop("namespace", None)
    made["metadata"].pop("annotations", None)
    return made


def by_name(things: list[Thing]) -> dict[tuple[str, str], Thing]:
    return {(each["kind"], each["metadata"]["name"]): each for each in map(plain, things)}


def test_the_folder_is_what_the_chart_renders() -> None:
    written = {
        path.relative_to(FOLDER): path.read_text(encoding="utf-8")
        for part in ("base", "components")
        for path in (FOLDER / part).rglob("*")
        if path.is_file()
    }
    assert written == kustomize.everything(), "run make kustomize"


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_components_combine_to_what_the_chart_renders(tmp_path: Path, names: tuple[str, ...]) -> None:
    things = combined(tmp_path, names)
    for name, pod in pods(tuple(things)):
        assert undefined(container(pod)) == [], name  # a merge may change the order
    made = by_name(things)
    rendered = by_name([thing for thing, _ in kustomize.rendered(COMBINATIONS[names]).values()])
    assert made.keys() == rendered.keys()
    for key, thing in rendered.items():
        assert made[key] == thing, key


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_is_used_in_a_combination(name: str) -> None:
    assert any(name in names for names in COMBINATIONS)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_example_is_valid(version: str) -> None:
    things = built(FOLDER / "examples" / "production")
    assert len(things) > 15
    for each in things:
        each["metadata"].pop("annotations", None)
        check(each, version)
        assert each["metadata"]["namespace"] == kustomize.NAMESPACE


def test_a_changed_setting_rolls_the_planner(tmp_path: Path) -> None:
    def config(sec: int) -> str:
        literals = [f"RFORK_PLANNER_LEASE_TTL_SEC={sec}"]
        generator = [{"name": kustomize.CONFIG, "behavior": "merge", "literals": literals}]
        things = combined(tmp_path, (), configMapGenerator=generator)
        (planner,) = [each for each in things if each["kind"] == "StatefulSet"]
        (box,) = planner["spec"]["template"]["spec"]["containers"]
        name: str = box["envFrom"][0]["configMapRef"]["name"]
        assert name in {each["metadata"]["name"] for each in things if each["kind"] == "ConfigMap"}
        return name

    assert config(30) != config(60)


def test_a_patch_cannot_remove() -> None:
    with pytest.raises(ValueError, match="cannot remove"):
        kustomize.difference({"a": 1, "b": 2}, {"a": 1}, named_lists=True)
