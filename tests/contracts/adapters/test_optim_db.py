"""torch's own table of optimizers, their arguments, schedulers and errors, run through our classes and torch's."""

import re
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    get_error_inputs_for_all_optims,
    optim_db,
)

from _lib.optimizers import (
    OURS,
    SHAPES,
    THEIRS,
    UNITS,
    assert_same,
    follow,
    gradients,
    make_params,
    options,
    params_of,
    train,
    twins,
)


INFOS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in OURS}
STEPS = 10


def inputs() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every configuration that torch lists: the optimizer, the description and the arguments."""
    for name, info in INFOS.items():
        for case in info.optim_inputs_func("cpu", torch.float64):
            yield name, case.desc, case.kwargs


def accepted(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether torch's constructor takes these arguments."""
    try:
        THEIRS[name](make_params(), **deepcopy(kwargs))
    except (ValueError, RuntimeError):
        return False
    return True


FLAGS: dict[str, dict[str, Any]] = {
    "": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "differentiable": {"differentiable": True},
    "capturable": {"capturable": True},
}
CASES = {
    f"{name}, {desc}{flag and ', ' + flag}": (name, kwargs, more)
    for name, desc, kwargs in inputs()
    for flag, more in FLAGS.items()
    if not (flag == "capturable" and not INFOS[name].has_capturable_arg)
    and not (flag == "fused" and not INFOS[name].supports_fused_on)
    and accepted(name, {**kwargs, **more})
}


def test_optim_db_has_every_class_and_flag() -> None:
    """Every class is there, with several configurations and with every flag."""
    assert INFOS.keys() == OURS.keys()
    assert len(list(inputs())) >= 65
    found = {(name, *more) for name, _, more in CASES.values()}
    assert {(name, "foreach") for name in OURS} <= found
    assert {(name, "fused") for name in ("SGD", "Adam", "AdamW", "Adagrad")} <= found
    assert {("Adam", "capturable"), ("NAdam", "capturable")} <= found


def leafless(params: list[Any]) -> list[torch.Tensor]:
    """Tensors that an optimizer which records its step can work on: they are not leaves."""
    return [p.clone() for p in params]


def make(cls: Any, kwargs: dict[str, Any]) -> torch.optim.Optimizer:
    params: list[Any] = make_params(shapes=SHAPES[:4])
    opt: torch.optim.Optimizer = cls(leafless(params) if kwargs.get("differentiable") else params, **deepcopy(kwargs))
    return opt


# A step that is recorded is made of torch's own operations, whose square root is not that of the fused kernel
KERNELS = [c for c, (name, _, more) in CASES.items() if INFOS[name].supports_fused_on and "differentiable" not in more]
# Without a square root, torch's plain loop rounds as ours does
LOOPS = [c for c, (name, _, _) in CASES.items() if name in ("Adamax", "ASGD", "Rprop")]


