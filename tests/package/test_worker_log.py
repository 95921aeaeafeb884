"""Every log line of a worker begins with ``RFork:``, and no call site types that by hand."""

from __future__ import annotations

import ast
import importlib
import logging
import re
from pathlib import Path

import pytest

from tests.package.test_light_imports import LIGHT
from vllm_rfork.logs.worker import SHORT, LoggedTexts, worker_logger

PACKAGE = Path(__file__).parents[2] / "vllm_rfork"
#: The planner logs as itself; this one file hands the worker's loggers to vLLM's.
PLANNER, PARENT = PACKAGE / "planner", PACKAGE / "vllm_compat" / "vllm_log.py"
#: Both sides import these, so they log by the loggers that they are given.
SHARED = sorted(
    {
        PACKAGE / "net" / f"{name}.py"
        for path in PLANNER.rglob("*.py")
        for name in re.findall(r"^\s*from vllm_rfork\.net\.(\w+) import", path.read_text(), re.MULTILINE)
    }
)
METHODS = frozenset({"debug", "info", "warning", "error", "exception", "critical", "log"})
MODULES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if PLANNER not in path.parents and path not in SHARED and path != PACKAGE / "logs" / "worker.py"
)


def _log_calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Calls such as ``logger.info(...)`` with the name of the object they are made on."""
    return [
        (ast.unparse(node.func.value), node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS
        if "log" in ast.unparse(node.func.value).lower() or ast.unparse(node.func.value) == "_quiet"
    ]


def faults(source: str) -> list[str]:
    """What is wrong with the logging of one module, one line each."""
    tree = ast.parse(source)
    ours = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("worker_logger(")
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = [
        f"line {call.lineno}: logs by {name}, which is not a worker_logger"
        for name, call in _log_calls(tree)
        if name not in ours
    ]
    for _, call in _log_calls(tree):
        texts = [each.value for each in ast.walk(call) if isinstance(each, ast.Constant)]
        if any(isinstance(text, str) and text.startswith("RFork") for text in texts):
            found.append(f"line {call.lineno}: types the prefix by hand")
    return found


def test_every_log_call_of_the_worker_side_goes_through_the_filter() -> None:
    texts = {path.relative_to(PACKAGE): path.read_text() for path in MODULES}
    assert [f"{path}: {fault}" for path, text in texts.items() for fault in faults(text)] == []
    assert [path for path, text in texts.items() if "getLogger(" in text] == [PARENT.relative_to(PACKAGE)]


@pytest.mark.parametrize("path", SHARED, ids=lambda path: path.name)
def test_what_both_sides_share_makes_no_logger(path: Path) -> None:
    assert "getLogger(" not in path.read_text()
    assert "worker_logger(" not in path.read_text()


def test_the_log_calls_are_found() -> None:
    """The check above sees calls: there are dozens of them."""
    assert len(SHARED) > 2
    assert sum(len(_log_calls(ast.parse(path.read_text()))) for path in MODULES) > 50
    assert faults("import logging\nlogging.warning('a')") == ["line 2: logs by logging, which is not a worker_logger"]
    assert faults("log = worker_logger('a')\nlog.info('RFork: b')") == ["line 2: types the prefix by hand"]


@pytest.mark.parametrize("module", LIGHT)
def test_each_logger_adds_the_prefix_once(module: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where a light module has a logger; a line that another handler passes on again keeps one prefix."""
    found = getattr(importlib.import_module(module), "logger", None)
    if found is None or found.name.startswith("vllm_rfork.planner"):
        return
    with caplog.at_level(logging.INFO, "vllm_rfork"):
        found.warning("seed %s is gone", "10.0.0.1:1:0")
        found.handle(caplog.records[0])
    assert [record.getMessage() for record in caplog.records] == ["RFork: seed 10.0.0.1:1:0 is gone"] * 2


def test_a_long_text_is_logged_whole_once_and_a_short_one_always() -> None:
    told, other_load = LoggedTexts(), LoggedTexts()
    long = "tensor w: shape (1, 2) here, (2, 1) on the seed; " * 20
    assert (told.once("short"), told.once("short")) == ("short", "short")
    assert told.once(ValueError(long)) == long
    again = told.once(long)
    assert again.startswith(long[:SHORT])
    assert len(again) < SHORT + 60
    assert other_load.once(long) == long


def test_an_error_as_message_and_a_percent_sign_survive(caplog: pytest.LogCaptureFixture) -> None:
    logger = worker_logger("vllm_rfork.example")
    logger.warning(ValueError("a bad value"))
    logger.warning("100 % of it")
    assert [record.getMessage() for record in caplog.records] == ["RFork: a bad value", "RFork: 100 % of it"]
