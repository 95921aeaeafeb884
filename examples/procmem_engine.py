"""An example engine: a receiver reads its seed's memory through /proc/PID/mem. One host, one user, host memory.

A distribution adds an engine by an entry point, in its pyproject.toml:

    [project.entry-points."vllm_rfork.engines"]
    procmem = "procmem_engine:ProcMemEngine"

Then ``rfork_engine=procmem`` and ``vllm-rfork selftest --engine procmem`` use it. It keeps the port's contract:
tests/contracts/test_example_engine.py runs the suite of ``vllm_rfork.testing`` on it.
"""

from __future__ import annotations

import ctypes
import json
import os
import time
from collections.abc import Sequence
from typing import ClassVar

from vllm_rfork.engines.base import EngineConfig, Limits, TransferEngine
from vllm_rfork.engines.registrations import RegionTable
from vllm_rfork.errors import EngineError, Side
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment

CHUNK_NBYTES = 16 << 20  # the deadline is checked after each


class ProcMemEngine(TransferEngine):
    """See the module's docstring."""

    name: ClassVar[str] = "procmem"
    device_types: ClassVar[frozenset[str]] = frozenset({"cpu"})
    limits: ClassVar[Limits] = Limits(max_batch_nbytes=256 << 20, max_batch_items=65536)

    def __init__(self) -> None:
        self._token = ctypes.create_string_buffer(16)  # random while the engine is open; receivers compare it
        self._table = RegionTable(self.name)
        self._peers: dict[str, tuple[int, int, bytes, RegionTable]] = {}  # endpoint → file, token's address, token

    def open(self, config: EngineConfig) -> None:
        """Draw the token."""
        if config.device != "cpu" or any(self._token.raw):
            raise EngineError(self.name, "open", f"it is open already, or cannot read {config.device}")
        self._token.raw = os.urandom(16)

    @property
    def endpoint(self) -> str:
        """The process, the token with its address, and the regions."""
        regions = [(each.address, each.nbytes) for each in self._table.regions]
        return json.dumps([os.getpid(), ctypes.addressof(self._token), self._token.raw.hex(), regions])

    def register(self, regions: Sequence[Region]) -> None:
        """Record the regions: any memory of the process can be read."""
        self._require_open("register")
        self._table.check_new(regions)
        self._table.add(regions)

    def connect(self, endpoint: str, timeout_s: float) -> None:
        """Open the seed's memory and compare the token in it."""
        self._require_open("connect")
        self.disconnect(endpoint)
        try:
            pid, address, token, regions = json.loads(endpoint)
            table = RegionTable(self.name)
            table.add(Region(*each) for each in regions)
            peer = (os.open(f"/proc/{pid}/mem", os.O_RDONLY), int(address), bytes.fromhex(token), table)
        except (ValueError, TypeError, OSError, RecursionError) as error:  # it is text of another machine
            raise self._failed("connect", f"the endpoint is unusable: {error}", "seed") from error
        self._peers[endpoint] = peer
        self._check_token(peer, "connect")

    def read(self, endpoint: str, segments: Sequence[Segment], timeout_s: float) -> None:
        """Check every segment, then copy chunk by chunk."""
        deadline = time.monotonic() + timeout_s
        self._require_open("read")
        if (peer := self._peers.get(endpoint)) is None:
            raise self._failed("read", "the peer is not connected", "receiver")
        self._check_token(peer, "read")
        self._table.check_local(segments)
        if outside := [each for each in segments if not peer[3].holds(each.remote, each.nbytes)]:
            raise self._failed("read", f"the seed has not registered {outside[0]}", "seed")
        for local, remote, nbytes in segments:
            for start in range(0, nbytes, CHUNK_NBYTES):
                if time.monotonic() > deadline:
                    raise self._failed("read", f"not done within {timeout_s:g} s", "unknown")
                self._copy(peer[0], local + start, remote + start, min(CHUNK_NBYTES, nbytes - start), "read")

    def disconnect(self, endpoint: str) -> None:
        """Close the seed's memory."""
        if (peer := self._peers.pop(endpoint, None)) is not None:
            os.close(peer[0])

    @property
    def registered_nbytes(self) -> int:
        """Bytes registered now."""
        return self._table.nbytes

    def close(self) -> None:
        """Erase the token, so that no receiver trusts the memory any more."""
        self._token.raw = bytes(16)
        self._table.clear()
        for endpoint in list(self._peers):
            self.disconnect(endpoint)

    def _require_open(self, operation: str) -> None:
        if not any(self._token.raw):
            raise self._failed(operation, "it is not open", "receiver")

    def _check_token(self, peer: tuple[int, int, bytes, RegionTable], operation: str) -> None:
        found = ctypes.create_string_buffer(16)
        self._copy(peer[0], ctypes.addressof(found), peer[1], 16, operation)
        if found.raw != peer[2]:
            raise self._failed(operation, "the seed has closed its engine", "seed")

    def _copy(self, file: int, local: int, remote: int, nbytes: int, operation: str) -> None:
        while nbytes:
            try:
                done = os.preadv(file, [(ctypes.c_char * nbytes).from_address(local)], remote)
            except (OSError, OverflowError) as error:
                raise self._failed(operation, f"/proc/PID/mem: {error}", "seed") from error
            if not done:
                raise self._failed(operation, "the seed's process has ended", "seed")
            local, remote, nbytes = local + done, remote + done, nbytes - done

    def _failed(self, operation: str, text: str, side: Side) -> EngineError:
        return EngineError(self.name, operation, text, side=side, retry_elsewhere=side != "receiver")
