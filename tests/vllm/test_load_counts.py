"""The order of a load's stages with real vLLM, and how often each is done: at most one look at the model per phase."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import Planner, eventually, extra_for
from tests.vllm.engine_process import load, vllm_config
from vllm_rfork.fork.engine_set import EngineSet
from vllm_rfork.fork.session import ForkSession
from vllm_rfork.load import capture, from_fork, from_storage
from vllm_rfork.load.context import LoadContext
from vllm_rfork.model import digest, restore, snapshot
from vllm_rfork.seeding.manager import manager
from vllm_rfork.vllm_compat import dummy_weights

pytestmark = pytest.mark.vllm

#: What is done, in order, by layout. ``walk`` is one traversal of the model.
FIRST = {
    "checkpoint": "describe, session, ask, look at what was built, walk, storage, look, walk, digest, post-process",
    "runtime": "describe, session, ask, look at what was built, walk, storage, walk, post-process, look, walk, digest",
}
FORK = {
    "checkpoint": "describe, session, ask, engine, look, walk, look at what was built, engine, read, post-process",
    "runtime": "describe, session, ask, manifest, look at what was built, walk, dummies, post-process, look, walk, "
    "engine, read, walk",
}


@pytest.fixture(params=["checkpoint", "runtime"])
def layout(request: pytest.FixtureRequest) -> str:
    if request.param == "runtime":
        request.getfixturevalue("runtime_allowed")
    return str(request.param)


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages of each load, in order."""
    from vllm.model_executor.model_loader import base_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from vllm_rfork import loader

    found: list[str] = []

    def noting(what: str, function: Any) -> Any:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            found.append(what)
            return function(*args, **kwargs)

        return called

    for where, name, what in (
        (loader, "describe", "describe"),
        (LoadContext, "open_session", "session"),
        (ForkSession, "reserve", "ask"),
        (EngineSet, "await_one", "engine"),
        (ForkSession, "peek", "manifest"),
        (capture, "built_model", "look at what was built"),
        (dummy_weights, "fill_with_dummies", "dummies"),
        (DefaultModelLoader, "load_weights", "storage"),
        (base_loader, "process_weights_after_loading", "post-process"),
        (capture, "contents", "look"),
        (from_fork, "restore", "read"),
        (digest, "digests", "digest"),
        (snapshot, "walk", "walk"),
        (from_storage, "walk", "walk"),
        (restore, "walk", "walk"),
    ):
        monkeypatch.setattr(where, name, noting(what, getattr(where, name)))
    return found


@pytest.fixture
def fleet(planner: Planner) -> Iterator[Planner]:
    yield planner
    manager().seeds(30)
    manager().withdraw("test is over", last=True)


def test_the_stages_of_a_first_instance_and_of_a_fork(
    layout: str, happened: list[str], fleet: Planner, model_a: Path
) -> None:
    extra = extra_for(fleet.url, model_url=f"counts of {layout}", rfork_layout=layout, rfork_verify="off")
    model = load(vllm_config(model_a, load_format="rfork", extra=extra))
    stages = list(happened)
    (seed,) = manager().seeds(30)
    eventually(lambda: seed.address, "the seed is announced")
    assert ", ".join(stages) == FIRST[layout]
    happened.clear()
    forked = load(vllm_config(model_a, load_format="rfork", extra={**extra, "rfork_become_seed": False}))
    assert ", ".join(happened) == FORK[layout]
    del model, forked


def test_a_first_instance_does_not_wait_for_an_engine(
    layout: str, fleet: Planner, model_a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its load is over while the engine is still being opened; the seed that it becomes waits for it."""

    def never(self: EngineSet) -> None:
        raise AssertionError("a load without a seed needs no engine")

    monkeypatch.setattr(EngineSet, "await_one", never)
    extra = extra_for(fleet.url, model_url=f"nobody {layout}", rfork_layout=layout, rfork_become_seed=False)
    load(vllm_config(model_a, load_format="rfork", extra=extra))
