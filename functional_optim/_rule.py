"""`elementwise` and `leafwise`: a formula for one element, or for one tensor, becomes a transformation."""

import inspect
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, overload

import torch

from ._compiler.arguments import checked_function, checked_switch, plain_number
from ._compiler.rule import Range, Rule
from ._compiler.slots import Slot, check_slot_dtype
from ._fusible import RuleFactory, WrappingFactory


RESERVED = {
    "updates",
    "state",
    "params",
    "grads",
    "tx",
    "donate",
    "closure",
    "step",
    "first",
    "grad_scale",
    "found_inf",
}


@overload
def elementwise(fn: Callable[..., Any]) -> RuleFactory: ...


@overload
def elementwise(
    fn: None = None,
    *,
    state: Mapping[str, Slot] | None = None,
    extra: Sequence[str] | Mapping[str, str] = (),
    static: Sequence[str] = (),
    ranges: Mapping[str, str | Sequence[Any]] | None = None,
    final: bool = False,
) -> Callable[[Callable[..., Any]], RuleFactory]: ...


def elementwise(
    fn: Callable[..., Any] | None = None,
    *,
    state: Mapping[str, Slot] | None = None,
    extra: Sequence[str] | Mapping[str, str] = (),
    static: Sequence[str] = (),
    ranges: Mapping[str, str | Sequence[Any]] | None = None,
    final: bool = False,
) -> RuleFactory | Callable[[Callable[..., Any]], RuleFactory]:
    """Turns the formula for one leaf into a function of hyper-parameters that returns a transformation.

    The formula takes the incoming update `u`, then `p` if it wants the parameter, then its slots of state by name,
    and keyword-only: `step` (1 at the first update) and `first` (whether it is the first) if it wants them, extra
    arguments, and hyper-parameters, whose defaults become the function's. It returns the new update, followed by the
    new value of every slot. A formula that computes the new parameter itself returns `new - p`, which rounds no
    more than `new` does. It is plain torch: operators, functions, and the reductions `leaf_sum`, `leaf_mean`,
    `leaf_norm`, `leaf_amax`, `leaf_size`, `tree_sum`, `tree_norm`, `tree_amax`. A hyper-parameter may be a number, a
    0-d tensor or a schedule. Another rule may call it as `formula`.

    A formula that takes `before`, right behind `u`, goes around an inner transformation, the first argument of its
    function: `u` is the update that left that, and `before` the one that entered it. The state is a pair, of the inner
    one and its own.

    Args:
      fn: the formula, when used without parentheses.
      state: slots of state, in the order of the formula's arguments; see `slot`.
      extra: extra arguments of `update` that the formula takes. `("value",)` are numbers or 0-d tensors;
        `{"value": "number", "hessian": "element"}` says of each whether it is one, or a tree like the parameters.
      static: hyper-parameters that are switches, for Python's `if`; each value makes a kernel of its own. Those
        whose value is None, a bool, a string or a dtype need not be named.
      ranges: intervals that hyper-parameters must lie in, such as `{"b1": "[0, 1)"}`, or the values that they may
        have, such as `{"mode": ("hard", "smooth")}`. `{"decay if debias": "[0, 1)"}` holds where a switch is on. One
        with an interval is a number, or None if that is its default; `"[-inf, inf]"` is for any number.
      final: whether it needs updates as they will be added to the parameters; `chain` warns if more comes behind it.

    Returns:
      The function of hyper-parameters.

    Raises:
      TypeError: the formula's arguments are not as described.

    Example:
      >>> import functional_optim as fo, torch
      >>> @fo.elementwise(state={"mu": fo.slot(0.0)}, ranges={"decay": "[0, 1)"})
      ... def momentum(u, mu, *, decay=0.9):
      ...     mu = decay * mu + u
      ...     return mu, mu
      >>> tx = momentum(decay=0.5)
      >>> tx
      momentum(decay=0.5)
      >>> state = tx.init(torch.zeros(2))
      >>> updates, state = tx.update(torch.ones(2), state)
      >>> updates, state = tx.update(torch.ones(2), state)
      >>> updates
      tensor([1.5000, 1.5000])
    """

    def make(fn: Callable[..., Any]) -> RuleFactory:
        return _make("elementwise", fn, state, extra, static, ranges, final)

    return make if fn is None else make(fn)


@overload
def leafwise(fn: Callable[..., Any]) -> RuleFactory: ...


