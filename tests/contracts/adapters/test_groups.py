"""Parameter groups: what callers give stays theirs, and an option means what its name says."""

import copy
import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import functional_optim as fo
from _lib.compare import assert_same_bits
from _lib.optimizers import (
    content,
    params_of as members,
    train,
)
from functional_optim.adapters import LAMB, SGD, Adam, AdamW, Lion, RMSprop, TransformOptimizer


def parameters(n: int = 2) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(8, generator=generator, dtype=torch.float64)) for _ in range(n)]


MAKERS: dict[str, Callable[[Any], Any]] = {
    **{cls.__name__: functools.partial(cls, lr=0.25) for cls in (SGD, Adam, AdamW, RMSprop, Lion, LAMB)},
    "TransformOptimizer": lambda groups: TransformOptimizer(groups, fo.lion(0.25)),
    "factory": lambda groups: TransformOptimizer.factory(fo.sgd)(groups, lr=0.25),
}


def by_constructor(make: Any, group: dict[str, Any]) -> Any:
    return make([group])


def by_add_param_group(make: Any, group: dict[str, Any]) -> Any:
    opt = make(parameters(1))
    opt.add_param_group(group)
    return opt


WAYS = {f.__name__: f for f in (by_constructor, by_add_param_group)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("second", MAKERS)
@pytest.mark.parametrize("first", ["AdamW", "TransformOptimizer"])
def test_a_group_that_is_used_again_brings_nothing_of_the_first_optimizer(first: str, second: str, way: str) -> None:
    names = ["a", "b"]
    group: dict[str, Any] = {"params": parameters(), "param_names": names, "weight_decay": 0.5}
    if way == "by_add_param_group":
        del group["param_names"]
    if second in ("TransformOptimizer", "SGD", "factory"):  # some have no such option
        del group["weight_decay"]
    before = dict(group)
    earlier = {
        "AdamW": lambda params: AdamW(params, lr=0.125, betas=(0.5, 0.5)),
        "TransformOptimizer": lambda params: TransformOptimizer(params, fo.adamw(0.125, b1=0.5)),
    }[first]

    old = WAYS[way](earlier, group)
    assert group == before
    opt = WAYS[way](MAKERS[second], group)
    alone = WAYS[way](MAKERS[second], {**before, "params": parameters()})

    assert group == before
    assert opt.param_groups[-1]["lr"] == 0.25
    assert old.param_groups[-1]["lr"] == 0.125
    assert opt.param_groups[-1].keys() == alone.param_groups[-1].keys()
    names.append("c")
    train([opt, alone], range(20))
    assert_same_bits(content(opt), content(alone))


@pytest.mark.parametrize("maker", MAKERS)
def test_a_group_that_is_refused_is_as_it_was(maker: str) -> None:
    opt = MAKERS[maker](parameters(1))
    bad: dict[str, Any] = {"params": [*parameters(1), torch.ones(1)[0:1] + torch.ones(1, requires_grad=True)]}
    before = dict(bad)

    with pytest.raises(ValueError, match="non-leaf"):
        opt.add_param_group(bad)

    assert bad == before
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("maker", MAKERS)
def test_an_iterator_that_another_optimizer_has_used_up_is_warned_of(maker: str) -> None:
    """torch puts a list in its place; here the caller's dict keeps the iterator."""
    group = {"params": iter(parameters())}
    assert len(members(MAKERS[maker]([group]))) == 2
    with pytest.warns(UserWarning, match="an iterator that yields nothing.*pass a list"):
        opt = MAKERS[maker]([group])
    with pytest.warns(UserWarning, match="an iterator that yields nothing.*pass a list") as caught:
        opt.add_param_group(group)
    assert [w.filename for w in caught] == [__file__]


def test_a_group_of_another_chain_is_warned_of_and_known_by_its_own() -> None:
    params = parameters()
    first = TransformOptimizer(params, fo.adamw(0.1))
    with pytest.warns(UserWarning, match="of an optimizer with the chain 'scale_by_adam") as caught:
        opt = TransformOptimizer([dict(g) for g in first.param_groups], fo.lion(0.5))
    assert {w.filename for w in caught} == {__file__}
    alone = TransformOptimizer(parameters(), fo.lion(0.1))
    assert opt.param_groups[0]["chain"] == alone.param_groups[0]["chain"]

    train([opt], range(2))
    with pytest.warns(UserWarning, match=r"knows 'eps', .* in param_groups\[0\] of the state dict"):
        alone.load_state_dict(opt.state_dict())  # which another chain's file could not
    train([opt], range(2, 4))


def test_a_chain_in_a_file_does_not_become_that_of_the_groups() -> None:
    opt = TransformOptimizer(parameters(), fo.adamw(0.1))
    tag = opt.param_groups[0]["chain"]
    opt.param_groups[0]["chain"] = "something else"  # by a wrapper that copies groups, for one
    saved = TransformOptimizer(parameters(), fo.adamw(0.1)).state_dict()

    opt.load_state_dict(saved)

    assert opt.param_groups[0]["chain"] == tag


def nothing(params: Any) -> tuple[()]:
    return ()


def one(updates: Any, state: Any, params: Any = None) -> Any:
    return updates, state


def other(updates: Any, state: Any, params: Any = None, more: Any = None) -> Any:
    return updates, state


def test_a_chain_is_known_by_no_name_of_a_function_and_no_address() -> None:
    """So that a file loads where a function has been renamed, and in another process."""
    chains = [
        fo.chain(fo.GradientTransformation(nothing, update), fo.sgd(0.1))
        for update in (one, other, functools.partial(other, more=3))
    ]
    tags = {TransformOptimizer(parameters(), tx).param_groups[0]["chain"] for tx in chains}
    assert len(tags) == 1
    assert "0x" not in tags.pop()


# --- options by name


@fo.elementwise
def plain(u: Any, *, lr: Any = 0.01) -> Any:
    return -lr * u


@fo.elementwise
def rated(u: Any, *, learning_rate: Any = 0.01, lr: Any = 2.0) -> Any:
    return -learning_rate * lr * u


@fo.elementwise(ranges={"max_lr": "[0, 1]"})
def bounded(u: Any, *, max_lr: Any = 0.5, maximize: Any = 1.0) -> Any:
    return maximize * torch.clamp(u, -max_lr, max_lr)


def moved(opt: torch.optim.Optimizer) -> float:
    """The length of a step with a gradient of ones."""
    [p] = members(opt)
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    opt.step()
    return float((before - p.detach()).mean())


# by chain: the options of its groups, the step at first, and the step once `lr` is 0.5
RATES: dict[str, tuple[Callable[[], Any], dict[str, float], float, float]] = {
    "lr": (lambda: plain(0.25), {"lr": 0.25}, 0.25, 0.5),
    "lr in a chain": (lambda: fo.chain(fo.scale(2.0), plain(0.25)), {"lr": 0.25, "step_size": 2.0}, 0.5, 1.0),
    "lr in a named chain": (lambda: fo.named_chain(("a", plain(0.25))), {"lr": 0.25}, 0.25, 0.5),
    "a schedule for lr": (lambda: plain(fo.constant_schedule(0.25)), {"lr": 1.0}, 0.25, 0.125),
    "a tensor for lr": (lambda: plain(torch.tensor(0.25)), {"lr": 0.25}, 0.25, 0.5),
    "two of lr": (
        lambda: fo.chain(plain(0.25), plain(-1.0)),
        {"lr": 1.0, "plain_lr": 0.25, "plain_lr_2": -1.0},
        0.25,
        0.125,
    ),
    "learning_rate": (lambda: fo.sgd(0.25), {"lr": 0.25}, 0.25, 0.5),
    "learning_rate and lr of one rule": (lambda: rated(0.25), {"lr": 0.25, "rated_lr": 2.0}, 0.5, 1.0),
    "learning_rate and lr of two": (
        lambda: fo.chain(plain(-2.0), fo.sgd(0.25)),
        {"lr": 0.25, "plain_lr": -2.0},
        0.5,
        1.0,
    ),
    "a schedule and lr": (
        lambda: fo.chain(plain(-2.0), fo.sgd(fo.constant_schedule(0.25))),
        {"lr": 1.0, "plain_lr": -2.0},
        0.5,
        0.25,
    ),
    "neither": (lambda: fo.scale(-0.25), {"lr": 1.0, "step_size": -0.25}, 0.25, 0.125),
}


@pytest.mark.parametrize("case", RATES)
def test_what_lr_is(case: str) -> None:
    make, expected, first, second = RATES[case]
    opt = TransformOptimizer(parameters(1), make())

    own = {k: float(v) for k, v in opt.param_groups[0].items() if k == "lr" or k.endswith(("_lr", "step_size", "lr_2"))}
    assert own == expected
    # powers of two: exact but for the rounding of the parameter, which is of order one in float64
    assert moved(opt) == pytest.approx(first, abs=1e-15)
    opt.param_groups[0]["lr"] = 0.5
    assert moved(opt) == pytest.approx(second, abs=1e-15)


def test_lr_of_a_rule_is_what_factories_groups_and_schedulers_say() -> None:
    opt = TransformOptimizer.factory(plain)([{"params": parameters(1)}, {"params": parameters(1), "lr": 0.25}], lr=0.5)
    assert [g["lr"] for g in opt.param_groups] == [0.5, 0.25]
    torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.5)
    for p in members(opt):
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in members(opt)]
    opt.step()
    moves = [float((b - p.detach()).mean()) for b, p in zip(before, members(opt), strict=True)]
    assert moves == pytest.approx([0.25, 0.125], abs=1e-15)


