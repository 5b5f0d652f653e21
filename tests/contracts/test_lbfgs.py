"""L-BFGS as a transformation, against optax; and what optax does not do."""

import io
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import functional_optim as fo
from _lib.compare import assert_same_bits
from _lib.objectives import START, each_search, flat, rosenbrock, value_and_grad
from _lib.records import gradients, normal, to_arrays, to_tensors
from _lib.trees import F32, F64, Tree, clone, leaves, tree_map
from functional_optim.adapters import TransformOptimizer


# --- scale_by_lbfgs


def curvature(tree: Tree) -> Tree:
    """The diagonal of a Hessian, between 1 and 4."""
    return tree_map(lambda x: 1 + 3 * torch.linspace(0, 1, x.numel(), dtype=F64).view(x.shape), tree)


@pytest.mark.slow
@pytest.mark.parametrize(("memory_size", "scale_init_precond"), [(1, True), (10, True), (4, False)])
def test_directions_are_those_of_optax(memory_size: int, scale_init_precond: bool) -> None:
    """Over 25 points of a parabola whose Hessian lies between 1 and 4, where every pair is kept.

    There cos(s, y) >= 0.8, so that a factor V of the recursion enlarges rounding errors by 1.25 at most, and twenty of
    them by 87; each adds a few units of 2**-53: 20 * 87 * 4 * 2**-53 = 8e-13 of the longest vector, which is the
    gradient or the direction.
    """
    arguments = (memory_size, scale_init_precond)
    ours, theirs = fo.scale_by_lbfgs(*arguments), optax.scale_by_lbfgs(*arguments)
    params = normal(1)
    hessian = curvature(params)
    state, their_state, update = ours.init(params), theirs.init(to_arrays(params)), jax.jit(theirs.update)
    for step in range(25):
        grads = tree_map(lambda p, h: p * h, params, hessian)
        found, state = ours.update(grads, state, params)
        expected, their_state = update(to_arrays(grads), their_state, to_arrays(params))
        expected = to_tensors(expected)

        scale = max(flat(grads).norm(), flat(expected).norm()).item()
        torch.testing.assert_close(flat(found), flat(expected), rtol=0, atol=1e-12 * scale)
        params = tree_map(lambda p, u, n: p - 0.1 * u + 0.1 * n, params, expected, gradients("normal", step))
    assert state.count == 25
    assert (state.weights_memory > 0).all()


def concave(x: torch.Tensor) -> torch.Tensor:
    return -(torch.tensor([1.0, 2.0, 3.0], dtype=F64) * x * x).sum() / 2


def test_pairs_that_curve_downwards_are_not_kept() -> None:
    """Updates stay directions of ascent of the objective, to be subtracted; optax's become the opposite."""
    tx, theirs = fo.scale_by_lbfgs(3), optax.scale_by_lbfgs(3)
    optax_update = jax.jit(theirs.update)
    params = torch.tensor([0.5, -0.25, 1.0], dtype=F64)
    state, their_state, turned = tx.init(params), theirs.init(jnp.asarray(params.numpy())), 0
    for _ in range(20):
        _, grad = value_and_grad(concave, params)
        update, state = tx.update(grad, state, params)
        other, their_state = optax_update(jnp.asarray(grad.numpy()), their_state, jnp.asarray(params.numpy()))
        assert update.dot(grad) > 0
        turned += bool(np.dot(np.asarray(other), grad.numpy()) < 0)
        params = params - 0.1 * update
    assert turned > 10
    assert (state.weights_memory == 0).all()


def test_old_pairs_are_kept_where_a_new_one_is_not() -> None:
    tx, params = fo.scale_by_lbfgs(2), torch.tensor([1.0, 1.0], dtype=F64)
    state = tx.init(params)
    for k, grad in enumerate([[1.0, 4.0], [0.5, 1.0], [3.0, 3.0], [math.nan, 1.0], [0.25, 0.5]]):
        before = state
        update, state = tx.update(torch.tensor(grad, dtype=F64), state, params - 0.25 * k)
        assert update.isfinite().all() == (k != 3)
        if k in (2, 3, 4):  # the gradient grew along a step down, was no number, and was none before
            assert_same_bits(state[3:], before[3:])
    assert (state.weights_memory != 0).sum() == 1


