"""The table of torch's schedulers: their keywords, and what these may be."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from .._compiler.rule import Range, plain_number
from .schedule import NUMBER, Schedule


class TorchScheduler(NamedTuple):
    """A scheduler of torch.

    Args:
      name: its class.
      build: `build(lr, **keywords)` makes the schedule; the names and defaults are torch's.
      ranges: intervals that keywords must lie in, or the values that they may have. What is annotated `int`
        must be whole.
    """

    name: str
    build: Callable[..., Schedule]
    ranges: Mapping[str, str | tuple[Any, ...]]

    @property
    def keywords(self) -> dict[str, inspect.Parameter]:
        """The keywords that torch's class takes, and `option` if it schedules two."""
        parameters = dict(inspect.signature(self.build).parameters)
        del parameters["lr"]
        return parameters

    @property
    def needs_rate(self) -> bool:
        """Whether the learning rate that the optimizer is given makes a difference."""
        return inspect.signature(self.build).parameters["lr"].annotation is float

    def __call__(self, lr: Any, keywords: Mapping[str, Any]) -> Schedule:
        """The schedule of some keywords, which are checked."""
        known = self.keywords
        listed = ", ".join(str(p).partition(":")[0] for p in known.values() if p.name != "option")
        for keyword in keywords:
            if keyword not in known:
                raise TypeError(f"{self.name} has no keyword {keyword!r}; it takes {listed}.")
        for keyword, parameter in known.items():
            if parameter.default is parameter.empty and keyword not in keywords:
                raise TypeError(f"{self.name} needs {keyword!r}; it takes {listed}.")
        if self.needs_rate:
            lr = self.check("lr", lr, NUMBER)
        values = {
            k: self.check(k, v, self.ranges[k], known[k].annotation in (int, int | None)) if k in self.ranges else v
            for k, v in keywords.items()
        }
        return self.build(lr, **values)

    def check(self, keyword: str, value: Any, allowed: str | tuple[Any, ...], whole: bool = False) -> Any:
        """Refuses a value of the wrong kind, or outside its range; a number of NumPy or JAX becomes Python's."""
        label, value = f"`{keyword}` of {self.name}", plain_number(value)
        if isinstance(allowed, tuple):
            if value not in allowed:
                raise ValueError(f"{label} must be one of {list(allowed)}, got {value!r}.")
            return value
        if value is None and keyword in self.keywords and self.keywords[keyword].default is None:
            return value
        if isinstance(value, (list, tuple)):
            raise TypeError(f"{label} must be a number, got {value!r:.60}: make a schedule for each parameter group.")
        if isinstance(value, torch.Tensor):
            hint = ": make the schedule of 1.0 and multiply it by the tensor" if keyword == "lr" else ""
            raise TypeError(f"{label} must be a number, got a tensor{hint}.")
        if not isinstance(value, (int, float)):
            raise TypeError(f"{label} must be a number, got {value!r:.60}.")
        if value not in Range.parse(allowed) or (whole and value != int(value)):
            raise ValueError(f"{label} must be {'a whole number ' if whole else ''}in {allowed}, got {value!r}.")
        return int(value) if whole else value


SCHEDULERS: dict[str, TorchScheduler] = {}


def scheduler(
    name: str, **ranges: str | tuple[Any, ...]
) -> Callable[[Callable[..., Schedule]], Callable[..., Schedule]]:
    """Enters a function into the table of schedulers."""

    def enter(build: Callable[..., Schedule]) -> Callable[..., Schedule]:
        SCHEDULERS[name] = TorchScheduler(name, build, ranges)
        return build

    return enter


def make(name: str, lr: Any, option: str, keywords: Mapping[str, Any]) -> Schedule:
    """The schedule of a scheduler; see `from_torch_scheduler`."""
    if name not in SCHEDULERS:
        raise ValueError(f"torch has no scheduler {name!r}; there are {', '.join(SCHEDULERS)}.")
    if option not in ("lr", "momentum"):
        raise ValueError(f'`option` must be "lr" or "momentum", got {option!r}.')
    keywords = dict(keywords)
    if "option" in SCHEDULERS[name].keywords:
        keywords["option"] = option
    elif option == "momentum":
        raise ValueError(f"{name} leaves the momentum as it is; CyclicLR and OneCycleLR cycle it.")
    if keywords.pop("last_epoch", -1) != -1:
        raise ValueError(f"`last_epoch` of {name} must be left out: a schedule is given the step, from 0 on.")
    return SCHEDULERS[name](lr, keywords)
