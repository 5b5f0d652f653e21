"""Trains a small convolutional network on scikit-learn's 1797 handwritten digits with a chain of five transformations.

    python examples/digits.py

It prints what the chain does to memory, the accuracy on images that training has not seen, and how long a step takes
beside the same recipe in torch.optim, and it draws the loss and the learning rate.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import matplotlib
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.func import functional_call, grad_and_value
from tqdm import tqdm

import functional_optim as fo


matplotlib.use("Agg")  # draws to a file, so no display is needed
import matplotlib.pyplot as plt  # noqa: E402


BATCH = 64
PEAK, WEIGHT_DECAY, MAX_NORM, AVERAGE = 3e-3, 1e-2, 1.0, 0.99


def milliseconds(step: Callable[[], object], rounds: int = 200) -> float:
    """The median time of a step."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e3 * median(times[rounds // 10 :])  # the first ones warm up


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a convolutional network on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=20, help="how often each image is seen")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "digits.png", help="the plot")
    args = parser.parse_args()
    torch.manual_seed(0)

    # 8x8 images with values from 0 to 16; a quarter of them, with as many of each digit, is kept for the test
    digits = load_digits()
    split = train_test_split(digits.images / 16, digits.target, test_size=0.25, random_state=0, stratify=digits.target)
    images, test_images = (torch.tensor(x, dtype=torch.float32).unsqueeze(1) for x in split[:2])
    labels, test_labels = (torch.tensor(x) for x in split[2:])

    # The model as a function of its parameters: a dict of plain tensors by name.
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss_of(params: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(functional_call(model, params, (x,)), y)

    # The optimizer: five ideas, each one transformation, run together as one kernel.
    per_epoch = len(images) // BATCH
    steps = args.epochs * per_epoch
    schedule = fo.warmup_cosine_decay_schedule(0.0, PEAK, warmup_steps=steps // 10, decay_steps=steps)
    tx = fo.chain(
        fo.clip_by_global_norm(MAX_NORM),
        fo.scale_by_adam(),
        fo.add_decayed_weights(WEIGHT_DECAY, mask=lambda path, p: p.ndim > 1),  # not the biases
        fo.scale_by_learning_rate(schedule),
        fo.params_ema(AVERAGE),
    )
    print(fo.explain(tx, params))

    # Training. Donating lets each step reuse the memory of the last one's parameters and state.
    state = tx.init(params)
    losses = []
    with tqdm(total=steps, desc="training", unit="step") as bar:
        for _ in range(args.epochs):
            for batch in torch.randperm(len(images)).split(BATCH)[:per_epoch]:
                grads, loss = grad_and_value(loss_of)(params, images[batch], labels[batch])
                params, state = fo.apply_gradients(tx, params, grads, state, donate=True)
                losses.append(loss.item())
                bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.4f}", lr=f"{float(schedule(len(losses) - 1)):.1e}")

    for name, tree in (("raw", params), ("averaged", fo.eval_params(state, params))):
        hits = functional_call(model, tree, (test_images,)).argmax(1) == test_labels
        print(f"test accuracy, {name} parameters: {hits.float().mean():.2%} of {len(hits)} images")

    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(8, 6), height_ratios=(2, 1), layout="constrained")
    above.semilogy(losses, color="tab:blue", alpha=0.35, linewidth=0.8, label="each batch")
    means = torch.tensor(losses).view(-1, per_epoch).mean(1)
    middles = [per_epoch * (k + 0.5) for k in range(len(means))]
    above.semilogy(middles, means, "o-", color="tab:blue", markersize=4, label="mean of an epoch")
    above.set(title="Handwritten digits", ylabel="training loss (cross-entropy, nats)")
    above.legend()
    below.plot([1e3 * float(schedule(k)) for k in range(steps)], color="tab:orange")
    below.set(xlabel=f"step (batches of {BATCH} images)", ylabel="learning rate (1e-3)", xlim=(0, steps), ylim=(0, None))
    for axes in (above, below):
        axes.grid(alpha=0.3)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=150)
    print(f"plot: {args.out}")

    # The same recipe in torch.optim, on the same gradients; its scheduler would come on top.
    theirs = [p.detach().requires_grad_() for p in model.parameters()]
