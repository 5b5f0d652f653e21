"""States that do not fit are refused, and nothing changes."""

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.compare import Snapshot, assert_same_bits
from _lib.loading import chain, named, parted, scheduled
from _lib.optimizers import content, params_of, train
from functional_optim.adapters import SGD, AdamW, TransformOptimizer


def edited(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Any], dict[str, Any]]:
    """A state of AdamW with something changed."""

    def make(params: Any) -> dict[str, Any]:
        opt = AdamW(params)
        train([opt], range(2))
        saved = copy.deepcopy(opt.state_dict())
        edit(saved)
        return saved

    return make


def state_of(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[Any], dict[str, Any]]:
    def saved(params: Any) -> dict[str, Any]:
        opt = make(params)
        train([opt], range(2))
        return copy.deepcopy(opt.state_dict())

    return saved


MISFITS: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "another optimizer": (
        state_of(lambda p: SGD(p, momentum=0.9)),
        "momentum_buffer.*expected 'exp_avg', 'exp_avg_sq'",
    ),
    "torch's other optimizer": (state_of(lambda p: torch.optim.RMSprop(p)), "square_avg.*expected 'exp_avg'"),
    "another chain": (state_of(lambda p: TransformOptimizer(p, chain())), "'step', 'mu', 'nu'"),
    "a slot is missing": (edited(lambda d: d["state"][0].pop("exp_avg")), "lacks 'exp_avg'"),
    "the counter is missing": (edited(lambda d: d["state"][0].pop("step")), "step"),
    "another shape": (edited(lambda d: d["state"][1].update(exp_avg=torch.ones(9))), r"'exp_avg'.*shape \(9,\)"),
    "integers": (edited(lambda d: d["state"][0].update(exp_avg=torch.ones(4, 8).long())), "dtype torch.int64"),
    "complex": (edited(lambda d: d["state"][0].update(exp_avg=torch.ones(4, 8) * 1j)), "dtype torch.complex64"),
    "no tensor": (edited(lambda d: d["state"][0].update(exp_avg=[1.0, 2.0])), "exp_avg"),
    "a slot on meta": (
        edited(lambda d: d["state"][1].update(exp_avg=torch.ones(8, device="meta"))),
        r"the saved 'exp_avg' at .*params\[1\]' is on meta, without elements.*map_location='cpu'",
    ),
    "a counter on meta": (
        edited(lambda d: d["state"][0].update(step=torch.zeros((), device="meta"))),
        "the saved 'step' at .* is on meta",
    ),
    "an unknown entry on meta": (
        edited(lambda d: d["state"][0].update(more={"a": [torch.zeros(2, device="meta")]})),
        r"the saved 'more'\['a'\]\[0\] at .* is on meta",
    ),
    "an option on meta": (
        edited(lambda d: d["param_groups"][0].update(lr=torch.tensor(0.1, device="meta"))),
        r"options of param_groups\[0\] .* 'lr' of the group is on meta",
    ),
    "a number for a state": (
        edited(lambda d: d["state"].update({0: 5})),
        r"saved state of .* is int 5, expected a dict",
    ),
    "None for a state": (edited(lambda d: d["state"].update({2: None})), "is NoneType None, expected a dict"),
    "no dict of states": (edited(lambda d: d.update(state=[1])), "'state' of the state dict is list"),
    "no list of groups": (edited(lambda d: d.update(param_groups="ab")), "'param_groups' of the state dict is str"),
    "a number for a group": (edited(lambda d: d.update(param_groups=[5])), r"param_groups\[0\] .* is int 5"),
    "a group of nothing": (edited(lambda d: d["param_groups"][0].pop("params")), "expected a dict with a list"),
    "a number for parameters": (edited(lambda d: d["param_groups"][0].update(params=3)), "expected a dict with a list"),
    "a list for a parameter": (
        edited(lambda d: d["param_groups"][0].update(params=[[0], 1, 2])),
        "'params' of param_g",
    ),
    "too few names": (edited(lambda d: d["param_groups"][0].update(param_names=["a"])), "a name for each parameter"),
    "numbers for names": (edited(lambda d: d["param_groups"][0].update(param_names=[1, 2, 3])), "a name for each"),
    "text for a rate": (
        edited(lambda d: d["param_groups"][0].update(lr="0.1")),
        "'lr' is str '0.1', expected a number",
    ),
    "None for a decay": (
        edited(lambda d: d["param_groups"][0].update(weight_decay=None)),
        "'weight_decay' is NoneType",
    ),
    "a tensor for a flag": (edited(lambda d: d["param_groups"][0].update(fused=torch.ones(2))), "'fused' is Tensor"),
    "text for a flag": (edited(lambda d: d["param_groups"][0].update(maximize="no")), "'maximize' is str 'no'"),
    "one beta": (edited(lambda d: d["param_groups"][0].update(betas=(0.9,))), "'betas' is"),
    "text for a counter": (edited(lambda d: d["state"][0].update(step="3")), "the saved 'step' .* is str '3'"),
    "a list for a counter": (edited(lambda d: d["state"][0].update(step=[3])), "the saved 'step' .* is list"),
    "two counters": (edited(lambda d: d["state"][0].update(step=torch.ones(2))), r"the saved 'step' .* shape \(2,\)"),
    "a complex counter": (edited(lambda d: d["state"][0].update(step=torch.tensor(1j))), "dtype torch.complex64"),
    "a sparse slot": (edited(lambda d: d["state"][0].update(exp_avg=torch.ones(4, 8).to_sparse())), "is sparse"),
    "more groups": (edited(lambda d: d["param_groups"].append(d["param_groups"][0])), "different number of parameter"),
    "fewer parameters": (edited(lambda d: d["param_groups"][0]["params"].pop()), "doesn't match the size"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(case: str) -> None:
    make, message = MISFITS[case]
    saved = make(named().values())
    opt = AdamW(named(1).values(), lr=0.5)
    train([opt], range(3))
    groups, state = list(opt.param_groups), dict(opt.state)
    before = Snapshot(params_of(opt), list(opt.state.values()), [dict(g, params=0) for g in opt.param_groups], saved)

    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)

    before.check()
    assert all(a is b for a, b in zip(opt.param_groups, groups, strict=True))
    assert opt.state.keys() == state.keys()
    train([opt], range(3, 4))


