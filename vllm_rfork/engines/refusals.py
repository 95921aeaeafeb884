"""Errors with which every adapter refuses a call that it cannot make."""

from __future__ import annotations

from vllm_rfork.errors import EngineError


def busy(engine: str, operation: str, *, in_flight: bool = False, retry_elsewhere: bool = False) -> EngineError:
    """Another call is under way and did not return within the bound."""
    return EngineError(
        engine,
        operation,
        "another call does not return",
        code="timeout",
        in_flight=in_flight,
        retry_elsewhere=retry_elsewhere,
        side="receiver",
    )


def not_open(engine: str, operation: str) -> EngineError:
    """The engine was never opened, is closed, or is closing."""
    return EngineError(engine, operation, "it is not open", side="receiver")


def not_connected(engine: str, operation: str) -> EngineError:
    """``connect`` was not called for this peer, or the peer was forgotten since."""
    return EngineError(engine, operation, "the peer is not connected", side="receiver")


def still_called(engine: str) -> EngineError:
    """``close`` waited in vain for a native call: the memory stays the engine's."""
    return EngineError(engine, "close", "a native call does not return", code="timeout", in_flight=True)


def given_up(engine: str, operation: str, why: str) -> EngineError:
    """Bytes of an earlier read may still arrive, so only ``close`` is possible."""
    text = f"an earlier read was given up ({why}): close the engine"
    return EngineError(engine, operation, text, in_flight=True, side="receiver")
