"""Line searches: updates times a step at which the objective has been found to be lower."""

import math
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch

from .._compiler.arguments import checked_function, checked_switch, plain_number, whole_number
from .._lbfgs.backtracking import backtrack
from .._lbfgs.point import Found, curvature_error, excess
from .._lbfgs.strong_wolfe import strong_wolfe
from .._lbfgs.zoom import zoom
from .._state_nodes import check_nest
from .._transform import Declared, GradientTransformation, declares
from .._tree import Tree, flatten
from ._objective import Objective, gradients
from ._vectors import Leaves, wide


class BacktrackingLinesearchInfo(NamedTuple):
    """The outcome of a search by `scale_by_backtracking_linesearch`.

    Args:
      num_linesearch_steps: how often the objective was evaluated.
      decrease_error: how far the objective is from a sufficient decrease; 0 if the search succeeded.
    """

    num_linesearch_steps: Any
    decrease_error: Any


class ZoomLinesearchInfo(NamedTuple):
    """The outcome of a search for the conditions of Wolfe.

    Args:
      num_linesearch_steps: how often the objective was evaluated.
      decrease_error: how far the objective is from a sufficient decrease; 0 if the search succeeded.
      curvature_error: how far the slope is from being small enough; 0 if the search succeeded.
    """

    num_linesearch_steps: Any
    decrease_error: Any
    curvature_error: Any


class ScaleByBacktrackingLinesearchState(NamedTuple):
    """The state of `scale_by_backtracking_linesearch`.

    Args:
      learning_rate: the last step; 0 if none was found.
      value: the objective after it.
      grad: its gradient there with `store_grad`, else None.
      info: the outcome of the search.
    """

    learning_rate: Any
    value: Any
    grad: Tree
    info: BacktrackingLinesearchInfo


class ScaleByZoomLinesearchState(NamedTuple):
    """The state of `scale_by_zoom_linesearch` and `scale_by_strong_wolfe_linesearch`.

    Args:
      learning_rate: the last step; 0 if none was found.
      value: the objective after it.
      grad: its gradient there.
      info: the outcome of the search.
    """

    learning_rate: Any
    value: Any
    grad: Tree
    info: ZoomLinesearchInfo


torch.serialization.add_safe_globals(
    [
        BacktrackingLinesearchInfo,
        ZoomLinesearchInfo,
        ScaleByBacktrackingLinesearchState,
        ScaleByZoomLinesearchState,
    ]
)


def _numbers(
    name: str, limits: Mapping[str, tuple[Any, float, float]], counts: str, optional: Collection[str] = ()
) -> dict[str, Any]:
    """Arguments of a line search, each found to be a number in its range; a number of NumPy or JAX becomes Python's.

    Args:
      name: the line search.
      limits: by argument, its value and its range, ends included.
      counts: the one that counts steps, which is a whole number.
      optional: those that may be None.
    """
    found = {argument: plain_number(x) for argument, (x, _, _) in limits.items()}
    for argument, x in found.items():
        _, least, most = limits[argument]
        if x is None and argument in optional:
            continue
        if argument == counts:
            whole_number(argument, name, x)
        if isinstance(x, bool) or not isinstance(x, (int, float)) or not least <= x <= most:
            raise ValueError(f"`{argument}` of {name} must be a number in [{least}, {most}], got {x!r:.60}.")
    return found


def _report(name: str, found: Found, objective: Objective) -> None:
    """Prints the outcome of a search that failed."""
    if found.decrease_error > 0.0 or (math.isfinite(found.curvature_error) and found.curvature_error > 0.0):
        start = objective.start
        sys.stdout.write(
            f"{name}: step {float(found.point.step):.6g} after {found.evaluations} evaluations; decrease error "
            f"{found.decrease_error:.6g}, curvature error {found.curvature_error:.6g}; value {start.value:.6g} and "
            f"slope {float(start.slope):.6g} at the start.\n"
        )


def _first_state(params: Tree, name: str) -> tuple[torch.Tensor, torch.Tensor, Tree, torch.Tensor]:
    """A learning rate of 1, an infinite value, a gradient of zeros, a counter of 0."""
    own = Leaves(name, params)
    like = own.params[0] if own.params else torch.zeros(())
    one = torch.ones((), dtype=wide(like).to_real(), device=like.device)
    grad = own.tree([torch.zeros_like(p, requires_grad=False) for p in own.params])
    return one, one * math.inf, grad, torch.zeros((), dtype=torch.int64, device=like.device)


