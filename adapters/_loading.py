"""Loading the state of an optimizer: matching parameters, refusing misfits, casting, distributing."""

import numbers
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.parameter import is_lazy

from functional_optim import _walk
from functional_optim._compiler.arguments import checked_switch
from functional_optim._compiler.rule import Option
from functional_optim._compiler.slots import Slot
from functional_optim._opaque import Kind
from functional_optim._params.layout import ChainLayout
from functional_optim._params.template import ParamList, Template, gradient_dtype, slots_of, view_of
from functional_optim._runtime.checks import check_stored
from functional_optim._runtime.shard import loaded_like
from functional_optim._warn import warn

from ._naming import FLAGS, names_of


if TYPE_CHECKING:
    from .optimizer import ChainOptimizer


def check_state_dict(state_dict: Any) -> None:
    """Refuses anything that is no state dict.

    Raises:
      TypeError: with its class and value.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"`state_dict` of load_state_dict is {_show(state_dict)}, expected what `optimizer.state_dict()` returns."
        )


def load(optimizer: "ChainOptimizer", state_dict: dict[str, Any], by_name: bool, strict: bool) -> None:
    """Loads a state; see `ChainOptimizer.load_state_dict`."""
    by_name, strict = (
        checked_switch(name, "load_state_dict", x) for name, x in (("by_name", by_name), ("strict", strict))
    )
    check_state_dict(state_dict)
    if not (strict or by_name):
        raise ValueError("strict=False is about names that are missing, so it needs by_name=True.")
    state_dict = copy(state_dict)
    for before in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = before(optimizer, state_dict)
        if changed is not None:
            state_dict = changed
    states, saved = parts_of(state_dict)
    live = optimizer.param_groups
    if by_name:
        id_map, saved = _match_names(live, saved, strict)
    else:
        id_map = _match_positions(live, saved)
    groups = [_group(optimizer, old, new) for old, new in zip(live, saved, strict=True)]
    unused = [optimizer._unused_options(g, old, new) for g, (old, new) in enumerate(zip(live, groups, strict=True))]
    names = names_of(groups)
    slots = _slots(optimizer, groups, names, opaque=bool(states))
    given = {id_map[k]: v for k, v in states.items() if k in id_map}
    state: defaultdict[Any, Any] = defaultdict(dict)
    unknown: list[str] = []
    read: list[tuple[Mapping[Any, Any], dict[Any, Any]]] = []
    counter = optimizer._counter_dtype()
    of_tree = _OfTree.of(states, slots)
    for p, name, own in zip((p for group in groups for p in group["params"]), names, slots, strict=True):
        if p in given:
            saved_state = _densified(given[p]) if optimizer.SPARSE_SLOTS else given[p]
            made = _state(saved_state, p, name, own, counter, of_tree)
            unknown += _unknown(saved_state, name, own)
            read.append((saved_state, made))
            if made or optimizer.EMPTY_STATES:
                state[p] = made
    for k, v in states.items():  # entries of no parameter are kept, as torch keeps them
        if k not in id_map and not by_name:
            state[k] = deepcopy(v)
    # entries that are None in the file and start anew; torch's classes look for numbers, which were no tensors once
    anew = [(made, key) for saved_state, made in read for key in saved_state if key not in made]
    for made, key in anew:
        made[key] = torch.zeros(())
    held = {key: optimizer.__dict__[key] for key in ("state", "param_groups")}
    try:
        optimizer.__setstate__({"state": state, "param_groups": groups})
    except BaseException:
        optimizer.__dict__.update(held)
        raise
    for made, key in anew:
        made.pop(key, None)
    optimizer._bindings.hold(state)
    if unknown and "chain" in optimizer.defaults:
        more = f", and {len(unknown) - 1} more are like it" if len(unknown) > 1 else ""
        warn(f"the saved state of {unknown[0]}, which the chain does not know{more}; it is kept.")
    for message in filter(None, dict.fromkeys(unused)):
        warn(message)
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)


def parts_of(state_dict: Mapping[str, Any]) -> tuple[Mapping[Any, Any], list[dict[str, Any]]]:
    """The states and a copy of the groups of a state dict, which are found to be of the right form."""
    lacking = [key for key in ("state", "param_groups") if key not in state_dict]
    if lacking:
        raise KeyError(
            f"the state dict lacks {' and '.join(map(repr, lacking))}; it has "
            f"{', '.join(map(repr, list(state_dict)[:5])) or 'nothing'}, so no optimizer's `state_dict()` made it."
        )
    states, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(states, Mapping):
        raise ValueError(f"'state' of the state dict is {_show(states)}, expected a dict.")
    if not isinstance(groups, Sequence) or isinstance(groups, str):
        raise ValueError(f"'param_groups' of the state dict is {_show(groups)}, expected a list.")
    for g, group in enumerate(groups):
        where = f"param_groups[{g}] of the state dict"
        if not isinstance(group, dict) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(f"{where} is {_show(group)}, expected a dict with a list of numbers at 'params'.")
        if not all(isinstance(key, Hashable) for key in group["params"]):
            raise ValueError(f"'params' of {where} holds something that is no number of a parameter.")
        names = group.get("param_names")
        if names is not None and (
            not isinstance(names, (list, tuple))
            or len(names) != len(group["params"])
            or not all(isinstance(name, str) for name in names)
        ):
            raise ValueError(f"'param_names' of {where} is {_show(names)}, expected a name for each parameter.")
    own = deepcopy(list(groups))
    return states, [{k: v for k, v in group.items() if not (k == "param_names" and v is None)} for group in own]


def _group(optimizer: "ChainOptimizer", old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A parameter group with the options of a file, and its own parameters, names and chain.

    Names of a file are taken over where there are none and no mask can ask for them, as torch does.
    """
    chain = optimizer.defaults.get("chain")
    if chain is not None and new.get("chain", chain) != chain:
        raise ValueError(f"the state was saved by another chain: {_first_difference(str(new['chain']), chain)}.")
    # a file written before an option was there leaves it as it is
    group = {**{k: old[k] for k in optimizer.defaults if k in old and k not in new}, **new, "params": old["params"]}
    names = old.get("param_names") or (new.get("param_names") if chain is None else None)
    group.pop("param_names", None)
    if names is not None:
        group["param_names"] = names
    if chain is not None:
        group["chain"] = chain
    return group


