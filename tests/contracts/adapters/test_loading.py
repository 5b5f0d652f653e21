"""States: kept by every way of keeping them, loaded by position and by name, and refused when they do not fit."""

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import functional_optim as fo
from _lib.chains import is_matrix
from _lib.compare import Snapshot, assert_same_bits
from _lib.optimizers import OURS, content, params_of, train, twins
from functional_optim.adapters import LAMB, SGD, AdamW, Lion, TransformOptimizer, load_safetensors, save_safetensors


SHAPES = ((4, 8), (8,), (3, 5))


def named(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    """Parameters with names."""
    generator = torch.Generator().manual_seed(seed)
    names = ("fc.weight", "fc.bias", "head")
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in zip(names, SHAPES, strict=True)
    }


def chain() -> fo.GradientTransformation:
    return fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-2, weight_decay=0.1), fo.params_ema(0.9))


def scheduled() -> fo.GradientTransformation:
    return fo.chain(fo.trace(0.9), fo.scale_by_learning_rate(fo.cosine_decay_schedule(0.1, 30)))


def parted() -> fo.GradientTransformation:
    """Some parameters have slots that others do not."""
    return fo.partition({True: fo.adamw(1e-2), False: fo.sgd(0.1, momentum=0.9)}, is_matrix)


def partly_masked() -> fo.GradientTransformation:
    return fo.chain(fo.masked(fo.trace(0.9), is_matrix), fo.scale_by_learning_rate(0.1))


MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    **{name: (lambda params, cls=cls: cls(params, lr=0.01)) for name, cls in OURS.items()},
    "SGD with momentum": lambda params: SGD(params, lr=0.01, momentum=0.9),
    "AMSGrad": lambda params: AdamW(params, lr=torch.tensor(0.01), amsgrad=True),
    "Lion": lambda params: Lion(params, lr=0.01, weight_decay=0.1),
    "LAMB": lambda params: LAMB(params, lr=0.01, weight_decay=0.1),
    "chain": lambda params: TransformOptimizer(params, chain()),
    "schedule": lambda params: TransformOptimizer(params, scheduled()),
    "slots of some": lambda params: TransformOptimizer(params, parted()),
    "no slots for some": lambda params: TransformOptimizer(params, partly_masked()),
}


def by_file(opt: torch.optim.Optimizer, folder: Path, make: Any) -> torch.optim.Optimizer:
    torch.save(opt.state_dict(), folder / "opt.pt")
    new = make(renamed(opt))
    new.load_state_dict(torch.load(folder / "opt.pt", weights_only=True))
    return new


def by_safetensors(opt: torch.optim.Optimizer, folder: Path, make: Any) -> torch.optim.Optimizer:
    save_safetensors(opt.state_dict(), folder / "opt.safetensors")
    new = make(renamed(opt))
    new.load_state_dict(load_safetensors(folder / "opt.safetensors"))
    return new


def by_pickle(opt: torch.optim.Optimizer, folder: Path, make: Any) -> torch.optim.Optimizer:
    new: torch.optim.Optimizer = pickle.loads(pickle.dumps(opt))
    return new


def by_deepcopy(opt: torch.optim.Optimizer, folder: Path, make: Any) -> torch.optim.Optimizer:
    params, new = copy.deepcopy((params_of(opt), opt))
    assert all(p is q for p, q in zip(params, params_of(new), strict=True))
    return new


def by_state_dict(opt: torch.optim.Optimizer, folder: Path, make: Any) -> torch.optim.Optimizer:
    new = make(renamed(opt))
    new.load_state_dict(opt.state_dict())
    return new


