"""Wrong values are refused before anything reaches a cluster, by the schema or with a sentence that says what to do."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.deploy.rendering import (
    CHART,
    EXAMPLES,
    NAMESPACE,
    RELEASE,
    container,
    environment,
    helm_template,
    pods,
    refused,
    rendered,
)
from tests.deploy.tools import run, tool

#: Values that the schema rejects, each with the place and a word of the reason that Helm reports: all in one rendering.
WRONG: dict[str, tuple[str, Any, str, str]] = {
    "a misspelt value": ("planner.replica", 2, "/planner", "replica"),
    "a misspelt value of a worker": ("workers.a.replica", 2, "/workers/a", "replica"),
    "an unknown store": ("planner.store", "etcd", "/planner/store", "memory"),
    "an unknown platform": ("workers.a.platform", "tpu", "/workers/a/platform", "ascend-a2"),
    "a worker's name that no object can have": ("workers.Q_1", {}, "", "Q_1"),
    "a worker with the name of the planner": ("workers.planner", {}, "", "invalid propertyName 'planner'"),
    "no name of the token's Secret": ("auth.existingSecret", "", "/auth/existingSecret", "minLength"),
    "tls without an issuer": ("tls.enabled", True, "/tls/issuerRef/name", "minLength"),
    "an unquoted off, which is false in YAML": ("tls.seeds", False, "/tls/seeds", "require"),
    "an argument of the chart": ("workers.a.args", ["--load-format=auto"], "/workers/a/args/0", "not"),
    "a variable of the chart": ("workers.a.env", [{"name": "RFORK_TOKEN"}], "/workers/a/env/0/name", "not"),
    "labels that the worker would reject": ("workers.a.labels", "rack", "/workers/a/labels", "pattern"),
    "a quantity that is none": ("workers.a.shm", "lots", "/workers/a/shm", "pattern"),
    "one node as several": (
        "workers.a.multiNode",
        {"enabled": True, "size": 1},
        "/workers/a/multiNode/size",
        "minimum",
    ),
    "a peer that admits everybody": (
        "networkPolicy.plannerFrom",
        [{}],
        "/networkPolicy/plannerFrom/0",
        "minProperties",
    ),
}


def test_a_wrong_value_is_refused_by_the_schema() -> None:
    errors = refused(**{name: value for name, value, _, _ in WRONG.values()})
    found = re.findall(r"- at '([^']*)': (.+)$", errors, re.MULTILINE)
    for what, (_, _, place, reason) in WRONG.items():
        assert [text for at, text in found if at == place and reason in text], f"{what} at {place}: {errors}"


#: Values that do not fit each other → a part of the error, which says what to do.
CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "replicas without a shared store": ({"planner.replicas": 2}, "needs planner.store redis"),
    "a Redis without an address": ({"planner.store": "redis", "redis.enabled": False}, "redis.urlSecret.name"),
    "a token in the options": ({"workers.a.options.rfork_token": "x"}, "a token in options"),
    "an option of the chart": ({"workers.a.options.rfork_scheduler_url": "x"}, "rfork_scheduler_url is set"),
    "a setting of the chart": ({"planner.settings.port": 80}, "planner.settings.port is set by the chart"),
    "client certificates, which probes do not have": ({"planner.settings.tls_client_ca": "/ca"}, "tls_client_ca"),
    "rdma for NPUs": ({"workers.a": {"platform": "ascend-a2", "rdma": {"enabled": True}}}, "hccn.conf"),
    "a worker that the planner's policy rejects": ({"workers.a.hostNetwork": True}, "networkPolicy.plannerFrom"),
    "caches of code without TLS": ({"workers.a.options.rfork_caches": "code"}, "tls.seeds=require"),
    "caches of code over http": (
        {
            "workers.a.options.rfork_caches": "code",
            "tls": {"enabled": True, "issuerRef": {"name": "ca"}, "seeds": "prefer"},
        },
        "tls.seeds=require",
    ),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_values_that_contradict_each_other_are_refused(what: str) -> None:
    values, named = CONTRADICTIONS[what]
    assert named in refused(**values)


def test_zero_and_false_are_values_too() -> None:
    """A merge that takes them for missing ones would give a worker the defaults instead."""
    worker = {
        "platform": "ascend-a2",
        "replicas": 0,
        "ascend": {"driverMounts": False},
        "model": {"claim": ""},
        "options": {"rfork_become_seed": False, "rfork_seed_key_separator": "$("},
    }
    things = rendered("", json.dumps({"workers": {"q": worker}}))
    (deployment,) = [each for each in things if each["kind"] == "Deployment"]
    assert deployment["spec"]["replicas"] == 0
    pod = deployment["spec"]["template"]
    assert {each["name"] for each in pod["spec"]["volumes"]} == {"token", "shm"}
    (config,) = [each for each in container(pod)["args"] if "extra-config" in each]
    assert '"rfork_become_seed":false' in config
    # Kubernetes would expand $(NAME) in an argument; $$( is its escape.
    assert '"rfork_seed_key_separator":"$$("' in config


def test_a_worker_can_leave_its_fleet_without_a_new_template() -> None:
    """A roll-back: vLLM's default loader, which rejects options of this package."""
    (_, pod) = next(
        each for each in pods(rendered("cuda", json.dumps({"workers.qwen.fork": False}))) if "qwen" in each[0]
    )
    words = container(pod)["args"]
    assert not [word for word in words if word.startswith(("--load-format", "--model-loader-extra-config"))]
    assert "--max-model-len=8192" in words


