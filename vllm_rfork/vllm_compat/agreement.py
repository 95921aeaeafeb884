"""All ranks of one instance agree: either all of them fork, or the instance loads normally.

A rank that forks beside one that reads storage would be ready no sooner, and a rank that waits for another's word
without bound would hang a start. So every rank brings its word to a register in the store of torch's process group,
which vLLM has initialised by the time a model is loaded, and takes what the register holds.

The register is assigned once (``compare_set``): the last of the ranks that say yes writes yes; whoever says no, or
has waited for its bound, writes no; whoever comes later, or tried to write something else, reads what stands there.
There is no leader whose death would matter, and no two ranks can read different answers. What is left: a rank that
cannot reach the store at all answers no by itself, while the others may have agreed. The store lives in rank 0's
process, so that is an instance that is about to die; the weights of each rank are right all the same, since each
proves its own.

Must not read or write weights, and must not raise: an agreement that cannot be had is a no.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.threads.deadline import DeadlineExceeded, call_with_deadline
from vllm_rfork.vllm_compat.worker_identity import is_draft

logger = worker_logger(__name__)

#: Characters of a reason that others are told.
MAX_REASON_LENGTH = 500
#: Seconds beyond a rank's bound after which a store that does not answer is given up.
STORE_GRACE_S = 5.0

_YES = "yes"
_NO = "no: "
#: Looking for the decision: often at first, since most agreements are reached at once, then less so.
_FIRST_LOOK_S, _LAST_LOOK_S = 0.005, 0.1


class _StoreLost(Exception):
    """The ranks' store cannot be asked any more; ``str()`` is the reason, for the log."""


@dataclass
class Agreement:
    """One load of one model by the ranks of an instance. Every rank makes one for every load, in the same order.

    Args:
        rank: this process's rank in torch's default process group.
        members: the ranks that load this model together, ascending; one, or none, means there is nobody to ask.
        name: what tells this group's keys from others' in the same store.
        connect: gives a torch ``Store`` that all members share; called when the first word is brought.
    """

    rank: int
    members: Sequence[int]
    name: str
    connect: Callable[[], Any]
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _store: Any = None
    _load: str = ""
    _broken: str = ""
    _reached: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, vllm_config: Any, model_config: Any) -> Agreement:
        """The agreement of the ranks that load ``model_config`` together with this one. Does no I/O.

        A target is loaded by all ranks of the instance: tensor, context and pipeline parallel ranks, and the data
        parallel ranks whose processes form one group with them (an MoE model's; those of other models are instances
        of their own, and so are the replicas of elastic expert parallelism and of an external launcher). A draft is
        loaded at one pipeline stage, by all its ranks.
        """
        import torch.distributed as dist

        draft = is_draft(vllm_config, model_config)
        if not dist.is_available() or not dist.is_initialized():
            return cls(0, (0,), "", _no_store)
        rank = dist.get_rank()
        members = members_of(vllm_config.parallel_config, rank, dist.get_world_size(), draft=draft)
        role = "draft" if draft else "target"
        return cls(rank, members, f"rfork/agreement/{role}/{members[0]}", _default_store)

    @property
    def alone(self) -> bool:
        """Whether there is nobody to ask."""
        return len(self.members) < 2

    def reach(self, stage: str, reason: str, timeout_s: float) -> str:
        """Bring this rank's word on ``stage`` and return the instance's: empty for yes, else why not.

        Every member calls this once for every stage; who does not come within another's bound makes the answer no.

        Args:
            stage: what is agreed on, in a word, the same on every rank. Coming back to a stage agrees anew.
            reason: empty where this rank can, or could; else why not, passed on up to :data:`MAX_REASON_LENGTH`.
            timeout_s: how long this rank waits for the others, in seconds; the call takes no longer than that and
                :data:`STORE_GRACE_S`.

        Returns:
            The same text on every rank; a no names the rank whose word it was, or the ranks that did not come.
        """
        if self.alone:
            return reason
        if self._broken:
            return self._broken
        self._reached[stage] += 1
        key = f"{stage}.{self._reached[stage]}"
        started = self.clock()
        try:
            decision = self._within(timeout_s, lambda: self._exchange(key, _shortened(reason), timeout_s))
        except _StoreLost as lost:
            decision = str(lost)
        logger.debug(
            "%d ranks agreed on %s in %.2f s: %s", len(self.members), stage, self.clock() - started, decision or "yes"
        )
        return decision

    def refused(self, stage: str) -> str:
        """Why the instance has said no already on ``stage``, which this rank is about to :meth:`reach`.

        Empty while it has not, and where nobody can tell. Takes :data:`STORE_GRACE_S` at most.
        """
        if self.alone or self._broken:
            return self._broken
        key = f"{stage}.{self._reached[stage] + 1}"
        try:
            return self._within(0.0, lambda: self._look(key))
        except _StoreLost as lost:
            return str(lost)

    def turn(self, stage: str, timeout_s: float) -> str:
        """Wait until the member before this one has called :meth:`pass_on`, before :meth:`reach` of ``stage``.

        Members take what other instances want as well, a seed for each rank, in one order. Were it any order, two
        instances could each hold what the other waits for.

        Returns:
            Empty when it is this rank's turn, and where the instance has said no already: then nothing is held for
            long. Else why this rank waits no longer.
        """
        earlier = [member for member in self.members if member < self.rank]
        if self.alone or self._broken or not earlier:
            return self._broken
        key = f"{stage}.{self._reached[stage] + 1}"
        try:
            return self._within(timeout_s, lambda: self._await_turn(key, earlier[-1], timeout_s))
        except _StoreLost as lost:
            return str(lost)

    def pass_on(self, stage: str) -> None:
        """Let the next member have its turn. A store that is lost is noticed by :meth:`reach`."""
        if self.alone or self._broken:
            return
        key = f"{stage}.{self._reached[stage] + 1}"
        with contextlib.suppress(_StoreLost):
            self._within(0.0, lambda: self._pass_on(key))

    def _await_turn(self, key: str, before: int, timeout_s: float) -> str:
        store = self._connected()
        base = f"{self.name}/{self._load}/{key}"
        started = self.clock()
        while not (store.check([f"{base}/passed/{before}"]) or store.check([f"{base}/decision"])):
            waited_s = self.clock() - started
            if waited_s >= timeout_s:
                return f"rank {before}: not ready within {timeout_s:g} s, as rank {self.rank} saw it"
            # A small part of the wait so far: turns follow each other, and what each adds is added up.
            pause_s = min(max(waited_s / 50, _FIRST_LOOK_S), _LAST_LOOK_S)
            self.sleep(min(pause_s, timeout_s - waited_s))
        return ""

    def _pass_on(self, key: str) -> str:
        self._connected().set(f"{self.name}/{self._load}/{key}/passed/{self.rank}", "1")
        return ""

    def _within(self, timeout_s: float, call: Callable[[], str]) -> str:
        """What ``call`` returns, from a thread of its own: a store whose process hangs answers no call.

        Raises:
            _StoreLost: it failed, or took longer than ``timeout_s`` and the grace. No call is made any more then.
        """
        bound_s = timeout_s + STORE_GRACE_S
        try:
            return call_with_deadline(call, bound_s, "rfork-agreement")
        except DeadlineExceeded:
            # Its thread may still be in a call; the others will not hear of this rank again.
            self._broken = f"rank {self.rank}: the store of the ranks did not answer within {bound_s:g} s"
        except Exception as error:  # noqa: BLE001 - whatever a store raises; the caller turns it into a no
            self._broken = f"rank {self.rank}: the store of the ranks failed: {_shortened(str(error))}"
        raise _StoreLost(self._broken)

    def _look(self, key: str) -> str:
        store = self._connected()
        register = f"{self.name}/{self._load}/{key}/decision"
        return _read(store.get(register)) if store.check([register]) else ""

    def _exchange(self, key: str, reason: str, timeout_s: float) -> str:
        store = self._connected()
        base = f"{self.name}/{self._load}/{key}"
        register = f"{base}/decision"
        store.set(f"{base}/came/{self.rank}", "1")  # before the word counts: who wrote yes is never called missing
        if reason:
            return self._decide(store, register, f"{_NO}rank {self.rank}: {reason}")
        if store.add(f"{base}/yes", 1) == len(self.members):
            return self._decide(store, register, _YES)
        deadline = self.clock() + timeout_s
        pause_s = _FIRST_LOOK_S
        while not store.check([register]):
            left_s = deadline - self.clock()
            if left_s <= 0:
                missing = [rank for rank in self.members if not store.check([f"{base}/came/{rank}"])]
                return self._decide(store, register, _NO + _absent(missing, self.rank, timeout_s))
            self.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _LAST_LOOK_S)
        return _read(store.get(register))

    @staticmethod
    def _decide(store: Any, register: str, decision: str) -> str:
        """Write ``decision`` where none stands yet; what stands there then is everybody's."""
        return _read(store.compare_set(register, "", decision))

    def _connected(self) -> Any:
        """The store; and which load this is, by a count that every rank keeps in it for itself."""
        if self._store is None:
            store = self.connect()
            self._load = str(store.add(f"{self.name}/loads/{self.rank}", 1))
            self._store = store
        return self._store


