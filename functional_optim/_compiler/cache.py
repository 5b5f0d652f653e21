"""Kernels that have been built: on disk for every process, in memory for this one.

The folder is `$FUNCTIONAL_OPTIM_CACHE`, or `functional_optim` in `$XDG_CACHE_HOME` or `~/.cache`; only its owner may
enter it (mode 0700, checked). A file appears there by atomic rename, complete or not at all, so any number of
processes may build the same kernel at once and any of them may be killed. A compiled file ends with a digest of its
content; one that does not match is built again. Where the folder fails (full, read-only, not private, mounted without
the right to execute), one warning says so and the process goes on in a temporary folder of its own.
"""

import atexit
import contextlib
import functools
import hashlib
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from .._warn import warn


DIGEST = hashlib.sha256().digest_size
UNFINISHED = ".build_"  # prefix of files and folders that a build renames or removes when it is done
A_DAY = 24 * 60 * 60.0  # seconds; no build takes as long
K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class BuildError(RuntimeError):
    """Kernel that could not be built; the message says why."""


class ToolError(BuildError):
    """Compiler or package that is missing, cannot be run or does not end; no other folder would help."""


# -- memory of the process --------------------------------------------------------------------------------------------

_forget: list[Callable[[], None]] = []  # one call per cache of this process


def clear() -> None:
    """Empties every cache of the compiler in this process: compilers, folders, loaded kernels, warnings given.

    Files on disk stay. The next kernel is found, built and loaded as in a new process.
    """
    for forget in _forget:
        forget()


def once(function: Callable[[], T]) -> Callable[[], T]:
    """Decorator of a function that is called once per process, or once after each `clear`."""
    cached = functools.lru_cache(maxsize=1)(function)
    _forget.append(cached.cache_clear)
    return cached


def warn_once(message: str) -> None:
    """Gives a warning that has not been given yet. It counts as given where warnings are errors, too."""
    if message not in _warned:
        _warned.add(message)
        warn(message)


_warned: set[str] = set()
_forget.append(_warned.clear)


class KernelCache(Generic[K, T]):
    """Kernels of this process by their source, or by all that they are made of.

    Args:
      build: makes the kernel of a source in a folder, or loads the one that is there already.
      most: number that is kept; the oldest goes first. It stays loaded as long as somebody holds it.
    """

    def __init__(self, build: Callable[[K, Path], T], most: int = 1024) -> None:
        self._build, self._most = build, most
        self._kept: dict[K, T] = {}
        _forget.append(self._kept.clear)

    def get(self, source: K) -> T:
        """Kernel of a source; one thread at a time builds.

        Raises:
          BuildError: the kernel can be built neither in the folder of the user nor in a temporary one.
        """
        kernel = self._kept.get(source)
        if kernel is not None:
            return kernel
        with _locks.building:
            if source not in self._kept:
                self._kept[source] = _folders.build(lambda folder: self._build(source, folder))
                while len(self._kept) > self._most:
                    del self._kept[next(iter(self._kept))]
            return self._kept[source]


class _Locks:
    """Locks of the builds of one process."""

    def __init__(self) -> None:
        self.building = threading.RLock()  # re-entrant, as a signal handler or a finalizer may build as well
        self.importing = threading.RLock()


_locks = _Locks()


@contextlib.contextmanager
def forks_wait() -> Iterator[None]:
    """Keeps other threads from forking, for a moment: a child would wait for ever for a module half imported."""
    with _locks.importing:
        yield


def _start_anew_in_child() -> None:
    """Frees locks that other threads of the parent held at the fork: they are not there to release them."""
    global _locks
    _locks = _Locks()
    _folders.leave_to_parent()


# -- folders ----------------------------------------------------------------------------------------------------------


