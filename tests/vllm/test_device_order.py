"""Nothing is read, digested or registered while the device still works on it.

Layout conversions, copies and kernels are queued, and return at once: what lies at an address until the queue is empty
are yesterday's bytes, and an engine's reads are not in that queue. The device here keeps a list of what is queued and
of who looked before it was done.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm.conftest import Planner, eventually, extra_for
from tests.vllm.engine_process import load, vllm_config
from vllm_rfork.devices.cpu import CpuBackend
from vllm_rfork.engines.memory import MemoryEngine
from vllm_rfork.load import context
from vllm_rfork.model import digest, relocation, snapshot
from vllm_rfork.model.relocation import PublishedSnapshot
from vllm_rfork.seeding.manager import manager
from vllm_rfork.vllm_compat import dummy_weights
from vllm_rfork.vllm_compat.worker_hooks import Change, WeightChanges

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("no_seeds")]


class Device:
    """What is queued, what has happened, and what happened too early."""

    def __init__(self) -> None:
        self.queued: list[str] = []
        self.happened: list[str] = []
        self.early: list[str] = []

    def queue(self, what: str) -> None:
        self.queued.append(what)
        self.happened.append(what)

    def wait(self) -> None:
        self.queued.clear()
        self.happened.append("waited")

    def look(self, how: str) -> None:
        self.happened.append(how)
        self.early += [f"{how} before {what} was done" for what in self.queued]

    def queueing(self, what: str, method: Any) -> Any:
        """``method`` as one that returns before the device has done its work."""

        @functools.wraps(method)
        def called(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            finally:
                self.queue(what)

        return called

    def looking(self, how: str, method: Any) -> Any:
        @functools.wraps(method)
        def called(*args: Any, **kwargs: Any) -> Any:
            self.look(how)
            return method(*args, **kwargs)

        return called

    def between(self, first: str, last: str) -> list[str]:
        """What happened from the last ``first`` to the ``last`` after it, without repetitions in a row."""
        start = len(self.happened) - 1 - self.happened[::-1].index(first)
        part = self.happened[start : self.happened.index(last, start) + 1]
        return [what for what, before in zip(part, ["", *part], strict=False) if what != before]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """This machine's processor, as a device that works by itself: loading, dummies and post-processing are queued.

    As on accelerators nothing is kept beside the model, and post-processing leaves the weights of this one in place.
    """
    from vllm.model_executor.model_loader import base_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    one = Device()
    monkeypatch.setattr(context, "KEEPS_LOADED", frozenset())
    monkeypatch.setattr(base_loader, "process_weights_after_loading", lambda *args: None)
    monkeypatch.setattr(CpuBackend, "synchronize", lambda side: one.wait())
    for where, name, what in (
        (DefaultModelLoader, "load_weights", "loading"),
        (dummy_weights, "fill_with_dummies", "dummies"),
        (base_loader, "process_weights_after_loading", "post-processing"),
    ):
        monkeypatch.setattr(where, name, one.queueing(what, getattr(where, name)))
    for where, name, how in (
        (snapshot, "collect", "addresses"),
        (relocation, "collect", "addresses"),
        (MemoryEngine, "register", "registered"),
        (MemoryEngine, "read", "read"),
        (digest.Digester, "add", "digested"),
    ):
        monkeypatch.setattr(where, name, one.looking(how, getattr(where, name)))
    return one


@pytest.fixture(params=["checkpoint", "runtime"])
def layout(request: pytest.FixtureRequest) -> str:
    if request.param == "runtime":
        request.getfixturevalue("runtime_allowed")
    return str(request.param)


@contextlib.contextmanager
def serving(device: Device) -> Iterator[None]:
    """Work is queued until the last moment before a seed checks its bytes: it has begun to serve meanwhile."""
    recheck = PublishedSnapshot.recheck

    def busy(self: PublishedSnapshot) -> None:
        device.queue("serving")
        recheck(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PublishedSnapshot, "recheck", busy)
        yield


def test_a_seed_waits_before_it_takes_addresses_and_before_it_checks_its_bytes(
    layout: str, device: Device, model_a: Path, planner: Planner
) -> None:
    extra = extra_for(planner.url, model_url=f"order of a seed, {layout}", rfork_layout=layout)
    with serving(device):
        load(vllm_config(model_a, load_format="rfork", extra=extra))
        (seed,) = manager().seeds(30)
    assert seed.address
    assert device.early == []
    # The test sees all of it: what was captured, what was registered, and what was checked last.
    if layout == "checkpoint":
        assert device.between("loading", "digested") == ["loading", "waited", "addresses", "digested"]
    assert device.between("post-processing", "addresses") == ["post-processing", "waited", "addresses"]
    assert device.between("addresses", "registered")[-1] == "registered"
    assert device.between("serving", "digested") == ["serving", "waited", "digested"]


def test_a_receiver_waits_before_it_takes_addresses_to_be_written_to(
    layout: str, device: Device, model_a: Path, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What construction or post-processing of dummies still writes would come after the seed's bytes."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    extra = extra_for(planner.url, model_url=f"order of a receiver, {layout}", rfork_layout=layout)
    load(vllm_config(model_a, load_format="rfork", extra=extra))
    manager().seeds(30)
    monkeypatch.setattr(
        BaseModelLoader, "create_model", device.queueing("construction", BaseModelLoader.create_model), raising=False
    )
    device.happened.clear()
    load(vllm_config(model_a, load_format="rfork", extra={**extra, "rfork_become_seed": False}))
    assert device.early == []
    last = "construction" if layout == "checkpoint" else "dummies"
    between = ["post-processing"] if layout == "runtime" else []
    assert device.between(last, "digested") == [
        last, *between, "waited", "addresses", "registered", "read", "digested"
    ]  # fmt: skip


def test_a_seed_that_comes_back_waits_for_what_the_change_has_queued(
    device: Device, model_a: Path, planner: Planner
) -> None:
    """Its tensors are found anew."""
    model: torch.nn.Module = load(
        vllm_config(model_a, load_format="rfork", extra=extra_for(planner.url, model_url="order of a return"))
    )
    (old,) = manager().seeds(30)
    with serving(device):
        WeightChanges(manager()).run(Change("weights are updated"), device.queue, "an update")
        eventually(lambda: [seed for seed in manager().seeds(30) if seed.address], "there is a seed again")
    assert device.early == []
    assert device.between("an update", "registered") == ["an update", "waited", "addresses", "registered"]
    assert device.between("serving", "digested") == ["serving", "waited", "digested"]
    assert model is not None
    assert old.address is None
