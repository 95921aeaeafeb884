"""Build the stand-in on demand, and the environment that puts a YuanRong engine on it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_OUT = ROOT / "build" / "standin"
ACL = "libascendcl.so"
P2P = "libp2p_standin.so"
CUDA = "cuda/libcuda.so.1"
NCCL = "cuda/libnccl.so.2"


def build(out: Path = DEFAULT_OUT) -> Path:
    """Run make, which does nothing where the libraries are newer than their sources; returns ``out``.

    Raises:
        RuntimeError: make or the compiler fails; the text is theirs.
    """
    done = subprocess.run(
        ["make", "--no-print-directory", "-C", str(Path(__file__).parent), f"OUT={out}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the stand-in for the Ascend data plane cannot be built:\n{done.stdout}{done.stderr}")
    return out


def cuda_environment(out: Path = DEFAULT_OUT, **faults: object) -> dict[str, str]:
    """Variables for a process whose ``libcuda.so.1`` shall be the stand-in; ``faults`` as in ``stall=1``."""
    path = os.pathsep.join(filter(None, [str((out / CUDA).parent), os.environ.get("LD_LIBRARY_PATH", "")]))
    return {
        "LD_LIBRARY_PATH": path,
        **{f"RFORK_STANDIN_CUDA_{name.upper()}": str(each) for name, each in faults.items()},
    }


def environment(out: Path = DEFAULT_OUT, **faults: object) -> dict[str, str]:
    """Variables for a process whose engine shall use the stand-in; ``faults`` as in ``stall_s=3``.

    They have to be there when the process starts: the loader reads LD_LIBRARY_PATH once.
    """
    path = os.pathsep.join(filter(None, [str(out), os.environ.get("LD_LIBRARY_PATH", "")]))
    named = {f"RFORK_STANDIN_{name.upper()}": str(value) for name, value in faults.items()}
    return {"LD_LIBRARY_PATH": path, "TRANSFER_ENGINE_P2P_SO_PATH": str(out / P2P), **named}
