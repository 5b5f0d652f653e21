"""The operation that a step is inside `torch.compile`, which the compiler keeps whole."""

from typing import Any
from weakref import WeakValueDictionary

import torch


OPTIMIZERS: "WeakValueDictionary[int, Any]" = WeakValueDictionary()  # optimizers whose step is compiled, by handle


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
    OPTIMIZERS[handle]._run_traced(
        params, grads, state, dict(zip(names.split(",") if names else (), values, strict=True))
    )


_step.register_fake(lambda *args: None)  # it returns nothing
