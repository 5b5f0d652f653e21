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
def interrupted(at: int = 0) -> Iterator[list[Line]]:
    """Raises `Interrupt` once, at one of the lines that the package runs, and ends with it.

    Args:
      at: the position of that line among those that are run, from 1 on; 0 interrupts nothing.

    Returns:
      The context manager, of a list of the lines that have been run.
    """
    lines: list[Line] = []
    package = str(PACKAGE)

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
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


def lines_of(step: Callable[[], Any]) -> list[Line]:
    """The lines that a step runs."""
    with interrupted() as lines:
        step()
    return lines


def once(lines: Sequence[Line]) -> list[int]:
    """Positions at which to interrupt so that each line is met once, apart from those of the compiler."""
    first = {line: at for at, line in reversed(list(enumerate(lines, 1)))}
    compiler = str(PACKAGE / "_compiler")
    return sorted(at for (file, _), at in first.items() if not file.startswith(compiler))
