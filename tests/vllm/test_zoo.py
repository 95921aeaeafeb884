"""A representative part of the model zoo; ``make zoo`` runs all of it."""

from __future__ import annotations

import concurrent.futures

import pytest

from zoo.catalogue import CATALOGUE
from zoo.planner import Planner
from zoo.processes import platform_facts
from zoo.run import FORKED, REFUSED, Row, Setting, run

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

BY_NAME = {case.name: case for case in CATALOGUE}


#: MLA with experts; quantized; a draft beside its target; a refusal.
NAMES = ("deepseek-v2", "llama-int8", "draft-pair", "phi")


@pytest.fixture(scope="module")
def rows(vllm_imported: None, planner: Planner, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """What came of each, two at a time: every load is a process of its own with one thread."""
    work = tmp_path_factory.mktemp("zoo")
    facts = platform_facts(work)
    setting = Setting(traits=frozenset(facts["traits"]), work=work, planner=planner, timeout_s=600.0)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(NAMES, pool.map(lambda name: run(BY_NAME[name], setting), NAMES), strict=True))


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_fork_is_the_default_load_tensor_by_tensor_and_token_by_token(name: str, rows: dict[str, Row]) -> None:
    row = rows[name]
    assert row.failures == []
    assert (row.outcome, row.layout, row.digests_equal, row.answers_equal) == (FORKED, "checkpoint", True, True)


def test_a_refusal_that_was_listed_ends_in_the_default_load(rows: dict[str, Row]) -> None:
    row = rows["phi"]
    assert row.failures == []
    assert (row.outcome, row.digests_equal, row.answers_equal) == (REFUSED, True, True)
