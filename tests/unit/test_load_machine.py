"""The load as a state machine: its table, and which way each failure leads."""

from __future__ import annotations

import contextlib
import gc
import itertools
import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from vllm_rfork.errors import ForkError, NoSeedAvailable, PlannerError, VerificationError
from vllm_rfork.fork.stage_times import STAGES as STAGE_NAMES
from vllm_rfork.fork.stage_times import StageTimes
from vllm_rfork.load import machine as machines
from vllm_rfork.load import metering
from vllm_rfork.load.machine import STAGES, TRANSITIONS, LoadMachine, Phase
from vllm_rfork.load.metering import Weights
from vllm_rfork.load.ranks import DUMMIES, FORK, KEPT, SEED
from vllm_rfork.manifest.schema import CHECKPOINT, RUNTIME
from vllm_rfork.messages.lanes import OTHER
from vllm_rfork.vllm_compat import storage_loader
from vllm_rfork.vllm_compat.rank_groups import RankGroup

#: The phases in which something is done; FORKED is the one in which vLLM post-processes the checkpoint layout.
STEPS = {
    CHECKPOINT: [Phase.RESERVING, Phase.READING, Phase.FORKED],
    RUNTIME: [Phase.RESERVING, Phase.DUMMIES, Phase.READING],
}

# --- the table ------------------------------------------------------------------------------------------------------


def test_the_table_names_every_phase_once_and_ends_in_a_snapshot() -> None:
    assert set(TRANSITIONS) == set(Phase)
    assert [phase for phase in Phase if not TRANSITIONS[phase]] == [Phase.SNAPSHOT]
    assert all(phase not in after for phase, after in TRANSITIONS.items())


def test_every_phase_is_reached_and_leads_to_a_snapshot() -> None:
    def reached_from(phase: Phase) -> set[Phase]:
        found, new = {phase}, [phase]
        while new:
            after = TRANSITIONS[new.pop()] - found
            found |= after
            new.extend(after)
        return found

    assert reached_from(Phase.DESCRIBED) == set(Phase)
    assert all(Phase.SNAPSHOT in reached_from(phase) for phase in Phase)


def test_no_load_goes_round_in_a_circle() -> None:
    """A second build loads from storage: it never asks for another seed."""
    order = list(Phase)
    order = [*order[: order.index(Phase.REBUILD)], Phase.REBUILD, Phase.STORAGE, Phase.SNAPSHOT]
    assert all(order.index(before) < order.index(each) for before, after in TRANSITIONS.items() for each in after)


def test_the_diagram_shows_every_phase() -> None:
    assert all(phase.name in (machines.__doc__ or "") for phase in Phase)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(Phase, Phase)))
def test_every_transition_is_in_the_table(before: Phase, after: Phase) -> None:
    load = Load()
    load.machine.phase = before
    if after in TRANSITIONS[before]:
        load.machine.enter(after)
        assert load.machine.phase is after
    else:
        with pytest.raises(RuntimeError, match=f"{before.value} cannot become {after.value}"):
            load.machine.enter(after)
        assert load.machine.phase is before


# --- the ways of a load ---------------------------------------------------------------------------------------------