def _first_difference(saved: str, own: str) -> str:
    """The first transformation in which two chains differ, and its neighbours in both."""
    both = [chain.split(" > ") if chain else [] for chain in (saved, own)]
    k = next((k for k, (x, y) in enumerate(zip(*both, strict=False)) if x != y), min(map(len, both)))
    theirs, ours = (repr(names[k]) if k < len(names) else "missing" for names in both)
    start = "... > " if k > 2 else ""
    there, here = (
        start + " > ".join([*names[max(k - 2, 0) : k + 1], *["..."] * (len(names) > k + 1)]) for names in both
    )
    return f"transformation {k + 1} is {theirs} there, but {ours} here: {there!r} against {here!r}"


def _match_positions(live: list[dict[str, Any]], saved: list[dict[str, Any]]) -> dict[Any, Any]:
    if len(live) != len(saved):
        raise ValueError("loaded state dict has a different number of parameter groups")
    if any(len(a["params"]) != len(b["params"]) for a, b in zip(live, saved, strict=True)):
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
        )
    return {k: p for a, b in zip(live, saved, strict=True) for p, k in zip(a["params"], b["params"], strict=True)}


def _match_names(
    live: list[dict[str, Any]], saved: list[dict[str, Any]], strict: bool
) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """Matches parameters by name; a live group takes its options from the saved one that its parameters come from."""
    for owner, groups in (("this optimizer", live), ("the state dict", saved)):
        if any("param_names" not in g and g["params"] for g in groups):
            raise ValueError(f"by_name=True needs names, but {owner} has none: pass `model.named_parameters()`.")
        counts = Counter(name for group in groups for name in group.get("param_names", ()))
        repeated = next((name for name, count in counts.items() if count > 1), None)
        if repeated is not None:
            raise ValueError(f"by_name=True needs names that differ, but {owner} has {repeated!r} twice.")
    where = {
        name: (key, group)
        for group in saved
        for name, key in zip(group.get("param_names", ()), group["params"], strict=True)
    }
    missing = [name for group in live for name in group.get("param_names", ()) if name not in where]
    if missing and strict:
        raise ValueError(
            f"the state dict lacks the parameters {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; "
            f"with strict=False they start anew."
        )
    id_map, options = {}, []
    for group in live:
        sources: dict[int, Any] = {}
        for name, p in zip(group.get("param_names", ()), group["params"], strict=True):
            if name in where:
                key, source = where[name]
                id_map[key] = p
                sources[id(source)] = source
        chosen = next(iter(sources.values())) if len(sources) == 1 else group
        options.append({k: v for k, v in chosen.items() if k not in ("params", "param_names")})
    return id_map, options


