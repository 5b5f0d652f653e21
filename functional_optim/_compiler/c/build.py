"""From C source to a loaded library: find the compiler, compile, load."""

import contextlib
import ctypes
import hashlib
import os
import platform
import select
import shlex
import shutil
import struct
import subprocess
import time
from pathlib import Path
from typing import IO

from .. import cache
from ..cache import BuildError, KernelCache, ToolError, once, warn_once


FLAGS = ("-O3", "-fPIC", "-shared", "-w", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
# tried in order; a compiler that does not know a set of flags gets the next
TUNING = (("-march=native", "-fopenmp-simd"), ("-mcpu=native", "-fopenmp-simd"), ())
TIMEOUT = 300.0  # seconds; a kernel takes less than two
KEY = "functional_optim_key"  # symbol of a library that says which source it was made from


@once
def find_compiler() -> tuple[str, ...] | None:
    """Command of the C compiler: `$CC`, else the first of cc, gcc, clang; None if there is none.

    `$CC` is a path, or a command with arguments in the shell's quotes. One that is not there is warned of.
    """
    chosen = os.environ.get("CC", "").strip()
    command = _chosen_compiler(chosen)
    if command is None:
        path = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        command = (os.path.abspath(path),) if path else None
        if chosen and command:
            warn_once(
                f"$CC is {chosen!r}, which is no program that can be run, so kernels are compiled by {command[0]}. "
                f"Set CC to the path of a C compiler; arguments may follow, and a path with spaces is quoted."
            )
    return command


def _chosen_compiler(chosen: str) -> tuple[str, ...] | None:
    try:
        words = shlex.split(chosen, posix=os.name == "posix")
    except ValueError:  # a quote is left open
        words = []
    for program, *arguments in ([chosen], words or [chosen]):
        path = shutil.which(program) if program else None
        if path:
            return (os.path.abspath(path), *arguments)
    return None


@once
def _machine() -> str:
    """Description of all that a kernel compiled here depends on: processor, system and compiler."""
    command = _compiler()
    try:
        with open("/proc/cpuinfo") as f:
            cpu = next((line for line in f if line.startswith(("flags", "Features"))), "")
    except OSError:
        cpu = platform.processor()
    try:
        info = os.stat(command[0])  # of the target of a link
    except OSError as error:
        raise ToolError(f"the C compiler cannot be found any more ({error})") from None
    compiler = (command, os.path.realpath(command[0]), info.st_size, info.st_mtime_ns)
    return repr((platform.system(), platform.machine(), cpu, compiler, FLAGS, TUNING))


def _compiler() -> tuple[str, ...]:
    command = find_compiler()
    if command is None:
        raise ToolError("no C compiler: neither $CC nor cc, gcc or clang is on the PATH")
    return command


def load_c(source: str) -> ctypes.CDLL:
    """Compiles C source, or finds it compiled, and loads it.

    Args:
      source: text of a library.

    Returns:
      The library, the same one for the same source.

    Raises:
      BuildError: there is no compiler, it fails, or its output cannot be loaded or is of another source.
    """
    return _libraries.get(source)


def _build(source: str, folder: Path) -> ctypes.CDLL:
    key = hashlib.sha256(f"{_machine()}\n{source}".encode()).hexdigest()[:32]
    target = folder / f"{key}.so"
    if cache.read_sealed(target) is not None:
        with contextlib.suppress(BuildError):  # a library may need others of another machine that has this folder
            return _load(target, key)
    text = f'{source}\nconst char {KEY}[] = "{key}";\n'.encode()
    cache.write(target.with_suffix(".c"), text)
    cache.write_sealed(target, _compile(text, folder))
    try:
        return _load(target, key)
    except BuildError:
        target.unlink(missing_ok=True)
        raise


_libraries = KernelCache(_build)


def _compile(text: bytes, folder: Path) -> bytes:
    """Library of a source, as the compiler writes it."""
    command = _compiler()
    name = shlex.join(command)
    failure = ""
    with cache.scratch(folder) as within:
        c, so, messages = within / "kernel.c", within / "kernel.so", within / "messages"
        c.write_bytes(text)
        for tuning in TUNING:
            # messages go to a file: a pipe may be held open by a process that outlives the compiler
            with messages.open("wb") as f:
                status = _run([*command, *FLAGS, *tuning, str(c), "-o", str(so), "-lm"], f)
            library = so.read_bytes() if so.is_file() else b""
            if not status and _is_whole(library):
                return library
            said = messages.read_bytes()[-2000:].decode("utf-8", "replace").strip()
            failure = said or (f"it ended with status {status}" if status else "it has not written a whole file")
    raise BuildError(f"{name} failed:\n{failure}")


def _is_whole(library: bytes) -> bool:
    """Whether an ELF file has its end. The loader does not check it, and would crash; those of other formats do."""
    if library[:5] != b"\x7fELF\2":
        return bool(library)
    if len(library) < 64:
        return False
    (start,), (size, count) = struct.unpack_from("=Q", library, 40), struct.unpack_from("=HH", library, 58)
    return bool(start + size * count <= len(library))  # of the table of sections, which comes last


def _run(command: list[str], messages: IO[bytes]) -> int:
    """Status that the compiler ends with."""
    try:
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages) as process:
            try:
                return _status(process)
            except BaseException:
                process.kill()
                raise
    except subprocess.TimeoutExpired:
        raise ToolError(f"{command[0]} has not ended within {TIMEOUT:g} seconds") from None
    except OSError as error:
        raise ToolError(f"{command[0]} cannot be run ({error})") from None


def _status(process: subprocess.Popen[bytes]) -> int:
    """Status of a process, which is waited for until `TIMEOUT`.

    With a timeout, `Popen.wait` sleeps and looks for the end, up to 50 ms late. Linux wakes who polls a descriptor of
    the process.
    """
    deadline = time.monotonic() + TIMEOUT
    end = None
    with contextlib.suppress(AttributeError, OSError):  # of another system, or an older one
        end = os.pidfd_open(process.pid)
    if end is not None:
        try:
            poll = select.poll()
            poll.register(end, select.POLLIN)
            poll.poll(1000 * TIMEOUT)
        finally:
            os.close(end)
    return process.wait(max(0.0, deadline - time.monotonic()))


def _load(path: Path, key: str) -> ctypes.CDLL:
    """Library at a path that says that it was made from the source with a key."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{shlex.join(_compiler())} has made a file that cannot be loaded ({error})") from None
    try:
        found = (ctypes.c_char * len(key)).in_dll(library, KEY).value
    except ValueError:
        found = b""
    if found != key.encode():
        raise BuildError(f"{shlex.join(_compiler())} has not compiled what it was given: {path} has another content")
    return library
