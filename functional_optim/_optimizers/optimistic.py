"""Optimistic descent, for games: gradients that foretell the next one."""

from .._chain import chain
from .._compiler.rule import OptionalDtype, Scalar
from .._transform import GradientTransformation
from .._transforms.adam import scale_by_adam
from .._transforms.optimistic import scale_by_optimistic_gradient
from .._transforms.scaling import scale_by_learning_rate
from ._arguments import named_arguments


@named_arguments
def optimistic_gradient_descent(
    learning_rate: Scalar, alpha: Scalar = 1.0, beta: Scalar = 1.0
) -> GradientTransformation:
    r"""Optimistic gradient descent, $\theta_t = \theta_{t-1} - \eta (\alpha g_t + \beta (g_t - g_{t-1}))$.

    Args:
      learning_rate: $\eta$.
      alpha, beta: see `scale_by_optimistic_gradient`.

    Returns:
      The optimizer.

    Example:
      >>> optimistic_gradient_descent(0.1)
      chain(scale_by_optimistic_gradient(), scale_by_learning_rate(learning_rate=0.1))

    Source: Mokhtari et al. 2019, arXiv:1901.08511, section 3.
    """
    return chain(scale_by_optimistic_gradient(alpha, beta), scale_by_learning_rate(learning_rate))


@named_arguments
def optimistic_adam_v2(
    learning_rate: Scalar,
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 1.0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: OptionalDtype = None,
    nesterov: bool = True,
) -> GradientTransformation:
    """Optimistic Adam: the last change of Adam's update is added to it.

    Args:
      learning_rate: the learning rate.
      alpha, beta: see `scale_by_optimistic_gradient`.
      b1, b2, eps, eps_root, mu_dtype, nesterov: see `scale_by_adam`.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> optimistic_adam_v2(1e-3)  # doctest: +NORMALIZE_WHITESPACE
      chain(scale_by_adam(nesterov=True), scale_by_optimistic_gradient(),
            scale_by_learning_rate(learning_rate=0.001))

    Source: Daskalakis et al. 2018, arXiv:1711.00141, algorithm 1.
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov),
        scale_by_optimistic_gradient(alpha, beta),
        scale_by_learning_rate(learning_rate),
    )
