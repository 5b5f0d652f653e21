"""The contract of a third-party optimizer, item by item, where the other files here do not show it already.

Never wrong
- one class, one hooked layer: here (`is_an_optimizer`), test_hooks.py
- the numbers of torch's classes: test_against_torch.py, test_optim_db.py; of a chain: here (`same_bits_as_pure`)
- gradients untouched, None skipped, zero gradients are steps: test_against_torch.py; of a chain: here
- options are read at every step: test_edits_against_torch.py; of a chain: test_options.py
- a learning rate of zero and zero gradients change nothing: test_against_torch.py; of a chain: here
- files, counters, dtypes, flat states, no aliasing: test_loading.py
- groups replaced, emptied, reloaded: test_edits_against_torch.py
- several groups are several optimizers; groups added: test_options.py, test_edits_against_torch.py
- closures: test_against_torch.py; a chain that takes the loss: here
- pickle, deepcopy, partial states: test_loading.py, here
The ecosystem
- learning rates that are tensors: test_against_torch.py; their identity: test_options.py
- errors in torch's words, names of parameters: test_optim_db.py, test_loading.py
- hooks, zeroing, printing, profiling, freeing: test_hooks.py
- layouts, mixed dtypes, complex and sparse tensors: test_tensor_kinds.py, test_optim_db.py
- ascending, freezing: test_edits_against_torch.py
- other processes: here
- gradients through a step: here
- averages of parameters: here
"""

import copy
import functools
import inspect
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
