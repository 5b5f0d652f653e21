"""States that are loaded by the names of parameters, in other orders and groups."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from _lib.compare import Snapshot, assert_same_bits
from _lib.loading import chain, named
from _lib.optimizers import train
from functional_optim.adapters import SGD, AdamW, TransformOptimizer


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