@overload
def leafwise(
    fn: None = None,
    *,
    state: Mapping[str, Slot] | None = None,
    extra: Sequence[str] = (),
    static: Sequence[str] = (),
    ranges: Mapping[str, str | Sequence[Any]] | None = None,
    final: bool = False,
    batched: bool = False,
    stacked_up_to: int | None = None,
) -> Callable[[Callable[..., Any]], RuleFactory]: ...


def leafwise(
    fn: Callable[..., Any] | None = None,
    *,
    state: Mapping[str, Slot] | None = None,
    extra: Sequence[str] = (),
    static: Sequence[str] = (),
    ranges: Mapping[str, str | Sequence[Any]] | None = None,
    final: bool = False,
    batched: bool = False,
    stacked_up_to: int | None = None,
) -> RuleFactory | Callable[[Callable[..., Any]], RuleFactory]:
    """Turns a function of one whole tensor, in any torch operations, into a function that makes transformations.

    The function has the arguments of an `elementwise` formula: the incoming update `u`, `p` if it wants the parameter,
    its slots by name, and keyword-only `step`, `first`, extra arguments and hyper-parameters. Here they are whole
    tensors: `u` has the shape of its leaf, slots have shapes of their own, `step` and `first` are 0-d tensors, and
    numbers are Python's or 0-d tensors. `u`, `p` and slots without a `dtype` arrive in the widest of their dtypes, so
    for float32 parameters with bfloat16 gradients a function of `u` alone computes in bfloat16. It returns the new
    update, which has the shape of `u`, followed by the new value of every slot; results are stored in the dtypes of `u`
    and of the slots, whatever floating dtype they were computed in. Arguments are not to be changed in place.

    Leaves of one shape and dtype with the same hyper-parameters are computed together, by `torch.func.vmap`: one
    `bmm` takes the place of many `mm`. Where a function cannot be batched, for instance because Python asks for the
    value of a tensor, it is called leaf by leaf. Leaves without a gradient and leaves that a mask leaves out are not
    passed to it.

    Args:
      fn: the function, when used without parentheses.
      state: slots of state, in the order of the function's arguments; see `slot`, whose `shape` is for these rules.
      extra: extra arguments of `update` that it takes.
      static: hyper-parameters that Python needs to know, such as a number of iterations; neither tensors nor schedules.
      ranges: intervals that hyper-parameters must lie in, or the values that they may have, as in `elementwise`.
      final: whether it needs updates as they will be added to the parameters.
      batched: whether the function takes stacks itself: `u`, `p` and slots then have one dimension more, the first,
        over the leaves of one shape, and so have its results.
      stacked_up_to: the most elements of leaves that are computed together, of which copies are made; larger ones are
        computed one by one. None: all are, as products of matrices gain from it. A rule that reads a leaf once or twice
        would spend as much on the copy.

    Returns:
      The function of hyper-parameters.

    Raises:
      TypeError: the function's arguments are not as described.

    Example:
      >>> import functional_optim as fo, torch
      >>> @fo.leafwise(state={"left": fo.slot(shape=lambda p: (p.shape[0], p.shape[0]))})
      ... def precondition(u, left, *, decay=0.9, eps=1e-6):
      ...     left = decay * left + u @ u.T
      ...     values, vectors = torch.linalg.eigh(left)
      ...     return vectors @ (vectors.T @ u / (values.clamp(min=0) + eps).sqrt()[:, None]), left
      >>> tx = fo.chain(precondition(decay=0.5), fo.scale(-0.1))
      >>> params = {"w": torch.zeros(2, 3)}
      >>> updates, state = tx.update({"w": torch.eye(2, 3)}, tx.init(params))
      >>> updates["w"]
      tensor([[-0.1000, -0.0000, -0.0000],
              [-0.0000, -0.1000, -0.0000]])
    """

    def make(fn: Callable[..., Any]) -> RuleFactory:
        return _make("leafwise", fn, state, extra, static, ranges, final, True, batched, stacked_up_to)

    return make if fn is None else make(fn)


def _misnamed(positional: Sequence[str], slots: Mapping[str, Slot]) -> str:
    """A hint at the argument that has the place of `u` or `p` and another name."""
    if positional and positional[0] not in ("u", "p", *slots):
        return f" Call the update `u`, not `{positional[0]}`."
    if positional[:1] == ["u"] and len(positional) > 1 and positional[1] not in ("p", *slots):
        other = positional[1]
        return (
            f" If `{other}` is the parameter, call it `p`; if it is a slot, declare it: "
            f"`state={{{other!r}: fo.zeros}}`; if it is a hyper-parameter, put it behind the `*`."
        )
    return ""


