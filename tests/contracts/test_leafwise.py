"""Rules for whole tensors: the promises of `leafwise`, in the pure API and in an optimizer."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import functional_optim as fo
from _lib.compare import Snapshot, assert_same_bits
from functional_optim.adapters import TransformOptimizer


SHAPES = {"a": (4, 3), "b": (3,), "c": (4, 3), "d": (), "e": (2, 3, 2), "f": (4, 3)}


@fo.leafwise(
    state={
        "mu": fo.slot("first_update"),
        "rows": fo.slot(0.5, shape=lambda p: p.shape[:1] if p.ndim == 2 else None),
        "gram": fo.slot(lambda p: torch.eye(p.shape[0] if p.ndim else 1)),
        "total": fo.slot(per="leaf"),
    },
    ranges={"decay": "[0, 1)"},
)
def whiten(
    u: Any, p: Any, mu: Any, rows: Any, gram: Any, total: Any, *, step: Any, first: Any, decay: Any = 0.9, lr: Any = 0.1
) -> Any:
    """Something of everything: products of matrices, slots of several shapes, the step, the parameter."""
    mu = decay * mu + (1 - decay) * u
    flat = u.reshape(u.shape[0] if u.ndim else 1, -1)
    gram = decay * gram + flat @ flat.T
    d = (torch.linalg.solve(gram + torch.eye(gram.shape[0], dtype=u.dtype), flat)).reshape(u.shape) + mu
    if rows is not None:
        rows = torch.where(first, u.square().sum(1), decay * rows + u.square().sum(1))
        d = d / rows.sqrt()[:, None]
    total = total + u.square().sum()
    return -lr * (1 - decay**step) * (d + 0.01 * p) / (1 + total), mu, rows, gram, total


def by_hand(p: Any, g: Any, s: dict[str, Any], step: int, decay: float, lr: float) -> Any:
    """One step of `whiten` for one tensor."""
    if step == 1:
        n = g.shape[0] if g.ndim else 1
        s |= {"mu": g, "rows": None, "gram": torch.eye(n, dtype=g.dtype), "total": torch.zeros((), dtype=g.dtype)}
    s["mu"] = decay * s["mu"] + (1 - decay) * g
    flat = g.reshape(g.shape[0] if g.ndim else 1, -1)
    s["gram"] = decay * s["gram"] + flat @ flat.T
    d = torch.linalg.inv(s["gram"] + torch.eye(len(flat), dtype=g.dtype)) @ flat
    d = d.reshape(g.shape) + s["mu"]
    if g.ndim == 2:
        own = (g * g).sum(1)
        s["rows"] = own if step == 1 else decay * s["rows"] + own
        d = d / s["rows"].sqrt()[:, None]
    s["total"] = s["total"] + (g * g).sum()
    return p - lr * (1 - decay**step) * (d + 0.01 * p) / (1 + s["total"])


def tree(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for k, s in SHAPES.items()}


def close(a: Any, b: Any) -> None:
    """Twenty steps of some hundred operations in float64, on numbers of about 1."""
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("donate", [False, True])
def test_the_pure_api_computes_the_function(donate: bool) -> None:
    tx = fo.chain(fo.scale(2.0), whiten(decay=0.8, lr=fo.linear_schedule(0.1, 0.01, 15)), fo.scale(0.5))
    params, expected, states = tree(0), tree(0), {k: {} for k in SHAPES}
    state = tx.init(params)
    for step in range(1, 21):
        grads, lr = tree(step), float(fo.linear_schedule(0.1, 0.01, 15)(step - 1))
        before = Snapshot(params, state)
        new = fo.apply_gradients(tx, params, grads, state, donate=donate)
        if not donate:
            before.check()
        params, state = new
        for k in SHAPES:
            p = expected[k]
            expected[k] = p + 0.5 * (by_hand(p, 2 * grads[k], states[k], step, 0.8, lr) - p)
    close(params, expected)
    close(state[1].gram, {k: s["gram"] for k, s in states.items()})
    assert {k for k, x in state[1].rows.items() if isinstance(x, fo.MaskedNode)} == {"b", "d", "e"}
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in state[1].mu.values()), "memory of their own"


def optimizer(**options: Any) -> tuple[TransformOptimizer, dict[str, Any]]:
    params = {k: nn.Parameter(p) for k, p in tree(0).items()}
    return TransformOptimizer([{"params": list(params.items()), **options}], whiten()), params


def take(opt: Any, params: dict[str, Any], step: int, missing: frozenset[str] = frozenset()) -> None:
    grads = tree(step)
    for k, p in params.items():
        p.grad = None if k in missing else grads[k].clone()
    opt.step()


def test_an_optimizer_counts_per_parameter_and_reads_its_groups() -> None:
    params = {k: nn.Parameter(p) for k, p in tree(0).items()}
    some = [(k, p) for k, p in params.items() if k < "c"]
    others = [(k, p) for k, p in params.items() if k >= "c"]
    opt = TransformOptimizer([{"params": some}, {"params": others, "lr": 0.02, "decay": 0.5}], whiten(lr=0.1))
    expected, states, steps = tree(0), {k: {} for k in SHAPES}, dict.fromkeys(SHAPES, 0)
    for step in range(1, 21):
        opt.param_groups[0]["lr"] = 0.1 / step
        missing = frozenset(k for n, k in enumerate(SHAPES) if (n + step) % 5 == 0)
        grads = tree(step)
        take(opt, params, step, missing)
        for k in SHAPES.keys() - missing:
            steps[k] += 1
            decay, lr = (0.9, 0.1 / step) if k < "c" else (0.5, 0.02)
            expected[k] = by_hand(expected[k], grads[k], states[k], steps[k], decay, lr)
    close({k: p.detach() for k, p in params.items()}, expected)
    assert {k: float(opt.state[p]["step"]) for k, p in params.items()} == steps
    assert sorted(opt.state[params["a"]]) == ["gram", "mu", "rows", "step", "total"]
    assert sorted(opt.state[params["b"]]) == ["gram", "mu", "step", "total"]


def test_a_checkpoint_goes_on_with_the_same_bits() -> None:
    (opt, params), (other, copies) = optimizer(), optimizer()
    for step in range(5):
        take(opt, params, step)
    buffer = io.BytesIO()
    torch.save((opt.state_dict(), {k: p.detach() for k, p in params.items()}), buffer)
    buffer.seek(0)
    state, content = torch.load(buffer, weights_only=True)
    other.load_state_dict(state)
    with torch.no_grad():
        for k, p in copies.items():
            p.copy_(content[k])
    twin, twins = copy.deepcopy((opt, params))
    for step in range(5, 10):
        take(opt, params, step)
        take(other, copies, step)
        take(twin, twins, step)
    assert_same_bits(copies, params)
    assert_same_bits(twins, params)

    state["state"][0]["rows"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"'rows' of 'a' has shape \(3,\), but it has \(4,\)"):
        other.load_state_dict(state)


def test_random_numbers_differ_from_leaf_to_leaf() -> None:
    @fo.leafwise
    def noise(u: Any) -> Any:
        return u + torch.randn_like(u)

    zeros = {"a": torch.zeros(8), "b": torch.zeros(8), "c": torch.zeros(3)}
    updates, _ = noise().update(zeros, noise().init(zeros))
    assert not torch.equal(updates["a"], updates["b"])


def test_masks_and_partitions_choose_its_leaves() -> None:
    seen = []

    @fo.leafwise(state={"mu": fo.zeros})
    def watch(u: Any, mu: Any) -> Any:
        seen.append(tuple(u.shape))
        return u, mu + u

    is_matrix = lambda path, p: p.ndim == 2  # noqa: E731
    params = tree(0)
    for tx in (fo.masked(watch(), is_matrix), fo.partition({True: watch(), False: fo.sgd(0.1)}, is_matrix)):
        state = tx.init(params)
        for step in range(2):
            fo.apply_gradients(tx, params, tree(step), state)
    assert set(seen) == {(4, 3)}

    opt = TransformOptimizer(list(map(nn.Parameter, params.values())), fo.masked(watch(), is_matrix))
    take(opt, dict(zip(params, opt.param_groups[0]["params"], strict=True)), 0)
    assert [sorted(opt.state[p]) for p in opt.param_groups[0]["params"]] == [["mu"], [], ["mu"], [], [], ["mu"]]


def test_results_are_stored_in_the_dtypes_of_gradients_and_slots() -> None:
    @fo.leafwise(state={"mu": fo.slot(dtype=torch.bfloat16), "seen": fo.slot(dtype=torch.int8)})
    def mean(u: Any, mu: Any, seen: Any) -> Any:
        assert mu.dtype is torch.bfloat16
        new = mu.double() + u.double()
        return new, new, seen + 1

    for shape in ((2, 2), ()):
        grads = {k: torch.ones(shape) for k in "ab"}
        updates, state = mean().update(grads, mean().init(grads))
        assert {x.dtype for x in updates.values()} == {torch.float32}
        assert {x.dtype for x in state.mu.values()} == {torch.bfloat16}
        assert {x.dtype for x in state.seen.values()} == {torch.int8}


def test_slots_of_whole_numbers_go_through_checkpoints() -> None:
    for slot in (fo.slot(dtype=torch.int8), fo.slot(dtype=torch.int64, per="leaf"), fo.slot(dtype=torch.bool)):

        @fo.leafwise(state={"q": slot})
        def keep(u: Any, q: Any) -> Any:
            return u, ~q if q.dtype is torch.bool else q + 1

        ours, theirs = ([nn.Parameter(p) for p in tree(0).values()] for _ in range(2))
        opts = [TransformOptimizer(params, fo.chain(keep(), fo.scale(-0.1))) for params in (ours, theirs)]
        take(opts[0], dict(zip(SHAPES, ours, strict=True)), 1)
        opts[1].load_state_dict(opts[0].state_dict())
        assert_same_bits([opts[1].state[p]["q"] for p in theirs], [opts[0].state[p]["q"] for p in ours])
        saved = opts[0].state_dict()
        saved["state"][0]["q"] = saved["state"][0]["q"].float()
        with pytest.raises(ValueError, match=r"has dtype torch.float32, but the chain keeps it as"):
            opts[1].load_state_dict(saved)


def test_a_start_may_depend_on_hypers_and_be_missing() -> None:
    def start(p: Any, eps: float) -> Any:
        return eps * torch.eye(p.shape[0], dtype=p.dtype) if p.ndim == 2 else None

    @fo.leafwise(state={"left": fo.slot(start)}, static=("eps",))
    def side(u: Any, left: Any, *, eps: float = 0.5) -> Any:
        return u, left if left is None else left + u @ u.T

    state = side(eps=0.25).init(tree(0))
    assert_same_bits(state.left["a"], 0.25 * torch.eye(4, dtype=torch.float64))
    assert isinstance(state.left["b"], fo.MaskedNode)
    _, state = side(eps=0.25).update(tree(1), state)
    g = tree(1)["a"]
    close(state.left["a"], 0.25 * torch.eye(4, dtype=torch.float64) + g @ g.T)


def test_an_error_of_the_function_names_the_rule_and_the_leaf() -> None:
    @fo.leafwise
    def fails(u: Any) -> Any:
        return u @ u

    with pytest.raises(RuntimeError) as caught:
        fails().update({"w": torch.ones(2, 3)}, fails().init({"w": torch.ones(2, 3)}))
    assert "in fails, for a tensor of shape (2, 3) at 'w'" in caught.value.__notes__


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_an_error_of_the_function_does_not_end_batching(error: type[Exception]) -> None:
    """The step after a caller's mistake is batched as before; an error that is no RuntimeError is raised at once."""
    shapes: list[tuple[bool, int]] = []

    @fo.leafwise
    def scaled(u: Any, *, by: Any = 1.0) -> Any:
        shapes.append((torch._C._functorch.is_batchedtensor(u), u.ndim))
        if by is not None and by > 2:
            raise error("by is at most 2")
        return by * u

    params = {k: nn.Parameter(torch.ones(3, 2)) for k in "abc"}
    opt = TransformOptimizer(list(params.items()), scaled())
    for p in params.values():
        p.grad = torch.ones_like(p)
    opt.step()
    assert shapes == [(True, 2)]
    opt.param_groups[0]["by"] = 3.0
    with pytest.raises(error, match="by is at most 2") as caught:
        opt.step()
    assert "in scaled, for a tensor of shape (3, 2) at 'a'" in caught.value.__notes__
    assert shapes[1:] == [(True, 2), (False, 2)][: 1 if error is ValueError else 2]
    opt.param_groups[0]["by"] = 1.0
    del shapes[:]
    opt.step()
    assert shapes == [(True, 2)]


