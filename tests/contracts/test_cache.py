"""The kernel cache and the compiler: private, shared by processes, mended when broken, done without when missing."""

import functools
import importlib.util
import marshal
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_optim as fo
from functional_optim._compiler import build
from functional_optim._runtime import backend as _backend


COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
pytestmark = [
    pytest.mark.slow,  # kernels are compiled anew
    pytest.mark.skipif(COMPILER is None, reason="no C compiler"),
    pytest.mark.skipif(sys.platform == "win32", reason="folders have no modes"),
]
ROOT = Path(__file__).parents[2]


def restart() -> None:
    """Forgets all that this process has found out, loaded and warned of; classes of states stay what they are."""
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
      text: what it does after it has noted the call.
    """

    def __init__(self, folder: Path, text: str = f'exec {COMPILER} "$@"') -> None:
        self.log = folder / "log"
        self.path = script(folder / "compiler", f'echo "$@" >> {self.log}\n{text}')

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


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


# The same step by programs of their own.
SAME_STEPS = [fo.sgd(0.5), fo.chain(fo.trace(0.9), fo.scale(-0.5)), fo.chain(fo.scale_by_sign(), fo.scale(-0.5))]


def warned(call: Callable[[], Any]) -> list[str]:
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in found]


def names(folder: Path) -> set[str]:
    return {x.name for x in folder.iterdir()}


def only(folder: Path, suffix: str) -> Path:
    (found,) = (x for x in folder.iterdir() if x.suffix == suffix)
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


def test_cache_holds_a_kernel_and_its_source_only(cache: Path) -> None:
    step()

    stem = only(cache, ".so").stem
    assert names(cache) == {f"{stem}.so", f"{stem}.c"}
    (kernel,) = fo.explain(fo.sgd(0.5), {"w": torch.zeros(5)}).kernels
    assert (cache / f"{stem}.c").read_text().startswith(kernel.source)


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

    assert only(tmp_path / expected, ".so").is_file()


def test_hyper_parameter_values_share_a_kernel(cache: Path, compiler: Compiler) -> None:
    for tx in (fo.sgd(0.5), fo.sgd(torch.tensor(0.5)), fo.sgd(fo.constant_schedule(0.5))):
        step(tx)
    for rate in (0.1, 0.2, 0.3):
        tx, params = fo.sgd(rate), {"w": torch.ones(9), "v": torch.ones(2)}
        fo.apply_gradients(tx, params, params, tx.init(params))

    # a number, or a tensor; a schedule that is a constant has a counter, and may or may not be the same program
    assert len([x for x in names(cache) if x.endswith(".so")]) <= 2


# --- folders that are not safe


def not_private(folder: Path) -> None:
    """Takes a step that must not put anything into a folder, and says so, once."""
    found = warned(lambda: [step(tx) for tx in SAME_STEPS[:2]])

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

    found = warned(lambda: [step(tx) for tx in SAME_STEPS * 2])

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
    module = build.load_triton(source)
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
        module = build.load_triton(source)

    assert module.x == "ours"


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give files away")
def test_a_kernel_of_somebody_else_is_built_again(cache: Path, compiler: Compiler) -> None:
    step()
    before = len(compiler.calls)
    os.chown(only(cache, ".so"), 12345, 12345)
    restart()

    step()

    assert len(compiler.calls) > before
    assert only(cache, ".so").stat().st_uid == os.getuid()


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


@pytest.mark.parametrize("name", BREAK)
def test_a_broken_kernel_is_built_again(
    name: str, cache: Path, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step()
    before, good = len(compiler.calls), only(cache, ".so").read_bytes()
    # the loader knows files by name, so what it has loaded is left alone
    shutil.copytree(cache, tmp_path / "copy")
    monkeypatch.setenv("FUNCTIONAL_OPTIM_CACHE", str(tmp_path / "copy"))
    BREAK[name](only(tmp_path / "copy", ".so"))
    restart()

    step()

    kernel = only(tmp_path / "copy", ".so")
    assert len(compiler.calls) > before
    assert not kernel.is_symlink()
    assert (len(kernel.read_bytes()), kernel.read_bytes()[:4]) == (
        len(good),
        b"\x7fELF" if sys.platform == "linux" else good[:4],
    )


def test_a_broken_source_of_triton_is_written_again(cache: Path) -> None:
    assert build.load_triton("x = 1\n").x == 1
    only(cache, ".py").write_text("x = 2\n")
    restart()

    assert build.load_triton("x = 1\n").x == 1


def test_cache_folder_removed_between_steps(cache: Path, compiler: Compiler) -> None:
    step(SAME_STEPS[0])
    shutil.rmtree(cache)

    found = warned(lambda: [step(tx) for tx in SAME_STEPS])

    assert len(found) <= 1, found


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


def test_a_chosen_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc")

    step()

    assert fo.explain(fo.sgd(0.5), {"w": torch.zeros(5)}).backends == ("c",)


def test_a_compiler_that_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiler caches and launchers are one program behind links, which looks at the name that it was called by."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script(folder / "launcher", f'case "$0" in */cc) exec {COMPILER} "$@";; *) echo "what am I?" >&2; exit 1;; esac')
    (folder / "cc").symlink_to("launcher")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    step()

    assert fo.explain(fo.sgd(0.5), {"w": torch.zeros(5)}).backends == ("c",)


def test_compilers_and_flags_do_not_share_kernels(
    cache: Path, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = script(tmp_path / "other", f'exec {COMPILER} "$@"')
    kernels = []
    for cc in (str(compiler.path), f"{compiler.path} -O1", str(other), f"{other} -O1"):
        monkeypatch.setenv("CC", cc)
        restart()
        step()
        kernels.append(len([x for x in names(cache) if x.endswith(".so")]))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DMORE"))
    restart()
    step()

    assert [*kernels, len([x for x in names(cache) if x.endswith(".so")])] == [1, 2, 3, 4, 5]


def test_a_compiler_that_is_updated(cache: Path, compiler: Compiler) -> None:
    step()
    compiler.path.write_text(compiler.path.read_text() + "# a new version\n")
    restart()

    step()

    assert len([x for x in names(cache) if x.endswith(".so")]) == 2


def test_a_compiler_that_knows_no_tuning(cache: Path, compiler: Compiler) -> None:
    """It gets the next set of flags, and in the end none."""
    compiler.path.write_text(
        compiler.path.read_text().replace(
            "exec", 'case "$*" in *native*) echo "unknown option" >&2; exit 1;; esac\nexec'
        )
    )

    step()

    assert len(compiler.calls) == len(build.TUNING)
    assert only(cache, ".so").is_file()


TO_TARGET = 'while [ "$1" != -o ]; do shift; done; '
BROKEN = {
    "fails": 'echo "broken for the test" >&2; exit 1',
    "crashes": "kill -9 $$",
    "makes nothing": "exit 0",
    "makes garbage": f'{TO_TARGET} echo garbage > "$2"',
    "makes an empty file": f'{TO_TARGET} : > "$2"',
    "makes another library": f'{TO_TARGET} echo "int x;" | {COMPILER} -shared -fPIC -xc - -o "$2"',
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_compiler(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next best backend computes the same, there is one warning, and the compiler is not tried at every step."""
    broken = Compiler(tmp_path, BROKEN[name])
    monkeypatch.setenv("CC", str(broken.path))
    found = warned(lambda: [step(tx) for tx in SAME_STEPS])
    tried = len(broken.calls)

    found += warned(lambda: [step(tx) for tx in SAME_STEPS * 3])

    assert len(found) == 1, found
    assert "Updates are computed without generated kernels" in found[0]
    assert tried >= 1
    assert len(broken.calls) == tried


