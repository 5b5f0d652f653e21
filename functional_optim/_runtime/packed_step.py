"""PackedStep: a step whose tensors are views of few buffers, which are all that it reads from Python.

Groups, kernels, launch structures and errors are those of any step: leaves are bound as views. What is left for every
step is to compare the buffers, and to add constant offsets to their data pointers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .._compiler.call import Column
from .._compiler.program import Level
from .backend import KERNEL_BACKENDS
from .binding import Binding
from .groups import Columns, Key
from .numbers import Numbers
from .offsets import OffsetPointers, Offsets, Origin, origin_of
from .packing import PackedColumn, Place
from .pointers import Difference, PointerReader
from .programs import NoKernels
from .spec import TensorSpec
from .step import BoundStep, Outputs, Reading, Workspace


class Made(NamedTuple):
    """A buffer of results.

    Args:
      key: the column of which it will be a buffer.
      position: its position there.
      like: the column whose layout and device it has.
      dtype: its dtype.
      kept: whether some of its leaves are not computed but stay as they are in the column, or lie apart.
    """

    key: Key
    position: int
    like: Key
    dtype: torch.dtype
    kept: bool

    def make(self, columns: Columns) -> torch.Tensor:
        """The buffer, with everything in it that kernels do not write."""
        like = columns[self.like]
        assert isinstance(like, PackedColumn)
        x: torch.Tensor = like.packed.buffers[self.position].detach()
        if self.kept:
            column = columns[self.key]
            assert isinstance(column, PackedColumn)
            kept: torch.Tensor = column.packed.buffers[self.position].detach().clone()
            return kept
        if like.packed.layout.gaps[self.position]:
            return torch.zeros_like(x, dtype=self.dtype)
        return torch.empty_like(x, dtype=self.dtype)


class PackedWorkspace(Workspace):
    """A workspace with memory for the data pointers of buffers, and pointers that are offsets from them."""

    def __init__(self, step: "PackedStep", n_threads: int) -> None:
        super().__init__(step, n_threads)
        n, pointers = step.n_gathered, self.pointers.tensor
        self.gathered = OffsetPointers(step.offsets, len(step.origins), pointers[:n])
        self.sources = self.gathered.bases
        self.made = OffsetPointers(step.made_offsets, len(step.made), pointers[n + 1 :][: step.n_outputs])


class PackedStep(BoundStep):
    """Programs bound to tensors some of which are views of buffers; see `BoundStep`.

    Raises:
      NoKernels: kernels do not compute the whole step on buffers; a `BoundStep` is to compute it on the views.
    """

    workspace_type: type[Workspace] = PackedWorkspace

    def __init__(self, binding: Binding) -> None:
        super().__init__(binding)
        columns = binding.columns
        if not self._runs_kernels():
            raise NoKernels
        gathers = [gather for group in self.groups for gather in group.gathers]
        cells = [cell for gather in gathers for cell in gather.cells[: gather.width]]
        found: dict[Origin, int] = {}
        entries = []
        for (key, i), spec in zip(cells, self.specs, strict=True):
            origin, offset = origin_of(columns, key, i)
            entries.append((found.setdefault(origin, len(found)), offset * spec.dtype.itemsize))
        self.origins: list[Origin] = list(found)
        self.offsets = Offsets(entries)
        self.owner = [k for k, _ in entries]  # the origin of each gathered tensor
        self.first = {k: position for position, k in reversed(list(enumerate(self.owner)))}
        written = dict.fromkeys(self.owner[i] for start, stop in self.written for i in range(start, stop))
        self.written_origins = list(written)
        tensors = [origin.of(columns) for origin in self.origins]
        self.buffer_reader = PointerReader(tensors, list(map(TensorSpec.of, tensors)))
        self.made: list[Made] = []
        self.made_offsets = Offsets(self._lay_out_results(columns) if self.allocates else ())

    def _runs_kernels(self) -> bool:
        """Whether kernels compute all groups, and need no tensors for it but pointers."""
        kernels = all(backend in KERNEL_BACKENDS for backend, _ in self.parts)
        return bool(self.groups) and self.plain and not self.copied and kernels

    def _lay_out_results(self, columns: Columns) -> list[tuple[int, int]]:
        """Decides which buffers the results have.

        Returns:
          For each result, the position of its buffer among those that are made, and the number of bytes behind it.

        Raises:
          NoKernels: they cannot have any.
        """
        found: dict[tuple[Key, int], list[tuple[Place, torch.dtype]]] = {}
        entries: list[tuple[tuple[Key, int], Place, torch.dtype]] = []
        likes: dict[Key, Key] = {}
        for group in self.groups:
            for cells, dtype in zip(group.targets, group.signature.outputs, strict=True):
                for key, i in cells:
                    likes[key] = "params" if key == "updates" and "params" in columns else key
                    column = columns[likes[key]]
                    place = column.place(i) if isinstance(column, PackedColumn) else None
                    if place is None:
                        raise NoKernels
                    found.setdefault((key, place.buffer), []).append((place, dtype))
                    entries.append(((key, place.buffer), place, dtype))
        for (key, b), placed in found.items():
            like = columns[likes[key]]
            assert isinstance(like, PackedColumn)
            dtype, is_one = placed[0][1], len({dtype for _, dtype in placed}) == 1
            kept = len({place for place, _ in placed}) < len(like.packed.layout.owners[b])
            if not is_one or (kept and not self._may_keep(columns, key, likes[key], b, dtype)):
                raise NoKernels
            self.made.append(Made(key, b, likes[key], dtype, kept))
        positions = {(made.key, made.position): k for k, made in enumerate(self.made)}
        for key in {made.key for made in self.made}:
            like = columns[likes[key]]
            assert isinstance(like, PackedColumn)
            for b, x in enumerate(like.packed.buffers):
                if (key, b) not in positions and not self._may_keep(columns, key, likes[key], b, x.dtype):
                    raise NoKernels
        return [(positions[k], place.offset * dtype.itemsize) for k, place, dtype in entries]

    @staticmethod
    def _may_keep(columns: Columns, key: Key, like: Key, b: int, dtype: torch.dtype) -> bool:
        """Whether leaves of a buffer that are not computed are in the column as they would be in the result."""
        column, other = columns[key], columns[like]
        return (
            isinstance(column, PackedColumn)
            and isinstance(other, PackedColumn)
            and column.packed.layout is other.packed.layout
            and column.packed.buffers[b].dtype == dtype
        )

    def read(self, columns: Columns) -> Reading | Difference:
        """The buffers and other tensors of this step, if they have the specs that it is bound to."""
        tensors = [origin.of(columns) for origin in self.origins]
        workspace = self.workspaces.take(self)
        workspace.written.value = 0
        assert isinstance(workspace, PackedWorkspace)
        found = self.buffer_reader.read(tensors, workspace.sources)
        if found is not None:
            self.workspaces.give_back(workspace)
            return Difference(self.first[found.position], found.outside)
        if workspace.gathered.update():  # a step in place finds the buffers of the last one
            self._copy_shared_pointers(workspace)
        return Reading(tensors, {}, workspace)

    def tensor_at(self, reading: Reading, position: int) -> torch.Tensor:
        """The tensor or buffer that a gathered tensor is, or is a view of."""
        return reading.tensors[self.owner[position]]

    def _written_tensors(self, reading: Reading) -> list[torch.Tensor]:
        return [reading.tensors[k] for k in self.written_origins]

    def _allocate(self, reading: Reading, columns: Columns) -> Outputs:
        """New buffers as one column, with the pointers of results among those of the step."""
        workspace = reading.workspace
        assert isinstance(workspace, PackedWorkspace)
        buffers = [made.make(columns) for made in self.made]
        workspace.made.put(buffers)
        return [[buffers]]

    def _evaluate(
        self,
        backend: str,
        part: Sequence[int],
        tensors: list[torch.Tensor],
        numbers: Numbers,
        outputs: Outputs,
    ) -> dict[int, list[Column]]:
        """Computes groups with torch operations on views, for a kernel that was to be launched is not there.

        New tensors are views of buffers that have been allocated, `outputs`.
        """
        views = [
            x if not origin.packed else _view(x, spec, n)
            for x, origin, spec, n in zip(
                [tensors[k] for k in self.owner],
                [self.origins[k] for k in self.owner],
                self.specs,
                self.offsets.bytes.tolist(),
                strict=True,
            )
        ]
        results = super()._evaluate(backend, part, views, numbers, outputs)
        if self.in_place:
            return {}
        entries = iter(zip(self.made_offsets.index.tolist(), self.made_offsets.bytes.tolist(), strict=True))
        for g, (group, bounds) in enumerate(zip(self.groups, self.bounds, strict=True)):
            first, computed = bounds[group.updates][0], iter(results.get(g, ()))
            for output in group.signature.program.outputs:
                values = next(computed, [None] * len(group.leaves))  # of another part
                for i, x in enumerate(values):
                    k, n = next(entries)
                    if x is not None:
                        spec = self.specs[first + i] if output.level is Level.ELEMENT else TensorSpec.of(x)
                        _view(outputs[0][0][k], spec, n).copy_(x)
        return {}

    def _results(self, columns: Columns, outputs: Outputs) -> Columns:
        """The columns that change, with new buffers."""
        results: dict[Key, PackedColumn] = {}
        for made, x in zip(self.made, outputs[0][0], strict=True):
            if made.key not in results:
                like = columns[made.like]
                assert isinstance(like, PackedColumn)
                # all buffers are made, or the column's own stand in the other places
                results[made.key] = like.result_in(columns[made.key])
            buffers = list(results[made.key].packed.buffers)
            buffers[made.position] = x
            results[made.key] = results[made.key].with_buffers(buffers)
        return dict(results)


def _view(buffer: torch.Tensor, spec: TensorSpec, n: int) -> torch.Tensor:
    """The view of a buffer that begins `n` bytes behind its first element and has the sizes and strides of a spec."""
    offset = buffer.storage_offset() + n // buffer.element_size()
    return buffer.detach().as_strided(spec.shape, spec.stride, offset)
