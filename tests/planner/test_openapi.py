"""The description at ``/openapi.json``: valid, complete, and what a running planner really answers."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from tests.planner.processes import PlannerUnderTest
from tests.planner.test_api import Client, planner
from vllm_rfork import __version__, messages
from vllm_rfork.planner.http import api, request_headers
from vllm_rfork.planner.http.protocol_calls import ProtocolCalls

DESCRIPTION: dict[str, Any] = json.loads(
    resources.files("vllm_rfork.planner.http").joinpath("openapi.json").read_text(encoding="utf-8")
)

METHODS = ("get", "post", "put", "delete", "patch", "head", "options")


def resolved(node: Any) -> Any:
    """``node`` with every reference to a component replaced by that component."""
    if isinstance(node, list):
        return [resolved(each) for each in node]
    if not isinstance(node, dict):
        return node
    if "$ref" not in node:
        return {name: resolved(each) for name, each in node.items()}
    found: Any = DESCRIPTION
    for name in node["$ref"].removeprefix("#/").split("/"):
        found = found[name]
    return resolved(found)


def described() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Path, method and operation of every call."""
    for path, methods in resolved(DESCRIPTION["paths"]).items():
        for method, operation in methods.items():
            assert method in METHODS
            yield path, method.upper(), operation


def test_the_description_is_valid_openapi() -> None:
    errors = list(OpenAPIV31SpecValidator(DESCRIPTION).iter_errors())
    assert [str(each) for each in errors] == []
    assert DESCRIPTION["info"]["version"] == __version__


async def test_every_call_of_the_planner_is_described_and_no_other() -> None:
    async with planner() as client:
        routes = {(path, method) for path, methods in client.planner.api.routes.items() for method in methods}
        status, headers, text = await client.call("GET", messages.OPENAPI)
    assert {(path, method) for path, method, _ in described()} == routes
    assert (status, headers["Content-Type"].partition(";")[0]) == (200, "application/json")
    assert json.loads(text) == DESCRIPTION


def header_names() -> dict[str, str]:
    """Constant → header, for every header of ``messages``."""
    return {
        name: value
        for name, value in vars(messages).items()
        if isinstance(value, str) and re.fullmatch(r"(SEED|USER|LEASE)_[A-Z_]+|RFORK-[A-Z-]+", value)
    }


def headers_in(function: Any) -> set[str]:
    """The headers that a call of the API reads or writes, by the names that its source uses."""
    known = header_names()
    seed = {"SEED_IP", "SEED_PORT", "SEED_RANK"}
    through = {
        "seed_address": seed,
        "seed_key": {"SEED_KEY"},
        "announcement": {
            "SEED_KEY",
            *seed,
            "SEED_REFCNT",
            "FINGERPRINT",
            "SLOTS",
            "LABELS",
            "EPOCH",
            "INTENT",
            "STATE",
            "CACHES",
            "MODEL",
            "STRATEGY",
            "PARENT",
            "DIFFERS",
        },
        "ask": {"SEED_KEY", "FINGERPRINT", "TICKET", "WAIT_SEC", "EXCLUDE", "LABELS", "INTENT", "MODEL", "STRATEGY"},
        "key_names": {"MODEL", "STRATEGY"},
        "user_id": {"USER_ID"},
        "outcome": {"RESULT", "NBYTES", "SECONDS", "CAUSE", "SIDE", "LANE"},
        "intent_ttl_s": {"INTENT_TTL_SEC"},
        "_address_headers": seed,
        "_lease_headers": {*seed, "USER_ID", "LEASE_TTL_SEC", "STORAGE_SEC"},
        "_sent_to_storage": {"INTENT", "INTENT_TTL_SEC", "MISS", "OTHER_FINGERPRINTS"},
    }
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    used: set[str] = set()
    for node in ast.walk(tree):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        used |= through.get(name, set()) | ({name} if name in known else set())
    return {known[name] for name in used}


async def test_every_header_that_a_call_uses_is_described_and_no_other() -> None:
    """On that very call: read from the source of each, so that a header added later is missed here."""
    async with planner() as client:
        routes = client.planner.api.routes
    seen: set[str] = set()
    for path, method, operation in described():
        told = {each["name"] for each in operation["parameters"] if each["in"] == "header"}
        for response in operation["responses"].values():
            told |= set(response.get("headers", {})) - {"Retry-After", "WWW-Authenticate", "Allow"}
        assert told == headers_in(routes[path][method]), (method, path)
        seen |= told
    assert seen == set(header_names().values())


def test_reading_the_source_finds_headers() -> None:
    """The test above would pass over a description without headers if this found none."""
    assert headers_in(ProtocolCalls.renew_seed_lease) == {
        "SEED_IP",
        "SEED_PORT",
        "SEED_RANK",
        "USER_ID",
        "LEASE_TTL_SEC",
    }


