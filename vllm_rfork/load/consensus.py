"""A decision of all ranks of one instance: each stage is accepted by all of them, or rejected for all of them.

A rank that forks beside one that reads storage would not be ready sooner, and a rank that waits for another without
bound would hang a start. So each rank writes its vote to the store of torch's process group, which vLLM has
initialised before it loads a model, and then reads the decision from one key of it.

That key is written once (``compare_set``). The last rank to accept writes the acceptance. A rank that cannot accept,
or has waited for its bound, writes a rejection. Every other rank reads what is there. No rank leads, so no single
death matters, and no two ranks can read different decisions. One case remains: a rank that cannot reach the store
rejects by itself, while the others may have accepted. The store lives in rank 0's process, so such an instance is
about to die; and each rank verifies its own weights in any case.

Nothing here raises: a consensus that cannot be reached is a rejection.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.threads.deadline import DeadlineExceeded, call_with_deadline
from vllm_rfork.vllm_compat.rank_groups import RankGroup

logger = worker_logger(__name__)

#: Maximum length of an obstacle as the other ranks read it, in characters.
MAX_OBSTACLE_LENGTH = 500
#: Seconds beyond a rank's bound after which a store that does not answer is given up.
STORE_GRACE_S = 5.0

_ACCEPTED = "yes"
_REJECTED = "no: "
#: Pauses between two looks for the decision: short at first, since most decisions are made at once.
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.005, 0.1


class _StoreLost(Exception):
    """The ranks' store cannot be used any more; ``str()`` is the reason, for the log."""


def default_store() -> Any:
    """The store of torch's default process group, by a connection of our own if the store has connections.

    On a shared connection, a call that blocks would also block the group's own use of the store.
    """
    from torch.distributed import distributed_c10d

    store = distributed_c10d._get_default_store()
    try:
        return store.clone()
    except (AttributeError, RuntimeError):  # an older torch, or a store without connections
        return store


