"""The native parts below the YuanRong adapter: the wheel's module, its codes, and the Ascend runtime.

Every difference between the wheels that can be installed is decided here, by looking at what is there and never at a
version number. Must not open an engine, and is imported by :mod:`.yuanrong` alone.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_rfork.engines.registry import install_hint
from vllm_rfork.errors import EngineError, EngineUnavailable, Side

NAME = "yuanrong"
MODULE = "yr.datasystem"
ACL = "libascendcl.so"

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
#: Codes that speak about this peer: another seed may do.
_PEERS_FAULT = frozenset({"kRuntimeError", "kNotReady", "kNotAuthorized", "kNotFound"})
#: Whose failure a code tells where a peer is involved; the others do not say. "Not found" and "not authorized" are
#: about the peer's registrations.
_SIDES: dict[str, Side] = {"kNotFound": "seed", "kNotAuthorized": "seed", "kNotSupported": "receiver"}


@dataclass(frozen=True)
class Binding:
    """The installed wheel.

    Attributes:
        engine_class: ``TransferEngine``; ``initialize``, ``batch_register_memory``, ``batch_transfer_sync_read``
            and ``finalize`` are the same in every generation.
        bounds_control_calls: the generation with HIXL, which gives its control calls 10 s and releases the GIL in a
            read. The others wait for a silent peer for ever, and every Python thread waits with them.
    """

    engine_class: Callable[[], Any]
    bounds_control_calls: bool


def load_binding() -> Binding:
    """Import the wheel.

    Raises:
        EngineUnavailable: it is not installed, or a library that it needs is not; the text names the package.
    """
    try:
        module = importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        # Only the absence of this very module means "not installed"; another one missing is told as it is.
        if error.name in (MODULE, MODULE.partition(".")[0]):
            raise EngineUnavailable(NAME, f"the module {MODULE} is not installed", hint=install_hint(NAME)) from error
        raise EngineUnavailable(NAME, f"{MODULE} cannot be imported: {error}", hint=install_hint(NAME)) from error
    except (ImportError, OSError) as error:
        raise _unloadable(error) from error
    try:
        engine_class = module.TransferEngine
    except AttributeError as error:
        # The datasystem wheel hides an ImportError of its native module behind this; the text still has it.
        raise _unloadable(error) from error
    return Binding(engine_class, _knows_hixl(module))


def _unloadable(error: Exception) -> EngineUnavailable:
    text = str(error)
    if "libunwind" in text:
        hint = "it needs libunwind.so.8: on Debian and Ubuntu, apt-get install libunwind8"
    else:
        hint = "see which library the text names, and install the package that carries it"
    return EngineUnavailable(NAME, f"{MODULE} cannot be loaded: {text}", hint=hint)


def _knows_hixl(module: Any) -> bool:
    """Whether this is the generation that bounds its control calls.

    Its newest form shows in Python; before that only in the variables that the native module reads.
    """
    if hasattr(module, "MemoryRegistration") or hasattr(module.TransferEngine, "batch_register_memory_ex"):
        return True
    file = getattr(importlib.import_module(module.TransferEngine.__module__), "__file__", None)
    return file is not None and b"TRANSFER_ENGINE_HIXL" in Path(file).read_bytes()


def code_name(result: Any) -> str:
    """The name of a result's code, by the enumeration of the wheel or, failing that, by number."""
    code = result.get_code()
    name = getattr(code, "name", None)
    return str(name) if name else CODES.get(int(code), f"code {int(code)}")


def failure(operation: str, result: Any, *, in_flight: bool = False, note: str = "") -> EngineError:
    """The wheel's failed ``result`` as ours. The path of a source file that it carries says nothing to a user."""
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
    """The wheel's engine object, held here and nowhere else.

    Destroying it is what ends its reads (see :mod:`.yuanrong`), and an exception keeps every local variable of the
    frames that it passed: so no frame has the engine itself in one.

    Args:
        binding: whose engine to make.

    Raises:
        EngineError: its constructor fails.
    """

    def __init__(self, binding: Binding) -> None:
        self._engine: Any = None
        self._engine = _translated("open", binding.engine_class)

    def call(self, operation: str, method: str, *arguments: Any) -> Any:
        """The engine's ``method``; its exceptions (arguments it cannot convert, C++ exceptions) become EngineError."""
        return _translated(operation, lambda: getattr(self._engine, method)(*arguments))

    def destroy(self) -> None:
        """Run the destructor, which waits for the engine's threads with the GIL held."""
        self._engine = None

    def keep_forever(self) -> None:
        """Never run the destructor, not even when the interpreter ends."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._engine))


def _translated(operation: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except (TypeError, ValueError, OverflowError) as error:
        raise EngineError(
            NAME, operation, f"the engine does not take these arguments: {error}", side="receiver"
        ) from error
    except (RuntimeError, MemoryError, OSError) as error:
        raise EngineError(
            NAME,
            operation,
            f"{type(error).__name__}: {error}",
            in_flight=operation == "read",
            side="receiver" if isinstance(error, MemoryError) else None,
        ) from error


class AclRuntime:
    """``libascendcl``, as far as the adapter needs it beside the engine.

    ``initialize`` succeeds without this library and the first read fails with kNotReady; asking early says why.

    Raises:
        EngineUnavailable: the loader does not find it.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(ACL)
        except OSError as error:
            raise EngineUnavailable(
                NAME,
                f"the Ascend runtime cannot be loaded: {error}",
                hint="source CANN's set_env.sh before the start, so that libascendcl.so is on the loader's path",
            ) from error

    @property
    def has_device_memory(self) -> bool:
        """Whether this runtime drives a device with memory of its own, which the host stand-in does not."""
        return hasattr(self._library, "aclrtMalloc")

    def ensure_context(self, device: int) -> None:
        """Give the calling thread a context on ``device`` where it has none.

        A context belongs to a thread. The engine sets one on its own threads but expects the reader's to be there,
        and a thread of Python's own has none ("please call aclrtSetDevice before using transfer_engine").

        Raises:
            EngineError: the runtime does not give one.
        """
        context = ctypes.c_void_p()
        if self._library.aclrtGetCurrentContext(ctypes.byref(context)) == 0 and context.value:
            return
        code = self._library.aclrtSetDevice(ctypes.c_int32(device))
        if code != 0:
            raise EngineError(NAME, "read", f"aclrtSetDevice({device}) failed", code=f"acl {code}", side="receiver")
