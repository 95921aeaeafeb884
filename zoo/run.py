"""Load one case three times, and compare the results.

The order is fixed: the default loader's model first, then a worker that loads from storage and becomes a seed, then a
worker that forks from it and has no weight files. A refusal that was listed beforehand is held against the default
load in the same way.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

from zoo import checkpoints
from zoo.case import Case, listed
from zoo.observe import Load
from zoo.planner import Planner, eventually, meeting_port
from zoo.processes import RoleFailed, in_a_process, instance
from zoo.workers import ENGINE_ARGUMENTS, LEADER, LOAD, Order, Report

#: Buffers and indices of adapters, made after the base model; their content is undefined until an adapter is loaded.
NOT_COMPARED = re.compile(r"^lora_manager\.|\.punica_wrapper\.")
#: How many differing names a failure lists.
NAMED = 4

_FORKED = re.compile(
    r"RFork: forked (?P<nbytes>\d+) bytes .* in (?P<seconds>[\d.]+) s .*engine=(?P<engine>\w+) layout=(?P<layout>\w+)"
)

FORKED, REFUSED, NOT_RUN, FAILED = "forked", "refused", "not run", "failed"


@dataclasses.dataclass(frozen=True)
class Setting:
    """The settings of one run.

    Attributes:
        traits: the platform's.
        work: folder of checkpoints and logs.
        planner_url: the planner's.
        options: more of the plugin's, ``rfork_engine`` among them.
        engine_arguments: more of vLLM's, for every model.
        seed_environment, receiver_environment: for the two workers, for instance which devices each sees.
        timeout_s: how long one role may take.
    """

    traits: frozenset[str]
    work: Path
    planner: Planner
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    engine_arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed_environment: dict[str, str] = dataclasses.field(default_factory=dict)
    receiver_environment: dict[str, str] = dataclasses.field(default_factory=dict)
    timeout_s: float = 300.0


@dataclasses.dataclass(frozen=True)
class Reports:
    """The reports of the three instances of one case, by rank."""

    default: list[Report]
    seeds: list[Report]
    forks: list[Report]


@dataclasses.dataclass
class Row:
    """The result of one case. ``failures`` is empty if it is as expected; bytes and tensors are those of all ranks and
    models; ``fork_s`` and ``storage_s`` are the slowest rank's."""

    name: str
    covers: str
    outcome: str
    reason: str = ""
    architecture: str = ""
    ranks: int = 1
    nbytes: int = 0
    tensors: int = 0
    layout: str = ""
    engine: str = ""
    digests_equal: bool | None = None
    answers_equal: bool | None = None
    asks: str = ""
    note: str = ""
    fork_s: float = 0.0
    storage_s: float = 0.0
    failures: list[str] = dataclasses.field(default_factory=list)


def run(case: Case, setting: Setting) -> Row:
    """Make, load, fork and compare ``case``. Errors become failures of the row."""
    row = Row(case.name, case.covers, FAILED, ranks=case.ranks)
    try:
        _run(case, setting, row)
    except (RoleFailed, AssertionError) as error:
        row.failures.append(str(error))
    if row.failures:
        row.outcome = FAILED
    return row


