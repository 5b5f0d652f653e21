"""Adafactor: updates divided by the root of a second moment that is kept as rows and columns."""

from collections.abc import Sequence

import torch

from .._compiler.functions import leaf_mean
from .._compiler.rule import NUMBER, Leaf, Scalar
from .._compiler.slots import slot
from .._rule import elementwise, leafwise
from ._moments import torch_slot


BLOCK = 1 << 18  # elements whose squares stay in the cache


def _factored_dims(shape: Sequence[int], factored: bool, min_dim_size_to_factor: int) -> tuple[int, int] | None:
    """The second largest and the largest dimension, if both are large enough to be factored."""
    if not factored or len(shape) < 2:
        return None
    small, large = sorted(range(len(shape)), key=lambda d: (shape[d], d))[-2:]
    return None if shape[small] < min_dim_size_to_factor else (small, large)


def _row_shape(p: torch.Tensor, factored: bool, min_dim_size_to_factor: int) -> Sequence[int] | None:
    dims = _factored_dims(p.shape, factored, min_dim_size_to_factor)
    return None if dims is None else [n for d, n in enumerate(p.shape) if d != dims[1]]


def _column_shape(p: torch.Tensor, factored: bool, min_dim_size_to_factor: int) -> Sequence[int] | None:
    dims = _factored_dims(p.shape, factored, min_dim_size_to_factor)
    return None if dims is None else [n for d, n in enumerate(p.shape) if d != dims[0]]


def _full_shape(p: torch.Tensor, factored: bool, min_dim_size_to_factor: int) -> Sequence[int] | None:
    return p.shape if _factored_dims(p.shape, factored, min_dim_size_to_factor) is None else None


@leafwise(
    state={
        "v_row": slot(shape=_row_shape, square=True),
        "v_col": slot(shape=_column_shape, square=True),
        "v": slot(shape=_full_shape, square=True),
    },
    static=("factored", "min_dim_size_to_factor"),
    ranges={
        "decay_rate": "[0, inf)",
        "step_offset": NUMBER,
        "min_dim_size_to_factor": "[0, inf]",
        "epsilon": "[0, inf)",
    },
)
def scale_by_factored_rms(
    u: Leaf,
    v_row: Leaf | None,
    v_col: Leaf | None,
    v: Leaf | None,
    *,
    step: Scalar,
    factored: bool = True,
    decay_rate: Scalar = 0.8,
    step_offset: Scalar = 0,
    min_dim_size_to_factor: int = 128,
    epsilon: Scalar = 1e-30,
) -> tuple[Leaf, Leaf | None, Leaf | None, Leaf | None]:
    r"""Adafactor's scaling: divides by the root of a second moment that is the product of a row and a column.

    $$R_t = \hat\beta_t R_{t-1} + (1 - \hat\beta_t) \operatorname{mean}_\text{columns}(G_t^2 + \epsilon), \quad
      \hat V_t = R_t C_t / \operatorname{mean}(R_t), \quad u_t = G_t / \sqrt{\hat V_t}, \quad
      \hat\beta_t = 1 - t^{-c}$$

    Args:
      factored: whether moments are factored, over the two largest dimensions.
      decay_rate: $c$.
      step_offset: the number of steps that the decay is behind; until then each step is as the first.
      min_dim_size_to_factor: the least size of these two dimensions; other leaves have a moment per element.
      epsilon: $\epsilon$.

    Returns:
      The transformation. Its state is `(count, v_row, v_col, v)`; a leaf has entries in `v_row` and `v_col`, or in `v`.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> tx = scale_by_factored_rms(min_dim_size_to_factor=2)
      >>> state = tx.init({"w": torch.zeros(3, 2)})
      >>> updates, state = tx.update({"w": torch.full((3, 2), -2.0)}, state)
      >>> updates["w"][0], state.v_row["w"].shape, state.v_col["w"].shape
      (tensor([-1., -1.]), torch.Size([2]), torch.Size([3]))

    Source: Shazeer & Stern 2018, arXiv:1804.04235, algorithm 4.
    """
    weight = torch.clamp(step - step_offset, min=1.0) ** -decay_rate
    dims = _factored_dims(u.shape, factored, min_dim_size_to_factor)
    if dims is None:
        assert v is not None
        v = _mixed(v, _square(u, v) + epsilon, weight)
        return u / v.sqrt(), v_row, v_col, v
    assert v_row is not None
    assert v_col is not None
    square = _square(u, v_row) + epsilon
    small, large = dims
    v_row, v_col = _mixed(v_row, square.mean(large), weight), _mixed(v_col, square.mean(small), weight)
    # in the rows, the smaller dimension is one place further to the front if the larger one was before it
    row_mean = v_row.mean(small - (small > large), keepdim=True)
    row_root = (v_row / row_mean).sqrt().unsqueeze(large)
    return u / row_root / v_col.sqrt().unsqueeze(small), v_row, v_col, v


