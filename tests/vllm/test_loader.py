"""The loader beside a fork: registration, delegation, choosing another seed, and what it refuses to offer."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from torch import nn

from tests.vllm import fakes
from tests.vllm.conftest import LogRecords, Planner, SeedProcess, eventually, extra_for
from tests.vllm.engine_process import digests_of, distributed, free_port, load, load_digested, vllm_config
from vllm_rfork import plugin
from vllm_rfork.config import parse_config
from vllm_rfork.engines.memory import MemoryEngine
from vllm_rfork.net.credentials import Credentials
from vllm_rfork.seeding.manager import manager
from vllm_rfork.seeding.publication import seed_ports
from vllm_rfork.startup import offers
from vllm_rfork.startup.worker_caches import no_caches
from vllm_rfork.vllm_compat.start_up.listener import listener, listens

pytestmark = pytest.mark.vllm


# --- registration -------------------------------------------------------------------------------------------------


@pytest.fixture
def in_tree(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """vLLM-Ascend's package with its loader of the same name, registered by a decorator when it is imported."""
    from vllm.model_executor import model_loader

    monkeypatch.setattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", dict(model_loader._LOAD_FORMAT_TO_MODEL_LOADER))
    model_loader._LOAD_FORMAT_TO_MODEL_LOADER.pop("rfork", None)
    package = types.ModuleType("vllm_ascend")

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
            import importlib.machinery

            if name.startswith("vllm_ascend"):
                return importlib.machinery.ModuleSpec(name, Finder, is_package=True)  # type: ignore[arg-type]
            return None

        @staticmethod
        def create_module(spec: Any) -> None:
            return None

        @staticmethod
        def exec_module(module: types.ModuleType) -> None:
            module.__path__ = []
            if module.__name__ == "vllm_ascend.model_loader.rfork.rfork_loader":
                from vllm.model_executor.model_loader.base_loader import BaseModelLoader

                module.Loader = model_loader.register_model_loader("rfork")(  # type: ignore[attr-defined]
                    type("InTree", (BaseModelLoader,), {"__module__": module.__name__})
                )

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    for name in [name for name in sys.modules if name.startswith("vllm_ascend")]:
        monkeypatch.delitem(sys.modules, name)
    return package


def registered() -> type:
    from vllm.model_executor import model_loader

    return model_loader._LOAD_FORMAT_TO_MODEL_LOADER["rfork"]


def in_tree_plugin() -> None:
    import importlib

    importlib.import_module("vllm_ascend.model_loader.rfork.rfork_loader")


@pytest.mark.usefixtures("in_tree")
@pytest.mark.parametrize("order", [(plugin.register, in_tree_plugin), (in_tree_plugin, plugin.register)])
def test_this_loader_wins_over_the_in_tree_one_in_either_order(order: Any) -> None:
    for register in (*order, *order):
        register()
    assert registered().__module__ == "vllm_rfork.loader"


@pytest.mark.usefixtures("in_tree")
def test_an_in_tree_module_that_cannot_be_imported_does_not_fail_the_start(
    monkeypatch: pytest.MonkeyPatch, rfork_log: LogRecords
) -> None:
    monkeypatch.setitem(sys.modules, "vllm_ascend.model_loader.rfork.rfork_loader", None)
    plugin.register()
    assert registered().__module__ == "vllm_rfork.loader"
    del rfork_log


def test_caches_that_fail_cost_no_fork(monkeypatch: pytest.MonkeyPatch, rfork_log: LogRecords) -> None:
    from vllm_rfork import loader

    def fail(level: str) -> None:
        raise ArithmeticError("not here")

    monkeypatch.setattr(loader, "install_hooks", fail)
    assert loader._caches_of(parse_config({}).settings, Credentials()) is None
    assert rfork_log.warnings == ["RFork: caches: every cache was left to vLLM because of ArithmeticError: not here"]


def test_off_is_off_after_another_start_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_rfork import loader

    monkeypatch.setattr(loader, "install_hooks", lambda level: None)
    settings = parse_config({}).settings
    earlier = loader._caches_of(settings, Credentials())
    assert earlier is listener()
    assert offers.source() is not None
    try:
        assert loader._caches_of(parse_config({"rfork_caches": "off"}).settings, Credentials()) is None
        assert not listens()
        assert offers.source() is None
        assert earlier.is_warm
        assert loader._caches_of(settings, Credentials()) not in (None, earlier)
    finally:
        no_caches()


# --- delegation ---------------------------------------------------------------------------------------------------


def test_downloads_and_reloads_go_to_the_storage_loader(model_a: Path, planner: Planner) -> None:
    from vllm.model_executor.model_loader import get_model_loader

    config = vllm_config(model_a, load_format="rfork", extra=extra_for(planner.url, enable_multithread_load=True))
    loader = get_model_loader(config.load_config)
    loader.download_model(config.model_config)
    model = load(vllm_config(model_a))
    names = {name for name, _ in loader.get_all_weights(config.model_config, model)}
    assert "model.embed_tokens.weight" in names
    assert not hasattr(loader, "no_such_method")


