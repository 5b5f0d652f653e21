"""`ChainOptimizer`: a step of a `torch.optim.Optimizer` is one run of a chain over all parameter groups."""

import contextlib
import functools
import math
import numbers
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from functional_optim._compiler.arguments import checked_function
from functional_optim._params.journal import Journal
from functional_optim._params.state import is_alike
from functional_optim._params.step import GRAD, Outcome, ParamStep
from functional_optim._params.template import Template
from functional_optim._runtime.backend import ASKED
from functional_optim._runtime.checks import refuse_meta
from functional_optim._runtime.internals import in_checkpoint
from functional_optim._runtime.overlap import SharedMemoryError
from functional_optim._runtime.shard import is_dtensor

from ._averages import averaged
from ._bindings import Bindings
from ._compiled import OPTIMIZERS, in_place_of_tensors, tensors_among
from ._loading import load
from ._steps import StepInputs, take_rows


def _check_rate(group: int, lr: Any) -> None:
    """Refuses a learning rate that would turn parameters into NaN; a tensor is not waited for."""
    if isinstance(lr, torch.Tensor) and lr.layout is not torch.strided:
        raise ValueError(f"lr of parameter group {group} is a sparse tensor, expected a number.")
    if lr is None or isinstance(lr, torch.Tensor):
        return
    try:
        finite = math.isfinite(lr)
    except (TypeError, OverflowError):
        finite = False
    if not finite:
        raise ValueError(f"lr of parameter group {group} is {lr!r:.60}, expected a finite number.")


def _is_at_start(own: Any) -> bool:
    """Whether the state of a parameter counts no step, as one does that checkpoint code has made, and its copies do."""
    step = own.get("step") if isinstance(own, Mapping) else None
    if isinstance(step, torch.Tensor):
        return type(step) is torch.Tensor and step.numel() == 1 and not step.is_meta and not step.any()
    return isinstance(step, numbers.Real) and not step


