"""The life of one published model in this process, as a table of states and events.

::

    STARTING ──started──▶ SERVING
       ▲  │ withdrawn, retry_later  │ withdrawn
       │  ▼                         │
    SUSPENDED ◀─────────────────────┘         ended, from each of the three ──▶ GONE
    (resumed leads back to STARTING)
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_rfork.seeding.publication import Publication
from vllm_rfork.seeding.seed import Seed


class SlotState(enum.Enum):
    """A seed is being started, serves, was withdrawn and may return, or will never be one again."""

    STARTING = "starting"
    SERVING = "serving"
    SUSPENDED = "suspended"
    GONE = "gone"


class SlotEvent(enum.Enum):
    """``RETRY_LATER``: a return failed, and another change may bring the bytes back."""

    STARTED = "started"
    WITHDRAWN = "withdrawn"
    RESUMED = "resumed"
    RETRY_LATER = "retry later"
    ENDED = "ended"


#: Every transition there is; any other event in a state is a mistake of the caller's.
TRANSITIONS: Mapping[tuple[SlotState, SlotEvent], SlotState] = {
    (SlotState.STARTING, SlotEvent.STARTED): SlotState.SERVING,
    (SlotState.STARTING, SlotEvent.WITHDRAWN): SlotState.SUSPENDED,
    (SlotState.STARTING, SlotEvent.RETRY_LATER): SlotState.SUSPENDED,
    (SlotState.STARTING, SlotEvent.ENDED): SlotState.GONE,
    (SlotState.SERVING, SlotEvent.WITHDRAWN): SlotState.SUSPENDED,
    (SlotState.SERVING, SlotEvent.ENDED): SlotState.GONE,
    (SlotState.SUSPENDED, SlotEvent.RESUMED): SlotState.STARTING,
    (SlotState.SUSPENDED, SlotEvent.ENDED): SlotState.GONE,
}


@dataclass(eq=False)
class Slot:
    """One publication and what has become of it.

    Attributes:
        publication: None once the slot is GONE, so that no memory is kept.
        seed: of the start that is going on, or serving; None otherwise.
        thread: of the last start; it may still run after a withdrawal, in a native call that hangs.
        off_device: set when the last start needs the device no more.
    """

    publication: Publication | None
    state: SlotState = SlotState.SUSPENDED
    seed: Seed | None = None
    thread: threading.Thread | None = None
    off_device: threading.Event = field(default_factory=threading.Event)

    def move(self, event: SlotEvent) -> None:
        """Enter the state that follows ``event``.

        Raises:
            ValueError: ``event`` cannot happen in this state.
        """
        after = TRANSITIONS.get((self.state, event))
        if after is None:
            raise ValueError(f"a slot that is {self.state.value} cannot be {event.value}")
        self.state = after
        if after in (SlotState.SUSPENDED, SlotState.GONE):
            self.seed = None
        if after is SlotState.GONE:
            self.publication = None
