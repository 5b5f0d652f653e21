"""The optimizers of torch.optim that compute whole tensors, as chains."""

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import torch

import functional_optim as fo
from functional_optim._compiler.arguments import plain_number
from functional_optim._compiler.rule import Option
from functional_optim._params.template import Template
from functional_optim._transforms.decay import shrink_and_descend
from functional_optim._transforms.factored import adafactor_descend, factored_square
from functional_optim._transforms.muon import torch_muon_momentum

from ._named import DECAY, LR, MOMENTUM, NamedClass, before
from ._naming import template
from ._numbers import check_number
from ._steps import StepInputs


def _plain(option: Any) -> Any:
    """A switch of the chain, as a number where it is a tensor of one element."""
    return option.item() if isinstance(option, torch.Tensor) and option.numel() == 1 else option


def _check_sequence(name: str, value: Any, expected: str) -> None:
    """Refuses an option that holds no numbers in order.

    Raises:
      TypeError: with its name and value.
    """
    if not isinstance(value, (tuple, list)) and getattr(value, "ndim", None) != 1:
        raise TypeError(f"`{name}` is {type(value).__name__} {value!r:.60}, expected {expected}.")


class _WholeTensors(NamedClass):
    """The common part of both: complex parameters with gradients are refused."""

    def _step_on(self, inputs: StepInputs) -> None:
        if any(g is not None and p.is_complex() for p, g in zip(inputs.params, inputs.grads, strict=True)):
            raise RuntimeError(f"{type(self).__name__} does not support complex parameters")
        super()._step_on(inputs)


class Muon(_WholeTensors, torch.optim.Muon):  # type: ignore[misc]
    """`torch.optim.Muon` from a chain; arguments, defaults and state are the same.

    Matrices of one shape are computed together.

    Example:
      >>> import torch
      >>> p = torch.nn.Parameter(torch.zeros(2, 2))
      >>> opt = Muon([p], lr=0.5)
      >>> p.grad = torch.eye(2)
      >>> opt.step()
      >>> sorted(opt.state[p])
      ['momentum_buffer']
    """

    def _switches(self, group: Mapping[str, Any]) -> tuple[Hashable, ...]:
        names = ("nesterov", "ns_coefficients", "ns_steps", "eps", "adjust_lr_fn")
        switches = {name: _plain(group[name]) for name in names}
        for name in ("ns_steps", "eps"):
            check_number(name, switches[name])
            switches[name] = +plain_number(switches[name])  # a bool is 1 or 0, as in torch
        if switches["ns_steps"] >= 100:
            raise ValueError("Number of steps must be less than 100 for computational efficiency")
        _check_sequence("ns_coefficients", switches["ns_coefficients"], "a tuple of three numbers")
        if isinstance(switches["ns_coefficients"], torch.Tensor):
            switches["ns_coefficients"] = tuple(switches["ns_coefficients"].tolist())
        if len(switches["ns_coefficients"]) != 3:
            raise ValueError("Coefficients must be a tuple of exactly 3 values")
        for k, x in enumerate(switches["ns_coefficients"]):
            check_number(f"ns_coefficients[{k}]", x)
        if not isinstance(switches["adjust_lr_fn"], Hashable):
            raise TypeError(f"`adjust_lr_fn` is {switches['adjust_lr_fn']!r:.60}, expected a name, or None.")
        return tuple(tuple(x) if isinstance(x, list) else x for x in switches.values())

    def _template(self, switches: tuple[Any, ...]) -> Template:
        nesterov, coefficients, steps, eps, adjust = switches
        adjusting = {
            None: fo.scale_by_shape(),
            "original": fo.scale_by_shape(),
            "match_rms_adamw": fo.scale_by_shape(0.2),
            "spectral_unclamped": fo.scale_by_shape(clamped=False),
        }
        shape = [adjusting[adjust]] if adjust in adjusting else []  # any other leaves it out, as torch has it in groups
        parts = [
            torch_muon_momentum(MOMENTUM, bool(nesterov)),
            fo.orthogonalize(coefficients, steps, eps, compute_dtype=torch.bfloat16, eps_is_least=True),
            *shape,
            shrink_and_descend(LR, DECAY),
        ]
        return template(fo.chain(*parts), self.SLOTS)


class Adafactor(_WholeTensors, torch.optim.Adafactor):  # type: ignore[misc]
    """`torch.optim.Adafactor` from a chain; arguments, defaults and state are the same.

    Tensors of one shape are computed together. `foreach` is accepted and makes no difference.

    Example:
      >>> import torch
      >>> p = torch.nn.Parameter(torch.ones(2, 2))
      >>> opt = Adafactor([p], lr=0.5)
      >>> p.grad = torch.ones(2, 2)
      >>> opt.step()
      >>> sorted(opt.state[p])
      ['col_var', 'row_var', 'step']
    """

    OPTIONS_DECIDE: ClassVar[bool] = False  # an epsilon that is None is that of the parameters' dtype

    def _switches(self, group: Mapping[str, Any]) -> tuple[Hashable, ...]:
        dtypes = {p.dtype for p in group["params"] if p.dtype.is_floating_point}  # others are frozen
        _check_sequence("eps", group["eps"], "a pair of numbers")
        if len(group["eps"]) != 2:
            raise ValueError(f"`eps` is {group['eps']!r:.60}, expected a pair of numbers.")
        eps1 = _plain(group["eps"][0])
        if eps1 is not None:
            check_number("eps[0]", eps1)
        if eps1 is None and len(dtypes) == 1:  # the epsilon of the parameters, whose gradients may have another dtype
            eps1 = torch.finfo(*dtypes).eps
        return bool(group["maximize"]), eps1

    def _template(self, switches: tuple[Any, ...]) -> Template:
        maximize, eps1 = switches
        step = adafactor_descend(
            factored_square(Option("beta2_decay"), eps1),
            learning_rate=LR,
            eps2=Option("eps", 1),
            d=Option("d"),
            weight_decay=DECAY,
        )
        return template(fo.chain(*before(maximize, l2=False), step), self.SLOTS)