class _Folders:
    """Folder to build in: the user's, or a temporary one once that has failed."""

    def __init__(self) -> None:
        self._failed = False
        self._temporary: Path | None = None

    def build(self, make: Callable[[Path], T]) -> T:
        """Result of `make` in the user's folder; if that fails, in a temporary one, whose success is warned of."""
        folder, why = _users(), ""
        if not self._failed:
            try:
                _make_private(folder)
                return make(folder)
            except ToolError:
                raise
            except (OSError, BuildError) as error:
                why = str(error)
        try:
            result = make(self._own())
        except OSError as error:
            raise BuildError(f"neither {folder} nor a temporary folder can be used ({why or error}; {error})") from None
        if not self._failed:
            self._failed = True
            warn_once(
                f"The kernel cache {folder} cannot be used: {why}. Kernels are built in a temporary folder, again in "
                f"each process. Set FUNCTIONAL_OPTIM_CACHE to a private folder that can be written to."
            )
        return result

    def forget(self) -> None:
        self._failed, self._temporary = False, None

    def leave_to_parent(self) -> None:
        self._temporary = None

    def _own(self) -> Path:
        """Temporary folder of this process, removed when it ends."""
        if self._temporary is None or not self._temporary.is_dir():
            self._temporary = Path(tempfile.mkdtemp(prefix="functional_optim_"))
            atexit.register(_remove_if_of, os.getpid(), self._temporary)
        return self._temporary


def _users() -> Path:
    chosen = os.environ.get("FUNCTIONAL_OPTIM_CACHE")
    if chosen:
        return Path(os.path.abspath(chosen))
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "functional_optim"


def _make_private(folder: Path) -> None:
    """Makes a folder if it is not there, and sees that only its owner may enter it.

    One that was open to others is not taken over: files that they left in it would be trusted.

    Raises:
      OSError: the folder cannot be made, written to or trusted.
    """
    if not folder.is_absolute():  # no home, or a variable that the system's rules say to ignore
        raise OSError("it is no absolute path")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode):
        raise OSError("it is a link, or no folder")
    if hasattr(os, "getuid"):
        if info.st_uid != os.getuid():
            raise OSError("it belongs to another user")
        if info.st_mode & 0o077:
            raise OSError(f"others than its owner may enter it (mode {stat.S_IMODE(info.st_mode):04o}, not 0700)")
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise OSError("it cannot be written to")


def _remove_if_of(process: int, folder: Path) -> None:
    """Removes a folder in the process that made it, and not in one that was forked from it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


_folders = _Folders()
_forget.append(_folders.forget)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _locks.importing.acquire(),
        after_in_parent=lambda: _locks.importing.release(),
        after_in_child=_start_anew_in_child,
    )


# -- files ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Folder within a folder for the files of one build; it is removed afterwards, with those of killed builds."""
    _sweep(folder)
    made = Path(tempfile.mkdtemp(dir=folder, prefix=UNFINISHED))
    try:
        yield made
    finally:  # not a TemporaryDirectory: a child that is forked meanwhile would remove it at its end
        shutil.rmtree(made, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Removes files and folders of builds that were killed at least a day ago."""
    for path in folder.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError):
            info = path.lstat()
            if time.time() - info.st_mtime > A_DAY:
                if stat.S_ISDIR(info.st_mode):
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def write(path: Path, content: bytes) -> None:
    """Writes a file by atomic rename."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=UNFINISHED)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(content)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def write_sealed(path: Path, content: bytes) -> None:
    """Writes a file that ends with a digest of its content."""
    write(path, content + hashlib.sha256(content).digest())


def read_sealed(path: Path) -> bytes | None:
    """Content of a file that is the user's own, complete and unchanged since `write_sealed`; None of any other."""
    try:
        info = path.lstat()
        if not stat.S_ISREG(info.st_mode) or (hasattr(os, "getuid") and info.st_uid != os.getuid()):
            return None
        content = path.read_bytes()
    except OSError:
        return None
    content, digest = content[:-DIGEST], content[-DIGEST:]
    return content if content and hashlib.sha256(content).digest() == digest else None
