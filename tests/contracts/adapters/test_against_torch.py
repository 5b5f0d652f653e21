"""Drop-in classes beside torch's: the bits of its fused kernels, or of its loop where no root is in it, or units."""

from typing import Any

import pytest
import torch

from _lib.compare import assert_same_bits, ulps
from _lib.forms_of_torch import ANY, EXACT, FEW, FUSED, LOOPS, ROUNDED, STEPS, split
from _lib.marks import OPTIMIZED
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
    give,
    gradients,
    make_params,
    options,
    pair,
    params_of,
    train,
)
from _lib.records import use


pytestmark = OPTIMIZED


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
