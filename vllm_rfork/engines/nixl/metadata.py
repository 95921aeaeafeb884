"""The structure of an agent's metadata as NIXL 1.5 writes it, validated before NIXL reads it.

NIXL's reader trusts lengths, counts and kinds of memory: two changed bytes among them end the process (SIGSEGV or
SIGABRT), and no exception can be caught. So NIXL never gets metadata that does not parse here completely. Two parts are
UCX's own: a worker's address and each registration's key. In both, the one byte that can end the process is checked.
The endpoint's checksum covers them (``peer.py``). A peer that computes the checksum over bytes of its choice may still
find some that crash UCX.

A field is a tag, its length (8 bytes, little-endian), its bytes and ``|``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

_BEGIN = b"nixlSerDes|"
_LENGTH = struct.Struct("<Q")
_KIND = struct.Struct("<I")
_REGISTRATION = struct.Struct("<QQQ")  # address, bytes, device number; the key follows

#: Printable, since NIXL and UCX use it as a text; ours are ``rfork-`` and 32 hexadecimal digits.
_AGENT = re.compile(rb"[\x21-\x7e]{1,128}")
_BACKEND = b"UCX"
#: NIXL's numbers of the kinds of memory that the engine registers: DRAM and VRAM.
_KINDS = frozenset({0, 1})
#: One backend, and a section of registrations for each kind of memory.
MAX_BACKENDS = 4
MAX_SECTIONS = 4
#: UCX's address of a worker: about 200 bytes, more with many interfaces.
MAX_ADDRESS_NBYTES = 64 * 1024
#: UCX's key of one registration: 11 bytes, about 100 per interface with RDMA.
MAX_KEY_NBYTES = 16 * 1024
MAX_DEVICES = 1024
_END_OF_MEMORY = 1 << 63
#: Kinds of memory as UCX numbers them in a key: host, CUDA, CUDA managed.
_KEY_KINDS = frozenset({0, 1, 2})

#: UCX's address of a worker begins with its version (lower half; 0 and 1 exist) and flags (upper half): debug names,
#: the worker's id, a client's id, active messages only. Workers that are read from have an id, and no more than names.
_ADDRESS_BEGINS = frozenset({0x20, 0x21, 0x30, 0x31})


def check_metadata(metadata: bytes, identity_at: int, identity_nbytes: int) -> None:
    """Raise :class:`ValueError` with the place if ``metadata`` is not as NIXL writes it.

    Args:
        identity_at, identity_nbytes: the memory that the engine compares on every connection; it must be registered.
    """
    fields = _Fields(metadata)
    if not _AGENT.fullmatch(fields.take(b"Agent", 128)):
        raise ValueError("the agent's name is not printable text")
    for _ in range(_number(fields, b"Conns", MAX_BACKENDS)):
        if fields.take(b"t", 32) != _BACKEND:
            raise ValueError("a backend is not UCX")
        worker = fields.take(b"c", MAX_ADDRESS_NBYTES)
        if not worker or worker[0] not in _ADDRESS_BEGINS:
            raise ValueError("a worker's address is not UCX's")
    if fields.take(b"", 32) != b"MemSection":
        raise ValueError("the list of registered memory is missing")
    identity_is_there = False
    for _ in range(_number(fields, b"nixlSecElms", MAX_SECTIONS)):
        if fields.take(b"bknd", 32) != _BACKEND or fields.take(b"nixlDList", 32) != b"nixlSDList":
            raise ValueError("a section of registered memory is not UCX's")
        kind = fields.take(b"t", _KIND.size, exactly=True)
        if _KIND.unpack(kind)[0] not in _KINDS:
            raise ValueError("a section has an unknown kind of memory")
        for address, nbytes in _registrations(fields):
            identity_is_there |= address <= identity_at and identity_at + identity_nbytes <= address + nbytes
    fields.end()
    if not identity_is_there:
        raise ValueError("the memory that identifies the engine is not registered")


def _registrations(fields: _Fields) -> Iterator[tuple[int, int]]:
    """Address and length of each registration in a section."""
    # At most one for each remaining byte: each entry has more than one.
    for _ in range(_number(fields, b"n", fields.left)):
        entry = fields.take(b"", _REGISTRATION.size + MAX_KEY_NBYTES)
        if not _is_key(entry[_REGISTRATION.size :]):
            raise ValueError("a registration's key is not UCX's")
        address, nbytes, device = _REGISTRATION.unpack_from(entry)
        if not 0 < address < address + nbytes <= _END_OF_MEMORY or device >= MAX_DEVICES:
            raise ValueError("a registration's address is impossible")
        yield address, nbytes


def _is_key(key: bytes) -> bool:
    """Return True if ``key`` may be UCX's: a map of memory domains (8 bytes), a kind of memory, a part for each domain.

    A part begins with its length. The bytes after the last part describe the memory's location and are ignored.
    """
    if len(key) <= _LENGTH.size or key[_LENGTH.size] not in _KEY_KINDS:
        return False
    at = _LENGTH.size + 1
    for _ in range(bin(_LENGTH.unpack_from(key)[0]).count("1")):
        if at >= len(key):
            return False
        at += 1 + key[at]
    return at <= len(key)


def _number(fields: _Fields, tag: bytes, most: int) -> int:
    value: int = _LENGTH.unpack(fields.take(tag, _LENGTH.size, exactly=True))[0]
    if value > most:
        raise ValueError(f"{tag.decode()} is {value}, more than {most}")
    return value


class _Fields:
    """A reader of one field after another."""

    def __init__(self, metadata: bytes) -> None:
        if not metadata.startswith(_BEGIN):
            raise ValueError("it does not begin like NIXL's metadata")
        self._bytes = metadata
        self._at = len(_BEGIN)

    @property
    def left(self) -> int:
        """The number of unread bytes."""
        return len(self._bytes) - self._at

    def take(self, tag: bytes, most: int, *, exactly: bool = False) -> bytes:
        """The bytes of the next field, which must be ``tag`` and have at most, or ``exactly``, ``most`` bytes."""
        start = self._at + len(tag) + _LENGTH.size
        if not self._bytes.startswith(tag, self._at) or start > len(self._bytes):
            raise ValueError(f"there is no {tag.decode()!r} at byte {self._at}")
        (nbytes,) = _LENGTH.unpack_from(self._bytes, self._at + len(tag))
        if nbytes > most or (exactly and nbytes != most):
            raise ValueError(f"{tag.decode()!r} at byte {self._at} has {nbytes} bytes, and may have {most}")
        end = start + nbytes
        if self._bytes[end : end + 1] != b"|":
            raise ValueError(f"{tag.decode()!r} at byte {self._at} does not end where it should")
        self._at = end + 1
        return self._bytes[start:end]

    def end(self) -> None:
        """Raise if bytes are left."""
        if self.left:
            raise ValueError(f"{self.left} bytes follow its end")
