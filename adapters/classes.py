"""torch.optim's optimizers that have fused kernels, RMSprop, and two optimizers that it lacks, as chains.

Classes of torch's names take their arguments, defaults and checks from torch's own classes, which they are subclasses
of, and replace the step. `foreach` and `capturable` are accepted and make no difference: there is one kernel, and it
reads counters and numbers where they are, so that a step on a CUDA device can be captured in a graph. `fused=True`
leaves what `torch.amp.GradScaler` does to the kernel, and `differentiable=True` records the step, as in torch.
"""

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import torch

import functional_optim as fo
from functional_optim._compiler.arguments import plain_number
from functional_optim._compiler.rule import Option
from functional_optim._params.template import Template
from functional_optim._transforms.adam import adam_step, amsgrad_step
from functional_optim._transforms.decay import decay_then_add
from functional_optim._transforms.momentum import momentum
from functional_optim._transforms.rms import centered_rmsprop_ratio, rmsprop_ratio
from functional_optim._transforms.scaling import descend

from ._named import B1, B2, DECAY, EPS, LR, MOMENTUM, NamedClass, before, nonzero
from ._naming import template
from ._numbers import check_number


class SGD(NamedClass, torch.optim.SGD):
    """`torch.optim.SGD` from a chain; arguments, defaults and state are the same.

    Where a gradient is sparse, a step without momentum changes the rows that it touches; with momentum it is made
    dense. `weight_decay` is refused there, as in torch.

    Example:
      >>> import torch
      >>> p = torch.nn.Parameter(torch.ones(1))
      >>> opt = SGD([p], lr=0.5, momentum=0.9)
      >>> p.grad = torch.ones(1)
      >>> opt.step()
      >>> p.item(), opt.state[p]
      (0.5, {'momentum_buffer': tensor([1.])})
    """

    SPARSE_SLOTS: ClassVar[bool] = True

    def _switches(self, group: Mapping[str, Any]) -> tuple[Hashable, ...]:
        decay, momentum = nonzero(group, "weight_decay"), nonzero(group, "momentum")
        return bool(group["maximize"]), decay, momentum, bool(group["nesterov"])

    def _template(self, switches: tuple[Any, ...]) -> Template:
        maximize, decay, moves, nesterov = switches
        parts = [momentum(MOMENTUM, Option("dampening"), nesterov)] if moves else []
        return template(fo.chain(*before(maximize, decay), *parts, descend(LR)), self.SLOTS)

    def _row_template(self, switches: tuple[Any, ...]) -> Template | None:
        _, decay, moves, _ = switches
        if decay:
            raise RuntimeError(
                "add(sparse, dense) is not supported. Use add(dense, sparse) instead. So torch refuses `weight_decay` "
                "for sparse gradients; set it to 0 in the group of the parameter, or pass dense gradients."
            )
        return None if moves else self._template(switches)


class Adam(NamedClass, torch.optim.Adam):  # type: ignore[misc]
    """`torch.optim.Adam` from a chain; arguments, defaults and state are the same.

    Example:
      >>> import torch
      >>> p = torch.nn.Parameter(torch.ones(1))
      >>> opt = Adam([p], lr=0.5)
      >>> p.grad = torch.ones(1)
      >>> opt.step()
      >>> round(p.item(), 6), sorted(opt.state[p])
      (0.5, ['exp_avg', 'exp_avg_sq', 'step'])
    """

    def _switches(self, group: Mapping[str, Any]) -> tuple[Hashable, ...]:
        # decoupled decay by 0 is exact, so groups without decay share the others' kernel; an L2 penalty by 0 is not
        decoupled = bool(group.get("decoupled_weight_decay"))
        l2 = not decoupled and nonzero(group, "weight_decay")
        return bool(group["maximize"]), l2, decoupled, bool(group["amsgrad"])

    def _template(self, switches: tuple[Any, ...]) -> Template:
        maximize, l2, decoupled, amsgrad = switches
        step = (amsgrad_step if amsgrad else adam_step)(LR, B1, B2, EPS)
        last = [decay_then_add(LR, DECAY, fused=True)] if decoupled else []
        return template(fo.chain(*before(maximize, l2), step, *last), self.SLOTS)

    def _row_template(self, switches: tuple[Any, ...]) -> Template | None:
        raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")


class AdamW(Adam, torch.optim.AdamW):  # type: ignore[misc]
    """`torch.optim.AdamW` from a chain; arguments, defaults and state are the same.

    The chain is not `fo.adamw`, which computes as optax does. torch shrinks the parameter before it adds the step, and
    corrects the bias in another order, so that the results of the two differ by rounding.

    Example:
      >>> import torch
      >>> p = torch.nn.Parameter(torch.ones(1))
      >>> opt = AdamW([p], lr=0.5)
      >>> p.grad = torch.ones(1)
      >>> opt.step()
      >>> round(p.item(), 6)
      0.495
    """


class RMSprop(NamedClass, torch.optim.RMSprop):  # type: ignore[misc]
    """`torch.optim.RMSprop` from a chain; arguments, defaults and state are the same.

    Example:
      >>> import torch
      >>> p = torch.nn.Parameter(torch.ones(1))
      >>> opt = RMSprop([p], lr=0.5, alpha=0.75)
      >>> p.grad = torch.ones(1)
      >>> opt.step()
      >>> round(p.item(), 6), sorted(opt.state[p])
      (0.0, ['square_avg', 'step'])
    """

    SLOTS: ClassVar[Mapping[str, str]] = {"trace": "momentum_buffer"}

    def _switches(self, group: Mapping[str, Any]) -> tuple[Hashable, ...]:
        decay, momentum = nonzero(group, "weight_decay"), nonzero(group, "momentum") and bool(group["momentum"] > 0)
        return bool(group["maximize"]), decay, momentum, bool(group["centered"])

    def _template(self, switches: tuple[Any, ...]) -> Template:
        maximize, decay, moves, centered = switches
        ratio = (centered_rmsprop_ratio if centered else rmsprop_ratio)(Option("alpha"), EPS)
        parts = [fo.trace(MOMENTUM)] if moves else []
        return template(fo.chain(*before(maximize, decay), ratio, *parts, descend(LR)), self.SLOTS)


