"""A front end that takes model information from a seed: its own time is bounded, its exit included."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.hanging_names import hanging_names
from vllm_rfork.config import parse_config
from vllm_rfork.startup.early_infos import BOUND_S, EarlyInfos
from vllm_rfork.vllm_compat.start_up import model_infos
from vllm_rfork.vllm_compat.start_up.listener import JsonPlace


def test_a_name_that_does_not_resolve_delays_neither_the_start_nor_the_exit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"model_url": "m", "model_deploy_strategy_name": "s", "rfork_scheduler_url": "http://planner.invalid:1"}
    with hanging_names(monkeypatch) as names:
        started = time.monotonic()
        with caplog.at_level("INFO"):
            assert EarlyInfos(parse_config(given, {}).settings, ("key",)).find("name", {}) is None
        took_s = time.monotonic() - started
        left, joined = names.waiting(), names.joined_at_exit()
    assert names.asked.is_set()
    assert took_s < BOUND_S + 0.5
    assert left
    assert not joined, "Python waits for them when it exits"
    assert "so vLLM inspects model classes" in caplog.text


def test_a_seed_is_not_asked_where_vllm_has_a_file_that_it_will_replace(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After an update of vLLM, the earlier one's file has the same name and the hash of another source."""
    asked: list[str] = []

    def find(name: str, identity: Mapping[str, str]) -> bytes:
        asked.append(name)
        return b"of this source"

    place = JsonPlace(model_infos.KIND, "name", {"a": "b"}, tmp_path, ("modelinfos",), "name.json", bytes)
    monkeypatch.setattr(model_infos, "_place", lambda entry, check: place)
    file = tmp_path / "modelinfos" / "name.json"
    file.parent.mkdir()
    file.write_bytes(b"of the earlier source")
    assert not model_infos._took(object(), "0" * 32, find)
    assert asked == []
    file.unlink()
    assert model_infos._took(object(), "0" * 32, find)
    assert (asked, file.read_bytes()) == (["name"], b"of this source")
