"""The host's part in a step: frames of Python, a tensor's share without a compiler, and a link that is not a rule.

    python benchmarks/host_step.py
    python benchmarks/host_step.py --only a,c
    python benchmarks/host_step.py --tiny

a  Calls of Python functions of this package in one steady step of AdamW over 3 parameters, and the files that they are
   in, counted by `sys.setprofile`: of `apply_gradients` in place, and of an optimizer; torch's fused one beside them.
b  A tensor's share of a step of AdamW in a process that has no C compiler: the time of a step without what torch
   operations compute, divided by the number of tensors.
c  A chain over 1000 tensors with an identity `stateless` between its rules, beside the same torch operations in a
   plain Python loop, and beside the chain without it.

Times are measured as in `adapter_step.py`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any
from unittest import mock

import torch
from adapter_step import ADAMW, Found, Step, case, goal, parameters, show_goals, show_times, turns
from figures import cpu_name, ratio, table, write_figures
from recipes import LR, SHAPES, TRANSFORMATIONS, draw

import functional_optim as fo
import functional_optim.adapters


STATELESS, PLAIN, LOOP = "with a stateless", "rules alone", "Python loop"
FOLDERS = tuple(str(Path(module.__file__).resolve().parent) for module in (fo, functional_optim.adapters))


def functional(tx: fo.GradientTransformation, shapes: str) -> Step:
    """A step in place."""
    params, grads = draw(SHAPES[shapes](), 0, 0.02), draw(SHAPES[shapes](), 1, 1e-3)
    state = tx.init(params)
    return lambda: fo.apply_gradients(tx, params, grads, state, donate=True)


def optimizer(make: Callable[..., torch.optim.Optimizer], shapes: str, **more: Any) -> Step:
    own = parameters(draw(SHAPES[shapes](), 0, 0.02), draw(SHAPES[shapes](), 1, 1e-3))
    return make(own, **ADAMW, **more).step


# -- (a) --------------------------------------------------------------------------------------------------------------


def calls(step: Step, folders: tuple[str, ...]) -> tuple[int, int]:
    """The number of calls of Python functions in some folders that a step makes, and of files that they are in."""
    files: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        name = os.path.realpath(frame.f_code.co_filename)
        if event == "call" and name.startswith(folders):
            files.append(name)

    for _ in range(5):
        step()
    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return len(files), len(set(files))


def figure_a(args: argparse.Namespace) -> Found:
    ours = {
        "apply_gradients": functional(TRANSFORMATIONS["adamw"](), "3x32x32"),
        "AdamW.step": optimizer(functional_optim.adapters.AdamW, "3x32x32"),
    }
    found = {name: calls(step, FOLDERS) for name, step in ours.items()}
    torch_folder = os.path.dirname(os.path.realpath(torch.__file__))
    shown = {**found, "torch fused": calls(optimizer(torch.optim.AdamW, "3x32x32", fused=True), (torch_folder,))}
    rows = [(name, str(n), str(files)) for name, (n, files) in shown.items()]
    print(f"(a) calls of Python functions in a steady step\n{table(('', 'calls', 'files'), rows)}\n", flush=True)
    goals = []
    for name, (n, files) in found.items():
        goals.append(goal(f"calls in a step, {name}", n, 40, True, ""))
        goals.append(goal(f"files of them, {name}", files, 8, True, ""))
    return [{"figure": "a", "calls": shown}], goals


# -- (b) --------------------------------------------------------------------------------------------------------------


def without_compiler(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of steps, and of what torch operations compute in them."""
    from functional_optim._runtime import step as runtime

    computing = 0.0
    compute = runtime.evaluate

    def timed(*arguments: Any) -> Any:
        nonlocal computing
        start = time.perf_counter()
        try:
            return compute(*arguments)
        finally:
            computing += time.perf_counter() - start

    shapes = chosen_shapes(args)
    steps = {
        "apply_gradients": functional(TRANSFORMATIONS["adamw"](), shapes),
        "AdamW.step": optimizer(functional_optim.adapters.AdamW, shapes),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    with mock.patch.object(runtime, "evaluate", timed):
        for round_ in range(args.rounds + 1):
            for name, step in steps.items():
                computing, start = 0.0, time.perf_counter()
                step()
                if round_:  # the first step binds
                    found[name].append((time.perf_counter() - start, computing))
    assert all(computed for pairs in found.values() for _, computed in pairs), "no torch operation computed the step"
    return {"tensors": sum(1 for _ in SHAPES[shapes]()), "seconds": found}


def figure_b(args: argparse.Namespace) -> Found:
    command = [sys.executable, "-W", "ignore", __file__, "--child", "--rounds", str(args.rounds)]
    command += ["--threads", str(args.threads), *(["--tiny"] if args.tiny else [])]
    environment = {**{k: x for k, x in os.environ.items() if k != "CC"}, "PATH": ""}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    n = found["tensors"]
    rows, goals = [], []
    for name, pairs in found["seconds"].items():
        whole, share = (median(x) for x in zip(*[(a, (a - b) / n) for a, b in pairs], strict=True))
        rows.append((name, f"{1e3 * whole:.3f}", f"{1e6 * share:.2f}"))
        goals.append(goal(f"a tensor's share without a compiler, {name}, {n} tensors", 1e6 * share, 3.0, True, " us"))
    print(f"(b) without a C compiler, AdamW over {n} tensors")
    print(f"{table(('', 'median ms of a step', 'us of a tensor'), rows)}\n", flush=True)
    return [{"figure": "b", **found}], goals


# -- (c) --------------------------------------------------------------------------------------------------------------


def figure_c(args: argparse.Namespace) -> Found:
    shapes = chosen_shapes(args)
    rules = fo.trace(0.9), fo.scale(-LR)
    stateless = fo.stateless(lambda updates, params: updates)
    params, grads = draw(SHAPES[shapes](), 0, 0.02), draw(SHAPES[shapes](), 1, 1e-3)
    momenta = {name: torch.zeros_like(p) for name, p in params.items()}

    @torch.no_grad()
    def loop() -> None:
        for name, p in params.items():
            m = momenta[name].mul_(0.9).add_(grads[name])
            p.add_(m, alpha=-LR)

    steps = {
        LOOP: loop,
        PLAIN: functional(fo.chain(*rules), shapes),
        STATELESS: functional(fo.chain(rules[0], stateless, rules[1]), shapes),
        f"{STATELESS}, optimizer": optimizer_of(fo.chain(rules[0], stateless, rules[1]), shapes),
    }
    samples = turns(steps, args.rounds)
    show_times(f"(c) momentum and an identity that is not a rule, {shapes}", samples, LOOP)
    bound = f"a stateless in a chain against a Python loop, {shapes}"
    goals = [
        goal(bound, ratio(samples, STATELESS, LOOP), 1.3, True, "x"),
        goal(f"{bound}, optimizer", ratio(samples, f"{STATELESS}, optimizer", LOOP), 1.3, True, "x"),
    ]
    return [case("c", shapes, samples)], goals


def optimizer_of(tx: fo.GradientTransformation, shapes: str) -> Step:
    own = parameters(draw(SHAPES[shapes](), 0, 0.02), draw(SHAPES[shapes](), 1, 1e-3))
    return functional_optim.adapters.TransformOptimizer(own, tx).step


FIGURES = {"a": figure_a, "b": figure_b, "c": figure_c}


def chosen_shapes(args: argparse.Namespace) -> str:
    return "tiny" if args.tiny else "1000x32x32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(FIGURES), help="which figures")
    parser.add_argument("--rounds", type=int, default=21, help="how often each contender takes its turn")
    parser.add_argument("--threads", type=int, default=2, help="torch.set_num_threads")
    parser.add_argument("--tiny", action="store_true", help="only see that it works: small trees, two rounds")
    default_json = Path(__file__).parent / "results" / "host_step.json"
    parser.add_argument("--json", type=Path, default=default_json, help="where the figures go")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tiny:
        args.rounds = 2
    torch.set_num_threads(args.threads)
    if args.child:
        print(json.dumps(without_compiler(args)))
        return

    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    print("small trees: times say nothing but that the script works\n" if args.tiny else "")
    cases: list[dict[str, Any]] = []
    goals: list[dict[str, Any]] = []
    for name in args.only:
        found = FIGURES[name](args)
        cases += found[0]
        goals += found[1]
    if not args.tiny:
        print(show_goals(goals))
    report = {"cpu": cpu_name(), "torch": torch.__version__, "tiny": args.tiny, "goals": goals, "cases": cases}
    write_figures(args.json, report)


if __name__ == "__main__":
    main()
