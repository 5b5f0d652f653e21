"""The cost of a step when a chain is a `torch.optim.Optimizer`: time, first step, memory, and the host's part in it.

    python benchmarks/adapter_step.py
    python benchmarks/adapter_step.py --only a,c --rounds 51 --threads 4
    python benchmarks/adapter_step.py --tiny

a  AdamW.step() beside torch.optim.AdamW(fused=True).step(): 10, 148 and 1000 tensors of 32x32, and GPT-2 small.
b  clip, AdamW and an average of the parameters in one chain, beside clip_grad_norm_, fused AdamW and a foreach lerp.
c  200 parameter groups, each with a learning rate and a decay of its own, beside the same tensors in one group.
d  Constructing the optimizer and taking the first step, 1000 tensors, in fresh processes that find the kernel on disk.
   Not counted are imports, torch's first operation, and collecting the garbage that imports have left.
e  The memory that a later step takes above parameters, gradients and state.
f  The time of a step under FSDP2 in one gloo process, beside plain tensors.

Times are measured as in `cpu_step.py`: contenders take turns within every round in an order drawn anew; given are
medians over rounds, and a ratio is the median of the ratios of each round. In (a), (b) and (c) contenders share
parameters and gradients, which are fixed; every optimizer has the state that it makes itself. Before anything is
timed, the contenders of (a) and (b) are compared on a small tree.

Memory. torch has no statistics of its allocator on the CPU, but its profiler records every allocation and release:
the highest sum of these in one step is "torch". tracemalloc gives the same for Python's own, in another step:
"Python"; tables that kernels read are made of Python's memory. What neither sees, such as a kernel's own malloc, is in
"process": by how much the resident memory of the process rose in a third step (Linux only; a multiple of the page
size, with freed memory given back at once). The figure is the sum of the first two. "Kept" is what a first step leaves
behind above the state: tables and plans. Every contender has a process of its own.

Host time. The tensors of (f) are so small (64 elements) that a step is next to no arithmetic: its time is what the
host does about it. One process needs no network, but its reductions still go through the collectives.
"""

import argparse
import functools
import gc
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from figures import cpu_name, ratio, seconds, table, write_figures
from recipes import (
    B1,
    B2,
    DECAY,
    FUSED,
    LR,
    SHAPES,
    TRANSFORMATIONS,
    Tensors,
    draw,
    slots,
    small_tree,
    torch_clip_adamw_ema_steps,
)

import functional_optim as fo
from functional_optim.adapters import AdamW, TransformOptimizer


Step = Callable[[], object]
OURS, FOREACH, LOOP = "ours", "torch foreach", "torch for-loop"
ADAMW = {"lr": LR, "betas": (B1, B2), "weight_decay": DECAY}


# -- contenders -------------------------------------------------------------------------------------------------------


def parameters(params: Tensors, grads: Tensors) -> list[torch.nn.Parameter]:
    """Parameters over tensors that are there already, with gradients."""
    own = [torch.nn.Parameter(p) for p in params.values()]
    for p, g in zip(own, grads.values(), strict=True):
        p.grad = g
    return own


def adamw(params: Tensors, grads: Tensors) -> dict[str, Step]:
    own = parameters(params, grads)
    ours, theirs = AdamW(own, **ADAMW), torch.optim.AdamW(own, **ADAMW, fused=True)
    return {OURS: ours.step, FUSED: theirs.step}


def clip_adamw_ema(params: Tensors, grads: Tensors) -> dict[str, Step]:
    own = parameters(params, grads)
    tx = TRANSFORMATIONS["clip_adamw_ema"]()
    ours, leaves = TransformOptimizer(own, tx), list(params.values())
    memory = slots(tx.init(params))
    return {OURS: ours.step, FUSED: torch_clip_adamw_ema_steps(leaves, list(grads.values()), memory)[FUSED]}


