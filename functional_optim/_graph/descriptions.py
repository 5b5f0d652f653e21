"""Descriptions of steps: texts that name a chain and the structure of its trees, and from which both are made again.

A compiled graph refers to its step by a text alone, and so do files of graphs: a cache, or an exported program. So the
text says what the step is, wherever that is possible: it is a pickle in which only transformations, schedules, rules
and structures may occur, and digests of formulas, which a graph may hold, too. A chain with functions that no
description can hold (an opaque transformation, a mask or a schedule that is a function of the caller's) is looked up
in this process by its serial number.
"""

import base64
import collections
import functools
import importlib
import io
import itertools
import pickle
import re
import sys
import threading
import zlib
from collections.abc import Sequence
from operator import attrgetter
from types import FunctionType
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from .._compiler.rule import Rule
from .._compiler.states import state_type
from .._packed import Form, Packed, form
from .._runtime.backend import computed_by
from .._runtime.checks import check_memory
from .._runtime.cuda.streams import streams_of
from .._runtime.internals import is_wrapper_of_a_transformation
from .._runtime.packing import Place
from .._runtime.recent import in_front
from .._schedules.schedule import Schedule, ScheduleFactory
from .._state_nodes import brief
from .._step import take_step
from .._structures import FORMS, Structure, rebuild
from .._transform import FACTORIES, TRANSFORMATIONS, GradientTransformation, LabelFunction, parts
from .._tree import Tree, difference, flatten, flatten_to_buffers, leaves_like, paths
from .digest import PROCESS_ID, digest_of, digest_of_package, is_edited


class Outline(NamedTuple):
    """The structure of a tree, and which of its leaves are there."""

    structure: Structure
    there: tuple[bool, ...]


class TreeMaker:
    """Makes trees of one outline from their tensors, and reads them, by the pytree library, which takes no Python.

    Args:
      outline: the structure, and which leaves are there.
    """

    def __init__(self, outline: Outline) -> None:
        # a tensor's position in the order of `read`, for each leaf in the order of the pytree library
        order, self.spec = flatten_to_buffers(rebuild(outline.structure, range(len(outline.there))))
        positions = list(itertools.accumulate(outline.there, initial=0))
        self.sources = [positions[i] if outline.there[i] else None for i in order]
        places = {i: k for k, i in enumerate(order)}
        self.leaves = [places[i] for i in range(len(order))] if order != sorted(order) else None

    def tree(self, tensors: Sequence[torch.Tensor]) -> Tree:
        """The tree with these tensors."""
        return self.spec.unflatten([None if k is None else tensors[k] for k in self.sources])

    def read(self, tree: Tree) -> list[Any] | None:
        """The leaves of a tree, None where one is absent; None for a tree of another structure.

        A dict and an ordered one are the same structure, as for the pytree library.
        """
        leaves, spec = flatten_to_buffers(tree)
        if spec != self.spec:
            try:
                leaves = leaves_like(self.spec, tree)
            except (ValueError, TypeError):
                return None
            if not all(x is None or isinstance(x, torch.Tensor) for x in leaves):
                return None
        return leaves if self.leaves is None else [leaves[k] for k in self.leaves]


