"""Ten optimizers of recent papers, each a rule of a few lines, beside loops in plain torch of the same formulas.

The table says how many lines each takes, types included: those of its functions, and one for its chain. The difference
is the largest one of a parameter from the plain loop after 20 steps in float64.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import functional_optim as fo


Params = dict[str, Tensor]
Results = tuple[Tensor, ...]
Memory = dict[str, dict[str, Any]]  # of a plain loop, by parameter
SHAPES = {"matrix": (6, 4), "kernel": (3, 2, 2), "bias": (5,)}
SQUARES = fo.slot(square=True)
LR, DECAY, HORIZON = 0.02, 0.1, 12.0


# ---- ten optimizers

# Arguments stand in rows, because the table counts lines.
# fmt: off


@fo.elementwise(state={"mu": fo.zeros, "nu": SQUARES})
def stable_adamw(
    u: Tensor, p: Tensor, mu: Tensor, nu: Tensor, *, step: Tensor, learning_rate: float,
    b1: float = 0.9, b2: float = 0.99, eps: float = 1e-8, weight_decay: float = 0.0,
) -> Results:
    """StableAdamW (Wortsman et al. 2023, arXiv:2304.13013): AdamW with small steps where squares have grown at once."""
    mu, nu = b1 * mu + (1 - b1) * u, b2 * nu + (1 - b2) * u * u
    square = nu / (1 - b2**step)
    growth = torch.sqrt(fo.leaf_mean(u * u / torch.clamp(square, min=eps**2)))
    rate = learning_rate / torch.clamp(growth, min=1.0)
    return -rate * (mu / (1 - b1**step) / (torch.sqrt(square) + eps) + weight_decay * p), mu, nu


@fo.schedule(b1="(0, 1)", b3="(0, 1)", horizon="(0, inf)")
def slow_decay(count: Tensor, b1: float, b3: float, horizon: float) -> Tensor:
    """Decay that makes the half-life of the slow mean grow along a line."""
    t = torch.clamp((count + 1) / horizon, max=1.0)
    return torch.exp(math.log(b1) * math.log(b3) / ((1 - t) * math.log(b3) + t * math.log(b1)))


@fo.elementwise(state={"fast": fo.zeros, "slow": fo.zeros, "nu": SQUARES})
def scale_by_ademamix(
    u: Tensor, fast: Tensor, slow: Tensor, nu: Tensor, *, step: Tensor,
    b1: float = 0.9, b2: float = 0.999, b3: float = 0.9999, alpha: float = 5.0, eps: float = 1e-8,
) -> Results:
    """AdEMAMix (Pagliardini et al. 2024, arXiv:2409.03137): Adam with a second, slow mean of gradients."""
    fast, slow, nu = b1 * fast + (1 - b1) * u, b3 * slow + (1 - b3) * u, b2 * nu + (1 - b2) * u * u
    return (fast / (1 - b1**step) + alpha * slow) / (torch.sqrt(nu / (1 - b2**step)) + eps), fast, slow, nu


@fo.elementwise(state={"mu": fo.zeros, "nu": SQUARES})
def scale_by_adopt(
    u: Tensor, mu: Tensor, nu: Tensor, *, step: Tensor, first: Tensor,
    b1: float = 0.9, b2: float = 0.9999, eps: float = 1e-6,
) -> Results:
    """ADOPT (Taniguchi et al. 2024, arXiv:2411.02853): a gradient over the root of squares that lack it."""
    bound = (step - 1) ** 0.25
    ratio = torch.clamp(u / torch.clamp(torch.sqrt(nu), min=eps), -bound, bound)
    mu = torch.where(first, 0.0, b1 * mu + (1 - b1) * ratio)
    return mu, mu, torch.where(first, u * u, b2 * nu + (1 - b2) * u * u)


@fo.elementwise
def cautious(u: Tensor, before: Tensor, *, floor: float = 1e-3) -> Tensor:
    """Caution (Liang et al. 2024, arXiv:2411.16085), around any direction: no element goes against its gradient."""
    agrees = torch.where(u * before > 0, 1.0, 0.0)
    return u * agrees / torch.clamp(fo.leaf_mean(agrees), min=floor)


@fo.elementwise(state={"mu": fo.zeros, "nu": SQUARES, "last": fo.slot("first_update")})
def scale_by_mars(
    u: Tensor, mu: Tensor, nu: Tensor, last: Tensor, *, step: Tensor,
    b1: float = 0.95, b2: float = 0.99, gamma: float = 0.025, eps: float = 1e-8,
) -> Results:
    """MARS (Yuan et al. 2024, arXiv:2411.10438), with last gradients: Adam of gradients of a lower variance."""
    c = u + gamma * b1 / (1 - b1) * (u - last)
    c = c / torch.clamp(fo.leaf_norm(c), min=1.0)
    return *fo.scale_by_adam.formula(c, mu, nu, step=step, b1=b1, b2=b2, eps=eps), u


@fo.elementwise(
    state={"start": fo.slot("param"), "mu": fo.zeros, "nu": SQUARES, "s": fo.zeros}
    | {"r": fo.slot(per="tree"), "d": fo.slot("d0", per="tree")}
)
def prodigy(
    u: Tensor, p: Tensor, start: Tensor, mu: Tensor, nu: Tensor, s: Tensor, r: Tensor, d: Tensor, *,
    learning_rate: float = 1.0, d0: float = 1e-3, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Results:
    """Prodigy (Mishchenko & Defazio 2023, arXiv:2306.06101): Adam that finds its learning rate, d, for the tree."""
    root = b2**0.5
    r = root * r + (1 - root) * learning_rate * d * d * fo.tree_sum(u * (start - p))
    s = root * s + (1 - root) * learning_rate * d * d * u
    mu, nu = b1 * mu + (1 - b1) * d * u, b2 * nu + (1 - b2) * (d * u) ** 2
    update = -learning_rate * d * (mu / (torch.sqrt(nu) + d * eps) + weight_decay * p)
    d = torch.maximum(d, r / torch.clamp(fo.tree_sum(torch.abs(s)), min=1e-30))  # which is 0 before any gradient
    return update, start, mu, nu, s, r, d


@fo.elementwise(
    state={"z": fo.slot("param"), "x": fo.slot("param", evaluate=True), "nu": SQUARES, "total": fo.slot(per="leaf")}
)
def schedule_free_adamw(
    u: Tensor, p: Tensor, z: Tensor, x: Tensor, nu: Tensor, total: Tensor, *, step: Tensor, learning_rate: float,
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0, warmup: float = 4.0,
) -> Results:
    """Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682): gradients between z and its average, x."""
    rate = learning_rate * torch.clamp(step / warmup, max=1.0)
    nu, total = b2 * nu + (1 - b2) * u * u, total + rate * rate
    z = z - rate * (u / (torch.sqrt(nu / (1 - b2**step)) + eps) + weight_decay * p)
    x = x + rate * rate / torch.clamp(total, min=1e-30) * (z - x)  # which stays while rates are 0
    return (1 - b1) * z + b1 * x - p, z, x, nu, total


@fo.elementwise(state={"mu": fo.zeros, "h": fo.zeros}, extra={"hessian": "element"})
def scale_by_sophia(
    u: Tensor, mu: Tensor, h: Tensor, *, hessian: Tensor, step: Tensor,
    b1: float = 0.96, b2: float = 0.99, rho: float = 0.04, eps: float = 1e-12, every: float = 3.0,
) -> Results:
    """Sophia (Liu et al. 2023, arXiv:2305.14342): momentum over an estimate of the Hessian's diagonal, clipped."""
    mu = b1 * mu + (1 - b1) * u
    h = torch.where((step - 1) % every == 0, b2 * h + (1 - b2) * hessian, h)
    return torch.clamp(mu / torch.clamp(rho * h, min=eps), -1, 1), mu, h


