from typing import Any
import torch
from .._rule import elementwise
from ..kernels.reductions import tree_norm
@elementwise(ranges={"max_norm": "(0, inf]"})
def clip_by_global_norm(u: Any, *, max_norm: Any) -> Any:
    norm = tree_norm(u)
    return torch.where(norm < max_norm, u, u / norm * max_norm)
@elementwise
def add_decayed_weights(u: Any, p: Any, *, weight_decay: Any=0.0) -> Any:
    return u + weight_decay * p
@elementwise
def scale(u: Any, *, step_size: Any) -> Any:
    return step_size * u
