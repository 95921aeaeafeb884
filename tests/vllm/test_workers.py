"""Every worker method that changes weights withdraws the seed first, on whatever worker class there is."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_rfork.vllm_compat.worker_calls import HANDS_OUT, LEAVES_WEIGHTS
from vllm_rfork.vllm_compat.worker_hooks import CAPTURES_GRAPHS, CHANGES_WEIGHTS, withdraw_before_changes

pytestmark = pytest.mark.vllm

BACK = "back"


class Log:
    """Stands for the seeds of a process; methods enter themselves beside it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.quiet = True

    def device_is_idle(self) -> bool:
        return self.quiet

    def withdraw(self, reason: str, *, last: bool) -> None:
        self.lines.append(f"withdrawn{' for good' if last else ''}: {reason}")

    def resume(self) -> None:
        self.lines.append(BACK)

    @property
    def calls(self) -> list[str]:
        """What happened, without the withdrawals."""
        return [line for line in self.lines if not line.startswith("withdrawn")]


@pytest.fixture
def log() -> Log:
    return Log()


def method(log: Log, name: str) -> Any:
    def called(self: Any, *args: Any, fails: bool = False, **kwargs: Any) -> str:
        log.lines.append(name)
        if fails:
            raise RuntimeError(f"{name} fails")
        return f"{name} returned {args} {kwargs}"

    return called


def worker(log: Log, *names: str, extension: type | None = None) -> Any:
    """A platform's worker with these methods, wrapped."""
    from vllm.v1.worker.worker_base import WorkerBase

    methods = {name: method(log, name) for name in (names or (*CHANGES_WEIGHTS, "execute_model"))}
    cls = type("PlatformWorker", (WorkerBase,), methods)
    if extension is not None:
        cls.__bases__ = (*cls.__bases__, extension)  # as vLLM mixes it in
    withdraw_before_changes(log)
    withdraw_before_changes(Log())  # the first one stays
    return object.__new__(cls)


@pytest.mark.parametrize("name", sorted(CHANGES_WEIGHTS))
def test_the_seed_is_withdrawn_before_the_method_runs(name: str, log: Log) -> None:
    assert getattr(worker(log), name)(1, a=2) == f"{name} returned (1,) {{'a': 2}}"
    change = CHANGES_WEIGHTS[name]
    ended = not change.last and not change.begins
    last = " for good" if change.last else ""
    assert log.lines == [f"withdrawn{last}: {change.reason}", name, *[BACK][: int(ended)]]


def test_serving_is_left_alone(log: Log) -> None:
    worker(log).execute_model()
    assert log.lines == ["execute_model"]


@pytest.mark.parametrize("name", CAPTURES_GRAPHS)
def test_graphs_are_captured_while_no_seed_asks_anything_of_the_device(name: str, log: Log) -> None:
    one = worker(log, name)
    assert getattr(one, name)() == f"{name} returned () {{}}"
    assert log.lines == [name], "a seed that is ready does nothing to the device, and stays"

    log.lines.clear()
    log.quiet = False
    assert getattr(one, name)() == f"{name} returned () {{}}"
    assert log.lines == ["withdrawn: graphs are captured", name, BACK]

    log.lines.clear()
    one.model_config = SimpleNamespace(enforce_eager=True)
    assert getattr(one, name)() == f"{name} returned () {{}}"
    assert log.lines == [name], "there are no graphs"


#: Calls in order; ``!`` marks one that fails, ``<-`` the moments at which the worker may be a seed again.
SEQUENCES = {
    "asleep until it wakes up": "sleep reload_weights update_config wake_up <-",
    "the KV cache alone wakes up": "sleep wake_up:kv_cache reload_weights wake_up:weights <- wake_up:kv_cache",
    "memory other than weights is discarded": "discard:kv_cache reload_weights <-",
    "weights are discarded": "discard:weights reload_weights wake_up <-",
    "a wake-up that fails": "sleep wake_up! wake_up <-",
    "an update in three steps": "start_weight_update update_weights update_weights finish_weight_update <-",
    "a draft's update": "start_draft_weight_update update_weights finish_weight_update <-",
    "an update that is not begun": "start_weight_update! <-",
    "an update that breaks off": "start_weight_update update_weights! <- reload_weights <-",
    "an update that is not finished": "start_weight_update finish_weight_update! update_config finish_weight_update <-",
    "an update while asleep": "sleep start_weight_update update_weights finish_weight_update wake_up <-",
    "zeroes until weights are loaded": "reset_weights update_config reload_weights <-",
    "zeroes until weights are sent": "reset_weights start_weight_update finish_weight_update <-",
    "a reload that fails": "reload_weights! <-",
    "a function that reads or writes": "apply_model <- apply_model! <-",
    "asleep, and then another model": "sleep load_model reload_weights <-",
    "never again": "shutdown load_model elastic_ep_execute reinitialize_distributed checkpoint_prepare",
}


