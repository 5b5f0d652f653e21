"""Stochastic weight averaging and an exponential moving average, the two recipes of torch's documentation.

Each is trained twice: with pure functions, and with an optimizer of torch. The average is a transformation at the end
of the chain. `torch.optim.swa_utils.AveragedModel` runs beside it, on the same model, so that what is printed as the
largest difference is that of two averages of the same parameters. Batch norm's statistics for the averaged parameters
come from torch's `update_bn`.
"""

import argparse
import copy
from typing import NamedTuple

import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import functional_optim as fo
from functional_optim.adapters import TransformOptimizer


RATE, AVERAGED_RATE, DECAY = 0.1, 0.05, 0.99
BATCH = 64


class Data(NamedTuple):
    """Points to train with, and points for the test."""

    x: torch.Tensor
    y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The points to train with, in a new order."""
        return [(self.x[batch], self.y[batch]) for batch in torch.randperm(len(self.x)).split(BATCH)]


class Result(NamedTuple):
    """The outcome of a training.

    Args:
      trained: accuracy of the parameters as they are at the end.
      averaged: accuracy of their average.
      difference: the largest one between an averaged parameter here and in torch's `AveragedModel`.
    """

    trained: float
    averaged: float
    difference: float


def make_data() -> Data:
    """Two classes of points in the plane, inside and outside of a wave; one label in five of the training is wrong."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(3072, 2, generator=generator) - 1
    y = (x[:, 1] > 0.5 * torch.sin(4 * x[:, 0])).long()
    noisy = torch.where(torch.rand(1024, generator=generator) < 0.2, 1 - y[:1024], y[:1024])
    return Data(x[:1024], noisy, x[1024:], y[1024:])


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2))


def accuracy(model: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return (model.eval()(data.test_x).argmax(1) == data.test_y).float().mean().item()


def difference(params: dict[str, torch.Tensor], theirs: AveragedModel) -> float:
    own = dict(theirs.module.named_parameters())
    return max((params[name] - p).abs().max().item() for name, p in own.items())


def swa_with_an_optimizer(data: Data, epochs: int) -> Result:
    """As in torch's documentation, but for two lines: the average is made by the chain, and swapped in by a block."""
    model, swa_start, per_epoch = make_model(), epochs // 2, len(data.x) // BATCH
    # torch averages after each epoch later than `swa_start`; epochs are counted from 0
    average = fo.params_swa(start=(swa_start + 2) * per_epoch, period=per_epoch)
    optimizer = TransformOptimizer(model.named_parameters(), fo.chain(fo.sgd(RATE, momentum=0.9), average))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    swa_scheduler = SWALR(optimizer, swa_lr=AVERAGED_RATE, anneal_epochs=5, anneal_strategy="linear")
    theirs = AveragedModel(model)
    for epoch in range(epochs):
        model.train()
        for x, y in data.batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        if epoch > swa_start:
            theirs.update_parameters(model)
            swa_scheduler.step()
        else:
            scheduler.step()

    trained = accuracy(model, data)
    with optimizer.averaged_params(model):  # parameters, and the buffers of the model, are put back at the end
        update_bn(data.batches(), model)
        found = {name: p.detach().clone() for name, p in model.named_parameters()}
        return Result(trained, accuracy(model, data), difference(found, theirs))


def swa_with_functions(data: Data, epochs: int) -> Result:
    """Parameters are the model's own tensors, which donated steps write to."""
    model, swa_start, per_epoch = make_model(), epochs // 2, len(data.x) // BATCH
    rate = fo.join_schedules(
        [fo.cosine_decay_schedule(RATE, epochs * per_epoch), fo.constant_schedule(AVERAGED_RATE)],
        [(swa_start + 1) * per_epoch],
    )
    tx = fo.chain(fo.sgd(rate, momentum=0.9), fo.params_swa(start=(swa_start + 2) * per_epoch, period=per_epoch))
    params = {name: p.detach() for name, p in model.named_parameters()}
    state, theirs = tx.init(params), AveragedModel(model)
    for epoch in range(epochs):
        model.train()
        for x, y in data.batches():
            loss = nn.functional.cross_entropy(model(x), y)
            grads = dict(zip(params, torch.autograd.grad(loss, list(model.parameters())), strict=True))
            params, state = fo.apply_gradients(tx, params, grads, state, donate=True)
        if epoch > swa_start:
            theirs.update_parameters(model)

    averages = fo.eval_params(state, params)
    averaged = copy.deepcopy(model)
    averaged.load_state_dict(averages, strict=False)  # without the buffers
    update_bn(data.batches(), averaged)
    return Result(accuracy(model, data), accuracy(averaged, data), difference(averages, theirs))


def ema_with_an_optimizer(data: Data, epochs: int) -> Result:
    """`AveragedModel` begins with the first parameters that it sees; so does `params_ema`, with those before a step."""
    model = make_model()
    optimizer = TransformOptimizer(model.named_parameters(), fo.chain(fo.sgd(RATE, momentum=0.9), fo.params_ema(DECAY)))
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    theirs.update_parameters(model)
    for _ in range(epochs):
        model.train()
        for x, y in data.batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            theirs.update_parameters(model)

    trained = accuracy(model, data)
    with optimizer.averaged_params(model):
        update_bn(data.batches(), model)
        found = {name: p.detach().clone() for name, p in model.named_parameters()}
        return Result(trained, accuracy(model, data), difference(found, theirs))


def ema_with_functions(data: Data, epochs: int) -> Result:
    """Statistics of batch norm are averaged beside the parameters here, so that no pass over the data is needed."""
    model = make_model()
    tx, of_buffers = fo.chain(fo.sgd(RATE, momentum=0.9), fo.params_ema(DECAY)), fo.params_ema(DECAY)
    params = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    state, statistics = tx.init(params), of_buffers.init(buffers)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    theirs.update_parameters(model)
    for _ in range(epochs):
        model.train()
        for x, y in data.batches():
            loss = nn.functional.cross_entropy(model(x), y)
            grads = dict(zip(params, torch.autograd.grad(loss, list(model.parameters())), strict=True))
            params, state = fo.apply_gradients(tx, params, grads, state, donate=True)
            statistics = fo.update_average(of_buffers, buffers, statistics)
            theirs.update_parameters(model)

    averages = fo.eval_params(state, params)
    averaged = copy.deepcopy(model)
    averaged.load_state_dict(averages | fo.eval_params(statistics, buffers), strict=False)
    return Result(accuracy(model, data), accuracy(averaged, data), difference(averages, theirs))


RECIPES = (swa_with_an_optimizer, swa_with_functions, ema_with_an_optimizer, ema_with_functions)


def main() -> None:
    parser = argparse.ArgumentParser(description="Averages the parameters of a small network, in two ways.")
    parser.add_argument("--epochs", type=int, default=30, help="how often each point is seen")
    args = parser.parse_args()
    torch.set_num_threads(1)  # more do not make so small a network faster

    data = make_data()
    print(f"{'':24}{'accuracy of the':>24}{'largest difference':>28}")
    print(f"{'':24}{'trained':>12}{'averaged':>12}{'from AveragedModel':>28}")
    for recipe in RECIPES:
        result = recipe(data, args.epochs)
        name = recipe.__name__.replace("_", " ")
        print(f"{name:24}{result.trained:>12.2%}{result.averaged:>12.2%}{result.difference:>28.2g}")


if __name__ == "__main__":
    main()
