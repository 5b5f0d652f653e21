"""Adam and its nearest kin."""

from typing import Any

import torch

from .._rule import elementwise
from .._spec import slot


_MU, _NU = slot(0.0, dtype="mu_dtype"), slot(0.0, dtype="nu_dtype")
_RANGES = {"b1": "[0, 1)", "b2": "[0, 1)", "eps": "[0, inf)", "eps_root": "[0, inf)"}


@elementwise(state={"mu": _MU, "nu": _NU}, static=("nesterov",), ranges=_RANGES)
def scale_by_adam(
    u: Any,
    mu: Any,
    nu: Any,
    *,
    step: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    mu_dtype: torch.dtype | None = None,
    nu_dtype: torch.dtype | None = None,
    nesterov: bool = False,
) -> Any:
    mu = b1 * mu + (1 - b1) * u
    nu = b2 * nu + (1 - b2) * u * u
    if nesterov:
        mu_hat = b1 * mu / (1 - b1 ** (step + 1)) + (1 - b1) * u / (1 - b1**step)
    else:
        mu_hat = mu / (1 - b1**step)
    nu_hat = nu / (1 - b2**step)
    return mu_hat / (torch.sqrt(nu_hat + eps_root) + eps), mu, nu
