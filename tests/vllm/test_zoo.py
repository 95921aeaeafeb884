"""A representative part of the model zoo; ``make zoo`` runs all of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from zoo.catalogue import CATALOGUE
from zoo.planner import Planner
from zoo.run import FORKED, REFUSED, Setting, run
from zoo.stage import fork_server, platform_facts

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

BY_NAME = {specimen.name: specimen for specimen in CATALOGUE}


@pytest.fixture(scope="module")
def setting(planner: Planner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    work = tmp_path_factory.mktemp("zoo")
    with fork_server(threads=1):
        facts = platform_facts(work)
        yield Setting(traits=frozenset(facts["traits"]), work=work, planner=planner, timeout_s=400.0)


@pytest.mark.parametrize("name", ["deepseek-v2", "llama-int8", "draft-pair"])
def test_a_fork_is_the_default_load_tensor_by_tensor_and_token_by_token(name: str, setting: Setting) -> None:
    row = run(BY_NAME[name], setting)
    assert row.failures == []
    assert (row.outcome, row.layout, row.digests_equal, row.answers_equal) == (FORKED, "checkpoint", True, True)


def test_a_refusal_that_was_listed_ends_in_the_default_load(setting: Setting) -> None:
    row = run(BY_NAME["phi"], setting)
    assert row.failures == []
    assert (row.outcome, row.digests_equal, row.answers_equal) == (REFUSED, True, True)