def test_vllm_allows_a_start_as_long_as_kubernetes_does() -> None:
    def limit(**values: Any) -> list[str]:
        found = dict(pods(rendered("cuda", json.dumps(values))))[f"{RELEASE}-rfork-qwen"]
        return [each["value"] for each in container(found)["env"] if each["name"] == "VLLM_ENGINE_READY_TIMEOUT_S"]

    assert limit(**{"workers.qwen.startupSeconds": 1800}) == ["1800"]
    assert limit(**{"workers.qwen.env": [{"name": "VLLM_ENGINE_READY_TIMEOUT_S", "value": "60"}]}) == ["60"]


def test_large_numbers_stay_integers() -> None:
    things = rendered("redis")
    (settings,) = [each["data"] for each in things if each["kind"] == "ConfigMap"]
    assert settings["RFORK_PLANNER_MAX_SEEDS"] == "1000000"


def test_a_worker_has_the_defaults_that_it_does_not_set() -> None:
    found = dict(pods(rendered("cuda-rdma")))
    assert set(found) == {f"{RELEASE}-rfork-{each}" for each in ("planner", "qwen", "draft")}
    assert environment(found[f"{RELEASE}-rfork-qwen"])["RFORK_LABELS"] == "host=$(NODE_NAME),rack=r7,zone=$(ZONE)"
    assert container(found[f"{RELEASE}-rfork-draft"])["args"][0] == "/models/draft"


def test_without_a_token_no_secret_is_mounted() -> None:
    things = rendered("cuda", json.dumps({"auth.enabled": False}))
    for _, pod in pods(things):
        assert "token" not in {each["name"] for each in pod["spec"].get("volumes", [])}
        assert "RFORK_TOKEN_FILE" not in environment(pod)


#: Arguments of Helm → what the notes must name.
NOTES: dict[tuple[str, ...], tuple[str, ...]] = {
    (): (
        "create secret generic -n prod rfork-token",
        "vllm serve MODEL --load-format rfork",
        "networkPolicy.workerNamespaces",
        "WARNING: imageRegistry is an example",
    ),
    ("--set", "auth.enabled=false"): ("WARNING: auth.enabled is false",),
    ("--values", "redis"): ("create secret generic -n prod rfork-redis",),
    ("--values", "cuda-host-pid"): (
        "http://fleet-rfork-qwen.prod.svc:8000/v1",
        "kubectl exec -n prod deploy/fleet-rfork-qwen -- vllm-rfork seeds",
        "hostPID is on",
        "TLS is off",
    ),
    ("--values", "ascend-a2"): ("hostNetwork is on",),
    ("--values", "multi-node"): ("kubectl exec -n prod pod/fleet-rfork-large-0 -- vllm-rfork seeds",),
    ("--set", "tls.enabled=true,tls.issuerRef.name=ca,tls.seeds=prefer"): ("WARNING: tls.seeds is prefer",),
}

EXAMPLE_NAMES = {each.stem for each in EXAMPLES}


@pytest.mark.parametrize("arguments", NOTES, ids=" ".join)
def test_the_notes_name_what_to_do_next(arguments: tuple[str, ...]) -> None:
    given = [str(CHART / "ci" / f"{each}.yaml") if each in EXAMPLE_NAMES else each for each in arguments]
    done = run(tool("helm"), "install", RELEASE, CHART, "--namespace", NAMESPACE, "--dry-run=client", *given)
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:")[2]
    assert [each for each in NOTES[arguments] if each not in notes] == []


def test_the_settings_of_an_unknown_name_reach_the_planner_that_rejects_them() -> None:
    """The chart does not repeat the list of settings; the planner names a wrong one at its start."""
    code, output, _ = helm_template("--set", "planner.settings.lease_ttl=5")
    assert code == 0
    assert 'RFORK_PLANNER_LEASE_TTL: "5"' in output
