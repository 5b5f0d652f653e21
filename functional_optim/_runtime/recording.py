"""A step with its numbers, and its derivative: outputs and cotangents by kernels, or by torch operations."""

from collections.abc import Sequence
from typing import Any

import torch

from .._compiler.differentiate import NoDerivative, cotangent, differentiate_all
from .._compiler.fuse import Recipe, ScalarSource
from .._compiler.program import Level, Program
from .backend import REQUESTED
from .binding import Binding
from .checks import at
from .evaluate import evaluate
from .groups import Columns, Group, Key, Leaf
from .internals import is_wrapper_of_a_transformation, outside_transformations
from .numbers import Number, Numbers
from .pointers import Difference
from .recent import in_front
from .spec import specs_of
from .step import BoundStep, Reading, flat


Tensors = Sequence[torch.Tensor]
KEEP = 8  # derivatives of a step, by the cotangents that are given and wanted; and steps that each is bound to


class Derivative:
    """The derivative of a step for some cotangents, and where all of its tensors come from and go to.

    Leaves without elements have no part in it: nothing follows from their elements.

    Args:
      bound: the step.
      programs: the derivative of the program of each group.
      given: for each group, the outputs whose cotangents are given.
      wanted: for each group, the inputs whose cotangents are wanted.
    """

    def __init__(
        self,
        bound: BoundStep,
        programs: Sequence[Program],
        given: Sequence[frozenset[str]],
        wanted: Sequence[frozenset[str]],
    ) -> None:
        self.step, self.bound = bound, list[BoundStep]()
        n = 1 + max(i for group in bound.groups for i in group.leaves)
        # positions among: the gathered tensors, the cotangents of outputs, a number, and None
        number = bound.n_gathered + bound.n_results
        self.none = number + 1
        self.places: dict[Key, list[int]] = {"updates": [self.none] * n}
        # of each gathered tensor, the columns and leaves whose cotangents it is the sum of
        self.parts: list[list[tuple[str, int]]] = [[] for _ in range(bound.n_gathered)]
        self.leaves: list[Leaf] = []
        self.rows: list[tuple[int, int]] = []  # the group and row that numbers of each row come from
        self.reads_cotangent: list[bool] = []  # of each output of the step
        result = bound.n_gathered
        for g, (group, bounds, program) in enumerate(zip(bound.groups, bound.bounds, programs, strict=True)):
            self._put("updates", group, range(*bounds[group.updates]))
            for name in wanted[g] & set(group.signature.program.scalars):
                # an output has the dtype of the tensor in its place
                self._put(cotangent(name), group, [number] * len(group.leaves))
            forward = group.signature.program
            for name, gather in zip((*forward.arrays, *forward.leaves), group.inputs, strict=True):
                found = list(range(*bounds[gather]))
                found *= len(group.leaves) // len(found)  # a number that leaves share
                self._put(name, group, found)
                self._put(cotangent(name), group, found)
                if name in wanted[g]:
                    for i, k, numel in zip(group.leaves, found, group.table.wholes, strict=True):
                        if numel:
                            self.parts[k].append((cotangent(name), i))
            for output in forward.outputs:
                self.reads_cotangent += [output.name in given[g]] * len(group.leaves)
                if output.name in given[g]:
                    self._put(cotangent(output.name), group, range(result, result + len(group.leaves)))
                result += len(group.leaves)
            recipe = Recipe(program, tuple(ScalarSource("value", -1, name) for name in program.scalars), {}, {})
            first = len(self.rows)
            self.rows += [(g, row) for row in range(len(group.sources))]
            for i, numel, row in zip(group.leaves, group.table.wholes, group.table.rows, strict=True):
                if numel:
                    self.leaves.append(Leaf(i, recipe, (g, first + row, False), numel, None))

    def _put(self, name: str, group: Group, positions: Sequence[int]) -> None:
        column = self.places.setdefault(name, [self.none] * len(self.places["updates"]))
        for i, k in zip(group.leaves, positions, strict=True):
            column[i] = k

    def bind(self, columns: Columns) -> tuple[BoundStep, Reading]:
        """The programs bound to such tensors, and these tensors read."""
        for bound in self.bound:
            reading = bound.read(columns)
            if not isinstance(reading, Difference):
                if bound is not self.bound[0]:
                    self.bound = in_front(bound, self.bound, KEEP)
                return bound, reading
        specs = {key: specs_of(column) for key, column in columns.items()}
        bound = BoundStep(Binding(self.leaves, specs, columns, self.step.paths, False))
        self.bound = in_front(bound, self.bound, KEEP)
        reading = bound.read(columns)
        assert not isinstance(reading, Difference), "a step is bound to the tensors that it was made for"
        return bound, reading

    def numbers(self, bound: BoundStep, tables: Numbers) -> list[list[Number]]:
        """The scalar table of each group of a bound derivative, from those of the step."""
        found = []
        for group in bound.groups:
            table: list[Number] = []
            for owner, _ in group.owners:
                g, row = self.rows[owner]
                names = self.step.groups[g].signature.program.scalars
                scalars = dict(zip(names, tables[g][row * len(names) : (row + 1) * len(names)], strict=True))
                table += [scalars[name] for name in group.signature.program.scalars]
            found.append(table)
        return found


