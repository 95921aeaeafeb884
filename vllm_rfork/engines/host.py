"""Facts of this host that decide which lanes are possible, and its addresses."""

from __future__ import annotations

import contextlib
import ctypes
import socket
from pathlib import Path

from vllm_rfork.engines.native_library import CUDA_DRIVER
from vllm_rfork.errors import EngineError


def boot_id() -> str:
    """The identifier of the running kernel.

    Raises:
        OSError: it cannot be read.
    """
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def boot_id_if_known() -> str:
    """The identifier of the running kernel, shared by the containers of one machine; empty if it cannot be read."""
    try:
        return boot_id()
    except OSError:
        return ""


def gpu_uuid(device: int) -> str:
    """The UUID of a visible GPU, in hexadecimal digits; empty if the driver does not return it. Creates no context."""
    handle, uuid = ctypes.c_int(), ctypes.create_string_buffer(16)
    try:
        cuda = ctypes.CDLL(CUDA_DRIVER)
        if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(handle), device) or cuda.cuDeviceGetUuid(uuid, handle):
            return ""
    except (OSError, AttributeError):
        return ""
    return uuid.raw.hex()


def local_ipv4(engine: str, host: str) -> str:
    """``host`` as an IPv4 literal, of an address that this machine can bind.

    Args:
        engine: the name of the engine that requires it, for the error.

    Raises:
        EngineError: it has no IPv4 address, or none of this machine's; the text names the option to set.
    """
    advice = "set rfork_seed_advertise_host to an IPv4 address of this machine"
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise EngineError(engine, "open", f"the host {host!r} has no IPv4 address ({error}); {advice}") from error
    addresses = sorted({str(entry[4][0]) for entry in found})
    for address in addresses:
        if address == "0.0.0.0":  # noqa: S104 - compared, not bound
            continue
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_STREAM) as attempt:
            attempt.bind((address, 0))
            return address
    raise EngineError(
        engine, "open", f"the host {host!r} ({', '.join(addresses)}) is not an address of this machine; {advice}"
    )
