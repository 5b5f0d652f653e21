"""Averages of weights: torch's `AveragedModel`, `update_bn` and `SWALR` beside an optimizer, and those in a chain."""

import copy
from typing import Any

import pytest
import torch
from torch.optim import swa_utils

import functional_optim as fo
from _lib.compare import EXACT
from _lib.training import fit, make_batches, make_model, values
from functional_optim import adapters


DECAY = 0.75
# An average is a sum of two products, which torch's lerp and a kernel round differently: two roundings of 2**-53 in
# each of at most ten steps, of numbers of order one. Later steps shrink what earlier ones were off.
AVERAGED: dict[str, Any] = {"rtol": 0.0, "atol": 20 * 2.0**-53}


def tx() -> fo.GradientTransformation:
    return fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.05), fo.params_ema(DECAY))


@pytest.mark.parametrize("cls", [adapters.AdamW, torch.optim.AdamW])
def test_averaged_model_and_swalr(cls: Any) -> None:
    """The average is the mean of the weights after each step, and the weights are those of torch's own class."""
    model, twin = make_model(), make_model()
    optimizer, other = cls(model.parameters(), lr=0.05), torch.optim.AdamW(twin.parameters(), lr=0.05, fused=True)
    averaged = swa_utils.AveragedModel(model)
    schedulers = [swa_utils.SWALR(o, 0.01, anneal_epochs=3) for o in (optimizer, other)]
    seen = []
    for batch in make_batches(6):
        fit(model, optimizer, [batch])
        fit(twin, other, [batch])
        averaged.update_parameters(model)
        for scheduler in schedulers:
            scheduler.step()
        seen.append(values(list(model.parameters())))
    mean = [torch.stack(xs).mean(0) for xs in zip(*seen, strict=True)]
    torch.testing.assert_close(values(list(averaged.module.parameters())), mean, **AVERAGED)
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"] == 0.01
    if cls is adapters.AdamW:
        # the last bias, of four, is no whole vector, and reaches other parameters by gradients: an ulp of the update
        # in each step, of which Adam may make a few
        torch.testing.assert_close(seen[-1], values(list(twin.parameters())), rtol=1e-13, atol=1e-14)


def test_update_bn() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 4)).double()
    optimizer = adapters.AdamW(model.parameters(), lr=0.05)
    averaged = swa_utils.AveragedModel(model)
    batches = make_batches(4)
    for batch in batches:
        fit(model, optimizer, [batch])
        averaged.update_parameters(model)
    before = values([*optimizer.state.values()]), values(list(model.parameters()))
    swa_utils.update_bn(batches, averaged)
    torch.testing.assert_close((values([*optimizer.state.values()]), values(list(model.parameters()))), before, **EXACT)
    hidden = torch.cat([averaged.module[0](x) for x, _ in batches])
    # all batches are of one size, so that the mean of their means is that of all rows; sums in another order
    torch.testing.assert_close(averaged.module[1].running_mean, hidden.mean(0), rtol=0, atol=1e-14)


def train() -> tuple[torch.nn.Module, Any, list[torch.Tensor]]:
    """Trains.

    Returns:
      The model, the optimizer, and averages by hand.
    """
    model = make_model()
    optimizer = adapters.TransformOptimizer(model.parameters(), tx())
    averages = values(list(model.parameters()))
    for batch in make_batches(5):
        fit(model, optimizer, [batch])
        averages = [DECAY * a + (1 - DECAY) * p.detach() for a, p in zip(averages, model.parameters(), strict=True)]
    return model, optimizer, averages


def test_averaged_params() -> None:
    model, optimizer, expected = train()
    before = values(list(model.parameters()))
    identities = [id(p) for p in model.parameters()], [p.data_ptr() for p in model.parameters()]
    with optimizer.averaged_params():
        inside = values(list(model.parameters()))
    torch.testing.assert_close(inside, expected, **AVERAGED)
    torch.testing.assert_close(values(list(model.parameters())), before, **EXACT)
    assert ([id(p) for p in model.parameters()], [p.data_ptr() for p in model.parameters()]) == identities


def test_averaged_params_are_those_of_averaged_model() -> None:
    model = make_model()
    optimizer = adapters.TransformOptimizer(model.parameters(), tx())
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(DECAY))
    averaged.update_parameters(model)  # the first is a copy, which is where the chain's average starts
    for batch in make_batches(5):
        fit(model, optimizer, [batch])
        averaged.update_parameters(model)
    with optimizer.averaged_params():
        torch.testing.assert_close(
            values(list(model.parameters())), values(list(averaged.module.parameters())), **AVERAGED
        )


def test_params_are_restored_after_an_exception_in_averaged_params() -> None:
    model, optimizer, _ = train()
    before = values(list(model.parameters()))
    with pytest.raises(ZeroDivisionError), optimizer.averaged_params():
        raise ZeroDivisionError
    torch.testing.assert_close(values(list(model.parameters())), before, **EXACT)


def test_step_in_averaged_params_is_refused() -> None:
    model, optimizer, _ = train()
    state = values([*optimizer.state.values()])
    with optimizer.averaged_params(), pytest.raises(RuntimeError, match="inside `averaged_params"):
        optimizer.step()
    torch.testing.assert_close(values([*optimizer.state.values()]), state, **EXACT)
    fit(model, optimizer, make_batches(1))  # and afterwards it steps again


def test_training_after_averaged_params_has_the_same_bits() -> None:
    model, optimizer, _ = train()
    other, other_optimizer, _ = train()
    with optimizer.averaged_params(), torch.no_grad():
        model(make_batches(1)[0][0])
    for m, o in ((model, optimizer), (other, other_optimizer)):
        fit(m, o, make_batches(3, seed=9))
    torch.testing.assert_close(values(list(model.parameters())), values(list(other.parameters())), **EXACT)


def test_state_dict_in_averaged_params_is_whole() -> None:
    """Saved in there, a state is whole; the weights of the model are the averages, which is what one ships."""
    model, optimizer, averages = train()
    with optimizer.averaged_params():
        saved, weights = copy.deepcopy(optimizer.state_dict()), values(model.state_dict())
    shipped, resumed = make_model(seed=5), make_model(seed=6)
    shipped.load_state_dict(weights)
    torch.testing.assert_close(values(list(shipped.parameters())), averages, **AVERAGED)
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer = adapters.TransformOptimizer(resumed.parameters(), tx())
    resumed_optimizer.load_state_dict(saved)
    for m, o in ((model, optimizer), (resumed, resumed_optimizer)):
        fit(m, o, make_batches(3, seed=9))
    torch.testing.assert_close(values(list(resumed.parameters())), values(list(model.parameters())), **EXACT)


def test_averaged_params_without_an_average_is_refused() -> None:
    without = adapters.TransformOptimizer(make_model().parameters(), fo.adamw(0.05))
    before_a_step = adapters.TransformOptimizer(make_model().parameters(), tx())
    for optimizer in (without, before_a_step):
        with pytest.raises(ValueError, match="no averaged parameters"), optimizer.averaged_params():
            pass