def check_no_bool(name: str, value: Any, place: str = "") -> None:
    """Refuses a bool in the place of a number, which torch's own classes take for 1 or 0."""
    if isinstance(plain_number(value), bool) or (isinstance(value, torch.Tensor) and value.dtype is torch.bool):
        raise TypeError(f"`{name}`{place} is {type(value).__name__} {value!r:.60}, expected a number.")


def _check(lr: Any, betas: Any, weight_decay: Any, eps: Any = 0.0) -> None:
    """The checks of torch's classes, in their words."""
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"`betas` is {betas!r:.60}, expected a pair of numbers.")
    named = {"lr": lr, "betas[0]": betas[0], "betas[1]": betas[1], "eps": eps, "weight_decay": weight_decay}
    for name, value in named.items():
        check_no_bool(name, value)
        check_number(name, value)
    for name, value in (("learning rate", lr), ("epsilon value", eps), ("weight_decay value", weight_decay)):
        if not value >= 0.0:
            raise ValueError(f"Invalid {name}: {value}")
    for k, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {k}: {beta}")


class _Betas(NamedClass):
    """The common part of the classes that torch lacks."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        if defaults["fused"]:
            if defaults["differentiable"]:
                raise RuntimeError("`fused` does not support `differentiable`")
            if defaults["foreach"]:
                raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
            self._step_supports_amp_scaling = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if any(group.get("fused") for group in self.param_groups):
            self._step_supports_amp_scaling = True

    def _check_options(self, g: int, group: Mapping[str, Any]) -> None:
        for name in ("lr", "betas", "eps", "weight_decay"):
            value = group.get(name)
            for x in value if isinstance(value, (tuple, list)) else (value,):
                if type(x) is not float:  # most are, and a scheduler changes one at each step
                    check_no_bool(name, x, f" of parameter group {g}")
        super()._check_options(g, group)

    def _switches(self, group: Mapping[str, Any]) -> tuple[Hashable, ...]:
        return (bool(group["maximize"]),)


class Lion(_Betas):
    r"""Lion: the sign of an interpolation between momentum and gradient, with decoupled decay.

    $$\theta_t = (1 - \eta\lambda)\, \theta_{t-1} - \eta \operatorname{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t), \quad
      m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t$$

    Args:
      params: parameters, named parameters or parameter groups.
      lr: $\eta$.
      betas: $\beta_1, \beta_2$.
      weight_decay: $\lambda$.
      maximize: whether to ascend.
      foreach, capturable: accepted; they make no difference.
      differentiable: whether autograd records the step.
      fused: whether the kernel does the unscaling of `torch.amp.GradScaler`.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> import torch
      >>> p = torch.nn.Parameter(torch.ones(1))
      >>> opt = Lion([p], lr=0.25)
      >>> p.grad = torch.ones(1)
      >>> opt.step()
      >>> p.item()
      0.75

    Source: Chen et al. 2023, arXiv:2302.06675, algorithm 2.
    """

    SLOTS: ClassVar[Mapping[str, str]] = {"mu": "exp_avg"}

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        _check(lr, betas, weight_decay)
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def _template(self, switches: tuple[Any, ...]) -> Template:
        parts = [fo.scale_by_lion(B1, B2), fo.add_decayed_weights(DECAY), fo.scale_by_learning_rate(LR)]
        return template(fo.chain(*before(switches[0], False), *parts), self.SLOTS)


class LAMB(_Betas):
    r"""LAMB: Adam whose step, in every tensor, is as long as the parameter.

    $$r_t = \hat m_t / (\sqrt{\hat v_t} + \epsilon) + \lambda \theta_{t-1}, \quad
      \theta_t = \theta_{t-1} - \eta \frac{\lVert \theta_{t-1} \rVert}{\lVert r_t \rVert} r_t$$

    Args:
      params: parameters, named parameters or parameter groups.
      lr: $\eta$.
      betas: decays of the moments.
      eps: $\epsilon$.
      weight_decay: $\lambda$.
      maximize: whether to ascend.
      foreach, capturable: accepted; they make no difference.
      differentiable: whether autograd records the step.
      fused: whether the kernel does the unscaling of `torch.amp.GradScaler`.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> import torch
      >>> p = torch.nn.Parameter(torch.ones(4))
      >>> opt = LAMB([p], lr=0.25)
      >>> p.grad = torch.ones(4)
      >>> opt.step()
      >>> p.detach()
      tensor([0.7500, 0.7500, 0.7500, 0.7500])

    Source: You et al. 2020, arXiv:1904.00962, algorithm 2.
    """

    SLOTS: ClassVar[Mapping[str, str]] = {"mu": "exp_avg", "nu": "exp_avg_sq"}

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        _check(lr, betas, weight_decay, eps)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def _template(self, switches: tuple[Any, ...]) -> Template:
        parts = [
            fo.scale_by_adam(B1, B2, EPS),
            fo.add_decayed_weights(DECAY),
            fo.scale_by_trust_ratio(),
            fo.scale_by_learning_rate(LR),
        ]
        return template(fo.chain(*before(switches[0], False), *parts), self.SLOTS)
