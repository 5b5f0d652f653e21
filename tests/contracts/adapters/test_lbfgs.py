"""`LBFGS` against torch's: the same iterates to the bit, files in both directions, and losses that are no number."""

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.compare import assert_same_bits
from _lib.lbfgs import (
    F64,
    INFO,
    KEPT,
    PROBLEMS,
    Run,
    assert_equal,
    drawn,
    square,
)
from _lib.trees import tensors
from functional_optim.adapters import LBFGS


ARGUMENTS: dict[str, dict[str, Any]] = {
    "default": {},
    "small steps": {"lr": 1e-3, "max_iter": 7},
    "wolfe": {"line_search_fn": "strong_wolfe"},
    "wolfe, short memory": {"line_search_fn": "strong_wolfe", "history_size": 2, "max_iter": 4, "lr": 0.5},
    "wolfe, few evaluations": {"line_search_fn": "strong_wolfe", "max_iter": 3, "max_eval": 4},
    "wolfe, one iteration": {"line_search_fn": "strong_wolfe", "max_iter": 1},
    "wolfe, one evaluation": {"line_search_fn": "strong_wolfe", "max_eval": 1, "lr": 10.0},
    "tolerances": {"tolerance_grad": 1e-2, "tolerance_change": 1e-3, "line_search_fn": "strong_wolfe"},
    **{f"optim_db, {case.desc}": case.kwargs for case in INFO.optim_inputs_func("cpu", F64)},
}
# steps of 1 without a search overflow
UNBOUNDED = {"default", "optim_db, default", "optim_db, tolerance_grad", "optim_db, maximize"}


CASES = [("net", name) for name in ARGUMENTS]
CASES += [("rosenbrock", name) for name in ARGUMENTS if name not in UNBOUNDED]
CASES += [(problem, name) for problem in ("net in float32", "complex") for name in ("default", "wolfe, short memory")]


@pytest.mark.parametrize(("problem", "name"), CASES)
def test_the_iterates_are_those_of_torch(problem: str, name: str) -> None:
    """Parameters, losses that the closure returned, and every entry of the state, to the bit."""
    ours, theirs = Run(LBFGS, problem, **ARGUMENTS[name]), Run(torch.optim.LBFGS, problem, **ARGUMENTS[name])

    for _ in range(2 if ARGUMENTS[name].get("max_iter", 20) == 20 else 10):  # 20 iterations or more
        torch.testing.assert_close(ours.step(), theirs.step(), rtol=0, atol=0)

        assert_equal(ours, theirs)
    assert all(map(math.isfinite, ours.values))


