"""Plots of schedules, by matplotlib: `pip install functional_optim[plot]`.

Plots
  schedules
"""

from ._plot import schedules


__all__ = ["schedules"]


def __dir__() -> list[str]:
    return __all__
