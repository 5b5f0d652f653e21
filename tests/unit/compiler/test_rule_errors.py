"""Rules that cannot become kernels: each is refused with a message that names the rule, its line and a way out."""

import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import functional_optim as fo
from _lib.faulty_rules import FAULTY, MU, VECTOR, Faulty, branches, sorts
from functional_optim.adapters import TransformOptimizer


# -- found while tracing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("faulty", FAULTY, ids=lambda x: x.rule.__name__)
def test_a_rule_that_cannot_become_a_kernel(faulty: Faulty) -> None:
    lines, first = inspect.getsourcelines(faulty.rule)
    at_fault = first + next((k for k, line in enumerate(lines) if "# at fault" in line), 0)
    tx = fo.elementwise(faulty.rule, state=faulty.slots)()
    params = torch.ones(3)
    state = tx.init(params)

    with pytest.raises(fo.RuleError) as caught:
        tx.update(params, state, params)

    assert faulty.message in str(caught.value)
    assert faulty.rule.__name__ in str(caught.value)
    assert f"{inspect.getsourcefile(faulty.rule)}:{at_fault}" in str(caught.value)


def test_functions_that_messages_name_do_what_they_say() -> None:
    @fo.elementwise
    def found(u: Any, p: Any) -> Any:
        is_any, is_all = fo.leaf_amax(u > 1), 1 - fo.leaf_amax(~torch.isfinite(p))
        return 100 * is_any + 10 * is_all + fo.leaf_sum(u != 0) + torch.nn.functional.relu(u, inplace=False) * 1000

    tx = found()
    for u, p in ((VECTOR, VECTOR), (VECTOR / 2, VECTOR / VECTOR)):
        expected = 100.0 * (u > 1).any() + 10.0 * p.isfinite().all() + u.count_nonzero() + u.relu() * 1000
        torch.testing.assert_close(tx.update(u, tx.init(p), p)[0], expected, rtol=0, atol=0)


def test_a_helper_of_a_rule_is_named_by_its_own_line() -> None:
    def helper(x: Any) -> Any:
        return torch.sort(x)

    @fo.elementwise
    def helped(u: Any) -> Any:
        return helper(u)

    tx = helped()
    with pytest.raises(fo.RuleError, match=re.escape("`helper` (")):
        tx.update(VECTOR, tx.init(VECTOR))


def test_the_traceback_of_a_rule_error_is_short() -> None:
    """The call, where it enters the package, and the rule's own line, last."""
    package, p = Path(fo.__file__).parent, torch.nn.Parameter(torch.ones(2))
    tx, p.grad = fo.elementwise(sorts)(), torch.ones(2)
    # a test that raises from a trace function can leave the interpreter with an exception that it still handles
    outer = sys.exception()
    calls: list[Callable[[], Any]] = [
        lambda: tx.update(VECTOR, tx.init(VECTOR)),
        lambda: fo.apply_gradients(
            fo.chain(fo.trace(0.9), tx), VECTOR, VECTOR, fo.chain(fo.trace(0.9), tx).init(VECTOR)
        ),
        lambda: fo.explain(tx, VECTOR),
        TransformOptimizer([p], tx).step,
    ]
    for call in calls:
        with pytest.raises(fo.RuleError) as caught:
            call()
        frames = traceback.extract_tb(caught.value.__traceback__)
        assert frames[-1].name == "sorts"
        assert sum(Path(frame.filename).is_relative_to(package) for frame in frames) <= 5
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is outer


def test_value_of_another_trace_is_refused() -> None:
    kept: list[Any] = []

    @fo.elementwise
    def keeps(u: Any) -> Any:
        kept.append(u)
        return u + kept[0]

    tx, other = keeps(), fo.chain(keeps(), fo.scale(2.0))
    tx.update(VECTOR, tx.init(VECTOR))
    with pytest.raises(fo.RuleError, match=r"`keeps` .* a value of another trace"):
        other.update(VECTOR, other.init(VECTOR))


def test_nothing_changes_when_a_rule_is_refused() -> None:
    tx = fo.chain(fo.trace(0.9), fo.elementwise(branches)())
    params, grads = [torch.ones(3)], [torch.ones(3)]
    state = tx.init(params)
    with pytest.raises(fo.RuleError):
        fo.apply_gradients(tx, params, grads, state, donate=True)
    torch.testing.assert_close((params, state[0].trace), (grads, [torch.zeros(3)]), rtol=0, atol=0)


# -- found where a rule is defined --------------------------------------------------------------------------------


def good(u: Any, p: Any, mu: Any, *, step: Any, decay: float = 0.9, mu_dtype: Any = None, flag: bool = False) -> Any:
    return decay * mu + u, mu


class Declared(NamedTuple):
    """Arguments of `elementwise`, and a part of the message that refuses them."""

    rule: Callable[..., Any]
    arguments: dict[str, Any]
    message: str


