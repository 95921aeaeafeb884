"""Every fact moves the fingerprint, in the layout in which it counts; what is left out does not."""

from __future__ import annotations

import enum
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.ignored import IGNORED_FIELDS, IGNORED_PACKAGES
from vllm_rfork.seed_key import build_fingerprint
from vllm_rfork.vllm_compat.fingerprint import canonical, config_fields, environment, installed, packages
from vllm_rfork.vllm_compat.fingerprint import facts as fingerprint

CPU = torch.device("cpu")


class Backend(enum.Enum):
    FLASH = 1
    TRITON = 2


class QuantConfig:
    """As vLLM's are: nested objects, containers, caches, and no dataclass."""

    def __init__(self) -> None:
        self.group_size = 128
        self.activation_scheme = "static"
        self.ignored_layers = ["lm_head"]
        self.scheme_map = {"Linear": SimpleNamespace(num_bits=8, strategy="channel", dtype=torch.float8_e4m3fn)}
        self._cache = object()


def hf_config(**changes: Any) -> Any:
    values = {"hidden_size": 64, "rope_parameters": {"rope_theta": 1e4}, "_name_or_path": "/here", **changes}
    return SimpleNamespace(architectures=["Qwen2ForCausalLM"], to_dict=lambda: values)


def configured() -> Any:
    """A VllmConfig of plain attributes, with every field of the tables."""
    config = SimpleNamespace(quant_config=QuantConfig(), additional_config={"weight_nz_mode": 1, "unknown": [1]})
    config.model = SimpleNamespace(hf_config=hf_config(), runner_type="generate", convert_type="none", seed=0)
    for section, path in config_fields.SECTIONS.items():
        target = place(config, path)
        for name in fields_of(section):
            if not hasattr(target, name):
                setattr(target, name, f"{section}.{name}")
    for path in (
        *config_fields.WHOLE_SECTION_BOTH_LAYOUTS.values(),
        *config_fields.WHOLE_SECTION_RUNTIME_ONLY.values(),
    ):
        setattr(config, path, SimpleNamespace(backend=Backend.FLASH, nested=SimpleNamespace(choice=1)))
    return config


def place(config: Any, path: str) -> Any:
    """The object at ``path``, made where it is not there yet."""
    for name in path.split("."):
        if not isinstance(getattr(config, name, None), SimpleNamespace):
            setattr(config, name, SimpleNamespace())
        config = getattr(config, name)
    return config


def fields_of(section: str) -> list[str]:
    left_out = [name for names in IGNORED_FIELDS[section].values() for name in names]
    return [*config_fields.BOTH_LAYOUTS.get(section, ()), *config_fields.RUNTIME_ONLY.get(section, ()), *left_out]


def digest(
    config: Any,
    *,
    layout: str = "runtime",
    dummy: bool = False,
    environ: Any = None,
    device: torch.device = CPU,
) -> str:
    facts = fingerprint.fingerprint_facts(
        config, config.model, layout=layout, engine="memory", device=device, dummy=dummy, environ=environ or {}
    )
    return build_fingerprint(facts)


