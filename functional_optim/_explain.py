"""`explain`: what a transformation will do to a tree, before it does it."""

from dataclasses import dataclass
from typing import Any

import torch

from ._compiler.c.emit import emit_c
from ._compiler.passes import Signature, plan, read_bytes, written_bytes
from ._compiler.triton.emit import emit_triton
from ._runtime.backend import choose_backend
from ._runtime.spec import TensorSpec
from ._step import TreeRegion, TreeStep
from ._transform import GradientTransformation, as_transformation
from ._tree import Tree, View, flatten, short


@dataclass(frozen=True)
class Kernel:
    """One program of a transformation.

    Args:
      signature: the program and its dtypes.
      backend: who computes it.
      leaves: paths of the leaves it updates.
      elements: how many elements they have.
      rows: number of rows of the scalar table: groups of hyper-parameters.
      passes: number of passes over memory, each one launch.
      bytes_read: bytes read per element, over all passes.
      bytes_written: bytes written per element, over all passes.
      copied: paths of leaves that are copied before and after, because their tensors are not laid out alike.
    """

    signature: Signature
    backend: str
    leaves: tuple[str, ...]
    elements: int
    rows: int
    passes: int
    bytes_read: int
    bytes_written: int
    copied: tuple[str, ...]

    @property
    def program(self) -> str:
        """The program as text."""
        return str(self.signature.program)

    @property
    def source(self) -> str:
        """The code generated for it: C, or Triton where that is the backend."""
        return emit_triton(self.signature) if self.backend == "triton" else emit_c(self.signature)


@dataclass(frozen=True)
class Explanation:
    """What a transformation does to a tree; print it.

    Args:
      kernels: the programs, in order.
      backends: who computes them.
      passes: passes over memory that follow one another.
      launches: kernels launched for one step.
      bytes_read: bytes read per element, averaged over the elements.
      bytes_written: bytes written per element, averaged over the elements.
      state_bytes: bytes of state per element.
      parameters: number of elements.
      leaves: number of leaves.
      notes: what does not fuse, or falls back, and why.
    """

    kernels: tuple[Kernel, ...]
    backends: tuple[str, ...]
    passes: int
    launches: int
    bytes_read: float
    bytes_written: float
    state_bytes: float
    parameters: int
    leaves: int
    notes: tuple[str, ...]

    @property
    def bytes_per_element(self) -> float:
        """Bytes read and written per element."""
        return self.bytes_read + self.bytes_written

    def __str__(self) -> str:
        lines = [
            f"{_count(self.parameters, 'parameter')} in {_count(self.leaves, 'tensor')}, "
            f"computed by {' and '.join(self.backends) or 'nothing'}",
            f"  {_count(self.launches, 'launch', 'es')} in {_count(self.passes, 'pass', 'es')} over memory",
            f"  {self.bytes_per_element:g} bytes per element: {self.bytes_read:g} read, {self.bytes_written:g} written",
            f"  {self.state_bytes:.4g} bytes of state per parameter",
        ]
        for k in self.kernels:
            names = [v.name for v in k.signature.program.values if v.op == "array"]
            lines.append(
                f"kernel over {_count(len(k.leaves), 'tensor')}, {_count(k.elements, 'element')}, "
                f"{_count(k.rows, 'row')} of scalars: {_count(k.passes, 'pass', 'es')}, "
                f"{k.bytes_read} + {k.bytes_written} bytes"
            )
            lines.append(f"  reads {', '.join(names)}; writes {', '.join(o.name for o in k.signature.program.outputs)}")
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])


def _count(n: int, what: str, plural: str = "s") -> str:
    return f"{n:,} {what}{plural if n != 1 else ''}"


def explain(tx: GradientTransformation, params: Tree) -> Explanation:
    """Says how `apply_gradients` would run: passes, launches, bytes, state, and what does not fuse.

    Args:
      tx: the transformation.
      params: the parameters; gradients are taken to be like them.

    Returns:
      An explanation: text when printed, with its numbers as attributes.

    Raises:
      ValueError, TypeError: the transformation does not fit the parameters.

    Example:
      >>> import functional_optim as fo, torch
      >>> e = fo.explain(fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-3)), {"w": torch.zeros(100)})
      >>> e.passes, e.bytes_per_element, e.state_bytes
      (2, 32.0, 8.08)
    """
    tx = as_transformation(tx)
    view = View.of(params)
    shadow = [_shadow(x) if seen else x for x, seen in zip(view.leaves, view.seen, strict=True)]
    tree = view.spec.unflatten(shadow)
    state = tx.init(tree)
    step = TreeStep(tx, True, tree, tree)
    columns = step.columns(tree, tree, False)
    assert columns is not None
    kernels: list[Kernel] = []
    notes: list[str] = []
    passes = 0
    for stage in step.stages:
        if not isinstance(stage, TreeRegion):
            notes.append(f"{short(stage.link.tx)} is not made of rules: it runs by itself, between kernels")
            passes += 1
            continue
        own = stage.columns(columns, stage.state.states(state))
        groups = stage.programs(own, stage.leaves(own)).groups
        for group in groups:
            tensors = [view.leaves[i] for i in group.leaves]
            backend, why = choose_backend(tensors[0].device)
            notes += [why] if why else []
            if not all(TensorSpec.of(x).plain for x in tensors):
                backend = "reference"
                notes.append("some tensors are on meta or of a class of their own: the reference computes them")
            if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
                backend = "reference"
                notes.append("a parameter requires a gradient: outside of torch.no_grad() the reference computes it")
            copied = [step.paths[group.leaves[k]] for k in group.copied]
            if copied and backend in ("c", "triton"):
                notes.append(f"not laid out densely, so copied before and after: {', '.join(copied[:5])}")
            kernels.append(
                Kernel(
                    group.signature,
                    backend,
                    tuple(step.paths[i] for i in group.leaves),
                    sum(group.table.sizes),
                    len(group.sources),
                    len(plan(group.signature)),
                    read_bytes(group.signature),
                    written_bytes(group.signature),
                    tuple(copied),
                )
            )
        hosts = sorted(stage.region.hosts)
        notes += [f"the schedule of {name} cannot be traced: Python computes it at every step" for name in hosts]
        passes += max((len(plan(group.signature)) for group in groups), default=0)
    elements = sum(view.leaves[i].numel() for i in step.present)
    state_bytes = sum(x.numel() * x.element_size() for x in flatten(state)[0] if isinstance(x, torch.Tensor))
    return Explanation(
        tuple(kernels),
        tuple(dict.fromkeys(k.backend for k in kernels)),
        passes,
        sum(k.passes for k in kernels),
        sum(k.bytes_read * k.elements for k in kernels) / max(elements, 1),
        sum(k.bytes_written * k.elements for k in kernels) / max(elements, 1),
        state_bytes / max(elements, 1),
        elements,
        len(step.present),
        tuple(dict.fromkeys(notes)),
    )


def _shadow(x: Any) -> Any:
    """A tensor without memory that has the dtype, shape and strides of another."""
    if not isinstance(x, torch.Tensor) or x.layout is not torch.strided:
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
