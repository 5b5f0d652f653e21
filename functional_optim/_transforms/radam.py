"""RAdam: Adam that takes plain momentum for as long as the second moment says too little."""

import torch

from .._compiler.rule import Leaf, Scalar
from .._compiler.slots import slot
from .._rule import elementwise
from ._moments import looking_ahead, mean, mean_square, torch_mean, torch_mean_square, unbiased, weight


def _length(step: Scalar, b2: Scalar) -> tuple[Leaf, Leaf]:
    r"""The number of updates that the second moment is of, $\rho_t$, and the most it can be, $\rho_\infty$."""
    most = 2 / (1 - b2) - 1
    return most - 2 * step * b2**step / weight(b2, step), most


def _rectification(length: Scalar, most: Scalar, rectified: Leaf) -> Leaf:
    """The factor that makes up for the variance of the second moment; 1 where it is not asked for."""
    above = (length - 4) * (length - 2) * most
    below = (most - 4) * (most - 2) * length
    # the other branch is no number, and its derivative would be none either
    return torch.sqrt(torch.where(rectified, above, 1.0) / torch.where(rectified, below, 1.0))


@elementwise(
    state={"mu": slot(0.0), "nu": slot(0.0, square=True)},
    static=("nesterov",),
    ranges={"b1": "[0, 1)", "b2": "[0, 1)", "eps": "[0, inf)", "eps_root": "[0, inf)", "threshold": "[4, inf)"},
)
def scale_by_radam(
    u: Leaf,
    mu: Leaf,
    nu: Leaf,
    *,
    step: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    threshold: Scalar = 5.0,
    nesterov: bool = False,
) -> tuple[Leaf, Leaf, Leaf]:
    r"""RAdam: Adam with a factor for the variance of its denominator, which is left out at first.

    $$\rho_\infty = \frac{2}{1 - \beta_2} - 1, \quad \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}, \quad
      r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\, \rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\, \rho_t}}$$
    $$u_t = r_t\, \hat m_t / (\sqrt{\hat v_t + \bar\epsilon} + \epsilon) \text{ if } \rho_t \ge \tau,
      \text{ else } \hat m_t$$

    The moments are those of `scale_by_adam`, corrected for their start at 0.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: term outside the root.
      eps_root: term inside the root, for gradients through the update at 0.
      threshold: $\tau$, at least 4, below which there is no $r_t$.
      nesterov: whether the numerator looks one step ahead, as in `scale_by_adam`.

    Returns:
      The transformation. Its state is `(count, mu, nu)`.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> tx = scale_by_radam()
      >>> tx.update(torch.tensor([1.0, -3.0]), tx.init(torch.zeros(2)))[0]
      tensor([ 1., -3.])

    Source: Liu et al. 2020, arXiv:1908.03265, algorithm 2.
    """
    mu, nu = mean(mu, u, b1), mean_square(nu, u, b2)
    mu_hat = looking_ahead(mu, u, b1, step) if nesterov else unbiased(mu, b1, step)
    length, most = _length(step, b2)
    rectified = length >= threshold
    root = torch.sqrt(unbiased(nu, b2, step) + eps_root) + eps
    adapted = _rectification(length, most, rectified) * mu_hat / root
    return torch.where(rectified, adapted, mu_hat), mu, nu


@elementwise(state={"exp_avg": slot(0.0), "exp_avg_sq": slot(0.0)})
def radam_step(
    u: Leaf,
    exp_avg: Leaf,
    exp_avg_sq: Leaf,
    *,
    step: Scalar,
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
) -> tuple[Leaf, Leaf, Leaf]:
    r"""A step of RAdam as torch has it: above a length of 5, and with an `eps` that is not corrected.

    $$u_t = -\eta\, \hat m_t\, r_t \sqrt{1 - \beta_2^t} / (\sqrt{v_t} + \epsilon)$$

    Args:
      learning_rate: $\eta$.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: $\epsilon$.

    Returns:
      The transformation.

    Example:
      >>> tx = radam_step(0.1)
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0]
      tensor([-0.1000])

    Source: Liu et al. 2020, arXiv:1908.03265, algorithm 2.
    """
    exp_avg, exp_avg_sq = torch_mean(exp_avg, u, b1), torch_mean_square(exp_avg_sq, u, b2)
    length, most = _length(step, b2)
    rectified = length > 5
    scale = _rectification(length, most, rectified) * torch.sqrt(weight(b2, step))
    factor = torch.where(rectified, scale / (torch.sqrt(exp_avg_sq) + eps), 1.0)
    return -(learning_rate / weight(b1, step)) * exp_avg * factor, exp_avg, exp_avg_sq