def opaque(lr: float) -> fo.GradientTransformation:
    return fo.stateless(lambda updates, params: {k: -lr * u for k, u in updates.items()})


def parted(learning_rate: float) -> fo.GradientTransformation:
    return fo.partition({"a": fo.sgd(learning_rate), "b": fo.sgd(2 * learning_rate)}, lambda path, p: "a")


@pytest.mark.parametrize("function", [opaque, parted])
def test_a_rate_that_a_factory_takes_and_groups_do_not_show_is_warned_of(function: Any) -> None:
    cls = TransformOptimizer.factory(function)
    with pytest.warns(UserWarning, match=f"`lr` went to {function.__name__}.* is a factor, 1.0 at first") as caught:
        opt = cls(parameters(1), lr=0.25)
    assert [w.filename for w in caught] == [__file__]
    assert opt.param_groups[0]["lr"] == 1.0


def test_a_schedule_that_a_factory_takes_is_expected_to_stay_inside() -> None:
    opt = TransformOptimizer.factory(fo.sgd)(parameters(1), lr=fo.constant_schedule(0.25))  # warnings are errors
    assert opt.param_groups[0]["lr"] == 1.0


def test_what_schedulers_and_torch_keep_in_groups_is_no_name_of_an_option() -> None:
    """OneCycleLR writes `max_lr`, for one."""
    opt = TransformOptimizer(parameters(1), fo.chain(bounded(), fo.sgd(0.25)))
    group = opt.param_groups[0]
    assert (group["bounded_max_lr"], group["bounded_maximize"], group["maximize"]) == (0.5, 1.0, False)
    torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.25, total_steps=10, cycle_momentum=False)
    group["lr"] = 1.0
    assert moved(opt) == pytest.approx(0.5, abs=1e-15)


