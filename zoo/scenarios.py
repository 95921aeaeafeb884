"""The lifecycle scenarios of ``python -m zoo.events``, one function each.

Each adds a row to the sheet for every check of its own, also after an error, and raises nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

from zoo import scenario_results
from zoo.planner import eventually, free_port
from zoo.processes import RoleFailed
from zoo.scenario_engines import Actor, Stage, actor, started
from zoo.scenario_results import NotHere, Wrong
from zoo.scenario_worker import BEFORE_EPOCH, BEFORE_READ, EXPANDABLE, Look, Part, SeedFacts, Started, look

#: What ``rfork_engine`` says of memory that it cannot keep.
POOL, VARIABLE, EXPANDED = "(enable_sleep_mode)", "makes memory expandable", "lie in expandable segments"
#: The planner sees within a second that a worker is dead when the machine is idle; in seconds.
FORGOTTEN_S = 10.0
#: The first engine on a machine compiles kernels; as many times the bound of a check.
FIRST = 2.5


def default_load(stage: Stage) -> None:
    """Load the reference of all comparisons; compiles what the platform compiles once."""
    with (
        stage.sheet.check("default load") as seen,
        started(stage, Part(stage.order("default", load_format="auto")), FIRST) as (_, stage.default),
    ):
        saw = stage.default
        if len({repr(answer) for answer in saw.answers}) < len(saw.answers):
            raise Wrong("different prompts get the same answer, so that equal ones mean nothing")
        nbytes, tensors = sum(load.nbytes for load in saw.loads), sum(load.tensors for load in saw.loads)
        seen.append(f"{nbytes} bytes in {tensors} tensors, {saw.seconds:.1f} s")


def sleep_mode(stage: Stage) -> None:
    """A worker whose weights are in a memory pool that is unmapped during sleep."""
    checks = [name for name in scenario_results.CHECKS if name.startswith("sleep mode: ")]
    part = Part(stage.order("sleep mode", llm={"enable_sleep_mode": True}))
    if stage.on_cpu:
        saw = Started()
        with _all_fail(stage, checks), actor(part) as running, stage.starting:
            saw = running.wait(stage.timeout_s)
        for name in checks:
            with stage.sheet.check(name):
                if not saw.error:
                    raise Wrong("vLLM has no sleep mode here, and takes the option")
                raise NotHere(f"vLLM says: {_reason(saw.error)}")
        return
    with _all_fail(stage, checks), started(stage, part) as (running, saw):
        _refused(stage, "sleep mode", saw, POOL)
        with stage.sheet.check(checks[-1]) as seen:
            seen += [f"sleep {running.tell(stage.timeout_s, 'call', 'sleep', 1)}"]
            seen += [f"wake_up {running.tell(stage.timeout_s, 'call', 'wake_up')}"]
            _same_answers(stage, running)


def expandable_by_variable(stage: Stage) -> None:
    """Expandable segments by environment variable, the usual way."""
    name = "expandable segments, by variable"
    if _no_allocator(stage, name):
        return
    variable = {"PYTORCH_CUDA_ALLOC_CONF": EXPANDABLE}
    with (
        _all_fail(stage, _of(name)),
        started(stage, Part(stage.order("expandable", environment=variable))) as (_, saw),
    ):
        _refused(stage, name, saw, VARIABLE)


def expandable_by_call(stage: Stage, key: str) -> None:
    """Expandable segments that only the blocks show. Needs a seed of ``key``: without one, no fork would be tried."""
    name = "expandable segments, by call"
    if _no_allocator(stage, name):
        return
    order = stage.order("expandable by call", key=key)
    with _all_fail(stage, _of(name)), started(stage, Part(order, expandable=True)) as (_, saw):
        if not saw.expandable:
            for check in _of(name):
                with stage.sheet.check(check):
                    raise NotHere(f"torch made none of its {saw.blocks} blocks expandable when it was told to")
            return
        _refused(stage, name, saw, EXPANDED)


def life(stage: Stage) -> None:
    """All changes in the life of one seed, on one port, and two receivers."""
    sheet, timeout_s, url = stage.sheet, stage.timeout_s, stage.planner.url
    order = stage.order("life", on_seeds=True, options={"rfork_seed_port_base": _port()})
    saw = Started()
    with contextlib.ExitStack() as stack:
        with sheet.check("seed") as seen:
            running, saw = stack.enter_context(started(stage, Part(order)))
            first = _seed(saw.seeds, saw.lines)
            _granted(stage, first)
            seen += [f"{first.address} in epoch {first.epoch[:8]}", stage.right(saw, "the seed")]
        if not saw.seeds:
            return
        now = _reload_under_a_receiver(stage, running, first)
        now = _change(
            stage, running, now, "weight update", lambda: running.tell(timeout_s, "update", str(stage.folder), url, now)
        )
        now = _change(stage, running, now, "sleep of a seed", lambda: _sleep(stage, running, now))
        with sheet.check("caches reset") as seen:
            seen.extend(running.tell(timeout_s, "reset_caches"))
            same = _seed(running.tell(timeout_s, "seeds", timeout_s), [])
            if same != now or look(url, same) != Look(same.address, ""):
                raise Wrong(f"it was {now}, and is {same}: {look(url, same)}")
            _same_answers(stage, running)
        _fork_after(stage, now)
        _other_weights(stage, running, now)


def _reload_under_a_receiver(stage: Stage, running: Actor, first: SeedFacts) -> SeedFacts:
    """Reload after a receiver got the manifest and before it confirmed the epoch."""
    sheet, timeout_s, url = stage.sheet, stage.timeout_s, stage.planner.url
    holder = Part(
        stage.order("old epoch", key="life", options={"rfork_become_seed": False}),
        stops_at=BEFORE_EPOCH,
    )
    with actor(holder) as receiver:
        saw, not_stopped = Started(), ""
        try:
            with stage.starting:
                receiver.stopped(timeout_s)
        except (RoleFailed, Wrong) as error:
            not_stopped = str(error)

        def reload() -> list[Look]:
            return [running.tell(timeout_s, "reload", str(stage.folder), url, first)]

        # Not granted at once: the receiver's lease lets the old seed drain, at the oldest planners.
        now = _change(stage, running, first, "reload", reload, at_once=False)
        with sheet.check("old epoch: over HTTP") as seen:
            if now.address != first.address:
                raise Wrong(f"it came back at {now.address}, not at {first.address}")
            old, new = look(url, first), look(url, now)
            if "is in epoch" not in old.refusal or new.refusal:
                raise Wrong(f"of the old epoch: {old.refusal or 'vouched for'}; of the new one: {new.refusal or 'yes'}")
            seen.append(old.refusal)
        with sheet.check("old epoch: a receiver that holds it") as seen:
            if not_stopped:
                raise Wrong(not_stopped)
            receiver.go()
            saw = receiver.wait(timeout_s)
            seen.append(scenario_results.refused(saw.lines, "is in epoch"))
        with sheet.check("old epoch: default loader") as seen:
            seen.append(stage.right(saw, "the receiver"))
    return now


def _change(
    stage: Stage,
    running: Actor,
    before: SeedFacts,
    name: str,
    change: Callable[[], list[Look]],
    *,
    at_once: bool = True,
) -> SeedFacts:
    """Make a change that preserves the weights, and return the seed after it."""
    now = before
    with stage.sheet.check(f"{name}: withdrawal") as seen:
        looks = change()
        seen += [scenario_results.withdrawn(one.granted, one.refusal) for one in looks]
    with stage.sheet.check(f"{name}: return") as seen:
        now = _seed(running.tell(stage.timeout_s, "seeds", stage.timeout_s), running.tell(stage.timeout_s, "lines"))
        seen.append(scenario_results.returned(before.epoch, now.epoch))
        if at_once:
            _granted(stage, now)
        _same_answers(stage, running)
    return now


def _sleep(stage: Stage, running: Actor, now: SeedFacts) -> list[Look]:
    """Without sleep mode vLLM's worker unmaps nothing, but a seed must act in the same way."""
    running.tell(stage.timeout_s, "call", "sleep", 1)
    asleep = look(stage.planner.url, now)
    running.tell(stage.timeout_s, "call", "wake_up")
    return [asleep]


