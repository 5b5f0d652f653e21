"""Functions of the step as schedules: which may be traced, and changes that must not go unseen."""

import functools
import math
import random
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import functional_optim as fo
from _lib.records import BACKENDS, use
from _lib.schedules import called, in_kernel
from functional_optim._schedules.traced import traced_key


RATE = 0.5
TABLE = [0.5, 0.25, 2.0, 1.0]
LINE = fo.linear_schedule(1.0, 0.0, 9)


def decay(count: Any) -> Any:
    return RATE * 0.5**count


def calls_another(count: Any) -> Any:
    return decay(count) + 1


def recursive(count: Any, depth: int = 3) -> Any:
    return count if depth == 0 else 0.5 * recursive(count, depth - 1)


def even(count: Any, depth: int = 2) -> Any:
    return count if depth == 0 else odd(count, depth - 1)


def odd(count: Any, depth: int = 1) -> Any:
    return even(count, depth - 1)


def in_a_closure(rate: Any) -> Callable[[Any], Any]:
    return lambda count: rate * (1 + count) ** -0.5


def with_a_default(rate: Any) -> Callable[[Any], Any]:
    def schedule(count: Any, rate: Any = rate) -> Any:
        return rate * (1 + count)

    return schedule


def with_a_keyword(rate: Any) -> Callable[[Any], Any]:
    def schedule(count: Any, *, rate: Any = rate) -> Any:
        return rate * (1 + count)

    return schedule


def with_an_attribute(rate: Any) -> Callable[[Any], Any]:
    def schedule(count: Any) -> Any:
        return schedule.rate * (1 + count)  # type: ignore[attr-defined]

    schedule.rate = rate  # type: ignore[attr-defined]
    return schedule


def in_a_module(rate: Any) -> Callable[[Any], Any]:
    settings: Any = types.ModuleType("settings")
    settings.lr = rate
    return lambda count: settings.lr * (1 + count)


def in_a_module_of_a_module(rate: Any) -> Callable[[Any], Any]:
    settings: Any = types.ModuleType("settings")
    settings.training = types.ModuleType("settings.training")
    settings.training.lr = rate
    return lambda count: settings.training.lr * (1 + count)


def in_a_function_inside(rate: Any) -> Callable[[Any], Any]:
    return lambda count: (lambda x: rate * x)(1 + count)


def in_a_comprehension(rate: Any) -> Callable[[Any], Any]:
    return lambda count: sum([rate * (k + count) for k in range(3)])


def through_another(rate: Any) -> Callable[[Any], Any]:
    inner = in_a_closure(rate)
    return lambda count: inner(count) + 1


def through_a_schedule(rate: Any) -> Callable[[Any], Any]:
    inner = fo.constant_schedule(rate)
    return lambda count: inner(count) + count


def partial(rate: Any) -> Callable[[Any], Any]:
    return functools.partial(lambda rate, count: rate * count, rate)


def partial_keyword(rate: Any) -> Callable[[Any], Any]:
    return functools.partial(lambda count, rate: rate * count, rate=rate)


def joined(rate: Any) -> Callable[[Any], Any]:
    return fo.join_schedules([in_a_closure(rate), in_a_module(rate)], [5])


def multiplied(rate: Any) -> Callable[[Any], Any]:
    return LINE * in_a_closure(rate)


def own_family(rate: Any) -> Callable[[Any], Any]:
    @fo.schedule()
    def family(count: Any) -> Any:
        return rate * count

    return family()


# ---- functions with a key

MAKERS = [
    in_a_closure, with_a_default, with_a_keyword, with_an_attribute, in_a_module, in_a_module_of_a_module,
    in_a_function_inside, in_a_comprehension, through_another, through_a_schedule, partial, partial_keyword, joined,
    multiplied, own_family, fo.constant_schedule, lambda rate: fo.piecewise_constant_schedule(1.0, {3: rate}),
]  # fmt: skip
makers = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)

TRACEABLE: dict[str, Callable[[Any], Any]] = {
    "a global": decay,
    "another function": calls_another,
    "recursion": recursive,
    "recursion of two": even,
    "a schedule": lambda count: LINE(count) * 2,
    "a family of schedules": lambda count: fo.cosine_decay_schedule(1.0, 9)(count) * 2,
    "a function of math": lambda count: math.cos(0.5) * count + math.pi,
    "operations of torch": lambda count: torch.where(count < 5, torch.cos(count), torch.exp(-count)),
    "a dtype": lambda count: count.to(torch.float32) * 2,
    "an exception that is not raised": lambda count: decay(count) if RATE else [][ValueError],  # type: ignore[index]
    "builtins": lambda count: sum([abs(-1.0), max(1.0, 2.0), float(len("abc"))]) * count,
    **{make.__name__: make(0.5) for make in MAKERS},
}


@pytest.mark.parametrize("name", TRACEABLE)
def test_a_function_with_a_key_has_the_same_one_again(name: str) -> None:
    key = traced_key(TRACEABLE[name])
    assert key is not None
    assert traced_key(TRACEABLE[name]) == key
    assert hash(traced_key(TRACEABLE[name])) == hash(key)