MISNAMED: dict[str, tuple[Callable[[], Any], str, Any, str]] = {
    "momentum of sgd": (lambda: fo.sgd(0.1, momentum=0.9), "momentum", 0.5, "'decay'"),
    "momentum of sgd beside an average": (
        lambda: fo.chain(fo.sgd(0.1, momentum=0.9), fo.params_ema(0.5)),
        "momentum",
        0.5,
        "'trace_decay'",
    ),
    "betas": (lambda: fo.adamw(0.1), "betas", (0.9, 0.99), "'b1' or 'b2'"),
    "betas of lion": (lambda: fo.lion(0.1), "betas", (0.9, 0.99), "'b1' or 'b2'"),
    "alpha": (lambda: fo.rmsprop(0.1), "alpha", 0.9, "'decay'"),
    "learning_rate": (lambda: fo.adamw(0.1), "learning_rate", 0.2, "'lr'"),
    "a name of two": (
        lambda: fo.chain(fo.ema(0.5), fo.sgd(0.1, momentum=0.5)),
        "decay",
        0.5,
        "'ema_decay' or 'trace_decay'",
    ),
    "decay of weights of two": (
        lambda: fo.chain(fo.add_decayed_weights(0.5), fo.adamw(0.1)),
        "weight_decay",
        0.0,
        "'add_decayed_weights_weight_decay' or 'add_decayed_weights_weight_decay_2'",
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", MISNAMED)
def test_a_name_that_means_an_option_and_is_not_its_name_is_refused(case: str, way: str) -> None:
    make, name, value, option = MISNAMED[case]
    with pytest.raises(ValueError, match=f"'{name}' is no option of this chain .* groups call it {re.escape(option)}"):
        WAYS[way](lambda params: TransformOptimizer(params, make()), {"params": parameters(), name: value})


def test_a_name_that_nothing_in_the_chain_is_meant_by_is_kept_with_a_warning() -> None:
    for name in ("momentum", "betas", "alpha", "weight_decay"):
        with pytest.warns(UserWarning, match=f"no transformation of the chain knows '{name}'") as caught:
            opt = TransformOptimizer([{"params": parameters(), name: 0.5}], fo.chain(fo.clip(1.0), fo.sgd(0.1)))
        assert [w.filename for w in caught] == [__file__]
        with pytest.warns(UserWarning, match=f"no transformation of the chain knows '{name}'") as caught:
            opt.add_param_group({"params": parameters(), name: 0.5})
        assert [w.filename for w in caught] == [__file__]
        assert [group[name] for group in opt.param_groups] == [0.5, 0.5]


def test_a_wrapper_that_keeps_the_arguments_in_groups_is_not_warned() -> None:
    """`ZeroRedundancyOptimizer(..., optimizer_class=TransformOptimizer, tx=tx)` does."""
    tx = fo.sgd(0.1)
    TransformOptimizer([{"params": parameters(), "tx": tx}], tx)  # warnings are errors


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.int64(1)], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("name", ["lr", "b1", "weight_decay"])
def test_numbers_of_numpy_in_a_group(name: str, value: Any) -> None:
    if name == "b1" and value == 1:
        with pytest.raises(ValueError, match=re.escape("`b1` of scale_by_adam must be in [0, 1)")):
            TransformOptimizer([{"params": parameters(), name: value}], fo.adamw(0.1))
        return
    opts = [TransformOptimizer([{"params": parameters(), name: x}], fo.adamw(0.1)) for x in (value, float(value))]
    train(opts, range(20))
    assert_same_bits(*map(content, opts))


# --- arguments that do not fit


@pytest.mark.parametrize("arguments", [{"lr": 0.1}, {"weight_decay": 0.1, "lr": 0.2}, {"foreach": True}])
def test_an_argument_that_belongs_elsewhere(arguments: dict[str, Any]) -> None:
    name = next(iter(arguments))
    with pytest.raises(TypeError, match=rf"unexpected argument '{name}'; numbers are given to the chain, or .*factory"):
        TransformOptimizer(parameters(), fo.adamw(0.1), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": "1e-3"}, "`lr` is str '1e-3', expected a number"),
        ({"lr": None}, "`lr` is NoneType None, expected a number"),
        ({"lr": [0.1]}, r"`lr` is list \[0.1\], expected a number"),
        ({"betas": ("0.9", 0.99)}, r"`betas\[0\]` is str '0.9', expected a number"),
        ({"betas": 0.9}, "`betas` is 0.9, expected a pair of numbers"),
        ({"betas": (0.9,)}, r"`betas` is \(0.9,\), expected a pair of numbers"),
        ({"betas": (0.9, 0.9, 0.9)}, "expected a pair of numbers"),
        ({"weight_decay": "0"}, "`weight_decay` is str '0', expected a number"),
        ({"eps": "1e-8"}, "`eps` is str '1e-8', expected a number"),
    ],
)
@pytest.mark.parametrize("cls", [Lion, LAMB])
def test_numbers_that_are_none(cls: Any, arguments: dict[str, Any], message: str) -> None:
    if "eps" in arguments and cls is Lion:
        pytest.skip("Lion has no eps")
    with pytest.raises(TypeError, match=message):
        cls(parameters(), **arguments)


