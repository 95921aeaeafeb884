"""The chart as Helm renders it, and its objects."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.tools import ROOT, run, tool

CHART = ROOT / "deploy" / "helm" / "vllm-rfork"
EXAMPLES = sorted((CHART / "ci").glob("*.yaml"))
NAMESPACE = "prod"
RELEASE = "fleet"

Thing = dict[str, Any]


def objects(text: str) -> list[Any]:
    """The documents of ``text`` that are not empty; libyaml needs a tenth of the time."""
    return [each for each in yaml.load_all(text, yaml.CSafeLoader) if each]


def helm_template(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, output and errors of `helm template`."""
    done = run(tool("helm"), "template", RELEASE, CHART, "--namespace", NAMESPACE, *arguments)
    return done.returncode, done.stdout, done.stderr


def set_arguments(values: Mapping[str, Any]) -> list[str]:
    """Arguments of Helm for ``values``: dotted name → value."""
    return [part for name, value in values.items() for part in ("--set-json", f"{name}={json.dumps(value)}")]


@functools.cache
def rendered(example: str = "", values: str = "{}") -> tuple[Thing, ...]:
    """The objects for an example's values, with more ``values`` (JSON) over them. Do not change them."""
    files = ["--values", CHART / "ci" / f"{example}.yaml"] if example else []
    more = [
        part for name, value in json.loads(values).items() for part in ("--set-json", f"{name}={json.dumps(value)}")
    ]
    code, output, errors = helm_template(*files, *more)
    assert code == 0, errors
    return tuple(objects(output))


def refused(**values: Any) -> str:
    """The error of a rendering that must fail."""
    code, _, errors = helm_template(*set_arguments(values))
    assert code != 0, f"{values} are accepted"
    return errors


def of_kind(things: tuple[Thing, ...], *kinds: str) -> list[Thing]:
    return [each for each in things if each["kind"] in kinds]


def pods(things: tuple[Thing, ...]) -> Iterator[tuple[str, Thing]]:
    """Every pod's template, with the name of its workload."""
    for each in things:
        spec = each.get("spec", {})
        if each["kind"] in ("Deployment", "StatefulSet"):
            yield each["metadata"]["name"], spec["template"]
        elif each["kind"] == "LeaderWorkerSet":
            for part in ("leaderTemplate", "workerTemplate"):
                yield f"{each['metadata']['name']} {part}", spec["leaderWorkerTemplate"][part]


def container(pod: Thing) -> Thing:
    (box,) = pod["spec"]["containers"]
    return box


def environment(pod: Thing) -> dict[str, Any]:
    return {each["name"]: each.get("value") for each in container(pod).get("env", [])}


def walk(node: Any) -> Iterator[Thing]:
    """Every mapping in ``node``."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from walk(value)
