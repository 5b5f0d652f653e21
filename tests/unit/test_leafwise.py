"""Chains over leaves with counters and options of their own, beside the pure API run for each leaf by itself."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from functional_optim.leafwise import Leafwise, Leaves, Option, Template

import functional_optim as fo
from _lib.chains import halving
from _lib.marks import INTERPRETER
from functional_optim import leafwise


pytestmark = INTERPRETER

BACKENDS = ("reference", "foreach", "c", "triton")
SHAPES = ((4, 3), (5,), (), (2, 0), (3, 2, 2))


def named(tx: fo.GradientTransformation) -> Template:
    """A template whose slots have their own names, each with its place in the chain."""
    return Template(
        tx,
        {
            (path, slot): f"{slot}{'.'.join(map(str, path))}"
            for path, rule in leafwise.rules(tx).items()
            for slot in rule.bound.rule.slots
        },
    )


def make_leaves(dtype: torch.dtype = torch.float64, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> Leaves:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    n = len(params)
    names = [f"p{k}" for k in range(n)]
    return Leaves(lambda: names, params, [None] * n, [{} for _ in range(n)], [0] * n, [0] * n, list(range(n)))


def gradients(leaves: Leaves, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in leaves.params]


def on_the_host(count: Any) -> float:
    """A schedule that cannot."""
    return [0.5, 0.4, 0.3, 0.2, 0.1][int(count) % 5]


CHAINS: dict[str, Callable[[Any], fo.GradientTransformation]] = {
    "sgd": lambda lr: fo.sgd(lr),
    "momentum": lambda lr: fo.sgd(lr, momentum=0.9, nesterov=True),
    "adamw": lambda lr: fo.adamw(lr, weight_decay=0.1),
    "lamb, a norm of every leaf": lambda lr: fo.lamb(lr),
    "a traced schedule": lambda lr: fo.chain(fo.scale_by_schedule(halving), fo.adam(lr)),
    "a schedule on the host": lambda lr: fo.chain(fo.scale_by_schedule(on_the_host), fo.adam(lr)),
    "a mask": lambda lr: fo.adamw(lr, weight_decay=0.1, mask=re.compile("p[02]")),
    "a partition": lambda lr: fo.partition(
        {"a": fo.adam(lr), "b": fo.sgd(lr, momentum=0.9)}, lambda path, p: "a" if p.ndim > 1 else "b"
    ),
    "averages": lambda lr: fo.chain(fo.lion(lr), fo.params_ema(0.9)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chain", CHAINS)
def test_each_leaf_is_as_if_it_were_alone(chain: str, backend: str) -> None:
    """Leaves miss steps at different times, and have different learning rates, in one run over all of them."""
    rates = [0.1, 0.01, 0.2]
    template = named(CHAINS[chain](Option("lr")))
    leaves = make_leaves()._replace(owners=[k % 3 for k in range(len(SHAPES))])
    alone = [{f"p{k}": p.clone()} for k, p in enumerate(leaves.params)]
    txs = [CHAINS[chain](rates[k % 3]) for k in range(len(SHAPES))]
    with pytest.warns(UserWarning, match="matches no parameter") if chain == "a mask" else _nothing():
        states = [tx.init(p) for tx, p in zip(txs, alone, strict=True)]
    run = Leafwise()
    with fo.use_backend(backend):
        for step in range(20):
            grads = gradients(leaves, step)
            given = [None if (step + k) % 4 == 0 else g for k, g in enumerate(grads)]
            run.step([template], leaves._replace(grads=given), [{"lr": rate} for rate in rates])
            for k, g in enumerate(given):
                if g is not None:
                    with fo.use_backend("reference"):
                        alone[k], states[k] = fo.apply_gradients(txs[k], alone[k], {f"p{k}": g}, states[k])
    for k, p in enumerate(leaves.params):
        # the same operations in the same order in double precision; norms are added up in another one, and Triton's
        # interpreter has its own powers: a few units of 2**-53 in each of twenty steps
        torch.testing.assert_close(p, alone[k][f"p{k}"], rtol=1e-13, atol=1e-14)
        if "step" in leaves.states[k]:
            assert leaves.states[k]["step"] == sum((step + k) % 4 != 0 for step in range(20))


def exchange(xs: list[Any]) -> None:
    xs[0], xs[1] = xs[1], xs[0]


IN_PLACE: dict[str, Callable[[Leaves], object]] = {
    "owners": lambda x: x.owners.__setitem__(0, 1),
    "templates": lambda x: x.templates.__setitem__(0, 1),
    "params": lambda x: x.params.__setitem__(0, x.params[0].detach().clone().requires_grad_()),
    "params and states": lambda x: (exchange(x.params), exchange(x.states)),
    "states": lambda x: x.states.__setitem__(0, {k: v.clone() for k, v in x.states[0].items()}),
    "fewer": lambda x: [xs.pop() for xs in (x.params, x.states, x.templates, x.owners, x.ids)],
}


@pytest.mark.parametrize("change", IN_PLACE)
def test_leaf_lists_changed_in_place_are_read_anew(change: str) -> None:
    """Steps that are taken from memory notice it."""
    templates = [named(fo.sgd(Option("lr"), momentum=decay)) for decay in (0.5, 0.9)]
    options, results = [{"lr": 0.1}, {"lr": 0.3}], []
    for remembers in (True, False):
        shapes = ((4,),) * 6
        leaves = make_leaves(shapes=shapes)._replace(grads=None)
        names = [f"p{k}" for k in range(len(shapes))]
        leaves = leaves._replace(names=lambda n=leaves.params: names[: len(n)])
        run = Leafwise()
        for step in range(8):
            if step == 5:
                IN_PLACE[change](leaves)
            for p, g in zip(leaves.params, gradients(leaves, step), strict=True):
                p.grad = g
            with torch.no_grad():
                (run if remembers else Leafwise()).step(templates, leaves, options)
        results.append((leaves.params, leaves.states))
    torch.testing.assert_close(*results, rtol=0, atol=0)


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_of_the_tree_spans_all_options(backend: str) -> None:
    tx = fo.chain(fo.clip_by_global_norm(0.5), fo.scale_by_learning_rate(Option("lr")))
    leaves = make_leaves()._replace(owners=[0, 1, 0, 1, 0])
    before = [p.clone() for p in leaves.params]
    grads = gradients(leaves, 1)
    norm = torch.sqrt(sum((g**2).sum() for g in grads))  # type: ignore[arg-type]
    with fo.use_backend(backend):
        Leafwise().step([named(tx)], leaves._replace(grads=list(grads)), [{"lr": 1.0}, {"lr": 0.25}])
    for k, (p, g) in enumerate(zip(leaves.params, grads, strict=True)):
        torch.testing.assert_close(p, before[k] - (1.0, 0.25)[k % 2] * g * 0.5 / norm, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_different_chains_share_one_run(backend: str) -> None:
    templates = [named(fo.adam(Option("lr"))), named(fo.sgd(Option("lr"), momentum=0.9))]
    leaves = make_leaves()._replace(templates=[0, 1, 0, 1, 0])
    alone = [p.clone() for p in leaves.params]
    txs = [fo.adam(0.1), fo.sgd(0.1, momentum=0.9)]
    states = [txs[k % 2].init(p) for k, p in enumerate(alone)]
    run = Leafwise()
    for step in range(20):
        grads = gradients(leaves, step)
        with fo.use_backend(backend):
            run.step(templates, leaves._replace(grads=list(grads)), [{"lr": 0.1}])
        for k, g in enumerate(grads):
            with fo.use_backend("reference"):
                alone[k], states[k] = fo.apply_gradients(txs[k % 2], alone[k], g, states[k])
    for p, q in zip(leaves.params, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-14)


@fo.elementwise(state={"sum": fo.slot(0.0)})
def later_ones_count_half(u: Any, sum: Any, *, first: Any) -> tuple[Any, Any]:
    """A rule whose first step differs."""
    sum = torch.where(first, u, sum + 0.5 * u)
    return sum, sum


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_step_is_each_leafs_own(backend: str) -> None:
    template = named(fo.chain(later_ones_count_half(), fo.scale(-1.0)))
    leaves = make_leaves(shapes=((2,), (2,)))
    run = Leafwise()
    ones = [torch.ones(2, dtype=torch.float64) for _ in range(2)]
    with fo.use_backend(backend):
        run.step([template], leaves._replace(grads=[ones[0], None]), [{}])
        run.step([template], leaves._replace(grads=ones), [{}])
    assert leaves.states[0]["sum0"].tolist() == [1.5, 1.5]
    assert leaves.states[1]["sum0"].tolist() == [1.0, 1.0]
    assert "step" not in leaves.states[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_guarded_step_with_an_infinite_gradient_changes_nothing(backend: str) -> None:
    template = named(fo.chain(later_ones_count_half(), fo.clip_by_global_norm(10.0), fo.adam(0.1)))
    leaves, other = make_leaves(), make_leaves()
    run, plain = Leafwise(), Leafwise()
    scale, no, yes = torch.tensor(4.0), torch.tensor(0.0), torch.tensor(1.0)
    for step in range(4):
        grads = gradients(leaves, step)
        infinite = [torch.full_like(g, torch.inf) for g in grads]
        scaled = [4 * g for g in grads]
        with fo.use_backend(backend):
            before = [p.clone() for p in leaves.params], [{k: x.clone() for k, x in s.items()} for s in leaves.states]
            overflow = {"grad_scale": scale, "found_inf": yes}
            run.step([template], leaves._replace(grads=list(infinite)), [{}], overflow, guarded=True)
            assert all(torch.equal(p, q) for p, q in zip(leaves.params, before[0], strict=True))
            for now, then in zip(leaves.states, before[1], strict=True):
                assert all(torch.equal(now[k], x) for k, x in then.items())
            run.step(
                [template], leaves._replace(grads=list(scaled)), [{}], {"grad_scale": scale, "found_inf": no}, True
            )
            plain.step([template], other._replace(grads=list(grads)), [{}])
    for p, q in zip(leaves.params, other.params, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)  # dividing by a power of two is exact
    for s, t in zip(leaves.states, other.states, strict=True):
        assert s.keys() == t.keys()
        assert all(torch.equal(s[k], t[k]) for k in s)


def test_option_values_share_a_program() -> None:
    template = named(fo.adamw(Option("lr"), b1=Option("betas", 0), b2=Option("betas", 1), weight_decay=Option("decay")))
    leaves, run = make_leaves(), Leafwise()
    for k in range(4):
        options = {"lr": torch.tensor(0.1) if k % 2 else 0.1 * k, "betas": (0.9 - k / 10, 0.99), "decay": k / 100}
        run.step([template], leaves._replace(grads=gradients(leaves, k)), [options])  # type: ignore[arg-type]
        if k == 0:
            signatures = [g.signature for s in run.layouts[0].plan.segments for p in s.recent for g in p.groups]  # type: ignore[union-attr]
    assert len(run.layouts) == 1
    assert [g.signature for s in run.layouts[0].plan.segments for p in s.recent for g in p.groups] == signatures  # type: ignore[union-attr]


# What users and libraries do to a state behind the optimizer's back; each returns what the next step must start from.


def fill(state: dict[str, Any]) -> None:
    state["mu0"].fill_(1.0)


def replace(state: dict[str, Any]) -> None:
    state["mu0"] = torch.ones_like(state["mu0"])


def set_data(state: dict[str, Any]) -> None:
    state["mu0"].data = torch.ones_like(state["mu0"])


def swap(state: dict[str, Any]) -> None:
    torch.utils.swap_tensors(state["mu0"], torch.ones_like(state["mu0"]))


def set_memory(state: dict[str, Any]) -> None:
    state["mu0"].set_(torch.ones_like(state["mu0"]))


def fill_a_view(state: dict[str, Any]) -> None:
    state["mu0"].view(-1).fill_(1.0)


@torch.no_grad()
@pytest.mark.parametrize(("size", "n"), [(4, 3), (4, 30), (200, 3)])
@pytest.mark.parametrize("change", [fill, replace, set_data, swap, set_memory, fill_a_view], ids=lambda f: f.__name__)
def test_state_changed_between_steps_is_read_anew(change: Callable[[dict[str, Any]], None], size: int, n: int) -> None:
    template = named(fo.adam(0.1))
    leaves, run = make_leaves(shapes=((size, size),) * n), Leafwise()
    for k in range(3):
        run.step([template], leaves._replace(grads=gradients(leaves, k)), [{}])  # type: ignore[arg-type]
    change(leaves.states[1])
    start = [p.clone() for p in leaves.params]
    states = [{k: x.clone() for k, x in s.items()} for s in leaves.states]
    assert (states[1]["mu0"] == 1).all()
    run.step([template], leaves._replace(grads=gradients(leaves, 9)), [{}])  # type: ignore[arg-type]
    again = leaves._replace(params=start, states=states, ids=list(range(7, 7 + n)), grads=gradients(leaves, 9))  # type: ignore[arg-type]
    Leafwise().step([template], again, [{}])
    for p, q in zip(leaves.params, start, strict=True):
        assert torch.equal(p, q)


def turn(state: dict[str, Any]) -> None:
    state["mu0"].t_()


def put_a_view(state: dict[str, Any]) -> None:
    state["mu0"] = state["mu0"].t()


@torch.no_grad()
@pytest.mark.parametrize("n", [2, 30])
@pytest.mark.parametrize("change", [turn, put_a_view], ids=lambda f: f.__name__)
def test_transposed_state_is_refused(change: Callable[[dict[str, Any]], None], n: int) -> None:
    template = named(fo.adam(0.1))
    leaves, run = make_leaves(shapes=((4, 3),) * n), Leafwise()
    for k in range(3):
        run.step([template], leaves._replace(grads=gradients(leaves, k)), [{}])  # type: ignore[arg-type]
    change(leaves.states[0])
    before = [p.clone() for p in leaves.params]
    with pytest.raises(ValueError, match=r"state scale_by_adam.mu at 'p0' has shape \(3, 4\)"):
        run.step([template], leaves._replace(grads=gradients(leaves, 9)), [{}])  # type: ignore[arg-type]
    assert all(torch.equal(p, q) for p, q in zip(leaves.params, before, strict=True))


def test_a_failed_step_leaves_no_state_behind() -> None:
    leaves = make_leaves(shapes=((2,), (2,)))
    grads = [torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)]
    with pytest.raises(TypeError, match="`value` is needed"):
        Leafwise().step([named(fo.chain(fo.trace(0.9), wants_value()))], leaves._replace(grads=list(grads)), [{}])
    assert leaves.states == [{}, {}]


@fo.elementwise(extra=("value",))
def wants_value(u: Any, *, value: Any) -> Any:
    """A rule that takes an extra argument."""
    return u * value


def test_an_option_that_is_not_there() -> None:
    leaves = make_leaves(shapes=((2,),))
    with pytest.raises(KeyError, match="lacks 'lr', which scale_by_learning_rate"):
        Leafwise().step([named(fo.sgd(Option("lr")))], leaves._replace(grads=[leaves.params[0].clone()]), [{}])


def test_the_pure_api_has_no_options() -> None:
    tx = fo.sgd(Option("lr"))
    with pytest.raises(TypeError, match=r"is Option\(name='lr'"):
        tx.update(torch.ones(2), tx.init(torch.ones(2)))


class Counting(fo.GradientTransformation):
    """Not made of rules: a sum per parameter, and a counter for all of them."""

    def __init__(self) -> None:
        super().__init__(self.start, self.run)

    @staticmethod
    def start(params: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "count": torch.zeros(()),
            "sums": {k: None if p is None else torch.zeros_like(p) for k, p in params.items()},
        }

    @staticmethod
    def run(updates: Mapping[str, Any], state: Any, params: Any = None) -> tuple[Any, Any]:
        sums = {k: s if updates[k] is None else s + updates[k] for k, s in state["sums"].items()}
        new = {k: None if u is None else sums[k] for k, u in updates.items()}
        return new, {"count": state["count"] + 1, "sums": sums}


def test_a_transformation_that_is_not_made_of_rules_keeps_its_state_with_the_leaves() -> None:
    template = named(fo.chain(fo.scale(2.0), Counting(), fo.scale(-1.0)))
    leaves, run = make_leaves(shapes=((2,), (2,))), Leafwise()
    ones = [torch.ones(2, dtype=torch.float64) for _ in range(2)]
    leaves.params[:] = [torch.zeros(2, dtype=torch.float64) for _ in range(2)]
    run.step([template], leaves._replace(grads=ones), [{}])
    run.step([template], leaves._replace(grads=[None, ones[1]]), [{}])
    run.step([template], leaves._replace(grads=ones), [{}])
    assert [p.tolist() for p in leaves.params] == [[-6.0, -6.0], [-12.0, -12.0]]
    assert [s["transformation_1.count"].item() for s in leaves.states] == [3.0, 3.0]
