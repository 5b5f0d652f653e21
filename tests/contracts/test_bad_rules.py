"""Rules that cannot become kernels, and declarations that are refused."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import functional_optim as fo
from _lib.compare import Snapshot
from _lib.trees import like, make_tree
from functional_optim.adapters import TransformOptimizer


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
COMPLEX = torch.tensor(1j)


@fo.elementwise
def captures_a_complex_number(u: torch.Tensor) -> torch.Tensor:
    return u * COMPLEX


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
    "a complex number from outside": (
        captures_a_complex_number(),
        r"`captures_a_complex_number` .*uses a complex tensor as a number",
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
    "a default outside its interval": (
        lambda: fo.elementwise(ranges={"b": "[0, 1)"})(takes("u", "*", "b=1.0")),
        ValueError,
        r"^the default of `b` of .* must be in \[0, 1\), got 1\.0",
    ),
    "a default that is none of its values": (
        lambda: fo.leafwise(ranges={"mode": ("hard", "soft")})(takes("u", "*", "mode='softer'")),
        ValueError,
        r"^the default of `mode` of .* must be one of \['hard', 'soft'\], got 'softer'",
    ),
    "a default outside an interval that holds with a switch": (
        lambda: fo.elementwise(ranges={"b if on": "[0, 1)"})(takes("u", "*", "b=1.0, on=True")),
        ValueError,
        r"^the default of `b` of .* must be in \[0, 1\) if `on` is True, got 1\.0",
    ),
    "a default of a rule around another outside its interval": (
        lambda: fo.elementwise(ranges={"b": "[0, 1)"})(takes("u", "before", "*", "b=-1")),
        ValueError,
        r"^the default of `b` of .* must be in \[0, 1\), got -1",
    ),
    "a default that is no number": (
        lambda: fo.elementwise(takes("u", "*", "b=[1]")),
        TypeError,
        r"^the default of `b` of .* must be a number, a 0-d tensor or a schedule, got \[1\]",
    ),
    "a default that is NaN": (
        lambda: fo.elementwise(takes("u", "*", "b=float('nan')")),
        ValueError,
        r"^the default of `b` of .* must be a number, got nan",
    ),
    "a default of a schedule outside its interval": (
        lambda: fo.schedule(rate="(0, 1]")(lambda count, value, rate=0.0: value * rate**count),
        ValueError,
        r"^the default of `rate` of .* must be in \(0, 1\], got 0\.0",
    ),
    "a default of a schedule outside another argument": (
        lambda: fo.schedule(end="(start, inf)")(lambda count, start=2, end=1: count),
        ValueError,
        r"^the default of `end` of .* must be in \(start, inf\), here \(2, inf\), got 1",
    ),
    "an interval of words": (
        lambda: fo.elementwise(ranges={"b": "[0, one)"})(takes("u", "*", "b=1")),
        ValueError,
        r"`ranges` of .* at 'b': a range is written like",
    ),
    "a shape for averages": (
        lambda: fo.slot(shape=lambda p: p.shape, evaluate=True),
        ValueError,
        "to evaluate at .* has the shape of its leaf; leave out `shape`",
    ),
    "a formula without a name": (
        lambda: fo.elementwise(functools.partial(takes("u", "*", "b=1"), b=2)),
        TypeError,
        r"`fn` of elementwise is functools\.partial.*, which has no name .*with `def`",
    ),
    "a slot per row": (lambda: fo.slot(per="row"), ValueError, r"`per` must be .* got 'row'"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", DECLARATIONS)
def test_bad_declarations_of_rules(name: str) -> None:
    declare, error, message = DECLARATIONS[name]

    with pytest.raises(error, match=message):
        declare()


def test_defaults_that_fit_are_no_errors() -> None:
    """None where it is the default; an interval that holds with a switch which has no default is one of the call."""
    fo.elementwise(ranges={"b": "[0, 1)"})(takes("u", "*", "b=None"))
    fo.schedule(end="(start, inf)")(lambda count, start, end=1: count)
    debiased = fo.elementwise(ranges={"b if on": "[0, 1)"})(takes("u", "*", "on", "b=1.0"))

    debiased(on=False)
    with pytest.raises(ValueError, match=r"^`b` of .* must be in \[0, 1\) if `on` is True"):
        debiased(on=True)


@fo.elementwise
def larger_by_python(u: torch.Tensor) -> torch.Tensor:
    return max(u, 0.0)


@fo.elementwise
def where_of_numpy(u: torch.Tensor) -> torch.Tensor:
    return np.where(u > 0, u, 0.0)


@fo.elementwise
def sum_of_numpy(u: torch.Tensor) -> torch.Tensor:
    return u / np.add.reduce(u)


@fo.elementwise
def times_an_array(u: torch.Tensor) -> torch.Tensor:
    return np.ones(2) * u


OF_OTHERS = {
    "max": (larger_by_python, r"larger_by_python.*Python's `max` and `min` do. Use torch's: `torch.maximum` for `max`"),
    "where": (where_of_numpy, r"where_of_numpy.*makes an array of a traced value, as functions of NumPy do. Use torch"),
    "sum": (sum_of_numpy, r"sum_of_numpy.*makes an array .* `leaf_sum`"),
    "array": (times_an_array, r"times_an_array.*makes an array"),
}


@pytest.mark.parametrize("name", OF_OTHERS)
def test_functions_of_python_and_numpy_are_refused_with_torchs(name: str) -> None:
    rule, message = OF_OTHERS[name]
    with pytest.raises(fo.RuleError, match=message):
        rule().update(torch.ones(2), rule().init(torch.ones(2)))


def test_functions_of_numpy_that_torch_has_are_those_of_torch() -> None:
    rule = fo.elementwise(lambda u: np.float32(2) * np.sign(u) + np.power(u, 2) + np.log1p(np.abs(u)) / np.float64(4))()
    u = torch.tensor([-2.0, 3.0])
    expected = 2 * u.sign() + u**2 + u.abs().log1p() / 4
    torch.testing.assert_close(rule.update(u, rule.init(u))[0], expected)


def keeps(u: torch.Tensor, mu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return u, mu


@pytest.mark.parametrize("decorator", [fo.elementwise, fo.leafwise])
@pytest.mark.parametrize(
    ("declared", "message"),
    [(0.5, r"slot\(0.5\)"), (torch.zeros, "fo.zeros"), (torch.zeros(2), "fo.zeros"), (None, "fo.zeros")],
)
def test_a_slot_that_is_none_is_refused(decorator: Any, declared: Any, message: str) -> None:
    with pytest.raises(TypeError, match=rf"the slot `mu` of keeps is declared as .*{message}"):
        decorator(state={"mu": declared})(keeps)


def test_a_rule_that_is_not_called_says_so() -> None:
    for name in ("init", "update"):
        with pytest.raises(AttributeError, match=rf"scale_by_adam .* no `{name}`; call it: `tx = scale_by_adam\("):
            getattr(fo.scale_by_adam, name)
        assert not hasattr(fo.scale_by_adam, name)
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = fo.scale_by_adam.other


@fo.elementwise
def decays_by_a_logarithm(u: torch.Tensor, *, b: Any = 0.9) -> torch.Tensor:
    return u * torch.log(b)


@fo.leafwise
def calls_the_formula(u: torch.Tensor, *, b: Any = 0.9) -> torch.Tensor:
    return decays_by_a_logarithm.formula(u, b=b)


def whole(rule: Any) -> Callable[[], Any]:
    made = fo.leafwise(rule)()
    return lambda: made.update(torch.ones(2), made.init(torch.ones(2)))


AS_TENSOR = "torch.as_tensor(b, dtype=torch.float64)"
OF_NUMBERS: dict[str, tuple[Callable[[], Any], str]] = {
    "a function of one": (whole(lambda u, *, b=0.9: u * torch.log(b)), AS_TENSOR),
    "a function of two": (whole(lambda u, *, b=0.9: torch.maximum(u, b)), AS_TENSOR),
    "a function of numbers": (whole(lambda u, *, b=0.9: u * torch.pow(b, 0.5)), AS_TENSOR),
    "a method": (whole(lambda u, *, b=0.9: u * b.exp()), AS_TENSOR),
    "a formula": (lambda: decays_by_a_logarithm.formula(torch.ones(2)), "b=torch.tensor(0.9, dtype=torch.float64)"),
    "a formula in a rule": (
        whole(lambda u, *, b=0.9: decays_by_a_logarithm.formula(u, b=b)),
        "b=torch.tensor(0.9, dtype=torch.float64)",
    ),
    "a schedule": (lambda: fo.schedule(lambda count, value: torch.log(value) * count)(0.5), "value + 0 * count"),
}


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_an_operation_that_wants_a_tensor_says_how_a_number_is_given(name: str) -> None:
    call, instead = OF_NUMBERS[name]
    with pytest.raises((TypeError, AttributeError)) as caught:
        call()
    [note] = [x for x in caught.value.__notes__ if x.startswith("numbers are Python's here")]
    assert instead in note


def test_the_ways_that_the_notes_name_agree() -> None:
    b, u = 0.999, torch.linspace(-1.0, 1.0, 5)
    rules = [
        decays_by_a_logarithm(b),
        fo.leafwise(lambda u, *, b: u * torch.log(torch.as_tensor(b, dtype=torch.float64)))(b),
        calls_the_formula(torch.tensor(b, dtype=torch.float64)),
        fo.scale(fo.schedule(lambda count, value: torch.log(value + 0 * count))(b)),
    ]
    for tx in rules:
        # one rounding of the number, and one of the product
        torch.testing.assert_close(tx.update(u, tx.init(u))[0], u * math.log(b), rtol=2.0**-22, atol=0)


def test_an_error_of_another_kind_gets_no_note_about_numbers() -> None:
    for call in (whole(lambda u: u @ torch.ones(3)), whole(lambda u: u.no_such_method())):
        with pytest.raises((RuntimeError, AttributeError)) as caught:
            call()
        assert not any("numbers" in x for x in caught.value.__notes__)


def test_messages_about_arguments_name_no_classes_of_the_package() -> None:
    message = r"its hyper-parameters are \(b=0\.9\)\.$"
    for call in (lambda: decays_by_a_logarithm(c=1), lambda: decays_by_a_logarithm().replace(c=1)):
        with pytest.raises(TypeError, match=message):
            call()
    assert repr(decays_by_a_logarithm) == "<rule decays_by_a_logarithm(b=0.9)>"


def test_numbers_of_the_tree_have_no_meaning_for_one_leaf() -> None:
    whole = fo.leafwise(lambda u: u / fo.tree_norm(u))()
    with pytest.raises(TypeError, match=r"inside an `elementwise` rule; a `leafwise` rule, .* see one leaf"):
        whole.update(torch.ones(2), whole.init(torch.ones(2)))


def slotted(declared: Any) -> fo.GradientTransformation:
    """A rule for whole tensors with a slot."""

    @fo.leafwise(state={"kept": declared})
    def keeps(u: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return u, kept

    made: fo.GradientTransformation = keeps()
    return made


SLOT_FUNCTIONS: dict[str, tuple[Any, type[Exception], str]] = {
    "a shape that is a number": (fo.slot(shape=lambda p: 5), TypeError, r"the shape of .* is 5 for .*, expected a tup"),
    "a shape that is text": (fo.slot(shape=lambda p: "5"), TypeError, r"the shape of .* is '5' for"),
    "half a size": (fo.slot(shape=lambda p: (2.5,)), TypeError, r"the shape of .* is \(2\.5,\) for"),
    "a size below 0": (fo.slot(shape=lambda p: (-1,)), TypeError, r"the shape of .* is \(-1,\) for"),
    "a bool for a size": (fo.slot(shape=lambda p: (True,)), TypeError, r"the shape of .* is \(True,\) for"),
    "bytes for a shape": (fo.slot(shape=lambda p: b"ab"), TypeError, r"the shape of .* is b'ab' for"),
    "a start that is a number": (fo.slot(lambda p: 3.0), TypeError, r"the start of .* is 3\.0 for .*, expected a tens"),
    "averages of another shape": (
        fo.slot(lambda p: torch.zeros(7), evaluate=True),
        ValueError,
        r"holds the parameters to evaluate at, but it starts with the shape \(7,\)",
    ),
    "averages of one element": (
        fo.slot(lambda p: torch.zeros(1), evaluate=True),
        ValueError,
        r"starts with the shape \(1,\)",
    ),
    "a shape that fails": (fo.slot(shape=lambda p: (p.shape[1],)), IndexError, "tuple index out of range"),
    "a start that fails": (fo.slot(lambda p: torch.zeros(p.shape[1])), IndexError, "tuple index out of range"),
}


@pytest.mark.parametrize("form", ["tree", "optimizer"])
@pytest.mark.parametrize("name", SLOT_FUNCTIONS)
def test_functions_of_slots_fail_with_rule_slot_and_leaf(name: str, form: str) -> None:
    declared, error, message = SLOT_FUNCTIONS[name]
    tx = slotted(declared)
    p = torch.nn.Parameter(torch.ones(5))
    opt = TransformOptimizer([("bias", p)], fo.chain(tx, fo.sgd(0.1)))
    p.grad = torch.ones(5)
    before = Snapshot([p])

    with pytest.raises(error, match=message) as info:
        tx.init({"bias": p.detach()}) if form == "tree" else opt.step()

    said = " ".join([str(info.value), *info.value.__notes__])
    assert re.search(r"the slot `kept` of keeps\b.*\bleaf of shape \(5,\).*the leaf at 'bias'", said)
    before.check()
    assert not opt.state


def test_an_error_of_a_batched_rule_gives_the_shape_of_its_leaves() -> None:
    params = {name: torch.ones(5) for name in ("bias", "scale")}
    tx = fo.orthogonalize()
    with pytest.raises(ValueError, match="is no matrix") as info:
        tx.update(params, tx.init(params))
    assert "in orthogonalize, for a tensor of shape (5,) at 'bias' and 1 more of that shape" in info.value.__notes__


@pytest.mark.parametrize(
    "shape",
    [
        lambda p: reversed(p.shape),
        lambda p: (n for n in (3, 2)),
        lambda p: np.array([3, 2]),
        lambda p: torch.tensor([3, 2]),
        lambda p: [np.int64(3), torch.tensor(2)],
    ],
)
def test_shapes_of_slots_are_any_sizes_in_order(shape: Any) -> None:
    state: Any = slotted(fo.slot(shape=shape)).init({"w": torch.ones(2, 3)})
    assert state.kept["w"].shape == (3, 2)
