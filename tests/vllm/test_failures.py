"""Whatever fails, the model is the default loader's, one WARNING names the cause, and nothing is left behind."""

from __future__ import annotations

import functools
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.open_engines import open_engines
from tests.vllm import fakes, models
from tests.vllm.conftest import LogRecords, Planner, SeedProcess, eventually, extra_for
from tests.vllm.engine_process import free_port, load, load_digested, vllm_config
from tests.vllm.falling_back import falls_back, nothing_left_behind
from vllm_rfork.engines.memory import MemoryEngine
from vllm_rfork.errors import ConfigError
from vllm_rfork.load import capture

pytestmark = pytest.mark.vllm


# --- planners ---------------------------------------------------------------------------------------------------


def test_no_planner(model_a: Path, default_a: Any, rfork_log: LogRecords) -> None:
    falls_back(model_a, default_a, f"http://127.0.0.1:{free_port()}", rfork_log, cause="PlannerError")


def test_a_planner_that_hangs_costs_one_request_timeout_in_total(
    model_a: Path, default_a: Any, rfork_log: LogRecords
) -> None:
    asked: list[bytes] = []
    with fakes.silent_server(asked) as url:
        falls_back(model_a, default_a, url, rfork_log, cause="no answer within 1 s", rfork_request_timeout_sec=1.0)
    # One question, whose bound is in the cause; seconds would say more of a busy machine than of the bound.
    assert len([head for head in asked if b"get_seed" in head]) == 1, asked
    assert len(asked) == 1, asked


