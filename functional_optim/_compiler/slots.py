"""Slots: declarations of the state that a rule keeps for each leaf."""

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from .arguments import checked_switch, plain_number


Shape = Callable[..., Sequence[int] | None]


@dataclass(frozen=True)
class Slot:
    """A slot of state of a rule; made by `slot`.

    Args:
      start: its first value.
      dtype: its dtype.
      per_leaf: whether a program sees one number per leaf.
      square: whether it holds squares.
      shape: its shape for a leaf, if it has one of its own.
      evaluate: whether it holds the parameters to evaluate at.
      per_tree: whether that number is one for all leaves.
      as_gradient: whether an optimizer stores it in the dtype of the gradient that it is made for, as torch does.
      label: its name and that of its rule, in messages.
    """

    start: float | str | Callable[..., torch.Tensor | None]
    dtype: torch.dtype | str | None
    per_leaf: bool
    square: bool = False
    shape: Shape | None = None
    evaluate: bool = False
    per_tree: bool = False
    as_gradient: bool = False
    label: str = field(default="a slot", compare=False, repr=False)

    @property
    def like_leaf(self) -> bool:
        """Whether it is declared to have a number for each element of its leaf."""
        return not self.per_leaf and self.shape is None and not callable(self.start)

    @cached_property
    def shape_hypers(self) -> tuple[str, ...]:
        """The hyper-parameters that its shape, or the tensor that it starts as, depends on."""
        function = self.start if callable(self.start) else self.shape
        return () if function is None else tuple(inspect.signature(function).parameters)[1:]

    @property
    def may_lack(self) -> bool:
        """Whether some leaves may have no entry."""
        return self.shape is not None or callable(self.start)

    def _from_function(self, function: Callable[..., Any], p: torch.Tensor, hypers: Mapping[str, Any]) -> Any:
        """The result of the function of a caller for one leaf."""
        try:
            return function(p, **{name: hypers[name] for name in self.shape_hypers})
        except Exception as error:
            error.add_note(f"in the function of {self.label}, for a leaf of shape {tuple(p.shape)}")
            raise

    def _own_shape(self, p: torch.Tensor, hypers: Mapping[str, Any]) -> tuple[int, ...] | None:
        """The shape that the function `shape` has for a leaf; None if it has no entry there.

        Raises:
          TypeError: the result is no shape.
        """
        assert self.shape is not None
        found: Any = self._from_function(self.shape, p, hypers)
        try:
            if isinstance(found, (str, bytes)):  # they have whole numbers, too
                raise TypeError
            return None if found is None else tuple(map(_size, found))
        except TypeError:
            raise TypeError(
                f"the shape of {self.label} is {found!r:.60} for a leaf of shape {tuple(p.shape)}, expected a tuple of "
                f"sizes, or None for a leaf that has no such entry."
            ) from None

    def _own_start(self, p: torch.Tensor, hypers: Mapping[str, Any]) -> torch.Tensor | None:
        """The tensor that the function `start` makes for a leaf.

        Raises:
          TypeError: the result is no tensor.
          ValueError: parameters to evaluate at would have another shape than the leaf.
        """
        assert callable(self.start)
        found = self._from_function(self.start, p, hypers)
        if found is not None and not isinstance(found, torch.Tensor):
            raise TypeError(
                f"the start of {self.label} is {found!r:.60} for a leaf of shape {tuple(p.shape)}, expected a tensor, "
                f"or None for a leaf that has no such entry."
            )
        if self.evaluate and found is not None and found.shape != p.shape:
            raise ValueError(
                f"{self.label} holds the parameters to evaluate at, but it starts with the shape {tuple(found.shape)} "
                f"for a leaf of shape {tuple(p.shape)}; give it that of the leaf."
            )
        return found

    def shape_for(self, p: torch.Tensor, hypers: Mapping[str, Any]) -> tuple[int, ...] | None:
        """The shape that it has for a leaf; None if it has no entry there."""
        if self.per_leaf:
            return ()
        if self.shape is not None:
            return self._own_shape(p, hypers)
        if callable(self.start):
            made = self._own_start(p, hypers)
            return None if made is None else tuple(made.shape)
        return tuple(p.shape)

    def declared_dtype(self, hypers: Mapping[str, Any]) -> torch.dtype | None:
        """The dtype that the rule or its caller asks for, if one does."""
        return hypers.get(self.dtype) if isinstance(self.dtype, str) else self.dtype

    def stored_as(
        self, p: torch.Tensor, hypers: Mapping[str, Any], gradient: torch.dtype | None = None
    ) -> torch.dtype | None:
        """The dtype that is asked for, or that squares need; None if it is the default one.

        Args:
          p: the parameter.
          hypers: the hyper-parameters of the rule.
          gradient: the dtype of its gradient, in an optimizer.
        """
        dtype = self.declared_dtype(hypers)
        if dtype is None and self.as_gradient:
            return gradient
        return torch.float32 if dtype is None and self.square and p.dtype is torch.float16 else dtype

    def make(
        self, p: torch.Tensor, hypers: Mapping[str, Any], gradient: torch.dtype | None = None
    ) -> torch.Tensor | None:
        """The slot's first value for one leaf; None if it has no entry there. For the arguments see `stored_as`."""
        dtype = self.stored_as(p, hypers, gradient)
        if callable(self.start):
            made = self._own_start(p, hypers)
            return None if made is None else made.to(dtype=dtype or p.dtype, device=p.device, copy=True)
        if self.start == "param":
            return p.to(dtype or p.dtype, copy=True)
        start = hypers.get(self.start, 0.0) if isinstance(self.start, str) else self.start
        if isinstance(start, torch.Tensor):  # zeros are added, so that autograd and `torch.func` follow it
            made = self._filled(p, 0.0, dtype, hypers)
            number = start.reshape(()) * (1 + 1j) if p.is_complex() else start.reshape(())
            return None if made is None else made + number.to(made)
        return self._filled(p, float(start), dtype, hypers)

    def _filled(
        self, p: torch.Tensor, start: float, dtype: torch.dtype | None, hypers: Mapping[str, Any]
    ) -> torch.Tensor | None:
        """A tensor of its shape for one leaf, full of a number; None if it has no entry there."""
        if self.per_leaf:
            wide = torch.float64 if p.dtype is torch.float64 else torch.float32
            return torch.full((), start, dtype=dtype or wide, device=p.device)
        if self.shape is not None:
            shape = self._own_shape(p, hypers)
            return None if shape is None else torch.full(shape, start, dtype=dtype or p.dtype, device=p.device)
        # a complex parameter is a pair of real ones, which both start there
        first = complex(start, start) if p.is_complex() else start
        return torch.full_like(p, first, dtype=dtype or p.dtype, requires_grad=False)

    def make_shared(self, leaves: Sequence[torch.Tensor], hypers: Mapping[str, Any]) -> torch.Tensor:
        """The first value of a number that leaves share: on the device of the first, in the widest dtype of all."""
        like = next((p for p in leaves if p.dtype is torch.float64), leaves[0] if leaves else torch.empty(()))
        made = self.make(like, hypers)
        assert made is not None, "a number has no shape of its own"
        return made.to(leaves[0].device if leaves else "cpu")


