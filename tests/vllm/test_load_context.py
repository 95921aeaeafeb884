"""The context of a load and the session that it opens; no model is built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import LogRecords, extra_for
from tests.vllm.engine_process import distributed, vllm_config
from tests.vllm.models import qwen2
from vllm_rfork.config import parse_config
from vllm_rfork.errors import ConfigError
from vllm_rfork.fork.intent import Intent
from vllm_rfork.load import early
from vllm_rfork.load.capture import SeedProspect
from vllm_rfork.load.context import LoadContext, describe
from vllm_rfork.manifest.facts import MAX_FACTS, differences

PLANNER = "http://10.255.255.1:1"


def described(model: Path, **options: Any) -> LoadContext:
    extra = extra_for(PLANNER, **options)
    config = vllm_config(model, load_format="rfork", extra=extra)
    with distributed(config):
        return describe(parse_config(extra, {}).settings, config, config.model_config, None)


def test_a_worker_without_an_address_is_no_seed_and_still_reads_from_others(
    model_a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "advertise_host", lambda settings: None)
    context = described(model_a)
    session = context.open_session()
    try:
        assert "rfork_seed_advertise_host" in str(context.seed_obstacle)
        assert context.planner_unreachable is None
        SeedProspect(session, context.seed_obstacle)
        assert session.intent.id == "", "nobody is to wait for it"
        assert [engine.registered_nbytes for engine in session.engines.hand_over()] == [0]
    finally:
        session.close()


def test_the_engines_of_a_worker_separate_it_from_no_other(model_a: Path) -> None:
    """And ``auto`` has the fingerprint that it had when the engine was a fact of the worker."""
    found = [described(model_a, rfork_engine=engines) for engines in ("auto", "memory", "memory,nixl", "nixl,memory")]
    assert len({context.fingerprint for context in found}) == 1
    assert found[0].facts["engine"] == "nixl"
    assert [context.engine_order[0] for context in found] == ["nixl", "memory", "memory", "nixl"]
    with pytest.raises(ConfigError, match=r"rfork_engine.*cuda_ipc has no access to cpu memory"):
        described(model_a, rfork_engine="memory,cuda_ipc")


def test_as_soon_as_it_is_known_that_it_will_be_no_seed_the_intent_is_taken_back(
    model_a: Path, rfork_log: LogRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    take_back = Intent.withdraw
    monkeypatch.setattr(Intent, "withdraw", lambda self: (taken.append(self.id), take_back(self)))
    session = described(model_a).open_session()
    try:
        intent = session.intent.id
        prospect = SeedProspect(session, None)
        assert intent
        assert taken == []
        prospect.rule_out("its weights cannot be accounted for")
        prospect.rule_out("another reason")
        assert taken[0] == intent
        assert session.intent.id == ""
        assert prospect.obstacle == "its weights cannot be accounted for"
    finally:
        session.close()


def test_what_vllm_reads_out_of_weight_files_is_named_where_it_differs(tmp_path: Path) -> None:
    """The configuration says tied, the checkpoint has an ``lm_head`` of its own, and the receiver has no files."""
    whole = qwen2(tmp_path / "whole", tie_word_embeddings=False)
    config = json.loads((whole / "config.json").read_text()) | {"tie_word_embeddings": True}
    (whole / "config.json").write_text(json.dumps(config))
    bare = tmp_path / "bare"
    shutil.copytree(whole, bare, ignore=shutil.ignore_patterns("*.safetensors*"))
    with_files, without = described(whole), described(bare)
    assert with_files.seed_key == without.seed_key
    assert with_files.fingerprint != without.fingerprint
    found = differences(without.facts, [(with_files.facts, 1)])
    assert "tie_word_embeddings: true here, false on 1 seed" in found
    assert 10 < len(without.facts) <= MAX_FACTS
