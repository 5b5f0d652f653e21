"""Rules that cannot become kernels, and declarations that are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.compare import Snapshot
from _lib.trees import like, make_tree


@fo.elementwise
def branches(u: torch.Tensor, *, limit: Any = 1.0) -> torch.Tensor:
    if u > limit:
        return u
    return -u


@fo.elementwise
def branches_on_a_number(u: torch.Tensor, *, limit: Any = 1.0) -> torch.Tensor:
    return u if limit > 0.5 else -u


@fo.elementwise
def takes_a_number_out(u: torch.Tensor, *, rate: Any = 1.0) -> torch.Tensor:
    return u * float(rate)


@fo.elementwise
def loops(u: torch.Tensor) -> torch.Tensor:
    return sum(u)  # type: ignore[call-overload,no-any-return]


@fo.elementwise
def sorts(u: torch.Tensor) -> torch.Tensor:
    return torch.sort(u).values


@fo.elementwise
def looks_at_the_shape(u: torch.Tensor) -> torch.Tensor:
    return u / u.shape[0]


@fo.elementwise
def multiplies_matrices(u: torch.Tensor) -> torch.Tensor:
    return u @ u


@fo.elementwise(state={"m": fo.zeros})
def forgets_its_state(u: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return u + m


@fo.elementwise
def returns_too_much(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return u, u


@fo.elementwise
def returns_nothing(u: torch.Tensor) -> None:
    u * 2


@fo.elementwise(state={"n": fo.slot(0.0, per="leaf")})
def stores_elements_in_a_number(u: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return u, n + u


CONSTANT = torch.ones(3)


@fo.elementwise
def captures_a_tensor(u: torch.Tensor) -> torch.Tensor:
    return u * CONSTANT


# The line that the message quotes, or else what it says; every message names the rule.
RULES: dict[str, tuple[Any, str]] = {
    "a branch on an element": (
        branches(),
        r"`branches` \(.*test_bad_rules\.py:\d+: `if u > limit:`\) branches on a traced value",
    ),
    "a branch on a hyper-parameter": (branches_on_a_number(), r"`branches_on_a_number` .*`return u if limit.*static"),
    "a number taken out": (takes_a_number_out(), r"`takes_a_number_out` .*float\(rate\).* takes the number"),
    "a loop over elements": (loops(), r"`loops` .*iterates over a traced value"),
    "an operation without a row": (sorts(), r"`sorts` .*uses `sort`, which has no row in the operation table"),
    "a shape": (looks_at_the_shape(), r"`looks_at_the_shape` .*reads `\.shape` of a traced value"),
    "a product of matrices": (multiplies_matrices(), r"`?multiplies_matrices`?.*matmul"),
    "too few results": (forgets_its_state(), r"forgets_its_state .*returned 1 results, expected 2: \(u, m\)"),
    "too many results": (returns_too_much(), r"returns_too_much .*returned 2 results, expected 1"),
    "no result": (returns_nothing(), r"returns_nothing .*returned NoneType for `u`"),
    "elements in a number per leaf": (
        stores_elements_in_a_number(),
        r"stores_elements_in_a_number .*`n` differs per element",
    ),
    "a tensor from outside": (
        captures_a_tensor(),
        r"`captures_a_tensor` .*uses a tensor of shape \(3,\).*not an argument",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_that_cannot_become_kernels(name: str) -> None:
    rule, message = RULES[name]
    tx, params = fo.chain(fo.trace(0.9), rule), make_tree(0)
    grads, state = like(params, 1), tx.init(params)
    before = Snapshot(params, grads, state)

    for donate in (False, True):
        with pytest.raises(fo.RuleError, match=message):
            fo.apply_gradients(tx, params, grads, state, donate=donate)

    before.check()


def takes(*names: str) -> Any:
    """A function with positional arguments of these names."""
    return eval(f"lambda {', '.join(names)}: u")


DECLARATIONS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "the update is missing": (lambda: fo.elementwise(takes("p")), TypeError, r"takes \(p\), expected \(p?u"),
    "a slot is not an argument": (
        lambda: fo.elementwise(state={"m": fo.zeros})(takes("u")),
        TypeError,
        r"expected \(u, m, \*, \.\.\.\)",
    ),
    "an argument is no slot": (lambda: fo.elementwise(takes("u", "m")), TypeError, r"takes \(u, m\), expected \(u, \*"),
    "slots in another order": (
        lambda: fo.elementwise(state={"a": fo.zeros, "b": fo.zeros})(takes("u", "b", "a")),
        TypeError,
        r"expected \(u, a, b",
    ),
    "variable arguments": (lambda: fo.elementwise(takes("u", "*rest")), TypeError, r"takes \(u, rest\)"),
    "an extra argument that is none": (
        lambda: fo.elementwise(extra=("value",))(takes("u")),
        TypeError,
        r"`extra` of .* names \['value'\]",
    ),
    "a switch that is none": (
        lambda: fo.elementwise(static=("mode",))(takes("u")),
        TypeError,
        r"`static` of .* names \['mode'\]",
    ),
    "a range of nothing": (
        lambda: fo.elementwise(ranges={"b": "[0, 1]"})(takes("u")),
        TypeError,
        r"`ranges` of .* names \['b'\]",
    ),
    "a range that is no interval": (
        lambda: fo.elementwise(ranges={"b": "0..1"})(takes("u", "*", "b=1")),
        ValueError,
        r'written like "\[0, 1\)", got \'0\.\.1\'',
    ),
    "a slot from nowhere": (
        lambda: fo.elementwise(state={"m": fo.slot("start")})(takes("u", "m")),
        TypeError,
        r"the slot `m` of .* takes its start from `start`, which is no argument",
    ),
    "a dtype from nowhere": (
        lambda: fo.elementwise(state={"m": fo.slot(dtype="kind")})(takes("u", "m")),
        TypeError,
        r"takes its dtype from `kind`",
    ),
    "a number per leaf from the parameter": (
        lambda: fo.slot("param", per="leaf"),
        ValueError,
        r"starts from a number, got start='param'",
    ),
    "a slot per row": (lambda: fo.slot(per="row"), ValueError, r"`per` must be .* got 'row'"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", DECLARATIONS)
def test_bad_declarations_of_rules(name: str) -> None:
    declare, error, message = DECLARATIONS[name]

    with pytest.raises(error, match=message):
        declare()
