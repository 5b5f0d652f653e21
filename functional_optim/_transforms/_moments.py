r"""Common formulas of rules with moments: means of updates and of their squares, and corrections for their start at 0.

torch rounds in an order of its own: the compiler of its fused CPU kernels contracts `a + b * c` to one fused
multiply-add. Formulas that stand for a class of torch.optim have the bits of that. In the last, incomplete vector of a
tensor torch's compiler contracts the other product of `a * b + c * d`; these formulas do not.
"""

import dataclasses

import torch

from .._compiler.rule import Leaf, OptionalDtype, Scalar
from .._compiler.slots import Shape, Slot, slot


def torch_slot(start: float | str = 0.0, shape: Shape | None = None) -> Slot:
    """A slot that torch stores as the gradient is, not as the parameter is."""
    return dataclasses.replace(slot(start, shape=shape), as_gradient=True)


def mean(moment: Leaf, u: Leaf, decay: Scalar) -> Leaf:
    r"""The first moment, $\beta m_{t-1} + (1 - \beta) g_t$."""
    return decay * moment + (1 - decay) * u


def mean_square(moment: Leaf, u: Leaf, decay: Scalar) -> Leaf:
    r"""The second moment, $\beta v_{t-1} + (1 - \beta) g_t^2$."""
    return decay * moment + (1 - decay) * u * u


def torch_mean(moment: Leaf, u: Leaf, decay: Scalar) -> Leaf:
    """The first moment, rounded as in torch."""
    return torch.lerp(moment, u, 1 - decay)


def torch_mean_square(moment: Leaf, u: Leaf, decay: Scalar) -> Leaf:
    """The second moment, rounded as in torch."""
    return torch.addcmul(moment * decay, u, u, value=1 - decay)


def weight(decay: Scalar, step: Scalar) -> Leaf:
    r"""The weight of all updates so far in a moment that started at 0, $1 - \beta^t$."""
    return 1 - decay**step


def unbiased(moment: Leaf, decay: Scalar, step: Scalar) -> Leaf:
    r"""A moment corrected for its start at 0, $m_t / (1 - \beta^t)$.

    The reciprocal is the same for all elements and computed once; a division per element would cost more than the
    rest of the update.
    """
    return moment * (1 / weight(decay, step))


def looking_ahead(moment: Leaf, u: Leaf, decay: Scalar, step: Scalar) -> Leaf:
    r"""The first moment one step ahead, $\beta m_t / (1 - \beta^{t+1}) + (1 - \beta) g_t / (1 - \beta^t)$."""
    return unbiased(decay * moment, decay, step + 1) + unbiased((1 - decay) * u, decay, step)


def over_root(u: Leaf, square: Leaf, eps: Scalar, eps_in_sqrt: bool) -> Leaf:
    """An update over the root of squares, with a term inside the root or outside."""
    return u * torch.rsqrt(square + eps) if eps_in_sqrt else u / (torch.sqrt(square) + eps)


def torch_root(square: Leaf, decay: Scalar, step: Scalar, eps: Scalar) -> Leaf:
    r"""The denominator of Adam, $\sqrt{v_t} / \sqrt{1 - \beta^t} + \epsilon$, rounded as in torch."""
    return torch.sqrt(square) / torch.sqrt(weight(decay, step)) + eps


def stored(x: Scalar, dtype: OptionalDtype) -> Leaf:
    """A number as a slot of a dtype holds it."""
    return x if dtype is None else x.to(dtype)


def variance(square: Leaf, first: Leaf) -> Leaf:
    """The second moment less the square of the first; rounding may leave less than 0, which counts as 0."""
    return torch.clamp(square - first * first, min=0.0)


def torch_variance(square: Leaf, first: Leaf) -> Leaf:
    """The same, rounded as in torch, which leaves NaN where this is 0."""
    return torch.clamp(torch.addcmul(square, first, first, value=-1), min=0.0)
