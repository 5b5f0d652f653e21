"""Events that change an optimizer, its parameters, their gradients and their states between two steps."""

import contextlib
import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import torch

import functional_optim as fo
from _lib.drawn import alike, laid_out
from _lib.trees import F64
from _lib.worlds import World


def drawn_gradient(p: torch.Tensor, how: str, generator: torch.Generator) -> torch.Tensor:
    """A gradient of a parameter, in some form."""
    dtype = torch.complex128 if p.is_complex() else F64
    g = torch.randn(p.shape, generator=generator, dtype=dtype).to(p.dtype)
    match how:
        case "zero":
            return torch.zeros_like(g)
        case "huge":
            return g * 1e3
        case "transposed" | "expanded" | "sliced":
            return laid_out(g, how)
        case "sparse":
            if not g.ndim or not g.shape[0]:
                return g
            rows = torch.randint(0, g.shape[0], (3,), generator=generator)
            values = torch.randn((3, *g.shape[1:]), generator=generator, dtype=dtype).to(p.dtype)
            return torch.sparse_coo_tensor(rows[None], values, g.shape)
    return torch.empty_like(p, requires_grad=False).copy_(g)


def give_gradient(w: World, k: int, g: torch.Tensor, how: str) -> None:
    """Gives a parameter a gradient, or leaves it the one that it has."""
    p = w.params[k]
    if how == "keep" and (p.grad is None or p.grad.dtype == p.dtype):
        return
    if how == "none":
        p.grad = None
    elif (
        how == "in place"
        and p.grad is not None
        and not p.grad.is_sparse
        and p.grad.dtype == g.dtype
        and (p.grad.stride() == torch.empty_like(p.grad).stride())
    ):
        p.grad.copy_(g)
    elif (
        how == "shared"
        and k
        and w.params[k - 1].grad is not None
        and (w.params[k - 1].grad.shape == p.shape and w.params[k - 1].grad.dtype == p.dtype)
    ):
        p.grad = w.params[k - 1].grad
    else:
        p.grad = g.clone() if g.is_sparse or how in ("random", "huge", "zero") else alike(g)


@contextlib.contextmanager
def around(how: str) -> Iterator[None]:
    """The context of a step."""
    match how:
        case "no_grad":
            with torch.no_grad():
                yield
        case "enable_grad":
            with torch.enable_grad():
                yield
        case "float64":
            torch.set_default_dtype(F64)
            try:
                yield
            finally:
                torch.set_default_dtype(torch.float32)
        case "threads":
            threads = torch.get_num_threads()
            torch.set_num_threads(3 - threads)
            try:
                yield
            finally:
                torch.set_num_threads(threads)
        case "reference" | "foreach":
            with fo.use_backend(how):
                yield
        case _:
            yield


def set_option(w: World, name: str, k: int, value: Any, form: str) -> None:
    """Gives an option of a group another value, in one of the forms that it may have."""
    group = w.group(k)
    old = group[name]
    if isinstance(value, (bool, tuple)):
        group[name] = value if form != "in place" or not isinstance(value, tuple) else list(value)
    elif form == "in place" and isinstance(old, torch.Tensor):
        old.fill_(value)
    elif form == "tensor":
        group[name] = torch.tensor(value, dtype=F64)
    elif form == "one element":
        group[name] = torch.tensor([value], dtype=F64)
    else:
        group[name] = value


def regroup(w: World, k: int, how: str) -> None:
    """Puts other dicts and lists in the place of groups."""
    groups, own = w.opt.param_groups, w.group(k)
    at = k % len(groups)
    match how:
        case "equal dict":
            groups[at] = dict(own)
        case "all equal dicts":
            w.opt.param_groups = [dict(g) for g in groups]
        case "reversed params":
            own["params"].reverse()
        case "new list":
            own["params"] = list(own["params"])
        case "to the next" if own["params"]:
            groups[(at + 1) % len(groups)]["params"].insert(0, own["params"].pop())
        case "reversed groups":
            groups.reverse()
        case "update":
            own.update(copy.deepcopy({x: y for x, y in own.items() if x != "params"}))


def remove_or_add(w: World, k: int, back: bool, keep_state: bool) -> None:
    """Takes a parameter out of its group, or puts it back, in a group of its own or in the first."""
    p = w.params[k % len(w.params)]
    if any(p is q for q in w.owned()):
        if len(w.owned()) > 2:
            for g in w.opt.param_groups:
                g["params"] = [q for q in g["params"] if q is not p]
            if not keep_state:  # state of no parameter of a group cannot be saved, in torch as well
                w.opt.state.pop(p, None)
    elif back:
        w.opt.add_param_group({"params": [p]})
    else:
        w.group(0)["params"].append(p)


