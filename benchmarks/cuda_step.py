"""The time of one optimizer step on a CUDA device: ours beside the ways that torch has of doing the same.

    python benchmarks/cuda_step.py
    python benchmarks/cuda_step.py --shapes gpt2 --recipes adamw --compile --json figures.json
    python benchmarks/cuda_step.py --shapes gpt2 llama --recipes muon

It runs from a checkout where torch, Triton and optree can be imported, and takes about two minutes on an H100; most
of the first run is compiling. Before anything is timed, all forms of each recipe are compared with the reference on
the CPU, captured steps too.

How it is measured. "Device ms" is the time between two events around steps that are enqueued back to back, divided by
their number; "host ms" is the time to enqueue one. Where both are alike, the host is the limit. Medians of three runs.
Every contender has its own parameters and state, and none of them is in memory while another is timed. Gradients are
fixed tensors. "Useful GB/s" is the bytes that our program moves, as `fo.explain` counts them, divided by the device
time of each contender; "of copy" compares it with copying 4 GiB from device to device, bytes read and written. Muon
multiplies matrices instead, so it has times only, of a step over the matrices of a model's layers.
"""

import argparse
import contextlib
import gc
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from figures import table, write_figures
from recipes import (
    AVERAGE,
    B1,
    B2,
    DECAY,
    LR,
    MAX_NORM,
    SHAPES as CPU_SHAPES,
    TRANSFORMATIONS,
    draw,
    foreach_lion,
    many,
    small_tree,
)
from torch_optim_rows import layers

import functional_optim as fo
from functional_optim import adapters


Step = Callable[[], object]
DONATED, PURE, ADAPTER, CAPTURED = "ours, donated", "ours, pure", "ours, adapter", "ours, adapter, captured"
FUSED, FOREACH, COMPILED = "torch fused", "torch foreach", "torch compiled"
RUNS, SECONDS = 3, 0.15  # of a contender, and how long each is to take


def llama() -> Iterator[tuple[str, tuple[int, ...]]]:
    """201 tensors, 1,100,048,384 elements: a Llama of 22 layers."""
    width, inner, keys = 2048, 5632, 256
    yield "embed.weight", (32000, width)
    for k in range(22):
        for name, rows, columns in (
            *(("q", width, width), ("k", keys, width), ("v", keys, width), ("o", width, width)),
            *(("gate", inner, width), ("up", inner, width), ("down", width, inner)),
        ):
            yield f"layers.{k}.{name}.weight", (rows, columns)
        yield from ((f"layers.{k}.norm_{j}.weight", (width,)) for j in (1, 2))
    yield from (("norm.weight", (width,)), ("head.weight", (32000, width)))


SHAPES = {
    "16x32x32": lambda: many(16, 32, 32),
    "16x1024x1024": CPU_SHAPES["16x1024x1024"],
    "1000x32x32": CPU_SHAPES["1000x32x32"],
    "gpt2": CPU_SHAPES["gpt2"],
    "llama": llama,
    "tiny": CPU_SHAPES["tiny"],
}
RECIPES = TRANSFORMATIONS | {"sgd": lambda: fo.sgd(LR, momentum=B1)}


MUON = "muon"
MATRICES = {
    "gpt2": layers,
    "llama": lambda: ((name, shape) for name, shape in llama() if "norm" not in name and "layers" in name),
    "tiny": lambda: many(4, 8, 12),
}


# -- contenders -------------------------------------------------------------------------------------------------------


class Tensors:
    """Parameters and gradients of one contender.

    Args:
      params: the parameters.
      grads: the gradients.
    """

    def __init__(self, params: dict[str, torch.Tensor], grads: dict[str, torch.Tensor]) -> None:
        self.params, self.grads = params, grads

    def leaves(self) -> list[torch.nn.Parameter]:
        """The parameters of an optimizer, with their gradients."""
        leaves = [torch.nn.Parameter(p) for p in self.params.values()]
        for p, g in zip(leaves, self.grads.values(), strict=True):
            p.grad = g
        return leaves


def ours_donated(recipe: str, x: Tensors) -> Step:
    tx = RECIPES[recipe]()
    state = tx.init(x.params)
    return lambda: fo.apply_gradients(tx, x.params, x.grads, state, donate=True)


