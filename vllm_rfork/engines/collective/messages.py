"""The messages of the control connection, as JSON with bounded fields.

A receiver sends :class:`Join` once; then both sides create the group, with :class:`Share` for what its library wants to
exchange. Each :class:`Read` is answered with :class:`Sending`, the bytes in the group, and :class:`Sent`. The seed may
answer :class:`Refused` instead of :class:`Joined`, of :class:`Sending` and of :class:`Sent`.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from vllm_rfork.engines.collective.channel import Channel, Lost

VERSION = 1
#: Segments of one request.
MAX_SEGMENTS = 8192
#: Bound of each short message, in seconds.
MESSAGE_S = 5.0
#: Bytes per second below which a batch is given up.
_MIN_BYTES_PER_S = 20e6
_Address = Annotated[int, msgspec.Meta(gt=0, lt=1 << 62)]
_MAX_S = 3600.0
_Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=_MAX_S)]


class Join(msgspec.Struct, tag="join", frozen=True):
    """The request for a group.

    Attributes:
        backend: ``tcp``, ``nccl`` or ``hccl``.
        lease: the planner's lease of the receiver, for the seed's log; empty without a planner.
    """

    v: int
    backend: Annotated[str, msgspec.Meta(max_length=16)]
    lease: Annotated[str, msgspec.Meta(max_length=256)]
    timeout_s: _Seconds


class Joined(msgspec.Struct, tag="joined", frozen=True):
    """The seed creates its side of the group now."""


class Share(msgspec.Struct, tag="share", frozen=True):
    """A value that the group's library publishes under ``key`` while a group is created."""

    key: Annotated[str, msgspec.Meta(max_length=256)]
    value: Annotated[bytes, msgspec.Meta(max_length=64 * 1024)]


class Read(msgspec.Struct, tag="read", frozen=True):
    """The request for bytes: addresses in the seed and lengths."""

    segments: Annotated[list[tuple[_Address, _Address]], msgspec.Meta(max_length=MAX_SEGMENTS)]
    timeout_s: _Seconds


class Sending(msgspec.Struct, tag="sending", frozen=True):
    """The segments are valid, and their bytes follow in the group, in order."""


class Sent(msgspec.Struct, tag="sent", frozen=True):
    """All bytes have left, and the seed's engine was open all the time."""


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """Nothing more is sent for the request. ``code``: ``busy``, ``lane``, ``address`` or empty."""

    text: Annotated[str, msgspec.Meta(max_length=1024)]
    code: Annotated[str, msgspec.Meta(max_length=16)] = ""


Message = Join | Joined | Share | Read | Sending | Sent | Refused
M = TypeVar("M", bound=Message)
_decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


def bounded_s(seconds: float) -> float:
    """``seconds`` as a message may contain them; the seed has bounds of its own, which are shorter."""
    return min(max(0.0, seconds), _MAX_S)


def batch_bound_s(nbytes: int) -> float:
    """Seconds after which either side gives up a batch of ``nbytes``."""
    return MESSAGE_S + nbytes / _MIN_BYTES_PER_S


def send(channel: Channel, message: Message, deadline: float) -> None:
    """Send ``message``. Raises Lost."""
    channel.send(msgspec.json.encode(message), deadline)


def receive(channel: Channel, expected: type[M], deadline: float) -> M:
    """The next message.

    Raises:
        Lost: the peer is gone or too slow, or sent anything else.
        Refusal: the seed refused.
    """
    try:
        message = _decoder.decode(channel.receive(deadline))
    except (msgspec.DecodeError, RecursionError) as error:
        raise Lost(f"the peer's message is unusable: {error}") from error
    if isinstance(message, Refused):
        raise Refusal(message)
    if not isinstance(message, expected):
        raise Lost(f"the peer sent {type(message).__name__} where {expected.__name__} was due")
    return message


class Refusal(Exception):
    """The seed refused a request; the connection stays usable if it was a read."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.text)
        self.code = refused.code
