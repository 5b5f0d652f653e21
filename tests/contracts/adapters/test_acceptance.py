"""The contract of a third-party optimizer, item by item, where the other files here do not show it already.

Never wrong
- one class, one hooked layer: here (`is_an_optimizer`), test_hooks.py
- the numbers of torch's classes: test_against_torch.py, test_optim_db.py; of a chain: here (`same_bits_as_pure`)
- gradients untouched, None skipped, zero gradients are steps: test_against_torch.py; of a chain: here
- options are read at every step: test_against_torch.py; of a chain: here
- a learning rate of zero and zero gradients change nothing: test_against_torch.py; of a chain: here
- files, counters, dtypes, flat states, no aliasing: test_loading.py
- groups replaced, emptied, reloaded: test_against_torch.py
- several groups are several optimizers; groups added: here, test_against_torch.py
- closures: test_against_torch.py; a chain that takes the loss: here
- pickle, deepcopy, partial states: test_loading.py, here
The ecosystem
- learning rates that are tensors: test_against_torch.py; their identity: here
- errors in torch's words, names of parameters: test_optim_db.py, test_loading.py
- hooks, zeroing, printing, profiling, freeing: test_hooks.py
- layouts, mixed dtypes, complex and sparse tensors: here, test_optim_db.py
- ascending, freezing: test_against_torch.py
- other processes: here
- gradients through a step: here
- averages of parameters: here
"""

import copy
import functools
import inspect
import math
import pickle
import warnings
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import functional_optim as fo
from _lib.chains import is_matrix
from _lib.compare import Snapshot, assert_same_bits
from _lib.optimizers import (
    NUMBERS,
    OURS,
    SHAPES,
    content,
    fitting,
    give,
    gradients,
    make_params,
    params_of,
    train,
    twins,
)
from _lib.processes import forks
from functional_optim import adapters
from functional_optim.adapters import LAMB, SGD, AdamW, ChainOptimizer, Lion, TransformOptimizer


STEPS = 20
CHAINS: dict[str, Callable[[], fo.GradientTransformation]] = {
    "sgd": lambda: fo.sgd(0.1, momentum=0.9, nesterov=True),
    "clip, AdamW and average": lambda: fo.chain(
        fo.clip_by_global_norm(1.0), fo.adamw(1e-2, weight_decay=0.1, mask=is_matrix), fo.params_ema(0.9)
    ),
    "lamb": lambda: fo.lamb(1e-2, weight_decay=0.1),
    "schedule": lambda: fo.chain(fo.scale_by_adam(), fo.scale_by_learning_rate(fo.linear_schedule(0.1, 0.0, 30))),
    "schedule of Python": lambda: fo.sgd(lambda count: [0.1, 0.2][int(count) % 2]),
    "partition": lambda: fo.partition({True: fo.adam(1e-2), False: fo.sgd(0.1, 0.9)}, is_matrix),
    "named": lambda: fo.named_chain(("moments", fo.scale_by_adam()), ("rate", fo.scale_by_learning_rate(0.1))),
}


def names(count: int) -> list[str]:
    return [f"p{k}" for k in range(count)]


def over(tx: fo.GradientTransformation, params: list[Any], **kwargs: Any) -> TransformOptimizer:
    """An optimizer over parameters with the names that the pure chain sees."""
    return TransformOptimizer(list(zip(names(len(params)), params, strict=True)), tx, **kwargs)


@pytest.mark.parametrize("cls", [*OURS.values(), Lion, LAMB, TransformOptimizer])
def test_each_class_is_an_optimizer_with_one_step_of_its_own(cls: type) -> None:
    assert issubclass(cls, torch.optim.Optimizer)
    assert inspect.unwrap(cls.step) is inspect.unwrap(ChainOptimizer.step)  # torch wraps it where it is first used
    for forbidden in ("__slots__", "__len__", "__bool__", "__eq__", "train", "eval"):
        assert not any(forbidden in vars(c) for c in cls.__mro__ if c.__module__.startswith("functional_optim"))


