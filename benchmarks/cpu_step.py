"""The time of one optimizer step on the CPU: ours beside the ways that torch has of doing the same.

    python benchmarks/cpu_step.py
    python benchmarks/cpu_step.py --shapes gpt2 --recipes adamw lamb --rounds 10 --threads 4
    python benchmarks/cpu_step.py --shapes resnet50 --compile

How it is measured. All contenders of a case take turns within every round, in an order drawn anew, so that what
disturbs the machine disturbs them all; reported are medians over rounds, and a ratio is the median of the ratios of
each round. Our donated step has its own parameters and state, and so have torch's steps among themselves, each made
the way its library makes them: in a training run nobody else writes to what an optimizer holds. Gradients are drawn
once and used again at every step: computing them is no part of the step, and no arithmetic here depends on their
values. No step is recorded by autograd. Before anything is timed, all contenders of a recipe are compared on a small
tree.

"Useful GB/s" is the bytes that our program moves, as `fo.explain` counts them, divided by the time of each contender:
for our donated step the bandwidth achieved. "Of memory" compares it with what multiplying 256 MiB in place achieves
in the same rounds. Small models stay in the caches, so they may go beyond it.
"""

import argparse
import functools
import gc
import itertools
import math
import platform
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from figures import ratio, write_figures

import functional_optim as fo


Tensors = dict[str, torch.Tensor]
LR, B1, B2, DECAY, MAX_NORM, AVERAGE = 1e-3, 0.9, 0.999, 0.01, 1.0, 0.999
DONATED, ONE_PASS, PURE = "ours, donated", "ours, one pass", "ours, pure"
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