class _OfTree(NamedTuple):
    """Entries of a file that are one for all parameters, of transformations that are not made of rules.

    Args:
      holders: by key, how many parameters have them: all that have taken a step, or one that may have taken none.
      copies: copies of them, by the id of the entry and the device.
    """

    holders: Counter[Any]
    copies: dict[tuple[int, torch.device], Any]

    @classmethod
    def of(cls, states: Mapping[Any, Any], slots: Sequence[Mapping[str, Any]]) -> "_OfTree":
        """Those of a file; `slots` are the entries that chains keep for each parameter."""
        keys = {key for own in slots for key, x in own.items() if isinstance(x, Kind) and x.of_tree}
        found = (key for own in states.values() if isinstance(own, Mapping) for key in own if key in keys)
        return cls(Counter(found), {})


def _slots(
    optimizer: "ChainOptimizer", groups: list[dict[str, Any]], names: list[str], opaque: bool
) -> list[dict[str, Any]]:
    """Entries that the chains of groups keep for each parameter, by key.

    They are a declaration and hyper-parameters, the `Kind` of an entry of a transformation that is not made of rules,
    if `opaque`, or None, for the counter of steps.
    """
    templates = [t for g, group in enumerate(groups) for t in [_template(optimizer, g, group)] * len(group["params"])]
    view = view_of(names, [p for group in groups for p in group["params"]])
    slots: list[dict[str, Any]] = [{} for _ in templates]
    for template in {id(t): t for t in templates}.values():
        own = [t is template for t in templates]
        found = slots_of(template, view.narrow(own))
        slots = [b if mine else a for a, b, mine in zip(slots, found, own, strict=True)]
    # `init` of a transformation makes nothing of parameters that have no shape yet
    if opaque and any(template.prefixes for template in templates) and not any(map(is_lazy, view.leaves)):
        unique = list({id(t): t for t in templates}.values())
        places = {id(t): k for k, t in enumerate(unique)}
        positions = [places[id(t)] for t in templates]
        tensors, owners = list(view.leaves), [g for g, group in enumerate(groups) for _ in group["params"]]
        layout = ChainLayout(unique, ParamList(names, tensors, positions, owners), False, warn=False)
        by_name = dict(zip(names, slots, strict=True))
        for split in layout.split_states().values():
            for entry, kind in split.kinds.items():
                for name in split.seen if entry[0] is None else (entry[0],):
                    by_name[name][split.keys[entry]] = kind
    return slots


def _template(optimizer: "ChainOptimizer", g: int, group: dict[str, Any]) -> Template:
    """The chain of a group, whose options are found to be numbers or flags where they have to be."""
    try:
        for flag in FLAGS & optimizer.defaults.keys():
            value = group.get(flag)
            if not (value is None or isinstance(value, (bool, int))):
                raise ValueError(f"{flag!r} is {_show(value)}, expected True, False or None.")
        template = optimizer._bindings.template_of(optimizer, group)
        for rule in _walk.rules(template.tx).values():
            for option in rule._bound.values.values():
                if isinstance(option, Option):
                    value = option.look_up(group)
                    one = isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex()
                    if not (one or isinstance(value, numbers.Real)):
                        raise ValueError(f"{option.name!r} is {_show(value)}, expected a number.")
                    check_entry(repr(option.name), "of the group", value, group["params"])
    except (TypeError, ValueError, LookupError, RuntimeError) as error:
        raise ValueError(f"the options of param_groups[{g}] of the state dict do not fit: {error}") from error
    return template


