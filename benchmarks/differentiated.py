"""The time of unrolled steps and of their derivative, by kernels beside torch operations.

    python benchmarks/differentiated.py
    python benchmarks/differentiated.py --tiny

Five steps from fixed gradients, and the derivative of a loss of the parameters behind them with respect to parameters,
gradients and the learning rate; over the weights of `examples/maml_sinusoid.py`, and over tensors of 64x64. The ways
take turns within each round; before that, derivatives of both are compared. Bound: torch operations take at least three
times as long.
"""

import argparse
import functools
import random
import time
from collections.abc import Callable
from statistics import median

import torch
from figures import table

import functional_optim as fo


SHAPES = {
    "sinusoid, 6 tensors": ((1, 40), (40, 40), (40, 1), (40,), (40,), (1,)),
    "12 of 64x64": ((64, 64),) * 12,
}
CHAINS: dict[str, Callable[[torch.Tensor], fo.GradientTransformation]] = {
    "Adam": lambda rate: fo.adam(rate, eps_root=1e-8),
    "clip, AdamW": lambda rate: fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(rate, eps_root=1e-8)),
}
STEPS, AT_LEAST = 5, 3.0


def make(name: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> Callable[[], list[torch.Tensor]]:
    """A function that takes the steps and returns the derivatives."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in (*shapes, *shapes)]
    rate = torch.tensor(0.01, requires_grad=True)
    tx = CHAINS[name](rate)

    def run() -> list[torch.Tensor]:
        params, grads = (
            {f"p{k}": x for k, x in enumerate(part)} for part in (leaves[: len(shapes)], leaves[len(shapes) :])
        )
        state = tx.init(params)
        for _ in range(STEPS):
            params, state = fo.apply_gradients(tx, params, grads, state)
        loss = torch.stack([p.square().sum() for p in params.values()]).sum()
        return list(torch.autograd.grad(loss, [*leaves, rate]))

    return run


def by_operations(run: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    """The same by the reference."""
    with fo.use_backend("reference"):
        return run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--tiny", action="store_true", help="two rounds, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for shapes in SHAPES:
        for name in CHAINS:
            exact = make(name, SHAPES[shapes], torch.float64)
            for x, y in zip(exact(), by_operations(exact), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9 * float(y.abs().max()))
            run = make(name, SHAPES[shapes], torch.float32)
            ways = {"kernels": run, "torch operations": functools.partial(by_operations, run)}
            samples: dict[str, list[float]] = {way: [] for way in ways}
            order, shuffle = list(ways), random.Random(0)
            for _ in range(2 if args.tiny else args.rounds):
                shuffle.shuffle(order)
                for way in order:
                    start = time.perf_counter()
                    ways[way]()
                    samples[way].append(time.perf_counter() - start)
            ratio = median(y / x for x, y in zip(*samples.values(), strict=True))
            times = [f"{1e3 * median(x):.2f}" for x in samples.values()]
            rows.append((shapes, name, *times, f"{ratio:.1f}x", f"{AT_LEAST:g}x", "yes" if ratio >= AT_LEAST else "NO"))
    print(f"{STEPS} steps and their derivative, one thread, torch {torch.__version__}, float32")
    print(table(("tensors", "chain", "kernels ms", "torch operations ms", "ratio", "at least", "met"), rows))


if __name__ == "__main__":
    main()