def groups(params: Tensors, grads: Tensors, number: int) -> dict[str, Step]:
    """One parameter group beside many, each with numbers of its own."""
    own = parameters(params, grads)
    cut = [own[k::number] for k in range(number)]

    def many() -> list[dict[str, Any]]:
        return [{"params": c, "lr": LR * (1 + k / number), "weight_decay": DECAY / (1 + k)} for k, c in enumerate(cut)]

    one_group, many_groups = AdamW(own, **ADAMW), AdamW(many(), **ADAMW)
    torch_one = torch.optim.AdamW(own, **ADAMW, fused=True)
    torch_many = torch.optim.AdamW(many(), **ADAMW, fused=True)
    return {
        f"{OURS}, 1 group": one_group.step,
        f"{OURS}, {number} groups": many_groups.step,
        f"{FUSED}, 1 group": torch_one.step,
        f"{FUSED}, {number} groups": torch_many.step,
    }


def check(recipe: Callable[[Tensors, Tensors], dict[str, Step]], steps: int = 5) -> None:
    """Compares what the contenders make of a small tree.

    Raises:
      AssertionError: they differ.
    """
    found = []
    for name in (OURS, FUSED):
        params, grads = small_tree()
        step = recipe(params, grads)[name]
        for _ in range(steps):
            step()
        found.append(params)
    # Values are of order one and a step moves them by 1e-3: a wrong formula or a sign that differs shows as 1e-4 or
    # more. Some ten roundings a step are 1e-6; clip_grad_norm_ adds 1e-6 to a norm of order ten.
    torch.testing.assert_close(*found, rtol=0, atol=5e-6)


# -- measuring --------------------------------------------------------------------------------------------------------