def _size(n: Any) -> Any:
    """The number of entries of a dimension.

    Raises:
      TypeError: the object is none.
    """
    if isinstance(n, torch.SymInt):
        return n
    size = -1 if isinstance(n, bool) else operator.index(n)
    if size < 0:
        raise TypeError
    return size


def slot(
    start: float | str | Callable[..., torch.Tensor | None] = 0.0,
    *,
    dtype: torch.dtype | str | None = None,
    per: Literal["element", "leaf", "tree"] = "element",
    square: bool = False,
    shape: Shape | None = None,
    evaluate: bool = False,
) -> Slot:
    """Declares a slot of state.

    Args:
      start: its value before the first update: a number, the name of the hyper-parameter that holds one, a copy of
        the parameter (`"param"`), or the update that reaches the rule at its first step (`"first_update"`). In a
        `leafwise` rule also a function of the parameter that returns a tensor, such as
        `lambda p: torch.eye(p.shape[0])`, or None for a parameter that has no such entry.
      dtype: how it is stored: a dtype, or the name of the hyper-parameter that holds one. By default as the
        parameter is, or as float32 (float64 for float64 parameters) where there is one number per leaf or tree.
      per: one number per element of a leaf, one per leaf, or one for the tree of all leaves that the rule sees.
      square: whether it holds squares, of which float16 has too few: the square of 1e-4 is 0. Then it is stored as
        float32 where the parameter is float16, unless `dtype` says otherwise.
      shape: in a `leafwise` rule, the shape as a function of the parameter, such as `lambda p: p.shape[:1]`; None
        where a parameter has no such entry, of which the rule is then given None. Further arguments of this function,
        and of `start`, are hyper-parameters of those names, which have to be static.
      evaluate: whether it holds the parameters to evaluate a model at, such as an average of those that are trained:
        `eval_params` and `averaged_params` of optimizers find it by this mark.

    Returns:
      The declaration.

    Raises:
      ValueError: one number per leaf or tree cannot start as a tensor, have a shape, or be parameters.
      TypeError: an argument is of another kind.

    Example:
      >>> slot(1.0, per="leaf").make(torch.zeros(3), {})
      tensor(1.)
    """
    square, evaluate = checked_switch("square", "slot", square), checked_switch("evaluate", "slot", evaluate)
    if not isinstance(per, str) or per not in ("element", "leaf", "tree"):
        raise ValueError(f'`per` must be "element", "leaf" or "tree", got {per!r}.')
    start = plain_number(start)
    for name, value, kinds, expected in (
        ("start", start, (int, float, str), "a number, a name or a function of the parameter"),
        ("dtype", dtype, (torch.dtype, str, type(None)), "a dtype of torch, the name of a hyper-parameter, or None"),
        ("shape", shape, (type(None),), "a function of the parameter, or None"),
    ):
        function = callable(value) and name != "dtype"
        if not (isinstance(value, kinds) or function) or isinstance(value, bool):
            raise TypeError(f"`{name}` of slot is {value!r:.60}, expected {expected}.")
    if per != "element" and (callable(start) or start in ("param", "first_update")):
        raise ValueError(f"a slot with one number per {per} starts from a number, got start={start!r}.")
    if shape is not None and (per != "element" or not isinstance(start, (int, float))):
        raise ValueError(f"a slot with a shape of its own starts from a number per element, got {start=!r}, {per=!r}.")
    if evaluate and per != "element":
        raise ValueError(f"a slot to evaluate at holds parameters, one number per element, got per={per!r}.")
    if evaluate and shape is not None:
        raise ValueError("a slot to evaluate at holds parameters, so it has the shape of its leaf; leave out `shape`.")
    return Slot(start, dtype, per != "element", square, shape, evaluate, per == "tree")


STORED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_slot_dtype(name: str, dtype: torch.dtype) -> None:
    """Refuses a dtype that slots of `elementwise` rules cannot have.

    Raises:
      TypeError: with what has it, and the dtype.
    """
    if dtype not in STORED:
        raise TypeError(
            f"{name} is stored as float32, float64, bfloat16 or float16, got {dtype}. Slots of `leafwise` rules "
            f"have any dtype."
        )


zeros = slot(0.0)