@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_has_the_same_bits_as_its_pure_form(chain: str) -> None:
    """The counter of a parameter is that of the tree while every parameter has a gradient at every step."""
    params = make_params()
    tree: Any = {n: p.detach().clone() for n, p in zip(names(len(params)), params, strict=True)}
    opt, tx = over(CHAINS[chain](), params), CHAINS[chain]()
    state = tx.init(tree)
    for step in range(20):
        grads = gradients(params, step)
        give(params, grads)
        opt.step()
        tree, state = fo.apply_gradients(tx, tree, dict(zip(tree, grads, strict=True)), state)

    assert_same_bits([p.detach() for p in params], list(tree.values()))


@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_never_writes_gradients_and_skips_those_that_are_missing(chain: str) -> None:
    params = make_params()
    opt = over(CHAINS[chain](), params)
    train([opt], range(2))
    give(params, gradients(params, 2))
    params[1].grad = None
    held, before = Snapshot([p.grad for p in params]), content(opt)

    opt.step()

    held.check()
    after = content(opt)
    assert_same_bits(after["params"][1], before["params"][1])
    assert_same_bits(after["state"][1], before["state"][1])


@pytest.mark.parametrize("chain", [c for c in CHAINS if c not in ("sgd", "lamb")])
def test_a_chain_with_no_learning_rate_and_zero_gradients_changes_no_parameter(chain: str) -> None:
    """The dry step of checkpoint code, on a fresh optimizer; `lr` is a factor where the rate is a schedule."""
    params = make_params()
    before = [p.detach().clone() for p in params]
    opt = over(CHAINS[chain](), params)
    for group in opt.param_groups:
        group["lr" if "lr" in group else next(k for k in group if k.endswith("lr"))] = 0.0
        for key in [k for k in group if k.endswith("lr")]:
            group[key] = torch.tensor(0.0)
    give(params, [torch.zeros_like(p) for p in params])

    opt.step()

    assert_same_bits([p.detach() for p in params], before)


@pytest.mark.parametrize("name", OURS)
def test_a_warmup_that_begins_with_zeros_is_that_of_torch(name: str) -> None:
    """A first step at a learning rate of 0, with gradients of zeros, counts like any other."""
    options: dict[str, Any] = {"momentum": 0.9} if name == "SGD" else {}
    options |= fitting(name, lr=0.0, weight_decay=0.1)
    ours = getattr(adapters, name)(make_params(), **options)
    theirs = getattr(torch.optim, name)(make_params(), **options)
    for step in range(STEPS):
        for opt in (ours, theirs):
            params = params_of(opt)
            give(params, [g * min(step, 1) for g in gradients(params, step)])
            opt.param_groups[0]["lr"] = 0.01 * step
            opt.step()
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=1e-12 if p.dtype is torch.float64 else 1e-6)
        assert float(ours.state[p].get("step", 0)) == float(theirs.state[q].get("step", 0))


@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_each_step_of_a_chain_without_state_is_taken(lr: float) -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = TransformOptimizer([p], fo.chain(fo.scale_by_learning_rate(lr), fo.add_decayed_weights(0.01)))
    p.grad = torch.zeros_like(p)
    for _ in range(STEPS):
        opt.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, 1.01**STEPS), rtol=1e-13, atol=0.0)


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


def test_the_loss_of_a_closure_reaches_rules_that_ask_for_it() -> None:
    from _lib.chains import scale_by_value

    tx = fo.chain(scale_by_value(), fo.sgd(0.1))
    [p] = make_params(shapes=SHAPES[:1])
    opt = TransformOptimizer([p], tx)
    before = p.detach().clone()
    p.grad = torch.ones_like(p)

    opt.step(lambda: torch.tensor(2.0))
    torch.testing.assert_close(p.detach(), before - 0.2, rtol=1e-15, atol=1e-15)  # two roundings
    opt.step(value=0.0)
    torch.testing.assert_close(p.detach(), before - 0.2, rtol=1e-15, atol=1e-15)
    with pytest.raises(TypeError, match="value"):
        opt.step()


