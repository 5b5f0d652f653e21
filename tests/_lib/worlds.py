"""Optimizers of torch and of this package by name, each with its parameters, hooks and scaler."""

import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import functional_optim as fo
from _lib.chains import Halve
from _lib.compare import bits
from functional_optim import adapters


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
    """The outcome of a call."""

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
