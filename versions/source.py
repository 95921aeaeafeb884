"""Definitions in Python source, read with ``ast``: nothing is imported, so neither torch nor the package is needed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

#: Parameters as pairs of name and kind.
REQUIRED, DEFAULT, KEYWORD_ONLY, STAR, STARS = "required", "default", "required keyword", "*", "**"


class Module:
    """The definitions in one file, also those inside ``if`` and ``try``."""

    def __init__(self, text: str) -> None:
        self._names: dict[str, ast.AST] = {}
        for node in _statements(ast.parse(text).body):
            for name in _bound(node):
                self._names[name] = node

    def describe(self, symbol: str) -> dict[str, Any] | None:
        """``symbol``, a name or ``Class.member``, as plain data; None if it is not defined here."""
        first, _, member = symbol.partition(".")
        node = self._names.get(first)
        if node is None:
            return None
        if not member:
            return _described(node)
        if not isinstance(node, ast.ClassDef):
            return None
        found = self._members(node).get(member)
        return None if found is None else self._described_member(node, found)

    def fields(self, cls: str) -> list[str] | None:
        """Annotated names in the body of ``cls``, in order: a dataclass's fields. None if there is no such class."""
        node = self._names.get(cls)
        if not isinstance(node, ast.ClassDef):
            return None
        annotated = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        kept = [item for item in annotated if not ast.unparse(item.annotation).startswith(("ClassVar", "InitVar"))]
        return [item.target.id for item in kept if isinstance(item.target, ast.Name)]

    def methods(self, cls: str) -> list[str] | None:
        """Public methods in the body of ``cls``, sorted; None if there is no such class."""
        node = self._names.get(cls)
        if not isinstance(node, ast.ClassDef):
            return None
        found = [item for item in _statements(node.body) if _described(item)["kind"] == "function"]
        return sorted({name for item in found for name in _bound(item) if not name.startswith("_")})

    def keys(self, mapping: str) -> list[str] | None:
        """The literal keys of a mapping; None if there is no such mapping."""
        value = getattr(self._names.get(mapping), "value", None)
        if not isinstance(value, ast.Dict):
            return None
        return sorted(str(key.value) for key in value.keys if isinstance(key, ast.Constant))

    def _members(self, node: ast.ClassDef) -> dict[str, ast.AST]:
        """The members of a class and of its bases in this file, with attributes set on ``self``."""
        found: dict[str, ast.AST] = {}
        for base in node.bases:
            other = self._names.get(base.id) if isinstance(base, ast.Name) else None
            if isinstance(other, ast.ClassDef) and other is not node:
                found.update(self._members(other))
        for inner in ast.walk(node):
            if (
                isinstance(inner, ast.Attribute)
                and isinstance(inner.ctx, ast.Store)
                and isinstance(inner.value, ast.Name)
                and inner.value.id == "self"
            ):
                found[inner.attr] = inner
        for statement in _statements(node.body):
            for name in _bound(statement):
                found[name] = statement
        return found

    def _described_member(self, node: ast.ClassDef, found: ast.AST) -> dict[str, Any]:
        described = _described(found)
        if "params" in described:
            described["calls"] = self._calls(node, found, seen=set())
        return described

    def _calls(self, node: ast.ClassDef, function: ast.AST, seen: set[str]) -> list[str]:
        """Names that ``function`` calls, in order, each followed by what the class's own method of that name calls."""
        calls: list[str] = []
        found = [inner for inner in ast.walk(function) if isinstance(inner, ast.Call)]
        for call in sorted(found, key=lambda inner: (inner.lineno, inner.col_offset)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            calls.append(name)
            own = self._members(node).get(name)
            if isinstance(own, (ast.FunctionDef, ast.AsyncFunctionDef)) and name not in seen:
                calls += self._calls(node, own, seen | {name})
        return calls


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            for inner in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, inner, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _bound(node: ast.stmt) -> list[str]:
    """The names that a statement binds."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _described(node: ast.AST) -> dict[str, Any]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        decorators = [ast.unparse(item) for item in node.decorator_list]
        if any(item.endswith("property") for item in decorators):
            return {"kind": "attribute"}
        return {"kind": "function", "params": _params(node.args)}
    if isinstance(node, ast.ClassDef):
        return {"kind": "class"}
    return {"kind": "import" if isinstance(node, (ast.Import, ast.ImportFrom)) else "attribute"}


def _params(args: ast.arguments) -> list[list[str]]:
    plain = [*args.posonlyargs, *args.args]
    first_default = len(plain) - len(args.defaults)
    params = [[arg.arg, REQUIRED if number < first_default else DEFAULT] for number, arg in enumerate(plain)]
    if args.vararg:
        params.append([args.vararg.arg, STAR])
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        params.append([arg.arg, KEYWORD_ONLY if default is None else DEFAULT])
    if args.kwarg:
        params.append([args.kwarg.arg, STARS])
    return params
