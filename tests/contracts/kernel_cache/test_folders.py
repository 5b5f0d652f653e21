"""Folders of the kernel cache: private, done without where they are not safe or fail."""

import ctypes
import errno
import importlib.util
import marshal
import os
import shutil
import stat
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.compilers import COMPILER, TO_TARGET, Compiler, built, names, only, restart, same_steps, step, warned
from functional_optim._compiler.triton.build import load_triton


pytestmark = [
    pytest.mark.slow,  # kernels are compiled anew
    pytest.mark.skipif(COMPILER is None, reason="no C compiler"),
    pytest.mark.skipif(sys.platform == "win32", reason="folders have no modes"),
]


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