DECLARED = {
    "a slot that is no argument": Declared(good, {"state": {}}, r"good takes \(u, p, mu, .*\), expected \(u, p, \*"),
    "an argument that is no slot": Declared(
        good, {"state": {"mu": fo.zeros, "nu": fo.zeros}}, r"good takes .* expected \(u, p, mu, nu, \*"
    ),
    "slots in another order": Declared(
        lambda u, b, a: u, {"state": {"a": fo.zeros, "b": fo.zeros}}, r"takes \(u, b, a\), expected \(u, a, b,"
    ),
    "no update": Declared(lambda p: p, {}, r"takes \(p\), expected \(u,"),
    "an update of another name": Declared(lambda g: g, {}, r"takes \(g\), .* Call the update `u`, not `g`\."),
    "a parameter of another name": Declared(
        lambda u, params: u, {}, r"takes \(u, params\), .* If `params` is the parameter, call it `p`; if it is a slot,"
    ),
    "hyper-parameters by position": Declared(lambda u, k=1.0: u, {}, r"takes \(u, k\), expected \(u,"),
    "any arguments": Declared(lambda *args: args[0], {}, "takes"),
    "any keywords": Declared(lambda u, **kwargs: u, {}, "takes"),
    "a lambda with a slot": Declared(lambda u, mu: (u, mu), {"state": MU}, "keeps a state, .* write it with `def`"),
    "a lambda that counts": Declared(lambda u, *, step: u / step, {}, "keeps a state, .* write it with `def`"),
    "unknown static": Declared(good, {"state": MU, "static": ("flags",)}, r"`static` of good names \['flags'\]"),
    "unknown extra": Declared(good, {"state": MU, "extra": ("value",)}, r"`extra` of good names \['value'\]"),
    "unknown ranges": Declared(good, {"state": MU, "ranges": {"b1": "[0, 1)"}}, r"`ranges` of good names \['b1'\]"),
    "a static step": Declared(good, {"state": MU, "static": ("step",)}, r"`static` of good names \['step'\]"),
    "an unknown dtype": Declared(
        good, {"state": {"mu": fo.slot(dtype="nu_dtype")}}, "the slot `mu` of good takes its dtype from `nu_dtype`"
    ),
    "an unknown start": Declared(
        good, {"state": {"mu": fo.slot("start")}}, "the slot `mu` of good takes its .* from `start`"
    ),
}


@pytest.mark.parametrize("name", DECLARED)
def test_a_declaration_that_does_not_fit(name: str) -> None:
    rule, arguments, message = DECLARED[name]
    with pytest.raises(TypeError, match=message):
        fo.elementwise(rule, **arguments)


@pytest.mark.parametrize("text", ["0, 1", "[0; 1)", "[0, 1", "", "[a, b]"])
def test_malformed_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text)) if text != "[a, b]" else "'a'|\\[a, b\\]"):
        fo.elementwise(good, state=MU, ranges={"decay": text})


def test_a_number_per_leaf_cannot_start_as_a_tensor() -> None:
    with pytest.raises(ValueError, match="starts from a number, got start='first_update'"):
        fo.slot("first_update", per="leaf")


def test_a_slot_of_whole_numbers() -> None:
    """Refused where the rule is declared; rules for whole tensors may have one."""
    slots = {"mu": fo.slot(dtype=torch.int8)}
    with pytest.raises(
        TypeError, match=r"the slot `mu` of good is stored as float32, .* got torch\.int8\. Slots of `leaf"
    ):
        fo.elementwise(good, state=slots)
    fo.leafwise(good, state=slots)


def test_a_hyper_parameter_that_asks_for_a_slot_of_whole_numbers() -> None:
    with pytest.raises(TypeError, match=r"the slot of scale_by_adam that `mu_dtype` is for .* got torch\.int8"):
        fo.scale_by_adam(mu_dtype=torch.int8)


def test_a_slot_is_per_element_or_per_leaf() -> None:
    with pytest.raises(ValueError, match="got 'row'"):
        fo.slot(per="row")  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [fo.tree_sum, fo.tree_amax, fo.tree_norm], ids=lambda f: f.__name__)
def test_a_tree_function_outside_a_rule(function: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(TypeError, match=f"`{function.__name__}` .* only be called inside an `elementwise` rule"):
        function(VECTOR)


def test_a_leaf_function_outside_a_rule_is_what_it_says() -> None:
    actual = torch.stack([f(VECTOR) for f in (fo.leaf_sum, fo.leaf_mean, fo.leaf_norm, fo.leaf_amax)])
    torch.testing.assert_close(actual, torch.tensor([3.0, 1.0, math.sqrt(5), 2.0]), rtol=2**-23, atol=0)
