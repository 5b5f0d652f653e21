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
import gc
import itertools
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from figures import cpu_name, ratio, seconds, table, write_figures
from recipes import (
    DONATED,
    FOREACH,
    FUSED,
    LOOP,
    ONE_PASS,
    PACKED,
    SHAPES,
    TORCH,
    TRANSFORMATIONS,
    Contender,
    contenders,
    draw,
    small_tree,
)

import functional_optim as fo


# -- measuring --------------------------------------------------------------------------------------------------------


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


def run(contender: Contender, steps: int) -> list[torch.Tensor]:
    for _ in range(steps):
        contender.step()
    return [p.detach().clone() for p in contender.read()]


def memory() -> dict[str, tuple[Callable[[], object], int]]:
    """The speed of the memory: steps over 256 MiB, and the bytes that each reads and writes.

    A copy makes the processor read what it is about to overwrite, which is not counted; working in place does not.
    """
    a, b = torch.ones(1 << 26), torch.zeros(1 << 26)
    return {"copy": (lambda: b.copy_(a), 2 * a.nbytes), "in place": (lambda: b.mul_(1.0), 2 * a.nbytes)}


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


# label, shapes, recipe, our form, slower contenders (the fastest of them counts), at least
GOALS = (
    ("AdamW against torch fused", "gpt2", "adamw", DONATED, (FUSED,), 1.0),
    ("AdamW against torch fused", "16x1024x1024", "adamw", DONATED, (FUSED,), 1.0),
    ("AdamW against torch fused", "10x32x32", "adamw", DONATED, (FUSED,), 2.5),
    ("AdamW against torch fused", "148x32x32", "adamw", DONATED, (FUSED,), 2.5),
    ("AdamW against torch fused", "1000x32x32", "adamw", DONATED, (FUSED,), 3.5),
    ("packed AdamW against torch fused", "1000x32x32", "adamw", PACKED, (FUSED,), 8.0),
    ("AdamW against torch's default", "gpt2", "adamw", DONATED, (LOOP,), 4.0),
    ("clip + AdamW + EMA against torch fused", "gpt2", "clip_adamw_ema", DONATED, (FUSED,), 1.15),
    ("clip + AdamW + EMA against torch fused", "1000x32x32", "clip_adamw_ema", DONATED, (FUSED,), 4.0),
    ("Lion against the best of plain torch", "gpt2", "lion", DONATED, (LOOP, FOREACH), 3.0),
    ("LAMB against the best of plain torch", "gpt2", "lamb", DONATED, (LOOP, FOREACH), 3.0),
)


def goals(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratios that were aimed at, and those found, for the cases that were measured."""
    by_name = {(c["shapes"], c["recipe"]): c for c in cases}
    found = []
    for what, shapes, recipe, form, names, least in GOALS:
        if (case := by_name.get((shapes, recipe))) is not None:
            best = min(ratio(case["samples_s"], name, form) for name in names)
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
    return table(("step", "at least", "found", "met"), rows)


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
