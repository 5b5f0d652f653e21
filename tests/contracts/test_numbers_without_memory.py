"""Hyper-parameters, extra arguments and counters that are tensors whose storage has been freed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

import functional_optim as fo
from _lib.compare import Snapshot
from _lib.marks import INTERPRETER
from functional_optim import adapters
from functional_optim._runtime.backend import BACKENDS
from functional_optim.adapters import TransformOptimizer


pytestmark = INTERPRETER
N = 4
SHAPES = {"weight": (4, 3), "bias": (3,)}
STORAGE = "its storage has been freed or cut"


def params_and_grads(*outer: int) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    made = [{k: torch.randn(*outer, *shape, generator=generator) for k, shape in SHAPES.items()} for _ in range(2)]
    return made[0], made[1]


@fo.elementwise(extra=("value",))
def times(u: Any, *, value: Any, factor: Any) -> Any:
    return factor * value * u


@fo.leafwise
def times_whole(u: Any, *, factor: Any) -> Any:
    return factor * u


class Trees:
    """Trees that steps of the pure API are taken over, with a number that may lose its memory."""

    def __init__(self, *outer: int) -> None:
        self.params, self.grads = params_and_grads(*outer)
        self.number = torch.full(outer, 0.1, dtype=torch.float64)

    def take(self, make: Callable[[Any], Any], **extra: Any) -> None:
        tx = make(self.number)
        fo.apply_gradients(tx, self.params, self.grads, tx.init(self.params), **extra)


class Plain(Trees):
    """A chain that has the number."""

    NAME = "the hyper-parameter scale_by_learning_rate.learning_rate"

    def __init__(self) -> None:
        super().__init__()
        self.tx = fo.chain(fo.clip_by_global_norm(1.0), fo.sgd(self.number))

    def step(self) -> None:
        fo.apply_gradients(self.tx, self.params, self.grads, self.tx.init(self.params))


class OneForEachStep(Trees):
    """A chain that is made at each step."""

    NAME = Plain.NAME

    def step(self) -> None:
        self.take(lambda x: fo.chain(fo.clip_by_global_norm(1.0), fo.sgd(x)))


class Whole(Trees):
    """A rule for whole tensors."""

    NAME = "the hyper-parameter times_whole.factor"

    def step(self) -> None:
        self.take(lambda x: times_whole(factor=x))


class Extra(Trees):
    """An extra argument."""

    NAME = "the extra argument `value`"

    def step(self) -> None:
        self.take(lambda x: times(factor=2.0), value=self.number)


class InFunction(Trees):
    """A step within a function that `grad` differentiates."""

    NAME = Plain.NAME

    def step(self) -> None:
        tx = fo.sgd(self.number)

        def loss(params: Any) -> Any:
            after, _ = fo.apply_gradients(tx, params, self.grads, tx.init(params))
            return after["weight"].sum()

        grad(loss)(self.params)


class Mapped(Trees):
    """A number for each member."""

    NAME = Plain.NAME

    def __init__(self) -> None:
        super().__init__(N)

    def step(self) -> None:
        vmap(lambda rate, p, g: fo.apply_gradients(fo.sgd(rate), p, g, fo.sgd(rate).init(p)))(
            self.number, self.params, self.grads
        )


class MappedOne(Mapped):
    """One number for all members, clipped each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.number = torch.tensor(0.1)

    def step(self) -> None:
        tx = fo.chain(fo.clip_by_global_norm(1.0), fo.sgd(self.number))
        vmap(lambda p, g: fo.apply_gradients(tx, p, g, tx.init(p)))(self.params, self.grads)


class ByPython(Trees):
    """A number that a schedule returns, which Python evaluates."""

    NAME = "the schedule of scale_by_learning_rate.learning_rate returned"

    def step(self) -> None:
        self.take(lambda x: fo.sgd(lambda count: x + 0 if count < 0 else x))


class AtTheStart(Trees):
    """A number that entries of state start from."""

    NAME = "the hyper-parameter scale_by_rprop.learning_rate"

    def step(self) -> None:
        self.take(lambda x: fo.rprop(x))


