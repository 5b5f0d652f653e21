"""Muon: momentum whose matrices are made orthogonal."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch

from .._chain import chain
from .._compiler.rule import Leaf, OptionalDtype, Scalar
from .._compiler.slots import slot
from .._rule import elementwise, leafwise
from .._transform import GradientTransformation
from ._moments import looking_ahead, mean, torch_mean, torch_slot, unbiased


Polynomial = tuple[float, float, float]

_ROOM = 1.01  # for singular values that rounding makes a little larger than 1, where the polynomials grow fast

# Coefficients (a, b, c) of the odd polynomials a x + b x^3 + c x^5 that singular values go through.
COEFFICIENTS: dict[str, tuple[Polynomial, ...]] = {
    "standard": ((3.4445, -4.7750, 2.0315),),  # Jordan 2024: steep at 0, and never quite 1
    "dion": (  # Ahn et al. 2025
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": (  # Amsel et al. 2025: the best ones for singular values from 1e-3 to 1, of x / 1.01
        (8.28721201814563 / _ROOM, -23.595886519098837 / _ROOM**3, 17.300387312530933 / _ROOM**5),
        (4.107059111542203 / _ROOM, -2.9478499167379106 / _ROOM**3, 0.5448431082926601 / _ROOM**5),
        (3.9486908534822946 / _ROOM, -2.908902115962949 / _ROOM**3, 0.5518191394370137 / _ROOM**5),
        (3.3184196573706015 / _ROOM, -2.488488024314874 / _ROOM**3, 0.51004894012372 / _ROOM**5),
        (2.300652019954817 / _ROOM, -1.6689039845747493 / _ROOM**3, 0.4188073119525673 / _ROOM**5),
        (1.891301407787398 / _ROOM, -1.2679958271945868 / _ROOM**3, 0.37680408948524835 / _ROOM**5),
        (1.8750014808534479 / _ROOM, -1.2500016453999487 / _ROOM**3, 0.3750001645474248 / _ROOM**5),
        (1.875, -1.25, 0.375),
    ),
}
PRECONDITIONING = ("frobenius", "spectral", "aol", "schatten")


def polynomials(ns_coeffs: Any) -> Sequence[Polynomial]:
    """The polynomials that are named or given.

    Raises:
      ValueError: they are no triples of numbers, or there is no such name.
    """
    if isinstance(ns_coeffs, str):
        if ns_coeffs not in COEFFICIENTS:
            raise ValueError(f"`ns_coeffs` is {ns_coeffs!r}, expected one of {list(COEFFICIENTS)}, or coefficients.")
        ns_coeffs = COEFFICIENTS[ns_coeffs]
    given = [ns_coeffs] if _is_polynomial(ns_coeffs) else ns_coeffs
    if not (isinstance(given, Sequence) and given and all(map(_is_polynomial, given))):
        raise ValueError(f"`ns_coeffs` is {ns_coeffs!r:.80}, expected three numbers, or such a triple for each step.")
    return given


def _is_polynomial(x: Any) -> bool:
    return isinstance(x, Sequence) and len(x) == 3 and all(isinstance(y, numbers.Real) for y in x)


def as_matrices(u: torch.Tensor) -> torch.Tensor:
    """A stack of tensors as a stack of matrices: one row for each entry of the first dimension.

    Raises:
      ValueError: the tensors have less than two dimensions.
    """
    if u.ndim < 3:
        raise ValueError(
            f"a tensor of shape {tuple(u.shape[1:])} is no matrix, and cannot be made orthogonal; leave it to another "
            f"rule, with `masked`, `partition`, or the predicate of `muon`."
        )
    return u.flatten(2)


def _normalized(x: torch.Tensor, preconditioning: str, eps: float, clamps: bool) -> torch.Tensor:
    """Matrices of spectral norm 1 at most."""
    if preconditioning == "spectral":
        norm = torch.linalg.matrix_norm(x.float(), ord=2, keepdim=True).to(x.dtype)
    else:
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    return x / (norm.clamp(min=eps) if clamps else norm + eps)


def _precondition(x: torch.Tensor, gram: torch.Tensor, preconditioning: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices and their Gram matrices, scaled so that singular values are at most 1 and closer to it."""
    least = 1e-8
    if preconditioning == "aol":
        s = gram.abs().sum(2, keepdim=True).clamp(min=least).rsqrt()
        return x * s, gram * s * s.mT
    s = torch.linalg.vector_norm(gram, dim=(1, 2), keepdim=True).clamp(min=least).rsqrt()
    return x * s, gram * s * s


