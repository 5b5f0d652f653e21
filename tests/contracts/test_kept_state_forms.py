"""State of opaque transformations in any form: its size, checkpoints and copies."""

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as dsd

import functional_optim as fo
from _lib.chains import is_matrix
from _lib.marks import pairwise
from _lib.state_forms import (
    FORM,
    FORMS,
    RATE,
    SCOPE,
    SCOPES,
    STEPS,
    Reference,
    assert_close,
    copied,
    give,
    make_chain,
    make_grads,
    make_params,
    reverse,
    transformation,
)
from functional_optim.adapters import TransformOptimizer, load_safetensors, save_safetensors


def train(opt: Any, params: Mapping[str, torch.Tensor], steps: Iterable[int]) -> None:
    for step in steps:
        give(params, make_grads(step))
        opt.step()


def n_bytes(tree: Any) -> int:
    """The bytes of all tensors of a tree, each once."""
    leaves = optree.tree_leaves(tree, none_is_leaf=True, namespace="functional_optim")
    return sum(x.nbytes for x in {id(x): x for x in leaves if isinstance(x, torch.Tensor)}.values())


@SCOPE
@FORM
def test_an_optimizer_keeps_as_much_as_the_pure_state(form: str, scope: str) -> None:
    """Each tensor is there once, though several parameters hold an entry of the tree; none for masked parameters."""
    params, tx = make_params(), SCOPES[scope][0](transformation(form))
    opt = TransformOptimizer(params.items(), fo.chain(tx, fo.scale(-RATE)))
    for step in range(4):
        give(params, make_grads(step, missing=False))
        opt.step()
        kept = {k: n_bytes(dict(opt.state[p])) for k, p in params.items()}
        states = {k: dict(opt.state[p]) for k, p in params.items()}
        assert n_bytes(states) == n_bytes(tx.init({k: p.detach() for k, p in params.items()}))
        assert not any(kept[k] for k, p in params.items() if not SCOPES[scope][1](k, p))
        assert n_bytes(opt.state_dict()["state"]) == n_bytes(states)


@pytest.mark.parametrize("form", ["a tensor by name", "another order of keys that counts", "a list in order"])
def test_the_size_of_state_does_not_grow_with_the_square_of_parameters(form: str) -> None:
    params = {}
    for k in range(40):
        params[f"{k}.weight"] = nn.Parameter(torch.ones(8, 8, dtype=torch.float64))
        params[f"{k}.bias"] = nn.Parameter(torch.ones(8, dtype=torch.float64))
    opt = TransformOptimizer(params.items(), fo.chain(fo.masked(transformation(form), is_matrix), fo.scale(-0.1)))
    for p in params.values():
        p.grad = torch.ones_like(p)
    opt.step()
    times = 2 if form == "a list in order" else 1
    for p in params.values():
        assert n_bytes(dict(opt.state[p])) == (times * p.nbytes if p.ndim == 2 else 0)


class Bare(nn.Module):
    """A module of parameters by their names."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        super().__init__()
        for k, p in params.items():
            *path, last = k.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, p)


def by_position(opt: Any, params: dict[str, Any], resume: Callable[..., Any], folder: Path) -> Any:
    saved = copied(opt)
    resumed = resume(params)
    resumed.load_state_dict(saved)
    return resumed


def by_name_in_another_order(opt: Any, params: dict[str, Any], resume: Callable[..., Any], folder: Path) -> Any:
    saved = copied(opt)
    resumed = resume(reverse(params))
    resumed.load_state_dict(saved, by_name=True)
    return resumed


def by_name_in_other_groups(opt: Any, params: dict[str, Any], resume: Callable[..., Any], folder: Path) -> Any:
    saved = copied(opt)
    resumed = resume(dict(list(params.items())[2:]))
    resumed.add_param_group({"params": list(params.items())[:2]})
    resumed.load_state_dict(saved, by_name=True)
    return resumed


def twice(opt: Any, params: dict[str, Any], resume: Callable[..., Any], folder: Path) -> Any:
    first = by_position(opt, {k: nn.Parameter(p.detach().clone()) for k, p in params.items()}, resume, folder)
    return by_position(first, params, resume, folder)


def in_a_safe_file(opt: Any, params: dict[str, Any], resume: Callable[..., Any], folder: Path) -> Any:
    pytest.importorskip("safetensors")
    save_safetensors(opt.state_dict(), folder / "state.safetensors")
    resumed = resume(params)
    resumed.load_state_dict(load_safetensors(folder / "state.safetensors"))
    return resumed


def in_a_distributed_checkpoint(opt: Any, params: dict[str, Any], resume: Callable[..., Any], folder: Path) -> Any:
    model = Bare(
        {k: p for group in opt.param_groups for k, p in zip(group["param_names"], group["params"], strict=True)}
    )
    dcp.save({"optimizer": dsd.get_optimizer_state_dict(model, opt)}, checkpoint_id=folder / "parts")
    resumed, other = resume(params), Bare(params)
    saved = dsd.get_optimizer_state_dict(other, resumed)
    dcp.load({"optimizer": saved}, checkpoint_id=folder / "parts")
    dsd.set_optimizer_state_dict(other, resumed, saved)
    return resumed


WAYS = {
    way.__name__: way
    for way in (
        by_position,
        by_name_in_another_order,
        by_name_in_other_groups,
        twice,
        in_a_safe_file,
        in_a_distributed_checkpoint,
    )
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pairwise("form, way, scope", FORMS, WAYS, ("all", "masked"))
def test_training_goes_on_after_a_checkpoint(form: str, scope: str, way: str, tmp_path: Path) -> None:
    params, reference = make_params(), Reference(form, make_params(), SCOPES[scope][1])
    opt = TransformOptimizer(params.items(), make_chain(form, scope))
    train(opt, params, range(STEPS // 2))
    opt.zero_grad()
    others = {k: nn.Parameter(p.detach().clone()) for k, p in params.items()}
    resumed = WAYS[way](opt, others, lambda own: TransformOptimizer(own.items(), make_chain(form, scope)), tmp_path)
    train(opt, params, range(STEPS // 2, STEPS))  # the saved state does not follow
    train(resumed, others, range(STEPS // 2, STEPS))
    for step in range(STEPS):
        reference.step(make_grads(step))
    assert_close(params, reference)
    assert_close(others, reference)


@pytest.mark.parametrize("scope", ["all", "masked"])
@FORM
def test_training_goes_on_in_a_copy(form: str, scope: str) -> None:
    params, reference = make_params(), Reference(form, make_params(), SCOPES[scope][1])
    opt = TransformOptimizer(params.items(), make_chain(form, scope))
    train(opt, params, range(STEPS // 2))
    opt, params = copy.deepcopy((opt, params))
    train(opt, params, range(STEPS // 2, STEPS))
    for step in range(STEPS):
        reference.step(make_grads(step))
    assert_close(params, reference)