class Load:
    """A machine whose fork, storage and vLLM are scripted: ``fail`` maps a step to what it raises."""

    def __init__(self, layout: str = CHECKPOINT, *, members: int = 1, whole: bool = False, **fail: Exception) -> None:
        self.layout, self.fail, self.happened = layout, fail, list[str]()
        self.phases: list[Phase] = []
        self.built: list[weakref.ref[nn.Module]] = []
        self.engine = SimpleNamespace(
            close=lambda: self.happened.append("engine closed"), discard=lambda: self.happened.append("discard")
        )
        self.session: Any = SimpleNamespace(
            has_written=False,
            leased="reserve" not in fail,
            engine="nixl",
            lane="nixl/rdma",
            seed="10.0.0.1:5000:0",
            storage_s=None,
            times=StageTimes(),
            leases=SimpleNamespace(no_longer_needed=None),
            engines=self.engine,
            intent=SimpleNamespace(withdraw=lambda: self.happened.append("intent withdrawn")),
            logged=SimpleNamespace(once=str),
            cancel_reservation=lambda: self.happened.append("reservation cancelled"),
            drop_tracebacks=lambda error: setattr(error, "__traceback__", None),
            close=lambda: self.happened.append("session closed"),
        )
        self.context: Any = SimpleNamespace(
            settings=SimpleNamespace(
                rfork_request_timeout_sec=1.0, rfork_fallback_load_format="auto", rfork_become_seed=True
            ),
            layout=layout,
            device=torch.device("cpu"),
            rank_group=RankGroup(0, tuple(range(members)), "g"),
            fork_obstacle=None,
            seed_obstacle=None,
        )
        self.whole = whole
        self.weights = Weights("seed", 70, 0.5)
        self.machine = self.new_machine()

    def new_machine(self) -> LoadMachine:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(machines, "FromFork", lambda *args: self)
            registries = SimpleNamespace(restore=lambda: self.happened.append("registries restored"))
            made = LoadMachine(self.context, self.session, self, cast("Any", registries))
        self.wrote_dummies = False
        return made

    # The fork.

    def _step(self, name: str) -> None:
        self.happened.append(name)
        self.phases.append(self.machine.phase)
        if error := self.fail.get(name):
            raise error

    def reserve(self, model: nn.Module) -> None:
        self._step("reserve")

    def fill_with_dummies(self, model: nn.Module, model_config: Any) -> None:
        self.wrote_dummies = "dummies" not in self.fail
        self._step("dummies")

    def read(self, model: nn.Module) -> None:
        self.session.has_written = "connect" not in self.fail
        self._step("connect")
        self._step("read")

    def keep(self) -> None:
        self._step("keep")

    def snapshot(self, model: nn.Module) -> Any:
        return "a snapshot"

    # vLLM and storage.

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        self._step("storage")

    def build(self) -> nn.Module:
        assert not any(reference() for reference in self.built), "the failed model is still in memory"
        model = nn.Linear(2, 2)
        self.built.append(weakref.ref(model))
        self.machine.fill(model, None)
        self._step("post-process" if len(self.built) == 1 else "post-process again")
        return model

    def load_whole(self) -> nn.Module:
        self.happened.append("whole")
        return nn.Linear(2, 2)

    def run(self) -> nn.Module:
        return self.machine.run(self.build, self.load_whole)


class Storage:
    def __init__(self, context: Any, session: Any, prospect: Any, loader: Load) -> None:
        self.loader = loader
        self.weights = Weights("storage", 70, 2.5)

    def fill(self, model: nn.Module, model_config: Any) -> None:
        self.loader.load_weights(model, model_config)

    def snapshot(self, model: nn.Module) -> Any:
        return "a snapshot"


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "FromStorage", Storage)
    monkeypatch.setattr(storage_loader, "loads_whole_models", lambda loader: loader.whole)
    monkeypatch.setattr(storage_loader, "release_memory", lambda device: gc.collect())
    monkeypatch.setattr(
        machines, "outcome_of", lambda context, session, obstacle, snapshot, model: (obstacle, snapshot)
    )


@pytest.mark.parametrize("layout", [CHECKPOINT, RUNTIME])
def test_a_fork_that_works(layout: str) -> None:
    load = Load(layout)
    model = load.run()
    assert load.machine.phase is Phase.FORKED
    assert "storage" not in load.happened
    assert load.happened.count("post-process") == 1
    assert load.machine.outcome(model) == (None, "a snapshot")
    assert load.machine.phase is Phase.SNAPSHOT


@pytest.mark.parametrize("layout", [CHECKPOINT, RUNTIME])
def test_without_a_seed_the_same_model_is_loaded_from_storage(layout: str) -> None:
    load = Load(layout, reserve=NoSeedAvailable("none"))
    load.run()
    assert load.happened == ["reserve", "storage", "post-process"]
    assert load.machine.phase is Phase.STORAGE


SAME_MODEL = [
    (CHECKPOINT, 1, "reserve"),
    (RUNTIME, 1, "reserve"),
    (CHECKPOINT, 2, "reserve"),
    (RUNTIME, 2, "reserve"),
    (CHECKPOINT, 1, "connect"),
    (RUNTIME, 1, "dummies"),
]
ANOTHER_MODEL = [
    (CHECKPOINT, 1, "read"),
    (CHECKPOINT, 2, "connect"),  # another rank may have written
    (CHECKPOINT, 2, "read"),
    (CHECKPOINT, 1, "post-process"),
    (CHECKPOINT, 2, "keep"),
    (RUNTIME, 2, "dummies"),
    (RUNTIME, 1, "post-process"),
    (RUNTIME, 1, "connect"),  # dummies are there
    (RUNTIME, 1, "read"),
]


