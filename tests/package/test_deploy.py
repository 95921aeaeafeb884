"""The Kubernetes manifests and the Grafana dashboard agree with each other and with the planner. Needs no cluster."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_rfork.config import ENVIRONMENT, parse_config
from vllm_rfork.engines.registry import engine_order
from vllm_rfork.messages import HEALTHZ, METRICS, parse_labels
from vllm_rfork.planner.metrics import Metrics
from vllm_rfork.planner.settings import ENVIRONMENT_PREFIX, check_environment, settings_from

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text(encoding="utf-8"))
#: Applied by hand, so that no token that everybody can read is ever in use.
SECRETS = "secrets.example.yaml"
API_VERSIONS = {
    "Namespace": "v1",
    "Secret": "v1",
    "ConfigMap": "v1",
    "Service": "v1",
    "Deployment": "apps/v1",
    "StatefulSet": "apps/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "PodDisruptionBudget": "policy/v1",
    "ServiceMonitor": "monitoring.coreos.com/v1",
}
#: Brought by whoever deploys.
FOREIGN_CLAIMS = {"models"}

Thing = dict[str, Any]


def things(*kinds: str) -> list[Thing]:
    """Every object of the kinds, of all files; all of them where no kind is named."""
    found: list[Thing] = []
    for name in [*KUSTOMIZATION["resources"], SECRETS]:
        found += [each for each in yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")) if each]
    return [each for each in found if not kinds or each["kind"] in kinds]


def named(kind: str, name: str) -> Thing:
    return next(each for each in things(kind) if each["metadata"]["name"] == name)


WORKLOADS = things("Deployment", "StatefulSet")
PODS = [each["spec"]["template"] for each in WORKLOADS]
by_name = [each["metadata"]["name"] for each in WORKLOADS]


def labels_of(pod: Thing) -> set[tuple[str, str]]:
    return set(pod["metadata"]["labels"].items())


def chosen(selector: Thing) -> list[Thing]:
    """The pods that a set of labels chooses."""
    return [pod for pod in PODS if set(selector.items()) <= labels_of(pod)]


def ports_of(pod: Thing) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for box in pod["spec"]["containers"] for port in box["ports"]}


def walk(node: Any) -> Iterator[Thing]:
    """Every mapping in ``node``."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from walk(value)


def test_kustomization_names_every_file_but_the_secrets() -> None:
    files = {each.name for each in FOLDER.glob("*.yaml")}
    assert set(KUSTOMIZATION["resources"]) == files - {"kustomization.yaml", SECRETS}
    generated = [file.rpartition("=")[2] for each in KUSTOMIZATION["configMapGenerator"] for file in each["files"]]
    assert all((FOLDER / name).is_file() for name in generated)


def test_every_object_is_of_a_known_kind_and_has_a_name_of_its_own() -> None:
    seen = [(each["kind"], each["metadata"]["name"]) for each in things()]
    assert len(seen) == len(set(seen))
    for each in things():
        assert each["apiVersion"] == API_VERSIONS[each["kind"]]
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", each["metadata"]["name"])
        assert each["metadata"].get("namespace", KUSTOMIZATION["namespace"]) == KUSTOMIZATION["namespace"]
    assert named("Namespace", KUSTOMIZATION["namespace"])


def test_what_is_asked_for_is_there() -> None:
    """A planner with Redis, both kinds of workers, the fence and the monitor."""
    assert set(by_name) == {"rfork-planner", "rfork-redis", "rfork-vllm-ascend", "rfork-vllm-cuda"}
    assert {each["metadata"]["name"] for each in things("NetworkPolicy")} >= {"rfork-workers", "rfork-planner"}
    assert things("ServiceMonitor")


@pytest.mark.parametrize("workload", WORKLOADS, ids=by_name)
def test_a_workload_chooses_its_own_pods_and_no_others(workload: Thing) -> None:
    assert chosen(workload["spec"]["selector"]["matchLabels"]) == [workload["spec"]["template"]]


def test_services_and_policies_choose_pods_that_exist() -> None:
    for service in things("Service"):
        pods = chosen(service["spec"]["selector"])
        assert len(pods) == 1, service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            assert ports_of(pods[0])[port["targetPort"]] == port["port"]
    for policy in things("NetworkPolicy"):
        pods = chosen(policy["spec"]["podSelector"]["matchLabels"])
        assert pods
        for node in walk(policy["spec"]["ingress"]):
            if "podSelector" in node:
                assert chosen(node["podSelector"]["matchLabels"])
            if "port" in node:
                assert all(node["port"] in ports_of(pod) for pod in pods)


