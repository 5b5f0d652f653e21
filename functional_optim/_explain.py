"""`explain`: what a transformation will do to a tree, before it does it."""

from dataclasses import dataclass
from typing import Any

import torch

from ._backend import choose_backend
from ._compiler.c.emit import emit_c
from ._compiler.passes import Signature, plan, read_bytes, written_bytes
from ._compiler.triton.emit import emit_triton
from ._plan import Plan, Prepared, Segment, get_state, lists_of
from ._transform import GradientTransformation, as_transformation
from ._tree import Tree, View, flatten
from .kernels import Column
from .kernels.layout import layout, meta


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
    whole = Plan.of(tx, True, tree, tree)
    devices = {k: x.device for k, x in enumerate(view.leaves) if x is not None}
    lists = lists_of(whole.read, tree, tree)
    kernels: list[Kernel] = []
    notes: list[str] = []
    passes = 0
    for segment in whole.segments:
        if not isinstance(segment, Segment):
            notes.append(f"{segment[1].tx!r:.80} is not made of rules: it runs by itself, between kernels")
            passes += 1
            continue
        for k, name in segment.slots:
            lists[k, name] = Column(whole.read(getattr(get_state(state, segment.links[k].path), name)))
        prepared = Prepared(segment, whole, lists)
        for group in prepared.groups:
            device = devices[group.leaves[0]]
            backend, why = choose_backend(device)
            if why:
                notes.append(why)
            tensors = [view.leaves[i] for i in group.leaves]
            if not all(type(x) in (torch.Tensor, torch.nn.Parameter) for x in tensors) or device.type == "meta":
                backend = "reference"
                notes.append("some tensors are on meta or of a class of their own: the reference computes them")
            if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
                backend = "reference"
                notes.append("a parameter requires a gradient: outside of torch.no_grad() the reference computes it")
            copied = [whole.paths[i] for i in group.leaves if layout(meta(view.leaves[i])) is None]
            if copied and backend in ("c", "triton"):
                notes.append(f"not laid out densely, so copied before and after: {', '.join(copied[:5])}")
            n = len(plan(group.signature))
            kernels.append(
                Kernel(
                    group.signature,
                    backend,
                    tuple(whole.paths[i] for i in group.leaves),
                    sum(group.table.sizes),
                    len(group.sources),
                    n,
                    read_bytes(group.signature),
                    written_bytes(group.signature),
                    tuple(copied),
                )
            )
            hosts = sorted({s.name for row in group.sources for s in row if s.kind == "host"})
            notes += [f"the schedule of {name} cannot be traced: Python computes it at every step" for name in hosts]
        passes += max((len(plan(g.signature)) for g in prepared.groups), default=0)
    elements = sum(view.leaves[i].numel() for i in whole.present)
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
        len(whole.present),
        tuple(dict.fromkeys(notes)),
    )


def _shadow(x: Any) -> Any:
    """A tensor without memory that has the dtype, shape and strides of another."""
    if not isinstance(x, torch.Tensor) or x.layout is not torch.strided:
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