def test_a_gradient_of_zeros_is_a_direction_of_zeros() -> None:
    tx, params = fo.scale_by_lbfgs(), torch.ones(3)
    state = tx.init(params)
    for _ in range(3):
        update, state = tx.update(torch.zeros(3), state, params)
        assert torch.equal(update, torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_single_precision(dtype: torch.dtype) -> None:
    """Only the result is rounded: half a unit, 2**-9 or 2**-12 relative, beside what single precision adds."""
    tx = fo.scale_by_lbfgs(3)
    params = tree_map(lambda x: x.to(dtype), normal(1))
    wide = tree_map(lambda x: x.float(), params)
    state, other = tx.init(params), tx.init(wide)
    assert all(x.dtype is F32 for x in leaves(state.diff_params_memory))
    for step in range(8):
        grads = tree_map(lambda p, h: p * h.to(dtype), params, curvature(params))
        update, state = tx.update(grads, state, params)
        expected, other = tx.update(tree_map(lambda g: g.float(), grads), other, wide)
        for x, y in zip(leaves(update), leaves(expected), strict=True):
            assert x.dtype is dtype
            assert_same_bits(x, y.to(dtype))
        noise = gradients("normal", step)
        params = tree_map(lambda p, u, n: p - u / 8 + n.to(dtype) / 8, params, update, noise)
        wide = tree_map(lambda x: x.float(), params)


def test_complex_parameters_are_pairs_of_real_ones() -> None:
    tx = fo.scale_by_lbfgs(3)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, 2, generator=generator, dtype=F64)
    odd = torch.randn(3, generator=generator, dtype=F64)  # so that the complex leaf begins at an odd place
    params, pairs = [odd, torch.view_as_complex(z)], [odd, z]
    state, other = tx.init(params), tx.init(pairs)
    for _ in range(6):
        weights = torch.arange(1, 5, dtype=F64)
        update, state = tx.update([odd, params[1] * weights], state, params)
        expected, other = tx.update([odd, pairs[1] * weights[:, None]], other, pairs)
        assert_same_bits(torch.view_as_real(update[1]), expected[1])
        params = [p - u / 4 for p, u in zip(params, update, strict=True)]
        pairs = [p - u / 4 for p, u in zip(pairs, expected, strict=True)]


# --- fo.lbfgs


