"""Every manifest against the API's own schemas, as an API server would check it. Needs no cluster and no download.

The schemas are those that `kubernetes-validate` carries, strict: a field that the API does not know is an error. What
is not part of the API (kustomize, the Prometheus operator) has a schema below, of the fields that are used here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from kubernetes_validate.utils import all_versions

from tests.package.test_deploy import FOLDER, KUSTOMIZATION, PODS, Thing, named, things, walk

#: The oldest and the newest API that the schemas know; "1.25" before "1.100", so by the package's own order.
VERSIONS = (".".join(all_versions()[0].split(".")[:2]), ".".join(all_versions()[-1].split(".")[:2]))
MAX_CONFIG_MAP_NBYTES = 1 << 20

_NAMES = {"type": "object", "minProperties": 1, "additionalProperties": {"type": "string"}}
_METADATA = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {"name": {"type": "string"}, "labels": _NAMES},
}
_DURATION = r"^([0-9]+(ms|s|m|h))+$"
_CREDENTIALS = {
    "type": "object",
    "required": ["name", "key"],
    "additionalProperties": False,
    "properties": {"name": {"type": "string"}, "key": {"type": "string"}},
}
_ENDPOINT = {
    "type": "object",
    "required": ["port"],
    "additionalProperties": False,
    "properties": {
        "port": {"type": "string"},
        "path": {"type": "string", "pattern": "^/"},
        "interval": {"type": "string", "pattern": _DURATION},
        "scheme": {"enum": ["http", "https"]},
        "authorization": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"type": {"const": "Bearer"}, "credentials": _CREDENTIALS},
        },
    },
}
FOREIGN = {
    ("monitoring.coreos.com/v1", "ServiceMonitor"): {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
        "properties": {
            "apiVersion": {},
            "kind": {},
            "metadata": _METADATA,
            "spec": {
                "type": "object",
                "required": ["selector", "endpoints"],
                "additionalProperties": False,
                "properties": {
                    "selector": {
                        "type": "object",
                        "required": ["matchLabels"],
                        "additionalProperties": False,
                        "properties": {"matchLabels": _NAMES},
                    },
                    "endpoints": {"type": "array", "minItems": 1, "items": _ENDPOINT},
                },
            },
        },
    },
    ("kustomize.config.k8s.io/v1beta1", "Kustomization"): {
        "type": "object",
        "required": ["apiVersion", "kind", "resources"],
        "additionalProperties": False,
        "properties": {
            "apiVersion": {},
            "kind": {},
            "namespace": {"type": "string"},
            "resources": {"type": "array", "uniqueItems": True, "items": {"type": "string", "pattern": r"\.yaml$"}},
            "configMapGenerator": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name", "files"],
                    "additionalProperties": False,
                    "properties": {
                        "name": {"type": "string"},
                        "files": {"type": "array", "minItems": 1, "items": {"type": "string"}},
                        "options": {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {"labels": _NAMES},
                        },
                    },
                },
            },
            "generatorOptions": {
                "type": "object",
                "additionalProperties": False,
                "properties": {"disableNameSuffixHash": {"type": "boolean"}},
            },
        },
    },
}


def generated() -> list[Thing]:
    """The ConfigMaps that kustomize makes."""
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": each["name"], "labels": each["options"]["labels"]},
            "data": {name: (FOLDER / name).read_text(encoding="utf-8") for name in each["files"]},
        }
        for each in KUSTOMIZATION["configMapGenerator"]
    ]


def check(thing: Thing, version: str) -> None:
    """Raise :class:`jsonschema.ValidationError` where an API server of ``version`` would refuse ``thing``."""
    schema = FOREIGN.get((thing["apiVersion"], thing["kind"]))
    if schema is not None:
        jsonschema.Draft202012Validator(schema).validate(thing)
    else:
        kubernetes_validate.validate(thing, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_is_valid_strictly(version: str) -> None:
    everything = [*things(), *generated(), KUSTOMIZATION]
    assert len(everything) > 15
    for each in everything:
        try:
            check(each, version)
        except jsonschema.ValidationError as error:
            name = each.get("metadata", {}).get("name", "")
            pytest.fail(f"{each['kind']} {name} at {error.json_path}: {error.message}")


def test_the_schemas_are_years_apart() -> None:
    oldest, newest = (int(each.split(".")[1]) for each in VERSIONS)
    assert newest - oldest >= 9


def planner() -> Thing:
    return named("StatefulSet", "rfork-planner")


WRONG: dict[str, tuple[Callable[[], Thing], Callable[[Any], object]]] = {
    "a field with a typing error": (planner, lambda it: it["spec"].update(replica=2)),
    "a number where text belongs": (planner, lambda it: it["metadata"]["labels"].update(tier=1)),
    "text where a number belongs": (planner, lambda it: it["spec"].update(replicas="two")),
    "a container without a name": (planner, lambda it: it["spec"]["template"]["spec"]["containers"][0].pop("name")),
    "a probe of a kind that does not exist": (
        planner,
        lambda it: it["spec"]["template"]["spec"]["containers"][0]["readinessProbe"].update(httpget={"port": 1}),
    ),
    "a policy with a misspelt side": (
        lambda: named("NetworkPolicy", "rfork-workers"),
        lambda it: it["spec"]["ingress"][0].update(form=[]),
    ),
    "an interval without a unit": (
        lambda: things("ServiceMonitor")[0],
        lambda it: it["spec"]["endpoints"][0].update(interval="15"),
    ),
    "a monitor that asks an unknown field": (
        lambda: things("ServiceMonitor")[0],
        lambda it: it["spec"]["endpoints"][0].update(bearerToken="x"),
    ),
    "a kustomization with an unknown field": (lambda: KUSTOMIZATION, lambda it: it.update(resource=[])),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_found(what: str) -> None:
    which, spoil = WRONG[what]
    thing = copy.deepcopy(which())
    check(thing, VERSIONS[-1])
    spoil(thing)
    with pytest.raises(jsonschema.ValidationError):
        check(thing, VERSIONS[-1])


def test_a_kind_that_the_newest_api_has_dropped_is_found() -> None:
    old = {**things("Deployment")[0], "apiVersion": "extensions/v1beta1"}
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        check(old, VERSIONS[-1])


def test_generated_maps_fit_into_the_api() -> None:
    for each in generated():
        assert sum(len(text.encode()) for text in each["data"].values()) < MAX_CONFIG_MAP_NBYTES


def test_quantities_are_quantities_and_no_request_is_over_its_limit() -> None:
    """Schemas take any text for these."""
    seen = 0
    for node in (node for pod in PODS for node in walk(pod)):
        if "limits" in node:
            requested = node.get("requests", {})
            for name, limit in node["limits"].items():
                seen += 1
                assert amount(requested.get(name, limit)) <= amount(limit), (name, node)
    assert seen >= 4


def amount(quantity: str | int) -> float:
    """A Kubernetes quantity as a number."""
    units = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    units |= {f"{unit}i": 1024.0**power for power, unit in enumerate("KMGTP", start=1)}
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([A-Za-z]*)", str(quantity))
    assert found, quantity
    return float(found[1]) * units[found[2]]
