"""torch.optim's optimizers whose learning rates are state, as chains: ASGD and Rprop.

They are made as those of `classes` are. State that torch's checkpoints have made, by a step with a learning rate of 0,
begins with the learning rate of the first step that is taken; in torch's classes it begins with 0.
"""

import torch

import functional_optim as fo
from functional_optim._compiler.rule import Option
from functional_optim._transforms.asgd import asgd_step
from functional_optim._transforms.rprop import rprop_step

from ._named import LR, PlainClass


class ASGD(PlainClass, torch.optim.ASGD):  # type: ignore[misc]
    """`torch.optim.ASGD` from a chain; arguments, defaults and state are the same.

    `averaged_params` swaps the averages in, which are the parameters themselves until step `t0 + 2`.

    Example:
      >>> import torch
      >>> p = torch.nn.Parameter(torch.ones(1))
      >>> opt = ASGD([p], lr=0.5, lambd=0.0)
      >>> p.grad = torch.ones(1)
      >>> opt.step()
      >>> round(p.item(), 6), sorted(opt.state[p])
      (0.5, ['ax', 'eta', 'mu', 'step'])
    """

    def _steps(self) -> list[fo.GradientTransformation]:
        return [asgd_step(LR, Option("lambd"), Option("alpha"), Option("t0"), self._counter_dtype())]


class Rprop(PlainClass, torch.optim.Rprop):  # type: ignore[misc]
    """`torch.optim.Rprop` from a chain; arguments, defaults and state are the same.

    Example:
      >>> import torch
      >>> p = torch.nn.Parameter(torch.ones(1))
      >>> opt = Rprop([p], lr=0.5)
      >>> p.grad = torch.ones(1)
      >>> opt.step()
      >>> round(p.item(), 6), sorted(opt.state[p])
      (0.5, ['prev', 'step', 'step_size'])
    """

    def _steps(self) -> list[fo.GradientTransformation]:
        etas, sizes = (Option("etas", 0), Option("etas", 1)), (Option("step_sizes", 0), Option("step_sizes", 1))
        return [rprop_step(LR, *etas, *sizes)]
