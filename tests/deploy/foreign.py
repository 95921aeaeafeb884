"""Closed schemas for kinds that are not part of Kubernetes' API, of the fields that the chart uses.

``kubernetes-validate`` has only Kubernetes' own. An unknown field is an error here as well.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import referencing
from kubernetes_validate.utils import all_versions

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string", "minLength": 1}
_TEXTS: Schema = {"type": "array", "minItems": 1, "items": _TEXT}
_NAMES: Schema = {"type": "object", "minProperties": 1, "additionalProperties": {"type": "string"}}
_DURATION: Schema = {"type": "string", "pattern": r"^([0-9]+(ms|s|m|h|d))+$"}


def closed(properties: Schema, *required: str) -> Schema:
    needed = required or tuple(properties)
    return {"type": "object", "additionalProperties": False, "required": list(needed), "properties": properties}


def _thing(spec: Schema) -> Schema:
    metadata = closed({"name": _TEXT, "namespace": _TEXT, "labels": _NAMES, "annotations": _NAMES}, "name")
    return closed({"apiVersion": _TEXT, "kind": _TEXT, "metadata": metadata, "spec": spec})


_KEY_OF_SECRET = closed({"name": _TEXT, "key": _TEXT})
_ENDPOINT = closed(
    {
        "port": _TEXT,
        "path": {"type": "string", "pattern": "^/"},
        "interval": _DURATION,
        "scheme": {"enum": ["http", "https"]},
        "tlsConfig": closed({"serverName": _TEXT, "ca": closed({"secret": _KEY_OF_SECRET})}),
        "authorization": closed({"type": {"const": "Bearer"}, "credentials": _KEY_OF_SECRET}),
        "relabelings": {"type": "array", "items": closed({"sourceLabels": _TEXTS, "targetLabel": _TEXT})},
    },
    "port",
)
_SELECTOR = closed({"matchLabels": _NAMES})
_RULE = closed(
    {"alert": _TEXT, "record": _TEXT, "expr": _TEXT, "for": _DURATION, "labels": _NAMES, "annotations": _NAMES}, "expr"
)
_POD: Schema = {"type": "object", "required": ["metadata", "spec"]}  # checked as a Pod by `check`
_KEDA_NUMBERS = ("pollingInterval", "cooldownPeriod", "minReplicaCount", "maxReplicaCount")
#: Fields of KServe's predictor that are not fields of a pod.
_PREDICTOR = ("minReplicas", "maxReplicas", "labels")

SCHEMAS: dict[tuple[str, str], Schema] = {
    ("monitoring.coreos.com/v1", "ServiceMonitor"): _thing(
        closed({"selector": _SELECTOR, "endpoints": {"type": "array", "minItems": 1, "items": _ENDPOINT}})
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): _thing(
        closed({"selector": _SELECTOR, "podMetricsEndpoints": {"type": "array", "minItems": 1, "items": _ENDPOINT}})
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): _thing(
        closed(
            {
                "groups": {
                    "type": "array",
                    "minItems": 1,
                    "items": closed({"name": _TEXT, "rules": {"type": "array", "minItems": 1, "items": _RULE}}),
                }
            }
        )
    ),
    ("cert-manager.io/v1", "Certificate"): _thing(
        closed(
            {
                "secretName": _TEXT,
                "dnsNames": {"type": "array", "minItems": 1, "items": {"type": "string", "pattern": r"^[a-z0-9*.-]+$"}},
                "usages": {"type": "array", "items": {"enum": ["server auth", "client auth"]}},
                "issuerRef": closed({"name": _TEXT, "kind": {"enum": ["Issuer", "ClusterIssuer"]}}),
            }
        )
    ),
    ("keda.sh/v1alpha1", "ScaledObject"): _thing(
        closed(
            {
                "scaleTargetRef": closed({"name": _TEXT}),
                **{name: {"type": "integer", "minimum": 0} for name in _KEDA_NUMBERS},
                "triggers": {
                    "type": "array",
                    "minItems": 1,
                    "items": closed(
                        {
                            "type": {"const": "prometheus"},
                            "metadata": closed({"serverAddress": _TEXT, "query": _TEXT, "threshold": _TEXT}),
                        }
                    ),
                },
            }
        )
    ),
    ("serving.kserve.io/v1beta1", "InferenceService"): _thing(
        closed(
            {
                "predictor": {
                    "type": "object",
                    "required": ["containers"],
                    "properties": {
                        "minReplicas": {"type": "integer"},
                        "maxReplicas": {"type": "integer"},
                        "labels": _NAMES,
                    },
                }
            }
        )
    ),
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): _thing(
        closed(
            {
                "replicas": {"type": "integer", "minimum": 0},
                "leaderWorkerTemplate": closed(
                    {
                        "size": {"type": "integer", "minimum": 1},
                        "restartPolicy": {"enum": ["RecreateGroupOnPodRestart", "None"]},
                        "leaderTemplate": _POD,
                        "workerTemplate": _POD,
                    }
                ),
            }
        )
    ),
}


#: The oldest and the newest API whose schemas are installed, as major.minor
VERSIONS = tuple(".".join(each.split(".")[:2]) for each in (all_versions()[0], all_versions()[-1]))


def check(thing: dict[str, Any], version: str) -> None:
    """Raise an error if an API server of Kubernetes ``version`` would reject ``thing``.

    Raises:
        jsonschema.ValidationError: a field is wrong or unknown.
        FileNotFoundError: this version has no such kind.
    """
    schema = SCHEMAS.get((thing["apiVersion"], thing["kind"]))
    if schema is None:
        _validator(thing["kind"], thing["apiVersion"], version).validate(thing)
        return
    jsonschema.Draft202012Validator(schema).validate(thing)
    for pod in _pods(thing["spec"]):
        _validator("Pod", "v1", version).validate({"apiVersion": "v1", "kind": "Pod", **pod})


@functools.cache
def _folder(version: str) -> Path:
    """The strict schemas of one version."""
    release = next(each for each in all_versions() if each.startswith(f"{version}."))
    return Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{release}-local-strict"


@functools.cache
def _definitions(version: str) -> referencing.Registry[Any]:
    content = json.loads((_folder(version) / "_definitions.json").read_text(encoding="utf-8"))
    return referencing.Resource.from_contents(content) @ referencing.Registry()


@functools.cache
def _validator(kind: str, api_version: str, version: str) -> jsonschema.Draft202012Validator:
    """As in :func:`kubernetes_validate.validate`, which reads its 10 MB of definitions again for each object."""
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    content = json.loads((_folder(version) / f"{kind.lower()}-{group}.json").read_text(encoding="utf-8"))
    registry = referencing.Resource.from_contents(content) @ _definitions(version)
    return jsonschema.Draft202012Validator(content, registry=registry)


def _pods(spec: Schema) -> list[Schema]:
    """The pods inside a foreign kind."""
    templates = spec.get("leaderWorkerTemplate", {})
    found = [templates[part] for part in ("leaderTemplate", "workerTemplate") if part in templates]
    if "predictor" in spec:
        fields = {name: value for name, value in spec["predictor"].items() if name not in _PREDICTOR}
        found.append({"metadata": {"labels": spec["predictor"].get("labels", {})}, "spec": fields})
    return found