@pytest.mark.parametrize(("layout", "members", "step"), SAME_MODEL)
def test_a_fork_that_fails_before_anything_is_written_is_replaced_by_storage(
    layout: str, members: int, step: str
) -> None:
    load = Load(layout, members=members, **{step: ForkError("not today")})
    load.run()
    assert len(load.built) == 1
    assert load.happened[-2:] == ["storage", "post-process"]
    assert "discard" in load.happened
    assert "reservation cancelled" in load.happened
    assert "registries restored" not in load.happened


@pytest.mark.parametrize(("layout", "members", "step"), ANOTHER_MODEL)
def test_a_fork_that_fails_later_is_replaced_by_another_model_from_storage(
    layout: str, members: int, step: str
) -> None:
    load = Load(layout, members=members, **{step: ForkError("not today")})
    load.run()
    assert len(load.built) == 2
    assert load.happened[-4:] == ["engine closed", "registries restored", "storage", "post-process again"]
    assert load.machine.phase is Phase.STORAGE
    assert load.session.seed is None, "a seed names the one that its weights come from"


def test_dummies_that_may_have_been_written_cost_the_model() -> None:
    """Whatever raises while they are written: nobody knows how far it came."""
    load = Load(RUNTIME, dummies=ForkError("no memory"))
    load.wrote_dummies = True
    load.fill_with_dummies = lambda model, model_config: load._step("dummies")  # type: ignore[method-assign]
    load.run()
    assert len(load.built) == 2


@pytest.mark.parametrize("error", [ForkError("rejected"), ValueError("not with these values")])
def test_post_processing_that_fails_on_weights_from_storage_raises_its_own_error(error: Exception) -> None:
    load = Load(CHECKPOINT, reserve=NoSeedAvailable("none"), **{"post-process": error})
    with pytest.raises(type(error)) as caught:
        load.run()
    assert caught.value is error
    assert len(load.built) == 1
    assert load.happened[-1] == "session closed"


def test_the_second_model_meets_its_own_error() -> None:
    load = Load(CHECKPOINT, **{"read": ForkError("x"), "post-process again": ValueError("the model's own")})
    with pytest.raises(ValueError, match="the model's own"):
        load.run()
    assert load.happened[-1] == "session closed"


@pytest.mark.parametrize("error", [NoSeedAvailable("none"), ForkError("no engine")])
def test_a_loader_of_whole_models_builds_its_own_after_a_miss(error: ForkError) -> None:
    load = Load(CHECKPOINT, whole=True, reserve=error)
    load.run()
    assert load.happened[-1] == "whole"
    assert "storage" not in load.happened
    obstacle, snapshot = cast("Any", load.machine.outcome(nn.Linear(2, 2)))
    assert "builds and loads models as a whole" in obstacle
    assert snapshot is None


def test_a_worker_that_cannot_fork_and_loads_models_as_a_whole_builds_one_only() -> None:
    load = Load(CHECKPOINT, whole=True)
    load.context.fork_obstacle = "weights lie in a pool"
    load.run()
    assert load.built == []
    assert load.happened == ["intent withdrawn", "whole"]


