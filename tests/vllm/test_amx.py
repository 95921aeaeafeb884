"""AMX tiles on CPU: every process that runs vLLM has requested them before its first prompt, whichever loader it uses.

Each test asserts the right value on either kind of processor.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import PROCESSOR
from tests.vllm.conftest import LineProcess, LogRecords
from tests.vllm.engine_process import vllm_config
from vllm_rfork import plugin
from vllm_rfork.vllm_compat.amx import request_amx_tiles
from zoo.processes import in_a_process

pytestmark = pytest.mark.vllm

#: x86-64 Linux: the system call, its request for the permitted features, and the bit of AMX tile data.
ARCH_PRCTL, ARCH_GET_XCOMP_PERM, TILE_DATA = 158, 0x1022, 1 << 18


def permitted() -> bool:
    """Whether this process may use AMX tiles; also false on a processor without them."""
    features = ctypes.c_uint64(0)
    failed = ctypes.CDLL(None, use_errno=True).syscall(ARCH_PRCTL, ARCH_GET_XCOMP_PERM, ctypes.byref(features))
    return not failed and bool(features.value & TILE_DATA)


def emulating(processor: str) -> dict[str, str]:
    """The environment of a process that takes this processor for a lesser one."""
    path = os.pathsep.join(filter(None, [str(PROCESSOR), os.environ.get("PYTHONPATH")]))
    return {"TEST_CPU": processor, "PYTHONPATH": path}


def write_permitted(file: str) -> None:
    Path(file).write_text(json.dumps(permitted()))


BY_PLUGINS = """
from tests.vllm.test_amx import permitted
from vllm.plugins import load_general_plugins
before = permitted()
load_general_plugins()
print("FOUND", int(before), int(permitted()))
"""


def test_vllm_s_plugins_request_them_in_a_new_process() -> None:
    """As in every engine core and worker, and for the default loader as well."""
    done = subprocess.run([sys.executable, "-c", BY_PLUGINS], capture_output=True, text=True, timeout=240, check=False)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND")] or [done.stderr]
    assert line == f"FOUND 0 {int(torch.cpu._is_amx_tile_supported())}"


def test_roles_of_the_zoo_have_them_from_the_fork_server(vllm_imported: None, tmp_path: Path) -> None:
    in_a_process(write_permitted, str(tmp_path / "found"), log=tmp_path / "log")
    assert json.loads((tmp_path / "found").read_text()) is torch.cpu._is_amx_tile_supported()


def test_this_process_has_them_once_it_has_made_a_configuration(model_a: Path) -> None:
    vllm_config(model_a)
    assert permitted() is torch.cpu._is_amx_tile_supported()


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processor", ["this one", "avx512"])
def test_a_spawned_engine_core_answers_a_short_prompt_first_with_the_default_loader(
    processor: str, model_a: Path
) -> None:
    arguments = json.dumps({"model": str(model_a), "load_format": "auto", "extra": {}})
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn"}
    if processor != "this one":
        env |= emulating(processor)
    engine = LineProcess("tests.vllm.llm_main", arguments, env=env)
    try:
        answers = engine.order("answer")["answers"]
        assert "EngineCore" in engine.log, "the worker is another process"
        assert all(len(tokens) == 12 for tokens, _ in answers)
    finally:
        engine.end()


LOOKS = """
import json, torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
current_platform.import_kernels()
found = {"attention": _get_attn_isa(torch.bfloat16, 128, 32), "packs into tensors": False}
from vllm.model_executor.layers.utils import check_cpu_sgl_kernel
found["packs into tensors"] = check_cpu_sgl_kernel(128, 128, torch.bfloat16)
found["torch"] = torch.backends.cpu.get_cpu_capability()
print("FOUND", json.dumps(found))
"""


@pytest.mark.long
@pytest.mark.parametrize(("processor", "torch_level"), [("avx512", ("AVX512", "AVX2", "DEFAULT")), ("avx2", ("AVX2",))])
def test_vllm_takes_its_other_paths_on_an_emulated_processor(processor: str, torch_level: tuple[str, ...]) -> None:
    """What ``make test TEST_CPU=...`` relies on; the first level that this processor has is torch's."""
    env = {**os.environ, **emulating(processor)}
    done = subprocess.run(
        [sys.executable, "-c", LOOKS], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND")] or [done.stderr]
    found = json.loads(line.removeprefix("FOUND "))
    assert (found["attention"], found["packs into tensors"]) == ("vec", False)
    assert found["torch"] in torch_level


# --- what is requested, and when: emulated on any processor ---------------------------------------------------------


class Processor:
    """Stands for torch's two functions; counts requests."""

    def __init__(self) -> None:
        self.supported = self.granted = True
        self.requests = 0

    def request(self) -> bool:
        self.requests += 1
        return self.granted


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Processor]:
    emulated = Processor()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: emulated.supported)
    monkeypatch.setattr(torch.cpu, "_init_amx", emulated.request)
    return emulated


def test_the_plugin_requests_them_on_a_processor_that_has_them(processor: Processor, rfork_log: LogRecords) -> None:
    plugin.register()
    assert processor.requests == 1
    assert rfork_log.warnings == []


def test_a_processor_without_them_is_left_alone(processor: Processor, rfork_log: LogRecords) -> None:
    processor.supported = False
    plugin.register()
    assert processor.requests == 0
    assert rfork_log.warnings == []


def test_an_accelerator_s_process_is_left_alone(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    request_amx_tiles()
    assert processor.requests == 0


@pytest.mark.parametrize("name", ["_is_amx_tile_supported", "_init_amx"])
def test_a_torch_that_lacks_the_request_is_left_alone(
    processor: Processor, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delattr(torch.cpu, name)
    request_amx_tiles()
    assert processor.requests == 0


def test_a_refusal_by_the_kernel_is_logged_with_what_it_means(processor: Processor, rfork_log: LogRecords) -> None:
    processor.granted = False
    request_amx_tiles()
    (warning,) = rfork_log.warnings
    assert "SIGILL" in warning
    assert "arch_prctl" in warning