def layouts_moved(before: Any, after: Any, **more: Any) -> set[str]:
    layouts = ("checkpoint", "runtime")
    return {layout for layout in layouts if digest(before, layout=layout) != digest(after, layout=layout, **more)}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    return torch.device("cuda", 0)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces what is installed: modules with the distributions that bring them."""

    def replace(**found: list[str]) -> None:
        monkeypatch.setattr(installed, "_module", lambda name: tuple(found[name]) if name in found else None)

    return replace


BOTH, RUNTIME = {"checkpoint", "runtime"}, {"runtime"}
COUNTED = [
    *((section, name, BOTH) for section, names in config_fields.BOTH_LAYOUTS.items() for name in names),
    *((section, name, RUNTIME) for section, names in config_fields.RUNTIME_ONLY.items() for name in names),
]
#: Configuration objects are looked at elsewhere; a target or a draft is told by which of them is loaded.
LOOKED_AT = {"multimodal_config", "eplb_config", "hf_config", "draft_model_config"}
LEFT_OUT = [
    (section, name)
    for section, reasons in IGNORED_FIELDS.items()
    for names in reasons.values()
    for name in names
    if section != "vllm" and name not in LOOKED_AT
]


def _said(value: object) -> str:
    """Names of tests in an order that is the same in every process."""
    return "+".join(sorted(value)) if isinstance(value, set) else str(value)


@pytest.mark.parametrize(("section", "name", "expected"), COUNTED, ids=_said)
def test_an_option_that_shapes_weights_moves_the_fingerprint(section: str, name: str, expected: set[str]) -> None:
    changed = configured()
    setattr(place(changed, config_fields.SECTIONS[section]), name, "another")
    assert layouts_moved(configured(), changed) == expected


def test_an_option_that_is_left_out_does_not() -> None:
    for section, name in LEFT_OUT:
        changed = configured()
        setattr(place(changed, config_fields.SECTIONS[section]), name, "another")
        assert not layouts_moved(configured(), changed), (section, name)


def test_no_option_is_in_two_places_and_every_reason_is_text() -> None:
    for section in (*config_fields.SECTIONS, "vllm"):
        names = fields_of(section)
        assert len(names) == len(set(names)), section
        assert all(reason.strip() for reason in IGNORED_FIELDS[section])


@pytest.mark.parametrize(
    ("path", "expected"), [*((path, BOTH) for path in config_fields.WHOLE_SECTION_BOTH_LAYOUTS.values())]
)
def test_whole_sections_move_it(path: str, expected: set[str]) -> None:
    changed = configured()
    getattr(changed, path).nested.choice = 2
    assert layouts_moved(configured(), changed) == expected


@pytest.mark.parametrize("path", config_fields.WHOLE_SECTION_RUNTIME_ONLY.values())
def test_kernel_options_move_it_in_the_runtime_layout(path: str) -> None:
    for change in ({"backend": Backend.TRITON}, {"a_new_option": 1}):
        changed = configured()
        vars(getattr(changed, path)).update(change)
        assert layouts_moved(configured(), changed) == RUNTIME


@pytest.mark.parametrize(
    ("section", "name"),
    [
        (section, name)
        for section, why in config_fields.WHOLE_SECTION_IGNORED.items()
        for names in why.values()
        for name in names
    ],
)
def test_what_is_left_out_of_a_whole_section_does_not_move_it(section: str, name: str) -> None:
    """Eager workers warm nothing up and run other norms: their weights are those of workers with graphs."""
    changed = configured()
    setattr(getattr(changed, config_fields.WHOLE_SECTION_RUNTIME_ONLY[section]), name, "another")
    assert not layouts_moved(configured(), changed)


@pytest.mark.parametrize(
    ("experts", "expected"),
    [({"num_experts": 8}, RUNTIME), ({"ffn_config": {"moe_top_k": 2}}, RUNTIME), ({}, set())],
    ids=_said,
)
def test_adapters_move_it_where_kernels_of_experts_are_chosen_by_them(experts: Any, expected: set[str]) -> None:
    """How many adapters and of which rank does not: they are wrapped around what has been loaded."""
    plain_model, with_lora, with_more = configured(), configured(), configured()
    for config in (plain_model, with_lora, with_more):
        config.model.hf_config = hf_config(**experts)
    with_lora.lora_config = SimpleNamespace(max_loras=1)
    with_more.lora_config = SimpleNamespace(max_loras=4)
    assert layouts_moved(plain_model, with_lora) == expected
    assert not layouts_moved(with_lora, with_more)


def test_a_rotary_operation_moves_it_where_it_wants_its_table_in_another_type(gpu: torch.device) -> None:
    """Eager and compiled workers of all other models pair: ``custom_ops`` differs between them by default."""

    def rotary(rope_type: str, *custom_ops: str, device: torch.device = gpu) -> str:
        config = configured()
        config.model.hf_config = hf_config(rope_parameters={"rope_type": rope_type})
        config.compilation_config = SimpleNamespace(custom_ops=list(custom_ops))
        return digest(config, device=device)

    on, off = rotary("yarn", "all"), rotary("yarn", "none", "+quant_fp8")
    assert on != off
    assert on == rotary("yarn", "none", "+rotary_embedding")
    assert off == rotary("yarn", "all", "-rotary_embedding")
    assert rotary("default", "all") == rotary("default", "none")
    assert rotary("yarn", "all", device=CPU) == rotary("yarn", "none", device=CPU)


def test_the_model_s_own_configuration_moves_it() -> None:
    for change in ({"hidden_size": 32}, {"rope_parameters": {"rope_theta": 1e6}}, {"new": None}):
        changed = configured()
        changed.model.hf_config = hf_config(**change)
        assert layouts_moved(configured(), changed) == BOTH
    elsewhere = configured()
    elsewhere.model.hf_config = hf_config(_name_or_path="/there", transformers_version="5")
    assert not layouts_moved(configured(), elsewhere)


@pytest.mark.parametrize(
    "change",
    [
        lambda quant: setattr(quant, "group_size", 64),
        lambda quant: quant.ignored_layers.append("model.layers.0"),
        lambda quant: setattr(quant.scheme_map["Linear"], "num_bits", 4),
        lambda quant: setattr(quant.scheme_map["Linear"], "dtype", torch.float8_e5m2),
    ],
)
def test_the_whole_quantization_moves_it(change: Any) -> None:
    changed = configured()
    change(changed.quant_config)
    assert layouts_moved(configured(), changed) == BOTH


def test_what_loading_writes_into_the_quantization_does_not() -> None:
    loaded = configured()
    loaded.quant_config.packed_modules_mapping = {"qkv_proj": ["q_proj"]}
    loaded.quant_config.online_quantization_time = 1.5
    assert not layouts_moved(configured(), loaded)


def test_a_draft_s_fingerprint_is_the_same_before_and_after_the_target_was_loaded() -> None:
    before, after = configured(), configured()
    for config in (before, after):
        config.speculative_config.draft_model_config = config.model
    after.quant_config.ignored_layers.append("renamed.by.the.target")
    assert not layouts_moved(before, after)


def test_what_the_platform_s_plugin_is_told_moves_it_but_for_its_logs() -> None:
    changed = configured()
    changed.additional_config["weight_nz_mode"] = 2
    assert layouts_moved(configured(), changed) == BOTH
    changed = configured()
    changed.additional_config["ascend_log_path"] = "/elsewhere"
    assert not layouts_moved(configured(), changed)


def test_kind_draft_and_random_weights_move_it() -> None:
    for name in ("runner_type", "convert_type"):
        changed = configured()
        setattr(changed.model, name, "another")
        assert layouts_moved(configured(), changed) == BOTH
    changed = configured()
    changed.speculative_config.draft_model_config = changed.model
    assert layouts_moved(configured(), changed) == BOTH
    assert layouts_moved(configured(), configured(), dummy=True) == BOTH
    seeded = configured()
    seeded.model.seed = 1
    assert not layouts_moved(configured(), seeded)
    assert digest(configured(), dummy=True) != digest(seeded, dummy=True)


@pytest.mark.parametrize(
    "fact", ["plugin", "vllm", "plugins", "libraries", "torch", "layout", "engine", "device", "kernels"]
)
def test_versions_layout_engine_and_device_are_facts_of_their_own(fact: str) -> None:
    facts = fingerprint.fingerprint_facts(
        configured(), configured().model, layout="runtime", engine="memory", device=CPU, dummy=False
    )
    assert fact in facts
    assert build_fingerprint({**facts, fact: "another"}) != build_fingerprint(facts)


def test_the_device_s_name_counts_where_kernels_do(gpu: torch.device) -> None:
    facts = {
        layout: fingerprint.fingerprint_facts(
            configured(), configured().model, layout=layout, engine="memory", device=gpu, dummy=False
        )["device"]
        for layout in ("checkpoint", "runtime")
    }
    assert facts["checkpoint"] == {"type": "cuda", "capability": [9, 0]}
    assert facts["runtime"]["name"] == "H100"


def test_the_toolkit_of_an_accelerator_counts_where_kernels_do(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {layout: digest(configured(), layout=layout, device=gpu) for layout in BOTH}
    monkeypatch.setattr(torch.version, "cann", "9.1.0", raising=False)
    assert {layout for layout in BOTH if digest(configured(), layout=layout, device=gpu) != before[layout]} == RUNTIME


# --- what is installed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        *((module, BOTH) for module in packages.BOTH_LAYOUTS),
        *((module, RUNTIME) for module in packages.RUNTIME_ONLY),
        *((module, set()) for names in IGNORED_PACKAGES.values() for module in names),
    ],
    ids=_said,
)
def test_a_package_moves_it_by_being_there_and_by_its_version(
    module: str, expected: set[str], install: Callable[..., None]
) -> None:
    digests = []
    for found in ({}, {module: [f"{module}==1"]}, {module: [f"{module}==2"]}):
        install(**found)
        digests.append({layout: digest(configured(), layout=layout) for layout in BOTH})
    for first, second in ((0, 1), (1, 2)):
        assert {layout for layout in BOTH if digests[first][layout] != digests[second][layout]} == expected


def test_a_module_is_found_with_or_without_a_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels_of_a_source_tree").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(installed, "_module", installed._module.__wrapped__)
    found = installed.modules(["pytest", "yaml", "kernels_of_a_source_tree", "not_there_at_all"])
    assert found == {
        "pytest": [f"pytest=={installed.version_of('pytest')}"],
        # Its distribution has another name, which no list of ours knows.
        "yaml": [f"PyYAML=={installed.version_of('pyyaml')}"],
        "kernels_of_a_source_tree": [],
    }


def test_distributions_are_found_as_the_standard_library_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which parses every record and looks for every file: most of a description's time on a host with many packages."""
    wanted = installed.metadata.packages_distributions()
    names = [*sorted(wanted)[:: max(1, len(wanted) // 12)], "yaml", "msgspec", "_pytest", "not_there_at_all"]
    monkeypatch.setattr(installed.metadata, "packages_distributions", lambda: pytest.fail("all records are parsed"))
    for name in names:
        assert set(installed._distributions_with(name)) == set(wanted.get(name, ())), name


@pytest.mark.parametrize(
    ("metadata", "listed", "contained"),
    [
        ("x-1.dist-info/RECORD", "humming/__init__.py,,\r\n", True),
        ("x-1.dist-info/RECORD", "humming.py,,\n", True),
        ("x-1.dist-info/RECORD", "./humming/__init__.py,,\n", True),
        ("x-1.dist-info/RECORD", '"humming/a,b.py",,\n', True),
        ("x-1.dist-info/RECORD", "humming.pth,sha256=x,3\nother/__init__.py,,\n", False),
        ("x-1.dist-info/RECORD", "other/humming/__init__.py,,\nhumming.tests.py,,\n", False),
        ("x-1.egg-info/SOURCES.txt", "setup.py\nhumming/__init__.py\n", True),
        ("x-1.egg-info/SOURCES.txt", "setup.py\nhumming.pyx\n", False),
        ("x-1.egg-info/installed-files.txt", "../humming/__init__.py\nPKG-INFO\n", True),
    ],
)
def test_a_module_is_found_in_every_kind_of_list(metadata: str, listed: str, contained: bool, tmp_path: Path) -> None:
    file = tmp_path / metadata
    file.parent.mkdir()
    file.write_text(listed)
    (distribution,) = installed.metadata.distributions(path=[str(tmp_path)])
    assert installed._contains(distribution, "humming") is contained


def test_the_toolkit_s_tools_count_where_flashinfer_would_have_to_compile(
    install: Callable[..., None], tmp_path: Path
) -> None:
    for tool in ("bin/nvcc", "ninja"):
        file = tmp_path / tool
        file.parent.mkdir(exist_ok=True)
        file.write_text("")
        file.chmod(0o755)
    with_tools = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)}
    without = {"PATH": "", "CUDA_HOME": str(tmp_path / "elsewhere")}
    assert installed.toolkit_tools(with_tools) == {"nvcc": True, "ninja": True}
    assert installed.toolkit_tools({"PATH": os.pathsep.join(with_tools.values())})["ninja"]
    assert installed.toolkit_tools(without) == {"nvcc": False, "ninja": False}

    def moved() -> bool:
        return digest(configured(), environ=with_tools) != digest(configured(), environ=without)

    install(flashinfer=["flashinfer-python==1"])
    assert moved()
    install(flashinfer=["flashinfer-python==1"], flashinfer_cubin=["flashinfer-cubin==1"])
    assert not moved()
    install()
    assert not moved()


def test_plugins_count_with_their_versions_where_vllm_loads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {
        "vllm.general_plugins": [
            ("b", "2", "models"),
            ("b", "2", "patches"),
            ("vllm-rfork", "1", "rfork"),
            ("vllm", "0.32.0+cpu", "lora_hf_hub_resolver"),
        ],
        "vllm.platform_plugins": [("a", "1", "npu")],
    }

    def entry_points(group: str) -> list[Any]:
        dists = [SimpleNamespace(name=name, version=version) for name, version, _ in points[group]]
        named = [
            SimpleNamespace(dist=dist, name=row[2], value=f"{row[0].replace('-', '_')}.plugins.x:register")
            for dist, row in zip(dists, points[group], strict=True)
        ]
        return [*named, SimpleNamespace(dist=None, name="loose", value="module:call")]

    monkeypatch.setattr(installed.metadata, "entry_points", entry_points)
    monkeypatch.setattr(installed, "_entry_points", installed._entry_points.__wrapped__)
    everything = {"a==1": ["npu"], "b==2": ["models", "patches"], "module:call": ["loose"]}
    assert installed.plugins({}) == everything
    # As vLLM reads it: names between commas, and an empty text names none.
    assert installed.plugins({"VLLM_PLUGINS": "rfork,patches"}) == {"b==2": ["patches"]}
    assert installed.plugins({"VLLM_PLUGINS": ""}) == {}
    assert layouts_moved(configured(), configured(), environ={"VLLM_PLUGINS": "rfork"}) == BOTH
    # But for vLLM's own, which count with its version: adapters' resolvers change no weight.
    every_name = {"VLLM_PLUGINS": "rfork,npu,models,patches,loose"}
    assert not layouts_moved(configured(), configured(), environ=every_name)


# --- the environment ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("VLLM_PP_LAYER_PARTITION", BOTH),
        ("VLLM_MLA_DISABLE", BOTH),
        ("K_SCALE_CONSTANT", BOTH),
        ("VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS", BOTH),
        ("VLLM_ASCEND_FLASHCOMM2_PARALLEL_SIZE", BOTH),
        ("VLLM_ASCEND_ENABLE_NZ", RUNTIME),
        ("VLLM_ASCEND_ENABLE_MLAPO", RUNTIME),
        ("VLLM_USE_FLASHINFER_MOE_FP8", RUNTIME),
        ("VLLM_FLASHINFER_MOE_BACKEND", RUNTIME),
        ("VLLM_USE_DEEP_GEMM", RUNTIME),
        ("VLLM_MARLIN_INPUT_DTYPE", RUNTIME),
        ("VLLM_DISABLED_KERNELS", RUNTIME),
        ("VLLM_ROCM_MOE_PADDING", RUNTIME),
        ("VLLM_KERNEL_OF_THE_FUTURE", RUNTIME),
        # Nobody has read these; a pattern for logs, ports, paths or hosts must not take them in.
        ("VLLM_USE_TRANSPOSED_W13_SUPPORT", RUNTIME),
        ("VLLM_MOE_TOPOLOGY", RUNTIME),
        ("VLLM_MOE_PACK_FAST_PATH", RUNTIME),
        ("VLLM_QUANT_ON_HOST", RUNTIME),
        ("VLLM_FP8_ANALOG_SCALES", RUNTIME),
        ("VLLM_LOGGING_LEVEL", set()),
        ("VLLM_PORT", set()),
        ("VLLM_NIXL_SIDE_CHANNEL_PORT", set()),
        ("VLLM_HOST_IP", set()),
        ("VLLM_API_KEY", set()),
        ("VLLM_FUTURE_TOKEN", set()),
        ("VLLM_ROCM_USE_AITER_CUSTOM_AR", set()),
        ("RFORK_TOKEN", set()),
        ("PATH", set()),
    ],
)
def test_a_variable_moves_it_where_it_shapes_weights(name: str, expected: set[str]) -> None:
    assert layouts_moved(configured(), configured(), environ={name: "1"}) == expected


