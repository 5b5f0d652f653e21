"""The drop-in classes in Triton have the bits of torch's fused CUDA kernels, by the arithmetic of these.

The arithmetic is that of the machine code in torch 2.11 and 2.13 for sm_90, read instruction by instruction: all of
it in the dtype of the elements, hyper-parameters rounded to it first, and these fused multiply-adds. One thing
differs: torch's compiler rounds the product of an L2 penalty in Adam apart for the first of every four elements, and
these formulas do for none.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy
import pytest
import torch

from _lib.backends import only
from _lib.floats import fma
from _lib.marks import INTERPRETER
from functional_optim import adapters


pytestmark = INTERPRETER
N, STEPS = 37, 20
State = dict[str, torch.Tensor]
Numbers = Mapping[str, torch.Tensor]


def power(x: torch.Tensor, y: int) -> torch.Tensor:
    return torch.from_numpy(numpy.asarray(numpy.power(x.double().numpy(), float(y)))).to(x.dtype)


def root(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(numpy.asarray(numpy.sqrt(x.numpy())))  # torch's is an ulp off here and there


def adam(p: torch.Tensor, g: torch.Tensor, s: State, step: int, h: Numbers) -> torch.Tensor:
    b1, b2, one = h["b1"], h["b2"], torch.ones((), dtype=p.dtype)
    square = g * g
    s["m"] = fma(b1, s["m"], fma(-b1, g, g))
    s["v"] = fma(b2, s["v"], fma(-b2, square, square))
    s["largest"] = torch.maximum(s["largest"], s["v"]) if "amsgrad" in h else s["v"]
    # a power rounded once; CUDA's is off by a unit in the last place here and there
    rate, weight = h["lr"] / (one - power(b1, step)), one - power(b2, step)
    return p - (rate * s["m"]) / (root(s["largest"]) / root(weight) + h["eps"])


def adamw(p: torch.Tensor, g: torch.Tensor, s: State, step: int, h: Numbers) -> torch.Tensor:
    return adam(fma(-(h["lr"] * h["weight_decay"]), p, p), g, s, step, h)


def adam_with_penalty(p: torch.Tensor, g: torch.Tensor, s: State, step: int, h: Numbers) -> torch.Tensor:
    return adam(p, fma(p, h["weight_decay"], g), s, step, h)


def sgd(p: torch.Tensor, g: torch.Tensor, s: State, step: int, h: Numbers) -> torch.Tensor:
    g = fma(p, h["weight_decay"], g)
    s["m"] = g if step == 1 else fma(1 - h["dampening"], g, h["momentum"] * s["m"])
    return fma(-h["lr"], fma(s["m"], h["momentum"], g) if "nesterov" in h else s["m"], p)


class Case(NamedTuple):
    """A class, its arguments, and its arithmetic."""

    cls: Any
    arguments: dict[str, Any]
    formula: Callable[..., torch.Tensor]


ADAM = {"lr": 1.3e-3, "betas": (0.9, 0.999), "eps": 1e-8}
CASES = {
    "AdamW": Case(adapters.AdamW, {**ADAM, "weight_decay": 0.07}, adamw),
    # 1 - 0.3 is not a number of either dtype, unlike 1 - 0.9 with 0.9 as it is rounded
    "AdamW, small decays": Case(adapters.AdamW, {**ADAM, "betas": (0.3, 0.4), "weight_decay": 0.07}, adamw),
    "AdamW, amsgrad": Case(adapters.AdamW, {**ADAM, "weight_decay": 0.07, "amsgrad": True}, adamw),
    "Adam": Case(adapters.Adam, ADAM, adam),
    "Adam, weight_decay": Case(adapters.Adam, {**ADAM, "weight_decay": 0.07}, adam_with_penalty),
    "SGD": Case(adapters.SGD, {"lr": 0.03, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.07}, sgd),
    "SGD, nesterov": Case(
        adapters.SGD, {"lr": 0.03, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.07, "nesterov": True}, sgd
    ),
}


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_bits(name: str, dtype: torch.dtype) -> None:
    cls, arguments, formula = CASES[name]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(N, generator=generator, dtype=dtype)
    grads = torch.randn(STEPS, N, generator=generator, dtype=dtype)
    pair = dict(zip(("b1", "b2"), arguments.get("betas", ()), strict=False))
    numbers = {**{k: x for k, x in arguments.items() if k != "betas"}, **pair}
    numbers = {k: torch.tensor(x, dtype=dtype) for k, x in numbers.items() if x is not False}
    expected, state = start, {k: torch.zeros(N, dtype=dtype) for k in ("m", "v", "largest")}
    p = torch.nn.Parameter(start.clone())
    optimizer = cls([p], **arguments)
    for step, g in enumerate(grads, 1):
        p.grad = g.clone()
        with only("triton"):
            optimizer.step()
        expected = formula(expected, g, state, step, numbers)

    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=0)