@declares
def scale_by_backtracking_linesearch(
    max_backtracking_steps: int,
    slope_rtol: float = 1e-4,
    decrease_factor: float = 0.8,
    increase_factor: float = 1.5,
    max_learning_rate: float = 1.0,
    atol: float = 0.0,
    rtol: float = 0.0,
    store_grad: bool = False,
    verbose: bool = False,
) -> GradientTransformation:
    r"""Shortens updates until the objective decreases enough, $f(\theta + \eta u) \leq (1 + \delta) f(\theta) + \eta c \langle u, \nabla f(\theta) \rangle + \epsilon$.

    Updates must be a direction of descent, so the transformation stands behind the factor of -1. `update` takes the
    extra arguments `value_fn`, the objective as a function of the parameters, `value` and `grad`, the objective and its
    gradient at the parameters, which are computed if they are missing, and the further arguments of `value_fn`.

    A step where the objective is no number is shortened. If all are, the update is zero, and the next search begins at
    `max_learning_rate`; optax stays at 0.

    Args:
      max_backtracking_steps: how often a step is shortened at most.
      slope_rtol: $c$.
      decrease_factor: factor of a step that is too long.
      increase_factor: factor between the last step and the first that is tried next; infinity begins with
        `max_learning_rate`.
      max_learning_rate: the longest step.
      atol: $\epsilon$.
      rtol: $\delta$.
      store_grad: whether the gradient at the end is computed and kept, for `value_and_grad_from_state`.
      verbose: whether a search that fails is printed.

    Returns:
      The transformation. Its state is `(learning_rate, value, grad, info)`.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> import functional_optim as fo
      >>> tx = fo.chain(fo.sgd(1.0), scale_by_backtracking_linesearch(max_backtracking_steps=15))
      >>> params = torch.tensor([1.0, 2.0])
      >>> f = lambda x: (x * x).sum()
      >>> updates, state = tx.update(2 * params, tx.init(params), params, value=f(params), grad=2 * params, value_fn=f)
      >>> f(params + updates) < f(params)
      tensor(True)

    Source: Nocedal & Wright 2006, "Numerical Optimization", algorithm 3.1.
    """  # noqa: E501
    name = "scale_by_backtracking_linesearch"
    limits = {
        "max_backtracking_steps": (max_backtracking_steps, 0, math.inf),
        "slope_rtol": (slope_rtol, 0.0, 1.0),
        "decrease_factor": (decrease_factor, 0.0, 1.0),
        "increase_factor": (increase_factor, 0.0, math.inf),
        "max_learning_rate": (max_learning_rate, 0.0, math.inf),
        "atol": (atol, 0.0, math.inf),
        "rtol": (rtol, 0.0, math.inf),
    }
    store_grad, verbose = checked_switch("store_grad", name, store_grad), checked_switch("verbose", name, verbose)
    arguments = {**_numbers(name, limits, "max_backtracking_steps"), "store_grad": store_grad, "verbose": verbose}

    def init(params: Tree) -> ScaleByBacktrackingLinesearchState:
        rate, infinity, zeros, count = _first_state(params, name)
        info = BacktrackingLinesearchInfo(count, infinity.clone())
        return ScaleByBacktrackingLinesearchState(rate, infinity, zeros if store_grad else None, info)

    def update(
        updates: Tree,
        state: ScaleByBacktrackingLinesearchState,
        params: Tree | None = None,
        *,
        value: Any = None,
        grad: Tree = None,
        value_fn: Callable[..., Any] | None = None,
        **extra: Any,
    ) -> tuple[Tree, ScaleByBacktrackingLinesearchState]:
        objective = Objective(name, updates, params, value, grad, value_fn, extra)
        last = float(state.learning_rate)
        found = backtrack(
            objective.value,
            objective.start,
            min(increase_factor * last, max_learning_rate) if last else max_learning_rate,
            max_steps=max_backtracking_steps,
            slope_rtol=slope_rtol,
            decrease_factor=decrease_factor,
            atol=atol,
            rtol=rtol,
        )
        if verbose:
            _report(name, found, objective)
        point = found.point
        if store_grad and point.grad is None:
            point = objective.point(point.step)
        new = ScaleByBacktrackingLinesearchState(
            objective.number(point.step),
            objective.number(point.value),
            objective.own.tree(point.grad) if store_grad else None,
            BacktrackingLinesearchInfo(objective.count(found.evaluations), objective.number(found.decrease_error)),
        )
        return objective.scaled(point.step), new

    return Declared(scale_by_backtracking_linesearch, arguments, init, update, ScaleByBacktrackingLinesearchState)


