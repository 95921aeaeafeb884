"""All ranks of one instance go the same way: a step counts only if every rank has done it.

After a common rejection, either all ranks build their models again or none does: constructors may make process groups
together, and a rank that built alone would wait there for the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

from vllm_rfork.errors import ForkError, as_fork_error
from vllm_rfork.load.consensus import Consensus

T = TypeVar("T")

#: The steps on which ranks vote: each has a seed; each model is filled with dummy weights (in the runtime layout,
#: before post-processing, where ranks may wait for each other); each has forked.
SEED, DUMMIES, FORK = "seed", "dummies", "fork"
#: In the checkpoint layout also: each has post-processed what it forked. vLLM's code meets the seed's state there.
KEPT = "kept"


class RankVote:
    """The votes of one load, in the order of ``stages``.

    Args:
        consensus: of this load.
        stages: the stages of this load's layout, in order. Each accepted stage makes the other ranks wait for this
            rank's vote on the next one.
        timeout_s: bound of :meth:`abandon`, in seconds.
    """

    def __init__(self, consensus: Consensus, stages: Sequence[str], timeout_s: float) -> None:
        self._consensus = consensus
        self._next = dict(itertools.pairwise(stages))
        self._timeout_s = timeout_s
        self._stage = stages[0]
        self._awaited: str | None = None

    @property
    def alone(self) -> bool:
        """True if no other rank loads this model."""
        return self._consensus.alone

    def rejection(self) -> str | None:
        """The other ranks' rejection of the stage that this rank is at; None if there is none yet."""
        return self._consensus.rejection(self._stage)

    def take_turn(self, timeout_s: float) -> None:
        """Wait for the turn to take a lease; :meth:`end_turn` gives it to the next rank.

        Each rank holds its lease until all ranks have one. In any other order, instances that start together could
        hold the seeds that the others wait for.

        Raises:
            ForkError: the turn did not come in time.
        """
        if obstacle := self._consensus.await_turn(SEED, timeout_s):
            raise ForkError(obstacle)

    def end_turn(self) -> None:
        """Let the next rank take its lease."""
        self._consensus.end_turn(SEED)

    def run(self, stage: str, action: Callable[[], T], timeout_s: float) -> T:
        """The result of ``action``, if it succeeds on every rank.

        Raises:
            ForkError: it failed here, or on another rank. Third-party errors are wrapped, so that the other ranks
                receive them too.
        """
        self._stage = stage
        try:
            with as_fork_error("this worker cannot fork"):
                result = action()
        except ForkError as error:
            self._awaited = None
            self._consensus.decide(stage, f"{type(error).__name__}: {error}", timeout_s)
            raise
        self._awaited = None
        if rejection := self._consensus.decide(stage, None, timeout_s):
            raise ForkError(f"not every rank of this instance could fork ({stage}): {rejection}")
        self._awaited = self._next.get(stage)
        return result

    def abandon(self, error: BaseException) -> None:
        """Reject the stage on which the other ranks wait for this one, if there is one. Idempotent."""
        if stage := self._awaited:
            self._awaited = None
            self._consensus.decide(stage, f"{type(error).__name__}: {error}", self._timeout_s)