def test_an_interrupt_ends_the_session() -> None:
    load = Load(CHECKPOINT)
    load.fail["read"] = cast("Any", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        load.run()
    assert load.happened[-1] == "session closed"


@pytest.mark.parametrize("layout", [CHECKPOINT, RUNTIME])
def test_the_phases_of_a_fork(layout: str) -> None:
    load = Load(layout)
    load.run()
    assert [phase for phase, _ in itertools.groupby(load.phases)] == STEPS[layout]


def test_the_stages_of_the_ranks_are_those_of_the_layout() -> None:
    assert STAGES == {CHECKPOINT: (SEED, FORK, KEPT), RUNTIME: (SEED, DUMMIES, FORK)}


# --- the report of a load -------------------------------------------------------------------------------------------

Reports = list[tuple[Any, ...]]


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> Reports:
    """What the machine reports to the metrics of its worker, without stages."""
    reported: Reports = []
    for name in ("loaded", "load_failed", "fell_back", "saved"):
        monkeypatch.setattr(
            metering.metrics,
            name,
            lambda *args, name=name, **more: reported.append((name, *args, *(more[each] for each in sorted(more)))),
        )
    return reported


FORKED = ("loaded", "seed", "nixl/rdma", 70, 0.5)
STORED = ("loaded", "storage", "", 70, 2.5)
FORK_FAILED = ("load_failed", "seed", "nixl/rdma")


@pytest.mark.parametrize("layout", [CHECKPOINT, RUNTIME])
@pytest.mark.parametrize(
    ("fail", "expected"),
    [
        ({}, [FORKED]),
        ({"reserve": NoSeedAvailable("", reason="busy")}, [("fell_back", "busy"), STORED]),
        ({"reserve": NoSeedAvailable("")}, [("fell_back", "NoSeedAvailable"), STORED]),
        ({"reserve": PlannerError("away")}, [("fell_back", "PlannerError"), STORED]),
        ({"read": VerificationError("damaged")}, [("fell_back", "VerificationError"), FORK_FAILED, STORED]),
        ({"post-process": ValueError("not so")}, [("fell_back", "ForkError"), FORK_FAILED, STORED]),
    ],
)
def test_a_load_is_reported_once(layout: str, fail: dict[str, Exception], expected: Reports, reports: Reports) -> None:
    load = Load(layout, **fail)
    load.machine.outcome(load.run())
    assert reports == expected


def test_a_load_from_storage_that_fails_is_reported(reports: Reports) -> None:
    load = Load(CHECKPOINT, reserve=NoSeedAvailable("", reason="none"), storage=OSError("no such file"))
    with pytest.raises(OSError, match="no such file"):
        load.run()
    assert reports == [("fell_back", "none"), ("load_failed", "storage")]


def test_a_worker_that_cannot_fork_reports_that(reports: Reports) -> None:
    load = Load(CHECKPOINT, whole=True, reserve=ForkError("a pool"))
    load.context.fork_obstacle = "a pool"
    load.machine = load.new_machine()
    load.machine.outcome(load.run())
    load = Load(CHECKPOINT, reserve=ForkError("a pool"))
    load.context.fork_obstacle = "a pool"
    load.session.leased = False
    load.machine = load.new_machine()
    load.machine.outcome(load.run())
    whole, each = reports[1], reports[3]
    assert reports == [("fell_back", "ineligible"), whole, ("fell_back", "ineligible"), each]
    assert (whole[:4], each) == (("loaded", "storage", "", 24), STORED)


def test_a_fork_saves_what_the_planner_has_measured_less_the_whole_load(reports: Reports) -> None:
    load = Load(CHECKPOINT)
    load.session.storage_s = 100.0
    load.machine.outcome(load.run())
    ((name, seconds),) = reports[1:]
    assert name == "saved"
    assert 90 < seconds < 100


def test_stages_have_series_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of stages are read from the source: one that is not in the list would be ``(other)``."""
    named = {
        name
        for file in Path(machines.__file__).parents[1].glob("*/*.py")
        for name in re.findall(r"times\.stage\(\"([a-z ]+)\"\)|seconds\[\"([a-z]+)\"\]", file.read_text())
    }
    assert {first or second for first, second in named} == STAGE_NAMES
    stages: list[tuple[str, float]] = []
    monkeypatch.setattr(metering.metrics, "stage_ended", lambda *stage: stages.append(stage))
    load = Load(CHECKPOINT)
    load.session.times.seconds |= {"read": 1.5, "something new": 2.0}
    load.machine.outcome(load.run())
    assert stages == [("read", 1.5), (OTHER, 2.0)]


@pytest.mark.parametrize("error", [None, OSError("no such file")])
def test_a_worker_that_takes_no_part_reports_its_load(error: Exception | None, reports: Reports) -> None:
    def load() -> nn.Module:
        if error is not None:
            raise error
        return nn.Linear(2, 2)

    with contextlib.ExitStack() as stack:
        if error is not None:
            stack.enter_context(pytest.raises(OSError, match="no such file"))
        metering.without_fork(load, "disabled")
    assert reports[0] == ("fell_back", "disabled")
    assert reports[1][:3] == (("loaded", "storage", 24) if error is None else ("load_failed", "storage"))


@pytest.mark.parametrize("model", [nn.ParameterList([nn.UninitializedParameter()]), object()], ids=["lazy", "wrapper"])
def test_a_model_whose_bytes_cannot_be_counted_starts(model: Any, reports: Reports) -> None:
    """A loader of another package may return anything that vLLM can run."""
    assert metering.without_fork(lambda: model, OTHER) is model
    assert [report[:3] for report in reports] == [("fell_back", OTHER), ("loaded", "storage", 0)]