def _square(u: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """The squares of updates in the wider dtype of the two: float16 has no square of 1e-4."""
    wide = u.to(torch.promote_types(u.dtype, moment.dtype))
    return wide * wide


def _mixed(mean: torch.Tensor, x: torch.Tensor, weight: Scalar) -> torch.Tensor:
    """A moving mean with a new value, whose weight members of `torch.vmap` may have of their own."""
    weight = weight if isinstance(weight, torch.Tensor) else torch.tensor(weight, device="cpu")
    return torch.lerp(mean, x.to(mean.dtype), weight.to(mean.dtype))


def _mean_squares(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The means of squares over the last dimension and over the one before it, with both dimensions kept.

    Squares of a large tensor would be written to memory and read again twice, so blocks of rows that stay in the cache
    are squared one after another.
    """
    n_rows = max(1, BLOCK * u.shape[-2] // max(u.numel(), 1))
    rows, columns = [], []
    for block in torch.split(u, n_rows, -2):
        squares = block.square()
        rows.append(squares.sum(-1, keepdim=True))
        columns.append(squares.sum(-2, keepdim=True))
    return torch.cat(rows, -2) / u.shape[-1], torch.cat(columns, -2).sum(-2, keepdim=True) / u.shape[-2]


def _torch_rows(p: torch.Tensor) -> Sequence[int] | None:
    return (*p.shape[:-1], 1) if p.ndim > 1 else None


def _torch_columns(p: torch.Tensor) -> Sequence[int] | None:
    return (*p.shape[:-2], 1, p.shape[-1]) if p.ndim > 1 else None


def _torch_elements(p: torch.Tensor) -> Sequence[int] | None:
    return p.shape if p.ndim < 2 else None


@leafwise(
    state={
        "row_var": torch_slot(shape=_torch_rows),
        "col_var": torch_slot(shape=_torch_columns),
        "variance": torch_slot(shape=_torch_elements),
    },
    static=("eps1",),
    batched=True,
    stacked_up_to=BLOCK // 4,
)
def factored_square(
    u: Leaf,
    row_var: Leaf | None,
    col_var: Leaf | None,
    variance: Leaf | None,
    *,
    step: Scalar,
    beta2_decay: Scalar = -0.8,
    eps1: float | None = None,
) -> tuple[Leaf, Leaf | None, Leaf | None, Leaf | None]:
    r"""The second moment of Adafactor as torch has it: the last two dimensions are factored.

    $$\hat V_t = R_t C_t / \max(\operatorname{mean}(R_t), \epsilon_1)$$

    Args:
      beta2_decay: $\tau$ in the weight $t^\tau$ of new squares.
      eps1: $\epsilon_1$; None for the machine epsilon of the update's dtype.

    Returns:
      The transformation, whose update is $\max(\hat V_t, \epsilon_1^2)$.

    Example:
      >>> tx = factored_square()
      >>> squares, _ = tx.update({"w": torch.full((2, 2), 3.0)}, tx.init({"w": torch.ones(2, 2)}))
      >>> squares["w"][0].round(decimals=3)
      tensor([9., 9.])

    Source: Shazeer & Stern 2018, arXiv:1804.04235, algorithm 4.
    """
    least = torch.finfo(u.dtype).eps if eps1 is None else eps1
    weight = (step**beta2_decay).to(u.dtype)
    if u.ndim < 3:  # a stack of vectors or numbers
        assert variance is not None
        variance = torch.lerp(variance, u * u, weight)
        return variance.clamp(min=least * least), row_var, col_var, variance
    assert row_var is not None
    assert col_var is not None
    rows, columns = _mean_squares(u)
    row_var, col_var = torch.lerp(row_var, rows, weight), torch.lerp(col_var, columns, weight)
    share = row_var / row_var.mean(-2, keepdim=True).clamp(min=least)
    return (share * col_var).clamp_min_(least * least), row_var, col_var, variance


@elementwise
def adafactor_descend(
    u: Leaf,
    before: Leaf,
    p: Leaf,
    *,
    step: Scalar,
    learning_rate: Scalar,
    eps2: Scalar = 1e-3,
    d: Scalar = 1.0,
    weight_decay: Scalar = 0.0,
) -> Leaf:
    r"""A step of Adafactor as torch has it, from gradients and their second moment: the step size is relative.

    $$U_t = G_t / \sqrt{\hat V_t}, \quad
      \theta_t = (1 - \eta\lambda)\, \theta_{t-1} - \max(\epsilon_2, \operatorname{RMS}(\theta_{t-1}))
      \min(\eta, 1 / \sqrt t) \frac{U_t}{\max(1, \operatorname{RMS}(U_t) / d)}$$

    Args:
      inner: the transformation that makes $\hat V_t$ of $G_t$, `factored_square`.
      learning_rate: $\eta$.
      eps2: $\epsilon_2$.
      d: the largest root mean square of a leaf's update.
      weight_decay: $\lambda$.

    Returns:
      The transformation; its update is the difference of the parameters.

    Example:
      >>> tx = adafactor_descend(factored_square(), learning_rate=0.1)
      >>> params = {"w": torch.ones(2, 2)}
      >>> tx.update({"w": torch.ones(2, 2)}, tx.init(params), params)[0]["w"][0]
      tensor([-0.1000, -0.1000])

    Source: Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 and 5.
    """
    update = before * torch.rsqrt(u)
    length = torch.sqrt(leaf_mean(update * update))
    own = torch.sqrt(leaf_mean(p * p))
    size = torch.maximum(own, eps2) * torch.minimum(learning_rate, step**-0.5) / torch.clamp(length / d, min=1.0)
    return torch.addcmul(p * (1 - learning_rate * weight_decay), update, -size) - p
