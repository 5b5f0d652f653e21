"""L-BFGS: updates times an approximation of the inverse Hessian that the last steps tell of."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .._compiler.arguments import checked_switch, whole_number
from .._lbfgs.capture import refuse_capture
from .._lbfgs.recursion import two_loop
from .._transform import Declared, GradientTransformation, declares
from .._tree import Tree
from ._constants import without_derivatives
from ._vectors import Leaves, dot, flat, rows, shaped, split, vector, wide


class ScaleByLBFGSState(NamedTuple):
    """The state of `scale_by_lbfgs`.

    Args:
      count: the number of updates.
      params: the parameters at the last one.
      updates: the updates that came in at the last one.
      diff_params_memory: for each leaf, the differences of parameters, stacked, the newest last.
      diff_updates_memory: the differences of updates that belong to them.
      weights_memory: for each pair of differences the inverse of their product; 0 for a pair that is not there yet.
    """

    count: Any
    params: Tree
    updates: Tree
    diff_params_memory: Tree
    diff_updates_memory: Tree
    weights_memory: Any


torch.serialization.add_safe_globals([ScaleByLBFGSState])


@declares
def scale_by_lbfgs(memory_size: int = 10, scale_init_precond: bool = True) -> GradientTransformation:
    r"""Multiplies updates by the inverse Hessian as L-BFGS approximates it, over all leaves as one vector.

    $$u_t = H_t g_t, \quad H \leftarrow V_i^\top H V_i + \rho_i s_i s_i^\top \; (i = t-m, \dots, t-1), \quad
      V_i = I - \rho_i y_i s_i^\top, \quad \rho_i = 1 / y_i^\top s_i$$

    with $s_i = \theta_{i+1} - \theta_i$ and $y_i = g_{i+1} - g_i$, from $H = \gamma I$ on, where $\gamma = s^\top y /
    y^\top y$ of the last pair, and $\min(1, 1 / \lVert g \rVert)$ before there is one.

    A pair is kept if $s^\top y > \epsilon \lVert s \rVert \lVert y \rVert$ with the $\epsilon$ of the dtype, so that
    $H$ stays positive definite and $-u_t$ a direction of descent. optax keeps all pairs, and ascends where the
    objective is not convex. A gradient that is no number enters no pair.

    Half types are computed and remembered in float32. Autograd does not follow; all leaves must be on one device.

    Args:
      memory_size: $m$, the number of pairs.
      scale_init_precond: whether $\gamma$ is as above; else it is 1.

    Returns:
      The transformation. Its state is `(count, params, updates, diff_params_memory, diff_updates_memory,
      weights_memory)`.

    Raises:
      ValueError: `memory_size` is less than 1.

    Example:
      >>> tx = scale_by_lbfgs()
      >>> params = torch.tensor([1.0, 1.0])  # of the objective x**2 / 2 + 2 * y**2
      >>> state = tx.init(params)
      >>> _, state = tx.update(torch.tensor([1.0, 4.0]), state, params)
      >>> tx.update(torch.tensor([1.0, 2.0]), state, torch.tensor([1.0, 0.5]))[0]
      tensor([0.2500, 0.5000])

    Source: Nocedal 1980, "Updating quasi-Newton matrices with limited storage"; Nocedal & Wright 2006, "Numerical
    Optimization", algorithms 7.4 and 7.5.
    """
    name = "scale_by_lbfgs"
    memory_size = whole_number("memory_size", name, memory_size)
    if memory_size < 1:
        raise ValueError(f"`memory_size` of {name} must be at least 1, got {memory_size}.")
    scale_init_precond = checked_switch("scale_init_precond", name, scale_init_precond)

    def init(params: Tree) -> ScaleByLBFGSState:
        own = Leaves(name, params)
        device = own.params[0].device if own.params else None
        dtype = flat(own.params).dtype if own.params else torch.float32

        def zeros() -> Tree:
            return own.tree([torch.zeros_like(p, requires_grad=False) for p in own.params])

        def memory() -> Tree:
            made = [torch.zeros((memory_size, *p.shape), dtype=wide(p), device=p.device) for p in own.params]
            return own.tree(made)

        weights = torch.zeros(memory_size, dtype=dtype, device=device)
        count = torch.zeros((), dtype=torch.int64, device=device)
        return ScaleByLBFGSState(count, zeros(), zeros(), memory(), memory(), weights)

    def update(updates: Tree, state: ScaleByLBFGSState, params: Tree | None = None) -> tuple[Tree, ScaleByLBFGSState]:
        with torch.no_grad():
            direction, new = step(updates, state, params)
        return without_derivatives(name, direction, updates, params, state), new

    def step(updates: Tree, state: ScaleByLBFGSState, params: Tree | None = None) -> tuple[Tree, ScaleByLBFGSState]:
        own = Leaves(name, params)
        if not own.params:
            return updates, state._replace(count=state.count + 1)
        refuse_capture(f"{name} chooses pairs of differences", own.params)
        given = own.read("updates", updates, fit=True)
        steps = own.read("state.diff_params_memory", state.diff_params_memory)
        differences = own.read("state.diff_updates_memory", state.diff_updates_memory)
        weights = state.weights_memory
        own.check_shapes("state.diff_params_memory", steps, memory_size)
        own.check_shapes("state.diff_updates_memory", differences, memory_size)
        if weights.shape != (memory_size,):
            raise ValueError(
                f"state.weights_memory of {name} has shape {tuple(weights.shape)}, expected {(memory_size,)}: it is of "
                f"other options; make the state with `init`."
            )
        if int(state.count):
            before, updates_before = own.read("state.params", state.params), own.read("state.updates", state.updates)
            own.check_shapes("state.params", before)
            own.check_shapes("state.updates", updates_before)
            s, y = flat(own.params) - flat(before), flat(given) - flat(updates_before)
            product = dot(s, y)
            if _is_convex(s, y, product):
                weights = torch.cat([weights[1:], (1.0 / product).reshape(1).to(weights)])
                steps = _pushed(steps, split(s, own.params))
                differences = _pushed(differences, split(y, own.params))
        known = [weight for weight in weights.tolist() if weight]
        direction = _direction(given, steps, differences, known, scale_init_precond)
        new = ScaleByLBFGSState(
            state.count + 1,
            own.tree([x.detach().clone() for x in own.params]),
            own.tree([x.detach().clone() for x in given]),
            own.tree(steps),
            own.tree(differences),
            weights,
        )
        return own.tree(direction), new

    arguments = {"memory_size": memory_size, "scale_init_precond": scale_init_precond}
    return Declared(scale_by_lbfgs, arguments, init, update, ScaleByLBFGSState)


def _is_convex(s: torch.Tensor, y: torch.Tensor, product: torch.Tensor) -> bool:
    """Whether the objective curves upwards along a step, by more than rounding can feign."""
    limits = torch.finfo(s.dtype)
    return float(product) > max(limits.eps * float(s.norm()) * float(y.norm()), limits.tiny)


def _pushed(memory: list[torch.Tensor], newest: list[torch.Tensor]) -> list[torch.Tensor]:
    """A memory with a new row at the end instead of the oldest one."""
    return [torch.cat([old[1:], row[None]]) for old, row in zip(memory, newest, strict=True)]


def _direction(
    updates: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    differences: Sequence[torch.Tensor],
    weights: Sequence[float],
    scales: bool,
) -> list[torch.Tensor]:
    """The product of the inverse Hessian and the updates, a sum of the updates and the vectors of all pairs.

    The recursion works on the coordinates of that sum. All that it asks of vectors is their products, of which there is
    a table: each leaf is read as a matrix, twice, and the host waits for a device once.

    Args:
      updates: a leaf each.
      steps: the differences of parameters, stacked, of which the last ones count.
      differences: the differences of updates, likewise.
      weights: the inverse products of the pairs that are there.
      scales: whether the inverse Hessian begins with a multiple of the identity.

    Returns:
      New updates.
    """
    k = len(weights)
    ss, ys = ([rows(x)[len(x) - k :] for x in memory] for memory in (steps, differences))
    # a gradient may be wider than its parameter, or narrower
    dtypes = [torch.promote_types(s.dtype, vector(u).dtype) for s, u in zip(ss, updates, strict=True)]
    ss, ys = ([x.to(dtype) for x, dtype in zip(memory, dtypes, strict=True)] for memory in (ss, ys))
    us = [vector(u).to(dtype) for u, dtype in zip(updates, dtypes, strict=True)]
    products = torch.zeros(2 * k + 1, 2 * k + 1, dtype=torch.float64, device=us[0].device)
    for s, y, u in zip(ss, ys, us, strict=True):
        products[:k, k:-1] += s @ y.t()  # products of two steps are never asked for
        products[k:-1, k:-1] += y @ y.t()
        products[:k, -1] += s @ u
        products[k:-1, -1] += y @ u
        products[-1, -1] += u @ u
    products = products.triu() + products.triu(1).t()
    table = products.cpu()
    basis = list(torch.eye(2 * k + 1, dtype=torch.float64, device="cpu"))
    scale = 1.0
    if scales and k:
        scale = float(table[k - 1, -2] / table[-2, -2])
    elif scales:
        scale = min(1.0, float(1.0 / table[-1, -1].sqrt()))
    found = two_loop(basis[-1], basis[:k], basis[k:-1], weights, scale, dot=lambda a, b: a @ table @ b)
    made = []
    for s, y, u, like in zip(ss, ys, us, updates, strict=True):
        a, b, c = found.to(u).split_with_sizes((k, k, 1))
        made.append(shaped(s.t() @ a + y.t() @ b + u * c, like).to(like.dtype))
    return made
