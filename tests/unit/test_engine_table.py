"""The table names every engine once, and importing an adapter imports no native package."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vllm_rfork.engines.base import TransferEngine
from vllm_rfork.engines.registry import DEFAULT_ENGINE, ENGINES, engine_class, engine_for_device
from vllm_rfork.errors import ConfigError


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
        assert engine_for_device(device) == name
        assert device in engine_class(name).device_types


def test_unknown_engines_and_devices_are_configuration_errors() -> None:
    with pytest.raises(ConfigError, match="rfork_engine"):
        engine_class("carrier-pigeon")
    with pytest.raises(ConfigError, match="rfork_engine"):
        engine_for_device("abacus")
