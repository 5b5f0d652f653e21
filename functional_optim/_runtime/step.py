"""BoundStep: steps over tensors of the specs that programs are bound to. Bind once, step many.

A step gathers its tensors, has them compared and their data pointers read in one operation, fills in numbers, and
launches. All that specs decide has been decided in `binding`.
"""

import ctypes
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch

from .._compiler.c.threads import parallel_address
from .._compiler.cache import BuildError
from .._compiler.call import Column
from .._compiler.program import Level
from .backend import KERNEL_BACKENDS, disable_backend
from .binding import Binding, BoundPrograms
from .cpu import CpuLaunches
from .cuda.launch import DeviceMemory
from .evaluate import evaluate
from .groups import Columns
from .internals import has_members
from .numbers import Numbers
from .overlap import SharedMemoryError
from .pointers import Difference, Pointers
from .programs import REQUIRES_GRAD
from .spec import TensorSpec, lies_outside


class _ForThreads(Protocol):
    n_threads: int


StepT = TypeVar("StepT")
WorkspaceT = TypeVar("WorkspaceT", bound=_ForThreads)


class Pool(list[WorkspaceT], Generic[StepT, WorkspaceT]):
    """The workspaces of a step that no thread uses at the moment.

    Args:
      make: makes a workspace of the step for a number of threads.
    """

    def __init__(self, make: Callable[[StepT, int], WorkspaceT]) -> None:
        super().__init__()
        self.make = make

    def take(self, step: StepT) -> WorkspaceT:
        """A workspace that no other thread uses."""
        n_threads = usable_threads()
        try:
            workspace = self.pop()
        except IndexError:  # the first step, or other threads have them
            return self.make(step, n_threads)
        return workspace if workspace.n_threads == n_threads else self.make(step, n_threads)

    give_back = list[WorkspaceT].append  # of one that has been used


def usable_threads() -> int:
    """Number of threads that a launch may use: torch's, and one in a forked child, which has none to wake."""
    return 1 if parallel_address() is None else torch.get_num_threads()


# the new tensors of a step: for each group and output those of its leaves; of a `PackedStep` one column, of buffers
Outputs = list[list[Column]]


class Reading(NamedTuple):
    """The tensors of one step, found to have the specs that it is bound to.

    Args:
      tensors: the gathered tensors, contiguous copies in place of tensors that a kernel cannot walk.
      originals: the tensors that were copied, by position.
      workspace: memory with the data pointers, and the launches that read it.
    """

    tensors: list[torch.Tensor]
    originals: dict[int, torch.Tensor]
    workspace: "Workspace"


class Workspace:
    """Memory for data pointers, and the launches of C kernels on it. Threads that share a step have one each.

    Args:
      step: the step.
      n_threads: the number of threads of launches.

    Attributes:
      pointers: the memory for data pointers.
      sources: the part of it that is read from tensors; of a `PackedStep` other memory, which they are offsets from.
      disjoint: the content of `sources` that was last found to share no memory.
      written: 0 until everything has been written.
      cpu: the launches of each part of the step that kernels of C compute.
      device: for each part that kernels of Triton compute, the memory of each stream.
    """

    def __init__(self, step: "BoundStep", n_threads: int) -> None:
        self.n_threads, self.pointers = n_threads, Pointers(step.n_gathered, step.n_outputs, step.n_shared)
        self.sources, self.disjoint = self.pointers, b""
        self.written = ctypes.c_int64()
        self.cpu = {
            k: CpuLaunches(
                [step.groups[g] for g in part], [step.places[g] for g in part], self.pointers, n_threads, step.joins
            )
            for k, (backend, part) in enumerate(step.parts)
            if backend == "c"
        }
        self.device: dict[int, dict[int, DeviceMemory]] = {k: {} for k in step.triton}

    @property
    def completed(self) -> bool:
        """Whether everything has been written, which C notes in the call that writes."""
        return self.written.value != 0


