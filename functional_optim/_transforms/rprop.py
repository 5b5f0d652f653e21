"""Rprop: a step size per element, which grows while the sign of the updates lasts and shrinks when it changes."""

import torch

from .._compiler.rule import Leaf, Scalar
from .._compiler.slots import slot
from .._rule import elementwise
from ._moments import torch_slot


def _factor(turn: Leaf, eta_minus: Scalar, eta_plus: Scalar) -> Leaf:
    """The factor of a step size, by the sign of the product of two updates behind one another."""
    return torch.where(turn > 0, eta_plus, torch.where(turn < 0, eta_minus, 1.0))


def _turn(u: Leaf, previous: Leaf) -> Leaf:
    """The sign of a product, which itself may be smaller than any number."""
    return torch.sign(u) * torch.sign(previous)


@elementwise(
    state={"step_sizes": slot("learning_rate"), "prev_updates": slot(0.0)},
    ranges={
        "learning_rate": "[0, inf)",
        "eta_minus": "(0, 1)",
        "eta_plus": "(1, inf)",
        "min_step_size": "[0, inf)",
        "max_step_size": "(0, inf)",
    },
)
def scale_by_rprop(
    u: Leaf,
    step_sizes: Leaf,
    prev_updates: Leaf,
    *,
    learning_rate: float,
    eta_minus: Scalar = 0.5,
    eta_plus: Scalar = 1.2,
    min_step_size: Scalar = 1e-6,
    max_step_size: Scalar = 50.0,
) -> tuple[Leaf, Leaf, Leaf]:
    r"""Rprop: the sign of each update times a step size of its own.

    $$\Delta_t = \Delta_{t-1} \cdot \begin{cases} \eta_+ & g_t u_{t-1} > 0 \\ \eta_- & g_t u_{t-1} < 0 \\
      1 & \text{else} \end{cases}, \quad u_t = \begin{cases} 0 & g_t u_{t-1} < 0 \\
      \Delta_t \operatorname{sign} g_t & \text{else} \end{cases}$$

    A step size that changes is kept between the smallest and the largest. The update is this step's own; optax gives
    that of the step before, and so nothing at the first.

    Args:
      learning_rate: $\Delta_0$, a number.
      eta_minus: $\eta_-$, for elements whose sign has changed.
      eta_plus: $\eta_+$, for those whose sign has lasted.
      min_step_size: the smallest step size.
      max_step_size: the largest step size.

    Returns:
      The transformation. Its state is `(step_sizes, prev_updates)`.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> tx = scale_by_rprop(0.5)
      >>> state = tx.init(torch.zeros(3))
      >>> _, state = tx.update(torch.tensor([1.0, 1.0, 1.0]), state)
      >>> tx.update(torch.tensor([2.0, -2.0, 0.0]), state)[0]
      tensor([0.6000, 0.0000, 0.0000])

    Source: Riedmiller & Braun 1993, "A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP
    Algorithm"; the variant without weight backtracking of Igel & Hüsken 2003.
    """
    turn = _turn(u, prev_updates)
    changed = torch.clamp(step_sizes * _factor(turn, eta_minus, eta_plus), min=min_step_size, max=max_step_size)
    step_sizes = torch.where(turn == 0, step_sizes, changed)
    u = torch.where(turn < 0, 0.0, step_sizes * torch.sign(u))
    return u, step_sizes, u


@elementwise(state={"prev": slot(0.0), "step_size": torch_slot("learning_rate")})
def rprop_step(
    u: Leaf,
    p: Leaf,
    prev: Leaf,
    step_size: Leaf,
    *,
    step: Scalar,
    first: Scalar,
    learning_rate: Scalar,
    eta_minus: Scalar = 0.5,
    eta_plus: Scalar = 1.2,
    min_step_size: Scalar = 1e-6,
    max_step_size: Scalar = 50.0,
) -> tuple[Leaf, Leaf, Leaf]:
    r"""A step of Rprop as torch has it: every step size is clamped, and the gradient is what is kept.

    Args:
      learning_rate: the first step size, that of the step which is the first.
      eta_minus: factor for elements whose sign has changed.
      eta_plus: factor for those whose sign has lasted.
      min_step_size: the smallest step size.
      max_step_size: the largest step size.

    Returns:
      The transformation; its update is the difference of the parameters.

    Example:
      >>> tx = rprop_step(0.5)
      >>> params = torch.ones(1)
      >>> tx.update(torch.ones(1), tx.init(params), params)[0]
      tensor([-0.5000])

    Source: Riedmiller & Braun 1993, "A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP
    Algorithm".
    """
    turn = _turn(u, prev)
    step_size = torch.where(first, learning_rate, step_size) * _factor(turn, eta_minus, eta_plus)
    step_size = torch.clamp(step_size, min=min_step_size, max=max_step_size)
    u = torch.where(turn < 0, 0.0, u)
    return torch.addcmul(p, torch.sign(u), step_size, value=-1) - p, u, step_size
