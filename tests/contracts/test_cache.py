"""The kernel cache and the compiler: private, shared by processes, mended when broken, done without when missing."""

import ctypes
import errno
import functools
import hashlib
import importlib.util
import json
import marshal
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_optim as fo
from functional_optim._compiler import cache as kernel_cache
from functional_optim._compiler.c import build
from functional_optim._compiler.triton.build import load_triton
from functional_optim._runtime import (
    backend as _backend,
    pointers,
)


COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
pytestmark = [
    pytest.mark.slow,  # kernels are compiled anew
    pytest.mark.skipif(COMPILER is None, reason="no C compiler"),
    pytest.mark.skipif(sys.platform == "win32", reason="folders have no modes"),
]
ROOT = Path(__file__).parents[2]

# A process builds a library for each program, and one that reads pointers and starts kernels.
POINTERS = Path(pointers.__file__).with_suffix(".c").read_text()
LIBRARIES = ("kernel", "pointers")


def restart() -> None:
    """Forgets all that this process has found out, loaded and warned of; classes of states stay what they are."""
    kernel_cache.clear()
    for name, module in list(sys.modules.items()):
        if name.startswith("functional_optim.") and name != "functional_optim._compiler.rule":
            for x in vars(module).values():
                if isinstance(x, functools._lru_cache_wrapper):
                    x.cache_clear()
    _backend.try_again()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This process as if it had just started, with a cache that does not exist yet."""
    monkeypatch.setenv("FUNCTIONAL_OPTIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("CC", raising=False)
    restart()
    yield tmp_path / "cache"
    restart()


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


class Compiler:
    """A script that stands for the compiler and notes its calls.

    Args:
      folder: where the script and its log are.
      text: what it does after it has noted the call; `$library` is one of `LIBRARIES`.
    """

    def __init__(self, folder: Path, text: str = f'exec {COMPILER} "$@"') -> None:
        self.log = folder / "log"
        asked_for = (
            'library=kernel\nfor x; do case "$x" in *.c) grep -q read_pointers "$x" && library=pointers;; esac; done'
        )
        self.path = script(folder / "compiler", f"{asked_for}\necho \"$library:$@\" >> '{self.log}'\n{text}")

    def calls_for(self, library: str) -> list[str]:
        """The arguments of the calls for one of `LIBRARIES`."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [x.removeprefix(f"{library}:") for x in lines if x.startswith(f"{library}:")]

    @property
    def calls(self) -> list[str]:
        """The arguments of all calls."""
        return [call for library in LIBRARIES for call in self.calls_for(library)]


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """A compiler that works, and notes its calls."""
    made = Compiler(tmp_path)
    monkeypatch.setenv("CC", str(made.path))
    return made


def step(tx: Any = None) -> None:
    """One step; its result is checked."""
    params = {"w": torch.arange(5.0)}
    tx = fo.sgd(0.5) if tx is None else tx

    new, _ = fo.apply_gradients(tx, params, {"w": torch.ones(5)}, tx.init(params))

    torch.testing.assert_close(new["w"], torch.arange(5.0) - 0.5)


def same_steps() -> list[Any]:
    """The same step by programs of their own, bound to nothing yet."""
    return [fo.sgd(0.5), fo.chain(fo.trace(0.9), fo.scale(-0.5)), fo.chain(fo.scale_by_sign(), fo.scale(-0.5))]


def warned(call: Callable[[], Any]) -> list[str]:
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in found]


def names(folder: Path) -> set[str]:
    return {x.name for x in folder.iterdir()}


def built(folder: Path, library: str = "kernel") -> list[Path]:
    """The files of one of `LIBRARIES` in a folder, which are told apart by the source that lies beside them."""
    found = [x for x in folder.iterdir() if x.suffix == ".so"]
    return [x for x in found if x.with_suffix(".c").read_text().startswith(POINTERS) is (library == "pointers")]


def only(folder: Path, library: str = "kernel") -> Path:
    (found,) = built(folder, library)
    return found


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- what is in the cache, and where


def test_warm_cache_calls_no_compiler(cache: Path, compiler: Compiler) -> None:
    step()
    cold = len(compiler.calls)
    restart()

    step()

    assert cold >= 1
    assert len(compiler.calls) == cold


