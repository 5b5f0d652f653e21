"""A row per algorithm of torch.optim: a step of our class beside the best implementation that torch has.

    python benchmarks/torch_optim_rows.py
    python benchmarks/torch_optim_rows.py --only Adagrad,Muon --rounds 21
    python benchmarks/torch_optim_rows.py --tiny

Elementwise classes, and Adafactor, step GPT-2 small and 1000 tensors of 32x32; Muon steps the matrices of GPT-2 small's
layers, 48 of 768x768 and 24 of 768x3072, with the same arithmetic in bfloat16. torch's implementations are those that
its class takes on this machine: the for-loop, foreach, and fused; the best one is the one with the lowest median.
SparseAdam steps 512 rows of a table of 50257x64, LBFGS takes 10 iterations on a sum of squares over 1000 tensors. Last
comes a rule for whole tensors, `leafwise`, beside the same operations on stacks, written by hand, as the for-loop.
Contenders share parameters and gradients, which are fixed, and take turns within every round in an order drawn anew; a
ratio is the median of the ratios of each round. Before that, each is compared with torch on a small tree.
"""

import argparse
import functools
import gc
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from adapter_step import parameters, turns
from figures import cpu_name, ratio, table, write_figures
from recipes import SHAPES, Tensors, draw, many, small_tree

import functional_optim as fo
from functional_optim import adapters


Step = Callable[[], object]
OURS = "ours"
# Arguments of each class, with which a step of float32 numbers stays finite for ever.
CLASSES: dict[str, dict[str, Any]] = {
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {},
    "Adam": {},
    "AdamW": {},
    "Adamax": {},
    "ASGD": {},
    "Muon": {"lr": 1e-3},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"lr": 1e-4},
    "Rprop": {"lr": 1e-4, "step_sizes": (1e-6, 1e-3)},
    "SGD": {"lr": 1e-4, "momentum": 0.9},
}
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
# Bounds: for classes that torch has fused kernels for on the CPU, and for the others; by shapes.
FUSED = {"gpt2": 1.0, "1000x32x32": 3.0}
OTHERS = {"gpt2": 3.0, "1000x32x32": 8.0}
ADAFACTOR = {"gpt2": 1.5, "1000x32x32": 4.0}
MUON = {"layers": 1.0}
LEAST = 1.0  # for the classes whose tensors are no trees of a model
LEAFWISE = "leafwise"
SPECIAL = ("SparseAdam", "LBFGS", LEAFWISE)


def layers() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The matrices that Muon takes of GPT-2 small."""
    yield from many(48, 768, 768)
    yield from ((f"wide.{name}", shape) for name, shape in many(24, 768, 3072))


def theirs(name: str, own: list[torch.nn.Parameter]) -> dict[str, torch.optim.Optimizer]:
    """torch's class in every implementation that it has here."""
    cls, found = getattr(torch.optim, name), {}
    for label, flags in IMPLEMENTATIONS.items():
        if name == "Muon":
            return {"for-loop": cls(own, **CLASSES[name])}
        try:
            found[label] = cls(own, **CLASSES[name], **flags)
        except (TypeError, RuntimeError):  # there is no such flag, or no such kernel for the CPU
            continue
    return found


def bound(name: str, shapes: str, implementations: Mapping[str, Any]) -> float:
    own = {"Adafactor": ADAFACTOR, "Muon": MUON}.get(name, FUSED if "fused" in implementations else OTHERS)
    return own[shapes]


def check(name: str, steps: int = 5) -> None:
    """Compares our class with torch's on a small tree.

    Raises:
      AssertionError: they differ by more than a few roundings of numbers of order one.
    """
    found = []
    for module in (adapters, torch.optim):
        params, grads = small_tree()
        if name == "Muon":
            params, grads = ({k: x for k, x in tree.items() if x.ndim == 2} for tree in (params, grads))
        opt = getattr(module, name)(parameters(params, grads), **CLASSES[name])
        for _ in range(steps):
            opt.step()
        found.append(params)
    torch.testing.assert_close(*found, rtol=0, atol=5e-6)