@fo.leafwise(static=("iterations",))
def orthogonal(u: Tensor, *, iterations: int = 5, eps: float = 1e-7) -> Tensor:
    """Newton-Schulz iterations of Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), for matrices."""
    x = u / (u.norm() + eps)
    for _ in range(iterations):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x * max(1, u.shape[0] / u.shape[1]) ** 0.5


def side(k: int) -> Callable[[Tensor], tuple[int, int] | None]:
    return lambda p: (p.shape[k], p.shape[k]) if k < p.ndim else None


@fo.leafwise(state={f"side_{k}": fo.slot(shape=side(k)) for k in range(3)})
def scale_by_shampoo(u: Tensor, side_0: Tensor, side_1: Tensor, side_2: Tensor, *, eps: float = 1e-4) -> Results:
    """Shampoo (Gupta et al. 2018, arXiv:1802.09568), for up to three dimensions: a root of a matrix for each side."""
    sides, x = [side_0, side_1, side_2], u
    for k, size in enumerate(u.shape):
        flat = u.movedim(k, 0).reshape(size, -1)
        sides[k] = sides[k] + flat @ flat.T
        values, vectors = torch.linalg.eigh(sides[k] + eps * torch.eye(size, dtype=u.dtype, device=u.device))
        root = (vectors * values ** (-0.5 / u.ndim)) @ vectors.T
        x = torch.tensordot(root, x.movedim(k, 0), 1).movedim(0, k)
    return x, *sides