def turns(steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each contender, round by round."""
    once: dict[str, float] = {}
    for name, step in steps.items():
        step()
        once[name] = min(seconds(step) for _ in range(3))
    # several steps in a row where one is over before the caches have settled
    times = {name: max(1, math.ceil(5e-3 / s)) for name, s in once.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            samples[name].append(seconds(steps[name], times[name]))
    return samples


def torch_memory(step: Step) -> tuple[int, int]:
    """The highest sum of torch's allocations in a step, and what of them is left after it, in bytes."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    total = highest = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            highest = max(highest, total)
    return highest, total


def python_memory(step: Step) -> tuple[int, int]:
    """The highest sum of Python's allocations in a step, and what of them is left after it, in bytes."""
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    step()
    _, highest = tracemalloc.get_traced_memory()
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return highest - before, after - before


def process_memory(step: Step) -> int | None:
    """By how much the resident memory of this process rises in a step, in bytes; None where Linux is not there."""

    def resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is the present one
        before = resident("VmHWM")
    except OSError:
        return None
    step()
    return resident("VmHWM") - before


def spawn(what: str, args: argparse.Namespace, *more: str, **environment: str) -> dict[str, Any]:
    """The result of a function below, called in a process of its own."""
    options = ["--child", what, "--threads", str(args.threads), "--rounds", str(args.rounds), *more]
    done = subprocess.run(
        [sys.executable, __file__, *options, *(["--tiny"] if args.tiny else [])],
        env={**os.environ, "KINETO_LOG_LEVEL": "99", **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def first_step(args: argparse.Namespace) -> dict[str, float]:
    """Seconds to construct an optimizer and to take its first steps."""
    shapes = SHAPES[named(args, "1000x32x32")]
    params, grads = draw(shapes(), 0, 0.02), draw(shapes(), 1, 1e-3)
    own = parameters(params, grads)
    make = {OURS: functools.partial(AdamW, own, **ADAMW), FUSED: torch_form(FUSED, own)}[args.contender]
    torch.randn(1 << 20).mul_(2.0).sum()  # starts torch's threads
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # torch's first optimizer imports its compiler
    gc.collect()
    gc.freeze()  # else the collector, at some moment of its own, walks for 0.1 s through what imports have left
    start = time.perf_counter()
    optimizer = make()
    constructed = time.perf_counter()
    optimizer.step()
    stepped = time.perf_counter()
    optimizer.step()
    second = time.perf_counter() - stepped
    return {"construct": constructed - start, "first": stepped - constructed, "second": second}


def torch_form(name: str, params: list[torch.nn.Parameter]) -> Callable[[], torch.optim.Optimizer]:
    form = {FUSED: {"fused": True}, FOREACH: {"foreach": True}, LOOP: {"foreach": False}}[name]
    return functools.partial(torch.optim.AdamW, params, **ADAMW, **form)


def step_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes that a first step leaves and a later one takes."""

    def make(own: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        if args.contender == OURS:
            return AdamW(own, **ADAMW)
        if args.contender == f"{OURS}, clip + AdamW + EMA":
            return TransformOptimizer(own, TRANSFORMATIONS["clip_adamw_ema"]())
        return torch_form(args.contender, own)()

    make(parameters(*small_tree())).step()  # what is imported and built is in place
    torch_memory(lambda: torch.empty(1 << 20))  # so is the profiler
    highest, _ = torch_memory(lambda: torch.empty(1 << 20))
    if highest < 4 << 20:
        raise RuntimeError(f"torch's profiler saw {highest} of {4 << 20} bytes; it cannot be relied on here.")
    shapes = SHAPES[args.shapes]
    own = parameters(draw(shapes(), 0, 0.02), draw(shapes(), 1, 1e-3))
    optimizer = make(own)
    python: list[tuple[int, int]] = []
    _, left = torch_memory(lambda: python.append(python_memory(optimizer.step)))
    state = sum(x.nbytes for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor))
    optimizer.step()
    figures = {
        "torch": torch_memory(optimizer.step)[0],
        "python": python_memory(optimizer.step)[0],
        "process": process_memory(optimizer.step),
        "kept": {"torch": left - state, "python": python[0][1]},
        "state": state,
    }
    return figures


def under_fsdp(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of steps of sharded and of plain parameters, and of what torch does about both."""
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    shapes = SHAPES[named(args, "1000x64")]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))

        def plain() -> list[torch.nn.Parameter]:
            return parameters(draw(shapes(), 0, 0.02), draw(shapes(), 1, 1e-3))

        def sharded() -> list[torch.nn.Parameter]:
            model = nn.ParameterList(plain())
            grads = [p.grad for p in model]
            fully_shard(model, mesh=mesh)
            for p, g in zip(model.parameters(), grads, strict=True):
                p.grad = distribute_tensor(g, p.device_mesh, p.placements)
            return list(model.parameters())

        makes: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
            "AdamW": lambda own: AdamW(own, **ADAMW),
            "clip + AdamW + EMA": lambda own: TransformOptimizer(own, TRANSFORMATIONS["clip_adamw_ema"]()),
            "torch fused AdamW": lambda own: torch.optim.AdamW(own, **ADAMW, fused=True),
        }
        steps: dict[str, Step] = {}
        for name, make in makes.items():
            params = {"plain": plain(), "FSDP2": sharded()}
            for kind, own in params.items():
                steps[f"{name}, {kind}"] = make(own).step
                steps[f"{name}, {kind}"]()
            for p, q in zip(*params.values(), strict=True):
                torch.testing.assert_close(q.to_local(), p, rtol=0, atol=0)  # one process: the same arithmetic
        return {"samples_s": turns(steps, args.rounds)}
    finally:
        dist.destroy_process_group()


CHILDREN = {"first_step": first_step, "step_memory": step_memory, "under_fsdp": under_fsdp}


# -- the six figures --------------------------------------------------------------------------------------------------


def named(args: argparse.Namespace, shapes: str) -> str:
    """The shapes that stand for some others."""
    return "tiny" if args.tiny else shapes


def goal(what: str, found: float, bound: float, most: bool, unit: str) -> dict[str, Any]:
    met = found <= bound if most else found >= bound
    return {"what": what, "found": found, "at_most" if most else "at_least": bound, "unit": unit, "met": met}


def show_times(title: str, samples: Mapping[str, Sequence[float]], base: str) -> None:
    rows = [
        (name, f"{1e3 * median(x):.3f}", f"{1e3 * min(x):.3f}", f"{ratio(samples, name, base):.2f}")
        for name, x in samples.items()
    ]
    print(f"{title}\n{table(('', 'median ms', 'fastest ms', f'times {base}'), rows)}\n", flush=True)


