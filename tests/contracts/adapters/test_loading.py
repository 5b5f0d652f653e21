"""States that are saved and loaded: nothing is lost, shared, or of another dtype."""

import copy
import pickle
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
from _lib.loading import chain, named, parted, scheduled
from _lib.optimizers import NAMES, OURS, content, params_of, train, twins
from functional_optim import adapters
from functional_optim.adapters import LAMB, SGD, AdamW, Lion, TransformOptimizer, load_safetensors, save_safetensors


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


TORCHS = [name for name in adapters.__all__ if hasattr(torch.optim, name)]


@pytest.mark.parametrize("name", TORCHS)
def test_hooks_may_mend_what_is_loaded_before_anything_is_refused(name: str) -> None:
    for module in (torch.optim, adapters):
        opt = getattr(module, name)([nn.Parameter(torch.ones(4, 3))], lr=0.1)
        saved = copy.deepcopy(opt.state_dict())
        saved["param_groups"][0]["lr"] = 0.2
        opt.register_load_state_dict_pre_hook(lambda opt, found: found["optimizer"])

        opt.load_state_dict({"optimizer": saved})

        assert opt.param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize("name", TORCHS)
def test_states_of_no_parameter_are_kept(name: str) -> None:
    for module in (torch.optim, adapters):
        opt = getattr(module, name)([nn.Parameter(torch.ones(4, 3))], lr=0.1)
        saved = copy.deepcopy(opt.state_dict())
        saved["state"] |= {"mine": {"x": 1}, "count": 3}

        opt.load_state_dict(saved)

        assert opt.state["mine"] == {"x": 1}
        assert opt.state["count"] == 3


@pytest.mark.parametrize("copied", [lambda opt: opt, copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
@pytest.mark.parametrize("name", TORCHS)
def test_states_load_again_and_into_copies(name: str, copied: Callable[[Any], Any]) -> None:
    """torch adds an option to the defaults where it loads or copies, which files lack."""
    p = nn.Parameter(torch.ones(4, 3))
    opt, theirs = getattr(adapters, name)([p], lr=0.1), getattr(torch.optim, name)([p], lr=0.1)

    def closure() -> torch.Tensor:
        p.grad = p.detach().to_sparse(1) if name == "SparseAdam" else p.detach().clone()
        return (p * p).sum() / 2

    opt.step(closure)
    theirs.step(closure)
    for saved in copy.deepcopy([opt.state_dict(), theirs.state_dict()]):
        new = copied(opt)
        for _ in range(3):
            new.load_state_dict(saved)

            assert_same_bits(new.state_dict()["state"], saved["state"])


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


@pytest.mark.parametrize("name", [*NAMES, "Adafactor", "LAMB", "Lion", "Muon"])
def test_every_slot_that_is_none_starts_anew(name: str) -> None:
    """The numbers among them, too, which classes of torch look at when they are loaded."""
    saved_of, loaded = (getattr(adapters, name)([torch.nn.Parameter(torch.ones(2, 2))]) for _ in range(2))
    (p,), (q,) = saved_of.param_groups[0]["params"], loaded.param_groups[0]["params"]
    p.grad = q.grad = torch.ones(2, 2)
    saved_of.step()
    for key in saved_of.state[p]:
        saved = copy.deepcopy(saved_of.state_dict())
        saved["state"][0][key] = None

        loaded.load_state_dict(saved)
        loaded.step()

        assert loaded.state[q][key] is not None


def test_a_number_per_leaf_loads_from_a_number_and_from_one_element() -> None:
    """In the dtype that it is made with: float64 beside float64 parameters."""
    wide = torch.tensor(3.0, dtype=torch.float64)
    for value in (3, 3.0, np.float64(3.0), wide, wide.reshape(1), torch.tensor(3), torch.tensor([[3]])):
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