# fmt: on


def with_decay(direction: fo.GradientTransformation) -> fo.GradientTransformation:
    return fo.chain(direction, fo.add_decayed_weights(DECAY), fo.scale_by_learning_rate(LR))


def muon_and_adam() -> fo.GradientTransformation:
    muon = fo.chain(fo.trace(0.95, nesterov=True), orthogonal())
    return fo.partition({True: muon, False: fo.scale_by_adam()}, lambda path, p: p.ndim == 2)


# ---- the same in plain torch: one step, which changes parameters and memory in place

Step = Callable[[Params, Params, Memory, int], None]
Leaf = Callable[[Tensor, Tensor, dict[str, Any], int], Tensor]


def leaf_by_leaf(leaf: Leaf) -> Step:
    """Step that gives each parameter what `leaf` returns."""

    def step(params: Params, grads: Params, memory: Memory, t: int) -> None:
        for name, p in params.items():
            params[name] = leaf(grads[name], p, memory.setdefault(name, {}), t)

    return step


def average(m: dict[str, Any], name: str, value: Any, decay: float) -> Any:
    """Mean of values so far that is kept under a name, starting at 0."""
    m[name] = decay * m.get(name, 0.0) + (1 - decay) * value
    return m[name]


def adam_direction(g: Tensor, m: dict[str, Any], t: int, b1: float = 0.9, b2: float = 0.999) -> Tensor:
    mean, square = average(m, "mean", g, b1) / (1 - b1**t), average(m, "square", g.square(), b2) / (1 - b2**t)
    return mean / (square.sqrt() + 1e-8)


def plain_stable_adamw(g: Tensor, p: Tensor, m: dict[str, Any], t: int) -> Tensor:
    mean, square = average(m, "mean", g, 0.9) / (1 - 0.9**t), average(m, "square", g.square(), 0.99) / (1 - 0.99**t)
    growth = (g.square() / square.clamp(min=1e-16)).mean().sqrt()
    return p - LR / growth.clamp(min=1.0) * (mean / (square.sqrt() + 1e-8) + DECAY * p)


def plain_ademamix(g: Tensor, p: Tensor, m: dict[str, Any], t: int) -> Tensor:
    part, fast, slow = min(t / HORIZON, 1.0), math.log(0.9), math.log(0.9999)
    b3 = math.exp(fast * slow / ((1 - part) * slow + part * fast))
    top = average(m, "fast", g, 0.9) / (1 - 0.9**t) + part * 5.0 * average(m, "slow", g, b3)
    bottom = (average(m, "square", g.square(), 0.999) / (1 - 0.999**t)).sqrt() + 1e-8
    return p - LR * (top / bottom + DECAY * p)


