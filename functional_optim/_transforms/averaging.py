"""Averages of parameters."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .._compiler.rule import Leaf, OptionalDtype, Scalar, slot, state_type
from .._rule import elementwise
from .._tree import MaskedNode, Tree, flatten, leaves_like, unflatten


@elementwise(state={"ema": slot("param", dtype="accumulator_dtype")}, ranges={"decay": "[0, 1]"}, final=True)
def params_ema(
    u: Leaf, p: Leaf, ema: Leaf, *, decay: Scalar, accumulator_dtype: OptionalDtype = None
) -> tuple[Leaf, Leaf]:
    r"""An exponential moving average of the updated parameters; updates pass through as they are.

    $$\bar\theta_t = \beta \bar\theta_{t-1} + (1 - \beta)(\theta_{t-1} + u_t), \quad \bar\theta_0 = \theta_0$$

    It belongs at the end of a chain, where updates are final: they are added to the parameters. `eval_params` reads
    the average.

    Args:
      decay: $\beta$; a schedule makes a warm-up.
      accumulator_dtype: how the average is stored; by default as the parameter. Half types lose what a decay near 1
        adds, so store their average as float32.

    Returns:
      The transformation. Its state is `(ema,)`. It needs the parameters.

    Raises:
      ValueError: `decay` is out of its range.

    Example:
      >>> import functional_optim as fo, torch
      >>> tx = fo.chain(fo.scale(-1.0), params_ema(decay=0.5))
      >>> params = torch.ones(1)
      >>> params, state = fo.apply_gradients(tx, params, torch.ones(1), tx.init(params))
      >>> params, eval_params(state, params)
      (tensor([0.]), tensor([0.5000]))

    Source: Polyak & Juditsky 1992; Tarvainen & Valpola 2017, arXiv:1703.01780, equation 2.
    """
    return u, decay * ema + (1 - decay) * (p + u)


@elementwise(state={"average": slot("param", dtype="accumulator_dtype")}, final=True)
def params_average(
    u: Leaf, p: Leaf, average: Leaf, *, step: Scalar, start: Scalar = 1, accumulator_dtype: OptionalDtype = None
) -> tuple[Leaf, Leaf]:
    r"""The mean of the parameters of all steps from one on; updates pass through as they are.

    $$\bar\theta_t = \bar\theta_{t-1} + \mu_t (\theta_{t-1} + u_t - \bar\theta_{t-1}), \quad
      \mu_t = 1 / \max(1, t - s + 1)$$

    Before that step the average is the parameters. It belongs at the end of a chain, as `params_ema` does, and
    `eval_params` reads it.

    Args:
      start: $s$, the first step whose parameters count; 1 for all of them.
      accumulator_dtype: how the average is stored; by default as the parameter. Half types soon lose what a step
        adds, so store their average as float32.

    Returns:
      The transformation. Its state is `(count, average)`. It needs the parameters.

    Example:
      >>> import functional_optim as fo, torch
      >>> tx = fo.chain(fo.scale(-1.0), params_average())
      >>> params = torch.ones(1)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     params, state = fo.apply_gradients(tx, params, torch.ones(1), state)
      >>> params, eval_params(state, params)
      (tensor([-2.]), tensor([-1.]))

    Source: Polyak & Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging".
    """
    new, share = p + u, 1 / torch.clamp(step - start + 1, min=1)
    return u, torch.where(share == 1, new, average + (new - average) * share)


# rules that average parameters, and the slot that each has its average in
AVERAGES: Mapping[str, str] = {"params_ema": "ema", "params_average": "average", "asgd_step": "ax"}


def eval_params(state: Any, params: Tree) -> Tree:
    """The averaged parameters that `params_ema` or `params_average` keeps somewhere in a state.

    Args:
      state: the state of a chain that holds one of them, or one for each part of a partition.
      params: the current parameters; where a leaf is not averaged, its own value is returned.

    Returns:
      A tree like `params`, in their dtypes.

    Raises:
      ValueError: the state has no average, or two of one parameter.

    Example:
      >>> tx = params_ema(decay=0.9)
      >>> params = torch.ones(1)
      >>> eval_params(tx.init(params), params)
      tensor([1.])
    """
    leaves, spec = flatten(params)
    averages = list(_find(state))
    if not averages:
        raise ValueError("the state holds no average of parameters; put `params_ema(decay)` at the end of the chain.")
    found: dict[int, Any] = {}
    for average in averages:
        for k, x in enumerate(leaves_like(spec, average)):
            if x is not None and not isinstance(x, MaskedNode):
                if k in found:
                    raise ValueError("the state holds two averages of one parameter; read the one you mean from it.")
                found[k] = x
    return unflatten(spec, [found[k].to(p.dtype) if k in found else p for k, p in enumerate(leaves)])


def _find(state: Any) -> Iterator[Tree]:
    """Every tree of averages in a nest of states."""
    kinds = {
        state_type(factory.rule, counted): AVERAGES[factory.rule.name]
        for factory in (params_ema, params_average)
        for counted in (False, True)
    }
    if type(state) in kinds:
        yield getattr(state, kinds[type(state)])
    elif isinstance(state, (tuple, list, dict)):
        for inner in state.values() if isinstance(state, dict) else state:
            yield from _find(inner)