def test_memory_that_runs_out_is_no_sign_of_a_function_that_cannot_be_batched() -> None:
    """The step is not computed leaf by leaf, then or later: it would be slow for ever, and nobody would know."""
    called, short = [], [False]

    @fo.leafwise
    def double(u: torch.Tensor) -> torch.Tensor:
        called.append(1)
        if short.pop():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return u * 2

    tx, grads = double(), {k: torch.ones(3) for k in "abcd"}
    state = tx.init(grads)
    for expected in (False, True, False, False):
        called.clear()
        short.append(expected)
        if expected:
            with pytest.raises(torch.OutOfMemoryError):
                tx.update(grads, state, grads)
        else:
            tx.update(grads, state, grads)
        assert len(called) == 1


def test_an_error_for_one_leaf_names_it() -> None:
    @fo.leafwise
    def solved(u: Any) -> Any:
        return torch.linalg.solve(u, torch.ones(2, 1)).expand(2, 2)

    grads = {"a": torch.eye(2), "b": torch.zeros(2, 2), "c": torch.eye(2)}
    with pytest.raises(RuntimeError, match="singular") as caught:
        solved().update(grads, solved().init(grads))
    assert "in solved, for a tensor of shape (2, 2) at 'b'" in caught.value.__notes__


def test_schedules_are_given_whole_numbers() -> None:
    table = [0.5, 0.25, 0.125]

    @fo.leafwise
    def scaled(u: Any, *, rate: Any) -> Any:
        return -rate * u

    p = nn.Parameter(torch.ones(2))
    opt = TransformOptimizer([p], scaled(lambda count: table[count]))
    for _ in table:
        p.grad = torch.ones(2)
        opt.step()
    assert_same_bits(p.detach(), torch.full((2,), 1 - sum(table)))


