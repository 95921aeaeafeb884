"""Every error that the package raises, and the decision that each one carries.

    RForkError
    ├── ConfigError            a bad or unknown setting; fails the start and names the field
    ├── CacheError             a cache cannot be offered, received or installed; vLLM computes it as usual
    └── ForkError              this fork did not happen; the worker loads from storage
        ├── NoSeedAvailable    no worker has the weights yet; normal on a cold start
        ├── PlannerError       the planner is unreachable, refused, or revoked the lease
        ├── SeedError          the seed's failure: gone, another epoch, an unusable manifest
        │   └── SeedBusy       it sends as much as it may; a later attempt succeeds
        ├── ManifestMismatch   nobody's failure: the keys are equal, the tensors are not
        ├── EngineError        native code failed: engine, operation, code and text
        │   └── EngineUnavailable   the engine's package, or a library that it needs, is missing
        └── VerificationError  bytes arrived and they are wrong

A ForkError never fails a start: the load machine (``load/machine.py``) falls back to storage, and background tasks log
it. Texts are made printable and shortened here, because they quote planners and seeds and end in logs and terminals.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from vllm_rfork.logs.quoting import MAX_MESSAGE, counted, printable

#: The side that failed, as far as it is known: ``seed``, ``receiver`` (this process, its machine, its settings, or
#: nobody in particular), or ``unknown`` (the network, or a peer that does not answer). The planner does not count a
#: ``receiver`` failure against a seed.
Side = Literal["seed", "receiver", "unknown"]


class RForkError(Exception):
    """Base of every error that this package raises.

    Args:
        message: may quote text from elsewhere; kept as one printable line of at most ``MAX_MESSAGE`` characters.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message, MAX_MESSAGE))


class ConfigError(RForkError, ValueError):
    """A setting is wrong; the start fails.

    Args:
        field: the option's published name, such as ``rfork_seed_timeout_sec``.
        problem: what is wrong; without the value if that may be a secret.
        accepts: the values that the field accepts, in a user's words.
    """

    def __init__(self, field: str, problem: str, accepts: str) -> None:
        self.field = field
        self.problem = problem
        self.accepts = accepts
        super().__init__(f"{field}: {problem}; it accepts {accepts}")


class CacheError(RForkError):
    """A cache of a compiler or profiler cannot be offered, received or installed. It costs nothing but its transfer."""


class ForkError(RForkError):
    """This fork did not happen; the worker loads from storage.

    Attributes:
        retry_elsewhere: another seed may succeed.
        side: the side that failed.
    """

    def __init__(self, message: str, *, retry_elsewhere: bool = False, side: Side = "unknown") -> None:
        super().__init__(message)
        self.retry_elsewhere = retry_elsewhere
        self.side: Side = side


class NoSeedAvailable(ForkError):
    """The planner has no free seed for the key (HTTP 404).

    Attributes:
        intent_granted: the planner has recorded that this worker loads from storage, so others may wait for it.
        reason: one of ``messages.MISSES``; empty if the planner sends none.
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
    """The planner is unreachable or too slow, sent an unusable answer, or revoked the lease."""

    def __init__(self, message: str, *, retry_elsewhere: bool = False) -> None:
        super().__init__(message, retry_elsewhere=retry_elsewhere, side="receiver")


class SeedError(ForkError):
    """The seed's failure: gone, hanging, another key or epoch, a malformed or too large manifest.

    Attributes:
        other_fingerprint: the seed's, if it differs from the receiver's: then it is nobody's failure.
        side: ``receiver`` for a seed that is sound, but of no use to this worker.
    """

    def __init__(
        self, message: str, *, retry_elsewhere: bool = True, other_fingerprint: str = "", side: Side = "seed"
    ) -> None:
        super().__init__(message, retry_elsewhere=retry_elsewhere, side="receiver" if other_fingerprint else side)
        self.other_fingerprint = other_fingerprint


class SeedBusy(SeedError):
    """The seed sends as much at once as it may; ask again."""


class ManifestMismatch(ForkError):
    """Seed and receiver have different tensors under one key. Contains all differences.

    Args:
        differences: one line per difference, in the receiver's order; at least one. Each is shortened to
            ``MAX_DIFFERENCE`` printable characters.
        summary: the beginning of the message.
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
        text: the engine's own text, or a description.
        code: the engine's own code, by its name if it has one.
        retry_elsewhere: another seed may succeed; None for the default, which is true if the seed has failed.
        in_flight: bytes of an abandoned read may still arrive. The buffers belong to the engine until it is closed,
            or until the process ends if that fails too.
        side: the side that failed. ``connect`` and ``read`` involve a peer and must state it; their default is
            ``unknown``. The default of all other operations is ``receiver``, which here means this process.
    """

    def __init__(
        self,
        engine: str,
        operation: str,
        text: str,
        *,
        code: str = "",
        retry_elsewhere: bool | None = None,
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
            retry_elsewhere=side == "seed" and not in_flight if retry_elsewhere is None else retry_elsewhere,
            side=side or ("unknown" if operation in ("connect", "read") else "receiver"),
        )


class EngineUnavailable(EngineError):
    """The engine's package, or a library that it needs, is not installed on this machine."""

    def __init__(self, engine: str, text: str, *, hint: str) -> None:
        self.hint = hint
        super().__init__(engine, "open", f"{text}; {hint}")


class VerificationError(ForkError):
    """Bytes arrived and they are wrong: the digest of a tensor differs from the seed's."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_elsewhere=True, side="seed")


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
