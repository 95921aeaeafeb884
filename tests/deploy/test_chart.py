"""The chart: every example renders, is valid for old and new Kubernetes, and agrees with the package's own options."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import jsonschema
import pytest
import yaml

from tests.deploy.foreign import VERSIONS, check
from tests.deploy.rendering import (
    CHART,
    EXAMPLES,
    NAMESPACE,
    RELEASE,
    Thing,
    container,
    environment,
    of_kind,
    pods,
    rendered,
    walk,
)
from tests.deploy.tools import ROOT, run, tool
from vllm_rfork import __version__
from vllm_rfork.config import ENVIRONMENT, parse_config
from vllm_rfork.engines.registry import engine_order
from vllm_rfork.messages import HEALTHZ, METRICS, parse_labels
from vllm_rfork.planner.settings import ENVIRONMENT_PREFIX, check_environment, settings_from

NAMES = [each.stem for each in EXAMPLES]
WORKER = {"rfork/worker": "true"}


def named(things: tuple[Thing, ...], kind: str, name: str) -> Thing:
    return next(each for each in of_kind(things, kind) if each["metadata"]["name"] == name)


def chosen(things: tuple[Thing, ...], labels: dict[str, str]) -> list[str]:
    """The workloads whose pods a set of labels selects."""
    return [name for name, pod in pods(things) if labels.items() <= pod["metadata"]["labels"].items()]


@pytest.mark.parametrize("example", NAMES)
def test_every_example_passes_helms_linter(example: str) -> None:
    done = run(tool("helm"), "lint", "--strict", CHART, "--values", CHART / "ci" / f"{example}.yaml")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("example", NAMES)
def test_every_example_renders_and_is_valid(example: str, version: str) -> None:
    things = rendered(example)
    assert len(things) >= 4
    for each in things:
        try:
            check(each, version)
        except jsonschema.ValidationError as error:
            pytest.fail(f"{each['kind']} {each['metadata']['name']} at {error.json_path}: {error.message}")


def test_the_schemas_find_what_is_wrong() -> None:
    spoilt: list[tuple[str, str, Any]] = [
        ("redis", "StatefulSet", lambda it: it["spec"].update(replica=2)),
        ("multi-node", "LeaderWorkerSet", lambda it: it["spec"].update(size=2)),
        (
            "multi-node",
            "LeaderWorkerSet",
            lambda it: it["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"].update(hostPid=True),
        ),
        ("tls", "Certificate", lambda it: it["spec"]["usages"].append("signing")),
        ("monitoring", "PodMonitor", lambda it: it["spec"]["podMetricsEndpoints"][0].update(interval="15")),
        ("monitoring", "PrometheusRule", lambda it: it["spec"]["groups"][0]["rules"][0].pop("expr")),
    ]
    for example, kind, spoil in spoilt:
        thing = copy.deepcopy(of_kind(rendered(example), kind)[0])
        spoil(thing)
        with pytest.raises(jsonschema.ValidationError):
            check(thing, VERSIONS[-1])


@pytest.mark.parametrize("example", NAMES)
def test_selectors_choose_pods_that_exist(example: str) -> None:
    things = rendered(example)
    for service in of_kind(things, "Service"):
        assert len(chosen(things, service["spec"]["selector"])) == 1, service["metadata"]["name"]
    for workload in of_kind(things, "Deployment", "StatefulSet"):
        assert chosen(things, workload["spec"]["selector"]["matchLabels"]) == [workload["metadata"]["name"]]
    for policy in of_kind(things, "NetworkPolicy"):
        labels = policy["spec"]["podSelector"]["matchLabels"]
        assert chosen(things, labels) or ("rfork/worker" in labels and not worker_pods(example))
    for monitor in of_kind(things, "PodMonitor"):
        assert chosen(things, monitor["spec"]["selector"]["matchLabels"])
    seen = [(each["kind"], each["metadata"]["name"]) for each in things]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("example", NAMES)
def test_pods_are_confined(example: str) -> None:
    for name, pod in pods(rendered(example)):
        spec, box = pod["spec"], container(pod)
        assert spec["automountServiceAccountToken"] is False, name
        # A Service called …-planner sets RFORK_…_PORT in every container that does not say so.
        assert spec["enableServiceLinks"] is False, name
        assert box["securityContext"]["allowPrivilegeEscalation"] is False
        assert "limits" in box["resources"]
        volumes = {each["name"] for each in spec.get("volumes", [])}
        assert {each["name"] for each in box.get("volumeMounts", [])} <= volumes | {"data"}
        if name.endswith(("-planner", "-redis")):
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert box["securityContext"]["readOnlyRootFilesystem"] is True
            assert box["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        ports = {each["name"] for each in box.get("ports", [])}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            for way in ("httpGet", "tcpSocket"):
                assert box.get(probe, {}).get(way, {"port": None})["port"] in {None, *ports}


def security_level(pod: Thing) -> str:
    """The strictest level of the Pod Security Standards that admits the pod, of what the chart can set."""
    spec, security = pod["spec"], container(pod)["securityContext"]
    shared = spec.get("hostPID") or spec.get("hostNetwork")
    if (
        shared
        or "add" in security.get("capabilities", {})
        or any("hostPath" in each for each in spec.get("volumes", []))
    ):
        return "privileged"
    own = spec.get("securityContext", {})
    confined = own.get("runAsNonRoot") and own.get("seccompProfile") == {"type": "RuntimeDefault"}
    dropped = security.get("capabilities") == {"drop": ["ALL"]} and not security["allowPrivilegeEscalation"]
    return "restricted" if confined and dropped else "baseline"


def test_pods_need_no_more_privileges_than_the_readme_says() -> None:
    text = (CHART / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^\| planner, Redis \| `restricted` \|$", text, re.MULTILINE)
    assert re.search(r"^\| workers \| `baseline` \|$", text, re.MULTILINE)
    assert re.search(r"^\| workers with `rdma` .*`hostPID`, `hostNetwork`, .* \| `privileged` \|$", text, re.MULTILINE)
    for example in NAMES:
        for name, pod in pods(rendered(example)):
            privileged = example in {"cuda-rdma", "cuda-host-pid", "multi-node", "ascend-a2"}
            worker = "privileged" if privileged else "baseline"
            expected = "restricted" if name.endswith(("-planner", "-redis")) else worker
            assert security_level(pod) == expected, f"{example} {name}"


#: Name → keys of the Secrets that a user creates; cert-manager makes those of the Certificates.
SECRETS = {"rfork-token": {"token", "scrape-token"}, "rfork-redis": {"password"}, "our-redis": {"uri"}}


@pytest.mark.parametrize("example", NAMES)
def test_everything_that_pods_refer_to_exists(example: str) -> None:
    things = rendered(example)
    maps = {each["metadata"]["name"] for each in of_kind(things, "ConfigMap")}
    certificates = {each["spec"]["secretName"] for each in of_kind(things, "Certificate")}
    for node in walk(list(things)):
        if "configMapRef" in node:
            assert node["configMapRef"]["name"] in maps
        for way in ("secretKeyRef", "credentials"):
            if way in node:
                assert node[way]["key"] in SECRETS[node[way]["name"]]
        if "secretName" in node and "issuerRef" not in node and node["secretName"] not in certificates:
            assert {item["key"] for item in node["items"]} <= SECRETS[node["secretName"]]
        if "persistentVolumeClaim" in node:
            assert node["persistentVolumeClaim"]["claimName"] == "models"


#: Group of foreign kinds → what the quick start calls that which brings them.
FOREIGN = {
    "cert-manager.io": "cert-manager",
    "monitoring.coreos.com": "Prometheus operator",
    "leaderworkerset.x-k8s.io": "LeaderWorkerSet",
}


@pytest.mark.parametrize("example", NAMES)
def test_the_quick_start_says_what_an_example_needs_before(example: str) -> None:
    page = (ROOT / "docs" / "quick-start" / "kubernetes.md").read_text(encoding="utf-8")
    section = page.split("## 2.")[1].split("\n## ")[0]
    row = "".join(re.findall(rf"^\| `{example}\.yaml` \| (.+) \|$", section, re.MULTILINE))
    things = rendered(example)
    needed = {FOREIGN[group] for each in things if (group := each["apiVersion"].partition("/")[0]) in FOREIGN}
    refers = {node["secretKeyRef"]["name"] for node in walk(list(things)) if "secretKeyRef" in node}
    needed |= {"Secret" if name == "our-redis" else name for name in refers}
    assert [each for each in needed if each not in row] == []
    assert bool(row) == bool(needed)


def undefined(box: Thing) -> list[str]:
    """Names in $(NAME) of variables that are not defined before; Kubernetes leaves these as they are."""
    known: set[str] = set()
    found = []
    for each in box.get("env", []):
        found += [name for name in re.findall(r"(?<!\$)\$\((\w+)\)", each.get("value", "")) if name not in known]
        known.add(each["name"])
    return found


@pytest.mark.parametrize("example", NAMES)
def test_variables_refer_to_earlier_ones(example: str) -> None:
    for name, pod in pods(rendered(example)):
        assert undefined(container(pod)) == [], name


@pytest.mark.parametrize("example", NAMES)
def test_quantities_are_quantities_and_no_request_is_over_its_limit(example: str) -> None:
    """Schemas take any text for these."""
    for _, pod in pods(rendered(example)):
        resources = container(pod)["resources"]
        for name, limit in resources["limits"].items():
            assert amount(resources["requests"].get(name, limit)) <= amount(limit), name


def amount(quantity: str | int) -> float:
    """A Kubernetes quantity as a number."""
    units = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    units |= {f"{unit}i": 1024.0**power for power, unit in enumerate("KMGTP", start=1)}
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([A-Za-z]*)", str(quantity))
    assert found, quantity
    return float(found[1]) * units[found[2]]


@pytest.mark.parametrize("example", NAMES)
def test_the_planners_settings_are_settings(example: str) -> None:
    things = rendered(example)
    data = named(things, "ConfigMap", f"{RELEASE}-rfork-planner")["data"]
    check_environment([*data, ENVIRONMENT_PREFIX + "STORE"])
    settings = settings_from({name.removeprefix(ENVIRONMENT_PREFIX).lower(): value for name, value in data.items()})
    pod = named(things, "StatefulSet", f"{RELEASE}-rfork-planner")["spec"]["template"]
    box = container(pod)
    assert box["ports"] == [{"name": "http", "containerPort": settings.port}]
    mounted = tuple(each["mountPath"] + "/" for each in box["volumeMounts"])
    for path in (settings.token_file, settings.tls_cert, settings.tls_key):
        assert path is None or str(path).startswith(mounted)
    assert pod["spec"]["terminationGracePeriodSeconds"] > 2 * settings.drain_sec
    assert not settings.trust_announced_address
    scheme = "HTTP" if settings.tls_cert is None else "HTTPS"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert (box[probe]["httpGet"]["path"], box[probe]["httpGet"]["scheme"]) == (HEALTHZ, scheme)


def worker_pods(example: str) -> list[tuple[str, Thing]]:
    return [(name, pod) for name, pod in pods(rendered(example)) if WORKER.items() <= pod["metadata"]["labels"].items()]


def option(pod: Thing, name: str) -> str:
    found = [each.partition("=")[2] for each in container(pod)["args"] if each.partition("=")[0] == f"--{name}"]
    assert len(found) == 1, name
    return found[0].replace("$$(", "$(")


@pytest.mark.parametrize("example", NAMES)
def test_workers_have_options_that_exist_and_every_planners_address(example: str) -> None:
    planner = named(rendered(example), "StatefulSet", f"{RELEASE}-rfork-planner")["spec"]
    scheme = "https" if "tls" in {each["name"] for each in planner["template"]["spec"]["volumes"]} else "http"
    for name, pod in worker_pods(example):
        told = {key: value for key, value in environment(pod).items() if key in ENVIRONMENT.values()}
        # A variable that the cluster does not fill is empty, and so its label is left out.
        told["RFORK_LABELS"] = re.sub(r"\$\(\w+\)", "", told["RFORK_LABELS"].replace("$(NODE_NAME)", "node-7.example"))
        settings = parse_config(json.loads(option(pod, "model-loader-extra-config")), told).settings
        assert not settings.missing
        assert engine_order(settings.rfork_engine, "npu" if example.startswith("ascend") else "cuda")
        assert settings.rfork_seed_wait_sec is None, "the planner decides"
        assert settings.rfork_scheduler_url.split(",") == [
            f"{scheme}://{RELEASE}-rfork-planner-{each}.{RELEASE}-rfork-planner.{NAMESPACE}.svc:1223"
            for each in range(planner["replicas"])
        ]
        assert parse_labels(settings.labels("pod"))["host"] == "node-7.example"
        assert option(pod, "load-format") == "rfork"
        mounts = tuple(each["mountPath"] + "/" for each in container(pod)["volumeMounts"])
        for path in (settings.rfork_token_file, settings.rfork_tls_cert_file, settings.rfork_tls_key_file):
            assert not path or path.startswith(mounts), name
        assert settings.rfork_token_file
        assert (settings.rfork_seed_tls == "require") == (scheme == "https")


@pytest.mark.parametrize("example", NAMES)
def test_the_engines_ports_are_open_to_workers_alone(example: str) -> None:
    """The isolation of SECURITY.md: a rule without ports opens all of them."""
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(rendered(example), "NetworkPolicy")}
    assert f"{RELEASE}-rfork-planner" in policies
    for rule in policies[f"{RELEASE}-rfork-workers"]["ingress"]:
        if "ports" in rule:
            assert [each["port"] for each in rule["ports"]] == ["api"]
        else:
            assert all(peer["podSelector"]["matchLabels"] == WORKER for peer in rule["from"])


def test_redis_is_open_to_planners_alone() -> None:
    things = rendered("redis")
    policy = named(things, "NetworkPolicy", f"{RELEASE}-rfork-redis")["spec"]
    peers = [peer for rule in policy["ingress"] for peer in rule["from"]]
    assert [chosen(things, peer["podSelector"]["matchLabels"]) for peer in peers] == [[f"{RELEASE}-rfork-planner"]]


def test_workers_of_other_namespaces_are_admitted_by_name_and_label() -> None:
    policy = named(rendered("memory"), "NetworkPolicy", f"{RELEASE}-rfork-planner")["spec"]
    (rule,) = policy["ingress"]
    admitted = [
        (peer["namespaceSelector"]["matchExpressions"][0]["values"], peer.get("podSelector"))
        for peer in rule["from"]
        if "namespaceSelector" in peer
    ]
    assert admitted == [(["team-a", "team-b"], {"matchLabels": WORKER}), (["monitoring"], None)]


def test_the_api_can_be_closed_to_all_but_its_callers() -> None:
    policy = named(rendered("monitoring"), "NetworkPolicy", f"{RELEASE}-rfork-workers")["spec"]
    (api,) = [rule for rule in policy["ingress"] if "ports" in rule]
    assert len(api["from"]) == 2
    (open_to_all,) = [
        rule
        for rule in named(rendered("cuda"), "NetworkPolicy", f"{RELEASE}-rfork-workers")["spec"]["ingress"]
        if "ports" in rule
    ]
    assert "from" not in open_to_all


def test_a_changed_setting_rolls_the_pods() -> None:
    def templates(**values: Any) -> dict[str, str]:
        return {name: json.dumps(pod, sort_keys=True) for name, pod in pods(rendered("cuda", json.dumps(values)))}

    before = templates()
    planner, worker = f"{RELEASE}-rfork-planner", f"{RELEASE}-rfork-qwen"
    after = templates(**{"planner.settings.lease_ttl_sec": 30})
    assert before[planner] != after[planner]
    assert before[worker] == after[worker]
    after = templates(**{"workers.qwen.options.rfork_verify": "sample"})
    assert before[planner] == after[planner]
    assert before[worker] != after[worker]


def test_a_new_version_of_the_chart_restarts_no_pod() -> None:
    """A label with the version in a pod's template would, also where the image's tag is fixed."""
    for _, pod in pods(rendered("redis")):
        assert not [name for name in pod["metadata"]["labels"] if name.endswith(("/version", "/managed-by"))]


def test_redis_has_every_write_on_disk_before_it_is_answered() -> None:
    box = container(named(rendered("redis"), "StatefulSet", f"{RELEASE}-rfork-redis")["spec"]["template"])
    words = box["args"][0].split()
    assert words[words.index("--appendfsync") + 1] == "always"
    assert words[words.index("--appendonly") + 1] == "yes"


def test_the_planner_uses_the_redis_that_is_configured() -> None:
    def store(example: str) -> Thing | None:
        box = container(named(rendered(example), "StatefulSet", f"{RELEASE}-rfork-planner")["spec"]["template"])
        return next((each for each in box.get("env", []) if each["name"] == ENVIRONMENT_PREFIX + "STORE"), None)

    assert store("memory") is None
    bundled = store("redis")
    assert bundled is not None
    assert bundled["value"] == f"redis://:$(REDIS_PASSWORD)@{RELEASE}-rfork-redis:6379/0"
    own = store("redis-own")
    assert own is not None
    assert own["valueFrom"]["secretKeyRef"] == {"name": "our-redis", "key": "uri"}
    assert not [each for each in rendered("redis-own") if each["metadata"]["name"].endswith("-redis")]


def test_replicas_are_updated_and_drained_one_after_the_other() -> None:
    spec = named(rendered("redis"), "StatefulSet", f"{RELEASE}-rfork-planner")["spec"]
    assert (spec["replicas"], spec["podManagementPolicy"]) == (2, "Parallel")
    (budget,) = of_kind(rendered("redis"), "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 1
    assert not of_kind(rendered("memory"), "PodDisruptionBudget")


@pytest.mark.parametrize("example", NAMES)
def test_a_slow_start_is_not_a_failed_rollout(example: str) -> None:
    for each in of_kind(rendered(example), "Deployment"):
        probe = container(each["spec"]["template"])["startupProbe"]
        assert each["spec"]["progressDeadlineSeconds"] > probe["periodSeconds"] * probe["failureThreshold"]


def test_a_drain_of_nodes_leaves_a_seed() -> None:
    def budgets(example: str, **values: Any) -> list[str]:
        things = rendered(example, json.dumps(values))
        found = of_kind(things, "PodDisruptionBudget")
        assert all(len(chosen(things, each["spec"]["selector"]["matchLabels"])) == 1 for each in found)
        return [each["metadata"]["name"] for each in found]

    assert budgets("cuda-rdma") == [f"{RELEASE}-rfork-qwen"], "the other worker has one replica"
    assert budgets("private-cluster") == [f"{RELEASE}-rfork-qwen"]
    assert budgets("cuda", **{"workers.qwen.maxUnavailable": 0}) == []


def test_an_autoscaler_alone_sets_the_number_of_replicas() -> None:
    (scaled,) = of_kind(rendered("private-cluster"), "Deployment")
    assert "replicas" not in scaled["spec"]
    (fixed,) = of_kind(rendered("cuda"), "Deployment")
    assert fixed["spec"]["replicas"] == 4


def test_every_pod_has_what_a_private_cluster_demands() -> None:
    found = dict(pods(rendered("private-cluster", json.dumps({"planner.store": "redis"}))))
    assert len(found) == 3
    for pod in found.values():
        assert pod["spec"]["imagePullSecrets"] == [{"name": "registry-internal"}]
    worker = found[f"{RELEASE}-rfork-qwen"]
    assert container(worker)["image"] == f"registry.internal/inference/vllm-rfork-cuda:{__version__}"
    assert {name: worker["spec"][name] for name in ("runtimeClassName", "priorityClassName", "nodeSelector")} == {
        "runtimeClassName": "nvidia",
        "priorityClassName": "inference",
        "nodeSelector": {"example.com/gpu": "h200"},
    }
    assert worker["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"
    planner = found[f"{RELEASE}-rfork-planner"]
    assert planner["spec"]["priorityClassName"] == "infrastructure"
    assert planner["metadata"]["annotations"]["example.com/team"] == "inference"


def test_rdma_brings_the_nic_the_capability_and_ucx() -> None:
    for _, pod in worker_pods("cuda-rdma"):
        box = container(pod)
        assert box["resources"]["limits"]["nvidia.com/roce"] == 1
        assert pod["metadata"]["annotations"]["k8s.v1.cni.cncf.io/networks"] == "roce-network"
        assert box["securityContext"]["capabilities"] == {"add": ["IPC_LOCK"]}
        assert environment(pod)["UCX_NET_DEVICES"] == "mlx5_0:1,mlx5_1:1"
        assert environment(pod)["UCX_IB_GID_INDEX"] == "3"
        assert "hostPID" not in pod["spec"]
    ((_, pod),) = worker_pods("cuda")
    assert "hostPID" not in pod["spec"]
    ((_, shared),) = worker_pods("cuda-host-pid")
    assert shared["spec"]["hostPID"] is True
    assert "capabilities" not in container(pod)["securityContext"]
    assert "UCX_NET_DEVICES" not in environment(pod)


def test_ascend_pods_have_npus_and_the_addresses_of_their_network() -> None:
    ((_, a2),) = worker_pods("ascend-a2")
    assert container(a2)["resources"]["limits"]["huawei.com/Ascend910"] == 8
    mounted = {each["mountPath"] for each in container(a2)["volumeMounts"]}
    assert {"/usr/local/Ascend/driver", "/etc/hccn.conf"} <= mounted
    assert (a2["spec"]["hostNetwork"], a2["spec"]["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    # A pod with hostNetwork has its node's address, and no label that a policy could select it by.
    policy = named(rendered("ascend-a2"), "NetworkPolicy", f"{RELEASE}-rfork-planner")["spec"]
    assert {"ipBlock": {"cidr": "10.1.0.0/16"}} in policy["ingress"][0]["from"]
    ((_, a3),) = worker_pods("ascend-a3")
    assert container(a3)["resources"]["limits"]["huawei.com/Ascend910"] == 16
    assert not [each for each in a3["spec"]["volumes"] if "hostPath" in each]
    assert container(a3)["image"].endswith(":0.1.0-a3")


def test_an_instance_of_several_nodes_has_one_api() -> None:
    found = dict(worker_pods("multi-node"))
    leader, follower = (found[f"{RELEASE}-rfork-large {part}"] for part in ("leaderTemplate", "workerTemplate"))
    assert option(leader, "tensor-parallel-size") == "16"
    assert "--headless" in container(follower)["args"]
    assert "--headless" not in container(leader)["args"]
    assert "ports" not in container(follower)
    assert not {"startupProbe", "readinessProbe", "livenessProbe"} & set(container(follower))
    service = named(rendered("multi-node"), "Service", f"{RELEASE}-rfork-large")["spec"]
    assert chosen(rendered("multi-node"), service["selector"]) == [f"{RELEASE}-rfork-large leaderTemplate"]


def test_certificates_are_for_the_names_that_are_used() -> None:
    things = rendered("tls", json.dumps({"monitoring.enabled": True, "planner.store": "redis", "planner.replicas": 2}))
    planner = named(things, "Certificate", f"{RELEASE}-rfork-planner")["spec"]
    assert f"*.{RELEASE}-rfork-planner.{NAMESPACE}.svc" in planner["dnsNames"]
    worker = named(things, "Certificate", f"{RELEASE}-rfork-worker")["spec"]
    assert worker["usages"] == ["server auth", "client auth"]
    ((_, pod),) = worker_pods("tls")
    assert worker["dnsNames"] == [environment(pod)["RFORK_SEED_TLS_NAME"]]
    assert environment(pod)["RFORK_SEED_TLS_CLIENT_CA_FILE"] == environment(pod)["RFORK_TLS_CA_FILE"]
    secrets = {node["secretName"] for _, each in pods(things) for node in walk(each) if "secretName" in node}
    assert {planner["secretName"], worker["secretName"]} <= secrets
    (endpoint,) = named(things, "ServiceMonitor", f"{RELEASE}-rfork-planner")["spec"]["endpoints"]
    assert endpoint["scheme"] == "https"
    assert endpoint["tlsConfig"]["serverName"] in planner["dnsNames"]


def test_monitors_scrape_ports_that_exist_with_the_token() -> None:
    things = rendered("monitoring")
    (endpoint,) = named(things, "ServiceMonitor", f"{RELEASE}-rfork-planner")["spec"]["endpoints"]
    assert endpoint["path"] == METRICS
    (workers,) = named(things, "PodMonitor", f"{RELEASE}-rfork-workers")["spec"]["podMetricsEndpoints"]
    ((_, pod),) = worker_pods("monitoring")
    config = json.loads(option(pod, "model-loader-extra-config"))
    added = {each["targetLabel"]: each["sourceLabels"] for each in workers["relabelings"]}
    for label, key in (("model", "model_url"), ("strategy", "model_deploy_strategy_name")):
        assert added[label] == [f"__meta_kubernetes_pod_annotation_rfork_{label}"]
        assert pod["metadata"]["annotations"][f"rfork/{label}"] == config[key]
    assert endpoint["authorization"]["credentials"]["key"] == "scrape-token"
    rule = named(things, "PrometheusRule", f"{RELEASE}-rfork")
    assert rule["metadata"]["labels"]["release"] == "prometheus"
    assert rule["spec"] == yaml.safe_load((CHART / "files" / "rules.yaml").read_text(encoding="utf-8"))
    (dashboards,) = [each for each in of_kind(things, "ConfigMap") if "grafana_dashboard" in each["metadata"]["labels"]]
    for text in dashboards["data"].values():
        assert json.loads(text)["panels"]
    assert sum(len(text.encode()) for text in dashboards["data"].values()) < 1 << 20


def test_the_chart_has_the_packages_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["version"] == chart["appVersion"] == __version__


def test_no_value_has_a_secret_and_every_example_explains_itself() -> None:
    for example in EXAMPLES:
        text = example.read_text(encoding="utf-8")
        assert text.startswith("# "), example.name
    assert not of_kind(rendered("tls"), "Secret")
    assert not re.search(r"(?i)password: *\S", (CHART / "values.yaml").read_text(encoding="utf-8"))
