"""A whole fork by TLS: planner and seed as processes that ask for token and certificate, and a receiver that has both.

The workers are told as an orchestrator would tell them: files that it mounts, named in the environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.authority import Authority
from tests.flow.memory_seed import NBYTES, contents, digest_of, manifest_of, session_of
from tests.planner.processes import ROOT, PlannerUnderTest
from vllm_rfork.clients import PlannerClient
from vllm_rfork.config import parse_config
from vllm_rfork.errors import NoSeedAvailable, PlannerError, SeedError, VerificationError
from vllm_rfork.fork.session import Destination
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.manifest.segments import Segment
from vllm_rfork.net.credentials import Credentials
from vllm_rfork.selftest.buffers import Buffer

NAME = "workers.fleet.example"
WITHIN_S = 60.0


class Fleet:
    """The files of one fleet, its planner's address, and what its workers' environment says."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder / "ca")
        self.token = folder / "token"
        self.token.write_text("first-s3cret\n")
        self.planner_files = self.authority.issue("planner")
        cert, key = self.authority.issue("worker", names=(NAME,))
        self.environment = {
            "RFORK_TOKEN_FILE": str(self.token),
            "RFORK_TLS_CA_FILE": str(self.authority.file),
            "RFORK_TLS_CERT_FILE": str(cert),
            "RFORK_TLS_KEY_FILE": str(key),
            "RFORK_SEED_TLS": "require",
            "RFORK_SEED_TLS_NAME": NAME,
            "RFORK_SEED_TLS_CLIENT_CA_FILE": str(self.authority.file),
            "RFORK_LABELS": "host=node-1,zone=z",
            "RFORK_SEED_SLOTS": "3",
        }
        self.port = 0

    @property
    def options(self) -> dict[str, Any]:
        return {
            "model_url": "q",
            "model_deploy_strategy_name": "prod",
            "rfork_scheduler_url": f"https://localhost:{self.port}",
            "rfork_seed_bind_host": "127.0.0.1",
            "rfork_seed_advertise_host": "127.0.0.1",
            "rfork_request_timeout_sec": 10.0,
        }

    def credentials(self, **changed: str) -> Credentials:
        return Credentials.of(parse_config({}, {**self.environment, **changed}).settings)

    def planner_client(self, **changed: str) -> PlannerClient:
        return PlannerClient(f"https://localhost:{self.port}", credentials=self.credentials(**changed))


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path)
    cert, key = map(str, made.planner_files)
    planner = PlannerUnderTest(
        *("--tls-cert", cert, "--tls-key", key, "--tls-client-ca", str(made.authority.file)),
        *("--token-file", str(made.token), "--policy", "nearest"),
    ).until_ready()
    made.port = planner.port
    yield made
    planner.stop()
    assert "s3cret" not in "".join(planner.log)


@contextlib.contextmanager
def seed_process(fleet: Fleet) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.flow.memory_seed", json.dumps(fleet.options)],
        cwd=ROOT,
        env={**os.environ, **fleet.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def until(condition: Callable[[], Awaitable[Any]], what: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not await condition():
        assert time.monotonic() < deadline, f"it never came true: {what}"
        await asyncio.sleep(0.02)


class Taking:
    """Looks at what has come when all of it is there."""

    def __init__(self, accept: Callable[[Manifest], None]) -> None:
        self.accept = accept

    def arrived(self, segments: Sequence[Segment]) -> None:
        pass

    def close(self) -> None:
        pass


def fork(fleet: Fleet, **changed: str) -> bytes:
    """What a receiver's memory holds after its fork; raises what the loader would fall back on."""
    session = session_of(parse_config(fleet.options, {**fleet.environment, **changed}).settings)
    buffer = Buffer("cpu", NBYTES)

    def verify(remote: Manifest) -> None:
        if remote.spans[0].digest != digest_of(buffer):
            raise VerificationError("other bytes")

    try:
        session.run(Destination(manifest_of(buffer), lambda: Taking(verify), buffer, lambda nbytes: None))
        return buffer.read(0, NBYTES)
    finally:
        session.close()
        buffer.close()


async def test_a_fork_with_token_and_certificates_on_every_way(fleet: Fleet) -> None:
    with seed_process(fleet) as process:
        assert process.stdout is not None
        address = json.loads(await asyncio.to_thread(process.stdout.readline))["address"]
        client = fleet.planner_client()

        async def seeds() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = (await client.snapshot())["seeds"]
            return found

        await until(seeds, "the seed is announced")
        (entry,) = await seeds()
        assert (entry["seed"], entry["slots"]) == (address, 3)
        assert entry["labels"] == {"host": "node-1", "zone": "z"}
        assert await asyncio.to_thread(fork, fleet) == contents()

        # The planner lets nobody in who has one of the two only.
        with pytest.raises(PlannerError, match="401"):
            await asyncio.to_thread(fork, fleet, RFORK_TOKEN_FILE="")
        bare = dict.fromkeys((name for name in fleet.environment if "TLS" in name and "CA" not in name), "")
        with pytest.raises(PlannerError, match="rfork_tls_cert_file"):
            await asyncio.to_thread(fork, fleet, RFORK_SEED_TLS_CLIENT_CA_FILE="", **bare)

        # One file for all of them is rotated, line by line, and nobody is restarted.
        old, new = fleet.token.with_name("old"), fleet.token.with_name("new")
        old.write_text("first-s3cret")
        new.write_text("second-s3cret")

        async def forks_with_the_new_one() -> bool:
            try:
                return await asyncio.to_thread(fork, fleet, RFORK_TOKEN_FILE=str(new)) == contents()
            except (PlannerError, SeedError, NoSeedAvailable):  # the last: refusals made the planner put the seed aside
                return False

        async def old_is_refused() -> bool:
            try:
                await fleet.planner_client(RFORK_TOKEN_FILE=str(old)).snapshot()
            except PlannerError as error:
                return "401" in str(error)
            return False

        fleet.token.write_text("first-s3cret\nsecond-s3cret\n")
        await until(forks_with_the_new_one, "planner and seed take the new token too")
        fleet.token.write_text("second-s3cret\nfirst-s3cret\n")
        assert await asyncio.to_thread(fork, fleet) == contents()
        fleet.token.write_text("second-s3cret\n")
        await until(old_is_refused, "the planner has dropped the old token")
        assert await forks_with_the_new_one()

        # A worker that is killed is seen by its connection: by TLS, and opened with a token of then.
        process.kill()

        async def gone() -> bool:
            return all(entry["absent"] for entry in await seeds())

        await until(gone, "the seed is absent")
        with pytest.raises(NoSeedAvailable):
            await asyncio.to_thread(fork, fleet)
