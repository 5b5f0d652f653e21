"""Modules whose parameters are packed: they train as they do without."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.compare import assert_same_bits
from functional_optim import adapters


STEPS = 5


class Tied(torch.nn.Module):
    """A model with a tied weight, a frozen one and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.into = torch.nn.Linear(5, 4)
        self.back = torch.nn.Linear(5, 4)
        self.back.weight = self.into.weight
        self.frozen = torch.nn.Parameter(torch.ones(4), requires_grad=False)
        self.norm = torch.nn.BatchNorm1d(4)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.norm(self.into(x)) * self.frozen) + self.back(x)


def batches() -> list[torch.Tensor]:
    return [torch.randn(6, 5, generator=torch.Generator().manual_seed(k)) for k in range(STEPS)]


def test_a_packed_module_trains_as_the_module_does() -> None:
    plain, model = Tied(), Tied()
    objects = dict(model.named_parameters())
    model.into.bias.grad = torch.ones(4)
    packed = fo.pack_module(model)
    assert_same_bits(model.into.bias.grad, torch.ones(4))
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-2, weight_decay=0.1))
    params = {k: p for k, p in plain.named_parameters() if p.requires_grad}
    expected_state, state = tx.init(params), tx.init(packed.params)

    for k, x in enumerate(batches()):
        plain.zero_grad()
        (model if k == 1 else packed).zero_grad()  # that of the module leaves no gradients
        for m in (plain, model):
            m(x).square().sum().backward()
        with torch.no_grad():
            grads = {k: p.grad for k, p in params.items()}
            _, expected_state = fo.apply_gradients(tx, params, grads, expected_state, donate=True)
        _, state = fo.apply_gradients(tx, packed.params, packed.grads, state, donate=True)

    assert_same_bits(dict(model.state_dict()), dict(plain.state_dict()))
    assert all(p is objects[k] for k, p in model.named_parameters())
    assert model.back.weight is model.into.weight
    assert len(packed.grads.buffers) == 1


def test_gradients_that_are_taken_away_are_zeros() -> None:
    model = torch.nn.Linear(3, 2)
    packed = fo.pack_module(model)
    model(torch.ones(1, 3)).sum().backward()
    assert packed.grads.buffers[0].any()

    model.zero_grad()

    assert not packed.grads.buffers[0].any()
    assert model.weight.grad is not None
    model.bias.grad = torch.ones(2)
    assert_same_bits(packed.grads.tree()["bias"], torch.ones(2))
    packed.zero_grad()
    assert not model.bias.grad.any()


@pytest.mark.parametrize("make", [adapters.AdamW, torch.optim.AdamW], ids=["ours", "torch"])
def test_optimizers_of_packed_modules(make: Any) -> None:
    plain, model = Tied(), Tied()
    opts = [make(m.parameters(), lr=1e-2) for m in (plain, model)]
    packed = fo.pack_module(model)
    for x in batches():
        for m, opt in zip((plain, model), opts, strict=True):
            opt.zero_grad(set_to_none=m is plain)
            m(x).square().sum().backward()
            opt.step()

    assert_same_bits(dict(model.state_dict()), dict(plain.state_dict()))
    assert_same_bits(packed.params.tree()["into.bias"], model.into.bias.detach())
    assert_same_bits(packed.grads.tree()["into.bias"], model.into.bias.grad)


def shared() -> torch.nn.Module:
    model = torch.nn.Linear(4, 4)
    model.bias.data = model.weight.data[0]
    return model


