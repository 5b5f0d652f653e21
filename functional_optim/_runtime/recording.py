"""Steps that autograd records: kernels compute the step, and kernels of its derivative the cotangents.

What is saved are the inputs of the step, which it leaves alone: the derivative computes other values again, which moves
fewer bytes than saving them. The derivative is itself recorded, as torch operations, for whoever differentiates it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .._compiler.call import Column
from .._compiler.differentiate import NoDerivative, cotangent, differentiate_all
from .._compiler.fuse import Recipe, Source
from .._compiler.program import Level, Program
from .evaluate import evaluate
from .plan import Columns, Key, Leaf
from .pointers import Difference
from .spec import specs_of
from .step import COMPILE, BoundStep, Numbers


Tensors = Sequence[torch.Tensor]
KEEP = 8  # derivatives of a step, by the cotangents that are given and wanted; and steps that each is bound to


def can_record(bound: BoundStep) -> bool:
    """Whether kernels compute a step and its derivative."""
    kernels = type(bound) is BoundStep and not bound.in_place and bound.joins is None
    return kernels and all(backend in COMPILE for backend, _ in bound.parts)


def record(bound: BoundStep, columns: Columns, numbers: Numbers) -> Columns:
    """Computes a step that autograd records.

    Args:
      bound: the step.
      columns: the columns that its tensors are gathered from.
      numbers: the scalar table of each group.

    Returns:
      The columns that change, complete.
    """
    step = Recording(bound, numbers)
    outputs = iter(_Step.apply(step, *bound.gather(columns), *step.tensors))  # type: ignore[no-untyped-call]
    nested = [[[next(outputs) for _ in group.leaves] for _ in group.outputs] for group in bound.groups]
    return bound.scatter(columns, nested)


class Derivative(NamedTuple):
    """The derivative of a step for some cotangents.

    Args:
      programs: that of the program of each group.
      given: for each group, the outputs whose cotangents are given.
      wanted: for each group, the inputs whose cotangents are wanted.
      bound: the programs bound to tensors, the last ones first.
    """

    programs: tuple[Program, ...]
    given: tuple[frozenset[str], ...]
    wanted: tuple[frozenset[str], ...]
    bound: list[BoundStep]


class Recording:
    """A step with the numbers that it is taken with. Its tensors are those that it gathers, then those among numbers.

    Args:
      bound: the step.
      numbers: the scalar table of each group.
    """

    def __init__(self, bound: BoundStep, numbers: Numbers) -> None:
        self.bound, self.numbers = bound, numbers
        self.places: dict[int, list[tuple[int, int]]] = {}  # of each tensor among numbers: groups, and places in tables
        self.tensors: list[torch.Tensor] = []
        for g, table in enumerate(numbers):
            for k, x in enumerate(table):
                if isinstance(x, torch.Tensor):
                    if id(x) not in self.places:
                        self.tensors.append(x)
                    self.places.setdefault(id(x), []).append((g, k))
        self.slots = [self.places[id(x)] for x in self.tensors]

    def split(self, tensors: Tensors) -> tuple[list[torch.Tensor], list[list[Any]]]:
        """The gathered tensors, and the scalar tables with other tensors in the place of those that they had."""
        n = self.bound.n_gathered
        tables = [list(table) for table in self.numbers]
        for x, places in zip(tensors[n:], self.slots, strict=True):
            for g, k in places:
                tables[g][k] = x
        return list(tensors[:n]), tables

    def compute(self, tensors: Tensors) -> list[torch.Tensor]:
        """The outputs by kernels, one after another."""
        gathered, tables = self.split(tensors)
        reading = self.bound.read_tensors(gathered)
        assert not isinstance(reading, Difference), "the tensors of a step are those that it was bound to"
        return _flat(self.bound.compute(reading, {}, tables))

    def follow(self, tensors: Tensors) -> list[torch.Tensor]:
        """The outputs by torch operations."""
        gathered, tables = self.split(tensors)
        columns = self.bound.split(gathered)
        return _flat(evaluate("reference", self.bound.groups, columns, tables, None))

    def names(self) -> list[tuple[int, str, int]]:
        """Of each output, one after another: its group, its name, and the place of its leaf in the group."""
        groups = enumerate(self.bound.groups)
        return [
            (g, output.name, k)
            for g, group in groups
            for output in group.signature.program.outputs
            for k in range(len(group.leaves))
        ]

    def inputs(self) -> list[tuple[int, str, int, int]]:
        """Of each input of a program: its group, its name, and the bounds of its tensors among those gathered."""
        found = []
        for g, (group, bounds) in enumerate(zip(self.bound.groups, self.bound.bounds, strict=True)):
            program = group.signature.program
            for name, gather in zip((*program.arrays, *program.leaves), group.inputs, strict=True):
                found.append((g, name, *bounds[gather]))
        return found

    def derivative(self, given: Sequence[bool], wanted: Sequence[bool]) -> Derivative:
        """The derivative for the outputs whose cotangents are given, and the tensors whose cotangents are wanted.

        Raises:
          NoDerivative: an operation of the step has none.
        """
        groups = self.bound.groups
        outputs: list[set[str]] = [set() for _ in groups]
        inputs: list[set[str]] = [set() for _ in groups]
        for (g, name, _), there in zip(self.names(), given, strict=True):
            if there:
                outputs[g].add(name)
        for g, name, start, stop in self.inputs():
            if any(wanted[start:stop]):
                inputs[g].add(name)
        for places, there in zip(self.slots, wanted[self.bound.n_gathered :], strict=True):
            for g, k in places if there else ():
                scalars = groups[g].signature.program.scalars
                inputs[g].add(scalars[k % len(scalars)])
        key = tuple(map(frozenset, outputs)), tuple(map(frozenset, inputs))
        known: dict[Any, Derivative] = self.bound.derivatives
        found = known.get(key)
        if found is None:
            programs = differentiate_all(tuple(group.signature.program for group in groups), *key)
            found = Derivative(programs, *key, [])
            if len(known) >= KEEP:
                known.pop(next(iter(known)), None)
            known[key] = found
        return found

    def pull_back(
        self, tensors: Tensors, cotangents: Sequence[torch.Tensor | None], wanted: Sequence[bool]
    ) -> list[torch.Tensor]:
        """The cotangents of wanted tensors by kernels, from those of outputs.

        Raises:
          NoDerivative: an operation of the step has none.
        """
        derivative = self.derivative([x is not None for x in cotangents], wanted)
        gathered, tables = self.split(tensors)
        columns, leaves, rows = self._columns(derivative, gathered, cotangents)
        bound, reading = self._bind(derivative, columns, leaves)
        numbers = []
        for group in bound.groups:
            table: list[Any] = []
            for owner, _ in group.owners:
                g, row = rows[owner]
                names = self.bound.groups[g].signature.program.scalars
                own = dict(zip(names, tables[g][row * len(names) : (row + 1) * len(names)], strict=True))
                table += [own[name] for name in group.signature.program.scalars]
            numbers.append(table)
        return self._gather(bound.run(reading, columns, numbers), tensors, wanted)

    def _columns(
        self, derivative: Derivative, gathered: Tensors, cotangents: Sequence[torch.Tensor | None]
    ) -> tuple[Columns, list[Leaf], list[tuple[int, int]]]:
        """The columns of a derivative, its leaves, and the group and row that numbers of each of its rows come from."""
        groups, bounds = self.bound.groups, self.bound.bounds
        n = 1 + max(i for group in groups for i in group.leaves)
        columns: dict[Key, list[Any]] = {"updates": [None] * n}

        def column(name: str) -> list[Any]:
            return columns.setdefault(name, [None] * n)

        number = torch.zeros((), dtype=torch.float64, device=gathered[0].device)
        for g, group in enumerate(groups):
            start, stop = bounds[g][group.updates]
            for i, x in zip(group.leaves, gathered[start:stop], strict=True):
                column("updates")[i] = x
            for name in derivative.wanted[g] & set(group.signature.program.scalars):
                for i in group.leaves:  # an output has the dtype of the tensor in its place
                    column(cotangent(name))[i] = number
        for g, name, start, stop in self.inputs():
            own = list(gathered[start:stop])
            for i, x in zip(groups[g].leaves, own * (len(groups[g].leaves) // len(own)), strict=True):
                column(name)[i] = column(cotangent(name))[i] = x
        likes = self._outputs_like(gathered)
        for (g, name, k), d, like in zip(self.names(), cotangents, likes, strict=True):
            if name in derivative.given[g]:
                column(cotangent(name))[groups[g].leaves[k]] = like() if d is None else d
        rows: list[tuple[int, int]] = []
        leaves = []
        for g, (group, program) in enumerate(zip(groups, derivative.programs, strict=True)):
            recipe = Recipe(program, tuple(Source("value", -1, name) for name in program.scalars), {}, {})
            first = len(rows)
            rows += [(g, row) for row in range(len(group.sources))]
            for i, numel, row in zip(group.leaves, group.table.wholes, group.table.rows, strict=True):
                leaves.append(Leaf(i, recipe, (g, first + row, False), numel, None))
        return dict(columns), leaves, rows

    def _outputs_like(self, gathered: Tensors) -> list[Callable[[], torch.Tensor]]:
        """Of each output, one after another, a function that makes zeros like it."""
        made: list[Callable[[], torch.Tensor]] = []
        for group, bounds in zip(self.bound.groups, self.bound.bounds, strict=True):
            start, stop = bounds[group.updates]
            for output, dtype in zip(group.signature.program.outputs, group.signature.outputs, strict=True):
                for x in gathered[start:stop]:
                    shape = x.shape if output.level is Level.ELEMENT else ()
                    made.append(lambda x=x, shape=shape, dtype=dtype: x.new_zeros(shape, dtype=dtype))  # type: ignore[misc]
        return made

    def _bind(self, derivative: Derivative, columns: Columns, leaves: Sequence[Leaf]) -> tuple[BoundStep, Any]:
        """A step of the derivative that is bound to such tensors, and these tensors read."""
        for bound in derivative.bound:
            reading = bound.read(columns)
            if not isinstance(reading, Difference):
                return bound, reading
        bound = BoundStep(leaves, {k: specs_of(x) for k, x in columns.items()}, columns, self.bound.paths, False)
        derivative.bound[:] = [bound, *derivative.bound[: KEEP - 1]]
        reading = bound.read(columns)
        assert not isinstance(reading, Difference)
        return bound, reading

    def _gather(self, results: Columns, tensors: Tensors, wanted: Sequence[bool]) -> list[torch.Tensor]:
        """The cotangents of wanted tensors, from the columns that a derivative has written."""
        sums: dict[int, torch.Tensor] = {}

        def add(k: int, d: torch.Tensor) -> None:
            d = d.to(device=tensors[k].device, dtype=tensors[k].dtype)
            sums[k] = sums[k] + d if k in sums else d

        for g, name, start, stop in self.inputs():
            leaves = self.bound.groups[g].leaves
            for place, i in enumerate(leaves):
                k = start + place if stop - start == len(leaves) else start  # a number that leaves share
                if wanted[k]:
                    add(k, results[cotangent(name)][i])
        for k, places in enumerate(self.slots, self.bound.n_gathered):
            for g, place in places if wanted[k] else ():
                group = self.bound.groups[g]
                scalars = group.signature.program.scalars
                row, column = divmod(place, len(scalars))
                for i, own in zip(group.leaves, group.table.rows, strict=True):
                    if own == row:
                        add(k, results[cotangent(scalars[column])][i].reshape(tensors[k].shape))
        return [sums[k] if k in sums else torch.zeros_like(tensors[k]) for k, there in enumerate(wanted) if there]


def _flat(outputs: Sequence[Sequence[Column]]) -> list[torch.Tensor]:
    """The tensors of all columns."""
    return [x for own in outputs for column in own for x in column]


def _follow_back(
    step: Recording, tensors: Tensors, cotangents: Sequence[torch.Tensor | None], wanted: Sequence[bool]
) -> list[torch.Tensor]:
    """The cotangents of wanted tensors by torch operations, which autograd records."""
    given = [(k, x) for k, x in enumerate(cotangents) if x is not None]
    outputs = step.follow(tensors)
    own = [x for x, there in zip(tensors, wanted, strict=True) if there]
    reached = [(outputs[k], d) for k, d in given if outputs[k].requires_grad]
    if not reached:
        return [torch.zeros_like(x) for x in own]
    found = torch.autograd.grad(
        [x for x, _ in reached], own, [d for _, d in reached], create_graph=True, materialize_grads=True
    )
    return list(found)


def _pull_back_followed(
    step: Recording, tensors: Tensors, cotangents: Sequence[torch.Tensor | None], wanted: Sequence[bool]
) -> tuple[torch.Tensor, ...]:
    """The cotangents of wanted tensors by torch operations, which transformations follow."""

    def outputs(*own: torch.Tensor) -> list[torch.Tensor]:
        given = iter(own)
        found = step.follow([next(given) if there else x for x, there in zip(tensors, wanted, strict=True)])
        return [x for x, d in zip(found, cotangents, strict=True) if d is not None]

    pull_back = torch.func.vjp(outputs, *[x for x, there in zip(tensors, wanted, strict=True) if there])[1]
    return tuple(pull_back([d for d in cotangents if d is not None]))


class _Step(torch.autograd.Function):
    """A step, of its tensors."""

    @staticmethod
    def forward(step: Recording, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(step.compute(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.step, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[1:]
        present = tuple(d is not None for d in cotangents)
        given = [d for d in cotangents if d is not None]
        if not given:
            return (None, *[None] * len(wanted))
        results = iter(_Derivative.apply(ctx.step, present, wanted, *ctx.saved_tensors, *given))  # type: ignore[no-untyped-call]
        return (None, *[next(results) if there else None for there in wanted])


class _Derivative(torch.autograd.Function):
    """The cotangents of wanted tensors, of the tensors of a step and the cotangents of its outputs."""

    @staticmethod
    def forward(
        step: Recording, present: Sequence[bool], wanted: Sequence[bool], *arguments: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        tensors, cotangents = _arguments(present, arguments)
        try:
            return tuple(step.pull_back(tensors, cotangents, wanted))
        except NoDerivative:
            return _pull_back_followed(step, tensors, cotangents, wanted)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, step: Recording, present: Sequence[bool], wanted: Sequence[bool], *arguments: Any
    ) -> tuple[Any, int]:
        """Some cotangents at once, as `jacrev` has them: torch operations, which `vmap` maps."""

        def one(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return _pull_back_followed(step, *_arguments(present, arguments), wanted)

        return torch.func.vmap(one, in_dims=tuple(in_dims[3:]))(*arguments), 0

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.step, ctx.present, ctx.wanted, *arguments = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[3:]
        with torch.enable_grad():
            # aliases, for a tensor may follow from another one before the step
            arguments = [x.view_as(x) if x.is_floating_point() else x for x in ctx.saved_tensors]
            arguments = [
                x if x.requires_grad or not (there and x.is_floating_point()) else x.requires_grad_()
                for x, there in zip(arguments, _floats(ctx, arguments), strict=True)
            ]
            tensors, given = _arguments(ctx.present, arguments)
            outputs = _follow_back(ctx.step, tensors, given, ctx.wanted)
            own = [x for x, there in zip(arguments, needed, strict=True) if there]
            pairs = [(x, d) for x, d in zip(outputs, cotangents, strict=True) if d is not None and x.requires_grad]
            if not pairs or not own:
                return (None,) * len(ctx.needs_input_grad)
            found = iter(
                torch.autograd.grad(
                    [x for x, _ in pairs],
                    own,
                    [d for _, d in pairs],
                    create_graph=torch.is_grad_enabled(),
                    allow_unused=True,
                )
            )
        return (None, None, None, *[next(found) if there else None for there in needed])


def _floats(ctx: Any, arguments: Tensors) -> Sequence[bool]:
    """The arguments of a derivative that its own derivative follows: wanted tensors."""
    return [*ctx.wanted, *[False] * (len(arguments) - len(ctx.wanted))]


def _arguments(present: Sequence[bool], arguments: Tensors) -> tuple[Tensors, list[torch.Tensor | None]]:
    """The tensors of a step and the cotangents of its outputs, of all arguments of its derivative."""
    n = len(arguments) - sum(present)
    given = iter(arguments[n:])
    return arguments[:n], [next(given) if there else None for there in present]