@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_it_may_be_a_seed_again_when_no_change_is_open(sequence: str, log: Log) -> None:
    one = worker(log)
    expected: list[str] = []
    for step in sequence.split():
        if step == "<-":
            expected.append(BACK)
            continue
        name, _, tag = step.rstrip("!").partition(":")
        expected.append(name)
        with contextlib.suppress(RuntimeError):
            getattr(one, name)(*[[tag]] * bool(tag), fails=step.endswith("!"))
    assert log.calls == expected


def test_before_there_was_a_last_method_one_call_was_a_whole_update(log: Log) -> None:
    """vLLM before ``finish_weight_update``."""
    worker(log, "reset_weights", "update_weights").update_weights()
    assert log.calls == ["update_weights", BACK]


def test_a_method_inside_another_does_not_end_its_change(log: Log) -> None:
    """Platform workers call their base class's method of the same name, and methods call each other."""
    from vllm.v1.worker.worker_base import WorkerBase

    class Base(WorkerBase):  # type: ignore[misc]
        def reload_weights(self) -> None:
            log.lines.append("base")

    class Platform(Base):
        def reload_weights(self) -> None:
            super().reload_weights()
            self.update_config()
            log.lines.append("platform")

        def update_config(self) -> None:
            log.lines.append("config")

    withdraw_before_changes(log)
    object.__new__(Platform).reload_weights()
    assert log.calls == ["base", "config", "platform", BACK]


def test_what_a_worker_extension_adds_is_taken_for_a_change(log: Log) -> None:
    """``worker_extension_cls`` is how training frameworks write weights into workers."""

    class Extension:
        def write_weights(self) -> str:
            log.lines.append("write_weights")
            return "written"

        def _helper(self) -> str:
            return "helped"

    one = worker(log, "sleep", "wake_up", extension=Extension)
    assert one.write_weights() == "written"
    assert log.lines == ["withdrawn: the worker extension's write_weights is called", "write_weights", BACK]
    assert one._helper() == "helped"
    assert len(log.lines) == 3