def _state(
    saved: Any, p: torch.Tensor, name: str, slots: Mapping[str, Any], counter: torch.dtype | None, of_tree: _OfTree
) -> dict[Any, Any]:
    """The state of one parameter, copied and cast."""
    if not isinstance(saved, Mapping):
        raise ValueError(f"the saved state of {name!r} is {_show(saved)}, expected a dict.")
    needed = [k for k, x in slots.items() if not (isinstance(x, Kind) and (k in of_tree.holders or not x.filled))]
    tensors = [k for k in needed if k != "step"]
    stepped = any(of_tree.holders.get(k) != 1 for k in saved)
    if stepped and tensors and not any(k in saved for k in tensors):
        raise ValueError(
            f"the saved state of {name!r} has {', '.join(map(repr, saved))}, expected "
            f"{', '.join(map(repr, tensors))}: another chain or other options made it."
        )
    lacking = [k for k in needed if k not in saved]
    if stepped and lacking:
        raise ValueError(
            f"the saved state of {name!r} lacks {', '.join(map(repr, lacking))}; it has "
            f"{', '.join(map(repr, saved))}, so another chain or other options made it."
        )
    made = {}
    for k, v in saved.items():
        check_entry(f"the saved {k!r}", f"at {name!r}", v, [p])
        if k == "step":
            made[k] = _counter(0 if v is None else v, p, name, counter)
        elif k not in slots:
            made[k] = _copy(v, p)
        elif isinstance(slots[k], Kind):
            made[k] = _entry(k, v, p, name, slots[k], of_tree)
        elif v is not None:  # a slot that is None starts anew, as in torch
            made[k] = _slot(k, v, p, name, *slots[k])
    return made


def _entry(key: str, value: Any, p: torch.Tensor, name: str, kind: Kind, of_tree: _OfTree) -> Any:
    """An entry of a transformation that is not made of rules."""
    number = isinstance(value, numbers.Real) and not kind.shape
    if not (isinstance(value, torch.Tensor) or number or value is None):
        expected = "a tensor" if kind.shape else "one number"
        raise ValueError(f"the saved {key!r} of {name!r} is {_show(value)}, expected {expected}.")
    if kind.of_tree:
        place = id(value), p.device
        if place not in of_tree.copies:
            of_tree.copies[place] = _copy(value, p)
        return of_tree.copies[place]
    # others may grow from step to step, and so may a list of one number
    like_parameter = kind.shape == tuple(p.shape) and p.numel() > 1
    if like_parameter and isinstance(value, torch.Tensor) and tuple(value.shape) != kind.shape:
        raise ValueError(
            f"the saved {key!r} of {name!r} has shape {tuple(value.shape)}, but the parameter has {tuple(p.shape)}."
        )
    return _copy(value, p)


def check_entry(name: str, place: str, value: Any, params: Sequence[torch.Tensor]) -> None:
    """Refuses tensors without elements in an entry of a state dict, for parameters that have some.

    Args:
      name: the entry, in messages.
      place: its place in the state dict, likewise.
      value: its value, which may be a nest of tensors.
      params: the parameters.

    Raises:
      ValueError: the storage of a tensor has been freed or cut, or it is on meta.
    """
    if isinstance(value, (dict, list, tuple)):
        for key, x in value.items() if isinstance(value, dict) else enumerate(value):
            check_entry(f"{name}[{key!r}]", place, x, params)
    elif isinstance(value, torch.Tensor):
        if value.layout is torch.strided:
            check_stored(f"{name} {place}", "", value)
        if value.is_meta and not all(p.is_meta for p in params):
            raise ValueError(
                f"{name} {place} is on meta, without elements, but the parameters have some; read the file with "
                f"`torch.load(path, map_location='cpu')`."
            )


def _unknown(saved: Mapping[Any, Any], name: str, slots: Mapping[str, Any]) -> list[str]:
    """A part of a warning of keys that the chain of a parameter does not know; none if there are none."""
    others = [k for k in saved if k not in slots and k != "step" and not str(k).startswith("transformation_")]
    return [f"{name!r} has {', '.join(map(repr, others))}"] if others else []


