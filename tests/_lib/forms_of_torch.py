"""Arguments of the classes of torch, and the forms of torch that round as ours."""

from collections.abc import Callable
from typing import Any

import torch


STEPS = 24


FUSED = {"fused": True}


# The form of torch that rounds as ours: its fused kernel, or its loop where that has no square root
ROUNDED: dict[str, dict[str, Any]] = {"Adamax": {}, "ASGD": {}, "Rprop": {}} | dict.fromkeys(
    ("SGD", "Adam", "AdamW", "Adagrad"), FUSED
)


# Arguments that these forms take
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {}),
    "sgd, decay": ("SGD", {"lr": 0.02, "weight_decay": 0.1}),
    "sgd, momentum": ("SGD", {"lr": 0.01, "momentum": 0.9}),
    "sgd, dampening": ("SGD", {"lr": 0.01, "momentum": 0.9, "dampening": 0.3}),
    "sgd, dampening and decay": ("SGD", {"lr": 0.01, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "sgd, nesterov": ("SGD", {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    "sgd, maximize": ("SGD", {"lr": 0.01, "momentum": 0.5, "nesterov": True, "weight_decay": 0.1, "maximize": True}),
    "sgd, tensor lr": ("SGD", {"lr": torch.tensor(0.01), "momentum": 0.9}),
    "sgd, tensor lr (1,)": ("SGD", {"lr": torch.tensor([0.01]), "weight_decay": 0.1}),
    "sgd, tensor lr (1, 1)": ("SGD", {"lr": torch.tensor([[0.01]], dtype=torch.float64)}),
    "adam": ("Adam", {}),
    "adam, betas and eps": ("Adam", {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3}),
    "adam, no betas": ("Adam", {"lr": 0.02, "betas": (0.0, 0.0), "eps": 1e-3}),
    "adam, decay": ("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    "adam, decoupled": ("Adam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adam, amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True}),
    "adam, maximize": ("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    "adam, tensor lr": ("Adam", {"lr": torch.tensor(0.01), "weight_decay": 0.1}),
    "adam, tensor lr (1,)": ("Adam", {"lr": torch.tensor([0.01])}),
    "adam, tensor lr (1, 1)": ("Adam", {"lr": torch.tensor([[0.01]]), "amsgrad": True}),
    "adam, tensor betas": ("Adam", {"lr": 0.01, "betas": (torch.tensor([[0.9]]), torch.tensor(0.99))}),
    "adamw": ("AdamW", {"lr": 0.01}),
    "adamw, no decay": ("AdamW", {"lr": 0.01, "weight_decay": 0.0}),
    "adamw, amsgrad": ("AdamW", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "adamw, maximize": ("AdamW", {"lr": 0.01, "maximize": True, "weight_decay": 0.1}),
    "adamw, tensor lr": ("AdamW", {"lr": torch.tensor(0.01, dtype=torch.float64)}),
    "adamw, tensor lr (1, 1)": ("AdamW", {"lr": torch.tensor([[0.01]]), "betas": (0.8, 0.99), "eps": 1e-5}),
    "adagrad": ("Adagrad", {}),
    "adagrad, decays": ("Adagrad", {"lr": 0.1, "lr_decay": 0.5, "weight_decay": 0.1, "initial_accumulator_value": 0.1}),
    "adagrad, maximize": ("Adagrad", {"lr": 0.1, "maximize": True, "eps": 1e-3}),
    "adagrad, tensor lr": ("Adagrad", {"lr": torch.tensor([0.1], dtype=torch.float64)}),
    "adamax": ("Adamax", {}),
    "adamax, maximize": ("Adamax", {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1, "maximize": True}),
    "asgd": ("ASGD", {"lr": 0.1}),
    "asgd, average": ("ASGD", {"lr": 0.1, "lambd": 0.1, "alpha": 0.5, "t0": 3, "weight_decay": 0.1}),
    "asgd, maximize": ("ASGD", {"lambd": 0.1, "t0": 8, "maximize": True}),
    "rprop": ("Rprop", {}),
    "rprop, sizes": ("Rprop", {"lr": 0.1, "etas": (0.3, 1.7), "step_sizes": (0.05, 0.4), "maximize": True}),
    "rprop, tensor lr": ("Rprop", {"lr": torch.tensor([0.1])}),
}


LOOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "rmsprop": ("RMSprop", {}),
    "rmsprop, alpha and eps": ("RMSprop", {"alpha": 0.9, "eps": 1e-3}),
    "rmsprop, decay": ("RMSprop", {"weight_decay": 0.1}),
    "rmsprop, momentum": ("RMSprop", {"momentum": 0.9}),
    "rmsprop, centered": ("RMSprop", {"centered": True, "weight_decay": 0.1, "momentum": 0.1}),
    "rmsprop, maximize": ("RMSprop", {"maximize": True, "centered": True}),
    "rmsprop, tensor lr": ("RMSprop", {"lr": torch.tensor([0.01])}),
    "nadam": ("NAdam", {}),
    "nadam, decays": ("NAdam", {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1, "momentum_decay": 0.1}),
    "nadam, decoupled": ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}),
    "radam": ("RAdam", {}),
    "radam, decay": ("RAdam", {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
    "radam, decoupled": ("RAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adadelta": ("Adadelta", {}),
    "adadelta, decay": ("Adadelta", {"lr": 0.5, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
}


ANY = EXACT | LOOPS


FEW = [  # of each kind of state one
    "sgd, decay",
    "sgd, maximize",
    "sgd, dampening and decay",
    "adam, maximize",
    "adam, tensor lr",
    "adamw",
    "adamw, amsgrad",
    "adagrad, decays",
    "adamax, maximize",
    "asgd, average",
    "rprop, sizes",
]


def split(rows: list[dict[str, Any]]) -> Callable[[list[Any]], Any]:
    """Parameter groups with their own options; the last one is empty."""
    return lambda params: [
        *({"params": params[k :: len(rows)], **row} for k, row in enumerate(rows)),
        {"params": []},
    ]