def _wolfe(
    factory: Callable[..., GradientTransformation],
    numbers: Mapping[str, Any],
    initial_guess_strategy: str,
    verbose: bool,
    search: Callable[[Objective, float], Found],
) -> GradientTransformation:
    """A transformation that scales updates by the step that a search for the conditions of Wolfe finds."""
    name = factory.__name__
    verbose = checked_switch("verbose", name, verbose)
    if not isinstance(initial_guess_strategy, str) or initial_guess_strategy not in ("keep", "one"):
        raise ValueError(
            f"`initial_guess_strategy` of {name} must be 'keep' or 'one', got {initial_guess_strategy!r:.60}."
        )
    keeps = initial_guess_strategy == "keep"

    def init(params: Tree) -> ScaleByZoomLinesearchState:
        rate, infinity, zeros, count = _first_state(params, name)
        info = ZoomLinesearchInfo(count, infinity.clone(), infinity.clone())
        return ScaleByZoomLinesearchState(rate, infinity, zeros, info)

    def update(
        updates: Tree,
        state: ScaleByZoomLinesearchState,
        params: Tree | None = None,
        *,
        value: Any = None,
        grad: Tree = None,
        value_fn: Callable[..., Any] | None = None,
        **extra: Any,
    ) -> tuple[Tree, ScaleByZoomLinesearchState]:
        objective = Objective(name, updates, params, value, grad, value_fn, extra)
        found = search(objective, (float(state.learning_rate) or 1.0) if keeps else 1.0)
        if verbose:
            _report(name, found, objective)
        new = ScaleByZoomLinesearchState(
            objective.number(found.point.step),
            objective.number(found.point.value),
            objective.own.tree(found.point.grad),
            ZoomLinesearchInfo(
                objective.count(found.evaluations),
                objective.number(found.decrease_error),
                objective.number(found.curvature_error),
            ),
        )
        return objective.scaled(found.point.step), new

    arguments = {**numbers, "initial_guess_strategy": initial_guess_strategy, "verbose": verbose}
    return Declared(factory, arguments, init, update, ScaleByZoomLinesearchState)


