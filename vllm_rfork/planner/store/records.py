"""Records that outlive the process: which of them have changed, and their form as text.

A :class:`Book` holds the records of one kind by name. With a :class:`Journal` it notes every record that is added,
removed or changed, so that a store can write exactly those. Without one it is a dictionary. No clock, no I/O.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar, Generic, TypeVar

import msgspec

#: The kind of a record, and its name among those of its kind.
Place = tuple[str, str]
R = TypeVar("R")


class Record:
    """Base of dataclasses that change while they are in a book: the journal notes every change of a field.

    ``VOLATILE`` fields change without a note, because a successor computes them again. A field that a later version
    adds needs a default, so that the records of an earlier version can be read.
    """

    __slots__ = ("_noted",)
    VOLATILE: ClassVar[frozenset[str]] = frozenset()

    def __setattr__(self, name: str, value: object) -> None:
        noted: tuple[dict[Place, None], Place] | None = getattr(self, "_noted", None)
        if noted is not None and name not in self.VOLATILE and getattr(self, name) != value:
            noted[0][noted[1]] = None
        object.__setattr__(self, name, value)


class Journal:
    """The books to write, and the places in them that have changed since the last :meth:`take`."""

    def __init__(self) -> None:
        self.books: dict[str, Book[Any]] = {}
        self.changed: dict[Place, None] = {}

    def take(self) -> list[tuple[str, str, str]]:
        """Kind, name and text of each changed record in the order of change; an empty text: the record is gone."""
        places = list(self.changed)
        self.changed.clear()
        found = ((kind, name, self.books[kind].get(name)) for kind, name in places)
        return [(kind, name, "" if record is None else encode(record)) for kind, name, record in found]


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
        """Remove and return the record called ``name``; ``default`` where there is none."""
        record = self.get(name, default)
        if name in self:
            del self[name]
        return record


def encode(record: Any) -> str:
    """A dataclass as one line of ASCII. Keys of seeds may hold lone surrogates, which only this JSON keeps."""
    values = {each.name: getattr(record, each.name) for each in dataclasses.fields(record)}
    return json.dumps(values, default=msgspec.to_builtins, separators=(",", ":"))


def decode(text: str | bytes, record_type: type[R]) -> R:
    """The record that :func:`encode` wrote; unknown fields are ignored.

    Raises:
        ValueError: ``text`` is not such a record.
    """
    try:
        return msgspec.convert(json.loads(text), record_type)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error
