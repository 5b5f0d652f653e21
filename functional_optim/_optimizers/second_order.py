"""Optimizers with a model of the curvature."""

from .._chain import chain, identity
from .._compiler.rule import Scalar
from .._transform import GradientTransformation, as_transformation
from .._transforms.lbfgs import scale_by_lbfgs
from .._transforms.linesearch import scale_by_zoom_linesearch
from .._transforms.scaling import scale_by_learning_rate
from ._arguments import named_arguments


@named_arguments
def lbfgs(
    learning_rate: Scalar = None,
    memory_size: int = 10,
    scale_init_precond: bool = True,
    linesearch: GradientTransformation | None = scale_by_zoom_linesearch(20, initial_guess_strategy="one"),  # noqa: B008
) -> GradientTransformation:
    r"""L-BFGS, $\theta_t = \theta_{t-1} - \eta_t H_t g_t$, with a line search for $\eta_t$.

    It is made for objectives that are the same in every step, whole batches. `update` takes the extra arguments `value`,
    `grad` and `value_fn`, for the line search; see `scale_by_zoom_linesearch`. If the objective is no number wherever
    the line search looks, parameters stay at the last point where it was one. `functional_optim.adapters.LBFGS` is
    torch's class.

    Args:
      learning_rate: factor of the direction, before the line search; None for 1.
      memory_size: the number of pairs of differences that the inverse Hessian is made of; see `scale_by_lbfgs`.
      scale_init_precond: whether it begins with a multiple of the identity; see `scale_by_lbfgs`.
      linesearch: a line search, or None for none.

    Returns:
      The optimizer.

    Raises:
      ValueError: `memory_size` is less than 1.

    Example:
      >>> import functional_optim as fo, torch
      >>> f = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
      >>> tx, params = lbfgs(), torch.tensor([-1.2, 1.0], dtype=torch.float64)
      >>> state, value_and_grad = tx.init(params), fo.value_and_grad_from_state(f)
      >>> for _ in range(40):
      ...     value, grad = value_and_grad(params, state=state)
      ...     params, state = fo.apply_gradients(tx, params, grad, state, value=value, grad=grad, value_fn=f)
      >>> params
      tensor([1., 1.], dtype=torch.float64)

    Source: Liu & Nocedal 1989, "On the limited memory BFGS method for large scale optimization".
    """
    return chain(
        scale_by_lbfgs(memory_size, scale_init_precond),
        scale_by_learning_rate(learning_rate),
        identity() if linesearch is None else as_transformation(linesearch, "`linesearch` of lbfgs"),
    )
