"""Adadelta, Adagrad, Adamax, NAdam and RAdam of torch.optim, as chains: gradients over moments of past ones.

They are made as those of `classes` are. None of torch's but Adagrad has a fused kernel, with whose bits ours agrees.
"""

from typing import Any

import torch

import functional_optim as fo
from functional_optim._compiler.rule import Option
from functional_optim._params.template import Template
from functional_optim._transforms.adadelta import adadelta_ratio
from functional_optim._transforms.adagrad import adagrad_step, sparse_adagrad_step
from functional_optim._transforms.adamax import adamax_step
from functional_optim._transforms.nadam import nadam_step
from functional_optim._transforms.radam import radam_step
from functional_optim._transforms.scaling import descend

from ._named import B1, B2, EPS, LR, PlainClass, before
from ._naming import template


class Adadelta(PlainClass, torch.optim.Adadelta):  # type: ignore[misc]
    """`torch.optim.Adadelta` from a chain; arguments, defaults and state are the same.

    Example:
      >>> import torch
      >>> p = torch.nn.Parameter(torch.ones(1))
      >>> opt = Adadelta([p], rho=0.75, eps=0.75)
      >>> p.grad = torch.ones(1)
      >>> opt.step()
      >>> round(p.item(), 4), sorted(opt.state[p])
      (0.134, ['acc_delta', 'square_avg', 'step'])
    """

    def _steps(self) -> list[fo.GradientTransformation]:
        return [adadelta_ratio(Option("rho"), EPS), descend(LR)]


class Adagrad(PlainClass, torch.optim.Adagrad):  # type: ignore[misc]
    """`torch.optim.Adagrad` from a chain; arguments, defaults and state are the same.

    The state is there from the start, as in torch. A sparse gradient changes the rows that it touches.

    Example:
      >>> import torch
      >>> p = torch.nn.Parameter(torch.ones(1))
      >>> opt = Adagrad([p], lr=0.5, initial_accumulator_value=3.0)
      >>> p.grad = torch.ones(1)
      >>> opt.step()
      >>> round(p.item(), 6), sorted(opt.state[p])
      (0.75, ['step', 'sum'])
    """

    def _arguments(self) -> tuple[Any, ...]:
        # the first value is the optimizer's, not a group's, as in torch
        return LR, Option("lr_decay"), self.defaults["initial_accumulator_value"], EPS

    def _steps(self) -> list[fo.GradientTransformation]:
        return [adagrad_step(*self._arguments())]

    def _row_template(self, switches: tuple[Any, ...]) -> Template | None:
        maximize, l2, *_ = switches
        if l2:
            raise RuntimeError("weight_decay option is not compatible with sparse gradients")
        return template(fo.chain(*before(maximize, False), sparse_adagrad_step(*self._arguments())), self.SLOTS)


class Adamax(PlainClass, torch.optim.Adamax):  # type: ignore[misc]
    """`torch.optim.Adamax` from a chain; arguments, defaults and state are the same.

    Example:
      >>> import torch
      >>> p = torch.nn.Parameter(torch.ones(1))
      >>> opt = Adamax([p], lr=0.5)
      >>> p.grad = torch.ones(1)
      >>> opt.step()
      >>> round(p.item(), 6), sorted(opt.state[p])
      (0.5, ['exp_avg', 'exp_inf', 'step'])
    """

    def _steps(self) -> list[fo.GradientTransformation]:
        return [adamax_step(LR, B1, B2, EPS)]


class NAdam(PlainClass, torch.optim.NAdam):  # type: ignore[misc]
    """`torch.optim.NAdam` from a chain; arguments, defaults and state are the same.

    Example:
      >>> import torch
      >>> p = torch.nn.Parameter(torch.ones(1))
      >>> opt = NAdam([p], lr=0.5)
      >>> p.grad = torch.ones(1)
      >>> opt.step()
      >>> round(p.item(), 4), sorted(opt.state[p])
      (0.4718, ['exp_avg', 'exp_avg_sq', 'mu_product', 'step'])
    """

    def _steps(self) -> list[fo.GradientTransformation]:
        return [nadam_step(LR, B1, B2, EPS, Option("momentum_decay"), self._counter_dtype())]


class RAdam(PlainClass, torch.optim.RAdam):  # type: ignore[misc]
    """`torch.optim.RAdam` from a chain; arguments, defaults and state are the same.

    Example:
      >>> import torch
      >>> p = torch.nn.Parameter(torch.ones(1))
      >>> opt = RAdam([p], lr=0.5)
      >>> p.grad = torch.ones(1)
      >>> opt.step()
      >>> round(p.item(), 6), sorted(opt.state[p])
      (0.5, ['exp_avg', 'exp_avg_sq', 'step'])
    """

    def _steps(self) -> list[fo.GradientTransformation]:
        return [radam_step(LR, B1, B2, EPS)]
