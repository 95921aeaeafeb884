"""Start-up plans on stand-in workers with the order of calls of vLLM 0.26 and 0.32: equal on all ranks, and they fit.

Real are vLLM's own functions for plans, its configuration and its keys. The device is a counter of bytes.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from tests.vllm import models
from tests.vllm.engine_process import vllm_config
from vllm_rfork.caches.installer import install_file
from vllm_rfork.caches.safe.startup_plan import CarriedPlan, decode_plan, encode_plan
from vllm_rfork.errors import CacheError
from vllm_rfork.load.consensus import Consensus
from vllm_rfork.vllm_compat.rank_groups import RankGroup
from vllm_rfork.vllm_compat.start_up import plan_hooks
from vllm_rfork.vllm_compat.start_up.listener import JsonPlace, listen
from vllm_rfork.vllm_compat.start_up.plan_memory import worker_obstacle

pytestmark = pytest.mark.vllm

GB = 10**9
WEIGHTS, ACTIVATIONS, LIBRARIES, GRAPHS = 15 * GB, 3 * GB, GB, 2 * GB
REQUESTED = 75 * GB


class Device:
    """One device of 150 GB: bytes of this process, and of its neighbours."""

    def __init__(self) -> None:
        self.neighbours = self.outside_torch = self.allocated = self.peak = 0

    @property
    def free(self) -> int:
        return 150 * GB - self.neighbours - self.outside_torch - self.allocated

    def take_for_a_while(self, nbytes: int) -> None:
        self.peak = max(self.peak, self.allocated + nbytes)

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self.peak = self.allocated

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        return {"allocated_bytes.all.peak": self.peak, "allocated_bytes.all.current": self.allocated}

    def get_memory_info(self, device: Any = None) -> tuple[int, int]:
        return self.free, 150 * GB


class Runner:
    """Notes the calls of a model runner, and the memory that they take."""

    def __init__(self, device: Device) -> None:
        self.device, self.calls = device, list[str]()
        self.model_memory_usage = WEIGHTS
        self.neighbour_nbytes = 0

    def profile_run(self, **how: Any) -> None:
        self.calls.append("profile")
        self.device.outside_torch = LIBRARIES
        self.device.neighbours += self.neighbour_nbytes
        self.neighbour_nbytes = 0
        self.device.take_for_a_while(ACTIVATIONS)

    def profile_cudagraph_memory(self) -> int:
        self.calls.append("measure graphs")
        return GRAPHS

    def capture_model(self) -> int:
        self.calls.append("capture")
        self.device.outside_torch += GRAPHS
        return GRAPHS


class StandIn:
    """Attributes of both versions' workers."""

    use_v2_model_runner = False

    def __init__(self, config: Any, device: Device, *, rank: int = 0) -> None:
        self.vllm_config, self.cache_config, self.parallel_config = config, config.cache_config, config.parallel_config
        self.rank, self.device, self.on = rank, torch.device("cpu"), device
        self.init_snapshot = SimpleNamespace(total_memory=150 * GB, free_memory=device.free)
        self.requested_memory = float(REQUESTED)
        self.model_runner = Runner(device)
        self.needed_nbytes = GB
        device.allocated = WEIGHTS

    def get_kv_cache_spec(self) -> dict[str, Any]:
        return {"layer": SimpleNamespace(max_memory_usage_bytes=lambda config: self.needed_nbytes)}

    def beside(self) -> int:
        return int(self.init_snapshot.free_memory) - self.on.free + ACTIVATIONS

    def measured(self) -> int:
        graphs: int = self.model_runner.profile_cudagraph_memory()
        return REQUESTED - self.beside() - graphs

    def compile_or_warm_up_model(self) -> None:
        from vllm.v1.worker import gpu_worker

        graphs = self.model_runner.capture_model()
        if self.cache_config.kv_cache_memory_bytes is None:
            beside = self.beside()  # with the graphs, which are captured now
            assert graphs == GRAPHS
            gpu_worker.maybe_save_startup_plan(self, REQUESTED - beside - 150 * 1024**2)


class Worker26(StandIn):
    """The calls of 0.26: the reserve for a front end that decodes is the worker's own method."""

    reserved_nbytes = 0

    def determine_available_memory(self) -> int:
        from vllm.v1.worker import gpu_worker

        gpu_worker.maybe_apply_startup_plan(self)
        if kv_cache_memory_bytes := self.cache_config.kv_cache_memory_bytes:
            self.model_runner.profile_run()
            return self._reserve_mm_ipc_gpu_memory(kv_cache_memory_bytes)
        self.model_runner.profile_run()
        return self._reserve_mm_ipc_gpu_memory(self.measured())

    def _reserve_mm_ipc_gpu_memory(self, nbytes: int) -> int:
        return nbytes - self.reserved_nbytes