def renamed(opt: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Copies of the parameters of an optimizer, by the names it has."""
    names = [n for group in opt.param_groups for n in group["param_names"]]
    return dict(zip(names, twins(params_of(opt)), strict=True))


WAYS = {f.__name__: f for f in (by_file, by_safetensors, by_pickle, by_deepcopy, by_state_dict)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("maker", MAKERS)
def test_training_that_is_kept_goes_on_as_if_never_stopped(maker: str, way: str, tmp_path: Path) -> None:
    make = lambda params: MAKERS[maker](params.items())  # noqa: E731
    opt = make(named())
    train([opt], range(5), missing=True)

    new = WAYS[way](opt, tmp_path, make)
    assert_same_bits(content(new), content(opt))
    train([opt, new], range(5, 15), missing=True)

    assert_same_bits(content(new), content(opt))
    assert new.state_dict()["param_groups"] == opt.state_dict()["param_groups"]


@pytest.mark.parametrize("maker", MAKERS)
def test_states_are_flat_dicts_of_tensors_in_what_is_saved(maker: str) -> None:
    opt = MAKERS[maker](named().items())
    train([opt], range(2))

    for state in opt.state_dict()["state"].values():
        assert type(state) is dict
        assert all(type(k) is str and type(v) is torch.Tensor for k, v in state.items())
    stateless = maker == "no slots for some"
    assert all(isinstance(k, nn.Parameter) and (v or stateless) for k, v in opt.state.items())


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("maker", MAKERS)
def test_what_is_loaded_shares_no_memory_and_what_is_given_stays(maker: str, count: int) -> None:
    opt = MAKERS[maker](list(named().items())[:count])
    train([opt], range(3))
    state_dict = opt.state_dict()
    new = MAKERS[maker](list(named(1).items())[:count])
    held = Snapshot(state_dict["state"], [dict(g, params=0) for g in state_dict["param_groups"]])

    new.load_state_dict(state_dict)
    train([new], range(3, 6))

    held.check()
    assert state_dict.keys() == {"state", "param_groups"}


# --- by name


def test_reordered_parameters_find_their_states_by_name() -> None:
    params = named()
    opt = AdamW(params.items(), lr=0.01)
    train([opt], range(5))
    order = ("head", "fc.bias", "fc.weight")
    new = AdamW([(name, params[name]) for name in order])

    new.load_state_dict(opt.state_dict(), by_name=True)

    for name in order:
        assert_same_bits(dict(new.state[params[name]]), dict(opt.state[params[name]]))
    assert new.param_groups[0]["lr"] == 0.01
    assert new.param_groups[0]["param_names"] == list(order)


def test_parameters_that_a_file_lacks_are_named_or_start_anew() -> None:
    params = named()
    opt = AdamW([(n, params[n]) for n in ("fc.weight", "fc.bias")], lr=0.01)
    train([opt], range(5))
    new = AdamW(params.items())
    train([new], range(1))
    before = Snapshot(list(new.state.values()), [dict(g, params=0) for g in new.param_groups])

    with pytest.raises(ValueError, match=r"lacks the parameters head.*strict=False"):
        new.load_state_dict(opt.state_dict(), by_name=True)
    before.check()
    new.load_state_dict(opt.state_dict(), by_name=True, strict=False)

    assert_same_bits(dict(new.state[params["fc.bias"]]), dict(opt.state[params["fc.bias"]]))
    assert params["head"] not in new.state
    train([new], range(5, 6))
    assert [new.state[p]["step"].item() for p in params.values()] == [6, 6, 1]


def test_parameters_that_only_the_file_has_are_left_out() -> None:
    params = named()
    opt = AdamW(params.items(), lr=0.01)
    train([opt], range(5))
    new = AdamW([("head", params["head"])])

    new.load_state_dict(opt.state_dict(), by_name=True)

    assert list(new.state) == [params["head"]]
    assert_same_bits(dict(new.state[params["head"]]), dict(opt.state[params["head"]]))


def test_parameters_in_other_groups_find_their_states_and_options_by_name() -> None:
    """A group whose parameters come from one saved group has its options; from several, it keeps its own."""
    params = named()
    opt = AdamW(
        [
            {"params": [("fc.weight", params["fc.weight"])], "lr": 0.1},
            {"params": [("fc.bias", params["fc.bias"]), ("head", params["head"])], "lr": 0.2},
        ]
    )
    train([opt], range(5))
    new = AdamW(
        [
            {"params": [("head", params["head"])], "lr": 1.0},
            {"params": [("fc.weight", params["fc.weight"]), ("fc.bias", params["fc.bias"])], "lr": 2.0},
        ]
    )

    new.load_state_dict(opt.state_dict(), by_name=True)

    assert [g["lr"] for g in new.param_groups] == [0.2, 2.0]
    for p in params.values():
        assert_same_bits(dict(new.state[p]), dict(opt.state[p]))


def test_names_are_needed_on_both_sides() -> None:
    params = named()
    with_names, without = AdamW(params.items()), AdamW(params.values())
    with pytest.raises(ValueError, match="by_name=True needs names, but the state dict has none"):
        with_names.load_state_dict(without.state_dict(), by_name=True)
    with pytest.raises(ValueError, match="by_name=True needs names, but this optimizer has none"):
        without.load_state_dict(with_names.state_dict(), by_name=True)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("live", [True, False])
def test_names_by_position_are_those_of_the_optimizer_or_else_of_the_file(live: bool, saved: bool) -> None:
    """As in torch, but that a file does not rename parameters."""
    results = []
    for cls in (AdamW, torch.optim.AdamW):
        params = named()
        a = cls([(f"old.{n}", p) for n, p in params.items()] if saved else list(params.values()))
        b = cls(params.items() if live else params.values())
        b.load_state_dict(a.state_dict())
        results.append(b.param_groups[0].get("param_names"))

    assert results[0] == (list(named()) if live else results[1])


def test_names_that_clash_or_mix_are_refused_as_in_torch() -> None:
    params = list(named().items())
    for bad in ([params[0], params[1][1]], [{"params": [params[0]]}, {"params": [params[1][1]]}]):
        with pytest.raises(ValueError, match="all optimizer param") as theirs:
            torch.optim.AdamW(copy.copy(bad))
        with pytest.raises(ValueError, match="all optimizer param") as ours:
            AdamW(copy.copy(bad))
        assert str(ours.value) == str(theirs.value)


def test_names_can_be_given_beside_plain_tensors() -> None:
    params = named()
    opt = AdamW([{"params": list(params.values()), "param_names": list(params)}], lr=0.01)
    train([opt], range(2))
    new = AdamW(list(reversed(params.items())))

    new.load_state_dict(opt.state_dict(), by_name=True)

    for p in params.values():
        assert_same_bits(dict(new.state[p]), dict(opt.state[p]))


# --- the examples of torch's page "How to utilize named parameters to load optimizer state dict"


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + x  # type: ignore[no-any-return]


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(5, 5)
        self.fc2 = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.fc1(x) + self.fc2(x)) / 2  # type: ignore[no-any-return]


class Bypass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 5)
        self.bypass = nn.Linear(5, 5, bias=False)
        nn.init.eye_(self.bypass.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + self.bypass(x)  # type: ignore[no-any-return]


def clone_deepcopy(d: dict[str, Any]) -> dict[str, Any]:
    return {k: (v.clone() if isinstance(v, torch.Tensor) else copy.deepcopy(v)) for k, v in d.items()}


def adapt(lookup: dict[str, str | None]) -> Any:
    """The first two hooks of the page, which differ in the table of names."""

    def hook(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        adapted = copy.deepcopy(optimizer.state_dict())
        for k, v in state_dict["param_groups"][0].items():
            if k not in ["params", "param_names"]:
                adapted["param_groups"][0][k] = v
        group = optimizer.state_dict()["param_groups"][0]
        for param_id, param_name in zip(group["params"], group["param_names"], strict=True):
            name_in_loaded = lookup[param_name]
            if name_in_loaded in state_dict["param_groups"][0]["param_names"]:
                index = state_dict["param_groups"][0]["param_names"].index(name_in_loaded)
                id_in_loaded = state_dict["param_groups"][0]["params"][index]
                if id_in_loaded in state_dict["state"]:
                    adapted["state"][param_id] = clone_deepcopy(state_dict["state"][id_in_loaded])
        return adapted

    return hook


def names_matching(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The third."""
    live = optimizer.state_dict()["param_groups"]
    assert len(state_dict["param_groups"]) == len(live)
    adapted = copy.deepcopy(optimizer.state_dict())
    for g_ind, saved in enumerate(state_dict["param_groups"]):
        assert len(saved["params"]) == len(live[g_ind]["params"])
        for k, v in saved.items():
            if k not in ["params", "param_names"]:
                adapted["param_groups"][g_ind][k] = v
        for param_id, param_name in zip(live[g_ind]["params"], live[g_ind]["param_names"], strict=True):
            id_in_loaded = saved["params"][saved["param_names"].index(param_name)]
            if id_in_loaded in state_dict["state"]:
                adapted["state"][param_id] = copy.deepcopy(state_dict["state"][id_in_loaded])
    return adapted


PAGE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: SGD(params, lr=0.01, momentum=0.9),
    "AdamW": lambda params: AdamW(params, lr=0.01),
    "chain": lambda params: TransformOptimizer(params, chain()),
}


