"""`accelerate`: an optimizer that is prepared, steps inside accumulation, and goes through its checkpoints."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.compare import EXACT
from _lib.training import grouped, make_batches, make_model, values
from functional_optim import adapters


pytestmark = [
    pytest.mark.integration,
    # warnings from inside this library are its own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
STEPS, HALF = 6, 3


@pytest.fixture
def accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes accelerators on the CPU; what they share in a process is forgotten afterwards."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerate = pytest.importorskip("accelerate")
    yield lambda **options: accelerate.Accelerator(cpu=True, project_dir=str(tmp_path), **options)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda model: adapters.AdamW(grouped(model), lr=0.05),
    "chain": lambda model: adapters.TransformOptimizer(
        grouped(model), fo.chain(fo.clip_by_global_norm(0.5), fo.adamw(0.05), fo.params_ema(0.9))
    ),
}
NAME = pytest.mark.parametrize("name", OPTIMIZERS)


class Run:
    """Objects that are prepared for a training run."""

    def __init__(self, accelerator: Any, name: str, seed: int = 0) -> None:
        model = make_model(seed)
        optimizer = OPTIMIZERS[name](model)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        self.accelerator, self.inner = accelerator, optimizer
        self.model, self.optimizer, self.scheduler = accelerator.prepare(model, optimizer, scheduler)

    def fit(self, batches: list[Any]) -> None:
        for x, y in batches:
            with self.accelerator.accumulate(self.model):
                loss = torch.nn.functional.mse_loss(self.model(x), y)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()

    @property
    def weights(self) -> list[torch.Tensor]:
        return values(list(self.model.parameters()))  # type: ignore[no-any-return]


def by_hand(name: str, batches: list[Any]) -> tuple[list[torch.Tensor], Any]:
    """The same training without the library."""
    model = make_model()
    optimizer = OPTIMIZERS[name](model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for x, y in batches:
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return values(list(model.parameters())), optimizer


@NAME
def test_training_with_accelerate_has_the_same_bits(name: str, accelerator: Callable[..., Any]) -> None:
    run = Run(accelerator(), name)
    run.fit(make_batches(STEPS))
    expected, optimizer = by_hand(name, make_batches(STEPS))
    torch.testing.assert_close(run.weights, expected, **EXACT)
    assert [g["lr"] for g in run.inner.param_groups] == [g["lr"] for g in optimizer.param_groups]


@NAME
def test_resume(name: str, accelerator: Callable[..., Any], tmp_path: Path) -> None:
    batches = make_batches(STEPS)
    accelerated = accelerator()
    first = Run(accelerated, name)
    first.fit(batches[:HALF])
    accelerated.save_state(str(tmp_path / "half"))
    first.fit(batches[HALF:])
    accelerated.free_memory()

    resumed = Run(accelerated, name, seed=5)
    accelerated.load_state(str(tmp_path / "half"))
    resumed.fit(batches[HALF:])
    expected, _ = by_hand(name, batches)
    torch.testing.assert_close(first.weights, expected, **EXACT)
    torch.testing.assert_close(resumed.weights, expected, **EXACT)


@NAME
def test_accumulation(name: str, accelerator: Callable[..., Any]) -> None:
    """A batch seen twice, each time halved, is the batch: halving is exact."""
    run = Run(accelerator(gradient_accumulation_steps=2), name)
    batches = make_batches(STEPS)
    run.fit([batch for batch in batches for _ in range(2)])
    expected, _ = by_hand(name, batches)
    torch.testing.assert_close(run.weights, expected, **EXACT)
    assert {int(s["step"]) for s in run.inner.state.values()} == {STEPS}


def test_averaged_params(accelerator: Callable[..., Any]) -> None:
    run = Run(accelerator(), "chain")
    run.fit(make_batches(STEPS))
    before = run.weights
    with run.inner.averaged_params():
        averages = run.weights
    torch.testing.assert_close(run.weights, before, **EXACT)
    torch.testing.assert_close(averages, [run.inner.state[p]["ema"] for p in run.model.parameters()], **EXACT)