class Worker32(StandIn):
    """The calls of 0.32: another signature of the profiling run."""

    def determine_available_memory(self) -> int:
        from vllm.v1.worker import gpu_worker

        gpu_worker.maybe_apply_startup_plan(self)
        self.model_runner.profile_run(randomize_inputs=False)
        if kv_cache_memory_bytes := self.cache_config.kv_cache_memory_bytes:
            return int(kv_cache_memory_bytes)
        return self.measured()


class Listener:
    """One rank's listener: it installs ``body`` where a plan is read, as a seed's, and votes for all ranks."""

    def __init__(self, body: bytes | None = None) -> None:
        self.body = body
        self.refuse: dict[str, str] = {}
        self.votes: list[tuple[str, str | None]] = []
        self.refused = ""
        self.made: list[tuple[JsonPlace, bytes]] = []
        self.used: list[bool] = []

    def about_to_read(self, place: JsonPlace) -> bool:
        if self.body is None:
            return False
        try:
            return install_file(place.root, place.directory, place.file, place.check(self.body))
        except CacheError as error:
            self.refused = str(error)
            return False

    def explain(self, details: dict[str, str]) -> None:
        assert details

    def agree(self, stage: str, obstacle: str | None) -> str | None:
        self.votes.append((stage, obstacle))
        return obstacle or self.refuse.get(stage)

    def outcome(self, kind: str, name: str, *, used: bool, seconds: float | None) -> None:
        self.used.append(used)

    def produced(self, place: JsonPlace, seconds: float | None, body: bytes | None = None) -> None:
        assert body is not None
        self.made.append((place, place.check(body)))


@functools.cache
def configuration(model: Path, utilization: float) -> Any:
    return vllm_config(model, gpu_memory_utilization=utilization)


@dataclasses.dataclass
class Starts:
    """Starts of one worker class, each on a device of its own, in one cache root unless it gets another."""

    worker: type[StandIn]
    model: Path
    patch: pytest.MonkeyPatch

    def prepare(self, listener: Any, device: Device | None = None, *, rank: int = 0, **options: Any) -> Any:
        from vllm.config import CUDAGraphMode

        config = copy.deepcopy(configuration(self.model, options.get("gpu_memory_utilization", 0.5)))
        config.cache_config.kv_cache_memory_bytes = None  # vLLM sets it on CPU, and captures no graphs there
        config.model_config.enforce_eager = False
        config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
        listen(listener)
        return self.worker(config, device or Device(), rank=rank)

    def run(self, listener: Any, prepared: Any = None, **options: Any) -> tuple[list[str], int]:
        """The runner's calls and the size of the cache, which is in use beside everything else at the end."""
        worker = prepared or self.prepare(listener, **options)
        value = worker.determine_available_memory()
        taken = worker.beside()
        worker.compile_or_warm_up_model()
        assert value + taken + GRAPHS <= REQUESTED, "out of memory that vLLM was asked to stay within"
        return worker.model_runner.calls, value


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.without_weights(models.qwen2(tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("bare"))


@pytest.fixture(params=[Worker26, Worker32])
def starts(
    request: pytest.FixtureRequest, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Starts]:
    """vLLM with the stand-in for its worker, and this package's hooks on both; no plan is enabled by a user."""
    from vllm.platforms import current_platform
    from vllm.v1.worker import gpu_worker

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "root"))
    monkeypatch.delenv(plan_hooks.FLAG, raising=False)
    monkeypatch.setattr(plan_hooks._Flag, "set_here", False)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    worker: type[StandIn] = type("Worker", (request.param,), {**vars(request.param)})
    monkeypatch.setattr(gpu_worker, "Worker", worker)
    for name in ("maybe_apply_startup_plan", "maybe_save_startup_plan"):
        monkeypatch.setattr(gpu_worker, name, getattr(gpu_worker, name))
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    yield Starts(worker, model, monkeypatch)
    listen(None)


