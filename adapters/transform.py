"""`TransformOptimizer`: any chain as a `torch.optim.Optimizer`, with the chain's numbers as options of its groups."""

import copyreg
import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from operator import is_
from typing import Any, cast

import torch

import functional_optim as fo
from functional_optim._compiler.arguments import checked_function, checked_switch
from functional_optim._optimizers._arguments import renaming
from functional_optim._params.template import Template
from functional_optim._reading import scheduled
from functional_optim._schedules.schedule import Identity
from functional_optim._transform import Declared, as_transformation, parts
from functional_optim._warn import warn

from ._groups import copied
from ._naming import KNOWN, RESERVED, Naming, is_number
from ._numbers import check_flags, check_params
from .optimizer import ChainOptimizer


FLAG_DEFAULTS: Mapping[str, bool | None] = {"maximize": False, "fused": None, "differentiable": False}


class TransformOptimizer(ChainOptimizer):
    """A chain as an optimizer of torch: parameter groups, hooks, schedulers, checkpoints.

    The hyper-parameters of the chain are options of the parameter groups, by name, and the learning rate, which a rule
    calls `learning_rate` or else `lr`, is `lr`; where two have one name, the name of the transformation comes first, as
    in `params_ema_decay`. Groups override them, schedulers and users change them, and the next step obeys. A schedule
    inside the chain stays there and follows each parameter's own count of steps; `lr` is then a factor, 1.0 at first,
    that multiplies the updates, and a torch scheduler changes that factor. A chain without a learning rate has such a
    factor too.

    The state of a parameter is a flat dict of tensors: the chain's slots, by name, and `step`, which counts its own
    steps. Parameters without a gradient are skipped, and their state stays as it is.

    Args:
      params: parameters, named parameters or parameter groups, as for any optimizer of torch.
      tx: the chain.
      maximize: whether to ascend.
      fused: True leaves unscaling, and skipping steps that overflow, to the kernel when `torch.amp.GradScaler` is
        used; otherwise the scaler does both itself.
      differentiable: whether autograd records the step.

    Raises:
      ValueError: an option is out of its range, or is called otherwise in this chain.
      TypeError: `tx` is no transformation, or there is an argument that is not listed here.

    Example:
      >>> import torch
      >>> import functional_optim as fo
      >>> model = torch.nn.Linear(2, 1)
      >>> tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-3), fo.params_ema(0.99))
      >>> opt = TransformOptimizer(model.named_parameters(), tx)
      >>> model(torch.ones(1, 2)).sum().backward()
      >>> opt.step()
      >>> opt.param_groups[0]["lr"], opt.param_groups[0]["max_norm"], sorted(opt.state[model.weight])
      (0.001, 1.0, ['ema', 'mu', 'nu', 'step'])
    """

    EMPTY_STATES = True  # torch's checkpoints ask for a state of all parameters that have gradients
    _held: list[str] | None = None  # warnings that the constructor is about to give

    def __init__(
        self,
        params: Any,
        tx: fo.GradientTransformation,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        differentiable: bool = False,
        **unknown: Any,
    ) -> None:
        if unknown:
            name, value = next(iter(unknown.items()))
            raise TypeError(
                f"TransformOptimizer got the unexpected argument {name!r}; numbers are given to the chain, or to a "
                f"parameter group, as in [{{'params': params, {name!r}: {value!r:.40}}}]. A class that takes the "
                f"arguments of a function which makes chains is `TransformOptimizer.factory(fo.adamw)`."
            )
        self._build(params, tx, maximize, fused, differentiable)

    def _build(
        self, params: Any, tx: fo.GradientTransformation, maximize: bool, fused: bool | None, differentiable: bool
    ) -> None:
        """Constructs the optimizer."""
        name = type(self).__name__
        check_params(name, params)
        maximize = checked_switch("maximize", name, maximize)
        fused = None if fused is None else checked_switch("fused", name, fused)
        differentiable = checked_switch("differentiable", name, differentiable)
        if fused and differentiable:
            raise RuntimeError("`fused` does not support `differentiable`")
        self._tx = (
            tx if isinstance(tx, fo.GradientTransformation) else fo.chain(as_transformation(tx, f"`tx` of {name}"))
        )
        naming = Naming(self._tx)
        naming.check(naming.defaults)
        self._naming = naming
        defaults = {
            **naming.defaults,
            "maximize": maximize,
            "fused": fused,
            "differentiable": differentiable,
            "chain": chain_names(self._tx),
        }
        held = self._held = []
        try:
            super().__init__(params, defaults)
        finally:
            del self._held
        for message in held:
            warn(message)
        if fused:
            self._offer_scaling()

    def _offer_scaling(self) -> None:
        """Has `GradScaler` leave unscaling to the kernel, if no transformation would see scaled gradients."""
        bounds = [part._bound for part in parts(self._tx).values()]
        if not any(bound is None or bound.rule.whole for bound in bounds):
            self._step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group; see `torch.optim.Optimizer.add_param_group`.

        Raises:
          ValueError: an option is out of its range, or is called otherwise in this chain.
          TypeError: an option is no number where it has to be one.
        """
        param_group = copied(param_group, self._warn)
        if isinstance(param_group, dict):
            check_flags(param_group, f" of parameter group {len(self.param_groups)}")
            self._naming.check(param_group, len(self.param_groups))
            self._naming.check_names(param_group)
            own = self.defaults["chain"]
            given = param_group.pop("chain", own)
            known = self.defaults.keys() | KNOWN
            # wrappers that construct an optimizer from its arguments keep these in groups
            unknown = sorted(k for k, x in param_group.items() if k not in known and x is not self._tx)
            if given != own:
                self._warn(
                    f"a parameter group is of an optimizer with the chain {given!r:.200}, but this chain is "
                    f"{own!r:.200}; options of both, such as 'lr', are taken over, and others do nothing."
                )
            elif unknown:
                self._warn(
                    f"no transformation of the chain knows {', '.join(map(repr, unknown))} in a parameter group; "
                    f"there are {', '.join(map(repr, self.defaults))}."
                )
        super().add_param_group(param_group)
        self._bindings.known_names.update(self.param_groups[-1])

    def hyperparams(self) -> list[dict[str, Any]]:
        """The hyper-parameters of each parameter group by name, as the next step will have them.

        These are the options of the group, and the schedules of the chain: their values for the parameter of the group
        that has taken the most steps. Where the learning rate is a schedule, it is `learning_rate`, and `lr` is the
        factor of the group, so updates have their product.

        Returns:
          A dict for each group.

        Raises:
          ValueError: a schedule returned something else than a number.

        Example:
          >>> import torch
          >>> import functional_optim as fo
          >>> p = torch.nn.Parameter(torch.ones(1))
          >>> opt = TransformOptimizer([p], fo.scale(fo.linear_schedule(-1.0, 0.0, 4)))
          >>> p.grad = torch.ones(1)
          >>> opt.step()
          >>> opt.hyperparams()
          [{'lr': 1.0, 'step_size': -0.75}]
        """
        naming, found = self._naming, []
        for group in self.param_groups:
            steps = [self.state[p]["step"] for p in group["params"] if "step" in self.state.get(p, {})]
            count = int(max(map(float, steps), default=0.0))
            own = {name: group[name] for name in naming.defaults if name in group}
            for name, (path, hyper) in naming.schedules.items():
                own[name] = scheduled(naming.rules[path]._bound, hyper, count)
            found.append(own)
        return found

    def _warn(self, message: str) -> None:
        """Warns of a group that a caller of `add_param_group` gave; of the constructor's, when it is done."""
        if self._held is None:
            warn(message)
        else:
            self._held.append(message)

    def _counter_dtype(self) -> torch.dtype | None:
        """The dtype of counters: float64 where a schedule follows them, because float32 stops counting at 2**24."""
        return torch.float64 if self._naming.schedules else super()._counter_dtype()

    def _check_options(self, g: int, group: Mapping[str, Any]) -> None:
        super()._check_options(g, group)
        check_flags(group, f" of parameter group {g}")
        self._check_new_names(g, group)
        checked, options = self._bindings.checked, [group.get(name) for name in self._naming.defaults]
        known = checked.get(g, [None] * len(options))
        if not all(map(is_, options, known)):
            pairs = zip(self._naming.defaults, options, known, strict=True)
            self._naming.check(group, g, [name for name, now, before in pairs if now is not before])
            checked[g] = options

    def _check_new_names(self, g: int, group: Mapping[str, Any]) -> None:
        """Looks at options that a group has been given since it was added.

        Raises:
          ValueError: one of them is a hyper-parameter of the chain, and would do nothing under this name.
        """
        known = self._bindings.known_names
        if not known:  # an optimizer that was copied, or a state that was loaded, whose options have been looked at
            known.update(*self.param_groups)
        if group.keys() <= known:
            return
        new = [name for name in group if name not in known]
        scheduled = next((name for name in new if name in self._naming.schedules), None)
        if scheduled is not None:
            raise ValueError(
                f"parameter group {g}: {scheduled!r} is a schedule of this chain, which no option replaces, and would "
                f"do nothing; `lr` of a parameter group multiplies the updates."
            )
        try:
            self._naming.check_names(new)
        except ValueError as error:
            raise ValueError(f"parameter group {g}: {error}") from None
        known.update(new)
        others = [name for name in new if name not in KNOWN]
        if others:
            warn(
                f"no transformation of the chain knows {', '.join(map(repr, others))}, which parameter group {g} has "
                f"been given; there are {', '.join(map(repr, self.defaults))}."
            )

    def _unused_options(self, g: int, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
        added = {k: x for k, x in new.items() if k not in old}
        try:
            self._naming.check(new)
            self._naming.check_names(added)
        except (ValueError, TypeError) as error:
            raise ValueError(f"the options of param_groups[{g}] of the state dict do not fit: {error}") from error
        unknown = sorted(str(k) for k in added if k not in self.defaults and k not in RESERVED)
        if not unknown:
            return ""
        return (
            f"no transformation of the chain knows {', '.join(map(repr, unknown))} in param_groups[{g}] of the state "
            f"dict, kept without an effect; there are {', '.join(map(repr, self.defaults))}."
        )

    def _switches(self, group: Mapping[str, Any]) -> tuple[Hashable, ...]:
        lacking = next((name for name in ("maximize", *self._naming.switches) if name not in group), None)
        if lacking is not None:
            raise KeyError(f"the parameter group lacks {lacking!r}, a switch of the chain; there are {sorted(group)}.")
        return (bool(group["maximize"]), *[group[name] for name in self._naming.switches])

    def _template(self, switches: tuple[Any, ...]) -> Template:
        return self._naming.template(switches[1:], switches[0], self.SLOTS)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_tx": self._tx}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_naming" not in self.__dict__:
            self._naming = Naming(self._tx)
        if any(group.get("fused") for group in self.param_groups):
            self._offer_scaling()

    @staticmethod
    def factory(tx_function: Callable[..., fo.GradientTransformation]) -> "type[TransformOptimizer]":
        """A class of optimizers for a function that makes chains, for libraries that construct optimizers themselves.

        Args:
          tx_function: returns a chain, such as `functional_optim.lion`.

        Returns:
          A subclass that is constructed as `(params, **arguments)`. Arguments are those of `tx_function`, with `lr`
          for `learning_rate`, and those of `TransformOptimizer`. Its optimizers pickle if `tx_function` does.

        Example:
          >>> import torch
          >>> import functional_optim as fo
          >>> Lion = TransformOptimizer.factory(fo.lion)
          >>> opt = Lion([torch.nn.Parameter(torch.ones(1))], lr=1e-4, b1=0.95)
          >>> opt.param_groups[0]["b1"]
          0.95
        """
        function = checked_function("tx_function", "TransformOptimizer.factory", tx_function, "which returns a chain")
        return _class_of(Identity(function))


@functools.lru_cache(maxsize=256)
def _class_of(key: Identity) -> type[TransformOptimizer]:
    """The class of `TransformOptimizer.factory` for a function; functions that are equal may make other chains."""
    tx_function = cast("Callable[..., fo.GradientTransformation]", key.x)

    def __init__(self: TransformOptimizer, params: Any, *args: Any, **arguments: Any) -> None:
        own = {flag: arguments.pop(flag) for flag in FLAG_DEFAULTS if flag in arguments}
        by_torch = "lr" in arguments
        if "lr" in arguments and "lr" not in inspect.signature(tx_function).parameters:
            if "learning_rate" in arguments:
                raise TypeError("`lr` and `learning_rate` are one argument; pass one of them.")
            if not _takes(tx_function, "learning_rate"):
                raise TypeError(
                    f"{name} has no argument `learning_rate` or `lr`, so `lr` has no place. Pass a function with the "
                    f"argument `learning_rate`, which returns "
                    f"`fo.chain({name}(...), fo.scale_by_learning_rate(learning_rate))`."
                )
            arguments["learning_rate"] = arguments.pop("lr")
        rate = arguments.get("lr", arguments.get("learning_rate")) if by_torch else None
        make = renaming({"learning_rate": "lr"}, name)(tx_function) if by_torch else tx_function
        self._build(params, make(*args, **arguments), **{**FLAG_DEFAULTS, **own})
        if is_number(rate) and self._naming.factor is not None:
            warn(
                f"`lr` went to {name}, but the chain that it made has no learning rate, or several, so `lr` of the "
                f"parameter groups is a factor, 1.0 at first, which multiplies the updates."
            )

    def __reduce__(self: TransformOptimizer) -> tuple[Any, ...]:
        if type(self) is cls:
            return _blank, (tx_function,), self.__getstate__()
        return copyreg.__newobj__, (type(self),), self.__getstate__()  # type: ignore[attr-defined]

    name = getattr(tx_function, "__name__", type(tx_function).__name__)
    body = {"__init__": __init__, "__reduce__": __reduce__, "__doc__": tx_function.__doc__, "__module__": __name__}
    cls = type(name, (TransformOptimizer,), body)
    return cls


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has an argument of a name, or takes arguments of any name."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _blank(tx_function: Callable[..., fo.GradientTransformation]) -> TransformOptimizer:
    """An optimizer of such a class that unpickling has yet to fill."""
    cls = _class_of(Identity(tx_function))
    return cls.__new__(cls)


def chain_names(tx: fo.GradientTransformation) -> str:
    """The names of a chain's transformations, which a checkpoint is known by."""
    # the functions of others may be renamed, and their `repr` may hold addresses
    return " > ".join(
        x._bound.rule.name if x._bound is not None else x.name if isinstance(x, Declared) else type(x).__name__
        for x in parts(tx).values()
    )
