"""Tables of the command line: borders on a terminal, plain columns in a pipe."""

from __future__ import annotations

import pytest

from vllm_rfork.cli import tables

ROWS = [("ok", "a" * 300, ""), ("fail", "[bold]x\ty\x1b[2J", 7)]


def test_columns_in_a_pipe_are_divided_by_tabs_and_never_folded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    tables.print_table(("state", "found", "number"), ROWS, title="2 rows")
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "state\tfound\tnumber",
        f"ok\t{'a' * 300}\t-",
        "fail\t[bold]x�y�[2J\t7",
    ]
    assert err == "2 rows\n"


def test_a_terminal_gets_borders_or_aligned_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    tables.print_table(("state", "found", "number"), ROWS, title="2 rows")
    out = capsys.readouterr().out
    assert "2 rows" in out
    assert "│" in out
    assert "\x1b[2J" not in out
    rows = [("a", "ok", "x"), ("much longer", "ERROR", "y " * 40)]
    tables.print_rows(("option", "status", "text"), rows, "end")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["a", "ok"], ["much", "longer"]]
    assert lines[0].index("ok") == lines[1].index("ERROR") == lines[2].index("y") - len("ERROR  ")
    assert lines[-1] == "end"
