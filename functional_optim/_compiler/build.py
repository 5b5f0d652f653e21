"""From source to a loaded kernel, through a cache on disk. The only file that touches disk or a subprocess.

The cache is a private folder of the user (mode 0700, ownership checked): `$FUNCTIONAL_OPTIM_CACHE`, or
`functional_optim` in `$XDG_CACHE_HOME` or `~/.cache`. A file appears there by atomic rename, complete or not at all,
so any number of processes may build the same kernel at once and any of them may be killed. Each compiled file ends
with a digest of its content; one that does not match is built again. If the folder cannot be used, kernels are
built in a temporary folder of the process.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from types import ModuleType


FLAGS = ("-O3", "-fPIC", "-shared", "-w", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
# tried in order; a compiler that does not know a set of flags gets the next
TUNING = (("-march=native", "-fopenmp-simd"), ("-mcpu=native", "-fopenmp-simd"), ())
DIGEST = 32
_lock = threading.Lock()


class BuildError(RuntimeError):
    """No kernel could be built; the message says why."""


@functools.cache
def find_compiler() -> tuple[str, ...] | None:
    """The command of the C compiler: `$CC`, else the first of cc, gcc, clang; None if there is none."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        command = name.split()
        path = shutil.which(command[0]) if command else None
        if path:
            return (path, *command[1:])
    return None


@functools.cache
def _machine() -> str:
    """What a kernel compiled here depends on: processor, system and compiler."""
    command = find_compiler()
    assert command is not None
    try:
        with open("/proc/cpuinfo") as f:
            cpu = next((line for line in f if line.startswith(("flags", "Features"))), "")
    except OSError:
        cpu = platform.processor()
    info = os.stat(command[0])  # of what a link leads to
    compiler = (command, os.path.realpath(command[0]), info.st_size, info.st_mtime_ns)
    return repr((platform.system(), platform.machine(), cpu, compiler, FLAGS, TUNING))


def _private(folder: Path) -> bool:
    """Whether a folder is one that only this user may enter, creating it if need be.

    One that was open to others is not taken over: what they left in it would be trusted.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.lstat()
        if not stat.S_ISDIR(info.st_mode):
            return False
        if hasattr(os, "getuid") and (info.st_uid != os.getuid() or info.st_mode & 0o077):
            return False
        return os.access(folder, os.R_OK | os.W_OK | os.X_OK)
    except OSError:
        return False


@functools.cache
def cache_folder() -> Path:
    """The folder that holds compiled kernels."""
    chosen = os.environ.get("FUNCTIONAL_OPTIM_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(chosen) if chosen else Path(base) / "functional_optim"
    if _private(folder):
        return folder
    try:
        temporary = tempfile.TemporaryDirectory(prefix="functional_optim_")
    except OSError as error:
        raise BuildError(f"neither {folder} nor a temporary folder can be written to ({error})") from None
    _keep_alive.append(temporary)
    warnings.warn(
        f"The kernel cache {folder} is not a folder that only you can write to, so kernels are built again in each "
        f"process. Set FUNCTIONAL_OPTIM_CACHE to a private folder.",
        stacklevel=2,
    )
    return Path(temporary.name)


_keep_alive: list[tempfile.TemporaryDirectory[str]] = []


def _write(path: Path, content: bytes) -> None:
    """Writes a file by atomic rename."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(content)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _intact(path: Path) -> bool:
    """Whether a compiled file is ours, private and complete."""
    try:
        info = path.lstat()
        if not stat.S_ISREG(info.st_mode) or (hasattr(os, "getuid") and info.st_uid != os.getuid()):
            return False
        content = path.read_bytes()
    except OSError:
        return False
    return len(content) > DIGEST and hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def _compile(source: str, target: Path) -> None:
    command = find_compiler()
    assert command is not None
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build_") as folder:
        c, so = Path(folder) / "kernel.c", Path(folder) / "kernel.so"
        c.write_text(source)
        errors = ""
        for tuning in TUNING:
            try:
                done = subprocess.run(
                    [*command, *FLAGS, *tuning, str(c), "-o", str(so), "-lm"],
                    capture_output=True,
                    text=True,
                    timeout=300,
                    stdin=subprocess.DEVNULL,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise BuildError(f"{' '.join(command)}: {error}") from None
            if not done.returncode:
                content = so.read_bytes()
                _write(target, content + hashlib.sha256(content).digest())
                return
            errors = done.stderr.strip()
    raise BuildError(f"{' '.join(command)} failed:\n{errors[-2000:]}")


@functools.cache
def load_c(source: str) -> ctypes.CDLL:
    """Compiles C source, or finds it compiled, and loads it.

    Raises:
      BuildError: there is no compiler, it fails, or what it makes cannot be loaded.
    """
    with _lock:
        if find_compiler() is None:
            raise BuildError("no C compiler: neither $CC nor cc, gcc or clang is on the PATH")
        key = hashlib.sha256(f"{_machine()}\n{source}".encode()).hexdigest()[:32]
        target = cache_folder() / f"{key}.so"
        try:
            if not _intact(target):
                _write(target.with_suffix(".c"), source.encode())
                _compile(source, target)
            return ctypes.CDLL(str(target))
        except OSError as error:
            raise BuildError(f"{target}: {error}") from None


@functools.cache
def load_triton(source: str) -> ModuleType:
    """Writes Triton source to the cache and imports it.

    Raises:
      BuildError: Triton is not installed, or the folder cannot be written to.
    """
    with _lock:
        if importlib.util.find_spec("triton") is None:
            raise BuildError("Triton is not installed")
        name = f"functional_optim_{hashlib.sha256(source.encode()).hexdigest()[:32]}"
        path = cache_folder() / f"{name}.py"
        try:
            if not path.is_file() or path.read_text() != source:
                _write(path, source.encode())
        except OSError as error:
            raise BuildError(f"{path}: {error}") from None
        module = ModuleType(name)
        module.__file__ = str(path)  # Triton reads the source of a kernel from its file
        sys.modules[name] = module
        exec(compile(source, str(path), "exec"), module.__dict__)  # not imported: no bytecode is trusted or left
        return module


SERIAL = 1 << 14  # elements below which waking other threads costs more than it saves


def parallel_address() -> int | None:
    """Address of the function that runs work on torch's own OpenMP threads; None if this process has none to wake."""
    return None if _forked else _parallel_address()


@functools.cache
def _parallel_address() -> int | None:
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


_forked: list[bool] = []
if hasattr(os, "register_at_fork"):  # OpenMP would wait forever for threads that stayed in the parent
    os.register_at_fork(after_in_child=lambda: _forked.append(True))
