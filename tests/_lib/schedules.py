"""Values of schedules in kernels, and how far from the true ones they may be."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

import functional_optim as fo
from _lib.records import use


# Values are of order one and take a few operations, each wrong by at most 2**-53 of its result; some, such as
# 1 + cos(pi x) near x = 1, are differences of such numbers, hence a bound on the absolute error too: 8 times 2**-53.
CLOSE = {"rtol": 1e-13, "atol": 2.0**-50}
# In Triton's interpreter a power is exp2(y log2 x): errors of log2 x grow by y, here at most 7.
CLOSE_IN_KERNELS = {"rtol": 1e-12, "atol": 2.0**-50}


def in_kernel(tx: fo.GradientTransformation, counts: Sequence[int], backend: str) -> torch.Tensor:
    """The results that a transformation makes of an update of 1 at each of some counts."""
    update = torch.ones(1, dtype=torch.float64)
    state = tx.init(update)
    with use(backend):
        updates = [tx.update(update, state._replace(count=torch.tensor(t)))[0] for t in counts]
    return torch.cat(updates)


@fo.elementwise
def choose(u: Any, *, s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any) -> Any:
    """One of eight numbers for each element, by the element's number."""
    for k, number in enumerate((s1, s2, s3, s4, s5, s6, s7), 1):
        s0 = torch.where(u == k, number, s0)
    return s0


def in_one_kernel(schedules: Sequence[fo.Schedule], counts: Sequence[int], backend: str) -> torch.Tensor:
    """The values of up to eight schedules in one kernel, which is built sooner than eight: a row per count."""
    filled = [*schedules, *[0.0] * (8 - len(schedules))]
    tx = choose(**{f"s{k}": schedule for k, schedule in enumerate(filled)})
    update = torch.arange(len(schedules), dtype=torch.float64)
    state = tx.init(update)
    with use(backend):
        updates = [tx.update(update, state._replace(count=torch.tensor(t)))[0] for t in counts]
    return torch.stack(updates)


def called(schedule: Callable[[Any], Any], counts: Sequence[int]) -> torch.Tensor:
    """A schedule called with each of some integers."""
    return torch.tensor([float(schedule(t)) for t in counts], dtype=torch.float64)