class ChainOptimizer(Optimizer):
    """The common part of the optimizers of this package: a step is one run of a chain over all parameter groups.

    A subclass says which chain a parameter group has, by way of switches: values of the group that decide the
    computation, as opposed to numbers, which are looked up in the group at every step.

    Example:
      >>> from functional_optim.adapters import AdamW, TransformOptimizer
      >>> issubclass(AdamW, ChainOptimizer), issubclass(TransformOptimizer, ChainOptimizer)
      (True, True)
    """

    SLOTS: ClassVar[Mapping[str, str]] = {}  # names of slots of state, where they differ from the rules' own
    OPTIONS_DECIDE: ClassVar[bool] = True  # whether parameter groups have their chains by options, not by parameters
    COMPILES: ClassVar[bool] = True  # whether a compiled step is one operation; otherwise it breaks the graph
    SPARSE_SLOTS: ClassVar[bool] = False  # whether torch's class keeps sparse slots, which are made dense at loading
    # whether parameters that keep nothing have an empty state where others have one
    EMPTY_STATES: ClassVar[bool] = False

    def _switches(self, group: Mapping[str, Any]) -> tuple[Hashable, ...]:
        """The values of a parameter group that decide which chain it has."""
        raise TypeError(f"{type(self).__name__} has no chain; use TransformOptimizer(params, tx).")

    def _template(self, switches: tuple[Any, ...]) -> Template:
        """The chain for some switches."""
        raise TypeError(f"{type(self).__name__} has no chain; use TransformOptimizer(params, tx).")

    def _row_template(self, switches: tuple[Any, ...]) -> Template | None:
        """The chain of rows that a sparse gradient touches, whose rules compute element by element.

        Args:
          switches: see `_switches`.

        Returns:
          The chain; None if all other rows change too, so that the gradient is made dense.

        Raises:
          RuntimeError: sparse gradients are refused.
        """
        raise RuntimeError(
            f"{type(self).__name__} does not support sparse gradients; make them dense (`nn.Embedding(..., "
            f"sparse=False)`), or use `SGD`, `Adagrad` or `SparseAdam` of functional_optim.adapters"
        )

    def _counter_dtype(self) -> torch.dtype | None:
        """The dtype of the counters `step`, which is torch's: float32, or float64 if that is the default dtype.

        None if counters are Python's integers.
        """
        return torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32

    def _check_options(self, g: int, group: Mapping[str, Any]) -> None:
        """Refuses options with which no step is taken, when any option has changed.

        Raises:
          ValueError, TypeError: with the index of the group, the option and its value.
        """
        _check_rate(g, group.get("lr"))

    def _unused_options(self, g: int, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
        """A warning of options that a file brings to a parameter group and that do nothing there; "" if there is none.

        Args:
          g: the index of the group.
          old: its options now.
          new: its options once the file is loaded.

        Raises:
          ValueError, TypeError: an option of the file is called otherwise here, or is out of its range.
        """
        return ""

    @functools.cached_property
    def _bindings(self) -> Bindings:
        """The steps that are bound; copies and pickles of an optimizer do not have them, and get their own."""
        bindings = Bindings()
        bindings.new = {id(p) for p, own in self.state.items() if _is_at_start(own)}
        return bindings

    def __getstate__(self) -> dict[str, Any]:
        if "_averaged" in self.__dict__:
            raise RuntimeError(
                "the optimizer was copied inside `averaged_params()`, where parameters are averages, from which the "
                "copy would train on; copy it outside."
            )
        return super().__getstate__()

    def step(self, closure: Callable[[], Any] | None = None, **extra: Any) -> Any:
        """Takes a step.

        Args:
          closure: evaluates the model again and returns the loss; it is called once, with gradients enabled.
          **extra: arguments that transformations of the chain take, such as `value`. A closure's loss is `value`. One
            that is a tree for a rule is a list in the order of the parameters, or a dict by name or by parameter.

        Returns:
          What `closure` returned, or None.

        Raises:
          ValueError, TypeError: a gradient, a state or an option does not fit; nothing has been changed.
        """
        loss = None
        offered: frozenset[str] = frozenset()
        if closure is not None:
            if not callable(closure):
                checked_function("closure", "step", closure, "which evaluates the model and returns the loss")
            with torch.enable_grad():
                loss = closure()
            if isinstance(loss, (int, float)) or (isinstance(loss, torch.Tensor) and loss.numel() == 1):
                value = loss.detach().reshape(()) if isinstance(loss, torch.Tensor) else loss
                extra = {"value": value, **extra}
                offered = frozenset({"value"})
        differentiable = bool(self.defaults.get("differentiable"))
        with torch.set_grad_enabled(differentiable):
            if torch.compiler.is_compiling():
                breaks = differentiable or not self.COMPILES
                breaks = breaks or any(isinstance(x, (list, tuple, dict)) for x in extra.values())
                if breaks or any(is_dtensor(p) for group in self.param_groups for p in group["params"]):
                    # an import of the compiler, which takes seconds
                    from ._outside import recorded_step_outside, step_outside

                    (recorded_step_outside if differentiable else step_outside)(self._run, extra, offered)
                else:
                    self._run_compiled(extra)
            else:
                self._run(extra, offered)
        return loss

    def _run(self, extra: dict[str, Any], offered: frozenset[str]) -> None:
        """Takes a step on the parameters and the gradients that they have."""
        if "_averaged" in self.__dict__:
            raise RuntimeError("step was called inside `averaged_params()`, where parameters are averages.")
        bindings = self._bindings
        templates, params = bindings.gather(self)
        if extra:
            self._check_extra(templates, extra, offered)
        grads = list(map(GRAD, params.tensors))
        states = bindings.states_of(self, params)
        self._step_on(StepInputs(templates, params.tensors, grads, states, extra))

    @staticmethod
    def _check_extra(templates: Sequence[Template], extra: Mapping[str, Any], offered: frozenset[str]) -> None:
        takes = [template.tx._extra_names() for template in templates]
        unknown = [k for k in extra if k not in offered and all(t is not None and k not in t for t in takes)]
        if unknown:
            known = sorted({name for t in takes if t is not None for name in t})
            raise TypeError(
                f"step() got an unexpected keyword argument {unknown[0]!r}; "
                f"this chain takes {', '.join(map(repr, known)) or 'none'}."
            )

    # -- stepping -----------------------------------------------------------------------------------------------------

    def _step_on(self, inputs: StepInputs) -> None:
        """Takes a step on some tensors, all or nothing, or steps one after another if some are the same memory."""
        bindings = self._bindings
        # `torch.amp.GradScaler` sets both where an optimizer offers to unscale gradients itself
        if getattr(self, "found_inf", None) is not None or getattr(self, "grad_scale", None) is not None:
            inputs = inputs.guarded_by(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        # before Python code of a chain runs, too, because nothing takes that back
        asked = bindings.sparse or (bindings.steps and bindings.steps[0].runs_python)
        try:
            if asked and not inputs.are_dense:
                take_rows(self, inputs)
            elif self._step_dense(inputs) == "sparse":
                bindings.sparse = True
                take_rows(self, inputs)
        except SharedMemoryError:
            turns = inputs.turns()
            if len(turns) < 2 or any(step.needs_all for step in bindings.steps):
                raise  # no two parameters are the same memory, or the chain needs all gradients at once
            for turn in turns:
                self._step_on(turn)

    def _step_dense(self, inputs: StepInputs) -> Outcome:
        """Takes a step on gradients that should be dense, all or nothing.

        The first attempt does not ask whether the gradients and entries of state of a bound step are still there,
        because reading their tensors shows it. A second one asks (`exact`), for one of two reasons: entries of state
        have to be made, but only for parameters that have gradients; or the first has found something gone.

        Args:
          inputs: the tensors and numbers of the step.

        Returns:
          `"sparse"` if one is not, and nothing has been done.
        """
        bindings, grads, states, extra = self._bindings, inputs.grads, inputs.states, inputs.extra
        assert bindings.params is not None
        originals = bindings.params.tensors
        dry = not self.state and in_checkpoint()
        # a step whose gradients are all there is looked for: the one that checkpoint code has taken had none missing
        before, exact, journal = bindings.new, dry or bool(bindings.started_dry), Journal()
        step: ParamStep | None = None
        first: frozenset[int] = frozenset()
        try:
            while True:
                step = bindings.step_for(self, inputs.templates, grads, guarded=inputs.guarded, exact=exact)
                step.begin()
                if bindings.started_dry:
                    bindings.start_anew(states, step.present, journal)
                columns, new = step.state.columns(states, exact), before
                if columns is None and not exact:
                    exact = True  # before state is made for parameters whose gradients are gone
                    continue
                if columns is None:
                    new = self._make_state(step, inputs, journal, dry)
                    columns = step.state.columns(states)
                    assert columns is not None, "the state that was missing has been made"
                elif self.EMPTY_STATES and 0 < len(self.state) < len(inputs.params):
                    bindings.adopt(self, originals, grads, states, journal)
                if dry:
                    bindings.note(step)
                    bindings.new = new
                    bindings.started_dry = [(states[i], key) for i, key in step.state.started_at_rate()]
                    return "taken"
                first = frozenset(i for i in step.present if id(originals[i]) in new) if new else frozenset()
                bindings.new = new - {id(originals[i]) for i in first} if first else new
                outcome = step.take(columns, inputs.params, grads, states, bindings.options, extra, first, journal)
                if outcome != "gone":
                    break
                if exact:
                    raise RuntimeError(
                        "a gradient or an entry of state that the step had found was taken away while it was computed; "
                        "change gradients and state between steps."
                    )
                bindings.undo(journal, before)  # slots of segments before the one that found something gone
                exact, journal = True, Journal()
            if self._keeps(inputs, journal, first, outcome == "taken"):
                if not step.state.noted:
                    bindings.note(step)
                if bindings.started_dry:
                    bindings.forget_started(states, step.present)
            else:
                bindings.undo(journal, before)
        except BaseException:
            bindings.forget_step(step)
            if step is None or not self._keeps(inputs, journal, first, step.completed):
                bindings.undo(journal, before)
            elif bindings.started_dry:
                bindings.forget_started(states, step.present)
            raise
        return outcome

    def _make_state(self, step: ParamStep, inputs: StepInputs, journal: Journal, dry: bool) -> set[int]:
        """Makes the entries of state that a step lacks.

        Args:
          step: the step.
          inputs: the tensors and numbers of the step.
          journal: takes note of entries that are made.
          dry: whether checkpoint code asks for them, which has put 0 in the place of the rates of groups.

        Returns:
          The ids of parameters that have state but have not taken their first step.
        """
        bindings = self._bindings
        assert bindings.params is not None
        originals = bindings.params.tensors
        groups = [{**g, "lr": self.defaults.get("lr")} for g in self.param_groups] if dry else self.param_groups
        made = step.state.make(originals, inputs.states, groups, journal, bindings.held)
        bindings.adopt(self, originals, inputs.grads, inputs.states, journal)
        return bindings.new | {id(originals[i]) for i in made}

    @staticmethod
    def _keeps(inputs: StepInputs, journal: Journal, first: frozenset[int], taken: bool) -> bool:
        """Whether the entries of state that a step has made stay: it was taken, and no gradient had overflowed.

        Nothing waits for a device but the first step.
        """
        return taken and not (inputs.guarded and (first or journal) and float(inputs.extra["found_inf"]))

    # -- torch.compile ------------------------------------------------------------------------------------------------
    # Inside torch.compile the step is one operation that the compiler does not look into. It does look into how its
    # arguments are collected, and runs a method called `_init_group` in Python, once, while it traces.

    def _run_compiled(self, extra: dict[str, Any]) -> None:
        params: list[torch.Tensor] = []
        grads: list[torch.Tensor] = []
        state: list[torch.Tensor] = []
        options: list[torch.Tensor] = []
        handle = 0
        for group in self.param_groups:
            some_params: list[torch.Tensor] = []
            some_grads: list[torch.Tensor] = []
            some_state: list[torch.Tensor] = []
            handle = self._init_group(group, some_params, some_grads, some_state)
            params.extend(some_params)
            grads.extend(some_grads)
            state.extend(some_state)
            options.extend(tensors_among(group))
        from functional_optim._graph.trace import as_numbers  # an import of the compiler, which takes seconds

        values = [torch.as_tensor(as_numbers(x), dtype=torch.float64) for x in extra.values()]
        backend = ASKED.names[-1] if ASKED.names else ""  # a name that graphs are guarded by
        torch.ops.functional_optim.step(handle, params, grads, state, options, ",".join(extra), values, backend)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        state: list[torch.Tensor],
    ) -> int:
        """Appends a group's tensors to lists, and returns the handle that the compiled step finds this optimizer by."""
        bindings = self._bindings
        templates, known = bindings.gather(self)
        own_grads, states, journal = list(map(GRAD, known.tensors)), bindings.states_of(self, known), Journal()
        step = bindings.step_for(self, templates, own_grads, guarded=False, exact=True)
        bindings.start_anew(states, step.present, journal)
        bindings.forget_started(states, step.present)
        if step.state.columns(states, True) is None:
            made = step.state.make(known.tensors, states, self.param_groups, journal, bindings.held)
            bindings.new = bindings.new | {id(known.tensors[i]) for i in made}
            bindings.adopt(self, known.tensors, own_grads, states, journal)
        bindings.note(step)
        owners: dict[int, torch.Tensor] = {}  # a number that parameters share is passed once, with the first of them
        for p, g, entries in zip(known.tensors, own_grads, bindings.states_of(self, known), strict=True):
            for x in entries.values() if g is not None else ():
                owners.setdefault(id(x), p)
        for p in group["params"]:
            if p.grad is not None:
                params.append(p)
                grads.append(p.grad)
                entries = self.state[p]
                state.extend(x for x in entries.values() if isinstance(x, torch.Tensor) and owners[id(x)] is p)
        handle = bindings.handle
        OPTIMIZERS[handle] = self
        return handle

    def _run_traced(
        self,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        state: list[torch.Tensor],
        options: list[torch.Tensor],
        extra: dict[str, Any],
    ) -> None:
        """Takes a step on tensors that stand for this optimizer's own, in the order of `_run_compiled`."""
        bindings = self._bindings
        templates, known = bindings.gather(self)
        own_params, own_grads = list(known.tensors), list(map(GRAD, known.tensors))
        own_states = list(bindings.states_of(self, known))
        given, tensors = iter(zip(params, grads, strict=True)), iter(state)
        standing: dict[int, torch.Tensor] = {}  # for which tensor of the state each stands
        for i, g in enumerate(own_grads):
            if g is not None:
                own_params[i], own_grads[i] = next(given)
                if own_params[i].is_meta:
                    refuse_meta(known.names[i])
                for x in own_states[i].values():
                    if isinstance(x, torch.Tensor) and id(x) not in standing:
                        standing[id(x)] = next(tensors)
        states = [{k: standing.get(id(x), x) for k, x in own.items()} if own else own for own in own_states]
        with in_place_of_tensors(self.param_groups, options):
            self._step_on(StepInputs(templates, own_params, own_grads, states, extra))
        # whole-tensor rules and Python transformations have put new tensors into `states`
        for own, entries in zip(own_states, states, strict=True):
            for k, x in entries.items():
                old = standing.get(id(own.get(k)), own.get(k))
                if isinstance(old, torch.Tensor) and is_alike(old, x):
                    old.copy_(x)
                elif x is not old:
                    own[k] = x

    def load_state_dict(self, state_dict: dict[str, Any], *, by_name: bool = False, strict: bool = True) -> None:
        """Loads a state dict, of this class or of the torch optimizer of the same name.

        Tensors are copied, never shared with `state_dict`, and keep the dtype that the chain declares for them.

        Args:
          state_dict: the state.
          by_name: whether parameters are matched by name instead of by position; both sides need named parameters.
          strict: with `by_name`, whether every parameter must be in `state_dict`; others start anew.

        Raises:
          ValueError: the state is that of another chain or of other parameters; nothing has been changed.
        """
        # a step that is not compiled need not import the compiler, which takes seconds
        compiles = "torch._dynamo" in sys.modules
        apart = torch.compiler.disable(load) if compiles else load  # type: ignore[no-untyped-call]
        apart(self, state_dict, by_name, strict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.pop("_bindings", None)
        super().__setstate__(state)
        self._bindings.hold(self.state)

    def averaged_params(
        self,
        model: torch.nn.Module | Iterable[torch.nn.Module] | None = None,
        *,
        buffers: Mapping[str, torch.Tensor] | None = None,
        slot: str | None = None,
    ) -> contextlib.AbstractContextManager[None]:
        """Swaps in the parameters to evaluate at, and the trained parameters back at the end.

        They are the averages of `params_ema` or `params_swa`, or a slot of a rule with `slot(..., evaluate=True)`. A
        parameter that has taken no step stays as it is.

        Parameters are put back in any case: after an exception or an interrupt, and where the block has replaced
        `.data` of a parameter. So are the buffers of the model, if it is given: `torch.optim.swa_utils.update_bn` in
        the block computes the statistics of the averaged model, and training goes on with its own.

        FSDP2 keeps a whole copy of some parameters after a forward pass (of its root module, and of modules with
        `reshard_after_forward=False`). Modules that are called inside the block gather parameters anew, and again after
        it. Methods other than `forward` read the copy that is there, unless the model is given.

        Args:
          model: the module, or modules, whose buffers are put back, and whose whole copies are freed on the way in and
            out, in all processes alike.
          buffers: values by name for buffers of the model, to be swapped in too, such as averages of them.
          slot: the key of the averages in the state of a parameter, where a chain keeps several.

        Returns:
          The context manager.

        Raises:
          ValueError: the chain keeps no averages, several, or none of that name; no step has been taken; the model has
            no such buffer.
          RuntimeError: the block is inside another one.
          TypeError: `model` is no module, or there are buffers and not one module.

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
        return averaged(self, model, buffers, slot)
