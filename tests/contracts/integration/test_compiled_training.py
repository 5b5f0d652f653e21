"""Whole train steps of optimizers in one compiled function: loss, backward, step, zero_grad; numbers of eager mode.

torch breaks the graph at `backward`, at `zero_grad` and where a scheduler has wrapped `step`; graphs are counted, and
from the third step on none may be made.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import functional_optim as fo
from functional_optim import adapters


pytestmark = [
    pytest.mark.integration,
    # the compiler's own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
STEPS = 20


@fo.leafwise
def center(u: Any) -> Any:
    """A rule for whole tensors, which no kernel computes."""
    return u - u.mean()


def halve(updates: Any, state: Any, params: Any = None) -> Any:
    """An opaque transformation with a state of its own."""
    return {k: None if u is None else u / (1 + state["n"]) for k, u in updates.items()}, {"n": state["n"] + 1}


HALVE = fo.GradientTransformation(lambda params: {"n": torch.zeros(())}, halve)


def model() -> torch.nn.Module:
    """Layers of which the first is frozen, and one that the loss does not use, so that its gradient is None."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Linear(3, 3), torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2), torch.nn.Linear(1, 1)
    )
    layers[0].requires_grad_(False)
    return layers


def groups(layers: Any, lr: Any) -> list[dict[str, Any]]:
    own = [p for layer in layers[:3] for p in layer.parameters()]
    return [{"params": own, "lr": lr}, {"params": [*layers[3].parameters(), *layers[4].parameters()], "lr": 0.01}]


