"""Steps of ensembles: kernels compute them, bound once."""

import re
from typing import Any

import pytest
import torch

import functional_optim as fo
from functional_optim._compiler.c.build import find_compiler
from functional_optim._runtime.backend import KERNEL_BACKENDS
from functional_optim._runtime.internals import map_levels
from functional_optim._runtime.members import MembersStep
from functional_optim._runtime.stacks import Stack
from functional_optim._stand_ins import stand_in_of


COMPILER = pytest.mark.skipif(find_compiler() is None, reason="there is no C compiler")


def bound(tx: Any) -> list[MembersStep]:
    """The steps of ensembles that a chain of rules is bound to."""
    return [step for trees in tx._tree_steps for segment in trees.segments for _, step in segment.members_steps]


@COMPILER
def test_kernels_are_bound_once() -> None:
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adam(1e-2))
    step = torch.vmap(lambda p, s: fo.apply_gradients(tx, p, p, s))
    params = {"w": torch.ones(3, 4), "b": torch.ones(3, 2)}
    state = torch.vmap(tx.init)(params)
    params, state = step(params, state)  # members that begin share a counter
    params, state = step(params, state)
    first, *_ = before = bound(tx)
    for _ in range(3):
        params, state = step(params, state)

    assert bound(tx) == before
    assert first.ensemble.n == 3
    assert len(first.parts) == 3  # each member has a norm of its own
    assert len(first.workspaces) == 1


@COMPILER
def test_leaves_of_all_members_are_one_launch_where_nothing_spans_the_tree() -> None:
    tx = fo.adam(1e-2)
    params = {"w": torch.ones(3, 4), "b": torch.ones(3, 2)}
    torch.vmap(lambda p: fo.apply_gradients(tx, p, p, tx.init(p)))(params)
    (step,) = bound(tx)

    assert len(step.parts) == 1
    assert step.parts[0][0].table.sizes == (4, 2) * 3 or step.parts[0][0].table.sizes == (2, 4) * 3


@pytest.mark.parametrize("backend", ["reference", "c", "triton"])
def test_a_backend_that_is_asked_for(backend: str) -> None:
    tx = fo.adam(1e-2)
    params = torch.ones(3, 4)
    with fo.use_backend(backend):
        new, _ = torch.vmap(lambda p: fo.apply_gradients(tx, p, p, tx.init(p)))(params)

    assert len(bound(tx)) == (backend in KERNEL_BACKENDS)
    torch.testing.assert_close(new, params - 1e-2)


@COMPILER
def test_backends_that_are_asked_for_in_turns() -> None:
    """Each has a step of its own, which goes on where it is asked for again."""
    tx, params = fo.adam(1e-2), torch.ones(3, 4)
    step = torch.vmap(lambda p: fo.apply_gradients(tx, p, p, tx.init(p)))
    steps = []
    for backend in ("c", "triton", "reference", "triton", "c"):
        with fo.use_backend(backend):
            step(params)
        steps.append((backend, bound(tx)[0].launch is not None, len(bound(tx))))

    assert steps == [("c", False, 1), ("triton", True, 2), ("reference", True, 2), ("triton", True, 2), ("c", False, 2)]


@COMPILER
def test_chains_that_members_make_are_bound_to_one_of_their_form() -> None:
    homes: list[Any] = []

    def step(rate: torch.Tensor, p: torch.Tensor) -> Any:
        tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(rate, mask=_mask))
        homes.append(stand_in_of(tx)[0])
        return fo.apply_gradients(tx, p, p, tx.init(p))

    for _ in range(3):
        torch.vmap(step)(torch.rand(2), torch.ones(2, 3))

    assert len(set(map(id, homes))) == 1
    assert len(bound(homes[0])) == 1


def _mask(path: str, p: torch.Tensor) -> bool:
    return True


# Pairs of chains of one learning rate that differ, each in something else.
OTHERS: dict[str, Any] = {
    "a number": (lambda x: fo.adam(x, b1=0.9), lambda x: fo.adam(x, b1=0.8)),
    "the sign of zero": (lambda x: fo.sgd(x, 0.0), lambda x: fo.sgd(x, -0.0)),
    "a switch": (lambda x: fo.sgd(x, 0.9), lambda x: fo.sgd(x, 0.9, nesterov=True)),
    "a rule": (lambda x: fo.adam(x), lambda x: fo.adamax(x)),
    "a mask": (lambda x: fo.masked(fo.sgd(x), {"a": True}), lambda x: fo.masked(fo.sgd(x), {"a": False})),
    "a pattern": (
        lambda x: fo.masked(fo.sgd(x), re.compile("a")),
        lambda x: fo.masked(fo.sgd(x), re.compile("A", re.I)),
    ),
    "a function": (
        lambda x: fo.masked(fo.sgd(x), lambda path, p: True),
        lambda x: fo.masked(fo.sgd(x), lambda path, p: False),
    ),
    "labels": (
        lambda x: fo.partition({0: fo.sgd(x), 1: fo.adam(x)}, 0),
        lambda x: fo.partition({0: fo.sgd(x), 1: fo.adam(x)}, 1),
    ),
    "a schedule": (
        lambda x: fo.sgd(fo.cosine_decay_schedule(x, 10)),
        lambda x: fo.sgd(fo.cosine_decay_schedule(x, 20)),
    ),
    "the tensor of a number": (lambda x: fo.adam(x, b1=0.9 + 0 * x, b2=x), lambda x: fo.adam(x, b1=x, b2=0.9 + 0 * x)),
    "a tensor in two places": (lambda x: fo.adam(x, b1=x, b2=1 * x), lambda x: fo.adam(x, b1=x, b2=x)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_stand_ins_of_other_chains(name: str) -> None:
    first, second = OTHERS[name]
    found: list[bool] = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        a, again, b = (stand_in_of(make(x))[0] for make in (first, first, second))
        found.extend([a is again, a is b])
        return x

    torch.vmap(ask)(torch.rand(2))
    # two ways of giving the same tensors have one key
    assert found == [name != "a function", False] or name == "the tensor of a number", found


def test_a_chain_with_tensors_of_its_own_is_its_own_stand_in() -> None:
    tx = fo.sgd(torch.tensor(0.1))
    found: list[Any] = []
    torch.vmap(lambda x: (found.append(stand_in_of(tx)), x)[1])(torch.rand(2))
    assert found == [(tx, {})]


def test_stacks_of_nested_calls() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    found: list[Stack] = []

    def keep(y: torch.Tensor) -> torch.Tensor:
        found.append(Stack.of(y, map_levels()))
        return y

    torch.vmap(torch.vmap(keep, in_dims=0), in_dims=1)(x)  # 3 outer members, 2 inner ones
    torch.vmap(lambda y: torch.vmap(lambda z: (keep(y), z)[1])(torch.zeros(5)), in_dims=2)(x)
    torch.vmap(lambda y: torch.vmap(keep, in_dims=1)(x), in_dims=0)(torch.zeros(5))

    assert [stack.stacked for stack in found] == [(True, True), (True, False), (False, True)]
    assert torch.equal(found[0].tensor, x.permute(1, 0, 2))
    assert torch.equal(found[1].tensor, x.permute(2, 0, 1))
    assert torch.equal(found[2].tensor, x.permute(1, 0, 2))