def masked_by_name() -> fo.GradientTransformation:
    return fo.chain(fo.masked(fo.trace(0.9), re.compile("^fc")), fo.scale_by_learning_rate(0.1))


def labelled_by_name() -> fo.GradientTransformation:
    return fo.partition({"a": fo.adamw(1e-2), "b": fo.sgd(0.1)}, {re.compile("^fc"): "a", re.compile(""): "b"})


@pytest.mark.parametrize("has", ["names", "no names"])
@pytest.mark.parametrize("file", [["head", "fc.bias", "fc.weight"], ["_orig_mod.a", "b", "c"], None, "no key"])
@pytest.mark.parametrize("make", [masked_by_name, labelled_by_name])
def test_names_in_a_file_do_not_steer_masks(make: Any, file: Any, has: str) -> None:
    """Parameters are called what the constructor was told, whatever the file calls them."""
    params = [named() for _ in range(2)]
    opt, other = (TransformOptimizer(p.items() if has == "names" else p.values(), make()) for p in params)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the (mask|pattern)")
        train([opt], range(2))
        saved = copy.deepcopy(opt.state_dict())
        for group in saved["param_groups"]:
            group.pop("param_names", None)
            if file != "no key":
                group["param_names"] = file
        with torch.no_grad():
            for name, p in params[1].items():
                p.copy_(params[0][name])

        other.load_state_dict(saved)
        train([opt, other], range(2, 5))

    assert_same_bits(content(other), content(opt))
    assert other.param_groups[0].get("param_names") == opt.param_groups[0].get("param_names")


@pytest.mark.parametrize("name", ["fc.weight", "fc.bias"])
def test_each_parameter_must_have_its_own_slots(name: str) -> None:
    """Not those of its neighbours, which other transformations see."""
    params = named()
    opt = TransformOptimizer(params.items(), parted())
    train([opt], range(2))
    saved = copy.deepcopy(opt.state_dict())
    position = list(params).index(name)
    saved["state"][position] = saved["state"][1 - position]

    with pytest.raises(ValueError, match=f"the saved state of '{name}' .* another chain or other options made it"):
        opt.load_state_dict(saved)


def test_another_chain_is_refused_by_its_names() -> None:
    opt, other = TransformOptimizer(named().values(), chain()), TransformOptimizer(named().values(), scheduled())
    train([opt, other], range(2))
    before = content(other)

    with pytest.raises(ValueError, match=r"transformation 1 is 'clip_by_global_norm' there, but 'trace' here"):
        other.load_state_dict(opt.state_dict())

    assert_same_bits(content(other), before)


def test_the_difference_of_long_chains_is_told_in_few_words() -> None:
    start = [fo.clip(1.0)] * 20
    opt, other = (
        TransformOptimizer(named().values(), fo.chain(*start, *end))
        for end in ([fo.scale_by_sign(), fo.trace(0.9), fo.scale(-1.0)], [fo.scale_by_sign()])
    )
    expected = (
        r"transformation 22 is 'trace' there, but missing here: "
        r"'... > clip > scale_by_sign > trace > ...' against '... > clip > scale_by_sign'."
    )
    with pytest.raises(ValueError, match=expected):
        other.load_state_dict(opt.state_dict())


def test_what_is_no_state_is_refused() -> None:
    opt = AdamW(named().values())
    with pytest.raises(KeyError, match=r"lacks 'state' and 'param_groups'; it has 'epoch', 'model'"):
        opt.load_state_dict({"epoch": 1, "model": {}})


def test_names_that_may_be_missing_need_names() -> None:
    opt = AdamW(named().values())
    with pytest.raises(ValueError, match=r"strict=False .* needs by_name=True"):
        opt.load_state_dict(opt.state_dict(), strict=False)


def test_an_unknown_group_key_is_kept_and_known_ones_are_listed() -> None:
    params = list(named().values())
    with pytest.warns(
        UserWarning, match=r"knows 'name', 'wd' in a parameter group; there are .*'weight_decay'"
    ) as seen:
        opt = TransformOptimizer([{"params": params[:1], "wd": 0.1, "name": "head"}], chain())
    assert opt.param_groups[0]["wd"] == 0.1
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.add_param_group({"params": params[1:2], "initial_lr": 0.1, "weight_decay": 0.5})
        AdamW([{"params": params[2:], "wd": 0.1}])  # torch's own classes keep them without a word
