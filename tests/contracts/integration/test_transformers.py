"""`transformers.Trainer` on a language model of random weights and a few rows of numbers."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.compare import EXACT
from _lib.training import grouped, values
from functional_optim import adapters


pytestmark = [
    pytest.mark.integration,
    # warnings from inside these libraries are theirs
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
STEPS, HALF, ROWS, BATCH = 6, 3, 24, 4
SMALL = {"vocab_size": 16, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.fixture(scope="module")
def library() -> Any:
    """transformers, cut off from the network and from whatever reports on training."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "WANDB_DISABLED"):
            patch.setenv(name, "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield pytest.importorskip("transformers")


def make_model(library: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    config = library.GPT2Config(**SMALL, **NO_DROPOUT, bos_token_id=0, eos_token_id=0)
    return library.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def rows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 16, (ROWS, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": x, "labels": x} for x in ids]


def tx(learning_rate: float = 1e-2, weight_decay: float = 0.1) -> fo.GradientTransformation:
    return fo.chain(fo.clip_by_global_norm(0.5), fo.adamw(learning_rate, weight_decay=weight_decay), fo.params_ema(0.9))


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda params: adapters.AdamW(params, lr=1e-2),
    "chain": lambda params: adapters.TransformOptimizer(params, tx()),
}
FACTORIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (adapters.AdamW, {"lr": 1e-2, "betas": (0.9, 0.99)}),
    "chain": (adapters.TransformOptimizer.factory(tx), {"lr": 1e-2}),
}


def arguments(library: Any, folder: Path, **options: Any) -> Any:
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "save_steps": HALF,
        "save_strategy": "steps",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        "weight_decay": 0.1,
        "max_grad_norm": 0.0,
        "dataloader_pin_memory": False,
        "lr_scheduler_type": "linear",
        "learning_rate": 1e-2,
    }
    return library.TrainingArguments(output_dir=os.fspath(folder), **{**defaults, **options})


def make_trainer(library: Any, folder: Path, make: Callable[[Any], Any], **options: Any) -> Any:
    model = make_model(library)
    optimizer = make(grouped(model))
    scheduler = library.get_linear_schedule_with_warmup(optimizer, 1, STEPS)
    return library.Trainer(
        model=model,
        args=arguments(library, folder, **options),
        train_dataset=rows(),
        optimizers=(optimizer, scheduler),
    )


def weights(trainer: Any) -> list[torch.Tensor]:
    return values(list(trainer.model.parameters()))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume(name: str, library: Any, tmp_path: Path) -> None:
    whole = make_trainer(library, tmp_path, OPTIMIZERS[name])
    whole.train()
    resumed = make_trainer(library, tmp_path, OPTIMIZERS[name])
    resumed.train(resume_from_checkpoint=os.fspath(tmp_path / f"checkpoint-{HALF}"))
    assert resumed.state.global_step == STEPS
    torch.testing.assert_close(weights(resumed), weights(whole), **EXACT)
    assert not torch.equal(weights(whole)[0], next(iter(make_model(library).parameters())))


def test_same_as_torch(library: Any, tmp_path: Path) -> None:
    ours = make_trainer(library, tmp_path / "ours", OPTIMIZERS["AdamW"], save_strategy="no")
    torchs = make_trainer(
        library, tmp_path / "torch", lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True), save_strategy="no"
    )
    ours.train()
    torchs.train()
    # all tensors of this model are of whole vectors, and the two kernels are the same to the bit
    assert all(p.numel() % 16 == 0 for p in weights(ours))
    torch.testing.assert_close(weights(ours), weights(torchs), **EXACT)


@pytest.mark.parametrize("name", FACTORIES)
def test_trainer_constructs_the_optimizer(name: str, library: Any, tmp_path: Path) -> None:
    """The trainer makes the groups itself: everything decays but biases and norms."""

    def make() -> Any:
        return library.Trainer(
            model=make_model(library),
            args=arguments(library, tmp_path),
            train_dataset=rows(),
            optimizer_cls_and_kwargs=FACTORIES[name],
        )

    whole = make()
    whole.train()
    inner = whole.optimizer.optimizer if hasattr(whole.optimizer, "optimizer") else whole.optimizer
    assert isinstance(inner, adapters.ChainOptimizer)
    assert [g["weight_decay"] for g in inner.param_groups] == [0.1, 0.0]
    resumed = make()
    resumed.train(resume_from_checkpoint=os.fspath(tmp_path / f"checkpoint-{HALF}"))
    torch.testing.assert_close(weights(resumed), weights(whole), **EXACT)


def test_clip_of_the_trainer_and_accumulation(library: Any, tmp_path: Path) -> None:
    """Clipping and accumulation of the trainer, before the step; two batches of half the size are one of the whole."""
    options = {"max_grad_norm": 0.5, "save_strategy": "no"}
    whole = make_trainer(library, tmp_path / "whole", OPTIMIZERS["AdamW"], **options)
    halves = make_trainer(
        library,
        tmp_path / "halves",
        OPTIMIZERS["AdamW"],
        gradient_accumulation_steps=2,
        per_device_train_batch_size=BATCH // 2,
        **options,
    )
    whole.train()
    halves.train()
    # gradients are sums in another order, some ulps of 2**-24 of their largest element apart; Adam divides by their
    # own size, and those that are near zero may take a step in any direction, of 1e-2 at most, six times
    for a, b in zip(weights(whole), weights(halves), strict=True):
        assert (a - b).abs().max() <= 2 * STEPS * 1e-2
        assert (a - b).abs().median() <= 1e-5
