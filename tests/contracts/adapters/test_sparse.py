"""Sparse gradients beside torch's classes: the rows that they touch change as there, and no others."""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.testing._internal.common_optimizers import get_error_inputs_for_all_optims, optim_db

import functional_optim as fo
from _lib.compare import Snapshot, assert_same_bits, bits, ulps
from _lib.marks import INTERPRETER
from _lib.optimizers import assert_same, content, copy_to, params_of, twins
from functional_optim import adapters
from functional_optim.adapters import SGD, Adagrad, SparseAdam, TransformOptimizer, load_safetensors, save_safetensors


pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant:UserWarning")  # torch's, of tensors that it makes
F64, F32 = torch.float64, torch.float32
STEPS = 20
# Of each parameter the shape and the number of dimensions that indices are over
LAYOUTS: tuple[tuple[tuple[int, ...], int], ...] = (((9, 16), 1), ((4, 3, 8), 2), ((6, 2, 4), 1), ((0, 3), 1))
ONE = LAYOUTS[:1]
FLAT = (((12,), 1), ((5, 4), 2))  # indices name single elements
# The quotient of a step has a root of torch that may be off by one unit, an addition, two divisions and a product on
# either side, half a unit each, and then comes a sum; units double at a power of two.
UNITS = 4.0


def make_params(layouts: Sequence[tuple[tuple[int, ...], int]], dtype: torch.dtype = F64) -> list[torch.nn.Parameter]:
    """Parameters of normal deviates; one of three dimensions is stored with its last dimension first."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=F64).to(dtype) for shape, _ in layouts]
    return [torch.nn.Parameter(x.permute(2, 0, 1).contiguous().permute(1, 2, 0) if x.ndim == 3 else x) for x in made]


def sparse_grad(
    p: torch.Tensor, dims: int, seed: int, repeat: bool = False, touched: int | None = None
) -> torch.Tensor:
    """Normal deviates at random indices, of which there are between none and six; with `repeat` some are the same."""
    generator = torch.Generator().manual_seed(seed)
    places = p.shape[:dims].numel()
    n = int(torch.randint(0, 7, (), generator=generator)) if touched is None else touched
    n = min(n, places)
    flat = torch.randperm(places, generator=generator)[:n]
    if repeat and n:
        flat = flat[torch.randint(0, (n + 1) // 2, (n,), generator=generator)]
    indices = torch.stack(torch.unravel_index(flat, p.shape[:dims])) if n else torch.zeros(dims, 0, dtype=torch.int64)
    values = torch.randn((n, *p.shape[dims:]), generator=generator, dtype=F64).to(p.dtype)
    return torch.sparse_coo_tensor(indices, values, p.shape, check_invariants=True)


def give_sparse(opts: Sequence[Any], layouts: Any, step: int, repeat: bool = False) -> None:
    """Puts the same sparse gradients where optimizers find them."""
    for opt in opts:
        for k, (p, (_, dims)) in enumerate(zip(params_of(opt), layouts, strict=True)):
            p.grad = sparse_grad(p, dims, 100 * step + k, repeat)


def untouched(p: torch.Tensor) -> torch.Tensor:
    """The elements that the gradient of a parameter does not name."""
    assert p.grad is not None
    ones = torch.sparse_coo_tensor(p.grad._indices(), torch.ones_like(p.grad._values()), p.shape, check_invariants=True)
    return ones.to_dense() == 0


def step_checked(opt: Any) -> None:
    """Takes a step, and asserts that elements which no gradient names keep their bits, in state too."""
    before = content(opt)
    opt.step()
    for k, p in enumerate(params_of(opt)):
        still = untouched(p)
        assert_same_bits(p.detach()[still], before["params"][k][still])
        for key, x in opt.state.get(p, {}).items():
            if key != "step" and before["state"][k]:
                assert_same_bits(x[still], before["state"][k][key][still])


def pair(name: str, layouts: Any, dtype: torch.dtype = F64, **kwargs: Any) -> tuple[Any, Any]:
    """Our optimizer of a name and torch's."""
    params = make_params(layouts, dtype)
    return (
        getattr(adapters, name)(params, **deepcopy(kwargs)),
        getattr(torch.optim, name)(twins(params), **deepcopy(kwargs)),
    )


# --- numbers

SGD_CASES: dict[str, dict[str, Any]] = {
    "": {"lr": 0.1},
    "maximize": {"lr": 0.1, "maximize": True},
    "tensor lr": {"lr": torch.tensor([0.1])},
    "foreach": {"lr": 0.1, "foreach": True},
}


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("case", SGD_CASES)
def test_sgd_has_the_bits_of_torch(case: str, dtype: torch.dtype) -> None:
    ours, theirs = pair("SGD", LAYOUTS, dtype, **SGD_CASES[case])

    for step in range(STEPS):
        give_sparse([ours, theirs], LAYOUTS, step)
        step_checked(ours)
        theirs.step()
        assert_same(ours, theirs)


