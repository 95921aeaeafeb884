"""The fallback behaves like its load format alone: the same configuration, the same loader, the same weights."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import nn

from tests.vllm import models
from tests.vllm.conftest import LogRecords, Planner, SeedProcess, eventually, extra_for
from tests.vllm.engine_process import distributed, load, load_digested, vllm_config
from tests.vllm.sources import folder
from vllm_rfork.errors import ConfigError
from vllm_rfork.vllm_compat import fallback_format

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("no_seeds")]

NOWHERE = "http://127.0.0.1:9"


def formats() -> list[str]:
    """Every load format of the installed vLLM, from its source: each test process would import vLLM."""
    source = folder("vllm") / "model_executor" / "model_loader" / "__init__.py"
    for statement in ast.parse(source.read_text(encoding="utf-8")).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="LoadFormats")], value=ast.Subscript(slice=names)):
                return list(ast.literal_eval(names))
    raise AssertionError(f"{source} defines no LoadFormats")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.qwen2(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def sharded(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tied model as vLLM saves its state: the shared tensor has one name, the output head's."""
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

    folder = tmp_path_factory.mktemp("sharded")
    shutil.copy(tied / "config.json", folder)
    config = vllm_config(tied)
    with distributed(config):
        ShardedStateLoader.save_model(Unprocessed.load(config), str(folder))
    return folder


class Unprocessed:
    """A model as it stands before post-processing, which packs weights on some processors."""

    @staticmethod
    def load(config: Any) -> nn.Module:
        from vllm.model_executor.model_loader import base_loader

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(base_loader, "process_weights_after_loading", lambda *args: None)
            return load(config)