def test_the_warning_quotes_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Compiler(tmp_path, BROKEN["fails"])
    monkeypatch.setenv("CC", str(broken.path))

    with pytest.warns(UserWarning, match=rf"{broken.path} failed:\nbroken for the test"):
        step()


def test_explain_knows_of_a_broken_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(Compiler(tmp_path, BROKEN["fails"]).path))
    warned(step)

    e = fo.explain(fo.sgd(0.5), {"w": torch.zeros(5)})

    assert e.backends == ("foreach",)
    assert any("failed" in note for note in e.notes)


def test_donated_steps_with_a_broken_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(Compiler(tmp_path, BROKEN["fails"]).path))
    tx, params = fo.sgd(0.5, momentum=0.9), {"w": torch.zeros(3)}
    state = tx.init(params)

    def steps() -> None:
        for _ in range(2):
            fo.apply_gradients(tx, params, {"w": torch.ones(3)}, state, donate=True)

    assert len(warned(steps)) == 1
    torch.testing.assert_close(params["w"], torch.full((3,), -0.5 * (1 + 1.9)))


@pytest.mark.parametrize("asked", [None, "c"])
def test_no_compiler(asked: str | None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")

    def steps() -> None:
        for tx in SAME_STEPS * 3:
            if asked is None:
                step(tx)
            else:
                with fo.use_backend(asked):
                    step(tx)

    found = warned(steps)
    e = fo.explain(fo.sgd(0.5), {"w": torch.zeros(5)})

    assert len(found) == 1, found
    assert "there is no C compiler" in found[0]
    assert e.backends == ("foreach",)
    assert any("there is no C compiler" in note for note in e.notes)
    assert not cache.exists()


def test_no_warning_where_no_compiler_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")

    for backend in ("reference", "foreach"):
        with fo.use_backend(backend):
            step()


# --- several at once


def test_threads_that_want_the_same_kernel(cache: Path, compiler: Compiler) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: step(), range(4)))

    assert len(compiler.calls) == 1
    assert only(cache, ".so").is_file()


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


