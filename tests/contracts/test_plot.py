"""Plots of schedules."""

import builtins
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure

import functional_optim as fo


LINE = fo.linear_schedule(0.0, 1.0, 4)
TABLE = [3.0, 2.0, 1.0]


def test_lines_are_the_values_of_schedules_functions_and_numbers() -> None:
    axes = Figure().subplots()

    drawn = fo.plot.schedules(LINE, lambda t: TABLE[t], 0.5, steps=3, ax=axes)

    assert drawn is axes
    assert [list(line.get_xdata()) for line in drawn.lines] == [[0, 1, 2]] * 3
    assert [list(line.get_ydata()) for line in drawn.lines] == [[0.0, 0.25, 0.5], TABLE, [0.5] * 3]
    assert (drawn.get_xlabel(), drawn.get_ylabel()) == ("step", "value")
    assert [text.get_text() for text in drawn.get_legend().get_texts()] == [repr(LINE), "<lambda>", "0.5"]


def test_some_steps_and_names_of_ones_own() -> None:
    drawn = fo.plot.schedules(LINE, LINE * 2, steps=range(1, 9, 3), labels=["one", "_two"], ax=Figure().subplots())

    assert list(drawn.lines[1].get_xdata()) == [1, 4, 7]
    assert list(drawn.lines[1].get_ydata()) == [0.5, 2.0, 2.0]
    assert [text.get_text() for text in drawn.get_legend().get_texts()] == ["one", "two"]


def test_axes_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    drawn = fo.plot.schedules(LINE, steps=3)
    try:
        assert isinstance(drawn.figure, pyplot.Figure)
        assert len(drawn.lines) == 1
    finally:
        pyplot.close(drawn.figure)


def test_the_message_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Callable[..., Any] = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install functional_optim\[plot\]"):
        fo.plot.schedules(LINE, steps=3)


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: fo.plot.schedules(steps=3), ValueError, "nothing to draw: got 0 schedules"),
    (lambda: fo.plot.schedules(LINE, steps=0), ValueError, "nothing to draw: .* steps=0"),
    (lambda: fo.plot.schedules(LINE, steps=3.5), TypeError, "`steps` .* got 3.5"),  # type: ignore[arg-type]
    (lambda: fo.plot.schedules(LINE, steps=3, labels=["a", "b"]), ValueError, "got 2 labels for 1 schedules"),
    (lambda: fo.plot.schedules("0.1", steps=3), TypeError, "a function of the step or a number, got '0.1'"),  # type: ignore[arg-type]
    (lambda: fo.plot.schedules(torch.ones(2), steps=3), TypeError, "a function of the step or a number"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_is_named_and_nothing_is_drawn(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    before = pyplot.get_fignums()
    with pytest.raises(error, match=message):
        make()
    assert pyplot.get_fignums() == before
