"""torch's key-value store for a group of two, over the control connection of the two.

torch's own TCPStore listens on every interface and admits everyone; this one exchanges the few values that a library
publishes when it creates a group. It is never used afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from vllm_rfork.engines.collective.channel import Channel, Lost
from vllm_rfork.engines.collective.messages import Share, receive, send

try:
    from torch.distributed import Store
except ImportError:  # imported all the same, by what lists modules
    Store = object

#: Values that a peer may publish.
_MAX_VALUES = 64


class RelayStore(Store):  # type: ignore[misc] # torch does not type it
    """A store whose ``set`` reaches the peer, and whose ``get`` waits for the peer's ``set``.

    Args:
        channel: used by no other thread while a group is created.
        deadline: bound of every call.
        problem: called with a value and the address of the side that publishes it; returns what is wrong with it.
            Libraries trust these values, and crash on some.

    Attributes:
        lost: the failure of the channel, which torch reports as an error of its own.
    """

    def __init__(self, channel: Channel, deadline: float, problem: Callable[[bytes, str], str | None]) -> None:
        super().__init__()
        self._problem = problem
        self._channel = channel
        self._deadline = deadline
        self._values: dict[str, bytes] = {}
        self.lost: Lost | None = None

    def set(self, key: str, value: bytes) -> None:
        """Publish a value. Raises Lost."""
        self._values[key] = bytes(value)
        try:
            self._check(bytes(value), self._channel.local_host)
            send(self._channel, Share(key, bytes(value)), self._deadline)
        except Lost as error:
            self.lost = error
            raise

    def get(self, key: str) -> bytes:
        """The value of ``key``; waits for it. Raises Lost."""
        while key not in self._values:
            try:
                share = receive(self._channel, Share, self._deadline)
                if len(self._values) >= _MAX_VALUES:
                    raise Lost("the peer publishes too many values")
                self._check(share.value, self._channel.peer_host)
            except Lost as error:
                self.lost = error
                raise
            self._values[share.key] = share.value
        return self._values[key]

    def _check(self, value: bytes, host: str) -> None:
        if (problem := self._problem(value, host)) is not None:
            raise Lost(f"{host} publishes an unusable value: {problem}")

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until every key has a value."""
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        """Return True if every key has a value."""
        return all(key in self._values for key in keys)

    def has_extended_api(self) -> bool:
        """There are no queues and no multi-key calls."""
        return False
