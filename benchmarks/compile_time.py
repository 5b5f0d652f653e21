"""The time of the first step of clip + AdamW + EMA, for more and more tensors.

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --tensors 10 100 --repeats 1

Each figure is the median over processes of their own. "Cold" processes start with an empty kernel cache, "warm" ones
find there what a cold one has left. Not counted are imports, what torch sets up at its first operation, and collecting
the garbage that imports have left. A first step is split into compiling (running the C compiler, or finding the kernel
in the cache, and loading it), a step as such (what the second one takes), and the rest: tracing the rules, laying out
passes, emitting code, checking every tensor and building the tables that later steps use.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest import mock

from figures import write_figures


PARTS = ("first", "compile", "rest", "second")


def child(tensors: int) -> dict[str, float]:
    """Makes two steps in this process; returns seconds."""
    import torch

    import functional_optim as fo
    from functional_optim._compiler.c import build
    from functional_optim._runtime import cpu

    compiling = 0.0

    def timed(source: str) -> object:
        nonlocal compiling
        start = time.perf_counter()
        library = build.load_c(source)
        compiling += time.perf_counter() - start
        return library

    torch.set_num_threads(2)
    torch.manual_seed(0)
    params = {f"layers.{k}.weight": torch.randn(32, 32) for k in range(tensors)}
    grads = {k: torch.randn_like(p) for k, p in params.items()}
    torch.randn(1 << 20).mul_(2.0).sum()  # starts torch's threads
    gc.collect()
    gc.freeze()  # else the collector, at some moment of its own, walks for 0.1 s through what imports have left
    start = time.perf_counter()
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-3), fo.params_ema(0.999))
    state = tx.init(params)
    init = time.perf_counter() - start
    times = []
    with mock.patch.object(cpu, "load_c", timed):
        for _ in range(2):
            start = time.perf_counter()
            params, state = fo.apply_gradients(tx, params, grads, state, donate=True)
            times.append(time.perf_counter() - start)
    first, second = times
    rest = first - compiling - second
    return {"init": init, "first": first, "compile": compiling, "rest": rest, "second": second}


def spawn(tensors: int, cache: str) -> dict[str, float]:
    """Makes two steps in a process of its own with a given kernel cache."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(tensors)],
        env={**os.environ, "FUNCTIONAL_OPTIM_CACHE": cache},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def measure(tensors: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of each part, with and without a kernel cache."""
    runs: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="functional_optim_") as cache:
            runs["cold"].append(spawn(tensors, cache))
            runs["warm"].append(spawn(tensors, cache))
    return {kind: {part: median(r[part] for r in found) for part in found[0]} for kind, found in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, nargs="+", default=[10, 100, 1000, 3000], help="how many, each 32x32")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each figure")
    parser.add_argument("--smoke", action="store_true", help="only see that it works: ten tensors, once")
    default_json = Path(__file__).parent / "results" / "compile_time.json"
    parser.add_argument("--json", type=Path, default=default_json, help="where the figures go")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.tensors, args.repeats = [10], 1
    if args.child is not None:
        print(json.dumps(child(args.child)))
        return

    print(f"first step of clip + AdamW + EMA, ms; medians of {args.repeats} processes, two threads")
    print(f"{'':>8}{'cold':^44}{'warm':^44}".rstrip())
    print(f"{'tensors':>8}" + "".join(f"{part:>11}" for part in PARTS) * 2, flush=True)
    found = {}
    for n in args.tensors:
        found[n] = measure(n, args.repeats)
        cells = (f"{1e3 * found[n][kind][part]:>11.1f}" for kind in ("cold", "warm") for part in PARTS)
        print(f"{n:>8}{''.join(cells)}", flush=True)
    goals = []
    for kind, most in (("cold", 2.0), ("warm", 0.1)):
        if 1000 in found:
            goals.append((f"first step, 1000 tensors, {kind}", most, found[1000][kind]["first"]))
    print()
    for what, most, actual in goals:
        print(f"{what}: {1e3 * actual:.0f} ms, at most {1e3 * most:.0f} ms: {'met' if actual <= most else 'NOT MET'}")
    if {100, 3000} <= set(found):  # the compiler does not see how many tensors there are
        for kind in ("cold", "warm"):
            few, more = (found[n][kind] for n in (100, 3000))
            growth = ", ".join(f"{part} {1e3 * (more[part] - few[part]):+.0f} ms" for part in PARTS)
            print(f"from 100 to 3000 tensors, {kind}: {growth}")
    report = {
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "repeats": args.repeats,
        "goals": [{"what": what, "at_most_s": most, "found_s": actual} for what, most, actual in goals],
        "seconds": found,
    }
    write_figures(args.json, report)


if __name__ == "__main__":
    main()
