"""Trains 64 models with 64 learning rates at once, by `torch.func.vmap`, and beside them one after another.

python examples/ensemble_sweep.py
python examples/ensemble_sweep.py --plot sweep.png
"""

import argparse
import time
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap

import functional_optim as fo


MEMBERS, STEPS = 64, 100
Params = dict[str, torch.Tensor]


class Problem(NamedTuple):
    """A model, the parameters that all members start from, and data: a wave with noise."""

    model: nn.Module
    params: Params
    x: torch.Tensor
    y: torch.Tensor


class Sweep(NamedTuple):
    """Learning rates, the loss that each has led to, and the parameters."""

    rates: torch.Tensor
    losses: torch.Tensor
    params: Params


def make_problem() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.linspace(-2.0, 2.0, 64)[:, None]
    return Problem(
        model,
        {name: p.detach() for name, p in model.named_parameters()},
        x,
        torch.sin(3 * x) + 0.05 * torch.randn(64, 1),
    )


def loss_of(problem: Problem, params: Params) -> torch.Tensor:
    return (functional_call(problem.model, params, (problem.x,)) - problem.y).square().mean()


def optimizer(rate: torch.Tensor) -> fo.GradientTransformation:
    return fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(rate, weight_decay=1e-4))


def train_step(problem: Problem, rate: torch.Tensor, params: Params, state: Any) -> tuple[Params, Any, torch.Tensor]:
    """A step of one member, written as if there were no others."""
    grads, loss = grad_and_value(lambda p: loss_of(problem, p))(params)
    params, state = fo.apply_gradients(optimizer(rate), params, grads, state)
    return params, state, loss


def at_once(problem: Problem, rates: torch.Tensor, steps: int) -> Sweep:
    """All members together: the step is mapped over learning rates, parameters and states."""
    params = {name: p.expand(len(rates), *p.shape) for name, p in problem.params.items()}
    state = vmap(lambda rate, p: optimizer(rate).init(p))(rates, params)
    step = vmap(lambda rate, p, s: train_step(problem, rate, p, s))
    for _ in range(steps):
        params, state, _ = step(rates, params, state)
    return Sweep(rates, vmap(lambda p: loss_of(problem, p))(params), params)


def one_by_one(problem: Problem, rates: torch.Tensor, steps: int) -> Sweep:
    """A loop over the members."""
    members, losses = [], []
    for rate in rates:
        params, tx = problem.params, optimizer(rate)
        state = tx.init(params)
        for _ in range(steps):
            grads, _ = grad_and_value(lambda p: loss_of(problem, p))(params)
            params, state = fo.apply_gradients(tx, params, grads, state)
        members.append(params)
        losses.append(loss_of(problem, params))
    return Sweep(rates, torch.stack(losses), {name: torch.stack([p[name] for p in members]) for name in problem.params})


def draw(sweep: Sweep, path: str) -> str:
    """Draws the loss over the learning rate, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed"
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    ax.loglog(sweep.rates, sweep.losses, marker=".")
    ax.set_xlabel("learning rate")
    ax.set_ylabel(f"loss after {STEPS} steps")
    figure.savefig(path)
    return f"the plot is in {path}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", metavar="FILE", help="draw the loss over the learning rate, with matplotlib")
    args = parser.parse_args()
    torch.set_num_threads(1)
    problem, rates = make_problem(), torch.logspace(-4, 0, MEMBERS, dtype=torch.float64)

    at_once(problem, rates, 2)  # kernels are compiled, and steps bound
    start = time.perf_counter()
    sweep = at_once(problem, rates, STEPS)
    together = time.perf_counter() - start
    for rate, loss in list(zip(sweep.rates.tolist(), sweep.losses.tolist(), strict=True))[::9]:
        print(f"learning rate {rate:8.1e}   loss {loss:.4f}")
    best = int(sweep.losses.nan_to_num(torch.inf).argmin())
    print(f"the best of {MEMBERS}: {rates[best]:.1e}, with a loss of {sweep.losses[best]:.4f}")

    one_by_one(problem, rates[:1], 2)
    start = time.perf_counter()
    alone = one_by_one(problem, rates[::8], STEPS)
    apart = (time.perf_counter() - start) * 8  # a part of the members stands for all
    # gradients of a stack of models are sums in another order, and steps of a large learning rate make the most of it
    gap = (sweep.losses[::8] - alone.losses).abs().max()
    print(f"{STEPS} steps of all members take {together:.2f} s at once, {apart:.1f} s one after another")
    print(f"losses are those of members that are trained alone, within {gap:.1e}")
    if args.plot:
        print(draw(sweep, args.plot))


if __name__ == "__main__":
    main()
