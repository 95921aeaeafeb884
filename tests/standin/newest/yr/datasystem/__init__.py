"""A stand-in for YuanRong's newest generation, which no package index has: the interface, over host memory.

Known of that generation, and here: ``Result`` and ``ErrorCode``, port 0 with ``get_rpc_port``, a range of ports and a
route by ``YR_TE_*`` variables, aligned registrations on the routes ``auto`` and ``hccs``, destinations that must be
registered, at most 4096 items a call, control calls that end after 10 s, and reads that release the GIL.

Not known, and chosen here: the code of a rejected registration, of a peer on another route, and of a destination that
is not registered; whether a read is authorized as a whole (here it is); the format on the wire.
"""

from yr.datasystem.engine import ErrorCode, MemoryRegistration, Result, TransferEngine

__all__ = ["ErrorCode", "MemoryRegistration", "Result", "TransferEngine"]
