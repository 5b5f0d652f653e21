"""Parameters of all kinds: layouts, mixed dtypes, complex numbers, tensors on the device `meta`."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import functional_optim as fo
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
    twins,
)
from functional_optim.adapters import LBFGS, SGD, AdamW, TransformOptimizer


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


def clip_and_average(params: Any, lr: float) -> TransformOptimizer:
    return TransformOptimizer(params, fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(lr), fo.params_ema(0.9)))


def in_python(params: Any, lr: float) -> TransformOptimizer:
    """A chain with a transformation that is not made of rules, and returns conjugated updates."""
    conjugate = fo.stateless(lambda updates, params: {k: u.conj() for k, u in updates.items()})
    return TransformOptimizer(params, fo.chain(conjugate, fo.sgd(lr)))


CONJUGATED: dict[str, Callable[..., torch.optim.Optimizer]] = {
    **OURS,
    "LBFGS": lambda params, lr: LBFGS([p for _, p in params], lr, line_search_fn="strong_wolfe"),
    "clip and average": clip_and_average,
    "Python": in_python,
    "lbfgs": lambda params, lr: TransformOptimizer(params, fo.lbfgs(lr, linesearch=None)),
}


@pytest.mark.parametrize("name", CONJUGATED)
def test_gradients_may_be_conjugated_when_they_are_read(name: str) -> None:
    """autograd leaves them so where a loss has the conjugate of a parameter; most of torch's classes fail there."""
    results = []
    for resolves in (False, True):
        p = torch.nn.Parameter(torch.complex(torch.arange(4.0), torch.ones(4)))
        opt = CONJUGATED[name]([("p", p)], lr=0.1)

        def closure(opt: Any = opt, p: Any = p, resolves: bool = resolves) -> torch.Tensor:
            opt.zero_grad()
            loss = (p.conj() * torch.complex(torch.ones(4), -torch.arange(4.0))).real.sum() + p.abs().square().sum()
            loss.backward()
            if resolves:
                p.grad = p.grad.resolve_conj()
            else:
                p.grad = p.grad.conj().resolve_conj().conj()
                assert p.grad.is_conj()
            return loss

        for _ in range(3):
            opt.step(closure)
        results.append(p.detach())

    assert_same_bits(*results)


def test_the_gradient_of_a_conjugate_takes_a_step() -> None:
    for cls in (SGD, torch.optim.SGD):
        p = torch.nn.Parameter(torch.complex(torch.ones(2), torch.ones(2)))
        (p.conj() * torch.tensor([1.0 + 2.0j, 3.0 - 1.0j])).real.sum().backward()
        assert p.grad is not None
        assert p.grad.is_conj()

        cls([p], lr=0.5).step()

        assert p.tolist() == [0.5 + 0.0j, -0.5 + 1.5j]


CONJUGATED_PARAMETERS = {
    "AdamW": (AdamW, "params at 'param_groups[0].params[0]'"),
    "SGD": (lambda p: SGD(p, lr=0.1), "params at 'param_groups[0].params[0]'"),
    "chain": (lambda p: TransformOptimizer([("w", *p)], fo.adam(0.1)), "params at 'w'"),
    "LBFGS": (lambda p: LBFGS(p, max_iter=1), "parameter 0"),
}


@pytest.mark.parametrize("after", ["making it", "a step"])
@pytest.mark.parametrize("name", CONJUGATED_PARAMETERS)
def test_parameters_that_are_conjugated_when_they_are_read_are_refused_by_name(name: str, after: str) -> None:
    """`view_as_real`, through which complex parameters are written, refuses them, and no other memory is theirs."""
    make, words = CONJUGATED_PARAMETERS[name]
    value = torch.tensor([1.0 + 2.0j, 3.0 - 1.0j])
    p = torch.nn.Parameter(value if after == "a step" else value.conj())
    opt = make([p])

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = p.abs().square().sum()
        loss.backward()
        return loss

    if after == "a step":
        opt.step(closure)
        p.data = p.data.conj()
    before = Snapshot(p.detach().resolve_conj(), dict(opt.state))

    for call in (lambda: opt.step(closure), lambda: fo.explain(opt)):
        with pytest.raises(ValueError, match=re.escape(words) + r" is a conjugated view.*resolve_conj\(\)`"):
            call()

    before.check()
    p.data = p.data.resolve_conj()
    opt.step(closure)


def test_a_state_that_is_conjugated_is_refused_by_name() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0 + 2.0j]))
    opt = AdamW([p])
    for conjugated in (False, True):
        p.grad = torch.ones_like(p)
        if conjugated:
            opt.state[p]["exp_avg"] = opt.state[p]["exp_avg"].conj()
            with pytest.raises(ValueError, match=r"exp_avg at 'param_groups\[0\]\.params\[0\]' is a conjugated view"):
                opt.step()
        else:
            opt.step()


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


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("to", [torch.complex64, torch.float32])
def test_a_parameter_that_becomes_complex_or_real_needs_another_state(name: str, to: torch.dtype) -> None:
    """torch cannot step it either; without its state it goes on as a new parameter does."""
    params = [torch.nn.Parameter(torch.ones(2, 3, dtype=kind)) for kind in (torch.float32, torch.complex64)]
    opt = OURS[name](params, lr=0.1)

    def give_ones() -> None:
        for p in params:
            p.grad = None
            p.grad = torch.ones_like(p)

    give_ones()
    opt.step()
    for p in params:
        p.data = (p.data if to.is_complex or not p.is_complex() else p.data.real).to(to, copy=True)
    give_ones()
    values, before = [p.detach().clone() for p in params], Snapshot(params, [dict(s) for s in opt.state.values()])
    if any(x.ndim for s in opt.state.values() for x in s.values() if x is not None):
        with pytest.raises(ValueError, match=r"state .* at '.*' has dtype .*, but its parameter has .* both must be"):
            opt.step()
        before.check()
    opt.state.clear()
    opt.step()
    fresh = [torch.nn.Parameter(x) for x in values]
    other = OURS[name](fresh, lr=0.1)
    give(fresh, [torch.ones_like(p) for p in fresh])
    other.step()
    for p, q in zip(params, fresh, strict=True):
        assert_same_bits(p.detach(), q.detach())


@pytest.mark.parametrize("wrong", [[1], 1, torch.zeros(2), "exp_avg"])
def test_a_state_that_is_no_dict_is_refused_by_name(wrong: Any) -> None:
    model = torch.nn.Linear(3, 2)
    opt = AdamW(model.named_parameters())
    give(list(model.parameters()), gradients(model.parameters(), 0))
    opt.step()
    opt.state[model.bias] = wrong
    before = Snapshot(list(model.parameters()))

    with pytest.raises(TypeError, match=r"state at 'bias' is .*, expected a dict of entries by name"):
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