@pytest.mark.parametrize("declare", [fo.elementwise, fo.leafwise])
def test_the_first_step_is_known_without_slots(declare: Any) -> None:
    @declare
    def skip(u: Any, *, first: Any) -> Any:
        return torch.where(first, torch.zeros_like(u), u)

    tx = fo.chain(skip(), fo.scale(-1.0))
    params, p = {"w": torch.zeros(2)}, nn.Parameter(torch.zeros(2))
    state, opt = tx.init(params), TransformOptimizer([p], tx)
    for step in range(3):
        params, state = fo.apply_gradients(tx, params, {"w": torch.ones(2)}, state)
        p.grad = torch.ones(2)
        opt.step()
        assert_same_bits((params["w"], p.detach()), (torch.full((2,), 0.0 - step),) * 2)


# -- transformations --------------------------------------------------------------------------------------------------


def test_derivatives_and_batches_go_through_it() -> None:
    params = {k: p for k, p in tree(0).items() if k in "abc"}
    tx = whiten()

    def run(lr: torch.Tensor, grads: Any) -> torch.Tensor:
        tx = whiten(lr=lr)
        p, state = params, tx.init(params)
        for _ in range(2):
            p, state = fo.apply_gradients(tx, p, grads, state)
        return sum((x.square().sum() for x in p.values()), torch.zeros((), dtype=torch.float64))

    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    grads = {k: tree(1)[k].requires_grad_() for k in params}
    assert torch.autograd.gradcheck(lambda lr, *g: run(lr, dict(zip(params, g, strict=True))), (lr, *grads.values()))

    stacked = {k: torch.stack([tree(1)[k], tree(2)[k]]) for k in params}
    state = tx.init(params)
    both, _ = torch.func.vmap(lambda g: tx.update(g, state, params))(stacked)
    for n in range(2):
        one, _ = tx.update({k: g[n] for k, g in stacked.items()}, state, params)
        close({k: x[n] for k, x in both.items()}, one)


