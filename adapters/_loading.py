"""Loading the state of an optimizer: matching parameters, refusing what does not fit, casting."""

import warnings
from collections import defaultdict
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from functional_optim._params import slots_of, view_of

from ._naming import names_of, outside


if TYPE_CHECKING:
    from .optimizer import ChainOptimizer


def load(optimizer: "ChainOptimizer", state_dict: dict[str, Any], by_name: bool, strict: bool) -> None:
    """Loads a state; see `ChainOptimizer.load_state_dict`."""
    state_dict = state_dict.copy()
    for before in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = before(optimizer, state_dict)
        if changed is not None:
            state_dict = changed
    lacking = [key for key in ("state", "param_groups") if key not in state_dict]
    if lacking:
        raise KeyError(
            f"the state dict lacks {' and '.join(map(repr, lacking))}; it has "
            f"{', '.join(map(repr, list(state_dict)[:5])) or 'nothing'}, so no optimizer's `state_dict()` made it."
        )
    if not (strict or by_name):
        raise ValueError("strict=False is about names that are missing, so it needs by_name=True.")
    live, saved = optimizer.param_groups, deepcopy(state_dict["param_groups"])
    if by_name:
        id_map, saved = _match_names(live, saved, strict)
    else:
        id_map = _match_positions(live, saved)
    groups = []
    for old, new in zip(live, saved, strict=True):
        if "chain" in old and new.get("chain", old["chain"]) != old["chain"]:
            raise ValueError(f"the state was saved by the chain {new['chain']!r}, but this one is {old['chain']!r}.")
        # a file written before an option was there leaves it as it is
        groups.append({**{k: old[k] for k in optimizer.defaults if k in old and k not in new}, **new})
        groups[-1]["params"] = old["params"]
        if "param_names" in old and "param_names" not in new:
            groups[-1]["param_names"] = old["param_names"]
    saved_state = {id_map[k]: v for k, v in state_dict["state"].items() if k in id_map}
    state: defaultdict[Any, Any] = defaultdict(dict)
    names = names_of(groups)
    slots = _slots(optimizer, groups, names)
    owners = [(p, group) for group in groups for p in group["params"]]
    for (p, group), name, own in zip(owners, names, slots, strict=True):
        if p in saved_state:
            state[p] = _state(saved_state[p], p, name, own, group)
    for k, v in state_dict["state"].items():  # what belongs to no parameter is kept, as torch keeps it
        if k not in id_map and not by_name:
            state[k] = v
    optimizer.__setstate__({"state": state, "param_groups": groups})
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)


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
    for what, groups in (("this optimizer", live), ("the state dict", saved)):
        if any("param_names" not in g and g["params"] for g in groups):
            raise ValueError(f"by_name=True needs names, but {what} has none: pass `model.named_parameters()`.")
    for what, groups in (("this optimizer", live), ("the state dict", saved)):
        names = [name for group in groups for name in group.get("param_names", ())]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ValueError(f"by_name=True needs names that differ, but {what} has {repeated!r} twice.")
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
        sources: list[Any] = []
        for name, p in zip(group.get("param_names", ()), group["params"], strict=True):
            if name in where:
                key, source = where[name]
                id_map[key] = p
                if not any(source is s for s in sources):
                    sources.append(source)
        chosen = sources[0] if len(sources) == 1 else group
        options.append({k: v for k, v in chosen.items() if k not in ("params", "param_names")})
    return id_map, options


def _slots(optimizer: "ChainOptimizer", groups: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """What the chains of groups keep for each parameter, by key: a declaration and hyper-parameters."""
    templates = [t for group in groups for t in [optimizer._template_of(group)] * len(group["params"])]
    view = view_of(names, [p for group in groups for p in group["params"]])
    slots: list[dict[str, Any]] = [{} for _ in templates]
    for template in {id(t): t for t in templates}.values():
        own = [t is template for t in templates]
        found = slots_of(template, view.narrow(own))
        slots = [b if mine else a for a, b, mine in zip(slots, found, own, strict=True)]
    return slots


def _state(saved: Any, p: torch.Tensor, name: str, slots: dict[str, Any], group: dict[str, Any]) -> Any:
    """The state of one parameter, copied and cast."""
    if not isinstance(saved, dict):
        return saved
    saved = {k: v for k, v in saved.items() if not (v is None and k in slots)}
    tensors = [k for k in slots if k != "step"]
    lacking = [k for k in slots if k not in saved]
    if saved and tensors and not any(k in saved for k in tensors):
        raise ValueError(
            f"the saved state of {name!r} has {', '.join(map(repr, saved))}, expected "
            f"{', '.join(map(repr, tensors))}: another chain or other options made it."
        )
    if saved and lacking:
        raise ValueError(
            f"the saved state of {name!r} lacks {', '.join(map(repr, lacking))}; it has "
            f"{', '.join(map(repr, saved))}, so another chain or other options made it."
        )
    unknown = [k for k in saved if k not in slots and k != "step" and not str(k).startswith("transformation_")]
    if unknown and "chain" in group:
        warnings.warn(
            f"the saved state of {name!r} has {', '.join(map(repr, unknown))}, which the chain does not know; "
            f"it is kept.",
            stacklevel=outside(),
        )
    return {k: _cast(k, v, p, name, slots.get(k)) for k, v in saved.items()}


def _cast(key: Any, value: Any, p: torch.Tensor, name: str, slot: Any) -> Any:
    """A copy of a saved value, on the parameter's device and in the dtype that the chain declares."""
    if key == "step" and isinstance(value, (int, float)):
        return torch.tensor(float(value), dtype=torch.float32, device=p.device)
    if key == "step" and isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"the saved 'step' of {name!r} has shape {tuple(value.shape)}, expected one number.")
        dtype = torch.float64 if value.dtype is torch.float64 else torch.float32  # half types stop counting at 256
        return value.detach().to(dtype=dtype, device=p.device, copy=True).reshape(())
    if isinstance(value, torch.Tensor):
        dtype = value.dtype
        if slot is not None:
            declared, hypers = slot
            shape = torch.Size(()) if declared.per_leaf else p.shape
            if value.shape != shape:
                raise ValueError(
                    f"the saved {key!r} of {name!r} has shape {tuple(value.shape)}, but the parameter has "
                    f"{tuple(p.shape)}."
                )
            if value.layout is not torch.strided:
                raise ValueError(f"the saved {key!r} of {name!r} is sparse ({value.layout}), expected a dense tensor.")
            if value.is_complex() != (p.is_complex() and not declared.per_leaf) or not (
                value.is_floating_point() or value.is_complex()
            ):
                raise ValueError(
                    f"the saved {key!r} of {name!r} has dtype {value.dtype}, but the parameter has {p.dtype}."
                )
            chosen = hypers.get(declared.dtype) if isinstance(declared.dtype, str) else declared.dtype
            dtype = chosen or (value.dtype if declared.per_leaf else p.dtype)
        return value.detach().to(dtype=dtype, device=p.device, copy=True)
    if slot is not None:
        if not (slot[0].per_leaf and isinstance(value, (int, float))):
            raise ValueError(
                f"the saved {key!r} of {name!r} is {type(value).__name__} {value!r:.60}, expected a tensor."
            )
        return torch.tensor(float(value), dtype=torch.float32, device=p.device)
    if isinstance(value, dict):
        return {k: _cast(k, v, p, name, None) for k, v in value.items()}
    return deepcopy(value)