def ours_pure(recipe: str, x: Tensors) -> Step:
    tx = RECIPES[recipe]()
    state = tx.init(x.params)

    def step() -> None:
        nonlocal state
        x.params, state = fo.apply_gradients(tx, x.params, x.grads, state)

    return step


def ours_adapter(recipe: str, x: Tensors) -> Step:
    step: Step = adapters.TransformOptimizer(x.leaves(), RECIPES[recipe]()).step
    return step


def captured(step: Step, warm_ups: int = 3) -> Step:
    """A step as one replay of a graph. It is taken some times before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(step: Step = step) -> None:  # a graph writes to the state of the optimizer, and does not keep it
        graph.replay()

    return replay


def torch_adamw(x: Tensors, **how: bool) -> Step:
    step: Step = torch.optim.AdamW(x.leaves(), lr=LR, betas=(B1, B2), weight_decay=DECAY, **how).step
    return step


def torch_sgd(x: Tensors, **how: bool) -> Step:
    step: Step = torch.optim.SGD(x.leaves(), lr=LR, momentum=B1, **how).step
    return step


def torch_clip_adamw_ema(x: Tensors, **how: bool) -> Step:
    leaves = x.leaves()
    averages = [p.detach().clone() for p in leaves]
    optimizer = torch.optim.AdamW(leaves, lr=LR, betas=(B1, B2), weight_decay=DECAY, **how)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(leaves, MAX_NORM, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(averages, [p.detach() for p in leaves], 1 - AVERAGE)

    return step


def torch_lion(x: Tensors) -> Step:
    params, grads = list(x.params.values()), list(x.grads.values())
    mus = [torch.zeros_like(p) for p in params]
    return lambda: foreach_lion(params, grads, mus)


TORCH: dict[str, dict[str, Callable[[Tensors], Step]]] = {
    "adamw": {
        FUSED: lambda x: torch_adamw(x, fused=True),
        FOREACH: lambda x: torch_adamw(x, foreach=True),
        COMPILED: lambda x: torch.compile(torch_adamw(x, foreach=True, capturable=True)),
    },
    "clip_adamw_ema": {
        FUSED: lambda x: torch_clip_adamw_ema(x, fused=True),
        FOREACH: lambda x: torch_clip_adamw_ema(x, foreach=True),
    },
    "lion": {FOREACH: torch_lion, COMPILED: lambda x: torch.compile(torch_lion(x))},
    "lamb": {},
    "sgd": {FUSED: lambda x: torch_sgd(x, fused=True), FOREACH: lambda x: torch_sgd(x, foreach=True)},
}
MUONS: dict[str, Callable[..., torch.optim.Optimizer]] = {ADAPTER: adapters.Muon, "torch": torch.optim.Muon}
OURS: dict[str, Callable[[str, Tensors], Step]] = {DONATED: ours_donated, PURE: ours_pure, ADAPTER: ours_adapter}


def contenders(recipe: str, device: torch.device, compiled: bool) -> dict[str, Callable[[Tensors], Step]]:
    """The makers of all steps of a recipe."""
    found: dict[str, Callable[[Tensors], Step]] = {
        name: lambda x, make=make: make(recipe, x) for name, make in OURS.items()
    }
    if device.type == "cuda":
        found[CAPTURED] = lambda x: captured(ours_adapter(recipe, x))
        found |= {name: make for name, make in TORCH[recipe].items() if name != COMPILED or compiled}
    return found


# -- correctness ------------------------------------------------------------------------------------------------------


def check(recipe: str, device: torch.device, steps: int = 5) -> None:
    """Compares all of our forms on a small tree with the reference on the CPU.

    Raises:
      AssertionError: two differ.
    """
    params, grads = small_tree()
    expected = Tensors(params, grads)
    with fo.use_backend("reference"):
        step = ours_pure(recipe, expected)
        for _ in range(steps):
            step()
    forms = dict(OURS)
    if device.type == "cuda":
        forms[CAPTURED] = lambda recipe, x: ours_adapter(recipe, x)
    for name, make in forms.items():
        x = Tensors(*({k: v.clone().to(device) for k, v in tree.items()} for tree in small_tree()))
        step = make(recipe, x)
        replayed = name == CAPTURED
        if replayed:
            step = captured(step, 3)
        for _ in range(steps - 3 * replayed):
            step()
        for k, p in expected.params.items():
            # Values are of order one and a step moves them by 1e-3: a wrong formula shows as 1e-4 or more.
            actual = x.params[k].detach().cpu()
            torch.testing.assert_close(actual, p, rtol=0, atol=5e-6, msg=lambda m: f"{recipe}, {name}: {m}")


def check_muon(device: torch.device, steps: int = 5) -> None:
    """Compares Muon with torch's.

    Raises:
      AssertionError: they differ by more than steps in bfloat16 do.
    """
    results = []
    for make in MUONS.values():
        x = Tensors(*(on_device("tiny", seed, 1.0, device, MATRICES) for seed in (0, 1)))
        optimizer = make(x.leaves(), lr=LR)
        for _ in range(steps):
            optimizer.step()
        results.append(x.params)
    torch.testing.assert_close(*results, rtol=0, atol=steps * LR * 2**-6)


def first_step(device: torch.device) -> float:
    """Seconds of the first step of a process, kernels and all, after a first use of the device."""
    params, grads = ({k: x.to(device) for k, x in tree.items()} for tree in small_tree())
    synchronize(device)
    start = time.perf_counter()
    tx = RECIPES["adamw"]()
    fo.apply_gradients(tx, params, grads, tx.init(params), donate=True)
    synchronize(device)
    return time.perf_counter() - start


# -- measuring --------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(step: Step, device: torch.device) -> tuple[float, float]:
    """Seconds of a step on the device, and on the host."""
    for _ in range(3):
        step()
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    n = max(3, min(100, int(SECONDS / max(time.perf_counter() - start, 1e-5))))
    devices, hosts = [], []
    for _ in range(RUNS):
        synchronize(device)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        for event in events[:1]:
            event.record()
        start = time.perf_counter()
        for _ in range(n):
            step()
        hosts.append((time.perf_counter() - start) / n)
        for event in events[1:]:
            event.record()
        synchronize(device)
        devices.append(events[0].elapsed_time(events[1]) / n / 1e3 if events else hosts[-1])
    return median(devices), median(hosts)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy, read and written."""
    n = 1 << 30 if device.type == "cuda" else 1 << 20
    a, b = torch.empty(n, device=device), torch.empty(n, device=device)
    return 8 * n / timed(lambda: b.copy_(a), device)[0]


