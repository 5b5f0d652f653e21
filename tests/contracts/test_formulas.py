"""Formulas of rules within other rules, `factory.formula`, and the size of a leaf."""

from typing import Any

import numpy
import pytest
import torch

import functional_optim as fo
from _lib.marks import INTERPRETER
from functional_optim._runtime.backend import BACKENDS
from functional_optim.adapters import TransformOptimizer


pytestmark = INTERPRETER


@fo.elementwise(state={"mu": fo.slot(dtype=torch.float64), "nu": fo.slot(dtype=torch.float64)}, ranges={"b1": "[0, 1)"})
def cautious_adam(u: Any, mu: Any, nu: Any, *, step: Any, b1: Any = 0.9) -> Any:
    """Adam without the elements that step against the gradient."""
    direction, mu, nu = fo.scale_by_adam.formula(u, mu, nu, step=step, b1=b1)
    agrees = torch.where(direction * u > 0, 1.0, 0.0)
    return direction * agrees / torch.clamp(fo.leaf_sum(agrees) / fo.leaf_size(u), min=1e-3), mu, nu


def in_numpy(grads: list[numpy.ndarray[Any, Any]], b1s: list[float]) -> list[numpy.ndarray[Any, Any]]:
    """The same, for one leaf."""
    mu = nu = numpy.zeros_like(grads[0])
    updates = []
    for k, (g, b1) in enumerate(zip(grads, b1s, strict=True), 1):
        mu, nu = b1 * mu + (1 - b1) * g, 0.999 * nu + 0.001 * g * g
        direction = (mu / (1 - b1**k)) / (numpy.sqrt(nu / (1 - 0.999**k)) + 1e-8)
        agrees = numpy.where(direction * g > 0, 1.0, 0.0)
        updates.append(direction * agrees / max(agrees.mean(), 1e-3))
    return updates


def gradients(n: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b": (70,)}
    return [{k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()} for _ in range(n)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_formula_within_a_formula(backend: str) -> None:
    """With a hyper-parameter that is a schedule, and others that have their defaults."""
    b1s = [0.9 - 0.01 * k for k in range(20)]
    tx, grads = cautious_adam(b1=lambda count: 0.9 - 0.01 * count), gradients(20)
    state = tx.init(grads[0])
    found = []
    with fo.use_backend(backend):
        for g in grads:
            updates, state = tx.update(g, state)
            found.append(updates)

    for name in ("a", "b"):
        expected = in_numpy([g[name].numpy() for g in grads], b1s)
        actual = torch.stack([u[name] for u in found])
        # some roundings in each of 20 steps of a mean, in double precision
        torch.testing.assert_close(actual, torch.from_numpy(numpy.stack(expected)), rtol=1e-13, atol=1e-15)


def test_an_optimizer_has_the_hyper_parameters_of_the_rule_that_calls() -> None:
    w = torch.nn.Parameter(torch.zeros(70, dtype=torch.float64))
    opt = TransformOptimizer([w], fo.chain(cautious_adam(b1=0.8), fo.scale(-1.0)))
    assert opt.param_groups[0]["b1"] == 0.8
    grads = [g["b"] for g in gradients(3)]
    for g in grads:
        w.grad = g.clone()
        opt.step()

    expected = -sum(in_numpy([g.numpy() for g in grads], [0.8] * 3))
    torch.testing.assert_close(w.detach(), torch.from_numpy(numpy.asarray(expected)), rtol=1e-13, atol=1e-15)


def test_a_formula_on_tensors() -> None:
    g = torch.tensor([1.0, -3.0], dtype=torch.float64)
    tx = fo.scale_by_adam(b2=0.9)
    expected, state = tx.update(g, tx.init(g))

    u, mu, nu = fo.scale_by_adam.formula(g, torch.zeros_like(g), torch.zeros_like(g), step=1, b2=0.9)

    torch.testing.assert_close((u, mu, nu), (expected, state.mu, state.nu), rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("arguments", "numbers", "error", "message"),
    [
        (2, {"step": 1}, TypeError, r"formula of scale_by_adam: missing .* 'nu'; it takes \(u, mu, nu, \*, step, b1="),
        (3, {}, TypeError, "formula of scale_by_adam: missing .* 'step'"),
        (3, {"step": 1, "beta1": 0.9}, TypeError, "formula of scale_by_adam: .* 'beta1'"),
        (3, {"step": 1, "b1": 1.0}, ValueError, r"`b1` of scale_by_adam must be in \[0, 1\), got 1\.0"),
        (3, {"step": 1, "b1": lambda count: 0.9}, TypeError, "`b1` is .* expected its value at this step"),
    ],
)
def test_a_formula_refuses(arguments: int, numbers: dict[str, Any], error: type[Exception], message: str) -> None:
    rule = fo.elementwise(lambda u: fo.scale_by_adam.formula(*[u] * arguments, **numbers)[0])()
    x = torch.ones(2)

    with pytest.raises(error, match=message):
        rule.update(x, rule.init(x))


def test_the_size_of_a_leaf_costs_no_pass() -> None:
    rule = fo.elementwise(lambda u: u / fo.leaf_size(u) + fo.leaf_sum(torch.ones_like(u)) - u.numel())()
    params = {"a": torch.zeros(4, 5), "b": torch.zeros(())}

    assert fo.explain(rule, params).passes == 1
    updates, _ = rule.update({"a": torch.ones(4, 5), "b": torch.ones(())}, rule.init(params))
    torch.testing.assert_close(updates, {"a": torch.full((4, 5), 1 / 20), "b": torch.ones(())})


def test_the_size_of_a_tensor() -> None:
    assert fo.leaf_size(torch.zeros(2, 3)) == 6


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_numbers_of_a_complex_tensor(dtype: torch.dtype) -> None:
    """Nothing is lost of the imaginary part; the norm and the size are real."""
    x = torch.tensor([3 + 4j, 0, 0, 1j], dtype=dtype)
    found = fo.leaf_sum(x), fo.leaf_mean(x), fo.leaf_norm(x), fo.leaf_size(x)
    wanted = torch.tensor(3 + 5j), torch.tensor(0.75 + 1.25j), torch.tensor(26.0).sqrt(), torch.tensor(4.0)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b.to(dtype if b.is_complex() else dtype.to_real()), rtol=1e-7, atol=0)


def test_a_hyper_parameter_may_be_called_as_the_counter_is() -> None:
    @fo.elementwise
    def by(u: Any, *, count: Any) -> Any:
        return count * u

    tx = by(lambda t: [1.0, 10.0, 100.0][int(t)])  # which Python evaluates
    state, found = tx.init(torch.ones(1)), []
    for _ in range(3):
        u, state = tx.update(torch.ones(1), state)
        found.append(u.item())
    assert found == [1.0, 10.0, 100.0]
    with pytest.raises(TypeError, match="the slot `count` of rule is a field of its state"):

        @fo.elementwise(state={"count": fo.zeros})
        def rule(u: Any, count: Any) -> Any:
            return u, count
