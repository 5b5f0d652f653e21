"""Shapes of models, and recipes of optimizers as our chains beside the ways that torch has of doing the same.

All contenders of a recipe step alike, each in its own form; programs beside this module time them.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

import functional_optim as fo


Tensors = dict[str, torch.Tensor]
LR, B1, B2, DECAY, MAX_NORM, AVERAGE = 1e-3, 0.9, 0.999, 0.01, 1.0, 0.999
DONATED, PACKED, ONE_PASS, PURE = "ours, donated", "ours, packed", "ours, one pass", "ours, pure"
LOOP, FOREACH, FUSED, COMPILED = "torch for-loop", "torch foreach", "torch fused", "torch compiled"


# -- shapes -----------------------------------------------------------------------------------------------------------


def gpt2_small() -> Iterator[tuple[str, tuple[int, ...]]]:
    """148 tensors, 124,439,808 elements."""
    width = 768
    yield from (("wte.weight", (50257, width)), ("wpe.weight", (1024, width)))
    linears = (("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4), ("mlp.c_proj", 4, 1))
    for k in range(12):
        for norm in ("ln_1", "ln_2"):
            yield from ((f"h.{k}.{norm}.{x}", (width,)) for x in ("weight", "bias"))
        for name, fan_in, fan_out in linears:
            yield f"h.{k}.{name}.weight", (fan_in * width, fan_out * width)
            yield f"h.{k}.{name}.bias", (fan_out * width,)
    yield from ((f"ln_f.{x}", (width,)) for x in ("weight", "bias"))


def resnet50() -> Iterator[tuple[str, tuple[int, ...]]]:
    """161 tensors, 25,557,032 elements."""

    def conv_bn(name: str, fan_in: int, fan_out: int, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.conv.weight", (fan_out, fan_in, size, size)
        yield from ((f"{name}.bn.{x}", (fan_out,)) for x in ("weight", "bias"))

    yield from conv_bn("stem", 3, 64, 7)
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}"
            yield from conv_bn(f"{name}.1", channels, width, 1)
            yield from conv_bn(f"{name}.2", width, width, 3)
            yield from conv_bn(f"{name}.3", width, 4 * width, 1)
            if block == 0:
                yield from conv_bn(f"{name}.downsample", channels, 4 * width, 1)
            channels = 4 * width
    yield from (("fc.weight", (1000, channels)), ("fc.bias", (1000,)))


def many(n: int, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors of one shape."""
    return ((f"layers.{k}.weight", shape) for k in range(n))


SHAPES: dict[str, Callable[[], Iterator[tuple[str, tuple[int, ...]]]]] = {
    "gpt2": gpt2_small,
    "resnet50": resnet50,
    "10x32x32": lambda: many(10, 32, 32),
    "148x32x32": lambda: many(148, 32, 32),
    "1000x32x32": lambda: many(1000, 32, 32),
    "1000x64": lambda: many(1000, 64),
    "16x1024x1024": lambda: many(16, 1024, 1024),
    "3x32x32": lambda: many(3, 32, 32),
    "tiny": lambda: itertools.chain(many(5, 7, 9), [("bias", (3,)), ("zero", (4, 4))]),
}


def draw(shapes: Iterator[tuple[str, tuple[int, ...]]], seed: int, scale: float) -> Tensors:
    """Normal values; a leaf called `zero` holds zeros."""
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=generator) * (scale if k != "zero" else 0.0) for k, s in shapes}


def small_tree() -> tuple[Tensors, Tensors]:
    return draw(SHAPES["tiny"](), 0, 1.0), draw(SHAPES["tiny"](), 1, 1.0)


# -- recipes: ours, and torch's own optimizers or operations ----------------------------------------------------------


class Contender(NamedTuple):
    """One way to make a step, and how to read the parameters that it has updated."""

    step: Callable[[], object]
    read: Callable[[], list[torch.Tensor]]


TRANSFORMATIONS: dict[str, Callable[[], fo.GradientTransformation]] = {
    "adamw": lambda: fo.adamw(LR, B1, B2, weight_decay=DECAY),
    "clip_adamw_ema": lambda: fo.chain(
        fo.clip_by_global_norm(MAX_NORM),
        fo.scale_by_adam(B1, B2),
        fo.add_decayed_weights(DECAY),
        fo.scale_by_learning_rate(LR),
        fo.params_ema(AVERAGE),
    ),
    "lion": lambda: fo.lion(LR, B1, 0.99, weight_decay=DECAY),
    "lamb": lambda: fo.lamb(LR, B1, B2, weight_decay=DECAY),
}