def test_it_prints_compares_and_pickles() -> None:
    assert repr(whiten(lr=0.5)) == "whiten(lr=0.5)"
    assert whiten(lr=0.5) == whiten(lr=0.5) != whiten()
    assert pickle.loads(pickle.dumps(whiten(lr=0.5))) == whiten(lr=0.5)
    assert "whiten computes whole tensors" in str(fo.explain(whiten(), tree(0)))


# -- refusals ---------------------------------------------------------------------------------------------------------

BAD = {
    "another shape": (lambda u, mu: (u.sum(0), mu), r"for `u` at 'a' a tensor of shape \(3,\), expected \(4, 3\)"),
    "another shape of a slot": (lambda u, mu: (u, mu.sum(0)), r"for `mu` at 'a' a tensor of shape \(3,\)"),
    "a number": (lambda u, mu: (0.5, mu), r"for `u` at 'a' 0.5, expected a tensor"),
    "whole numbers": (lambda u, mu: (u.int(), mu), r"torch.int32, expected torch.float64; convert it"),
    "a sparse tensor": (
        lambda u, mu: (torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), u[:1, 0], u.shape), mu),
        r"for `u` at 'a' a tensor of the layout torch.sparse_coo, expected a dense one; convert it",
    ),
    "a sparse tensor in a slot": (lambda u, mu: (u, mu.to_sparse()), r"for `mu` at 'a' a tensor of the layout"),
    "one result": (lambda u, mu: u, r"returned 1 results, expected 2: \(u, mu\)"),
    "a change in place": (lambda u, mu: (u, mu.add_(u)), r"changes its argument `mu` in place; make a new tensor"),
    "a change of the gradient": (lambda u, mu: (u.neg_(), mu), r"changes its argument `u` in place"),
}