@makers
@pytest.mark.parametrize(("old", "new"), [(0.5, 0.25), (1, 1.0), (0.0, -0.0), (1e300, 1e301)], ids=str)
def test_another_number_makes_another_key(make: Callable[[Any], Any], old: Any, new: Any) -> None:
    assert traced_key(make(old)) is not None
    assert traced_key(make(old)) != traced_key(make(new))


def test_a_number_that_is_not_one_has_a_lasting_key() -> None:
    schedule = in_a_closure(math.nan)
    assert traced_key(schedule) == traced_key(schedule)


def test_changes_of_whatever_a_function_refers_to_change_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = 0.5

    def closure(count: Any) -> Any:
        return rate * count

    settings: Any = types.ModuleType("settings")
    settings.rate = 0.5
    attribute, default, keyword = with_an_attribute(0.5), with_a_default(0.5), with_a_keyword(0.5)
    functions = {
        "global": decay,
        "global of another": calls_another,
        "closure": closure,
        "module": lambda count: settings.rate * count,
        "attribute": attribute,
        "default": default,
        "keyword": keyword,
        "a helper that is replaced": lambda count: in_a_closure(1.0)(count),
        "code": through_another(1.0),
    }
    before = {name: traced_key(fn) for name, fn in functions.items()}
    assert None not in before.values()

    monkeypatch.setattr(sys.modules[__name__], "RATE", 0.25)
    rate = 0.25
    settings.rate = 0.25
    attribute.rate = 0.25  # type: ignore[attr-defined]
    default.__defaults__ = (0.25,)  # type: ignore[attr-defined]
    keyword.__kwdefaults__["rate"] = 0.25  # type: ignore[attr-defined]
    monkeypatch.setattr(sys.modules[__name__], "in_a_closure", with_a_default)
    functions["code"].__code__ = functions["closure"].__code__.replace()  # type: ignore[attr-defined]

    assert [name for name, fn in functions.items() if traced_key(fn) == before[name]] == []


def test_a_key_outlives_what_it_was_made_from() -> None:
    """An object that takes the address of one that is gone does not take its place."""
    keys = [traced_key(fo.constant_schedule(torch.tensor(0.5))) for _ in range(50)]
    assert len(set(keys)) == 50


# ---- functions without one


class Rated:
    rate = 0.5

    def __call__(self, count: Any) -> Any:
        return self.rate * count

    def method(self, count: Any) -> Any:
        return self.rate * count


CALLS = 0


def counts_its_calls(count: Any) -> Any:
    global CALLS
    CALLS += 1
    return CALLS * count


def nonlocal_counter() -> Callable[[Any], Any]:
    calls = 0

    def schedule(count: Any) -> Any:
        nonlocal calls
        calls += 1
        return calls * count

    return schedule


def writes_an_attribute(count: Any) -> Any:
    writes_an_attribute.calls = 1  # type: ignore[attr-defined]
    return count


def imports(count: Any) -> Any:
    import os

    return count * len(os.environ)


def catches(count: Any) -> Any:
    try:
        return float(TABLE[int(count)])
    except TypeError:
        return count


def uses_a_module_as_a_value(count: Any) -> Any:
    return vars(sys.modules[__name__])["RATE"] * count


def makes_a_class(count: Any) -> Any:
    class Rate:
        value = RATE

    return Rate.value * count


THING, TENSOR, NAMES = Rated(), torch.tensor(0.5), {"rate": 0.5}

