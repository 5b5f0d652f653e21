"""The operation that a step is inside `torch.compile`, which the compiler keeps whole."""

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch


OPTIMIZERS: "WeakValueDictionary[int, Any]" = WeakValueDictionary()  # optimizers whose step is compiled, by handle
HANDLES = itertools.count()  # a handle is a constant of a graph, which may outlive its optimizer: none is used twice


@torch.library.custom_op("functional_optim::step", mutates_args=("params", "state"))
def _step(
    handle: int,
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    state: list[torch.Tensor],
    names: str,
    values: list[torch.Tensor],
) -> None:
    """A step of an optimizer, which the compiler keeps whole."""
    optimizer = OPTIMIZERS.get(handle)
    if optimizer is None:
        raise RuntimeError("the optimizer of this compiled step is gone; keep it as long as the compiled function.")
    optimizer._run_traced(params, grads, state, dict(zip(names.split(",") if names else (), values, strict=True)))


_step.register_fake(lambda *args: None)  # it returns nothing