@pytest.mark.parametrize("layouts", [LAYOUTS, FLAT], ids=["rows", "elements"])
def test_sgd_adds_up_repeated_indices(layouts: Any) -> None:
    """torch takes k values of one index one after another, with a rounding each; ours are added up first.

    That is k roundings on either side, of numbers no larger than all terms together, which are less than twice the
    largest. Single elements torch rounds once more.
    """
    ours, theirs = pair("SGD", layouts, lr=0.1)

    for step in range(STEPS):
        give_sparse([ours, theirs], layouts, step, repeat=True)
        before = content(ours)["params"]
        step_checked(ours)
        theirs.step()
        for p, q, was in zip(params_of(ours), params_of(theirs), before, strict=True):
            g = p.grad
            assert g is not None
            if not g._nnz():
                continue
            size = torch.sparse_coo_tensor(g._indices(), g._values().abs(), g.shape, check_invariants=True).to_dense()
            assert ulps(p, q, was, 0.1 * size).max() <= 2 * (g._nnz() + 1)
        copy_to(theirs, ours)


ADAM_CASES: dict[str, dict[str, Any]] = {
    "": {},
    "betas and eps": {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3},
    "no betas": {"lr": 0.1, "betas": (0.0, 0.0)},
    "maximize": {"lr": 0.1, "maximize": True},
    "tensor lr": {"lr": torch.tensor([0.1], dtype=F64)},
}


def follow(ours: Any, theirs: Any, layouts: Any, steps: range, after: Callable[[], None] = lambda: None) -> float:
    """The distance of a step's parameters from torch's at most, in units; all else is asserted to be the same bits."""
    worst = 0.0
    for step in steps:
        give_sparse([ours, theirs], layouts, step, repeat=step % 2 == 1)
        before = content(ours)["params"]
        step_checked(ours)
        theirs.step()
        assert_same_bits(content(ours)["state"], content(theirs)["state"])
        for p, q, was in zip(params_of(ours), params_of(theirs), before, strict=True):
            if p.numel():
                worst = max(worst, ulps(p, q, was, p - was).max().item())
            with torch.no_grad():
                q.copy_(p)
        after()
    return worst


ADAGRAD_CASES: dict[str, dict[str, Any]] = {
    "": {},
    "decay of the rate": {"lr": 0.1, "lr_decay": 0.3},
    "a first value": {"lr": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3},
    "maximize": {"lr": 0.1, "maximize": True},
    "tensor lr": {"lr": torch.tensor(0.1, dtype=F64), "lr_decay": 0.3},
}


@pytest.mark.parametrize("layouts", [LAYOUTS, FLAT], ids=["rows", "elements"])
@pytest.mark.parametrize("case", ADAGRAD_CASES)
def test_adagrad_is_within_units_of_torch(case: str, layouts: Any) -> None:
    """Sums of squares and counters have the same bits."""
    ours, theirs = pair("Adagrad", layouts, **ADAGRAD_CASES[case])

    assert follow(ours, theirs, layouts, range(STEPS)) <= UNITS


def test_adagrad_in_single_precision() -> None:
    ours, theirs = pair("Adagrad", LAYOUTS, F32, lr=0.1, lr_decay=0.3)
    assert follow(ours, theirs, LAYOUTS, range(STEPS)) <= UNITS


@pytest.mark.parametrize("layouts", [LAYOUTS, FLAT], ids=["rows", "elements"])
@pytest.mark.parametrize("case", ADAM_CASES)
def test_sparse_adam_is_within_units_of_torch(case: str, layouts: Any) -> None:
    """Moments and counters have the same bits; gradients have repeated indices, or none."""
    ours, theirs = pair("SparseAdam", layouts, **ADAM_CASES[case])

    far = follow(ours, theirs, layouts, range(STEPS))

    assert far <= UNITS
    assert [type(s["step"]) for s in ours.state.values()] == [int] * len(layouts)


def test_sparse_adam_in_single_precision() -> None:
    ours, theirs = pair("SparseAdam", LAYOUTS, F32, lr=0.1)
    assert follow(ours, theirs, LAYOUTS, range(STEPS)) <= UNITS


# torch's sparse momentum has an entry for each gradient that touched a row, so that each of these steps has a rounding
# for each step before it, in ours and in torch's, of numbers that are less than 8: half a unit of 4 each.
MOMENTUM = {"rtol": 0.0, "atol": STEPS * STEPS * 2 * 4 * 2**-53}


