"""Optimistic gradients: the update and its last change, which foretells the next one."""

from .._compiler.rule import NUMBER, Leaf, Scalar
from .._compiler.slots import slot
from .._rule import elementwise


@elementwise(state={"previous_gradient": slot("first_update")}, ranges={"alpha": NUMBER, "beta": NUMBER})
def scale_by_optimistic_gradient(
    u: Leaf, previous_gradient: Leaf, *, alpha: Scalar = 1.0, beta: Scalar = 1.0
) -> tuple[Leaf, Leaf]:
    r"""Adds the last change of the update, $u_t = \alpha g_t + \beta (g_t - g_{t-1})$, with $g_0 = g_1$.

    Args:
      alpha: factor of the update.
      beta: factor of its change.

    Returns:
      The transformation. Its state is `(count, previous_gradient)`; optax has `is_initial_step` for the count.

    Example:
      >>> import torch
      >>> tx = scale_by_optimistic_gradient()
      >>> _, state = tx.update(torch.tensor([1.0]), tx.init(torch.zeros(1)))
      >>> tx.update(torch.tensor([3.0]), state)[0]
      tensor([5.])

    Source: Mokhtari et al. 2019, arXiv:1901.08511, section 3.
    """
    return (alpha + beta) * u - beta * previous_gradient, u