# -- recipes: ours, and what torch has for the same -------------------------------------------------------------------


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
    """The three forms of one transformation. The functional ones keep the results of their last step."""
    kept = dict.fromkeys((PURE, ONE_PASS), (params, state))

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

    return {
        PURE: Contender(pure, lambda: list(kept[PURE][0].values())),
        ONE_PASS: Contender(one_pass, lambda: list(kept[ONE_PASS][0].values())),
        DONATED: Contender(donated, lambda: list(params.values())),
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
        u = torch._foreach_lerp(mus, grads, 1 - B1)
        torch._foreach_sign_(u)
        torch._foreach_mul_(params, 1 - LR * DECAY)
        torch._foreach_add_(params, u, alpha=-LR)
        torch._foreach_lerp_(mus, grads, 1 - 0.99)

    return {LOOP: loop, FOREACH: foreach, COMPILED: foreach}


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


def check(recipe: str, compiled: bool, steps: int = 5) -> None:
    """Compares what all contenders make of a small tree with what the reference makes of it.

    Raises:
      AssertionError: two differ.
    """
    names = list(contenders(recipe, *small_tree(), compiled))
    with fo.use_backend("reference"):
        expected = run(contenders(recipe, *small_tree(), False)[ONE_PASS], steps)
    for name in names:
        if compiled:
            torch.compiler.reset()
        actual = run(contenders(recipe, *small_tree(), compiled)[name], steps)
        for a, e in zip(actual, expected, strict=True):
            # Values are of order one and a step moves them by 1e-3: a wrong formula or a sign that differs shows as
            # 1e-4 or more. Some ten roundings a step are 1e-6; clip_grad_norm_ adds 1e-6 to a norm of order ten.
            torch.testing.assert_close(a, e, rtol=0, atol=5e-6, msg=lambda m: f"{recipe}, {name}: {m}")


def small_tree() -> tuple[Tensors, Tensors]:
    return draw(SHAPES["tiny"](), 0, 1.0), draw(SHAPES["tiny"](), 1, 1.0)


def run(contender: Contender, steps: int) -> list[torch.Tensor]:
    for _ in range(steps):
        contender.step()
    return [p.detach().clone() for p in contender.read()]


# -- measuring --------------------------------------------------------------------------------------------------------


def seconds(step: Callable[[], object], times: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        step()
    return (time.perf_counter() - start) / times


def memory() -> dict[str, tuple[Callable[[], object], int]]:
    """The speed of the memory: steps over 256 MiB, and the bytes that each reads and writes.

    A copy makes the processor read what it is about to overwrite, which is not counted; working in place does not.
    """
    a, b = torch.ones(1 << 26), torch.zeros(1 << 26)
    return {"copy": (lambda: b.copy_(a), 2 * a.nbytes), "in place": (lambda: b.mul_(1.0), 2 * a.nbytes)}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def emitted(source: str) -> tuple[int, int]:
    """Passes, and bytes loaded and stored per element, counted in C code whose arrays are all float."""
    arrays = re.findall(r"^ +(?:const )?float \*(?:restrict )?[ao]\d+ = ", source, re.MULTILINE)
    return len(re.findall(r"^void pass_\d+\(", source, re.MULTILINE)), 4 * len(arrays)


def measure(shapes: str, recipe: str, rounds: int, compiled: bool) -> dict[str, Any]:
    """Times one case: steps of all contenders, taking turns."""
    params = draw(SHAPES[shapes](), 0, 0.02)
    grads = draw(SHAPES[shapes](), 1, 1e-3)
    explanation = fo.explain(TRANSFORMATIONS[recipe](), params)
    case = contenders(recipe, params, grads, compiled)
    if compiled:
        torch.compiler.reset()
    first = {name: seconds(c.step) for name, c in case.items()}
    once = {name: min(seconds(c.step) for _ in range(3)) for name, c in case.items()}
    # several steps in a row where one is over before the caches have settled
    times = {name: max(1, math.ceil(5e-3 / s)) for name, s in once.items()}
    limits = memory()
    steps = {name: c.step for name, c in case.items()} | {name: f for name, (f, _) in limits.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            samples[name].append(seconds(steps[name], times.get(name, 1)))
    memory_samples = {name: samples.pop(name) for name in limits}
    return {
        "shapes": shapes,
        "recipe": recipe,
        "tensors": len(params),
        "elements": explanation.parameters,
        "backends": explanation.backends,
        "launches": explanation.launches,
        "bytes_per_element": explanation.bytes_per_element,
        "emitted": [emitted(k.source) for k in explanation.kernels],
        "first_step_s": first,
        "median_s": {name: median(x) for name, x in samples.items()},
        "fastest_s": {name: min(x) for name, x in samples.items()},
        "samples_s": samples,
        "memory_bytes_per_s": {name: limits[name][1] / median(x) for name, x in memory_samples.items()},
    }


# -- reporting --------------------------------------------------------------------------------------------------------


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Plain text; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(x.ljust(w) if k == 0 else x.rjust(w) for k, (x, w) in enumerate(zip(row, widths, strict=True)))
        for row in (header, tuple("-" * w for w in widths), *rows)
    ]
    return "\n".join(lines)


def show(case: dict[str, Any]) -> str:
    moved, memory = case["bytes_per_element"] * case["elements"], case["memory_bytes_per_s"]
    rows = [
        (
            name,
            f"{1e3 * s:.3f}",
            f"{1e3 * case['fastest_s'][name]:.3f}",
            f"{moved / s / 1e9:.1f}",
            f"{moved / s / memory['in place']:.0%}",
            f"{ratio(case['samples_s'], name, DONATED):.2f}",
            f"{1e3 * case['first_step_s'][name]:.0f}",
        )
        for name, s in case["median_s"].items()
    ]
    header = ("", "median ms", "fastest ms", "useful GB/s", "of memory", "times donated", "first step ms")
    return (
        f"{case['shapes']}, {case['recipe']}: {case['tensors']} tensors, {case['elements']:,} elements; ours moves "
        f"{case['bytes_per_element']:g} bytes per element in {case['launches']} launches, computed by "
        f"{' and '.join(case['backends'])}\nmemory: {memory['copy'] / 1e9:.1f} GB/s by copying, "
        f"{memory['in place'] / 1e9:.1f} GB/s in place\n{table(header, rows)}"
    )


# what, shapes, recipe, slower contenders (the fastest of them counts), at least
GOALS = (
    ("AdamW against torch fused", "gpt2", "adamw", (FUSED,), 1.0),
    ("AdamW against torch fused", "16x1024x1024", "adamw", (FUSED,), 1.0),
    ("AdamW against torch fused", "10x32x32", "adamw", (FUSED,), 2.5),
    ("AdamW against torch fused", "148x32x32", "adamw", (FUSED,), 2.5),
    ("AdamW against torch fused", "1000x32x32", "adamw", (FUSED,), 3.5),
    ("AdamW against torch's default", "gpt2", "adamw", (LOOP,), 4.0),
    ("clip + AdamW + EMA against torch fused", "gpt2", "clip_adamw_ema", (FUSED,), 1.15),
    ("clip + AdamW + EMA against torch fused", "1000x32x32", "clip_adamw_ema", (FUSED,), 4.0),
    ("Lion against the best of plain torch", "gpt2", "lion", (LOOP, FOREACH), 3.0),
    ("LAMB against the best of plain torch", "gpt2", "lamb", (LOOP, FOREACH), 3.0),
)


def goals(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratios that were aimed at, and those found, for the cases that were measured."""
    by_name = {(c["shapes"], c["recipe"]): c for c in cases}
    found = []
    for what, shapes, recipe, names, least in GOALS:
        if (case := by_name.get((shapes, recipe))) is not None:
            best = min(ratio(case["samples_s"], name, DONATED) for name in names)
            found.append({"what": f"{what}, {shapes}", "at_least": least, "found": best, "met": best >= least})
    return found


def show_goals(found: list[dict[str, Any]], cases: list[dict[str, Any]]) -> str:
    rows = [(g["what"], f"{g['at_least']:.1f}x", f"{g['found']:.2f}x", "yes" if g["met"] else "NO") for g in found]
    case = next((c for c in cases if c["recipe"] == "clip_adamw_ema"), None)
    if case is not None:
        counts = (case["launches"], case["bytes_per_element"])
        said, code = (f"{n} launches, {b:g} B" for n, b in (counts, map(sum, zip(*case["emitted"], strict=True))))
        rows.append(
            ("clip + AdamW + EMA, as `explain` says", "2 launches, 40 B", said, "yes" if counts == (2, 40) else "NO")
        )
        rows.append(
            ("clip + AdamW + EMA, counted in the C code", "2 launches, 40 B", code, "yes" if code == said else "NO")
        )
    return table(("donated step", "at least", "found", "met"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [name for name in SHAPES if name not in ("3x32x32", "tiny")]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=default, help="which models")
    parser.add_argument("--recipes", nargs="+", choices=TORCH, default=list(TORCH), help="which optimizers")
    parser.add_argument("--rounds", type=int, default=21, help="how often each contender takes its turn")
    parser.add_argument("--threads", type=int, default=2, help="torch.set_num_threads")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile of the foreach step too: minutes")
    parser.add_argument("--compile-limit", type=int, default=200, metavar="TENSORS", help="no compiling beyond these")
    parser.add_argument("--smoke", action="store_true", help="only see that it works: one small tree, two rounds")
    default_json = Path(__file__).parent / "results" / "cpu_step.json"
    parser.add_argument("--json", type=Path, default=default_json, help="where the figures go")
    args = parser.parse_args()
    if args.smoke:
        args.shapes, args.rounds = ["tiny"], 2
    torch.set_num_threads(args.threads)

    for recipe in args.recipes:
        check(recipe, args.compile)
    machine = f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}; medians of {args.rounds} rounds in turns, float32")
    print("gradients are fixed tensors, the same at every step\n")
    cases = []
    for shapes, recipe in itertools.product(args.shapes, args.recipes):
        few = sum(1 for _ in SHAPES[shapes]()) <= args.compile_limit
        case = measure(shapes, recipe, args.rounds, args.compile and few)
        cases.append(case)
        print(show(case), end="\n\n", flush=True)
        gc.collect()  # closures of the case refer to one another
    found = goals(cases)
    print(show_goals(found, cases))
    report = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "functional_optim": fo.__version__,
        "rounds": args.rounds,
        "goals": found,
        "cases": cases,
    }
    write_figures(args.json, report)


if __name__ == "__main__":
    main()