def _run(case: Case, setting: Setting, row: Row) -> None:
    folder = setting.work / "models" / case.name
    logs = setting.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob(f"{case.name}.*"):
        old.unlink()
    in_a_process(checkpoints.make, case, folder, log=logs / f"{case.name}.make")
    quiet = listed(case.cannot_answer, setting.traits)
    row.asks, row.note = (case.asks, case.needs_files) if quiet is None else (LOAD, quiet)

    default = _load(case, setting, folder, "default", row.asks)
    cannot = listed(case.cannot_run, setting.traits)
    said = "; ".join(report.error for report in default if report.error)
    if cannot is not None:
        row.outcome, row.reason, row.note = NOT_RUN, cannot, case.why
        if not said:
            row.failures.append("listed as what vLLM cannot load here, and it loads")
        elif cannot not in said:
            row.failures.append(f"listed as what vLLM cannot load here because of {cannot!r}, but it says: {said}")
        return
    if said:
        raise RoleFailed(f"the default load failed: {said}")
    loads = [load for report in default for load in report.loads]
    row.architecture = ", ".join(dict.fromkeys(load.architecture for load in loads))
    row.nbytes, row.tensors = sum(load.nbytes for load in loads), sum(load.tensors for load in loads)
    row.storage_s = max(report.storage_s for report in default)
    if row.asks != LOAD:
        _check_meaning(case, default[0].answers, row)

    refused = listed(case.refused, setting.traits)
    bare = folder
    if refused is None and not case.needs_files:
        bare = setting.work / "bare" / case.name
        shutil.rmtree(bare, ignore_errors=True)
        checkpoints.without_weights(folder, bare)
        if case.adapter:
            shutil.copytree(folder / "adapter", bare / "adapter", dirs_exist_ok=True)
    with instance(_order(case, setting, folder, "seed", LOAD), case.ranks, meeting_port()) as seed:
        seeds = seed.reports(setting.timeout_s)
        row.failures += _differences(case, "the seed", default, seeds, layout="", used=False)
        if refused is None:
            _check_seeds(case, setting, seeds)
        forks = _load(case, setting, bare, "fork", row.asks)
    _judge(case, refused, Reports(default, seeds, forks), row)


def _check_meaning(case: Case, answers: list[Any], row: Row) -> None:
    """Check that equal answers are meaningful: they depend on the prompt and the adapter, and the draft proposes."""
    if len({repr(answer) for answer in answers}) < len(answers):
        row.failures.append("different prompts get the same answer, so that equal ones mean nothing")
    if case.models > 1 and len({repr(step) for step in answers[-1][1]}) < 2:
        row.failures.append("the draft proposes nothing, or always the same")


def _load(case: Case, setting: Setting, folder: Path, role: str, asks: str) -> list[Report]:
    with instance(_order(case, setting, folder, role, asks), case.ranks, meeting_port()) as running:
        return running.reports(setting.timeout_s)


def _order(case: Case, setting: Setting, folder: Path, role: str, asks: str) -> Order:
    arguments = {**ENGINE_ARGUMENTS, **case.arguments(folder), **setting.engine_arguments, "model": str(folder)}
    if case.models > 1:
        arguments.setdefault("async_scheduling", False)  # else drafts stay on the device, where nobody sees them
    if role != "default":
        arguments["load_format"] = "rfork"
        arguments["model_loader_extra_config"] = {
            "model_url": case.name,
            "model_deploy_strategy_name": "zoo",
            "rfork_scheduler_url": setting.planner.url,
            "rfork_seed_advertise_host": "127.0.0.1",
            "rfork_seed_bind_host": "127.0.0.1",
            "rfork_become_seed": role == "seed",
            **setting.options,
        }
    return Order(
        engine_arguments=arguments,
        asks=asks,
        log=str(setting.work / "logs" / f"{case.name}.{role}"),
        adapter=str(folder / "adapter") if case.adapter and asks != LOAD else "",
        media=case.media if asks != LOAD else "",
        media_token=case.media_token,
        drafts=case.models > 1,
        replicas=case.replicas,
        workers=LEADER if case.executor else "",
        environment=setting.seed_environment if role == "seed" else setting.receiver_environment,
    )


def _check_seeds(case: Case, setting: Setting, seeds: list[Report]) -> None:
    """Check that each rank has a seed for each of its models, at its own address.

    The planner is asked, not the workers: a function that runs on a worker suspends its seed.
    """
    if said := "; ".join(report.error for report in seeds if report.error):
        raise RoleFailed(f"the seed failed: {said}")
    wanted = case.models * case.ranks
    try:
        eventually(lambda: len(set(setting.planner.seeds(case.name))) == wanted, "the seeds are announced", 180.0)
    except AssertionError as error:
        why = "; ".join(text for report in seeds for level, text in report.lines if level != "INFO")
        raise RoleFailed(f"{len(set(setting.planner.seeds(case.name)))} seeds for {wanted} models: {why}") from error