class Valleys:
    """A function of one number with many valleys; with `plateaus`, values are multiples of 1/4, so that many are equal.

    Args:
      seed: of its shape, and of the first step.
      plateaus: whether values are rounded.
    """

    def __init__(self, cls: Any, seed: int, plateaus: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.waves = torch.rand(6, 3, generator=generator, dtype=F64) * torch.tensor([2.0, 6.0, 6.0], dtype=F64)
        self.p = torch.nn.Parameter(torch.zeros(1, dtype=F64))
        lr = 10 ** (4 * torch.rand((), generator=generator, dtype=F64).item() - 2)
        self.opt = cls([self.p], lr=lr, max_iter=3, max_eval=60, line_search_fn="strong_wolfe")
        self.plateaus, self.seen = plateaus, torch.zeros(0, dtype=F64)

    def closure(self) -> torch.Tensor:
        self.opt.zero_grad()
        heights, widths, places = self.waves.unbind(1)
        value = (heights * torch.sin(widths * self.p + places)).sum() + (self.p * self.p).sum() / 50
        value.backward()
        self.seen = torch.cat([self.seen, self.p.detach()])
        return torch.round(4 * value.detach()) / 4 if self.plateaus else value.detach()


@pytest.mark.slow
@pytest.mark.parametrize("plateaus", [False, True])
def test_the_search_is_that_of_torch_in_many_valleys(plateaus: bool) -> None:
    """The points at which 150 functions are evaluated, to the bit."""
    counts = []
    for seed in range(150):
        ours, theirs = Valleys(LBFGS, seed, plateaus), Valleys(torch.optim.LBFGS, seed, plateaus)
        for each in (ours, theirs):
            each.opt.step(each.closure)
        assert_same_bits(ours.seen, theirs.seen)
        assert_same_bits(ours.p.detach(), theirs.p.detach())
        counts.append(len(ours.seen))
    assert max(counts) > 12


def test_parameters_may_be_stored_by_columns() -> None:
    """torch refuses them; the iterates are those of parameters stored by rows."""
    rows, columns = (Run(LBFGS, "rosenbrock", line_search_fn="strong_wolfe") for _ in range(2))
    columns.params[0].data = columns.params[0].data.t().contiguous().t()
    rows.step()
    columns.step()

    assert columns.params[0].stride() == (1, 2)
    assert_equal(columns, rows)


def addresses(tree: Any) -> set[int]:
    """The memory of all tensors of a tree."""
    return {x.data_ptr() for x in tensors(tree)}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("direction", ["torch's into ours", "ours into torch's"])
def test_files_load_in_the_middle_of_training(problem: str, direction: str) -> None:
    """The run goes on as if it had not changed hands, and the file is not written to."""
    kwargs = {"line_search_fn": "strong_wolfe", "max_iter": 3, "history_size": 4}
    classes = [torch.optim.LBFGS, LBFGS]
    source, target = classes if direction == "torch's into ours" else classes[::-1]
    saved, straight, loaded = (Run(cls, problem, **kwargs) for cls in (source, torch.optim.LBFGS, target))
    for _ in range(4):
        saved.step()
        straight.step()
    file = io.BytesIO()
    torch.save(saved.opt.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    before = copy.deepcopy(state)
    with torch.no_grad():
        for p, q in zip(loaded.params, saved.params, strict=True):
            p.copy_(q)

    loaded.opt.load_state_dict(state)
    if target is LBFGS:
        assert not addresses(loaded.opt.state_dict()) & addresses(state)
    straight.values.clear()
    for _ in range(4):
        loaded.step()
        straight.step()

        assert_equal(loaded, straight)
    if target is LBFGS:
        assert_same_bits(state, before)


def test_state_is_in_the_first_parameter() -> None:
    run = Run(LBFGS, "net", line_search_fn="strong_wolfe")
    run.step()

    assert list(run.opt.state) == [run.params[0]]
    assert set(run.opt.state[run.params[0]]) == set(KEPT)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on(copied: Callable[[Any], Any]) -> None:
    """torch's own class loses its parameters when it is copied."""
    run = Run(LBFGS, "net", line_search_fn="strong_wolfe", max_iter=3)
    run.step()
    other = copied(run.opt)

    twin = Run(LBFGS, "net")
    twin.opt, twin.params = other, other.param_groups[0]["params"]
    run.values.clear()
    run.step()
    twin.step()

    assert_equal(twin, run)


def test_sparse_gradients_are_made_dense() -> None:
    runs = []
    for cls in (LBFGS, torch.optim.LBFGS):
        p = torch.nn.Parameter(drawn((6, 2))[0])
        opt = cls([p])

        def closure(p: Any = p) -> torch.Tensor:
            rows = p.detach()[:3]
            p.grad = torch.sparse_coo_tensor(torch.tensor([[0, 1, 2]]), 2 * rows, p.shape, check_invariants=True)
            return (rows * rows).sum()

        for _ in range(3):
            opt.step(closure)
        runs.append(p.detach())

    assert_same_bits(*runs)


# --- losses that are no number


class Cliff:
    """A parabola with its minimum at 3 that is no number beyond 1, evaluated at parameters of an optimizer."""

    def __init__(self, bad: float = math.nan, where: float = 1.0, **kwargs: Any) -> None:
        self.p = torch.nn.Parameter(torch.zeros(2, dtype=F64))
        self.bad, self.where = bad, where
        self.opt = LBFGS([self.p], **kwargs)
        self.seen: list[torch.Tensor] = []

    def closure(self) -> torch.Tensor:
        self.opt.zero_grad()
        loss = ((self.p - 3.0) ** 2).sum()
        loss.backward()
        self.seen.append(self.p.detach().clone())
        return loss if self.p.max() <= self.where else loss * self.bad

    def good(self) -> list[torch.Tensor]:
        return [x for x in self.seen if x.max() <= self.where]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_parameters_stay_at_the_last_good_point(bad: float) -> None:
    """Without a line search the move that led there is taken back, and the state is one that can go on."""
    cliff = Cliff(bad, lr=0.6)

    with pytest.warns(RuntimeWarning, match=f"returned a loss of {bad}; parameters stay"):
        cliff.opt.step(cliff.closure)

    assert len(cliff.good()) < len(cliff.seen)
    assert torch.equal(cliff.p, cliff.good()[-1])
    assert cliff.opt.state[cliff.p]["t"] == 0  # so that no pair is made of a move that was taken back
    cliff.where = math.inf
    for _ in range(3):
        cliff.opt.step(cliff.closure)
    # a step ends where the loss, 2 * x * x around the minimum, changes by less than 1e-9
    torch.testing.assert_close(cliff.p.detach(), torch.full((2,), 3.0, dtype=F64), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_line_search_backs_off(bad: float) -> None:
    """The loss goes down to the edge; every point that is kept is a good one."""
    cliff = Cliff(bad, line_search_fn="strong_wolfe", lr=1.0)

    for _ in range(5):
        before = ((cliff.p.detach() - 3) ** 2).sum()
        cliff.opt.step(cliff.closure)
        assert cliff.p.max() <= 1.0
        assert ((cliff.p.detach() - 3) ** 2).sum() <= before
    assert any(x.max() > 1.0 for x in cliff.seen)
    assert cliff.p.min() > 0.5


def test_a_last_move_that_nothing_was_evaluated_after_is_taken_back() -> None:
    """With `max_iter=1` a bad point is found at the beginning of the next step."""
    cliff = Cliff(lr=1.0, max_iter=1)
    cliff.opt.step(cliff.closure)
    good = cliff.p.detach().clone()
    cliff.opt.param_groups[0]["lr"] = 10.0
    cliff.opt.step(cliff.closure)
    assert cliff.p.max() > 1.0

    with pytest.warns(RuntimeWarning, match="parameters stay"):
        cliff.opt.step(cliff.closure)

    assert torch.equal(cliff.p, good)
    # parameters that somebody else has moved there stay
    cliff.opt.step(cliff.closure)
    with torch.no_grad():
        cliff.p.fill_(5.0)
    with pytest.warns(RuntimeWarning, match="parameters stay"):
        cliff.opt.step(cliff.closure)
    assert torch.equal(cliff.p, torch.full((2,), 5.0, dtype=F64))


def test_a_gradient_that_is_no_number_moves_nothing() -> None:
    cliff = Cliff(line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        loss = cliff.closure()
        assert cliff.p.grad is not None
        cliff.p.grad[1] = math.nan
        return loss

    with pytest.warns(RuntimeWarning, match="a gradient that is not finite"):
        cliff.opt.step(closure)

    assert torch.equal(cliff.p, torch.zeros(2, dtype=F64))


# --- beside other features


def test_explain_says_how_it_runs() -> None:
    """The state that `explain` announces is the one that a full history has."""
    run = Run(LBFGS, "rosenbrock", history_size=3, line_search_fn="strong_wolfe", tolerance_change=0.0)
    text = str(fo.explain(run.opt))
    run.step()

    assert "torch operations compute it over all parameters as one vector" in text
    assert "up to 20 iterations and 25 evaluations" in text
    state = run.opt.state[run.params[0]]
    assert len(state["old_dirs"]) == 3
    vectors = [state["d"], state["prev_flat_grad"], *state["old_dirs"], *state["old_stps"]]
    assert fo.explain(run.opt).state_bytes * 6 == sum(x.nbytes for x in vectors)
    with pytest.raises(TypeError, match="LBFGS has its own; pass it alone"):
        fo.explain(run.opt, run.params)


def test_no_parameter_has_elements() -> None:
    p = torch.nn.Parameter(torch.zeros(0))

    assert LBFGS([p]).step(lambda: square(p)) == 0


def test_schedulers_change_the_step() -> None:
    """The learning rate of a group is obeyed, whoever changes it."""
    runs = [Run(cls, "net", lr=0.1, max_iter=2) for cls in (LBFGS, torch.optim.LBFGS)]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(run.opt, 0.5) for run in runs]

    for _ in range(4):
        for run, scheduler in zip(runs, schedulers, strict=True):
            run.step()
            scheduler.step()

        assert_equal(*runs)


def test_hooks_are_called_once() -> None:
    run = Run(LBFGS, "net")
    calls = []
    run.opt.register_step_post_hook(lambda *args: calls.append(1))

    with warnings.catch_warnings():
        run.step()

    assert calls == [1]
