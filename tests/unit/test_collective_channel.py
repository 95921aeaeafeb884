"""The control connection of the collective engine: who is admitted, and what ends it."""

from __future__ import annotations

import secrets
import socket
import struct
import threading

import pytest

from tests.recorded_groups import (
    SECRET,
    Backends,
    backend,
    connected,
    joined,
    seed,
    soon,
)
from vllm_rfork.engines.collective import channel, messages
from vllm_rfork.engines.collective.channel import MAX_FRAME_NBYTES, Channel, Lost
from vllm_rfork.engines.collective.sender import MAX_STRANGERS, Sender

__all__ = ["backend", "seed"]  # fixtures


def test_a_peer_without_the_secret_is_turned_away(seed: Sender, backend: Backends) -> None:
    with pytest.raises(Lost):
        connected(seed, secrets.token_bytes(32))
    joined(seed).close()


def test_a_seed_proves_nothing_to_a_peer_that_has_not_proved_the_secret(seed: Sender) -> None:
    with socket.create_connection(("127.0.0.1", seed.port)) as stranger:
        stranger.settimeout(20.0)
        assert len(stranger.recv(34, socket.MSG_WAITALL)) == 34
        stranger.sendall(secrets.token_bytes(48))
        assert stranger.recv(1) == b""


def test_a_seed_without_the_secret_is_noticed() -> None:
    """It could only replay what a receiver sent."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def pretend() -> None:
            with listening.accept()[0] as sock:
                sock.sendall(b"rfork-collective-1" + bytes(16))
                sock.sendall(sock.recv(48)[16:])

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(Lost, match="secret"):
            channel.connect("127.0.0.1", listening.getsockname()[1], SECRET, soon())
        thread.join()


@pytest.mark.parametrize("text", [b"GET / HTTP/1.1\r\n\r\n", bytes(48), bytes(100_000), b""])
def test_nonsense_costs_its_own_connection(seed: Sender, text: bytes) -> None:
    with socket.create_connection(("127.0.0.1", seed.port)) as stranger:
        stranger.sendall(text)
        stranger.shutdown(socket.SHUT_WR)
        stranger.settimeout(20.0)
        try:
            while stranger.recv(4096):
                pass
        except ConnectionResetError:
            pass
    joined(seed).close()


def test_strangers_that_send_nothing_are_few_and_are_dropped(seed: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MESSAGE_S", 0.2)
    strangers = [socket.create_connection(("127.0.0.1", seed.port)) for _ in range(MAX_STRANGERS + 5)]
    for stranger in strangers:
        stranger.settimeout(20.0)
        assert len(stranger.recv(100)) in (0, 34)
        assert stranger.recv(100) == b""
        stranger.close()
    joined(seed).close()


def test_a_frame_that_is_changed_or_repeated_or_too_large_ends_the_connection() -> None:
    keys = secrets.token_bytes(32), secrets.token_bytes(32)

    def pair() -> tuple[Channel, Channel, socket.socket]:
        one, other = socket.socketpair()
        return Channel(one, *keys), Channel(other, *reversed(keys)), one

    for change in (
        lambda frame: frame[:6] + b"X" + frame[7:],
        lambda frame: frame[:-1] + bytes([frame[-1] ^ 1]),
        lambda frame: struct.pack(">I", MAX_FRAME_NBYTES + 1) + frame[4:],
    ):
        first, second, _ = pair()
        first.send(b"a message", soon())
        frame = second._socket.recv(1000)
        first._socket.sendall(change(frame))
        with pytest.raises(Lost):
            second.receive(soon())
    first, second, raw = pair()
    first.send(b"a message", soon())
    frame = second._socket.recv(1000)
    raw.sendall(frame * 2)
    assert second.receive(soon()) == b"a message"
    with pytest.raises(Lost, match="changed"):
        second.receive(soon())
    with pytest.raises(Lost, match="too large"):
        first.send(bytes(MAX_FRAME_NBYTES + 1), soon())