@pytest.fixture
def hooked(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> Starts:
    """With torch's counters answered by the device of the present worker."""
    plan_hooks.install()
    plan_hooks.install()
    prepare = starts.prepare

    def prepared(listener: Any, device: Device | None = None, **options: Any) -> Any:
        device = device or Device()
        for name in ("reset_peak_memory_stats", "memory_stats", "get_memory_info"):
            monkeypatch.setattr(torch.accelerator, name, getattr(device, name))
        return prepare(listener, device, **options)

    starts.prepare = prepared  # type: ignore[method-assign]
    return starts


MEASURED = ["profile", "measure graphs", "capture"]
PLANNED = ["profile", "capture"]


def seeds_plan(starts: Starts, root: Path) -> CarriedPlan:
    """The plan that a first start with its own cache root offers."""
    seed = Listener()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(root))
        calls, _ = starts.run(seed)
    assert calls == MEASURED
    ((place, body),) = seed.made
    assert (place.kind, place.name) == ("startup_plan", "rank0")
    plan = decode_plan(body)
    assert (plan.graphs_nbytes, plan.memory.weights_nbytes) == (GRAPHS, WEIGHTS)
    return plan


def test_a_receiver_uses_the_plan_of_its_seed_and_offers_it_on(hooked: Starts, tmp_path: Path) -> None:
    plan = seeds_plan(hooked, tmp_path / "seed")
    receiver = Listener(encode_plan(plan))
    assert hooked.run(receiver) == (PLANNED, plan.cache_nbytes)
    assert receiver.votes == [(plan_hooks.FOUND, None), (plan_hooks.FITS, None)]
    assert receiver.used == [True]
    assert [decode_plan(body) for _, body in receiver.made] == [plan]

    # Its next start has no seed.
    assert hooked.run(Listener()) == (PLANNED, plan.cache_nbytes)


def test_a_start_with_other_options_measures_and_keeps_its_own_plan(hooked: Starts, tmp_path: Path) -> None:
    plan = seeds_plan(hooked, tmp_path / "seed")
    other = Listener(encode_plan(plan))
    calls, _ = hooked.run(other, gpu_memory_utilization=0.6)
    assert calls == MEASURED
    assert "gpu_memory_utilization is 0.6 here and 0.5 on the seed" in other.refused
    assert hooked.run(Listener(), gpu_memory_utilization=0.6)[0] == PLANNED
    assert hooked.run(Listener())[0] == MEASURED, "vLLM's fingerprint is equal, the record is not"


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_nbytes": 2**62},
        {"cache_nbytes": -1},
        {"cache_nbytes": 59 * GB},
        {"cache_nbytes": 1},
        {"graphs_nbytes": 0},
        {"graphs_nbytes": -(2**40)},
        {"memory": {"total_nbytes": 2**60}},
        {"memory": {"requested_nbytes": 149 * GB}},
        {"memory": {"weights_nbytes": 1}},
    ],
)
def test_a_plan_with_absurd_numbers_ends_in_a_measured_start(
    hooked: Starts, tmp_path: Path, changes: dict[str, Any]
) -> None:
    plan = seeds_plan(hooked, tmp_path / "seed")
    changed = dict(changes)
    memory = msgspec.structs.replace(plan.memory, **changed.pop("memory", {}))
    receiver = Listener(encode_plan(msgspec.structs.replace(plan, memory=memory, **changed)))
    assert hooked.run(receiver)[0] == MEASURED
    assert "plan" in receiver.refused
    (vote,) = receiver.votes
    assert vote[1] is not None