def _fork_after(stage: Stage, now: SeedFacts) -> None:
    with contextlib.ExitStack() as stack:
        saw = Started()
        with stage.sheet.check("fork after all of this") as seen:
            _, saw = stack.enter_context(started(stage, Part(stage.order("fork", key="life"))))
            seen.append(scenario_results.forked(saw.lines, now.address))
            seen.append(stage.right(saw, "the fork"))
            _seed(saw.seeds, saw.lines)
        _memory(stage, saw, "memory at rest", "fork and seed at rest", peak=False)
        _memory(stage, saw, "memory at its peak", "fork and seed at most", peak=True)


def _other_weights(stage: Stage, running: Actor, before: SeedFacts) -> None:
    sheet, timeout_s, url = stage.sheet, stage.timeout_s, stage.planner.url
    with sheet.check("other weights: withdrawal") as seen:
        looks = running.tell(timeout_s, "update", str(stage.other), url, before)
        seen += [scenario_results.withdrawn(one.granted, one.refusal) for one in looks]
    with sheet.check("other weights: away") as seen:
        if found := running.tell(timeout_s, "seeds", timeout_s):
            raise Wrong(f"it is a seed: {found}")
        seen.append(scenario_results.withdrawn(*dataclasses.astuple(look(url, before))))
        seen.append(scenario_results.said(running.tell(timeout_s, "lines"), scenario_results.STAYS_AWAY))
        if running.tell(timeout_s, "answers") == stage.default.answers:
            raise Wrong("the answers are the old ones")
    with sheet.check("right weights again") as seen:
        running.tell(timeout_s, "reload", str(stage.folder), url, before)
        _same_answers(stage, running)
        found = running.tell(timeout_s, "seeds", timeout_s)
        if stage.on_cpu:
            if found:
                raise Wrong(f"it is a seed: {found}")
            raise NotHere("answers as before, and no seed: what a CPU seed kept beside its packed weights is let go")
        seen.append(scenario_results.returned(before.epoch, _seed(found, running.tell(timeout_s, "lines")).epoch))