@dataclass
class Consensus:
    """The decisions on one load of one model. Every rank makes one of these for every load, in the same order.

    Args:
        group: the ranks that decide together; with one member, every decision is that member's.
        connect: returns a torch ``Store`` that all members share; called at the first use.
    """

    group: RankGroup
    connect: Callable[[], Any] = default_store
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _store: Any = None
    _load: str = ""
    _lost: str | None = None
    _decided: Counter[str] = field(default_factory=Counter)

    @property
    def alone(self) -> bool:
        """True if this rank loads the model by itself."""
        return len(self.group.members) < 2

    def decide(self, stage: str, obstacle: str | None, timeout_s: float) -> str | None:
        """Vote on ``stage`` and return the ranks' common decision: None if all accepted, else the rejection.

        Every member calls this once for every stage. A member that does not come within another's bound makes the
        decision a rejection.

        Args:
            stage: a word, the same on every rank. A second call for a stage is a new decision.
            obstacle: why this rank rejects, None if it accepts; cut at :data:`MAX_OBSTACLE_LENGTH` characters.
            timeout_s: how long this rank waits for the others, in seconds. The call takes at most
                :data:`STORE_GRACE_S` longer.

        Returns:
            The same on every rank; a rejection names the rank that rejected, or the ranks that did not come.
        """
        if self.alone:
            return obstacle
        if self._lost is not None:
            return self._lost
        key = self._next(stage)
        self._decided[stage] += 1
        started = self.clock()
        try:
            rejection = self._bounded(timeout_s, lambda: self._vote(key, obstacle, timeout_s))
        except _StoreLost as lost:
            rejection = str(lost)
        took_s = self.clock() - started
        logger.debug("%d ranks decided on %s in %.2f s: %s", len(self.group.members), stage, took_s, rejection or "yes")
        return rejection

    def rejection(self, stage: str) -> str | None:
        """The rejection of ``stage``, on which this rank has still to :meth:`decide`; None while there is none.

        Takes at most :data:`STORE_GRACE_S`.
        """
        if self.alone or self._lost is not None:
            return self._lost
        key = self._next(stage)
        try:
            return self._bounded(0.0, lambda: self._look(key))
        except _StoreLost as lost:
            return str(lost)

    def await_turn(self, stage: str, timeout_s: float) -> str | None:
        """Wait until the member before this one has called :meth:`end_turn`, before :meth:`decide` on ``stage``.

        Members take what other instances want as well (a seed for each rank) in one order. In any other order, two
        instances could each hold what the other waits for.

        Returns:
            None if it is this rank's turn, or if the stage has been rejected already: nothing is held for long then.
            Otherwise the reason why this rank waits no longer.
        """
        earlier = [member for member in self.group.members if member < self.group.rank]
        if self.alone or self._lost is not None or not earlier:
            return self._lost
        key = self._next(stage)
        try:
            return self._bounded(timeout_s, lambda: self._await_turn(key, earlier[-1], timeout_s))
        except _StoreLost as lost:
            return str(lost)

    def end_turn(self, stage: str) -> None:
        """Give the turn to the next member. A lost store shows in the :meth:`decide` that follows."""
        if self.alone or self._lost is not None:
            return
        key = self._next(stage)
        with contextlib.suppress(_StoreLost):
            self._bounded(0.0, lambda: self._connected().set(f"{self._base(key)}/passed/{self.group.rank}", "1"))

    def _next(self, stage: str) -> str:
        return f"{stage}.{self._decided[stage] + 1}"

    def _base(self, key: str) -> str:
        return f"{self.group.name}/{self._load}/{key}"

    def _await_turn(self, key: str, before: int, timeout_s: float) -> str | None:
        store = self._connected()
        base = self._base(key)
        started = self.clock()
        while not (store.check([f"{base}/passed/{before}"]) or store.check([f"{base}/decision"])):
            waited_s = self.clock() - started
            if waited_s >= timeout_s:
                return f"rank {before}: not ready within {timeout_s:g} s, as rank {self.group.rank} saw it"
            # A small part of the wait so far: turns follow each other, and their pauses add up.
            pause_s = min(max(waited_s / 50, _FIRST_PAUSE_S), _LAST_PAUSE_S)
            self.sleep(min(pause_s, timeout_s - waited_s))
        return None

    def _bounded(self, timeout_s: float, call: Callable[[], str | None]) -> str | None:
        """The result of ``call``, made on a thread of its own: a store whose process hangs answers no call.

        Raises:
            _StoreLost: it failed, or took longer than ``timeout_s`` and the grace. No further call is made then.
        """
        bound_s = timeout_s + STORE_GRACE_S
        try:
            return call_with_deadline(call, bound_s, "rfork-agreement")
        except DeadlineExceeded:
            # The thread may still be in a call; this rank uses the store no more.
            problem = f"did not answer within {bound_s:g} s"
        except Exception as error:  # noqa: BLE001 - whatever a store raises; it becomes a rejection
            problem = f"failed: {_shortened(str(error))}"
        self._lost = f"rank {self.group.rank}: the store of the ranks {problem}"
        raise _StoreLost(self._lost)

    def _look(self, key: str) -> str | None:
        store = self._connected()
        register = f"{self._base(key)}/decision"
        return _rejection_in(store.get(register)) if store.check([register]) else None

    def _vote(self, key: str, obstacle: str | None, timeout_s: float) -> str | None:
        store = self._connected()
        base = self._base(key)
        register = f"{base}/decision"
        store.set(f"{base}/came/{self.group.rank}", "1")  # before the vote counts: a voter is never called missing
        if obstacle is not None:
            return self._write(store, register, f"{_REJECTED}rank {self.group.rank}: {_shortened(obstacle)}")
        if store.add(f"{base}/yes", 1) == len(self.group.members):
            return self._write(store, register, _ACCEPTED)
        deadline = self.clock() + timeout_s
        pause_s = _FIRST_PAUSE_S
        while not store.check([register]):
            left_s = deadline - self.clock()
            if left_s <= 0:
                missing = [rank for rank in self.group.members if not store.check([f"{base}/came/{rank}"])]
                return self._write(store, register, _REJECTED + _absence(missing, self.group.rank, timeout_s))
            self.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)
        return _rejection_in(store.get(register))

    @staticmethod
    def _write(store: Any, register: str, decision: str) -> str | None:
        """Write ``decision`` unless there is one already; what is there then is every rank's."""
        return _rejection_in(store.compare_set(register, "", decision))

    def _connected(self) -> Any:
        """The store. Each rank counts its loads in it, which tells the keys of one load from those of the next."""
        if self._store is None:
            store = self.connect()
            self._load = str(store.add(f"{self.group.name}/loads/{self.group.rank}", 1))
            self._store = store
        return self._store


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_OBSTACLE_LENGTH else text[: MAX_OBSTACLE_LENGTH - 1] + "…"


def _absence(missing: list[int], rank: int, timeout_s: float) -> str:
    """A rejection because of ranks that did not come; ``missing`` is empty if the last one is coming just now."""
    if not missing:
        return f"rank {rank}: it waited {timeout_s:g} s for the others"
    who = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing[:8]))}"
    return f"{who}: no vote within {timeout_s:g} s, as rank {rank} saw it"


def _rejection_in(value: bytes | str) -> str | None:
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    return None if text == _ACCEPTED else text.removeprefix(_REJECTED)
