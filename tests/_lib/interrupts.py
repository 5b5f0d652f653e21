"""Interrupts at a chosen line of the package."""

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import functional_optim


PACKAGE = Path(functional_optim.__file__).parent
Line = tuple[str, int]


class Interrupt(BaseException):
    """The exception of an interrupt, which nothing catches by its name."""


@contextlib.contextmanager
def interrupted(at: int = 0, compiler: bool = True, before: Callable[[], None] = lambda: None) -> Iterator[list[Line]]:
    """Raises `Interrupt` once, at one of the lines that the package runs, and ends with it.

    Args:
      at: the position of that line among those that are run, from 1 on; 0 interrupts nothing.
      compiler: whether lines of the compiler count, of which a step that binds runs thousands.
      before: what is called before each line that counts.

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
            before()
            lines.append((file, frame.f_lineno))
            if len(lines) == at:
                raise Interrupt
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    except Interrupt:
        pass
    finally:
        sys.settrace(outer)


def apart(step: Callable[[], Any]) -> None:
    """Calls a function from a generator, which has a stack of its own of the exceptions that are being handled.

    One that is interrupted in the last line of an `except` block leaves its exception there; on the stack of the test
    it would be the context of all later ones, and keep their frames alive.
    """

    def steps() -> Iterator[None]:
        yield step()

    for _ in steps():
        pass


def lines_of(step: Callable[[], Any], compiler: bool = True) -> list[Line]:
    """The lines that a step runs."""
    with interrupted(compiler=compiler) as lines:
        step()
    return lines


class Lines(NamedTuple):
    """The lines that a step runs."""

    before: list[Line]  # up to the first write to parameters or state, with the line that writes
    after: list[Line]

    def positions(
        self, known: Collection[Line], visits: Callable[[Sequence[Line]], list[int]], files: Collection[str] = ()
    ) -> list[int]:
        """Positions at which to interrupt: lines that are new, and all that run after the first write.

        Args:
          known: the lines that steps of other tests run. Before a write nothing is there that a step could leave half
            done, but for what the package keeps of steps, which is the same for all.
          visits: `once` or `ends`.
          files: the files whose lines are interrupted after the first write, known or not; empty for all files.
        """
        lines = [*self.before, *self.after]
        new = {at for at in visits(lines) if lines[at - 1] not in known}
        late = {len(self.before) + at for at in visits(self.after)}
        return sorted(new | {at for at in late if not files or lines[at - 1][0] in files})


def watched(step: Callable[[], Any], changed: Callable[[], bool], compiler: bool = True) -> Lines:
    """The lines that a step runs before parameters or state have `changed`, and those after that."""
    before: list[bool] = []

    def look() -> None:
        before.append(before[-1:] != [False] and not changed())

    with interrupted(compiler=compiler, before=look) as lines:
        step()
    count = before.index(False) if False in before else len(lines)
    return Lines(lines[:count], lines[count:])


def once(lines: Sequence[Line]) -> list[int]:
    """Positions at which to interrupt so that each line is met when it is run first."""
    return sorted({line: at for at, line in reversed(list(enumerate(lines, 1)))}.values())


def ends(lines: Sequence[Line]) -> list[int]:
    """Positions at which to interrupt so that each line is met when it is run first and when it is run last."""
    return sorted({*once(lines), *{line: at for at, line in enumerate(lines, 1)}.values()})
