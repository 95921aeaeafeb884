"""The file for Docker Compose, which cannot run here: its fields, and that it fits the images and the package."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest
import yaml

from tests.deploy.foreign import Schema, closed
from tests.deploy.tools import ROOT
from vllm_rfork.config import ENVIRONMENT, parse_config

FILE = ROOT / "deploy" / "images" / "compose.yaml"
WORKERS = ("cpu-first", "cpu-second", "cuda-first", "cuda-second")

_TEXT: Schema = {"type": "string", "minLength": 1}
_TEXTS: Schema = {"type": "array", "minItems": 1, "items": _TEXT}
_DURATION: Schema = {"type": "string", "pattern": "^([0-9]+(s|m|h))+$"}
_GPUS = closed({"driver": {"const": "nvidia"}, "count": {"type": "integer"}, "capabilities": {"const": ["gpu"]}})
#: The fields of the Compose specification that the file uses. Compose rejects unknown ones, too.
_SERVICE = closed(
    {
        "profiles": _TEXTS,
        "image": _TEXT,
        "build": closed({"context": _TEXT, "dockerfile": _TEXT}),
        "entrypoint": _TEXTS,
        "command": _TEXTS,
        # Compose makes other things of numbers and of words such as `on`: values are text.
        "environment": {"type": "object", "additionalProperties": _TEXT},
        "ports": _TEXTS,
        "volumes": _TEXTS,
        "shm_size": {"type": "string", "pattern": "^[0-9]+[mg]b$"},
        "stop_grace_period": _DURATION,
        "depends_on": {
            "type": "object",
            "additionalProperties": closed({"condition": {"const": "service_healthy"}}),
        },
        "healthcheck": closed(
            {
                "test": {"type": "array", "minItems": 2, "items": _TEXT},
                "interval": _DURATION,
                "timeout": _DURATION,
                "start_period": _DURATION,
                "retries": {"type": "integer"},
            },
            *("test", "interval", "timeout", "retries"),
        ),
        "deploy": closed({"resources": closed({"reservations": closed({"devices": {"items": _GPUS}})})}),
    },
    *("image", "build", "environment", "ports", "healthcheck"),
)
SCHEMA: Schema = {
    **closed(
        {
            "name": _TEXT,
            "services": {"type": "object", "additionalProperties": _SERVICE},
            "volumes": {"type": "object", "additionalProperties": {"type": "null"}},
        }
    ),
    "patternProperties": {"^x-": True},
}


def compose(**variables: str) -> dict[str, Any]:
    """The file as Compose reads it with ``variables`` in the environment.

    Raises:
        KeyError: a variable without a default is not set.
    """

    def value(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        return variables.get(name, default) if default is not None else variables[name]

    text = re.sub(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*)|:\?[^}]+)\}", value, FILE.read_text(encoding="utf-8"))
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def service(name: str, **variables: str) -> dict[str, Any]:
    found: dict[str, Any] = compose(**{"RFORK_TOKEN": "secret", **variables})["services"][name]
    return found


def test_the_file_has_fields_of_compose_alone() -> None:
    document = compose(RFORK_TOKEN="secret")
    jsonschema.validate(document, SCHEMA)
    document["services"]["planner"]["helthcheck"] = document["services"]["planner"].pop("healthcheck")
    with pytest.raises(jsonschema.ValidationError, match="helthcheck"):
        jsonschema.validate(document, SCHEMA)


def test_without_a_token_nothing_starts() -> None:
    with pytest.raises(KeyError, match="RFORK_TOKEN"):
        compose()


def test_services_have_images_that_are_built_from_this_checkout() -> None:
    for name in ("planner", *WORKERS):
        build = service(name)["build"]
        assert (FILE.parent / build["context"]).resolve() == ROOT
        text = (ROOT / build["dockerfile"]).read_text(encoding="utf-8")
        assert f"docker build -f {build['dockerfile']} -t {service(name)['image']} ." in text


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_the_second_worker_is_the_first_one_again_and_starts_when_that_one_is_ready(platform: str) -> None:
    first, second = (service(f"{platform}-{which}") for which in ("first", "second"))
    assert first["profiles"] == second["profiles"] == [platform]
    assert {*first["depends_on"]} == {"planner"}
    assert {*second["depends_on"]} == {"planner", f"{platform}-first"}
    assert {first["environment"].pop("CUDA_VISIBLE_DEVICES", None), platform} == (
        {"0", "cuda"} if platform == "cuda" else {None, "cpu"}
    )
    assert second["environment"].pop("CUDA_VISIBLE_DEVICES", None) == ("1" if platform == "cuda" else None)
    changes = {"ports", "depends_on"}
    assert {key: value for key, value in first.items() if key not in changes} == {
        key: value for key, value in second.items() if key not in changes
    }


@pytest.mark.parametrize("name", WORKERS)
def test_a_workers_options_are_options_and_complete(name: str) -> None:
    worker = service(name, MODEL="some/model")
    environment = worker["environment"]
    ours = {key: value for key, value in environment.items() if not key.startswith(("VLLM_CPU_", "CUDA_"))}
    assert set(ours) <= set(ENVIRONMENT.values())
    assert not parse_config({}, environment).settings.missing
    assert worker["command"][0] == environment["MODEL_URL"] == "some/model"
    assert "--load-format=rfork" in worker["command"]
    assert environment["RFORK_TOKEN"] == service("planner")["environment"]["RFORK_TOKEN"]


def test_ports_are_open_to_this_machine_alone() -> None:
    published = [port for each in ("planner", *WORKERS) for port in service(each)["ports"]]
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in published)