def ours(tx: fo.GradientTransformation, params: Tensors, grads: Tensors, state: Any) -> dict[str, Contender]:
    """The forms of one transformation. The functional ones keep the results of their last step.

    Packed trees are donated, and have a parameter, a gradient and a state of their own.
    """
    kept = dict.fromkeys((PURE, ONE_PASS), (params, state))
    packed = fo.pack(params)
    packed_grads, packed_state = fo.pack(grads), tx.init(packed)

    @torch.no_grad()
    def pure() -> None:
        p, s = kept[PURE]
        updates, s = tx.update(grads, s, p)
        kept[PURE] = fo.apply_updates(p, updates), s

    @torch.no_grad()
    def one_pass() -> None:
        p, s = kept[ONE_PASS]
        kept[ONE_PASS] = fo.apply_gradients(tx, p, grads, s)

    @torch.no_grad()
    def donated() -> None:
        fo.apply_gradients(tx, params, grads, state, donate=True)

    @torch.no_grad()
    def of_packed() -> None:
        fo.apply_gradients(tx, packed, packed_grads, packed_state, donate=True)

    return {
        PURE: Contender(pure, lambda: list(kept[PURE][0].values())),
        ONE_PASS: Contender(one_pass, lambda: list(kept[ONE_PASS][0].values())),
        DONATED: Contender(donated, lambda: list(params.values())),
        PACKED: Contender(of_packed, lambda: list(fo.unpack(packed).values())),
    }


def slots(state: Any) -> dict[str, list[torch.Tensor]]:
    """The tensors of each slot of a chain's state, by name."""
    found: dict[str, list[torch.Tensor]] = {}
    for member in state:
        for name, tree in member._asdict().items():
            if name != "count":
                found[name] = list(tree.values())
    return found


def torch_adamw(
    params: list[torch.nn.Parameter], memory: Mapping[str, list[torch.Tensor]], **form: bool
) -> torch.optim.AdamW:
    """torch's AdamW over memory that is there already."""
    optimizer = torch.optim.AdamW(params, lr=LR, betas=(B1, B2), weight_decay=DECAY, **form)
    for p, mu, nu in zip(params, memory["mu"], memory["nu"], strict=True):
        optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": mu, "exp_avg_sq": nu}
    return optimizer


FORMS = {LOOP: {"foreach": False}, FOREACH: {"foreach": True}, FUSED: {"fused": True}, COMPILED: {"foreach": True}}


def torch_adamw_steps(
    params: list[torch.Tensor], grads: list[torch.Tensor], memory: Mapping[str, list[torch.Tensor]]
) -> dict[str, Callable[[], object]]:
    own = [torch.nn.Parameter(p) for p in params]
    for p, g in zip(own, grads, strict=True):
        p.grad = g
    return {name: torch_adamw(own, memory, **form).step for name, form in FORMS.items()}


def torch_clip_adamw_ema_steps(
    params: list[torch.Tensor], grads: list[torch.Tensor], memory: Mapping[str, list[torch.Tensor]]
) -> dict[str, Callable[[], object]]:
    own = [torch.nn.Parameter(p) for p in params]
    for p, g in zip(own, grads, strict=True):
        p.grad = g.clone()  # clip_grad_norm_ writes to them

    def recipe(name: str) -> Callable[[], object]:
        optimizer = torch_adamw(own, memory, **FORMS[name])

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(own, MAX_NORM, foreach=name != LOOP)
            optimizer.step()
            if name == LOOP:
                for average, p in zip(memory["ema"], params, strict=True):
                    average.lerp_(p, 1 - AVERAGE)
            else:
                torch._foreach_lerp_(memory["ema"], params, 1 - AVERAGE)

        return step

    return {name: recipe(name) for name in FORMS}


def torch_lion_steps(
    params: list[torch.Tensor], grads: list[torch.Tensor], memory: Mapping[str, list[torch.Tensor]]
) -> dict[str, Callable[[], object]]:
    """Lion as well as plain torch can do it: everything in place, and every operation it can save saved.

    The loop needs one buffer of the size of the largest tensor, so what it holds stays in the cache.
    """
    mus = memory["mu"]
    buffer = torch.empty(max(p.numel() for p in params))

    @torch.no_grad()
    def loop() -> None:
        for p, g, mu in zip(params, grads, mus, strict=True):
            u = torch.lerp(mu, g, 1 - B1, out=buffer[: p.numel()].view(p.shape)).sign_()
            p.mul_(1 - LR * DECAY).add_(u, alpha=-LR)
            mu.lerp_(g, 1 - 0.99)

    @torch.no_grad()
    def foreach() -> None:
        foreach_lion(params, grads, mus)

    return {LOOP: loop, FOREACH: foreach, COMPILED: foreach}