@pytest.mark.parametrize("learning_rate", [None, 0.5, fo.linear_schedule(0.5, 1.0, 20)])
@each_search
def test_lbfgs_finds_the_minimum(search: Any, learning_rate: Any) -> None:
    tx = fo.lbfgs(learning_rate, linesearch=search)
    params, find = START, fo.value_and_grad_from_state(rosenbrock)
    state = tx.init(params)
    for _ in range(120):
        value, grad = find(params, state=state)
        params, state = fo.apply_gradients(tx, params, grad, state, value=value, grad=grad, value_fn=rosenbrock)
    torch.testing.assert_close(flat(params), torch.ones(3, dtype=F64), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_lbfgs_takes_the_steps_of_optax() -> None:
    """From the start of Rosenbrock's valley: as many evaluations in each step, 20 of them, and the same minimum.

    Rounding errors grow from step to step, by the condition of the Hessian, 2500, at most in all that follow: the first
    steps agree to 1e-10, the others to 1e-6.
    """
    ours, theirs = fo.lbfgs(memory_size=5), optax.lbfgs(memory_size=5)
    params, their_params = START, to_arrays(START)
    state, their_state = ours.init(params), theirs.init(their_params)

    @jax.jit
    def step_of_optax(params: Any, state: Any) -> Any:
        value, grad = jax.value_and_grad(rosenbrock)(params)
        updates, state = theirs.update(grad, state, params, value=value, grad=grad, value_fn=rosenbrock)
        return optax.apply_updates(params, updates), state

    for step in range(20):
        value, grad = value_and_grad(rosenbrock, params)
        params, state = fo.apply_gradients(ours, params, grad, state, value=value, grad=grad, value_fn=rosenbrock)
        their_params, their_state = step_of_optax(their_params, their_state)
        close = {"rtol": 0, "atol": 1e-10 if step < 5 else 1e-6}
        torch.testing.assert_close(flat(params), flat(to_tensors(their_params)), **close)
        assert int(state[2].info.num_linesearch_steps) == int(their_state[2].info.num_linesearch_steps)


def test_lbfgs_without_a_search_is_the_direction() -> None:
    tx, params = fo.lbfgs(0.25, linesearch=None), torch.tensor([0.25, -0.5])
    assert_same_bits(tx.update(params, tx.init(params), params)[0], -0.25 * params)  # as long as the gradient, below 1


def test_value_and_grad_from_state_evaluates_only_where_it_must() -> None:
    calls = 0

    def f(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return (x * x).sum()

    tx = fo.named_chain(("direction", fo.sgd(1.0)), ("search", fo.scale_by_zoom_linesearch(5)))
    params = torch.tensor([1.0, 2.0])
    state, find = tx.init(params), fo.value_and_grad_from_state(f)
    for first in (True, False, False):
        before = calls
        value, grad = find(params, state=state)
        assert calls == before + first
        assert_same_bits([value, grad], [(params * params).sum(), 2 * params])
        params, state = fo.apply_gradients(tx, params, grad, state, value=value, grad=grad, value_fn=f)


def test_value_and_gradient_are_computed_where_they_are_not_given() -> None:
    tx = fo.scale_by_zoom_linesearch(10)
    value, grad = value_and_grad(rosenbrock, START)
    updates, state = tree_map(torch.neg, grad), tx.init(START)
    given = tx.update(updates, state, START, value=value, grad=grad, value_fn=rosenbrock)
    assert_same_bits(tx.update(updates, state, START, value_fn=rosenbrock), given)
    assert_same_bits(tx.update(updates, state, START, value=value.item(), value_fn=rosenbrock), given)


def test_further_arguments_go_to_the_objective() -> None:
    tx = fo.chain(fo.scale(-1.0), fo.scale_by_zoom_linesearch(10))
    shift = torch.tensor(0.25, dtype=F64)
    value, grad = value_and_grad(lambda params: rosenbrock(params, shift), START)
    updates, state = tx.update(grad, tx.init(START), START, value=value, grad=grad, value_fn=rosenbrock, shift=shift)
    assert_same_bits(state[1].value, rosenbrock(tree_map(torch.add, START, updates), shift))


# --- in chains, masks, optimizers and files


def parabola(params: Tree) -> torch.Tensor:
    """A convex function of named parameters, with a minimum that is not 0."""
    x = torch.cat([p.reshape(-1) for p in params.values()])
    return (torch.linspace(1, 9, x.numel(), dtype=x.dtype) * (x - 1) ** 2).sum() / 2 + (x**4).sum() / 8


def named(dtype: torch.dtype = F64) -> dict[str, torch.Tensor]:
    """Parameters in the order of their names, in which a dict is flattened; an optimizer takes them as they come."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"bias": (3,), "scale": (), "weight": (4, 3)}
    return {k: torch.randn(shape, generator=generator, dtype=F64).to(dtype) for k, shape in shapes.items()}


def take(tx: Any, params: Tree, state: Any, steps: int, donate: bool = False) -> tuple[Tree, Any]:
    for _ in range(steps):
        value, grad = value_and_grad(parabola, params)
        params, state = fo.apply_gradients(
            tx, params, grad, state, donate=donate, value=value, grad=grad, value_fn=parabola
        )
    return params, state


@each_search
def test_a_state_goes_through_a_file(search: Any) -> None:
    """`torch.load` with `weights_only`; the run goes on to the bit. Donated steps have the same results."""
    tx, params = fo.lbfgs(memory_size=3, linesearch=search), named()
    params, state = take(tx, params, tx.init(params), 5)
    file = io.BytesIO()
    torch.save([params, state], file)
    file.seek(0)
    loaded = torch.load(file)
    straight = take(tx, params, state, 4)
    assert_same_bits(take(tx, *loaded, 4), straight)
    assert_same_bits(take(tx, *clone([params, state]), 4, donate=True), straight)


def test_masked_parameters_are_none_of_the_vector() -> None:
    """The others move as they would alone, and those that are masked as the rest of the chain says."""
    params, own = named(), {"weight": named()["weight"], "scale": named()["scale"]}
    alone = fo.scale_by_lbfgs(3)
    tx = fo.chain(fo.masked(fo.scale_by_lbfgs(3), {"weight": True, "bias": False, "scale": True}), fo.scale(-0.5))
    state, other = tx.init(params), alone.init(own)
    for _ in range(6):
        _, grad = value_and_grad(parabola, params)
        updates, state = tx.update(grad, state, params)
        expected, other = alone.update({k: grad[k] for k in own}, other, {k: params[k] for k in own})
        assert_same_bits(updates, {k: -0.5 * (expected[k] if k in own else grad[k]) for k in params})
        params = fo.apply_updates(params, updates)


@each_search
def test_an_optimizer_takes_the_steps_of_the_functions(search: Any) -> None:
    """And hands its state over to another one, in a file, in the middle of training."""
    tx = fo.lbfgs(memory_size=3, linesearch=search)
    expected, state = named(), tx.init(named())

    def optimizer(values: Tree) -> tuple[dict[str, torch.nn.Parameter], TransformOptimizer]:
        params = {k: torch.nn.Parameter(p.clone()) for k, p in values.items()}
        return params, TransformOptimizer(params.items(), tx)

    params, opt = optimizer(named())
    for step in range(8):
        if step == 4:
            file = io.BytesIO()
            torch.save(opt.state_dict(), file)
            file.seek(0)
            params, opt = optimizer(expected)
            opt.load_state_dict(torch.load(file))
        expected, state = take(tx, expected, state, 1)

        def closure() -> torch.Tensor:
            opt.zero_grad()
            loss = parabola(params)
            loss.backward()
            return loss

        opt.step(closure, value_fn=parabola)
        assert_same_bits({k: p.detach() for k, p in params.items()}, expected)
    assert opt.param_groups[0]["chain"].startswith("scale_by_lbfgs > scale_by_learning_rate > scale_by_")


# --- bad input


class Bad:
    """A step that is refused.

    Args:
      error: the class of the error.
      message: a part of its message.
      tx: the transformation.
      updates: the updates.
      params: the parameters.
      **extra: the extra arguments.
    """

    def __init__(self, error: type[Exception], message: str, tx: Any, **changes: Any) -> None:
        self.error, self.message, self.tx, self.changes = error, message, tx, changes


ZOOMED = fo.scale_by_zoom_linesearch(5)
HALF = fo.masked(ZOOMED, {"weight": True, "bias": False, "scale": True})
BAD = {
    "lbfgs without parameters": Bad(ValueError, "scale_by_lbfgs needs the param", fo.scale_by_lbfgs(), params=None),
    "lbfgs without a gradient": Bad(
        ValueError, r"updates at 'bias' is None; scale_by_lbfgs works on one vector", fo.scale_by_lbfgs(), bias=None
    ),
    "lbfgs of another shape": Bad(
        ValueError, r"updates at 'bias' has shape \(2,\)", fo.scale_by_lbfgs(), bias=torch.zeros(2)
    ),
    "no objective": Bad(TypeError, "scale_by_zoom_linesearch evaluates the objective: call", ZOOMED, value_fn=None),
    "value of two elements": Bad(ValueError, "`value` of scale_by_zoom.* one real", ZOOMED, value=torch.ones(2)),
    "value that is none": Bad(ValueError, "`value` of scale_by_zoom_linesearch is 'a'", ZOOMED, value="a"),
    "objective of two elements": Bad(
        ValueError, r"`value_fn` is a tensor of shape \(2,\)", fo.scale_by_backtracking_linesearch(3),
        value_fn=lambda p: p["bias"][:2],
    ),
    "objective that is detached": Bad(
        ValueError, "autograd does not know to depend", ZOOMED, value_fn=lambda p: p["bias"].sum().item()
    ),
    "argument that is not taken": Bad(TypeError, "extra argument 'temperature'", ZOOMED, temperature=1.0),
    "gradient of another shape": Bad(
        ValueError, r"grad at 'bias' has shape", ZOOMED, grad={**named(), "bias": torch.zeros(4, dtype=F64)}
    ),
    "gradient of another structure": Bad(ValueError, "grad of scale_by_zoom_linesearch", ZOOMED, grad=torch.zeros(3)),
    "search within a mask": Bad(ValueError, "inside `masked` or `partition`", HALF),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_steps_are_refused(name: str) -> None:
    bad = BAD[name]
    value, grad = value_and_grad(parabola, named())
    arguments = {"params": named(), "value": value, "grad": grad, "value_fn": parabola, **bad.changes}
    params, updates = arguments.pop("params"), tree_map(torch.neg, grad)
    if "bias" in arguments:
        updates["bias"] = arguments.pop("bias")
    if bad.tx == fo.scale_by_lbfgs():
        arguments = {}

    with pytest.raises(bad.error, match=bad.message):
        bad.tx.update(updates, bad.tx.init(named()), params, **arguments)


@pytest.mark.parametrize("tx", [fo.lbfgs(0.1, linesearch=None), fo.scale_by_backtracking_linesearch(3), ZOOMED])
def test_members_of_vmap_are_refused(tx: Any) -> None:
    """Python reads numbers of the step."""
    ones, one = torch.ones(3, 2), torch.ones(2)

    def step(p: Any, g: Any, value: Any) -> Any:
        return fo.apply_gradients(tx, p, g, tx.init(p), value=value, grad=g, value_fn=lambda p: p.sum())

    message = r"%s stands for several members of `torch.vmap`, and scale_by_\w+ decides by numbers.* in a loop"
    with pytest.raises(TypeError, match=message % "params"):
        torch.vmap(step)(ones, ones, ones[:, 0])
    with pytest.raises(TypeError, match=message % "updates"):
        torch.vmap(step, (None, 0, None))(one, ones, ones[0, 0])
    if tx == ZOOMED:
        with pytest.raises(TypeError, match=message % "`value` of scale_by_zoom_linesearch"):
            torch.vmap(step, (None, None, 0))(one, one, ones[:, 0])


ARGUMENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "no memory": (lambda: fo.scale_by_lbfgs(0), "`memory_size` of scale_by_lbfgs must be at least 1"),
    "no steps": (lambda: fo.scale_by_zoom_linesearch(0), "`max_linesearch_steps` of scale_by_zoom.* got 0"),
    "negative rate": (lambda: fo.scale_by_zoom_linesearch(5, -1.0), "`max_learning_rate` .* got -1"),
    "factor below 1": (lambda: fo.scale_by_zoom_linesearch(5, increase_factor=0.5), "`increase_factor` .* got 0.5"),
    "strategy": (lambda: fo.scale_by_zoom_linesearch(5, initial_guess_strategy="two"), "'keep' or 'one', got 'two'"),
    "strategy of strong_wolfe": (
        lambda: fo.scale_by_strong_wolfe_linesearch(initial_guess_strategy="two"), "'keep' or 'one', got 'two'"
    ),
    "nan": (lambda: fo.scale_by_strong_wolfe_linesearch(curv_rtol=math.nan), "`curv_rtol` .* got nan"),
    "growing steps": (lambda: fo.scale_by_backtracking_linesearch(5, 0.1, 2.0), "`decrease_factor`.* got 2"),
    "negative steps": (lambda: fo.scale_by_backtracking_linesearch(-1), "`max_backtracking_steps` .* got -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_arguments_are_refused(name: str) -> None:
    make, message = ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (fo.adam(0.1), "has none"),
        (fo.scale_by_backtracking_linesearch(5), "has none"),
        (fo.chain(ZOOMED, ZOOMED), "holds 2 of them"),
    ],
    ids=str,
)
def test_a_state_without_value_and_gradient_is_refused(tx: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fo.value_and_grad_from_state(parabola)(named(), state=tx.init(named()))


def test_failed_searches_are_printed_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for verbose in (False, True):
        tx = fo.scale_by_zoom_linesearch(3, verbose=verbose)
        value, grad = value_and_grad(parabola, named())
        tx.update(grad, tx.init(named()), named(), value=value, grad=grad, value_fn=parabola)  # uphill
        assert ("scale_by_zoom_linesearch: step" in capsys.readouterr().out) is verbose


SECOND_ORDER: dict[str, Any] = {
    "scale_by_lbfgs": lambda: fo.chain(fo.scale_by_lbfgs(), fo.scale(-0.1)),
    "scale_by_backtracking_linesearch": lambda: fo.chain(fo.sgd(0.1), fo.scale_by_backtracking_linesearch(10)),
    "scale_by_zoom_linesearch": lambda: fo.chain(fo.sgd(0.1), fo.scale_by_zoom_linesearch(10)),
    "scale_by_strong_wolfe_linesearch": lambda: fo.chain(fo.sgd(0.1), fo.scale_by_strong_wolfe_linesearch()),
}


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_derivatives_through_their_steps_are_refused(name: str) -> None:
    """They compute without a record, so a derivative would lack a term; values are those without derivatives."""
    tx = SECOND_ORDER[name]()

    def f(p: torch.Tensor) -> torch.Tensor:
        return (p**4).sum() / 4

    def go(w: torch.Tensor) -> torch.Tensor:
        p, state = w, tx.init(w)
        for _ in range(2):
            grad = p**3
            p, state = (
                fo.apply_gradients(tx, p, grad, state, value=f(p), grad=grad, value_fn=f)
                if ("linesearch" in name)
                else fo.apply_gradients(tx, p, grad, state)
            )
        return f(p)

    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    expected = go(start)
    w = start.clone().requires_grad_()
    loss = go(w)
    assert loss.item() == expected.item()
    with pytest.raises(RuntimeError, match=f"{name} computes its updates without a record"):
        loss.backward()
    with pytest.raises(RuntimeError, match="would lack a term"):
        torch.func.grad(go)(start)
    with pytest.raises(RuntimeError, match="would lack a term"):
        torch.func.jvp(go, (start,), (start,))


OTHER_STATES: dict[str, tuple[Callable[[], Any], str]] = {
    "another memory_size": (
        lambda: stepped(fo.scale_by_lbfgs(memory_size=3), (2, 3)),
        r"state\.diff_params_memory at 'w' of scale_by_lbfgs has shape \(3, 2, 3\), expected \(8, 2, 3\)",
    ),
    "other parameters": (
        lambda: stepped(fo.scale_by_lbfgs(memory_size=8), (3, 2)),
        r"state\.diff_params_memory at 'w' of scale_by_lbfgs has shape \(8, 3, 2\), expected \(8, 2, 3\)",
    ),
    "parameters of another shape": (
        lambda: stepped(fo.scale_by_lbfgs(memory_size=8), (2, 3))._replace(params={"w": torch.ones(6)}),
        r"state\.params at 'w' of scale_by_lbfgs has shape \(6,\), expected \(2, 3\)",
    ),
    "other weights": (
        lambda: stepped(fo.scale_by_lbfgs(memory_size=8), (2, 3))._replace(weights_memory=torch.zeros(3)),
        r"state\.weights_memory of scale_by_lbfgs has shape \(3,\), expected \(8,\)",
    ),
}


def stepped(tx: fo.GradientTransformation, shape: tuple[int, ...]) -> Any:
    """A state after a step."""
    params = {"w": torch.ones(shape)}
    return tx.update(params, tx.init(params), params)[1]


@pytest.mark.parametrize("name", OTHER_STATES)
def test_a_state_of_other_shapes_is_refused(name: str) -> None:
    make, message = OTHER_STATES[name]
    params = {"w": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=message):
        fo.scale_by_lbfgs(memory_size=8).update(params, make(), params)


@each_search
def test_a_default_device_does_not_reach_into_a_search(search: Any) -> None:
    """A number that is made on the way has the device of the parameters, or is on the host."""
    tx = fo.lbfgs(linesearch=search)

    def run() -> torch.Tensor:
        params, state = {"w": torch.tensor([1.0, -2.0], device="cpu")}, None
        value_fn = lambda params: (params["w"] ** 4).sum()  # noqa: E731
        state = tx.init(params)
        for _ in range(5):
            given = {"value": value_fn(params), "grad": {"w": 4 * params["w"] ** 3}, "value_fn": value_fn}
            updates, state = tx.update(given["grad"], state, params, **given)
            params = fo.apply_updates(params, updates)
        return params["w"]

    expected = run()
    with torch.device("meta"):
        found = run()

    torch.testing.assert_close(found, expected, rtol=0, atol=0)
