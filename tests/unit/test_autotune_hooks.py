"""Carrying of autotune tables, with stand-ins for vLLM's module and FlashInfer: 0.26, 0.30, 0.32 and 0.33."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_rfork.caches.installer import install_file
from vllm_rfork.errors import CacheError
from vllm_rfork.vllm_compat import key_factors
from vllm_rfork.vllm_compat.key_factors import KeyFactors
from vllm_rfork.vllm_compat.start_up import autotune_hooks
from vllm_rfork.vllm_compat.start_up.listener import JsonPlace, listen

METADATA = {"flashinfer_version": "0.6.14", "gpu": "NVIDIA H200"}
ENTRIES = {"('op', 'runner', (1, 2))": ["Runner", 7]}
TABLE = json.dumps({"_metadata": METADATA, **ENTRIES}).encode()


class Listener:
    def __init__(self, body: bytes | None = None) -> None:
        self.body = body
        self.places: list[JsonPlace] = []
        self.refused = ""
        self.used: list[bool] = []
        self.made: list[tuple[str, float | None]] = []

    def explain(self, details: dict[str, str]) -> None:
        assert details == {"model_config.dtype": "bfloat16"}

    def about_to_read(self, place: JsonPlace) -> bool:
        self.places.append(place)
        try:
            return self.body is not None and install_file(
                place.root, place.directory, place.file, place.check(self.body)
            )
        except CacheError as error:
            self.refused = str(error)
            return False

    def outcome(self, kind: str, name: str, *, used: bool, seconds: float | None) -> None:
        self.used.append(used)

    def produced(self, place: JsonPlace, seconds: float | None, body: bytes | None = None) -> None:
        self.made.append((place.name, seconds))


class Vllm:
    """The module ``kernel_warmup`` of one version: it tunes what no table has, and writes the table if it did."""

    def __init__(self, version: str, root: Path, entries: dict[str, Any]) -> None:
        self.version, self.root, self.entries = version, root, entries
        self.tuned = 0
        self.rank = 0
        self.module = types.ModuleType("vllm.model_executor.warmup.kernel_warmup")
        resolve = "resolve_rank_flashinfer_autotune_file" if version == "0.33" else "resolve_flashinfer_autotune_file"
        setattr(self.module, resolve, self.resolve)
        if version in ("0.32", "0.33"):
            self.module._all_ranks_have_matching_cache = lambda path, group: True  # type: ignore[attr-defined]
        self.module.flashinfer_autotune = self.tune  # type: ignore[attr-defined]
        self._name = resolve

    def resolve(self, runner: Any) -> Path:
        folder = self.root / "flashinfer_autotune_cache" / "0.6.14" / "90a" / "0123abcd"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / ("autotune_configs_dp0_rank0.json" if self.version == "0.33" else "autotune_configs.json")

    def tune(self, runner: Any, *, skip_attn: bool = False) -> None:
        path: Path = getattr(self.module, self._name)(runner)
        if self.version == "0.32":
            path = path.with_name(f"{path.stem}_dp0_rank{self.rank}{path.suffix}")
        if path.exists() and self.entries.items() <= json.loads(path.read_bytes()).items():
            return
        self.tuned += 1
        path.write_text(json.dumps({"_metadata": METADATA, **self.entries}, indent=2))

    def start(self, listener: Listener) -> None:
        listen(listener)  # type: ignore[arg-type]
        parallel = SimpleNamespace(data_parallel_rank=0, world_size=1)
        runner = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=parallel))
        self.module.flashinfer_autotune(runner)


@pytest.fixture(params=["0.26", "0.30", "0.32", "0.33"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def vllm(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Vllm]]:
    def made(folder: str, entries: dict[str, Any] = ENTRIES, rank: int = 0) -> Vllm:
        root = tmp_path / folder
        root.mkdir(exist_ok=True)
        vllm = Vllm(version, root, entries)
        vllm.rank = rank
        modules: dict[str, Any] = {
            "vllm": SimpleNamespace(envs=SimpleNamespace(VLLM_CACHE_ROOT=str(root))),
            "vllm.platforms": SimpleNamespace(current_platform=SimpleNamespace(is_cuda=lambda: True)),
            "vllm.distributed.parallel_state": SimpleNamespace(
                get_world_group=lambda: SimpleNamespace(rank_in_group=rank)
            ),
            "vllm.model_executor.warmup": SimpleNamespace(kernel_warmup=vllm.module),
            "flashinfer.autotuner": SimpleNamespace(_collect_metadata=lambda: METADATA),
        }
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        autotune_hooks.install()
        autotune_hooks.install()
        return vllm

    factors = KeyFactors({"model_config": "12ab"}, {"model_config.dtype": "bfloat16"})
    monkeypatch.setattr(autotune_hooks, "key_factors", lambda config: factors)
    assert key_factors.key_factors is not autotune_hooks.key_factors
    yield made
    listen(None)


def test_a_table_is_found_where_this_version_reads_it(vllm: Callable[..., Vllm], version: str) -> None:
    first, seed = vllm("seed"), Listener()
    first.start(seed)
    ((name, seconds),) = seed.made
    assert (name, first.tuned, seed.used) == ("dp0_rank0", 1, [])
    assert seconds is not None
    (place,) = seed.places
    assert place.identity == {
        "model_config": "12ab",
        **METADATA,
        "rank": "0",
        "data_rank": "0",
        "world_size": "1",
    }

    table = place.root.joinpath(*place.directory, place.file).read_bytes()
    second, receiver = vllm("receiver"), Listener(table)
    second.start(receiver)
    assert (second.tuned, receiver.used, receiver.made) == (0, [True], [("dp0_rank0", None)])


def test_a_table_that_lacks_an_entry_was_not_enough(vllm: Callable[..., Vllm]) -> None:
    worker, receiver = vllm("receiver", {**ENTRIES, "another": ["Runner", 1]}), Listener(TABLE)
    worker.start(receiver)
    assert (worker.tuned, receiver.used) == (1, [False])
    assert receiver.made[0][1] is not None


@pytest.mark.parametrize(
    "body", [b"{}", b"[", json.dumps({"_metadata": {**METADATA, "gpu": "B200"}, **ENTRIES}).encode()]
)
def test_a_table_of_another_environment_is_refused_and_vllm_tunes(vllm: Callable[..., Vllm], body: bytes) -> None:
    worker, receiver = vllm("receiver"), Listener(body)
    worker.start(receiver)
    assert (worker.tuned, receiver.used) == (1, [])
    assert "table" in receiver.refused


def test_an_empty_table_is_not_offered(vllm: Callable[..., Vllm]) -> None:
    seed = Listener()
    vllm("seed", {}).start(seed)
    assert seed.made == []


def test_only_the_reading_rank_takes_a_table(vllm: Callable[..., Vllm], version: str) -> None:
    other, receiver = vllm("receiver", rank=1), Listener(TABLE)
    other.start(receiver)
    assert [place.name for place in receiver.places] == (["dp0_rank1"] if version in ("0.32", "0.33") else [])


def test_a_failing_look_costs_one_line(vllm: Callable[..., Vllm], caplog: pytest.LogCaptureFixture) -> None:
    worker = vllm("receiver")
    sys.modules["flashinfer.autotuner"]._collect_metadata = lambda: 1 // 0  # type: ignore[attr-defined]
    worker.start(Listener(TABLE))
    assert worker.tuned == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
