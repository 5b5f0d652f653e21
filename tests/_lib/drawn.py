"""Drawn chains over drawn leaves, for tests that hold one way of taking a step against another."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import (
    Phase,
    settings,
    strategies as st,
)

import functional_optim as fo
from _lib.backends import STEPS
from _lib.trees import BF16, F16, F32, F64


Params = dict[str, torch.Tensor]
NAMES = ("a", "b", "c", "d")


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides."""
    match layout:
        case "channels_last":
            return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        case "transposed":
            return x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim > 1 else x
        case "sliced":
            if not x.ndim:
                return x
            holes = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7.0, dtype=x.dtype)
            holes[..., ::2] = x
            return holes[..., ::2]
        case "expanded":
            return x[:1].expand(x.shape) if x.ndim and x.shape[0] else x
        case "offset":  # not at the start of its memory, nor where vectors are
            return torch.cat([torch.zeros(1, dtype=x.dtype), x.flatten()])[1:].view(x.shape)
    return x


def alike(x: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own with the same strides, zero strides too."""
    whole = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return torch.as_strided(whole.clone(), x.shape, x.stride(), x.storage_offset())


SHAPES = [(), (1,), (0,), (3, 0, 2), (7,), (33,), (5, 9), (2, 3, 4, 5), (8, 3, 3, 3), (1023,), (17, 31)]
LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced", "offset"]
DTYPES = [F32, F64, BF16, F16]


class Leaf(NamedTuple):
    """Shape, dtype and layout of a drawn leaf."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    grad_dtype: torch.dtype
    layout: str
    grad_layout: str


class Run(NamedTuple):
    """A drawn chain and its tree.

    Args:
      tx: the transformation.
      leaves: shapes, dtypes and layouts of parameters and gradients.
      seed: the seed of their values.
      spoiled: whether some gradients are NaN.
      how: whether a step is "update", an "apply" of gradients, or one that may "donate" its arguments.
    """

    tx: fo.GradientTransformation
    leaves: tuple[Leaf, ...]
    seed: int
    spoiled: bool
    how: str

    def start(self) -> tuple[Params, list[Params]]:
        """The parameters, and the gradients of each step."""
        generator = torch.Generator().manual_seed(self.seed)

        def tree(dtypes: Sequence[torch.dtype], layouts: Sequence[str]) -> Params:
            return {
                name: laid_out(torch.randn(leaf.shape, generator=generator, dtype=F64).to(dtype), layout)
                for name, leaf, dtype, layout in zip(NAMES, self.leaves, dtypes, layouts, strict=False)
            }

        params = tree([x.dtype for x in self.leaves], [x.layout for x in self.leaves])
        grad_dtypes, grad_layouts = [x.grad_dtype for x in self.leaves], [x.grad_layout for x in self.leaves]
        grads = [tree(grad_dtypes, grad_layouts) for _ in range(STEPS)]
        if self.spoiled:
            for x in grads[1].values():
                x[(0,) * x.ndim if x.numel() else ...] = math.nan
        return params, grads


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    """Hyper-parameters. They are not part of a program, so drawing them costs nothing."""
    return st.floats(low, high)


decays = numbers(0.5, 0.99)
steps = st.one_of(
    numbers(0.01, 0.5),
    st.builds(fo.cosine_decay_schedule, numbers(0.01, 0.5), st.just(10)),
    st.builds(lambda x: lambda count: x / (1 + count), numbers(0.01, 0.5)),
    st.builds(torch.tensor, numbers(0.01, 0.5)),
)
stored = st.sampled_from([None, F32, BF16])
RULES = st.one_of(
    st.builds(fo.scale, numbers(-2, 2)),
    st.builds(fo.scale_by_schedule, steps),
    st.builds(fo.trace, decays, st.booleans(), stored),
    st.builds(fo.ema, decays, st.booleans(), stored),
    st.builds(fo.scale_by_adam, decays, decays, numbers(1e-8, 1e-2), mu_dtype=stored, nesterov=st.booleans()),
    st.builds(fo.scale_by_amsgrad, decays, decays, numbers(1e-8, 1e-2)),
    st.builds(fo.scale_by_rms, decays, numbers(1e-8, 1e-2), numbers(0, 1), st.booleans(), st.booleans()),
    # with its bias corrected, the first variance is zero but for rounding
    st.builds(fo.scale_by_stddev, decays, numbers(1e-4, 1e-2), numbers(0, 1), st.booleans()),
    st.builds(fo.scale_by_lion, decays, decays, stored, st.sampled_from(["hard", "smooth", "refined"])),
    st.builds(fo.scale_by_sign),
    st.builds(fo.scale_by_trust_ratio, numbers(0, 0.1), numbers(0.5, 2), numbers(0, 1e-2)),
    st.builds(fo.add_decayed_weights, numbers(0, 0.1)),
    st.builds(fo.clip, numbers(0.1, 2)),
    st.builds(fo.clip_by_global_norm, numbers(0.1, 10)),
    st.builds(fo.clip_by_block_rms, numbers(0.1, 2)),
    st.builds(fo.zero_nans),
)


class ByName(NamedTuple):
    """A mask or labels, by the last letter of a path, for however many leaves there are."""

    values: tuple[Any, ...]

    def __call__(self, path: str, p: torch.Tensor) -> Any:
        return self.values[NAMES.index(path[-1])]


def wrapped(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Combinations of transformations."""
    some = st.tuples(*[st.booleans()] * len(NAMES)).filter(lambda bits: bits[0]).map(ByName)
    labels = st.tuples(*[st.sampled_from("xy")] * len(NAMES)).map(ByName)
    return st.one_of(
        st.lists(inner, max_size=2).map(lambda txs: fo.chain(*txs)),
        st.builds(fo.masked, inner, some),
        st.builds(lambda x, y, by: fo.partition({"x": x, "y": y}, by), inner, inner, labels),
    )


leaves = st.builds(
    Leaf,
    st.sampled_from(SHAPES),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
    st.sampled_from([*LAYOUTS, "expanded"]),
)
# leaves of the same dtypes are one program, as in most trees
of_one_dtype = st.tuples(st.lists(leaves, min_size=1, max_size=len(NAMES)), leaves).map(
    lambda x: tuple(leaf._replace(dtype=x[1].dtype, grad_dtype=x[1].grad_dtype) for leaf in x[0])
)
links = st.recursive(RULES, wrapped, max_leaves=3)
RUNS = st.builds(
    lambda txs, average, *rest: Run(fo.chain(*txs, *([fo.params_ema(0.9)] if average else [])), *rest),
    st.lists(links, min_size=1, max_size=3),
    st.booleans(),
    st.one_of(of_one_dtype, st.lists(leaves, min_size=1, max_size=2).map(tuple)),
    st.integers(0, 2**16),
    st.booleans(),
    st.sampled_from(["update", "apply", "donate"]),
)


def same_each_time(examples: int, **more: Any) -> settings:
    """The same examples every time: random ones belong on a developer's machine.

    One that fails is shown as it was drawn: making it smaller can take minutes (add Phase.shrink to do so).
    """
    phases = (Phase.explicit, Phase.generate)
    return settings(derandomize=True, deadline=None, max_examples=examples, database=None, phases=phases, **more)


DRAWN = same_each_time(25)