def plain_adopt(g: Tensor, p: Tensor, m: dict[str, Any], t: int) -> Tensor:
    if t == 1:
        m["square"] = g.square()
        return p - LR * DECAY * p
    bound = (t - 1) ** 0.25
    mean = average(m, "mean", (g / m["square"].sqrt().clamp(min=1e-6)).clamp(-bound, bound), 0.9)
    average(m, "square", g.square(), 0.9999)
    return p - LR * (mean + DECAY * p)


def plain_cautious(g: Tensor, p: Tensor, m: dict[str, Any], t: int) -> Tensor:
    direction = adam_direction(g, m, t)
    mask = (direction * g > 0).to(g.dtype)
    return p - LR * (direction * mask / mask.mean().clamp(min=1e-3) + DECAY * p)


def plain_mars(g: Tensor, p: Tensor, m: dict[str, Any], t: int) -> Tensor:
    c, m["last"] = g + 0.025 * 0.95 / (1 - 0.95) * (g - m.get("last", g)), g
    if c.norm() > 1:
        c = c / c.norm()
    return p - LR * (adam_direction(c, m, t, 0.95, 0.99) + DECAY * p)


def plain_prodigy(params: Params, grads: Params, memory: Memory, t: int) -> None:
    whole, root = memory.setdefault("", {"d": 1e-3, "r": 0.0}), math.sqrt(0.999)
    d, scalar, length = whole["d"], 0.0, 0.0
    for name, g in grads.items():
        m = memory.setdefault(name, {"start": params[name].clone()})
        scalar += ((m["start"] - params[name]) * g).sum().item()
        length += average(m, "s", d * d * g, root).abs().sum().item()
        update = average(m, "mean", d * g, 0.9) / (average(m, "square", (d * g).square(), 0.999).sqrt() + d * 1e-8)
        params[name] = params[name] - d * (update + DECAY * params[name])
    whole["d"] = max(d, average(whole, "r", d * d * scalar, root) / length)


def plain_schedule_free(g: Tensor, p: Tensor, m: dict[str, Any], t: int) -> Tensor:
    rate = LR * min(t / 4, 1.0)
    m["total"] = m.get("total", 0.0) + rate**2
    update = g / ((average(m, "square", g.square(), 0.999) / (1 - 0.999**t)).sqrt() + 1e-8)
    m["z"] = m.get("z", p) - rate * (update + DECAY * p)
    m["x"] = torch.lerp(m.get("x", p), m["z"], rate**2 / m["total"])
    return 0.1 * m["z"] + 0.9 * m["x"]


def plain_sophia(params: Params, grads: Params, memory: Memory, t: int) -> None:
    for name, p in params.items():
        m = memory.setdefault(name, {})
        if t % 3 == 1:
            average(m, "h", hessian_at(t)[name], 0.99)
        ratio = average(m, "mean", grads[name], 0.96) / (0.04 * m["h"]).clamp(min=1e-12)
        params[name] = p - LR * (ratio.clamp(-1, 1) + DECAY * p)


def plain_muon(g: Tensor, p: Tensor, m: dict[str, Any], t: int) -> Tensor:
    if g.ndim != 2:
        return p - LR * (adam_direction(g, m, t) + DECAY * p)
    m["momentum"] = 0.95 * m.get("momentum", 0.0) + g
    x = g + 0.95 * m["momentum"]
    x = x / (x.square().sum().sqrt() + 1e-7)
    for _ in range(5):
        a = x.mm(x.t())
        x = 3.4445 * x - 4.775 * a.mm(x) + 2.0315 * a.mm(a.mm(x))
    return p - LR * (x * math.sqrt(max(1, len(g) / len(g[0]))) + DECAY * p)


def plain_shampoo(g: Tensor, p: Tensor, m: dict[str, Any], t: int) -> Tensor:
    x = g
    for k in range(g.ndim):
        flat = g.transpose(0, k).flatten(1) if g.ndim > 1 else g[:, None]
        m[f"{k}"] = m.get(f"{k}", 1e-4 * torch.eye(len(flat), dtype=g.dtype)) + flat @ flat.T
        values, vectors = torch.linalg.eigh(m[f"{k}"])
        root = vectors @ torch.diag(values ** (-1 / (2 * g.ndim))) @ vectors.T
        x = (root @ x.transpose(0, k).reshape(len(root), -1)).reshape(x.transpose(0, k).shape).transpose(0, k)
    return p - LR * (x + DECAY * p)