class BoundStep(BoundPrograms):
    """Programs bound to tensors of certain specs, and steps over such tensors."""

    workspace_type: "type[Workspace]" = Workspace

    def __init__(self, binding: Binding) -> None:
        super().__init__(binding)
        self.derivatives: dict[Hashable, object] = {}  # of `recording`, by the cotangents given and wanted
        self.workspaces: Pool[BoundStep, Workspace] = Pool(self.workspace_type)

    def read(self, columns: Columns) -> Reading | Difference:
        """The tensors of this step, if they have the specs that it is bound to; else the first difference.

        Args:
          columns: the tensors by column.
        """
        return self.read_tensors(self.gather(columns))

    def read_tensors(self, tensors: list[Any]) -> Reading | Difference:
        """The same for tensors that have been gathered; copies take the place of some of them."""
        originals: dict[int, torch.Tensor] = {}
        for i in self.copied:
            x = originals[i] = tensors[i]
            if not isinstance(x, torch.Tensor) or x.layout is not torch.strided or TensorSpec.of(x) != self.specs[i]:
                return Difference(i, outside=False)
            if lies_outside(x, self.specs[i]):
                return Difference(i, outside=True)
            tensors[i] = x.contiguous()
        workspace = self.workspaces.take(self)
        workspace.written.value = 0
        try:
            found = self.reader.read(tensors, workspace.pointers)
        except RuntimeError:
            self._refuse_escaped(tensors)
            raise
        if found is not None:
            self.workspaces.give_back(workspace)
            return found
        if self.shared_pointers:
            self._copy_shared_pointers(workspace)
        return Reading(tensors, originals, workspace)

    def _refuse_escaped(self, tensors: Sequence[Any]) -> None:
        """Refuses a tensor of a function that `torch.vmap` has mapped and that has returned.

        Raises:
          ValueError: with the path of the leaf.
        """
        escaped = next((k for k, x in enumerate(tensors) if has_members(x)), None)
        if escaped is not None:
            raise ValueError(
                f"{self.label(escaped)} has escaped from a function that `torch.vmap` maps: it stands for one member, "
                f"and only within that function; return it from there, or step there."
            )

    def _copy_shared_pointers(self, workspace: Workspace) -> None:
        """Repeats the pointers to tensors that leaves share, for kernels read one per leaf."""
        memory = workspace.pointers.memory
        for start, first, n in self.shared_pointers:
            if memory[first] != memory[start]:
                memory[first : first + n] = [memory[start]] * n

    def release(self, reading: Reading) -> None:
        """Gives back the memory of a reading that is not run.

        That of one which an error has stopped is freed with it, and not used again: launches may be in progress.
        """
        self.workspaces.give_back(reading.workspace)

    def tensor_at(self, reading: Reading, position: int) -> torch.Tensor:
        """The gathered tensor at a position."""
        return reading.tensors[position]

    def requires_grad(self, reading: Reading, numbers: Numbers) -> bool:
        """Whether a tensor or a number requires a gradient, so that autograd has to record the step."""
        for x in itertools.chain.from_iterable(numbers):
            if type(x) is not float and isinstance(x, torch.Tensor) and x.requires_grad:  # most are floats
                return True
        return any(map(REQUIRES_GRAD, reading.tensors))

    def run(self, reading: Reading, columns: Columns, numbers: Numbers) -> Columns:
        """Computes the step. `reading.workspace.completed` tells from then on whether everything has been written.

        Args:
          reading: its tensors.
          columns: the columns that they were gathered from.
          numbers: the scalar table of each group.

        Returns:
          The columns that change, complete; none if the step is in place.

        Raises:
          SharedMemoryError: tensors that are written share memory. Nothing has been written.
        """
        outputs = self.compute(reading, columns, numbers)
        return {} if self.in_place else self._results(columns, outputs)

    def compute(self, reading: Reading, columns: Columns, numbers: Numbers) -> Outputs:
        """Computes the outputs of all groups; see `run`. They are empty if the step is in place."""
        workspace = reading.workspace
        outputs: Outputs = self._allocate(reading, columns) if self.allocates else [[]] * len(self.groups)
        increments: list[int] = []  # addresses of integers that the call in C moves on by one
        if self.in_place:
            self._refuse_overlap(reading)
        ready = self._prepare(workspace, numbers) if self.prepares else {}
        if self.in_place:
            written = self._written_tensors(reading)
            for i in self.counters.values():
                written.append(self.tensor_at(reading, i))
                increments.append(workspace.pointers.memory[i])
            # before anything is written, so that no interrupt comes between a write and its version
            torch.autograd.graph.increment_version(written)
        if len(workspace.cpu) == len(self.parts) == 1:
            if not reading.originals:  # originals are written behind the call
                increments.append(ctypes.addressof(workspace.written))  # from 0 to 1, as C moves a counter on
            workspace.cpu[0](numbers, increments)
        else:
            parts = self.parts  # those of this step: another thread may give a backend up meanwhile
            computed = self._run_parts(parts, reading, numbers, outputs, ready)
            outputs = [computed.get(g, allocated) for g, allocated in enumerate(outputs)]
            for i in self._unmoved(parts):
                self.tensor_at(reading, i).add_(1)
        if reading.originals:
            if self.in_place:
                self._copy_back(reading)
            else:
                outputs = self._in_layouts(reading, outputs)
        workspace.written.value = 1
        self.workspaces.give_back(workspace)
        return outputs

    def _allocate(self, reading: Reading, columns: Columns) -> Outputs:
        """New tensors for the outputs of kernels, with their pointers among those of the step."""
        assert self.allocator is not None
        likes = [
            reading.tensors[slice(*bounds[group.updates])]
            for group, bounds in zip(self.groups, self.bounds, strict=True)
            for _ in group.outputs
        ]
        made = iter(self.allocator(likes, reading.workspace.pointers))
        return [list(itertools.islice(made, len(group.outputs))) for group in self.groups]

    def _refuse_overlap(self, reading: Reading) -> None:
        """Refuses to write to memory that two tensors share, if pointers are not those of the last time.

        Raises:
          SharedMemoryError: with the paths of both.
        """
        pointers = reading.workspace.pointers
        if self.repeated is not None:
            label = self.label(self.repeated)
            raise SharedMemoryError(label, label)
        content = reading.workspace.sources.content()
        if content == reading.workspace.disjoint and not reading.originals:
            return
        addresses = pointers.tensor[: self.n_gathered]
        if reading.originals:
            addresses = addresses.clone()
            for i, x in reading.originals.items():
                addresses[i] = x.data_ptr()
        clash = self.overlap.find(addresses)
        if clash is not None:
            raise SharedMemoryError(self.label(clash.first), self.label(clash.second))
        reading.workspace.disjoint = content

    def _prepare(self, workspace: Workspace, numbers: Numbers) -> dict[int, DeviceMemory]:
        """Brings the tables of launches on devices up to date; for each part with launches, memory that is ready.

        Addresses of another alignment have another variant of kernels, which may fail to build: nothing has been
        written then, and all devices have operations of torch from there on.
        """
        ready: dict[int, DeviceMemory] = {}
        try:
            for k, (backend, part) in enumerate(self.parts):
                tables = [numbers[g] for g in part]
                if backend not in KERNEL_BACKENDS:
                    self.watches[k].check([*itertools.chain(*tables)], {self.groups[g].device for g in part})
                elif backend == "triton":
                    ready[k] = self.triton[k].prepare(workspace.pointers, tables, workspace.device[k])
        except BuildError as error:
            disable_backend("triton", str(error))
            self.parts = [("foreach" if backend == "triton" else backend, part) for backend, part in self.parts]
        return ready

    def _written_tensors(self, reading: Reading) -> list[torch.Tensor]:
        """The tensors that are written in place."""
        written = []
        for start, stop in self.written:
            written += reading.tensors[start:stop]
        return written

    def _run_parts(
        self,
        parts: Sequence[tuple[str, list[int]]],
        reading: Reading,
        numbers: Numbers,
        outputs: Outputs,
        ready: Mapping[int, DeviceMemory],
    ) -> dict[int, list[Column]]:
        """Runs the groups of several devices, or of a backend that is not one call.

        Returns:
          By group, the new tensors of those that operations of torch compute.
        """
        computed: dict[int, list[Column]] = {}
        for k, (backend, part) in enumerate(parts):
            tables = [numbers[g] for g in part]
            if backend == "c":
                reading.workspace.cpu[k](tables, [])
            elif backend == "triton":
                self.triton[k].launch(ready[k])
            else:
                computed |= self._evaluate(backend, part, reading.tensors, tables, outputs)
        return computed

    def _evaluate(
        self,
        backend: str,
        part: Sequence[int],
        tensors: list[torch.Tensor],
        numbers: Numbers,
        outputs: Outputs,
    ) -> dict[int, list[Column]]:
        """Computes groups with torch operations.

        Returns:
          By group, its new tensors; nothing if they are in place, or in memory that `outputs` have already.
        """
        gathered = self.split(tensors)
        groups = [self.groups[g] for g in part]
        results = evaluate(backend, groups, [gathered[g] for g in part], numbers, self.joins, self.in_place)
        return {} if self.in_place else dict(zip(part, results, strict=True))

    def _unmoved(self, parts: Sequence[tuple[str, list[int]]]) -> list[int]:
        """The positions of shared counters that no kernel of several parts moves on."""
        launched = [self.triton[k].moved for k, (backend, _) in enumerate(parts) if backend == "triton"]
        return [i for i in self.counters.values() if not any(i in moved for moved in launched)]

    def _copy_back(self, reading: Reading) -> None:
        """Writes the copies that kernels have changed to their originals."""
        for i, x in reading.originals.items():
            if x is not reading.tensors[i] and any(start <= i < stop for start, stop in self.written):
                x.copy_(reading.tensors[i])

    def _in_layouts(self, reading: Reading, outputs: Outputs) -> Outputs:
        """New tensors, those of leaves that were copied in the layout of the tensors that they follow."""
        found: Outputs = []
        for group, bounds, computed in zip(self.groups, self.bounds, outputs, strict=True):
            laid_out: list[Column] = []
            for k, output, column in zip(group.outputs, group.signature.program.outputs, computed, strict=True):
                first = bounds[group.updates if k is None else k][0]
                copied = group.copied if output.level is Level.ELEMENT else ()
                likes = {i: reading.originals[first + i] for i in copied if first + i in reading.originals}
                laid_out.append([_in_layout_of(likes[i], x) if i in likes else x for i, x in enumerate(column)])
            found.append(laid_out)
        return found

    def _results(self, columns: Columns, outputs: Outputs) -> Columns:
        """The columns that change, with the outputs in them."""
        return self.scatter(columns, outputs)


def _in_layout_of(like: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor in the layout of another one."""
    return torch.empty_like(like, dtype=x.dtype, requires_grad=False).copy_(x)


def flat(outputs: Outputs) -> list[torch.Tensor]:
    """The tensors of all columns."""
    return [x for columns in outputs for column in columns for x in column]
