"""Every error the package raises, and the decision each one carries.

    RForkError
    ├── ConfigError            a bad or unknown setting; fails the start and names the field
    └── ForkError              this fork did not happen; the loader falls back to storage
        ├── NoSeedAvailable    nobody has the weights yet; normal on a cold start
        ├── PlannerError       the planner is unreachable, refused, or took the lease back
        ├── SeedError          the seed's fault: gone, another epoch, a manifest that cannot be read
        ├── ManifestMismatch   nobody's fault: the keys are equal, the bytes are not
        ├── EngineError        native code failed: engine, operation, code and text
        │   └── EngineUnavailable   the engine's package or a library it needs is not there
        └── VerificationError  bytes arrived and they are wrong

Only ``loader.py`` and the guards of background tasks catch :class:`ForkError`. Nothing in the package
returns ``None`` or ``False`` to mean failure. Every text is made printable and cut here, whoever wrote what it quotes:
errors end in logs, in terminals and at other ranks. Must not import anything of the package but ``quoting``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from vllm_rfork.logs.quoting import MAX_MESSAGE, counted, printable

#: Whose failure it was, as far as can be seen: ``seed``, ``receiver`` (this process, its machine, its settings, or
#: nobody in particular), or ``unknown`` (the network, or a peer that does not answer). The planner counts a
#: ``receiver`` failure against no seed.
Side = Literal["seed", "receiver", "unknown"]


class RForkError(Exception):
    """Base of everything this package raises on purpose.

    Args:
        message: may quote text from elsewhere; kept as one printable line of at most ``MAX_MESSAGE`` characters.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message, MAX_MESSAGE))


class ConfigError(RForkError, ValueError):
    """A setting is wrong; the start fails.

    Args:
        field: the option's published name, such as ``rfork_seed_timeout_sec``.
        problem: what is wrong with the value, without the value where it may be a secret.
        accepts: what the field does accept, in a user's words.
    """

    def __init__(self, field: str, problem: str, accepts: str) -> None:
        self.field = field
        self.problem = problem
        self.accepts = accepts
        super().__init__(f"{field}: {problem}; it accepts {accepts}")


class ForkError(RForkError):
    """This fork did not happen; the loader falls back.

    Attributes:
        mutated: the receiver's tensors may have been written to: rebuild the model before loading it.
        retry_elsewhere: another seed may well succeed where this one failed.
        side: whose failure it was.
    """

    def __init__(
        self, message: str, *, mutated: bool = False, retry_elsewhere: bool = False, side: Side = "unknown"
    ) -> None:
        super().__init__(message)
        self.mutated = mutated
        self.retry_elsewhere = retry_elsewhere
        self.side: Side = side


class NoSeedAvailable(ForkError):
    """The planner knows no free seed for the key (HTTP 404): a cold start.

    Attributes:
        intent_granted: the planner remembers that this worker loads from storage and others may wait for it.
        reason: one of ``messages.MISSES``; empty from a planner that gives none.
        others: seeds of this key with other fingerprints, as ``messages.OtherSeeds``.
    """

    def __init__(
        self, message: str, *, intent_granted: bool = False, reason: str = "", others: Sequence[Any] = ()
    ) -> None:
        super().__init__(message, side="receiver")
        self.intent_granted = intent_granted
        self.reason = reason
        self.others = tuple(others)


class PlannerError(ForkError):
    """The planner is unreachable, too slow, answered something unusable, or took the lease back."""

    def __init__(self, message: str, *, mutated: bool = False, retry_elsewhere: bool = False) -> None:
        super().__init__(message, mutated=mutated, retry_elsewhere=retry_elsewhere, side="receiver")


class SeedError(ForkError):
    """The seed's fault: gone, hanging, another key or epoch, a manifest that is malformed or too large.

    Attributes:
        other_fingerprint: the seed's, where it is another than the receiver's: then it is nobody's fault.
    """

    def __init__(
        self, message: str, *, mutated: bool = False, retry_elsewhere: bool = True, other_fingerprint: str = ""
    ) -> None:
        side: Side = "receiver" if other_fingerprint else "seed"
        super().__init__(message, mutated=mutated, retry_elsewhere=retry_elsewhere, side=side)
        self.other_fingerprint = other_fingerprint


class ManifestMismatch(ForkError):
    """Seed and receiver hold different tensors under one key; carries every difference at once.

    Args:
        differences: one line per difference, in the receiver's order; never empty. Each is kept as a printable line
            of at most ``MAX_DIFFERENCE`` characters.
        summary: what differs, before the number of differences.
    """

    SHOWN = 20
    #: Characters of one difference: two long names and two values.
    MAX_DIFFERENCE = 600

    def __init__(
        self,
        differences: Sequence[str],
        *,
        summary: str = "seed and receiver do not hold the same tensors",
        retry_elsewhere: bool = False,
    ) -> None:
        self.differences = [printable(each, self.MAX_DIFFERENCE) for each in differences]
        shown = "; ".join(self.differences[: self.SHOWN])
        more = len(self.differences) - self.SHOWN
        tail = f"; and {more} more" if more > 0 else ""
        number = counted(len(self.differences), "difference")
        super().__init__(
            f"{summary} ({number}): {shown}{tail}",
            side="receiver",
            retry_elsewhere=retry_elsewhere,
        )


class EngineError(ForkError):
    """Native transfer code failed.

    Args:
        engine: the engine's name in ``rfork_engine``.
        operation: ``open``, ``register``, ``connect``, ``read`` or ``close``.
        text: what the engine said, or what was seen.
        code: the engine's own code, by name where it has one.
        in_flight: a read was abandoned and the engine cannot say that it will write no more. The buffers
            belong to the wire until the engine is closed, or for good where closing it fails too.
        side: whose failure it was. ``connect`` and ``read`` involve a peer and must state it; by default they count
            as ``unknown``, and every other operation as ``receiver``, which here means this process.
    """

    def __init__(
        self,
        engine: str,
        operation: str,
        text: str,
        *,
        code: str = "",
        mutated: bool = False,
        retry_elsewhere: bool = False,
        in_flight: bool = False,
        side: Side | None = None,
    ) -> None:
        self.engine = engine
        self.operation = operation
        self.text = text
        self.code = code
        self.in_flight = in_flight
        coded = f" [{code}]" if code else ""
        super().__init__(
            f"engine {engine}: {operation} failed{coded}: {text}",
            mutated=mutated,
            retry_elsewhere=retry_elsewhere,
            side=side or ("unknown" if operation in ("connect", "read") else "receiver"),
        )


class EngineUnavailable(EngineError):
    """The engine's package, or a library that it needs, is not on this machine."""

    def __init__(self, engine: str, text: str, *, hint: str) -> None:
        self.hint = hint
        super().__init__(engine, "open", f"{text}; {hint}")


class VerificationError(ForkError):
    """Bytes arrived and they are wrong: the digest over a receiver's tensor is not the seed's."""

    def __init__(self, message: str) -> None:
        super().__init__(message, mutated=True, retry_elsewhere=True, side="seed")


@contextlib.contextmanager
def as_fork_error(what: str) -> Iterator[None]:
    """Wrap third-party exceptions, an allocator's for instance, in ForkError: a load must not fail because of us.

    ``what`` failed, for the message.
    """
    try:
        yield
    except ForkError:
        raise
    except Exception as error:
        raise ForkError(f"{what}: {type(error).__name__}: {error}") from error
