"""Pickles refer to public names, so that definitions may move; to names of one private module where there are none."""

import pickle
import pickletools
from typing import Any

import pytest
import torch

import functional_optim as fo
import functional_optim.adapters
from _lib.transforms import CASES
from functional_optim import _pickles


MODULES = (fo, functional_optim.adapters)
PUBLIC = {f"{module.__name__}.{name}" for module in MODULES for name in module.__all__}
# classes of transformations and functions that restore states have no public name; they are promised here
PRIVATE = {f"{_pickles.__name__}.{name}" for name in vars(_pickles)} | {"functional_optim.adapters._blank"}


def addresses(x: Any) -> set[str]:
    """The globals of this package that a pickle names."""
    found = {str(arg).replace(" ", ".") for op, arg, _ in pickletools.genops(pickle.dumps(x, 2)) if op.name == "GLOBAL"}
    return {name for name in found if name.startswith("functional_optim")}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_public_objects_are_pickled_by_their_public_names(module: Any) -> None:
    for name in set(module.__all__) - {"multi_transform", "zeros"}:  # a second name, and an object of `slot`
        x = getattr(module, name)
        assert addresses(x) == {f"{module.__name__}.{name}"}
        assert pickle.loads(pickle.dumps(x)) is x


OPTIMIZERS = (
    "sgd adam adamw nadam nadamw amsgrad adamax adamaxw radam rmsprop adagrad adadelta lion lars lamb sign_sgd signum "
    "rprop asgd muon adafactor lbfgs adabelief yogi adan novograd optimistic_gradient_descent optimistic_adam_v2 "
    "fromage polyak_sgd"
)
OTHERS = (
    fo.adamw(0.1, mask=True),
    fo.partition({"a": fo.trace(0.9), "b": fo.set_to_zero()}, "a"),
    fo.scale_by_backtracking_linesearch(10),
    fo.lbfgs(linesearch=fo.scale_by_strong_wolfe_linesearch()),
    fo.sgd(fo.join_schedules([fo.constant_schedule(0.1) * fo.linear_schedule(0.0, 1.0, 5)], [])),
)
RULES = [case.ours for case in CASES if "<lambda>" not in repr(case.ours) and "mask" not in case.id]


def test_chains_and_their_states_are_pickled_by_addresses_that_stay() -> None:
    params = {"w": torch.ones(2, 2)}
    chains = [getattr(fo, name)(0.1) for name in OPTIMIZERS.split()]
    for tx in (*chains, *OTHERS, *RULES):
        assert addresses((tx, tx.init(params))) <= PUBLIC | PRIVATE, tx
    packed = fo.pack(params)
    assert addresses(packed) <= PUBLIC | PRIVATE


def test_optimizers_are_pickled_by_addresses_that_stay() -> None:
    params = [torch.nn.Parameter(torch.ones(2))]
    made = fo.adamw(fo.cosine_decay_schedule(0.1, 10))
    of_factory = functional_optim.adapters.TransformOptimizer.factory(fo.adamw)(params, lr=0.1)
    own = functional_optim.adapters.AdamW(params), functional_optim.adapters.TransformOptimizer(params, made)
    for opt in (of_factory, *own):
        params[0].grad = torch.ones(2)
        opt.step()
        assert addresses(opt) <= PUBLIC | PRIVATE
    assert {"functional_optim.adamw", "functional_optim.adapters._blank"} <= addresses(of_factory)
