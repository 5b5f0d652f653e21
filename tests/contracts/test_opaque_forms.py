"""Forms of an opaque state, and parameters that share memory."""

from collections import OrderedDict
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.twins import Params, counting, opaque_by_norm, seen
from functional_optim import adapters
from functional_optim.adapters import TransformOptimizer


STEPS = 20


@pytest.mark.parametrize("order", ["mv", "vm", "mvwn", "vnmw"])
def test_entries_of_some_parameters_only(order: str) -> None:
    """A form does not depend on which parameter comes first."""
    init = lambda params: {k: torch.zeros_like(p) for k, p in seen(params).items() if p.ndim == 1}  # noqa: E731

    def update(updates: Params, state: Any, params: Any = None) -> Any:
        new = {k: s + updates[k] for k, s in state.items()}
        return {**updates, **new}, new

    shapes = {"m": (2, 2), "v": (2,), "w": (3, 1), "n": (4,)}
    params = {k: torch.nn.Parameter(torch.zeros(shapes[k])) for k in order}
    opt = TransformOptimizer(list(params.items()), fo.chain(fo.GradientTransformation(init, update), fo.scale(-1.0)))
    for _ in range(3):
        for p in params.values():
            p.grad = torch.ones_like(p)
        opt.step()

    assert {k for k, p in params.items() if "transformation_0" in opt.state.get(p, {})} == {*order} & {*"vn"}
    assert {k: p.flatten()[0].item() for k, p in params.items()} == {k: -6.0 if k in "vn" else -3.0 for k in order}


def test_dicts_of_another_class_are_the_same_structure() -> None:
    def update(updates: Params, state: Any, params: Any = None) -> Any:
        return updates, OrderedDict((k, state[k] + x) for k, x in reversed(list(seen(updates).items())))

    init = lambda params: {k: torch.zeros_like(p) for k, p in seen(params).items()}  # noqa: E731
    params = {"a": torch.nn.Parameter(torch.zeros(1)), "b": torch.nn.Parameter(torch.zeros(2))}
    opt = TransformOptimizer(list(params.items()), fo.chain(fo.GradientTransformation(init, update), fo.scale(-1.0)))
    for p in params.values():
        p.grad = torch.ones_like(p)
    for _ in range(2):
        opt.step()

    assert {k: opt.state[p]["transformation_0"].tolist() for k, p in params.items()} == {"a": [2.0], "b": [2.0, 2.0]}


def test_a_state_with_tensors_for_keys_is_refused() -> None:
    params = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    keep = fo.GradientTransformation(
        lambda tree: {p: torch.zeros(()) for p in seen(tree).values()},
        lambda updates, state, params=None: (updates, state),
    )
    opt = TransformOptimizer(params, fo.chain(keep, fo.scale(-1.0)))
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"has tensors for keys, so it cannot be split .* in a dict by its name"):
        opt.step()


def test_derivatives_go_through_a_state_that_is_the_gradient() -> None:
    """The state of a step is the gradient of the one before, whose memory the caller may write to."""
    delayed = fo.GradientTransformation(
        lambda params: {k: torch.zeros_like(p) for k, p in seen(params).items()},
        lambda updates, state, params=None: (state, dict(updates)),
    )

    @fo.elementwise(state={"last": fo.slot(0.0)})
    def delayed_rule(u: Any, last: Any) -> Any:
        return last, u

    found = []
    for tx in (delayed, delayed_rule()):
        m = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        start = torch.ones(2, dtype=torch.float64, requires_grad=True)
        x = start.clone()
        opt = TransformOptimizer([("x", x)], fo.chain(tx, fo.scale(-0.2)), differentiable=True)
        for _ in range(3):
            x.grad = m + x
            opt.step()
        found.append(torch.autograd.grad(x.sum(), [m, start]))

    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


# -- memory that is shared --------------------------------------------------------------------------------------------


@fo.elementwise(state={"d": fo.slot(1.0, per="tree")})
def per_tree(u: Any, d: Any) -> Any:
    """Counts in a slot of the tree."""
    return u * d, d + 1.0


@pytest.mark.parametrize("tx", [counting([]), per_tree(), opaque_by_norm()], ids=["opaque", "a slot", "a norm"])
def test_parameters_of_one_memory_are_refused_where_a_step_is_of_all(tx: fo.GradientTransformation) -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    params[1].data = params[0].data
    for p in params:
        p.grad = torch.ones(3)
    opt = TransformOptimizer([(f"w{k}", p) for k, p in enumerate(params)], fo.chain(tx, fo.scale(-0.1)))
    with pytest.raises(ValueError, match=r"'w0'.*'w1'.*memory|'w1'.*'w0'.*memory"):
        opt.step()
    assert not opt.state
    assert [p.tolist() for p in params] == [[1.0] * 3] * 3


TWICE = ["SGD", "AdamW", "Adam", "NAdam", "RAdam", "Rprop", "RMSprop", "Adagrad", "Adamax", "Adadelta", "ASGD"]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("name", TWICE)
def test_a_parameter_that_is_twice_in_a_group_takes_two_steps(name: str) -> None:
    found = []
    for library in (adapters, torch.optim):
        w = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        foreach = {} if library is adapters else {"foreach": False}
        opt = getattr(library, name)([{"params": [w, w]}], lr=0.1, **foreach)
        for k in range(STEPS):
            w.grad = torch.full((2,), 1.0 + k, dtype=torch.float64)
            opt.step()
        found.append((w.detach(), float(opt.state[w].get("step", 2 * STEPS))))

    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)  # scalars of NAdam and ASGD are in float32
