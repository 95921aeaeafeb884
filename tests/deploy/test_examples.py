"""The examples for autoscalers and KServe: valid, and their names are those of the Kustomize base and components."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.deploy import kustomize
from tests.deploy.foreign import VERSIONS, check
from tests.deploy.kustomize import WORKERS
from tests.deploy.rendering import Thing
from tests.deploy.test_chart import WORKER
from tests.deploy.tools import ROOT
from vllm_rfork.config import parse_config

FILES = sorted((ROOT / "deploy" / "examples").glob("*.yaml"))


def content(name: str) -> Thing:
    found: Thing = yaml.safe_load((ROOT / "deploy" / "examples" / f"{name}.yaml").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_is_valid(file: Path, version: str) -> None:
    check(content(file.stem), version)


@pytest.mark.parametrize("name", ["hpa", "keda"])
def test_an_autoscaler_scales_a_worker_that_exists_and_leaves_a_seed(name: str) -> None:
    spec = content(name)["spec"]
    assert ("Deployment", spec["scaleTargetRef"]["name"]) in kustomize.rendered(WORKERS["cuda"])
    least = spec["minReplicas"] if name == "hpa" else spec["minReplicaCount"]
    assert least >= 1


def test_a_worker_under_kserve_has_what_the_charts_workers_have() -> None:
    predictor = content("kserve")["spec"]["predictor"]
    assert predictor["labels"] == WORKER
    (box,) = predictor["containers"]
    (config,) = [each.partition("=")[2] for each in box["args"] if "extra-config" in each]
    told = {each["name"]: each["value"].replace("$(NODE_NAME)", "n") for each in box["env"] if "value" in each}
    assert not parse_config(json.loads(config), told).settings.missing
    deployment, _ = kustomize.rendered(WORKERS["cuda"])["Deployment", f"{kustomize.RELEASE}-cuda"]
    (chart_box,) = deployment["spec"]["template"]["spec"]["containers"]
    assert {each["name"]: each for each in box["env"]} == {each["name"]: each for each in chart_box["env"]}
    assert {each["name"] for each in predictor["volumes"]} == {"token", "models", "shm"}
