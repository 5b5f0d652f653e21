"""Errors of rules: they name the rule's own line, and their tracebacks show no other."""

import os
import re
import traceback
from types import TracebackType

import torch


_TORCH = os.path.dirname(torch.__file__) + os.sep
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_COMPILER = os.path.dirname(__file__) + os.sep


class RuleError(TypeError):
    """Error of a rule that cannot become a kernel. The message names its line and a remedy.

    Example:
      >>> from functional_optim import elementwise
      >>> @elementwise
      ... def sort(u):
      ...     return u.sort()[0]
      >>> sort().update(torch.ones(2), sort().init(torch.ones(2)))  # doctest: +IGNORE_EXCEPTION_DETAIL
      Traceback (most recent call last):
        ...
      functional_optim.RuleError: `sort` uses `sort`, which has no row in the operation table.
    """


class ShortTracebacks:
    """Context in which the traceback of a `RuleError` loses the lines of this package and of torch."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not isinstance(error, RuleError) or tb is None:
            return
        kept: list[TracebackType] = []
        rest = tb.tb_next
        while rest is not None:
            if not rest.tb_frame.f_code.co_filename.startswith((_PACKAGE, _TORCH)):
                kept.append(rest)
            rest = rest.tb_next
        for each in reversed(kept):
            rest = TracebackType(rest, each.tb_frame, each.tb_lasti, each.tb_lineno)
        error.__traceback__ = TracebackType(rest, tb.tb_frame, tb.tb_lasti, tb.tb_lineno)


def user_frame() -> traceback.FrameSummary | None:
    """The innermost line outside the compiler and torch: the rule's own."""
    frames = reversed(traceback.extract_stack())
    return next((x for x in frames if not x.filename.startswith((_COMPILER, _TORCH))), None)


def where() -> str:
    """Names the line of the rule."""
    frame = user_frame()
    return "A rule" if frame is None else f"`{frame.name}` ({frame.filename}:{frame.lineno}: `{frame.line}`)"


_OF_NUMBERS = re.compile(
    r"must be Tensor, not (float|int|bool)\b"
    r"|got \((float|int|bool)\b"
    r"|^'(float|int|bool)' object has no attribute '(\w+)'"
)


def note_number(error: BaseException, instead: str) -> None:
    """Adds to an error of torch, or of Python, about a number in the place of a tensor how to write it.

    Args:
      error: the error, which gets a note if it is such a one and has none yet.
      instead: an operation of a number, as it is written there.
    """
    note = "numbers are Python's here, where they are not given as tensors; an operation of torch takes one as a "
    noted = any(x.startswith(note) for x in getattr(error, "__notes__", ()))
    found = _OF_NUMBERS.search(str(error))
    if found and not noted and (found[4] is None or hasattr(torch.Tensor, found[4])):
        error.add_note(f"{note}tensor: {instead}")
