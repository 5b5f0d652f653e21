"""`explain`: the passes, launches and bytes of a transformation or an optimizer, before a step."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._compiler.c.emit import emit_c
from ._compiler.differentiate import NoDerivative, differentiate_signatures
from ._compiler.errors import ShortTracebacks
from ._compiler.fuse import extra_key
from ._compiler.passes import Signature, plan, read_bytes, written_bytes
from ._compiler.rule import Option
from ._compiler.triton.emit import emit_triton, launches
from ._foreign import host_column
from ._leafwise import LeafwiseStep
from ._params.journal import Journal
from ._params.layout import ChainLayout
from ._params.local import tensor_of
from ._params.region import ParamRegion
from ._params.step import ParamStep
from ._params.template import ParamList, Template, gradient_dtype
from ._runtime.backend import choose_backend
from ._runtime.checks import at
from ._runtime.groups import Columns, Group, Key
from ._runtime.shard import local_tensor
from ._runtime.spec import TensorSpec
from ._segments import BoundRegion
from ._step import TreeRegion, TreeStep
from ._transform import GradientTransformation, Link, as_transformation
from ._tree import Tree, View, flatten, show


@dataclass(frozen=True)
class Kernel:
    """One program of a transformation.

    Args:
      signature: the program and its dtypes.
      backend: who computes it.
      leaves: paths of the leaves it updates.
      elements: how many elements they have.
      rows: number of rows of the scalar table: groups of hyper-parameters.
      passes: number of passes over memory.
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
    def launches(self) -> int:
        """The number of launches: one for each pass, and in Triton one for each kernel of uniform values."""
        return launches(self.signature) if self.backend == "triton" else self.passes

    @property
    def source(self) -> str:
        """The code generated for it: C, or Triton where that is the backend."""
        return emit_triton(self.signature) if self.backend == "triton" else emit_c(self.signature)


@dataclass(frozen=True)
class OptimizerChain:
    """The chain of some parameter groups of an optimizer: those whose switches are the same.

    Args:
      groups: positions of the groups.
      leaves: number of parameters in them.
      transformations: names of its transformations, in order.
      options: keys of a group that its numbers are looked up by.
    """

    groups: tuple[int, ...]
    leaves: int
    transformations: tuple[str, ...]
    options: tuple[str, ...]

    def __str__(self) -> str:
        groups = f"parameter group{'s' if len(self.groups) > 1 else ''} {', '.join(map(str, self.groups))}"
        return (
            f"chain of {groups}, {_count(self.leaves, 'tensor')}: {' > '.join(self.transformations) or 'identity'}\n"
            f"  options {', '.join(self.options) or 'none'}"
        )


@dataclass(frozen=True)
class Route:
    """The transformations that some leaves go through, which masks and labels decide.

    Args:
      leaves: paths of the leaves.
      transformations: names of the transformations that see them, in order.
    """

    leaves: tuple[str, ...]
    transformations: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"route of {_count(len(self.leaves), 'tensor')} ({_some(self.leaves)})\n"
            f"  {' > '.join(self.transformations) or 'no transformation'}"
        )


