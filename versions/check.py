"""Comparison of a recorded release with the table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from versions.source import DEFAULT, KEYWORD_ONLY, REQUIRED, STAR, STARS
from versions.table import Row


def number(version: str) -> tuple[int, ...]:
    """``0.23.0rc1`` → (0, 23, 0): whatever follows the digits of a part is ignored."""
    parts = []
    for part in version.split("."):
        digits = "".join(char for char in part if char.isdigit()) if part[:1].isdigit() else ""
        if not digits:
            break
        leading = len(part) - len(part.lstrip("0123456789"))
        parts.append(int(part[:leading]))
    return tuple(parts)


def complaints(record: dict[str, Any], rows: Iterable[Row]) -> list[str]:
    """Everything in ``rows`` that the release of ``record`` lacks, as sentences."""
    found = []
    release = f"{record['package']} {record['version']}"
    for row in rows:
        if row.package != record["package"]:
            continue
        there = record["symbols"].get(row.key, "unread")
        if there == "unread":
            found.append(f"{release}: {row.key} is not recorded; run `make versions`")
        elif there is None:
            version = number(record["version"])
            early = row.since and version < number(row.since)
            if not early and not (row.until and version >= number(row.until)):
                found.append(f"{release} has no {row.key}")
        else:
            found += [f"{release}: {row.key} {complaint}" for complaint in _misfits(row, there)]
    return found


def _misfits(row: Row, there: dict[str, Any]) -> list[str]:
    """The reasons why a call as in ``row`` would fail."""
    found = []
    if row.takes is not None and "params" not in there:
        found.append(f"is not a function but {there['kind']}")
    elif row.takes is not None:
        params = [(name, kind) for name, kind in there["params"] if name not in ("self", "cls")]
        plain = [name for name, kind in params if kind in (REQUIRED, DEFAULT)]
        kinds = {kind for _, kind in params}
        given = {*row.takes, *plain[: row.positional]}
        if row.positional > len(plain) and STAR not in kinds:
            found.append(f"takes {len(plain)} positional arguments, and gets {row.positional}")
        if STARS not in kinds:
            found += [f"does not take {name}" for name in row.takes if name not in {param for param, _ in params}]
        found += [f"requires {name}" for name, kind in params if kind in (REQUIRED, KEYWORD_ONLY) and name not in given]
    position = -1
    for name in row.calls:
        later = [place for place, called in enumerate(there.get("calls", [])) if called == name and place > position]
        if not later:
            found.append(f"does not call {name} where it should")
            break
        position = later[0]
    return found
