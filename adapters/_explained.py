"""`functional_optim.explain` of an optimizer."""

import functools

import torch

from functional_optim._explain import Explanation, explain_params, explanation
from functional_optim._runtime.shard import real_view
from functional_optim._tree import Tree

from .lbfgs import LBFGS
from .optimizer import ChainOptimizer


@explanation.register
def _(optimizer: ChainOptimizer, params: Tree | None) -> Explanation:
    _refuse_params(optimizer, params)
    templates, own = optimizer._bindings.gather(optimizer)
    records = bool(optimizer.defaults.get("differentiable"))
    return explain_params(templates, own, optimizer.param_groups, optimizer._counter_dtype(), records)


@explanation.register
def _(optimizer: LBFGS, params: Tree | None) -> Explanation:
    _refuse_params(optimizer, params)
    (group,) = optimizer.param_groups
    views = [real_view(p.detach(), f"parameter {i}") for i, p in enumerate(group["params"])]
    elements, length = sum(p.numel() for p in group["params"]), sum(view.numel() for view in views)
    itemsize = functools.reduce(torch.promote_types, [view.dtype for view in views]).itemsize
    vectors = 2 * group["history_size"] + 2  # pairs of differences, a direction and a gradient
    return Explanation(
        kernels=(),
        backends=("torch operations",),
        passes=1,
        launches=0,
        bytes_read=0.0,
        bytes_written=0.0,
        state_bytes=vectors * length * itemsize / max(elements, 1),
        parameters=elements,
        leaves=len(views),
        notes=(
            f"LBFGS is no chain and has no kernel: torch operations compute it over all parameters as one vector, in "
            f"up to {group['max_iter']} iterations and {group['max_eval']} evaluations of the closure a step",
            f"its state grows to {vectors} such vectors, by two an iteration: history_size={group['history_size']} "
            f"pairs, the last direction and the last gradient",
        ),
    )


def _refuse_params(optimizer: torch.optim.Optimizer, params: Tree | None) -> None:
    """Refuses parameters beside an optimizer's own."""
    if params is not None:
        raise TypeError(f"explain was given parameters, but {type(optimizer).__name__} has its own; pass it alone.")
