"""Two real ranks of one instance: whatever keeps one from forking, both do the same, and neither waits for ever."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from tests.vllm.rank_process import FAULTS, Outcome, play
from zoo.planner import meeting_port

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def outcomes(
    vllm_imported: None, model_a: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Outcome] | str]:
    """What both ranks report, by fault; see ``rank_process``."""
    context, port, logs = multiprocessing.get_context("forkserver"), meeting_port(), tmp_path_factory.mktemp("ranks")
    running = []
    for rank in range(2):
        ours, theirs = context.Pipe()
        arguments = (rank, port, str(model_a), str(logs / f"{rank}.log"), theirs)
        process = context.Process(target=play, args=arguments, daemon=True)
        process.start()
        theirs.close()
        running.append((process, ours))
    try:
        reports = []
        for _, connection in running:
            assert connection.poll(600), f"no report; see {logs}"
            reports.append(connection.recv())
        return reports
    finally:
        for process, connection in running:
            connection.close()
            process.join(10)
            process.kill()


@pytest.mark.parametrize("fault", FAULTS)
def test_both_ranks_build_again_or_none_does_and_both_end_in_a_default_load(
    fault: str, outcomes: list[dict[str, Outcome] | str]
) -> None:
    """A constructor that makes a process group would otherwise wait for a rank that does not come."""
    found = []
    for report in outcomes:
        assert isinstance(report, dict), outcomes
        found.append(report[fault])
    assert [each.built for each in found] == ([1, 1] if fault == "no seed" else [2, 2])
    assert [each.equal for each in found] == [True, True], "not the default loader's model"
    said = ["; ".join(each.warnings) for each in found]
    assert "not every rank of this instance could fork" in said[0], said
    assert "rank 1: " in said[0]