@declares
def scale_by_zoom_linesearch(
    max_linesearch_steps: int,
    max_learning_rate: float | None = None,
    tol: float = 0.0,
    increase_factor: float = 2.0,
    slope_rtol: float = 1e-4,
    curv_rtol: float = 0.9,
    approx_dec_rtol: float | None = 1e-6,
    stepsize_precision: float = 1e-5,
    initial_guess_strategy: str = "keep",
    verbose: bool = False,
) -> GradientTransformation:
    r"""Scales updates by a step that decreases the objective enough and leaves a small slope, by optax's search.

    $$f(\theta + \eta u) \leq f(\theta) + \eta c_1 \langle u, \nabla f(\theta) \rangle + \epsilon, \quad
      |\langle u, \nabla f(\theta + \eta u) \rangle| \leq c_2 |\langle u, \nabla f(\theta) \rangle| + \epsilon$$

    Where the objective hardly changes, $f(\theta + \eta u) \leq f(\theta) + c_3 |f(\theta)|$, a slope
    $\langle u, \nabla f(\theta + \eta u) \rangle \leq (2 c_1 - 1) \langle u, \nabla f(\theta) \rangle$ does for the
    first.

    Extra arguments are those of `scale_by_backtracking_linesearch`. A step where the objective is no number, or
    infinite, is shortened. If no step was found that decreases it, the last one that was tried is taken, as in optax,
    or none if the objective is no number there: then the update is zero and parameters stay where they are.

    Args:
      max_linesearch_steps: how often the objective is evaluated at most.
      max_learning_rate: the longest step, or None.
      tol: $\epsilon$.
      increase_factor: factor of a step that is too short.
      slope_rtol: $c_1$.
      curv_rtol: $c_2$; infinity for no condition.
      approx_dec_rtol: $c_3$; None for no approximate decrease.
      stepsize_precision: the width of the interval in which a sufficient decrease is enough.
      initial_guess_strategy: "keep" begins with the last step, "one" with 1.
      verbose: whether a search that fails is printed.

    Returns:
      The transformation. Its state is `(learning_rate, value, grad, info)`.

    Raises:
      ValueError: an argument is out of its range.

    Example:
      >>> import functional_optim as fo
      >>> tx = fo.chain(fo.sgd(1.0), scale_by_zoom_linesearch(max_linesearch_steps=15))
      >>> params = torch.tensor([1.0, 2.0])
      >>> f = lambda x: (x * x).sum()
      >>> updates, state = tx.update(2 * params, tx.init(params), params, value=f(params), grad=2 * params, value_fn=f)
      >>> params + updates
      tensor([0., 0.])

    Source: Nocedal & Wright 2006, "Numerical Optimization", algorithms 3.5 and 3.6; Hager & Zhang 2006, "Algorithm
    851: CG_DESCENT".
    """
    limits = {
        "max_linesearch_steps": (max_linesearch_steps, 1, math.inf),
        "max_learning_rate": (max_learning_rate, 0.0, math.inf),
        "tol": (tol, 0.0, math.inf),
        "increase_factor": (increase_factor, 1.0, math.inf),
        "slope_rtol": (slope_rtol, 0.0, 1.0),
        "curv_rtol": (curv_rtol, 0.0, math.inf),
        "approx_dec_rtol": (approx_dec_rtol, 0.0, math.inf),
        "stepsize_precision": (stepsize_precision, 0.0, math.inf),
    }
    optional = ("max_learning_rate", "approx_dec_rtol")
    numbers = _numbers("scale_by_zoom_linesearch", limits, "max_linesearch_steps", optional)

    def search(objective: Objective, first: float) -> Found:
        return zoom(
            objective.point,
            objective.start,
            first,
            max_steps=max_linesearch_steps,
            max_step=max_learning_rate,
            tol=tol,
            increase_factor=increase_factor,
            slope_rtol=slope_rtol,
            curv_rtol=curv_rtol,
            approx_dec_rtol=approx_dec_rtol,
            precision=stepsize_precision,
        )

    return _wolfe(scale_by_zoom_linesearch, numbers, initial_guess_strategy, verbose, search)


@declares
def scale_by_strong_wolfe_linesearch(
    max_linesearch_steps: int = 25,
    slope_rtol: float = 1e-4,
    curv_rtol: float = 0.9,
    stepsize_precision: float = 1e-9,
    initial_guess_strategy: str = "one",
    verbose: bool = False,
) -> GradientTransformation:
    r"""Scales updates by a step that decreases the objective enough and leaves a small slope, by torch's search.

    The conditions are those of `scale_by_zoom_linesearch` with $\epsilon = 0$ and without the approximate decrease; the
    search is the one of `torch.optim.LBFGS(line_search_fn="strong_wolfe")`, which interpolates by cubics with the
    slopes of both ends.

    Extra arguments are those of `scale_by_backtracking_linesearch`. A point where the objective is no number counts as
    infinitely high, so the search backs off from it; if it finds no lower point than the start, the update is zero.

    Args:
      max_linesearch_steps: how often the objective is evaluated at most after the first step.
      slope_rtol: $c_1$.
      curv_rtol: $c_2$.
      stepsize_precision: the largest change of a parameter below which the search ends.
      initial_guess_strategy: "one" begins with a step of 1, "keep" with the last one.
      verbose: whether a search that fails is printed.

    Returns:
      The transformation. Its state is `(learning_rate, value, grad, info)`.

    Raises:
      ValueError: an argument is out of its range.

    Example:
      >>> import functional_optim as fo
      >>> tx = fo.chain(fo.sgd(1.0), scale_by_strong_wolfe_linesearch())
      >>> params = torch.tensor([1.0, 2.0])
      >>> f = lambda x: (x * x).sum()
      >>> updates, state = tx.update(2 * params, tx.init(params), params, value=f(params), grad=2 * params, value_fn=f)
      >>> params + updates
      tensor([0., 0.])

    Source: Nocedal & Wright 2006, "Numerical Optimization", algorithms 3.5 and 3.6.
    """
    limits = {
        "max_linesearch_steps": (max_linesearch_steps, 0, math.inf),
        "slope_rtol": (slope_rtol, 0.0, 1.0),
        "curv_rtol": (curv_rtol, 0.0, math.inf),
        "stepsize_precision": (stepsize_precision, 0.0, math.inf),
    }
    numbers = _numbers("scale_by_strong_wolfe_linesearch", limits, "max_linesearch_steps")

    def search(objective: Objective, first: float) -> Found:
        start = objective.start
        if not start.is_finite:
            return Found(start, 0, math.inf, math.inf)
        point, evaluations = strong_wolfe(
            objective.point,
            start,
            first,
            objective.direction.abs().max(),
            max_steps=max_linesearch_steps,
            slope_rtol=slope_rtol,
            curv_rtol=curv_rtol,
            precision=stepsize_precision,
        )
        decrease = max(excess(point.value, point.step, start, slope_rtol), 0.0)
        return Found(point, evaluations, decrease, curvature_error(point, start, curv_rtol))

    return _wolfe(scale_by_strong_wolfe_linesearch, numbers, initial_guess_strategy, verbose, search)