def broken_seeds(stage: Stage) -> None:
    """A seed whose memory is altered after its digest, repaired, and killed while it serves and is read."""
    with contextlib.ExitStack() as stack:
        names = [name for name in scenario_results.CHECKS if name.startswith(("altered", "seed killed"))]
        names += [*_of("expandable segments, by call"), "memory after a fallback"]
        with _all_fail(stage, names):
            running, saw = stack.enter_context(
                started(stage, Part(stage.order("broken", on_seeds=True, options={"rfork_become_seed": True})))
            )
            seed = _seed(saw.seeds, saw.lines)
            eventually(
                lambda: look(stage.planner.url, seed) == Look(seed.address, ""), "it is granted", stage.timeout_s
            )
            expandable_by_call(stage, "broken")
            _altered(stage, running)
            _killed(stage, running, seed)


def _altered(stage: Stage, running: Actor) -> None:
    sheet, timeout_s, saw = stage.sheet, stage.timeout_s, Started()
    with contextlib.ExitStack() as stack:
        with sheet.check("altered byte: verification") as seen:
            name = running.tell(timeout_s, "alter")
            order = stage.order("altered", key="broken", options={"rfork_become_seed": False})
            _, saw = stack.enter_context(started(stage, Part(order)))
            text = scenario_results.refused(saw.lines, "VerificationError")
            seen.append(text)
            if name not in text:
                raise Wrong(f"{name} was altered, and is not named")
        with sheet.check("altered byte: default loader") as seen:
            seen.append(stage.right(saw, "the receiver"))
        _memory(stage, saw, "memory after a fallback", "after a fallback", peak=False)
        running.tell(timeout_s, "alter")  # as it was


def _killed(stage: Stage, running: Actor, seed: SeedFacts) -> None:
    sheet, timeout_s, saw, began = stage.sheet, stage.timeout_s, Started(), 0.0
    order = stage.order("killed", key="broken", options={"rfork_become_seed": False})
    with actor(Part(order, stops_at=BEFORE_READ)) as receiver:
        with sheet.check("seed killed while it serves and is read") as seen:
            with stage.starting:
                receiver.stopped(timeout_s)
            running.tell(timeout_s, "serve")
            running.kill()
            began = time.monotonic()
            receiver.go()
            with sheet.check("seed killed: the planner") as forgotten:
                eventually(lambda: _forgotten(stage, seed), "it grants the seed no more", FORGOTTEN_S)
                forgotten.append(f"after {time.monotonic() - began:.1f} s")
            saw = receiver.wait(timeout_s)
            if saw.error:
                raise Wrong(saw.error)
            seen.append(scenario_results.refused(saw.lines, ""))
            seen.append(f"answered {time.monotonic() - began:.1f} s after the kill")
        with sheet.check("seed killed: default loader") as seen:
            seen.append(stage.right(saw, "the receiver"))


