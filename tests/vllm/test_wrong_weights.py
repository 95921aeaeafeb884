"""Two checkpoints under what looks like one seed key: never does a worker serve the other one's weights."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import models
from tests.vllm.conftest import LogRecords, Planner, eventually, extra_for
from tests.vllm.engine_process import load, load_digested, vllm_config
from vllm_rfork.seeding.manager import manager
from vllm_rfork.seeding.seed import Seed

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("no_seeds")]


@pytest.fixture(scope="module")
def default_b(model_b: Path) -> Any:
    """Model B as vLLM's default loader makes it."""
    return load_digested(vllm_config(model_b))


@pytest.mark.parametrize(
    ("separator", "first", "second"),
    [
        ("-", ("qwen-7b", "chat-prod"), ("qwen-7b-chat", "prod")),
        ("$", ("x$s", "t"), ("x", "s$t")),
    ],
)
def test_names_that_give_one_key_do_not_give_one_fingerprint(
    separator: str,
    first: tuple[str, str],
    second: tuple[str, str],
    model_a: Path,
    model_b: Path,
    default_b: Any,
    planner: Planner,
    rfork_log: LogRecords,
) -> None:
    def extra(named: tuple[str, str]) -> dict[str, Any]:
        names = {"model_url": named[0], "model_deploy_strategy_name": named[1]}
        return extra_for(planner.url, rfork_seed_key_separator=separator, **names)

    seed_model = load(vllm_config(model_a, load_format="rfork", extra=extra(first)))
    (seed,) = manager().seeds(30)
    eventually(lambda: str(seed.address) in planner.seeds(), "the seed is announced")
    loaded = load_digested(vllm_config(model_b, load_format="rfork", extra=extra(second)))
    keys = {str(each.manifest.seed_key) for each in manager().seeds(30)}
    assert len(keys) == 1, "the keys stay as they are published"
    assert loaded.before == default_b.before, "the second serves its own weights"
    warned = [line for line in rfork_log.warnings if "rfork_seed_key_separator" in line]
    assert len(warned) == 2
    assert repr(first[0]) in warned[0]
    assert seed_model is not None


# --- one key for two checkpoints, by mistake ----------------------------------------------------------------------


def seed_of(planner: Planner) -> Seed:
    """The one seed of this process, announced and free."""
    (seed,) = manager().seeds(30)
    eventually(lambda: str(seed.address) in planner.seeds() and planner.leases() == 0, "the seed is announced")
    return seed


def forked_from(seed: Seed, log: LogRecords) -> bool:
    return any("forked " in line and f"from seed {seed.address}" in line for line in log.texts())


@pytest.mark.usefixtures("runtime_allowed")
@pytest.mark.parametrize("layout", ["checkpoint", "runtime"])
def test_another_checkpoint_under_the_same_key_is_loaded_from_storage(
    layout: str,
    model_a: Path,
    model_b: Path,
    default_b: Any,
    planner: Planner,
    rfork_log: LogRecords,
) -> None:
    """In the runtime layout before dummies are filled in."""
    extra = extra_for(planner.url, model_url=f"same key, other checkpoint, {layout}", rfork_layout=layout)
    seed_model = load(vllm_config(model_a, load_format="rfork", extra=extra))
    seed = seed_of(planner)
    loaded = load_digested(vllm_config(model_b, load_format="rfork", extra={**extra, "rfork_become_seed": False}))
    assert loaded.before == default_b.before
    assert not forked_from(seed, rfork_log)
    (line,) = [line for line in rfork_log.warnings if "different checkpoints" in line and "falling back" in line]
    identity = (seed.manifest.checkpoint or {})["weights"]
    assert str(seed.address) in line
    # In the line about that seed: a long text is logged once.
    assert any(f"weights {identity} on the seed" in each for each in rfork_log.warnings)
    eventually(lambda: planner.leases() == 0, "the lease is released")
    (known,) = [each for each in planner.snapshot()["seeds"] if each["key"] == seed.manifest.seed_key]
    assert f"{known['ip']}:{known['port']}:{known['rank']}" == str(seed.address), "the seed stays"
    assert known.get("failures", 0) == 0, "it is not to blame"
    assert seed_model is not None