def newton_schulz(
    x: torch.Tensor, steps: Sequence[Polynomial], preconditioning: str, eps: float, clamps: bool, by_gram: bool
) -> torch.Tensor:
    """Orthogonal matrices near a stack of matrices, by iterations of odd polynomials.

    Args:
      x: matrices, not higher than they are wide.
      steps: the polynomial of each iteration.
      preconditioning: the scaling at the start.
      eps: $\\epsilon$ in the norm at the start.
      clamps: whether it is the least norm, as in torch, instead of being added.
      by_gram: whether the small Gram matrices are iterated, and the product taken at the end; in float32 at least.
    """
    if by_gram:  # rounding makes eigenvalues of Gram matrices in half types negative, and those grow without a bound
        x = x.to(torch.promote_types(x.dtype, torch.float32))
    starts = preconditioning in ("frobenius", "spectral")
    if starts:
        x = _normalized(x, preconditioning, eps, clamps)
    gram = torch.bmm(x, x.mT)  # `@` would copy the transposed matrices
    if not starts:
        x, gram = _precondition(x, gram, preconditioning)
    if not by_gram:
        for k, (a, b, c) in enumerate(steps):
            gram = torch.bmm(x, x.mT) if k else gram
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    product = eye.expand_as(gram)
    for a, b, c in steps:
        factor = a * eye + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product, gram = torch.bmm(factor, product), torch.bmm(torch.bmm(factor, gram), factor)
    return torch.bmm(product, x)


@leafwise(
    static=(
        "ns_coeffs",
        "ns_steps",
        "eps",
        "adaptive",
        "preconditioning",
        "compute_dtype",
        "by_gram",
        "eps_is_least",
    ),
    ranges={
        "ns_steps": "[1, inf)",
        "eps": "[0, inf)",
        "preconditioning": PRECONDITIONING,
        "compute_dtype": (None, torch.float64, torch.float32, torch.bfloat16, torch.float16),
    },
    batched=True,
)
def orthogonalize(
    u: Leaf,
    *,
    ns_coeffs: Any = "standard",
    ns_steps: int = 5,
    eps: float = 1e-8,
    adaptive: bool = False,
    preconditioning: str = "frobenius",
    compute_dtype: OptionalDtype = None,
    by_gram: bool = False,
    eps_is_least: bool = False,
) -> Leaf:
    r"""Makes matrices orthogonal by Newton-Schulz iterations.

    $$X_0 = G / \lVert G \rVert_F, \quad A = X_{k-1} X_{k-1}^\top, \quad X_k = a X_{k-1} + (b A + c A^2) X_{k-1}$$

    Matrices of one shape are computed together. A tensor of more than two dimensions, such as the kernel of a
    convolution, counts as a matrix with one row for each entry of its first dimension.

    Args:
      ns_coeffs: $(a, b, c)$, or such a triple for each step, of which the last is repeated; or the name of some:
        `"standard"`, `"dion"`, or `"polar_express"`, with which singular values come closest to 1.
      ns_steps: number of iterations.
      eps: term in the first norm.
      adaptive: whether the result is multiplied by its inner product with the update.
      preconditioning: scaling at the start: by the `"frobenius"` norm, the `"spectral"` norm, row by row (`"aol"`), or
        by the norm of the Gram matrix (`"schatten"`).
      compute_dtype: dtype of the iterations, such as `torch.bfloat16`; by default that of the updates, or float32 for
        those in float16, where `eps` is 0 and products leave the range.
      by_gram: whether $A$ is iterated in place of $X$, and $X$ multiplied at the end. For matrices that are much wider
        than high, or higher than wide, that takes fewer operations. They are in float32 where `compute_dtype` is a half
        type, in which rounded Gram matrices have negative eigenvalues.
      eps_is_least: whether `eps` is the least norm, as in torch, instead of being added to it.

    Returns:
      The transformation.

    Raises:
      ValueError: a leaf has less than two dimensions, or an argument is none of those that there are.

    Example:
      >>> tx = orthogonalize(ns_coeffs="polar_express", ns_steps=8)
      >>> updates, _ = tx.update({"w": torch.tensor([[3.0, 0.0], [0.0, 0.1]])}, tx.init({"w": torch.zeros(2, 2)}))
      >>> updates["w"].round(decimals=3)
      tensor([[1., 0.],
              [0., 1.]])

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Amsel et al. 2025,
    arXiv:2505.16932; Boissin et al. 2025, arXiv:2512.04632; Grishina et al. 2025, arXiv:2506.10935.
    """
    matrices = as_matrices(u)
    x = matrices.to(compute_dtype or (torch.float32 if u.dtype is torch.float16 else u.dtype))
    high = x.shape[1] > x.shape[2]
    given = polynomials(ns_coeffs)
    steps = [given[min(k, len(given) - 1)] for k in range(ns_steps)]  # the last polynomial serves further steps
    x = newton_schulz(x.mT if high else x, steps, preconditioning, eps, eps_is_least, by_gram)
    # in the order of the updates, by the copy that changes the dtype, and not by another one after it
    x = (x.mT if high else x).to(u.dtype, memory_format=torch.contiguous_format)
    if adaptive:
        x = x * (x * matrices).sum((1, 2), keepdim=True)
    return x.reshape(u.shape)