def test_every_pattern_of_the_environment_can_match() -> None:
    """None stands behind a list that wins over its own."""
    for pattern in environment.RUNTIME_ONLY:
        name = re.sub(r"\[(.).*?\]", r"\1", pattern.replace("*", "X"))
        assert environment.place_of(name) in {"runtime only", "both layouts"}, pattern


def test_what_is_left_out_is_named_from_its_beginning() -> None:
    """But for secrets, whose values must count nowhere, and for the ends of names that say enough."""
    ends = {"VLLM_*_PORT", "VLLM_*_SIDE_CHANNEL_HOST", "VLLM_*_TIMEOUT", "VLLM_*_TIMEOUT_S", "VLLM_*_TIMEOUT_SECONDS"}
    secrets = {"*_API_KEY", "*SECRET*", "*PASSWORD*", "*TOKEN"}
    patterns = {pattern for names in environment.IGNORED.values() for pattern in names}
    assert {pattern for pattern in patterns if "*" in pattern[:-1]} == ends | secrets


# --- canonical ------------------------------------------------------------------------------------------------------


def test_plain_data_says_nothing_of_addresses_and_survives_json() -> None:
    class Loop:
        def __init__(self) -> None:
            self.me = self
            self.tensor = torch.zeros(1)
            self.call = canonical.plain
            self.path = re.compile("a+")
            self.mixed = {2, 1, "x", Backend.FLASH}
            self.numbers = (float("nan"), 1.5, b"\x01")
            self.keyed = {Backend.TRITON: torch.bfloat16, (1, 2): object()}

    text = json.dumps(canonical.plain(Loop()), allow_nan=False)
    assert "0x" not in text
    assert text == json.dumps(canonical.plain(Loop()), allow_nan=False)
    assert json.loads(text)["fields"]["keyed"] == {"Backend.TRITON": "torch.bfloat16", "[1, 2]": "builtins.object"}


