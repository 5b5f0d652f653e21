"""A Lightning `Trainer` with our optimizers."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.compare import EXACT
from _lib.training import fit, grouped, make_batches, make_model, values
from functional_optim import adapters


pytestmark = [
    pytest.mark.integration,
    # warnings from inside this library are its own, and so is its advice about workers, loggers and folders
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:.*(does not have many workers|exists and is not empty|litlogger|tensorboardX|dirpath has changed).*"
    ),
    pytest.mark.filterwarnings("ignore:.*(isinstance.treespec, LeafSpec|`training_step` returned `None`).*"),
]
STEPS, HALF = 6, 3  # of two epochs, and of one, at whose end a checkpoint is written


@pytest.fixture(scope="module")
def library() -> Any:
    """lightning, without its messages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("lightning")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return found


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda model: adapters.AdamW(grouped(model), lr=0.05),
    "LAMB": lambda model: adapters.LAMB(grouped(model), lr=0.05),
    "chain": lambda model: adapters.TransformOptimizer(
        grouped(model), fo.chain(fo.clip_by_global_norm(0.5), fo.adamw(0.05), fo.params_ema(0.9))
    ),
    "schedule": lambda model: adapters.TransformOptimizer(
        model.named_parameters(), fo.adamw(fo.linear_schedule(0.1, 0.0, 10))
    ),
}
NAME = pytest.mark.parametrize("name", OPTIMIZERS)


def make_module(library: Any, name: str, manual: bool = False, seed: int = 0) -> Any:
    batches = make_batches(STEPS)

    class Module(library.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model(seed)
            self.automatic_optimization = not manual

        def training_step(self, batch: Any, index: int) -> Any:
            # by the count of steps: where in its loader the library goes on is not what is tested
            x, y = batches[self.trainer.global_step]
            loss = torch.nn.functional.mse_loss(self.model(x), y)
            if not manual:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.lr_schedulers().step()
            return None

        def configure_optimizers(self) -> Any:
            optimizer = OPTIMIZERS[name](self.model)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return Module()


def train(library: Any, module: Any, folder: Path, steps: int, resume: Any = None, **options: Any) -> Any:
    trainer = library.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing="callbacks" in options,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(
        module, torch.utils.data.DataLoader(range(HALF)), ckpt_path=resume, weights_only=True if resume else None
    )
    assert trainer.global_step == steps
    return trainer


def weights(module: Any) -> list[torch.Tensor]:
    return values(list(module.model.parameters()))  # type: ignore[no-any-return]


def by_hand(name: str, clip: float | None = None) -> list[torch.Tensor]:
    """The same training without the library."""
    model = make_model()
    optimizer = OPTIMIZERS[name](model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    if clip is not None:
        # in the order that the library finds them in, which the last bit of the norm depends on
        params = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(params, clip) and None)
    for batch in make_batches(STEPS):
        fit(model, optimizer, [batch])
        scheduler.step()
    return values(list(model.parameters()))  # type: ignore[no-any-return]


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@NAME
def test_training_with_lightning_has_the_same_bits(name: str, manual: bool, library: Any, tmp_path: Path) -> None:
    """Automatic optimization gives the step a closure, manual none."""
    module = make_module(library, name, manual)
    train(library, module, tmp_path, STEPS)
    torch.testing.assert_close(weights(module), by_hand(name), **EXACT)


@NAME
def test_resume(name: str, library: Any, tmp_path: Path) -> None:
    """The file is loaded as weights only, which no code can hide in."""

    def callback(folder: str) -> Any:
        return library.pytorch.callbacks.ModelCheckpoint(tmp_path / folder, "{step}", save_top_k=-1, every_n_epochs=1)

    whole = make_module(library, name)
    train(library, whole, tmp_path, STEPS, callbacks=[callback("whole")])
    resumed = make_module(library, name, seed=5)
    file = tmp_path / "whole" / f"step={HALF}.ckpt"
    train(library, resumed, tmp_path, STEPS, resume=file, callbacks=[callback("resumed")])
    torch.testing.assert_close(weights(whole), by_hand(name), **EXACT)
    torch.testing.assert_close(weights(resumed), by_hand(name), **EXACT)


def test_clip_of_the_trainer(library: Any, tmp_path: Path) -> None:
    module = make_module(library, "AdamW")
    train(library, module, tmp_path, STEPS, gradient_clip_val=0.5)
    torch.testing.assert_close(weights(module), by_hand("AdamW", clip=0.5), **EXACT)