@pytest.mark.parametrize("kwargs", [{}, {"nesterov": True}, {"dampening": 0.5}], ids=str)
def test_momentum_moves_all_rows_that_were_ever_touched(kwargs: dict[str, Any]) -> None:
    """torch keeps a sparse buffer of these rows; ours is dense."""
    ours, theirs = pair("SGD", LAYOUTS, lr=0.1, momentum=0.9, **kwargs)

    for step in range(STEPS):
        give_sparse([ours, theirs], LAYOUTS, step)
        ours.step()
        theirs.step()
        for p, q in zip(params_of(ours), params_of(theirs), strict=True):
            buffer = theirs.state[q]["momentum_buffer"].to_dense()
            assert not buffer.numel() or max(p.abs().max(), buffer.abs().max()) < 8
            torch.testing.assert_close(p, q, **MOMENTUM)
            torch.testing.assert_close(ours.state[p]["momentum_buffer"], buffer, **MOMENTUM)


@pytest.mark.parametrize("kwargs", [{}, {"momentum": 0.9}], ids=str)
def test_sparse_and_dense_gradients_take_turns(kwargs: dict[str, Any]) -> None:
    """As in torch, which wants the first one to be dense where there is momentum."""
    ours, theirs = pair("SGD", LAYOUTS, lr=0.1, **kwargs)

    for step in range(STEPS):
        give_sparse([ours, theirs], LAYOUTS, step)
        for opt in (ours, theirs):
            for k, p in enumerate(params_of(opt)):
                if (step + k) % 3 == 0 or not step:
                    p.grad = torch.full_like(p, 1.0 + step) if (step + k) % 2 else None if step else torch.ones_like(p)
            opt.step()

    assert_same(ours, theirs)


def mixed(cls: Any, sparse_options: dict[str, Any], dense_options: dict[str, Any], **kwargs: Any) -> Any:
    """An optimizer over two parameters with sparse gradients and two with dense ones, a group of each."""
    params = make_params((*LAYOUTS[:2], *LAYOUTS[:2]))
    return cls([{"params": params[:2], **sparse_options}, {"params": params[2:], **dense_options}], **kwargs)


def test_groups_with_sparse_and_with_dense_gradients() -> None:
    """Each with its options; the dense ones have momentum and decay."""
    options: tuple[dict[str, Any], ...] = ({"lr": 0.5}, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True})
    ours, theirs = mixed(SGD, *options, lr=0.1), mixed(torch.optim.SGD, *options, lr=0.1, fused=None)

    for step in range(STEPS):
        for opt in (ours, theirs):
            for k, p in enumerate(params_of(opt)):
                g = sparse_grad(p, LAYOUTS[k % 2][1], 100 * step + k)
                p.grad = g if k < 2 else g.to_dense()
        before = content(ours)
        ours.step()
        theirs.step()
        for k, (p, q) in enumerate(zip(params_of(ours), params_of(theirs), strict=True)):
            if k < 2:
                assert_same_bits(p.detach(), q.detach())
                assert p not in ours.state
            else:  # the for-loop rounds decay, momentum and the step once more than kernels do, as derived there
                assert ulps(p, q, before["params"][k], p - before["params"][k]).max() <= UNITS
        copy_to(theirs, ours)


def test_complex_parameters_of_sgd() -> None:
    p = torch.nn.Parameter(torch.complex(*make_params((LAYOUTS[0],) * 2)).detach())
    [q] = twins([p])
    ours, theirs = SGD([p], lr=0.1), torch.optim.SGD([q], lr=0.1)
    for step in range(3):
        p.grad = sparse_grad(p, 1, step) * (1 + 2j)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(p, q, rtol=4 * 2**-53, atol=4 * 2**-53)


@pytest.mark.parametrize("cls", [SGD, Adagrad, SparseAdam])
def test_a_number_may_have_a_sparse_gradient(cls: Any) -> None:
    p = torch.nn.Parameter(torch.tensor(1.0, dtype=F64))
    opt = cls([p], lr=0.1)
    p.grad = torch.ones((), dtype=F64).to_sparse()
    opt.step()
    assert p.item() == pytest.approx(0.9, abs=1e-7)


@INTERPRETER
@pytest.mark.parametrize("backend", ["reference", "foreach", "triton"])
def test_every_backend_computes_rows(backend: Any) -> None:
    """Within a few roundings of what C computes, in the moments that torch's operations round otherwise too."""
    ours, others = (SparseAdam(make_params(ONE), lr=0.1) for _ in range(2))
    for step in range(2):
        give_sparse([ours, others], ONE, step)
        ours.step()
        with fo.use_backend(backend):
            step_checked(others)
    for x, y in zip(params_of(ours), params_of(others), strict=True):
        torch.testing.assert_close(x, y, rtol=8 * 2**-53, atol=8 * 2**-53)