def value_and_grad_from_state(value_fn: Callable[..., Any]) -> Callable[..., tuple[Any, Tree]]:
    """A function for the objective and its gradient that takes both from the state of a line search.

    They are computed where the state does not have them: before the first step, after a search without an end, and
    where the search saw only some of the parameters.

    Args:
      value_fn: the objective, a function of the parameters.

    Returns:
      A function of the parameters, further arguments of `value_fn`, and `state=`, that returns the value, a 0-d tensor,
      and the gradient, a tree like the parameters.

    Raises:
      ValueError: the state has no value with a gradient, or several; raised when the function is called.

    Example:
      >>> import functional_optim as fo
      >>> f = lambda x: (x * x).sum()
      >>> tx, params = fo.lbfgs(), torch.tensor([1.0, 2.0])
      >>> state, value_and_grad = tx.init(params), value_and_grad_from_state(f)
      >>> for _ in range(3):
      ...     value, grad = value_and_grad(params, state=state)
      ...     updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=f)
      ...     params = fo.apply_updates(params, updates)
      >>> f(params) < 1e-12
      tensor(True)
    """

    checked_function("value_fn", "value_and_grad_from_state", value_fn, "`value_fn(params) -> value`")

    def value_and_grad(params: Tree, *args: Any, state: Any, **kwargs: Any) -> tuple[Any, Tree]:
        check_nest(state)
        found = _searches(state)
        if len(found) != 1 or found[0].grad is None:
            several = f"holds {len(found)} of them" if len(found) > 1 else "has none"
            raise ValueError(
                f"value_and_grad_from_state takes a value with its gradient from the state of one line search, but "
                f"this state {several}; use a line search that keeps both, such as "
                f"`scale_by_zoom_linesearch`, or `scale_by_backtracking_linesearch(store_grad=True)`."
            )
        own, (last,) = Leaves("value_and_grad_from_state", params), found
        if bool(torch.isfinite(last.value)) and flatten(last.grad)[1] == own.spec:
            return last.value, last.grad
        with torch.enable_grad():
            leaves = [p.detach().clone().requires_grad_() for p in own.params]
            value = value_fn(own.tree(leaves), *args, **kwargs)
            return value.detach(), own.tree(gradients(value, leaves))

    return value_and_grad


def _searches(state: Any) -> list[Any]:
    """The states of line searches within a state: tuples that have a value and a gradient, of optax's names."""
    if isinstance(state, Mapping):
        return [x for child in state.values() for x in _searches(child)]
    if not isinstance(state, (tuple, list)):
        return []
    if {"value", "grad"} <= set(getattr(state, "_fields", ())):
        return [state]
    return [x for child in state for x in _searches(child)]
