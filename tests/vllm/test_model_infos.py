"""Model information from a seed: vLLM's front end starts on an empty cache root without inspecting a class."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.vllm import models
from tests.vllm.engine_process import vllm_config
from vllm_rfork.caches.manifest import Artifact, ArtifactFile, Offer, encode_offer
from vllm_rfork.startup import early_infos
from vllm_rfork.vllm_compat.start_up import model_infos
from vllm_rfork.vllm_compat.start_up.listener import JsonPlace, Place, listen

pytestmark = pytest.mark.vllm

NAME = "vllm-model_executor-models-qwen2-Qwen2ForCausalLM"
KEY = "key of the first rank"


class Recorder:
    """A listener that installs one body wherever a place is read, and records what was produced."""

    def __init__(self, body: bytes | None = None) -> None:
        self.body = body
        self.read: list[Place] = []
        self.made: list[JsonPlace] = []

    def about_to_read(self, place: Place) -> bool:
        self.read.append(place)
        return False

    def produced(self, place: JsonPlace, seconds: float | None, body: bytes | None = None) -> None:
        self.made.append(place)


class Service:
    """A planner and a seed in one service, on a thread of its own."""

    def __init__(self) -> None:
        self.bodies: dict[str, bytes] = {}
        self.artifacts: list[Artifact] = []
        self.keys: list[str] = []
        self.asked: list[str] = []
        self.url = ""
        self.answer_late_s = 0.0
        self.without = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def offer(self, place: JsonPlace, body: bytes, **changes: Any) -> None:
        file = ArtifactFile(place.file, len(body), hashlib.sha256(body).hexdigest())
        artifact = Artifact(place.kind, place.name, dict(place.identity), (file,))
        self.artifacts.append(msgspec.structs.replace(artifact, **changes))
        self.bodies[place.name] = body

    def start(self) -> None:
        app = web.Application()
        for path, handler in (
            ("/rfork_find_seed", self._find),
            ("/rfork_caches", self._list),
            ("/rfork_cache", self._body),
        ):
            app.router.add_get(path, handler)
        self._server = TestServer(app)
        self._thread.start()
        self._in_loop(self._server.start_server())
        self.url = str(self._server.make_url("/")).rstrip("/")

    def stop(self) -> None:
        self._in_loop(self._server.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _in_loop(self, coro: Any) -> None:
        asyncio.run_coroutine_threadsafe(coro, self._loop).result(10)

    async def _asked(self, request: web.Request) -> None:
        self.asked.append(request.path)
        await asyncio.sleep(self.answer_late_s)
        if request.path == self.without:
            raise web.HTTPNotFound

    async def _find(self, request: web.Request) -> web.Response:
        await self._asked(request)
        self.keys.append(request.headers["SEED_KEY"])
        return web.Response(headers={"SEED_IP": "127.0.0.1", "SEED_PORT": str(self._server.port), "SEED_RANK": "0"})

    async def _list(self, request: web.Request) -> web.Response:
        await self._asked(request)
        return web.Response(body=encode_offer(Offer(tuple(self.artifacts))))

    async def _body(self, request: web.Request) -> web.Response:
        await self._asked(request)
        return web.Response(body=self.bodies[request.query["name"]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.without_weights(models.qwen2(tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("bare"))


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    service.start()
    yield service
    service.stop()


@pytest.fixture
def inspected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of classes that vLLM has inspected; it does so in this process, which takes seconds less."""
    from vllm.model_executor.models import registry

    names: list[str] = []

    def run(inspect: Callable[[], Any]) -> Any:
        info = inspect()
        names.append(info.architecture)
        return info

    monkeypatch.setattr(registry, "_run_in_subprocess", run)
    return names