class InOptimizer:
    """An option of a group."""

    NAME = "parameter group 1: the option 'lr'"

    def __init__(self) -> None:
        tree, grads = params_and_grads()
        self.params = {name: nn.Parameter(p) for name, p in tree.items()}
        self.grads, self.number = grads, torch.tensor(0.1)
        groups = [{"params": [p]} for p in self.params.values()]
        self.opt = TransformOptimizer(groups, fo.sgd(0.1, momentum=0.9))
        self.opt.param_groups[1]["lr"] = self.number

    def step(self) -> None:
        for name, p in self.params.items():
            p.grad = self.grads[name].clone()
        self.opt.step()


class OfTorch(InOptimizer):
    """An option of a class of torch: a switch of its chain, or the start of a state."""

    NAME = "`weight_decay`|the option 'weight_decay'"
    CLASS, OPTION, VALUE = "AdamW", "weight_decay", torch.tensor(0.1)

    def __init__(self) -> None:
        super().__init__()
        self.number = self.VALUE.clone()
        self.opt = getattr(adapters, self.CLASS)([{"params": [p]} for p in self.params.values()], lr=0.1)
        self.opt.param_groups[1][self.OPTION] = self.number


class Momentum(OfTorch):
    NAME, CLASS, OPTION = "`momentum`|the option 'momentum'", "SGD", "momentum"


class StartOfRprop(OfTorch):
    NAME, CLASS, OPTION = InOptimizer.NAME, "Rprop", "lr"


class PairOfNumbers(OfTorch):
    NAME, CLASS, OPTION, VALUE = (
        r"parameter group 1: the option 'betas(\[0\])?'",
        "Adam",
        "betas",
        torch.tensor([0.9, 0.99]),
    )


WAYS = [Plain, OneForEachStep, Whole, Extra, InFunction, Mapped, MappedOne, ByPython, AtTheStart]
WAYS += [InOptimizer, OfTorch, Momentum, StartOfRprop, PairOfNumbers]


def free(x: torch.Tensor) -> None:
    x.untyped_storage().resize_(0)


FOLLOWED = (InFunction, Mapped)  # which "foreach" cannot serve


@pytest.mark.parametrize("steps", [0, 1], ids=["at the first step", "later"])
@pytest.mark.parametrize(
    ("way", "backend"),
    [(way, backend) for way in WAYS for backend in BACKENDS if backend != "foreach" or not issubclass(way, FOLLOWED)],
)
def test_a_number_that_was_freed_is_refused(way: Any, backend: str, steps: int) -> None:
    """Python ends if torch operations read it."""
    case = way()
    with fo.use_backend(backend):
        for _ in range(steps):
            case.step()
        before = Snapshot(case.params if isinstance(case, InOptimizer) else ())  # a pure step writes nothing
        free(case.number)
        with pytest.raises(ValueError, match=f"({case.NAME}) (is |is in )?a tensor that holds no number: {STORAGE}"):
            case.step()
    before.check()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_counter_that_was_freed_is_refused(dtype: torch.dtype) -> None:
    tx, trees = fo.adam(0.1), Trees()
    adam, *rest = tx.init(trees.params)
    state = (adam._replace(count=adam.count.to(dtype)), *rest)
    free(state[0].count)
    with pytest.raises(ValueError, match=rf"scale_by_adam\.count.* {STORAGE}"):
        fo.apply_gradients(tx, trees.params, trees.grads, state)


def test_a_third_number_is_named_without_being_read() -> None:
    opt = adapters.Adam([nn.Parameter(torch.ones(2))])
    betas = torch.tensor(0.9), torch.tensor(0.99), torch.tensor(0.5)
    opt.param_groups[0]["betas"] = betas
    opt.param_groups[0]["params"][0].grad = torch.ones(2)
    for x in betas:
        free(x)
    with pytest.raises(ValueError, match="'betas' of parameter group 0 holds 3 numbers, expected two numbers"):
        opt.step()


def test_a_number_that_has_its_memory_again_is_read() -> None:
    case = Plain()
    before, _ = fo.apply_gradients(case.tx, case.params, case.grads, case.tx.init(case.params))
    free(case.number)
    with pytest.raises(ValueError, match=STORAGE):
        case.step()
    case.number.untyped_storage().resize_(case.number.nbytes)
    case.number.fill_(0.2)
    after, _ = fo.apply_gradients(case.tx, case.params, case.grads, case.tx.init(case.params))
    for k, p in case.params.items():
        torch.testing.assert_close(after[k] - p, 2 * (before[k] - p), rtol=1e-5, atol=1e-6)