@leafwise(static=("consistent_rms", "clamped"), ranges={"consistent_rms": "[0, inf)"}, batched=True)
def scale_by_shape(u: Leaf, *, consistent_rms: float | None = None, clamped: bool = True) -> Leaf:
    r"""Multiplies matrices by a factor that depends on their shape, $\sqrt{\max(1, \text{rows} / \text{columns})}$.

    Rows are outputs and columns inputs of a layer, as in torch.

    Args:
      consistent_rms: the root mean square that orthogonal matrices of all shapes are to have, in place of that factor:
        then it is this times $\sqrt{\max(\text{rows}, \text{columns})}$. 0.2 is about that of AdamW's updates.
      clamped: whether the factor is at least 1; otherwise it is $\sqrt{\text{rows} / \text{columns}}$, which bounds
        the change of a layer's output whatever its shape.

    Returns:
      The transformation.

    Raises:
      ValueError: a leaf has less than two dimensions.

    Example:
      >>> tx = scale_by_shape()
      >>> tx.update({"w": torch.ones(4, 1)}, tx.init({"w": torch.zeros(4, 1)}))[0]["w"].flatten()
      tensor([2., 2., 2., 2.])

    Source: Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982, section 2.2; Bernstein 2025, "Deriving Muon".
    """
    rows, columns = as_matrices(u).shape[1:]
    if consistent_rms is None:
        return u * math.sqrt(max(1 if clamped else 0, rows / columns))
    return u * (math.sqrt(max(rows, columns)) * consistent_rms)


@elementwise(state={"mu": slot(0.0, dtype="mu_dtype")}, static=("nesterov",), ranges={"beta": "[0, 1)"})
def muon_momentum(
    u: Leaf, mu: Leaf, *, step: Scalar, beta: Scalar = 0.95, nesterov: bool = True, mu_dtype: OptionalDtype = None
) -> tuple[Leaf, Leaf]:
    r"""The momentum of Muon: a mean of past updates, corrected for its start, that looks one step ahead.

    $$m_t = \beta m_{t-1} + (1 - \beta) g_t, \quad
      u_t = \beta \frac{m_t}{1 - \beta^{t+1}} + (1 - \beta) \frac{g_t}{1 - \beta^t}$$

    Args:
      beta: $\beta$.
      nesterov: whether it looks ahead; otherwise $u_t = m_t / (1 - \beta^t)$.
      mu_dtype: how the mean is stored; by default as the parameter.

    Returns:
      The transformation. Its state is `(count, mu)`.

    Raises:
      ValueError: `beta` is out of its range.

    Example:
      >>> tx = muon_momentum(beta=0.5)
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0].round(decimals=4)
      tensor([1.3333])

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    mu = mean(mu, u, beta)
    return looking_ahead(mu, u, beta, step) if nesterov else unbiased(mu, beta, step), mu


@elementwise(state={"momentum_buffer": torch_slot()}, static=("nesterov",))
def torch_muon_momentum(
    u: Leaf, momentum_buffer: Leaf, *, momentum: Scalar = 0.95, nesterov: bool = True
) -> tuple[Leaf, Leaf]:
    r"""The momentum of Muon as torch has it, not corrected for its start.

    $$b_t = \mu b_{t-1} + (1 - \mu) g_t, \quad u_t = (1 - \mu) g_t + \mu b_t$$

    Args:
      momentum: $\mu$.
      nesterov: whether it looks ahead; otherwise $u_t = b_t$.

    Returns:
      The transformation.

    Example:
      >>> tx = torch_muon_momentum(0.5)
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0]
      tensor([0.7500])

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    buffer = torch_mean(momentum_buffer, u, momentum)
    return (torch.lerp(u, buffer, momentum) if nesterov else buffer), buffer


def scale_by_muon(
    ns_coeffs: Any = "standard",
    ns_steps: int = 5,
    beta: Scalar = 0.95,
    eps: float = 1e-8,
    mu_dtype: OptionalDtype = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: str = "frobenius",
    compute_dtype: OptionalDtype = None,
    by_gram: bool = False,
) -> GradientTransformation:
    """Muon before its scaling by shape: `muon_momentum`, made orthogonal by `orthogonalize`.

    Args:
      ns_coeffs, ns_steps, eps, adaptive, preconditioning, compute_dtype, by_gram: see `orthogonalize`.
      beta, nesterov, mu_dtype: see `muon_momentum`.

    Returns:
      The transformation.

    Raises:
      ValueError: a leaf has less than two dimensions, or an argument is out of its range.

    Example:
      >>> scale_by_muon(beta=0.9)
      chain(muon_momentum(beta=0.9), orthogonalize())

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    polynomials(ns_coeffs)
    if compute_dtype is not None and not (isinstance(compute_dtype, torch.dtype) and compute_dtype.is_floating_point):
        raise TypeError(f"`compute_dtype` is {compute_dtype!r:.60}, expected a floating dtype, such as torch.bfloat16.")
    return chain(
        muon_momentum(beta, nesterov, mu_dtype),
        orthogonalize(_frozen(ns_coeffs), ns_steps, eps, adaptive, preconditioning, compute_dtype, by_gram),
    )


def _frozen(ns_coeffs: Any) -> Any:
    """Coefficients as tuples, which can be compared and hashed."""
    if isinstance(ns_coeffs, str):
        return ns_coeffs
    return tuple(tuple(x) if isinstance(x, Sequence) else x for x in ns_coeffs)
