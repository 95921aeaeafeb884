"""The seed's side: a listener, and a thread for each connected receiver.

Everything is bounded: the connections, the groups, the sends at one time, each message, each wait. A receiver that
dies, stops or sends nonsense costs its own group.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress

from vllm_rfork.engines.capture_gate import gate
from vllm_rfork.engines.collective import channel, messages
from vllm_rfork.engines.collective.channel import Channel, Lost
from vllm_rfork.engines.collective.group import SEED, STALL_S, Backend, Group, GroupFailed
from vllm_rfork.engines.collective.messages import Join, Joined, Read, Refused, Sending, Sent
from vllm_rfork.engines.collective.plan import Piece, parts
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.threads.native import native_thread

logger = worker_logger(__name__)

#: Connections at one time whose peers have proved that they have the secret.
MAX_CONNECTIONS = 16
#: Connections at one time whose peers have not; the oldest is dropped for a new one.
MAX_STRANGERS = 16
#: Receivers that have a group at one time.
MAX_GROUPS = 8
#: Batches that are sent at one time.
MAX_SENDS = 4
#: Receivers that may die while their groups are created. NCCL 2.28 then keeps two sockets, 1.7 MB and 0.3 TB of the
#: process's 128 TB of addresses for each, although they are aborted; those that die later leave nothing.
MAX_UNFINISHED = 64
#: Such receivers by the backend's name. What they cost is the process's, and a seed that resumes has a new sender.
_unfinished: Counter[str] = Counter()
_unfinished_lock = threading.Lock()
#: Bytes of the largest batch: ``rfork_max_batch_bytes`` may not be greater.
MAX_BATCH_NBYTES = 1024 * 1024 * 1024
#: Bound of a group's creation, which a capture of graphs waits for, in seconds.
_CREATE_S = 9.0
#: A group without a request for so long is closed, in seconds.
_IDLE_S = 60.0
#: Pause after a failed accept, most likely for lack of descriptors, in seconds.
_PAUSE_S = 1.0
#: Between two looks at the connections of receivers, in seconds; none if there are no receivers.
_TICK_S = 0.5
#: Threads that send yield the processor to inference.
_NICENESS = 10


class Sender:
    """Serves the registered memory of one open engine.

    Args:
        host: the address to listen on.
        secret: the endpoint's.
        holds: returns True if one registered region contains a number of bytes at an address. Called on any thread.

    Raises:
        OSError, UnicodeError: the address cannot be used.
        RuntimeError: there is no thread for it.
    """

    def __init__(self, backend: Backend, host: str, secret: bytes, holds: Callable[[int, int], bool]) -> None:
        self.backend = backend
        self.holds = holds
        self.secret = secret
        self.stopped = False
        self.groups = threading.BoundedSemaphore(MAX_GROUPS)
        self.sends = threading.BoundedSemaphore(MAX_SENDS)
        self._lock = threading.Lock()
        self._sessions: dict[_Session, None] = {}  # the oldest first
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        self._listening = socket.create_server(address[:2], family=family, backlog=MAX_STRANGERS)
        self._thread = native_thread(self._listen, "rfork-collective-listen")  # it aborts groups
        try:
            self._thread.start()
        except RuntimeError:
            self._listening.close()
            raise

    @property
    def unfinished(self) -> int:
        """Groups of this process that were given up while they were created."""
        return _unfinished[self.backend.name]

    @property
    def port(self) -> int:
        """The port of the control connections."""
        return int(self._listening.getsockname()[1])

    def stop(self, timeout_s: float) -> None:
        """Refuse everything and end every group. Idempotent.

        Raises:
            GroupFailed: a thread does not end, so the memory may still be read (``in_flight``).
        """
        deadline = time.monotonic() + timeout_s
        self.stopped = True
        with suppress(OSError):  # stopped before
            self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout_s)
        self._listening.close()
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.interrupt()
        for session in sessions:
            session.thread.join(max(0.0, deadline - time.monotonic()))
        stuck = [session for session in sessions if session.thread.is_alive() or session.in_flight]
        if stuck:
            raise GroupFailed(f"{len(stuck)} of {len(sessions)} groups cannot be closed", in_flight=True, late=True)

    def trust(self, session: _Session) -> None:
        """Give a session whose peer has proved the secret a place of its own. Raises Lost if there is none."""
        with self._lock:
            if sum(each.proven for each in self._sessions) >= MAX_CONNECTIONS:
                raise Lost(f"there are {MAX_CONNECTIONS} connections already")
            session.proven = True

    def note(self, error: GroupFailed) -> None:
        """Count a failure to create a group, if it has a price."""
        with _unfinished_lock:
            _unfinished[self.backend.name] += error.unfinished
            last = error.unfinished and self.unfinished == MAX_UNFINISHED
        if last:
            logger.warning("%s; no receiver is served any more, until this worker starts again", _worn_out())

    def forget(self, session: _Session) -> None:
        """Drop a session that has ended; one whose group may still read memory is kept, for :meth:`stop`."""
        if not session.in_flight:
            with self._lock:
                self._sessions.pop(session, None)

    def _listen(self) -> None:
        while not self.stopped:
            try:
                if self._wait_for_receiver():
                    self._admit(self._listening.accept()[0])
            except OSError as error:
                if not self.stopped:
                    logger.warning("No receiver can connect for %g s because of: %s", _PAUSE_S, error)
                    time.sleep(_PAUSE_S)

    def _wait_for_receiver(self) -> bool:
        """Wait a while for a connection; end the sessions of receivers that are gone.

        A thread that sends over a device's library does not look at its control connection.
        """
        with self._lock:
            sessions = {each.descriptor: each for each in self._sessions if not each.interrupted}
        poll = select.poll()
        poll.register(self._listening, select.POLLIN)
        for descriptor in sessions:
            if descriptor >= 0:  # it has ended
                poll.register(descriptor, select.POLLRDHUP)
        ready = dict(poll.poll(_TICK_S * 1000.0 if sessions else None))
        for descriptor in ready.keys() & sessions.keys():
            sessions[descriptor].interrupt()
        return self._listening.fileno() in ready

    def _admit(self, sock: socket.socket) -> None:
        session = _Session(self, sock)
        with self._lock:
            strangers = [each for each in self._sessions if not (each.proven or each.interrupted)]
            if self.stopped:
                sock.close()
                return
            self._sessions[session] = None
        if len(strangers) >= MAX_STRANGERS:
            strangers[0].interrupt()
            strangers[0].thread.join(_PAUSE_S)  # so that their threads are as few
        session.start()


class _Session:
    """One receiver's connection, group and thread."""

    def __init__(self, sender: Sender, sock: socket.socket) -> None:
        self._sender = sender
        self._socket = sock
        self._group: Group | None = None
        #: The group may still read memory, for good.
        self.in_flight = False
        self.interrupted = False
        #: The peer has proved that it has the secret.
        self.proven = False
        self.thread = native_thread(self._run, "rfork-collective-send")

    def start(self) -> None:
        """Start the thread; without one the connection is closed."""
        try:
            self.thread.start()
        except RuntimeError as error:
            logger.warning("A receiver was turned away because of: %s", error)
            self._socket.close()
            self._sender.forget(self)

    @property
    def descriptor(self) -> int:
        """The connection's; negative when it is closed."""
        return self._socket.fileno()

    def interrupt(self) -> None:
        """Make the thread end soon."""
        self.interrupted = True
        with suppress(OSError):  # the receiver was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        if (group := self._group) is not None:
            group.abort()

    def _run(self) -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
            with self._socket:
                opened = channel.accept(self._socket, self._sender.secret, time.monotonic() + messages.MESSAGE_S)
                self._sender.trust(self)
                self._admit(opened, messages.receive(opened, Join, time.monotonic() + messages.MESSAGE_S))
        except (Lost, messages.Refusal) as error:
            logger.debug("A receiver's connection ended: %s", error)
        except GroupFailed as error:
            logger.info("A receiver's transfer group was given up because of: %s", error)
        except Exception:  # the guard of a background thread: serving goes on, whatever fails here
            logger.exception("A receiver's transfer group failed")
        finally:
            self._sender.forget(self)

    def _admit(self, opened: Channel, join: Join) -> None:
        """Create the group, if it is of the right kind and there is room, and serve it."""
        refused = None
        if join.v != messages.VERSION or join.backend != self._sender.backend.name:
            text = f"the seed transfers with {self._sender.backend.name}, version {messages.VERSION}"
            refused = Refused(text, "lane")
        elif self._sender.unfinished >= MAX_UNFINISHED:
            refused = Refused(_worn_out(), "lane")
        elif not self._sender.groups.acquire(blocking=False):
            refused = Refused(f"the seed serves {MAX_GROUPS} receivers already", "busy")
        if refused is not None:
            messages.send(opened, refused, time.monotonic() + messages.MESSAGE_S)
            return
        try:
            logger.debug("A receiver joined: host=%s, lease=%s", opened.peer_host, join.lease)
            self._create(opened, time.monotonic() + min(join.timeout_s, _IDLE_S))
            while self._group is not None:
                self._answer(opened, messages.receive(opened, Read, time.monotonic() + _IDLE_S))
        finally:
            try:
                self._close()
            finally:
                self._sender.groups.release()

    def _create(self, opened: Channel, deadline: float) -> None:
        with self._on_device(deadline) as free:
            if not free:
                messages.send(opened, _CAPTURING, time.monotonic() + messages.MESSAGE_S)
                return
            bound = min(deadline, time.monotonic() + _CREATE_S)
            messages.send(opened, Joined(), bound)
            try:
                self._group = self._sender.backend.create(SEED, opened, bound)
            except GroupFailed as error:
                self._sender.note(error)
                raise
        if self._sender.stopped:  # interrupt() may have come too early
            raise Lost("the seed closes")

    def _answer(self, opened: Channel, read: Read) -> None:
        """Validate a request, then send."""
        for address, nbytes in read.segments:
            if not self._sender.holds(address, nbytes):
                text = f"{nbytes} bytes at the seed's address {address:#x} do not lie in one registered region"
                messages.send(opened, Refused(text, "address"), time.monotonic() + messages.MESSAGE_S)
                return
        total = sum(nbytes for _, nbytes in read.segments)
        if total > MAX_BATCH_NBYTES:
            text = f"a batch of {total} bytes is larger than {MAX_BATCH_NBYTES}"
            messages.send(opened, Refused(text), time.monotonic() + messages.MESSAGE_S)
            return
        deadline = time.monotonic() + min(read.timeout_s, messages.batch_bound_s(total))
        if not self._sender.sends.acquire(timeout=max(0.0, deadline - time.monotonic())):
            refused = Refused(f"the seed sends {MAX_SENDS} other batches", "busy")
            messages.send(opened, refused, time.monotonic() + messages.MESSAGE_S)
            return
        try:
            self._send(opened, [Piece(*segment) for segment in read.segments], deadline)
        finally:
            self._sender.sends.release()

    def _send(self, opened: Channel, pieces: list[Piece], deadline: float) -> None:
        with self._on_device(deadline) as free:
            pass
        if not free:
            messages.send(opened, _CAPTURING, time.monotonic() + messages.MESSAGE_S)
            return
        messages.send(opened, Sending(), deadline)
        # A capture waits for one part at most. A group of host memory divides it into larger ones.
        for part in parts(pieces) if self._sender.backend.captures else [pieces]:
            self._send_part(part, deadline)
        messages.send(opened, Sent(), time.monotonic() + messages.MESSAGE_S)

    def _send_part(self, pieces: Sequence[Piece], deadline: float) -> None:
        with self._on_device(min(deadline, time.monotonic() + STALL_S)) as free:  # the receiver waits no longer
            if not free:
                raise GroupFailed("graphs are captured in the middle of a batch", late=True)
            assert self._group is not None  # noqa: S101 - _admit
            try:
                self._group.send(pieces, deadline)
            except GroupFailed:
                self._end_group()  # within the block: it uses the device
                raise

    def _close(self) -> None:
        if self._group is not None:
            # A seed that stops closes its groups before a capture begins: vllm_compat/weight_changes.py.
            with self._on_device(time.monotonic() + _IDLE_S):
                self._end_group()

    def _end_group(self) -> None:
        group, self._group = self._group, None
        if group is None:
            return
        try:
            group.close()
        except Exception as error:  # noqa: BLE001 - whatever failed: the memory may still be read
            self.in_flight = getattr(error, "in_flight", True)
            logger.warning("A receiver's transfer group cannot be closed: %s", error)

    def _on_device(self, deadline: float) -> AbstractContextManager[bool]:
        """Keep captures away for the block; False if one does not end before ``deadline``."""
        if not self._sender.backend.captures:
            return nullcontext(True)
        return gate.working(deadline - time.monotonic(), given_up=lambda: self._sender.stopped)


def _worn_out() -> str:
    return f"{MAX_UNFINISHED} receivers of this worker died or stopped while their transfer groups were created"


_CAPTURING = Refused("the seed captures graphs", "busy")
