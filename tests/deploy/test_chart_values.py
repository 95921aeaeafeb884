"""Wrong values are refused before anything reaches a cluster, by the schema or with a sentence that says what to do."""

from __future__ import annotations

import json
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

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt value": ({"planner.replica": 2}, "replica"),
    "a misspelt value of a worker": ({"workers": {"q": {"replica": 2}}}, "replica"),
    "an unknown store": ({"planner.store": "etcd"}, "store"),
    "an unknown platform": ({"workers": {"q": {"platform": "tpu"}}}, "platform"),
    "a worker's name that no object can have": ({"workers": {"Q_1": {}}}, "Q_1"),
    "replicas without a shared store": ({"planner.replicas": 2}, "needs planner.store redis"),
    "tls without an issuer": ({"tls.enabled": True}, "issuerRef"),
    "an unquoted off, which is false in YAML": ({"tls.seeds": False}, "seeds"),
    "a Redis without an address": ({"planner.store": "redis", "redis.enabled": False}, "redis.urlSecret.name"),
    "a token in the options": ({"workers": {"q": {"options": {"rfork_token": "x"}}}}, "a token in options"),
    "an option of the chart": (
        {"workers": {"q": {"options": {"rfork_scheduler_url": "x"}}}},
        "rfork_scheduler_url is set",
    ),
    "an argument of the chart": ({"workers": {"q": {"args": ["--load-format=auto"]}}}, "args"),
    "labels that the worker would reject": ({"workers": {"q": {"labels": "rack"}}}, "labels"),
    "a setting of the chart": ({"planner.settings.host": "::"}, "planner.settings.host is set by the chart"),
    "client certificates, which probes do not have": ({"planner.settings.tls_client_ca": "/ca"}, "tls_client_ca"),
    "rdma for NPUs": ({"workers": {"q": {"platform": "ascend-a2", "rdma": {"enabled": True}}}}, "hccn.conf"),
    "a quantity that is none": ({"workers": {"q": {"shm": "lots"}}}, "shm"),
    "one node as several": ({"workers": {"q": {"multiNode": {"enabled": True, "size": 1}}}}, "size"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_value_is_refused(what: str) -> None:
    values, named = WRONG[what]
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


def test_large_numbers_stay_integers() -> None:
    things = rendered("redis")
    (settings,) = [each["data"] for each in things if each["kind"] == "ConfigMap"]
    assert settings["RFORK_PLANNER_MAX_SEEDS"] == "1000000"


def test_a_worker_has_the_defaults_that_it_does_not_set() -> None:
    found = dict(pods(rendered("cuda-rdma")))
    assert set(found) == {f"{RELEASE}-rfork-{each}" for each in ("planner", "qwen", "draft")}
    assert environment(found[f"{RELEASE}-rfork-qwen"])["RFORK_LABELS"] == "host=$(NODE_NAME),rack=r7,zone=z1"
    assert container(found[f"{RELEASE}-rfork-draft"])["args"][0] == "/models/draft"


def test_without_a_token_no_secret_is_mounted() -> None:
    things = rendered("cuda", json.dumps({"auth.enabled": False}))
    for _, pod in pods(things):
        assert "token" not in {each["name"] for each in pod["spec"].get("volumes", [])}
        assert "RFORK_TOKEN_FILE" not in environment(pod)


NOTES: dict[str, tuple[tuple[str, ...], str]] = {
    "the Secret that has to exist": ((), "create secret generic -n prod rfork-token"),
    "the arguments of a worker elsewhere": ((), "vllm serve MODEL --load-format rfork"),
    "a planner without a token": (("--set", "auth.enabled=false"), "WARNING: auth.enabled is false"),
    "the password of Redis": (("--values", "redis"), "create secret generic -n prod rfork-redis"),
    "the address of a worker": (("--values", "cuda"), "http://fleet-rfork-qwen.prod.svc:8000/v1"),
    "shared pids": (("--values", "cuda"), "hostPID is on"),
    "the host's network": (("--values", "ascend-a2"), "hostNetwork is on"),
    "seeds that may use http": (("--values", "tls", "--set", "tls.seeds=prefer"), "WARNING: tls.seeds is prefer"),
    "a token that crosses the network readable": (("--values", "cuda"), "TLS is off"),
}

EXAMPLE_NAMES = {each.stem for each in EXAMPLES}


@pytest.mark.parametrize("what", NOTES)
def test_the_notes_name(what: str) -> None:
    arguments, text = NOTES[what]
    given = [str(CHART / "ci" / f"{each}.yaml") if each in EXAMPLE_NAMES else each for each in arguments]
    done = run(tool("helm"), "install", RELEASE, CHART, "--namespace", NAMESPACE, "--dry-run=client", *given)
    assert done.returncode == 0, done.stderr
    assert text in done.stdout.partition("NOTES:")[2]


def test_the_settings_of_an_unknown_name_reach_the_planner_that_rejects_them() -> None:
    """The chart does not repeat the list of settings; the planner names a wrong one at its start."""
    code, output, _ = helm_template("--set", "planner.settings.lease_ttl=5")
    assert code == 0
    assert 'RFORK_PLANNER_LEASE_TTL: "5"' in output