def trained(maker: str) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    """A model of one layer after some steps, and the file of its optimizer's state."""
    torch.manual_seed(0)
    model = OneLayer()
    opt = PAGE[maker](model.named_parameters())
    for _ in range(3):
        opt.zero_grad()
        model(torch.randn(4, 5)).square().mean().backward()
        opt.step()
    opt.param_groups[0]["lr"] = 0.5
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    return model, opt, torch.load(file, weights_only=True)


def go_on(model: nn.Module, opt: torch.optim.Optimizer) -> None:
    model(torch.ones(4, 5)).square().mean().backward()
    opt.step()


@pytest.mark.parametrize("maker", PAGE)
def test_the_first_example_copies_a_state_to_two_layers(maker: str) -> None:
    model, opt, saved = trained(maker)
    new_model = TwoLayers()
    new = PAGE[maker](new_model.named_parameters())
    names = {f"fc{k}.{kind}": f"fc.{kind}" for k in (1, 2) for kind in ("weight", "bias")}
    new.register_load_state_dict_pre_hook(adapt(names))

    new.load_state_dict(saved)

    source, target = dict(model.named_parameters()), dict(new_model.named_parameters())
    for name, origin in names.items():
        assert_same_bits(dict(new.state[target[name]]), dict(opt.state[source[origin]]))
    assert new.param_groups[0]["lr"] == 0.5
    go_on(new_model, new)


