"""The two-loop recursion."""

from collections.abc import Callable, Sequence

import torch


Number = float | torch.Tensor


def two_loop(
    vector: torch.Tensor,
    steps: Sequence[torch.Tensor],
    differences: Sequence[torch.Tensor],
    weights: Sequence[Number],
    scale: Number,
    dot: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.dot,
) -> torch.Tensor:
    r"""The product $H v$ of a vector and the approximation of the inverse Hessian.

    $H$ begins as $\gamma I$ and is made to satisfy $H y_i = s_i$ for one pair after another:
    $H \leftarrow V_i^\top H V_i + \rho_i s_i s_i^\top$ with $V_i = I - \rho_i y_i s_i^\top$.

    Nothing is done to vectors but adding multiples and taking products, so they may be coordinates in any basis.

    Args:
      vector: $v$.
      steps: $s_i$, differences of parameters, the oldest first.
      differences: $y_i$, differences of gradients.
      weights: $\rho_i = 1 / y_i^\top s_i$.
      scale: $\gamma$.
      dot: the product of two vectors.

    Returns:
      A new vector.

    Example:
      >>> s, y = torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0])
      >>> two_loop(torch.tensor([4.0, 2.0]), [s], [y], [0.25], 0.5)
      tensor([1., 1.])

    Source: Nocedal & Wright 2006, "Numerical Optimization", algorithm 7.4.
    """
    product = vector.clone()
    pairs = list(zip(steps, differences, weights, strict=True))
    alphas: list[torch.Tensor] = []
    for s, y, rho in reversed(pairs):
        alphas.append(dot(s, product) * rho)
        product.add_(y, alpha=-float(alphas[-1]))
    product = product * scale
    for (s, y, rho), alpha in zip(pairs, reversed(alphas), strict=True):
        product.add_(s, alpha=float(alpha - dot(y, product) * rho))
    return product
