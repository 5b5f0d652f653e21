"""Drop-in classes beside torch's: the bits of its fused kernels, or of its loop where no root is in it, or units."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from _lib.compare import assert_same_bits, ulps
from _lib.optimizers import (
    NUMBERS,
    OURS,
    SHAPES,
    THEIRS,
    UNITS,
    assert_same,
    content,
    copy_to,
    distances,
    fitting,
    follow,
    give,
    gradients,
    make_params,
    options,
    pair,
    params_of,
    train,
    twins,
)
from _lib.records import use


STEPS = 24
FUSED = {"fused": True}

# The form of torch that rounds as ours: its fused kernel, or its loop where that has no square root
ROUNDED: dict[str, dict[str, Any]] = {"Adamax": {}, "ASGD": {}, "Rprop": {}} | dict.fromkeys(
    ("SGD", "Adam", "AdamW", "Adagrad"), FUSED
)
# Arguments that these forms take
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {}),
    "sgd, decay": ("SGD", {"lr": 0.02, "weight_decay": 0.1}),
    "sgd, momentum": ("SGD", {"lr": 0.01, "momentum": 0.9}),
    "sgd, dampening": ("SGD", {"lr": 0.01, "momentum": 0.9, "dampening": 0.3}),
    "sgd, dampening and decay": ("SGD", {"lr": 0.01, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "sgd, nesterov": ("SGD", {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    "sgd, maximize": ("SGD", {"lr": 0.01, "momentum": 0.5, "nesterov": True, "weight_decay": 0.1, "maximize": True}),
    "sgd, tensor lr": ("SGD", {"lr": torch.tensor(0.01), "momentum": 0.9}),
    "sgd, tensor lr (1,)": ("SGD", {"lr": torch.tensor([0.01]), "weight_decay": 0.1}),
    "sgd, tensor lr (1, 1)": ("SGD", {"lr": torch.tensor([[0.01]], dtype=torch.float64)}),
    "adam": ("Adam", {}),
    "adam, betas and eps": ("Adam", {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3}),
    "adam, no betas": ("Adam", {"lr": 0.02, "betas": (0.0, 0.0), "eps": 1e-3}),
    "adam, decay": ("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    "adam, decoupled": ("Adam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adam, amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True}),
    "adam, maximize": ("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    "adam, tensor lr": ("Adam", {"lr": torch.tensor(0.01), "weight_decay": 0.1}),
    "adam, tensor lr (1,)": ("Adam", {"lr": torch.tensor([0.01])}),
    "adam, tensor lr (1, 1)": ("Adam", {"lr": torch.tensor([[0.01]]), "amsgrad": True}),
    "adam, tensor betas": ("Adam", {"lr": 0.01, "betas": (torch.tensor([[0.9]]), torch.tensor(0.99))}),
    "adamw": ("AdamW", {"lr": 0.01}),
    "adamw, no decay": ("AdamW", {"lr": 0.01, "weight_decay": 0.0}),
    "adamw, amsgrad": ("AdamW", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "adamw, maximize": ("AdamW", {"lr": 0.01, "maximize": True, "weight_decay": 0.1}),
    "adamw, tensor lr": ("AdamW", {"lr": torch.tensor(0.01, dtype=torch.float64)}),
    "adamw, tensor lr (1, 1)": ("AdamW", {"lr": torch.tensor([[0.01]]), "betas": (0.8, 0.99), "eps": 1e-5}),
    "adagrad": ("Adagrad", {}),
    "adagrad, decays": ("Adagrad", {"lr": 0.1, "lr_decay": 0.5, "weight_decay": 0.1, "initial_accumulator_value": 0.1}),
    "adagrad, maximize": ("Adagrad", {"lr": 0.1, "maximize": True, "eps": 1e-3}),
    "adagrad, tensor lr": ("Adagrad", {"lr": torch.tensor([0.1], dtype=torch.float64)}),
    "adamax": ("Adamax", {}),
    "adamax, maximize": ("Adamax", {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1, "maximize": True}),
    "asgd": ("ASGD", {"lr": 0.1}),
    "asgd, average": ("ASGD", {"lr": 0.1, "lambd": 0.1, "alpha": 0.5, "t0": 3, "weight_decay": 0.1}),
    "asgd, maximize": ("ASGD", {"lambd": 0.1, "t0": 8, "maximize": True}),
    "rprop": ("Rprop", {}),
    "rprop, sizes": ("Rprop", {"lr": 0.1, "etas": (0.3, 1.7), "step_sizes": (0.05, 0.4), "maximize": True}),
    "rprop, tensor lr": ("Rprop", {"lr": torch.tensor([0.1])}),
}
LOOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "rmsprop": ("RMSprop", {}),
    "rmsprop, alpha and eps": ("RMSprop", {"alpha": 0.9, "eps": 1e-3}),
    "rmsprop, decay": ("RMSprop", {"weight_decay": 0.1}),
    "rmsprop, momentum": ("RMSprop", {"momentum": 0.9}),
    "rmsprop, centered": ("RMSprop", {"centered": True, "weight_decay": 0.1, "momentum": 0.1}),
    "rmsprop, maximize": ("RMSprop", {"maximize": True, "centered": True}),
    "rmsprop, tensor lr": ("RMSprop", {"lr": torch.tensor([0.01])}),
    "nadam": ("NAdam", {}),
    "nadam, decays": ("NAdam", {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1, "momentum_decay": 0.1}),
    "nadam, decoupled": ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}),
    "radam": ("RAdam", {}),
    "radam, decay": ("RAdam", {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
    "radam, decoupled": ("RAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adadelta": ("Adadelta", {}),
    "adadelta, decay": ("Adadelta", {"lr": 0.5, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
}
ANY = EXACT | LOOPS
FEW = [  # of each kind of state one
    "sgd, decay",
    "sgd, maximize",
    "sgd, dampening and decay",
    "adam, maximize",
    "adam, tensor lr",
    "adamw",
    "adamw, amsgrad",
    "adagrad, decays",
    "adamax, maximize",
    "asgd, average",
    "rprop, sizes",
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", EXACT)
def test_fused_kernels_and_loops_without_roots_have_the_same_bits(case: str, dtype: torch.dtype) -> None:
    name, kwargs = EXACT[case]
    ours, theirs = pair(name, dtype, theirs=ROUNDED[name], **kwargs)

    train([ours, theirs], range(STEPS), missing=True)

    assert_same(ours, theirs)
    assert options(ours) == options(theirs)


GROUPS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        {"nesterov": True, "momentum": 0.5},
        {"maximize": True},
        {"lr": torch.tensor(0.01)},
    ],
    "Adam": [
        {"lr": 0.1, "betas": (0.5, 0.9)},
        {"weight_decay": 0.1, "eps": 1e-3},
        {"amsgrad": True, "decoupled_weight_decay": True},
        {"maximize": True, "lr": torch.tensor([0.02])},
    ],
    "AdamW": [
        {"lr": 0.1, "betas": (0.5, 0.9)},
        {"weight_decay": 0.0},
        {"amsgrad": True, "weight_decay": 0.5},
        {},
    ],
    # the first value of the sum is the optimizer's, not a group's
    "Adagrad": [{"lr": 0.1, "lr_decay": 0.5}, {"weight_decay": 0.1}, {"initial_accumulator_value": 0.5}],
    "Adamax": [{"lr": 0.1, "betas": (0.5, 0.9)}, {"weight_decay": 0.1, "eps": 1e-3}, {"maximize": True}],
    "ASGD": [{"lr": 0.1, "lambd": 0.1}, {"t0": 3, "alpha": 0.5}, {"maximize": True, "weight_decay": 0.1}],
    "Rprop": [{"lr": 0.1}, {"etas": (0.3, 1.7)}, {"step_sizes": (0.005, 0.02), "maximize": True}],
}


def split(rows: list[dict[str, Any]]) -> Callable[[list[Any]], Any]:
    """Parameter groups with their own options; the last one is empty."""
    return lambda params: [
        *({"params": params[k :: len(rows)], **row} for k, row in enumerate(rows)),
        {"params": []},
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_groups_with_their_own_options_have_the_same_bits(name: str, dtype: torch.dtype) -> None:
    ours, theirs = pair(name, dtype, split(GROUPS[name]), theirs=ROUNDED[name], lr=0.01)

    train([ours, theirs], range(STEPS), missing=True)

    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", ["sgd, maximize", "adam", "adam, maximize", "adagrad, decays", *LOOPS])
def test_one_step_is_within_units_of_the_for_loop(case: str, dtype: torch.dtype) -> None:
    name, kwargs = ANY[case]
    far = distances(name, dtype, 20, kwargs, {"foreach": False})
    assert max(far.values()) <= UNITS[name], far


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", ["sgd, maximize", "sgd, dampening and decay", "adam, maximize", "adamw, amsgrad"])
def test_sizes_that_fill_no_vector_are_within_units_of_the_fused_kernels(case: str, dtype: torch.dtype) -> None:
    name, kwargs = ANY[case]
    far = distances(name, dtype, 20, kwargs, FUSED, shapes=((7,), (3, 5), (33,), ()))
    assert max(far.values()) <= UNITS[name], far


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["adam", "adam, maximize", "adamw", "adamw, amsgrad"])
def test_half_types_have_the_bits_of_fused_adam(case: str, dtype: torch.dtype) -> None:
    name, kwargs = EXACT[case]
    ours, theirs = pair(name, dtype, theirs=FUSED, **kwargs)

    train([ours, theirs], range(STEPS), missing=True)

    assert_same(ours, theirs)


# torch 2.13's fused SGD leaves half-precision parameters that fill a vector as they are, so it is no reference
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        "sgd, decay",
        "sgd, maximize",
        "sgd, dampening",
        "adam, maximize",
        "rmsprop, momentum",
        "rmsprop, centered",
        "nadam, decays",
        "radam, decay",
        "adamax, maximize",
        "adagrad, decays",
        "adadelta, decay",
        "asgd, average",
        "rprop, sizes",
    ],
)
def test_half_types_are_computed_in_single_precision_and_rounded_once(case: str, dtype: torch.dtype) -> None:
    """One step is that of torch in float32 from the same numbers, rounded.

    Errors of float32 are 2**-13 units of float16 and 2**-16 of bfloat16: too small to matter, unless the number lies
    beside the middle of two neighbours, where it is one unit.
    """
    name, kwargs = ANY[case]
    params = make_params(dtype)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    ours, theirs = OURS[name](params, **kwargs), THEIRS[name](wide, **kwargs)
    far = []
    for step in range(20):
        grads = gradients(params, step)
        old = [p.detach().clone() for p in params]
        give(params, grads)
        give(wide, [g if g is None else g.float() for g in grads])
        ours.step()
        theirs.step()
        for p, q, was in zip(params, wide, old, strict=True):
            far += [ulps(p.detach(), q.detach().to(dtype), was).flatten()]
            far += [
                ulps(x, theirs.state[q][key].to(dtype), was.abs() if key == "momentum_buffer" else x).flatten()
                for key, x in ours.state[p].items()
                if key not in NUMBERS
            ]
        copy_to(theirs, ours)
        for q in wide:
            theirs.state[q] = {k: v.float() for k, v in theirs.state[q].items()}
    worst = torch.cat(far)
    torch.testing.assert_close(worst, torch.zeros_like(worst), rtol=0, atol=1)


# --- checkpoints


def reload(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state as a file keeps it."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def reborn(opt: torch.optim.Optimizer, cls: Any, state_dict: dict[str, Any], **kwargs: Any) -> torch.optim.Optimizer:
    """An optimizer of another class over copies of the parameters, with a state loaded."""
    new: torch.optim.Optimizer = cls(twins(params_of(opt)), **kwargs)
    new.load_state_dict(reload(state_dict))
    for state in new.state.values():
        for key in NUMBERS & state.keys():  # torch loads numbers other than `step` in the dtype of the parameter
            assert cls in THEIRS.values() or state[key].dtype is torch.float32
            state[key] = state[key].float()
    return new


@pytest.mark.parametrize("case", FEW)
def test_training_that_torch_began_goes_on_with_the_same_bits(case: str) -> None:
    name, kwargs = EXACT[case]
    _, theirs = pair(name, theirs=ROUNDED[name], **kwargs)
    train([theirs], range(10), missing=True)

    ours = reborn(theirs, OURS[name], theirs.state_dict(), lr=123.0)
    assert_same(ours, theirs)
    train([ours, theirs], range(10, 30), missing=True)

    assert_same(ours, theirs)
    assert options(ours) == options(theirs)


@pytest.mark.parametrize("case", FEW)
def test_training_that_ours_began_goes_on_in_torch_with_the_same_bits(case: str) -> None:
    name, kwargs = EXACT[case]
    ours, _ = pair(name, **{**kwargs, **ROUNDED[name]})
    train([ours], range(10), missing=True)

    theirs = reborn(ours, THEIRS[name], ours.state_dict(), lr=123.0)
    assert_same(ours, theirs)
    train([ours, theirs], range(10, 30), missing=True)

    assert_same(ours, theirs)
    assert options(ours) == options(theirs)


@pytest.mark.parametrize("case", LOOPS)
def test_training_goes_on_from_torch_and_back_within_units(case: str) -> None:
    name, kwargs = LOOPS[case]
    _, theirs = pair(name, **kwargs)
    train([theirs], range(5))  # RAdam takes its first adaptive step after these, or among them
    ours = reborn(theirs, OURS[name], theirs.state_dict())
    back = reborn(ours, THEIRS[name], ours.state_dict())
    assert_same(ours, theirs)
    assert_same(back, theirs)

    far = follow(ours, back, range(5, 15))

    assert max(far.values()) <= UNITS[name], far


OLD = {  # what files of earlier versions of torch lack
    "SGD": ("foreach", "fused", "maximize", "differentiable", "nesterov"),
    "Adam": ("foreach", "fused", "maximize", "differentiable", "capturable", "amsgrad", "decoupled_weight_decay"),
    "AdamW": ("foreach", "fused", "maximize", "differentiable", "capturable", "amsgrad", "decoupled_weight_decay"),
    "RMSprop": ("foreach", "maximize", "differentiable", "capturable", "momentum", "centered"),
    "NAdam": ("foreach", "maximize", "differentiable", "capturable", "decoupled_weight_decay"),
    "RAdam": ("foreach", "maximize", "differentiable", "capturable", "decoupled_weight_decay"),
    "Adagrad": ("foreach", "maximize", "differentiable", "fused"),
    **dict.fromkeys(("Adamax", "Adadelta", "ASGD", "Rprop"), ("foreach", "maximize", "differentiable", "capturable")),
}


@pytest.mark.parametrize("name", OLD)
def test_files_of_older_versions_load(name: str) -> None:
    """Without the newer options, and with numbers that are Python's."""
    _, theirs = pair(name, lr=0.01)
    train([theirs], range(5))
    old = reload(theirs.state_dict())
    for group in old["param_groups"]:
        for key in OLD[name]:
            del group[key]
    for state in old["state"].values():
        state.update({key: float(state[key]) for key in NUMBERS & state.keys()})

    ours = reborn(theirs, OURS[name], old)
    theirs = reborn(theirs, THEIRS[name], old)

    assert_same(ours, theirs)
    assert options(ours) == options(theirs)
    far = follow(ours, theirs, range(5, 10))
    assert max(far.values()) <= UNITS[name], far


