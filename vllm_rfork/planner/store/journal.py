"""Records that outlive the process: which of them changed, and their form as text.

A :class:`Book` holds the records of one kind by name. With a :class:`Journal` it notes every record that is added,
removed or changed, so that a store can write exactly those. Without one it is a dictionary.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, Generic, TypeVar

import msgspec

#: The kind of a record, and its name among those of its kind.
Place = tuple[str, str]
R = TypeVar("R")


class Record:
    """Base of dataclasses that change while they are in a book: the journal notes every change of a field.

    Fields in ``VOLATILE`` change without a note, because a successor computes them again. A field that a later version
    adds needs a default, so that records of an earlier version can be read.
    """

    __slots__ = ("_noted",)
    VOLATILE: ClassVar[frozenset[str]] = frozenset()

    def __setattr__(self, name: str, value: object) -> None:
        noted: tuple[dict[Place, None], Place] | None = getattr(self, "_noted", None)
        if noted is not None and name not in self.VOLATILE and getattr(self, name) != value:
            noted[0][noted[1]] = None
        object.__setattr__(self, name, value)


class Journal:
    """The books to write, and the places in them that changed since the last :meth:`take`."""

    def __init__(self) -> None:
        self.books: dict[str, Book[Any]] = {}
        self.changed: dict[Place, None] = {}

    def take(self) -> list[tuple[str, str, bytes]]:
        """Return kind, name and text of each changed record in the order of change. Empty text: it was removed."""
        places = list(self.changed)
        self.changed.clear()
        found = ((kind, name, self.books[kind].get(name)) for kind, name in places)
        return [(kind, name, b"" if record is None else encode(record)) for kind, name, record in found]


class Book(dict[str, R], Generic[R]):
    """The records of one ``kind`` by name; each is a dataclass of type ``record_type``.

    ``in_order``: names are numbers, and a successor reads the records in their order. Use ``[]``, ``del`` and ``pop``
    to change it: the other methods of a dictionary are not noted.
    """

    def __init__(
        self, kind: str, record_type: type[R], journal: Journal | None = None, *, in_order: bool = False
    ) -> None:
        super().__init__()
        self.in_order = in_order
        self.kind = kind
        self.record_type = record_type
        self._journal = journal
        if journal is not None:
            journal.books[kind] = self

    def __setitem__(self, name: str, record: R) -> None:
        super().__setitem__(name, record)
        if self._journal is not None:
            self._journal.changed[self.kind, name] = None
            if isinstance(record, Record):
                object.__setattr__(record, "_noted", (self._journal.changed, (self.kind, name)))

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        if self._journal is not None:
            self._journal.changed[self.kind, name] = None

    def pop(self, name: str, default: Any = None) -> Any:
        """Remove and return the record called ``name``; ``default`` if there is none."""
        record = self.get(name, default)
        if name in self:
            del self[name]
        return record


def encode(record: Any) -> bytes:
    """Return a dataclass as one line of JSON."""
    try:
        return msgspec.json.encode(record)
    except UnicodeEncodeError:
        # A key that arrived as other bytes than UTF-8 contains lone surrogates, which only Python's JSON keeps.
        return json.dumps(msgspec.to_builtins(record)).encode("ascii")


def decode(text: str | bytes, record_type: type[R]) -> R:
    """Return the record that :func:`encode` wrote; unknown fields are ignored.

    Raises:
        ValueError: ``text`` is not such a record.
    """
    try:
        return msgspec.convert(json.loads(text), record_type)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error
