"""Bindings of an optimizer: its groups as one list of parameters with their chains, and the steps that are bound."""

from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from itertools import chain, repeat
from operator import is_, is_not
from typing import TYPE_CHECKING, Any

import torch

from functional_optim._compiler.errors import ShortTracebacks
from functional_optim._params.journal import Journal
from functional_optim._params.layout import ChainLayout
from functional_optim._params.state import Held
from functional_optim._params.step import ParamStep
from functional_optim._params.template import ParamList, Template
from functional_optim._runtime.recent import in_front
from functional_optim._runtime.spec import TensorSpec

from ._compiled import HANDLES
from ._naming import names_of


if TYPE_CHECKING:
    from .optimizer import ChainOptimizer


# types of options that are another object when they change
CONSTANT = {float, int, bool, str, type(None)}
KEEP = 16  # sets of present gradients that an optimizer is bound to at once
KEEP_CHAINS = 1024  # chains by switches, and layouts of chains; switches may be numbers


class Bindings:
    """The tensors and chains that an optimizer is bound to: it makes steps faster, and is made anew if it is gone."""

    def __init__(self) -> None:
        self.templates: dict[tuple[Hashable, ...], Template] = {}  # by switches
        self.row_templates: dict[tuple[Hashable, ...], Template | None] = {}  # of sparse gradients, by switches
        self.seen_names: list[str] = []  # of the options of the groups
        self.seen_values: list[Any] | None = None  # of the groups, if they are other objects when they change
        self.options: tuple[Mapping[str, Any], ...] = ()  # the groups, another tuple when an option has changed
        self.checked: dict[int, list[Any]] = {}  # the options of each group that were in their ranges
        self.known_names: set[str] = set()  # of options that have been looked at, whether or not the chain knows them
        self.used: tuple[list[Template], list[int]] = ([], [])  # the templates of the groups, and that of each
        self.params: ParamList | None = None
        self.counter: torch.dtype | None = None  # the dtype of counters that chains and steps were made for
        self.sizes: list[int] = []  # of the groups
        self.names: list[list[str] | None] = []  # given with the groups
        self.states: list[dict[str, Any]] = []  # of the parameters
        self.state_items: tuple[list[Any], list[Any]] = ([], [])  # keys and values of the optimizer's state
        self.layouts: dict[tuple[int, ...], ChainLayout] = {}  # by whether steps are guarded, and the ids of templates
        self.steps: list[ParamStep] = []
        self.row_steps: list[ParamStep] = []  # of the rows that sparse gradients touch
        # addresses and specs of tensors with rows to be written, which were found to share no memory
        self.disjoint: Sequence[tuple[int, TensorSpec]] = ()
        self.sparse = False  # whether a gradient has been sparse, so that layouts are looked at before a step
        self.held: Held = {}  # entries that steps have left, by which one that was removed is told from a new one
        self.new: set[int] = set()  # ids of parameters that have state, but have not taken their first step
        # entries of state that begin at the rate of a group, made by checkpoint code, which sets that to 0 meanwhile
        self.started_dry: list[tuple[dict[str, Any], str]] = []
        self.warned = False
        self.handle = next(HANDLES)

    def __reduce__(self) -> tuple[Any, ...]:
        return Bindings, ()  # tensors of a copy are other ones

    def hold(self, state: Mapping[Any, Mapping[str, Any]]) -> None:
        """Takes note of the entries of a state that is not of steps of this optimizer: of a file, or of a copy."""
        self.held = {id(p): set(entries) for p, entries in state.items() if isinstance(p, torch.Tensor)}

    def note(self, step: ParamStep) -> None:
        """Takes note of the entries that a step leaves, the first time that it is taken."""
        if not step.state.noted:
            for key, entries in step.state.note().items():
                self.held.setdefault(key, set()).update(entries)

    def template_of(self, opt: "ChainOptimizer", group: Mapping[str, Any]) -> Template:
        """The chain of a parameter group.

        Raises:
          TypeError: an option that decides what is computed has no hash.
        """
        switches, known = opt._switches(group), self.templates
        try:
            found = known.get(switches)
        except TypeError:
            raise TypeError(
                f"an option that decides what is computed must be a bool, a number or a string; this parameter group "
                f"has {', '.join(repr(x) for x in switches if not isinstance(x, Hashable))}."
            ) from None
        if found is None:
            found = known[switches] = opt._template(switches)
            _drop_oldest(known)
        return found

    def row_template_of(self, opt: "ChainOptimizer", group: Mapping[str, Any]) -> Template | None:
        """The chain of the rows of a group that sparse gradients touch; see `ChainOptimizer._row_template`."""
        switches, known = opt._switches(group), self.row_templates
        if switches not in known:
            known[switches] = opt._row_template(switches)
            _drop_oldest(known)
        return known[switches]

    def gather(self, opt: "ChainOptimizer") -> tuple[list[Template], ParamList]:
        """The chains of the groups, and the parameters."""
        counter = opt._counter_dtype()
        if counter is not self.counter:
            self.seen_values = None
        templates, of_group, options = self._templates(opt)
        lists = [group["params"] for group in opt.param_groups]
        params = list(chain.from_iterable(lists))
        known, sizes = self.params, list(map(len, lists))
        names = [group.get("param_names") for group in opt.param_groups]
        if (
            known is None
            or self.used != (templates, of_group)
            or sizes != self.sizes
            or names != self.names
            or counter is not self.counter
            or not all(map(is_, params, known.tensors))
        ):
            groups = [g for g, size in enumerate(sizes) for _ in range(size)]
            _check_names(opt, sizes)
            own_names, before = names_of(opt.param_groups), set(map(id, params if known is None else known.tensors))
            later = frozenset(name for name, p in zip(own_names, params, strict=True) if id(p) not in before)
            known = ParamList(own_names, params, [of_group[g] for g in groups], groups, later)
            self.layouts, self.steps, self.row_steps, self.states = {}, [], [], []
            there = {*map(id, params), *map(id, opt.state)}
            self.held = {key: entries for key, entries in self.held.items() if key in there}
            self.names = [None if x is None else list(x) for x in names]
            self.params, self.sizes, self.used, self.counter = known, sizes, (templates, of_group), counter
        same_groups = len(self.options) == len(sizes) and all(map(is_, self.options, opt.param_groups))
        if options is None or options is not self.seen_values or not same_groups:
            self.options = tuple(opt.param_groups)
            self.seen_names = list(chain.from_iterable(opt.param_groups))
        self.seen_values = options  # last: they say that all the rest is up to date
        return templates, known

    def _templates(self, opt: "ChainOptimizer") -> tuple[list[Template], list[int], list[Any] | None]:
        """The chains of all groups, which of them each group has, and the options that they depend on.

        There are no options to compare by if one of them can change and be the same object, or parameters decide, too.
        """
        groups = opt.param_groups
        values = list(chain.from_iterable(map(dict.values, groups)))
        if (
            self.seen_values is not None
            and len(values) == len(self.seen_values)
            and all(map(is_, values, self.seen_values))
            and list(chain.from_iterable(groups)) == self.seen_names
        ):
            return *self.used, self.seen_values
        templates: list[Template] = []
        of_group: list[int] = []
        for g, group in enumerate(groups):
            opt._check_options(g, group)
            try:
                template = self.template_of(opt, group)
            except (TypeError, ValueError) as error:
                if type(error) not in (TypeError, ValueError):
                    raise
                raise type(error)(f"parameter group {g}: {error}") from None
            if not any(template is t for t in templates):
                templates.append(template)
            of_group.append(next(k for k, t in enumerate(templates) if t is template))
        return templates, of_group, values if opt.OPTIONS_DECIDE and _is_constant(opt) else None

    def states_of(self, opt: "ChainOptimizer", params: ParamList) -> list[dict[str, Any]]:
        """The state of each parameter; a dict that is not the optimizer's yet for one that has none."""
        state = opt.state
        keys, values = self.state_items
        same = len(state) == len(keys) and all(map(is_, state, keys)) and all(map(is_, state.values(), values))
        if not self.states or not same:
            found = [state.get(p) for p in params.tensors]
            for name, x in zip(params.names, found, strict=True):
                if x is not None and not isinstance(x, MutableMapping):
                    raise TypeError(f"state at {name!r} is {x!r:.60}, expected a dict of entries by name.")
            made: dict[int, dict[str, Any]] = {}  # a parameter may be there twice
            pairs = zip(params.tensors, found, strict=True)
            self.states = [made.setdefault(id(p), {}) if x is None else x for p, x in pairs]
            self.state_items = list(state), list(state.values())
        return self.states

    def adopt(
        self,
        opt: "ChainOptimizer",
        params: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor | None],
        states: Sequence[dict[str, Any]],
        journal: Journal,
    ) -> None:
        """Takes up states that have been made; where some parameters have one, the others get an empty one."""
        everyone = opt.EMPTY_STATES and (bool(opt.state) or any(states))
        for p, g, state in zip(params, grads, states, strict=True):
            if (state or (everyone and g is not None)) and p not in opt.state:
                journal.set(opt.state, p, state)
                self.states = []  # to be gathered anew

    def start_anew(self, states: Sequence[dict[str, Any]], present: Sequence[int], journal: Journal) -> None:
        """Has entries of `started_dry` made anew, of parameters that have gradients."""
        stepped = {id(states[i]) for i in present}
        for state, key in self.started_dry:
            if id(state) in stepped:
                journal.set(state, key, None)

    def forget_started(self, states: Sequence[dict[str, Any]], present: Sequence[int]) -> None:
        """Forgets entries of `started_dry` of parameters that have taken a step."""
        stepped = {id(states[i]) for i in present}
        self.started_dry = [(state, key) for state, key in self.started_dry if id(state) not in stepped]

    def step_for(
        self,
        opt: "ChainOptimizer",
        templates: Sequence[Template],
        grads: Sequence[torch.Tensor | None],
        *,
        guarded: bool,
        exact: bool,
        of_rows: bool = False,
    ) -> ParamStep:
        """The step for gradients of which the same ones are there, if there is one that is bound; else a new one.

        Args:
          opt: the optimizer.
          templates: the chains of the groups.
          grads: the gradients.
          guarded: whether the step is taken only if `found_inf` is 0.
          exact: whether to look for gradients that are gone; they are found when tensors are read, too.
          of_rows: whether the gradients are sparse, and the step one of the rows that they touch.
        """
        steps = self.row_steps if of_rows else self.steps
        # of several steps, none is tried in vain on gradients of which some are gone
        there = list(map(is_not, grads, repeat(None))) if len(steps) > 1 else None
        for step in steps:
            if (there is None or there == step.there) and step.is_for(templates, grads, guarded, exact):
                if step is not steps[0]:
                    self._keep(step, of_rows)
                return step
        with ShortTracebacks():
            layout = self._layout_of(templates, guarded)
            step = ParamStep(layout, grads, opt._counter_dtype(), warn=not self.warned)
        self.warned = True
        self._keep(step, of_rows)
        return step

    def _keep(self, step: ParamStep, of_rows: bool) -> None:
        """Puts a step in front of the other bound steps."""
        if of_rows:
            self.row_steps = in_front(step, self.row_steps, KEEP)
        else:
            self.steps = in_front(step, self.steps, KEEP)

    def _layout_of(self, templates: Sequence[Template], guarded: bool) -> ChainLayout:
        """The layout of some chains over the parameters, which all sets of present gradients share."""
        assert self.params is not None
        key = guarded, *map(id, templates)  # a layout holds its templates, so that no other ones get their ids
        layout = self.layouts.get(key)
        if layout is None or not layout.is_current:
            layout = self.layouts[key] = ChainLayout(templates, self.params, guarded, warn=not self.warned)
            _drop_oldest(self.layouts)
        return layout

    def undo(self, journal: Journal, new: set[int]) -> None:
        """Takes back the entries that a step has made before it failed; `new` are the parameters without a step."""
        journal.undo()
        self.new, self.states = new, []

    def forget_step(self, step: ParamStep | None) -> None:
        """Gives up all layouts, and a step that has failed if its masks ask for shapes, which parameters may change."""
        self.layouts = {}
        if step is None or not any(template.tx._asks_leaves() for template in step.templates):
            return
        self.steps = [x for x in self.steps if x is not step]
        self.row_steps = [x for x in self.row_steps if x is not step]


def _drop_oldest(known: dict[Any, Any]) -> None:
    """Drops the entries that were made longest ago, so that `KEEP_CHAINS` are left."""
    while len(known) > KEEP_CHAINS:
        del known[next(iter(known))]


def _check_names(opt: "ChainOptimizer", sizes: Sequence[int]) -> None:
    """Refuses names of another number than the parameters of their group."""
    for g, (size, group) in enumerate(zip(sizes, opt.param_groups, strict=True)):
        names = group.get("param_names")
        if names is not None and len(names) != size:
            raise ValueError(
                f"parameter group {g} has {size} params but {len(names)} param_names; change both together."
            )


def _is_constant(opt: "ChainOptimizer") -> bool:
    """Whether no option can change and be the same object, apart from lists of parameters and names."""
    values = (x for group in opt.param_groups for k, x in group.items() if k not in ("params", "param_names"))
    parts = chain.from_iterable(x if type(x) is tuple else (x,) for x in values)
    return {type(x) for x in parts} <= CONSTANT
