"""The tables of what shapes weights against the installed vLLM: every field and variable has been looked at."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ignored import IGNORED_FIELDS, IGNORED_PACKAGES
from tests.vllm.engine_process import vllm_config
from vllm_rfork.seed_key import build_fingerprint
from vllm_rfork.vllm_compat.fingerprint import config_fields, packages
from vllm_rfork.vllm_compat.fingerprint.environment import place_of
from vllm_rfork.vllm_compat.fingerprint.facts import fingerprint_facts

#: What vLLM-Ascend 0.18 and 0.23 read, by their published sources.
OF_ASCEND = (
    "VLLM_ASCEND_BALANCE_SCHEDULING",
    "VLLM_ASCEND_ENABLE_BATCH_MEMCPY",
    "VLLM_ASCEND_ENABLE_CONTEXT_PARALLEL",
    "VLLM_ASCEND_ENABLE_FLASHCOMM",
    "VLLM_ASCEND_ENABLE_FLASHCOMM1",
    "VLLM_ASCEND_ENABLE_FUSED_MC2",
    "VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE",
    "VLLM_ASCEND_ENABLE_MLAPO",
    "VLLM_ASCEND_ENABLE_NZ",
    "VLLM_ASCEND_FLASHCOMM2_PARALLEL_SIZE",
    "VLLM_ASCEND_FUSION_OP_TRANSPOSE_KV_CACHE_BY_BLOCK",
    "DYNAMIC_EPLB",
    "MSMONITOR_USE_DAEMON",
)


def configurations() -> dict[str, Any]:
    import vllm.config as vllm
    from vllm.config.parallel import EPLBConfig

    return {
        "vllm": vllm.VllmConfig,
        "model": vllm.ModelConfig,
        "multimodal": vllm.MultiModalConfig,
        "parallel": vllm.ParallelConfig,
        "eplb": EPLBConfig,
        "cache": vllm.CacheConfig,
        "load": vllm.LoadConfig,
        "device": vllm.DeviceConfig,
        "kv_transfer": vllm.KVTransferConfig,
        "scheduler": vllm.SchedulerConfig,
        "speculative": vllm.SpeculativeConfig,
    }


#: Where vLLM's models are built, processed and given kernels.
WHERE_WEIGHTS_ARE_SHAPED = (
    "model_executor",
    "models",
    "kernels",
    "ir",
    "platforms",
    "utils",
    "v1/attention",
    "_aiter_ops.py",
)
IMPORTS = re.compile(r"(?:import[ \t]+|from[ \t]+(?=[\w.]+[ \t]+import\b))(\w+)")
#: How vLLM asks whether a package is there.
ASKS = ("_has_module", "_has_module_spec", "find_spec", "import_module", "PlaceholderModule")
ASKED = re.compile(rf"(?:{'|'.join(ASKS)})\(\s*[\"'](\w+)")
#: No modules: lines of comments that begin like imports.
WORDS_OF_COMMENTS = {"path", "stability"}


def modules_asked_for() -> Iterator[str]:
    import vllm

    root = Path(vllm.__file__).parent
    for place in WHERE_WEIGHTS_ARE_SHAPED:
        files = [root / place] if place.endswith(".py") else (root / place).rglob("*.py")
        for file in files:
            source = file.read_text()
            # Files are many: expressions see only what can fit.
            lines = (line.lstrip() for line in source.splitlines() if "import " in line)
            yield from (found[1] for line in lines if (found := IMPORTS.match(line)) is not None)
            if any(word in source for word in ASKS):
                yield from ASKED.findall(source)


def test_every_package_that_vllm_looks_for_where_it_shapes_weights_is_in_one_of_the_lists() -> None:
    """vLLM takes other kernels where one is there; a new one fails here until somebody has read what it does."""
    theirs = set(modules_asked_for()) - set(sys.stdlib_module_names) - WORDS_OF_COMMENTS - {"vllm"}
    assert theirs > {"flashinfer", "deep_gemm", "triton_kernels", "cutlass", "humming", "tilelang"}
    left_out = {name for names in IGNORED_PACKAGES.values() for name in names}
    assert theirs - left_out - {*packages.BOTH_LAYOUTS, *packages.RUNTIME_ONLY} == set()


def test_no_package_is_in_two_lists() -> None:
    left_out = [name for names in IGNORED_PACKAGES.values() for name in names]
    everything = [*packages.BOTH_LAYOUTS, *packages.RUNTIME_ONLY, *left_out]
    assert len(everything) == len(set(everything))


@pytest.mark.parametrize("section", [*config_fields.SECTIONS, "vllm"])
def test_every_field_of_vllm_s_configuration_is_in_one_of_the_tables(section: str) -> None:
    """A new field fails here until somebody has said whether it shapes weights; other releases: tests/versions."""
    counted = {*config_fields.BOTH_LAYOUTS.get(section, ()), *config_fields.RUNTIME_ONLY.get(section, ())}
    left_out = {name for names in IGNORED_FIELDS[section].values() for name in names}
    theirs = {field.name for field in dataclasses.fields(configurations()[section])}
    assert theirs - counted - left_out == set()


def test_every_variable_of_vllm_is_in_one_of_the_lists() -> None:
    from vllm import envs

    theirs = {name for name in envs.environment_variables if name.startswith("VLLM_")}
    assert len(theirs) > 100
    assert {name for name in (*theirs, *OF_ASCEND) if place_of(name) == "unknown"} == set()


def test_every_variable_that_vllm_reads_or_sets_elsewhere_is_in_one_of_the_lists() -> None:
    """Some are not in its own list; one that is set to something else in every instance would let no fork happen."""
    import vllm

    asked = re.compile(r"""(?:environ\[|environ\.\w+\(|getenv\()\s*["'](VLLM_[A-Z0-9_]+)""")
    sources = Path(vllm.__file__).parent.rglob("*.py")
    names = {name for file in sources for name in asked.findall(file.read_text())}
    assert "VLLM_DIST_IDENT" in names
    assert {name for name in names if place_of(name) == "unknown"} == set()


def test_the_sections_are_where_vllm_has_them_and_their_facts_are_canonical(model_a: Path) -> None:
    """Equal configurations made anew give equal facts, and an option that a user sets arrives in them."""

    def facts(layout: str, **changes: Any) -> dict[str, Any]:
        config = vllm_config(model_a, **changes)
        return fingerprint_facts(
            config, config.model_config, layout=layout, engine="memory", device=torch.device("cpu"), dummy=False
        )

    first, second = facts("runtime"), facts("runtime")
    assert first == second
    assert "0x" not in json.dumps(first)
    options = first["options"]
    assert set(options) >= {"model", "parallel", "eplb", "cache", "offload", "attention", "kernel", "mamba"}
    assert options["model"]["dtype"] == "torch.bfloat16"
    assert options["parallel"]["tensor_parallel_size"] == 1
    assert first["kind"] == ["generate", "none"]

    larger = facts("runtime", max_num_batched_tokens=128)
    assert larger != first
    assert facts("runtime", max_num_batched_tokens=128, max_num_seqs=3) == larger
    assert facts("checkpoint", max_num_batched_tokens=128) == facts("checkpoint")
    assert facts("runtime", moe_backend="triton") != first
    assert facts("checkpoint", moe_backend="triton") == facts("checkpoint")
    assert build_fingerprint(facts("checkpoint")) != build_fingerprint(first)


def test_what_is_left_out_of_a_whole_section_is_a_field_of_it() -> None:
    import vllm.config as vllm

    left_out = {name for names in config_fields.WHOLE_SECTION_IGNORED["kernel"].values() for name in names}
    theirs = {field.name for field in dataclasses.fields(vllm.KernelConfig)}
    assert left_out < theirs
    # What chooses kernels stays.
    assert {"moe_backend", "linear_backend"} <= theirs - left_out


def test_workers_whose_weights_are_the_same_have_one_fingerprint(model_a: Path) -> None:
    """With graphs and without, with adapters and without where there are no experts."""

    def facts(**changes: Any) -> tuple[Any, dict[str, Any]]:
        config = vllm_config(model_a, **changes)
        return config, fingerprint_facts(
            config, config.model_config, layout="runtime", engine="memory", device=torch.device("cpu"), dummy=False
        )

    eager, facts_of_eager = facts(enforce_eager=True)
    graphs, facts_of_graphs = facts(enforce_eager=False)
    # Not because vLLM made the two alike:
    assert eager.compilation_config.custom_ops != graphs.compilation_config.custom_ops
    assert eager.kernel_config.enable_jit_warmup != graphs.kernel_config.enable_jit_warmup
    assert facts_of_eager == facts_of_graphs
    for changes in (
        {"enable_lora": True},
        {"performance_mode": "interactivity"},
        {"optimization_level": 0},
        {"compilation_config": {"custom_ops": ["all"]}},
    ):
        assert facts(**changes)[1] == facts_of_eager, changes