def test_planners_can_be_updated_and_drained_one_after_the_other() -> None:
    """A standby is ready, too: what waits for ready replicas would wait for ever if only the leader were."""
    spec = named("StatefulSet", "rfork-planner")["spec"]
    assert (spec["replicas"], spec["podManagementPolicy"]) == (2, "Parallel")
    (box,) = spec["template"]["spec"]["containers"]
    probes = ("startupProbe", "readinessProbe", "livenessProbe")
    assert {box[probe]["httpGet"]["path"] for probe in probes} == {HEALTHZ}
    (budget,) = things("PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 1
    assert chosen(budget["spec"]["selector"]["matchLabels"]) == [spec["template"]]


def planner_urls() -> str:
    """The addresses of the planner's pods, which its headless Service names."""
    replicas, service = named("StatefulSet", "rfork-planner")["spec"], named("Service", "rfork-planner")
    assert service["spec"]["clusterIP"] == "None"
    assert replicas["serviceName"] == service["metadata"]["name"]
    port = service["spec"]["ports"][0]["port"]
    return ",".join(f"http://rfork-planner-{each}.rfork-planner:{port}" for each in range(replicas["replicas"]))


def test_the_engines_ports_are_open_to_workers_alone() -> None:
    """The fence of SECURITY.md: without a port, a rule opens all of them."""
    worker = {"rfork/worker": "true"}
    assert len(chosen(worker)) == 2
    policy = named("NetworkPolicy", "rfork-workers")["spec"]
    assert policy["podSelector"]["matchLabels"] == worker
    for rule in policy["ingress"]:
        if "ports" not in rule:
            assert rule["from"] == [{"podSelector": {"matchLabels": worker}}]
        else:
            assert [each["port"] for each in rule["ports"]] == ["api"]
    redis = named("NetworkPolicy", "rfork-redis")["spec"]["ingress"]
    assert [chosen(each["podSelector"]["matchLabels"]) for rule in redis for each in rule["from"]] == [
        [named("StatefulSet", "rfork-planner")["spec"]["template"]]
    ]


def test_everything_that_pods_refer_to_exists() -> None:
    maps = {each["metadata"]["name"] for each in things("ConfigMap")}
    secrets = {each["metadata"]["name"]: set(each["stringData"]) for each in things("Secret")}
    refers = 0
    for thing in [*PODS, *things("ServiceMonitor")]:
        for node in walk(thing):
            if "configMapRef" in node:
                assert node["configMapRef"]["name"] in maps
            if "configMap" in node:
                assert node["configMap"]["name"] in maps
            for way in ("secretKeyRef", "credentials"):
                if way in node:
                    refers += 1
                    assert node[way]["key"] in secrets[node[way]["name"]]
            if "secretName" in node:
                refers += 1
                assert {item["key"] for item in node["items"]} <= secrets[node["secretName"]]
            if "claimName" in node:
                assert node["claimName"] in FOREIGN_CLAIMS
    assert refers >= 6


@pytest.mark.parametrize("pod", PODS, ids=by_name)
def test_pods_mount_what_they_have_and_probe_ports_that_are_open(pod: Thing) -> None:
    volumes = {each["name"] for each in pod["spec"].get("volumes", [])}
    volumes |= {each["metadata"]["name"] for each in named_claims(pod)}
    for box in pod["spec"]["containers"]:
        assert {each["name"] for each in box["volumeMounts"]} <= volumes
        assert {"readinessProbe", "livenessProbe"} <= set(box)
        assert "limits" in box["resources"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            for way in ("httpGet", "tcpSocket"):
                if way in box.get(probe, {}):
                    assert box[probe][way]["port"] in ports_of(pod)
    # A Service named rfork-planner sets RFORK_PLANNER_PORT in every container that does not say so.
    assert pod["spec"]["enableServiceLinks"] is False
    assert pod["spec"]["automountServiceAccountToken"] is False


def named_claims(pod: Thing) -> list[Thing]:
    return next(each["spec"].get("volumeClaimTemplates", []) for each in WORKLOADS if each["spec"]["template"] is pod)


def test_the_planners_settings_are_settings_and_fit_the_rest() -> None:
    data = named("ConfigMap", "rfork-planner")["data"]
    assert all(isinstance(value, str) for value in data.values())
    check_environment([*data, ENVIRONMENT_PREFIX + "STORE"])
    url = named("Secret", "rfork-redis")["stringData"]["url"]
    given = {name.removeprefix(ENVIRONMENT_PREFIX).lower(): value for name, value in data.items()}
    settings = settings_from({**given, "store": url})
    pod = named("StatefulSet", "rfork-planner")["spec"]["template"]
    assert ports_of(pod) == {"http": settings.port}
    assert f"@rfork-redis:{ports_of(chosen({'app.kubernetes.io/name': 'rfork-redis'})[0])['redis']}/" in url
    (box,) = pod["spec"]["containers"]
    assert str(settings.token_file).startswith(box["volumeMounts"][0]["mountPath"] + "/")
    # Those who wait are sent away, then requests under way end: either may take the whole time.
    assert pod["spec"]["terminationGracePeriodSeconds"] > 2 * settings.drain_sec
    assert not settings.trust_announced_address


def test_redis_has_every_write_on_disk_before_it_is_answered() -> None:
    (box,) = named("StatefulSet", "rfork-redis")["spec"]["template"]["spec"]["containers"]
    words = box["args"][0].split()
    assert words[words.index("--appendfsync") + 1] == "always"
    assert words[words.index("--appendonly") + 1] == "yes"


@pytest.mark.parametrize("name", ["rfork-vllm-ascend", "rfork-vllm-cuda"])
def test_workers_are_given_options_that_exist_and_reach_the_planner(name: str) -> None:
    settings = parse_config(json.loads(named("ConfigMap", name)["data"]["extra-config.json"]), {}).settings
    assert settings.rfork_scheduler_url == planner_urls()
    assert not settings.missing
    assert engine_order(settings.rfork_engine, "npu" if name == "rfork-vllm-ascend" else "cuda")
    pod = named("Deployment", name)["spec"]["template"]
    # A containerPort of a pod on the host's network is a host port, and a second pod on the node would stay pending.
    assert ports_of(pod).get("seed", 0) == settings.rfork_seed_port_base
    assert "seed" not in ports_of(pod) or name == "rfork-vllm-cuda"
    (box,) = pod["spec"]["containers"]
    assert f"--port {ports_of(pod)['api']} " in box["args"][0]
    environment = {each["name"]: each.get("value", "") for each in box["env"]}
    assert set(environment) - set(ENVIRONMENT.values()) == {"NODE_NAME"}
    assert "$(NODE_NAME)" in environment["RFORK_LABELS"]
    named_node = environment["RFORK_LABELS"].replace("$(NODE_NAME)", "node-7.example")
    told = parse_config({"rfork_labels": named_node}, {}).settings
    assert parse_labels(told.labels("the-pods-name")) == {"host": "node-7.example"}
    mounts = {each["name"]: each["mountPath"] for each in box["volumeMounts"]}
    assert environment["RFORK_TOKEN_FILE"] == mounts["token"] + "/token"
    assert settings.rfork_seed_wait_sec is None, "the planner decides"


def test_no_secret_holds_a_value_that_somebody_might_keep() -> None:
    for each in things("Secret"):
        for value in each["stringData"].values():
            assert value in {"", "redis://:PASSWORD@rfork-redis:6379/0"}


def test_the_monitor_scrapes_the_planner() -> None:
    (monitor,) = things("ServiceMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    (service,) = [each for each in things("Service") if wanted <= each["metadata"]["labels"].items()]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {each["name"] for each in service["spec"]["ports"]}
    assert endpoint["path"] == METRICS


# --- the dashboard ---------------------------------------------------------------------------------------------------
DASHBOARD = json.loads((FOLDER / "grafana-dashboard.json").read_text(encoding="utf-8"))


def series() -> dict[str, set[str]]:
    """Every series that the planner can show, with its labels, from the metrics themselves."""
    found: dict[str, set[str]] = {}
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", Metrics(10).page({}).decode(), re.MULTILINE):
        for suffix in ("_bucket", "_count", "_sum") if kind == "histogram" else ("",):
            found[name + suffix] = set()
    return found


def queries() -> list[str]:
    asked = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return asked + [each["query"]["query"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]


def test_every_metric_on_the_dashboard_is_one_of_the_planners() -> None:
    used = {name for query in queries() for name in re.findall(r"rfork_planner_\w+", query)}
    assert used <= set(series())
    assert len(used) > 15


def test_every_metric_of_the_planner_is_on_the_dashboard() -> None:
    text = " ".join(queries())
    for name in series():
        if not name.endswith(("_created", "_count", "_sum")):
            assert re.search(rf"\b{name}\b", text), name


def test_panels_lie_beside_each_other_and_ask_whole_questions() -> None:
    taken: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    variables = {each["name"] for each in DASHBOARD["templating"]["list"]}
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["targets"]
    for query in queries():
        assert query.count("(") == query.count(")")
        assert query.count("{") == query.count("}")
        assert set(re.findall(r"\$(\w+)", query)) <= variables | {"__rate_interval"}
