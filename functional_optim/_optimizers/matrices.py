"""Optimizers of whole matrices."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .._chain import chain
from .._compiler.rule import OptionalDtype, Scalar
from .._masking import partition, pattern_of
from .._transform import GradientTransformation, LabelFunction
from .._transforms.clipping import clip_by_block_rms
from .._transforms.decay import add_decayed_weights
from .._transforms.factored import scale_by_factored_rms
from .._transforms.momentum import ema
from .._transforms.muon import scale_by_muon, scale_by_shape
from .._transforms.scaling import scale, scale_by_learning_rate, scale_by_param_block_rms
from .._tree import flatten, show, tree_map
from ._arguments import named_arguments, renaming
from .adam import adamw


ADAFACTOR = {
    "step_offset of scale_by_factored_rms": "decay_offset",
    "epsilon of scale_by_factored_rms": "eps",
    "threshold of clip_by_block_rms": "clipping_threshold",
    "decay of ema": "momentum",
    "accumulator_dtype of ema": "dtype_momentum",
    "weight_decay of add_decayed_weights": "weight_decay_rate",
    "mask of masked": "weight_decay_mask",
}


@named_arguments
@renaming(ADAFACTOR)
def adafactor(
    learning_rate: Scalar = None,
    min_dim_size_to_factor: int = 128,
    decay_rate: Scalar = 0.8,
    decay_offset: Scalar = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: Scalar = 1.0,
    momentum: Scalar = None,
    dtype_momentum: OptionalDtype = torch.float32,
    weight_decay_rate: Scalar = None,
    eps: Scalar = 1e-30,
    factored: bool = True,
    weight_decay_mask: Any = None,
) -> GradientTransformation:
    r"""Adafactor, whose second moment of a matrix is a row and a column; see `scale_by_factored_rms`.

    As in optax, decay is not multiplied by the learning rate.

    Args:
      learning_rate: a factor; None for none.
      min_dim_size_to_factor: the least size of the two largest dimensions of a leaf whose moment is factored.
      decay_rate: $c$ in the decay $1 - t^{-c}$ of the second moment.
      decay_offset: the number of steps that the decay is behind.
      multiply_by_parameter_scale: whether updates are multiplied by the root mean square of the parameter.
      clipping_threshold: the largest root mean square of the update of a leaf; None for none.
      momentum: decay of a mean of updates; None for none.
      dtype_momentum: how that mean is stored; None for as the parameter.
      weight_decay_rate: decay; None for none.
      eps: number that is added to squares.
      factored: whether second moments are factored.
      weight_decay_mask: the leaves that decay; see `masked`.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> tx = adafactor(0.1)
      >>> params = {"w": torch.ones(2)}
      >>> updates, _ = tx.update({"w": torch.ones(2)}, tx.init(params), params)
      >>> updates["w"]
      tensor([-0.1000, -0.1000])

    Source: Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 and 5.
    """
    parts: list[GradientTransformation] = [
        scale_by_factored_rms(factored, decay_rate, decay_offset, min_dim_size_to_factor, eps)
    ]
    if clipping_threshold is not None:
        parts.append(clip_by_block_rms(clipping_threshold))
    if learning_rate is not None:
        parts.append(scale_by_learning_rate(learning_rate, flip_sign=False))
    if multiply_by_parameter_scale:
        parts.append(scale_by_param_block_rms())
    if momentum is not None:
        parts.append(ema(momentum, False, dtype_momentum))
    if weight_decay_rate is not None:
        parts.append(add_decayed_weights(weight_decay_rate, weight_decay_mask))
    return chain(*parts, scale(-1.0))


@dataclass(frozen=True, repr=False)
class _IsMatrix(LabelFunction):
    """The label of a leaf for `muon`: chosen by a predicate, or by its number of dimensions."""

    choose: Callable[[str, torch.Tensor], bool] | None = None

    def __repr__(self) -> str:
        chosen = "p.ndim == 2" if self.choose is None else f"{show(self.choose)}(path, p)"
        return f"lambda path, p: 'muon' if {chosen} else 'adam'"

    def __call__(self, path: str, p: torch.Tensor) -> str:
        chosen = p.ndim == 2 if self.choose is None else self.choose(path, p)
        if not isinstance(chosen, bool):
            raise TypeError(f"`matrices` of muon returned {chosen!r:.60} for {path!r}, expected True or False.")
        return "muon" if chosen else "adam"


ADAM_OF_MUON = {
    "b1 of scale_by_adam": "adam_b1",
    "b2 of scale_by_adam": "adam_b2",
    "eps_root of scale_by_adam": "adam_eps_root",
    "weight_decay of add_decayed_weights": "adam_weight_decay",
    "learning_rate of scale_by_learning_rate": "adam_learning_rate",
}


@named_arguments
@renaming({"mask of masked": "weight_decay_mask"})
def muon(
    learning_rate: Scalar,
    ns_coeffs: Any = "standard",
    ns_steps: int = 5,
    beta: Scalar = 0.95,
    eps: float = 1e-8,
    weight_decay: Scalar = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: OptionalDtype = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: str = "frobenius",
    adam_b1: Scalar = 0.9,
    adam_b2: Scalar = 0.999,
    adam_eps_root: Scalar = 0.0,
    adam_weight_decay: Scalar = 0.0,
    adam_learning_rate: Scalar = None,
    matrices: Any = None,
    consistent_rms: float | None = None,
    compute_dtype: OptionalDtype = None,
    by_gram: bool = False,
) -> GradientTransformation:
    r"""Muon for matrices, AdamW for everything else, in one chain.

    $$O_t = \operatorname{NS}(\hat m_t) \approx U V^\top \text{ of } \hat m_t = U \Sigma V^\top, \quad
      \theta_t = \theta_{t-1} - \eta\,(s\, O_t + \lambda\, \theta_{t-1})$$

    `explain` lists the leaves that are made orthogonal. Embeddings and the last layer of a network are matrices, too,
    which Muon's authors leave to AdamW: exclude them with `matrices`.

    Args:
      learning_rate: $\eta$.
      ns_coeffs, ns_steps, eps, adaptive, preconditioning, compute_dtype, by_gram: see `orthogonalize`.
      beta, nesterov, mu_dtype: see `muon_momentum`.
      weight_decay: $\lambda$, for matrices.
      weight_decay_mask: the leaves that decay; see `masked`.
      adam_b1, adam_b2, adam_eps_root, adam_weight_decay: see `adamw`, for all other leaves.
      adam_learning_rate: their learning rate; by default $\eta$.
      matrices: leaves that Muon takes: a function of the path and the parameter, a regular expression that is searched
        for in the path, or a tree of bools. By default those of two dimensions. A tensor of more counts as a matrix
        with one row for each entry of its first dimension.
      consistent_rms: see `scale_by_shape`, which makes $s$.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range, or a leaf that Muon is to take has less than two dimensions.

    Example:
      >>> tx = muon(0.02, matrices=lambda path, p: p.ndim == 2 and "embed" not in path)
      >>> params = {"embed": torch.ones(4, 2), "layer": torch.ones(2, 2), "bias": torch.ones(2)}
      >>> grads = {"embed": torch.ones(4, 2), "layer": torch.eye(2), "bias": torch.ones(2)}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> (updates["layer"] / updates["layer"][0, 0]).round(decimals=3)
      tensor([[1., 0.],
              [0., 1.]])

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu et al. 2025,
    arXiv:2502.16982.
    """
    labels: Any = _IsMatrix(matrices) if matrices is None or callable(matrices) else matrices
    if isinstance(labels, (str, re.Pattern)):
        pattern = pattern_of(labels, "`matrices` of muon") if isinstance(labels, str) else labels
        labels = {pattern: "muon", re.compile(""): "adam"}
    elif not isinstance(labels, _IsMatrix):
        leaves = flatten(labels)[0]
        if not all(isinstance(x, bool) for x in leaves):
            raise TypeError(
                f"`matrices` of muon is {matrices!r:.60}, expected a function of the path and the parameter, a regular "
                f"expression, or a tree of bools."
            )
        labels = tree_map(lambda is_matrix: "muon" if is_matrix else "adam", labels)
    if consistent_rms is not None and not (isinstance(consistent_rms, (int, float)) and consistent_rms >= 0):
        raise ValueError(
            f"`consistent_rms` is {consistent_rms!r:.60}, expected a number that is not negative, or None."
        )
    return partition(
        {
            "muon": chain(
                scale_by_muon(
                    ns_coeffs,
                    ns_steps,
                    beta,
                    eps,
                    mu_dtype,
                    nesterov=nesterov,
                    adaptive=adaptive,
                    preconditioning=preconditioning,
                    compute_dtype=compute_dtype,
                    by_gram=by_gram,
                ),
                scale_by_shape(consistent_rms),
                add_decayed_weights(weight_decay, weight_decay_mask),
                scale_by_learning_rate(learning_rate),
            ),
            "adam": renaming(ADAM_OF_MUON, "muon")(adamw)(
                learning_rate if adam_learning_rate is None else adam_learning_rate,
                adam_b1,
                adam_b2,
                eps,
                adam_eps_root,
                mu_dtype,
                adam_weight_decay,
                nesterov=nesterov,
            ),
        },
        labels,
    )