@pytest.fixture(scope="module")
def pickled(model_a: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model A as torch saves it."""
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("pickled")
    shutil.copy(model_a / "config.json", folder)
    weights = {name: each.float() for name, each in load_file(model_a / "model.safetensors").items()}  # for numpy
    torch.save(weights, folder / "pytorch_model.bin")
    torch.save(weights, folder / "model.pt")
    return folder


def derived(config: Any) -> dict[str, Any]:
    """What vLLM has made of the arguments, but for the load format itself."""
    model = config.model_config
    return {
        "hf_config": model.hf_config.to_dict(),
        "untied": model.word_embeddings_untied_by_checkpoint,
        "speculative": config.speculative_config,
        "quantization": model.quantization,
        "weights": model.model_weights,
    }


@pytest.mark.parametrize("load_format", formats())
def test_the_configuration_and_the_loader_are_those_of_the_format_alone(load_format: str, sharded: Path) -> None:
    """A folder whose configuration says tied and whose files hold an output head: formats differ in what they make
    of it. Loaders that need a package which is not here fail alike."""
    keys = {"num_readers": 2} if load_format == "tensorizer" else {}

    def made(config: Any, loader: Callable[[], Any]) -> list[Any]:
        found: list[Any] = [derived(config)]
        try:
            storage = loader()
        except Exception as error:  # noqa: BLE001 - whatever vLLM raises: both must
            return [*found, type(error), str(error)]
        own = {name: value for name, value in vars(storage).items() if name != "load_config"}
        return [*found, type(storage), own, storage.load_config]

    from vllm.model_executor.model_loader import LoadFormats, get_model_loader

    assert get_args(LoadFormats) == tuple(formats())
    alone = vllm_config(sharded, load_format=load_format, extra=dict(keys))
    extra = extra_for(NOWHERE, rfork_fallback_load_format=load_format.upper(), **keys)
    ours = vllm_config(sharded, load_format="rfork", extra=extra)
    assert ours.load_config.load_format == "rfork"
    expected = made(alone, lambda: get_model_loader(alone.load_config))
    assert made(ours, lambda: get_model_loader(ours.load_config)._storage(ours, ours.model_config)) == expected


@pytest.mark.parametrize("load_format", ["auto", "hf", "safetensors", "pt", "npcache", "dummy", "sharded_state"])
def test_the_weights_are_those_of_the_format_alone(
    load_format: str, model_a: Path, pickled: Path, sharded: Path, rfork_log: LogRecords
) -> None:
    folder = {"pt": pickled, "npcache": pickled, "sharded_state": sharded}.get(load_format, model_a)
    alone = load_digested(vllm_config(folder, load_format=load_format))
    extra = extra_for(NOWHERE, rfork_fallback_load_format=load_format, rfork_request_timeout_sec=1.0)
    loaded = load_digested(vllm_config(folder, load_format="rfork", extra=extra))
    assert loaded.before == alone.before
    assert loaded.after == alone.after
    assert any(f"load_format={load_format}" in line for line in rfork_log.texts())


def test_models_see_the_fallback_s_format_while_they_are_built(model_a: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some models have embeddings of their own unless the format is ``dummy``."""
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    seen: list[str] = []
    build = Qwen2ForCausalLM.__init__

    def building(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        seen.append(vllm_config.load_config.load_format)
        build(self, vllm_config=vllm_config, prefix=prefix)

    monkeypatch.setattr(Qwen2ForCausalLM, "__init__", building)
    extra = extra_for(NOWHERE, rfork_fallback_load_format="dummy", rfork_request_timeout_sec=1.0)
    config = vllm_config(model_a, load_format="rfork", extra=extra)
    load(config)
    assert seen == ["dummy"]
    assert config.load_config.load_format == "rfork", "a draft is loaded by this package's loader, too"


@pytest.mark.parametrize("given", ["RFORK", "rfork", " RFork ", ""])
def test_the_fallback_is_not_this_package_s_own_format(given: str, model_a: Path) -> None:
    with pytest.raises(ConfigError, match="rfork_fallback_load_format"):
        vllm_config(model_a, load_format="rfork", extra=extra_for(NOWHERE, rfork_fallback_load_format=given))


def test_a_format_that_vllm_does_not_have_fails_the_start_with_the_formats_that_it_has(model_a: Path) -> None:
    with pytest.raises(ConfigError, match="vLLM has no format safetensor; it accepts one of auto, dummy") as raised:
        vllm_config(model_a, load_format="rfork", extra=extra_for(NOWHERE, rfork_fallback_load_format="Safetensor"))
    assert "rfork," not in str(raised.value)


def test_a_draft_is_read_as_vllm_would_read_it() -> None:
    """``ipc_cache`` has daemons for some drafts only; ``fastsafetensors`` cannot load at one pipeline stage."""
    from vllm.config import LoadConfig

    draft = SimpleNamespace(runner_type="draft")

    def read(load_format: str, method: str, stages: int = 1) -> tuple[str, dict[str, Any]]:
        speculative = SimpleNamespace(draft_model_config=draft, draft_load_config=None, method=method)
        config = SimpleNamespace(
            speculative_config=speculative, parallel_config=SimpleNamespace(pipeline_parallel_size=stages)
        )
        found = fallback_format.for_draft(LoadConfig(load_format=load_format), config, draft)
        return found.load_format, found.model_loader_extra_config

    assert read("ipc_cache", "eagle") == ("ipc_cache", {"is_draft": True})
    assert read("ipc_cache", "draft_model") == ("auto", {})
    assert read("fastsafetensors", "eagle", stages=2) == ("auto", {})
    assert read("fastsafetensors", "eagle") == ("fastsafetensors", {})
    assert read("auto", "eagle") == ("auto", {})


def test_weights_that_another_process_holds_are_counted_and_not_forked(
    model_a: Path, planner: Planner, seed: SeedProcess
) -> None:
    """As ``ipc_cache`` maps them: a fork would take the memory twice."""
    from vllm.model_executor.model_loader import get_model_loader, register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    loads: list[str] = []

    @register_model_loader("mapped")
    class Mapped(DefaultModelLoader):
        def __init__(self, load_config: Any) -> None:
            super().__init__(type(load_config)(load_format="auto"))

        def get_external_weight_memory(self, vllm_config: Any) -> int:
            return 4096

        def load_model(self, *args: Any, **kwargs: Any) -> nn.Module:
            loads.append("mapped")
            return super().load_model(*args, **kwargs)

    eventually(lambda: seed.said["seeds"][0] in planner.seeds() and planner.leases() == 0, "the seed is free")
    config = vllm_config(
        model_a, load_format="rfork", extra=extra_for(planner.url, rfork_fallback_load_format="mapped")
    )
    assert get_model_loader(config.load_config).get_external_weight_memory(config) == 4096
    load(config)
    assert loads == ["mapped"]


# --- models in object storage -------------------------------------------------------------------------------------


@pytest.fixture
def bucket(model_a: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Object storage that holds model A: files that describe it are pulled, weights are streamed. The streamer's own
    package, which is not here, is replaced; vLLM's checks and its loader are real. Returns what was streamed."""
    import vllm.config.model
    from vllm.model_executor.model_loader import runai_streamer_loader as loader

    streamed: list[str] = []

    class Storage:
        def __init__(self, url: str) -> None:
            self.dir = str(model_a)

        def pull_files(self, *args: Any, **kwargs: Any) -> None:
            pass

    def weights(files: list[str], *args: Any) -> Any:
        from safetensors.torch import load_file

        streamed.extend(files)
        return iter(load_file(model_a / "model.safetensors").items())

    monkeypatch.setattr(vllm.config.model, "ObjectStorageModel", Storage)
    monkeypatch.setattr(loader, "list_safetensors", lambda path: [f"{path}/model.safetensors"])
    monkeypatch.setattr(loader, "runai_safetensors_weights_iterator", weights)
    return streamed


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_a_model_in_object_storage_falls_back_to_the_streamer_that_vllm_chooses(
    scheme: str, bucket: list[str], default_a: Any, rfork_log: LogRecords
) -> None:
    extra = extra_for(NOWHERE, rfork_request_timeout_sec=1.0)
    config = vllm_config(f"{scheme}://bucket/model", load_format="rfork", extra=extra)
    assert config.load_config.load_format == "rfork"
    loaded = load_digested(config)
    assert bucket == [f"{scheme}://bucket/model/model.safetensors"]
    assert loaded.before == default_a.before
    assert any("load_format=runai_streamer" in line for line in rfork_log.texts())


def test_a_model_in_object_storage_forks(
    bucket: list[str], default_a: Any, planner: Planner, seed: SeedProcess, rfork_log: LogRecords
) -> None:
    eventually(lambda: seed.said["seeds"][0] in planner.seeds() and planner.leases() == 0, "the seed is free")
    extra = extra_for(planner.url, rfork_become_seed=False)
    loaded = load_digested(vllm_config("s3://bucket/model", load_format="rfork", extra=extra))
    assert bucket == []
    assert loaded.before == default_a.before
    assert any("forked " in line for line in rfork_log.texts())


@pytest.mark.usefixtures("bucket")
def test_a_fallback_that_cannot_read_object_storage_fails_the_start_and_is_named() -> None:
    extra = extra_for(NOWHERE, rfork_fallback_load_format="pt")
    with pytest.raises(ValueError, match="rfork_fallback_load_format: is pt, and vLLM refuses it"):
        vllm_config("s3://bucket/model", load_format="rfork", extra=extra)
