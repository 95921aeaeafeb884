"""The engine of the stand-in; see the package's docstring."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import itertools
import json
import os
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CONTROL_BOUND_S = 10.0
MAX_ITEMS = 4096
ALIGNMENT = 2 << 20
BACKEND_KIND = "ascend"
_LENGTH = struct.Struct("<I")
_MAX_MESSAGE_NBYTES = 1 << 20


class ErrorCode(enum.IntEnum):
    """The codes of every generation."""

    kOk = 0
    kInvalid = 2
    kNotFound = 3
    kRuntimeError = 5
    kNotReady = 8
    kNotAuthorized = 9
    kNotSupported = 36


class Result:
    """The result of a call."""

    def __init__(self, code: ErrorCode = ErrorCode.kOk, text: str = "") -> None:
        self._code, self._text = code, text

    def is_ok(self) -> bool:
        return self._code is ErrorCode.kOk

    def is_error(self) -> bool:
        return self._code is not ErrorCode.kOk

    def get_code(self) -> ErrorCode:
        return self._code

    def get_msg(self) -> str:
        return self._text

    def to_string(self) -> str:
        return f"code={int(self._code)}, msg={self._text}"


@dataclass
class MemoryRegistration:
    """An argument of ``batch_register_memory_ex``."""

    addr: int
    size: int


class _Failure(Exception):
    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.result = Result(code, text)


class TransferEngine:
    """One engine; thread-safe as far as the adapter needs it."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None
        self._regions: dict[int, int] = {}
        self._links: dict[str, socket.socket] = {}  # to peers that this engine reads from
        self._served: set[socket.socket] = set()
        self._lock = threading.RLock()
        self._reading = 0

    # -- control ---------------------------------------------------------------------------------------------------

    def initialize(self, address: str, protocol: str, device: str) -> Result:
        host, _, port = address.rpartition(":")
        if self._listener is not None:
            return Result(ErrorCode.kInvalid, "already initialized")
        if protocol != BACKEND_KIND or not device.startswith("npu:"):
            return Result(ErrorCode.kInvalid, f"protocol {protocol} or device {device} is invalid")
        for candidate in self._candidates(int(port)):
            listener = socket.socket()
            try:
                listener.bind((host, candidate))
                listener.listen(64)
            except OSError:
                listener.close()
                continue
            self._listener = listener
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
            return Result()
        return Result(ErrorCode.kRuntimeError, f"no port of {host} can be bound")

    @staticmethod
    def _candidates(port: int) -> Sequence[int]:
        least, most = (int(os.environ.get(f"YR_TE_RPC_PORT_{end}", "0")) for end in ("MIN", "MAX"))
        return [port] if port or not most else range(least, most + 1)

    def get_rpc_port(self) -> int:
        return 0 if self._listener is None else int(self._listener.getsockname()[1])

    def get_route_policy(self) -> str:
        return os.environ.get("YR_TE_HIXL_ROUTE", "roce")

    def finalize(self) -> Result:
        with self._lock:
            if self._reading:
                return Result(ErrorCode.kNotReady, "a read is running")
            listener, self._listener = self._listener, None
            self._regions = {}
            self._disconnect_all()
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        return Result()

    # -- memory ----------------------------------------------------------------------------------------------------

    def batch_register_memory(self, addresses: list[int], lengths: list[int]) -> Result:
        with self._lock:
            if self._listener is None:
                return Result(ErrorCode.kNotReady, "not initialized")
            if not addresses or len(addresses) != len(lengths) or 0 in addresses or 0 in lengths:
                return Result(ErrorCode.kInvalid, "empty or unequal lists, or a zero")
            if self.get_route_policy() != "roce" and any(address % ALIGNMENT for address in addresses):
                return Result(ErrorCode.kInvalid, "a base is not aligned")
            merged = sorted([*self._regions.items(), *zip(addresses, lengths, strict=True)])
            if any(start + nbytes > after for (start, nbytes), (after, _) in itertools.pairwise(merged)):
                return Result(ErrorCode.kInvalid, "regions overlap")
            self._regions = dict(merged)
            self._disconnect_all()
            return Result()

    def batch_register_memory_ex(self, registrations: list[MemoryRegistration]) -> Result:
        return self.batch_register_memory([each.addr for each in registrations], [each.size for each in registrations])

    def batch_unregister_memory(self, addresses: list[int]) -> Result:
        with self._lock:
            if self._reading:
                return Result(ErrorCode.kNotReady, "a read is running")
            for address in addresses:
                if self._regions.pop(address, None) is None:
                    return Result(ErrorCode.kNotFound, f"{address:#x} is not registered")
            self._disconnect_all()
            return Result()

    def _holds(self, address: int, nbytes: int) -> bool:
        return any(start <= address and address + nbytes <= start + length for start, length in self._regions.items())

    def _disconnect_all(self) -> None:
        for link in [*self._links.values(), *self._served]:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        self._links, self._served = {}, set()

    # -- reading ---------------------------------------------------------------------------------------------------

    def batch_transfer_sync_read(self, peer: str, local: list[int], remote: list[int], lengths: list[int]) -> Result:
        if self._listener is None:
            return Result(ErrorCode.kNotReady, "not initialized")
        if not local or not len(local) == len(remote) == len(lengths) <= MAX_ITEMS:
            return Result(ErrorCode.kInvalid, "empty, unequal or too many items")
        if not all(self._holds(address, nbytes) for address, nbytes in zip(local, lengths, strict=True)):
            return Result(ErrorCode.kInvalid, "a destination is not registered")
        with self._lock:
            self._reading += 1
        try:
            link = self._link(peer)
            _send(link, {"items": list(zip(remote, lengths, strict=True))})
            _check(_receive(link))
            for address, nbytes in zip(local, lengths, strict=True):
                _fill(link, address, nbytes)
        except _Failure as failure:
            return failure.result
        except (OSError, ValueError) as error:
            self._forget(peer)
            return Result(ErrorCode.kRuntimeError, f"the peer failed: {error}")
        finally:
            with self._lock:
                self._reading -= 1
        return Result()

    def _link(self, peer: str) -> socket.socket:
        with self._lock:
            if peer in self._links:
                return self._links[peer]
        host, _, port = peer.rpartition(":")
        link = socket.create_connection((host, int(port)), CONTROL_BOUND_S)
        _send(link, {"kind": BACKEND_KIND, "route": self.get_route_policy()})
        _check(_receive(link))
        with self._lock:
            self._links[peer] = link
        return link

    def _forget(self, peer: str) -> None:
        with self._lock:
            link = self._links.pop(peer, None)
        if link is not None:
            link.close()

    # -- serving ---------------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = listener.accept()
                with self._lock:
                    self._served.add(link)
                threading.Thread(target=self._serve, args=(link,), daemon=True).start()

    def _serve(self, link: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), link:
            hello = _receive(link)
            same = hello == {"kind": BACKEND_KIND, "route": self.get_route_policy()}
            _send(link, _answer(ErrorCode.kOk if same else ErrorCode.kRuntimeError, "another kind or route"))
            while same:
                items = _receive(link)["items"]
                with self._lock:
                    allowed = all(self._holds(address, nbytes) for address, nbytes in items)
                _send(link, _answer(ErrorCode.kOk if allowed else ErrorCode.kNotAuthorized, "not registered"))
                for address, nbytes in items if allowed else ():
                    link.sendall((ctypes.c_char * nbytes).from_address(address))
        with self._lock:
            self._served.discard(link)


def _answer(code: ErrorCode, text: str) -> dict[str, Any]:
    return {"code": int(code), "text": text}


def _check(answer: Any) -> None:
    if answer["code"]:
        raise _Failure(ErrorCode(answer["code"]), answer["text"])


def _send(link: socket.socket, message: dict[str, Any]) -> None:
    text = json.dumps(message).encode()
    link.sendall(_LENGTH.pack(len(text)) + text)


def _receive(link: socket.socket) -> Any:
    (nbytes,) = _LENGTH.unpack(_exactly(link, _LENGTH.size))
    if nbytes > _MAX_MESSAGE_NBYTES:
        raise ValueError(f"a message of {nbytes} bytes")
    return json.loads(_exactly(link, nbytes))


def _exactly(link: socket.socket, nbytes: int) -> bytes:
    buffer = bytearray(nbytes)
    _fill_view(link, memoryview(buffer))
    return bytes(buffer)


def _fill(link: socket.socket, address: int, nbytes: int) -> None:
    _fill_view(link, memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B"))


def _fill_view(link: socket.socket, view: memoryview) -> None:
    done = 0
    while done < len(view):
        got = link.recv_into(view[done:])
        if not got:
            raise OSError("the connection ended")
        done += got
