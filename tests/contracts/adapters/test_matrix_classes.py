"""Muon and Adafactor beside torch's classes: numbers, state, checkpoints, refusals."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import optim_db

from _lib.compare import assert_same_bits
from _lib.optimizers import content, give, gradients, params_of
from functional_optim import adapters


MATRICES: tuple[tuple[int, ...], ...] = ((16, 16), (8, 24), (24, 8), (8, 24), (1, 4))
TENSORS: tuple[tuple[int, ...], ...] = ((16,), (8, 16), (16, 8), (8, 16), (4, 3, 2), (), (4, 2, 3, 3))
INPUTS = {
    info.optim_cls.__name__: [(x.desc, x.kwargs) for x in info.optim_inputs_func("cpu", torch.float32)]
    for info in optim_db
    if info.optim_cls.__name__ in ("Muon", "Adafactor")
}
MORE: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "Muon": [
        ("adjusted", {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw"}),
        ("plain", {"lr": 0.02, "nesterov": False, "ns_steps": 3, "eps": 1e-3, "weight_decay": 0.0}),
        (
            "tensors",
            {"lr": 0.02, "ns_steps": torch.tensor(3), "nesterov": torch.tensor([True]), "eps": torch.tensor(1e-3)},
        ),
        ("other coefficients", {"lr": 0.02, "ns_coefficients": [3.0, -4.0, 2.0], "momentum": 0.5}),
    ],
    "Adafactor": [
        ("everything", {"lr": 0.5, "beta2_decay": -0.5, "eps": (1e-5, 1e-2), "d": 1.5, "weight_decay": 0.1}),
        ("maximize", {"lr": 0.01, "maximize": True, "weight_decay": 0.1}),
    ],
}
CASES = {
    f"{name}, {desc or 'default'}": (name, {k: v for k, v in kwargs.items() if k != "foreach"})
    for name in INPUTS
    for desc, kwargs in (*INPUTS[name], *MORE[name])
}


def make_params(name: str, dtype: torch.dtype) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = MATRICES if name == "Muon" else TENSORS
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def pair(name: str, dtype: torch.dtype, **kwargs: Any) -> tuple[Any, Any]:
    ours = getattr(adapters, name)(make_params(name, dtype), **copy.deepcopy(kwargs))
    return ours, getattr(torch.optim, name)(make_params(name, dtype), **copy.deepcopy(kwargs))


def take(opts: tuple[Any, Any], steps: range, missing: bool = False) -> None:
    for step in steps:
        for opt in opts:
            give(params_of(opt), gradients(params_of(opt), step, missing))
            opt.step()


def assert_close(ours: Any, theirs: Any, steps: int, dtype: torch.dtype) -> None:
    """Parameters and state within units that each step can add.

    Momenta are the same bits, and so are the orthogonal matrices, but for those of one row, whose products in bfloat16
    are sums in another order, which five iterations carry on. A parameter is the sum of its old value and a step, which
    torch multiplies by its factors in another order: one rounding of the step, and one of the sum. Adafactor multiplies
    by the row and the column in the same order and takes norms in another one: some units of the step. A rate that is
    a tensor is multiplied by the decay in its own dtype in torch, float32, and in float64 here.
    """
    eps = torch.finfo(dtype).eps
    rate = ours.param_groups[0]["lr"]
    own = torch.finfo(rate.dtype).eps if isinstance(rate, torch.Tensor) else eps
    a, b = content(ours), content(theirs)
    for p, q in zip(a["params"], b["params"], strict=True):
        bound = 8 * steps * max(eps, own) * q.abs().max().clamp(min=1e-3)
        if "momentum" in ours.param_groups[0] and min(p.shape) == 1:
            bound = bound + 8 * steps * torch.finfo(torch.bfloat16).eps * float(rate)
        assert ((p - q).abs() <= bound).all()
    for s, t in zip(a["state"], b["state"], strict=True):
        assert (s is None and not t) or s.keys() == t.keys()
        for k in s or ():
            assert s[k].shape == t[k].shape, k
            assert s[k].dtype == t[k].dtype, k
            if k in ("momentum_buffer", "step"):
                assert_same_bits(s[k], t[k])
            else:
                torch.testing.assert_close(s[k], t[k], rtol=8 * steps * eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_torch(case: str, dtype: torch.dtype) -> None:
    name, kwargs = CASES[case]
    opts = pair(name, dtype, **kwargs)
    take(opts, range(20), missing=True)
    assert_close(*opts, 20, dtype)


@pytest.mark.parametrize("name", MORE)
def test_checkpoints_go_both_ways_in_mid_run(name: str) -> None:
    kwargs = MORE[name][0][1]
    ours, theirs = pair(name, torch.float32, **kwargs)
    take((ours, theirs), range(5))
    other, another = pair(name, torch.float32, **kwargs)
    for source, target in ((ours, another), (theirs, other)):
        target.load_state_dict(copy.deepcopy(source.state_dict()))
        with torch.no_grad():
            for p, q in zip(params_of(target), params_of(source), strict=True):
                p.copy_(q)
    assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
    take((ours, another), range(5, 10))
    take((other, theirs), range(5, 10))
    assert_close(ours, another, 5, torch.float32)
    assert_close(other, theirs, 5, torch.float32)


@pytest.mark.parametrize("name", MORE)
def test_options_are_live(name: str) -> None:
    opts = pair(name, torch.float32, lr=0.1)
    for step in range(6):
        for opt in opts:
            opt.param_groups[0]["lr"] = 0.1 / (step + 1) if step % 2 else torch.tensor(0.1 / (step + 1))
            opt.param_groups[0]["weight_decay"] = 0.1 * (step % 3)
            if name == "Muon":
                opt.param_groups[0]["momentum"] = 0.9 - 0.1 * step
            else:
                opt.param_groups[0]["d"] = 1.0 + step
        take(opts, range(step, step + 1))
    assert_close(*opts, 6, torch.float32)


@pytest.mark.parametrize("change", ["data", "module", "swapped", "replaced in the list"])
def test_an_epsilon_that_is_none_is_that_of_the_parameters_as_they_are_now(change: str) -> None:
    """Gradients are smaller than the epsilon of float32, which bounds the update, and larger than that of float64."""

    def converted(p: torch.Tensor) -> Any:
        module = nn.ParameterList([p])
        if change == "data":
            p.data = p.data.double()
        elif change == "replaced in the list":
            return nn.Parameter(p.detach().double())
        else:
            torch.__future__.set_swap_module_params_on_conversion(change == "swapped")
            try:
                module.double()
            finally:
                torch.__future__.set_swap_module_params_on_conversion(False)
        return module[0]

    opts = tuple(cls([nn.Parameter(torch.ones(4, 3))]) for cls in (adapters.Adafactor, torch.optim.Adafactor))
    small = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(4, 3) * 1e-9
    for dtype in (torch.float32, torch.float64):
        for opt in opts:
            group = opt.param_groups[0]
            if dtype is torch.float64:
                opt.state.clear()
                group["params"][0].grad = None
                group["params"][0] = converted(group["params"][0])
            group["params"][0].grad = small.to(dtype)
            opt.step()
        assert_close(*opts, 2, torch.float32)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", MORE)
def test_parameters_that_take_no_step_may_be_of_any_dtype(name: str, dtype: torch.dtype, alone: bool) -> None:
    """Weights that are quantized have no gradients."""
    opts = []
    for module in (adapters, torch.optim):
        params, frozen = make_params(name, torch.float32), nn.Parameter(torch.ones(2, 2, dtype=dtype), False)
        groups = [params, [frozen]] if alone else [[*params, frozen]]
        opts.append(getattr(module, name)([{"params": group} for group in groups], lr=0.01))
    for step in range(2):
        for opt in opts:
            for p, g in zip(params_of(opt)[:-1], gradients(params_of(opt)[:-1], step), strict=True):
                p.grad = g
            opt.step()
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))

    assert params_of(opts[0])[-1] not in opts[0].state
    for opt in opts:
        del opt.param_groups[-1]["params"][-1]
    assert_close(*opts, 2, torch.float32)


REFUSED: dict[str, Any] = {
    "a rate": ("both", {"lr": -1.0}),
    "a rate that is a vector": ("both", {"lr": torch.ones(2)}),
    "a decay": ("both", {"weight_decay": -1.0}),
    "a momentum": ("Muon", {"momentum": -1.0}),
    "an adjustment": ("Muon", {"adjust_lr_fn": "other"}),
    "a threshold": ("Adafactor", {"d": 0.5}),
    "an epsilon": ("Adafactor", {"eps": (-1.0, 1e-3)}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_are_refused_in_the_words_of_torch(case: str) -> None:
    which, kwargs = REFUSED[case]
    for name in MORE if which == "both" else (which,):
        errors = []
        for module in (adapters, torch.optim):
            with pytest.raises(ValueError) as caught:  # noqa: PT011
                getattr(module, name)(make_params(name, torch.float32), **kwargs)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


def test_tensors_are_refused_in_the_words_of_torch() -> None:
    with pytest.raises(ValueError, match="Muon only supports 2D parameters whereas we found a parameter with size"):
        adapters.Muon([nn.Parameter(torch.ones(3))])
    for name in MORE:
        p = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
        p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match=f"{name} does not support complex parameters"):
            getattr(adapters, name)([p]).step()
        p = nn.Parameter(torch.ones(2, 2))
        p.grad = torch.ones(2, 2).to_sparse()
        with pytest.raises(RuntimeError, match=f"{name} does not support sparse gradients"):
            getattr(adapters, name)([p]).step()
        assert torch.equal(p.detach(), torch.ones(2, 2))
    for key, value in (("ns_steps", 100), ("ns_coefficients", (1.0, 2.0))):
        p = nn.Parameter(torch.ones(2, 2))
        p.grad = torch.ones(2, 2)
        with pytest.raises(ValueError, match=r"Number of steps must be less than 100|exactly 3 values"):
            adapters.Muon([p], **{key: value}).step()