@pytest.mark.parametrize("maker", PAGE)
def test_the_second_example_leaves_a_new_layer_as_it_is(maker: str) -> None:
    model, opt, saved = trained(maker)
    new_model = Bypass()
    new = PAGE[maker](new_model.named_parameters())
    new.register_load_state_dict_pre_hook(
        adapt({"fc.weight": "fc.weight", "fc.bias": "fc.bias", "bypass.weight": None})
    )

    new.load_state_dict(saved)

    source, target = dict(model.named_parameters()), dict(new_model.named_parameters())
    for name in ("fc.weight", "fc.bias"):
        assert_same_bits(dict(new.state[target[name]]), dict(opt.state[source[name]]))
    assert new_model.bypass.weight not in new.state
    go_on(new_model, new)


@pytest.mark.parametrize("maker", PAGE)
def test_the_third_example_matches_names_and_so_does_the_direct_way(maker: str) -> None:
    model, opt, saved = trained(maker)
    order = list(reversed(list(model.named_parameters())))
    new, direct = PAGE[maker](order), PAGE[maker](order)
    new.register_load_state_dict_pre_hook(names_matching)

    new.load_state_dict(saved)
    direct.load_state_dict(saved, by_name=True)  # type: ignore[call-arg]

    for p in model.parameters():
        assert_same_bits(dict(new.state[p]), dict(opt.state[p]))
        assert_same_bits(dict(direct.state[p]), dict(opt.state[p]))
    go_on(model, new)


# --- dtypes


def test_slots_and_counters_of_half_parameters_keep_their_dtypes() -> None:
    """The counter is exact where bfloat16, which holds 8 bits, would round it to 1000."""
    params = named(dtype=torch.bfloat16)
    tx = fo.chain(fo.scale_by_adam(mu_dtype=torch.float32), fo.scale_by_learning_rate(0.1))
    opt = TransformOptimizer(params.values(), tx)
    train([opt], range(2))
    for p in params.values():
        opt.state[p]["step"].fill_(1001)

    new = TransformOptimizer(twins(list(params.values())), tx)
    new.load_state_dict(opt.state_dict())

    for p in params_of(new):
        dtypes = {k: v.dtype for k, v in new.state[p].items()}
        assert dtypes == {"step": torch.float32, "mu": torch.float32, "nu": torch.bfloat16}
        assert new.state[p]["step"] == 1001
    train([opt, new], range(2, 5))
    assert_same_bits(content(new), content(opt))


def test_a_state_of_other_floats_is_cast_as_in_torch() -> None:
    """To the parameter's dtype, unless the chain declares one."""
    wide, narrow = named(), named(dtype=torch.float32)
    opt = AdamW(wide.values())
    train([opt], range(2))

    new = AdamW(narrow.values())
    new.load_state_dict(opt.state_dict())

    for p, q in zip(wide.values(), narrow.values(), strict=True):
        torch.testing.assert_close(new.state[q]["exp_avg"], opt.state[p]["exp_avg"].float(), rtol=0, atol=0)