def measure(name: str, shapes: str, rounds: int, tree: tuple[Tensors, Tensors]) -> dict[str, Any]:
    """A row: medians in ms, the ratio to torch's best, and its bound."""
    own = parameters(*tree)
    ours = getattr(adapters, name)(own, **CLASSES[name])
    contenders: dict[str, Step] = {OURS: ours.step}
    implementations = theirs(name, own)
    contenders |= {label: opt.step for label, opt in implementations.items()}
    samples = turns(contenders, rounds)
    medians = {label: median(times) * 1e3 for label, times in samples.items()}
    best = min(implementations, key=medians.__getitem__)
    return {
        "class": name,
        "shapes": shapes,
        "ms": medians,
        "best": best,
        "ratio": ratio(samples, best, OURS),
        "bound": bound(name, shapes, implementations),
    }


def measure_leafwise(rounds: int, shapes: str, tree: tuple[Tensors, Tensors]) -> dict[str, Any]:
    """A row for momentum that is multiplied by its own square, and a loop by hand that keeps state leaf by leaf."""

    @fo.leafwise(state={"mu": fo.zeros}, batched=True)
    def cubed(u, mu, *, decay=0.9):  # type: ignore[no-untyped-def]
        mu = decay * mu + u
        return torch.bmm(mu, torch.bmm(mu.mT, mu)), mu

    params, grads = tree
    tx = fo.chain(cubed(), fo.scale(-1e-3))
    state = tx.init(params)
    momenta = {name: torch.zeros_like(p) for name, p in params.items()}

    def ours() -> None:
        nonlocal state
        _, state = fo.apply_gradients(tx, params, grads, state, donate=True)

    @torch.no_grad()
    def by_hand() -> None:
        mu = 0.9 * torch.stack(list(momenta.values())) + torch.stack(list(grads.values()))
        updates = torch.bmm(mu, torch.bmm(mu.mT, mu))
        for name, x, u in zip(momenta, mu.unbind(), updates.unbind(), strict=True):
            momenta[name] = x.clone()  # a view would keep all of them
            params[name].add_(u, alpha=-1e-3)

    for _ in range(5):  # before the turns, in which each takes as many steps as fit
        ours()
        by_hand()
    torch.testing.assert_close(state[0].mu, momenta, rtol=0, atol=1e-6)
    samples = turns({OURS: ours, "for-loop": by_hand}, rounds)
    return {
        "class": LEAFWISE,
        "shapes": shapes,
        "ms": {label: median(times) * 1e3 for label, times in samples.items()},
        "best": "for-loop",
        "ratio": ratio(samples, "for-loop", OURS),
        "bound": 0.8,  # of a loop by hand
    }


def measure_sparse(rounds: int, n_rows: int, length: int) -> dict[str, Any]:
    """A row for rows of a table that a sparse gradient touches."""
    own = torch.nn.Parameter(torch.randn(length, 64) * 0.02)
    indices = torch.randperm(len(own))[:n_rows].unsqueeze(0)
    own.grad = torch.sparse_coo_tensor(indices, torch.randn(n_rows, 64) * 1e-3, own.shape, check_invariants=True)
    ours, torchs = (module.SparseAdam([own], lr=1e-4) for module in (adapters, torch.optim))
    return row_of("SparseAdam", f"{n_rows} of {len(own)}x64", {OURS: ours.step, "for-loop": torchs.step}, rounds)


def measure_lbfgs(rounds: int, shapes: str, tree: tuple[Tensors, Tensors]) -> dict[str, Any]:
    """A row for a step of ten iterations, which evaluates a sum of squares around the gradients of the tree."""
    contenders: dict[str, Step] = {}
    for label, module in ((OURS, adapters), ("for-loop", torch.optim)):
        params, targets = parameters(*tree), list(tree[1].values())
        opt = module.LBFGS(params, lr=0.1, max_iter=10, tolerance_grad=0.0, tolerance_change=0.0)

        def closure(
            opt: torch.optim.Optimizer = opt, params: list[torch.nn.Parameter] = params, targets: Any = targets
        ) -> torch.Tensor:
            opt.zero_grad()
            loss = sum((p - x).square().sum() for p, x in zip(params, targets, strict=True))
            assert isinstance(loss, torch.Tensor)
            loss.backward()
            return loss

        contenders[label] = functools.partial(opt.step, closure)
    return row_of("LBFGS", shapes, contenders, rounds)