def test_objects_nested_without_end_are_cut_off() -> None:
    deep: list[Any] = []
    for _ in range(1000):
        deep = [deep]
    assert len(json.dumps(canonical.plain(deep))) < 100


def test_the_fingerprint_of_fixed_facts_is_pinned() -> None:
    """Versions and the machine come from outside and are fixed here; all else is what the tables make of options."""
    facts = fingerprint.fingerprint_facts(
        configured(),
        configured().model,
        layout="runtime",
        engine="memory",
        device=CPU,
        dummy=False,
        environ={"VLLM_MARLIN_USE_ATOMIC_ADD": "1", "VLLM_PORT": "1"},
    )
    fixed = dict.fromkeys(("plugin", "vllm", "plugins", "libraries", "torch", "device", "kernels"), "fixed")
    fixed["toolkit_tools"] = "fixed"
    assert build_fingerprint({**facts, **fixed}) == "ffb26b271e14a008742926f3866d4b99"


def test_plugins_that_vllm_brings_itself_do_not_count() -> None:
    """``VLLM_PLUGINS=rfork`` on one instance only: both pair. This runs on the installed vLLM's own entry points."""
    shipped = {point.name for point in installed.metadata.entry_points(group="vllm.general_plugins")} - {"rfork"}
    assert any("resolver" in name for name in shipped), "the test is about vLLM's LoRA resolvers"
    assert installed.plugins({"VLLM_PLUGINS": "rfork"}) == installed.plugins({})