@pytest.mark.parametrize("case", [*KERNELS, *LOOPS])
def test_every_configuration_has_the_bits_of_the_fused_kernel_or_the_loop(case: str) -> None:
    """Whichever flag ours has."""
    name, kwargs, more = CASES[case]
    form = {"fused": True} if case in KERNELS else {"foreach": False}
    ours, theirs = make(OURS[name], {**kwargs, **more}), make(THEIRS[name], {**kwargs, **form})

    for step in range(STEPS):
        for opt in (ours, theirs):
            for p, g in zip(params_of(opt), gradients(params_of(opt), step), strict=True):
                p.grad = g
            opt.step()

    assert_same(ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_within_units_of_the_same_configuration_of_torch(case: str) -> None:
    """`capturable` on a CPU, which torch's constructors take and its steps refuse, is without effect in ours.

    With `differentiable`, torch corrects the biases of Adam in single precision; ours is as exact as it is without.
    """
    name, kwargs, more = CASES[case]
    theirs = {} if {"capturable", "differentiable"} & set(more) else more
    a, b = make(OURS[name], {**kwargs, **more}), make(THEIRS[name], {**kwargs, **theirs})

    with warnings.catch_warnings():
        # tensors that are not leaves have no `grad` unless it is put there, as it is here
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
        far = follow(a, b, range(4))

    assert max(far.values()) <= UNITS[name], far


SCHEDULED = {
    f"{name}, {k}, {desc}": (name, schedulers, kwargs)
    for name, info in INFOS.items()
    for k, schedulers in enumerate(info.scheduler_inputs)
    for desc, kwargs in [(c.desc, c.kwargs) for c in info.optim_inputs_func("cpu", torch.float64)][k % 3 :: 3]
}


def attach(schedulers: Any, opt: torch.optim.Optimizer) -> Callable[[float], None]:
    made = [scheduler(opt) for scheduler in schedulers]

    def step(loss: float) -> None:
        for scheduler in made:
            scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()

    return step


@pytest.mark.parametrize("case", SCHEDULED)
def test_schedulers_of_the_table_are_obeyed(case: str) -> None:
    """The same learning rates, and the same bits or, where torch has no fused form, a few units in every step."""
    name, schedulers, kwargs = SCHEDULED[case]
    fused = {"fused": True} if INFOS[name].supports_fused_on else {}
    ours, theirs = make(OURS[name], kwargs), make(THEIRS[name], {**kwargs, **fused})
    advance = [attach(schedulers, opt) for opt in (ours, theirs)]

    def after() -> None:
        for step in advance:
            step(1.0)  # a loss that does not fall, for ReduceLROnPlateau
        assert options(ours) == options(theirs)

    if fused:
        for step in range(STEPS):
            train([ours, theirs], [step])
            after()
        assert_same(ours, theirs)
    else:
        far = follow(ours, theirs, range(STEPS), after)
        assert max(far.values()) <= UNITS[name], far


# --- errors


def errors() -> Iterator[tuple[str, Any, Any]]:
    for name, info in INFOS.items():
        given = [*get_error_inputs_for_all_optims("cpu", torch.float32)]
        given += info.optim_error_inputs_func("cpu", torch.float32)
        for case in {c.optimizer_error_input.desc: c for c in given}.values():
            yield f"{name}, {case.optimizer_error_input.desc}", OURS[name], case
    for name in ("Lion", "LAMB"):
        import functional_optim.adapters

        for case in get_error_inputs_for_all_optims("cpu", torch.float32):
            yield f"{name}, {case.optimizer_error_input.desc}", getattr(functional_optim.adapters, name), case


ERRORS = {desc: (cls, case) for desc, cls, case in errors()}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_those_of_torch(case: str) -> None:
    cls, error = ERRORS[case]
    given = error.optimizer_error_input
    params = given.params
    if params is None:
        params = [torch.nn.Parameter(torch.randn(1))]
    assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    expect = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises

    with expect(error.error_type, match=error.error_regex):
        cls(params, **given.kwargs)


MORE_ERRORS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd lr": ("SGD", {"lr": -1.0}),
    "sgd decay": ("SGD", {"weight_decay": -1.0}),
    "sgd nesterov": ("SGD", {"nesterov": True}),
    "sgd nesterov, dampening": ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
    "sgd fused foreach": ("SGD", {"fused": True, "foreach": True}),
    "sgd fused differentiable": ("SGD", {"fused": True, "differentiable": True}),
    "adam lr": ("Adam", {"lr": -1.0}),
    "adam nan lr": ("Adam", {"lr": float("nan")}),
    "adam tensor lr": ("Adam", {"lr": torch.tensor(-1.0)}),
    "adam eps": ("Adam", {"eps": -1.0}),
    "adam beta": ("Adam", {"betas": (0.9, 1.0)}),
    "adam tensor betas": ("Adam", {"betas": (torch.ones(2) / 2, torch.tensor(0.5))}),
    "adam tensor beta 2": ("Adam", {"betas": (torch.tensor(0.5), torch.ones(2) / 2)}),
    "adam fused foreach": ("Adam", {"fused": True, "foreach": True}),
    "adam fused differentiable": ("Adam", {"fused": True, "differentiable": True}),
    "adamw decay": ("AdamW", {"weight_decay": -0.1}),
    "adamw fused foreach": ("AdamW", {"fused": True, "foreach": True}),
    "adamw decoupled": ("AdamW", {"decoupled_weight_decay": True}),
    "rmsprop lr": ("RMSprop", {"lr": -1.0}),
    "rmsprop eps": ("RMSprop", {"eps": -1.0}),
    "rmsprop alpha": ("RMSprop", {"alpha": -1.0}),
    "rmsprop decay": ("RMSprop", {"weight_decay": -1.0}),
    "nadam eps": ("NAdam", {"eps": -1.0}),
    "nadam beta": ("NAdam", {"betas": (0.9, 1.0)}),
    "radam beta": ("RAdam", {"betas": (0.9, 1.0)}),
    "adamax decay": ("Adamax", {"weight_decay": -0.1}),
    "adagrad sum": ("Adagrad", {"initial_accumulator_value": -0.1}),
    "adagrad eps": ("Adagrad", {"eps": -0.1}),
    "adagrad fused foreach": ("Adagrad", {"fused": True, "foreach": True}),
    "adagrad fused differentiable": ("Adagrad", {"fused": True, "differentiable": True}),
    "adadelta eps": ("Adadelta", {"eps": -0.1}),
    "asgd lr": ("ASGD", {"lr": torch.tensor([0.1, 0.1])}),
    "rprop etas": ("Rprop", {"etas": (0.5, 0.9)}),
    "rprop lr": ("Rprop", {"lr": -1.0}),
    "unknown argument": ("AdamW", {"beta1": 0.9}),
}


