"""Learns a start from which a few steps of Adam fit any sine wave (MAML), through the steps themselves.

Each task is a sine wave of its own amplitude and phase. Inner steps of Adam start at shared weights and fit ten points;
the loss at other points is differentiated through these steps, down to the shared weights and the inner learning rate.
Steps and their derivatives are kernels; the last lines time a meta-step beside the same in torch operations.

    python examples/maml_sinusoid.py

Source: Finn, Abbeel & Levine 2017, "Model-agnostic meta-learning for fast adaptation of deep networks".
"""

import math
import time
from statistics import median

import torch

import functional_optim as fo


WIDTH, POINTS, INNER, TASKS, META_STEPS = 40, 10, 5, 4, 120
Params = dict[str, torch.Tensor]


def make_params() -> Params:
    sizes = [(1, WIDTH), (WIDTH, WIDTH), (WIDTH, 1)]
    params = {f"weight{k}": torch.randn(size) / math.sqrt(size[0]) for k, size in enumerate(sizes)}
    return params | {f"bias{k}": torch.zeros(size[1]) for k, size in enumerate(sizes)}


def net(params: Params, x: torch.Tensor) -> torch.Tensor:
    for k in range(2):
        x = torch.tanh(x @ params[f"weight{k}"] + params[f"bias{k}"])
    return x @ params["weight2"] + params["bias2"]


def make_task(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Points to fit, and points to be judged by, of one wave."""
    amplitude, phase = (torch.rand((), generator=generator) for _ in range(2))
    x = torch.rand(2 * POINTS, 1, generator=generator) * 10 - 5
    y = (0.1 + 4.9 * amplitude) * torch.sin(x + math.pi * phase)
    return x[:POINTS], y[:POINTS], x[POINTS:], y[POINTS:]


def loss_of(params: Params, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (net(params, x) - y).square().mean()


def adapt(params: Params, rate: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> Params:
    """The weights after inner steps, which autograd records."""
    inner = fo.adam(rate, eps=1e-3)  # a root of zero has no derivative; gradients here are far from it
    state = inner.init(params)
    for _ in range(INNER):
        gradients = torch.autograd.grad(loss_of(params, x, y), list(params.values()), create_graph=True)
        params, state = fo.apply_gradients(inner, params, dict(zip(params, gradients, strict=True)), state)
    return params


def meta_loss(params: Params, rate: torch.Tensor, tasks: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    losses = [loss_of(adapt(params, rate, x, y), *judged) for x, y, *judged in tasks]
    return torch.stack(losses).mean()


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    trees = {"params": make_params(), "log_rate": torch.tensor(math.log(0.01))}
    judged = [make_task(torch.Generator().manual_seed(100 + k)) for k in range(50)]

    def leaves() -> tuple[Params, torch.Tensor]:
        params = {name: p.detach().requires_grad_() for name, p in trees["params"].items()}
        return params, trees["log_rate"].detach().requires_grad_()

    def report(when: str) -> float:
        params, log_rate = leaves()
        before = sum(loss_of(params, *task[2:]).item() for task in judged) / len(judged)
        after = meta_loss(params, log_rate.exp(), judged).item()
        print(f"{when}: loss of a new wave {before:.2f}, after {INNER} steps {after:.2f}")
        return after

    first = report("before meta-training")
    outer = fo.adam(fo.cosine_decay_schedule(3e-3, META_STEPS))
    state = outer.init(trees)
    for _ in range(META_STEPS):
        params, log_rate = leaves()
        tasks = [make_task(generator) for _ in range(TASKS)]
        found = torch.autograd.grad(meta_loss(params, log_rate.exp(), tasks), [*params.values(), log_rate])
        gradients = {"params": dict(zip(params, found, strict=False)), "log_rate": found[-1]}
        trees, state = fo.apply_gradients(outer, trees, gradients, state, donate=True)
    last = report("after meta-training")
    print(f"inner learning rate, learned as well: {trees['log_rate'].exp():.3f}, it was 0.010")
    print(f"{INNER} steps fit a new wave {first / last:.1f} times better than before")

    fixed = [make_task(generator) for _ in range(TASKS)]

    def meta_step() -> None:
        params, log_rate = leaves()
        torch.autograd.grad(meta_loss(params, log_rate.exp(), fixed), [*params.values(), log_rate])

    def by_operations() -> None:
        with fo.use_backend("reference"):
            meta_step()

    times: dict[str, list[float]] = {"kernels": [], "torch operations": []}
    for _ in range(7):  # in turns, so that other work on the machine disturbs both
        for samples, step in zip(times.values(), (meta_step, by_operations), strict=True):
            begin = time.perf_counter()
            step()
            samples.append(time.perf_counter() - begin)
    shown = ", ".join(f"{1e3 * median(samples):.0f} ms by {name}" for name, samples in times.items())
    print(f"a meta-step of {TASKS} tasks, forward and backward: {shown}")


if __name__ == "__main__":
    main()
