"""Updates that autograd takes for constants: a derivative through them is refused, for it would lack a term."""

from typing import Any

import torch

from .._runtime.internals import needs_dispatch
from .._tree import Tree, flatten, tree_map


class _Constant(torch.autograd.Function):
    """Tensors that were computed from others without a record: their values, and an error in place of a derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, n: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.clone() for x in tensors[:n])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(_message(ctx.name))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_message(ctx.name))


def _message(name: str) -> str:
    return (
        f"{name} computes its updates without a record, so a derivative through its step would lack a term. "
        f"Detach what it is given, or its updates, if they are to be constants; or unroll another optimizer."
    )


def without_derivatives(name: str, updates: Tree, *given: Any) -> Tree:
    """Updates that refuse derivatives, where autograd or `torch.func` records operations on their inputs.

    Args:
      name: the transformation, for the error.
      updates: the updates.
      given: all that they depend on.
    """
    tensors = [x for x in flatten(given)[0] if isinstance(x, torch.Tensor) and x.is_floating_point()]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if not recorded and (torch.compiler.is_compiling() or not needs_dispatch()):
        return updates
    own = [x for x in flatten(updates)[0] if isinstance(x, torch.Tensor)]
    apply: Any = _Constant.apply
    made = iter(apply(name, len(own), *own, *tensors))
    return tree_map(lambda x: next(made) if isinstance(x, torch.Tensor) else x, updates)
