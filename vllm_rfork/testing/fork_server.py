"""Workers of the contract suite as forks of a process that has imported what they need: torch takes seconds.

Run as ``python -m vllm_rfork.testing.fork_server FD MODULE...``. Each message on the socket contains a descriptor, the
worker's socket; the answer is the worker's process id.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from vllm_rfork.testing import engine_worker

_ID_NBYTES = 8


class ForkedProcess:
    """A worker, with the parts of ``Popen`` that the suite uses. Its exit status is not known."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptor = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """0 if the process has ended, else None."""
        ended, _, _ = select.select([self._descriptor], [], [], 0.0)
        return 0 if ended else None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises ``subprocess.TimeoutExpired``."""
        ended, _, _ = select.select([self._descriptor], [], [], timeout)
        if not ended:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return 0

    def send_signal(self, number: int) -> None:
        """Raises ``ProcessLookupError`` if it has ended."""
        signal.pidfd_send_signal(self._descriptor, number)

    def kill(self) -> None:
        """Does nothing to a process that has ended."""
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)

    def __del__(self) -> None:
        os.close(self._descriptor)


class ForkServer:
    """The server's side in the test process."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            arguments = [command[0], "-m", __name__, str(theirs.fileno()), *command[1:]]
            self._process = subprocess.Popen(arguments, env=environment, pass_fds=[theirs.fileno()])
        atexit.register(self.end)

    def start(self, worker: socket.socket) -> ForkedProcess:
        """A worker that serves ``worker``."""
        socket.send_fds(self._socket, [b"\0"], [worker.fileno()])
        self._socket.settimeout(120.0)
        return ForkedProcess(int.from_bytes(self._socket.recv(_ID_NBYTES), "big"))

    def end(self) -> None:
        """End the server; its workers end with their own sockets."""
        self._socket.close()
        self._process.wait(60)


@functools.cache
def server(command: tuple[str, ...], environment: tuple[tuple[str, str], ...]) -> ForkServer:
    """The server of an interpreter, its modules and its environment; one for the whole run."""
    return ForkServer(command, dict(environment))


def main() -> None:
    """Fork a worker for each message, until the test process ends."""
    for module in sys.argv[2:]:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the workers
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        while True:
            message, descriptors, _, _ = socket.recv_fds(requests, 1, 1)
            if not message:
                return
            pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                requests.close()
                engine_worker.main(descriptors[0])
                atexit._run_exitfuncs()
                os._exit(0)  # taking torch's modules apart costs each worker more than a second
            os.close(descriptors[0])
            requests.send(pid.to_bytes(_ID_NBYTES, "big"))


if __name__ == "__main__":
    main()
