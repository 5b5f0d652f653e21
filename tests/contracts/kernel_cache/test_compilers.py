"""C compilers: chosen, broken, missing, and done without."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import functional_optim as fo
from _lib.compilers import (
    BROKEN,
    BYTES,
    COMPILER,
    LIBRARIES,
    Compiler,
    built,
    names,
    only,
    restart,
    same_steps,
    script,
    step,
    warned,
)
from functional_optim._compiler.c import build


pytestmark = [
    pytest.mark.slow,  # kernels are compiled anew
    pytest.mark.skipif(COMPILER is None, reason="no C compiler"),
    pytest.mark.skipif(sys.platform == "win32", reason="folders have no modes"),
]


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
