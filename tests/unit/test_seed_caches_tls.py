"""Caches of code: which settings of seed and receiver let them through, with real certificates and sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.authority import Authority
from tests.unit.cache_seeds import CONTENTS, held, installed, offered
from tests.unit.test_seed_caches import MIB, Endless, request_for
from tests.unit.test_seed_service import KEY, TOKEN, get, serving, until
from vllm_rfork import messages
from vllm_rfork.clients.seed_caches import SeedCaches
from vllm_rfork.errors import CacheError, SeedError
from vllm_rfork.messages import SeedAddress
from vllm_rfork.net.credentials import Credentials, Options

NAME = "seeds.fleet.example"
CODE = held("torch_aot", "rank_0_0")
SAFE = held("model_info", "Qwen2ForCausalLM")
NOBODY = SeedAddress("127.0.0.1", 1, 0)


class Files:
    """Certificates of the fleet, and of somebody else."""

    def __init__(self, folder: Path) -> None:
        fleet, stranger = Authority(folder / "fleet"), Authority(folder / "stranger")
        self.ca, self.foreign_ca = str(fleet.file), str(stranger.file)
        self.worker = tuple(map(str, fleet.issue("worker", names=(NAME,))))
        self.foreign = tuple(map(str, stranger.issue("worker", names=(NAME,))))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("authorities"))


def with_certificate(pair: tuple[str, ...], **more: str) -> dict[str, str]:
    return {"cert_file": pair[0], "key_file": pair[1], "seed_name": NAME, **more}


def whole(files: Files, **changes: str) -> Credentials:
    """Everything that a worker of the fleet needs to take and to send code, with ``changes``."""
    settings = with_certificate(files.worker, seed_tls="require", token=TOKEN, ca_file=files.ca)
    return Credentials(Options(**{**settings, **changes}))


async def listed(port: int, credentials: Credentials) -> set[str]:
    offer = await SeedCaches(credentials=credentials).offer(SeedAddress("127.0.0.1", port, 0), KEY)
    assert offer is not None
    return {artifact.kind for artifact in offer.artifacts}


# --- settings --------------------------------------------------------------------------------------------------------


def test_code_is_taken_only_from_a_seed_that_has_proven_itself(files: Files, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    certificate = {"cert_file": files.worker[0], "key_file": files.worker[1]}
    for settings, missing in (
        ({}, "set rfork_seed_tls to require"),
        ({"seed_tls": "off", "token": TOKEN, "ca_file": files.ca, **certificate}, "set rfork_seed_tls to require"),
        ({"seed_tls": "prefer", "token": TOKEN, "ca_file": files.ca, **certificate}, "set rfork_seed_tls to require"),
        ({"seed_tls": "require"}, "set rfork_tls_ca_file"),
        ({"seed_tls": "require", "token": TOKEN, **certificate}, "set rfork_tls_ca_file"),
        ({"seed_tls": "require", "ca_file": files.ca}, "set rfork_token_file, or rfork_tls_cert_file"),
        ({"seed_tls": "require", "ca_file": files.ca, "token": TOKEN}, None),
        ({"seed_tls": "require", "ca_file": files.ca, "token_file": str(tmp_path / "token")}, None),
        ({"seed_tls": "require", "ca_file": files.ca, **certificate}, None),
    ):
        obstacle = Credentials(Options(**settings)).code_obstacle()
        assert (obstacle is None) if missing is None else (obstacle or "").startswith(missing), settings
        assert TOKEN not in (obstacle or "")


def test_code_is_sent_only_to_callers_that_must_prove_themselves(files: Files) -> None:
    for changes, missing in (
        ({}, None),
        ({"token": "", "client_ca_file": files.ca}, None),
        ({"token": ""}, "set rfork_token_file, or rfork_seed_tls_client_ca_file"),
        ({"seed_tls": "prefer"}, "set rfork_seed_tls to require"),
        ({"seed_tls": "off"}, "set rfork_seed_tls to require"),
    ):
        obstacle = whole(files, **changes).code_serving_obstacle()
        assert (obstacle is None) if missing is None else (obstacle or "").startswith(missing), changes


# --- over sockets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proof", ["token", "certificate", "both"])
async def test_a_fleet_with_tls_and_proofs_passes_code_on(files: Files, tmp_path: Path, proof: str) -> None:
    seed = whole(files, **({} if proof == "token" else {"client_ca_file": files.ca}))
    receiver = whole(files, **({"cert_file": "", "key_file": ""} if proof == "token" else {}))
    if proof == "certificate":
        seed, receiver = whole(files, token="", client_ca_file=files.ca), whole(files, token="")
    present = offered(CODE)
    async with serving(caches=lambda: present, credentials=seed) as service:
        assert await installed(tmp_path, SeedAddress("127.0.0.1", service.port, 0), receiver) == CONTENTS


@pytest.mark.parametrize(
    "receiver",
    [{"seed_tls": "prefer"}, {"cert_file": "", "key_file": "", "seed_tls": "prefer"}],
    ids=["prefer", "prefer without a certificate"],
)
async def test_a_receiver_that_does_not_qualify_gets_safe_caches_only(files: Files, receiver: dict[str, str]) -> None:
    credentials = whole(files, **receiver)
    present = offered(CODE, SAFE)
    async with serving(caches=lambda: present, credentials=whole(files)) as service:
        assert await listed(service.port, whole(files)) == {"torch_aot", "model_info"}
        assert await listed(service.port, credentials) == {"model_info"}
        with pytest.raises(CacheError, match="set rfork_seed_tls to require"):
            await SeedCaches(credentials=credentials).fetch(NOBODY, KEY, CODE.artifact, print, timeout_s=5.0)


async def test_bytes_of_a_kind_that_this_version_does_not_have_count_as_code() -> None:
    with pytest.raises(CacheError, match="is code, and is not taken"):
        await SeedCaches().fetch(NOBODY, KEY, held("next_year").artifact, print, timeout_s=5.0)


@pytest.mark.parametrize(
    "seed",
    [{"seed_tls": "prefer"}, {"token": ""}, {"seed_tls": "prefer", "token": ""}],
    ids=["prefer", "no proof", "neither"],
)
async def test_a_seed_that_does_not_qualify_neither_lists_nor_sends_code(files: Files, seed: dict[str, str]) -> None:
    present = offered(CODE, SAFE)
    async with serving(caches=lambda: present, credentials=whole(files, **seed)) as service:
        assert await listed(service.port, whole(files)) == {"model_info"}
        with pytest.raises(SeedError, match=r"403.*sends no code"):
            await SeedCaches(credentials=whole(files)).fetch(
                SeedAddress("127.0.0.1", service.port, 0), KEY, CODE.artifact, print, timeout_s=5.0
            )


async def test_without_tls_code_is_neither_listed_nor_sent(files: Files) -> None:
    present = offered(CODE, SAFE)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    for seed in (Credentials(Options(token=TOKEN)), whole(files, seed_tls="prefer")):
        async with serving(caches=lambda: present, credentials=seed) as service:
            _, text = await get(service, messages.SEED_CACHES, headers=headers)
            assert "model_info" in text
            assert "torch_aot" not in text
            for name in ("rank_0_0", "no such name"):
                status, _ = await get(service, messages.SEED_CACHE, headers=headers, kind="torch_aot", name=name)
                assert status == 403
    async with serving(caches=lambda: present, credentials=whole(files)) as service:
        assert (await get(service, messages.SEED_CACHES, headers=headers))[0] == 426


@pytest.mark.parametrize("encrypted", [True, False])
async def test_a_receiver_that_leaves_ends_its_answer(
    files: Files, encrypted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    credentials = whole(files, token="", client_ca_file=files.ca) if encrypted else Credentials()
    source = Endless(256 * MIB)
    present = offered(source)
    async with serving(caches=lambda: present, credentials=credentials) as service:
        tls = {"ssl": credentials.client_context(), "server_hostname": NAME} if encrypted else {}
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port, **tls)
        writer.write(request_for())
        await reader.readexactly(100_000)
        writer.transport.abort()
        await until(lambda: source.closed == 1)
    assert source.made < 64, "the rest was not read from the disk"
    assert "socket.send() raised exception" not in caplog.text


async def test_a_seed_without_tls_is_not_asked_by_a_receiver_that_requires_it(files: Files) -> None:
    present = offered(CODE, SAFE)
    async with serving(caches=lambda: present, credentials=Credentials(Options(token=TOKEN))) as service:
        with pytest.raises(SeedError, match="TLS"):
            await listed(service.port, whole(files))


@pytest.mark.parametrize(
    ("receiver", "reason"),
    [
        ({"token": "wrong"}, "401"),
        ({"token": ""}, "401"),
        ({"cert_file": "", "key_file": ""}, "403"),
    ],
    ids=["wrong token", "no token", "no certificate"],
)
async def test_a_stranger_on_an_encrypted_connection_gets_nothing(
    files: Files, receiver: dict[str, str], reason: str
) -> None:
    present = offered(CODE, SAFE)
    async with serving(caches=lambda: present, credentials=whole(files, client_ca_file=files.ca)) as service:
        address = SeedAddress("127.0.0.1", service.port, 0)
        client = SeedCaches(credentials=whole(files, **receiver))
        with pytest.raises(SeedError, match=reason):
            await client.offer(address, KEY)
        with pytest.raises((SeedError, CacheError)):
            await client.fetch(address, KEY, CODE.artifact, print, timeout_s=5.0)


async def test_a_seed_of_another_authority_or_name_is_not_read(files: Files) -> None:
    present = offered(CODE)
    other = Credentials(
        Options(**with_certificate(files.foreign, seed_tls="require", token=TOKEN, ca_file=files.foreign_ca))
    )
    async with serving(caches=lambda: present, credentials=other) as service:
        with pytest.raises(SeedError, match="rfork_tls_ca_file"):
            await listed(service.port, whole(files))
    async with serving(caches=lambda: present, credentials=whole(files)) as service:
        with pytest.raises(SeedError, match="rfork_seed_tls_name"):
            await listed(service.port, whole(files, seed_name="others.example"))
