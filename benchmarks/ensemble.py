"""The time of a step of an ensemble by `torch.func.vmap`, beside other ways to take the same step.

    python benchmarks/ensemble.py
    python benchmarks/ensemble.py --members 8,64 --tiny
    python benchmarks/ensemble.py --device cuda

Each member has four tensors, small ones but for the last shape, and a learning rate of its own, or one learning rate
for all. The ways, which take turns within each round:

- one call of the kernels over the stacked leaves, which are tensors like any other (one learning rate, no clipping by
  the norm of each member);
- the step mapped by `vmap`; `vmap` of a function that returns its arguments, which is what mapping alone costs; and the
  step within a mapped function, which is the rest;
- the same with trees that are packed;
- a loop over the members, each with its own trees and chain; the step mapped in operations of torch.

A time ends when the device has done the step.

Bounds: the mapped step takes at most 1 / 0.85 of the time of one call, and the loop at least 50 times as long as it.
"""

import argparse
import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from figures import ratio
from torch.func import vmap

import functional_optim as fo


SHAPES = {
    "16x8, 16, 4x16, 4": ((16, 8), (16,), (4, 16), (4,)),
    "32x32, 32, 32x32, 32": ((32, 32), (32,), (32, 32), (32,)),
    "4 of 64x64": ((64, 64),) * 4,
    "4 of 256x256": ((256, 256),) * 4,
}
AT_LEAST = {"one call": 0.85, "loop": 50.0}
CHAINS: dict[str, Callable[[Any], fo.GradientTransformation]] = {
    "adamw": lambda rate: fo.adamw(rate),
    "clip, adamw": lambda rate: fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(rate)),
}
Ways = dict[str, Callable[[], Any]]
Step = Callable[..., Any]


def step_of(tx: fo.GradientTransformation) -> Step:
    """A step of one member, or of any tree."""
    return lambda p, g, s: fo.apply_gradients(tx, p, g, s)


def ways(name: str, shapes: tuple[tuple[int, ...], ...], n: int, device: str) -> Ways:
    """The ways to take a step of an ensemble."""
    params = {f"layer{k}": torch.randn(n, *shape, device=device) for k, shape in enumerate(shapes)}
    grads = {k: torch.randn_like(p) for k, p in params.items()}
    packed, packed_grads = vmap(fo.pack)(params), vmap(fo.pack)(grads)
    rates = torch.logspace(-4, -1, n, dtype=torch.float64).to(device)
    tx = CHAINS[name](1e-3)
    state, whole, packed_state = vmap(tx.init)(params), tx.init(params), vmap(tx.init)(packed)
    pick: Callable[[Any, int], Any] = lambda tree, k: {name: x[k].clone() for name, x in tree.items()}  # noqa: E731
    alone = []
    for k in range(n):
        own = CHAINS[name](rates[k])
        p = pick(params, k)
        alone.append((step_of(own), p, pick(grads, k), own.init(p)))

    def with_rate(rate: torch.Tensor, p: Any, g: Any, s: Any) -> Any:
        return fo.apply_gradients(CHAINS[name](rate), p, g, s)

    def loop() -> None:
        for step, p, g, s in alone:
            step(p, g, s)

    def by_operations() -> None:
        with fo.use_backend("reference"):
            vmap(step)(params, grads, state)

    same: Step = lambda p, g, s: (p, s)  # noqa: E731
    step = step_of(tx)
    return {
        "one call": lambda: step(params, grads, whole),
        "mapped": lambda: vmap(step)(params, grads, state),
        "mapped, a rate each": lambda: vmap(with_rate)(rates, params, grads, state),
        "nothing, mapped": lambda: vmap(same)(params, grads, state),
        "packed, mapped": lambda: vmap(step)(packed, packed_grads, packed_state),
        "nothing, packed, mapped": lambda: vmap(same)(packed, packed_grads, packed_state),
        "loop": loop,
        "operations, mapped": by_operations,
    }


def measure(steps: Ways, seconds: float, wait: Callable[[], None]) -> dict[str, list[float]]:
    """The times of each way, in microseconds, by rounds in which all take turns."""
    for step in steps.values():
        for _ in range(3):
            step()
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle, end = list(steps), random.Random(0), time.perf_counter() + seconds
    while len(samples["loop"]) < 5 or time.perf_counter() < end:
        shuffle.shuffle(order)
        for name in order:
            wait()
            start = time.perf_counter()
            steps[name]()
            wait()
            samples[name].append(1e6 * (time.perf_counter() - start))
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", default="64", help="numbers of members")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each row")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="the smallest tensors and five rounds, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    for n in map(int, args.members.split(",")):
        for label, shapes in list(SHAPES.items())[: 1 if args.tiny else None]:
            for name in CHAINS:
                samples = measure(ways(name, shapes, n, args.device), 0.0 if args.tiny else args.seconds, wait)
                print(f"{n} members of {label}: {name}, microseconds")
                print("  " + ", ".join(f"{way} {median(times):.0f}" for way, times in samples.items()))
                for form in ("mapped", "mapped, a rate each", "packed, mapped"):
                    against = [f"{to} {ratio(samples, to, form):.2f} (at least {AT_LEAST[to]})" for to in AT_LEAST]
                    print(f"  {form}, against it: {', '.join(against)}", flush=True)
                rest = median(
                    z / max(x - y, 1e-9)
                    for x, y, z in zip(samples["mapped"], samples["nothing, mapped"], samples["one call"], strict=True)
                )
                print(f"  without the time that mapping nothing takes: one call {rest:.2f}")


if __name__ == "__main__":
    main()
