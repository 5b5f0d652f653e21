"""Options that a file brings: of another kind than the optimizer's own, called otherwise, or known to nobody."""

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import functional_optim as fo
from _lib.optimizers import content
from functional_optim import adapters
from functional_optim.adapters import TransformOptimizer


CLASSES = sorted(
    name
    for name, x in vars(torch.optim).items()
    if inspect.isclass(x) and issubclass(x, torch.optim.Optimizer) and x is not torch.optim.Optimizer
)
# values of another kind than the default: strings for None, lists for tuples, whole numbers, tensors
OTHERS: dict[str, list[Any]] = {
    "adjust_lr_fn": ["original", "match_rms_adamw"],
    "line_search_fn": ["strong_wolfe"],
    "foreach": [False],
    "fused": [False, True],
    "max_eval": [7],
    "max_iter": [3.0],
}


def others(option: str, default: Any) -> list[Any]:
    if option in OTHERS:
        return OTHERS[option]
    if isinstance(default, bool):
        return [not default, int(not default)]
    if isinstance(default, tuple):
        return [list(default), tuple(0.5 if x is None else x / 2 for x in default)]
    if option in ("history_size", "ns_steps"):
        return [default + 1]
    return [torch.tensor(float(default)), int(default)]


def made(module: Any, name: str, **kwargs: Any) -> Any:
    start = torch.linspace(-1, 2, 32).reshape(8, 4)
    return getattr(module, name)([nn.Parameter(start.clone())], **kwargs)


def step(opt: Any) -> torch.Tensor:
    (p,) = opt.param_groups[0]["params"]
    grad = torch.linspace(1, -3, 32).reshape(8, 4)
    p.grad = grad.to_sparse() if type(opt).__name__ == "SparseAdam" else grad
    opt.step((lambda: (p * p).sum()) if type(opt).__name__ == "LBFGS" else None)
    return p.detach()


@pytest.mark.parametrize("name", CLASSES)
def test_a_file_with_options_of_another_kind_loads_as_in_torch(name: str) -> None:
    ours, theirs = getattr(adapters, name), getattr(torch.optim, name)
    seen = set()
    for option, parameter in list(inspect.signature(theirs).parameters.items())[1:]:
        for value in others(option, parameter.default):
            if option == "capturable":  # torch refuses to step on a CPU
                continue
            for module in (torch.optim, adapters):
                try:
                    source = made(module, name, **{option: value})
                except (TypeError, ValueError, RuntimeError):
                    continue  # the constructor refuses it
                file = copy.deepcopy(source.state_dict())
                mine, other = made(adapters, name), made(torch.optim, name)
                mine.load_state_dict(copy.deepcopy(file))
                other.load_state_dict(copy.deepcopy(file))
                assert mine.state_dict()["param_groups"] == other.state_dict()["param_groups"], (option, value)
                torch.testing.assert_close(step(mine), step(other), rtol=1e-5, atol=1e-6, msg=f"{option}={value!r}")
                seen.add(option)
    assert {"lr"} <= seen
    assert issubclass(ours, theirs)


@fo.elementwise(static=("mode",))
def moded(u: Any, *, mode: bool | str = False, size: float = 1.0) -> Any:
    return u * size * {False: 1.0, True: 2.0, "slow": 0.5}[mode]


def test_a_switch_of_a_rule_may_be_of_several_kinds() -> None:
    source = TransformOptimizer([nn.Parameter(torch.ones(2))], moded(mode="slow"))
    opt = TransformOptimizer([nn.Parameter(torch.ones(2))], moded())
    opt.load_state_dict(source.state_dict())
    assert opt.param_groups[0]["mode"] == "slow"
    assert torch.equal(step_of_ones(opt), torch.full((2,), 1.5))


def step_of_ones(opt: Any) -> torch.Tensor:
    (p,) = opt.param_groups[0]["params"]
    p.grad = torch.ones_like(p)
    opt.step()
    return p.detach()


def adamw(**kwargs: Any) -> TransformOptimizer:
    return TransformOptimizer([nn.Parameter(torch.ones(3))], fo.chain(fo.clip(1.0), fo.adamw(1e-3, **kwargs)))


CALLED_OTHERWISE = {
    "betas": (adamw, (0.8, 0.95), "'betas' is no option of this chain .* call it 'b1' or 'b2'"),
    "learning_rate": (adamw, 0.5, "'learning_rate' is no option of this chain .* call it 'lr'"),
    "momentum": (
        lambda: TransformOptimizer([nn.Parameter(torch.ones(3))], fo.sgd(0.1, momentum=0.5)),
        0.9,
        "'momentum' is no option of this chain .* call it 'decay'",
    ),
    "b1": (adamw, 1.5, r"`b1` of scale_by_adam must be in \[0, 1\), got 1.5"),
    "lr": (adamw, -1.0, "learning rate `lr` must be in"),
}


@pytest.mark.parametrize("option", CALLED_OTHERWISE)
def test_an_option_that_would_do_nothing_is_refused_and_nothing_changes(option: str) -> None:
    make, value, message = CALLED_OTHERWISE[option]
    opt = make()
    step_of_ones(opt)
    file = copy.deepcopy(opt.state_dict())
    file["param_groups"][0].update({option: value, "weight_decay": 0.25})
    before, groups = content(opt), [dict(group) for group in opt.param_groups]

    with pytest.raises(ValueError, match=rf"options of param_groups\[0\] of the state dict do not fit: .*{message}"):
        opt.load_state_dict(file)

    assert [dict(group) for group in opt.param_groups] == groups
    torch.testing.assert_close(content(opt), before, rtol=0.0, atol=0.0)


def test_options_that_no_transformation_knows_are_kept_with_a_warning() -> None:
    opt = adamw()
    file = copy.deepcopy(opt.state_dict())
    file["param_groups"][0].update(amsgrad=False, centered=True, initial_lr=0.1, foreach=None)
    with pytest.warns(
        UserWarning, match=r"knows 'amsgrad', 'centered' in param_groups\[0\] of the state .*'b1'"
    ) as seen:
        opt.load_state_dict(file)
    assert len(seen) == 1
    assert opt.param_groups[0]["centered"] is True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(opt.state_dict())  # they are there by now
        adamw().load_state_dict(adamw(b1=0.5).state_dict())