@pytest.mark.parametrize("keys", [("state", "param_groups"), ("param_groups",)])
def test_a_partial_state_can_be_set(keys: tuple[str, ...]) -> None:
    """torch sets some attributes alone; the chain and the defaults stay."""
    opt = TransformOptimizer(make_params(), fo.adamw(0.1))
    train([opt], range(2))
    opt.__setstate__({k: getattr(opt, k) for k in keys})
    train([opt], range(2, 3))
    assert opt.state[params_of(opt)[0]]["step"] == 3


def test_public_attributes_survive_a_deep_copy() -> None:
    for opt in (AdamW(make_params()), TransformOptimizer(make_params(), fo.adamw(0.1))):
        train([opt], range(1))
        new = copy.deepcopy(opt)
        assert {k for k in vars(opt) if not k.startswith("_")} <= set(vars(new))


# --- kinds of tensors


LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "a column of a matrix": lambda: torch.arange(12.0, dtype=torch.float64).reshape(4, 3)[:, 1],
    "every other column": lambda: torch.arange(24.0, dtype=torch.float64).reshape(4, 6)[:, ::2],
    "transposed": lambda: torch.arange(12.0, dtype=torch.float64).reshape(4, 3).t(),
    "channels last": lambda: (
        torch.arange(48.0, dtype=torch.float64).reshape(2, 3, 2, 4).to(memory_format=torch.channels_last)
    ),
    "a number": lambda: torch.tensor(2.0, dtype=torch.float64),
    "empty": lambda: torch.zeros(0, 3, dtype=torch.float64),
    "one element": lambda: torch.ones(1, 1, dtype=torch.float64),
}