# --- what changes between steps


def _set(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda group: group.update(values)


EDITS: dict[str, tuple[str, dict[str, Any], list[Callable[[dict[str, Any]], Any]]]] = {
    "sgd lr": ("SGD", {"lr": 0.1, "momentum": 0.9}, [_set(lr=0.2), _set(lr=0), _set(lr=torch.tensor(0.3))]),
    "sgd lr in place": ("SGD", {"lr": torch.tensor(0.1)}, [lambda group: group["lr"].fill_(0.3)]),
    "sgd momentum": ("SGD", {"momentum": 0.9}, [_set(momentum=0.5), _set(momentum=0), _set(momentum=0.7)]),
    "sgd momentum from none": ("SGD", {"lr": 0.1}, [_set(momentum=0.9), _set(dampening=0.5)]),
    "sgd decay": ("SGD", {"lr": 0.1}, [_set(weight_decay=0.1), _set(weight_decay=0.2), _set(weight_decay=0)]),
    "sgd decay in place": (
        "SGD",
        {"momentum": 0.9, "weight_decay": torch.zeros(())},
        [lambda group: None, lambda group: group["weight_decay"].fill_(0.5)],
    ),
    "sgd switches": ("SGD", {"momentum": 0.9}, [_set(maximize=True), _set(nesterov=True), _set(maximize=False)]),
    "adam numbers": (
        "Adam",
        {},
        [_set(lr=0.1), _set(betas=(0.5, 0.6)), _set(eps=0.1), _set(weight_decay=0.1), _set(betas=[0.5, 0.8])],
    ),
    "adam betas in place": ("Adam", {}, [_set(betas=[0.5, 0.8]), lambda group: group["betas"].__setitem__(0, 0.1)]),
    "adam betas as tensors": ("Adam", {}, [_set(betas=(torch.tensor(0.5), torch.tensor([0.6])))]),
    "adam switches": (
        "Adam",
        {"weight_decay": 0.1, "amsgrad": True},
        [_set(maximize=True), _set(decoupled_weight_decay=True), _set(amsgrad=False)],
    ),
    "adagrad numbers": ("Adagrad", {}, [_set(lr=0.1, eps=0.1), _set(lr_decay=0.5), _set(weight_decay=0.1)]),
    "adamax numbers": ("Adamax", {}, [_set(lr=0.1), _set(betas=(0.5, 0.6)), _set(maximize=True, weight_decay=0.1)]),
    "asgd numbers": ("ASGD", {}, [_set(lr=0.1), _set(lambd=0.1, alpha=0.5), _set(t0=2), _set(weight_decay=0.1)]),
    "rprop numbers": ("Rprop", {}, [_set(lr=1.0), _set(etas=(0.3, 1.7)), _set(step_sizes=(0.1, 0.2), maximize=True)]),
    "adamw numbers": ("AdamW", {}, [_set(lr=0.1, weight_decay=0.5), _set(lr=0.0), _set(weight_decay=0, eps=1e-2)]),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_change_of_an_option_shows_in_the_next_step(case: str) -> None:
    name, kwargs, edits = EDITS[case]
    halves: Callable[[list[Any]], Any] = lambda params: [{"params": params[::2]}, {"params": params[1::2]}]  # noqa: E731
    ours, theirs = pair(name, groups=halves, theirs=ROUNDED[name], **kwargs)
    for k, edit in enumerate([lambda group: None, *edits]):
        for opt in (ours, theirs):
            edit(opt.param_groups[0])
        train([ours, theirs], range(3 * k, 3 * k + 3))

        assert_same(ours, theirs)


@pytest.mark.parametrize("name", OURS)
def test_each_edit_of_rmsprop_and_others_is_within_units_of_the_for_loop(name: str) -> None:
    ours, theirs = pair(name, **fitting(name, lr=0.01, weight_decay=0.1))
    edits = iter([{"lr": 0.1}, {"weight_decay": 0.0}, {"maximize": True}, {"lr": 0.001, "weight_decay": 0.2}] * 3)

    def edit() -> None:
        values = next(edits)
        for opt in (ours, theirs):
            opt.param_groups[0].update(values)

    far = follow(ours, theirs, range(12), edit)

    assert max(far.values()) <= UNITS[name], far


@pytest.mark.parametrize("name", OURS)
def test_maximize_ascends_and_still_decays(name: str) -> None:
    """Ascending with the gradient is descending with its negative; a decay shrinks either way."""
    up, _ = pair(name, **fitting(name, lr=0.01, weight_decay=0.1), maximize=True)
    down, _ = pair(name, **fitting(name, lr=0.01, weight_decay=0.1))
    for step in range(5):
        grads = gradients(params_of(up), step)
        give(params_of(up), grads)
        give(params_of(down), [g if g is None else -g for g in grads])
        up.step()
        down.step()

    assert_same(up, down)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_parameters_that_are_frozen_and_unfrozen_have_the_same_bits(name: str) -> None:
    """Frozen: they have no gradient, for the loss does not ask for one. Late ones start with fresh state."""
    ours, theirs = pair(name, lr=0.01, theirs=FUSED)
    for step in range(20):
        for opt in (ours, theirs):
            params = params_of(opt)
            for k, p in enumerate(params):
                p.requires_grad_(not (k == 1 and step < 5) and not (k == 2 and 8 <= step < 14))
            opt.zero_grad()
            grads = gradients(params, step)
            sum((p * g).sum() for p, g in zip(params, grads, strict=True) if p.requires_grad).backward()
            opt.step()

        assert_same(ours, theirs)
    assert [ours.state[p]["step"].item() for p in params_of(ours)][:4] == [20, 15, 14, 20]


def test_late_gradients_of_sgd_start_their_own_momentum() -> None:
    """A parameter's first gradient is its first buffer, whole, whenever it comes; torch's for-loop does the same."""
    ours, theirs = pair("SGD", lr=0.01, momentum=0.9, dampening=0.5)
    for step in range(10):
        for opt in (ours, theirs):
            grads = gradients(params_of(opt), step)
            give(params_of(opt), [None if k == step % 2 and step < 4 else g for k, g in enumerate(grads)])
            opt.step()
    # the for-loop of SGD multiplies and adds as the kernel does, so nothing differs
    assert_same(ours, theirs)


ADAGRAD = pytest.param(
    "Adagrad",
    marks=pytest.mark.skipif(
        torch.__version__ < (2, 12), reason="torch.optim.Adagrad of this version has no state for parameters that join"
    ),
)
JOINED = [ADAGRAD if name == "Adagrad" else name for name in ROUNDED]


@pytest.mark.parametrize("name", JOINED)
def test_replaced_parameters_start_anew(name: str) -> None:
    ours, theirs = pair(name, lr=0.01, theirs=ROUNDED[name])
    train([ours, theirs], range(5))
    new = make_params(seed=1)
    for opt in (ours, theirs):
        group = opt.param_groups[0]
        group["params"] = [*twins(new)[:3], *group["params"][3:]]
        train([opt], range(5, 10))
        group["params"][4] = twins(new)[4]
        train([opt], range(10, 15))

    assert_same(ours, theirs)


@pytest.mark.parametrize("name", JOINED)
def test_added_groups_start_anew_and_others_go_on(name: str) -> None:
    ours, theirs = pair(name, lr=0.01, theirs=ROUNDED[name])
    train([ours, theirs], range(5))
    for opt in (ours, theirs):
        opt.add_param_group({"params": make_params(seed=1)[:2], "lr": 0.1, "weight_decay": 0.2})

    train([ours, theirs], range(5, 15))

    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ROUNDED)
def test_a_part_of_the_groups_can_be_stepped(name: str) -> None:
    """Some libraries assign a sub-list to `param_groups`, step, and put the groups back."""
    ours, theirs = pair(name, groups=split([{}, {"lr": 0.1}]), lr=0.01, theirs=ROUNDED[name])
    train([ours, theirs], range(3))
    for opt in (ours, theirs):
        groups = opt.param_groups
        for k in range(4):
            opt.param_groups = [groups[k % 2]]
            train([opt], [3 + k])
        opt.param_groups = groups
    train([ours, theirs], range(7, 10))

    assert_same(ours, theirs)


# --- what a step does not do


@pytest.mark.parametrize("tensor", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("case", [*FEW, *LOOPS])
def test_no_learning_rate_and_zero_gradients_leave_parameters_bitwise(case: str, tensor: bool) -> None:
    """Checkpoint code makes the states exist by such a step."""
    name, kwargs = ANY[case]
    params = make_params()
    if not kwargs.get("maximize"):  # else -0.0 - lr * -0.0 is 0.0, in torch as well
        with torch.no_grad():
            params[0][::2] = -0.0
    opt = OURS[name](params, **{**kwargs, "lr": torch.tensor(0.0) if tensor else 0.0})
    before = [p.detach().clone() for p in params]
    for _ in range(3):
        give(params, [torch.zeros_like(p) for p in params])
        opt.step()

    assert_same_bits([p.detach() for p in params], before)


@pytest.mark.parametrize("case", [*FEW, *LOOPS])
def test_gradients_are_never_written(case: str) -> None:
    name, kwargs = ANY[case]
    params = make_params()
    opt = OURS[name](params, **kwargs)
    for step in range(3):
        grads = gradients(params, step)
        give(params, grads)
        held = [p.grad for p in params]
        versions = [g._version for g in held if g is not None]
        opt.step()

        assert all(p.grad is g for p, g in zip(params, held, strict=True))
        assert [g._version for g in held if g is not None] == versions
        assert_same_bits(held, grads)


@pytest.mark.parametrize("name", OURS)
def test_parameters_without_gradients_stay_as_they_are(name: str) -> None:
    """No decay and no count, and no state for those that never had a gradient."""
    params = make_params()
    opt = OURS[name](params, **fitting(name, lr=0.1, weight_decay=0.1))
    train([opt], range(2))
    before = content(opt)
    late = make_params(seed=1)[0]
    opt.add_param_group({"params": [late]})
    opt.zero_grad()
    assert opt.step() is None

    assert late not in opt.state
    after = content(opt)
    assert_same_bits({k: v[:-1] for k, v in after.items()}, before)


@pytest.mark.parametrize("name", OURS)
def test_a_step_changes_the_version_of_what_it_writes(name: str) -> None:
    """Autograd refuses to go back through what a step has overwritten, as after a step of torch's."""
    [p] = make_params(shapes=SHAPES[:1])
    opt = OURS[name]([p], lr=0.1)
    loss = (p * p).sum()
    give([p], gradients([p], 0))
    opt.step()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("call", ["positional", "keyword", "no_grad"])
def test_closures_are_called_once_with_gradients_and_their_loss_is_returned(name: str, call: str) -> None:
    ours, theirs = pair(name, lr=0.01)
    before = content(ours)["params"]
    calls = []
    for opt in (ours, theirs):
        params = params_of(opt)

        def closure(opt: Any = opt, params: Any = params) -> torch.Tensor:
            calls.append(torch.is_grad_enabled())
            opt.zero_grad()
            loss: torch.Tensor = sum((p * p).sum() for p in params)  # type: ignore[assignment]
            loss.backward()
            return loss

        with torch.set_grad_enabled(call != "no_grad"):
            loss = opt.step(closure=closure) if call == "keyword" else opt.step(closure)
        calls.append(loss)

    assert calls[0] is True
    assert calls[2] is True
    torch.testing.assert_close(calls[1], calls[3], rtol=0, atol=0)
    far = [ulps(p, q, was).flatten() for p, q, was in zip(params_of(ours), params_of(theirs), before, strict=True)]
    worst = torch.cat(far)
    torch.testing.assert_close(worst, torch.zeros_like(worst), rtol=0, atol=UNITS[name])


@pytest.mark.parametrize("backend", ["reference", "foreach", "triton"])
@pytest.mark.parametrize("name", [name for name in OURS if name not in ("SGD", "Adam", "AdamW", "RMSprop")])
def test_backends_agree_on_a_step_of_each_class(name: str, backend: str) -> None:
    """They differ by the square root, as torch's does, and the interpreter has no fused multiply-add."""
    kwargs = fitting(name, lr=0.1, betas=(0.5, 0.9), t0=0)
    ours, theirs = (OURS[name](make_params(shapes=SHAPES[:2]), **kwargs) for _ in range(2))
    far: dict[str, float] = {}
    for step in (0, 5):  # RAdam adapts from the sixth step on
        with use("c"):
            train([ours, theirs], range(step))
        before = content(ours)
        with use("c"):
            train([ours], [step])
        with use(backend):
            train([theirs], [step])
        for k, (p, q) in enumerate(zip(params_of(ours), params_of(theirs), strict=True)):
            was = before["params"][k]
            far["params"] = max(far.get("params", 0.0), ulps(p, q, was, p - was).max().item())
            for key, x in ours.state[p].items():
                past = (before["state"][k] or {}).get(key, torch.zeros_like(x))
                far[key] = max(far.get(key, 0.0), ulps(x, theirs.state[q][key], past, x - past).max().item())
        copy_to(theirs, ours)
    assert max(far.values()) <= UNITS[name], far