def test_load_weights_from_outside_fills_an_existing_model(
    model_a: Path, model_b: Path, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.model_loader import base_loader, get_model_loader

    monkeypatch.setattr(base_loader, "process_weights_after_loading", lambda *args: None)
    expected = digests_of(load(vllm_config(model_b)))
    model = load(vllm_config(model_a))
    config = vllm_config(model_b, load_format="rfork", extra=extra_for(planner.url))
    with distributed(config):
        get_model_loader(config.load_config).load_weights(model, config.model_config)
    assert digests_of(model) == expected


def test_keys_that_are_not_ours_reach_the_storage_loader_and_are_judged_there(model_a: Path, planner: Planner) -> None:
    config = vllm_config(model_a, load_format="rfork", extra=extra_for(planner.url, no_such_key=1))
    with pytest.raises(ValueError, match="no_such_key"):
        load(config)


@pytest.fixture
def whole_model_loader() -> Any:
    """A load format whose loader overrides ``load_model``, as tensorizer's does; counts its calls."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class Whole(DefaultModelLoader):
        calls = 0

        def __init__(self, load_config: Any) -> None:
            super().__init__(type(load_config)(load_format="auto"))

        def load_model(self, *args: Any, **kwargs: Any) -> nn.Module:
            Whole.calls += 1
            return super().load_model(*args, **kwargs)

    register_model_loader("whole")(Whole)
    return Whole


@pytest.mark.parametrize("key", ["nobody-has-it", "tiny"])
def test_loaders_that_build_models_themselves_are_delegated_to_whole(
    key: str,
    whole_model_loader: Any,
    model_a: Path,
    default_a: Any,
    seed: SeedProcess,
    planner: Planner,
    rfork_log: LogRecords,
) -> None:
    """Without a seed they load; with one the fork comes first. Either way the model is the default loader's."""
    eventually(lambda: seed.said["seeds"][0] in planner.seeds() and planner.leases() == 0, "the seed is free")
    extra = extra_for(planner.url, model_url=key, rfork_fallback_load_format="whole")
    loaded = load_digested(vllm_config(model_a, load_format="rfork", extra=extra))
    manager().seeds(30)
    manager().withdraw("test is over", last=True)
    assert loaded.before == default_a.before
    assert loaded.after == default_a.after
    if key == "tiny":
        assert whole_model_loader.calls == 0
        assert rfork_log.warnings == []
    else:
        assert whole_model_loader.calls == 1
        assert any("not a seed" in line and "whole" in line for line in rfork_log.warnings)


# --- choosing a seed ----------------------------------------------------------------------------------------------


def test_another_seed_is_asked_for_when_the_first_fails(
    model_a: Path, default_a: Any, seed: SeedProcess, rfork_log: LogRecords
) -> None:
    """The first is gone; the planner is told which one failed and why, and gives the second."""
    gone, good = f"127.0.0.1:{free_port()}:0", seed.said["seeds"][0]
    asked: list[tuple[str, str]] = []
    released: list[tuple[str, str]] = []

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/get_seed":
            excluded = request.headers.get("RFORK-EXCLUDE", "")
            asked.append((request.path, excluded))
            host, port, rank = (good if excluded else gone).rsplit(":", 2)
            return web.Response(headers={"SEED_IP": host, "SEED_PORT": port, "SEED_RANK": rank, "USER_ID": "u"})
        if request.path == "/put_seed":
            released.append((request.headers["SEED_PORT"], request.headers["RFORK-RESULT"]))
        return web.Response()

    with fakes.http_server(handle) as url:
        extra = extra_for(url, rfork_become_seed=False)
        loaded = load_digested(vllm_config(model_a, load_format="rfork", extra=extra))
        eventually(lambda: len(released) == 2, "both leases are released")
    assert loaded.before == default_a.before
    assert [excluded for _, excluded in asked] == ["", gone]
    assert sorted(released) == sorted([(gone.split(":")[1], "failed"), (good.split(":")[1], "ok")])
    assert any(line.startswith("RFork: forked ") for line in rfork_log.texts())


@pytest.mark.usefixtures("seed")
def test_reads_keep_within_the_bound_that_the_user_gave(
    model_a: Path, default_a: Any, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    eventually(lambda: planner.seeds() and planner.leases() == 0, "the seed is free")
    sizes: list[int] = []
    read = MemoryEngine.read

    def noting(self: Any, endpoint: str, segments: Any, timeout_s: float) -> None:
        sizes.append(sum(segment.nbytes for segment in segments))
        read(self, endpoint, segments, timeout_s)

    monkeypatch.setattr(MemoryEngine, "read", noting)
    extra = extra_for(planner.url, rfork_become_seed=False, rfork_max_batch_bytes=10_000)
    loaded = load_digested(vllm_config(model_a, load_format="rfork", extra=extra))
    assert loaded.before == default_a.before
    assert max(sizes) == 10_000
    assert len(sizes) > 10


# --- ports --------------------------------------------------------------------------------------------------------


def test_the_order_of_ports_keeps_target_and_draft_apart() -> None:
    from vllm_rfork.config import parse_config
    from vllm_rfork.seed_key import WorkerIdentity

    settings = parse_config({"rfork_seed_port_base": 9000}, {}).settings
    ports = {
        seed_ports(settings, WorkerIdentity("kv_both", 0, 0, local_rank=rank, is_draft=draft))[0]
        for rank in range(4)
        for draft in (False, True)
    }
    assert ports == set(range(9000, 9008))


def test_further_instances_on_a_host_have_ports_of_the_documented_range() -> None:
    from vllm_rfork.config import parse_config
    from vllm_rfork.seed_key import WorkerIdentity

    def ports(base: int, rank: int, *, draft: bool = False) -> list[int]:
        settings = parse_config({"rfork_seed_port_base": base}, {}).settings
        return seed_ports(settings, WorkerIdentity("kv_both", 0, 0, local_rank=rank, is_draft=draft))

    assert ports(20000, 0) == [20000, 20032, 20064, 20096, 20128, 20160, 20192, 20224]
    every = [port for rank in range(16) for draft in (False, True) for port in ports(20000, rank, draft=draft)]
    assert sorted(every) == list(range(20000, 20256)), "no two ranks or roles try the same port"
    assert ports(65000, 15) == [65030] + [65030 + 32 * number for number in range(1, 8)]
    assert ports(65000, 15, draft=True)[-1] <= 65535
    assert ports(0, 3) == [0]