def test_calls_that_need_no_token_say_so() -> None:
    for path, method, operation in described():
        is_open = path in api.OPEN_PATHS
        assert ("401" in operation["responses"]) != is_open, (method, path)
        assert operation["security"][0] == ({} if is_open else {"token": []})


def test_a_running_planner_answers_as_described(tmp_path: Path) -> None:
    """Schemathesis makes calls that the description allows, and some that it forbids; few, and always the same.

    Its coverage phase finds no more here than these and takes ten times as long.
    """
    process = PlannerUnderTest("--trust-announced-address", "--max-wait-sec", "0.05").until_ready()
    program = Path(sys.executable).with_name("schemathesis")
    command = [program, "run", process.url + messages.OPENAPI, "--max-examples", "20", "--seed", "1", "--no-color"]
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance"
    command += ["--checks", f"{checks},response_schema_conformance", "--phases", "fuzzing"]
    command += ["--suppress-health-check", "too_slow"]  # a busy machine takes its time to make calls up
    try:
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200, stdin=subprocess.DEVNULL
        )
    finally:
        process.kill()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


async def test_a_lease_is_answered_as_described() -> None:
    """Calls made up at random never find a seed: its whole life, by hand."""
    seed = {"SEED_IP": "127.0.0.1", "SEED_PORT": "5000", "SEED_RANK": "0"}
    async with planner() as client:
        await answers_as_described(client, "POST", "/add_seed", "200", SEED_KEY="k", SEED_REFCNT="0", **seed)
        lease = await answers_as_described(client, "GET", "/get_seed", "200", SEED_KEY="k")
        lease = {name: lease[name] for name in (*seed, "USER_ID")}
        await answers_as_described(client, "POST", "/renew_seed_lease", "200", **lease)
        await answers_as_described(client, "POST", "/remove_seed", "409", SEED_KEY="k", **seed)
        await answers_as_described(client, "POST", "/put_seed", "200", **lease, **{"RFORK-RESULT": "ok"})
        missed = await answers_as_described(client, "GET", "/get_seed", "404", SEED_KEY="k", **{"RFORK-INTENT": "i"})
        assert missed["RFORK-INTENT"] == "granted"
        await answers_as_described(client, "POST", "/rfork_intent", "200", SEED_KEY="k", **{"RFORK-INTENT": "i"})


async def answers_as_described(client: Client, method: str, path: str, status: str, /, **sent: str) -> dict[str, str]:
    """The answer's headers, once status and headers are those of the description."""
    operation = resolved(DESCRIPTION["paths"][path])[method.lower()]
    needed = {each["name"] for each in operation["parameters"] if each["required"]}
    allowed = {each["name"] for each in operation["parameters"]}
    assert needed <= set(sent) <= allowed
    got, headers, text = await client.call(method, path, **sent)
    assert str(got) == status, text
    for name, header in operation["responses"][status].get("headers", {}).items():
        assert name in headers or not header["required"], name
    return dict(headers)


async def test_a_key_that_is_no_text_leaves_the_snapshot_readable() -> None:
    async with planner() as client:
        port = client.planner.port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            b"POST /add_seed HTTP/1.1\r\nHost: x\r\nConnection: close\r\nSEED_KEY: \xd7\xf8\r\nSEED_IP: 127.0.0.1\r\n"
        )
        writer.write(head + b"SEED_PORT: 5000\r\nSEED_RANK: 0\r\nSEED_REFCNT: 0\r\n\r\n")
        assert b" 200 " in await reader.readline()
        writer.close()
        _, _, text = await client.call("GET", messages.DEBUG_SNAPSHOT)
        assert list(msgspec.json.decode(text)["keys"]) == [r"\udcd7\udcf8"]


@pytest.mark.parametrize("header", sorted(header_names().values()))
def test_no_header_is_described_without_meaning(header: str) -> None:
    schema = DESCRIPTION["components"]["schemas"][header]
    assert schema["description"].endswith(".")
    assert schema["type"] in {"string", "integer", "number"}


def test_bounds_and_words_are_the_codes() -> None:
    schemas = DESCRIPTION["components"]["schemas"]
    assert schemas["SEED_KEY"]["maxLength"] == messages.MAX_KEY_LENGTH
    assert schemas["RFORK-EXCLUDE"]["maxLength"] == messages.MAX_HEADER_LENGTH
    assert schemas["RFORK-INTENT"]["maxLength"] == request_headers.MAX_ID_LENGTH
    assert schemas["RFORK-MODEL"]["maxLength"] == schemas["RFORK-STRATEGY"]["maxLength"] == messages.MAX_LABEL_LENGTH
    assert schemas["RFORK-LANE"]["maxLength"] == request_headers.MAX_LANE_LENGTH
    assert schemas["RFORK-MISS"]["enum"] == list(messages.MISSES)
    assert schemas["RFORK-SIDE"]["enum"] == list(messages.SIDES)
    assert schemas["RFORK-RESULT"]["enum"] == [messages.RESULT_OK, messages.RESULT_FAILED]
