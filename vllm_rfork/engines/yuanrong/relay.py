"""A process between a receiver's YuanRong engine and one seed's control port: a silent seed cannot hang a read.

The engines wait without limit for the answer to a control call and hold Python's GIL meanwhile: no thread of their
process can break that wait, and a signal only restarts it. This process forwards each connection and resets it if the
call exceeds its bound; the engine then fails with an error. It does not forward weights, only control calls of some
hundred bytes to some hundred kilobytes.

Run as ``python -I -S relay.py HOST PORT BOUND_S``. Prints the port on which it listens (loopback only), and exits with
its standard input or its parent. Standard library only: it starts in a few hundredths of a second.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
import threading
import time

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER with 0 s: close resets, and the engine's wait ends at once
_CHECK_PARENT_S = 1.0
_PIECE_NBYTES = 1 << 16


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    connection.close()


def _pass_on(near: socket.socket, address: tuple[str, int], bound_s: float) -> None:
    """Forward one control call in both directions until the seed has answered, or until the bound."""
    deadline = time.monotonic() + bound_s
    try:
        far = socket.create_connection(address, bound_s)
    except OSError:
        _reset(near)
        return
    for side in (near, far):
        side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        side.settimeout(bound_s)
    other = {near: far, far: near}
    whole = False
    try:
        while not whole:
            ready, _, _ = select.select([near, far], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for side in ready:
                piece = side.recv(_PIECE_NBYTES)
                if piece:
                    other[side].sendall(piece)
                elif side is far:
                    whole = True  # the seed closes the connection after its answer
                else:
                    return  # the engine has given up
    except OSError:
        pass  # the reset below ends the engine's wait
    finally:
        far.close()
        if whole:
            near.close()
        else:
            _reset(near)


def _end_with_the_parent(parent: int) -> None:
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], _CHECK_PARENT_S)
        if (ready and not os.read(0, 64)) or os.getppid() != parent:
            os._exit(0)


def main() -> None:
    """Serve until the parent ends it."""
    address, bound_s = (sys.argv[1], int(sys.argv[2])), float(sys.argv[3])
    threading.Thread(target=_end_with_the_parent, args=(os.getppid(),), daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            near, _ = listener.accept()
            threading.Thread(target=_pass_on, args=(near, address, bound_s), daemon=True).start()


if __name__ == "__main__":
    main()