def test_a_name_server_that_hangs_costs_one_request_timeout_in_total(
    model_a: Path, rfork_log: LogRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking up the planner's name is part of reaching it."""
    over = threading.Event()
    lookup = socket.getaddrinfo

    def hanging(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host != "planner.invalid":
            return lookup(host, *args, **kwargs)
        over.wait(120)
        raise OSError("no answer from the name server")

    monkeypatch.setattr("socket.getaddrinfo", hanging)
    extra = extra_for("http://planner.invalid:1", rfork_request_timeout_sec=0.5, rfork_become_seed=False)
    del extra["rfork_seed_advertise_host"]
    monkeypatch.delenv("VLLM_HOST_IP", raising=False)
    loading_thread = threading.Thread(
        target=load, args=(vllm_config(model_a, load_format="rfork", extra=extra),), daemon=True
    )
    loading_thread.start()
    try:
        eventually(lambda: any("falling back" in line for line in rfork_log.warnings), "the fallback", 90)
    finally:
        over.set()
        loading_thread.join(60)


@pytest.mark.parametrize("status", [400, 401, 403, 429, 500, 502, 503])
def test_a_planner_that_refuses(status: int, model_a: Path, default_a: Any, rfork_log: LogRecords) -> None:
    async def refuse(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=status, text="not today")

    with fakes.http_server(refuse) as url:
        falls_back(model_a, default_a, url, rfork_log, cause=f"HTTP {status}")


@pytest.mark.parametrize(
    ("changed", "cause"),
    [
        ({"SEED_PORT": "0"}, "SEED_PORT"),
        ({"SEED_PORT": "http"}, "SEED_PORT"),
        ({"SEED_IP": "a b"}, "SEED_IP"),
        ({"SEED_RANK": "-1"}, "SEED_RANK"),
        ({"USER_ID": ""}, "USER_ID"),
        ({"LEASE_TTL_SEC": "soon"}, "LEASE_TTL_SEC"),
    ],
)
def test_a_planner_with_garbage_in_its_headers(
    changed: dict[str, str], cause: str, model_a: Path, default_a: Any, rfork_log: LogRecords
) -> None:
    with fakes.http_server(fakes.planner_that_grants("127.0.0.1:9:0", [], **changed)) as url:
        falls_back(model_a, default_a, url, rfork_log, cause=cause)


def test_something_that_does_not_speak_http(model_a: Path, default_a: Any, rfork_log: LogRecords) -> None:
    with fakes.answering(b"\x16\x03\x01" + os.urandom(300)) as url:
        falls_back(model_a, default_a, url, rfork_log, cause="PlannerError")


def test_a_cold_start_is_no_warning(model_a: Path, default_a: Any, rfork_log: LogRecords, planner: Planner) -> None:
    extra = extra_for(planner.url, model_url="nobody-has-it", rfork_become_seed=False)
    with nothing_left_behind():
        loaded = load_digested(vllm_config(model_a, load_format="rfork", extra=extra))
    assert loaded.before == default_a.before
    assert rfork_log.warnings == []
    assert any("no free seed" in line for line in rfork_log.texts())


# --- seeds ------------------------------------------------------------------------------------------------------


def test_a_seed_that_is_gone(model_a: Path, default_a: Any, rfork_log: LogRecords) -> None:
    calls: list[str] = []
    with fakes.http_server(fakes.planner_that_grants(f"127.0.0.1:{free_port()}:0", calls)) as url:
        falls_back(model_a, default_a, url, rfork_log, cause="SeedError")
        eventually(lambda: "/put_seed" in calls, "the lease is released")


def test_a_seed_that_hangs(model_a: Path, default_a: Any, rfork_log: LogRecords) -> None:
    calls: list[str] = []
    with fakes.silent_server() as silent:
        seed = silent.removeprefix("http://") + ":0"
        with fakes.http_server(fakes.planner_that_grants(seed, calls)) as url:
            falls_back(model_a, default_a, url, rfork_log, cause="no answer within 3 s", rfork_request_timeout_sec=3.0)
            eventually(lambda: "/put_seed" in calls, "the lease is released")


@pytest.mark.parametrize("operation", ["register", "connect"])
def test_an_engine_that_hangs(
    operation: str,
    model_a: Path,
    default_a: Any,
    rfork_log: LogRecords,
    seed: SeedProcess,
    planner: Planner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Native calls that are not reads do not return either; its thread and its memory are the engine's from then on."""
    goes_on = threading.Event()
    monkeypatch.setattr(MemoryEngine, operation, lambda self, *args: goes_on.wait(600))
    bounds = {"rfork_fork_timeout_sec": 5.0, "rfork_request_timeout_sec": 5.0}
    extra = extra_for(planner.url, rfork_become_seed=False, **bounds)
    try:
        loaded = load_digested(vllm_config(model_a, load_format="rfork", extra=extra))
        assert not goes_on.is_set()
    finally:
        goes_on.set()
    assert (loaded.before, loaded.after) == (default_a.before, default_a.after)
    (warning,) = [line for line in rfork_log.warnings if "falling back" in line]
    waited = re.search(rf"{operation} failed: no return within ([0-9.]+) s", warning)
    # The bound of a request with its grace, and on a busy machine what the fork's own bound leaves of it.
    assert waited is not None, warning
    assert 1.0 < float(waited[1]) <= 6.0, warning
    eventually(lambda: planner.leases() == 0, "no lease is left at the planner")
    eventually(lambda: not open_engines(), "the engine is closed once it can be")


def test_a_seed_of_another_key(model_a: Path, default_a: Any, rfork_log: LogRecords, seed: SeedProcess) -> None:
    with fakes.http_server(fakes.planner_that_grants(seed.said["seeds"][0], [])) as url:
        falls_back(model_a, default_a, url, rfork_log, cause="SeedError", model_url="another")


def at_manifest(change: Callable[[Any], Any]) -> Callable[[str, Any], Any]:
    return lambda path, data: change(data) if path == "/rfork_manifest" else data


def edited(**fields: Any) -> Callable[[Any], Any]:
    return lambda manifest: {**manifest, **fields}


def first_tensor(**fields: Any) -> Callable[[Any], Any]:
    def change(manifest: Any) -> Any:
        manifest["tensors"][0].update(fields)
        return manifest

    return change


def first_span(**fields: Any) -> Callable[[Any], Any]:
    def change(manifest: Any) -> Any:
        manifest["spans"][0].update(fields)
        return manifest

    return change


def without_first_tensor(manifest: Any) -> Any:
    manifest["tensors"] = manifest["tensors"][1:]
    return manifest


def with_another_tensor(manifest: Any) -> Any:
    manifest["tensors"].append({**manifest["tensors"][0], "name": "extra"})
    return manifest


def swapped_digests(manifest: Any) -> Any:
    spans = manifest["spans"]
    spans[0]["digest"], spans[1]["digest"] = spans[1]["digest"], spans[0]["digest"]
    return manifest


LIES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "not JSON": (lambda manifest: b"\x00garbage", "SeedError"),
    "no object": (lambda manifest: b"[1, 2]", "SeedError"),
    "deeply nested": (lambda manifest: b"[" * 100_000, "SeedError"),
    "empty": (lambda manifest: b"", "SeedError"),
    "huge": (lambda manifest: b" " * (65 * 1024 * 1024), "SeedError"),
    "another key inside": (edited(seed_key="another"), "SeedError"),
    "another fingerprint": (edited(fingerprint="0" * 32), "fingerprint"),
    "a newer version": (edited(version=99), "version 99"),
    "another engine": (edited(engine="yuanrong"), "engine yuanrong"),
    "another layout": (edited(layout="runtime"), "layout"),
    "no regions": (edited(regions=[]), "SeedError"),
    "another digest algorithm": (edited(digest_algorithm="sha1"), "sha1"),
    "another dtype": (first_tensor(dtype="float16"), "dtype float16"),
    "another shape": (first_tensor(shape=[1, 2]), "shape [1, 2]"),
    "another stride": (first_tensor(stride=[1, 256]), "stride"),
    "a private format": (first_tensor(format=29), "format 29"),
    "a tensor less": (without_first_tensor, "only the receiver has it"),
    "a tensor more": (with_another_tensor, "extra: only the seed has it"),
    "a span outside its region": (first_span(nbytes=10**12), "outside its region"),
    "an address of its own choosing": (first_span(address=4096), "outside its region"),
    "swapped digests": (swapped_digests, "VerificationError"),
    "state that has no place": (edited(state={"no.such.place": 1}), "no place"),
    "state that is not plain": (edited(state={"model.vocab_size": [1]}), "cannot be read"),
    "state that is of no type": (edited(state={"model.vocab_size": {"numpy": "O"}}), "not a plain value"),
    "state instead of torch's bookkeeping": (edited(state={"_modules": 5}), "no place"),
    "state instead of a parameter": (edited(state={"model.norm.weight": None}), "no place"),
    "state instead of a layer": (edited(state={"model.norm": None}), "no place"),
    "state instead of all parameters": (edited(state={"model.layers.0._parameters": None}), "no place"),
    "state instead of a method of torch's": (edited(state={"eval": 1}), "no place"),
    "state instead of the model's method": (edited(state={"model.layers.0.forward": "x"}), "no place"),
    "state instead of an object": (edited(state={"model.layers.0.self_attn.qkv_proj.quant_method": None}), "no place"),
    "text instead of a number": (edited(state={"model.layers.0.self_attn.head_dim": "x"}), "is a text"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_seed_whose_manifest_lies(
    lie: str, model_a: Path, default_a: Any, rfork_log: LogRecords, seed: SeedProcess
) -> None:
    change, cause = LIES[lie]
    calls: list[str] = []
    with fakes.http_server(fakes.seed_in_between(seed.said["seeds"][0], at_manifest(change))) as between:
        address = between.removeprefix("http://") + ":0"
        with fakes.http_server(fakes.planner_that_grants(address, calls)) as url:
            falls_back(model_a, default_a, url, rfork_log, cause=cause)
            eventually(lambda: "/put_seed" in calls, "the lease is released")


@pytest.mark.parametrize("always", [False, True], ids=["on the fork", "on every model"])
def test_post_processing_that_fails_on_what_was_forked(
    always: bool,
    model_a: Path,
    default_a: Any,
    rfork_log: LogRecords,
    seed: SeedProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The seed's state may be why, although it passed all checks; a model that fails anyway fails as without a fork."""
    from vllm.model_executor.model_loader import base_loader

    process, calls = base_loader.process_weights_after_loading, []

    def failing(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if always or len(calls) == 1:
            raise ArithmeticError("not with these values")
        process(*args, **kwargs)

    monkeypatch.setattr(base_loader, "process_weights_after_loading", failing)
    with fakes.http_server(fakes.planner_that_grants(seed.said["seeds"][0], [])) as url:
        cause = "ForkError: post-processing failed on what was forked: ArithmeticError: not with these values"
        if always:
            options = extra_for(url, rfork_become_seed=False)
            with pytest.raises(ArithmeticError, match="not with these values"):
                load(vllm_config(model_a, load_format="rfork", extra=options))
        else:
            falls_back(model_a, default_a, url, rfork_log, cause=cause)
    assert len(calls) == 2
    assert sum(cause in line for line in rfork_log.warnings) == 1


@pytest.mark.parametrize("asked", ["before the first byte", "after the last"])
def test_a_seed_that_changed_its_epoch(
    asked: str,
    model_a: Path,
    default_a: Any,
    rfork_log: LogRecords,
    seed: SeedProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Addresses are good for one epoch: where it is over no byte is read, or what was read is thrown away."""
    true_answers = 0 if asked == "before the first byte" else 1
    reads: list[int] = []
    read = MemoryEngine.read

    def noting(self: Any, endpoint: str, segments: Any, timeout_s: float) -> None:
        reads.append(len(segments))
        read(self, endpoint, segments, timeout_s)

    def change(path: str, data: Any) -> Any:
        nonlocal true_answers
        if path != "/rfork_epoch":
            return data
        true_answers -= 1
        return data if true_answers >= 0 else {"epoch": "next", "status": "ok"}

    monkeypatch.setattr(MemoryEngine, "read", noting)
    with fakes.http_server(fakes.seed_in_between(seed.said["seeds"][0], change)) as between:
        address = between.removeprefix("http://") + ":0"
        with fakes.http_server(fakes.planner_that_grants(address, [])) as url:
            falls_back(model_a, default_a, url, rfork_log, cause="epoch")
    assert bool(reads) == (asked == "after the last")


def test_a_lease_that_is_taken_back_while_reading(
    model_a: Path, default_a: Any, rfork_log: LogRecords, seed: SeedProcess
) -> None:
    """The planner's TTL has passed when the read is over: another receiver may have the seed by then."""
    with fakes.http_server(fakes.planner_that_grants(seed.said["seeds"][0], [], LEASE_TTL_SEC="0.000001")) as url:
        falls_back(model_a, default_a, url, rfork_log, cause="lease")


# --- bytes and engines --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("open_fails", "engine memory: open failed"),
        ("register_fails", "engine memory: register failed"),
        ("connect_fails", "engine memory: connect failed"),
        ("fail_read=1", "engine memory: read failed"),
        ("stall_read=1", "engine memory: read failed"),
        ("late_read=1", "engine memory: read failed"),
        ("flip_byte=12345", "VerificationError"),
        ("truncate_read=1", "VerificationError"),
    ],
)
def test_an_engine_that_fails(
    fault: str,
    cause: str,
    model_a: Path,
    default_a: Any,
    rfork_log: LogRecords,
    planner: Planner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    eventually(planner.seeds, "the seed is announced")
    eventually(lambda: planner.leases() == 0, "the seed is free")
    monkeypatch.setenv("RFORK_MEMORY_FAULT", fault)
    contents = capture.contents

    def contents_with_other_bytes(context: Any, model: Any) -> Any:
        """The allocator may hand out memory that still holds an earlier load's bytes, the right ones by accident."""
        for parameter in model.parameters():
            parameter.data.fill_(0.4375)
        return contents(context, model)

    monkeypatch.setattr(capture, "contents", contents_with_other_bytes)
    falls_back(
        model_a, default_a, planner.url, rfork_log, cause=cause, leases=planner.leases, rfork_request_timeout_sec=1.0
    )


@pytest.mark.usefixtures("seed")
def test_an_engine_that_is_not_installed(
    model_a: Path, default_a: Any, rfork_log: LogRecords, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "yr", None)
    falls_back(
        model_a, default_a, planner.url, rfork_log, cause="pip install", leases=planner.leases, rfork_engine="yuanrong"
    )


@pytest.mark.usefixtures("seed")
def test_memory_that_cannot_be_vouched_for(
    model_a: Path, default_a: Any, rfork_log: LogRecords, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A structure with a tensor that no engine can read is refused before a lease is asked for."""
    import torch
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    build = Qwen2ForCausalLM.__init__

    @functools.wraps(build)  # vLLM looks at the signature
    def with_sparse(self: Any, **kwargs: Any) -> None:
        build(self, **kwargs)
        self.odd = torch.ones(2, 2).to_sparse()

    monkeypatch.setattr(Qwen2ForCausalLM, "__init__", with_sparse)
    # The digests of the comparison cannot read a sparse tensor either; it goes before they look.
    from vllm_rfork.load.machine import LoadMachine

    fill = LoadMachine.fill

    def filling(self: LoadMachine, model: Any, model_config: Any) -> None:
        fill(self, model, model_config)
        del model.odd

    monkeypatch.setattr(LoadMachine, "fill", filling)
    falls_back(model_a, default_a, planner.url, rfork_log, cause="odd", leases=planner.leases)


def test_another_dtype_is_never_paired(model_a: Path, rfork_log: LogRecords, seed: SeedProcess) -> None:
    expected = load_digested(vllm_config(model_a, dtype="float32"))
    with fakes.http_server(fakes.planner_that_grants(seed.said["seeds"][0], [])) as url, nothing_left_behind():
        options = extra_for(url, rfork_become_seed=False)
        loaded = load_digested(vllm_config(model_a, load_format="rfork", extra=options, dtype="float32"))
    assert loaded.before == expected.before
    assert any("fingerprint" in line for line in rfork_log.warnings)
    deadline = time.monotonic() + 30
    while not any("dtype: float32 here, " in line for line in rfork_log.warnings) and time.monotonic() < deadline:
        time.sleep(0.05)  # the facts are fetched in the background
    assert any("dtype: float32 here, " in line and " on 1 seed" in line for line in rfork_log.warnings)


def test_a_seed_killed_while_it_is_read(
    vllm_imported: None,
    model_a: Path,
    default_a: Any,
    rfork_log: LogRecords,
    planner: Planner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm_rfork.engines.memory import MemoryEngine

    extra = extra_for(planner.url, model_url="victim", rfork_heartbeat_interval_sec=2.0)
    victim = SeedProcess(model_a, extra)
    try:
        victim.wait()
        eventually(lambda: victim.said["seeds"][0] in planner.seeds(), "the victim is announced")
        read = MemoryEngine.read

        def kill_then_read(self: Any, endpoint: str, segments: Any, timeout_s: float) -> None:
            victim.process.send_signal(signal.SIGKILL)
            victim.process.wait()
            read(self, endpoint, segments, timeout_s)

        monkeypatch.setattr(MemoryEngine, "read", kill_then_read)
        falls_back(
            model_a,
            default_a,
            planner.url,
            rfork_log,
            cause="engine memory: read failed",
            leases=planner.leases,
            model_url="victim",
        )
    finally:
        victim.end()


@pytest.mark.usefixtures("seed")
def test_a_fork_that_takes_too_long_gives_up(
    model_a: Path, default_a: Any, rfork_log: LogRecords, planner: Planner
) -> None:
    falls_back(
        model_a,
        default_a,
        planner.url,
        rfork_log,
        cause="rfork_fork_timeout_sec",
        leases=planner.leases,
        rfork_fork_timeout_sec=1e-6,
    )


# --- becoming a seed ------------------------------------------------------------------------------------------------


def test_a_taken_port_is_passed_over_and_the_model_is_correct(
    model_a: Path, default_a: Any, rfork_log: LogRecords, planner: Planner
) -> None:
    from vllm_rfork.seeding.manager import manager
    from vllm_rfork.seeding.publication import INSTANCES_OF_HOST, PORTS_OF_INSTANCE

    with socket.socket() as taken, nothing_left_behind():
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        extra = extra_for(planner.url, model_url="taken", rfork_seed_port_base=min(port, 65000))
        if port > 65000:
            pytest.fail("the machine's ephemeral ports lie above what rfork_seed_port_base takes")
        loaded = load_digested(vllm_config(model_a, load_format="rfork", extra=extra))
        (seed,) = manager().seeds(30)
        listens_at = seed.address.port if seed.address else None
        manager().withdraw("test is over", last=True)
    assert loaded.before == default_a.before
    # The ports of further instances on this host, unless all of them are in use as well: then any, with a WARNING.
    further = [port + PORTS_OF_INSTANCE * number for number in range(1, INSTANCES_OF_HOST)]
    assert listens_at in further or any(str(port) in line and "in use" in line for line in rfork_log.warnings)


def test_a_heartbeat_that_is_refused_is_one_warning(model_a: Path, default_a: Any, rfork_log: LogRecords) -> None:
    from vllm_rfork.seeding.manager import manager

    async def refuse_beats(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=404 if request.path == "/get_seed" else 503)

    with fakes.http_server(refuse_beats) as url, nothing_left_behind():
        extra = extra_for(url, rfork_heartbeat_interval_sec=0.2)
        loaded = load_digested(vllm_config(model_a, load_format="rfork", extra=extra))
        manager().seeds(30)
        eventually(lambda: any("503" in line for line in rfork_log.warnings), "the refusal is logged")
        time.sleep(1.0)  # several beats: the property is that they add no line
        manager().withdraw("test is over", last=True)
    assert loaded.before == default_a.before
    assert len([line for line in rfork_log.warnings if "announced" in line]) == 1


# --- settings -------------------------------------------------------------------------------------------------------


def test_a_wrong_setting_fails_the_start_before_anything_is_built(model_a: Path) -> None:
    with pytest.raises(ConfigError, match="rfork_seed_timeout_sec"):
        load_digested(vllm_config(model_a, load_format="rfork", extra={"rfork_seed_timeout_sec": -1}))


@pytest.mark.parametrize("missing", ["model_url", "model_deploy_strategy_name", "rfork_scheduler_url"])
def test_without_an_identity_the_default_loader_loads_with_one_warning(
    missing: str, model_a: Path, default_a: Any, rfork_log: LogRecords
) -> None:
    extra = extra_for("http://127.0.0.1:9")
    del extra[missing]
    with nothing_left_behind():
        loaded = load_digested(vllm_config(model_a, load_format="rfork", extra=extra))
    assert loaded.before == default_a.before
    assert loaded.after == default_a.after
    assert len(rfork_log.warnings) == 1
    assert missing in rfork_log.warnings[0]


def test_the_fallback_loaders_own_error_is_raised(model_a_without_weights: Path, planner: Planner) -> None:
    extra = extra_for(planner.url, model_url="nobody-has-it", rfork_become_seed=False)
    with nothing_left_behind(), pytest.raises(RuntimeError, match="Cannot find any model weights"):
        load_digested(vllm_config(model_a_without_weights, load_format="rfork", extra=extra))


def test_other_weights_under_the_same_key_would_be_seen(model_b: Path, default_a: Any) -> None:
    """The comparison that the tests above rest on tells two checkpoints of one shape apart."""
    other = load_digested(vllm_config(model_b))
    assert set(other.before) == set(default_a.before)
    assert other.before != default_a.before
    assert models.WEIGHTS_A != models.WEIGHTS_B
