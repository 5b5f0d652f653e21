"""Optimizers whose states are saved and loaded."""

import torch
from torch import nn

import functional_optim as fo
from _lib.chains import is_matrix


SHAPES = ((4, 8), (8,), (3, 5))


def named(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    """Parameters with names."""
    generator = torch.Generator().manual_seed(seed)
    names = ("fc.weight", "fc.bias", "head")
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in zip(names, SHAPES, strict=True)
    }


def chain() -> fo.GradientTransformation:
    return fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-2, weight_decay=0.1), fo.params_ema(0.9))


def scheduled() -> fo.GradientTransformation:
    return fo.chain(fo.trace(0.9), fo.scale_by_learning_rate(fo.cosine_decay_schedule(0.1, 30)))


def parted() -> fo.GradientTransformation:
    """Some parameters have slots that others do not."""
    return fo.partition({True: fo.adamw(1e-2), False: fo.sgd(0.1, momentum=0.9)}, is_matrix)