def _densified(saved: Any) -> Any:
    """The state of a parameter with dense tensors in the place of sparse ones."""
    if not isinstance(saved, Mapping):
        return saved
    return {k: v.to_dense() if isinstance(v, torch.Tensor) and v.is_sparse else v for k, v in saved.items()}


def _counter(value: Any, p: torch.Tensor, name: str, usual: torch.dtype | None) -> torch.Tensor | int:
    """A counter of steps, in the optimizer's dtype for it or a wider one; half types stop counting at 256.

    Where the dtype is None, it is one of Python's integers.
    """
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex() or value.layout is not torch.strided:
            raise ValueError(
                f"the saved 'step' of {name!r} has shape {tuple(value.shape)} and dtype {value.dtype}, expected one "
                f"number."
            )
        one = loaded_like(value.detach(), None).reshape(())
        if usual is None:
            return int(one)
        dtype = torch.float64 if one.dtype is torch.float64 else usual
        return one.to(dtype=dtype, device=p.device, copy=True)
    if not isinstance(value, numbers.Real):
        raise ValueError(f"the saved 'step' of {name!r} is {_show(value)}, expected one number.")
    return int(float(value)) if usual is None else torch.tensor(float(value), dtype=usual, device=p.device)


def _slot(key: str, value: Any, p: torch.Tensor, name: str, declared: Slot, hypers: Mapping[str, Any]) -> torch.Tensor:
    """A slot, in the dtype that the chain declares, on the device of its parameter and distributed as that is."""
    dtype = declared.stored_as(p, hypers, gradient_dtype(p))
    wide = torch.float64 if p.dtype is torch.float64 else torch.float32
    if not isinstance(value, torch.Tensor):
        if not (declared.per_leaf and isinstance(value, numbers.Real)):
            raise ValueError(f"the saved {key!r} of {name!r} is {_show(value)}, expected a tensor.")
        return torch.tensor(float(value), dtype=dtype or wide, device=p.device)
    if value.layout is not torch.strided:
        raise ValueError(f"the saved {key!r} of {name!r} is sparse ({value.layout}), expected a dense tensor.")
    fits = value.numel() == 1 if declared.per_leaf else tuple(value.shape) == declared.shape_for(p, hypers)
    if not fits:
        expected = (
            f"the parameter has {tuple(p.shape)}" if declared.like_leaf else f"it has {declared.shape_for(p, hypers)}"
        )
        raise ValueError(
            f"the saved {key!r} of {name!r} has shape {tuple(value.shape)}, but "
            f"{'it is one number' if declared.per_leaf else expected}."
        )
    if not declared.like_leaf and not declared.per_leaf:
        return value.detach().to(dtype=dtype or p.dtype, device=p.device, copy=True)
    numbers_of_its_own = dtype is not None and not dtype.is_floating_point  # bits or counts of a rule for whole tensors
    if numbers_of_its_own and value.dtype != dtype:
        raise ValueError(f"the saved {key!r} of {name!r} has dtype {value.dtype}, but the chain keeps it as {dtype}.")
    if not numbers_of_its_own and (
        value.is_complex() != (p.is_complex() and not declared.per_leaf)
        or not (value.is_floating_point() or value.is_complex() or declared.per_leaf)  # numbers of leaves may be whole
    ):
        raise ValueError(f"the saved {key!r} of {name!r} has dtype {value.dtype}, but the parameter has {p.dtype}.")
    if declared.per_leaf:
        one = loaded_like(value.detach(), None).reshape(())
        usual = one.dtype if one.is_floating_point() else wide
        return one.to(dtype=dtype or usual, device=p.device, copy=True)
    return loaded_like(value.detach(), p).to(dtype=dtype or p.dtype, device=p.device, copy=True)


def _copy(value: Any, p: torch.Tensor) -> Any:
    """A copy of an entry that no rule knows; a tensor goes to the device of the parameter."""
    if isinstance(value, torch.Tensor):
        placed = loaded_like(value.detach(), p) if value.shape == p.shape else value.detach()
        return placed.to(device=p.device, copy=True)
    if isinstance(value, dict):
        return {k: _copy(v, p) for k, v in value.items()}
    return deepcopy(value)


def _show(x: Any) -> str:
    return f"{type(x).__name__} {x!r:.60}"