# --- what scenarios share -------------------------------------------------------------------------------------------


def _of(name: str) -> list[str]:
    return [check for check in scenario_results.CHECKS if check.startswith(f"{name}: ")]


def _refused(stage: Stage, name: str, saw: Started, reason: str) -> None:
    """Make the three checks of a worker whose memory no engine can register."""
    as_seed, as_receiver, right = (check for check in _of(name)[:3])
    with stage.sheet.check(as_seed) as seen:
        if saw.seeds:
            raise Wrong(f"it is a seed: {saw.seeds}")
        seen.append(scenario_results.not_a_seed(saw.lines, reason))
    with stage.sheet.check(as_receiver) as seen:
        seen.append(scenario_results.refused(saw.lines, reason))
    with stage.sheet.check(right) as seen:
        seen.append(stage.right(saw, "it"))
        if saw.blocks:
            seen.append(f"{saw.expandable} of {saw.blocks} blocks are expandable")


def _reason(error: str) -> str:
    """Return vLLM's message in a configuration error, without pydantic's frame."""
    return error.partition("Value error, ")[2].partition(" [type=")[0] or error


def _no_allocator(stage: Stage, name: str) -> bool:
    if stage.on_cpu:
        for check in _of(name):
            with stage.sheet.check(check):
                raise NotHere("host memory has no such segments")
    return stage.on_cpu


@contextlib.contextmanager
def _all_fail(stage: Stage, names: list[str]) -> Iterator[None]:
    """Fail every one of ``names`` that has no row yet if the block raises."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - every failure is a row, and other scenarios go on
        for name in names:
            stage.sheet.put(name, f"{type(error).__name__}: {error}", scenario_results.FAILED)


def _port() -> int:
    """Return a free port that is a valid base of ports, which end at 65000."""
    return next(port for port in iter(free_port, 0) if port <= 65000)


def _forgotten(stage: Stage, seed: SeedFacts) -> bool:
    """Return True if the planner grants it to nobody; the lease of a receiver may keep it listed."""
    known = stage.planner.snapshot()["seeds"]
    ended = ("draining", "absent")
    return all(
        any(map(each.get, ended)) for each in known if f"{each['ip']}:{each['port']}:{each['rank']}" == seed.address
    )


def _seed(seeds: list[SeedFacts], lines: scenario_results.Lines) -> SeedFacts:
    if len(seeds) != 1:
        raise Wrong(f"{len(seeds)} seeds: {scenario_results.warnings(lines)}")
    return seeds[0]


def _granted(stage: Stage, seed: SeedFacts) -> None:
    url = stage.planner.url
    eventually(lambda: look(url, seed) == Look(seed.address, ""), "the planner grants it", stage.timeout_s)


def _same_answers(stage: Stage, running: Actor) -> None:
    if running.tell(stage.timeout_s, "answers") != stage.default.answers:
        raise Wrong("the answers are not the default load's")


def _memory(stage: Stage, saw: Started, name: str, what: str, *, peak: bool) -> None:
    with stage.sheet.check(name) as seen:
        if stage.on_cpu:
            raise NotHere("host memory has no allocator that counts")
        if saw.memory is None or stage.default.memory is None:
            raise Wrong("nothing was measured")
        ours, theirs = stage.default.memory, saw.memory
        bound = scenario_results.MORE_AT_PEAK if peak else scenario_results.MORE_AT_REST
        pair = (ours.peak, theirs.peak) if peak else (ours.allocated, theirs.allocated)
        seen.append(scenario_results.no_more(what, *pair, bound))


#: They know nothing of each other and run at the same time, after :func:`default_load`.
SCENARIOS: tuple[Callable[[Stage], None], ...] = (life, broken_seeds, sleep_mode, expandable_by_variable)
