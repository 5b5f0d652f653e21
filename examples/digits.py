"""Trains a small convolutional network on scikit-learn's 1797 handwritten digits with a chain of five transformations.

It prints what the chain does to memory, the accuracy on images that training has not seen, and how long a step takes
beside the same recipe in torch.optim, and it draws the loss and the learning rate.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.func import functional_call, grad_and_value
from tqdm import tqdm
from turns import compare

import functional_optim as fo


BATCH, PEAK, WEIGHT_DECAY, MAX_NORM, AVERAGE = 64, 5e-3, 0.1, 1.0, 0.99


def plot(path: Path, losses: list[float], rates: list[float], per_epoch: int) -> None:
    plt.switch_backend("Agg")  # draws to a file; no display is needed
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3})
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(8, 6), height_ratios=(5, 3), layout="constrained")
    means = torch.tensor(losses).view(-1, per_epoch).mean(1)
    above.semilogy(losses, color="tab:blue", alpha=0.4, linewidth=0.8, label="each batch")
    above.semilogy(
        (torch.arange(len(means)) + 0.5) * per_epoch, means, ".-", color="tab:blue", label="mean of an epoch"
    )
    above.set(title="Training on handwritten digits", ylabel="cross-entropy (nats)")
    above.legend()
    below.plot([1e3 * rate for rate in rates], color="tab:orange")
    below.set(xlabel=f"step (batches of {BATCH} images)", ylabel="learning rate (1e-3)", xlim=(0, len(losses)))
    figure.align_ylabels()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a convolutional network on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=20, help="how often each image is seen")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for the plot")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more do not make so small a network faster

    # 8x8 images with values from 0 to 16. A quarter of them is kept for the test.
    digits = load_digits()
    split = train_test_split(digits.images / 16, digits.target, test_size=0.25, random_state=0, stratify=digits.target)
    images, test_images = (torch.tensor(x, dtype=torch.float32).unsqueeze(1) for x in split[:2])
    labels, test_labels = (torch.tensor(x) for x in split[2:])

    # The model is a function of its parameters, a dict of plain tensors by name.
    features = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    model = nn.Sequential(*features, nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10))
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss_of(params: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(functional_call(model, params, (x,)), y)

    # The optimizer is five ideas, one transformation each, that run together as one program.
    per_epoch = len(images) // BATCH
    steps = args.epochs * per_epoch
    schedule = fo.warmup_cosine_decay_schedule(0.0, PEAK, warmup_steps=steps // 10, decay_steps=steps)
    weights = {name: p.ndim > 1 for name, p in params.items()}  # biases do not decay
    tx = fo.chain(
        fo.clip_by_global_norm(MAX_NORM),
        fo.scale_by_adam(),
        fo.add_decayed_weights(WEIGHT_DECAY, mask=weights),
        fo.scale_by_learning_rate(schedule),
        fo.params_ema(AVERAGE),
    )
    print(fo.explain(tx, params))

    # `donate` lets each step write over the parameters and the state that it is given.
    state, losses = tx.init(params), []
    for _ in (bar := tqdm(range(args.epochs), desc="training", unit="epoch")):
        for batch in torch.randperm(len(images)).split(BATCH)[:per_epoch]:
            grads, loss = grad_and_value(loss_of)(params, images[batch], labels[batch])
            params, state = fo.apply_gradients(tx, params, grads, state, donate=True)
            losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.4f}")
    for name, tree in (("raw", params), ("averaged", fo.eval_params(state, params))):
        hits = functional_call(model, tree, (test_images,)).argmax(1) == test_labels
        print(f"test accuracy of the {name} parameters: {hits.float().mean():.2%} of {len(hits)} images")
    plot(args.out / "digits.png", losses, [float(schedule(k)) for k in range(steps)], per_epoch)
    print(f"plot of loss and learning rate: {args.out / 'digits.png'}")

    # The same recipe in torch.optim, without its scheduler, on copies of the same parameters and gradients.
    copies = [nn.Parameter(p.clone()) for p in params.values()]
    averages = [p.detach().clone() for p in copies]
    for p, g in zip(copies, grads.values(), strict=True):
        p.grad = g.clone()
    groups = [{"params": [p for p in copies if (p.ndim > 1) == w], "weight_decay": w * WEIGHT_DECAY} for w in (1, 0)]
    adamw = torch.optim.AdamW(groups, lr=PEAK, fused=True)

    def ours() -> None:
        fo.apply_gradients(tx, params, grads, state, donate=True)

    def theirs() -> None:
        nn.utils.clip_grad_norm_(copies, MAX_NORM)
        adamw.step()
        torch._foreach_lerp_(averages, [p.detach() for p in copies], 1 - AVERAGE)

    print(compare(ours, theirs))


if __name__ == "__main__":
    main()