@dataclass(frozen=True)
class Explanation:
    """Report of a transformation or an optimizer over its parameters; print it.

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
      notes: transformations that do not fuse, or fall back, and why.
      chains: for an optimizer, the chains of its parameter groups.
      routes: which leaves go through which transformations; one for all leaves that go through the same ones.

    Example:
      >>> from functional_optim import adamw
      >>> found = explain(adamw(1e-3), {"w": torch.zeros(64, 64)})
      >>> found.passes, found.bytes_read, found.bytes_written
      (1, 16.0, 12.0)
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
    chains: tuple[OptimizerChain, ...] = ()
    routes: tuple[Route, ...] = ()

    @property
    def bytes_per_element(self) -> float:
        """Bytes read and written per element."""
        return self.bytes_read + self.bytes_written

    @property
    def _whole(self) -> set[tuple[str, ...]]:
        """The routes that a reader takes for granted: through all of a chain."""
        chains = {chain.transformations for chain in self.chains}
        return chains or {route.transformations for route in self.routes if route.transformations}

    def __str__(self) -> str:
        lines = [
            f"{_count(self.parameters, 'parameter')} in {_count(self.leaves, 'tensor')}, "
            f"computed by {' and '.join(self.backends) or 'nothing'}",
            f"  {_count(self.launches, 'launch', 'es')} in {_count(self.passes, 'pass', 'es')} over memory",
            f"  {self.bytes_per_element:g} bytes per element: {self.bytes_read:g} read, {self.bytes_written:g} written",
            f"  {self.state_bytes:.4g} bytes of state per parameter",
        ]
        lines += map(str, self.chains)
        shown = len(self.routes) > max(1, len(self.chains))
        if shown or any(route.transformations not in self._whole for route in self.routes):
            lines += map(str, self.routes)
        for k in self.kernels:
            names = [v.name for v in k.signature.program.values if v.op == "array"]
            lines.append(
                f"kernel over {_count(len(k.leaves), 'tensor')}, {_count(k.elements, 'element')}, "
                f"{_count(k.rows, 'row')} of scalars: {_count(k.passes, 'pass', 'es')}, "
                f"{k.bytes_read} + {k.bytes_written} bytes"
            )
            lines.append(f"  reads {', '.join(names)}")
            lines.append(f"  writes {', '.join(o.name for o in k.signature.program.outputs)}")
        words = [*WORDS, *(UNIFORM if any(k.launches > k.passes for k in self.kernels) else ())]
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes), *(words if self.kernels else ())])


WORDS = (
    "launch: one call of a kernel, which makes one pass over all of its tensors",
    "row of scalars: the numbers (learning rate, decay, ...) that tensors with the same hyper-parameters share",
)

UNIFORM = ("on a GPU there are launches before passes, which compute what is the same for all elements of a tensor",)


def _count(n: int, noun: str, plural: str = "s") -> str:
    return f"{n:,} {noun}{plural if n != 1 else ''}"


def explain(tx: GradientTransformation | torch.optim.Optimizer, params: Tree | None = None) -> Explanation:
    """Says how a step would run: passes, launches, bytes, state, and transformations that do not fuse.

    Args:
      tx: the transformation, whose step is `apply_gradients`; or an optimizer of `functional_optim.adapters`.
      params: the parameters of a transformation; an optimizer has its own. Gradients are taken to be like them.

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
    return explanation(tx, params)


@functools.singledispatch
def explanation(tx: Any, params: Tree | None) -> Explanation:
    """The explanation of a transformation. Optimizers register theirs here, by their class."""
    tx = as_transformation(tx, "`tx` of explain")
    if params is None:
        raise TypeError(f"explain needs the parameters that {show(tx)} is to update: call `explain(tx, params)`.")
    view = View.of(params)
    shadow = [_shadow(x) if seen else x for x, seen in zip(view.leaves, view.seen, strict=True)]
    tree = view.spec.unflatten(shadow)
    state = tx.init(tree)
    with ShortTracebacks():
        step = TreeStep(tx, True, tree, tree)
    columns = step.columns(tree, tree)
    assert columns is not None
    found = _Collector(step.paths, view.leaves, torch.is_grad_enabled(), differentiates=True)
    columns |= dict.fromkeys(_given(step), columns["updates"])
    for segment in step.segments:
        if isinstance(segment, TreeRegion) and segment.leafwise is not None:
            found.add_leafwise(segment.leafwise)
        elif isinstance(segment, TreeRegion):
            states = segment.state_reader.states(state)
            own = segment.state_reader.columns(states, columns) | segment.host_columns(columns, states)
            found.add_region(segment, own)
        else:
            found.add_opaque(segment.link.tx)
    return found.explanation(step.present, flatten(state)[0], _routes([(tx, view)], step))