def test_the_methods_exist_on_vllms_own_workers() -> None:
    """A method that vLLM renames would silently stop to withdraw."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    found = {name for name in CHANGES_WEIGHTS if hasattr(CPUWorker, name)}
    assert set(CHANGES_WEIGHTS) - found == {"reinitialize_distributed"}  # before 0.20
    wrapped = withdraw_before_changes(Log())
    expected = {"CPUWorker.sleep", "Worker.reload_weights", "Worker.shutdown", "WorkerBase.apply_model"}
    assert expected <= set(wrapped)


def test_every_public_method_of_vllm_s_workers_is_in_one_of_the_tables() -> None:
    """A new one fails here until somebody has read whether it changes weights."""
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.worker_base import WorkerBase
    from vllm.v1.worker.xpu_worker import XPUWorker

    found = {**vars(WorkerBase), **vars(Worker), **vars(CPUWorker), **vars(XPUWorker)}
    theirs = {name for name, each in found.items() if name[0] != "_" and callable(each)}
    named = [*CHANGES_WEIGHTS, *CAPTURES_GRAPHS, *HANDS_OUT, *(n for each in LEAVES_WEIGHTS.values() for n in each)]
    assert len(theirs) > 40
    assert theirs - set(named) == set()
    assert len(named) == len(set(named)), "one is in two tables"


# --- calls by name and by function --------------------------------------------------------------------------------


@pytest.fixture
def rpc(log: Log, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls like ``collective_rpc``'s on one worker, guarded for ``log`` alone; undone after the test."""
    from vllm.v1 import serial_utils
    from vllm.v1.executor import multiproc_executor, uniproc_executor
    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

    for owner, name in (
        (WorkerWrapperBase, "__getattr__"),
        (serial_utils, "run_method"),
        (uniproc_executor, "run_method"),
    ):
        found = getattr(owner, name)
        monkeypatch.setattr(owner, name, getattr(found, "__wrapped__", found))
    monkeypatch.setattr(multiproc_executor, "cloudpickle", __import__("cloudpickle"))

    class PlatformWorker(WorkerBase):  # type: ignore[misc]
        model = "the model"

        def __init__(self) -> None:
            pass

    for name in ("sample_tokens", "get_model", "sleep", "a_method_of_the_next_version"):
        setattr(PlatformWorker, name, method(log, name))
    PlatformWorker.__module__ = "vllm.v1.worker.platform_worker"

    class OwnWorker(PlatformWorker):
        """As a user names it in ``worker_cls``."""

    for name in ("write", "_write"):
        setattr(OwnWorker, name, method(log, name))
    withdraw_before_changes(log)

    class Calls:
        def __init__(self) -> None:
            self.wrapper = WorkerWrapperBase.__new__(WorkerWrapperBase)
            self.wrapper.worker = OwnWorker()

        def in_this_process(self, method: Any, *args: Any) -> Any:
            executor = SimpleNamespace(driver_worker=self.wrapper)
            call = uniproc_executor.UniProcExecutor.collective_rpc
            return call(executor, method, args=args, single_value=True)

        def in_a_worker_process(self, method: Any, *args: Any) -> Any:
            import cloudpickle

            answers: list[Any] = []
            process = SimpleNamespace(worker=self.wrapper, rank=0, handle_output=answers.append)
            sent = method if isinstance(method, str) else cloudpickle.dumps(method)
            multiproc_executor.WorkerProc._execute_worker_rpc(process, (sent, args, {}, None))
            return answers[0]

        def over_ray(self, method: Any, *args: Any) -> Any:
            import cloudpickle

            sent = method if isinstance(method, str) else cloudpickle.dumps(method)
            return serial_utils.run_method(self.wrapper, sent, args, {})

    return Calls()


ROUTES = ("in_this_process", "in_a_worker_process", "over_ray")


@pytest.mark.parametrize("route", ROUTES)
def test_a_function_on_a_worker_is_taken_for_a_change(route: str, rpc: Any, log: Log) -> None:
    """``llm.collective_rpc(lambda worker: ...)`` is the shortest way to write to a model."""
    assert getattr(rpc, route)(lambda worker, added: f"{worker.model} {added}", 1) == "the model 1"
    assert log.lines == ["withdrawn: a function is called on the worker", BACK]


@pytest.mark.parametrize("route", ROUTES)
def test_inside_a_function_the_worker_s_methods_are_part_of_its_change(route: str, rpc: Any, log: Log) -> None:
    getattr(rpc, route)(lambda worker: worker.get_model())
    assert log.lines == ["withdrawn: a function is called on the worker", "get_model", BACK]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("sample_tokens", ["sample_tokens"]),
        ("a_method_of_the_next_version", ["a_method_of_the_next_version"]),
        ("sleep", ["withdrawn: the worker goes to sleep", "sleep"]),
        ("write", ["withdrawn: the worker's write is called", "write", BACK]),
        ("_write", ["withdrawn: the worker's _write is called", "_write", BACK]),
        ("get_model", ["withdrawn for good: the model is handed out (get_model)", "get_model"]),
    ],
)
def test_a_name_is_taken_for_a_change_unless_somebody_has_read_it(
    route: str, name: str, lines: list[str], rpc: Any, log: Log
) -> None:
    assert getattr(rpc, route)(name) == f"{name} returned () {{}}"
    assert log.lines == lines


@pytest.mark.parametrize("route", ROUTES)
def test_a_function_that_fails_ends_its_change(route: str, rpc: Any, log: Log) -> None:
    def fails(worker: Any) -> None:
        raise RuntimeError("it fails")

    with contextlib.suppress(RuntimeError):
        getattr(rpc, route)(fails)
    assert log.lines == ["withdrawn: a function is called on the worker", BACK]
