"""A training script for torch.optim.AdamW, and what becomes of it when one import changes.

The first half of training is torch's; it ends with a checkpoint. From there the script goes on twice, once with
torch's AdamW and once with ours: model, optimizer and scheduler come from the same file. It prints how far the two
loss curves are apart, the accuracy on images that training has not seen, and how long a step takes.

    from torch.optim import AdamW                     before
    from functional_optim.adapters import AdamW       after
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm
from turns import compare

import functional_optim.adapters


BATCH, PEAK, WEIGHT_DECAY = 64, 3e-3, 0.1
TORCH, OURS = torch.optim.AdamW, functional_optim.adapters.AdamW


class Run(NamedTuple):
    """Training as it stands at the end."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float]


def network() -> nn.Module:
    features = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10))


def train(
    AdamW: type[torch.optim.Optimizer],
    images: torch.Tensor,
    labels: torch.Tensor,
    epochs: range,
    of: int,
    resume: Path | None = None,
    save: Path | None = None,
) -> Run:
    """An ordinary training loop, with a checkpoint at its beginning or its end."""
    torch.manual_seed(0)
    model = network()
    weights, biases = ([p for p in model.parameters() if (p.ndim > 1) == w] for w in (True, False))
    groups = [{"params": weights}, {"params": biases, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=PEAK, weight_decay=WEIGHT_DECAY, fused=True)
    per_epoch = len(images) // BATCH
    scheduler = CosineAnnealingLR(optimizer, of * per_epoch)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    if resume is not None:
        checkpoint = torch.load(resume)
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])

    losses = []
    for epoch in (bar := tqdm(epochs, desc=AdamW.__module__, unit="epoch")):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(BATCH)[:per_epoch]:
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.4f}")

    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: part.state_dict() for name, part in parts.items()}, save)
    return Run(model, optimizer, losses)


def main() -> None:
    parser = argparse.ArgumentParser(description="Resumes torch.optim's training of a convolutional network.")
    parser.add_argument(
        "--epochs", type=int, default=14, help="how often each image is seen, before and after together"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for the checkpoint")
    args = parser.parse_args()

    torch.set_num_threads(1)  # more do not make so small a network faster, and one adds up in one order

    # 8x8 images with values from 0 to 16. A quarter of them is kept for the test.
    digits = load_digits()
    split = train_test_split(digits.images / 16, digits.target, test_size=0.25, random_state=0, stratify=digits.target)
    images, test_images = (torch.tensor(x, dtype=torch.float32).unsqueeze(1) for x in split[:2])
    labels, test_labels = (torch.tensor(x) for x in split[2:])

    path, half = args.out / "drop_in.pt", args.epochs // 2
    train(TORCH, images, labels, range(half), args.epochs, save=path)
    print(f"checkpoint of {TORCH.__module__}.{TORCH.__name__} after {half} epochs: {path}")
    theirs, ours = (
        train(which, images, labels, range(half, args.epochs), args.epochs, resume=path) for which in (TORCH, OURS)
    )

    # The two are the same bits, but for the bias of the last layer at times: torch rounds elements that fill no whole
    # vector, as its ten do, in another way.
    differences = [abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True)]
    print(f"largest difference of the two loss curves: {max(differences):.2g} nats in {len(differences)} steps")
    for name, run in (("torch.optim", theirs), ("functional_optim", ours)):
        with torch.no_grad():
            hits = run.model(test_images).argmax(1) == test_labels
        print(f"test accuracy with {name}: {hits.float().mean():.2%} of {len(hits)} images")

    # With the gradients of the last batch. Both move a copy that nobody needs any more.
    print(compare(ours.optimizer.step, theirs.optimizer.step))


if __name__ == "__main__":
    main()