UNTRACEABLE: dict[str, Callable[[Any], Any]] = {
    "a list": lambda count: TABLE[0] * count,
    "a dict": lambda count: NAMES["rate"] * count,
    "a list in a closure": in_a_closure([0.5]),
    "a list as a default": with_a_default([0.5]),
    "a tensor": lambda count: TENSOR * count,
    "a tensor in a closure": in_a_closure(TENSOR),
    "a tensor in a schedule of a closure": through_a_schedule(TENSOR),
    "an object": lambda count: THING.rate * count,
    "a class": lambda count: Rated.rate * count,
    "a callable object": THING,
    "a bound method": THING.method,
    "a builtin": math.cos,
    "a function that another without a key calls": through_another([0.5]),
    "a global counter": counts_its_calls,
    "a nonlocal counter": nonlocal_counter(),
    "a written attribute": writes_an_attribute,
    "an import": imports,
    "a handler": catches,
    "a module as a value": uses_a_module_as_a_value,
    "a class inside": makes_a_class,
    "random numbers": lambda count: random.random() * count,
    "random numbers of torch": lambda count: torch.rand(()).item() * count,
    "a tensor that is made": lambda count: torch.tensor(RATE) * count,
    "variables by name": lambda count: globals()["RATE"] * count,
    "attributes by name": lambda count: getattr(math, "pi") * count,  # noqa: B009
    "hidden attributes": lambda count: decay.__globals__["RATE"] * count,
    "NumPy": lambda count: np.cos(count),
    "a cached function": functools.lru_cache(decay),
    "a name that is not defined": lambda count: no_such_name * count,  # type: ignore[name-defined]  # noqa: F821
    "an attribute that is not there": lambda count: math.no_such_name * count,  # type: ignore[attr-defined]
    "a partial of an object": functools.partial(THING.method),
    "a list in a partial": functools.partial(lambda rates, count: rates[0] * count, [0.5]),
    "a schedule with such a member": fo.join_schedules([lambda count: TABLE[0] * count, LINE], [5]),
    "a product with such a factor": LINE * (lambda count: TABLE[0] * count),
    "a running product of such factors": fo.cumulative_product_schedule(1.0, lambda count: TABLE[0]),
    "a family with such a formula": fo.schedule()(lambda count: TABLE[0] * count)(),
    "a number": 0.5,  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_a_function_that_may_change_unseen_has_no_key(name: str) -> None:
    assert traced_key(UNTRACEABLE[name]) is None


# ---- in chains


class Rates:
    """Names that the functions below refer to, and changes of them."""

    def __init__(self) -> None:
        self.rate = 0.5


def changing() -> dict[str, tuple[Callable[[Any], Any], Callable[[float], None]]]:
    """For each name, a function and what changes the rate that it refers to."""
    listed, named, thing = [0.5], {"rate": 0.5}, Rates()
    tensor, other = (torch.tensor(x, dtype=torch.float64) for x in (0.5, 2.0))
    one = types.SimpleNamespace(rate=0.5)
    return {
        "list": (lambda count: listed[0] * count, lambda x: listed.__setitem__(0, x)),
        "dict": (lambda count: named["rate"] * count, lambda x: named.update(rate=x)),
        "object": (lambda count: thing.rate * count, lambda x: setattr(thing, "rate", x)),
        "namespace": (lambda count: one.rate * count, lambda x: setattr(one, "rate", x)),
        "tensor": (lambda count: 2 * tensor / 2 * count, lambda x: tensor.fill_(x) and None),
        "tensor in a schedule": (fo.linear_schedule(0.0, tensor, 1), lambda x: tensor.fill_(x) and None),
        "two tensors in a schedule": (fo.linear_schedule(tensor, other, 4), lambda x: tensor.fill_(x) and None),
        "two tensors in another": (
            fo.cosine_onecycle_schedule(8, tensor, div_factor=other),
            lambda x: tensor.fill_(x) and None,
        ),
        "tensor in a joined schedule": (
            fo.join_schedules([fo.constant_schedule(tensor), fo.linear_schedule(0.0, tensor, 1)], [1]),
            lambda x: tensor.fill_(x) and None,
        ),
        "tensor in a product": (fo.linear_schedule(0.0, 1.0, 1) * tensor, lambda x: tensor.fill_(x) and None),
        "factor of a product": (LINE * (lambda count: listed[0] * count), lambda x: listed.__setitem__(0, x)),
        "tensor in a mapping": (
            fo.piecewise_constant_schedule(tensor, {1: tensor}),
            lambda x: tensor.fill_(x) and None,
        ),
        "member of a joined schedule": (
            fo.join_schedules([LINE, lambda count: listed[0] * count], [1]),
            lambda x: listed.__setitem__(0, x),
        ),
        "formula of a family": (
            fo.schedule()(lambda count: thing.rate * count)(),
            lambda x: setattr(thing, "rate", x),
        ),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", changing())
def test_a_change_of_what_a_schedule_refers_to_is_seen_at_the_next_step(name: str, backend: str) -> None:
    schedule, change = changing()[name]
    tx = fo.scale_by_schedule(schedule)
    update = torch.ones(1, dtype=torch.float64)
    state = tx.init(update)
    for step, rate in enumerate((0.5, 0.25, 4.0, 1.0)):
        change(rate)
        with use(backend):
            actual, state = tx.update(update, state)
        torch.testing.assert_close(actual, called(schedule, [step]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TRACEABLE)
def test_a_traced_function_has_the_values_that_it_has_when_called(name: str, backend: str) -> None:
    at = (0, 3, 7)
    schedule = TRACEABLE[name]
    needs_tensor = name in ("operations of torch", "a dtype")
    expected = [float(schedule(torch.tensor(float(t), dtype=torch.float64) if needs_tensor else t)) for t in at]
    actual = in_kernel(fo.scale_by_schedule(schedule), at, backend)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=2.0**-50)


def test_explain_says_which_functions_python_computes() -> None:
    def note(schedule: Any) -> bool:
        return any("cannot be traced" in x for x in fo.explain(fo.scale_by_schedule(schedule), torch.zeros(1)).notes)

    assert not note(decay)
    assert note(lambda count: TABLE[0] * count)


def test_the_derivative_with_respect_to_a_tensor_in_a_schedule() -> None:
    rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    tx = fo.sgd(fo.linear_schedule(rate, 0.0, 4))
    params = torch.ones(1, dtype=torch.float64)
    state = tx.init(params)
    for _ in range(3):
        params, state = fo.apply_gradients(tx, params, torch.ones_like(params), state)
    (derivative,) = torch.autograd.grad(params.sum(), rate)
    assert derivative == -(1 + 0.75 + 0.5)