def explain_params(
    templates: Sequence[Template],
    params: ParamList,
    options: Sequence[Mapping[str, Any]],
    counter: torch.dtype | None,
    records: bool,
) -> Explanation:
    """The explanation of a step over parameters that each count their own steps.

    Args:
      templates: their transformations.
      params: the parameters. Those that require no gradient and have none do not take part.
      options: mappings that hyper-parameters are looked up in.
      counter: the dtype of counters; None if they are Python's integers.
      records: whether autograd records steps.

    Raises:
      RuntimeError: a parameter has no memory.
    """
    grads = [p if p.requires_grad or p.grad is not None else None for p in params.tensors]
    with ShortTracebacks():
        step = ParamStep(ChainLayout(templates, params, guarded=False, warn=False), grads, counter, warn=False)
    shadows = [_shadow(local_tensor(p)) for p in params.tensors]
    states: list[dict[str, Any]] = [{} for _ in shadows]
    step.state.make(shadows, states, options, Journal())  # without memory, as the parameters are now
    columns = step.state.columns(states)
    assert columns is not None, "the state that was missing has been made"
    if step.state.counts_in_integers and "step" in columns:
        columns["step"] = [None if x is None else step.state.counter_of(x, i) for i, x in enumerate(columns["step"])]
    local = [tensor_of(x, "params") for x in shadows]
    as_gradients = [_shadow(x, gradient_dtype(p)) for x, p in zip(shadows, params.tensors, strict=True)]
    updates = [tensor_of(x, "params") for x in as_gradients]
    tensors = [tensor_of(p, f"params at {name!r}") for name, p in zip(step.paths, params.tensors, strict=True)]
    found = _Collector(step.paths, tensors, records)
    for segment in step.segments:
        if isinstance(segment, ParamRegion) and segment.leafwise is not None:
            found.add_leafwise(segment.leafwise)
        elif isinstance(segment, ParamRegion):
            own: Columns = {"updates": updates, "params": local, **columns, **dict.fromkeys(_given(step), local)}
            for host in segment.region.host_schedules:
                own[host.column] = host_column(host, [0] * len(local), step.state.devices)
            found.add_region(segment, own)
        else:
            found.add_opaque(segment.link.tx)
    chains = tuple(_chain_of(k, template, params, step.view) for k, template in enumerate(templates))
    entries = {id(x): x for state in states for x in state.values()}  # parameters may share a number
    views = [step.view.narrow([k == position for k in params.templates]) for position in range(len(templates))]
    routes = _routes([(template.tx, view) for template, view in zip(templates, views, strict=True)], step)
    return found.explanation(step.present, list(entries.values()), routes, chains)


def _given(step: TreeStep | ParamStep) -> list[Key]:
    """The columns of extra arguments, and of updates that are kept for rules around other segments."""
    kept = [segment.entered for segment in step.segments if segment.entered is not None]
    return [*map(extra_key, step.extras.trees), *kept]


def _chain_of(position: int, template: Template, params: ParamList, view: View) -> OptimizerChain:
    """The chain of the parameters that have a template."""
    own = [k == position for k in params.templates]
    links = template.tx._links(view.narrow(own), ())
    values = [x for link in links if link.bound is not None for x in link.bound.values.values()]
    return OptimizerChain(
        tuple(dict.fromkeys(owner for owner, mine in zip(params.groups, own, strict=True) if mine)),
        sum(own),
        tuple(map(_name, links)),
        tuple(dict.fromkeys(x.name for x in values if isinstance(x, Option))),
    )


def _name(link: Link) -> str:
    """The name of a transformation within a chain."""
    return show(link.tx) if link.bound is None else link.bound.rule.name


def _routes(chains: Iterable[tuple[GradientTransformation, View]], step: TreeStep | ParamStep) -> tuple[Route, ...]:
    """The routes of the leaves that take part in a step of chains, each of which has leaves of its own."""
    leaves: dict[tuple[str, ...], list[str]] = {}
    for tx, view in chains:
        links = tx._links(view, ())
        for i in (i for i in step.present if view.seen[i]):
            leaves.setdefault(tuple(_name(link) for link in links if link.seen[i]), []).append(step.paths[i])
    return tuple(Route(tuple(own), names) for names, own in leaves.items())