COUNTERS: dict[str, Callable[[], Any]] = {
    "int": lambda: 7,
    "float": lambda: 7.0,
    "NumPy's float": lambda: np.float32(7.0),
    "NumPy's int": lambda: np.int64(7),
    "int64": lambda: torch.tensor(7),
    "float64": lambda: torch.tensor(7.0, dtype=torch.float64),
    "float32": lambda: torch.tensor(7.0),
    "bfloat16": lambda: torch.tensor(7.0, dtype=torch.bfloat16),
    "shape (1,)": lambda: torch.tensor([7.0]),
    "int64 of shape (1, 1)": lambda: torch.tensor([[7]]),
}


@pytest.mark.parametrize("kind", COUNTERS)
@pytest.mark.parametrize("cls", [AdamW, LAMB])
def test_counters_of_any_kind_load(cls: Any, kind: str) -> None:
    opt, twin = cls(named().values()), cls(named().values())
    train([opt, twin], range(7))
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state["step"] = COUNTERS[kind]()

    opt.load_state_dict(saved)
    train([opt, twin], range(7, 30))

    assert [s["step"].item() for s in opt.state.values()] == [30.0] * 3
    assert [s["step"].shape for s in opt.state.values()] == [()] * 3
    # float32 and float64 counters are 30 exactly, so the numbers are the same bits
    for p, q in zip(params_of(opt), params_of(twin), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_counters_have_the_dtype_that_torch_gives_them(default: torch.dtype) -> None:
    """A number becomes a tensor of the default dtype, in torch too; torch leaves an integer tensor as it is."""
    params = list(named().values())
    slots = [{name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")} for p in params]
    groups = AdamW(params).state_dict()["param_groups"]
    torch.set_default_dtype(default)
    try:
        dtypes = []
        for cls, step in ((torch.optim.AdamW, 7), (AdamW, 7), (AdamW, torch.tensor(7)), (AdamW, None)):
            opt = cls(params)
            opt.load_state_dict(
                {"state": {k: {"step": step, **s} for k, s in enumerate(slots)}, "param_groups": groups}
            )
            dtypes.append({s["step"].dtype for s in opt.state.values()})
    finally:
        torch.set_default_dtype(torch.float32)

    assert dtypes == [{default}] * 4


@pytest.mark.parametrize("key", ["momentum_buffer", "exp_avg", "exp_avg_sq", "step", "all"])
def test_slots_that_are_none_start_anew(key: str) -> None:
    """As if they were zeros, which is what they start from; torch writes None for a buffer that it has not made."""
    momentum = key == "momentum_buffer"
    make: Any = (lambda p: SGD(p, lr=0.1, momentum=0.9)) if momentum else (lambda p: AdamW(p, lr=0.1))
    opts = [make(named().values()) for _ in range(2)]
    train(opts, range(3))
    saved = [copy.deepcopy(opt.state_dict()) for opt in opts]
    for none, zero in zip(saved[0]["state"].values(), saved[1]["state"].values(), strict=True):
        for k in list(none) if key == "all" else [key]:
            none[k], zero[k] = None, torch.zeros_like(zero[k])

    for opt, state in zip(opts, saved, strict=True):
        opt.load_state_dict(state)
    assert all(x is not None for s in opts[0].state.values() for x in s.values())
    assert all(opts[0].state.values())  # no empty ones
    train(opts, range(3, 23))

    assert_same_bits(*[[p.detach() for p in params_of(opt)] for opt in opts])


def test_a_number_per_leaf_loads_from_a_number_and_from_one_element() -> None:
    """In the dtype that it is made with: float64 beside float64 parameters."""
    for value in (3, 3.0, np.float64(3.0), torch.tensor(3.0, dtype=torch.float64), torch.tensor([3.0]).double()):
        opt = TransformOptimizer(named().values(), counted())
        train([opt], range(1))
        saved = copy.deepcopy(opt.state_dict())
        for state in saved["state"].values():
            state["c"] = value
        opt.load_state_dict(saved)
        for state in opt.state.values():
            assert_same_bits(state["c"], torch.tensor(3.0, dtype=torch.float64))


def test_a_frozen_parameter_that_keeps_the_state_of_the_tree_loads() -> None:
    """State per tree is an entry of the first parameter, which has no slots if it takes no step."""

    def count(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, {"n": state["n"] + 1}

    counts = fo.GradientTransformation(lambda params: {"n": torch.zeros(())}, count)
    optimizers = []
    for _ in range(2):
        frozen, w = torch.nn.Parameter(torch.ones(3), requires_grad=False), torch.nn.Parameter(torch.ones(2))
        optimizers.append(TransformOptimizer([frozen, w], fo.chain(fo.trace(0.9), counts, fo.scale(-0.1))))
        w.grad = torch.ones(2)
    saved, loaded = optimizers
    saved.step()
    loaded.load_state_dict(saved.state_dict())
    for optimizer in optimizers:
        optimizer.step()
    actual, expected = (optimizer.state_dict()["state"] for optimizer in (loaded, saved))
    assert [list(x) for x in actual.values()] == [list(x) for x in expected.values()]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_values_without_a_parameter_are_copied() -> None:
    opt, other = SGD(named().values()), SGD(named().values())
    opt.state["mine"] = {"x": torch.ones(2)}

    other.load_state_dict(opt.state_dict())
    other.state["mine"]["x"].add_(1)

    assert opt.state["mine"]["x"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("maker", MAKERS)
def test_each_loaded_tensor_has_memory_of_its_own(maker: str) -> None:
    opt = MAKERS[maker](named().items())
    train([opt], range(2))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))

    tensors = [x for state in opt.state.values() for x in state.values() if x.numel()]
    assert len({x.untyped_storage().data_ptr() for x in tensors}) == len(tensors)


class Counted(str):
    """A name that counts how often it is compared."""

    __slots__ = ()
    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


@pytest.mark.parametrize("groups", [1, 100])
def test_matching_by_name_takes_a_few_comparisons_per_parameter(groups: int) -> None:
    count = 200
    names = [Counted(f"layer.{k}") for k in range(count)]
    params = [nn.Parameter(torch.zeros(1)) for _ in names]

    def make(pairs: Any) -> torch.optim.Optimizer:
        return SGD([{"params": pairs[g::groups]} for g in range(groups)], momentum=0.9)

    opt, other = make(list(zip(names, params, strict=True))), make(list(zip(names, params, strict=True))[::-1])
    train([opt], range(1))
    saved = opt.state_dict()
    Counted.compared = 0

    other.load_state_dict(saved, by_name=True)  # type: ignore[call-arg]

    assert Counted.compared <= 20 * count  # a comparison of each with each is 40,000


# --- what does not fit


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

    with pytest.raises(ValueError, match=r"saved by the chain 'clip_by_global_norm > .*but this one is 'trace > "):
        other.load_state_dict(opt.state_dict())

    assert_same_bits(content(other), before)


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


def test_files_of_safetensors_that_others_wrote_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="holds no state of an optimizer"):
        load_safetensors(tmp_path / "x.safetensors")


def test_safetensors_refuse_what_they_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"param_groups\.0\.hook is function"):
        save_safetensors({"state": {}, "param_groups": [{"hook": lambda: None}]}, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_safetensors_keep_types_keys_layouts_and_special_numbers(tmp_path: Path) -> None:
    state = {
        "state": {
            0: {"step": torch.tensor(3.0), "x": torch.arange(6.0).reshape(2, 3).t(), "n": {"k": torch.ones(0, 2)}},
            "name": 1,
        },
        "param_groups": [{"lr": float("inf"), "betas": (0.9, 0.99), "list": [1, None, True], "d": torch.bfloat16}],
    }
    save_safetensors(state, tmp_path / "x.safetensors")
    assert_same_bits(load_safetensors(tmp_path / "x.safetensors")["state"][0], state["state"][0])
    assert load_safetensors(tmp_path / "x.safetensors")["param_groups"] == state["param_groups"]
    assert load_safetensors(tmp_path / "x.safetensors")["state"]["name"] == 1


@fo.elementwise(state={"c": fo.slot(1.0, per="leaf")})
def counted(u: Any, c: Any) -> Any:
    return -0.1 * c * u, c + 1


def test_one_number_for_a_complex_parameter() -> None:
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.complex64)) for _ in range(2)]
    opts = [TransformOptimizer([p], counted()) for p in params]
    params[0].grad = torch.ones(3, dtype=torch.complex64)
    params[1].grad = params[0].grad
    opts[0].step()
    with torch.no_grad():
        params[1].copy_(params[0])

    opts[1].load_state_dict(opts[0].state_dict())

    for opt in opts:
        opt.step()
    assert torch.equal(*params)
