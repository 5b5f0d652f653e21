"""Options of chains and of classes: read at every step, by group, and refused out of their ranges."""

import math
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.compare import Snapshot, assert_same_bits
from _lib.optimizers import (
    content,
    give,
    gradients,
    make_params,
    params_of,
    train,
    twins,
)
from functional_optim import adapters
from functional_optim.adapters import AdamW, TransformOptimizer


OPTIONS: dict[str, dict[str, Any]] = {
    "lr": {"lr": 0.3},
    "lr as a tensor": {"lr": torch.tensor([[0.3]], dtype=torch.float64)},
    "weight_decay": {"weight_decay": 0.7},
    "b1": {"b1": 0.5},
    "b2": {"b2": 0.5},
    "eps": {"eps": 0.1},
    "max_norm": {"max_norm": 0.01},
    "a switch": {"nesterov": True},
}


ARGUMENTS = {"lr": 0.01, "weight_decay": 0.1, "b1": 0.9, "b2": 0.99, "eps": 1e-8, "max_norm": 1.0, "nesterov": False}


def options_chain(**given: Any) -> fo.GradientTransformation:
    o = {**ARGUMENTS, **given}
    adamw = fo.adamw(
        o["lr"], b1=o["b1"], b2=o["b2"], eps=o["eps"], weight_decay=o["weight_decay"], nesterov=o["nesterov"]
    )
    return fo.chain(fo.clip_by_global_norm(o["max_norm"]), adamw)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_change_of_an_option_of_a_chain_shows_in_the_next_step(option: str) -> None:
    """As if the chain had been made with it and had taken over the state."""
    params = make_params()
    opt = TransformOptimizer(params, options_chain())
    train([opt], range(3))
    plain = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in OPTIONS[option].items()}
    other = TransformOptimizer(twins(params), options_chain(**plain))
    other.load_state_dict({**other.state_dict(), "state": opt.state_dict()["state"]})

    opt.param_groups[0].update(OPTIONS[option])
    train([opt, other], range(3, 6))

    assert_same_bits(content(opt), content(other))


@pytest.mark.parametrize("option", [o for o in OPTIONS if o != "max_norm"])
def test_groups_override_every_option_as_optimizers_of_their_own_would(option: str) -> None:
    """Several groups are several optimizers, but for what looks at the whole tree, such as a global norm."""
    params = make_params()
    adamw = fo.adamw(0.01, b2=0.99, weight_decay=0.1)
    both = TransformOptimizer([{"params": params[:3]}, {"params": params[3:], **OPTIONS[option]}], adamw)
    copies = twins(params)
    parts = [
        TransformOptimizer(copies[:3], adamw),
        TransformOptimizer([{"params": copies[3:], **OPTIONS[option]}], adamw),
    ]
    for step in range(6):
        grads = gradients(params, step, missing=True)
        give(params, grads)
        give(copies, grads)
        for opt in (both, *parts):
            opt.step()

    assert_same_bits(content(both)["params"], [x for part in parts for x in content(part)["params"]])
    assert_same_bits(content(both)["state"], [x for part in parts for x in content(part)["state"]])


def test_a_global_norm_is_that_of_all_groups() -> None:
    params = make_params()
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.sgd(0.1))
    many = TransformOptimizer([{"params": [p]} for p in params], tx)
    one = TransformOptimizer(twins(params), tx)

    train([many, one], range(5), missing=True)

    assert_same_bits(content(many)["params"], content(one)["params"])


@fo.elementwise(state={"pace": fo.zeros})
def scale_by_pace(u: torch.Tensor, pace: torch.Tensor, *, drag: Any = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """A rule that nobody knows."""
    pace = drag * pace + u
    return pace, pace


def test_hyper_parameters_of_a_custom_rule_are_options_and_clashes_are_qualified() -> None:
    params = make_params()
    tx = fo.chain(scale_by_pace(0.5), scale_by_pace(drag=0.25), fo.scale_by_learning_rate(0.1))
    opt = TransformOptimizer(params, tx)
    assert [k for k in opt.param_groups[0] if "drag" in k] == ["scale_by_pace_drag", "scale_by_pace_drag_2"]
    opt.param_groups[0]["scale_by_pace_drag_2"] = 0.75
    other = TransformOptimizer(
        twins(params), fo.chain(scale_by_pace(0.5), scale_by_pace(0.75), fo.scale_by_learning_rate(0.1))
    )

    train([opt, other], range(4))

    assert_same_bits(content(opt), content(other))


def test_options_out_of_range_are_refused_at_construction_by_name() -> None:
    params = make_params()
    with pytest.raises(ValueError, match="b1"):
        TransformOptimizer([{"params": params, "b1": 1.5}], fo.adamw(0.1))
    opt = TransformOptimizer(params[:2], fo.adamw(0.1))
    with pytest.raises(ValueError, match="b2"):
        opt.add_param_group({"params": params[2:], "b2": -1.0})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("make", [AdamW, lambda p: TransformOptimizer(p, fo.adamw(0.1))])
def test_a_learning_rate_that_is_no_number_is_refused_and_nothing_changes(make: Any, lr: float) -> None:
    opt = make(make_params())
    train([opt], range(2))
    opt.param_groups[0]["lr"] = lr
    before = Snapshot(params_of(opt), [dict(s) for s in opt.state.values()])

    with pytest.raises(ValueError, match="lr of parameter group 0 is"):
        opt.step()

    before.check()


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [("lr", -0.1, "[0, inf)"), ("b1", 1.5, "[0, 1)"), ("params_ema_decay", -0.5, "[0, 1]"), ("b2", math.nan, "[0, 1)")],
)
def test_an_option_that_leaves_its_range_is_refused_by_the_next_step_and_nothing_changes(
    option: str, value: float, allowed: str
) -> None:
    params = make_params()
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    opt = TransformOptimizer(groups, fo.chain(fo.trace(0.9), fo.adamw(0.1), fo.params_ema(0.9)))
    train([opt], range(2))
    good, opt.param_groups[1][option] = opt.param_groups[1][option], value
    before = Snapshot(params_of(opt), [dict(s) for s in opt.state.values()])

    for _ in range(2):
        with pytest.raises(ValueError, match=f"{option!r} of parameter group 1") as caught:
            opt.step()
        for part in (repr(value), allowed):
            assert part in str(caught.value)
        before.check()

    opt.param_groups[1][option] = good
    opt.step()


