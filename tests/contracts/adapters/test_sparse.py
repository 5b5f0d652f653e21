"""Sparse gradients beside torch's classes: the rows that they touch change as there, and no others."""

from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.compare import assert_same_bits, ulps
from _lib.marks import INTERPRETER
from _lib.optimizers import assert_same, content, copy_to, params_of, twins
from _lib.sparse import (
    F32,
    F64,
    LAYOUTS,
    MOMENTUM,
    ONE,
    STEPS,
    UNITS,
    follow,
    give_sparse,
    make_params,
    mixed,
    pair,
    sparse_grad,
    step_checked,
)
from functional_optim import adapters
from functional_optim.adapters import SGD, Adagrad, SparseAdam


pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant:UserWarning")  # torch's, of tensors that it makes


FLAT = (((12,), 1), ((5, 4), 2))  # indices name single elements


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