def row_of(name: str, shapes: str, contenders: dict[str, Step], rounds: int) -> dict[str, Any]:
    """A row of ours beside the for-loop of torch."""
    samples = turns(contenders, rounds)
    medians = {label: median(times) * 1e3 for label, times in samples.items()}
    found = ratio(samples, "for-loop", OURS)
    return {"class": name, "shapes": shapes, "ms": medians, "best": "for-loop", "ratio": found, "bound": LEAST}


def operations(matrices: int) -> int:
    """The number of torch operations that a step of Muon takes for some matrices of two shapes."""
    shapes = {f"{k}": ((8, 8), (8, 24))[k % 2] for k in range(matrices)}
    params = {name: torch.randn(shape) for name, shape in shapes.items()}
    opt = adapters.Muon(parameters(params, {name: torch.randn_like(p) for name, p in params.items()}), lr=1e-3)
    opt.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    outermost = [x for x in profile.events() if x.name.startswith("aten::") and not _within(x)]
    return len(outermost)


def _within(event: Any) -> bool:
    """Whether an operation is a part of another one."""
    parent = event.cpu_parent
    return parent is not None and (parent.name.startswith("aten::") or _within(parent))


def show(rows: list[dict[str, Any]]) -> str:
    header = ("class", "shapes", "ours ms", *(f"{label} ms" for label in IMPLEMENTATIONS), "ratio", "at least", "met")
    lines = []
    for row in rows:
        times = [f"{row['ms'][label]:.3f}" if label in row["ms"] else "-" for label in (OURS, *IMPLEMENTATIONS)]
        met = "yes" if row["ratio"] >= row["bound"] else "NO"
        lines.append((row["class"], row["shapes"], *times, f"{row['ratio']:.2f}", f"{row['bound']:g}", met))
    return table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join([*CLASSES, *SPECIAL]), help="classes, separated by commas")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="small tensors and two rounds, to see that it runs")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "torch_optim_rows.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = [name for name in args.only.split(",") if name]
    unknown = [name for name in names if name not in (*CLASSES, *SPECIAL)]
    if unknown:
        parser.error(f"no class {unknown[0]!r}; there are {', '.join([*CLASSES, *SPECIAL])}")

    rounds = 2 if args.tiny else args.rounds
    trees: dict[str, Callable[[], Iterator[tuple[str, tuple[int, ...]]]]]
    trees = {shapes: (lambda: many(4, 8, 8)) if args.tiny else SHAPES[shapes] for shapes in FUSED}
    trees["layers"] = (lambda: many(2, 8, 8)) if args.tiny else layers
    rows = []
    for shapes, made in trees.items():
        tree = draw(made(), 0, 0.02), draw(made(), 1, 1e-3)
        for name in names:
            if name in SPECIAL:
                if shapes == "1000x32x32":
                    special = {
                        "SparseAdam": lambda: measure_sparse(rounds, *((20, 1000) if args.tiny else (512, 50257))),
                        "LBFGS": functools.partial(measure_lbfgs, max(2, rounds // 4), shapes, tree),
                        LEAFWISE: functools.partial(measure_leafwise, rounds, shapes, tree),
                    }
                    rows.append(special[name]())
                    print(show(rows[-1:]), flush=True)
            elif (name == "Muon") is (shapes == "layers"):
                check(name)
                gc.collect()
                rows.append(measure(name, shapes, rounds if name != "Muon" else max(2, rounds // 4), tree))
                print(show(rows[-1:]), flush=True)
        del tree
    machine = {
        "cpu": cpu_name(),
        "threads": args.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(
        f"\n{machine['cpu']}, {args.threads} threads, torch {torch.__version__}; medians of {rounds} rounds, float32\n"
    )
    print(show(rows))
    if "Muon" in names:
        counted = {n: operations(n) for n in (4, 40)}
        print("\ntorch operations of a step of Muon: " + ", ".join(f"{k} for {n} matrices" for n, k in counted.items()))
    write_figures(args.json, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
