"""`torch.amp.GradScaler`: it unscales and skips itself, or leaves both to the kernel (`fused=True`)."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.compare import EXACT
from _lib.optimizers import SMALL, make_grads, make_params, params_of, take_steps
from _lib.training import values
from functional_optim import adapters


SCALE = 8.0  # a power of two: scaling and unscaling are exact
Make = Callable[[list[torch.nn.Parameter], bool], Any]


def chain(params: list[torch.nn.Parameter], fused: bool) -> Any:
    tx = fo.chain(
        fo.clip_by_global_norm(1.0), fo.adamw(fo.linear_schedule(0.1, 0.01, 5), weight_decay=0.1), fo.params_ema(0.9)
    )
    return adapters.TransformOptimizer(params, tx, fused=fused)


OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p, fused: adapters.SGD(p, lr=0.1, fused=fused),
    "SGD with dampened momentum": lambda p, fused: adapters.SGD(
        p, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1, fused=fused
    ),
    "Adam": lambda p, fused: adapters.Adam(p, lr=0.1, amsgrad=True, fused=fused),
    "AdamW": lambda p, fused: adapters.AdamW(p, lr=0.1, fused=fused),
    "Adagrad": lambda p, fused: adapters.Adagrad(p, lr=0.1, lr_decay=0.1, fused=fused),
    "Lion": lambda p, fused: adapters.Lion(p, lr=0.1, weight_decay=0.1, fused=fused),
    "LAMB": lambda p, fused: adapters.LAMB(p, lr=0.1, fused=fused),
    "chain": chain,
}
ADAGRAD = torch.optim.Adagrad([torch.zeros(1)], fused=True)
if not getattr(ADAGRAD, "_step_supports_amp_scaling", False):  # torch 2.11: a scaler skips its steps itself
    del OPTIMIZERS["Adagrad"]
PATHS = pytest.mark.parametrize("fused", [False, True], ids=["scaler skips", "kernel skips"])


def state_of(optimizer: Any) -> list[Any]:
    return [values(optimizer.state.get(p, {})) for p in params_of(optimizer)]


def scaled_step(scaler: Any, optimizer: Any, grads: Sequence[torch.Tensor], overflow: bool) -> None:
    """A step as a loop with a scaler takes it; an overflow is one element of one gradient."""
    for p, g in zip(params_of(optimizer), grads, strict=True):
        p.grad = g * scaler.get_scale()
    if overflow:
        params_of(optimizer)[1].grad[3] = torch.inf  # type: ignore[index]
    scaler.step(optimizer)
    scaler.update()


def make_scaler() -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000)
    scaler.scale(torch.zeros(()))  # a scaler makes its tensors when it scales its first loss
    return scaler


@PATHS
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("overflows", [(), (0,), (0, 1), (2,), (1, 3, 4)], ids=str)
def test_same_as_without_a_scaler(name: str, fused: bool, overflows: tuple[int, ...]) -> None:
    optimizer = OPTIMIZERS[name](make_params(shapes=SMALL), fused)
    assert getattr(optimizer, "_step_supports_amp_scaling", False) is fused
    scaler = make_scaler()
    grads = make_grads(params_of(optimizer), 6)
    for k, each in enumerate(grads):
        scaled_step(scaler, optimizer, each, k in overflows)
    plain = OPTIMIZERS[name](make_params(shapes=SMALL), False)
    take_steps(plain, [g for k, g in enumerate(grads) if k not in overflows])

    actual = values(params_of(optimizer)), state_of(optimizer)
    torch.testing.assert_close(actual, (values(params_of(plain)), state_of(plain)), **EXACT)
    assert scaler.get_scale() == SCALE * 0.5 ** len(overflows)


@PATHS
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_overflow_changes_nothing(name: str, fused: bool) -> None:
    optimizer = OPTIMIZERS[name](make_params(shapes=SMALL), fused)
    scaler = make_scaler()
    grads = make_grads(params_of(optimizer), 3)
    for each in grads[:2]:
        scaled_step(scaler, optimizer, each, False)
    before = values(params_of(optimizer)), state_of(optimizer)
    scaled_step(scaler, optimizer, grads[2], True)
    torch.testing.assert_close((values(params_of(optimizer)), state_of(optimizer)), before, **EXACT)


@PATHS
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_overflow_at_the_first_step(name: str, fused: bool) -> None:
    """There may be state afterwards, but only as it is made: the counter is 0."""
    optimizer = OPTIMIZERS[name](make_params(shapes=SMALL), fused)
    scaled_step(make_scaler(), optimizer, make_grads(params_of(optimizer), 1)[0], True)
    torch.testing.assert_close(values(params_of(optimizer)), values(make_params(shapes=SMALL)), **EXACT)
    for p, state in zip(params_of(optimizer), state_of(optimizer), strict=True):
        for key, value in state.items():
            initial = p.detach() if key == "ema" else torch.zeros_like(value)
            torch.testing.assert_close(value, initial, **EXACT)


@PATHS
def test_unscaled_and_clipped_before_the_step(fused: bool) -> None:
    optimizer, plain = (OPTIMIZERS["AdamW"](make_params(shapes=SMALL), f) for f in (fused, False))
    scaler = make_scaler()
    for k, grads in enumerate(make_grads(params_of(plain), 4)):
        for o, scale in ((optimizer, scaler.get_scale()), (plain, 1.0)):
            for p, g in zip(params_of(o), grads, strict=True):
                p.grad = g * scale
        if k == 2:
            params_of(optimizer)[0].grad[0, 0] = torch.nan  # type: ignore[index]
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params_of(optimizer), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if k != 2:
            torch.nn.utils.clip_grad_norm_(params_of(plain), 1.0)
            plain.step()
    torch.testing.assert_close(values(params_of(optimizer)), values(params_of(plain)), **EXACT)
    assert scaler.get_scale() == SCALE / 2


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("overflow", [False, True], ids=["finite", "overflow"])
def test_kernel_does_not_write_gradients(name: str, overflow: bool) -> None:
    """The scaler itself writes them when it looks for overflows, multiplied by one; the step does not."""
    optimizer = OPTIMIZERS[name](make_params(shapes=SMALL), True)
    seen: list[Any] = []

    def note(*_: Any) -> None:
        grads = [p.grad for p in params_of(optimizer)]
        seen.append([(id(g), g._version, g.clone()) for g in grads if g is not None])

    optimizer.register_step_pre_hook(note)
    optimizer.register_step_post_hook(note)
    scaled_step(make_scaler(), optimizer, make_grads(params_of(optimizer), 1)[0], overflow)
    torch.testing.assert_close(seen[1], seen[0], **EXACT)


def test_scaler_attributes_are_removed_after_the_step() -> None:
    """A step without a scaler after one with it is an ordinary one."""
    optimizer, plain = (OPTIMIZERS["AdamW"](make_params(shapes=SMALL), fused) for fused in (True, False))
    first, second = make_grads(params_of(plain), 2)
    scaled_step(make_scaler(), optimizer, first, False)
    take_steps(optimizer, [second])
    take_steps(plain, [first, second])
    assert not hasattr(optimizer, "found_inf")
    torch.testing.assert_close(values(params_of(optimizer)), values(params_of(plain)), **EXACT)


@PATHS
def test_with_autocast(fused: bool) -> None:
    """A loop as in torch's documentation: a model in float32, its products in bfloat16."""
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 16)
    x = torch.randn(32, 16)
    optimizer = OPTIMIZERS["AdamW"](list(model.parameters()), fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = torch.nn.functional.mse_loss(model(x), x)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@PATHS
@pytest.mark.parametrize("position", [0, 1, 2])
def test_opaque_transformation_sees_unscaled_gradients(position: int, fused: bool) -> None:
    members = [fo.trace(0.9), fo.sgd(0.1, momentum=0.5)]
    names = [f"p{k}" for k in range(len(make_params(shapes=SMALL)))]

    def signs(updates: Any, params: Any) -> Any:
        return {k: None if u is None else u.sign() for k, u in updates.items()}

    members.insert(position, fo.stateless(signs))
    tx = fo.chain(*members)

    def make(fused: bool) -> Any:
        return adapters.TransformOptimizer(list(zip(names, make_params(shapes=SMALL), strict=True)), tx, fused=fused)

    optimizer, plain, scaler = make(fused), make(False), make_scaler()
    grads = make_grads(params_of(optimizer), 4)
    for k, each in enumerate(grads):
        scaled_step(scaler, optimizer, each, k == 1)
    take_steps(plain, [g for k, g in enumerate(grads) if k != 1])

    actual = values(params_of(optimizer)), state_of(optimizer)
    torch.testing.assert_close(actual, (values(params_of(plain)), state_of(plain)), **EXACT)