def case(figure: str, shapes: str, samples: dict[str, list[float]]) -> dict[str, Any]:
    medians = {name: median(x) for name, x in samples.items()}
    return {"figure": figure, "shapes": shapes, "median_s": medians, "samples_s": samples}


Found = tuple[list[dict[str, Any]], list[dict[str, Any]]]  # cases and goals


def against_fused(
    args: argparse.Namespace,
    figure: str,
    what: str,
    recipe: Callable[[Tensors, Tensors], dict[str, Step]],
    **least: float,
) -> Found:
    check(recipe)
    cases, goals = [], []
    for shapes, bound in {named(args, name): x for name, x in least.items()}.items():
        samples = turns(recipe(draw(SHAPES[shapes](), 0, 0.02), draw(SHAPES[shapes](), 1, 1e-3)), args.rounds)
        gc.collect()  # closures of the case refer to one another
        show_times(f"({figure}) {what}, {shapes}", samples, OURS)
        cases.append(case(figure, shapes, samples))
        goals.append(goal(f"{what} against torch fused, {shapes}", ratio(samples, FUSED, OURS), bound, False, "x"))
    return cases, goals


def figure_a(args: argparse.Namespace) -> Found:
    least = {"10x32x32": 2.5, "148x32x32": 3.0, "1000x32x32": 3.0, "gpt2": 1.0}
    return against_fused(args, "a", "AdamW", adamw, **least)


def figure_b(args: argparse.Namespace) -> Found:
    return against_fused(args, "b", "clip + AdamW + EMA", clip_adamw_ema, **{"1000x32x32": 4.0, "gpt2": 1.15})


def figure_c(args: argparse.Namespace) -> Found:
    number = 3 if args.tiny else 200
    shapes = named(args, "1000x32x32")
    samples = turns(groups(draw(SHAPES[shapes](), 0, 0.02), draw(SHAPES[shapes](), 1, 1e-3), number), args.rounds)
    base = f"{OURS}, 1 group"
    show_times(f"(c) parameter groups, AdamW, {shapes}", samples, base)
    ours = ratio(samples, f"{OURS}, {number} groups", base)
    theirs = ratio(samples, f"{FUSED}, {number} groups", f"{FUSED}, 1 group")
    print(f"{number} groups against 1: {ours:.2f}x here, {theirs:.2f}x in torch fused\n")
    what = f"{number} groups against 1, {shapes} (torch fused's own: {theirs:.2f}x)"
    return [{**case("c", shapes, samples), "torch_ratio": theirs}], [goal(what, ours, 1.2, True, "x")]


def figure_d(args: argparse.Namespace) -> Found:
    shapes, processes = named(args, "1000x32x32"), 1 if args.tiny else 5
    runs: dict[str, list[dict[str, Any]]] = {OURS: [], FUSED: []}
    with tempfile.TemporaryDirectory(prefix="functional_optim_") as cache:
        child = functools.partial(spawn, "first_step", args, FUNCTIONAL_OPTIM_CACHE=cache)
        child("--contender", OURS)  # builds the kernel
        for _ in range(processes):
            for name, found in runs.items():
                found.append(child("--contender", name))
    rows = [
        (name, *(f"{1e3 * median(r[part] for r in found):.1f}" for part in ("construct", "first", "second")))
        for name, found in runs.items()
    ]
    print(f"(d) AdamW, {shapes}, ms; medians of {processes} processes, kernel on disk")
    print(f"{table(('', 'construct', 'first step', 'second step'), rows)}\n", flush=True)
    total = median(r["construct"] + r["first"] for r in runs[OURS])
    goals = [goal(f"constructing and first step, {shapes}, kernel on disk", total, 0.2, True, " s")]
    return [{"figure": "d", "shapes": shapes, "processes": runs}], goals


