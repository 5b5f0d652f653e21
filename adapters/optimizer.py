"""`ChainOptimizer`: a step of a `torch.optim.Optimizer` is one run of a chain over all parameter groups."""

import contextlib
import functools
import math
import sys
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from functional_optim import leafwise
from functional_optim.leafwise import Contents, Leafwise, Leaves, Template

from ._averages import averaged
from ._compiled import LIVE
from ._loading import load
from ._naming import names_of


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
      fresh: which of these states the optimizer did not have.
      used: the templates of the groups then, and which of them each group had.
      cut: which template each of the groups had then, and how many parameters.
      options: what was in the groups then.
      settled: the same, if they are what they were and cannot change unnoticed; else None.
      constant: whether those that are not lists can only change by being replaced; None if nobody has asked.
      state: what was in the optimizer's state then.
    """

    leafwise: Leafwise = field(default_factory=Leafwise)
    templates: dict[tuple[Hashable, ...], Template] = field(default_factory=dict)
    leaves: Leaves | None = None
    fresh: list[int] = field(default_factory=list)
    used: tuple[list[Template], list[int]] = field(default_factory=lambda: ([], []))
    cut: tuple[list[int], list[int]] | None = None
    options: Contents = field(default_factory=lambda: Contents.of([]))
    settled: Contents | None = None
    constant: bool | None = None
    state: Contents = field(default_factory=lambda: Contents.of([]))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Runtime, ()


def _names_of(optimizer: "weakref.ref[ChainOptimizer]") -> list[str]:
    owner = optimizer()  # which does not keep itself alive by what it remembers
    return [] if owner is None else names_of(owner.param_groups)


class ChainOptimizer(Optimizer):
    """What the optimizers of this package have in common: a step is one run of a chain over all parameter groups.

    A subclass says which chain a parameter group has, by way of switches: values of the group that decide what is
    computed, as opposed to numbers, which are looked up in the group at every step.
    """

    SLOTS: ClassVar[Mapping[str, str]] = {}  # names of slots of state, where they differ from the rules' own
    EMPTY: ClassVar[bool] = False  # whether parameters that keep nothing have an empty state where others have one

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
        self._keep(leaves, fresh)

    def _keep(self, leaves: Leaves, fresh: list[int]) -> None:
        """Takes up states that have been made."""
        made = [i for i in fresh if leaves.states[i]]
        if self.EMPTY and (made or self.state):
            made = [i for i in fresh if leaves.states[i] or leaves.params[i].grad is not None]
        for i in made:
            self.state[leaves.params[i]] = leaves.states[i]
        if made:  # the optimizer is not what is remembered, not even if somebody takes these states away again
            self._runtime.leaves = None

    def _gather(self) -> tuple[list[Template], Leaves, list[int]]:
        """All parameters with their states, and which of the states the optimizer does not have yet."""
        if "_averaged" in self.__dict__:
            raise RuntimeError("step was called inside `averaged_params()`, where parameters are averages.")
        last = self._runtime
        unchanged = last.options.are_in(self.param_groups)
        last.settled = last.options if unchanged and self._constant() else None
        if last.leaves is not None and last.settled is not None:
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
        cut, tags = (kind_of, list(map(len, members))), list(map(_names_key, given))
        leaves = last.leaves if last.cut == cut and last.state.are_in([self.state]) else None
        if leaves is None or leaves.tags != tags or not leafwise.are_parts(members, leaves.params):
            params: list[torch.Tensor] = list(chain.from_iterable(members))
            states: list[Any] = [self.state.get(p) for p in params]
            fresh = [i for i, state in enumerate(states) if state is None]
            for i in fresh:
                states[i] = {}
            kinds = [k for k, group in zip(kind_of, members, strict=True) for _ in group]
            owners = [g for g, group in enumerate(members) for _ in group]
            names = functools.partial(_names_of, weakref.ref(self))
            leaves = Leaves(names, params, None, states, kinds, owners, list(map(id, params)), tags)
            last.leaves, last.fresh, last.cut, last.state = leaves, fresh, cut, Contents.of([self.state])
        last.used = templates, kind_of
        if not unchanged:
            last.options, last.constant = Contents.of(self.param_groups), None
        return templates, leaves, last.fresh

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
            self._runtime.leafwise.step(templates, leaves, self.param_groups, extra, guarded, self._runtime.settled)
        except TypeError:
            grads = leaves.gradients
            if not any(g is not None and g.layout is not torch.strided for g in grads):
                raise
            leaves = leaves._replace(grads=self._dense(grads))
            self._runtime.leafwise.step(templates, leaves, self.param_groups, extra, guarded, self._runtime.settled)

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
        self._keep(leaves, fresh)
        for p in group["params"]:
            if p.grad is not None:
                # where shapes are symbols, inductor has no name for the place of a tensor within memory that it shares
                for key, x in self.state[p].items():
                    if type(x) is torch.Tensor:
                        self.state[p][key] = leafwise.unpack(x)
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
        own = list(leaves.gradients)
        leaves = leaves._replace(params=list(leaves.params), grads=own, states=list(leaves.states))
        given = iter(zip(params, grads, strict=True))
        tensors = iter(state)
        for i, g in enumerate(own):
            if g is not None:
                leaves.params[i], own[i] = next(given)
                leaves.states[i] = {
                    k: next(tensors) if isinstance(x, torch.Tensor) else x for k, x in leaves.states[i].items()
                }
        self._run_on(templates, leaves, extra)

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

    def averaged_params(
        self, model: torch.nn.Module | Iterable[torch.nn.Module] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Swaps in the averages that `params_ema` keeps, for evaluation, and the parameters back at the end.

        Parameters are put back in any case: after an exception or an interrupt, and where the block has replaced
        `.data` of a parameter.

        FSDP2 keeps a whole copy of some parameters after a forward pass (of its root module, and of modules with
        `reshard_after_forward=False`), and the next pass reads that copy. So with FSDP2 pass the model, or evaluation
        sees the plain parameters, and the next training step the averages.

        Args:
          model: the module, or modules, whose whole copies are freed on the way in and out, in all processes alike.

        Returns:
          The context manager.

        Raises:
          ValueError: the chain has no `params_ema`, or no step has been taken.
          RuntimeError: it is inside another one.
          TypeError: `model` is no module.

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
        return averaged(self, model)
