"""Arguments that are refused where they are given, by the name that their caller has for them."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.compare import Snapshot
from _lib.trees import make_tree, zeros


CALLERS_NAMES: dict[str, tuple[Callable[[], Any], str]] = {
    "momentum of sgd": (lambda: fo.sgd(0.1, momentum=-1.0), r"`decay` of trace must be in \[0, inf\), got -1\.0"),
    "momentum of lars": (lambda: fo.lars(0.1, momentum="x"), "`decay` of trace must be a number"),
    "momentum of rmsprop": (lambda: fo.rmsprop(0.1, momentum=-1.0), "`decay` of trace must be in"),
    "beta of signum": (lambda: fo.signum(0.1, beta=2.0), "`decay` of ema must be in"),
    "t0 of asgd": (lambda: fo.asgd(0.1, t0=-9), "`start` of params_swa must be in"),
    "scaling of polyak_sgd": (lambda: fo.polyak_sgd(0.1, scaling="x"), "`learning_rate` of .* must be a number"),
    "eps of adafactor": (lambda: fo.adafactor(eps=-1.0), "`epsilon` of scale_by_factored_rms must be in"),
    "momentum of adafactor": (lambda: fo.adafactor(momentum=2.0), "`decay` of ema must be in"),
    "dtype_momentum of adafactor": (lambda: fo.adafactor(momentum=0.9, dtype_momentum="x"), "`accumulator_dtype` of"),
    "clipping_threshold of adafactor": (lambda: fo.adafactor(clipping_threshold=0.0), "`threshold` of clip_by_block"),
    "weight_decay_rate of adafactor": (lambda: fo.adafactor(weight_decay_rate="x"), "`weight_decay` of add_decayed"),
    "adam_b1 of muon": (lambda: fo.muon(0.1, adam_b1=2.0), "`b1` of scale_by_adam must be in"),
    "adam_learning_rate of muon": (lambda: fo.muon(0.1, adam_learning_rate="x"), "`learning_rate` of scale_by_learn"),
    "weight_decay_mask of adadelta": (lambda: fo.adadelta(0.1, weight_decay_mask="("), "`mask` of masked is '\\('"),
    "weight_decay_mask of lars": (lambda: fo.lars(0.1, weight_decay_mask="("), "`mask` of masked is '\\('"),
    "trust_ratio_mask of lars": (lambda: fo.lars(0.1, trust_ratio_mask="("), "`mask` of masked is '\\('"),
    "weight_decay_mask of muon": (lambda: fo.muon(0.1, weight_decay_mask="("), "`mask` of masked is '\\('"),
}


@pytest.mark.parametrize("name", CALLERS_NAMES)
def test_an_error_of_an_argument_begins_with_the_callers_name(name: str) -> None:
    make, of_the_rule = CALLERS_NAMES[name]
    argument, _, owner = name.partition(" of ")

    with pytest.raises((TypeError, ValueError), match=f"^`{argument}` of {owner}: {of_the_rule}"):
        make()


WRONG: dict[str, Any] = {
    "a number": 0.5,
    "text": "(",
    "None": None,
    "a list": [1],
    "a tensor": torch.ones(2),
    "a dict": {"a": 1},
    "an object": object(),
}


TX = fo.params_ema(0.9)


RULE: dict[str, Callable[[Any], Any]] = {
    "state": lambda x: fo.elementwise(lambda u: u, state=x),
    "extra": lambda x: fo.elementwise(lambda u: u, extra=x),
    "static": lambda x: fo.leafwise(lambda u: u, static=x),
    "ranges": lambda x: fo.leafwise(lambda u: u, ranges=x),
    "final": lambda x: fo.elementwise(lambda u: u, final=x),
    "batched": lambda x: fo.leafwise(lambda u: u, batched=x),
    "stacked_up_to": lambda x: fo.leafwise(lambda u: u, stacked_up_to=x),
}


CALLS: dict[str, tuple[Callable[[Any], Any], str, tuple[str, ...]]] = {  # calls, their messages, kinds that fit
    **{f"{argument} of a rule": (call, f"`{argument}` of |the slot `a`", ("None",)) for argument, call in RULE.items()},
    "extra of a rule": (RULE["extra"], "`extra` of |the extra argument `a`", ()),
    "static of a rule": (RULE["static"], "`static` of ", ()),
    "final of a rule": (RULE["final"], "`final` of elementwise is a switch", ()),
    "batched of a rule": (RULE["batched"], "`batched` of leafwise is a switch", ()),
    "a range of a rule": (
        lambda x: fo.elementwise(lambda u, *, a=1.0: u * a, ranges={"a": x}),
        "`ranges` of <lambda> at 'a'",
        ("a list",),
    ),
    "fn of elementwise": (lambda x: fo.elementwise()(x), "`fn` of elementwise is .*, expected a function", ()),
    "fn of leafwise": (lambda x: fo.leafwise()(x), "`fn` of leafwise is .*, expected a function", ()),
    "start of slot": (lambda x: fo.slot(x), "`start` of slot is", ("a number", "text")),
    "dtype of slot": (lambda x: fo.slot(dtype=x), "`dtype` of slot is", ("text", "None")),
    "shape of slot": (lambda x: fo.slot(shape=x), "`shape` of slot is", ("None",)),
    "per of slot": (lambda x: fo.slot(per=x), "`per` must be", ()),
    "square of slot": (lambda x: fo.slot(square=x), "`square` of slot is a switch", ()),
    "evaluate of slot": (lambda x: fo.slot(evaluate=x), "`evaluate` of slot is a switch", ()),
    "formula of schedule": (
        lambda x: fo.schedule(rate="[0, 1]")(x),
        "`formula` of schedule is .*, expected a func",
        (),
    ),
    "a range of a schedule": (
        lambda x: fo.schedule(rate=x)(lambda count, rate=0.5: rate * count),
        "`rate` of schedule is .*, expected an interval|the default of `rate` of|a range is written like",
        (),
    ),
    "a Schedule": (lambda x: fo.Schedule(x, {}), "a Schedule is made by a function such as", ()),  # type: ignore[arg-type]
    "params of a method of second order": (lambda x: fo.lbfgs().init(x), "params|needs the parameters", ("a tensor",)),
    "params of value_and_grad": (
        lambda x: fo.value_and_grad_from_state(lambda p: p.sum())(x, state=fo.lbfgs().init(zeros(1))),
        "params",
        ("a tensor",),
    ),
    "chain": (lambda x: fo.chain(TX, x), r"`transformations\[1\]` of chain: expected a gradient transformation", ()),
    "named_chain": (
        lambda x: fo.named_chain(("a", TX), x),
        r"`transformations\[1\]` of named_chain is .*, expected a pair of a name and a transformation",
        (),
    ),
    "a name of named_chain": (lambda x: fo.named_chain((x, TX)), r"`transformations\[0\]` of named_chain", ("text",)),
    "a member of named_chain": (lambda x: fo.named_chain(("a", x)), "'a' of named_chain: expected a gradient", ()),
    "inner of masked": (lambda x: fo.masked(x, True), "`inner` of masked: expected a gradient transformation", ()),
    "inner of a rule": (lambda x: around(x), "`inner` of around: expected a gradient transformation", ()),
    "transforms of partition": (
        lambda x: fo.partition(x, "a"),
        r"`transforms` of partition is .*, expected a dict|`transforms\['a'\]` of partition: expected a gradient",
        (),
    ),
    "init of a transformation": (
        lambda x: fo.GradientTransformation(x, lambda u, s: (u, s)),
        "`init` of GradientTransformation is .*, expected a function",
        (),
    ),
    "update of a transformation": (
        lambda x: fo.GradientTransformation(lambda p: (), x),
        "`update` of GradientTransformation is .*, expected a function",
        (),
    ),
    "f of stateless": (lambda x: fo.stateless(x), "`f` of stateless is .*, expected a function", ()),
    "f of stateless_with_tree_map": (
        lambda x: fo.stateless_with_tree_map(x),
        "`f` of stateless_with_tree_map is .*, expected a function",
        (),
    ),
    "value_fn": (lambda x: fo.value_and_grad_from_state(x), "`value_fn` of value_and_grad_from_state is", ()),
    "tx of apply_gradients": (
        lambda x: fo.apply_gradients(x, zeros(1), zeros(1), ()),
        "`tx` of apply_gradients: expected a gradient transformation",
        (),
    ),
    "params of apply_gradients": (
        lambda x: fo.apply_gradients(TX, x, {"w": zeros(1)}, TX.init({"w": zeros(1)})),
        "params|updates is dict",
        (),
    ),
    "donate of apply_gradients": (
        lambda x: fo.apply_gradients(TX, zeros(1), zeros(1), TX.init(zeros(1)), donate=x),
        "`donate` of apply_gradients is a switch",
        (),
    ),
    "params of apply_updates": (lambda x: fo.apply_updates(x, {"w": zeros(1)}), "params|updates is dict", ()),
    "params of eval_params": (
        lambda x: fo.eval_params(TX.init({"w": zeros(1)}), x),
        "params does not have the str",
        (),
    ),
    "state of eval_params": (lambda x: fo.eval_params(x, zeros(1)), "state", ()),
    "tx of explain": (lambda x: fo.explain(x, zeros(1)), "`tx` of explain: expected a gradient transformation", ()),
    "tx of hyperparams": (lambda x: fo.hyperparams(x, ()), "`tx` of hyperparams: expected a gradient transform", ()),
    "tx of slots": (lambda x: fo.slots(x, ()), "`tx` of slots: expected a gradient transformation", ()),
    "name of use_backend": (lambda x: fo.use_backend(x).__enter__(), "unknown backend .*; there are 'reference'", ()),
    "module of pack_module": (lambda x: fo.pack_module(x), "pack_module takes a module, got", ()),
    "tx of update_average": (lambda x: fo.update_average(x, zeros(1), ()), "`tx` of update_average: expected", ()),
    "matrices of muon": (lambda x: fo.muon(0.1, matrices=x), "`matrices` of muon is", ("None",)),
    "ns_coeffs of muon": (lambda x: fo.muon(0.1, x), "`ns_coeffs` is .*, expected", ()),
    "linesearch of lbfgs": (lambda x: fo.lbfgs(linesearch=x), "expected a gradient transformation", ("None",)),
    "a mask": (lambda x: fo.masked(TX, x).init(zeros(1)), "mask", ()),
    "labels": (lambda x: fo.partition({"a": TX}, x).init(zeros(1)), "label", ()),
}


@fo.elementwise
def around(u: Any, before: Any) -> Any:
    return u + before


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", CALLS)
def test_an_argument_of_a_wrong_kind_is_refused_by_its_name(name: str, kind: str) -> None:
    call, message, fits = CALLS[name]
    if kind in fits:
        call(WRONG[kind])
        return
    with pytest.raises((TypeError, ValueError), match=message):
        call(WRONG[kind])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fo.masked(TX, "("), r"`mask` of masked is '\(', which is no regular expression \(missing \)"),
        (lambda: fo.adamw(0.1, mask="["), "`mask` of masked is '\\[', which is no regular expression"),
        (lambda: fo.muon(0.1, matrices="("), r"`matrices` of muon is '\(', which is no regular expression"),
    ],
)
def test_text_that_is_no_regular_expression(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


ARGUMENTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "unknown backend": (
        lambda: fo.use_backend("cuda").__enter__(),
        ValueError,
        r"unknown backend 'cuda'; there are 'reference', 'foreach', 'c', 'triton'",
    ),
    "unknown hyper-parameter": (
        lambda: fo.scale_by_adam(beta1=0.9),
        TypeError,
        r"scale_by_adam: .*'beta1'; its hyper-parameters are \(b1",
    ),
    "missing hyper-parameter": (lambda: fo.trace(), TypeError, r"trace: missing a required argument: 'decay'"),
    "too many hyper-parameters": (lambda: fo.scale(1.0, 2.0), TypeError, r"scale: too many positional arguments"),
    "unknown schedule argument": (lambda: fo.constant_schedule(rate=1.0), TypeError, r"constant_schedule: "),
    "tree reduction outside a rule": (lambda: fo.tree_sum(zeros(2)), TypeError, r"`tree_sum` spans every leaf"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_arguments(name: str) -> None:
    call, error, message = ARGUMENTS[name]

    with pytest.raises(error, match=message):
        call()


def test_an_unknown_backend_changes_nothing() -> None:
    with fo.use_backend("foreach"):
        with pytest.raises(ValueError, match="unknown backend"), fo.use_backend("numpy"):
            pass

        assert fo.explain(fo.sgd(0.1), make_tree(0)).backends == ("foreach",)


CALLED_OTHERWISE: dict[str, tuple[Callable[[], Any], str]] = {
    "a rate": (lambda: fo.adamw(lr=1e-3), r"adamw\(\) got .* 'lr', which is called 'learning_rate' here; it takes "),
    "decays": (
        lambda: fo.lamb(1e-3, betas=(0.9, 0.99)),
        r"lamb\(\) got .* 'betas', which is called 'b1' and 'b2' here",
    ),
    "a mean": (lambda: fo.rmsprop(1e-3, alpha=0.9), "'alpha', which is called 'decay' here"),
    "a slip": (lambda: fo.adam(1e-3, epps=1e-3), "'epps', which is called 'eps' here"),
    "another": (lambda: fo.sgd(1e-3, foreach=True), "'foreach'; it takes learning_rate, momentum, nesterov"),
}


@pytest.mark.parametrize("name", CALLED_OTHERWISE)
def test_an_argument_of_another_name_is_refused_with_its_own(name: str) -> None:
    make, message = CALLED_OTHERWISE[name]
    with pytest.raises(TypeError, match=message):
        make()


class Callables:
    """Functions as methods, which have another number of arguments than they are called with."""

    def of_one(self, count: Any) -> Any:
        return 0.1

    def of_two(self, count: Any, total: Any) -> Any:
        return 0.1


TAKES_SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "`learning_rate` of": lambda f: fo.adamw(f),
    "`b1` of scale_by_adam": lambda f: fo.scale_by_adam(b1=f),
    "`step_size_fn` of scale_by_schedule": lambda f: fo.scale_by_schedule(f),
    "`schedules` of join_schedules at 1": lambda f: fo.join_schedules([fo.constant_schedule(0.1), f], [3]),
    "`factors` of multiply_schedules at 0": lambda f: fo.multiply_schedules([f, 2.0]),
}


OF_OTHER_ARGUMENTS: dict[str, Callable[..., Any]] = {
    "none": lambda: 0.1,
    "two": lambda count, total: 0.1,
    "a method": Callables().of_two,
    "one more by name": lambda count, *, total: 0.1,
    "a partial function": functools.partial(lambda total: 0.1, total=3),
}


def of_two(count: Any, total: Any) -> Any:
    return 0.1


OF_ONE: dict[str, Callable[..., Any]] = {
    "a default": lambda count, total=9: 0.1,
    "any number": lambda *counts: 0.1,
    "a method": Callables().of_one,
    "a partial function": functools.partial(lambda total, count: 0.1, 9),
    "a function of C": math.exp,
    "one that wraps another of two": functools.wraps(of_two)(lambda count: 0.1),
}


@pytest.mark.parametrize("takes", TAKES_SCHEDULES)
def test_schedules_are_functions_of_one_argument(takes: str) -> None:
    for function in OF_ONE.values():
        TAKES_SCHEDULES[takes](function)
    for function in OF_OTHER_ARGUMENTS.values():
        with pytest.raises(TypeError, match=f"{takes}.* expected a schedule, a function of the number of the step"):
            TAKES_SCHEDULES[takes](function)


@pytest.mark.parametrize(
    "make",
    [
        fo.scale_by_schedule,
        lambda f: fo.chain(fo.orthogonalize(), fo.scale_by_schedule(f)),
        lambda f: fo.scale_by_factored_rms(decay_rate=f),
    ],
)
def test_a_schedule_that_returns_a_bool(make: Callable[[Any], fo.GradientTransformation]) -> None:
    tx, params = make(lambda count: True), {"w": torch.ones(2, 2)}
    state = tx.init(params)
    before = Snapshot(params, state)

    with pytest.raises(ValueError, match=r"the schedule of .* returned True, expected a number"):
        tx.update(params, state)

    before.check()
