"""The operation that a step is inside `torch.compile`, which the compiler keeps whole."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch

from functional_optim._runtime.backend import computed_by
from functional_optim._runtime.spec import are_ordinary


OPTIMIZERS: "WeakValueDictionary[int, Any]" = WeakValueDictionary()  # optimizers whose step is compiled, by handle
HANDLES = itertools.count()  # a handle is a constant of a graph, which may outlive its optimizer: none is used twice


def _take(
    handle: int,
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    state: list[torch.Tensor],
    options: list[torch.Tensor],
    names: str,
    values: list[torch.Tensor],
    backend: str,
) -> None:
    """A step of an optimizer."""
    optimizer = OPTIMIZERS.get(handle)
    if optimizer is None:
        raise RuntimeError("the optimizer of this compiled step is gone; keep it as long as the compiled function.")
    extra = dict(zip(names.split(",") if names else (), values, strict=True))
    with computed_by(backend):
        optimizer._run_traced(params, grads, state, options, extra)


_step = torch.library.custom_op("functional_optim::step", _take, mutates_args=("params", "state"))


@_step.register_fake
def _(handle: int, params: Any, grads: Any, state: Any, options: Any, names: str, values: Any, backend: str) -> None:
    if are_ordinary(params, grads, state, options, values):  # one of them is on meta
        _take(handle, params, grads, state, options, names, values, backend)


def tensors_among(group: Mapping[str, Any]) -> list[torch.Tensor]:
    """The options of a group that are tensors, those in pairs too.

    They are arguments of the operation, so that the compiler keeps its order among writes of the compiled function.
    """
    tensors: list[torch.Tensor] = []
    for x in group.values():
        if isinstance(x, torch.Tensor):
            tensors.append(x)
        elif isinstance(x, tuple):
            tensors.extend([y for y in x if isinstance(y, torch.Tensor)])
    return tensors


@contextlib.contextmanager
def in_place_of_tensors(groups: Sequence[dict[str, Any]], tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Puts others in the place of `tensors_among` groups, for the time of a step.

    Args:
      groups: the groups.
      tensors: the tensors that stand for those of all groups.
    """
    given, changed = iter(tensors), []
    for group in groups:
        for key, x in group.items():
            new = x
            if isinstance(x, torch.Tensor):
                new = next(given)
            elif isinstance(x, tuple) and any(isinstance(y, torch.Tensor) for y in x):
                new = tuple([next(given) if isinstance(y, torch.Tensor) else y for y in x])
            if new is not x:
                changed.append((group, key, x, new))
    try:
        for group, key, _, new in changed:
            group[key] = new
        yield
    finally:
        for group, key, x, _ in changed:
            group[key] = x
