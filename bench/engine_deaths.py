"""The behaviour of an engine when the other side is killed or stopped in the middle of reads."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from bench.engine_pair import Failed, Pair, Setting, Worker

#: How long a receiver reads on, in seconds, if nothing stops it.
READ_ON_S = 4.0
#: From the end of a first pass to the disturbance, in seconds: the next one is under way then.
LATER_S = 0.05
#: How long an answer may take after the disturbance, in seconds.
PATIENCE_S = 60.0
TENSORS = 200


def deaths(setting: Setting, nbytes: int) -> dict[str, str]:
    """The outcome of each disturbance, as text for the table."""
    return {
        "receiver killed": _outcome(setting, nbytes, _receiver_killed),
        "seed killed": _outcome(setting, nbytes, _seed_killed),
        "seed stopped": _outcome(setting, nbytes, _seed_stopped),
    }


def _outcome(setting: Setting, nbytes: int, disturbance: Callable[[Pair], str]) -> str:
    try:
        with Pair(setting, TENSORS, nbytes) as pair:
            return disturbance(pair)
    except Failed as error:
        return f"failed: {error}"


def _reading(pair: Pair) -> tuple[Worker, Worker]:
    """A seed, and a receiver in the middle of its second pass or a later one."""
    seed = pair.publish()
    receiver, _ = pair.receiver()
    receiver.send("read_on", seconds=READ_ON_S)
    message = receiver.message(PATIENCE_S)
    if message != {"event": "reading"}:
        raise Failed(f"the first pass failed: {message.get('failed', message)}")
    time.sleep(LATER_S)
    return seed, receiver


def _receiver_killed(pair: Pair) -> str:
    seed, receiver = _reading(pair)
    receiver.process.kill()
    receiver.process.wait(10)
    try:
        other, _ = pair.receiver()
        other.call("read")
    except Failed as error:
        return f"the next receiver: {_ended(seed) or error}"
    right = other.call("is_right")
    return _ended(seed) or f"the seed goes on; the next receiver's bytes are {'right' if right else 'WRONG'}"


def _seed_killed(pair: Pair) -> str:
    seed, receiver = _reading(pair)
    seed.process.kill()
    return _receivers_end(receiver)


def _seed_stopped(pair: Pair) -> str:
    seed, receiver = _reading(pair)
    seed.process.send_signal(signal.SIGSTOP)
    return _receivers_end(receiver)


def _receivers_end(receiver: Worker) -> str:
    """The receiver's outcome, and the seconds since the disturbance, which has just happened."""
    began = time.monotonic()
    try:
        done = receiver.answer(PATIENCE_S)
    except Failed as error:
        return f"{_ended(receiver) or 'an error'} after {time.monotonic() - began:.1f} s: {error}"
    return f"the receiver reads on; its bytes are {'right' if done['right'] else 'WRONG'}"


def _ended(worker: Worker) -> str:
    """The way in which a process ended; nothing while it runs."""
    status = worker.process.poll()
    return "" if status is None else f"the process DIED with status {status}"
