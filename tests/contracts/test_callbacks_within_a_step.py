"""Python code of somebody else that runs within a step, between the look at tensors and the kernel, and moves them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.compare import Snapshot
from functional_optim.adapters import TransformOptimizer


N, STEPS, RATE = 200_000, 6, 0.5  # large enough for memory that is given back to be gone


def moved(x: torch.Tensor) -> None:
    x.data = x.data.clone()


def transposed(x: torch.Tensor) -> None:
    x.data = x.data.t().contiguous().t()


def by_a_transformation(act: Callable[[], object]) -> fo.GradientTransformation:
    def pass_on(updates: Any, params: Any) -> Any:
        act()
        return updates

    return fo.chain(fo.stateless(pass_on), fo.sgd(RATE, momentum=0.5))


def by_a_schedule(act: Callable[[], object]) -> fo.GradientTransformation:
    def rate(count: Any) -> float:
        int(count)  # no tracer can follow
        act()
        return RATE

    return fo.sgd(rate, momentum=0.5)


def by_both(act: Callable[[], object]) -> fo.GradientTransformation:
    return fo.chain(fo.trace(0.5), by_a_transformation(act), fo.scale(1.0), by_a_schedule(act), fo.params_ema(0.5))


CHAINS = {"transformation": by_a_transformation, "schedule": by_a_schedule, "both": by_both}


def nothing() -> None:
    pass


def as_optimizer(make: Any, params: list[torch.Tensor], act: Callable[[], object]) -> Callable[[], object]:
    opt = TransformOptimizer(params, make(act))

    def step() -> None:
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()

    return step


def as_function(make: Any, params: list[torch.Tensor], act: Callable[[], object]) -> Callable[[], object]:
    tx = make(act)
    state = [tx.init(params)]

    def step() -> None:
        with torch.no_grad():
            grads = list(map(torch.ones_like, params))
            state[0] = fo.apply_gradients(tx, params, grads, state[0], donate=True)[1]

    return step


FORMS = {"optimizer": as_optimizer, "function": as_function}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CHAINS)
def test_params_moved_by_a_callback_are_written_where_they_are(name: str, form: str) -> None:
    """As if they had been brought back from somewhere else."""
    ours, still = ([torch.full((N,), 1.0 + k).requires_grad_() for k in range(3)] for _ in range(2))
    step = FORMS[form](CHAINS[name], ours, lambda: [moved(p) for p in ours])
    expected = FORMS[form](CHAINS[name], still, nothing)

    for _ in range(STEPS):
        step()
        expected()

    assert all(torch.equal(p, q) for p, q in zip(ours, still, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CHAINS)
def test_params_transposed_by_a_callback_are_refused(name: str, form: str) -> None:
    params = [torch.full((30, 20), 1.0 + k).requires_grad_() for k in range(3)]
    act: list[Callable[[], object]] = [nothing]
    step = FORMS[form](CHAINS[name], params, lambda: act[0]())
    for _ in range(3):
        step()
    before = Snapshot([p.detach() for p in params])
    act[0] = lambda: transposed(params[1])

    with pytest.raises(RuntimeError, match=r"params changed while the step was computed.*Change tensors between steps"):
        step()

    before.check()


@pytest.mark.parametrize("form", FORMS)
def test_lazy_clone_made_by_a_callback_is_not_written(form: str) -> None:
    params = [torch.full((N,), 1.0).requires_grad_()]
    kept: list[torch.Tensor] = []
    step = FORMS[form](by_a_transformation, params, lambda: kept.append(torch._lazy_clone(params[0].detach())))
    at_start = []
    for _ in range(4):
        at_start.append(params[0].detach().clone())
        step()

    assert all(torch.equal(x, y) for x, y in zip(kept, at_start, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("what", ["parameter", "state"])
def test_real_and_complex_tensors_moved_by_a_schedule(what: str, dtype: torch.dtype) -> None:
    p, still = (torch.nn.Parameter(torch.ones(N, dtype=dtype)) for _ in range(2))
    opts: list[Any] = []

    def act() -> None:
        state = opts[0].state[p]
        moved(p if what == "parameter" or "trace" not in state else state["trace"])

    opts += [TransformOptimizer([p], by_a_schedule(act)), TransformOptimizer([still], by_a_schedule(nothing))]
    for _ in range(STEPS):
        for q, opt in zip((p, still), opts, strict=True):
            q.grad = torch.ones_like(q)
            opt.step()

    assert torch.equal(p, still)
    assert torch.equal(opts[0].state[p]["trace"], opts[1].state[still]["trace"])


@pytest.mark.parametrize("form", ["transformation", "schedule"])
def test_an_option_that_a_callback_changes_is_that_of_the_step(form: str) -> None:
    """As if it had been changed before; also at the first step that changes it after several that did not."""

    def act() -> None:
        opts[0].param_groups[0]["lr"] = rate

    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opts = [TransformOptimizer([p], CHAINS[form](a)) for p, a in zip(params, (act, nothing), strict=True)]
    for rate in (0.5, 0.5, 0.5, 0.25, 0.125, 0.125):
        opts[1].param_groups[0]["lr"] = rate
        for p, opt in zip(params, opts, strict=True):
            p.grad = torch.ones(3)
            opt.step()
        assert torch.equal(*params)
