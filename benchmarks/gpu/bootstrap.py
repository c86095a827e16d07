"""From a bare checkout to a process that can import `tandemkv._native`: built with cmake and nanobind as the wheel is,
beside the source and not in it. Standard library alone; nothing is fetched."""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from tandemkv.errors import UnavailableError

ROOT = Path(__file__).parents[2]
BEGAN = "TANDEMKV_BENCHMARK_BEGAN"
"""When the command began, seconds since the epoch: it goes on in a new process once the module is built."""


def elapsed_s() -> float:
    """Since the command began."""
    return time.time() - float(os.environ.setdefault(BEGAN, str(time.time())))


def ensure_native(module: str, arguments: Sequence[str]) -> str:
    """How the native module came to be here. Where it has to be built first, the command begins again with it in its
    path (and in that of its subprocesses), and this does not return.

    Raises UnavailableError where it cannot be built or imported.
    """
    elapsed_s()
    if find_spec("tandemkv._native") is None:
        _build_and_begin_again(module, arguments)
    _import_native()
    return "built by this run" if _site() in _python_path() else "found"


def _build_and_begin_again(module: str, arguments: Sequence[str]) -> NoReturn:
    if _site() in _python_path():
        raise UnavailableError(f"the native module was built, but is not found in {_site()}")
    print("building the native module", file=sys.stderr, flush=True)
    build()
    sys.stdout.flush()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (_site(), ROOT, *_python_path())))}
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)


def build(root: Path = ROOT) -> Path:
    """A folder for PYTHONPATH, in which the package is the source's and has the native module beside it."""
    folder = _folder(root)
    cmake, ninja = _program("cmake"), _program("ninja", required=False)
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    python = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
    _run([cmake, "-S", root, "-B", folder, *generator, *python])
    _run([cmake, "--build", folder, "--target", "_native", "--parallel", str(os.cpu_count() or 1)])
    package = _site(root) / "tandemkv"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for entry in (root / "src" / "tandemkv").iterdir():
        if not entry.name.startswith("_native.") and entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for built in folder.glob("_native*.so"):
        (package / built.name).symlink_to(built)
    return package.parent


def _folder(root: Path) -> Path:
    return root / "build" / f"gpu-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"


def _site(root: Path = ROOT) -> Path:
    return _folder(root) / "site"


def _python_path() -> list[Path]:
    return [Path(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _import_native() -> None:
    try:
        __import__("tandemkv._native")
    except ImportError as error:
        raise UnavailableError(f"the native module cannot be imported: {error}") from error


def _program(name: str, required: bool = True) -> str:
    """Its path: in PATH, or beside this Python, whose folder need not be in PATH."""
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None and required:
        raise UnavailableError(f"the native module has to be built, and {name} is not found: pip install {name}")
    return path or ""


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        last = "\n".join(done.stdout.strip().splitlines()[-20:])
        raise UnavailableError(f"the native module cannot be built, {Path(command[0]).name} says:\n{last}")
