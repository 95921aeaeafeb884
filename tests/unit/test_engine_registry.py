"""The registry names every engine once, importing an adapter imports no native package, and others can add engines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_rfork.engines.base import TransferEngine
from vllm_rfork.engines.memory import MemoryEngine
from vllm_rfork.engines.registry import (
    AUTO_ORDER,
    DEFAULT_ENGINE,
    ENGINES,
    GROUP,
    check_engines,
    engine_class,
    engine_names,
    engine_order,
)
from vllm_rfork.errors import ConfigError, EngineUnavailable


@pytest.mark.parametrize("name", list(ENGINES))
def test_every_row_leads_to_an_adapter_of_that_name(name: str) -> None:
    cls = engine_class(name)
    assert issubclass(cls, TransferEngine)
    assert cls.name == name
    assert cls.limits.max_batch_nbytes > 0
    assert cls.limits.max_batch_items > 0
    assert not cls.__abstractmethods__


@pytest.mark.parametrize("name", list(ENGINES))
def test_an_adapter_loads_its_native_package_only_when_opened(name: str) -> None:
    code = (
        "import sys; from vllm_rfork.engines.registry import engine_class;"
        f"engine_class({name!r})();"
        "print([m for m in ('torch', 'vllm', 'nixl', 'nixl_cu12', 'nixl_cu13', 'yr', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "[]"


def test_the_default_engine_reads_its_device() -> None:
    for device, name in DEFAULT_ENGINE.items():
        assert device in engine_class(name).device_types


def test_unknown_engines_and_devices_are_configuration_errors() -> None:
    with pytest.raises(ConfigError, match="rfork_engine"):
        engine_class("carrier-pigeon")
    with pytest.raises(ConfigError, match="rfork_engine"):
        engine_order("auto", "abacus")


@pytest.mark.parametrize("device", ["cpu", "cuda", "npu"])
def test_the_automatic_order_has_the_engines_that_exist_and_read_the_device(device: str) -> None:
    order = engine_order("auto", device)
    assert order == tuple(name for name in AUTO_ORDER[device] if name in ENGINES)
    assert DEFAULT_ENGINE[device] in order
    assert all(device in engine_class(name).device_types for name in order)


def test_the_order_of_a_list_is_the_users() -> None:
    assert engine_order("memory", "cpu") == ("memory",)
    assert engine_order("memory,nixl", "cpu") == ("memory", "nixl")
    assert engine_order("nixl,memory", "cpu") == ("nixl", "memory")


@pytest.mark.parametrize(
    ("setting", "device", "problem"),
    [
        ("nixl,carrier-pigeon", "cpu", "there is no engine 'carrier-pigeon'"),
        ("nixl,auto", "cpu", "there is no engine 'auto'"),
        ("nixl,cuda_ipc", "cpu", "engine cuda_ipc has no access to cpu memory, only to cuda"),
        ("memory", "cuda", "engine memory has no access to cuda memory, only to cpu"),
        ("auto", "abacus", "auto selects no engine for device type 'abacus'"),
    ],
)
def test_an_order_that_cannot_work_fails_the_start_by_name(setting: str, device: str, problem: str) -> None:
    with pytest.raises(ConfigError, match="rfork_engine") as caught:
        engine_order(setting, device)
    assert problem in str(caught.value)


# -- engines of other distributions ----------------------------------------------------------------------------------

Install = Callable[..., None]
CARRIER = """
from vllm_rfork.engines.base import TransferEngine
from vllm_rfork.engines.memory import MemoryEngine

class Pigeon(MemoryEngine):
    name = "pigeon"

class Half(TransferEngine):
    name = "dove"

not_a_class = Pigeon()
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a distribution with entry points, as pip would."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "carrier.py").write_text(CARRIER)

    def install(distribution: str, **engines: str) -> None:
        info = tmp_path / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        lines = [f"[{GROUP}]", *(f"{name} = {value}" for name, value in engines.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")

    return install


def test_an_engine_of_another_distribution_is_found_by_its_entry_point(install: Install) -> None:
    install("carrier-engines", pigeon="carrier:Pigeon")
    assert engine_names() == [*ENGINES, "pigeon"]
    cls = engine_class("pigeon")
    assert (cls.__module__, cls.__name__, cls.name) == ("carrier", "Pigeon", "pigeon")


def test_an_engine_of_this_package_cannot_be_replaced(install: Install) -> None:
    install("carrier-engines", memory="carrier:Pigeon")
    assert engine_names() == list(ENGINES)
    assert engine_class("memory") is MemoryEngine


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("nowhere:Engine", "ModuleNotFoundError"),
        ("carrier:Missing", "AttributeError"),
        ("carrier:not_a_class", "not a subclass of TransferEngine"),
        ("carrier:Half", "lacks close, connect"),
        ("carrier:Pigeon", "is called 'pigeon', not 'dove'"),
    ],
)
def test_a_broken_engine_is_reported_with_its_distribution(value: str, problem: str, install: Install) -> None:
    """It is as unavailable as an engine whose package is missing: the worker loads from storage."""
    install("carrier-engines", dove=value)
    with pytest.raises(EngineUnavailable, match=problem) as caught:
        engine_class("dove")
    assert "carrier-engines 1.2" in str(caught.value)
    assert value in str(caught.value)


def test_a_broken_engine_stays_in_a_list_until_it_is_opened(install: Install) -> None:
    install("carrier-engines", dove="nowhere:Engine")
    assert engine_order("dove,memory", "cpu") == ("dove", "memory")
    check_engines("dove,memory")


def test_names_are_checked_before_the_device_is_known() -> None:
    for setting in ("auto", "nixl", "cuda_ipc,nixl"):
        check_engines(setting)
    with pytest.raises(ConfigError, match="there is no engine 'carrier-pigeon'"):
        check_engines("nixl,carrier-pigeon")


def test_two_distributions_with_one_name_are_a_configuration_error(install: Install) -> None:
    install("carrier-engines", pigeon="carrier:Pigeon")
    install("other-engines", pigeon="carrier:Pigeon")
    with pytest.raises(ConfigError, match=r"carrier-engines 1\.2, other-engines 1\.2"):
        engine_class("pigeon")


def test_a_missing_engine_is_a_configuration_error_that_lists_the_others(install: Install) -> None:
    install("carrier-engines", pigeon="carrier:Pigeon")
    with pytest.raises(ConfigError, match=r"no engine 'dove'.*memory, pigeon"):
        engine_class("dove")


def test_a_malformed_distribution_costs_no_engine_of_this_package(install: Install, tmp_path: Path) -> None:
    """``importlib.metadata`` parses the entry points of all distributions to find those of one group."""
    install("carrier-engines", pigeon="carrier:Pigeon")
    (tmp_path / "carrier_engines-1.2.dist-info" / "entry_points.txt").write_text("[console_scripts]\nno equals sign\n")
    assert engine_names() == list(ENGINES)
    assert engine_class("memory") is MemoryEngine
