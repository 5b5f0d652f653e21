"""`TransformOptimizer`: any chain as a `torch.optim.Optimizer`."""

import contextlib
import copyreg
import functools
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

import functional_optim as fo
from functional_optim import leafwise
from functional_optim.leafwise import Contents, Leafwise, Leaves, Template

from ._compiled import LIVE
from ._loading import load
from ._naming import Naming, outside


# what schedulers and torch itself keep in a group
KNOWN = frozenset(
    {"params", "param_names", "initial_lr", "min_lr", "max_lr", "swa_lr", "base_momentum", "max_momentum"}
)


# what an option can be that is not another object when it changes
CONSTANT = {float, int, bool, str, type(None)}


def _check_rate(group: int, lr: Any) -> None:
    """Refuses a learning rate that would turn parameters into NaN; a tensor is not waited for."""
    if lr is None or isinstance(lr, torch.Tensor):
        return
    try:
        finite = math.isfinite(lr)
    except (TypeError, OverflowError):
        finite = False
    if not finite:
        raise ValueError(f"lr of parameter group {group} is {lr!r:.60}, expected a finite number.")


def _names_key(names: list[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)


@dataclass
class _Runtime:
    """What an optimizer remembers between steps: it makes them faster, and is made anew where it is missing.

    Args:
      leafwise: runs the steps.
      templates: chains by switches.
      leaves: the parameters of the last step and their states.
      used: the templates of the groups then, and which of them each group had.
      cut: which template each of the groups had then, and how many parameters.
      options: what was in the groups then.
      constant: whether those that are not lists can only change by being replaced; None if nobody has asked.
      state: what was in the optimizer's state then.
    """

    leafwise: Leafwise = field(default_factory=Leafwise)
    templates: dict[tuple[Hashable, ...], Template] = field(default_factory=dict)
    leaves: Leaves | None = None
    used: tuple[list[Template], list[int]] = field(default_factory=lambda: ([], []))
    cut: tuple[list[int], list[int]] | None = None
    options: Contents = field(default_factory=lambda: Contents.of([]))
    constant: bool | None = None
    state: Contents = field(default_factory=lambda: Contents.of([]))


class ChainOptimizer(Optimizer):
    """What the optimizers of this package have in common: a step is one run of a chain over all parameter groups.

    A subclass says which chain a parameter group has, by way of switches: values of the group that decide what is
    computed, as opposed to numbers, which are looked up in the group at every step.
    """

    SLOTS: ClassVar[Mapping[str, str]] = {}  # names of slots of state, where they differ from the rules' own

    def _switches(self, group: Mapping[str, Any]) -> tuple[Hashable, ...]:
        """What decides which chain a parameter group has."""
        raise TypeError(f"{type(self).__name__} has no chain; use TransformOptimizer(params, tx).")

    def _template(self, switches: tuple[Any, ...]) -> Template:
        """The chain for some switches."""
        raise TypeError(f"{type(self).__name__} has no chain; use TransformOptimizer(params, tx).")

    @property
    def _runtime(self) -> "_Runtime":
        found = self.__dict__.get("_remembered")
        if not isinstance(found, _Runtime):
            found = self.__dict__["_remembered"] = _Runtime()
        return found

    def _template_of(self, group: Mapping[str, Any]) -> Template:
        switches, known = self._switches(group), self._runtime.templates
        try:
            found = known.get(switches)
        except TypeError:
            raise TypeError(
                f"an option that decides what is computed must be a bool, a number or a string; this parameter group "
                f"has {', '.join(repr(x) for x in switches if not isinstance(x, Hashable))}."
            ) from None
        if found is None:
            found = known[switches] = self._template(switches)
        return found

    def step(self, closure: Callable[[], Any] | None = None, **extra: Any) -> Any:
        """Takes a step.

        Args:
          closure: evaluates the model again and returns the loss; it is called once, with gradients enabled.
          **extra: arguments that transformations of the chain take, such as `value`. A closure's loss is `value`.

        Returns:
          What `closure` returned, or None.

        Raises:
          ValueError, TypeError: a gradient, a state or an option does not fit; nothing has been changed.
        """
        loss = None
        offered: frozenset[str] = frozenset()
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if isinstance(loss, (int, float)) or (isinstance(loss, torch.Tensor) and loss.numel() == 1):
                value = loss.detach().reshape(()) if isinstance(loss, torch.Tensor) else loss
                extra = {"value": value, **extra}
                offered = frozenset({"value"})
        with torch.set_grad_enabled(bool(self.defaults.get("differentiable"))):
            self._run(extra, offered)
        return loss

    def _run(self, extra: dict[str, Any], offered: frozenset[str]) -> None:
        if torch.compiler.is_compiling():
            self._run_compiled(extra)
            return
        templates, leaves, fresh = self._gather()
        if extra:
            takes = [leafwise.extras(template.tx) for template in templates]
            unknown = [k for k in extra if k not in offered and all(t is not None and k not in t for t in takes)]
            if unknown:
                known = sorted({name for t in takes if t is not None for name in t})
                raise TypeError(
                    f"step() got an unexpected keyword argument {unknown[0]!r}; "
                    f"this chain takes {', '.join(map(repr, known)) or 'none'}."
                )
        self._run_on(templates, leaves, extra)
        for i in fresh:
            if leaves.states[i]:
                self.state[leaves.params[i]] = leaves.states[i]

    def _gather(self) -> tuple[list[Template], Leaves, list[int]]:
        """All parameters with their gradients and states, and which of the states are new."""
        if "_averaged" in self.__dict__:
            raise RuntimeError("step was called inside `averaged_params()`, where parameters are averages.")
        last = self._runtime
        unchanged = last.options.are_in(self.param_groups)
        if last.leaves is not None and unchanged and self._constant():
            templates, kind_of = last.used
        else:
            templates, kind_of = self._templates()
        given = [group.get("param_names") for group in self.param_groups]
        named = given if given.count(None) < len(given) else []
        for g, (names, group) in enumerate(zip(named, self.param_groups, strict=False)):
            if names is not None and len(names) != len(group["params"]):
                raise ValueError(
                    f"parameter group {g} has {len(group['params'])} params but {len(names)} param_names; "
                    f"change both together."
                )
        members = [group["params"] for group in self.param_groups]
        params: list[torch.Tensor] = list(chain.from_iterable(members))
        states: list[Any]
        fresh: list[int]
        known = last.leaves is not None and last.state.are_in([self.state])
        if last.leaves is not None and known and leafwise.same(last.leaves.params, params):
            states, ids, fresh = last.leaves.states, last.leaves.ids, []
        else:  # asking a dict for a tensor takes longer than all of the above
            states, ids = [self.state.get(p) for p in params], list(map(id, params))
            fresh = [i for i, state in enumerate(states) if state is None]
        for i in fresh:
            states[i] = {}
        cut = kind_of, list(map(len, members))
        if last.leaves is not None and last.cut == cut:
            kinds, owners = last.leaves.templates, last.leaves.owners
        else:
            kinds = [k for k, group in zip(kind_of, members, strict=True) for _ in group]
            owners = [g for g, group in enumerate(members) for _ in group]
        grads = leafwise.gradients(params)
        leaves = Leaves(self._names, params, grads, states, kinds, owners, ids, list(map(_names_key, given)))
        if not fresh:
            last.leaves, last.used, last.cut = leaves._replace(names=list, grads=[]), (templates, kind_of), cut
            if not known:
                last.state = Contents.of([self.state])
            if not unchanged:
                last.options, last.constant = Contents.of(self.param_groups), None
        return templates, leaves, fresh

    def _templates(self) -> tuple[list[Template], list[int]]:
        """The chains of all groups, and which of them each group has."""
        templates: list[Template] = []
        numbers: dict[int, int] = {}
        kind_of: list[int] = []
        for g, group in enumerate(self.param_groups):  # of which there may be hundreds
            lr = group.get("lr")
            if type(lr) is not float or not -math.inf < lr < math.inf:
                _check_rate(g, lr)
            template = self._template_of(group)
            kind = numbers.get(id(template))
            if kind is None:
                kind = numbers[id(template)] = len(templates)
                templates.append(template)
            kind_of.append(kind)
        return templates, kind_of

    def _constant(self) -> bool:
        """Whether nothing in the groups but lists of parameters and names can change and be the same object.

        It is asked when everything in them has been seen twice, as nothing with a schedule is.
        """
        last = self._runtime
        if last.constant is None:
            values = (x for group in self.param_groups for k, x in group.items() if k not in ("params", "param_names"))
            parts = chain.from_iterable(x if type(x) is tuple else (x,) for x in values)
            last.constant = {type(x) for x in parts} <= CONSTANT
        return last.constant

    def _run_on(self, templates: list[Template], leaves: Leaves, extra: dict[str, Any]) -> None:
        guarded = getattr(self, "found_inf", None) is not None or getattr(self, "grad_scale", None) is not None
        if guarded:
            for name, default in (("grad_scale", 1.0), ("found_inf", 0.0)):
                x = getattr(self, name, None)
                extra[name] = default if x is None else x.reshape(()) if isinstance(x, torch.Tensor) else x
        try:
            self._runtime.leafwise.step(templates, leaves, self.param_groups, extra, guarded)
        except TypeError:
            if not any(g is not None and g.layout is not torch.strided for g in leaves.grads):
                raise
            leaves = leaves._replace(grads=self._dense(leaves.grads))
            self._runtime.leafwise.step(templates, leaves, self.param_groups, extra, guarded)

    # Inside torch.compile the step is one operation that the compiler does not look into. What it looks into is how
    # its arguments are collected, and it runs a method called `_init_group` in Python, once, while it traces.

    def _run_compiled(self, extra: dict[str, Any]) -> None:
        params: list[torch.Tensor] = []
        grads: list[torch.Tensor] = []
        state: list[torch.Tensor] = []
        handle = 0
        for group in self.param_groups:
            some_params: list[torch.Tensor] = []
            some_grads: list[torch.Tensor] = []
            some_state: list[torch.Tensor] = []
            handle = self._init_group(group, some_params, some_grads, some_state)
            params.extend(some_params)
            grads.extend(some_grads)
            state.extend(some_state)
        values = [torch.as_tensor(x, dtype=torch.float64) for x in extra.values()]
        torch.ops.functional_optim.step(handle, params, grads, state, ",".join(extra), values)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        state: list[torch.Tensor],
    ) -> int:
        """Appends a group's tensors to lists, and returns what the compiled step finds this optimizer by."""
        templates, leaves, fresh = self._gather()
        self._runtime.leafwise.prepare(templates, leaves, self.param_groups)
        for i in fresh:
            if leaves.states[i]:
                self.state[leaves.params[i]] = leaves.states[i]
        for p in group["params"]:
            if p.grad is not None:
                params.append(p)
                grads.append(p.grad)
                state.extend(x for x in self.state[p].values() if isinstance(x, torch.Tensor))
        LIVE[id(self)] = self
        return id(self)

    def _run_traced(
        self, params: list[torch.Tensor], grads: list[torch.Tensor], state: list[torch.Tensor], extra: dict[str, Any]
    ) -> None:
        """Takes a step on tensors that stand for this optimizer's own, in the order of `_init_group`."""
        templates, leaves, _ = self._gather()
        leaves = leaves._replace(params=list(leaves.params), states=list(leaves.states))
        given = iter(zip(params, grads, strict=True))
        tensors = iter(state)
        for i, g in enumerate(leaves.grads):
            if g is not None:
                leaves.params[i], leaves.grads[i] = next(given)
                leaves.states[i] = {
                    k: next(tensors) if isinstance(x, torch.Tensor) else x for k, x in leaves.states[i].items()
                }
        self._run_on(templates, leaves, extra)

    def _names(self) -> list[str]:
        """What messages and masks call the parameters."""
        names: list[str] = []
        for g, group in enumerate(self.param_groups):
            given = group.get("param_names")
            names += given or [f"param_groups[{g}].params[{k}]" for k in range(len(group["params"]))]
        if len(set(names)) < len(names):
            groups = [g for g, group in enumerate(self.param_groups) for _ in group["params"]]
            names = [f"param_groups[{g}].{name}" for g, name in zip(groups, names, strict=True)]
        return names

    def _dense(self, grads: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """What becomes of sparse gradients."""
        raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")

    def load_state_dict(self, state_dict: dict[str, Any], *, by_name: bool = False, strict: bool = True) -> None:
        """Loads what `state_dict` returned, or what that of the torch optimizer of the same name did.

        Tensors are copied, never shared with `state_dict`, and keep the dtype that the chain declares for them.

        Args:
          state_dict: the state.
          by_name: whether parameters are matched by name instead of by position; both sides need named parameters.
          strict: with `by_name`, whether every parameter must be in `state_dict`; others start anew.

        Raises:
          ValueError: it is the state of another chain or of other parameters; nothing has been changed.
        """
        # what is not compiled need not import the compiler, which takes seconds
        compiles = "torch._dynamo" in sys.modules
        apart = torch.compiler.disable(load) if compiles else load  # type: ignore[no-untyped-call]
        apart(self, state_dict, by_name, strict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.pop("_remembered", None)
        super().__setstate__(state)

    @contextlib.contextmanager
    def averaged_params(self) -> Iterator[None]:
        """Swaps in the averages that `params_ema` keeps, for evaluation, and the parameters back at the end.

        Raises:
          ValueError: the chain has no `params_ema`, or no step has been taken.

        Example:
          >>> import torch
          >>> import functional_optim as fo
          >>> from functional_optim.adapters import TransformOptimizer
          >>> p = torch.nn.Parameter(torch.ones(1))
          >>> opt = TransformOptimizer([p], fo.chain(fo.sgd(1.0), fo.params_ema(0.5)))
          >>> p.grad = torch.ones(1)
          >>> opt.step()
          >>> with opt.averaged_params():
          ...     print(p.item())
          0.5
          >>> p.item()
          0.0
        """
        pairs = []
        for group in self.param_groups:
            template = self._template_of(group)
            rules = leafwise.rules(template.tx)
            averages = [k for (path, _), k in template.keys.items() if rules[path].bound.rule.name == "params_ema"]
            for p in group["params"]:
                found = [self.state[p][key] for key in averages if p in self.state and key in self.state[p]]
                pairs += [(p, average) for average in found[-1:]]
        if not pairs:
            raise ValueError(
                "there are no averaged parameters: put `params_ema(decay)` at the end of the chain, and take a step."
            )
        if "_averaged" in self.__dict__:
            raise RuntimeError("averaged_params() was called inside itself, where parameters are averages already.")
        before = [p.detach().clone() for p, _ in pairs]
        self.__dict__["_averaged"] = True
        try:
            with torch.no_grad():
                for p, average in pairs:
                    p.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for (p, _), old in zip(pairs, before, strict=True):
                    p.copy_(old)
            del self.__dict__["_averaged"]


class TransformOptimizer(ChainOptimizer):
    """A chain as an optimizer of torch: parameter groups, hooks, schedulers, checkpoints.

    The hyper-parameters of the chain are options of the parameter groups, by name, and the learning rate is `lr`;
    where two have one name, the name of the transformation comes first, as in `params_ema_decay`. Groups override
    them, schedulers and users change them, and the next step obeys. A schedule inside the chain stays there and
    follows each parameter's own count of steps; `lr` is then a factor, 1.0 at first, that multiplies the updates, and
    what a torch scheduler changes is the factor. A chain without a learning rate has such a factor too.

    The state of a parameter is a flat dict of tensors: the chain's slots, by name, and `step`, which counts its own
    steps. Parameters without a gradient are skipped, and what they have stays as it is.

    Args:
      params: parameters, named parameters or parameter groups, as for any optimizer of torch.
      tx: the chain.
      maximize: whether to ascend.
      fused: True leaves unscaling, and skipping steps that overflow, to the kernel when `torch.amp.GradScaler` is
        used; otherwise the scaler does both itself.
      differentiable: whether autograd records the step.

    Raises:
      ValueError, TypeError: an option is out of its range, or `tx` is no transformation.

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

    def __init__(
        self,
        params: Any,
        tx: fo.GradientTransformation,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        self._tx = fo.chain(tx) if not isinstance(tx, fo.GradientTransformation) else tx
        naming = Naming(self._tx)
        naming.check(naming.defaults)
        self._naming = naming
        defaults = {
            **naming.defaults,
            "maximize": maximize,
            "fused": fused,
            "differentiable": differentiable,
            "chain": describe(self._tx),
        }
        super().__init__(params, defaults)
        if fused:
            if differentiable:
                raise RuntimeError("`fused` does not support `differentiable`")
            self._offer_scaling()

    def _offer_scaling(self) -> None:
        """Has `GradScaler` leave unscaling to the kernel, if no transformation would see scaled gradients."""
        if len(leafwise.rules(self._tx)) == len(leafwise.parts(self._tx)):
            self._step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group; see `torch.optim.Optimizer.add_param_group`.

        Raises:
          ValueError, TypeError: an option is out of its range.
        """
        if isinstance(param_group, dict):
            self._naming.check(param_group)
            unknown = sorted(set(param_group) - set(self.defaults) - KNOWN)
            if unknown:
                warnings.warn(
                    f"no transformation of the chain knows {', '.join(map(repr, unknown))} in a parameter group; "
                    f"there are {', '.join(map(repr, self.defaults))}.",
                    stacklevel=outside(),
                )
        super().add_param_group(param_group)

    def _switches(self, group: Mapping[str, Any]) -> tuple[Hashable, ...]:
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
        return _class_of(tx_function)


@functools.lru_cache(maxsize=256)
def _class_of(tx_function: Callable[..., fo.GradientTransformation]) -> type[TransformOptimizer]:
    """The class of `TransformOptimizer.factory`."""

    def __init__(self: TransformOptimizer, params: Any, *args: Any, **arguments: Any) -> None:
        own = {name: arguments.pop(name) for name in ("maximize", "fused", "differentiable") if name in arguments}
        if "lr" in arguments and "lr" not in inspect.signature(tx_function).parameters:
            if "learning_rate" in arguments:
                raise TypeError("`lr` and `learning_rate` are one argument; pass one of them.")
            arguments["learning_rate"] = arguments.pop("lr")
        TransformOptimizer.__init__(self, params, tx_function(*args, **arguments), **own)

    def __reduce__(self: TransformOptimizer) -> tuple[Any, ...]:
        if type(self) is _class_of(tx_function):
            return _blank, (tx_function,), self.__getstate__()
        return copyreg.__newobj__, (type(self),), self.__getstate__()  # type: ignore[attr-defined]

    name = getattr(tx_function, "__name__", type(tx_function).__name__)
    body = {"__init__": __init__, "__reduce__": __reduce__, "__doc__": tx_function.__doc__, "__module__": __name__}
    return type(name, (TransformOptimizer,), body)


def _blank(tx_function: Callable[..., fo.GradientTransformation]) -> TransformOptimizer:
    """An optimizer of such a class that unpickling has yet to fill."""
    cls = _class_of(tx_function)
    return cls.__new__(cls)


def describe(tx: fo.GradientTransformation) -> str:
    """The names of a chain's transformations, which a checkpoint is known by."""
    rules = leafwise.rules(tx)
    return " > ".join(rules[k].bound.rule.name if k in rules else f"{x!r:.80}" for k, x in leafwise.parts(tx).items())