def members_of(parallel: Any, rank: int, world_size: int, *, draft: bool) -> tuple[int, ...]:
    """The ranks of torch's default group, of ``world_size`` processes, that load a model together with ``rank``.

    vLLM orders ranks as replica x data x pipeline x context x tensor parallel.
    """
    stage = _size(parallel, "tensor_parallel_size") * _size(parallel, "prefill_context_parallel_size")
    pipeline = stage * _size(parallel, "pipeline_parallel_size")
    with_data = pipeline * _size(parallel, "data_parallel_size")
    # The group holds data parallel ranks or it does not; a size that does not divide it is not its own.
    instance = next((size for size in (with_data, pipeline) if world_size % size == 0), world_size)
    first = rank // instance * instance
    members = range(first, first + instance)
    if not draft or instance % pipeline:
        return tuple(members)
    return tuple(other for other in members if other % pipeline // stage == rank % pipeline // stage)


def _size(parallel: Any, name: str) -> int:
    return int(getattr(parallel, name, 1) or 1)


def _default_store() -> Any:
    """The store of torch's default process group, by a connection of our own where it can be had.

    A call that blocks would otherwise block the group's own use of the store in other threads.
    """
    from torch.distributed import distributed_c10d

    store = distributed_c10d._get_default_store()
    try:
        return store.clone()
    except (AttributeError, RuntimeError):  # an older torch, or a store that has no connections
        return store


def _no_store() -> Any:
    raise RuntimeError("torch's process group is not initialised")


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_REASON_LENGTH else text[: MAX_REASON_LENGTH - 1] + "…"


def _absent(missing: list[int], rank: int, timeout_s: float) -> str:
    """A no for ranks that did not come; ``missing`` may be empty where the last one is just now coming."""
    who = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing[:8]))}"
    if not missing:
        return f"rank {rank}: it waited {timeout_s:g} s for the others"
    return f"{who}: not heard of within {timeout_s:g} s by rank {rank}"


def _read(value: bytes | str) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    return "" if text == _YES else text.removeprefix(_NO)
