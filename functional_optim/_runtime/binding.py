"""BoundPrograms: programs bound to tensors of certain specs.

Everything that specs decide is decided here, once: groups, backends, kernels, launch structures, and the places of
pointers.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .._compiler.program import Level
from .allocate import Allocator, Make
from .backend import KERNEL_BACKENDS, choose_backend
from .checks import at
from .cuda.capture import NumberWatch, refuse_binding
from .cuda.launch import TritonLaunch
from .groups import Columns, Key, Leaf
from .join import Joins
from .kernels import build_kernels
from .overlap import OverlapCheck
from .pointers import PointerReader
from .programs import Programs, Specs
from .spec import TensorSpec


class Binding(NamedTuple):
    """The leaves and tensors that a step is bound to, and the ways of its results.

    Args:
      leaves: the leaves that programs compute.
      specs: the specs of their tensors, by column.
      columns: tensors of these specs.
      paths: the path of each leaf of the tree.
      in_place: whether results are written to the tensors that are there; otherwise they are new tensors.
      counters: columns of counters that all leaves on a device share, which a step in place moves on by one.
      joins: the reductions over processes, if there are any.
    """

    leaves: Sequence[Leaf]
    specs: Specs
    columns: Columns
    paths: Sequence[str]
    in_place: bool
    counters: Sequence[Key] = ()
    joins: Joins | None = None


class BoundPrograms(Programs):
    """Programs bound to tensors of certain specs.

    Attributes:
      specs: the spec of each gathered tensor.
      parts: the backend of each part of the groups, and which these are.
      n_gathered, n_outputs, n_shared: how many pointers there are of gathered tensors, new ones, and repeated.
      places: for each group, where the pointers of its inputs and outputs begin.
      shared_pointers: of pointers to tensors that leaves share: which one, where it is repeated, and how often.
      counters: the positions of shared counters that a step in place moves on.
      triton: the launches of parts that kernels of Triton compute.
      watches: of each part, the numbers that a captured step of torch operations has been taken with.
      prepares: whether some part has something to do before anything is written.
      copied: positions of the tensors that kernels are handed copies of.
      written: bounds of the runs of gathered tensors that are written in place.
      repeated: the position of a tensor that is written and several of whose elements share memory.
      overlap: the search for tensors that share memory with one that is written.
      reader: the check of gathered tensors.
      allocator: the maker of new tensors, if kernels make some.
      n_results: the number of outputs of all leaves.
    """

    def __init__(self, binding: Binding) -> None:
        leaves, specs, columns, paths, in_place, counters, joins = binding
        super().__init__(leaves, specs, joins, counters)
        self.paths, self.in_place = paths, in_place
        self.specs: list[TensorSpec] = self.gather(dict(specs))
        self.plain = all(spec.plain for spec in set(self.specs))
        self.devices = {group.device for group in self.groups}
        refuse_binding(self.devices)
        self.spans_devices = len(self.devices) > 1 and any(g.signature.program.spans_tree for g in self.groups)
        self.parts = self._build_backends()
        self.n_gathered = len(self.specs)
        launched = [g for backend, part in self.parts for g in part if backend in KERNEL_BACKENDS]
        self.allocates = bool(launched) and not in_place
        self.n_outputs = sum(len(g.leaves) * len(g.outputs) for g in self.groups) if self.allocates else 0
        self.places, self.shared_pointers = self._kernel_places()
        self.n_shared = sum(n for _, _, n in self.shared_pointers)
        self.counters = self._find_counters(counters) if in_place else {}
        self.triton = {
            k: TritonLaunch(
                [self.groups[g] for g in part], [self.places[g] for g in part], self._counters_of(part), joins
            )
            for k, (backend, part) in enumerate(self.parts)
            if backend == "triton"
        }
        self.watches = [NumberWatch() for _ in self.parts]
        self.prepares = any(backend != "c" for backend, _ in self.parts)
        self.copied = self._find_copied(launched)
        self.written = self._find_written() if in_place else []
        self.repeated = self._find_repeated() if in_place else None
        self.overlap = OverlapCheck(self.specs, self._is_written())
        tensors = self.gather(columns)
        for i in self.copied:
            if not tensors[i].is_contiguous():  # a copy is described without reading memory, which may be freed
                tensors[i] = torch.empty_like(tensors[i], memory_format=torch.contiguous_format)
        seen = list(self.specs)
        for i in self.copied:
            seen[i] = TensorSpec.of(tensors[i])
        self.reader = PointerReader(tensors, seen)
        self.allocator = self._allocator(list(zip(seen, tensors, strict=True))) if self.allocates else None
        self.n_results = sum(len(g.leaves) * len(g.outputs) for g in self.groups)

    def _build_backends(self) -> list[tuple[str, list[int]]]:
        """The backends, and the groups that each computes; those on one device run together.

        Kernels are built here, so that a backend that cannot build one is disabled before anything is bound.
        """
        if not self.plain or self.spans_devices or (self.joins and len(self.devices) != 1):
            return [("reference", list(range(len(self.groups))))]
        parts = []
        for device in dict.fromkeys(group.device for group in self.groups):
            part = [k for k, group in enumerate(self.groups) if group.device == device]
            backend, _ = choose_backend(device, at(self.paths[self.groups[part[0]].leaves[0]]))
            if backend in KERNEL_BACKENDS and not build_kernels(backend, [self.groups[k] for k in part]):
                backend = "foreach"
            parts.append((backend, part))
        return parts

    def _kernel_places(self) -> tuple[list[list[int]], list[tuple[int, int, int]]]:
        """Decides where kernels find pointers.

        Gathered tensors come first, then the status of reading them, new tensors, and repeated pointers: a kernel reads
        one per leaf, also of a tensor that leaves share.

        Returns:
          For each group, the positions among the pointers at which those of each input and output begin; and the
          repeated pointers to shared tensors: from where, to where, and how many.
        """
        places: list[list[int]] = []
        repeated: list[tuple[int, int, int]] = []
        new = self.n_gathered + 1
        end = new + self.n_outputs
        for group, bounds in zip(self.groups, self.bounds, strict=True):
            n, starts = len(group.leaves), []
            for i in group.inputs:
                if group.gathers[i].shared:
                    repeated.append((bounds[i][0], end, n))
                    starts.append(end)
                    end += n
                else:
                    starts.append(bounds[i][0])
            for k in group.outputs:
                if self.allocates:
                    starts.append(new)
                    new += n
                elif k is not None:
                    starts.append(bounds[k][0])
            places.append(starts)
        return places, repeated

    def _allocator(self, gathered: Sequence[tuple[TensorSpec, torch.Tensor]]) -> Allocator:
        """The maker of new tensors for all outputs: each is like an update, and a number per leaf has no shape."""
        likes: list[Sequence[tuple[TensorSpec, torch.Tensor]]] = []
        makers: list[Make] = []
        for group, bounds in zip(self.groups, self.bounds, strict=True):
            like = gathered[slice(*bounds[group.updates])]
            for output, dtype in zip(group.signature.program.outputs, group.signature.outputs, strict=True):
                likes.append(like)
                if output.level is Level.LEAF:
                    makers.append(functools.partial(torch.Tensor.new_empty, size=(), dtype=dtype))
                else:
                    makers.append(functools.partial(torch.empty_like, dtype=dtype))
        return Allocator(likes, makers)

    def _find_copied(self, launched: Sequence[int]) -> list[int]:
        """Positions of the tensors that kernels are handed copies of."""
        copied = []
        for g, (group, bounds) in enumerate(zip(self.groups, self.bounds, strict=True)):
            program = group.signature.program
            if g in launched and group.copied:
                arrays = {group.updates, *group.inputs[: len(program.arrays)]}
                for k, output in zip(group.outputs, program.outputs, strict=True):
                    if k is not None and output.level is Level.ELEMENT:
                        arrays.add(k)
                copied += [bounds[k][0] + i for k in sorted(arrays) for i in group.copied]
        return copied

    def _find_written(self) -> list[tuple[int, int]]:
        """Bounds of the runs of gathered tensors that are written in place."""
        runs: list[tuple[int, int]] = []
        for group, bounds in zip(self.groups, self.bounds, strict=True):
            for k in sorted({k for k in group.outputs if k is not None}):
                start, stop = bounds[k]
                if runs and runs[-1][1] == start:
                    runs[-1] = (runs[-1][0], stop)
                else:
                    runs.append((start, stop))
        return runs

    def _is_written(self) -> list[bool]:
        """For each gathered tensor, whether it is written in place."""
        written = [False] * self.n_gathered
        for start, stop in self.written:
            written[start:stop] = [True] * (stop - start)
        return written

    def _find_repeated(self) -> int | None:
        """The position of a tensor that is written and several of whose elements share memory."""
        bad = {spec for spec in set(self.specs) if spec.repeats}
        written = (i for start, stop in self.written for i in range(start, stop))
        return next((i for i in written if self.specs[i] in bad), None) if bad else None

    def _find_counters(self, keys: Sequence[Key]) -> dict[Key, int]:
        """The position of each shared counter among the gathered tensors, where a program reads it."""
        found: dict[Key, int] = {}
        for group, bounds in zip(self.groups, self.bounds, strict=True):
            for gather, (start, _) in zip(group.gathers, bounds, strict=True):
                if gather.cells[0][0] in keys:
                    found.setdefault(gather.cells[0][0], start)
        return found

    def _counters_of(self, part: Sequence[int]) -> list[int]:
        """The positions of shared counters among the gathered tensors of some groups."""
        bounds = [x for g in part for x in self.bounds[g]]
        return [i for i in self.counters.values() if any(start <= i < stop for start, stop in bounds)]

    def name_of(self, position: int) -> tuple[str, int]:
        """The name of a gathered tensor's column in messages, and the position of its leaf."""
        for group, bounds in zip(self.groups, self.bounds, strict=True):
            for k, (start, stop) in enumerate(bounds):
                if position < stop:
                    return group.name_of(k), group.leaves[position - start]
        raise IndexError(position)

    def label(self, position: int) -> str:
        """A gathered tensor as messages call it."""
        name, leaf = self.name_of(position)
        return f"{name}{at(self.paths[leaf])}"