@pytest.fixture
def start(model: Path, service: Service, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """A front end's configuration with a cache root, as in a process of its own."""
    from vllm.model_executor.models import registry

    def start(root: Path, **extra: Any) -> Any:
        monkeypatch.setenv("VLLM_CACHE_ROOT", str(root))
        registry._try_inspect_model_cls.cache_clear()
        early_infos._of_process.cache_clear()
        given = {"model_url": "m", "model_deploy_strategy_name": "s", "rfork_scheduler_url": service.url, **extra}
        return vllm_config(model, load_format="rfork", extra=given)

    return start


@pytest.fixture
def offered(start: Callable[..., Any], service: Service, inspected: list[str], tmp_path: Path) -> Path:
    """The file of a first start, which the service offers from then on as a worker describes it."""
    seed = Recorder()
    listen(seed)  # type: ignore[arg-type]
    try:
        config = start(tmp_path / "seed")
        model_infos.exchange(config)
    finally:
        listen(None)
    assert inspected == ["Qwen2ForCausalLM"]
    inspected.clear()
    (place,) = seed.made
    assert (place.kind, place.name, not seed.read) == ("model_info", NAME, True)
    file = place.root.joinpath(*place.directory, place.file)
    service.offer(place, place.check(file.read_bytes()))
    service.asked.clear()
    return file


def test_a_second_start_on_an_empty_cache_root_inspects_nothing(
    start: Callable[..., Any], offered: Path, inspected: list[str], service: Service, tmp_path: Path
) -> None:
    config = start(tmp_path / "empty")
    assert inspected == []
    assert config.model_config._model_info.architecture == "Qwen2ForCausalLM"
    assert service.keys[-1] == "m$s$kv_both$0$0"
    written = tmp_path / "empty" / "modelinfos" / offered.name
    assert json.loads(written.read_bytes()) == json.loads(offered.read_bytes())

    service.asked.clear()
    start(tmp_path / "empty")
    assert (inspected, service.asked) == ([], []), "its own file is enough"


def test_a_file_of_another_source_is_left_to_vllm(
    start: Callable[..., Any], offered: Path, inspected: list[str], service: Service, tmp_path: Path
) -> None:
    stale = tmp_path / "stale" / "modelinfos" / offered.name
    stale.parent.mkdir(parents=True)
    stale.write_bytes(other_source(offered.read_bytes()))
    start(tmp_path / "stale")
    assert (inspected, service.asked) == (["Qwen2ForCausalLM"], [])
    assert json.loads(stale.read_bytes()) == json.loads(offered.read_bytes())


@pytest.mark.parametrize("extra", [{"rfork_caches": "off"}, {"model_url": ""}])
def test_a_start_that_takes_no_caches_asks_nobody(
    start: Callable[..., Any],
    offered: Path,
    inspected: list[str],
    service: Service,
    tmp_path: Path,
    extra: dict[str, str],
) -> None:
    start(tmp_path / "empty", **extra)
    assert (inspected, service.asked) == (["Qwen2ForCausalLM"], [])


def other_source(body: bytes) -> bytes:
    return json.dumps({**json.loads(body), "hash": "0" * 64}).encode()


def other_value(body: bytes) -> bytes:
    info = json.loads(body)
    info["modelinfo"]["supports_pp"] = "yes"
    return json.dumps(info).encode()


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (other_source, "is for source 0000"),
        (other_value, "unacceptable value for supports_pp"),
        (lambda body: b"[" * len(body), "cannot be read"),
    ],
)
def test_information_that_does_not_fit_costs_one_line(
    start: Callable[..., Any],
    offered: Path,
    inspected: list[str],
    service: Service,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    changed: Callable[[bytes], bytes],
    line: str,
) -> None:
    (artifact,) = service.artifacts
    body = changed(service.bodies[NAME])
    file = ArtifactFile(artifact.files[0].path, len(body), hashlib.sha256(body).hexdigest())
    service.artifacts, service.bodies[NAME] = [msgspec.structs.replace(artifact, files=(file,))], body
    start(tmp_path / "empty")
    assert inspected == ["Qwen2ForCausalLM"]
    assert line in caplog.text
    assert json.loads((tmp_path / "empty" / "modelinfos" / offered.name).read_bytes())["hash"] != "0" * 64


def changes_bytes(service: Service) -> None:
    service.bodies[NAME] = service.bodies[NAME].replace(b"true", b"fals")


def changes_identity(service: Service) -> None:
    service.artifacts[0].identity["transformers"] = "4.0"


def is_late(service: Service) -> None:
    service.answer_late_s = 5.0


def has_no_seed(service: Service) -> None:
    service.without = "/rfork_find_seed"


def is_an_older_seed(service: Service) -> None:
    service.without = "/rfork_caches"


def has_not_collected(service: Service) -> None:
    service.artifacts.clear()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (changes_bytes, "do not have the SHA-256"),
        (changes_identity, "transformers: "),
        (is_late, "within"),
        (has_no_seed, "no seed of key"),
        (is_an_older_seed, "has no model information of"),
        (has_not_collected, "has no model information of"),
    ],
)
def test_a_seed_or_planner_that_cannot_help_costs_at_most_a_second(
    service: Service, caplog: pytest.LogCaptureFixture, change: Callable[[Service], None], line: str
) -> None:
    from vllm_rfork.config import parse_config

    place = JsonPlace("model_info", NAME, model_infos.identity(), Path("/"), ("modelinfos",), "f.json", bytes)
    service.offer(place, b'{"true":1}')
    change(service)
    given = {"model_url": "m", "model_deploy_strategy_name": "s", "rfork_scheduler_url": service.url}
    infos = early_infos.EarlyInfos(parse_config(given, {}).settings, (KEY,))
    started = time.monotonic()
    with caplog.at_level("INFO"):
        assert infos.find(NAME, model_infos.identity()) is None
    assert time.monotonic() - started < early_infos.BOUND_S + 0.5
    assert line in caplog.text

    service.asked.clear()
    assert infos.find(NAME, model_infos.identity()) is None
    assert service.asked == [], "once per process"


def test_a_host_without_the_file_takes_it_for_its_next_start(
    start: Callable[..., Any], offered: Path, inspected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = start(tmp_path / "front end")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "another host"))
    receiver = Recorder()
    listen(receiver)  # type: ignore[arg-type]
    try:
        model_infos.exchange(config)
    finally:
        listen(None)
    (place,) = receiver.read
    assert isinstance(place, JsonPlace)
    assert (place.name, place.root, receiver.made) == (NAME, tmp_path / "another host", [])
    assert json.loads(place.check(offered.read_bytes())) == json.loads(offered.read_bytes())


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        ({}, [("kv_both", 0, None, None)]),
        ({"pipeline_parallel_size": 2, "node_rank": 1}, [("kv_both", 1, 0, None)]),
        ({"enable_expert_parallel": True}, [("kv_both", 0, None, 0), ("kv_both", 0, None, None)]),
        ({"kv_transfer_config": {"kv_role": "kv_producer"}}, [("kv_producer", 0, None, None)]),
    ],
)
def test_the_first_rank_has_the_key_that_its_worker_will_have(
    given: dict[str, Any], kinds: list[tuple[str, int, int | None, int | None]]
) -> None:
    from types import SimpleNamespace

    from vllm_rfork.vllm_compat.early_settings import first_ranks

    ranks = first_ranks(SimpleNamespace(**given))
    assert [(each.kv_mode, each.node_rank, each.pp_rank, each.ep_rank) for each in ranks] == kinds
