"""What is relied on in vLLM-Ascend and torch_npu is there in their published releases, as ``record.py`` read them."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

import vllm_rfork.devices.npu
from tests.ascend.fake_torch_npu import FakeTorchNpu, Format
from vllm_rfork.devices.npu import _PLAIN_FORMATS
from vllm_rfork.vllm_compat import ascend
from vllm_rfork.vllm_compat.model_rules import VLLM_RULES

RECORDED = Path(__file__).parent / "recorded"
DOCS = Path(__file__).parents[2] / "docs" / "ascend.md"


def _records(package: str) -> list[Any]:
    found = [json.loads(file.read_text()) for file in sorted(RECORDED.glob(f"{package}-*.json"))]
    return [pytest.param(record, id=record["version"]) for record in found]


VLLM_ASCEND = pytest.mark.parametrize("release", _records("vllm_ascend"))
TORCH_NPU = pytest.mark.parametrize("release", _records("torch_npu"))

#: What classes hold that is no tensor: counters, streams and numbers from the configuration.
NO_TENSORS = {
    "AscendFusedMoE.gate_stream",
    "AscendFusedMoE.moe_counter",
    "AscendMoERunner.gate_stream",
    "AscendMoERunner.moe_counter",
    "AscendRowParallelLinear.unique_prefix_idx",
    "AscendW4A4FlatQuantDynamicLinearMethod.input_size",
    "AttentionMaskBuilder310.max_seqlen",
    "PrepareAndFinalize.quant_stream",
}

#: Where construction enters things, by release: a name that moves away would not be put back any more.
PROCESS_WIDE = {
    "0.18.0": {
        "vllm_ascend.ops.rotary_embedding": 3,
        "vllm_ascend.ops.fused_moe.fused_moe": 1,
        "vllm_ascend.ops.linear": 1,
        "vllm_ascend.ops.layer_shard_linear": 2,
        "vllm_ascend.ops.flashcomm2_oshard_manager": 1,
    },
    "0.23.0": {
        "vllm_ascend.ops.rotary_embedding": 3,
        "vllm_ascend.ops.fused_moe.fused_moe": 1,
        "vllm_ascend.ops.fused_moe.fused_moe_0_23_0": 1,
        "vllm_ascend.ops.linear": 1,
        "vllm_ascend.eplb.adaptor.vllm_adaptor": 1,
        "vllm_ascend.ops.layer_shard_linear": 2,
        "vllm_ascend.ops.flashcomm2_oshard_manager": 1,
    },
}

#: Function → attributes that it sets, in both releases; the models beside this file do the same with the same names.
MAKES = {
    "attention/mla_v1.py: AscendMLAImpl.process_weights_after_loading": {"W_UV", "W_UK_T", "enable_mlapo"},
    "attention/mla_v1.py: AscendMLAImpl._process_weights_for_fused_mlapo": {"wd_qkv", "gamma1", "ctkv_scale"},
    "attention/sfa_v1.py: AscendSFAImpl.process_weights_after_loading": {"W_UV", "W_UK_T", "enable_mlapo"},
    "ops/fused_moe/fused_moe.py: AscendUnquantizedFusedMoEMethod.process_weights_after_loading": {
        "w13_weight",
        "w2_weight",
    },
    "quantization/methods/w8a8_static.py: AscendW8A8LinearMethod.process_weights_after_loading": {
        "weight",
        "weight_scale",
        "aclnn_input_scale",
        "aclnn_input_scale_reciprocal",
        "aclnn_input_offset",
    },
    "quantization/methods/w8a8_dynamic.py: AscendW8A8DynamicFusedMoEMethod.process_weights_after_loading": {
        "w13_weight_list",
        "w2_weight_list",
    },
    "quantization/methods/w4a4_flatquant.py: AscendW4A4FlatQuantDynamicLinearMethod.process_weights_after_loading": {
        "aclnn_clip_ratio",
        "weight_packed",
    },
    "quantization/methods/w8a8_pdmix.py: AscendW8A8PDMixLinearMethod.process_weights_after_loading": {
        "is_kv_consumer",
        "weight_scale_fp32",
    },
}


@VLLM_ASCEND
def test_the_check_of_shared_experts_is_looked_up_on_the_layer(release: dict[str, Any]) -> None:
    """That is how it can be kept back: the wrapper says ``self._validate_…()`` when post-processing calls it."""
    assert release["shared_expert_checks"]
    assert all(place.startswith("ops/fused_moe/") for place in release["shared_expert_checks"])


@VLLM_ASCEND
def test_every_tensor_that_a_class_holds_is_accounted_for(release: dict[str, Any]) -> None:
    """A new one fails here: somebody has to look whether it is a weight."""
    unknown = [
        name
        for name in release["on_classes"]
        if name not in NO_TENSORS and name.rpartition(".")[2] not in ascend.CLASS_LEVEL
    ]
    assert unknown == []


@VLLM_ASCEND
def test_what_construction_enters_process_wide_is_where_it_is_looked_for(release: dict[str, Any]) -> None:
    found = {module: len(names) for module, names in release["process_wide"].items() if names}

    assert found == PROCESS_WIDE[release["version"]]


def test_no_process_wide_place_is_listed_that_no_release_has() -> None:
    everywhere = {
        f"{module}.{name}"
        for record in (value.values[0] for value in _records("vllm_ascend"))
        for module, names in record["process_wide"].items()
        for name in names
    }
    assert everywhere == {f"{module}.{name}" for module, names in ascend.PROCESS_WIDE.items() for name in names}


@VLLM_ASCEND
@pytest.mark.parametrize("function", MAKES)
def test_post_processing_makes_what_the_models_here_make(release: dict[str, Any], function: str) -> None:
    assert set(release["post_processing"][function]["sets"]) >= MAKES[function]


@VLLM_ASCEND
def test_sparse_attention_empties_what_it_has_derived_from(release: dict[str, Any]) -> None:
    function = "attention/sfa_v1.py: AscendSFAImpl.process_weights_after_loading"
    assert "dispose_layer" in release["post_processing"][function]["calls"]


@VLLM_ASCEND
def test_only_one_value_is_taken_out_of_a_weight(release: dict[str, Any]) -> None:
    """Everything else that post-processing leaves in Python follows from shapes and settings."""
    taking = [name for name, found in release["post_processing"].items() if "item" in found["calls"]]

    assert all("flatquant" in name for name in taking)


@VLLM_ASCEND
def test_no_scratch_name_is_one_of_the_weights(release: dict[str, Any]) -> None:
    made = {name for found in release["post_processing"].values() for name in found["sets"]}

    assert made & VLLM_RULES.scratch_buffers.keys() <= {"o_proj_full_pool", "o_proj_full_gather_pool"}


@VLLM_ASCEND
def test_settings_are_called_as_they_are_looked_for(release: dict[str, Any]) -> None:
    assert {"eplb_config", "layer_sharding"} <= set(release["additional_config"])
    assert {"dynamic_eplb", "expert_map_path", "expert_map_record_path"} <= set(release["eplb_config"])
    assert release["expandable_by_default"], "refusing expandable segments would not refuse every NPU any more"


@VLLM_ASCEND
def test_every_function_that_the_documentation_names_is_there(release: dict[str, Any]) -> None:
    named = {
        match
        for line in DOCS.read_text().splitlines()
        if f"not in {release['version'].removesuffix('.0')}" not in line
        for match in re.findall(r"`([\w/]+\.py: [\w.]+)`", line)
    }
    checked = set(release["post_processing"]) | set(release["shared_expert_checks"])

    assert len(named) >= 8
    assert named - checked == set()


# -- torch_npu -------------------------------------------------------------------------------------------------------


def _called() -> set[str]:
    """The dotted names under ``self._npu`` in the NPU side."""
    tree = ast.parse(inspect.getsource(vllm_rfork.devices.npu))
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    asked = {name.removeprefix("self._npu.") for name in names if name.startswith("self._npu.")}
    return asked - {"npu", "_C"}


@TORCH_NPU
def test_torch_npu_has_what_the_npu_side_calls(release: dict[str, Any]) -> None:
    there = {*release["operators"], *(f"npu.{name}" for name in release["npu"])}
    there |= {"_C._weak_ref_tensor"} if release["weak_ref_tensor"] else set()

    assert _called() - there == set()


def test_the_stand_in_has_nothing_else() -> None:
    fake = FakeTorchNpu()
    for name in _called():
        holder: Any = fake
        for part in name.split("."):
            holder = getattr(holder, part)
        assert callable(holder), name


@TORCH_NPU
def test_the_stand_in_takes_what_torch_npu_takes(release: dict[str, Any]) -> None:
    fake = FakeTorchNpu()
    for name, schema in release["operators"].items():
        given = [part.split("=")[0].split()[-1] for part in schema[1:].partition(") ->")[0].split(", ") if part != "*"]
        own = list(inspect.signature(getattr(fake, name)).parameters)
        assert set(given[1:]) <= set(own[1:]), name
    for name, parameters in release["npu"].items():
        own = list(inspect.signature(getattr(fake.npu, name)).parameters)
        assert set(parameters) <= set(own), name


@TORCH_NPU
def test_formats_are_numbered_as_in_torch_npu(release: dict[str, Any]) -> None:
    formats = release["formats"]
    plain = {name for name, number in formats.items() if number in _PLAIN_FORMATS}

    assert {member.name: member.value for member in Format}.items() <= formats.items()
    assert plain == {"UNDEFINED", "NCHW", "NHWC", "ND", "HWCN", "NDHWC", "NCDHW", "NC", "NCL"}
