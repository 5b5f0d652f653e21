"""Files of the kernel cache that are broken or foreign, and kernels in memory."""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from _lib.compilers import COMPILER, LIBRARIES, Compiler, only, restart, step, warned
from functional_optim._compiler import cache as kernel_cache
from functional_optim._compiler.c import build
from functional_optim._compiler.triton.build import load_triton


pytestmark = [
    pytest.mark.slow,  # kernels are compiled anew
    pytest.mark.skipif(COMPILER is None, reason="no C compiler"),
    pytest.mark.skipif(sys.platform == "win32", reason="folders have no modes"),
]


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

    kernels = kernel_cache.KernelCache(make, most=2)

    assert [kernels.get(x) for x in "abab"] == ["A", "B", "A", "B"]
    assert [kernels.get(x) for x in "cbca"] == ["C", "B", "C", "A"]
    assert built == ["a", "b", "c", "a"]