@pytest.mark.parametrize("shapes", [("a",), ("a", "c")], ids=["alone", "batched"])
@pytest.mark.parametrize("name", BAD)
def test_results_that_do_not_fit_are_refused(name: str, shapes: tuple[str, ...]) -> None:
    fn, message = BAD[name]

    def rule(u: Any, mu: Any) -> Any:
        return fn(u, mu)

    tx = fo.leafwise(state={"mu": fo.slot("param")})(rule)()
    params = {k: tree(0)[k] for k in shapes}
    grads, state = {k: tree(1)[k] for k in shapes}, tx.init(params)
    before = Snapshot(params, grads, state)
    for donate in (False, True):
        with pytest.raises(fo.RuleError, match=message):
            fo.apply_gradients(tx, params, grads, state, donate=donate)
        before.check()

    opt = TransformOptimizer([(k, nn.Parameter(p)) for k, p in params.items()], tx)
    own = dict(zip(shapes, opt.param_groups[0]["params"], strict=True))
    with pytest.raises(fo.RuleError, match=message):
        take(opt, own, 1)
    assert_same_bits(own, params)
    assert not opt.state


def test_a_fault_of_a_later_step_changes_nothing() -> None:
    @fo.leafwise(state={"mu": fo.zeros})
    def positive(u: Any, mu: Any, *, limit: Any = 9.0) -> Any:
        if float(limit) < 1:
            raise ArithmeticError("of the rule")
        return u, mu + u

    params = {k: nn.Parameter(p) for k, p in tree(0).items()}
    opt = TransformOptimizer(params.items(), fo.chain(fo.trace(0.9), positive(), fo.scale(0.1)))
    take(opt, params, 0)
    before = copy.deepcopy((opt.state_dict(), params))
    opt.param_groups[0]["limit"] = 0.5
    with pytest.raises(ArithmeticError, match="of the rule"):
        take(opt, params, 1)
    opt.param_groups[0]["limit"] = 9.0
    assert_same_bits((opt.state_dict(), params), before)


def test_what_it_cannot_be_given_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`mu` of rule has a shape of its own, .* with `leafwise`"):

        @fo.elementwise(state={"mu": fo.slot(shape=lambda p: p.shape[:1])})
        def rule(u: Any, mu: Any) -> Any:
            return u, mu

    with pytest.raises(ValueError, match="a slot with a shape of its own starts from a number"):
        fo.slot("param", shape=lambda p: p.shape)

    p = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"whiten needs real numbers, but .* is torch.complex64"):
        TransformOptimizer([p], whiten()).step()

    opt, params = optimizer()
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with pytest.raises(ValueError, match="loss scale reach transformations that torch operations"):
        take(opt, params, 0)

    state = whiten().init(tree(0))
    wrong = state._replace(rows={**state.rows, "a": torch.zeros(3, dtype=torch.float64)})
    with pytest.raises(ValueError, match=r"state whiten.rows at 'a' is \(3,\) on cpu, but the rule declares .*\(4,\)"):
        fo.apply_gradients(whiten(), tree(0), tree(1), wrong)


@fo.leafwise(state={"mu": fo.slot("first_update")})
def averaged(u: Any, mu: Any, *, step: Any) -> Any:
    """A running mean of the updates."""
    mu = mu + (u - mu) / step
    return mu, mu


def test_a_default_device_does_not_reach_into_a_step() -> None:
    p = nn.Parameter(torch.ones(2, 3))
    opt = TransformOptimizer([p], averaged())
    for value in (1.0, 2.0, 6.0):
        p.grad = torch.full_like(p, value)
        with torch.device("meta"):
            opt.step()
    # the means are 1, 1.5 and 3
    torch.testing.assert_close(p.detach(), torch.full((2, 3), 6.5))