# ---- the comparison


@dataclass(frozen=True)
class Entry:
    """An optimizer of the table: its chain, the functions that were written for it, and a step in plain torch."""

    name: str
    tx: fo.GradientTransformation
    functions: tuple[Any, ...]
    plain: Step
    extra: Callable[[int], dict[str, Any]] = lambda t: {}

    @property
    def lines(self) -> int:
        """Lines from the decorators to the last return, without docstrings, and one for the chain."""
        written = [inspect.unwrap(f) for f in self.functions]
        return 1 + sum(inspect.getsource(f).count("\n") - bool(f.__doc__) for f in written)


growing = fo.linear_schedule(5.0 / HORIZON, 5.0, int(HORIZON) - 1)
slower = slow_decay(0.9, 0.9999, HORIZON)
OPTIMIZERS = (
    Entry(
        "StableAdamW",
        stable_adamw(learning_rate=LR, weight_decay=DECAY),
        (stable_adamw,),
        leaf_by_leaf(plain_stable_adamw),
    ),
    Entry(
        "AdEMAMix",
        with_decay(scale_by_ademamix(b3=slower, alpha=growing)),
        (slow_decay, scale_by_ademamix),
        leaf_by_leaf(plain_ademamix),
    ),
    Entry("ADOPT", with_decay(scale_by_adopt()), (scale_by_adopt,), leaf_by_leaf(plain_adopt)),
    Entry("Cautious AdamW", with_decay(cautious(fo.scale_by_adam())), (cautious,), leaf_by_leaf(plain_cautious)),
    Entry("MARS-AdamW", with_decay(scale_by_mars()), (scale_by_mars,), leaf_by_leaf(plain_mars)),
    Entry("Prodigy", prodigy(weight_decay=DECAY), (prodigy,), plain_prodigy),
    Entry(
        "Schedule-free AdamW",
        schedule_free_adamw(learning_rate=LR, weight_decay=DECAY),
        (schedule_free_adamw,),
        leaf_by_leaf(plain_schedule_free),
    ),
    Entry(
        "Sophia",
        with_decay(scale_by_sophia()),
        (scale_by_sophia,),
        plain_sophia,
        lambda t: {"hessian": hessian_at(t)},
    ),
    Entry("Muon + AdamW", with_decay(muon_and_adam()), (orthogonal, muon_and_adam), leaf_by_leaf(plain_muon)),
    Entry("Shampoo", with_decay(scale_by_shampoo()), (side, scale_by_shampoo), leaf_by_leaf(plain_shampoo)),
)


def normal(seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def grads_at(params: Params, t: int) -> Params:
    """Gradients of a bowl at step t, with noise."""
    noise = normal(t)
    return {name: 0.3 * p + noise[name] for name, p in params.items()}


def hessian_at(t: int) -> Params:
    """Estimates of a Hessian's diagonal at step t: any positive numbers, which are the same for both."""
    return {name: x.square() for name, x in normal(1000 + t).items()}


def run(entry: Entry, steps: int) -> tuple[Params, Any]:
    params = normal(0)
    state = entry.tx.init(params)
    for t in range(1, steps + 1):
        params, state = fo.apply_gradients(entry.tx, params, grads_at(params, t), state, **entry.extra(t))
    return params, state


def run_plain(entry: Entry, steps: int) -> tuple[Params, Memory]:
    params = normal(0)
    memory: Memory = {}
    for t in range(1, steps + 1):
        entry.plain(params, grads_at(params, t), memory, t)
    return params, memory


def difference(ours: Params, theirs: Params) -> float:
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


def main() -> None:
    print(f"{'optimizer':<20} {'lines':>5}  largest difference from the plain loop")
    for entry in OPTIMIZERS:
        largest = difference(run(entry, 20)[0], run_plain(entry, 20)[0])
        print(f"{entry.name:<20} {entry.lines:>5}  {largest:.1e}")


if __name__ == "__main__":
    main()
