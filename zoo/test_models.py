"""One test per model of the catalogue; ``python -m zoo`` runs them, with the fixtures of ``zoo.plugin``."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from zoo.case import Case
from zoo.run import NOT_RUN, Row


def test_a_fork_is_the_default_load_or_is_refused_as_listed(case: Case, rows: dict[str, Future[Row]]) -> None:
    """Fail with everything that is not as it should be; skip what vLLM cannot load here."""
    row = rows[case.name].result()
    if row.failures:
        pytest.fail("; ".join(row.failures), pytrace=False)
    if row.outcome == NOT_RUN:
        pytest.skip(f"vLLM cannot load it here: {row.reason}")
