"""Optimizers, alone and in pairs: ours and the one of torch that it replaces, over equal parameters and gradients."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch

from _lib.compare import assert_same_bits, ulps
from _lib.trees import clone
from functional_optim import adapters


# All sizes are multiples of 16, and of 32 where they are big enough for two threads to share: then the fused kernels of
# torch see whole vectors only, and their rounding is the same for every element. Among them are a matrix stored by
# columns, images stored channel by channel, and a tensor without elements.
SHAPES: tuple[tuple[int, ...], ...] = ((16,), (4, 8), (8, 16), (4, 4, 2, 2), (32, 32), (0, 3), (48,))
# a matrix and a vector, of whole vectors of the CPU
SMALL: tuple[tuple[int, ...], ...] = ((8, 16), (32,))
NAMES = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "ASGD", "Rprop")
OURS: dict[str, Any] = {name: getattr(adapters, name) for name in NAMES}
THEIRS: dict[str, Any] = {name: getattr(torch.optim, name) for name in NAMES}
# entries of state that are one number
NUMBERS = frozenset({"step", "mu_product", "eta", "mu"})

# One step of ours and one of torch's from the same state, in units of the last place of the largest number in each
# sum. Where torch contracts another product of a * b + c * d into a fused multiply-add, or none, one rounding of half a
# unit moves, which may make one unit. The quotient of a step has a square root of torch that may be off by one unit, an
# addition and two divisions on either side, half a unit each; units double at a power of two.
UNITS: dict[str, float] = dict.fromkeys(NAMES, 4.0)
# The quotients of NAdam and RAdam have two operations more on either side, and NAdam adds two quotients.
UNITS |= {"NAdam": 8.0, "RAdam": 8.0}
# The step of Adadelta has two such roots, and four roundings of half a unit on either side, which make 6. Its square,
# which `acc_delta` is of, is off by twice that, and by three roundings on either side: 15, or 30 at a power of two.
UNITS |= {"Adadelta": 30.0}
# torch's lists of ASGD add up the average, `ax + (p - ax)`, which its loop and ours copy: two roundings and those of p.
UNITS |= {"ASGD": 6.0}


def fitting(name: str, **kwargs: Any) -> dict[str, Any]:
    """The arguments that a class takes: Rprop has no decay."""
    return {k: x for k, x in kwargs.items() if k in inspect.signature(THEIRS[name]).parameters}


def make_params(
    dtype: torch.dtype = torch.float64, shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0
) -> list[torch.nn.Parameter]:
    """Parameters of normal deviates; the third is stored by columns, a four-dimensional one with its channels last."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for k, shape in enumerate(shapes):
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if k == 2 and x.ndim == 2:
            x = x.t()
        if x.ndim == 4:
            x = x.to(memory_format=torch.channels_last)
        made.append(torch.nn.Parameter(x))
    return made


def vectors(n: int = 2, size: int = 16) -> list[torch.nn.Parameter]:
    """Parameters of normal deviates in one dimension."""
    return make_params(shapes=((size,),) * n)


def twins(params: Sequence[torch.Tensor]) -> list[torch.nn.Parameter]:
    """Copies of parameters, in the same layouts."""
    return [torch.nn.Parameter(p.detach().clone(), p.requires_grad) for p in params]


def gradients(params: Iterable[torch.Tensor], step: int, missing: bool = False) -> list[torch.Tensor | None]:
    """Normal deviates that differ from step to step; with `missing`, some are zero, and some None after step 0."""
    generator = torch.Generator().manual_seed(1000 + step)
    made: list[torch.Tensor | None] = []
    for k, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 2.0 ** (k - 2)
        g = torch.empty_like(p, requires_grad=False).copy_(g)
        if missing and step and (step + k) % 4 == 0:
            made.append(None)
        else:
            made.append(torch.zeros_like(g) if missing and (step + k) % 5 == 0 else g)
    return made