def figure_e(args: argparse.Namespace) -> Found:
    contenders = (OURS, f"{OURS}, clip + AdamW + EMA", FUSED, FOREACH, LOOP)[: 2 if args.tiny else None]
    cases, goals = [], []
    for shapes in dict.fromkeys(named(args, s) for s in ("gpt2", "1000x32x32")):
        found = {}
        for name in contenders:
            # memory that is freed goes back to the system at once, so that a rise shows whenever it happens
            own = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
            found[name] = spawn("step_memory", args, "--shapes", shapes, "--contender", name, **own)
        rows = [
            (
                name,
                *(f"{x / 2**10:,.0f}" for x in (f["torch"] + f["python"], f["torch"], f["python"])),
                "-" if f["process"] is None else f"{f['process'] / 2**10:,.0f}",
                f"{sum(f['kept'].values()) / 2**10:,.0f}",
                f"{f['state'] / 2**10:,.0f}",
            )
            for name, f in found.items()
        ]
        print(f"(e) memory of a step, {shapes}, KiB")
        print(table(("", "above", "torch", "Python", "process", "kept", "state"), rows), end="\n\n", flush=True)
        cases.append({"figure": "e", "shapes": shapes, "bytes": found})
        for name in contenders[:2]:
            above = (found[name]["torch"] + found[name]["python"]) / 1e6
            goals.append(goal(f"peak memory of a later step, {name}, {shapes}", above, 1.0, True, " MB"))
    return cases, goals


def figure_f(args: argparse.Namespace) -> Found:
    shapes = named(args, "1000x64")
    samples = spawn("under_fsdp", args)["samples_s"]
    show_times(f"(f) a step under FSDP2, 1 gloo process, {shapes}", samples, "AdamW, plain")
    recipes = list(dict.fromkeys(name.rpartition(", ")[0] for name in samples))
    ratios = {name: ratio(samples, f"{name}, FSDP2", f"{name}, plain") for name in recipes}
    print(f"FSDP2 against plain: {', '.join(f'{x:.2f}x for {name}' for name, x in ratios.items())}\n")
    goals = [
        goal(f"a step under FSDP2 against plain tensors, {name}, {shapes}", x, 1.3, True, "x")
        for name, x in ratios.items()
        if not name.startswith("torch")
    ]
    return [{**case("f", shapes, samples), "ratios": ratios}], goals


FIGURES = {"a": figure_a, "b": figure_b, "c": figure_c, "d": figure_d, "e": figure_e, "f": figure_f}


def show_goals(goals: list[dict[str, Any]]) -> str:
    rows = []
    for g in goals:
        most = "at_most" in g
        bound = f"{'at most' if most else 'at least'} {g['at_most' if most else 'at_least']:g}{g['unit']}"
        rows.append((g["what"], bound, f"{g['found']:.2f}{g['unit']}", "yes" if g["met"] else "NO"))
    return table(("", "bound", "found", "met"), rows)


def chosen(text: str) -> list[str]:
    names = text.split(",")
    if unknown := sorted(set(names) - set(FIGURES)):
        raise argparse.ArgumentTypeError(f"no figure is called {', '.join(unknown)}; there are {', '.join(FIGURES)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=chosen, default=list(FIGURES), metavar="a,b,...", help="which figures")
    parser.add_argument("--rounds", type=int, default=21, help="how often each contender takes its turn")
    parser.add_argument("--threads", type=int, default=2, help="torch.set_num_threads")
    parser.add_argument("--tiny", action="store_true", help="only see that it works: small trees, two rounds")
    default_json = Path(__file__).parent / "results" / "adapter_step.json"
    parser.add_argument("--json", type=Path, default=default_json, help="where the figures go")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--shapes", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tiny:
        args.rounds = 2
    torch.set_num_threads(args.threads)
    if args.child is not None:
        print(json.dumps(CHILDREN[args.child](args)))
        return

    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    print(f"medians of {args.rounds} rounds in turns; gradients are fixed tensors, the same at every step")
    print("small trees: what follows says nothing but that the script works\n" if args.tiny else "")
    cases: list[dict[str, Any]] = []
    goals: list[dict[str, Any]] = []
    for name in args.only:
        found = FIGURES[name](args)
        cases += found[0]
        goals += found[1]
    if not args.tiny:
        print(show_goals(goals))
    report = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "functional_optim": fo.__version__,
        "rounds": args.rounds,
        "tiny": args.tiny,
        "goals": goals,
        "cases": cases,
    }
    write_figures(args.json, report)


if __name__ == "__main__":
    main()