def _judge(case: Case, refused: str | None, reports: Reports, row: Row) -> None:
    matches = [match for report in reports.forks for _, text in report.lines if (match := _FORKED.match(text))]
    row.layout = ", ".join(dict.fromkeys(match["layout"] for match in matches))
    row.engine = ", ".join(dict.fromkeys(match["engine"] for match in matches))
    row.fork_s = max((float(match["seconds"]) for match in matches), default=0.0)
    warnings = [text for report in (*reports.seeds, *reports.forks) for level, text in report.lines if level != "INFO"]
    said = "; ".join(report.error for report in (*reports.seeds, *reports.forks) if report.error)
    if refused is not None:
        row.outcome, row.reason, row.note = REFUSED, refused, case.why
        if matches:
            row.failures.append("listed as refused, and it forks")
        elif not any(refused in text for text in warnings):
            row.failures.append(f"listed as refused because of {refused!r}, but the log says: {'; '.join(warnings)}")
    else:
        row.outcome = FORKED
        if len(matches) != case.models * case.ranks:
            row.failures.append(
                f"{len(matches)} of {case.models * case.ranks} models were forked: {'; '.join(warnings)}"
            )
    if said:
        raise RoleFailed(f"a load failed: {said}; {'; '.join(row.failures)}")
    different = _differences(case, "the fork", reports.default, reports.forks, layout=row.layout)
    if row.outcome == FORKED and row.layout == "checkpoint":
        # What no checkpoint gives a value is the seed's all the same.
        for seed, fork in zip(reports.seeds, reports.forks, strict=True):
            if [load.before for load in seed.loads] != [load.before for load in fork.loads]:
                different.append("the fork did not load what the seed did")
    row.digests_equal = not different
    row.failures += different
    if row.asks != LOAD:
        row.answers_equal = [report.answers for report in reports.forks] == [
            report.answers for report in reports.default
        ]
        if not row.answers_equal:
            row.failures.append("the fork answers otherwise than the default load does")


def _differences(
    case: Case, who: str, default: list[Report], others: list[Report], *, layout: str, used: bool = True
) -> list[str]:
    """List the differences from the default loader's models, rank by rank and model by model."""
    found = []
    for rank, (ours, theirs) in enumerate(zip(default, others, strict=True)):
        if len(ours.loads) != len(theirs.loads):
            found.append(f"rank {rank}: {who} loaded {len(theirs.loads)} models, the default loader {len(ours.loads)}")
            continue
        for expected, load in zip(ours.loads, theirs.loads, strict=True):
            ignored = frozenset(name for model, name in case.not_in_checkpoint if model == expected.architecture)
            texts = differences(expected, load, layout=layout, used=used, ignored=ignored)
            found += [f"rank {rank}: {who}: {text}" for text in texts]
    return found


def differences(
    expected: Load, load: Load, *, layout: str, used: bool = True, ignored: frozenset[str] = frozenset()
) -> list[str]:
    """Describe every difference between ``load`` and ``expected``.

    Args:
        layout: with ``runtime`` the bytes come after post-processing, and what stood there before says nothing.
        used: whether ``load`` got caches for prompts, as ``expected`` did; they make and set values.
        ignored: tensors that are not compared as loaded.
    """
    found = []
    kinds = [("tensors after post-processing", expected.after, load.after)]
    if used:
        kinds.append(("values", expected.state, load.state))
    if "runtime" not in layout:
        kinds.append(("tensors as loaded", expected.before, load.before))
    for kind, one, other in kinds:
        names = [
            name
            for name in sorted({*one, *other})
            if not (NOT_COMPARED.search(name) or (one is expected.before and name in ignored))
            and repr(one.get(name, "absent")) != repr(other.get(name, "absent"))
        ]
        if names:
            shown = ", ".join(
                f"{name} ({one.get(name, 'absent')} | {other.get(name, 'absent')})"[:120] for name in names[:NAMED]
            )
            found.append(f"{len(names)} {kind} differ: {shown}")
    return found
