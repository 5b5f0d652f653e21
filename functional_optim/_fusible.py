"""Transformations that the compiler sees into: rules with their hyper-parameters, and the functions that make them."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from ._compiler.errors import note_number
from ._compiler.rule import Bound, Rule
from ._compiler.slots import Slot
from ._compiler.states import restore_slots, restore_state, state_type
from ._compiler.symbols import Symbol
from ._graph.run import run
from ._runtime.checks import at, check_leaf, check_memory, check_stored
from ._runtime.internals import is_differentiated, register_in_exports
from ._schedules.schedule import swap_tensors, tensors_of
from ._state_nodes import StateNode
from ._transform import GradientTransformation, Link, Path, Rewrite, as_transformation
from ._tree import MaskedNode, Tree, View, paths, show


EMPTY = inspect.Parameter.empty


class Fusible(GradientTransformation):
    """A transformation that the compiler sees into: made of rules, or a combination of transformations."""

    def init(self, params: Tree) -> Any:
        """Makes the state for a tree of parameters."""
        if torch.compiler.is_dynamo_compiling():
            from ._graph.trace import init_outside  # an import of the compiler, which takes seconds

            return init_outside(self.init, params)
        view = View.of(params)
        for path, p in zip(paths(view.spec), view.leaves, strict=True):
            if p is not None:
                check_stored("params", path, check_leaf("params", path, p))
        return self._init(view)

    def update(self, updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, Any]:
        """Transforms updates; see `GradientTransformation.update`."""
        return run(self, False, updates, state, params, extra, donate=False)


class RuleTransformation(Fusible):
    """A rule with its hyper-parameters: immutable, comparable, picklable. Its `repr` is the call that makes it.

    Args:
      factory: the function that `elementwise` made.
      values: every hyper-parameter by name.
    """

    _bound: Bound

    def __init__(self, factory: "RuleFactory", values: Mapping[str, Any]) -> None:
        self.factory = factory
        self._bound = Bound(factory.rule, dict(values))
        self._tensors = tensors_of(self._bound.values)

    def replace(self, **values: Any) -> "RuleTransformation":
        """The same rule with some hyper-parameters replaced."""
        unknown = [name for name in values if name not in self._bound.values]
        if unknown:
            raise TypeError(
                f"{self._bound.rule.name} has no hyper-parameter `{unknown[0]}`; its hyper-parameters are "
                f"{self.factory.arguments}."
            )
        return self.factory.make({**self._bound.values, **values})

    def _swap(self, tensor: Callable[[torch.Tensor], torch.Tensor]) -> "RuleTransformation":
        values = swap_tensors(self._bound.values, tensor)
        return RuleTransformation(self.factory, values) if self._tensors else self

    def _init(self, view: View) -> Any:
        rule, values = self._bound.rule, self._bound.values
        seen = [p for p, own in zip(view.leaves, view.seen, strict=True) if own]
        for start in {slot.start for slot in rule.slots.values() if isinstance(slot.start, str)} & values.keys():
            x = values[start]
            check_memory(f"the hyper-parameter {rule.name}.{start} is", x, getattr(x, "device", None))

        def make(slot: Slot, p: torch.Tensor) -> Any:
            # a leaf of autograd's graph starts a state of its own; anything else is followed to where it came from
            with _noting_leaf(view, p):
                made = slot.make(p.detach() if p.is_leaf and not is_differentiated(p) else p, values)
            return MaskedNode() if made is None else made  # a node that functions of torch.func pass by, as not None

        fields = {
            name: slot.make_shared(seen, values) if slot.per_tree else view.map(functools.partial(make, slot))
            for name, slot in rule.slots.items()
        }
        if self._bound.counted:
            fields["count"] = torch.zeros((), dtype=torch.int64, device=seen[0].device if seen else None)
        # here, and kept as long as the process: `torch.export.load` looks the class up by its name, in a process that
        # has traced nothing
        made = state_type(rule, self._bound.counted)
        register_in_exports(made)
        return made(**fields)

    def _links(self, view: View, path: Path) -> list[Link]:
        return [Link(self, path, view.seen, self._bound, self._lacking(view))]

    def _state_nodes(self, path: Path) -> list[StateNode]:
        return [StateNode(self, path, state_type(self._bound.rule, self._bound.counted))]

    def _lacking(self, view: View) -> Mapping[str, frozenset[int]]:
        """The slots of which some leaves have no entry, with the positions of those leaves."""
        shaped = {name: slot for name, slot in self._bound.rule.slots.items() if slot.may_lack}

        def lacks(slot: Slot, p: torch.Tensor) -> bool:
            with _noting_leaf(view, p):
                return slot.shape_for(p, self._bound.values) is None

        return {
            name: frozenset(
                i for i, (p, seen) in enumerate(zip(view.leaves, view.seen, strict=True)) if seen and lacks(slot, p)
            )
            for name, slot in shaped.items()
        }

    def _extra_names(self) -> frozenset[str] | None:
        return frozenset((*self._bound.rule.extras, *self._bound.rule.tree_extras))

    def __reduce__(self) -> tuple[Any, ...]:
        return RuleTransformation, (self.factory, self._bound.values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RuleTransformation) and self._bound.key == other._bound.key

    def __hash__(self) -> int:
        return hash(self._bound.key)

    def __repr__(self) -> str:
        return f"{self._bound.rule.name}({', '.join(self._shown())})"

    def _shown(self) -> list[str]:
        """The arguments of `repr`: hyper-parameters that are not their defaults."""
        shown = []
        for name, value in self._bound.values.items():
            default = self._bound.rule.hypers[name]
            if (
                default is EMPTY
                or type(value) is not type(default)
                or isinstance(value, torch.Tensor)
                or value != default
            ):
                shown.append(f"{name}={show(value)}")
        return shown


class Combination(Fusible):
    """A transformation that is made of others.

    Args:
      members: the others.
    """

    def __init__(self, members: Iterable[GradientTransformation]) -> None:
        self.members = tuple(members)
        self._tensors = tuple({id(x): x for tx in self.members for x in tx._tensors}.values())

    def _warn(self, view: View) -> None:
        for tx in self.members:
            tx._warn(view)

    def _asks_leaves(self) -> bool:
        return any(tx._asks_leaves() for tx in self.members)

    def _extra_names(self) -> frozenset[str] | None:
        names = [tx._extra_names() for tx in self.members]
        return None if None in names else frozenset().union(*[own for own in names if own is not None])


class Wrapping(Combination):
    """A rule around an inner transformation: it sees the update that entered that beside the one that left it.

    Args:
      inner: the inner transformation.
      own: the rule; in an optimizer a chain that begins with it.
    """

    def __init__(self, inner: GradientTransformation, own: GradientTransformation) -> None:
        super().__init__((inner, own))
        self.inner, self.own = inner, own

    def _init(self, view: View) -> Any:
        return self.inner._init(view), self.own._init(view)

    def _rewrite(self, fn: Rewrite, path: Path) -> GradientTransformation:
        return Wrapping(self.inner._rewrite(fn, (*path, 0)), self.own._rewrite(fn, (*path, 1)))

    def _links(self, view: View, path: Path) -> list[Link]:
        inside = self.inner._links(view, (*path, 0))
        rule, *behind = self.own._links(view, (*path, 1))
        return [*inside, rule._replace(wraps=len(inside)), *behind]

    def _state_nodes(self, path: Path) -> list[StateNode]:
        own = StateNode(self, path, tuple, (0, 1))
        return [own, *self.inner._state_nodes((*path, 0)), *self.own._state_nodes((*path, 1))]

    def __reduce__(self) -> tuple[Any, ...]:
        return Wrapping, (self.inner, self.own)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Wrapping) and (self.inner, self.own) == (other.inner, other.own)

    def __hash__(self) -> int:
        return hash((Wrapping, self.inner, self.own))

    def __repr__(self) -> str:
        if not isinstance(self.own, RuleTransformation):
            return f"{self.own!r} around {self.inner!r}"
        return f"{self.own._bound.rule.name}({', '.join([repr(self.inner), *self.own._shown()])})"


@contextlib.contextmanager
def _noting_leaf(view: View, p: torch.Tensor) -> Iterator[None]:
    """Adds the path of a leaf to an error, as those of functions of slots are."""
    try:
        yield
    except Exception as error:
        leaves = zip(paths(view.spec), view.leaves, view.seen, strict=True)
        path = next((path for path, x, seen in leaves if seen and x is p), "")
        error.add_note(f"for the leaf{at(path)}")
        raise


class RuleFactory:
    """A function of hyper-parameters that returns a transformation."""

    __name__: str
    __qualname__: str

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        rule.factory = self
        functools.update_wrapper(self, rule.fn)
        hypers = {**({"inner": EMPTY} if rule.wraps else {}), **rule.hypers}
        if rule.wraps:  # some hyper-parameter may have no default
            kinds = [inspect.Parameter.POSITIONAL_OR_KEYWORD, *[inspect.Parameter.KEYWORD_ONLY] * len(rule.hypers)]
        else:
            kinds = [inspect.Parameter.POSITIONAL_OR_KEYWORD] * len(hypers)
        self.__signature__ = inspect.Signature(
            [inspect.Parameter(k, kind, default=v) for (k, v), kind in zip(hypers.items(), kinds, strict=True)],
            return_annotation=Wrapping if rule.wraps else RuleTransformation,
        )
        # so that `torch.load(weights_only=True)` may load states, in a process that has made none: torch keeps the list
        # as long as the process, and so each rule that is declared
        named = (self, f"{self.__module__}.{self.__qualname__}")
        torch.serialization.add_safe_globals([named, restore_slots, restore_state])

    def __call__(self, *args: Any, **kwargs: Any) -> RuleTransformation:
        return self.make(self.bind(args, kwargs))

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, defaults among them.

        Raises:
          TypeError: an argument is missing or unknown.
        """
        try:
            bound = self.__signature__.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.rule.name}: {error}; its hyper-parameters are {self.arguments}.") from None
        bound.apply_defaults()
        return dict(bound.arguments)

    @property
    def arguments(self) -> str:
        """The arguments of the function, as messages list them."""
        return str(self.__signature__.replace(return_annotation=EMPTY))

    def make(self, values: Mapping[str, Any]) -> RuleTransformation:
        """The rule with its hyper-parameters."""
        return RuleTransformation(self, values)

    def formula(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the formula itself, as a part of another rule's.

        Hyper-parameters that are left out have their defaults, and numbers are checked as ever. The caller keeps the
        slots: it declares them, passes them and returns their new values. On tensors the formula is plain torch.

        Args:
          *args: the update, the parameter if the formula takes it, and its slots, in order.
          **kwargs: `step`, `first` and extra arguments if it takes them, and hyper-parameters.

        Returns:
          The new update, followed by the new value of every slot.

        Raises:
          TypeError: an argument is missing or unknown, or a schedule, whose value only the rule that is called has.
          ValueError: a number is out of its range.

        Example:
          >>> import functional_optim as fo, torch
          >>> @fo.elementwise(state={"mu": fo.zeros, "nu": fo.zeros})
          ... def signed_adam(u, mu, nu, *, step, b1=0.9):
          ...     u, mu, nu = fo.scale_by_adam.formula(u, mu, nu, step=step, b1=b1)
          ...     return torch.sign(u), mu, nu
          >>> tx = signed_adam()
          >>> tx.update(torch.tensor([3.0, -0.5]), tx.init(torch.zeros(2)))[0]
          tensor([ 1., -1.])
        """
        rule = self.rule
        try:
            bound = inspect.signature(rule.fn).bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"the formula of {rule.name}: {error}; it takes {_arguments(rule)}, as they are in the rule that calls."
            ) from None
        bound.apply_defaults()
        values = {k: bound.arguments[k] for k in rule.hypers}
        for hyper, value in values.items():
            if isinstance(value, Symbol):
                continue
            if hyper not in rule.static and callable(value) and not isinstance(value, torch.Tensor):
                raise TypeError(
                    f"the formula of {rule.name}: `{hyper}` is {show(value)}, expected its value at this step. Make it "
                    f"a hyper-parameter of the rule that calls: schedules are looked up for those."
                )
            bound.arguments[hyper] = rule.check(hyper, value, values)
        try:
            return rule.fn(*bound.args, **bound.kwargs)
        except (TypeError, AttributeError) as error:
            note_number(error, f"`{rule.name}.formula(..., b=torch.tensor(0.9, dtype=torch.float64))`")
            raise

    def __getattr__(self, name: str) -> Any:
        if name in ("init", "update") and "rule" in self.__dict__:
            raise AttributeError(
                f"{self.rule.name} makes transformations, and has no `{name}`; call it: `tx = {self.rule.name}(...)`."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"<rule {self.rule.name}{self.arguments}>"

    def __reduce__(self) -> str:
        return self.__qualname__


class WrappingFactory(RuleFactory):
    """A function of an inner transformation and hyper-parameters that returns a transformation."""

    def __call__(self, *args: Any, **kwargs: Any) -> Wrapping:  # type: ignore[override]
        values = self.bind(args, kwargs)
        return Wrapping(as_transformation(values.pop("inner"), f"`inner` of {self.rule.name}"), self.make(values))


def _arguments(rule: Rule) -> str:
    """The arguments of a formula, with defaults and without annotations."""
    parameters = inspect.signature(rule.fn).parameters.values()
    return str(inspect.Signature([p.replace(annotation=EMPTY) for p in parameters]))