@pytest.mark.parametrize("cls", [Lion, LAMB])
def test_numbers_of_numpy(cls: Any) -> None:
    given = {"lr": np.float64(0.25), "betas": [np.float64(0.5), np.float64(0.75)], "weight_decay": np.float64(0.5)}
    opts = [cls(parameters(), **given), cls(parameters(), lr=0.25, betas=(0.5, 0.75), weight_decay=0.5)]
    train(opts, range(20))
    assert_same_bits(*map(content, opts))


@pytest.mark.parametrize("long", [False, True])
def test_a_warning_about_a_mask_names_what_the_user_wrote_and_is_not_cut(long: bool) -> None:
    mask = "wieght" + "x" * (100 if long else 0)
    opt = TransformOptimizer(nn.Linear(2, 2).named_parameters(), fo.adamw(0.1, mask=mask))
    for p in members(opt):
        p.grad = torch.ones_like(p)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.step()
    [message] = [str(w.message) for w in caught]
    if long:
        assert re.fullmatch(
            r"the mask re\.compile\('wieghtx+ \.\.\. of add_decayed_weights\(\.\.\.\) matches .*", message
        )
    else:
        assert message == (
            "the mask re.compile('wieght') of add_decayed_weights(...) matches no parameter; there are weight, bias."
        )


