"""Drawn sequences of events between steps: an optimizer beside torch's, and beside one that remembers nothing."""

import contextlib
import copy
import io
import math
import pickle
import traceback
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from hypothesis import (
    Phase,
    settings,
    strategies as st,
)
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import functional_optim as fo
from _lib.chains import Halve
from _lib.compare import bits
from functional_optim import adapters


F64 = torch.float64
SHAPES: list[tuple[int, ...]] = [(3, 4), (5,), (), (2, 3, 2, 2), (0, 3), (4, 3), (5,)]
RATES = [0.0, 0.05, 0.2]
DECAYS = [0.0, 0.1]
BETAS = [(0.5, 0.9), (0.9, 0.5), (0.0, 0.8)]
FLAGS = [False, True]
OPTIONS: dict[str, dict[str, list[Any]]] = {
    "SGD": {"momentum": [0.0, 0.5, 0.9], "dampening": [0.0, 0.5], "nesterov": FLAGS},
    "Adam": {"betas": BETAS, "eps": [1e-3, 1e-1], "amsgrad": FLAGS, "decoupled_weight_decay": FLAGS},
    "AdamW": {"betas": BETAS, "eps": [1e-3, 1e-1], "amsgrad": FLAGS},
    "NAdam": {"betas": BETAS, "eps": [1e-3], "momentum_decay": [0.1, 0.0], "decoupled_weight_decay": FLAGS},
    "RAdam": {"betas": BETAS, "eps": [1e-3], "decoupled_weight_decay": FLAGS},
    "Adamax": {"betas": BETAS, "eps": [1e-3]},
    "RMSprop": {"alpha": [0.5, 0.9], "eps": [1e-3], "momentum": [0.0, 0.5], "centered": FLAGS},
    "Adagrad": {"eps": [1e-3], "lr_decay": [0.0, 0.5]},
    "Adadelta": {"rho": [0.5, 0.9], "eps": [1e-3]},
    "ASGD": {"lambd": [0.1, 0.0], "alpha": [0.5], "t0": [2, 8]},
    "Rprop": {"etas": [(0.5, 1.2), (0.3, 1.7)], "step_sizes": [(0.01, 0.4)]},
    "SparseAdam": {"betas": BETAS, "eps": [1e-3]},
}
NAMED = list(OPTIONS)


def descent() -> fo.GradientTransformation:
    return fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1), fo.params_ema(0.9))


def by_rank(path: str, p: torch.Tensor) -> str:
    return "a" if p.ndim > 1 else "b"


def by_steps(count: Any) -> Any:
    return [-0.1, -0.2][int(count) % 2]


CHAINS: dict[str, Callable[[], fo.GradientTransformation]] = {
    "clip + AdamW + EMA": descent,
    "two programs": lambda: fo.partition({"a": fo.adamw(0.1), "b": fo.sgd(0.1, momentum=0.9)}, by_rank),
    "host schedule": lambda: fo.chain(fo.trace(0.9), fo.scale_by_schedule(by_steps)),
    "whole tensors": lambda: fo.partition(
        {"a": fo.adafactor(0.1, min_dim_size_to_factor=2), "b": fo.adam(0.1)}, by_rank
    ),
    "opaque": lambda: fo.chain(Halve(), fo.sgd(0.1, momentum=0.9)),
    "schedule": lambda: fo.chain(fo.scale_by_adam(), fo.scale_by_learning_rate(fo.linear_schedule(0.2, 0.0, 20))),
}


@fo.elementwise(state={"norm": fo.slot(per="tree")})
def by_norm(u: Any, norm: Any, *, keep: Any = 0.5) -> Any:
    norm = keep * norm + (1 - keep) * fo.tree_norm(u)
    return u / (norm + 1), norm


CHAINS["one for the tree"] = lambda: fo.chain(by_norm(), fo.sgd(0.1, momentum=0.5))


def made(kind: str, ours: bool) -> Callable[..., torch.optim.Optimizer]:
    """The constructor of an optimizer."""
    if kind in CHAINS:
        return lambda params, **options: adapters.TransformOptimizer(params, CHAINS[kind](), **options)
    if ours:
        return getattr(adapters, kind)
    plain: dict[str, Any] = {} if kind == "SparseAdam" else {"foreach": False}
    return lambda params, **options: getattr(torch.optim, kind)(params, **plain, **options)