class Trees(NamedTuple):
    """The trees of a step: updates, parameters if there are any, the state, and extra arguments by name."""

    updates: Outline
    params: Outline | None
    state: Outline
    extra: Outline

    @property
    def same_containers(self) -> bool:
        """Whether updates and parameters are in the same containers, in the same order."""
        return self.params is not None and self.params.structure == self.updates.structure

    def computed(self, apply: bool) -> list[int]:
        """The leaves of the result that a step computes; others it returns as they are."""
        base, other = (self.params, self.updates) if apply else (self.updates, self.params)
        assert base is not None
        both = zip(base.there, other.there if self.same_containers and other else base.there, strict=True)
        return [i for i, (one, two) in enumerate(both) if one and two]

    def partners(self, leaves: Sequence[int]) -> list[int | None]:
        """The positions, among the tensors of the parameters, of those that go with some leaves of the updates."""
        assert self.params is not None
        n = len(self.params.there)
        order = list(range(n))
        if not self.same_containers:
            order = reordered(order, self.params.structure, self.updates.structure)
        positions = list(itertools.accumulate(self.params.there, initial=0))
        return [positions[order[i]] if self.params.there[order[i]] else None for i in leaves]

    def check(self) -> None:
        """Refuses updates in another structure than the parameters.

        Raises:
          ValueError: with the paths of both that differ.
        """
        if self.params is None or self.same_containers:
            return
        params, updates = (_skeleton(x.structure, len(x.there)) for x in (self.params, self.updates))
        spec = flatten(params)[1]
        try:
            leaves_like(spec, updates)
        except (ValueError, TypeError):
            raise ValueError(f"updates does not have the structure of params: {difference(spec, updates)}.") from None