def foreach_lion(params: list[torch.Tensor], grads: list[torch.Tensor], mus: list[torch.Tensor]) -> None:
    """One step of Lion by operations of torch on lists of tensors."""
    u = torch._foreach_lerp(mus, grads, 1 - B1)
    torch._foreach_sign_(u)
    torch._foreach_mul_(params, 1 - LR * DECAY)
    torch._foreach_add_(params, u, alpha=-LR)
    torch._foreach_lerp_(mus, grads, 1 - 0.99)


def torch_lamb_steps(
    params: list[torch.Tensor], grads: list[torch.Tensor], memory: Mapping[str, list[torch.Tensor]]
) -> dict[str, Callable[[], object]]:
    """LAMB as well as plain torch can do it; the corrections for the start at zero are folded into other numbers.

    m / c1 / (sqrt(v / c2) + eps) is r m / (sqrt(v) + eps sqrt(c2)) with r = sqrt(c2) / c1.
    """
    mus, nus, eps = memory["mu"], memory["nu"], 1e-6
    buffers = torch.empty(2, max(p.numel() for p in params))

    def corrections(t: int) -> tuple[float, float]:
        root = math.sqrt(1 - B2**t)
        return root / (1 - B1**t), eps * root

    @torch.no_grad()
    def loop(factor: float, small: float) -> None:
        for p, g, mu, nu in zip(params, grads, mus, nus, strict=True):
            mu.lerp_(g, 1 - B1)
            nu.mul_(B2).addcmul_(g, g, value=1 - B2)
            root, u = (b[: p.numel()].view(p.shape) for b in buffers)
            torch.sqrt(nu, out=root).add_(small)
            torch.mul(p, DECAY, out=u).addcdiv_(mu, root, value=factor)
            p_norm, u_norm = p.norm().item(), u.norm().item()
            p.add_(u, alpha=-LR * (p_norm / u_norm if p_norm and u_norm else 1.0))

    @torch.no_grad()
    def foreach(factor: Any, small: Any) -> None:
        torch._foreach_lerp_(mus, grads, 1 - B1)
        torch._foreach_mul_(nus, B2)
        torch._foreach_addcmul_(nus, grads, grads, 1 - B2)
        root = torch._foreach_sqrt(nus)
        torch._foreach_add_(root, small)
        if isinstance(factor, float):
            u = torch._foreach_mul(params, DECAY)
            torch._foreach_addcdiv_(u, mus, root, value=factor)
        else:  # compiled, where the number of operations does not matter
            u = torch._foreach_div(mus, root)
            torch._foreach_mul_(u, factor)
            torch._foreach_add_(u, params, alpha=DECAY)
        p_norms, u_norms = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(u))
        ratios = torch.where((p_norms == 0) | (u_norms == 0), 1.0, p_norms / u_norms)
        torch._foreach_mul_(u, (-LR * ratios).unbind())
        torch._foreach_add_(params, u)

    def counted(step: Callable[..., object], number: Callable[[float], Any] = float) -> Callable[[], object]:
        steps = itertools.count(1)
        return lambda: step(*map(number, corrections(next(steps))))

    # a number given to a compiled function is compiled in, so it gets tensors
    return {LOOP: counted(loop), FOREACH: counted(foreach), COMPILED: counted(compile_step(foreach), torch.tensor)}


TORCH = {
    "adamw": torch_adamw_steps,
    "clip_adamw_ema": torch_clip_adamw_ema_steps,
    "lion": torch_lion_steps,
    "lamb": torch_lamb_steps,
}


def compile_step(step: Callable[..., object]) -> Callable[..., object]:
    """A step that is compiled when it is first called. Compiling it is not even thought of before."""
    compiled = functools.cache(lambda: torch.compile(lambda *args: step(*args)))
    return lambda *args: compiled()(*args)


def contenders(recipe: str, params: Tensors, grads: Tensors, compiled: bool) -> dict[str, Contender]:
    """All ways to make a step of a recipe; torch's share their memory."""
    tx = TRANSFORMATIONS[recipe]()
    state = tx.init(params)
    leaves = [p.clone() for p in params.values()]
    memory = {name: [x.clone() for x in column] for name, column in slots(state).items()}
    found = ours(tx, params, grads, state)
    steps = TORCH[recipe](leaves, list(grads.values()), memory)
    for name, step in steps.items():
        if name != COMPILED or compiled:
            whole = name == COMPILED and recipe != "lamb"  # lamb compiles all but its counter
            found[name] = Contender(compile_step(step) if whole else step, lambda: leaves)
    return found
