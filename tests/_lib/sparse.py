"""Parameters with sparse gradients."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch

from _lib.compare import assert_same_bits, ulps
from _lib.optimizers import content, params_of, twins
from functional_optim import adapters


F64, F32 = torch.float64, torch.float32
STEPS = 20
# Of each parameter the shape and the number of dimensions that indices are over
LAYOUTS: tuple[tuple[tuple[int, ...], int], ...] = (((9, 16), 1), ((4, 3, 8), 2), ((6, 2, 4), 1), ((0, 3), 1))
ONE = LAYOUTS[:1]


# The quotient of a step has a root of torch that may be off by one unit, an addition, two divisions and a product on
# either side, half a unit each, and then comes a sum; units double at a power of two.
UNITS = 4.0


def make_params(layouts: Sequence[tuple[tuple[int, ...], int]], dtype: torch.dtype = F64) -> list[torch.nn.Parameter]:
    """Parameters of normal deviates; one of three dimensions is stored with its last dimension first."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=F64).to(dtype) for shape, _ in layouts]
    return [torch.nn.Parameter(x.permute(2, 0, 1).contiguous().permute(1, 2, 0) if x.ndim == 3 else x) for x in made]


def sparse_grad(
    p: torch.Tensor, dims: int, seed: int, repeat: bool = False, touched: int | None = None
) -> torch.Tensor:
    """Normal deviates at random indices, of which there are between none and six; with `repeat` some are the same."""
    generator = torch.Generator().manual_seed(seed)
    places = p.shape[:dims].numel()
    n = int(torch.randint(0, 7, (), generator=generator)) if touched is None else touched
    n = min(n, places)
    flat = torch.randperm(places, generator=generator)[:n]
    if repeat and n:
        flat = flat[torch.randint(0, (n + 1) // 2, (n,), generator=generator)]
    indices = torch.stack(torch.unravel_index(flat, p.shape[:dims])) if n else torch.zeros(dims, 0, dtype=torch.int64)
    values = torch.randn((n, *p.shape[dims:]), generator=generator, dtype=F64).to(p.dtype)
    return torch.sparse_coo_tensor(indices, values, p.shape, check_invariants=True)


def give_sparse(opts: Sequence[Any], layouts: Any, step: int, repeat: bool = False) -> None:
    """Puts the same sparse gradients where optimizers find them."""
    for opt in opts:
        for k, (p, (_, dims)) in enumerate(zip(params_of(opt), layouts, strict=True)):
            p.grad = sparse_grad(p, dims, 100 * step + k, repeat)


def untouched(p: torch.Tensor) -> torch.Tensor:
    """The elements that the gradient of a parameter does not name."""
    assert p.grad is not None
    ones = torch.sparse_coo_tensor(p.grad._indices(), torch.ones_like(p.grad._values()), p.shape, check_invariants=True)
    return ones.to_dense() == 0


def step_checked(opt: Any) -> None:
    """Takes a step, and asserts that elements which no gradient names keep their bits, in state too."""
    before = content(opt)
    opt.step()
    for k, p in enumerate(params_of(opt)):
        still = untouched(p)
        assert_same_bits(p.detach()[still], before["params"][k][still])
        for key, x in opt.state.get(p, {}).items():
            if key != "step" and before["state"][k]:
                assert_same_bits(x[still], before["state"][k][key][still])


def pair(name: str, layouts: Any, dtype: torch.dtype = F64, **kwargs: Any) -> tuple[Any, Any]:
    """Our optimizer of a name and torch's."""
    params = make_params(layouts, dtype)
    return (
        getattr(adapters, name)(params, **deepcopy(kwargs)),
        getattr(torch.optim, name)(twins(params), **deepcopy(kwargs)),
    )


def follow(ours: Any, theirs: Any, layouts: Any, steps: range, after: Callable[[], None] = lambda: None) -> float:
    """The distance of a step's parameters from torch's at most, in units; all else is asserted to be the same bits."""
    worst = 0.0
    for step in steps:
        give_sparse([ours, theirs], layouts, step, repeat=step % 2 == 1)
        before = content(ours)["params"]
        step_checked(ours)
        theirs.step()
        assert_same_bits(content(ours)["state"], content(theirs)["state"])
        for p, q, was in zip(params_of(ours), params_of(theirs), before, strict=True):
            if p.numel():
                worst = max(worst, ulps(p, q, was, p - was).max().item())
            with torch.no_grad():
                q.copy_(p)
        after()
    return worst


# torch's sparse momentum has an entry for each gradient that touched a row, so that each of these steps has a rounding
# for each step before it, in ours and in torch's, of numbers that are less than 8: half a unit of 4 each.
MOMENTUM = {"rtol": 0.0, "atol": STEPS * STEPS * 2 * 4 * 2**-53}


def mixed(cls: Any, sparse_options: dict[str, Any], dense_options: dict[str, Any], **kwargs: Any) -> Any:
    """An optimizer over two parameters with sparse gradients and two with dense ones, a group of each."""
    params = make_params((*LAYOUTS[:2], *LAYOUTS[:2]))
    return cls([{"params": params[:2], **sparse_options}, {"params": params[2:], **dense_options}], **kwargs)