class Event(NamedTuple):
    """What a call has come to."""

    result: Any
    error: Exception | None


def attempt(fn: Callable[[], Any]) -> Event:
    try:
        return Event(fn(), None)
    except Exception as error:
        if isinstance(error, AssertionError):
            raise
        if "swap" not in str(error):
            traceback.clear_frames(error.__traceback__)
        return Event(None, error.with_traceback(None))


class World:
    """An optimizer with its parameters, a scaler and hooks."""

    def __init__(self, kind: str, ours: bool, values: list[torch.Tensor], groups: int, options: dict[str, Any]) -> None:
        self.kind, self.ours, self.options = kind, ours, options
        self.make = made(kind, ours)
        self.params = [torch.nn.Parameter(x.clone()) for x in values]
        self.opt = self.make([{"params": self.params[k::groups]} for k in range(groups)], **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        self.hooks: dict[str, Any] = {}

    def group(self, k: int) -> dict[str, Any]:
        return self.opt.param_groups[k % len(self.opt.param_groups)]

    def owned(self) -> list[torch.Tensor]:
        return [p for group in self.opt.param_groups for p in group["params"]]

    def hook(self, name: str) -> None:
        if name in self.hooks:
            self.hooks.pop(name).remove()
            return
        when, fn = HOOKS[name]
        self.hooks[name] = getattr(self.opt, f"register_step_{when}_hook")(fn)

    def adopt(self, opt: torch.optim.Optimizer) -> None:
        """Takes another optimizer in the place of this one, with the same hooks."""
        self.opt = opt
        for name in self.hooks:
            when, fn = HOOKS[name]
            self.hooks[name] = getattr(self.opt, f"register_step_{when}_hook")(fn)

    def fresh(self) -> torch.optim.Optimizer:
        """A new optimizer over the same groups, with other options and no state."""
        groups = [{"params": list(g["params"]), "lr": 0.123} for g in self.opt.param_groups]
        return self.make(groups, **self.options)

    def state(self, k: int) -> dict[str, Any]:
        return self.opt.state.get(self.params[k], {})


def halve_lr(opt: Any, args: Any, kwargs: Any) -> None:
    for group in opt.param_groups:
        group["lr"] = 0.03 if float(group["lr"]) > 0.1 else 0.15


def new_grads(opt: Any, args: Any, kwargs: Any) -> None:
    for group in opt.param_groups:
        for p in group["params"]:
            if p.grad is not None and not p.grad.is_sparse:
                p.grad = p.grad * 0.5


def grads_in_place(opt: Any, args: Any, kwargs: Any) -> None:
    for group in opt.param_groups:
        for p in group["params"]:
            if p.grad is not None and not p.grad.is_sparse and p.grad.stride() == torch.empty_like(p.grad).stride():
                p.grad.mul_(1.5)


def drop_last_grad(opt: Any, args: Any, kwargs: Any) -> None:
    opt.param_groups[-1]["params"][-1].grad = None


def shrink_params(opt: Any, args: Any, kwargs: Any) -> None:
    for group in opt.param_groups:
        for p in group["params"]:
            p.data.mul_(0.9)


def toggle_maximize(opt: Any, args: Any, kwargs: Any) -> None:
    for group in opt.param_groups:
        if "maximize" in group:
            group["maximize"] = not group["maximize"]


HOOKS: dict[str, tuple[str, Any]] = {
    "rate": ("pre", halve_lr),
    "other gradients": ("pre", new_grads),
    "gradients in place": ("pre", grads_in_place),
    "no gradient": ("pre", drop_last_grad),
    "params": ("post", shrink_params),
    "direction": ("post", toggle_maximize),
}


def dense(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    x = x.detach()
    return x.to_dense() if x.layout is not torch.strided else x


class Before:
    """Parameters, states and groups, as they are before a call that may fail."""

    def __init__(self, world: World) -> None:
        self.params = [(p, p.detach().clone(), p.dtype) for p in world.params]
        self.grads = [(p, p.grad, None if p.grad is None else dense(p.grad).clone()) for p in world.params]
        self.versions = [
            None if g is None else g._version for _, g, _ in self.grads if g is None or not g.is_inference()
        ]
        self.state = {
            p: {k: (x, x.clone() if isinstance(x, torch.Tensor) else x) for k, x in own.items()}
            for p, own in world.opt.state.items()
        }
        self.groups = [dict(g, params=list(g["params"])) for g in world.opt.param_groups]

    def check(self, world: World) -> None:
        """Asserts that nothing has changed."""
        for p, x, _ in self.params:
            assert torch.equal(bits(p), bits(x)), "a failed call has changed a parameter"
        assert list(world.opt.state) == list(self.state), "a failed call has changed the keys of the state"
        for p, own in self.state.items():
            assert list(world.opt.state[p]) == list(own)
            for k, (x, value) in own.items():
                assert world.opt.state[p][k] is x
                if isinstance(x, torch.Tensor):
                    assert torch.equal(bits(dense(x)), bits(dense(value))), f"a failed call has changed {k}"
        assert len(world.opt.param_groups) == len(self.groups)
        for now, then in zip(world.opt.param_groups, self.groups, strict=True):
            assert now.keys() == then.keys()
            assert all(now[k] is x for k, x in then.items() if k != "params")

    def check_grads(self) -> None:
        """Asserts that gradients are what they were."""
        for p, g, value in self.grads:
            assert p.grad is g
            if g is not None:
                assert torch.equal(bits(dense(g)), bits(value))
        assert self.versions == [
            None if g is None else g._version for _, g, _ in self.grads if g is None or not g.is_inference()
        ]

    def restore(self, world: World) -> None:
        """Puts parameters and states back, by copies."""
        for p, x, _ in self.params:
            p.data.copy_(x)
        world.opt.state.clear()
        for p, own in self.state.items():
            world.opt.state[p] = {k: value for k, (_, value) in own.items()}


def close(a: Any, b: Any, bound: float, where: str) -> None:
    a, b = dense(a), dense(b)
    if not isinstance(a, torch.Tensor):
        assert a == b or float(a) == float(b), f"{where}: {a} {b}"
        return
    if isinstance(b, torch.Tensor):
        assert a.shape == b.shape, f"{where}: {a.shape} {b.shape}"
        assert not bound or a.ndim == 0 or a.dtype == b.dtype, f"{where}: {a.dtype} {b.dtype}"
    if not bound:
        assert a.dtype == b.dtype, f"{where}: {a.dtype} {b.dtype}"
        assert torch.equal(bits(a), bits(b)), f"{where}: {a} {b}"
        return
    b = torch.as_tensor(b)
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b.resolve_conj())
    a, b = a.double(), b.double()
    scale = max(1.0, b.nan_to_num(0, 0, 0).abs().amax().item() if b.numel() else 0.0)
    torch.testing.assert_close(a, b, rtol=bound, atol=bound * scale, equal_nan=True, msg=lambda m: f"{where}: {m}")


GRADS = [
    "random",
    "random",
    "none",
    "keep",
    "zero",
    "transposed",
    "expanded",
    "sliced",
    "in place",
    "shared",
    "sparse",
    "huge",
]


class Beside(RuleBasedStateMachine):
    """Worlds in which the same happens: torch's optimizer, ours, and ours that forgets between steps."""

    kinds: ClassVar[list[str]] = [*NAMED, *CHAINS]

    @initialize(
        data=st.data(),
        seed=st.integers(0, 9),
        groups=st.integers(1, 3),
        forgets=st.sampled_from(["load", "copy"]),
        complex_=st.booleans(),
    )
    def start(self, data: Any, seed: int, groups: int, forgets: str, complex_: bool) -> None:
        kind = data.draw(st.sampled_from(self.kinds))
        generator = torch.Generator().manual_seed(seed)
        values = [torch.randn(shape, generator=generator, dtype=F64) for shape in SHAPES]
        values[3] = values[3].to(memory_format=torch.channels_last)
        values[5] = values[5].t().clone().t()
        if kind == "SparseAdam":
            values = [values[k] for k in (0, 1, 5, 6)]
        elif complex_ and kind != "whole tensors":
            values.append(torch.randn(3, generator=generator, dtype=torch.complex128))
        options: dict[str, Any] = {}
        if kind in NAMED:
            names = OPTIONS[kind]
            options = {"lr": 0.1} | {k: data.draw(st.sampled_from(v)) for k, v in names.items()}
            if kind != "SparseAdam" and kind != "Rprop":
                options["weight_decay"] = data.draw(st.sampled_from(DECAYS))
            if kind == "SGD" and options["nesterov"]:
                options |= {"momentum": 0.9, "dampening": 0.0}
        self.kind, self.forgets = kind, forgets
        self.worlds = {"ours": World(kind, True, values, groups, options)}
        self.worlds["forgetful"] = World(kind, True, values, groups, options)
        self.torch = kind in NAMED
        if self.torch:
            self.worlds["theirs"] = World(kind, False, values, groups, options)
        self.bound = 1e-6 if kind in ("NAdam", "ASGD") else 1e-9  # of float32 numbers, which torch loads as float64
        self.seed = 100 * seed
        self.said = ""

    # -- the same for all

    def each(self, fn: Callable[[World], Any]) -> None:
        """Does the same in all worlds, which come to the same."""
        found = {name: attempt(lambda w=w: fn(w)) for name, w in self.worlds.items()}
        errors = {name: e.error for name, e in found.items()}
        if any(errors.values()) and not all(errors.values()):
            raise AssertionError(f"only some fail: {errors}") from next(e for e in errors.values() if e)

    def compare(self) -> None:
        ours = self.worlds["ours"]
        for name, other in self.worlds.items():
            if other is ours:
                continue
            bound = 0.0 if name == "forgetful" else self.bound
            for k, (p, q) in enumerate(zip(ours.params, other.params, strict=True)):
                where = f"{name}, params[{k}]"
                assert p.dtype == q.dtype
                assert p.requires_grad == q.requires_grad
                assert p.stride() == q.stride(), f"{where}: {p.stride()} {q.stride()}"
                close(p, q, bound, where)
                a, b = ours.state(k), other.state(k)
                if a or b or name == "forgetful":
                    assert a.keys() == b.keys(), f"state of {where}: {a.keys()} {b.keys()}"
                    assert name == "theirs" or list(a) == list(b), f"state of {where}: {a.keys()} {b.keys()}"
                for key in a:
                    close(a[key], b[key], bound, f"{key} of {where}")
            groups = [
                [
                    {k: x for k, x in g.items() if k not in ("params", "foreach", "fused", "differentiable")}
                    for g in w.opt.param_groups
                ]
                for w in (ours, other)
            ]
            for a, b in zip(*groups, strict=True):
                assert a.keys() == b.keys(), f"{name}: {a.keys()} {b.keys()}"
                for key, x in a.items():
                    y = b[key]
                    if isinstance(x, (tuple, list)):
                        assert [float(z) for z in x] == [float(z) for z in y], f"{name}, {key}: {x} {y}"
                    else:
                        assert x == y, f"{name}, {key}: {x} {y}"
            places = [
                [[next(i for i, r in enumerate(w.params) if r is p) for p in g["params"]] for g in w.opt.param_groups]
                for w in (ours, other)
            ]
            assert places[0] == places[1]

    def forget(self) -> None:
        w = self.worlds["forgetful"]
        if self.forgets == "copy":
            w.adopt(copy.copy(w.opt))
            return
        opt = w.fresh()
        if not self.lacks_slots():
            opt.load_state_dict(w.opt.state_dict())
            w.adopt(opt)

    def lacks_slots(self) -> bool:
        """Whether a switch has been set since the last step, so that the state lacks slots and is not loaded."""
        w = self.worlds["ours"]
        found = attempt(lambda: w.fresh().load_state_dict(w.opt.state_dict()))
        return isinstance(found.error, ValueError) and " lacks " in str(found.error)

    def resync(self) -> None:
        """Gives torch's optimizer what ours has, where torch cannot go on and ours can."""
        ours, theirs = self.worlds["ours"], self.worlds["theirs"]
        for p, q in zip(ours.params, theirs.params, strict=True):
            q.data.copy_(p.detach())
            if p in ours.opt.state:
                theirs.opt.state[q] = {
                    k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in ours.opt.state[p].items()
                }
            else:
                theirs.opt.state.pop(q, None)
        for a, b in zip(
            ours.opt.param_groups, theirs.opt.param_groups, strict=True
        ):  # hooks have run here and not there
            for key in a:
                if key not in ("params", "foreach", "fused", "differentiable"):
                    b[key] = copy.deepcopy(a[key])
        for p, q in zip(ours.params, theirs.params, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()

    def take(self, call: Callable[[World], Any], exact: bool = True) -> None:
        """Takes a step in all worlds."""
        self.forget()
        self.compare()
        before = {name: Before(w) for name, w in self.worlds.items()}
        found = {name: attempt(lambda w=w: call(w)) for name, w in self.worlds.items()}
        ours, forgetful = found["ours"], found["forgetful"]
        if (ours.error is None) != (forgetful.error is None) or (
            ours.error and (type(ours.error), str(ours.error)) != (type(forgetful.error), str(forgetful.error))
        ):
            raise AssertionError(f"ours: {ours.error!r}\nforgetful: {forgetful.error!r}") from (
                ours.error or forgetful.error
            )
        theirs = found.get("theirs")
        touching = {"other gradients", "gradients in place", "no gradient", "rate"} & set(self.worlds["ours"].hooks)
        if ours.error is not None:
            if exact and not touching:
                before["ours"].check(self.worlds["ours"])
            if theirs is not None and theirs.error is None:
                self.refused(ours.error)
            if theirs is not None:
                before["theirs"].restore(self.worlds["theirs"])
                self.resync()
        else:
            if exact and not touching:
                before["ours"].check_grads()
            if theirs is not None and theirs.error is not None:
                before["theirs"].restore(self.worlds["theirs"])
                self.resync()
        self.compare()

    def refused(self, error: Exception) -> None:
        """Takes a refusal that torch does not share for right where documents say so."""
        text = str(error)
        known = ("share memory", "expected a finite number", "averaged_params")
        if not any(x in text for x in known):
            raise AssertionError(f"only ours refuses: {error!r}") from error

    def draw(self, p: torch.Tensor, how: str) -> torch.Tensor:
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        dtype = torch.complex128 if p.is_complex() else F64
        g = torch.randn(p.shape, generator=generator, dtype=dtype).to(p.dtype)
        match how:
            case "zero":
                return torch.zeros_like(g)
            case "huge":
                return g * 1e3
            case "transposed":
                return g.transpose(0, -1).contiguous().transpose(0, -1) if g.ndim > 1 else g
            case "expanded":
                return g[:1].expand(g.shape) if g.ndim and g.shape[0] else g
            case "sliced":
                return g.repeat_interleave(2, -1)[..., ::2] if g.ndim else g
            case "sparse":
                if not g.ndim or not g.shape[0]:
                    return g
                rows = torch.randint(0, g.shape[0], (3,), generator=generator)
                values = torch.randn((3, *g.shape[1:]), generator=generator, dtype=dtype).to(p.dtype)
                return torch.sparse_coo_tensor(rows[None], values, g.shape)
        return torch.empty_like(p, requires_grad=False).copy_(g)

    # -- gradients

    @rule(
        hows=st.lists(st.sampled_from(GRADS), min_size=len(SHAPES) + 1, max_size=len(SHAPES) + 1), sparse=st.booleans()
    )
    def give(self, hows: list[str], sparse: bool) -> None:
        """Gives every parameter a gradient, in some form."""
        sparse = sparse or self.kind == "SparseAdam"
        for k in range(len(self.worlds["ours"].params)):
            how = hows[k % len(hows)]
            if self.kind == "SparseAdam" and how not in ("none", "keep", "sparse"):
                how = "sparse"
            if how == "sparse" and not sparse:
                how = "random"
            g = self.draw(self.worlds["ours"].params[k], how)
            for w in self.worlds.values():
                p = w.params[k]
                if how == "keep" and (p.grad is None or p.grad.dtype == p.dtype):
                    continue
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
                    p.grad = g.clone() if g.is_sparse or how in ("random", "huge", "zero") else self.alike(g)

    @staticmethod
    def alike(g: torch.Tensor) -> torch.Tensor:
        """A copy in memory of its own with the same strides, zero strides too."""
        return torch.as_strided(
            torch.as_strided(g, (g.untyped_storage().nbytes() // g.element_size(),), (1,), 0).clone(),
            g.shape,
            g.stride(),
            g.storage_offset(),
        )

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none: bool) -> None:
        self.each(lambda w: w.opt.zero_grad(set_to_none=to_none))

    # -- steps

    @rule(
        how=st.sampled_from(["plain", "plain", "no_grad", "enable_grad", "float64", "threads", "reference", "foreach"])
    )
    def step(self, how: str) -> None:
        @contextlib.contextmanager
        def context() -> Iterator[None]:
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

        if how == "float64" and self.forgets == "load" and self.kind in ("NAdam", "ASGD"):
            return  # numbers are loaded in the default dtype of their time

        def call(w: World) -> None:
            with context():
                w.opt.step()

        self.take(call)

    @rule(zero=st.booleans(), to_none=st.booleans(), no_grad=st.booleans())
    def closure_step(self, zero: bool, to_none: bool, no_grad: bool) -> None:
        if self.kind == "SparseAdam":
            return
        losses = {}

        def call(w: World) -> None:
            def closure() -> torch.Tensor:
                if zero:
                    w.opt.zero_grad(set_to_none=to_none)
                loss = sum((p * p.conj()).real.sum() * (0.5 + k) for k, p in enumerate(w.params) if p.requires_grad)
                if isinstance(loss, torch.Tensor):
                    for p in w.params:
                        if (p.grad is not None and p.grad.is_sparse) or (
                            p.grad is not None and p.grad.dtype != p.dtype
                        ):
                            p.grad = None
                        if p.grad is not None:
                            p.grad = p.grad.clone(memory_format=torch.contiguous_format)
                    loss.backward()
                return loss

            with torch.set_grad_enabled(not no_grad):
                losses[id(w)] = w.opt.step(closure)

        self.take(call, exact=False)

    @rule(unscale=st.booleans(), bad=st.sampled_from([None, None, math.inf, math.nan]), at=st.integers(0, 7))
    def scaled_step(self, unscale: bool, bad: float | None, at: int) -> None:
        """A step by a scaler, which takes it or does not."""
        if self.kind == "SparseAdam":
            return
        if all(q.grad is None for q in self.worlds["ours"].owned()):
            return
        if any(
            p.is_complex() or (p.grad is not None and (p.grad.is_sparse or 0 in p.grad.stride()))
            for p in self.worlds["ours"].params
        ):
            return
        if len({id(p.grad) for p in self.worlds["ours"].params if p.grad is not None}) < sum(
            p.grad is not None for p in self.worlds["ours"].params
        ):
            return

        def call(w: World) -> None:
            w.scaler.scale(torch.ones(()))
            scale = w.scaler.get_scale()
            p = w.params[at % len(w.params)]
            for q in w.owned():
                if q.grad is not None:
                    q.grad = q.grad * scale
            if bad is not None and p.grad is not None and p.numel():
                p.grad = torch.full_like(p.grad, bad)
            if unscale:
                w.scaler.unscale_(w.opt)
            w.scaler.step(w.opt)
            w.scaler.update()

        self.take(call, exact=False)
        for w in self.worlds.values():
            if w.scaler._per_optimizer_states:
                w.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        if any(p.grad is not None and not p.grad.isfinite().all() for p in self.worlds["ours"].params):
            self.each(lambda w: w.opt.zero_grad())
            self.each(lambda w: [setattr(p, "grad", None) for p in w.params])

    # -- options

    @rule(
        data=st.data(),
        k=st.integers(0, 3),
        form=st.sampled_from(["number", "number", "tensor", "in place", "one element"]),
    )
    def option(self, data: Any, k: int, form: str) -> None:
        if self.kind in CHAINS:
            known = self.worlds["ours"].group(k)
            name = data.draw(st.sampled_from(sorted(x for x in known if isinstance(known[x], (float, torch.Tensor)))))
            value: Any = data.draw(st.sampled_from([0.1, 0.5]))
        else:
            names = {"lr": RATES, **OPTIONS[self.kind]}
            if self.kind != "SparseAdam":
                names |= {"maximize": FLAGS}
            if self.kind not in ("SparseAdam", "Rprop"):
                names |= {"weight_decay": DECAYS}
            name = data.draw(st.sampled_from(sorted(names)))
            value = data.draw(st.sampled_from(names[name]))

        def change(w: World) -> None:
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

        self.each(change)

    @rule(
        k=st.integers(0, 3),
        how=st.sampled_from(
            ["equal dict", "all equal dicts", "reversed params", "new list", "to the next", "reversed groups", "update"]
        ),
    )
    def regroup(self, k: int, how: str) -> None:
        def change(w: World) -> None:
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

        self.each(change)

    @rule(k=st.integers(0, 7), back=st.booleans())
    def remove_and_add(self, k: int, back: bool) -> None:
        """Takes a parameter out of its group, or puts it back in a group of its own."""

        def change(w: World) -> None:
            p = w.params[k % len(w.params)]
            if any(p is q for q in w.owned()):
                if len(w.owned()) > 2:
                    for g in w.opt.param_groups:
                        g["params"] = [q for q in g["params"] if q is not p]
                    if self.forgets == "load":  # state of no parameter of a group cannot be saved, in torch as well
                        w.opt.state.pop(p, None)
            elif back:
                w.opt.add_param_group({"params": [p]})
            else:
                w.group(0)["params"].append(p)

        self.each(change)

    @precondition(lambda self: len(self.worlds["ours"].params) < 12)
    @rule(shape=st.sampled_from([(2, 2), (5,), ()]), lr=st.sampled_from([None, 0.05]))
    def add_group(self, shape: tuple[int, ...], lr: float | None) -> None:
        if self.kind == "SparseAdam" and not shape:
            return
        x = self.draw(torch.zeros(shape, dtype=F64), "random")

        def change(w: World) -> None:
            p = torch.nn.Parameter(x.clone())
            w.params.append(p)
            w.opt.add_param_group({"params": p} | ({} if lr is None else {"lr": lr}))

        self.each(change)

    # -- parameters

    @rule(
        k=st.integers(0, 7),
        how=st.sampled_from(
            [
                "freeze",
                "thaw",
                "clone",
                "other layout",
                "view",
                "set_",
                "swap",
                "in place",
                "no_grad copy",
                "module.to",
                "offset",
                "data set_",
            ]
        ),
    )
    def change_param(self, k: int, how: str) -> None:
        def change(w: World) -> None:
            p = w.params[k % len(w.params)]
            match how:
                case "freeze":
                    p.requires_grad_(False)
                case "thaw":
                    p.requires_grad_(True)
                case "clone":
                    p.data = p.data.clone()
                case "other layout":
                    p.data = p.data.transpose(0, -1).contiguous().transpose(0, -1) if p.ndim > 1 else p.data * 1
                case "view":
                    p.data = torch.stack([p.data, p.data])[1]
                case "offset":
                    p.data = torch.cat([p.data.new_zeros(1), p.data.flatten()])[1:].view(p.shape)
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

        self.each(change)

    @rule(k=st.integers(0, 7), flag=st.sampled_from(["data", "swap", "overwrite"]))
    def round_trip(self, k: int, flag: str) -> None:
        """A module that is cast to another type and back, with its gradient, by each of torch's ways."""
        if self.worlds["ours"].params[k % len(self.worlds["ours"].params)].is_complex():
            return

        def change(w: World) -> None:
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

        self.each(change)

    # -- states

    @rule(
        k=st.integers(0, 7),
        how=st.sampled_from(
            [
                "del",
                "clear",
                "pop",
                "in place",
                "replace",
                "other layout",
                "view",
                "count",
                "new dict",
                "equal",
                "double count",
                "share",
            ]
        ),
        which=st.integers(0, 3),
    )
    def change_state(self, k: int, how: str, which: int) -> None:
        if self.kind == "one for the tree" and how in ("in place", "replace", "new dict", "share"):
            return
        if self.kind in ("Adagrad", "whole tensors") and how in ("del", "clear", "pop"):
            return

        def change(w: World) -> None:
            p = w.params[k % len(w.params)]
            state = w.opt.state.get(p)
            if how == "clear":
                w.opt.state.clear()
                return
            if not state:
                return
            kept = ("square_avg",) if self.kind == "RMSprop" else ()  # whose variance would be negative
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
                    x = state[key]
                    state[key] = x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim > 1 else x.clone()
                case "view" if key:
                    state[key] = torch.stack([state[key]] * 2)[1]

        self.each(change)

    @rule(
        how=st.sampled_from(
            ["deepcopy", "pickle", "load", "save and load", "cross", "load in place", "setstate", "hooks"]
        )
    )
    def copy_all(self, how: str) -> None:
        if how == "cross" and self.torch and not self.lacks_slots():
            found = {name: attempt(w.opt.state_dict) for name, w in self.worlds.items()}
            if not any(e.error for e in found.values()):
                self.cross({name: e.result for name, e in found.items()})
            return

        def change(w: World) -> None:
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

        if how not in ("deepcopy", "pickle", "setstate") and self.lacks_slots():
            return
        self.each(change)

    def cross(self, dicts: dict[str, Any]) -> None:
        """Ours goes on from torch's file, and torch's from ours."""
        for name, w in self.worlds.items():
            opt = w.fresh()
            found = attempt(lambda: opt.load_state_dict(dicts["ours" if name == "theirs" else "theirs"]))
            if found.error:
                raise AssertionError("ours does not load torch's state") from found.error
            w.adopt(opt)
        ours = self.worlds["ours"]
        for p, q in zip(ours.params, self.worlds["theirs"].params, strict=True):
            with torch.no_grad():
                q.copy_(p)
            if p in ours.opt.state:
                self.worlds["theirs"].opt.state[q] = {
                    k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in ours.opt.state[p].items()
                }

    @rule(name=st.sampled_from(sorted(HOOKS)))
    def hook(self, name: str) -> None:
        if name in ("gradients in place", "other gradients") and self.kind == "SparseAdam":
            return
        self.each(lambda w: w.hook(name))

    # -- failures

    @rule(k=st.integers(0, 7), how=st.sampled_from(["shape", "rate", "params", "state", "betas"]))
    def failing_step(self, k: int, how: str) -> None:
        if self.kind == "SparseAdam":
            return
        ours = {name: w for name, w in self.worlds.items() if w.ours}
        undo: list[Callable[[], None]] = []
        for w in ours.values():
            p = w.params[k % len(w.params)]
            if not any(p is q for q in w.owned()):
                return
            if how == "shape":
                if p.grad is None or p.grad.is_sparse:
                    return
                old = p.grad
                p.grad = torch.ones_like(p)
                p.grad.data = torch.ones(7, dtype=p.dtype)
                undo.append(lambda p=p, old=old: setattr(p, "grad", old))
            elif how == "params":
                if p.grad is None:
                    return
                old = p.data
                p.data = torch.ones(9, dtype=p.dtype)
                undo.append(lambda p=p, old=old: setattr(p, "data", old))
            elif how == "state":
                state = w.opt.state.get(p, {})
                keys = [x for x in sorted(state) if isinstance(state[x], torch.Tensor) and state[x].ndim]
                if not keys or p.grad is None:
                    return
                old = state[keys[0]]
                state[keys[0]] = torch.ones(9, dtype=p.dtype)
                undo.append(lambda state=state, key=keys[0], old=old: state.__setitem__(key, old))
            else:
                group = w.group(k)
                name = "betas" if how == "betas" and "betas" in group else "lr"
                if not any(q.grad is not None for q in group["params"]):
                    return
                old = group[name]
                group[name] = "0.1"
                undo.append(lambda group=group, name=name, old=old: group.__setitem__(name, old))
        for w in ours.values():
            hooks = dict(w.hooks)
            for name in hooks:
                w.hook(name)
            before = Before(w)
            found = attempt(w.opt.step)
            assert found.error is not None, f"a step with a bad {how} is taken"
            before.check(w)
            before.check_grads()
            for name in hooks:
                w.hook(name)
        for fn in undo:
            fn()
        self.compare()

    @rule()
    def averaged(self) -> None:
        if self.kind != "clip + AdamW + EMA" or not any(self.worlds["ours"].opt.state.values()):
            return

        def look(w: World) -> list[torch.Tensor]:
            with w.opt.averaged_params():
                return [p.detach().clone() for p in w.params]

        found = [attempt(lambda w=w: look(w)) for w in self.worlds.values()]
        assert [type(x.error) for x in found] == [type(found[0].error)] * len(found), found
        if not found[0].error:
            for x in zip(*(f.result for f in found), strict=True):
                assert torch.equal(x[0], x[1])
        self.compare()


# the same sequences every time, and not made smaller: random ones belong on a developer's machine
SETTINGS = settings(
    derandomize=True,
    deadline=None,
    max_examples=25,
    stateful_step_count=25,
    database=None,
    phases=(Phase.explicit, Phase.generate),
)


@pytest.mark.parametrize("kinds", [NAMED, list(CHAINS)], ids=["classes", "chains"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_drawn_sequences_of_events_beside_torch_and_beside_an_optimizer_that_forgets(kinds: list[str]) -> None:
    machine = type("Machine", (Beside,), {"kinds": kinds})
    run_state_machine_as_test(machine, settings=SETTINGS)