class DescribedStep:
    """A step of a chain on trees of some structure.

    Args:
      tx: the chain.
      apply: whether to add the updates to the parameters.
      trees: the structure of the trees.
      backend: the backend that is asked for where the step is written, if any.

    Attributes:
      runs_foreign_code: whether a transformation is made of functions, which may do anything.
      of_rules: whether all transformations are rules that are computed element by element.
      n_extra: the number of tensors among the extra arguments.
      computed: the leaves of the result that are computed, by position.
      picked: their positions among the leaves of the tree that results are like.
      partners: of each, the position of its parameter, where updates are made as wide.
      updates, params, state, extra: the makers of the trees of their tensors.
    """

    KEEP = 8  # chains with tensors of their own

    def __init__(self, tx: GradientTransformation, apply: bool, trees: Trees, backend: str | None) -> None:
        self.tx, self.apply, self.trees, self.backend = tx, apply, trees, backend
        bounds = [part._bound for part in parts(tx).values()]
        self.runs_foreign_code = None in bounds
        self.of_rules = not any(bound is None or bound.rule.whole for bound in bounds)
        self.n_extra = sum(trees.extra.there)
        self.computed = trees.computed(apply)
        self.updates, self.state, self.extra = map(TreeMaker, (trees.updates, trees.state, trees.extra))
        self.params = None if trees.params is None else TreeMaker(trees.params)
        base = trees.params if apply else trees.updates
        assert base is not None
        positions = {i: k for k, i in enumerate(i for i, there in enumerate(base.there) if there)}
        self.picked = [positions[i] for i in self.computed]
        without: list[int | None] = [None] * len(self.computed)
        self.partners = without if apply or trees.params is None else trees.partners(self.computed)
        self._own: collections.OrderedDict[Any, GradientTransformation] = collections.OrderedDict()

    def take(
        self,
        updates: Sequence[torch.Tensor],
        params: Sequence[torch.Tensor],
        state: Sequence[torch.Tensor],
        numbers: Sequence[torch.Tensor],
        donate: bool = False,
        reference: bool = False,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Takes the step.

        Args:
          updates: the tensors of the updates.
          params: the tensors of the parameters.
          state: the tensors of the state.
          numbers: the tensors of the extra arguments, and of hyper-parameters that are tensors.
          donate: whether to write in place.
          reference: whether to compute with operations of torch, which are traced and differentiated.

        Returns:
          The tensors of the result that are computed, and those of the new state; none if all are written in place.

        Raises:
          ValueError: a transformation returned a state in another structure than it was given.
          RuntimeError: the backend that is asked for never computes these tensors; operations of torch do not take
            its place then, as in eager mode.
        """
        extra = self.extra.tree(numbers[: self.n_extra])
        given = numbers[self.n_extra :]
        follows = reference or any(map(is_wrapper_of_a_transformation, given))
        tx = self.tx._with_tensors(list(given)) if follows else self._chain_of(given)
        with computed_by(self.backend, reference):
            before, like = self.state.tree(state), None if self.params is None else self.params.tree(params)
            result, after = take_step(tx, self.apply, self.updates.tree(updates), before, like, extra, donate)
        if donate and after is before:
            return [], []
        reader = self.updates if self.params is None else self.params  # of the containers that results have
        leaves, states = reader.read(result), self.state.read(after)
        there = () if states is None else tuple(x is not None for x in states)
        if leaves is None or there != self.trees.state.there:
            raise ValueError(
                f"a transformation of {brief(self.tx)} returned updates or a state in another structure than it was "
                f"given, which a compiled step cannot; keep the state's structure as `init` makes it."
            )
        if self.params is not None and not self.apply and not self.trees.same_containers:
            assert self.trees.params is not None
            leaves = reordered(leaves, self.trees.params.structure, self.trees.updates.structure)
        return [leaves[i] for i in self.computed], [x for x in states or () if x is not None]

    def _chain_of(self, given: Sequence[torch.Tensor]) -> GradientTransformation:
        """The chain with tensors of its own, which hold these numbers: a kernel stays bound to it."""
        if not given:
            return self.tx
        key = threading.get_ident(), *((x.dtype, x.device) for x in given)  # a thread does not write another one's
        if key not in self._own:
            while len(self._own) >= self.KEEP:
                self._own.popitem(last=False)
            with torch.inference_mode(False):  # steps outside of that mode write to them, too
                made = [streams_of(x.device).allocate(functools.partial(torch.empty_like, x), x.device) for x in given]
            self._own[key] = self.tx._with_tensors(made)
        own = self._own[key]
        for mine, x in zip(own._tensors, given, strict=True):
            check_memory("a hyper-parameter of a compiled step is", x, x.device)
            mine.copy_(x.detach())
        return own


def path_of(outline: Outline, k: int) -> str:
    """The path of the `k`-th leaf that is there."""
    position = [i for i, there in enumerate(outline.there) if there][k]
    order, spec = flatten_to_buffers(rebuild(outline.structure, range(len(outline.there))))
    return paths(spec)[order.index(position)]


def _skeleton(structure: Structure, n: int) -> Tree:
    """A tree of a structure of `n` leaves, with numbers for leaves; that which a packed tree stands for."""
    tree = rebuild(structure, [0] * n)
    return tree.form.spec.unflatten([0] * len(tree.layout.places)) if isinstance(tree, Packed) else tree


def with_forms(structure: Structure) -> Structure:
    """A structure with the forms of packed trees in place of their serial numbers, which one process knows."""
    if isinstance(structure, str):
        return structure
    kind, keys, inside = structure
    keys = FORMS[keys] if isinstance(keys, str) else keys
    return kind, keys, inside if isinstance(inside, int) else tuple(map(with_forms, inside))


def reordered(leaves: Sequence[Any], old: Structure, new: Structure) -> list[Any]:
    """Leaves in the order of another structure, which the pytree library takes for the same."""
    olds, spec = flatten(rebuild(old, range(len(leaves))))
    news = leaves_like(spec, rebuild(new, range(len(leaves))))
    places = dict(zip(news, olds, strict=True))
    return [leaves[places[i]] for i in range(len(leaves))]


def describe(serial: str, apply: bool, trees: Trees, backend: str | None) -> str:
    """The text of a step.

    Args:
      serial: the serial number of the chain.
      apply: whether to add the updates to the parameters.
      trees: the structure of the trees.
      backend: the backend that is asked for.

    Raises:
      ValueError: the trees do not fit each other, or the state is that of a rule that has been written anew.
    """
    trees.check()
    tx = TRANSFORMATIONS[serial]
    try:
        text = _write(tx, (apply, *trees, backend), by_serial=False)
        _read(text)
    except Exception:  # pickles fail in many ways, depending on the object
        text = _write(tx, (apply, *trees, backend), by_serial=True)
    DESCRIBED[text] = tx
    return text


DESCRIBED: "WeakValueDictionary[str, GradientTransformation]" = WeakValueDictionary()  # chains that are here, by text


def _write(tx: GradientTransformation, rest: tuple[Any, ...], by_serial: bool) -> str:
    digests = [digest_of_package(), *map(digest_of, parts(tx).values())]
    return base64.b85encode(zlib.compress(_pickled((digests, len(tx._tensors), tx, *rest), tx, by_serial))).decode()


def _read(text: str) -> tuple[DescribedStep, bool]:
    """The step that a text describes, and whether its chain was in this process before."""
    reader = _Reader(text)
    (_, *digests), n, tx, apply, updates, params, state, extra, backend = reader.load()
    here = reader.chain is not None
    own = parts(tx).values()
    edited = next((part for part, digest in zip(own, digests, strict=True) if is_edited(part, digest)), None)
    if edited is not None:  # names lead to other rules now; the chain that was described may still have the old ones
        tx, here = DESCRIBED.get(text), True
        if tx is None:
            raise RuntimeError(
                f"{brief(edited)} is not what it was when this step was compiled or exported: the rule, or something "
                f"that it refers to, has been edited or defined anew since. Compile or export the step again, or keep "
                f"the chain that was compiled."
            )
    if n != len(tx._tensors):
        raise RuntimeError(
            f"the description of a compiled step says that its chain has {n} hyper-parameters that are tensors, but "
            f"{brief(tx)} has {len(tx._tensors)}. Compile or export the step again."
        )
    return DescribedStep(tx, apply, Trees(updates, params, state, extra), backend), here


_KEEP = 256  # steps of chains that are made of their texts, and of each chain that is here
# of chains that are here, by text: they own their steps, lest a step should keep a chain and all that it refers to
OWN_STEPS: "WeakValueDictionary[str, DescribedStep]" = WeakValueDictionary()


def find_step(text: str) -> DescribedStep:
    """The step that a text describes.

    Raises:
      RuntimeError: the chain cannot be found in this process, or its rules have been edited.
    """
    return made_step(text) or OWN_STEPS.get(text) or _find_own(text)


@functools.lru_cache(maxsize=_KEEP)
def made_step(text: str) -> DescribedStep | None:
    """The step of a chain that is made of its text; None of one that is here."""
    step, here = _read(text)
    return None if here else step


def _find_own(text: str) -> DescribedStep:
    step, _ = _read(text)
    step.tx._described_steps = in_front(step, step.tx._described_steps, _KEEP)
    OWN_STEPS[text] = step
    return step


# NamedTuples that are defined within functions, by identity, for texts that only this process can read
CLASSES: "WeakValueDictionary[int, type]" = WeakValueDictionary()


def _pickled(x: Any, tx: GradientTransformation, by_serial: bool) -> bytes:
    """An object of a description of a chain."""
    file = io.BytesIO()
    _Writer(file, tx, by_serial).dump(x)
    return file.getvalue()


class _Writer(pickle.Pickler):
    """Writes a description of a chain: its tensors by position, classes of states by the rule that declares them."""

    def __init__(self, file: Any, tx: GradientTransformation, by_serial: bool) -> None:
        super().__init__(file, protocol=4)
        self.tx, self.by_serial = tx, by_serial

    def persistent_id(self, x: Any) -> Any:
        if self.by_serial and x is self.tx:
            return "chain", x._serial, PROCESS_ID
        if isinstance(x, torch.Tensor):
            position = next((k for k, own in enumerate(self.tx._tensors) if own is x), None)
            if position is None:
                raise pickle.PicklingError("a tensor that is no hyper-parameter")
            return "number", position
        if isinstance(x, frozenset):  # its order differs from process to process
            return "set", sorted(x, key=lambda entry: _pickled(entry, self.tx, self.by_serial))
        if isinstance(x, Form) and x.containers is not None:
            return "form", x.containers, [None if p is None else tuple(p) for p in x.layout.places]
        if isinstance(x, Form) and self.by_serial:
            return "form here", x.serial
        if not (isinstance(x, type) and issubclass(x, tuple) and hasattr(x, "_fields")):
            return None
        if hasattr(x, "_rule"):
            counted = vars(x)["_counted"]
            if self.by_serial:
                return "state here", self._position(x._rule), counted
            return "state", x._rule.factory, counted
        if self.by_serial and "<locals>" in x.__qualname__:
            CLASSES[id(x)] = x
            return "class", id(x)
        return None

    def _position(self, rule: Rule) -> int:
        """The position of a rule among the parts of the chain.

        Raises:
          ValueError: a state is that of a rule in whose place the chain has another one.
        """
        rules = _rules(self.tx)
        if rule not in rules:
            raise ValueError(
                f"the state of {rule.name} was made before the rule was written anew; take one step outside of the "
                f"compiled function with `donate=False`, whose state is the new rule's, or make it with "
                f"`tx.init(params)`."
            )
        return rules.index(rule)


def _rules(tx: GradientTransformation) -> list[Rule | None]:
    """The rule of each part of a chain; None for a part that is not one."""
    return [None if part._bound is None else part._bound.rule for part in parts(tx).values()]


class _Reader(pickle.Unpickler):
    """Reads a description. Files hold them, so nothing is called but what makes chains, schedules and structures."""

    def __init__(self, text: str) -> None:
        super().__init__(io.BytesIO(zlib.decompress(base64.b85decode(text))))
        self.numbers: dict[int, torch.Tensor] = {}
        self.chain: GradientTransformation | None = None  # if it is found by its serial number

    def persistent_load(self, pid: Any) -> Any:
        kind, *rest = pid
        if kind == "number":
            return self.numbers.setdefault(rest[0], torch.zeros((), dtype=torch.float64))
        if kind == "state":
            return state_type(rest[0].rule, rest[1])
        if kind == "state here":
            assert self.chain is not None, "a chain stands before the states"
            rule = _rules(self.chain)[rest[0]]
            assert rule is not None, "positions are those of rules"
            return state_type(rule, rest[1])
        if kind == "set":
            return frozenset(rest[0])
        if kind == "class":
            return CLASSES[rest[0]]
        if kind == "form":
            containers, places = rest
            spec = flatten(rebuild(containers, range(len(places))))[1]
            return form(spec, tuple([None if place is None else Place(*place) for place in places]))
        if kind == "form here":
            return FORMS[rest[0]]
        serial, process = rest
        tx = TRANSFORMATIONS.get(serial) if process == PROCESS_ID else None
        if tx is None:
            raise RuntimeError(
                "the chain of this compiled step is not in this process. It is found by its description in any "
                "process if it holds no functions: give masks as trees or regular expressions in place of functions, "
                "schedules as schedules of functional_optim, and rules in place of opaque transformations. Otherwise "
                "keep the chain as long as the compiled function, and compile in the process that runs it."
            )
        self.chain = tx
        return tx

    def find_class(self, module: str, name: str) -> Any:
        own = module.partition(".")[0] == __name__.partition(".")[0]
        if not own and module not in sys.modules:
            raise RuntimeError(
                f"the chain of this compiled step uses {name} of the module {module}; import {module} before."
            )
        try:
            found = attrgetter(name)(importlib.import_module(module) if own else sys.modules[module])
        except AttributeError:
            raise RuntimeError(
                f"the chain of this compiled step uses {name} of the module {module}, which has no such name here."
            ) from None
        if not _is_harmless(found):
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a chain")
        return found


# with the class of a call to come, as which a declared transformation is pickled
_CLASSES = (dict, list, tuple, collections.OrderedDict, functools.partial)


def _is_harmless(x: Any) -> bool:
    """Whether an object of a description is a class or a function of parts of chains."""
    if not isinstance(x, type):
        if isinstance(x, FunctionType):
            return x in (re._compile, *FACTORIES)  # type: ignore[attr-defined]  # as which a pattern is pickled
        return isinstance(x, (torch.dtype, ScheduleFactory)) or isinstance(getattr(x, "rule", None), Rule)
    if issubclass(x, tuple) and hasattr(x, "_fields"):
        return True
    return issubclass(x, (GradientTransformation, LabelFunction, Schedule, Packed)) or x in _CLASSES