def test_cache_holds_libraries_and_their_sources_only(cache: Path) -> None:
    step()

    own, reader = only(cache), only(cache, "pointers")
    assert names(cache) == {x.with_suffix(suffix).name for x in (own, reader) for suffix in (".so", ".c")}
    (kernel,) = fo.explain(fo.sgd(0.5), {"w": torch.zeros(5)}).kernels
    assert own.with_suffix(".c").read_text().startswith(kernel.source)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_cache_is_private(umask: int, cache: Path) -> None:
    before = os.umask(umask)
    try:
        step()
    finally:
        os.umask(before)

    assert mode(cache) == 0o700
    assert all(not mode(x) & 0o022 for x in cache.iterdir())


PLACES: dict[str, tuple[dict[str, str], str]] = {
    "its own variable": ({"FUNCTIONAL_OPTIM_CACHE": "chosen", "XDG_CACHE_HOME": "xdg", "HOME": "home"}, "chosen"),
    "parents are made": ({"FUNCTIONAL_OPTIM_CACHE": "some/where/else"}, "some/where/else"),
    "the system's variable": ({"XDG_CACHE_HOME": "xdg", "HOME": "home"}, "xdg/functional_optim"),
    "home": ({"HOME": "home"}, "home/.cache/functional_optim"),
    "empty variables": (
        {"FUNCTIONAL_OPTIM_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "home"},
        "home/.cache/functional_optim",
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_where_the_cache_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables, expected = PLACES[name]
    monkeypatch.delenv("FUNCTIONAL_OPTIM_CACHE")
    for variable, folder in variables.items():
        monkeypatch.setenv(variable, str(tmp_path / folder) if folder else "")

    step()

    assert only(tmp_path / expected).is_file()
    assert only(tmp_path / expected, "pointers").is_file()


def test_hyper_parameter_values_share_a_kernel(cache: Path, compiler: Compiler) -> None:
    for tx in (fo.sgd(0.5), fo.sgd(torch.tensor(0.5)), fo.sgd(fo.constant_schedule(0.5))):
        step(tx)
    for rate in (0.1, 0.2, 0.3):
        tx, params = fo.sgd(rate), {"w": torch.ones(9), "v": torch.ones(2)}
        fo.apply_gradients(tx, params, params, tx.init(params))

    # a number, or a tensor; a schedule that is a constant has a counter, and may or may not be the same program
    assert len(built(cache)) <= 2
    assert len(built(cache, "pointers")) == 1


# --- folders that are not safe


def not_private(folder: Path) -> None:
    """Takes a step that must not put anything into a folder, and says so, once."""
    found = warned(lambda: [step(tx) for tx in same_steps()[:2]])

    assert len(found) == 1, found
    assert str(folder) in found[0]
    assert "FUNCTIONAL_OPTIM_CACHE" in found[0]
    assert fo.explain(fo.sgd(0.5), {"w": torch.zeros(5)}).backends == ("c",)


def test_cache_folder_of_another_user(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(0o700)
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)

    not_private(cache)

    assert names(cache) == set()


def test_cache_folder_that_is_a_symlink(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(0o700)
    cache.symlink_to(tmp_path / "elsewhere")

    not_private(cache)

    assert names(tmp_path / "elsewhere") == set()


def test_cache_folder_that_is_a_dangling_symlink(cache: Path, tmp_path: Path) -> None:
    cache.symlink_to(tmp_path / "nowhere")

    not_private(cache)

    assert not (tmp_path / "nowhere").exists()


def test_cache_folder_that_is_a_file(cache: Path) -> None:
    cache.write_text("a file")

    not_private(cache)

    assert cache.read_text() == "a file"


def test_cache_folder_under_a_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file")
    monkeypatch.setenv("FUNCTIONAL_OPTIM_CACHE", str(cache / "folder"))

    not_private(cache / "folder")


def test_a_home_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUNCTIONAL_OPTIM_CACHE")
    monkeypatch.setenv("HOME", "/dev/null")  # nobody can make a folder under a file, root included

    not_private(Path("/dev/null/.cache/functional_optim"))


def test_no_writable_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUNCTIONAL_OPTIM_CACHE", "/dev/null/cache")
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/tmp")

    found = warned(lambda: [step(tx) for tx in same_steps() * 2])

    assert len(found) == 1, found
    assert "/dev/null/cache" in found[0]


def test_cache_folder_open_to_other_users(cache: Path) -> None:
    """It is closed, or not used."""
    cache.mkdir()
    cache.chmod(0o777)

    warned(step)

    assert mode(cache) == 0o700 or names(cache) == set()


def test_bytecode_that_somebody_has_put_into_an_open_folder(cache: Path) -> None:
    """Python would run it in place of the source beside it."""
    source, name = "x = 'ours'\n", ""
    module = load_triton(source)
    name = module.__name__
    shutil.rmtree(cache)
    (cache / "__pycache__").mkdir(parents=True)
    cache.chmod(0o777)
    # bytecode that says of itself that its source need not be looked at
    header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8)
    bytecode = Path(importlib.util.cache_from_source(str(cache / f"{name}.py")))
    bytecode.write_bytes(header + marshal.dumps(compile("x = 'theirs'\n", name, "exec")))
    restart()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may say that the folder is not private
        module = load_triton(source)

    assert module.x == "ours"


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_of_somebody_else_is_built_again(library: str, cache: Path, compiler: Compiler) -> None:
    step()
    before = len(compiler.calls_for(library))
    os.chown(only(cache, library), 12345, 12345)
    restart()

    step()

    assert len(compiler.calls_for(library)) > before
    assert only(cache, library).stat().st_uid == os.getuid()


# --- files that are broken


def overwrite(path: Path, content: bytes) -> None:
    """Puts another file in the place of one; memory that a process has of the old one stays as it is."""
    path.unlink()
    path.write_bytes(content)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    overwrite(path, bytes(content))


def make_a_link(path: Path) -> None:
    path.rename(path.with_suffix(".away"))
    path.symlink_to(path.with_suffix(".away"))


BREAK: dict[str, Callable[[Path], None]] = {
    "truncated": lambda path: overwrite(path, path.read_bytes()[:-100]),
    "half": lambda path: overwrite(path, path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: overwrite(path, b""),
    "short": lambda path: overwrite(path, b"x"),
    "garbage": lambda path: overwrite(path, os.urandom(5000)),
    "flipped bit": flip_a_bit,
    "longer": lambda path: overwrite(path, path.read_bytes() + b"x"),
    "a link": make_a_link,
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", BREAK)
def test_a_broken_library_is_built_again(
    name: str, library: str, cache: Path, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step()
    before, good = len(compiler.calls_for(library)), only(cache, library).read_bytes()
    # the loader knows files by name, so what it has loaded is left alone
    shutil.copytree(cache, tmp_path / "copy")
    monkeypatch.setenv("FUNCTIONAL_OPTIM_CACHE", str(tmp_path / "copy"))
    BREAK[name](only(tmp_path / "copy", library))
    restart()

    step()

    mended = only(tmp_path / "copy", library)
    assert len(compiler.calls_for(library)) > before
    assert not mended.is_symlink()
    assert (len(mended.read_bytes()), mended.read_bytes()[:4]) == (
        len(good),
        b"\x7fELF" if sys.platform == "linux" else good[:4],
    )


def test_a_broken_source_of_triton_is_written_again(cache: Path) -> None:
    assert load_triton("x = 1\n").x == 1
    (source,) = cache.glob("*.py")
    source.write_text("x = 2\n")
    restart()

    assert load_triton("x = 1\n").x == 1


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_that_cannot_be_loaded_here(
    library: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is complete, but was made on another machine that has the same home."""
    step()
    shutil.copytree(cache, tmp_path / "copy")
    monkeypatch.setenv("FUNCTIONAL_OPTIM_CACHE", str(tmp_path / "copy"))
    foreign = b"\x7fELF of another system"
    overwrite(only(tmp_path / "copy", library), foreign + hashlib.sha256(foreign).digest())
    restart()

    assert warned(step) == []
    assert only(tmp_path / "copy", library).stat().st_size > 1000


def test_cache_folder_removed_between_steps(cache: Path, compiler: Compiler) -> None:
    step(same_steps()[0])
    shutil.rmtree(cache)

    found = warned(lambda: [step(tx) for tx in same_steps()])

    assert found == []
    assert mode(cache) == 0o700
    assert len(built(cache)) == 2


# --- folders that fail while the process runs


def refuse(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, folder: Path, error: OSError) -> None:
    """Makes a function of the system fail where it is about a folder."""
    function = getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if str(folder) in " ".join(map(str, (*args, *kwargs.values()))):
            raise error
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


FULL, READ_ONLY = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "Read-only file system")
GONE, BROKEN_DISK = FileNotFoundError(errno.ENOENT, "No such file"), OSError(errno.EIO, "Input/output error")
NO_EXEC = OSError("failed to map segment from shared object: Operation not permitted")
REFUSED: dict[str, tuple[Any, str, OSError]] = {
    "full": (tempfile, "mkstemp", FULL),
    "full when it is compiled": (tempfile, "mkdtemp", FULL),
    "full at the end": (os, "replace", FULL),
    "read-only": (tempfile, "mkstemp", READ_ONLY),
    "read-only at the end": (os, "replace", READ_ONLY),
    "gone": (os, "replace", GONE),
    "a broken disk": (tempfile, "mkstemp", BROKEN_DISK),
    "no right to execute": (ctypes, "CDLL", NO_EXEC),
    "no right to make it": (Path, "mkdir", PermissionError(errno.EACCES, "Permission denied")),
    "no right to look": (Path, "lstat", PermissionError(errno.EACCES, "Permission denied")),
}


def built_elsewhere(folder: Path) -> None:
    """Steps by kernels although a folder fails, with one warning, also of kernels that come later."""
    found = warned(lambda: step(same_steps()[0]))
    assert len(found) == 1, found
    assert f"The kernel cache {folder} cannot be used" in found[0]
    assert "FUNCTIONAL_OPTIM_CACHE" in found[0]

    assert warned(lambda: [step(tx) for tx in same_steps() * 2]) == []
    for tx in same_steps():
        assert fo.explain(tx, {"w": torch.zeros(5)}).backends == ("c",)


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_fails(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, function, error = REFUSED[name]
    refuse(monkeypatch, owner, function, cache, error)

    built_elsewhere(cache)


TO_TARGET = 'while [ "$1" != -o ]; do shift; done; '
# The compiler meets it first: it has no room for its output, or someone removes the folder below it.
FAIL_IN_FOLDER = {
    "full": 'echo "No space left on device" >&2; exit 1',
    "full, and nobody notices": "exit 0",
    "full, and half is written": f'{COMPILER} "$@"; {TO_TARGET} truncate -s 5000 "$2"; exit 0',
    "deleted": 'rm -rf "$FUNCTIONAL_OPTIM_CACHE"',
}


@pytest.mark.parametrize("name", FAIL_IN_FOLDER)
def test_a_folder_that_fails_the_compiler(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = f'case "$*" in *"$FUNCTIONAL_OPTIM_CACHE"*) {FAIL_IN_FOLDER[name]};; esac'
    monkeypatch.setenv("CC", str(Compiler(tmp_path, f'{fail}\nexec {COMPILER} "$@"').path))

    built_elsewhere(cache)


@pytest.mark.parametrize("name", ["full", "read-only at the end", "no right to make it"])
def test_a_folder_that_fails_triton(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, function, error = REFUSED[name]
    refuse(monkeypatch, owner, function, cache, error)

    with pytest.warns(UserWarning, match=f"The kernel cache {cache} cannot be used"):
        assert load_triton("x = 1\n").x == 1
    assert load_triton("x = 2\n").x == 2


def test_a_home_that_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is put into the folder that the process happens to be in."""
    monkeypatch.delenv("FUNCTIONAL_OPTIM_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where there is no HOME and no such user
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    built_elsewhere(Path("~/.cache/functional_optim"))

    assert names(tmp_path / "here") == set()


def test_the_warning_says_why_a_folder_is_not_trusted(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o750)

    (found,) = warned(step)

    assert "mode 0750, not 0700" in found


def test_leftovers_of_killed_builds_are_removed_a_day_later(cache: Path) -> None:
    cache.mkdir(0o700)
    two_days_ago = time.time() - 2 * 86400
    for name in (".build_old", ".build_young"):
        (cache / name).mkdir()
        (cache / name / "kernel.c").write_text("")
        (cache / f"{name}_file").write_text("")
    (cache / "notes").write_text("of the user")
    (cache / ".build_old_link").symlink_to(cache / "notes")
    for name in (".build_old", ".build_old_file", ".build_old_link", "notes"):
        os.utime(cache / name, (two_days_ago, two_days_ago), follow_symlinks=False)

    step()

    assert {x for x in names(cache) if Path(x).suffix not in (".c", ".so")} == {
        ".build_young",
        ".build_young_file",
        "notes",
    }


# --- compilers


def test_the_chosen_compiler_is_called(compiler: Compiler) -> None:
    step()

    assert all("-ffp-contract=off" in call and "-shared" in call for call in compiler.calls)
    assert compiler.calls


def test_the_chosen_compiler_may_have_arguments(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{compiler.path} -DMINE=1 -O1")

    step()

    assert compiler.calls
    assert all(call.startswith("-DMINE=1 -O1 ") for call in compiler.calls)


def not_executable(folder: Path) -> str:
    (folder / "plain").write_text("#!/bin/sh\n")
    return str(folder / "plain")


NO_COMPILER: dict[str, Callable[[Path], str]] = {
    "a path to nothing": lambda folder: "/nowhere/cc",
    "a name of nothing": lambda folder: "no-such-cc",
    "with arguments": lambda folder: "no-such-cc -O2",
    "with a space": lambda folder: "/nowhere/my tools/cc",
    "with an open quote": lambda folder: '"/nowhere/cc',
    "empty quotes": lambda folder: '""',
    "a folder": str,
    "not executable": not_executable,
}


@pytest.mark.parametrize("name", NO_COMPILER)
def test_a_chosen_compiler_that_is_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one is used, and a warning names both."""
    cc = NO_COMPILER[name](tmp_path)
    monkeypatch.setenv("CC", cc)

    found = warned(lambda: [step(tx) for tx in same_steps() * 2])

    assert len(found) == 1, found
    assert repr(cc) in found[0]
    assert str(COMPILER) in found[0]
    assert fo.explain(fo.sgd(0.5), {"w": torch.zeros(5)}).backends == ("c",)


@pytest.mark.parametrize("cc", ["", "  "])
def test_no_chosen_compiler(cc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", cc)

    assert warned(step) == []
    assert fo.explain(fo.sgd(0.5), {"w": torch.zeros(5)}).backends == ("c",)


@pytest.mark.parametrize("form", ["{}", "'{}'", '"{}" -DMINE=1', "'{}' '-DMINE=a b'"])
def test_a_chosen_compiler_with_a_space_in_its_path(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my tools").mkdir()
    compiler = Compiler(tmp_path / "my tools", f'exec {COMPILER} "$@"')
    monkeypatch.setenv("CC", form.format(compiler.path))

    assert warned(step) == []
    assert [len(compiler.calls_for(x)) for x in LIBRARIES] == [1, 1]
    assert compiler.calls[0].startswith({"1": "-DMINE=1 ", "'": "-DMINE=a b "}.get(form[-1] * (len(form) > 4), ""))


def test_a_chosen_compiler_with_a_relative_path(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays the same one where the process goes elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CC", "./compiler")
    step(same_steps()[0])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    assert warned(lambda: [step(tx) for tx in same_steps()]) == []
    assert len(compiler.calls_for("kernel")) == len(same_steps())


def test_a_compiler_that_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiler caches and launchers are one program behind links, which looks at the name that it was called by."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script(folder / "launcher", f'case "$0" in */cc) exec {COMPILER} "$@";; *) echo "what am I?" >&2; exit 1;; esac')
    (folder / "cc").symlink_to("launcher")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    step()

    assert fo.explain(fo.sgd(0.5), {"w": torch.zeros(5)}).backends == ("c",)


def test_compilers_and_flags_do_not_share_libraries(
    cache: Path, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = script(tmp_path / "other", f'exec {COMPILER} "$@"')
    counts = []
    for cc in (str(compiler.path), f"{compiler.path} -O1", str(other), f"{other} -O1"):
        monkeypatch.setenv("CC", cc)
        restart()
        step()
        counts.append([len(built(cache, x)) for x in LIBRARIES])
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DMORE"))
    restart()
    step()

    counts.append([len(built(cache, x)) for x in LIBRARIES])
    assert counts == [[n, n] for n in range(1, 6)]


def test_a_compiler_that_is_updated(cache: Path, compiler: Compiler) -> None:
    step()
    compiler.path.write_text(compiler.path.read_text() + "# a new version\n")
    restart()

    step()

    assert [len(built(cache, x)) for x in LIBRARIES] == [2, 2]


def test_a_compiler_that_knows_no_tuning(cache: Path, compiler: Compiler) -> None:
    """It gets the next set of flags, and in the end none."""
    compiler.path.write_text(
        compiler.path.read_text().replace(
            "exec", 'case "$*" in *native*) echo "unknown option" >&2; exit 1;; esac\nexec'
        )
    )

    step()

    for library in LIBRARIES:
        assert len(compiler.calls_for(library)) == len(build.TUNING)
        assert only(cache, library).is_file()


BYTES = r"printf '\377\376 \200 not text \351\n' >&2"
BROKEN = {
    "fails": 'echo "broken for the test" >&2; exit 1',
    "fails without a word": "exit 3",
    "fails with bytes that are not UTF-8": f"{BYTES}; exit 1",
    "says much": "i=0; while [ $i -lt 20000 ]; do echo 0123456789; i=$((i + 1)); done; exit 1",
    "crashes": "kill -9 $$",
    "crashes after it has written": f'{COMPILER} "$@"; kill -11 $$',
    "makes nothing": "exit 0",
    "makes nothing and prints bytes": f"{BYTES}; {BYTES} >&1; exit 0",
    "makes garbage": f'{TO_TARGET} echo garbage > "$2"',
    "makes an empty file": f'{TO_TARGET} : > "$2"',
    "makes a folder": f'{TO_TARGET} mkdir -p "$2"',
    "makes half a library": f'{COMPILER} "$@"; {TO_TARGET} truncate -s 5000 "$2"',
    "makes an object": f'exec {COMPILER} -c "$@"',
    "makes another library": f'{TO_TARGET} echo "int x;" | {COMPILER} -shared -fPIC -xc - -o "$2"',
    "makes another kernel": f'{TO_TARGET} echo "void pass_0(void *l) {{}}" | {COMPILER} -shared -fPIC -xc - -o "$2"',
    "deletes the source": f'for x; do case "$x" in *.c) rm "$x";; esac; done; exec {COMPILER} "$@"',
    "deletes its folder": f'{TO_TARGET} rm -rf "${{2%/*}}"; exit 1',
    "deletes itself": 'rm "$0"; exit 1',
}


def falls_back_once(monkeypatch: pytest.MonkeyPatch, cc: Path, tried: Callable[[], int]) -> str:
    """Steps with a compiler that does not work; returns the one warning.

    The next best backend computes the same, and the compiler is not tried at every step.
    """
    monkeypatch.setenv("CC", str(cc))
    found = warned(lambda: [step(tx) for tx in same_steps()])
    before = tried()

    found += warned(lambda: [step(tx) for tx in same_steps() * 3])

    assert len(found) == 1, found
    assert "Updates are computed without generated kernels" in found[0]
    assert tried() == before
    assert fo.explain(fo.sgd(0.5), {"w": torch.zeros(5)}).backends == ("foreach",)
    return found[0]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_compiler(name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Compiler(tmp_path, BROKEN[name])

    found = falls_back_once(monkeypatch, broken.path, lambda: len(broken.calls))

    assert broken.calls
    assert str(broken.path) in found or name == "deletes its folder"  # which looks like a folder that fails
    assert len(found) < 3000
    assert [x for x in names(cache) if not x.endswith(".c")] == []


def test_a_compiler_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for once, although a process that it has started goes on and holds its output."""
    monkeypatch.setattr(build, "TIMEOUT", 0.2)
    os.mkfifo(tmp_path / "never")
    hanging = Compiler(tmp_path, f"(read x < {tmp_path}/never) &\nread x < {tmp_path}/never")

    found = falls_back_once(monkeypatch, hanging.path, lambda: len(hanging.calls))
    os.close(os.open(tmp_path / "never", os.O_RDWR | os.O_NONBLOCK))

    assert len(hanging.calls) == 1
    assert "has not ended within" in found


def test_a_compiler_that_leaves_a_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of compiler caches keep the output of the first call open; nobody waits for them."""
    monkeypatch.setattr(build, "TIMEOUT", 60.0)
    never = tmp_path / "never"
    os.mkfifo(never)
    compiler = Compiler(tmp_path, f'(read x < {never}) &\nexec {COMPILER} "$@"')
    monkeypatch.setenv("CC", str(compiler.path))

    assert warned(step) == []
    assert fo.explain(fo.sgd(0.5), {"w": torch.zeros(5)}).backends == ("c",)
    with never.open("w"):
        pass  # lets it end


def test_a_compiler_that_is_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "compiler"
    program.write_bytes(b"\x00\x01\x02 no program")
    program.chmod(0o755)

    assert str(program) in falls_back_once(monkeypatch, program, lambda: 0)


@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_compiler_that_is_deleted(
    steps_before: int, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it has been found, and after it has been used."""
    assert build.find_compiler() == (str(compiler.path),)
    for _ in range(steps_before):
        step()
    compiler.path.unlink()

    found = warned(lambda: [step(tx) for tx in same_steps()[1:] * 3])

    assert len(found) == 1, found
    assert str(compiler.path) in found[0]


def test_a_compiler_that_works_and_prints_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(tmp_path, f'{BYTES}; {BYTES} 2>&1; exec {COMPILER} "$@"')
    monkeypatch.setenv("CC", str(compiler.path))

    assert warned(lambda: [step(tx) for tx in same_steps()]) == []
    assert fo.explain(fo.sgd(0.5), {"w": torch.zeros(5)}).backends == ("c",)


def test_a_broken_compiler_that_is_mended_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels are not taken for good ones by later processes."""
    flag = tmp_path / "broken"
    flag.touch()
    compiler = Compiler(
        tmp_path, f'if [ -e {flag} ]; then {BROKEN["makes another kernel"]}; exit 0; fi\nexec {COMPILER} "$@"'
    )
    monkeypatch.setenv("CC", str(compiler.path))
    assert len(warned(step)) == 1
    flag.unlink()

    assert finish(start()) == (0, "done\n", "")


# --- the first step of a process, which has registered no operation yet


STEPS = f"""
import json, os, sys, warnings
sys.path.insert(0, {str(ROOT)!r})
import torch
import functional_optim as fo
from functional_optim._compiler.c import build
from functional_optim.adapters import TransformOptimizer
build.TIMEOUT = float(os.environ.get("TIMEOUT", build.TIMEOUT))
found = []
warnings.simplefilter("always")
warnings.showwarning = lambda message, *_: found.append(str(message))
for tx in (fo.sgd(0.5), fo.chain(fo.trace(0.9), fo.scale(-0.5)), fo.sgd(0.5)):
    params, grads = {{"w": torch.arange(5.0)}}, {{"w": torch.ones(5)}}
    new, _ = fo.apply_gradients(tx, params, grads, tx.init(params))
    assert torch.equal(new["w"], torch.arange(5.0) - 0.5), new
    p = torch.nn.Parameter(torch.arange(5.0))
    p.grad = torch.ones(5)
    TransformOptimizer([p], tx).step()
    assert torch.equal(p.detach(), torch.arange(5.0) - 0.5), p
print(json.dumps([found, fo.explain(tx, params).backends]))
"""
# all libraries, or one alone, which is not built, or cannot be loaded
FIRST_STEP = [
    ("fails", "$library"),
    ("makes garbage", "$library"),
    ("fails", "pointers"),
    ("crashes after it has written", "pointers"),
    ("makes nothing", "pointers"),
    ("makes another library", "pointers"),
]


@pytest.mark.parametrize(("name", "library"), FIRST_STEP)
def test_a_broken_compiler_in_a_new_process(
    name: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One warning, and every step is right, whichever library cannot be built."""
    broken = Compiler(tmp_path, f'if [ {library} = $library ]; then {BROKEN[name]}; exit; fi\nexec {COMPILER} "$@"')
    monkeypatch.setenv("CC", str(broken.path))

    steps_without_kernels()


def test_a_compiler_that_hangs_in_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for once, not once for each library."""
    os.mkfifo(tmp_path / "never")
    hanging = Compiler(tmp_path, f"read x < {tmp_path}/never")
    monkeypatch.setenv("CC", str(hanging.path))

    steps_without_kernels(TIMEOUT="0.2")

    assert len(hanging.calls) == 1


def steps_without_kernels(**variables: str) -> None:
    """Takes `STEPS` in a new process, which must say once that there are no kernels."""
    returncode, out, err = finish(start(STEPS, **variables))

    assert (returncode, err) == (0, "")
    found, backends = json.loads(out)
    assert len(found) == 1, found
    assert "Updates are computed without generated kernels" in found[0]
    assert backends == ["foreach"]


# --- memory of the process


def test_clear_finds_the_compiler_again(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.find_compiler() == (str(compiler.path),)
    monkeypatch.setenv("CC", f"{compiler.path} -O1")

    assert build.find_compiler() == (str(compiler.path),)
    kernel_cache.clear()
    assert build.find_compiler() == (str(compiler.path), "-O1")


def test_clear_loads_again_and_builds_nothing(compiler: Compiler) -> None:
    library, module = build.load_c("int x = 1;"), load_triton("x = 1\n")
    assert build.load_c("int x = 1;") is library
    assert load_triton("x = 1\n") is module

    kernel_cache.clear()

    assert build.load_c("int x = 1;") is not library
    assert load_triton("x = 1\n") is not module
    assert len(compiler.calls) == 1


def test_clear_warns_again(cache: Path) -> None:
    cache.write_text("no folder")
    assert len(warned(lambda: build.load_c("int x = 1;"))) == 1
    assert warned(lambda: build.load_c("int x = 2;")) == []

    kernel_cache.clear()

    assert len(warned(lambda: build.load_c("int x = 2;"))) == 1


def test_the_latest_kernels_are_kept() -> None:
    built = []

    def make(source: str, folder: Path) -> str:
        built.append(source)
        return source.upper()

    kernels = kernel_cache.Kernels(make, most=2)

    assert [kernels.get(x) for x in "abab"] == ["A", "B", "A", "B"]
    assert [kernels.get(x) for x in "cbca"] == ["C", "B", "C", "A"]
    assert built == ["a", "b", "c", "a"]


# --- several at once


def test_threads_that_want_the_same_kernel(cache: Path, compiler: Compiler) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: step(), range(4)))

    for library in LIBRARIES:
        assert len(compiler.calls_for(library)) == 1
        assert only(cache, library).is_file()


PROCESS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import functional_optim as fo
params = {{"w": torch.arange(5.0)}}
tx = fo.sgd(0.5)
new, _ = fo.apply_gradients(tx, params, {{"w": torch.ones(5)}}, tx.init(params))
assert torch.equal(new["w"], torch.arange(5.0) - 0.5), new
assert fo.explain(tx, params).backends == ("c",)
print("done")
"""


def start(code: str = PROCESS, **variables: str) -> "subprocess.Popen[str]":
    """Starts a process that takes the step, in a group of its own."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        if process.returncode is None:  # with the compiler that it waits for; its pipes are closed as well
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode, out, err


def wait_for(fifo: Path, process: "subprocess.Popen[str]") -> None:
    """Waits until somebody writes to a fifo; a process that ends before that is a failure."""
    end = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    try:
        while not select.select([end], [], [], 0.1)[0]:
            assert process.poll() is None, finish(process)
    finally:
        os.close(end)


@pytest.mark.parametrize("library", LIBRARIES)
def test_two_processes_that_build_the_same_library(
    library: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are within the compiler at the same time: the first one there waits for the other."""
    meet = tmp_path / "meet"
    os.mkfifo(meet)
    wait = f"if mkdir {tmp_path}/first 2> /dev/null; then read x < {meet}; else echo > {meet}; fi"
    compiler = Compiler(tmp_path, f'if [ $library = {library} ]; then {wait}; fi\nexec {COMPILER} "$@"')
    monkeypatch.setenv("CC", str(compiler.path))
    processes = [start(), start()]

    results = list(map(finish, processes))

    assert results == [(0, "done\n", "")] * 2
    assert len(compiler.calls_for(library)) == 2
    stems = [only(cache, x).stem for x in LIBRARIES]
    assert names(cache) == {f"{stem}{suffix}" for stem in stems for suffix in (".so", ".c")}
    # and this process finds what they have left
    before = compiler.calls
    step()
    assert compiler.calls == before


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_build_that_is_killed(library: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, never = tmp_path / "started", tmp_path / "never"
    os.mkfifo(started)
    os.mkfifo(never)
    # half a library is there, and the compiler hangs
    half = 'for x; do [ "$before" = -o ] && echo half > "$x"; before=$x; done'
    hang = f'if [ "$HANG" = $library ]; then {half}; echo > {started}; read x < {never}; fi'
    compiler = Compiler(tmp_path, f'{hang}\nexec {COMPILER} "$@"')
    monkeypatch.setenv("CC", str(compiler.path))
    process = start(HANG=library)
    wait_for(started, process)

    os.killpg(process.pid, signal.SIGKILL)
    returncode, _, _ = finish(process)

    assert returncode == -signal.SIGKILL
    assert built(cache, library) == []
    step()
    assert only(cache, library).is_file()
    assert len(compiler.calls_for(library)) == 2
