"""Drawing schedules."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ._schedules.polynomial import constant_schedule
from ._schedules.schedule import Schedule, value_at


if TYPE_CHECKING:
    from matplotlib.axes import Axes


def schedules(
    *schedules: Callable[[Any], Any] | float,
    steps: int | range,
    labels: Sequence[str] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draws schedules over the steps.

    Args:
      *schedules: schedules, any functions of the step, or numbers.
      steps: the steps: how many, or which.
      labels: names for the legend, one for each schedule; by default the calls that make them.
      ax: the axes to draw on; by default those of a new figure.

    Returns:
      The axes, labelled, for titles, scales and saving: `ax.figure.savefig("rates.png")`.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError: a schedule is neither a function nor a number, or `steps` no number of steps.
      ValueError: there is nothing to draw, or not one label for each schedule.

    Example:
      >>> import functional_optim as fo
      >>> from matplotlib.figure import Figure
      >>> decay = fo.cosine_decay_schedule(1.0, decay_steps=100)
      >>> ax = fo.plot.schedules(decay, decay * 0.5, steps=120, ax=Figure().subplots())
      >>> ax.get_xlabel(), ax.get_ylabel(), len(ax.lines)
      ('step', 'value', 2)
    """
    counts = range(steps) if isinstance(steps, int) else steps
    if not isinstance(counts, range):
        raise TypeError(f"`steps` must be a number of steps or a range, got {steps!r:.60}.")
    if not schedules or not len(counts):
        raise ValueError(f"there is nothing to draw: got {len(schedules)} schedules and steps={steps!r}.")
    if labels is not None and len(labels) != len(schedules):
        raise ValueError(f"`labels` must name every schedule, got {len(labels)} labels for {len(schedules)} schedules.")
    lines = [_values(one, counts) for one in schedules]
    names = [_label(one) for one in schedules] if labels is None else labels
    if ax is None:
        try:
            from matplotlib import pyplot
        except ImportError:
            raise ImportError("plots need matplotlib: pip install functional_optim[plot].") from None
        ax = pyplot.subplots()[1]
    for values, name in zip(lines, names, strict=True):
        ax.plot(list(counts), values, label=name.lstrip("_"))  # one that begins with an underscore would be left out
    ax.set_xlabel("step")
    ax.set_ylabel("value")
    ax.legend()
    return ax


def _values(one: Any, counts: range) -> list[float]:
    """The values of a schedule, a function or a number."""
    if callable(one) and not isinstance(one, torch.Tensor):
        values: list[float] = value_at(one, torch.tensor(counts, dtype=torch.float64)).tolist()
        return values
    if isinstance(one, (int, float)):
        return _values(constant_schedule(one), counts)
    raise TypeError(f"a schedule must be a function of the step or a number, got {one!r:.60}.")


def _label(one: Any) -> str:
    """The name of a schedule in the legend."""
    made = isinstance(one, (Schedule, int, float))
    return repr(one) if made else str(getattr(one, "__name__", type(one).__name__))
