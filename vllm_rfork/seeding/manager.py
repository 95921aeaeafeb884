"""The seeds of this process: started after a load, withdrawn before their bytes change, resumed if the bytes are equal.

A withdrawn seed never serves again, and its epoch and addresses are invalid from then on. A resumed slot starts another
seed in a new epoch, after every published tensor has been found and digested again.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from vllm_rfork.errors import ForkError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.metrics import worker as metrics
from vllm_rfork.seeding.engines import SeedEngines
from vllm_rfork.seeding.publication import Publication, PublishedTensors
from vllm_rfork.seeding.seed import Seed
from vllm_rfork.seeding.slot import Slot, SlotEvent, SlotState
from vllm_rfork.startup import offers
from vllm_rfork.threads.native import native_thread

logger = worker_logger(__name__)

#: How long, in seconds, capturing graphs waits for seeds that are being started: they open and register with their
#: engines and digest the bytes, which usually takes less.
LEAVES_DEVICE_WITHIN_S = 5.0
#: How long, in seconds, a withdrawal waits for the thread of a start that it met.
_JOIN_S = 1.0


@dataclass(frozen=True, eq=False)
class _Start:
    """One attempt to start a seed.

    Attributes:
        tensors: where they are now.
        generation: the manager's, when they were found; valid until the next withdrawal.
        returning: a seed has been withdrawn before, and this one replaces it.
        before: the thread of the start before this one, which may still use its engines.
        proceed: raises ForkError once a withdrawal has begun.
    """

    tensors: PublishedTensors
    generation: int
    returning: bool
    before: threading.Thread | None
    off_device: threading.Event
    proceed: Callable[[], None]


class _StillStarting(ForkError):
    """The start before this one hangs."""


class SeedManager:
    """All seeds of one process, one slot for each published model (target and draft).

    Implements ``vllm_compat``'s listener for changes of weights. ``generation`` counts withdrawals: whatever was
    captured or found before one must not be published after it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: Held until a withdrawal is complete: another thread's change must not begin before its bytes may change.
        self._withdrawing = threading.RLock()
        self._slots: list[Slot] = []
        self._generation = 0
        self._may_return = True
        self._reason = ""  # of the last withdrawal

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots that are not GONE."""
        with self._lock:
            return tuple(self._slots)

    def seeds(self, wait_s: float = 0.0) -> list[Seed]:
        """The seeds that are serving, after waiting up to ``wait_s`` seconds for each that is being started."""
        for slot in self.slots:
            if slot.state is SlotState.STARTING and slot.thread is not None:
                slot.thread.join(wait_s)
        return [slot.seed for slot in self.slots if slot.state is SlotState.SERVING and slot.seed is not None]

    @property
    def generation(self) -> int:
        """The number of withdrawals so far."""
        return self._generation

    def publish(self, publication: Publication, generation: int | None = None) -> None:
        """Start a seed in the background.

        ``generation``: of the moment when the tensors were captured. If weights have changed since, the seed starts
        after the change, or never if there is no return from it.
        """
        slot = Slot(publication)
        with self._lock:
            captured = self._generation if generation is None else generation
            begun = self._begin(slot, publication.tensors, captured, returning=False)
            if begun or self._may_return:
                self._slots.append(slot)
                self._report_state()
        if not begun:
            _give_up(publication)
            publication.tensors.release()

    def withdraw(self, reason: str, *, last: bool) -> None:
        """Withdraw every seed and wait until no receiver can get its addresses any more.

        Unless this is the ``last`` change, :meth:`resume` will be called when it is over; until then, tensors that
        are kept beside the model stay. Otherwise they are dropped.
        """
        with self._withdrawing:
            if last:
                offers.end()
            with self._lock:
                self._generation += 1
                self._may_return, self._reason = not last, reason
                met = [slot for slot in self._slots if slot.state in (SlotState.STARTING, SlotState.SERVING)]
                seeds = [slot.seed for slot in met if slot.seed is not None]
                for slot in list(self._slots) if last else met:
                    self._move(slot, SlotEvent.ENDED if last else SlotEvent.WITHDRAWN)
            for seed in seeds:
                seed.withdraw(reason)
            for slot in met:
                if slot.thread is not None and slot.thread is not threading.current_thread():
                    slot.thread.join(_JOIN_S)  # it announces nothing any more

    def device_is_idle(self) -> bool:
        """Wait a little for seeds that are being started; False if one may still need the device."""
        with self._lock:
            starting = [
                slot.off_device
                for slot in self._slots
                if slot.state is SlotState.STARTING and slot.publication and slot.publication.captures_graphs
            ]
        deadline = time.monotonic() + LEAVES_DEVICE_WITHIN_S
        return all(off_device.wait(max(0.0, deadline - time.monotonic())) for off_device in starting)

    def resume(self) -> None:
        """Start the suspended seeds again, in the background, if their bytes are the same.

        Call it when a change is over. Finding the tensors is done here, while nothing can change the model; digesting
        them is not. Logs one WARNING for each seed that cannot return.
        """
        with self._lock:
            generation = self._generation
            suspended = [
                (slot, slot.publication)
                for slot in self._slots
                if slot.state is SlotState.SUSPENDED and slot.publication is not None
            ]
        for slot, publication in suspended:
            try:
                tensors = publication.tensors.relocate()
                with self._lock:
                    self._begin(slot, tensors, generation, returning=True)
            except ForkError as error:
                logger.warning("this worker is not a seed again: %s: %s", type(error).__name__, error)
                if not publication.tensors.recoverable:
                    self._end(slot)
            except Exception:
                # Whatever happens to the seed, the worker's method has done its work.
                logger.exception("this worker is not a seed again")
                self._end(slot)

    def _begin(self, slot: Slot, tensors: PublishedTensors, generation: int, *, returning: bool) -> bool:
        """Start a seed in the background, or return False if another change has begun meanwhile. The lock is held."""
        publication = slot.publication
        if generation != self._generation or slot.state is not SlotState.SUSPENDED or publication is None:
            return False
        proceed = functools.partial(self._check_current, generation)
        start = _Start(tensors, generation, returning, slot.thread, threading.Event(), proceed)
        thread = native_thread(self._run, f"rfork-seed-{publication.role}", (slot, publication, start))
        thread.start()  # first: it raises at the limit of threads. The new one waits for the lock before it looks.
        slot.move(SlotEvent.RESUMED)
        self._report_state()
        slot.off_device = start.off_device
        slot.thread = thread
        return True

    def _run(self, slot: Slot, publication: Publication, start: _Start) -> None:
        """Start a seed; the guard of a background thread: serving goes on without a seed, whatever fails here."""
        try:
            self._start(slot, publication, start)
        except ForkError as error:
            self._failed(slot, publication, start, error)
        except Exception:
            logger.exception("this worker is not a seed")
            self._failed(slot, publication, start, None)
        finally:
            start.off_device.set()
            publication.intent.stop_renewing()
            start.tensors.release()

    def _start(self, slot: Slot, publication: Publication, start: _Start) -> None:
        publication.set_device()
        if start.returning:
            self._wait_for_the_last(publication, start)
        seed = self._make(publication, start)
        with self._lock:
            # From here on a withdrawal finds the seed; an earlier one has raised the generation.
            current = start.generation == self._generation
            if current:
                slot.seed = seed
        if not current:
            seed.withdraw(self._reason)
        address = seed.start()  # raises if it has been withdrawn
        with self._lock:
            if start.generation == self._generation:
                self._move(slot, SlotEvent.STARTED)
        if start.returning:
            logger.info("this worker is a seed again, at %s in a new epoch: its bytes are the same", address)

    def _wait_for_the_last(self, publication: Publication, start: _Start) -> None:
        """Wait until the start before this one has ended.

        Raises:
            ForkError: it hangs, or another change has begun.
        """
        if start.before is not None:
            start.before.join(publication.config.ready_timeout_s + publication.config.request_timeout_s)
            if start.before.is_alive():
                raise _StillStarting("the start of the seed before it still hangs")
        start.proceed()

    def _check_current(self, generation: int) -> None:
        """Raise ForkError if a withdrawal has begun since ``generation``."""
        if generation != self._generation:
            raise ForkError(self._reason)

    @staticmethod
    def _make(publication: Publication, start: _Start) -> Seed:
        # The checkpoint first: it may take a while or fail, and nobody would close engines that are handed over.
        manifest = msgspec.structs.replace(start.tensors.manifest, checkpoint=publication.checkpoint())
        return Seed(
            config=publication.config,
            manifest=manifest,
            engines=SeedEngines(publication.engines.hand_over(start.proceed)),
            keep=start.tensors.keep,
            recheck=start.tensors.recheck,
            # An earlier announcement has fulfilled the intent, or it was taken back.
            intent="" if start.returning else publication.intent.id,
            off_device=start.off_device,
        )

    def _failed(self, slot: Slot, publication: Publication, start: _Start, error: ForkError | None) -> None:
        """Settle a start that failed. After a withdrawal the slot is suspended already, and may return."""
        _give_up(publication)
        with self._lock:
            withdrawn = start.generation != self._generation
            if not withdrawn:
                retry = start.returning and error is not None and start.tensors.recoverable
                retry = retry and not isinstance(error, _StillStarting)
                self._move(slot, SlotEvent.RETRY_LATER if retry else SlotEvent.ENDED)
        if withdrawn:
            logger.info("this worker is not a seed now: %s", self._reason)
        elif error is not None:
            again = " again" if start.returning else ""
            logger.warning(
                "this worker is not a seed%s: %s: %s", again, type(error).__name__, publication.logged.once(error)
            )

    def _end(self, slot: Slot) -> None:
        with self._lock:
            if slot.state is SlotState.SUSPENDED:
                self._move(slot, SlotEvent.ENDED)

    def _move(self, slot: Slot, event: SlotEvent) -> None:
        """Enter the next state; the lock is held."""
        slot.move(event)
        if slot.state is SlotState.GONE:
            self._slots.remove(slot)
        self._report_state()

    def _report_state(self) -> None:
        """Report the state of this worker's seeds, the best one of several; the lock is held."""
        states = {slot.state for slot in self._slots}
        best = (state for state in (SlotState.SERVING, SlotState.STARTING, SlotState.SUSPENDED) if state in states)
        metrics.seed_state(next((state.value for state in best), "none"))


def _give_up(publication: Publication) -> None:
    """Close the engines and take the intent back: this publication has no seed now."""
    publication.engines.close()
    publication.intent.withdraw()


@functools.cache
def manager() -> SeedManager:
    """The manager of this process."""
    return SeedManager()