class Table(torch.nn.Module):
    """Words in a context of three, by an embedding and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(30, 16, sparse=True, dtype=F64)
        self.out = torch.nn.Linear(16, 30, bias=False, dtype=F64)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=F64) / 4)

    def loss(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step % 4)
        words = torch.randint(0, 20, (8, 3), generator=generator)
        scores: torch.Tensor = self.out(self.words(words).mean(1))
        return torch.nn.functional.cross_entropy(scores, words.sum(1) % 30)


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "SparseAdam"])
def test_an_embedding_is_trained_as_by_torch(name: str) -> None:
    models, losses = (Table(), Table()), []
    unseen = models[0].words.weight.detach()[20:].clone()
    opts: list[list[Any]] = []
    for model, module in zip(models, (adapters, torch.optim), strict=True):
        if name != "SparseAdam":
            opts.append([getattr(module, name)(model.parameters(), lr={"SGD": 2.0, "Adagrad": 0.2}[name])])
        else:
            table, others = model.words.parameters(), model.out.parameters()
            opts.append([module.SparseAdam(table, lr=0.05), module.AdamW(others, lr=0.05)])

    for step in range(STEPS):
        for model, own in zip(models, opts, strict=True):
            for opt in own:
                opt.zero_grad()
            loss = model.loss(step)
            loss.backward()
            losses.append(loss.item())
            for opt in own:
                opt.step()

    assert losses[-2] < 0.8 * losses[0]
    assert_same_bits(models[0].words.weight.detach()[20:], unseen)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        # steps of order 0.1 that differ by a few units of 2**-53, which a model of this size hands on some tenfold
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


# --- torch's own table

NAMES = ("SGD", "Adagrad", "SparseAdam")
INFOS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in NAMES}


def inputs() -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Each configuration that takes sparse gradients, and those with schedulers."""
    for name, info in INFOS.items():
        assert info.supports_sparse or info.only_supports_sparse_grads
        for case in info.optim_inputs_func("cpu", F64):
            if not case.kwargs.get("weight_decay"):
                yield f"{name}, {case.desc}", {"name": name, **case.kwargs}, []
        kwargs, schedulers = info.metadata_for_sparse
        yield f"{name}, sparse", {"name": name, **kwargs}, schedulers


TABLE = {desc: (kwargs, schedulers) for desc, kwargs, schedulers in inputs()}


@pytest.mark.parametrize("case", TABLE)
def test_every_configuration_of_the_table(case: str) -> None:
    kwargs, makers = TABLE[case]
    if isinstance(kwargs.get("lr"), torch.Tensor):
        kwargs = {**kwargs, "lr": kwargs["lr"].double()}  # torch's arithmetic is that of the tensor
    ours, theirs = pair(layouts=ONE, **kwargs)
    schedulers = [make(opt) for make in makers for opt in (ours, theirs)]

    for step in range(8):
        give_sparse([ours, theirs], ONE, step)
        before = content(ours)["params"][0]
        for opt in (ours, theirs):
            opt.step()
        for scheduler in schedulers:
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(1.0) if plateau else scheduler.step()
        [p], [q] = params_of(ours), params_of(theirs)
        assert ulps(p, q, before, p - before).max() <= UNITS
        with torch.no_grad():
            q.copy_(p)
    assert [g["lr"] for g in ours.param_groups] == [g["lr"] for g in theirs.param_groups]


ERRORS = {
    case.optimizer_error_input.desc: case
    for case in (
        *get_error_inputs_for_all_optims("cpu", F32),
        *INFOS["SparseAdam"].optim_error_inputs_func("cpu", F32),
    )
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_sparse_adam_are_those_of_torch(case: str) -> None:
    error = ERRORS[case]
    params, kwargs = error.optimizer_error_input.params, error.optimizer_error_input.kwargs
    params = [torch.nn.Parameter(torch.randn(1))] if params is None else params
    expect = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    with expect(error.error_type, match=error.error_regex):
        SparseAdam(params, **kwargs)


MORE_ERRORS: tuple[dict[str, Any], ...] = (
    {"lr": 0.0},
    {"lr": torch.ones(2)},
    {"eps": 0.0},
    {"betas": (0.5, 1.0)},
    {"foreach": True},
)


@pytest.mark.parametrize("kwargs", MORE_ERRORS, ids=str)
def test_errors_that_the_table_lacks_are_those_of_torch(kwargs: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as theirs:
        torch.optim.SparseAdam([torch.nn.Parameter(torch.ones(1))], **kwargs)
    with pytest.raises(theirs.type, match=re.escape(str(theirs.value))):
        SparseAdam([torch.nn.Parameter(torch.ones(1))], **kwargs)


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
