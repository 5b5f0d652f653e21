"""`LBFGS` at work on problems, ours or that of torch."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.testing._internal.common_optimizers import optim_db

from _lib.compare import assert_same_bits


F32, F64 = torch.float32, torch.float64


(INFO,) = [info for info in optim_db if info.optim_cls is torch.optim.LBFGS]


KEPT = ("func_evals", "n_iter", "d", "t", "old_dirs", "old_stps", "ro", "H_diag", "prev_flat_grad", "prev_loss")


Loss = Callable[[list[torch.Tensor]], torch.Tensor]


def rosenbrock(params: list[torch.Tensor]) -> torch.Tensor:
    """Six numbers in two parameters."""
    x = torch.cat([p.reshape(-1) for p in params])
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def net(params: list[torch.Tensor]) -> torch.Tensor:
    """The squared error of a small net; its last parameter is not used."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(32, 5, generator=generator, dtype=F64).to(params[0].dtype)
    hidden = torch.tanh(x @ params[0] + params[1])
    return ((hidden @ params[2] - torch.sin(x.sum(1, keepdim=True))) ** 2).mean()


def complex_squares(params: list[torch.Tensor]) -> torch.Tensor:
    """A least-squares problem of complex numbers beside a real one."""
    a, b = params
    weights = torch.arange(1, a.numel() + 1, dtype=F64)
    return (weights * (a - (1 + 2j)).abs() ** 2).sum() + ((b - a.real.sum()) ** 2).sum() + (b**4).sum()


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = F64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=F64).to(dtype) / 2 for shape in shapes]


PROBLEMS: dict[str, tuple[Loss, Callable[[], list[torch.Tensor]]]] = {
    "rosenbrock": (rosenbrock, lambda: [torch.tensor([[-1.2, 1.0], [0.5, -0.3]], dtype=F64), drawn((2,))[0]]),
    "net": (net, lambda: drawn((5, 4), (4,), (4, 1), (3,))),
    "net in float32": (net, lambda: drawn((5, 4), (4,), (4, 1), (3,), dtype=F32)),
    "complex": (complex_squares, lambda: [torch.view_as_complex(drawn((3, 2))[0]), *drawn((2,))]),
}


class Run:
    """An optimizer at work on a problem.

    Args:
      cls: its class.
      problem: the problem's name.
      **kwargs: its arguments.
    """

    def __init__(self, cls: Any, problem: str, **kwargs: Any) -> None:
        self.loss, make = PROBLEMS[problem]
        self.params: list[Any] = [torch.nn.Parameter(x) for x in make()]
        self.opt = cls(self.params, **copy.deepcopy(kwargs))
        self.values: list[float] = []

    def closure(self) -> torch.Tensor:
        self.opt.zero_grad()
        loss = self.loss(self.params)
        if self.opt.param_groups[0].get("maximize"):  # which torch's own has from 2.14 on
            loss = -loss
        loss.backward()
        self.values.append(loss.item())
        return loss

    def step(self) -> torch.Tensor:
        return self.opt.step(self.closure)

    def content(self) -> dict[str, Any]:
        """All that a step may change."""
        state = self.opt.state[self.params[0]]
        kept = {k: x for k, x in state.items() if k in KEPT}
        return {"params": [p.detach() for p in self.params], "state": numbers(kept), "values": self.values}


def numbers(x: Any) -> Any:
    """A nest with tensors in the place of numbers, of which torch keeps either."""
    if isinstance(x, dict):
        return {k: numbers(v) for k, v in x.items()}
    if isinstance(x, list):
        return [numbers(v) for v in x]
    return x.to(F64) if isinstance(x, torch.Tensor) else torch.tensor(float(x), dtype=F64)


def assert_equal(ours: Run, theirs: Run) -> None:
    one, two = ours.content(), theirs.content()
    assert one["values"] == two["values"]
    assert one["state"].keys() == two["state"].keys()
    assert_same_bits([one["params"], one["state"]], [two["params"], two["state"]])


def one() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(2))


def square(p: torch.Tensor) -> torch.Tensor:
    return (p * p).sum()
