"""Steps during the backward pass: an optimizer for each parameter, gone through as soon as its gradient is there."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import state_dict as dsd

import functional_optim as fo
from _lib.compare import EXACT
from _lib.training import fit, make_batches, make_model
from functional_optim import adapters


# the package that the function is in compiles scripts when it is first imported
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def in_backward(make: Any, params: Iterable[torch.Tensor]) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(make, params, {"lr": 0.01})


def backward_only(model: torch.nn.Module, steps: int) -> None:
    for x, y in make_batches(steps):
        torch.nn.functional.mse_loss(model(x), y).backward()


@pytest.mark.parametrize("cls", [adapters.AdamW, adapters.SGD, adapters.Lion, adapters.LAMB])
def test_step_in_backward_is_a_step_after_it(cls: type[torch.optim.Optimizer]) -> None:
    model, expected = make_model(), make_model()
    in_backward(cls, model.parameters())
    backward_only(model, 4)
    fit(expected, cls(expected.parameters(), lr=0.01), make_batches(4))  # type: ignore[call-arg]
    torch.testing.assert_close(list(model.parameters()), list(expected.parameters()), **EXACT)
    assert all(p.grad is None for p in model.parameters())


def test_chain_in_backward() -> None:
    def tx(learning_rate: float) -> fo.GradientTransformation:
        return fo.chain(fo.clip_by_block_rms(1.0), fo.adamw(learning_rate), fo.params_ema(0.9))

    model, expected = make_model(), make_model()
    in_backward(adapters.TransformOptimizer.factory(tx), model.parameters())
    backward_only(model, 4)
    fit(expected, adapters.TransformOptimizer(expected.parameters(), tx(0.01)), make_batches(4))
    torch.testing.assert_close(list(model.parameters()), list(expected.parameters()), **EXACT)


def test_state_dict_of_optimizers_in_backward() -> None:
    """The checkpoint code takes the list of optimizers."""
    model, resumed = make_model(), make_model()
    in_backward(adapters.AdamW, model.parameters())
    in_backward(adapters.AdamW, resumed.parameters())
    backward_only(model, 2)
    each = [[o for p in m.parameters() for o in p._in_backward_optimizers] for m in (model, resumed)]  # type: ignore[attr-defined]
    saved = dsd.get_optimizer_state_dict(model, each[0])
    assert {k: int(v["step"]) for k, v in saved["state"].items()} == {name: 2 for name, _ in model.named_parameters()}
    resumed.load_state_dict(model.state_dict())
    dsd.set_optimizer_state_dict(resumed, each[1], saved)
    backward_only(model, 2)
    backward_only(resumed, 2)
    torch.testing.assert_close(list(resumed.parameters()), list(model.parameters()), **EXACT)


def test_global_norm_in_backward_is_refused() -> None:
    def tx(learning_rate: float) -> fo.GradientTransformation:
        return fo.chain(fo.clip_by_global_norm(1.0), fo.sgd(learning_rate))

    model = make_model()
    factory = adapters.TransformOptimizer.factory(tx)

    def apply_and_train() -> None:
        in_backward(factory, model.parameters())
        backward_only(model, 1)

    with pytest.raises(RuntimeError, match="needs the gradients of all parameters at once"):
        apply_and_train()
    torch.testing.assert_close(list(model.parameters()), list(make_model().parameters()), **EXACT)
