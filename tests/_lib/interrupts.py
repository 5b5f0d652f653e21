"""Interrupts at a chosen line of the package."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import functional_optim


PACKAGE = Path(functional_optim.__file__).parent
Line = tuple[str, int]


class Interrupt(BaseException):
    """The exception of an interrupt, which nothing catches by its name."""


@contextlib.contextmanager
def interrupted(at: int = 0, compiler: bool = True) -> Iterator[list[Line]]:
    """Raises `Interrupt` once, at one of the lines that the package runs, and ends with it.

    Args:
      at: the position of that line among those that are run, from 1 on; 0 interrupts nothing.
      compiler: whether lines of the compiler count, of which a step that binds runs thousands.

    Returns:
      The context manager, of a list of the lines that have been run.
    """
    lines: list[Line] = []
    package, left_out = str(PACKAGE), str(PACKAGE / "_compiler")

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(package) or (not compiler and file.startswith(left_out)):
            return None
        if event == "line":
            lines.append((file, frame.f_lineno))
            if len(lines) == at:
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    except Interrupt:
        pass
    finally:
        sys.settrace(before)


def lines_of(step: Callable[[], Any], compiler: bool = True) -> list[Line]:
    """The lines that a step runs."""
    with interrupted(compiler=compiler) as lines:
        step()
    return lines


def once(lines: Sequence[Line]) -> list[int]:
    """Positions at which to interrupt so that each line is met when it is run first."""
    return sorted({line: at for at, line in reversed(list(enumerate(lines, 1)))}.values())


def ends(lines: Sequence[Line]) -> list[int]:
    """Positions at which to interrupt so that each line is met when it is run first and when it is run last."""
    return sorted({*once(lines), *{line: at for at, line in enumerate(lines, 1)}.values()})
