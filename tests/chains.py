"""Chains of all kinds, and a tree of several dtypes and layouts."""

from typing import Any

import torch
from support import Halve, is_matrix, make_tree

import functional_optim as fo


STEPS = 20


def flip(updates: Any, params: Any) -> Any:
    """A barrier: what a kernel, which sees one element at a time, cannot do."""
    return {k: None if u is None else u.flip(0) if u.ndim else u for k, u in updates.items()}


CHAINS: dict[str, Any] = {
    "sgd": fo.sgd(0.1),
    "momentum": fo.sgd(0.1, momentum=0.9, nesterov=True),
    "clip, AdamW and average": fo.chain(
        fo.clip_by_global_norm(1.0), fo.adamw(1e-2, weight_decay=0.1, mask=is_matrix), fo.params_ema(0.9)
    ),
    "lamb with schedule": fo.chain(fo.zero_nans(), fo.lamb(fo.cosine_decay_schedule(1e-2, STEPS), weight_decay=0.1)),
    "host schedule": fo.sgd(lambda count: [0.1, 0.2][int(count) % 2]),
    "partition": fo.partition({True: fo.adam(1e-2), False: fo.sgd(0.1, 0.9)}, is_matrix),
    "barrier first": fo.chain(fo.stateless(flip), fo.adam(1e-2)),
    "barrier between": fo.chain(fo.trace(0.9), fo.stateless(flip), fo.scale_by_adam(), fo.scale(-1e-2)),
    "barrier last": fo.chain(fo.adam(1e-2), fo.stateless(flip)),
    "only a barrier": fo.chain(Halve()),
}


def mixed_tree() -> dict[str, torch.Tensor]:
    """Leaves of several dtypes and layouts."""
    tree = make_tree(0)
    return {
        "weight": tree["weight"],
        "bias": tree["bias"].float(),
        "scale": tree["scale"].bfloat16(),
        "columns": torch.ones(4, 6)[:, ::2],
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "empty": torch.zeros(0, 3),
    }