@pytest.mark.parametrize("case", MORE_ERRORS)
def test_errors_that_the_table_lacks_are_those_of_torch(case: str) -> None:
    name, kwargs = MORE_ERRORS[case]
    with pytest.raises((ValueError, RuntimeError, TypeError)) as theirs:
        THEIRS[name]([torch.nn.Parameter(torch.ones(1))], **kwargs)

    with pytest.raises(theirs.type, match=re.escape(str(theirs.value))):
        OURS[name]([torch.nn.Parameter(torch.ones(1))], **kwargs)


PARAMS_ERRORS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: [],
    "not a tensor": lambda: [1],
    "not a leaf": lambda: [torch.ones(1, requires_grad=True) * 2],
    "no params key": lambda: [{"lr": 0.1}],
    "a set in a group": lambda: [{"params": {torch.nn.Parameter(torch.ones(1))}}],
}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("case", PARAMS_ERRORS)
def test_errors_of_parameters_are_those_of_torch(case: str, name: str) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)) as theirs:
        THEIRS[name](PARAMS_ERRORS[case]())

    with pytest.raises(theirs.type, match=re.escape(str(theirs.value))):
        OURS[name](PARAMS_ERRORS[case]())


@pytest.mark.parametrize("name", [name for name in OURS if name not in ("SGD", "Adagrad")])
def test_sparse_gradients_are_refused_as_in_torch(name: str) -> None:
    [p] = make_params(shapes=((4, 2),))
    for classes in (THEIRS, OURS):
        [copy] = twins([p])
        copy.grad = torch.eye(4, 2, dtype=torch.float64).to_sparse()
        opt = classes[name]([copy])
        with pytest.raises(RuntimeError, match=r"^\w+ does not support sparse gradients"):
            opt.step()
        torch.testing.assert_close(copy, p, rtol=0, atol=0)
        if classes is OURS:
            assert not opt.state


DENSE: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
]


@pytest.mark.parametrize(("name", "kwargs"), DENSE, ids=str)
def test_sparse_gradients_are_as_good_as_dense_ones(name: str, kwargs: dict[str, Any]) -> None:
    [p] = make_params(shapes=((8, 2),))
    [q] = twins([p])
    ours, theirs = OURS[name]([p], lr=0.1, **kwargs), THEIRS[name]([q], lr=0.1, **kwargs)
    for step in range(4):
        [g] = gradients([p], step)
        assert g is not None
        p.grad = (g * (torch.arange(8)[:, None] % 3 == step % 3)).to_sparse(1)
        q.grad = p.grad.to_dense()
        ours.step()
        theirs.step()

    assert_same(ours, theirs)
