"""Compilers that are scripts, and steps that build kernels with them."""

import functools
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import functional_optim as fo
from functional_optim._compiler import cache as kernel_cache
from functional_optim._runtime import (
    backend as _backend,
    pointers,
)


COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


# A process builds a library for each program, and one that reads pointers and starts kernels.
POINTERS = Path(pointers.__file__).with_suffix(".c").read_text()
LIBRARIES = ("kernel", "pointers")


def restart() -> None:
    """Clears the caches of this process: compilers, kernels, warnings; classes of states stay."""
    kernel_cache.clear()
    for name, module in list(sys.modules.items()):
        if name.startswith("functional_optim."):
            for x in vars(module).values():
                if isinstance(x, functools._lru_cache_wrapper):
                    x.cache_clear()
    _backend.enable_backends()


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


TO_TARGET = 'while [ "$1" != -o ]; do shift; done; '


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