def of_chain(tx: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda layers, lr: adapters.TransformOptimizer(layers.named_parameters(), tx(lr))


OPTIMIZERS: dict[str, Callable[[Any, Any], Any]] = {
    "AdamW": lambda layers, lr: adapters.AdamW(groups(layers, lr), weight_decay=0.1),
    "SGD": lambda layers, lr: adapters.SGD(layers.parameters(), lr=lr, momentum=0.9, dampening=0.1),
    "amsgrad": lambda layers, lr: adapters.Adam(groups(layers, lr), amsgrad=True),
    "chain": of_chain(lambda lr: fo.chain(fo.clip_by_global_norm(0.5), fo.adamw(lr), fo.params_ema(0.9))),
    "Python between": of_chain(lambda lr: fo.chain(fo.trace(0.9), center(), HALVE, fo.scale_by_learning_rate(lr))),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def counter(backend: str = "aot_eager") -> Any:
    """A backend that counts graphs; it takes seconds to import."""
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend(backend)


@contextlib.contextmanager
def strict(settled: bool) -> Iterator[None]:
    """The compiler fails where it would give up, and where it would compile anew when all should be settled."""
    import torch._dynamo.config

    with torch._dynamo.config.patch(error_on_recompile=settled, fail_on_recompile_limit_hit=True):
        yield


def batch(k: int) -> torch.Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(k))


def numbers_of(layers: Any, optimizer: Any) -> list[torch.Tensor]:
    """Parameters, and the tensors of their states."""
    states = [optimizer.state.get(p, {}) for p in layers.parameters()]
    entries = [x for state in states for x in state.values() if isinstance(x, torch.Tensor)]
    return [*(p.detach() for p in layers.parameters()), *entries]


def assert_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """The same bits."""
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def make_step(layers: Any, optimizer: Any, set_to_none: bool = True) -> Callable[[torch.Tensor], torch.Tensor]:
    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = layers[:4](x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@pytest.mark.parametrize(
    ("name", "tensor_lr"),
    [
        ("AdamW", False),
        ("AdamW", True),
        ("SGD", True),
        ("amsgrad", False),
        ("chain", False),
        ("Python between", False),
        ("Python between", True),
    ],
)
def test_whole_steps_equal_eager_mode(name: str, tensor_lr: bool) -> None:
    """Bit by bit under a scheduler, and compiled at the first two steps alone: a float is a variable by then."""
    results = []
    for backend in (counter(), None):
        layers = model()
        optimizer = OPTIMIZERS[name](layers, torch.tensor(0.05) if tensor_lr else 0.05)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        step = make_step(layers, optimizer, set_to_none=tensor_lr)
        step = step if backend is None else torch.compile(step, backend=backend)
        losses = []
        for k in range(STEPS):
            with strict(settled=k >= 2):
                losses.append(step(batch(k)))
            scheduler.step()
        results.append([*losses, *numbers_of(layers, optimizer)])
        assert backend is None or backend.frame_count >= 2
    assert_equal(*results)
    assert any(len(state) for state in optimizer.state.values())


@pytest.mark.parametrize("name", ["AdamW", "Python between"])
def test_a_whole_step_goes_on_from_a_file(name: str) -> None:
    """A fresh optimizer that loads a state before its first, compiled step; later its own state again."""
    layers = model()
    optimizer = OPTIMIZERS[name](layers, 0.05)
    for k in range(3):
        make_step(layers, optimizer)(batch(k))
    file = io.BytesIO()
    torch.save((layers.state_dict(), optimizer.state_dict()), file)
    results = []
    for compiled in (True, False):
        layers = model()
        optimizer = OPTIMIZERS[name](layers, 0.5)
        step = make_step(layers, optimizer)
        step = torch.compile(step, backend=counter()) if compiled else step
        for k in range(6):
            if k in (0, 4):
                file.seek(0)
                weights, state = torch.load(file)
                layers.load_state_dict(weights)
                optimizer.load_state_dict(state)
            with strict(settled=False):
                step(batch(k))
        results.append(numbers_of(layers, optimizer))
    assert_equal(*results)


def test_parameters_that_are_frozen_and_thawed() -> None:
    """A gradient that is gone leaves a parameter and its state as they are; one more graph, and back to the first."""
    results = []
    for backend in (counter(), None):
        layers = model()
        optimizer = adapters.AdamW(layers.parameters(), lr=0.05)
        step = make_step(layers, optimizer)
        step = step if backend is None else torch.compile(step, backend=backend)
        for k in range(9):
            layers[1].requires_grad_(not 3 <= k < 6)
            with strict(settled=k >= 7):
                step(batch(k))
        results.append(numbers_of(layers, optimizer))
    assert_equal(*results)


def test_two_optimizers_in_one_function() -> None:
    results = []
    for backend in (counter(), None):
        layers = model()
        both = [
            adapters.SGD(layers[1].parameters(), lr=0.1, momentum=0.9),
            adapters.TransformOptimizer(layers[3].parameters(), fo.chain(fo.clip_by_global_norm(0.1), fo.adam(0.1))),
        ]

        def step(x: torch.Tensor) -> None:
            for optimizer in both:
                optimizer.zero_grad()
            for part in x.chunk(2):  # gradients add up
                layers[:4](part).square().mean().backward()
            for optimizer in both:
                optimizer.step()

        take = step if backend is None else torch.compile(step, backend=backend)
        for k in range(STEPS):
            with strict(settled=k >= 1):
                take(batch(k))
        results.append([x for optimizer in both for x in numbers_of(layers, optimizer)])
    assert_equal(*results)


# -- writes of the compiled function around the step --------------------------------------------------------------


def write_rates(layers: Any, optimizer: Any, rate: torch.Tensor) -> None:
    """Two steps, and a rate that is written to before, between and after them."""
    rate.mul_(0.5)
    optimizer.step()
    rate.mul_(3.0)
    optimizer.step()
    rate.mul_(0.9)


def write_everything(layers: Any, optimizer: Any, rate: torch.Tensor) -> None:
    """Gradients, parameters and states that are written to before and after a step."""
    with torch.no_grad():
        for p in layers[1].parameters():
            p.grad.mul_(2.0)
            p.mul_(0.9)
            for x in optimizer.state[p].values():
                x.mul_(0.5)
        optimizer.step()
        for p in layers[1].parameters():
            p.grad.zero_()
            p.add_(1.0)
        optimizer.step()


@pytest.mark.parametrize("write", [write_rates, write_everything], ids=["rates", "everything"])
@pytest.mark.parametrize("name", ["SGD", "chain", "Python between"])
def test_steps_come_between_what_is_written_before_and_after(name: str, write: Any) -> None:
    results = []
    for backend in (counter(), None):
        layers, rate = model(), torch.tensor(0.1)
        optimizer = OPTIMIZERS[name](layers, rate)
        make_step(layers, optimizer)(batch(0))  # states are there
        take = write if backend is None else torch.compile(write, backend=backend, fullgraph=True)
        for k in range(5):
            optimizer.zero_grad(set_to_none=False)  # a graph that looks into states is bound to the gradients
            layers[:4](batch(k)).square().mean().backward()
            with strict(settled=k >= 1):
                take(layers, optimizer, rate)
        results.append([rate, *numbers_of(layers, optimizer)])
    assert_equal(*results)


def test_an_extra_number_becomes_a_variable() -> None:
    @fo.elementwise(extra=("value",))
    def scale_by_value(u: Any, *, value: Any) -> Any:
        return u * value

    results = []
    for backend in (counter(), None):
        layers = model()
        optimizer = of_chain(lambda lr: fo.chain(scale_by_value(), fo.sgd(lr)))(layers, 0.1)

        def step(value: Any) -> None:
            optimizer.step(value=value)

        take = step if backend is None else torch.compile(step, backend=backend, fullgraph=True)
        for k in range(6):
            optimizer.zero_grad()
            layers[:4](batch(k)).square().mean().backward()
            with strict(settled=k >= 2):
                take(1.0 + 0.3 * k)
        results.append(numbers_of(layers, optimizer))
    assert_equal(*results)


@pytest.mark.parametrize("inside", [False, True])
def test_a_backend_that_is_asked_for_inside_or_around(inside: bool) -> None:
    """The kernels of C round otherwise in some of these steps; after the context they are back."""
    results = []
    for backend in (counter(), None):
        layers = model()
        optimizer = adapters.AdamW(layers.parameters(), lr=0.05)
        seen = []

        def step() -> None:
            with fo.use_backend("reference") if inside else contextlib.nullcontext():
                optimizer.step()

        take = step if backend is None else torch.compile(step, backend=backend, fullgraph=True)
        for k in range(6):
            optimizer.zero_grad()
            layers[:4](batch(k)).square().mean().backward()
            with contextlib.nullcontext() if inside or k >= 4 else fo.use_backend("reference"):
                take()
            seen += [x.clone() for x in numbers_of(layers, optimizer)]
        results.append(seen)
    assert_equal(*results)


# -- packed modules -----------------------------------------------------------------------------------------------


class Many(torch.nn.Module):
    """Many parameters, which one operation reads."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.linspace(-1, 1, 2 + k % 5) for k in range(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(list(self.weights)) * x


@pytest.mark.parametrize(("how", "n"), [("pure API", 100), ("optimizer", 20)])
def test_packed_modules(how: str, n: int) -> None:
    """The step in one graph, over the buffers alone; or that of an optimizer, over all parameters."""
    results = []
    for backend in (counter(), None):
        many = Many(n)
        packed = fo.pack_module(many)
        tx = fo.chain(fo.clip_by_global_norm(0.5), fo.adamw(0.1))
        optimizer = adapters.TransformOptimizer(many.parameters(), tx)
        state = tx.init(packed.params)

        def update(params: Any, grads: Any, state: Any) -> Any:
            return fo.apply_gradients(tx, params, grads, state, donate=True)[1]

        take = update if how == "pure API" else optimizer.step
        take = take if backend is None else torch.compile(take, backend=backend, fullgraph=True)
        for k in range(4):
            packed.zero_grad()
            many(torch.ones(()) + k).square().mean().backward()
            with strict(settled=k >= 1):
                if how == "pure API":
                    state = take(packed.params, packed.grads, state)
                else:
                    take()
        results.append([p.detach().clone() for p in many.parameters()])
        assert backend is None or backend.frame_count == 1
    assert_equal(*results)
    tree = dict(Many(n).named_parameters())
    plain = {name: p.detach() for name, p in tree.items()}, tx.init(tree)
    for k in range(4):
        grads = torch.func.grad(lambda p: (torch.cat(list(p.values())) * (torch.ones(()) + k)).square().mean())(
            plain[0]
        )
        plain = fo.apply_gradients(tx, plain[0], grads, plain[1])
    assert_equal(results[0], list(plain[0].values()))