def expanded() -> torch.nn.Module:
    model = torch.nn.Linear(4, 4)
    model.bias.data = torch.ones(1).expand(4)
    return model


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (shared(), ValueError, "the parameter 'weight' and the parameter 'bias' share memory"),
        (expanded(), ValueError, "the parameter 'bias' is an expanded tensor"),
        (torch.nn.Linear(2, 2, device="meta"), TypeError, "the parameter 'weight' is on meta"),
        (torch.nn.LazyLinear(2), TypeError, "the parameter 'weight' is UninitializedParameter"),
        (torch.nn.ReLU(), TypeError, "the module has no parameters that require a gradient"),
        ({"w": torch.ones(1)}, TypeError, "pack_module takes a module, got dict"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_modules_that_cannot_be_packed(model: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        fo.pack_module(model)


def test_a_module_that_is_converted_after_it_was_packed() -> None:
    model = torch.nn.Linear(2, 2)
    packed = fo.pack_module(model)
    model.to(torch.float64)

    with pytest.raises(RuntimeError, match="'weight' has been given other memory since its module was packed"):
        packed.params  # noqa: B018


def new_weight(m: Tied) -> None:
    m.into.weight = torch.nn.Parameter(torch.ones(4, 5))


# changes of a module after it was packed, and the message that refuses the next step
CHANGES: dict[str, tuple[Callable[[Tied], Any], str]] = {
    "another parameter": (new_weight, r"'into\.weight' was replaced in the module after"),
    "a parameter that is frozen": (
        lambda m: setattr(m.into, "bias", torch.nn.Parameter(torch.ones(4), requires_grad=False)),
        r"'into\.bias' was replaced in the module",
    ),
    "a state that is assigned": (
        lambda m: m.load_state_dict({k: x.clone() for k, x in m.state_dict().items()}, assign=True),
        r"'into\.weight' was replaced in the module",
    ),
    "a weight that is tied": (lambda m: setattr(m.back, "bias", m.into.bias), r"'back\.bias' was taken from the mod"),
    "a parametrization": (
        lambda m: torch.nn.utils.parametrizations.weight_norm(m.back, "bias", dim=None),
        r"'back\.bias' was taken from the module",
    ),
    "another layer": (lambda m: setattr(m, "norm", torch.nn.BatchNorm1d(4)), r"'norm\.weight' was replaced in"),
    "one more layer": (
        lambda m: m.into.add_module("more", torch.nn.Linear(1, 1)),
        r"'into\.more\.weight' was given to",
    ),
    "conversion to meta": (lambda m: m.to("meta"), r"'into\.weight' was replaced in the module"),
    "freezing": (
        lambda m: m.into.weight.requires_grad_(False),
        r"'into\.weight' was frozen after the module was packed",
    ),
    "unfreezing": (lambda m: m.frozen.requires_grad_(), r"'frozen' was frozen when the module was packed and is not"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_module_that_has_other_parameters_to_train_is_refused(name: str) -> None:
    change, message = CHANGES[name]
    model, tx = Tied(), fo.adamw(1e-2)
    packed = fo.pack_module(model)
    change(model)
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(RuntimeError, match=message):
        fo.apply_gradients(tx, packed.params, packed.grads, tx.init(packed.params), donate=True)

    if "freezing" in name:
        with pytest.raises(RuntimeError, match=message):
            packed.zero_grad()
    if "meta" not in name:
        assert_same_bits(dict(model.state_dict()), dict(before))


def test_a_module_that_is_packed_again_goes_on_with_its_state() -> None:
    model, tx = Tied(), fo.adamw(1e-2)
    packed = fo.pack_module(model)
    state = tx.init(packed.params)
    for k, x in enumerate(batches()):
        if k == 1:
            new_weight(model)
            model.back.weight = model.into.weight
            packed = fo.pack_module(model)
        before = model.into.weight.detach().clone()
        packed.zero_grad()
        model(x).square().sum().backward()
        _, state = fo.apply_gradients(tx, packed.params, packed.grads, state, donate=True)
        assert not torch.equal(model.into.weight, before)
    assert int(state[0].count) == STEPS


def test_a_module_may_have_other_layers_without_parameters() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())
    packed = fo.pack_module(model)
    params = packed.params
    model[1] = torch.nn.ReLU()
    model.append(torch.nn.Dropout())
    model.register_parameter("scale", torch.nn.Parameter(torch.ones(1), requires_grad=False))

    assert packed.params is params
    model[0].bias = None
    with pytest.raises(RuntimeError, match=r"'0\.bias' was taken from the module"):
        packed.params  # noqa: B018


def test_a_copy_of_a_packed_module_is_refused() -> None:
    packed = fo.pack_module(torch.nn.Linear(2, 2))
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="copy or save the module, and pack the copy"):
            copied(packed)


def test_a_step_between_forward_and_backward_is_noticed_with_a_packed_module() -> None:
    module = torch.nn.Linear(3, 2)
    packed = fo.pack_module(module)
    tx = fo.sgd(0.1)
    packed.zero_grad()
    loss = module(torch.ones(2, 3, requires_grad=True)).square().sum()
    fo.apply_gradients(tx, packed.params, packed.grads, tx.init(packed.params), donate=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_packed_module_is_checked_outside_of_a_graph(fullgraph: bool) -> None:
    torch.compiler.reset()
    model = torch.nn.Linear(2, 1)
    packed = fo.pack_module(model)
    tx = fo.sgd(0.5)
    state = tx.init(packed.params)
    model(torch.ones(3, 2)).sum().backward()
    before, slope = [{k: x.clone() for k, x in fo.unpack(tree).items()} for tree in (packed.params, packed.grads)]

    @torch.compile(fullgraph=fullgraph, backend="eager")
    def step(state: Any) -> Any:
        _, state = fo.apply_gradients(tx, packed.params, packed.grads, state, donate=True)
        packed.zero_grad()
        return state

    if fullgraph:
        with pytest.raises(Exception, match=r"give `packed.params` and `packed.grads` to the function as arguments"):
            step(state)
        return
    step(state)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name] - 0.5 * slope[name])
        assert not p.grad.any()
    model.weight = torch.nn.Parameter(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="'weight' was replaced"):
        step(state)
