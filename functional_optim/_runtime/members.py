"""MembersStep: programs bound to the tensors of an ensemble, which `torch.vmap` has stacked.

Within `vmap` a tensor is a wrapper of one with a dimension more, that of the members. The tensors of one member are
views of such a stack, at constant distances in memory. So a step reads the data pointers of the stacks, adds constant
offsets to them, and runs the kernels of ordinary steps over the leaves of all members in one call.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import Any, NamedTuple

import torch

from .._compiler.call import LeafTable
from .._compiler.program import Level
from .backend import KERNEL_BACKENDS, choose_backend
from .cpu import CpuLaunchesOfParts
from .cuda.capture import is_capturing, refuse_binding, refuse_numbers
from .cuda.launch import DeviceMemory, TritonLaunch
from .groups import Columns, Group, Key, Leaf
from .internals import is_wrapper_of_a_transformation, members_unwrapper, outside_transformations, wrap_members
from .kernels import build_kernels
from .numbers import MemberNumbers, Numbers
from .offsets import OffsetPointers, Offsets, Origin, origin_of
from .packing import PackedColumn
from .pointers import Difference, PointerReader, Pointers
from .programs import REQUIRES_GRAD, NoKernels, Programs, Specs
from .spec import TensorSpec
from .stacks import Ensemble, Levels, Stack, Stacked
from .step import Pool


Scalars = Sequence[Sequence["float | Stack"]]  # the scalar table of each group, with stacks in the place of tensors


class _Result(NamedTuple):
    """The place of a leaf's results.

    Args:
      maker: the tensor that they are in, by position among those that are made.
      offset: the bytes in front of the first member's.
      distance: the bytes between two members.
    """

    maker: int
    offset: int
    distance: int


class MembersReading(NamedTuple):
    """The tensors of one step, found to have the specs that it is bound to.

    Args:
      tensors: the stacks.
      scalars: the scalar table of each group.
      workspace: memory with the data pointers of stacks, and the launches that read it.
    """

    tensors: Sequence[torch.Tensor]
    scalars: Scalars
    workspace: "MembersWorkspace"

    @property
    def requires_grad(self) -> bool:
        """Whether a tensor or a number requires a gradient, so that autograd has to record the step."""
        stacks = [x.tensor for table in self.scalars for x in table if isinstance(x, Stack)]
        return any(map(REQUIRES_GRAD, self.tensors)) or any(map(REQUIRES_GRAD, stacks))


class MembersWorkspace:
    """Memory for data pointers, and the launches of kernels on it. Threads that share a step have one each."""

    def __init__(self, step: "MembersStep", n_threads: int) -> None:
        n, n_origins, n_made = len(step.offsets), len(step.origins), len(step.makers)
        self.n_threads, self.pointers = n_threads, Pointers(n, len(step.made_offsets))
        self.gathered = OffsetPointers(step.offsets, n_origins, self.pointers.tensor[:n])
        self.made = OffsetPointers(step.made_offsets, n_made, self.pointers.new)
        self.cpu: CpuLaunchesOfParts | None = None
        if step.launch is None:
            self.cpu = CpuLaunchesOfParts(step.parts, step.places, self.pointers, n_threads, step.rows)
        self.device: dict[int, DeviceMemory] = {}  # of each stream, where kernels of Triton are launched


class MembersStep(Programs):
    """Programs bound to the tensors of an ensemble.

    Args:
      leaves: the leaves of one member that programs compute.
      specs: the specs of one member's tensors, by column.
      columns: the tensors, as they are within `vmap`.
      levels: the calls of `vmap` that are active.
      counters: columns of counters that all leaves share.
      extra: the extra arguments that are numbers.
      given: tensors in the place of those that hyper-parameters have, by identity.

    Raises:
      NoKernels: operations of torch are to compute the step.
    """

    def __init__(
        self,
        leaves: Sequence[Leaf],
        specs: Specs,
        columns: Columns,
        levels: Levels,
        counters: Set[Key],
        extra: Mapping[str, Any],
        given: Mapping[int, torch.Tensor],
    ) -> None:
        super().__init__(leaves, specs)
        self.contiguous = any(group.copied for group in self.groups)
        if self.contiguous:  # copies of stacks are walked side by side
            super().__init__(leaves, {key: list(map(_contiguous, column)) for key, column in specs.items()})
        self.sizes, self.counters = tuple(level.size for level in levels), counters
        if self.contiguous and any(isinstance(x, PackedColumn) for x in columns.values()):
            raise NoKernels
        self.device, self.backend = self._build_kernels(specs)
        self.origins = self._find_origins(columns)
        stacks = [self._stack(origin.of(columns), levels) for origin in self.origins]
        if not all(map(self._is_whole, stacks)):
            raise NoKernels
        with outside_transformations():
            tensors = [stack.tensor for stack in stacks]
            self.reader = PointerReader(tensors, list(map(TensorSpec.of, tensors)))
        self.stacked = [stack.stacked for stack in stacks]
        self.of_numbers = _levels_of(_scalars(self.numbers((), extra, given), levels), levels)
        used = map(any, zip(*self.stacked, self.of_numbers, strict=True))
        self.used = tuple(used)
        self.ensemble = Ensemble([size if used else 1 for size, used in zip(self.sizes, self.used, strict=True)])
        self.makers: list[Callable[[], torch.Tensor]] = []
        self.leaves_made: list[tuple[Key, int, int]] = []  # columns, positions in them, and which tensor is made for it
        self.columns_made: list[tuple[Key, Key, list[int]]] = []  # packed ones, those that they are like, and buffers
        self.parts: list[list[Group]] = []
        self.places: list[list[list[int]]] = []
        self.offsets, self.made_offsets = self._lay_out(columns, stacks, self._make_results(columns, specs))
        # for each group, the numbers of all parts, and those between two
        widths = [len(group.sources) * len(group.signature.program.scalars) for group in self.groups]
        n_rows = self.ensemble.n if any(self.of_numbers) else 1
        self.rows = [(width * n_rows, width if len(self.parts) > 1 and n_rows > 1 else 0) for width in widths]
        self.launch: TritonLaunch | None = None
        if self.backend == "triton":
            groups, places = [*itertools.chain(*self.parts)], [*itertools.chain(*self.places)]
            with outside_transformations():
                self.launch = TritonLaunch(groups, places, (), None, n_parts=len(self.parts))
        self.workspaces = Pool(MembersWorkspace)

    # -- binding ------------------------------------------------------------------------------------------------------

    def _build_kernels(self, specs: Specs) -> tuple[torch.device, str]:
        """Builds the kernels of all groups; returns their device and backend.

        Raises:
          NoKernels: operations of torch compute them.
        """
        found = {spec for column in specs.values() for spec in column if spec is not None}
        devices = {spec.device for spec in found}
        if not (self.groups and len(devices) == 1 and all(spec.plain for spec in found)):
            raise NoKernels
        (device,) = devices
        backend, _ = choose_backend(device)
        if backend not in KERNEL_BACKENDS:
            raise NoKernels
        refuse_binding(devices)
        if not build_kernels(backend, self.groups):
            raise NoKernels
        return device, backend

    def _origin(self, columns: Columns, key: Key, i: int) -> tuple[Origin, int]:
        """The origin of a tensor, and its offset there in elements. Leaves share a counter, which is read once."""
        return origin_of(columns, key, self.groups[0].leaves[0] if key in self.counters else i)

    def _find_origins(self, columns: Columns) -> list[Origin]:
        """The origins of all tensors that are read, and of updates, whose layout results have."""
        inputs = [group.gathers[k] for group in self.groups for k in (group.updates, *group.inputs)]
        return list(dict.fromkeys(self._origin(columns, *cell)[0] for gather in inputs for cell in gather.cells))

    def _stack(self, x: torch.Tensor, levels: Levels) -> Stack:
        """The tensor that stands behind one within `vmap`, in an order that kernels walk."""
        stack = Stack.of(x, levels)
        return stack._replace(tensor=stack.tensor.contiguous()) if self.contiguous else stack

    def _lay_out(
        self, columns: Columns, stacks: Sequence[Stack], results: Sequence[Sequence[Sequence["_Result"]]]
    ) -> tuple[Offsets, Offsets]:
        """Decides where the data pointers of all leaves of all members are.

        Each member is a part with launches of its own where something is reduced over the tree. Otherwise the leaves of
        all members are those of one.

        Args:
          columns: the tensors.
          stacks: the stacks of the origins.
          results: for each group and output, the results of its leaves.

        Returns:
          The pointers that are read, from those of the origins; and those of results, from the tensors that are made.
        """
        entries: list[tuple[int, int]] = []
        made: list[tuple[int, int]] = []
        n, index = self.ensemble.n, {origin: k for k, origin in enumerate(self.origins)}
        distances = [[k * x.tensor.element_size() for k in self.ensemble.offsets(x)] for x in stacks]
        of_inputs: list[list[list[tuple[int, int]]]] = []  # for each group, input and leaf: the origin, and bytes in it
        for group in self.groups:
            found = [[self._origin(columns, *cell) for cell in group.gathers[k].cells] for k in group.inputs]
            sizes = [dtype.itemsize for dtype in group.signature.inputs]
            of_inputs.append(
                [[(index[x], k * size) for x, k in leaves] for leaves, size in zip(found, sizes, strict=True)]
            )
        spans_tree = any(group.signature.program.spans_tree for group in self.groups)
        n_read = n * sum(len(leaves) for group in of_inputs for leaves in group)
        for members in [[m] for m in range(n)] if spans_tree else [list(range(n))]:
            self.parts.append([self._expanded(group, len(members)) for group in self.groups])
            self.places.append([])
            for inputs, outputs in zip(of_inputs, results, strict=True):
                places: list[int] = []
                for leaves in inputs:
                    places.append(len(entries))
                    entries += [(x, k + distances[x][m]) for m in members for x, k in leaves]
                for of_output in outputs:
                    places.append(n_read + 1 + len(made))  # behind the status of reading
                    made += [(x.maker, x.offset + m * x.distance) for m in members for x in of_output]
                self.places[-1].append(places)
        return Offsets(entries), Offsets(made)

    def _expanded(self, group: Group, n: int) -> Group:
        """A group with the leaves of several members, each with numbers of its own if any number is stacked."""
        n_rows = n if any(self.of_numbers) else 1
        width, table = len(group.sources), group.table
        rows = tuple(row + width * (m % n_rows) for m in range(n) for row in table.rows)
        return group._replace(
            leaves=group.leaves * n,
            table=LeafTable(table.sizes * n, table.wholes * n, rows),
            sources=group.sources * n_rows,
            owners=group.owners * n_rows,
        )

    def _is_whole(self, stack: Stack) -> bool:
        """Whether all members are there, which those of a tensor that has left its function need not be."""
        sizes = tuple(size for size, there in zip(self.sizes, stack.stacked, strict=True) if there)
        return not is_wrapper_of_a_transformation(stack.tensor) and stack.tensor.shape[: len(sizes)] == sizes

    def _make_results(self, columns: Columns, specs: Specs) -> list[list[list["_Result"]]]:
        """Adds functions that make the tensors of results: for each group and output, the results of its leaves.

        There is a stack for each buffer of a packed column that is computed as a whole, and for each leaf of others,
        whose members are laid out like updates.
        """
        kinds: dict[Key, list[tuple[int, torch.dtype]]] = {}
        for group in self.groups:
            for places, dtype in zip(group.targets, group.signature.outputs, strict=True):
                for key, i in places:
                    kinds.setdefault(key, []).append((i, dtype))
        buffers = {key: self._make_buffers(columns, key, leaves) for key, leaves in kinds.items()}
        results: list[list[list[_Result]]] = []
        for group in self.groups:
            results.append([])
            likes = [specs[key][i] for key, i in group.gathers[group.updates].cells]
            for places, output, dtype in zip(
                group.targets, group.signature.program.outputs, group.signature.outputs, strict=True
            ):
                found = []
                for (key, i), spec in zip(places, likes, strict=True):
                    known = buffers[key]
                    if known is not None:
                        found.append(known[i])
                        continue
                    spec = _contiguous(spec) if self.contiguous else spec
                    assert spec is not None
                    is_number = output.level is Level.LEAF
                    self.leaves_made.append((key, i, len(self.makers)))
                    found.append(self._result(() if is_number else spec.shape, () if is_number else spec.stride, dtype))
                results[-1].append(found)
        return results

    def _result(
        self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, fill: bool = False
    ) -> "_Result":
        """Adds a function that makes the stack of a result of some shape and strides, zeros if it is to be filled."""
        sizes = [size for size, used in zip(self.ensemble.sizes, self.used, strict=True) if used]
        numel = math.prod(shape)
        outer = [numel * math.prod(sizes[k + 1 :]) for k in range(len(sizes))]
        self.makers.append(
            partial(torch.zeros, (*sizes, *shape), dtype=dtype, device=self.device)
            if fill
            else partial(torch.empty_strided, (*sizes, *shape), (*outer, *strides), dtype=dtype, device=self.device)
        )
        return _Result(len(self.makers) - 1, 0, numel * dtype.itemsize)

    def _make_buffers(
        self, columns: Columns, key: Key, leaves: Sequence[tuple[int, torch.dtype]]
    ) -> dict[int, "_Result"] | None:
        """The results of a column by leaf, in new buffers; None if it is not packed, or not computed as a whole."""
        like = "params" if key == "updates" and "params" in columns else key
        column = columns[like]
        if not isinstance(column, PackedColumn):
            return None
        layout = column.packed.layout
        places = {i: place for i, _ in leaves if (place := column.place(i)) is not None}
        dtypes = {(places[i].buffer, dtype) for i, dtype in leaves if i in places}
        n_owners = sum(map(len, layout.owners))
        if len(set(places.values())) < n_owners or len(places) < len(leaves) or len(dtypes) > len(layout.owners):
            return None
        made = {
            b: self._result((layout.sizes[b],), (1,), dtype, fill=layout.gaps[b])
            for b, dtype in sorted(dtypes, key=lambda x: x[0])
        }
        self.columns_made.append((key, like, [made[b].maker for b in sorted(made)]))
        sizes = {b: dtype.itemsize for b, dtype in dtypes}
        return {i: made[p.buffer]._replace(offset=p.offset * sizes[p.buffer]) for i, p in places.items()}

    def name_of(self, position: int) -> tuple[str, int]:
        """The name of a tensor's column in messages, and the position of its leaf."""
        origin = self.origins[position]
        for group in self.groups:
            for k, gather in enumerate(group.gathers):
                for key, i in gather.cells:
                    if key == origin.key and (origin.packed or i == origin.position):
                        return group.name_of(k), i
        raise IndexError(position)

    # -- stepping -----------------------------------------------------------------------------------------------------

    def read(self, columns: Columns, numbers: Numbers, levels: Levels) -> MembersReading | Difference | None:
        """The tensors of this step, if they have the specs that it is bound to; else the first difference.

        Args:
          columns: the tensors, as they are within `vmap`.
          numbers: the scalar table of each group, likewise.
          levels: the calls of `vmap` that are active.

        Returns:
          The tensors; their first difference from the specs; or None if others are stacked.
        """
        scalars = _scalars(numbers, levels)
        if _levels_of(scalars, levels) != self.of_numbers:
            return None
        with outside_transformations():
            tensors = self._unwrap(columns, levels)
            if tensors is None:
                return None
            workspace = self.workspaces.take(self)
            found = self.reader.read(tensors, workspace.gathered.bases)
            if found is not None:
                self.workspaces.give_back(workspace)
                return found
            workspace.gathered.update()
        return MembersReading(tensors, scalars, workspace)

    def _unwrap(self, columns: Columns, levels: Levels) -> list[torch.Tensor] | None:
        """The tensors that stand behind those within `vmap`; None if others are stacked."""
        tensors = []
        if len(levels) == 1 and not self.contiguous:  # a call less for each
            unwrap, level = members_unwrapper(), levels[0].level
            for (key, position, packed), (stacked,) in zip(self.origins, self.stacked, strict=True):
                column: Any = columns[key]
                x = column.packed.buffers[position] if packed else column[position]
                if not isinstance(x, torch.Tensor):
                    return None
                x, dim = unwrap(x, level)
                if (dim is not None) is not stacked:
                    return None
                tensors.append(x.movedim(dim, 0) if dim else x)
            return tensors
        for origin, expected in zip(self.origins, self.stacked, strict=True):
            x = origin.of(columns)
            if not isinstance(x, torch.Tensor):
                return None
            stack = self._stack(x, levels)
            if stack.stacked != expected:
                return None
            tensors.append(stack.tensor)
        return tensors

    def release(self, reading: MembersReading) -> None:
        """Gives back the memory of a reading that is not run."""
        self.workspaces.give_back(reading.workspace)

    def run(self, reading: MembersReading, columns: Columns, levels: Levels) -> Columns:
        """Computes the step.

        Args:
          reading: its tensors and numbers.
          columns: the columns that they were gathered from.
          levels: the calls of `vmap` that are active.

        Returns:
          The columns that change, complete, with wrappers of all members' results.

        Raises:
          BuildError: kernels for the alignment of these tensors cannot be built.
        """
        workspace = reading.workspace
        with outside_transformations():
            made = [make() for make in self.makers]
            workspace.made.put(made)
            tables = self._tables(reading.scalars)
            if self.launch is not None:
                self.launch.launch(self.launch.prepare(workspace.pointers, tables, workspace.device))
            if workspace.cpu is not None:
                workspace.cpu(tables)
        self.workspaces.give_back(workspace)
        for level, used in zip(levels, self.used, strict=True):
            if used:
                made = wrap_members(made, level.level)
        results: dict[Key, Any] = {}
        for key, i, k in self.leaves_made:
            if key not in results:
                results[key] = list(columns[key])
            results[key][i] = made[k]
        for key, like, buffers in self.columns_made:
            column = columns[like]
            assert isinstance(column, PackedColumn)
            results[key] = column.result_in(columns[key]).with_buffers([made[k] for k in buffers])
        return results

    def _tables(self, scalars: Scalars) -> list[list[Any]]:
        """The scalar tables that launches take: for each group, with the numbers of all members, row after row.

        On a device each part has tables of its own, and numbers that are there stay there.

        Raises:
          CaptureError: a graph that is being captured would keep a number of the host.
        """
        apart = self.launch is not None and len(self.parts) > 1
        n_rows = self.ensemble.n if apart or any(self.of_numbers) else 1
        if self.launch is not None and is_capturing([self.device]):
            refuse_numbers([x.tensor for table in scalars for x in table if isinstance(x, Stack)], [self.device])
        distance = sum(max(len(table), 1) for table in scalars)
        rows = [self._rows(table, n_rows, distance if apart else len(table)) for table in scalars]
        if not apart:
            return rows
        return [
            of_group[k * len(table) : (k + 1) * len(table)]
            for k in range(len(self.parts))
            for table, of_group in zip(scalars, rows, strict=True)
        ]

    def _rows(self, table: Sequence[float | Stack], n_rows: int, distance: int) -> list[Any]:
        """A scalar table with the numbers of members, row after row.

        Args:
          table: the scalar table of a group.
          n_rows: the number of members that have numbers of their own.
          distance: how many numbers further that of the next member stands on a device; see `MemberNumbers`.
        """
        row: list[Any] = [0.0 if isinstance(x, Stack) else x for x in table]
        rows = row * n_rows
        for k, x in enumerate(table):
            if isinstance(x, Stack):
                numbers = self.ensemble.numbers(x) if n_rows > 1 else x.tensor.detach().reshape(1)
                if self.launch is not None and x.tensor.device == self.device:
                    rows[k] = MemberNumbers(numbers, distance)
                else:
                    rows[k :: len(row)] = numbers.tolist()
        return rows


def _scalars(numbers: Numbers, levels: Levels) -> Scalars:
    """The scalar table of each group, with stacks in the place of tensors."""
    return [[Stack.of(x, levels) if isinstance(x, torch.Tensor) else x for x in table] for table in numbers]


def _levels_of(scalars: Scalars, levels: Levels) -> Stacked:
    """The levels at which some number is stacked."""
    found = [x.stacked for table in scalars for x in table if isinstance(x, Stack)]
    return tuple(any(stacked[k] for stacked in found) for k in range(len(levels)))


def _contiguous(spec: TensorSpec | None) -> TensorSpec | None:
    """A spec with the strides of a contiguous tensor."""
    if spec is None:
        return None
    strides = tuple(itertools.accumulate(reversed(spec.shape[1:]), lambda a, b: a * max(b, 1), initial=1))[::-1]
    return spec._replace(stride=strides if spec.shape else ())