def start(**variables: str) -> "subprocess.Popen[str]":
    """Starts a process that takes the step, in a group of its own."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROCESS],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_two_processes_that_build_the_same_kernel(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are within the compiler at the same time: the first one there waits for the other."""
    meet = tmp_path / "meet"
    os.mkfifo(meet)
    wait = f"if mkdir {tmp_path}/first 2> /dev/null; then read x < {meet}; else echo > {meet}; fi"
    compiler = Compiler(tmp_path, f'{wait}\nexec {COMPILER} "$@"')
    monkeypatch.setenv("CC", str(compiler.path))
    processes = [start(), start()]

    results = list(map(finish, processes))

    assert results == [(0, "done\n", "")] * 2
    assert len(compiler.calls) == 2
    stem = only(cache, ".so").stem
    assert names(cache) == {f"{stem}.so", f"{stem}.c"}
    # and this process finds what they have left
    step()
    assert len(compiler.calls) == 2


def test_a_build_that_is_killed(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, never = tmp_path / "started", tmp_path / "never"
    os.mkfifo(started)
    os.mkfifo(never)
    # half a kernel is there, and the compiler hangs
    half = 'for x; do [ "$before" = -o ] && echo half > "$x"; before=$x; done'
    hang = f'if [ "$HANG" ]; then {half}; echo > {started}; read x < {never}; fi'
    compiler = Compiler(tmp_path, f'{hang}\nexec {COMPILER} "$@"')
    monkeypatch.setenv("CC", str(compiler.path))
    process = start(HANG="1")
    started.read_text()  # until the compiler is there

    os.killpg(process.pid, signal.SIGKILL)
    returncode, _, _ = finish(process)

    assert returncode == -signal.SIGKILL
    assert not [x for x in names(cache) if x.endswith(".so")]
    step()
    assert only(cache, ".so").is_file()
    assert len(compiler.calls) == 2
