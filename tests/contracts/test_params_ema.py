"""`params_ema` in a chain, and the averages that are read from its state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import functional_optim as fo
from _lib.chains import Halve, is_matrix
from _lib.compare import DOUBLE, assert_same_bits
from _lib.training import train, trajectory
from _lib.trees import clone, like, make_tree


STEPS = 20
DECAY = 0.75


def average_by_hand(steps: list[Any], first: Any, decays: list[float]) -> Any:
    """The average that starts at the first parameters and follows those after each step."""
    average = clone(first)
    for params, decay in zip(steps, decays, strict=True):
        average = {k: decay * x + (1 - decay) * params[k] for k, x in average.items()}
    return average


def averaged(inner: Any, decay: Any = DECAY) -> Any:
    return fo.chain(inner, fo.params_ema(decay))


class Average(NamedTuple):
    """A transformation that averages, and the leaves of which it does."""

    tx: Any
    leaves: tuple[str, ...] = ("weight", "bias", "scale")
    decay: Callable[[int], float] = lambda step: DECAY


EARLY: dict[str, Callable[[], Any]] = {
    "chain": lambda: fo.chain(fo.params_ema(0.9), fo.scale(-0.1)),
    "named_chain": lambda: fo.named_chain(("average", fo.params_ema(0.9)), ("rate", fo.scale(-0.1))),
    "not next to it": lambda: fo.chain(fo.sgd(0.1), fo.params_ema(0.9), fo.identity(), fo.adamw(0.1)),
    "a chain before": lambda: fo.chain(fo.chain(fo.sgd(0.1), fo.params_ema(0.9)), fo.scale(2.0)),
    "masked": lambda: fo.chain(fo.masked(fo.params_ema(0.9), is_matrix), fo.scale(2.0)),
    "before a partition": lambda: fo.chain(
        fo.params_ema(0.9), fo.partition({"a": fo.sgd(0.1), "b": fo.identity()}, {"x": "a", "y": "b"})
    ),
}
LATE: dict[str, Callable[[], Any]] = {
    "at the end": lambda: fo.chain(fo.sgd(0.1), fo.params_ema(0.9)),
    "before nothing": lambda: fo.chain(fo.sgd(0.1), fo.params_ema(0.9), fo.identity()),
    "two": lambda: fo.chain(fo.sgd(0.1), fo.params_ema(0.9), fo.params_ema(0.99)),
    "parts": lambda: fo.partition({"a": averaged(fo.sgd(0.1)), "b": fo.sgd(0.1)}, {"x": "a", "y": "b"}),
}


@pytest.mark.parametrize("name", EARLY)
def test_an_average_before_the_end_is_warned_of(name: str) -> None:
    with pytest.warns(UserWarning, match=r"params_ema stands before .*put it at the end of the chain") as seen:
        EARLY[name]()

    assert [x.filename for x in seen] == [__file__]


@pytest.mark.parametrize("name", LATE)
def test_an_average_at_the_end_is_not_warned_of(name: str) -> None:
    LATE[name]()  # warnings are errors


AVERAGES = {
    "chain": Average(averaged(fo.adam(1e-2))),
    "alone": Average(fo.params_ema(DECAY)),
    "named_chain": Average(fo.named_chain(("step", fo.sgd(0.1)), ("average", fo.params_ema(DECAY)))),
    "masked": Average(fo.chain(fo.adam(1e-2), fo.masked(fo.params_ema(DECAY), is_matrix)), ("weight",)),
    "behind an opaque one": Average(fo.chain(fo.adam(1e-2), Halve(), fo.params_ema(DECAY))),
    "before an opaque identity": Average(fo.chain(fo.adam(1e-2), fo.params_ema(DECAY), fo.stateless(lambda u, p: u))),
    "partition": Average(
        fo.partition(
            {"a": averaged(fo.adam(1e-2)), "b": averaged(fo.sgd(0.1))}, {"weight": "a", "bias": "b", "scale": "a"}
        )
    ),
    "one label": Average(
        fo.partition({"a": averaged(fo.adam(1e-2)), "b": fo.sgd(0.1)}, {"weight": "a", "bias": "b", "scale": "a"}),
        ("weight", "scale"),
    ),
    "warm-up": Average(
        averaged(fo.adam(1e-2), lambda count: 1 - 1 / (2.0 + count)), decay=lambda step: 1 - 1 / (2.0 + step)
    ),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", AVERAGES)
def test_averages_of_parameters(name: str, donate: bool) -> None:
    tx, averaged_leaves, decay = AVERAGES[name]
    first = make_tree(0)
    grads = [like(first, seed) for seed in range(1, STEPS + 1)]
    steps = trajectory(tx, first, grads)
    expected = average_by_hand(steps, first, [decay(step) for step in range(STEPS)])

    params, state = train(tx, clone(first), grads, donate=donate)
    average = fo.eval_params(state, params)

    last = steps[-1]
    torch.testing.assert_close(average, {k: (expected if k in averaged_leaves else last)[k] for k in last}, **DOUBLE)


def test_an_average_starts_at_the_parameters() -> None:
    params = make_tree(0)

    average = fo.eval_params(averaged(fo.adam(1e-2)).init(params), params)

    assert_same_bits(average, params)
    assert not {x.data_ptr() for x in average.values()} & {x.data_ptr() for x in params.values()}


def test_an_average_in_float32_is_read_in_the_dtype_of_the_parameters() -> None:
    params = make_tree(0, torch.bfloat16)
    tx = fo.params_ema(0.999, accumulator_dtype=torch.float32)

    new, state = fo.apply_gradients(tx, params, {k: torch.ones_like(p) for k, p in params.items()}, tx.init(params))

    # 1 - 0.999 of the way is far below the spacing of bfloat16, and is kept
    expected = {k: p + 0.001 * (p.float() + 1 - p.float()) for k, p in params.items()}
    torch.testing.assert_close(state.ema, expected, rtol=2**-22, atol=2**-22)
    assert {x.dtype for x in fo.eval_params(state, new).values()} == {torch.bfloat16}


def test_an_average_of_parameters_that_require_gradients() -> None:
    params = {"w": torch.nn.Parameter(torch.ones(2))}

    average = fo.eval_params(fo.params_ema(0.9).init(params), params)

    assert not average["w"].requires_grad


def test_eval_params_refuses_a_state_without_average() -> None:
    params = make_tree(0)

    with pytest.raises(ValueError, match="no average of parameters"):
        fo.eval_params(fo.adam(1e-2).init(params), params)


def test_eval_params_refuses_two_averages_of_one_parameter() -> None:
    params = make_tree(0)
    tx = fo.chain(fo.params_ema(0.9), fo.params_ema(0.99))

    with pytest.raises(ValueError, match="two averages of one parameter"):
        fo.eval_params(tx.init(params), params)