def measure(shapes: str, recipe: str, device: torch.device, compiled: bool) -> dict[str, Any]:
    """Times one case, contender after contender."""
    seconds: dict[str, tuple[float, float]] = {}
    first: dict[str, float] = {}
    memory: dict[str, int] = {}
    explanation = fo.explain(RECIPES[recipe](), on_device(shapes, 0, 0.02, device))
    for name, make in contenders(recipe, device, compiled).items():
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        x = Tensors(on_device(shapes, 0, 0.02, device), on_device(shapes, 1, 1e-3, device))
        with contextlib.nullcontext() if name in TORCH[recipe] else torch.no_grad():
            step = make(x)
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            first[name] = time.perf_counter() - start
            if device.type == "cuda":
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                step()
                memory[name] = torch.cuda.max_memory_allocated() - before
            seconds[name] = timed(step, device)
        del step, x
    return {
        "shapes": shapes,
        "recipe": recipe,
        "elements": explanation.parameters,
        "launches": explanation.launches,
        "backends": explanation.backends,
        "bytes_per_element": explanation.bytes_per_element,
        "device_s": {name: s for name, (s, _) in seconds.items()},
        "host_s": {name: s for name, (_, s) in seconds.items()},
        "first_step_s": first,
        "peak_bytes_of_a_step": memory,
    }