def test_a_copy_of_an_optimizer_warns_as_the_optimizer_does() -> None:
    """Nothing of the construction is left behind."""
    opt = copy.deepcopy(TransformOptimizer(parameters(), fo.sgd(0.1)))
    with pytest.warns(UserWarning, match="knows 'wd'") as caught:
        opt.add_param_group({"params": parameters(), "wd": 0.5})
    assert [w.filename for w in caught] == [__file__]


def test_what_a_file_has_beyond_the_chain_is_warned_of_once_and_kept() -> None:
    opt = TransformOptimizer(parameters(3), fo.adamw(0.1))
    train([opt], range(2))
    saved = opt.state_dict()
    for state in saved["state"].values():
        state["more"] = torch.ones(1)
    with pytest.warns(
        UserWarning, match=r"has 'more', which the chain does not know, and 2 more are like it"
    ) as caught:
        opt.load_state_dict(saved)
    assert len(caught) == 1
    assert all(state["more"].item() == 1.0 for state in opt.state.values())


PATHS: dict[str, tuple[Any, bool]] = {
    "a function of the path": (lambda path, p: "bias" not in path, False),
    "an expression": (re.compile("^(?!.*bias)"), True),
    "an expression of anything": (re.compile(".*"), False),
    "the whole tree": (lambda tree: {k: p.ndim > 1 for k, p in tree.items()}, False),
    "a value": (True, False),
}


@pytest.mark.parametrize("case", PATHS)
def test_patterns_for_names_where_there_are_none_warn(case: str) -> None:
    """Once, and where parameters have names, or a function decides, not at all."""
    choice, asks = PATHS[case]
    chains = [fo.chain(fo.masked(fo.scale(2.0), choice), fo.scale(-1.0))]
    if callable(choice):
        chains += [fo.partition({True: fo.scale(-1.0), False: fo.scale(-2.0)}, choice)]
    for tx in chains:
        for named in (False, True):
            model = nn.Linear(2, 2)
            opt = TransformOptimizer(model.named_parameters() if named else model.parameters(), tx)
            model(torch.ones(1, 2)).sum().backward()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                opt.step()
                opt.step()
            assert ["named_parameters" in str(w.message) for w in caught] == [True] * (asks and not named)


@fo.leafwise(state={"mu": fo.zeros}, static=("soft",))
def whole(u: Any, mu: Any, *, beta: Any = 0.9, soft: bool = False) -> Any:
    return (torch.tanh(u) if soft else u), beta * mu + u


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("beta", "missing", KeyError, "lacks 'beta', which whole.beta is taken from; there are"),
        ("soft", "missing", KeyError, "lacks 'soft', a switch of the chain; there are"),
        ("beta", None, ValueError, "the option 'beta' is None, expected a number"),
    ],
)
def test_options_of_a_rule_for_whole_tensors_that_are_gone(name: str, value: Any, error: Any, message: str) -> None:
    p = torch.nn.Parameter(torch.ones(2, 2))
    opt = TransformOptimizer([p], fo.chain(whole(), fo.scale(-0.1)))
    p.grad = torch.ones(2, 2)
    opt.step()
    before = p.detach().clone()
    if value == "missing":
        del opt.param_groups[0][name]
    else:
        opt.param_groups[0][name] = value
    with pytest.raises(error, match=message):
        opt.step()
    assert torch.equal(p, before)


def test_a_factor_lr_stands_before_a_constraint_of_parameters() -> None:
    tx = fo.chain(fo.trace(0.0), fo.scale(-1.0), fo.keep_params_nonnegative())
    for lr, expected in ((3.0, 0.0), (0.1, 0.5)):
        p = torch.nn.Parameter(torch.ones(2))
        p.grad = torch.full((2,), 5.0)
        opt = TransformOptimizer([p], tx)
        opt.param_groups[0]["lr"] = lr
        opt.step()
        torch.testing.assert_close(p.data, torch.full((2,), expected))
