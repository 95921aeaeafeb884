"""Writes deploy/kustomize: a base and components, from what the chart renders: `python -m tests.deploy.kustomize`.

The chart is the one source. A component is the difference of two renderings: objects that only the second one has are
resources, with their comments; objects that differ are strategic merge patches. Patches of workers apply to every
Deployment with the label ``rfork/worker``, so that one component serves all platforms.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.deploy.rendering import CHART, Thing, objects, set_arguments
from tests.deploy.tools import ROOT, run, tool

FOLDER = ROOT / "deploy" / "kustomize"
#: The release is named like the chart, so that names are not longer than they need to be.
RELEASE = "vllm-rfork"
NAMESPACE = "rfork"
CONFIG = f"{RELEASE}-planner"
WRITTEN = "# Written by `make kustomize` from the chart in deploy/helm; change it there.\n"

Values = Mapping[str, Any]
WORKERS: dict[str, Values] = {
    "cuda": {"workers.cuda": {}},
    "cuda-rdma": {"workers.cuda-rdma": {"rdma": {"enabled": True}}},
    "ascend-a2": {"workers.ascend-a2": {"platform": "ascend-a2", "devices": 8}},
    "ascend-a3": {"workers.ascend-a3": {"platform": "ascend-a3", "devices": 16}},
}
REDIS: Values = {"planner.store": "redis", "planner.replicas": 2}
MONITORING: Values = {"monitoring.enabled": True}
TLS: Values = {"tls.enabled": True, "tls.issuerRef": {"name": "rfork-ca", "kind": "Issuer"}}


class Component(NamedTuple):
    """``after`` adds to ``before``. In a kustomization the components have the order of :data:`COMPONENTS`."""

    about: str
    before: Values
    after: Values


COMPONENTS: dict[str, Component] = {
    **{name: Component(f"vLLM workers: {name}", {}, values) for name, values in WORKERS.items()},
    "redis": Component("Two planner replicas over one Redis", WORKERS["cuda"], REDIS),
    "monitoring": Component("Monitors, alerts and dashboards", WORKERS["cuda"], MONITORING),
    "tls": Component(
        "https, with certificates from an Issuer `rfork-ca` of cert-manager. Workers get the addresses of two\n"
        "# replicas; without the component redis the second one does not exist, and they use the first",
        {**WORKERS["cuda"], **REDIS, **MONITORING},
        TLS,
    ),
}


@functools.cache
def _documents(values: str) -> tuple[str, ...]:
    """The objects that the chart renders for ``values`` (JSON) as text, with comments, without what only Helm needs."""
    done = run(tool("helm"), "template", RELEASE, CHART, "--namespace", NAMESPACE, *set_arguments(json.loads(values)))
    if done.returncode:
        raise RuntimeError(done.stderr)
    text = re.sub(r"(?m)^# Source: .*\n|^ *app\.kubernetes\.io/managed-by: .*\n", "", done.stdout)
    # The hash in the name of the generated ConfigMap rolls the pods instead.
    text = re.sub(r"(?m)^ *annotations:\n *checksum/config: .*\n", "", text)
    return tuple(each.strip("\n") + "\n" for each in re.split(r"(?m)^---\n", text) if objects(each))


def rendered(values: Values) -> dict[tuple[str, str], tuple[Thing, str]]:
    """Kind and name → the object, and its text."""
    found = {}
    for text in _documents(json.dumps(values)):
        (thing,) = objects(text)
        found[thing["kind"], thing["metadata"]["name"]] = (thing, text)
    return found


def difference(old: Any, new: Any, *, named_lists: bool) -> Any:
    """The strategic merge patch from ``old`` to ``new``; nothing may be missing in ``new``.

    Args:
        named_lists: Kubernetes merges lists of things with names by these. It does not for foreign kinds, whose lists
            a patch replaces.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        if missing := old.keys() - new.keys():
            raise ValueError(f"a patch cannot remove {sorted(missing)}")
        return {
            name: difference(old[name], value, named_lists=named_lists) if name in old else value
            for name, value in new.items()
            if name not in old or old[name] != value
        }
    if named_lists and isinstance(new, list) and all(isinstance(each, dict) and "name" in each for each in new):
        before = {each["name"]: each for each in old}
        return [
            {"name": each["name"], **difference(before.get(each["name"], {}), each, named_lists=True)}
            for each in new
            if before.get(each["name"]) != each
        ]
    return new


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def dumped(content: Any) -> str:
    """``content`` as YAML, in its own order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)


def base() -> dict[str, str]:
    """The files of the base: the planner with its state in memory, and the NetworkPolicies."""
    objects = rendered({})
    config, _ = objects.pop(("ConfigMap", CONFIG))
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["resources.yaml"],
        "configMapGenerator": [
            {
                "name": CONFIG,
                "literals": [f"{name}={value}" for name, value in config["data"].items()],
                "options": {"labels": config["metadata"]["labels"]},
            }
        ],
    }
    about = "# The planner with its state in memory, and the isolation of SECURITY.md.\n"
    return {
        "kustomization.yaml": WRITTEN + about + dumped(kustomization),
        "resources.yaml": WRITTEN + "---\n".join(text for _, text in objects.values()),
    }


def component(each: Component) -> dict[str, str]:
    """The files of a component."""
    before, after = rendered(each.before), rendered({**each.before, **each.after})
    kustomization: Thing = {"apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component"}
    files: dict[str, str] = {}
    new = [text for key, (_, text) in after.items() if key not in before]
    if new:
        kustomization["resources"] = ["resources.yaml"]
        files["resources.yaml"] = WRITTEN + "---\n".join(new)
    patches = []
    for (kind, name), (thing, _) in after.items():
        old = before.get((kind, name), (thing, ""))[0]
        if old == thing:
            continue
        if (kind, name) == ("ConfigMap", CONFIG):
            changed = difference(old["data"], thing["data"], named_lists=False)
            literals = [f"{setting}={value}" for setting, value in changed.items()]
            kustomization["configMapGenerator"] = [{"name": CONFIG, "behavior": "merge", "literals": literals}]
            continue
        is_worker = thing["metadata"]["labels"].get("rfork/worker") == "true"
        target = {"kind": kind, "labelSelector": "rfork/worker=true"} if is_worker else {"kind": kind, "name": name}
        patch = difference(old, thing, named_lists="." not in thing["apiVersion"].partition("/")[0])
        head = {"apiVersion": thing["apiVersion"], "kind": kind, "metadata": {"name": "any" if is_worker else name}}
        patches.append({"target": target, "patch": dumped({**head, **patch})})
    if patches:
        kustomization["patches"] = patches
    files["kustomization.yaml"] = f"{WRITTEN}# {each.about}.\n" + dumped(kustomization)
    return files


def everything() -> dict[Path, str]:
    """Path below :data:`FOLDER` → text."""
    files = {Path("base", name): text for name, text in base().items()}
    for name, each in COMPONENTS.items():
        files |= {Path("components", name, file): text for file, text in component(each).items()}
    return files


def main() -> None:
    """Write all files, and remove those that are no longer written."""
    for folder in ("base", "components"):
        shutil.rmtree(FOLDER / folder, ignore_errors=True)
    for path, text in everything().items():
        (FOLDER / path).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