class Recording:
    """A step with the numbers that it is taken with. Its tensors are those that it gathers, then those among numbers.

    Args:
      bound: the step.
      numbers: the scalar table of each group.

    Attributes:
      asked: the backend that is asked for, if any; derivatives may be computed outside of its block.
    """

    def __init__(self, bound: BoundStep, numbers: Numbers) -> None:
        self.bound, self.numbers, self.asked = bound, [list(table) for table in numbers], REQUESTED.get()
        found: dict[int, list[tuple[int, int]]] = {}  # by tensor: groups, and its positions in their tables
        self.tensors: list[torch.Tensor] = []
        for g, table in enumerate(numbers):
            for k, x in enumerate(table):
                if isinstance(x, torch.Tensor) and not (x.requires_grad or is_wrapper_of_a_transformation(x)):
                    # the caller may change it before the derivative is computed, outside of transformations of today
                    with outside_transformations():
                        self.numbers[g][k] = x.clone()
                elif isinstance(x, torch.Tensor):
                    if id(x) not in found:
                        self.tensors.append(x)
                    found.setdefault(id(x), []).append((g, k))
        self.positions = [found[id(x)] for x in self.tensors]

    def split(self, tensors: Tensors) -> tuple[list[torch.Tensor], list[list[Any]]]:
        """The gathered tensors, and the scalar tables with other tensors in the place of those that they had."""
        n = self.bound.n_gathered
        tables = [list(table) for table in self.numbers]
        for x, positions in zip(tensors[n:], self.positions, strict=True):
            for g, k in positions:
                tables[g][k] = x
        return list(tensors[:n]), tables

    def compute(self, tensors: Tensors) -> list[torch.Tensor]:
        """The outputs by kernels, one after another."""
        gathered, tables = self.split(tensors)
        reading = self.bound.read_tensors(gathered)
        assert not isinstance(reading, Difference), "the tensors of a step are those that it was bound to"
        return flat(self.bound.compute(reading, {}, tables))

    def evaluate_reference(self, tensors: Tensors) -> list[torch.Tensor]:
        """The outputs by torch operations."""
        gathered, tables = self.split(tensors)
        by_group = self.bound.split(gathered)
        return flat(evaluate("reference", self.bound.groups, by_group, tables, None))

    def names(self) -> list[tuple[int, str, int]]:
        """Of each output, one after another: its group, its name, and the position of its leaf in the group."""
        groups = enumerate(self.bound.groups)
        return [
            (g, output.name, k)
            for g, group in groups
            for output in group.signature.program.outputs
            for k in range(len(group.leaves))
        ]

    def tensor_names(self, form: tuple[str, tuple[int, ...]] | None) -> list[str]:
        """The names of tensors of a form, with the paths of their leaves, and of hyper-parameters of it.

        Args:
          form: the class that torch's messages have for a dtype, such as FloatTensor, and the shape; if it is not
            known, names are of whole columns.
        """
        found: dict[str, None] = {}

        def note(name: str, path: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
            if form is None:
                found[name] = None
            elif tuple(shape) == form[1] and torch.empty(0, dtype=dtype).type().endswith(f".{form[0]}"):
                found[f"{name}{path}"] = None

        for group, bounds in zip(self.bound.groups, self.bound.bounds, strict=True):
            program = group.signature.program
            named = [("updates", group.updates), *zip((*program.arrays, *program.leaves), group.inputs, strict=True)]
            for name, gather in named:
                for k, i in zip(range(*bounds[gather]), group.leaves, strict=False):
                    spec = self.bound.specs[k]
                    note(name, at(self.bound.paths[i]), spec.dtype, spec.shape)
        for x, positions in zip(self.tensors, self.positions, strict=True):
            for g, k in positions:
                scalars = self.bound.groups[g].signature.program.scalars
                note(scalars[k % len(scalars)], "", x.dtype, x.shape)
        return list(found)

    def derivative(self, given: Sequence[bool], wanted: Sequence[bool]) -> Derivative:
        """The derivative for the outputs whose cotangents are given, and the tensors whose cotangents are wanted.

        Raises:
          NoDerivative: an operation of the step has none.
        """
        known = self.bound.derivatives
        key = tuple(given), tuple(wanted), tuple(map(tuple, self.positions))
        found = known.get(key)
        if isinstance(found, Derivative):
            return found
        self._refuse_numbers_of_nothing(given)
        outputs, inputs = self._names_of(given, wanted)
        programs = tuple(group.signature.program for group in self.bound.groups)
        made = Derivative(self.bound, differentiate_all(programs, outputs, inputs), outputs, inputs)
        if len(known) >= KEEP:
            known.pop(next(iter(known)), None)
        known[key] = made
        return made

    def _refuse_numbers_of_nothing(self, given: Sequence[bool]) -> None:
        """Refuses the cotangent of a number of a leaf without elements: kernels add up over elements.

        Raises:
          NoDerivative: with the name of the number.
        """
        for (g, name, place), there in zip(self.names(), given, strict=True):
            group = self.bound.groups[g]
            if there and not group.table.wholes[place]:
                output = next(x for x in group.signature.program.outputs if x.name == name)
                if output.level is not Level.ELEMENT:
                    raise NoDerivative(name)

    def _names_of(
        self, given: Sequence[bool], wanted: Sequence[bool]
    ) -> tuple[tuple[frozenset[str], ...], tuple[frozenset[str], ...]]:
        """The outputs of each group whose cotangents are given, and its inputs whose cotangents are wanted."""
        groups = self.bound.groups
        outputs: list[set[str]] = [set() for _ in groups]
        inputs: list[set[str]] = [set() for _ in groups]
        for (g, name, _), there in zip(self.names(), given, strict=True):
            if there:
                outputs[g].add(name)
        for g, (group, bounds) in enumerate(zip(groups, self.bound.bounds, strict=True)):
            program = group.signature.program
            for name, gather in zip((*program.arrays, *program.leaves), group.inputs, strict=True):
                if any(wanted[slice(*bounds[gather])]):
                    inputs[g].add(name)
        for positions, there in zip(self.positions, wanted[self.bound.n_gathered :], strict=True):
            for g, k in positions if there else ():
                scalars = groups[g].signature.program.scalars
                inputs[g].add(scalars[k % len(scalars)])
        return tuple(map(frozenset, outputs)), tuple(map(frozenset, inputs))

    def pull_back(
        self, tensors: Tensors, cotangents: Sequence[torch.Tensor | None], wanted: Sequence[bool]
    ) -> list[torch.Tensor]:
        """The cotangents of wanted tensors by kernels, from those of outputs.

        Raises:
          NoDerivative: an operation of the step has none.
        """
        derivative = self.derivative([x is not None for x in cotangents], wanted)
        if not derivative.leaves:
            return [torch.zeros_like(x) for x, there in zip(tensors, wanted, strict=True) if there]
        gathered, tables = self.split(tensors)
        number = torch.zeros((), dtype=torch.float64, device=gathered[0].device)
        present = [
            self._zeros(k, gathered) if read and d is None else d
            for k, (d, read) in enumerate(zip(cotangents, derivative.reads_cotangent, strict=True))
        ]
        tensors_of = [*gathered, *present, number, None].__getitem__
        columns: Columns = {key: list(map(tensors_of, column)) for key, column in derivative.places.items()}
        bound, reading = derivative.bind(columns)
        results = bound.run(reading, columns, derivative.numbers(bound, tables))
        found: list[torch.Tensor] = []
        for parts, x, there in zip(derivative.parts, gathered, wanted, strict=False):
            if there and len(parts) == 1:  # as nearly all, without a call
                (name, i) = parts[0]
                total = results[name][i]
                found.append(total if total.dtype is x.dtype else total.to(x.dtype))
            elif there:
                found.append(_sum([results[name][i] for name, i in parts], x))
        n = len(gathered)
        for positions, x, there in zip(self.positions, tensors[n:], wanted[n:], strict=True):
            if there:
                total = _sum(self._parts_of_number(positions, results), x)
                if total.device != x.device or total.shape != x.shape:
                    total = total.to(x.device).reshape(x.shape)
                found.append(total)
        return found

    def _zeros(self, k: int, gathered: Tensors) -> torch.Tensor:
        """The cotangent of an output that has none, where others of its name have one."""
        g, name, position = self.names()[k]
        group = self.bound.groups[g]
        like = gathered[self.bound.bounds[g][group.updates][0] + position]
        outputs = zip(group.signature.program.outputs, group.signature.outputs, strict=True)
        output, dtype = next((output, dtype) for output, dtype in outputs if output.name == name)
        return like.new_zeros(like.shape if output.level is Level.ELEMENT else (), dtype=dtype)

    def _parts_of_number(self, positions: Sequence[tuple[int, int]], results: Columns) -> list[torch.Tensor]:
        """The cotangents of leaves whose sum is that of a tensor among numbers."""
        found = []
        for g, position in positions:
            group = self.bound.groups[g]
            scalars = group.signature.program.scalars
            row, k = divmod(position, len(scalars))
            column = results.get(cotangent(scalars[k]))
            if column is not None:
                owners = zip(group.leaves, group.table.rows, group.table.wholes, strict=True)
                found += [column[i] for i, owner, numel in owners if owner == row and numel]
        return found


def _sum(parts: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The sum of cotangents, in the dtype of the tensor that they are of."""
    if not parts:
        return torch.zeros_like(like)
    total = parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum(0)
    return total if total.dtype is like.dtype else total.to(like.dtype)
