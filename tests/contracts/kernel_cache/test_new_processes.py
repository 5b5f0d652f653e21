"""Processes that build kernels: with compilers that do not work, several at once, and killed."""

import json
import os
import select
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from _lib.compilers import BROKEN, COMPILER, LIBRARIES, Compiler, built, names, only, step, warned
from _lib.processes import Program, run_program


pytestmark = [
    pytest.mark.slow,  # kernels are compiled anew
    pytest.mark.skipif(COMPILER is None, reason="no C compiler"),
    pytest.mark.skipif(sys.platform == "win32", reason="folders have no modes"),
]
ROOT = Path(__file__).parents[3]


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

    assert run_program(PROCESS, tmp_path) == "done\n"


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

    steps_without_kernels(tmp_path)


def test_a_compiler_that_hangs_in_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for once, not once for each library."""
    os.mkfifo(tmp_path / "never")
    hanging = Compiler(tmp_path, f"read x < {tmp_path}/never")
    monkeypatch.setenv("CC", str(hanging.path))

    steps_without_kernels(tmp_path, TIMEOUT="0.2")

    assert len(hanging.calls) == 1


def steps_without_kernels(folder: Path, **variables: str) -> None:
    """Takes `STEPS` in a new process, which must say once that there are no kernels."""
    found, backends = json.loads(run_program(STEPS, folder, environment=variables))
    assert len(found) == 1, found
    assert "Updates are computed without generated kernels" in found[0]
    assert backends == ["foreach"]


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


def wait_for(fifo: Path, program: Program) -> None:
    """Waits until somebody writes to a fifo; a process that ends before that is a failure."""
    end = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    try:
        while not select.select([end], [], [], 0.1)[0]:
            assert not program.ended(), program.finish()
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
    programs = [Program(PROCESS, tmp_path), Program(PROCESS, tmp_path)]

    results = [program.finish() for program in programs]

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
    program = Program(PROCESS, tmp_path, environment={"HANG": library})
    wait_for(started, program)

    program.kill()
    returncode, _, _ = program.finish()

    assert returncode == -signal.SIGKILL
    assert built(cache, library) == []
    step()
    assert only(cache, library).is_file()
    assert len(compiler.calls_for(library)) == 2