def _make(
    maker: str,
    fn: Callable[..., Any],
    state: Mapping[str, Slot] | None,
    extra: Sequence[str] | Mapping[str, str],
    static: Sequence[str],
    ranges: Mapping[str, str | Sequence[Any]] | None,
    final: bool,
    whole: bool = False,
    batched: bool = False,
    stacked_up_to: int | None = None,
) -> RuleFactory:
    checked_function("fn", maker, fn, "the formula")
    if not hasattr(fn, "__qualname__"):
        raise TypeError(
            f"`fn` of {maker} is {fn!r:.60}, which has no name for states and pickles to find it by; write the "
            f"formula with `def`, with what it fixes as defaults."
        )
    name = fn.__name__.lstrip("_")
    slots, ranges = dict(_by_name("state", name, state)), _by_name("ranges", name, ranges)
    for argument, given in (("extra", extra), ("static", static)):
        _check_names(argument, name, given)
    final, batched = checked_switch("final", maker, final), checked_switch("batched", maker, batched)
    stacked_up_to = plain_number(stacked_up_to)
    if not (stacked_up_to is None or (isinstance(stacked_up_to, int) and not isinstance(stacked_up_to, bool))):
        raise TypeError(f"`stacked_up_to` of {name} is {stacked_up_to!r:.60}, expected a number of elements, or None.")
    for slot_name, declared in slots.items():
        if not isinstance(declared, Slot):
            start = f"fo.slot({declared!r})" if isinstance(declared, (int, float)) else "fo.zeros"
            raise TypeError(
                f"the slot `{slot_name}` of {name} is declared as {declared!r:.60}, expected what `slot` returns: "
                f"`state={{{slot_name!r}: {start}}}`."
            )
    kinds = dict(extra) if isinstance(extra, Mapping) else dict.fromkeys(extra, "number")
    _check_extra(name, kinds)
    parameters = inspect.signature(fn).parameters
    wraps = "before" in parameters and "before" not in slots
    positional = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY)]
    keywords = {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    uses_params = "p" in positional
    expected = ["u", *(["before"] if wraps else []), *(["p"] if uses_params else []), *slots]
    if positional != expected or len(positional) + len(keywords) != len(parameters):
        raise TypeError(
            f"{name} takes ({', '.join(parameters)}), expected ({', '.join(expected)}, *, ...): the update `u`, "
            f"{'`before`, ' if wraps else ''}`p` if it wants the parameter, the slots of state in order, and the rest "
            f"keyword-only."
            f"{_misnamed([k for k in positional if k in slots or k != 'before'], slots)}"
        )
    hypers = {k: v for k, v in keywords.items() if k not in ("step", "first", *kinds)}
    ranged = [name for key in ranges for name in key.split(" if ", 1)]
    for argument, names in (("extra", kinds), ("static", static), ("ranges", ranged)):
        unknown = [k for k in names if k not in (keywords if argument == "extra" else hypers)]
        if unknown:
            raise TypeError(f"`{argument}` of {name} names {unknown}, which are not among its keyword-only arguments.")
    _check_slots(name, slots, hypers, static, whole)
    trees = [k for k, kind in kinds.items() if kind == "element"]
    trees += [slot_name for slot_name, slot in slots.items() if slot.per_tree]
    if whole and trees:
        raise TypeError(
            f"`{trees[0]}` of {name} is declared per element or per tree, but the rule is called for some leaves at a "
            f"time; declare an `elementwise` rule."
        )
    if wraps and (whole or "inner" in hypers):
        raise TypeError(
            f"{name} takes `before`, so it goes around an inner transformation, "
            + ("which `leafwise` rules cannot." if whole else "which is its argument `inner`; rename the other one.")
        )
    if (slots or "step" in keywords) and not name.isidentifier():
        raise TypeError(f"{name} keeps a state, whose class is named after the rule; write it with `def`.")
    rule = Rule(
        name=name,
        fn=fn,
        slots={k: replace(slot, label=f"the slot `{k}` of {name}") for k, slot in slots.items()},
        hypers=hypers,
        extras=tuple(k for k, kind in kinds.items() if kind == "number"),
        tree_extras=tuple(k for k, kind in kinds.items() if kind == "element"),
        static=frozenset(static),
        ranges={k: _range(k, name, v) for k, v in ranges.items()},
        uses_params=uses_params,
        uses_step="step" in keywords,
        takes_first="first" in keywords,
        final=final,
        whole=whole,
        batched=batched,
        stacked_up_to=stacked_up_to,
        wraps=wraps,
    )
    rule.check_defaults()
    return (WrappingFactory if wraps else RuleFactory)(rule)


def _by_name(argument: str, rule: str, given: Any) -> Mapping[str, Any]:
    """An argument of a rule that is a mapping from names, empty where it is None.

    Raises:
      TypeError: with the argument, the name of the rule and the value.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(k, str) for k in given):
        example = '{"mu": fo.zeros}' if argument == "state" else '{"decay": "[0, 1)"}'
        raise TypeError(f"`{argument}` of {rule} is {given!r:.60}, expected a dict by name, such as {example}.")
    return given


def _check_names(argument: str, rule: str, given: Any) -> None:
    """Refuses an argument of a rule that holds no names.

    Raises:
      TypeError: with the argument, the name of the rule and the value.
    """
    many = isinstance(given, (Sequence, Set, Mapping)) and not isinstance(given, (str, bytes))
    if not many or not all(isinstance(k, str) for k in given):
        raise TypeError(f'`{argument}` of {rule} is {given!r:.60}, expected a list of names, such as ["value"].')


def _range(hyper: str, rule: str, allowed: Any) -> Range | tuple[Any, ...]:
    """An interval, or the values that a hyper-parameter may have.

    Raises:
      TypeError, ValueError: with the hyper-parameter, the name of the rule and the value.
    """
    if isinstance(allowed, str):
        try:
            return Range.parse(allowed)
        except ValueError as error:
            raise ValueError(f"`ranges` of {rule} at {hyper!r}: {error}") from None
    if not isinstance(allowed, (Sequence, Set)) or isinstance(allowed, bytes):
        raise TypeError(
            f'`ranges` of {rule} at {hyper!r} is {allowed!r:.60}, expected an interval, such as "[0, 1)", or a list of '
            f"values."
        )
    return tuple(allowed)


def _check_slots(
    name: str, slots: Mapping[str, Slot], hypers: Mapping[str, Any], static: Sequence[str], whole: bool
) -> None:
    """Refuses slots that a rule cannot have.

    Args:
      name: the name of the rule.
      slots: its slots, by name.
      hypers: its hyper-parameters, with their defaults.
      static: hyper-parameters that are switches.
      whole: whether it is a rule for whole tensors.

    Raises:
      TypeError: with the name of the rule and the slot.
    """
    unfit = next((k for k in slots if k == "count" or k.startswith("_") or not k.isidentifier()), None)
    if unfit is not None:
        raise TypeError(
            f"the slot `{unfit}` of {name} is a field of its state, beside the counter `count`; choose a name that is "
            f"another one, and begins with a letter."
        )
    for slot_name, slot in slots.items():
        for field, source in (("dtype", slot.dtype), ("start", slot.start)):
            if isinstance(source, str) and source not in (*hypers, "param", "first_update"):
                starts = ' A slot may also start as "param" or "first_update".' if field == "start" else ""
                raise TypeError(
                    f"the slot `{slot_name}` of {name} takes its {field} from `{source}`, which is no argument.{starts}"
                )
        unknown = [k for k in slot.shape_hypers if k not in hypers or k not in static]
        if unknown:
            raise TypeError(
                f"the shape of the slot `{slot_name}` of {name} depends on {unknown}, which are no static "
                f"hyper-parameters."
            )
        if not whole and isinstance(slot.dtype, torch.dtype):
            check_slot_dtype(f"the slot `{slot_name}` of {name}", slot.dtype)
        if not whole and not (slot.like_leaf or slot.per_leaf):
            raise TypeError(
                f"the slot `{slot_name}` of {name} has a shape of its own, but the formula is one for an element; "
                f"declare a rule for whole tensors with `leafwise`."
            )


def _check_extra(name: str, kinds: Mapping[str, str]) -> None:
    """Refuses extra arguments of a kind or a name that there is not.

    Raises:
      TypeError, ValueError: with the name of the rule and the argument.
    """
    for extra, kind in kinds.items():
        if kind not in ("number", "element"):
            raise ValueError(
                f'the extra argument `{extra}` of {name} is "number" or "element", one number per element of the '
                f"parameters, got {kind!r}."
            )
        if extra in RESERVED:
            raise TypeError(f"`{extra}` of {name} is no name for an extra argument: functions of a step have it.")
