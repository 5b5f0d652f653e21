"""Transformations that are equal to earlier ones and do something else: nothing is remembered for the wrong one."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import functional_optim as fo
from functional_optim import adapters
from functional_optim.adapters import TransformOptimizer


class Chosen:
    """A function of the path whose instances are all equal."""

    def __init__(self, *paths: str) -> None:
        self.paths = paths

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chosen)

    def __hash__(self) -> int:
        return 0

    def __call__(self, path: str, p: Any) -> bool:
        return path in self.paths


class Rate(Chosen):
    """A schedule whose instances are all equal."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, count: Any) -> float:  # type: ignore[override]
        return self.value


def frozen(mask: Any) -> Any:
    return fo.chain(fo.masked(fo.set_to_zero(), mask), fo.sgd(1.0))


def labelled(labels: Any) -> Any:
    return fo.partition({"frozen": fo.set_to_zero(), "free": fo.sgd(1.0)}, labels)


def dict_that_changes() -> list[tuple[Any, Callable[[], None]]]:
    mask = {"a": True, "b": False}
    return [(frozen(mask), lambda: mask.update(a=False, b=True)), (lambda: frozen(mask), lambda: None)]


def labels_that_change() -> list[tuple[Any, Callable[[], None]]]:
    labels = {"a": "frozen", "b": "free"}
    return [(labelled(labels), lambda: labels.update(a="free", b="frozen")), (lambda: labelled(labels), lambda: None)]


def equal_masks() -> list[tuple[Any, Callable[[], None]]]:
    return [(frozen(Chosen("a")), lambda: None), (lambda: frozen(Chosen("b")), lambda: None)]


def a_closure() -> list[tuple[Any, Callable[[], None]]]:
    held = {"path": "a"}

    def mask(path: str, p: Any) -> bool:
        return path == held["path"]

    return [(frozen(mask), lambda: held.update(path="b")), (lambda: frozen(mask), lambda: None)]


CASES = {f.__name__: f for f in (dict_that_changes, labels_that_change, equal_masks, a_closure)}


def pure(tx: Any) -> tuple[float, float]:
    params = {"a": torch.ones(1), "b": torch.ones(1)}
    new, _ = fo.apply_gradients(tx, params, params, tx.init(params))
    return new["a"].item(), new["b"].item()


def donated(tx: Any) -> tuple[float, float]:
    params, grads = ({"a": torch.ones(1), "b": torch.ones(1)} for _ in range(2))
    fo.apply_gradients(tx, params, grads, tx.init(params), donate=True)
    return params["a"].item(), params["b"].item()


def optimizer(tx: Any) -> tuple[float, float]:
    params = {k: nn.Parameter(torch.ones(1)) for k in "ab"}
    for p in params.values():
        p.grad = torch.ones(1)
    TransformOptimizer(params.items(), tx).step()
    return params["a"].item(), params["b"].item()


@pytest.mark.parametrize("step", [pure, donated, optimizer])
@pytest.mark.parametrize("case", CASES)
def test_a_chain_that_is_made_anew_has_its_own_masks(case: str, step: Callable[[Any], Any]) -> None:
    (first, change), (second, _) = CASES[case]()
    assert step(first) == (1.0, 0.0)
    change()
    assert step(second()) == (0.0, 1.0)


@pytest.mark.parametrize("step", [pure, donated, optimizer])
def test_equal_schedules_are_each_evaluated(step: Callable[[Any], Any]) -> None:
    for value in (1.0, 0.5, 0.25, 1.0):
        assert step(fo.sgd(Rate(value))) == (1 - value, 1 - value)


def test_equal_factors_of_a_running_product_are_each_evaluated() -> None:
    schedules = [fo.cumulative_product_schedule(1.0, Rate(value)) for value in (0.5, 0.25)]
    assert [[float(schedule(step)) for step in range(3)] for schedule in schedules] == [
        [1, 0.5, 0.25],
        [1, 0.25, 1 / 16],
    ]


class Descent(Rate):
    """A function that makes a chain, whose instances are all equal."""

    def __call__(self, lr: float = 1.0) -> Any:  # type: ignore[override]
        return fo.chain(fo.scale(self.value), fo.sgd(lr))


class DescentWithoutHash(Descent):
    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Descent, DescentWithoutHash])
def test_equal_functions_that_make_chains_are_each_called(kind: Any) -> None:
    makers = [kind(1.0), kind(0.5)]  # held, so that neither is in the other's place
    for make in makers:
        w = nn.Parameter(torch.ones(1))
        w.grad = torch.ones(1)
        opt = TransformOptimizer.factory(make)([w], lr=0.5)
        copy.deepcopy(opt).step()
        opt.step()
        assert w.item() == 1 - 0.5 * make.value


# -- options of a step that was refused -------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[Callable[[Any], Any], str, Any]] = {
    "maximize": (lambda params: adapters.AdamW(params, lr=0.1), "maximize", True),
    "nesterov": (lambda params: adapters.SGD(params, lr=0.1, momentum=0.9), "nesterov", True),
    "amsgrad": (lambda params: adapters.AdamW(params, lr=0.1), "amsgrad", True),
    "a chain": (lambda params: TransformOptimizer(params, fo.adam(0.1)), "maximize", True),
}


def too_many_names(opt: Any) -> Callable[[], Any]:
    opt.param_groups[0]["param_names"].append("more")
    return opt.param_groups[0]["param_names"].pop


def a_gradient_of_another_shape(opt: Any) -> Callable[[], Any]:
    p = opt.param_groups[0]["params"][0]
    p.__dict__["kept"], p.grad = p.grad, None
    held = p.data
    p.data = torch.zeros(3)
    p.grad = torch.ones(3)
    p.data = held

    def mend() -> None:
        p.grad = p.__dict__.pop("kept")

    return mend


def a_rate_that_is_no_number(opt: Any) -> Callable[[], Any]:
    before = opt.param_groups[0]["lr"]
    opt.param_groups[0]["lr"] = float("nan")
    return lambda: opt.param_groups[0].update(lr=before)


@pytest.mark.parametrize("refuse", [too_many_names, a_gradient_of_another_shape, a_rate_that_is_no_number])
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_changes_before_a_refused_step_counts_in_the_next(option: str, refuse: Any) -> None:
    make, key, value = OPTIONS[option]
    runs = []
    for refused in (True, False):
        params = [("p", nn.Parameter(torch.ones(2))), ("q", nn.Parameter(torch.ones(2)))]
        opt = make(params)
        for step in range(4):
            for _, p in params:
                p.grad = torch.tensor([1.0, -2.0 - step])
            if step == 2:
                opt.param_groups[0][key] = value
                if refused:
                    mend = refuse(opt)
                    with pytest.raises((ValueError, TypeError, RuntimeError)):
                        opt.step()
                    mend()
            opt.step()
        runs.append([p.detach() for _, p in params])
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)
