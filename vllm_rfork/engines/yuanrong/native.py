"""The native parts below the YuanRong adapter: the wheel's module, its codes, and the Ascend runtime.

Every difference between the wheels is decided here, by the members that they have and never by a version number.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_rfork.engines.native_library import ascend_runtime
from vllm_rfork.engines.registry import install_hint
from vllm_rfork.errors import EngineError, EngineUnavailable, Side

NAME = "yuanrong"
MODULE = "yr.datasystem"

#: Every code of ``StatusCode`` (transfer-engine) and ``ErrorCode`` (datasystem); the contract tests compare.
CODES: dict[int, str] = {
    0: "kOk",
    2: "kInvalid",
    3: "kNotFound",
    5: "kRuntimeError",
    8: "kNotReady",
    9: "kNotAuthorized",
    36: "kNotSupported",
}
#: The beginnings of HIXL's variables; the second is the newer one.
_HIXL_VARIABLES = (b"TRANSFER_ENGINE_HIXL", b"YR_TE_HIXL")

#: Codes about this peer: another seed may succeed.
_PEERS_FAULT = frozenset({"kRuntimeError", "kNotReady", "kNotAuthorized", "kNotFound"})
#: The side that failed, for codes that reveal it. "Not found" and "not authorized" refer to the peer's registrations.
_SIDES: dict[str, Side] = {"kNotFound": "seed", "kNotAuthorized": "seed", "kNotSupported": "receiver"}


@dataclass(frozen=True)
class Binding:
    """The installed wheel.

    Attributes:
        engine_class: ``TransferEngine``; ``initialize``, ``batch_register_memory``, ``batch_transfer_sync_read``
            and ``finalize`` are the same in every generation.
        bounds_control_calls: true for the generation with HIXL, which bounds its control calls to 10 s and releases
            the GIL in a read. The others wait for a silent peer for ever, and so does every Python thread.
        chooses_port: true for the newest generation: ``initialize`` accepts port 0, and ``get_rpc_port`` returns the
            port that the engine has bound, within ``YR_TE_RPC_PORT_MIN`` and ``YR_TE_RPC_PORT_MAX`` if they are set.
            ``get_route_policy`` returns its route.
    """

    engine_class: Callable[[], Any]
    bounds_control_calls: bool
    chooses_port: bool = False


def load_binding() -> Binding:
    """Import the wheel.

    Raises:
        EngineUnavailable: it, or a library that it needs, is not installed; the text names the package.
    """
    try:
        module = importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        # Only if this very module is missing, the wheel is not installed.
        if error.name in (MODULE, MODULE.partition(".")[0]):
            raise EngineUnavailable(NAME, f"the module {MODULE} is not installed", hint=install_hint(NAME)) from error
        raise EngineUnavailable(NAME, f"{MODULE} cannot be imported: {error}", hint=install_hint(NAME)) from error
    except (ImportError, OSError) as error:
        raise _unloadable(error) from error
    try:
        engine_class = module.TransferEngine
    except AttributeError as error:
        # The datasystem wheel hides an ImportError of its native module behind this one; the text still contains it.
        raise _unloadable(error) from error
    # datasystem 0.8.1 has get_rpc_port too, and rejects port 0.
    newest = hasattr(engine_class, "get_route_policy") and hasattr(engine_class, "get_rpc_port")
    return Binding(engine_class, newest or _knows_hixl(module), newest)


def _unloadable(error: Exception) -> EngineUnavailable:
    text = str(error)
    if "libunwind" in text:
        hint = "it needs libunwind.so.8: on Debian and Ubuntu, apt-get install libunwind8"
    else:
        hint = "install the package of the library that the text names"
    return EngineUnavailable(NAME, f"{MODULE} cannot be loaded: {text}", hint=hint)


def _knows_hixl(module: Any) -> bool:
    """Return True for the generation that bounds its control calls.

    Newer forms have members in Python; older forms show only in the variables that the native module reads.
    """
    if hasattr(module, "MemoryRegistration") or hasattr(module.TransferEngine, "batch_register_memory_ex"):
        return True
    file = getattr(importlib.import_module(module.TransferEngine.__module__), "__file__", None)
    return file is not None and any(name in Path(file).read_bytes() for name in _HIXL_VARIABLES)


def code_name(result: Any) -> str:
    """The name of a result's code, from the wheel's enumeration or from :data:`CODES`."""
    code = result.get_code()
    name = getattr(code, "name", None)
    return str(name) if name else CODES.get(int(code), f"code {int(code)}")


def failure(operation: str, result: Any, *, in_flight: bool = False, note: str = "") -> EngineError:
    """The error of a failed ``result``, without the path of a source file that the wheel adds."""
    code = code_name(result)
    text = result.get_msg() or result.to_string()
    return EngineError(
        NAME,
        operation,
        f"{text} ({note})" if note else text,
        code=code,
        in_flight=in_flight,
        retry_elsewhere=code in _PEERS_FAULT and operation in ("connect", "read"),
        side=_SIDES.get(code) if operation in ("connect", "read") else "receiver",
    )


class NativeEngine:
    """The only reference to the wheel's engine object.

    Destroying the object ends its reads (see :mod:`.engine`), and an exception keeps the local variables of the frames
    that it passed. So no frame has the object in a local variable.

    Args:
        binding: the wheel.

    Raises:
        EngineError: its constructor fails.
    """

    def __init__(self, binding: Binding) -> None:
        self._engine: Any = None
        self._engine = _translated("open", binding.engine_class)

    def call(self, operation: str, method: str, *arguments: Any) -> Any:
        """Call the engine's ``method``; its exceptions (unconvertible arguments, C++ exceptions) become EngineError."""
        return _translated(operation, lambda: getattr(self._engine, method)(*arguments))

    def destroy(self) -> None:
        """Run the destructor, which holds the GIL while it waits for the engine's threads."""
        self._engine = None

    def keep_forever(self) -> None:
        """Prevent the destructor from running, even when the interpreter ends."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._engine))


def _translated(operation: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except (TypeError, ValueError, OverflowError) as error:
        raise EngineError(NAME, operation, f"the engine rejected the arguments: {error}", side="receiver") from error
    except (RuntimeError, MemoryError, OSError) as error:
        raise EngineError(
            NAME,
            operation,
            f"{type(error).__name__}: {error}",
            in_flight=operation == "read",
            side="receiver" if isinstance(error, MemoryError) else None,
        ) from error


class AclRuntime:
    """``libascendcl``, as far as the adapter needs it.

    Without this library ``initialize`` succeeds and the first read fails with kNotReady; loading it early gives the
    reason.

    Raises:
        EngineUnavailable: the loader does not find it.
    """

    def __init__(self) -> None:
        self._library = ascend_runtime(NAME)

    @property
    def has_device_memory(self) -> bool:
        """Return True if the runtime has device memory, which the host stand-in does not."""
        return hasattr(self._library, "aclrtMalloc")

    def ensure_context(self, device: int) -> None:
        """Create a context on ``device`` for the calling thread if it has none.

        A context belongs to a thread. The engine creates one on its own threads but expects the reader to have one,
        and a new Python thread has none ("please call aclrtSetDevice before using transfer_engine").

        Raises:
            EngineError: the runtime refused.
        """
        context = ctypes.c_void_p()
        if self._library.aclrtGetCurrentContext(ctypes.byref(context)) == 0 and context.value:
            return
        code = self._library.aclrtSetDevice(ctypes.c_int32(device))
        if code != 0:
            raise EngineError(NAME, "read", f"aclrtSetDevice({device}) failed", code=f"acl {code}", side="receiver")