def measure_muon(shapes: str, device: torch.device) -> dict[str, Any]:
    """Times Muon on the matrices of a model, ours beside torch's, with the same arithmetic in bfloat16."""
    seconds = {}
    for name, make in MUONS.items():
        gc.collect()
        matrices = [on_device(shapes, seed, scale, device, MATRICES) for seed, scale in ((0, 0.02), (1, 1e-3))]
        seconds[name] = timed(make(Tensors(*matrices).leaves(), lr=LR).step, device)
        del matrices
    return {
        "shapes": shapes,
        "recipe": MUON,
        "device_s": {name: s for name, (s, _) in seconds.items()},
        "host_s": {name: s for name, (_, s) in seconds.items()},
    }


def show_muon(case: dict[str, Any]) -> str:
    """A case of Muon as a table."""
    rows = [
        (name, f"{1e3 * s:.2f}", f"{1e3 * case['host_s'][name]:.2f}", f"{s / case['device_s'][ADAPTER]:.2f}")
        for name, s in case["device_s"].items()
    ]
    return f"{case['shapes']}, {MUON}\n{table(('', 'device ms', 'host ms', 'times ours'), rows)}"


def on_device(
    shapes: str, seed: int, scale: float, device: torch.device, models: Mapping[str, Any] = SHAPES
) -> dict[str, torch.Tensor]:
    """Normal values, drawn on the device."""
    if device.type == "cpu":
        return draw(models[shapes](), seed, scale)
    generator = torch.Generator(device=device).manual_seed(seed)
    return {k: torch.randn(s, generator=generator, device=device).mul_(scale) for k, s in models[shapes]()}


def show(case: dict[str, Any], copy: float) -> str:
    """A case as a table."""
    moved = case["bytes_per_element"] * case["elements"]
    rows = [
        (
            name,
            f"{1e3 * s:.3f}",
            f"{1e3 * case['host_s'][name]:.3f}",
            f"{moved / s / 1e9:.0f}",
            f"{moved / s / copy:.1%}",
            f"{s / case['device_s'][DONATED]:.2f}",
            f"{1e3 * case['first_step_s'][name]:.0f}",
            f"{case['peak_bytes_of_a_step'].get(name, 0) / 2**20:.1f}",
        )
        for name, s in case["device_s"].items()
    ]
    header = ("", "device ms", "host ms", "useful GB/s", "of copy", "times donated", "first step ms", "peak MiB")
    return (
        f"{case['shapes']}, {case['recipe']}: {case['elements']:,} elements, {case['bytes_per_element']:g} bytes for "
        f"each, {case['launches']} launches by {' and '.join(case['backends'])}\n{table(header, rows)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=default, help="which models")
    parser.add_argument(
        "--recipes", nargs="+", choices=[*RECIPES, MUON], default=list(RECIPES), help="which optimizers"
    )
    parser.add_argument("--compile", action="store_true", help="measure torch.compile of torch's steps too: minutes")
    parser.add_argument("--smoke", action="store_true", help="only see that it works: one small tree, also on a CPU")
    parser.add_argument("--json", type=Path, help="where the figures go")
    args = parser.parse_args()
    if not (torch.cuda.is_available() or args.smoke):
        raise SystemExit("There is no CUDA device here: nothing was measured. `--smoke` tries the program on a CPU.")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if args.smoke:
        args.shapes = ["tiny"]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    first = first_step(device)
    for recipe in args.recipes:
        check_muon(device) if recipe == MUON else check(recipe, device)
    print(f"correct: {', '.join(args.recipes)}, against the reference on the CPU", flush=True)
    copy = copy_bandwidth(device)
    print(f"{name}, torch {torch.__version__}; a copy moves {copy / 1e9:.0f} GB/s; float32")
    print(f"the first step of this process, with kernels to be built or on disk, took {first:.2f} s\n", flush=True)
    cases = []
    for shapes in args.shapes:
        for recipe in args.recipes:
            if recipe != MUON:
                cases.append(measure(shapes, recipe, device, args.compile))
                print(show(cases[-1], copy), end="\n\n", flush=True)
            elif shapes in MATRICES:
                cases.append(measure_muon(shapes, device))
                print(show_muon(cases[-1]), end="\n\n", flush=True)
    if args.json is not None:
        report = {
            "device": name,
            "torch": torch.__version__,
            "copy_bytes_per_s": copy,
            "first_step_s": first,
            "cases": cases,
        }
        write_figures(args.json, report)


if __name__ == "__main__":
    main()