@pytest.fixture(scope="module")
def repackaged(model_a: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model A cut into two files, and as torch saves it."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(model_a / "model.safetensors")
    folders = {name: tmp_path_factory.mktemp(name) for name in ("cut", "pickled")}
    for folder in folders.values():
        shutil.copy(model_a / "config.json", folder)
    names = sorted(weights)
    for number, part in enumerate((names[:5], names[5:])):
        save_file({name: weights[name] for name in part}, folders["cut"] / f"model-{number}.safetensors")
    torch.save(weights, folders["pickled"] / "pytorch_model.bin")
    return folders


@pytest.mark.parametrize("how", ["cut", "pickled", "without files"])
def test_the_same_checkpoint_in_another_packaging_and_no_files_at_all_fork(
    how: str,
    model_a: Path,
    model_a_without_weights: Path,
    repackaged: dict[str, Path],
    default_a: Any,
    planner: Planner,
    rfork_log: LogRecords,
) -> None:
    """The receiver becomes a seed with the identity that it was given: its bytes are that checkpoint's."""
    extra = extra_for(planner.url, model_url=f"packaging: {how}")
    seed_model = load(vllm_config(model_a, load_format="rfork", extra=extra))
    seed = seed_of(planner)
    folder = {**repackaged, "without files": model_a_without_weights}[how]
    loaded = load_digested(vllm_config(folder, load_format="rfork", extra=extra))
    assert forked_from(seed, rfork_log)
    assert loaded.before == default_a.before
    (passed_on,) = [each for each in manager().seeds(30) if each is not seed]
    assert passed_on.manifest.checkpoint == seed.manifest.checkpoint
    assert list(passed_on.manifest.checkpoint or {}) == ["weights"]
    said = [line for line in rfork_log.texts() if "packaged in another way" in line]
    assert len(said) == (1 if how == "pickled" else 0)
    assert seed_model is not None


def test_another_draft_of_the_same_shape_is_not_forked(
    model_a: Path, model_b: Path, planner: Planner, rfork_log: LogRecords, tmp_path: Path
) -> None:
    """The same target and key; ``speculative_config.model`` is another draft. The target's weights do not differ."""
    drafts = {name: models.qwen2(tmp_path / name, seed=seed) for name, seed in (("first", 11), ("second", 12))}
    extra = extra_for(planner.url, model_url="same target, other draft")

    def target(draft: str, load_format: str = "rfork", **more: Any) -> Any:
        speculative = {"model": str(drafts[draft]), "num_speculative_tokens": 2, "method": "draft_model"}
        options = {**extra, **more} if load_format == "rfork" else {}
        return vllm_config(model_a, load_format=load_format, extra=options, speculative_config=speculative)

    def of_draft(*args: Any, **more: Any) -> Any:
        """As vLLM makes it of the target's; of a fresh one, since layers of both have the same names here."""
        config = target(*args, **more)
        return dataclasses.replace(config, model_config=config.speculative_config.draft_model_config)

    kept = [load(target("first")), load(of_draft("first"))]
    seeds = {each.manifest.seed_key.endswith("draft"): each for each in manager().seeds(30)}
    assert set(seeds) == {True, False}
    eventually(lambda: {str(each.address) for each in seeds.values()} <= set(planner.seeds()), "both are announced")
    expected = load_digested(of_draft("second", "auto"))
    kept.append(load(target("second", rfork_become_seed=False)))
    assert forked_from(seeds[False], rfork_log), "a draft says nothing about its target"
    loaded = load_digested(of_draft("second", rfork_become_seed=False))
    assert not forked_from(seeds[True], rfork_log)
    assert loaded.before == expected.before
    assert any("different checkpoints" in line for line in rfork_log.warnings)
    assert kept