def change_param(w: World, k: int, how: str) -> None:
    """Puts a parameter elsewhere, or gives it other values."""
    p = w.params[k % len(w.params)]
    match how:
        case "freeze":
            p.requires_grad_(False)
        case "thaw":
            p.requires_grad_(True)
        case "clone":
            p.data = p.data.clone()
        case "other layout":
            p.data = laid_out(p.data.clone(), "transposed")
        case "view":
            p.data = torch.stack([p.data, p.data])[1]
        case "offset":
            p.data = laid_out(p.data, "offset")
        case "set_":
            with torch.no_grad():
                p.set_(p.detach().clone())
        case "data set_":
            x = p.detach().clone()
            p.data.set_(x.untyped_storage(), 0, x.shape, x.stride())
        case "swap":
            new = torch.nn.Parameter(p.detach() + 0.5, p.requires_grad)
            new.grad = p.grad
            torch.utils.swap_tensors(p, new)
        case "in place":
            p.data.mul_(0.5)
        case "no_grad copy":
            with torch.no_grad():
                p.copy_(p * 0.7)
        case "module.to":
            module = torch.nn.Module()
            module.p = p
            module.to(memory_format=torch.channels_last if p.ndim == 4 else torch.preserve_format)


def cast_and_back(w: World, k: int, flag: str) -> None:
    """Casts a module to another type and back, with its gradient, by one of the ways of torch."""
    p = w.params[k % len(w.params)]
    if flag == "data":
        p.data = p.data.float()
        p.data = p.data.double()
        return
    module = torch.nn.Module()
    module.p = p
    setter = (
        torch.__future__.set_swap_module_params_on_conversion
        if flag == "swap"
        else (torch.__future__.set_overwrite_module_params_on_conversion)
    )
    setter(True)
    try:
        module.float()
        module.double()
    finally:
        setter(False)
    if module.p is not p:
        new = module.p
        state = w.opt.state.pop(p, None)
        if state is not None:
            w.opt.state[new] = state
        for g in w.opt.param_groups:
            g["params"] = [new if x is p else x for x in g["params"]]
        w.params[k % len(w.params)] = new


def change_state(w: World, kind: str, k: int, how: str, which: int) -> None:
    """Takes away, replaces or writes to entries of a state."""
    p = w.params[k % len(w.params)]
    state = w.opt.state.get(p)
    if how == "clear":
        w.opt.state.clear()
        return
    if not state:
        return
    kept = ("square_avg",) if kind == "RMSprop" else ()  # whose variance would be negative
    keys = [
        x
        for x in sorted(state)
        if x not in kept
        and isinstance(state[x], torch.Tensor)
        and state[x].shape == p.shape
        and x != "step"
        and state[x].ndim
        and state[x].layout is torch.strided
    ]
    key = keys[which % len(keys)] if keys else None
    match how:
        case "del":
            del w.opt.state[p]
        case "pop":
            w.opt.state.pop(p)
        case "new dict":
            w.opt.state[p] = dict(state)
        case "count" if isinstance(state.get("step"), torch.Tensor):
            state["step"] += 3
        case "double count" if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].double()
        case "in place" if key:
            state[key].mul_(0.5)
        case "replace" if key:
            state[key] = state[key] * 0.5
        case "equal" if key:
            state[key] = state[key].clone()
        case "other layout" if key:
            state[key] = laid_out(state[key].clone(), "transposed")
        case "view" if key:
            state[key] = torch.stack([state[key]] * 2)[1]


def carry(w: World, how: str) -> None:
    """An optimizer, with its parameters or by its state alone, by way of something else."""
    match how:
        case "deepcopy":
            w.params, opt = copy.deepcopy((w.params, w.opt))
            w.adopt(opt)
        case "pickle":
            grads = [p.grad for p in w.params]
            w.params, opt = pickle.loads(pickle.dumps((w.params, w.opt)))
            for p, g in zip(w.params, grads, strict=True):
                p.grad = g
            w.adopt(opt)
        case "load" | "cross":
            opt = w.fresh()
            opt.load_state_dict(w.opt.state_dict())
            w.adopt(opt)
        case "save and load":
            file = io.BytesIO()
            torch.save(w.opt.state_dict(), file)
            file.seek(0)
            opt = w.fresh()
            opt.load_state_dict(torch.load(file))
            w.adopt(opt)
        case "load in place":
            w.opt.load_state_dict(w.opt.state_dict())
        case "setstate":
            w.opt.__setstate__(w.opt.__getstate__())
        case "hooks":

            def saved(opt: Any, found: dict[str, Any]) -> None:
                found["param_groups"][0]["lr"] = 0.07

            def loaded(opt: Any, found: dict[str, Any]) -> dict[str, Any]:
                found = copy.deepcopy(found)
                found["param_groups"][-1]["lr"] = 0.08
                return found

            handles = [
                w.opt.register_state_dict_post_hook(saved),
                w.opt.register_load_state_dict_pre_hook(loaded),
            ]
            w.opt.load_state_dict(w.opt.state_dict())
            for handle in handles:
                handle.remove()