@pytest.mark.parametrize("other_grad", [False, True], ids=["same layout", "contiguous gradient"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OURS)
def test_layouts_are_kept_and_make_no_difference(name: str, layout: str, other_grad: bool) -> None:
    """The state is laid out as torch's; what surrounds a slice stays as it is."""
    p = torch.nn.Parameter(LAYOUTS[layout]())
    flat = torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
    opt, plain = OURS[name]([p], lr=0.1), OURS[name]([flat], lr=0.1)
    for step in range(4):
        [g] = gradients([flat], step)
        assert g is not None
        flat.grad = g
        p.grad = g.clone() if other_grad else torch.empty_like(p, requires_grad=False).copy_(g)
        opt.step()
        plain.step()

    assert_same_bits(content(opt), content(plain))
    for key, x in opt.state[p].items():
        assert key in NUMBERS or x.stride() == torch.zeros_like(p).stride()


@pytest.mark.parametrize("name", OURS)
def test_dtypes_mix_in_one_group(name: str) -> None:
    """Each parameter does what it would do alone."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    params = [make_params(dtype, SHAPES[:1], seed=k)[0] for k, dtype in enumerate(dtypes)]
    both, alone = OURS[name](params, lr=0.01), [OURS[name]([p], lr=0.01) for p in twins(params)]
    for step in range(5):
        grads = gradients(params, step)
        give(params, grads)
        give([params_of(o)[0] for o in alone], grads)
        for opt in (both, *alone):
            opt.step()

    assert_same_bits(content(both)["params"], [content(o)["params"][0] for o in alone])
    assert_same_bits(content(both)["state"], [content(o)["state"][0] for o in alone])


@pytest.mark.parametrize("kwargs", [{}, {"weight_decay": 0.1, "maximize": True}], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_complex_parameters_are_pairs_of_real_ones(name: str, kwargs: dict[str, Any]) -> None:
    """As in torch; states of both are complex or real as the parameter is."""
    generator = torch.Generator().manual_seed(0)
    z = torch.nn.Parameter(torch.randn(8, 2, generator=generator, dtype=torch.complex128))
    x = torch.nn.Parameter(torch.view_as_real(z.detach()).clone())
    real = make_params(shapes=SHAPES[:1])
    kwargs = fitting(name, **kwargs)
    opt, pairs = OURS[name]([z, *real], lr=0.01, **kwargs), OURS[name]([x, *twins(real)], lr=0.01, **kwargs)
    for step in range(5):
        g = torch.randn(8, 2, generator=generator, dtype=torch.complex128)
        rest = gradients(real, step)
        give([z, *real], [g, *rest])
        give(params_of(pairs), [torch.view_as_real(g), *rest])
        opt.step()
        pairs.step()

    assert_same_bits(torch.view_as_real(z.detach()), x.detach())
    for key, value in opt.state[z].items():
        assert_same_bits(torch.view_as_real(value) if value.is_complex() else value, pairs.state[x][key])
        assert value.is_complex() == (key not in NUMBERS)


def test_parameters_on_meta_are_refused_at_the_step() -> None:
    """They have no numbers to change; materialised ones step."""
    module = torch.nn.Linear(3, 2, device="meta")
    opt = AdamW(module.parameters(), lr=0.1)
    for p in module.parameters():
        p.grad = torch.empty_like(p)
    with pytest.raises((ValueError, RuntimeError), match="meta"):
        opt.step()
    assert not opt.state


def test_parameters_made_on_meta_step_once_they_are_real() -> None:
    module = torch.nn.Linear(3, 2, device="meta")
    opt = AdamW(module.parameters(), lr=0.1)
    module.to_empty(device="cpu")
    torch.nn.init.ones_(module.weight)
    torch.nn.init.zeros_(module.bias)
    opt.param_groups[0]["params"] = list(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    opt.step()
    # the first step of Adam is lr long, after a decay of lr times 0.01; 1e-6: float32 and eps
    torch.testing.assert_close(module.weight.detach(), torch.full((2, 3), 0.899), rtol=0, atol=1e-6)


def test_a_state_that_does_not_fit_its_parameter_is_refused_by_name_and_nothing_changes() -> None:
    model = torch.nn.Linear(3, 2)
    opt = AdamW(model.named_parameters())
    give(list(model.parameters()), gradients(model.parameters(), 0))
    opt.step()
    opt.state[model.bias]["exp_avg"] = torch.zeros(5)
    before = Snapshot(list(model.parameters()), [dict(s) for s in opt.state.values()])

    with pytest.raises(ValueError, match=r"exp_avg.*bias|bias.*exp_avg"):
        opt.step()

    before.check()


def test_a_failed_first_step_leaves_no_state() -> None:
    params = make_params(shapes=SHAPES[:2])
    opt = AdamW(params)
    give(params, gradients(params, 0))
    params[1].grad = torch.zeros_like(params[1]).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert not opt.state


# --- other processes


def _child(opt: torch.optim.Optimizer, queue: Any) -> None:
    train([opt], range(2, 4))
    queue.put([p.detach().tolist() for p in params_of(opt)])


@pytest.mark.slow
@pytest.mark.integration
def test_an_optimizer_goes_to_another_process_and_steps_there() -> None:
    params = make_params(shapes=SHAPES[:2])
    opt = TransformOptimizer(params, fo.chain(fo.clip(1.0), fo.adamw(0.1)))
    train([opt], range(2))
    context = forks()
    queue = context.Queue()
    sent = pickle.loads(pickle.dumps(opt))  # memory of its own: torch shares what goes to another process
    process = context.Process(target=_child, args=(sent, queue))
    process.start()
    result = queue.get(timeout=120)
    process.join()
    assert ForkingPickler.dumps(opt)

    train([opt], range(2, 4))

    assert result == [p.detach().tolist() for p in params]


# --- gradients through a step

LATER = ("NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "ASGD", "Rprop")


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, differentiable=True),
        lambda p: OURS["Adam"](p, lr=0.1, weight_decay=0.1, amsgrad=True, differentiable=True),
        lambda p: AdamW(p, lr=0.1, differentiable=True),
        lambda p: OURS["RMSprop"](p, lr=0.1, momentum=0.9, centered=True, differentiable=True),
        *(functools.partial(OURS[name], lr=0.1, differentiable=True) for name in LATER),
        lambda p: Lion(p, lr=0.1, weight_decay=0.1, differentiable=True),
        lambda p: TransformOptimizer(p, fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1)), differentiable=True),
    ],
    ids=["SGD", "Adam", "AdamW", "RMSprop", *LATER, "Lion", "chain"],
)
def test_a_recorded_step_has_the_derivative_of_finite_differences(make: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q, g = (torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))

    def two_steps(p: torch.Tensor, q: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
        params = [p.clone(), q.clone()]
        opt = make(params)
        for k in range(2):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
                for j, x in enumerate(params):
                    x.grad = g * (1 + k + j)
            opt.step()
        return tuple(params)

    assert torch.autograd.gradcheck(two_steps, (p, q, g))


def test_a_recorded_step_refuses_leaves_as_torch_does() -> None:
    params = make_params(shapes=SHAPES[:1])
    opt = AdamW(params, differentiable=True)
    give(params, gradients(params, 0))
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        opt.step()


# --- averages


def test_averages_are_swapped_in_and_out_to_the_bit() -> None:
    params = make_params()
    opt = TransformOptimizer(params, fo.chain(fo.adamw(0.1), fo.params_ema(0.5)))
    train([opt], range(3))
    before, averages = content(opt), [opt.state[p]["ema"].clone() for p in params]

    with opt.averaged_params():
        assert_same_bits([p.detach() for p in params], averages)
        with pytest.raises(RuntimeError, match="averaged_params"):
            opt.step()
    assert_same_bits(content(opt), before)
    with pytest.raises(ZeroDivisionError), opt.averaged_params():
        raise ZeroDivisionError
    assert_same_bits(content(opt), before)


def test_averages_are_missing_before_a_step_and_without_the_transformation() -> None:
    for tx in (fo.chain(fo.sgd(0.1), fo.params_ema(0.5)), fo.chain(fo.trace(0.5), fo.ema(0.5), fo.scale(-0.1))):
        opt = TransformOptimizer(make_params(), tx)
        if "params_ema" not in repr(tx):
            train([opt], range(1))
        with pytest.raises(ValueError, match="there are no averaged parameters"), opt.averaged_params():
            pass


def test_an_averaged_model_beside_ours_equals_the_average_of_the_chain() -> None:
    """`AveragedModel` starts with a copy after the first step, the chain with the parameters before it."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4).double()
    opt = AdamW(model.parameters(), lr=0.1)
    averaged = AveragedModel(model)
    history = []
    for step in range(4):
        give(list(model.parameters()), gradients(model.parameters(), step))
        opt.step()
        averaged.update_parameters(model)
        history.append(model.weight.detach().clone())

    # a running mean of four numbers of order one: a rounding in each step
    torch.testing.assert_close(averaged.module.weight.detach(), torch.stack(history).mean(0), rtol=1e-14, atol=1e-15)


def test_one_launch_serves_any_number_of_groups() -> None:
    """Two hundred groups with their own rates give the bits of one group each rate."""
    shapes = ((16,),) * 60
    rates = [0.1 / (k + 1) for k in range(60)]
    params = make_params(shapes=shapes)
    many = AdamW([{"params": [p], "lr": lr} for p, lr in zip(params, rates, strict=True)])
    one = torch.optim.AdamW([{"params": [p], "lr": lr} for p, lr in zip(twins(params), rates, strict=True)], fused=True)

    train([many, one], range(3))

    assert_same_bits(content(many), content(one))


@pytest.mark.parametrize("cls", [Lion, LAMB])
def test_classes_that_torch_lacks_equal_their_chains(cls: Any) -> None:
    params = make_params()
    opt = cls(params, lr=0.01, weight_decay=0.1)
    tx = fo.lion(0.01, b1=0.9, b2=0.99, weight_decay=0.1) if cls is Lion else fo.lamb(0.01, weight_decay=0.1)
    chain = TransformOptimizer(twins(params), tx)

    train([opt, chain], range(10), missing=True)

    assert_same_bits(content(opt)["params"], content(chain)["params"])


def test_threads_make_no_difference() -> None:
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            opt = TransformOptimizer(make_params(), fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1)))
            train([opt], range(5))
            results.append(content(opt))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])