class _Collector:
    """The kernels and notes of the segments of a step.

    Args:
      paths: the path of each leaf.
      tensors: the parameters.
      records: whether autograd records steps that need a gradient.
      differentiates: whether kernels compute steps that are recorded, and their derivatives.
    """

    def __init__(
        self, paths: Sequence[str], tensors: Sequence[Any], records: bool, differentiates: bool = False
    ) -> None:
        self.paths, self.tensors, self.records, self.differentiates = paths, tensors, records, differentiates
        self.kernels: list[Kernel] = []
        self.notes: list[str] = []
        self.passes = 0

    def add_opaque(self, tx: GradientTransformation) -> None:
        """Adds a transformation that is not made of rules."""
        self.notes.append(f"{show(tx)} is not made of rules: it runs by itself, between kernels")
        self.passes += 1

    def add_leafwise(self, segment: LeafwiseStep) -> None:
        """Adds a rule for whole tensors."""
        shapes: dict[tuple[int, ...], list[str]] = {}
        for i in segment.leaves:
            shapes.setdefault(tuple(self.tensors[i].shape), []).append(self.paths[i])
        listed = "; ".join(
            f"{len(own)} of {'x'.join(map(str, shape)) or 'one number'} ({_some(own)})" for shape, own in shapes.items()
        )
        name = segment.bound.rule.name
        # `torch.func.vmap` shows at the first step whether it can batch the rule
        at_once = "at once" if segment.bound.rule.batched else "at once where they can be batched"
        self.notes.append(
            f"{name} computes whole tensors with torch operations, those of one shape {at_once}: {listed}"
        )
        self.passes += 1

    def add_region(self, segment: BoundRegion, own: Columns) -> None:
        """Adds rules that fuse.

        Args:
          segment: the rules.
          own: tensors without memory that are like those of a step.
        """
        groups = segment.programs(own, segment.leaves(own)).groups
        why = self._falls_back(groups)
        self.notes += [why] if why else []
        for group in groups:
            self._add_group(group, "reference" if why else None)
        for name in sorted(segment.region.by_python):
            self.notes.append(f"the schedule of {name} cannot be traced: Python computes it at every step")
        self.passes += max((len(plan(group.signature)) for group in groups), default=0)

    def _falls_back(self, groups: Sequence[Group]) -> str:
        """The reason for which the reference computes all groups, if there is one."""
        tensors = [self.tensors[i] for group in groups for i in group.leaves]
        if not all(spec.plain for spec in set(map(TensorSpec.of, tensors))):
            return "some tensors are on meta or of a class of their own: the reference computes them all"
        if self.records and any(x.requires_grad for x in tensors):
            reason = self._derivative(groups)
            if reason:
                return f"a parameter requires a gradient: outside of torch.no_grad() {reason}"
        spans_tree = any(group.signature.program.spans_tree for group in groups)
        if spans_tree and len({group.device for group in groups}) > 1:
            return "a reduction over the tree meets tensors on several devices: the reference computes them all"
        return ""

    def _derivative(self, groups: Sequence[Group]) -> str:
        """Notes how the derivative of a step is computed; the reason for which the reference does, if there is one."""
        if not self.differentiates:
            return "the reference computes them all"
        try:
            found = differentiate_signatures([group.signature for group in groups])
        except NoDerivative as error:
            return f"the reference computes them all: no kernel has the derivative of {error}"
        passes = max(len(plan(signature)) for signature in found)
        costs = dict.fromkeys((read_bytes(signature), written_bytes(signature)) for signature in found)
        self.notes.append(
            f"autograd records the step: kernels compute its derivative, too, in {_count(passes, 'pass', 'es')}, "
            f"{' and '.join(f'{read} + {written}' for read, written in costs)} bytes per element"
        )
        return ""

    def _add_group(self, group: Group, backend: str | None) -> None:
        """Adds the kernel of a group; without a backend it is the one that a step would choose."""
        if backend is None:
            first = group.leaves[0]
            backend, why = choose_backend(self.tensors[first].device, at(self.paths[first]))
            self.notes += [why] if why else []
        copied = [self.paths[group.leaves[k]] for k in group.copied]
        if copied and backend in ("c", "triton"):
            self.notes.append(f"not laid out densely, so copied before and after: {_some(copied)}")
        self.kernels.append(
            Kernel(
                group.signature,
                backend,
                tuple(self.paths[i] for i in group.leaves),
                sum(group.table.sizes),
                len(group.sources),
                len(plan(group.signature)),
                read_bytes(group.signature),
                written_bytes(group.signature),
                tuple(copied),
            )
        )

    def explanation(
        self,
        present: Sequence[int],
        state: Sequence[Any],
        routes: tuple[Route, ...],
        chains: tuple[OptimizerChain, ...] = (),
    ) -> Explanation:
        """The explanation of all segments.

        Args:
          present: the leaves that take part.
          state: all entries of state.
          routes: the routes of the leaves.
          chains: the chains of an optimizer.
        """
        elements = sum(self.tensors[i].numel() for i in present)
        state_bytes = sum(x.numel() * x.element_size() for x in state if isinstance(x, torch.Tensor))
        return Explanation(
            tuple(self.kernels),
            tuple(dict.fromkeys(k.backend for k in self.kernels)),
            self.passes,
            sum(k.launches for k in self.kernels),
            sum(k.bytes_read * k.elements for k in self.kernels) / max(elements, 1),
            sum(k.bytes_written * k.elements for k in self.kernels) / max(elements, 1),
            state_bytes / max(elements, 1),
            elements,
            len(present),
            tuple(dict.fromkeys(self.notes)),
            chains,
            routes,
        )


def _some(paths: Sequence[str]) -> str:
    """The first few of some paths."""
    return ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")


def _shadow(x: Any, dtype: torch.dtype | None = None) -> Any:
    """A tensor without memory that has the shape and strides of another, and its dtype if no other is asked for."""
    if not isinstance(x, torch.Tensor) or x.layout is not torch.strided:
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device="meta")
