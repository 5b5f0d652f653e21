"""Constraints: updates that keep parameters within bounds."""

import torch

from .._compiler.rule import Leaf
from .._rule import elementwise


@elementwise(final=True)
def keep_params_nonnegative(u: Leaf, p: Leaf) -> Leaf:
    r"""Shortens updates so that parameters do not fall below 0, $u_t = \max(g_t, -\theta)$.

    It stands at the end of a chain, for it looks at the parameters that the update leads to.

    Returns:
      The transformation. It needs the parameters, and has no state.

    Example:
      >>> tx = keep_params_nonnegative()
      >>> params = torch.tensor([1.0, 1.0])
      >>> tx.update(torch.tensor([-0.5, -3.0]), tx.init(params), params)[0]
      tensor([-0.5000, -1.0000])
    """
    return torch.where(p + u < 0, -p, u)
