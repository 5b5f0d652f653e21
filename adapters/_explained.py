"""`functional_optim.explain` of an optimizer."""

from functional_optim._explain import Explanation, explain_params, explanation
from functional_optim._tree import Tree

from .optimizer import ChainOptimizer


@explanation.register
def _(optimizer: ChainOptimizer, params: Tree | None) -> Explanation:
    if params is not None:
        raise TypeError(f"explain was given parameters, but {type(optimizer).__name__} has its own; pass it alone.")
    templates, own = optimizer._params()
    records = bool(optimizer.defaults.get("differentiable"))
    return explain_params(templates, own, optimizer.param_groups, optimizer._counter_dtype(), records)
