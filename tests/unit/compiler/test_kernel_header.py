"""The C that every emitted kernel starts with, as a file of its own."""

import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

from functional_optim._compiler.c.build import find_compiler
from functional_optim._compiler.c.emit import prelude


@pytest.mark.parametrize("text", [None, prelude("float"), prelude("double")], ids=["alone", "float", "double"])
@pytest.mark.parametrize("halves", ["-DSOFT_F16", "-DHARD_F16"])
def test_the_header_compiles_without_a_warning(text: str | None, halves: str, tmp_path: Path) -> None:
    """Alone too, as an editor reads it. Kernels do not use all of its functions."""
    command = find_compiler()
    if command is None:
        pytest.skip("there is no C compiler")
    header = files("functional_optim._compiler.c").joinpath("kernel.h").read_text("utf-8")
    (tmp_path / "kernel.c").write_text(header if text is None else text)

    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", halves, "-fsyntax-only"]
    done = subprocess.run([*command, *flags, str(tmp_path / "kernel.c")], capture_output=True, text=True, timeout=100)

    assert not done.returncode, done.stderr