def give(params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]) -> None:
    """Puts copies of gradients where an optimizer finds them."""
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All parameters of an optimizer, in order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(opts: Sequence[torch.optim.Optimizer], steps: Iterable[int], missing: bool = False) -> None:
    """Steps optimizers through the same gradients."""
    for step in steps:
        for opt in opts:
            params = params_of(opt)
            give(params, gradients(params, step, missing))
            opt.step()


def content(opt: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of the parameters of an optimizer and of their state."""
    params = params_of(opt)
    return clone(
        {
            "params": [p.detach() for p in params],
            "state": [dict(opt.state[p]) if p in opt.state else None for p in params],
        }
    )


def options(opt: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The parameter groups of an optimizer without the parameters."""
    return [{k: v for k, v in group.items() if k not in ("params", "fused")} for group in opt.param_groups]


def assert_same(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    """Asserts that parameters and every entry of the states are the same bits."""
    assert_same_bits(content(ours), content(theirs))


def pair(
    name: str,
    dtype: torch.dtype = torch.float64,
    groups: Callable[[list[Any]], Any] = list,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    theirs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Our optimizer of a name and torch's; `theirs` are arguments that only torch's gets."""
    params = make_params(dtype, shapes)
    return (
        OURS[name](groups(params), **deepcopy(kwargs)),
        THEIRS[name](groups(twins(params)), **deepcopy({**kwargs, **(theirs or {})})),
    )


def copy_to(target: torch.optim.Optimizer, source: torch.optim.Optimizer) -> None:
    """Overwrites the parameters and states of one optimizer with those of another."""
    with torch.no_grad():
        for p, q in zip(params_of(target), params_of(source), strict=True):
            p.copy_(q)
            if q in source.state:
                target.state[p] = {k: v.clone() for k, v in source.state[q].items()}


def distances(
    name: str, dtype: torch.dtype, steps: int, ours: dict[str, Any], theirs: dict[str, Any], **more: Any
) -> dict[str, float]:
    """Bounds of the distance between a step of ours and of torch's, by tensor written, in units in the last place.

    torch's optimizer takes over ours after every step, so that what is measured is a single step.
    """
    return follow(*pair(name, dtype, theirs=theirs, **more, **ours), range(steps))


def follow(
    ours: torch.optim.Optimizer,
    theirs: torch.optim.Optimizer,
    steps: Iterable[int],
    after: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The same for two optimizers that exist; `after` is called after every step."""
    worst: dict[str, float] = {}
    for step in steps:
        before = content(ours)
        train([ours, theirs], [step])
        rates = [float(group["lr"]) for group in ours.param_groups for _ in group["params"]]
        for k, (p, q) in enumerate(zip(params_of(ours), params_of(theirs), strict=True)):
            if p.grad is None or not p.numel():
                continue
            past, state = before["state"][k] or {}, ours.state.get(p, {})
            assert state.keys() == theirs.state.get(q, {}).keys()
            momentum = [rates[k] * past[key] for key in ("momentum_buffer",) if key in past]
            was = before["params"][k]
            far = {"params": ulps(p, q, was, p - was, *momentum)}
            for key, x in state.items():
                was = past.get(key, torch.zeros_like(x))
                terms = [p.grad] if key in ("exp_avg", "grad_avg", "momentum_buffer") else []
                terms += [before["params"][k]] if key == "ax" else []
                far[key] = ulps(x, theirs.state[q][key], was, x - was, *terms)
            for key, x in far.items():
                worst[key] = max(worst.get(key, 0.0), x.max().item())
        copy_to(theirs, ours)
        after()
    return worst


def make_grads(params: Sequence[torch.Tensor], count: int, seed: int = 1) -> list[list[torch.Tensor]]:
    """Gradients for some steps."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params]
        for _ in range(count)
    ]


def take_step(optimizer: Any, grads: Sequence[torch.Tensor]) -> None:
    """A step with these gradients."""
    for p, g in zip(params_of(optimizer), grads, strict=True):
        p.grad = g.clone()
    optimizer.step()


def take_steps(optimizer: Any, grads: Iterable[Sequence[torch.Tensor]]) -> None:
    """Steps with these gradients."""
    for each in grads:
        take_step(optimizer, each)
