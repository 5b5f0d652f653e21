"""Averages of parameters: in the last pass of a chain, and over values that no chain changes."""

from collections.abc import Sequence
from typing import Any

import torch

from .._compiler.rule import Leaf, OptionalDtype, Scalar
from .._compiler.slots import slot
from .._packed import Packed
from .._reading import marked_slots, rule_states
from .._rule import elementwise
from .._runtime.checks import at, check_leaf
from .._state_nodes import check_nest
from .._transform import GradientTransformation, as_transformation
from .._tree import MaskedNode, Spec, Tree, difference, flatten, leaves_like, packed_like, paths, tree_map


@elementwise(
    state={"ema": slot("param", dtype="accumulator_dtype", evaluate=True)}, ranges={"decay": "[0, 1]"}, final=True
)
def params_ema(
    u: Leaf, p: Leaf, ema: Leaf, *, decay: Scalar, accumulator_dtype: OptionalDtype = None
) -> tuple[Leaf, Leaf]:
    r"""An exponential moving average of the updated parameters; updates pass through as they are.

    $$\bar\theta_t = \beta \bar\theta_{t-1} + (1 - \beta)(\theta_{t-1} + u_t), \quad \bar\theta_0 = \theta_0$$

    It belongs at the end of a chain, where updates are final: they are added to the parameters. `eval_params` reads
    the average. A schedule as decay forgets the first parameters sooner: `ema_debias_schedule` is the correction of
    Adam's bias, `ema_warmup_schedule` the warm-up of other libraries.

    Args:
      decay: $\beta$.
      accumulator_dtype: how the average is stored; by default as the parameter. Half types lose what a decay near 1
        adds, so store their average as float32.

    Returns:
      The transformation. Its state is `(ema,)`, with a schedule `(count, ema)`. It needs the parameters.

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


@elementwise(
    state={"swa": slot("param", dtype="accumulator_dtype", evaluate=True), "n_averaged": slot(0.0, per="leaf")},
    ranges={"start": "[0, inf)", "period": "[1, inf)"},
    final=True,
)
def params_swa(
    u: Leaf,
    p: Leaf,
    swa: Leaf,
    n_averaged: Leaf,
    *,
    step: Scalar,
    start: Scalar,
    period: Scalar = 1,
    accumulator_dtype: OptionalDtype = None,
) -> tuple[Leaf, Leaf, Leaf]:
    r"""The equal average of the parameters after some steps, as in SWA; updates pass through as they are.

    With $s$ for `start` and $k$ for `period`, the average after step $t$ is

    $$\bar\theta_t = \frac{1}{n} \sum_{i=0}^{n-1} \theta_{s + ik}, \quad n = \lfloor (t - s) / k \rfloor + 1$$

    and before step $s$ it is $\theta_t$. It belongs at the end of a chain, where updates are final: they are added to
    the parameters. `eval_params` reads the average, so it returns the parameters until one has begun.

    Args:
      start: $s$, the number of steps after which parameters are averaged for the first time; 0 are the parameters
        that the chain was initialised with.
      period: $k$, the number of steps from one that is averaged to the next. Where $s + ik$ is not a whole number,
        the first step after it counts.
      accumulator_dtype: how the average is stored; by default as the parameter. Half types lose what the later of
        many parameters add, so store their average as float32.

    Returns:
      The transformation. Its state is `(count, swa, n_averaged)`: a leaf that has no gradient at a step is not
      averaged there, so each counts its own. It needs the parameters.

    Raises:
      ValueError: `start` or `period` is out of its range.

    Example:
      >>> import functional_optim as fo, torch
      >>> tx = fo.chain(fo.scale(-1.0), params_swa(start=2, period=2))
      >>> params = torch.zeros(1)
      >>> state = tx.init(params)
      >>> for _ in range(5):
      ...     params, state = fo.apply_gradients(tx, params, torch.ones(1), state)
      >>> params, eval_params(state, params)  # the mean of -2 and -4
      (tensor([-5.]), tensor([-3.]))

    Source: Izmailov et al. 2018, arXiv:1803.05407, algorithm 1.
    """
    after = p + u
    n = n_averaged + ((start == 0) & (step == 1))  # the parameters before the first step are the first of them
    is_due = (step >= start) & (torch.floor((step - start) / period) > torch.floor((step - 1 - start) / period))
    mean = torch.where(n > 0, swa + (after - swa) / (n + 1), after)  # as torch's `AveragedModel` rounds
    return u, torch.where((n > 0) & ~is_due, swa, mean), n + is_due


def update_average(tx: GradientTransformation, values: Tree, state: Any) -> Any:
    """Averages values that something else changes, such as buffers, or parameters of another optimizer.

    It is a step of `tx` with updates of zeros. Nothing happens between two calls, so an average that is called for
    once in an epoch costs other steps nothing.

    Args:
      tx: an average, such as `params_swa(start=1)` or `params_ema(0.99)`.
      values: a tree of floating tensors, as they are now. Counters, such as `num_batches_tracked`, are left out.
      state: the result of `tx.init(values)`, or of the last call.

    Returns:
      The new state, which `eval_params` reads.

    Raises:
      ValueError, TypeError: a tree, shape, dtype or device does not fit.

    Example:
      >>> tx, mean = params_swa(start=1), torch.zeros(1)
      >>> state = tx.init({"mean": mean})
      >>> for _ in range(3):
      ...     mean += 1
      ...     state = update_average(tx, {"mean": mean}, state)
      >>> eval_params(state, {"mean": mean})
      {'mean': tensor([2.])}
    """
    tx = as_transformation(tx, "`tx` of update_average")
    # as in `init`: parameters of a module are leaves of autograd's graph, which an average does not join
    values = tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) and x.is_leaf else x, values)
    zeros = tree_map(lambda x: torch.zeros_like(x) if isinstance(x, torch.Tensor) else x, values)
    return tx.update(zeros, state, values)[1]


def eval_params(state: Any, params: Tree, slot: str | None = None) -> Tree:
    """The parameters to evaluate at that a state holds, such as the averages of `params_ema` or `params_swa`.

    They are in the slots of rules that are marked by `slot(..., evaluate=True)`.

    Args:
      state: the state of a chain that keeps one for each parameter, or for some.
      params: the current parameters; where a leaf has none in the state, its own value is returned.
      slot: the name of the slot to read where several are marked, as `slots` gives it.

    Returns:
      A tree like `params`, in their dtypes.

    Raises:
      ValueError: the state has none, two of one parameter, or none of that name.
      TypeError: the state is none.

    Example:
      >>> import torch
      >>> tx = params_ema(decay=0.9)
      >>> params = torch.ones(1)
      >>> eval_params(tx.init(params), params)
      tensor([1.])
    """
    check_nest(state)
    states = rule_states(state)
    marked = marked_slots({path: own._rule for path, own in states.items()}, slot)
    if isinstance(params, Packed):
        columns = [getattr(states[path], field) for path, field in marked]
        if len(columns) == 1 and isinstance(columns[0], Packed) and columns[0].form is params.form:
            pairs = zip(columns[0].buffers, params.buffers, strict=True)
            return params.with_buffers([x.to(p.dtype, copy=True) for x, p in pairs])
        if torch.compiler.is_dynamo_compiling():
            from .._traced import read_outside  # an import of the compiler, which takes seconds

            return read_outside(eval_params, state, params, slot)
    leaves, spec = flatten(params)
    if not marked:
        raise ValueError(
            "the state holds no average of parameters; put `params_ema(decay)` or `params_swa(start)` at the end of "
            "the chain, or mark a slot of your rule by `slot(..., evaluate=True)`."
        )
    found: dict[int, tuple[str, Any]] = {}
    for (path, field), name in marked.items():
        for k, x in enumerate(_average_like(spec, name, getattr(states[path], field), leaves)):
            if x is not None and not isinstance(x, MaskedNode):
                if k in found:
                    raise ValueError(
                        f"the state holds two averages of one parameter{at(paths(spec)[k])}, {found[k][0]!r} and "
                        f"{name!r}; say which to read: `eval_params(state, params, {name!r})`."
                    )
                found[k] = name, x
    new = [found[k][1].to(p.dtype) if k in found else p for k, p in enumerate(leaves)]
    return packed_like(params, spec.unflatten(new))


def _average_like(spec: Spec, name: str, average: Tree, params: Sequence[Any]) -> list[Any]:
    """The leaves of an average, in the places of those of the parameters.

    Args:
      spec: the structure of the parameters.
      name: the average, in messages.
      average: a tree like them.
      params: the leaves of the parameters.

    Raises:
      ValueError, TypeError: the two do not fit.
    """
    try:
        found = leaves_like(spec, average)
    except (ValueError, TypeError):
        found = None
    if found is None or not all(x is None or isinstance(x, (torch.Tensor, MaskedNode)) for x in found):
        misfit = difference(flatten(average)[1], spec.unflatten(params))
        raise ValueError(f"params does not have the structure of {name!r} in the state: {misfit}.")
    for path, p, x in zip(paths(spec), params, found, strict=True):
        if isinstance(x, torch.Tensor):
            check_leaf("params", path, p)
    return found