# torch's classes go on with infinite parameters or NaN, or with an error of Python's arithmetic
UNFIT: list[tuple[str, str, Any, str]] = [
    ("AdamW", "betas", (1.0, 0.9), "beta parameter at index 0: 1.0 in parameter group 1"),
    ("Adam", "betas", [0.9, 1.5], "beta parameter at index 1: 1.5"),
    ("NAdam", "betas", (0.9, -0.1), "beta parameter at index 1: -0.1"),
    ("Adamax", "betas", (0.9, 0.99, 0.5), "'betas' of parameter group 1 .* two numbers"),
    ("Lion", "betas", (math.nan, 0.9), "beta parameter at index 0: nan"),
    ("RAdam", "eps", -1.0, "epsilon value: -1.0"),
    ("Adafactor", "eps", (None, -1.0), "epsilon value: -1.0"),
    ("Adadelta", "rho", 2.0, "rho value: 2.0"),
    ("LAMB", "weight_decay", math.nan, "weight_decay: nan"),
    ("Muon", "momentum", math.nan, "momentum: nan"),
]


@pytest.mark.parametrize(("name", "option", "value", "message"), UNFIT)
def test_an_option_of_a_class_with_which_there_is_no_step_is_refused_and_nothing_changes(
    name: str, option: str, value: Any, message: str
) -> None:
    params = [torch.nn.Parameter(torch.full((2, 2), x)) for x in (1.0, 2.0)]
    opt = getattr(adapters, name)([{"params": params[:1]}, {"params": params[1:]}])
    train([opt], range(2))
    good, opt.param_groups[1][option] = opt.param_groups[1][option], value
    before = Snapshot(params_of(opt), [dict(s) for s in opt.state.values()])

    with pytest.raises(ValueError, match=message):
        opt.step()

    before.check()
    opt.param_groups[1][option] = good
    opt.step()


def test_a_learning_rate_may_end_a_rounding_below_zero_or_be_negative_from_the_start() -> None:
    opt = TransformOptimizer(make_params(), fo.adamw(0.1))
    opt.param_groups[0]["lr"] = -1e-17
    train([opt], range(2))
    opt = TransformOptimizer(make_params(), fo.scale_by_learning_rate(-0.1, flip_sign=False))
    opt.param_groups[0]["lr"] = -0.05
    train([opt], range(2))


def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor() -> None:
    lr = torch.tensor(0.1)
    for opt in (AdamW(make_params(), lr=lr), TransformOptimizer([{"params": make_params(), "lr": lr}], fo.sgd(0.1))):
        train([opt], range(3))
        assert opt.param_groups[0]["lr"] is lr
    assert lr == 0.1


def test_an_option_that_a_group_is_given_later_and_nothing_knows_is_warned_of_once() -> None:
    opt = TransformOptimizer(make_params(), fo.adamw(0.1))
    train([opt], range(1))
    opt.param_groups[0]["weight_decya"] = 0.5
    with pytest.warns(
        UserWarning, match=r"knows 'weight_decya', which parameter group 0 has been given; there are 'b1'"
    ):
        train([opt], range(1))
    train([opt], range(2))
    torch.optim.lr_scheduler.StepLR(opt, 1)  # keeps an option of its own
    train([opt], range(2))


@pytest.mark.parametrize(
    ("tx", "name", "message"),
    [
        (fo.sgd(fo.linear_schedule(0.1, 0.0, 9)), "learning_rate", "'learning_rate' is a schedule of this chain"),
        (fo.adamw(0.1), "betas", "'betas' is no option of this chain and would do nothing; .* 'b1' or 'b2'"),
        (fo.adamw(0.1), "learning_rate", "'learning_rate' is no option of this chain"),
    ],
)
def test_a_name_that_does_nothing_is_refused_when_a_group_is_given_it(
    tx: fo.GradientTransformation, name: str, message: str
) -> None:
    opt = TransformOptimizer(make_params(), tx)
    train([opt], range(1))
    before = Snapshot(params_of(opt), [dict(s) for s in opt.state.values()])
    opt.param_groups[0][name] = 0.5
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"parameter group 0: {message}"):
            train([opt], range(1))
        before.check()
    del opt.param_groups[0][name]
    train([opt], range(1))


def test_a_file_with_a_number_in_the_place_of_a_schedule_is_loaded() -> None:
    opt = TransformOptimizer(make_params(), fo.adamw(1e-3, weight_decay=0.1))
    train([opt], range(2))
    other = TransformOptimizer(make_params(), fo.adamw(1e-3, weight_decay=lambda count: 0.1 * count))
    with pytest.warns(UserWarning, match="weight_decay"):
        other.load_state_dict(opt.state_dict())
    train([other], range(2))