def test_a_cache_that_does_not_fit_becomes_smaller(
    hooked: Starts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = seeds_plan(hooked, tmp_path / "seed")
    receiver = Listener(encode_plan(plan))
    worker = hooked.prepare(receiver)
    worker.model_runner.neighbour_nbytes = 10 * GB
    calls, value = hooked.run(receiver, worker)
    assert (calls, value) == (PLANNED, plan.cache_nbytes - 10 * GB)
    assert worker.cache_config.kv_cache_memory_bytes == value
    assert f"{plan.cache_nbytes} bytes for the KV cache, and {value} fit" in caplog.text
    assert decode_plan(receiver.made[0][1]) == plan, "others get the plan as it was measured"


@pytest.mark.parametrize(("neighbour_nbytes", "needed_nbytes"), [(40 * GB, GB), (10 * GB, 25 * GB)])
def test_a_cache_that_would_be_too_small_is_measured(
    hooked: Starts, tmp_path: Path, neighbour_nbytes: int, needed_nbytes: int
) -> None:
    """vLLM's own measurement gives a little more than a plan, which may be the difference to a start that fails."""
    receiver = Listener(encode_plan(seeds_plan(hooked, tmp_path / "seed")))
    worker = hooked.prepare(receiver)
    worker.model_runner.neighbour_nbytes, worker.needed_nbytes = neighbour_nbytes, needed_nbytes
    assert hooked.run(receiver, worker)[0] == ["profile", *MEASURED]
    assert [stage for stage, _ in receiver.votes] == [plan_hooks.FOUND, plan_hooks.FITS]


@pytest.mark.parametrize(("stage", "calls"), [(plan_hooks.FOUND, MEASURED), (plan_hooks.FITS, ["profile", *MEASURED])])
def test_a_rank_measures_if_another_one_does(hooked: Starts, tmp_path: Path, stage: str, calls: list[str]) -> None:
    receiver = Listener(encode_plan(seeds_plan(hooked, tmp_path / "seed")))
    receiver.refuse[stage] = "rank 1: no plan"
    assert hooked.run(receiver)[0] == calls


def test_a_plan_without_room_for_long_requests_costs_no_second_profiling_run(hooked: Starts, tmp_path: Path) -> None:
    receiver = Listener(encode_plan(seeds_plan(hooked, tmp_path / "seed")))
    worker = hooked.prepare(receiver)
    worker.needed_nbytes = 50 * GB
    assert hooked.run(receiver, worker)[0] == MEASURED
    assert "long requests" in receiver.refused


@pytest.mark.parametrize("flag", ["", "1"])
def test_a_start_that_died_with_a_seeds_plan_does_not_use_it_again(
    starts: Starts, request: pytest.FixtureRequest, tmp_path: Path, flag: str
) -> None:
    if flag:
        starts.patch.setenv(plan_hooks.FLAG, flag)
    hooked = request.getfixturevalue("hooked")
    body = encode_plan(seeds_plan(hooked, tmp_path / "seed"))
    worker = hooked.prepare(Listener(body))
    worker.determine_available_memory()
    assert worker.model_runner.calls == ["profile"], "it dies while it captures graphs"
    again = Listener(body)
    assert hooked.run(again)[0] == MEASURED
    assert "did not end its warm-up" in str(again.votes[0][1])
    assert hooked.run(Listener())[0] == PLANNED, "by what it measured itself"


def test_ranks_that_measure_together_but_vote_apart_use_no_plan(hooked: Starts, tmp_path: Path) -> None:
    plan = seeds_plan(hooked, tmp_path / "seed")
    worker = hooked.prepare(Listener())
    assert worker_obstacle(worker, plan) is None
    worker.parallel_config.enable_elastic_ep = True
    assert "do not vote" in str(worker_obstacle(worker, plan))


def test_a_number_of_another_type_never_fails_a_start(hooked: Starts, caplog: pytest.LogCaptureFixture) -> None:
    hooked.patch.setattr(Runner, "capture_model", lambda self: "2 GB")
    worker = hooked.prepare(Listener())
    worker.determine_available_memory()
    assert worker.model_runner.capture_model() == "2 GB"
    assert "startup_plan was left to vLLM because of ValueError" in caplog.text


def test_a_failure_while_looking_for_a_plan_is_a_vote(hooked: Starts, tmp_path: Path) -> None:
    """The other ranks wait for it."""
    from vllm.v1.worker import startup_plan

    receiver = Listener()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup_plan, "compute_plan_fingerprint", lambda *given: 1 // 0)
        assert hooked.run(receiver)[0] == MEASURED
    assert receiver.votes == [(plan_hooks.FOUND, "ZeroDivisionError: integer division or modulo by zero")]

    body = encode_plan(seeds_plan(hooked, tmp_path / "seed"))
    receiver = Listener(body)
    worker = hooked.prepare(receiver)
    hooked.patch.setattr(torch.accelerator, "memory_stats", lambda device: {})
    assert hooked.run(receiver, worker)[0] == ["profile", *MEASURED]
    assert receiver.votes[-1] == (plan_hooks.FITS, "KeyError: 'allocated_bytes.all.peak'")


def test_two_ranks_of_which_one_has_a_plan_both_measure(hooked: Starts, tmp_path: Path) -> None:
    """By the real vote. A rank that skips the measurement of graphs would leave the other in a collective."""
    body = encode_plan(seeds_plan(hooked, tmp_path / "seed"))
    store = torch.distributed.HashStore()
    local = threading.local()
    turn = threading.Lock()  # between votes: vLLM's keys are computed with a replaced function of the process

    class OfRank(Listener):
        def __init__(self, rank: int, body: bytes | None) -> None:
            super().__init__(body)
            self.consensus = Consensus(RankGroup(rank, (0, 1), "g"), connect=lambda: store)

        def agree(self, stage: str, obstacle: str | None) -> str | None:
            turn.release()
            try:
                return self.consensus.decide(stage, obstacle, 10.0)
            finally:
                turn.acquire()

    class Dispatching:
        def __getattr__(self, name: str) -> Any:
            return getattr(local.listener, name)

    results: list[list[str]] = []

    def run(rank: int, worker: Any, listener: OfRank) -> None:
        local.listener = listener
        with turn:
            worker.determine_available_memory()
        results.append(worker.model_runner.calls)

    for bodies, calls in (((body, None), ["profile", "measure graphs"]), ((body, body), ["profile"])):
        hooked.patch.setenv("VLLM_CACHE_ROOT", str(tmp_path / f"root {calls}"))
        device = Device()
        threads = []
        for rank, each in enumerate(bodies):
            of_rank = each and each.replace(b'"rank":"0"', b'"rank":"%d"' % rank)
            worker = hooked.prepare(Dispatching(), device, rank=rank)
            threads.append(threading.Thread(target=run, args=(rank, worker, OfRank(rank, of_rank))))
        results.clear()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert results == [calls, calls]


@pytest.mark.parametrize("flag", ["", "1"])
def test_a_later_start_without_caches_has_plans_only_if_the_user_enabled_them(
    starts: Starts, request: pytest.FixtureRequest, flag: str
) -> None:
    if flag:
        starts.patch.setenv(plan_hooks.FLAG, flag)
    hooked = request.getfixturevalue("hooked")
    assert hooked.run(Listener())[0] == MEASURED
    plan_hooks.disable()
    assert os.environ.get(plan_hooks.FLAG, "") == flag
    assert hooked.run(None)[0] == (PLANNED if flag else MEASURED)
    plan_hooks.install()
    assert hooked.run(Listener())[0] == PLANNED


def test_the_users_decision_stays(starts: Starts, tmp_path: Path) -> None:
    """Disabled: nothing is applied and nothing is voted on; the plan is still offered."""
    starts.patch.setenv(plan_hooks.FLAG, "0")
    plan_hooks.install()
    listener = Listener()
    worker = starts.prepare(listener)
    for name in ("reset_peak_memory_stats", "memory_stats", "get_memory_info"):
        starts.patch.setattr(torch.accelerator, name, getattr(worker.on, name))
    assert starts.run(listener, worker)[0] == MEASURED
    assert (listener.votes, len(listener.made)) == ([], 1)
    assert not (tmp_path / "root").exists()


def test_vllms_own_plan_without_a_record_is_the_users_choice(starts: Starts, tmp_path: Path) -> None:
    from vllm.v1.worker import gpu_worker

    starts.patch.setenv(plan_hooks.FLAG, "1")
    assert starts.run(Listener())[0] == MEASURED, "vLLM by itself"
    (file,) = (tmp_path / "root" / "startup_plan").iterdir()
    stored = json.loads(file.read_bytes())["kv_cache_memory_bytes"]

    without = gpu_worker.maybe_apply_startup_plan, gpu_worker.maybe_save_startup_plan
    determine = starts.worker.determine_available_memory  # type: ignore[attr-defined]
    plan_hooks.install()
    listener = Listener()
    assert starts.run(listener) == (PLANNED, stored)
    assert listener.votes == [(plan_hooks.FOUND, None), (plan_hooks.FITS, None)]

    gpu_worker.maybe_apply_startup_plan, gpu_worker.maybe_save_startup_plan = without
    starts.worker.determine_available_memory = determine  # type: ignore[attr-defined]
    starts.patch.delenv(plan_hooks.FLAG)
    plan_hooks.install()
    listener = Listener()
    assert starts.run(listener)[0] == MEASURED
    assert "does not state" in str(listener.votes[0][1])


def test_a_vllm_without_plans_and_another_platform_are_left_alone(starts: Starts) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.worker import gpu_worker

    before = gpu_worker.maybe_apply_startup_plan
    starts.patch.setattr(type(current_platform), "is_cuda", lambda self: False)
    plan_hooks.install()
    assert gpu_worker.maybe_apply_startup_plan is before
    starts.patch.delattr(gpu_worker, "maybe_apply_startup_plan")
    with pytest.raises(AttributeError):
        plan_hooks.install()
