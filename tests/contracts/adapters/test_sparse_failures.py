"""Sparse gradients that are refused, steps that fail, checkpoints, scalers and compilers."""

import io
import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import functional_optim as fo
from _lib.compare import Snapshot, assert_same_bits, bits, ulps
from _lib.optimizers import assert_same, content, params_of, twins
from _lib.sparse import F64, LAYOUTS, MOMENTUM, ONE, UNITS, follow, give_sparse, make_params, mixed, pair, sparse_grad
from functional_optim import adapters
from functional_optim.adapters import SGD, Adagrad, SparseAdam, TransformOptimizer, load_safetensors, save_safetensors


pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant:UserWarning")  # torch's, of tensors that it makes


# --- failures


REFUSED: dict[str, tuple[str, dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "weight decay": ("SGD", {"weight_decay": 0.1}, lambda p: sparse_grad(p, 1, 0, touched=3)),
    "weight decay of Adagrad": ("Adagrad", {"weight_decay": 0.1}, lambda p: sparse_grad(p, 1, 0, touched=3)),
    "a dense gradient": ("SparseAdam", {}, torch.ones_like),
    "a sparse gradient": ("Adam", {}, lambda p: sparse_grad(p, 1, 0, touched=3)),
    "another sparse gradient": ("RMSprop", {}, lambda p: sparse_grad(p, 1, 0, touched=3)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_torch_refuses_is_refused_in_its_words(case: str) -> None:
    name, kwargs, make = REFUSED[case]
    ours, theirs = pair(name, ONE, **kwargs)
    for opt in (ours, theirs):
        for p in params_of(opt):
            p.grad = make(p)
    with pytest.raises(RuntimeError) as said:
        theirs.step()
    before, state = Snapshot(params_of(ours)), content(ours)["state"]

    with pytest.raises(RuntimeError, match=f"^{re.escape(str(said.value))}"):
        ours.step()

    before.check()
    assert_same_bits(content(ours)["state"], state)


def test_any_chain_refuses_sparse_gradients_before_its_functions_run() -> None:
    calls = []

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        calls.append(1)
        return updates, state

    tx = fo.chain(fo.GradientTransformation(lambda params: (), update), fo.sgd(0.1))
    [p] = make_params(ONE)
    opt = TransformOptimizer([p], tx)
    p.grad = torch.ones_like(p)
    opt.step()
    p.grad = sparse_grad(p, 1, 0, touched=3)
    with pytest.raises(RuntimeError, match=r"TransformOptimizer does not support sparse gradients; .*`SGD`"):
        opt.step()
    assert calls == [1]


def test_pure_functions_say_where_sparse_gradients_are_taken() -> None:
    [p] = make_params(ONE)
    tx = fo.sgd(0.1)
    with pytest.raises(TypeError, match=r"updates at 'w' is sparse .*`x.to_dense\(\)`.* `SparseAdam`"):
        fo.apply_gradients(tx, {"w": p}, {"w": sparse_grad(p, 1, 0)}, tx.init({"w": p}))


def break_state(opt: Any) -> None:
    opt.state[params_of(opt)[0]]["exp_avg"] = torch.zeros(10, 16, dtype=F64)


def break_counter(opt: Any) -> None:
    opt.state[params_of(opt)[0]]["step"] = "three"


def break_rate(opt: Any) -> None:
    opt.param_groups[0]["lr"] = float("nan")


def break_indices(opt: Any) -> None:
    p = params_of(opt)[0]
    values = torch.ones(1, 16, dtype=F64)
    p.grad = torch.sparse_coo_tensor(torch.tensor([[9]]), values, p.shape, check_invariants=False)


BROKEN: dict[str, tuple[Callable[[Any], None], type[Exception], str]] = {
    "a slot of another shape": (break_state, ValueError, r"exp_avg at .*shape \(10, 16\)"),
    "a counter that is no number": (break_counter, ValueError, "step at .*'three'"),
    "a rate that is no number": (break_rate, ValueError, "lr of parameter group 0"),
    "an index that is too large": (break_indices, IndexError, "index out of range"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_step_that_fails_changes_nothing(case: str) -> None:
    damage, error, message = BROKEN[case]
    opt = SparseAdam(make_params(LAYOUTS[:2]), lr=0.1)
    give_sparse([opt], LAYOUTS[:2], 3)
    opt.step()
    give_sparse([opt], LAYOUTS[:2], 3)
    damage(opt)
    before = Snapshot(params_of(opt), [dict(s) for s in opt.state.values()])

    with pytest.raises(error, match=message):
        opt.step()

    before.check()


def test_a_dense_part_that_fails_leaves_the_sparse_one_alone() -> None:
    opt = mixed(SGD, {}, {"momentum": 0.9}, lr=0.1)
    params = params_of(opt)
    for k, p in enumerate(params):
        p.grad = sparse_grad(p, LAYOUTS[k % 2][1], k, touched=3) if k < 2 else torch.ones_like(p)
    opt.step()
    opt.state[params[3]]["momentum_buffer"] = torch.zeros(5, dtype=F64)
    before = Snapshot(params, [dict(s) for s in opt.state.values()])

    with pytest.raises(ValueError, match="momentum_buffer"):
        opt.step()

    before.check()


def test_a_first_step_that_fails_leaves_no_state() -> None:
    """Though state was made for the parameter whose gradient is fine."""
    opt = SparseAdam(make_params(LAYOUTS[:2]), lr=0.1)
    give_sparse([opt], LAYOUTS[:2], 3)
    break_indices(opt)
    with pytest.raises(IndexError):
        opt.step()
    assert not opt.state


@pytest.mark.parametrize("cls", [SGD, Adagrad, SparseAdam])
def test_parameters_of_one_memory_take_turns_as_in_torch(cls: Any) -> None:
    outcomes = []
    for own in (cls, getattr(torch.optim, cls.__name__)):
        [p] = make_params(ONE)
        opt = own([p, torch.nn.Parameter(p.data)], lr=0.1)
        for step in range(2):
            for k, x in enumerate(params_of(opt)):
                x.grad = sparse_grad(x, 1, step + k, touched=6)
            opt.step()
        outcomes.append(p.detach())
    torch.testing.assert_close(*outcomes, rtol=8 * 2**-53, atol=8 * 2**-53)


def windows() -> list[torch.Tensor]:
    rows = torch.zeros(9, 16, dtype=F64)
    return [rows[:6], rows[3:]]


SHARED: dict[str, tuple[Callable[[], list[torch.Tensor]], bool, str]] = {
    "windows": (windows, True, r"params at .*\[0\]' and params at .*\[1\]' share memory"),
    "windows, one of them dense": (windows, False, r"params at .*\[0\]' and params at .*\[1\]' share memory"),
    "an expanded one": (lambda: [torch.zeros(1, 4, dtype=F64).expand(3, 4)], True, "is an expanded tensor"),
}


@pytest.mark.parametrize("case", SHARED)
def test_parameters_that_overlap_are_refused(case: str) -> None:
    make, both, message = SHARED[case]
    params = [torch.nn.Parameter(x) for x in make()]
    opt = SGD(params, lr=0.1)
    for k, p in enumerate(params):
        g = sparse_grad(p, 1, k, touched=3)
        p.grad = g if both or not k else g.to_dense()
    before = [bits(p) for p in params]
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert_same_bits([bits(p) for p in params], before)


# --- checkpoints, scalers, compilers


@pytest.mark.parametrize("halfway", [5, 0])
@pytest.mark.parametrize("name", ["SparseAdam", "Adagrad"])
def test_checkpoints_go_both_ways(name: str, halfway: int) -> None:
    """In the middle of a run, and before the first step: the run goes on as if nothing had been."""
    ours, theirs = pair(name, LAYOUTS, lr=0.1)
    follow(ours, theirs, LAYOUTS, range(halfway))
    files = [io.BytesIO(), io.BytesIO()]
    for opt, file in zip((ours, theirs), files, strict=True):
        torch.save(opt.state_dict(), file)
        file.seek(0)
    new = [getattr(module, name)(twins(params_of(ours)), lr=1.0) for module in (adapters, torch.optim)]
    new[0].load_state_dict(torch.load(files[1]))
    new[1].load_state_dict(torch.load(files[0]))

    assert follow(*new, LAYOUTS, range(halfway, halfway + 5)) <= UNITS
    follow(ours, theirs, LAYOUTS, range(halfway, halfway + 5))
    assert_same(ours, new[0])


def test_a_sparse_buffer_of_torch_is_loaded_as_a_dense_one() -> None:
    ours, theirs = pair("SGD", LAYOUTS, lr=0.1, momentum=0.9)
    for step in range(3):
        give_sparse([theirs], LAYOUTS, step)
        theirs.step()
    with torch.no_grad():
        for p, q in zip(params_of(ours), params_of(theirs), strict=True):
            p.copy_(q)
    ours.load_state_dict(theirs.state_dict())
    for step in range(3, 6):
        give_sparse([ours, theirs], LAYOUTS, step)
        ours.step()
        theirs.step()
        for p, q in zip(params_of(ours), params_of(theirs), strict=True):
            torch.testing.assert_close(p, q, **MOMENTUM)
    theirs.load_state_dict(ours.state_dict())  # torch adds to a dense buffer, too
    give_sparse([theirs], LAYOUTS, 6)
    theirs.step()


def test_other_files_of_sparse_adam(tmp_path: Any) -> None:
    """Safetensors, deep copies, and torch's checkpoints, which make a state by a step of dense zeros."""
    opt = SparseAdam(make_params(ONE), lr=0.1)
    give_sparse([opt], ONE, 3)
    opt.step()
    save_safetensors(opt.state_dict(), str(tmp_path / "file"))
    other = SparseAdam(twins(params_of(opt)), lr=0.1)
    other.load_state_dict(load_safetensors(str(tmp_path / "file")))
    assert_same(other, opt)
    assert_same(deepcopy(opt), opt)

    model = torch.nn.Embedding(4, 3, sparse=True)
    fresh = SparseAdam(model.parameters())
    before = Snapshot(model.weight)
    state = get_optimizer_state_dict(model, fresh)["state"]["weight"]  # type: ignore[index]
    assert state["step"] == 0
    assert not state["exp_avg"].any()
    before.check()


@pytest.mark.parametrize("value", [3, 3.0, torch.tensor(3.0), torch.tensor([3])], ids=str)
def test_a_counter_of_a_file_becomes_an_integer(value: Any) -> None:
    opt = SparseAdam(make_params(ONE), lr=0.1)
    give_sparse([opt], ONE, 3)
    opt.step()
    saved = deepcopy(opt.state_dict())
    saved["state"][0]["step"] = value
    opt.load_state_dict(saved)
    opt.step()
    [state] = opt.state.values()
    assert (type(state["step"]), state["step"]) == (int, 4)


SCALED: tuple[dict[str, Any], ...] = (
    {"name": "SparseAdam"},
    {"name": "Adagrad"},
    {"name": "Adagrad", "fused": True},
    {"name": "SGD"},
    {"name": "SGD", "fused": True},
)


@pytest.mark.parametrize("kwargs", SCALED, ids=str)
def test_a_scaler_skips_steps_as_with_torch(kwargs: dict[str, Any]) -> None:
    """With `fused=True`, where torch refuses sparse gradients, our kernel does the scaler's work."""
    ours, _ = pair(layouts=ONE, lr=0.1, **kwargs)
    _, theirs = pair(layouts=ONE, lr=0.1, name=kwargs["name"])
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2)]
    for step in range(6):
        before = content(ours)["params"][0]
        for opt, scaler in zip((ours, theirs), scalers, strict=True):
            [p] = params_of(opt)
            g = sparse_grad(p, 1, step, touched=4) * scaler.get_scale()
            p.grad = g * torch.inf if step in (0, 3) else g
            scaler.scale(torch.ones(()))
            scaler.step(opt)
            scaler.update()
        assert_same_bits(content(ours)["state"], content(theirs)["state"])
        [p], [q] = params_of(ours), params_of(theirs)
        assert ulps(p, q, before).max() <= UNITS
        if step in (0, 3):
            assert_same_bits(p.detach(), before)
        with torch.no_grad():
            q.copy_(p)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, where it imports the compiler
@pytest.mark.parametrize("kwargs", [{"name": "SGD"}, {"name": "SparseAdam"}], ids=str)
def test_a_compiled_step_runs_apart(kwargs: dict[str, Any]) -> None:
    compiled, _ = pair(layouts=ONE, lr=0.1, **kwargs)
    plain, _ = pair(layouts=ONE, lr=0.1, **kwargs)
    step = torch.compile(compiled.step, backend="eager")
    for k in range(3):
        give_sparse([compiled, plain], ONE, k)
        step()
        plain.step()
    assert_same_bits(content(compiled)["params"], content(plain)["params"])


def test_autograd_records_a_step_of_a_sparse_gradient() -> None:
    [w] = make_params(ONE)
    p = w * 2
    opt = SGD([p], lr=0.1, differentiable=True)
    weight = torch.ones((), dtype=F64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
        p.grad = sparse_grad(p, 1, 0, touched=3) * weight
        given = p.grad.to_dense().detach()
    opt.step()
    p.sum().backward()
    assert w.grad is not None
    torch.testing.assert_close(w.grad, torch.full_like(w, 2.0), rtol=0, atol=0)
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(-0.1 * given.sum().item(), rel=1e-12)


def test_the_explanation_of_sparse_adam() -> None:
    explained = fo.explain(SparseAdam(make_params(ONE)))
    assert (explained.passes, explained.bytes_per_element) == (1, 56.0)
    assert explained.state_bytes == 16
