"""Steps of many members at once by `torch.func.vmap`: each member's are those that it takes alone, to the bit."""

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import (
    example,
    given,
    settings,
    strategies as st,
)
from torch import nn
from torch.func import functional_call, grad, grad_and_value, stack_module_state, vmap

import functional_optim as fo
from _lib.chains import CHAINS, STEPS, cautious, is_matrix, remember_first, scale_by_value, watch
from _lib.compare import DOUBLE, assert_alike, assert_same_bits
from _lib.scripts import load_script
from _lib.trees import BF16, F32, F64, Tree, tensors, tree_map


N = 3
SHAPES: dict[str, tuple[int, ...]] = {"weight": (4, 3), "bias": (3,), "gain": (), "none": (0, 2)}


CASES: dict[str, Any] = CHAINS | {
    "lamb": fo.lamb(1e-2, weight_decay=0.1),
    "first updates and numbers per leaf": fo.chain(remember_first(), fo.scale(-0.1)),
    "a number of the tree": fo.chain(fo.trace(0.9), watch(), fo.scale(-0.1)),
    "a rule around others": cautious(fo.adam(1e-2)),
    "moments in bfloat16": fo.adamw(1e-2, mu_dtype=BF16),
    "numbers that signs choose": fo.rprop(1e-2),
    "whole matrices": fo.muon(1e-2),
    "factored moments": fo.adafactor(1e-2, min_dim_size_to_factor=2),
}
# operations of torch compute these, and round differently for one matrix and for a stack
IN_OPERATIONS = {"whole matrices", "factored moments"}


def stacks(seed: int, n: int = N, dtype: torch.dtype = F32) -> dict[str, torch.Tensor]:
    """The leaves of `n` members."""
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn((n, *s), generator=generator, dtype=F64).to(dtype) for k, s in SHAPES.items()}


def member(tree: Tree, k: Any) -> Tree:
    """The tensors of one member."""
    return tree_map(lambda x: x[k].clone() if isinstance(x, torch.Tensor) else x, tree)


def joined(trees: list[Tree]) -> Tree:
    """The trees of members as one, of stacked tensors."""
    return tree_map(lambda *xs: torch.stack(xs) if isinstance(xs[0], torch.Tensor) else xs[0], *trees)


@pytest.mark.parametrize("name", CASES)
def test_members_step_as_they_do_alone(name: str) -> None:
    tx = CASES[name]
    starts = stacks(0)
    alone = []
    for k in range(N):
        params = member(starts, k)
        state = tx.init(params)
        for t in range(STEPS):
            params, state = fo.apply_gradients(tx, params, member(stacks(t + 1), k), state)
        alone.append((params, state))

    params, state = starts, vmap(tx.init)(starts)
    for t in range(STEPS):
        params, state = vmap(lambda p, g, s: fo.apply_gradients(tx, p, g, s))(params, stacks(t + 1), state)

    (assert_alike if name in IN_OPERATIONS else assert_same_bits)((params, state), joined(alone))


def test_updates_of_members() -> None:
    tx = fo.chain(fo.clip_by_global_norm(0.5), fo.adam(1e-2))
    grads = stacks(1)
    state = vmap(tx.init)(grads)
    expected = [tx.update(member(grads, k), tx.init(member(grads, k))) for k in range(N)]

    assert_same_bits(vmap(tx.update)(grads, state), joined(expected))


# --- hyper-parameters of members

RATES = torch.tensor([0.1, 0.02, 3e-3], dtype=F64)
HYPERS: dict[str, Callable[[Any], Any]] = {
    "learning rate": lambda x: fo.adamw(x),
    "several": lambda x: fo.chain(
        fo.clip_by_global_norm(10 * x), fo.adamw(x, b1=1 - x, weight_decay=x, mask=is_matrix)
    ),
    "in a schedule": lambda x: fo.sgd(fo.cosine_decay_schedule(x, STEPS), 0.9),
    "in a part": lambda x: fo.partition({True: fo.sgd(x), False: fo.adam(1e-2)}, is_matrix),
    "masked by a pattern": lambda x: fo.masked(fo.sgd(x), re.compile("weight")),
    "in a named chain": lambda x: fo.named_chain(("a", fo.trace(0.9)), ("b", fo.scale(-1.0 * x))),
    "around a rule": lambda x: cautious(fo.adam(x)),
    "where a state starts": lambda x: fo.chain(fo.scale_by_rss(initial_accumulator_value=x), fo.rprop(x)),
    "beside a function": lambda x: fo.chain(fo.stateless(lambda u, p: tree_map(lambda y: 2 * y, u)), fo.sgd(x)),
    "of whole matrices": lambda x: fo.muon(x),
    "in a function of the step": lambda x: fo.sgd(lambda count: x * 0.5**count),
}


@pytest.mark.parametrize("name", HYPERS)
def test_members_with_hyper_parameters_of_their_own(name: str) -> None:
    make, starts = HYPERS[name], stacks(0)
    alone = []
    for k in range(N):
        tx, params = make(RATES[k]), member(starts, k)
        state = tx.init(params)
        for t in range(3):
            params, state = fo.apply_gradients(tx, params, member(stacks(t + 1), k), state)
        alone.append((params, state))

    def step(x: Any, p: Any, g: Any, s: Any) -> Any:
        return fo.apply_gradients(make(x), p, g, s)  # the chain is made anew at every step

    params, state = starts, vmap(lambda x, p: make(x).init(p))(RATES, starts)
    for t in range(3):
        params, state = vmap(step)(RATES, params, stacks(t + 1), state)

    # anything but a table of numbers is computed in operations of torch
    close = {"of whole matrices", "in a function of the step"}
    (assert_alike if name in close else assert_same_bits)((params, state), joined(alone))


def test_a_number_of_another_step_is_not_kept() -> None:
    """Chains of one form share kernels, and nothing else."""

    def step(x: Any, p: Any, scale: float) -> Any:
        tx = fo.chain(fo.scale(scale), fo.sgd(x))
        return fo.apply_gradients(tx, p, p, tx.init(p))[0]

    ones = torch.ones(N, 2, dtype=F64)
    for scale in (1.0, 2.0, -0.0, 0.0, 1.0):
        for rates in (RATES, 2 * RATES):
            new = vmap(lambda x, p: step(x, p, scale))(rates, ones)
            assert_same_bits(new, ones - (rates * scale)[:, None])
    negative = vmap(lambda x, p: fo.chain(fo.scale(-0.0), fo.scale(x)).update(p, (fo.EmptyState(),) * 2)[0])(
        RATES, ones
    )
    assert torch.signbit(negative).all()


def test_an_extra_argument_of_each_member() -> None:
    tx, values = fo.chain(scale_by_value(), fo.sgd(1.0)), torch.tensor([1.0, -2.0, 0.5])
    params, grads = stacks(0), stacks(1)
    expected = [
        fo.apply_gradients(tx, member(params, k), member(grads, k), tx.init(member(params, k)), value=values[k])[0]
        for k in range(N)
    ]

    def step(p: Any, g: Any, value: Any) -> Any:
        return fo.apply_gradients(tx, p, g, tx.init(p), value=value)[0]

    assert_same_bits(vmap(step)(params, grads, values), joined(expected))
    assert_same_bits(
        vmap(step, (0, 0, None))(params, grads, values[0]), vmap(lambda p, g: step(p, g, 1.0))(params, grads)
    )


def test_a_chain_whose_arguments_are_stacked_now_and_then() -> None:
    """Tensors of one shape are those of three members, or of one, from call to call."""
    tx, three = fo.chain(scale_by_value(), fo.sgd(1.0)), torch.tensor([1.0, 2.0, 4.0])

    def step(p: Any, g: Any, value: Any) -> Any:
        return fo.apply_gradients(tx, p, g, tx.init(p), value=value)[0]

    for _ in range(2):
        assert_same_bits(vmap(step, (0, 0, None))(three, three, three[1]), -three)
        assert_same_bits(vmap(step)(three, three, three), three - three * three)
        assert_same_bits(vmap(step, (None, None, 0))(three, three, three), three - three[:, None] * three)
        more = torch.arange(5.0)
        assert_same_bits(vmap(step, (None, None, 0))(three, three, more), three - more[:, None] * three)
        assert_same_bits(vmap(step, (0, None, None))(three, three[2], three[0]), three - 4.0)
        assert_same_bits(step(three, three, three[0]), 0 * three)


def test_a_schedule_that_python_evaluates_for_counts_that_differ() -> None:
    tx = fo.sgd(lambda count: [1.0, 10.0, 100.0][int(count) % 3])
    params = torch.zeros(N, 2)
    state = vmap(tx.init)(params)
    state = tree_map(lambda count: torch.tensor([0, 2, 1]), state)

    new, _ = vmap(lambda p, s: fo.apply_gradients(tx, p, torch.ones(2), s))(params, state)

    assert_same_bits(new, -torch.tensor([[1.0, 1.0], [100.0, 100.0], [10.0, 10.0]]))


# --- what is stacked, and how


PIECES: list[Any] = [
    fo.clip_by_global_norm(0.5),
    fo.clip_by_block_rms(0.1),
    fo.scale_by_adam(),
    fo.scale_by_rms(),
    fo.trace(0.9),
    fo.add_decayed_weights(0.1, mask=is_matrix),
    fo.scale_by_trust_ratio(),
    remember_first(),
    fo.scale_by_schedule(fo.linear_schedule(1.0, 0.1, 3)),
    fo.masked(fo.scale(2.0), re.compile("bias")),
    fo.params_ema(0.9),  # behind the last
]
AVERAGE = len(PIECES) - 1


@pytest.mark.slow
@settings(max_examples=20)
@given(
    picked=st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=3, unique=True),
    n=st.sampled_from([1, 2, 5]),
    dtype=st.sampled_from([F32, F64, BF16]),
    stacked=st.tuples(*[st.booleans()] * 4),
    last=st.booleans(),
)
@example(picked=[0, 2], n=2, dtype=F32, stacked=(True,) * 4, last=False)  # a number of each member behind a tree's norm
def test_any_chain_with_any_arguments_stacked(
    picked: list[int], n: int, dtype: torch.dtype, stacked: tuple[bool, ...], last: bool
) -> None:
    """Parameters, gradients, the state, and a hyper-parameter of the step."""
    pieces = [PIECES[k] for k in sorted(picked) if k < AVERAGE]
    behind = PIECES[AVERAGE:] if AVERAGE in picked else []
    rates = torch.linspace(0.1, 0.2, n, dtype=F64)
    trees = [
        stacks(0, n, dtype),
        stacks(1, n, dtype),
        vmap(fo.chain(*pieces, fo.scale(-0.1), *behind).init)(stacks(2, n, dtype)),
    ]
    args = [
        *(x if own else member(x, 0) for x, own in zip(trees, stacked, strict=False)),
        rates if stacked[3] else rates[0],
    ]
    if not (stacked[0] or stacked[1] or stacked[3]):  # a state may hold no tensors
        stacked, args[0] = (True, *stacked[1:]), trees[0]

    def step(p: Any, g: Any, s: Any, rate: Any) -> Any:
        return fo.apply_gradients(fo.chain(*pieces, fo.scale(-1.0 * rate), *behind), p, g, s)

    dims = tuple(0 if own else None for own in stacked)
    if last:  # the members of gradients come last
        args[1] = tree_map(lambda x: x.movedim(0, -1).contiguous(), args[1]) if stacked[1] else args[1]
        dims = (dims[0], -1 if stacked[1] else None, *dims[2:])

    actual = vmap(step, dims)(*args)

    whole = [
        x if own else tree_map(lambda y: y.expand(n, *y.shape), member(x, 0))
        for x, own in zip(trees, stacked, strict=False)
    ]
    alone = [step(*(member(x, k) for x in whole), rates[k] if stacked[3] else rates[0]) for k in range(n)]
    assert_same_bits(joined([member(actual, k) for k in range(n)]), joined(alone))


def test_a_count_that_members_share() -> None:
    tx = fo.adam(1e-2)
    params, state = stacks(0), tx.init(stacks(0))  # stacked leaves, and one counter
    count, mu, nu = state[0].count, state[0].mu, state[0].nu

    def step(p: Any, g: Any, mu: Any, nu: Any) -> Any:
        p, s = fo.apply_gradients(tx, p, g, (state[0]._replace(count=count, mu=mu, nu=nu), *state[1:]))
        return p, s[0].mu, s[0].nu, s[0].count

    *new, after = vmap(step, out_dims=(0, 0, 0, None))(params, stacks(1), mu, nu)

    whole, expected = fo.apply_gradients(tx, params, stacks(1), state)
    assert_same_bits(new, [whole, expected[0].mu, expected[0].nu])
    assert_same_bits(after, expected[0].count)


def test_nested_ensembles() -> None:
    """A grid: learning rates inside, decays outside, gradients of the inner members, parameters of the outer ones."""
    decays, rates = torch.tensor([0.1, 0.0], dtype=F64), RATES
    outer, inner = stacks(0, 2), stacks(1, 3)

    def step(decay: Any, rate: Any, p: Any, g: Any) -> Any:
        tx = fo.chain(fo.clip_by_global_norm(0.5), fo.adamw(rate, weight_decay=decay))
        return fo.apply_gradients(tx, p, g, tx.init(p))

    grid = vmap(vmap(step, (None, 0, None, 0)), (0, None, 0, None))

    expected = [
        joined([step(decays[i], rates[j], member(outer, i), member(inner, j)) for j in range(3)]) for i in range(2)
    ]
    assert_same_bits(grid(decays, rates, outer, inner), joined(expected))
    # members of the outer level come second
    params, turned = expected, vmap(vmap(step, (None, 0, 0, 0)), (0, None, 1, None))
    wanted = [
        joined([step(decays[i], rates[j], member(params[i][0], j), member(inner, j)) for j in range(3)])
        for i in range(2)
    ]
    stacked = {k: torch.stack([row[0][k] for row in params], 1) for k in SHAPES}
    assert_same_bits(turned(decays, rates, stacked, inner), joined(wanted))


@pytest.mark.parametrize("layout", ["columns first", "expanded", "a slice", "of all kinds"])
def test_members_in_memory_that_is_not_one_piece_each(layout: str) -> None:
    tx = fo.adam(1e-1)
    params = {"w": torch.randn(N, 4, 6, generator=torch.Generator().manual_seed(0))}
    made: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "columns first": lambda x: x.movedim(0, 1).transpose(1, 2).contiguous().transpose(1, 2).movedim(1, 0),
        "expanded": lambda x: x[:, :1, :1].expand(N, 4, 6),
        "a slice": lambda x: torch.cat([x, x], -1)[..., ::2],
        "of all kinds": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    }
    p = {"w": made[layout](params["w"])}
    g = p if layout != "of all kinds" else {"w": params["w"]}
    state = vmap(tx.init)(params)

    actual = vmap(lambda p, g, s: fo.apply_gradients(tx, p, g, s))(p, g, state)

    alone = [fo.apply_gradients(tx, member(p, k), member(g, k), tx.init(member(p, k))) for k in range(N)]
    assert_same_bits(actual, joined(alone))


def test_leaves_that_are_absent() -> None:
    tx = fo.adam(1e-1)
    params = stacks(0)
    state = vmap(tx.init)(params)
    grads = {**stacks(1), "bias": None}

    new, after = vmap(lambda p, s: fo.apply_gradients(tx, p, {**p, "bias": None}, s))(params, state)
    alone = [fo.apply_gradients(tx, q := member(params, k), {**q, "bias": None}, tx.init(q)) for k in range(N)]

    assert grads["bias"] is None
    assert_same_bits((new, after), joined(alone))


def test_packed_members() -> None:
    tx = fo.chain(fo.clip_by_global_norm(0.5), fo.adamw(1e-2, mask=is_matrix), fo.params_ema(0.9))
    params, grads = stacks(0), stacks(1)
    p, g = vmap(fo.pack)(params), vmap(fo.pack)(grads)
    state, plain = vmap(tx.init)(p), vmap(tx.init)(params)
    step = vmap(lambda p, g, s: fo.apply_gradients(tx, p, g, s))
    for _ in range(3):
        p, state = step(p, g, state)
        params, plain = step(params, grads, plain)

    assert isinstance(p, fo.Packed)
    assert_same_bits(vmap(fo.unpack)(p), params)
    assert_same_bits(vmap(fo.unpack)(state[2].ema), plain[2].ema)
    assert_same_bits(list(p.buffers), list(vmap(fo.pack)(params).buffers))  # zeros between leaves
    assert repr(p).startswith(f"Packed({len(SHAPES)} leaves in 1 buffer: {N}x")
    for look in (p.tree, lambda: fo.unpack(p), lambda: fo.apply_gradients(tx, p, g, state)):
        with pytest.raises(ValueError, match=r"is a stack of members, .*`vmap\(fo\.unpack\)\(packed\)`"):
            look()
    # with some leaves that are not computed
    part = fo.masked(fo.sgd(0.1, 0.9), re.compile("weight"))
    some, _ = vmap(lambda p, g: fo.apply_gradients(part, p, g, part.init(p)))(p, g)
    assert_same_bits(
        vmap(fo.unpack)(some), vmap(lambda p, g: fo.apply_gradients(part, p, g, part.init(p)))(params, grads)[0]
    )


def test_members_of_several_threads() -> None:
    tx = fo.adam(1e-1)
    step = vmap(lambda p, g, s: fo.apply_gradients(tx, p, g, s))
    found: dict[int, Any] = {}

    def work(seed: int) -> None:
        params = stacks(seed)
        state = vmap(tx.init)(params)
        for t in range(10):
            params, state = step(params, stacks(seed + t), state)
        found[seed] = params

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    together = dict(found)
    for seed in range(4):
        work(seed)
        assert_same_bits(together[seed], found[seed])


# --- training


def test_models_of_stack_module_state() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double() for _ in range(N)]
    params, buffers = stack_module_state(models)
    params = {k: p.detach() for k, p in params.items()}
    starts = [{k: p.detach().clone() for k, p in model.named_parameters()} for model in models]
    x, y = torch.randn(16, 3, dtype=F64), torch.randn(16, 1, dtype=F64)
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-2))

    def loss(p: Tree) -> torch.Tensor:
        return (functional_call(models[0], p, (x,)) - y).square().mean()

    def train(p: Tree, s: Any) -> Any:
        g, value = grad_and_value(loss)(p)
        return *fo.apply_gradients(tx, p, g, s), value

    assert not buffers
    state, first = vmap(tx.init)(params), vmap(loss)(params)
    for _ in range(20):
        params, state, value = vmap(train)(params, state)

    assert (value < first).all()
    for k, p in enumerate(starts):
        s = tx.init(p)
        for _ in range(20):
            p, s, _ = train(p, s)
        torch.testing.assert_close(member(params, k), p, **DOUBLE)


def test_members_that_are_replaced() -> None:
    """Population-based training: the worst member goes on as a copy of the best, a third one begins anew."""
    tx = fo.adam(1e-1)
    step = vmap(lambda p, g, s: fo.apply_gradients(tx, p, g, s))
    params = stacks(0)
    state = vmap(tx.init)(params)
    params, state = step(params, stacks(1), state)
    fresh = tx.init(member(params, 2))

    order = torch.tensor([0, 0, 2])
    params, state = member(params, order), member(state, order)
    for whole, own in zip(tensors(state), tensors(fresh), strict=True):
        whole[2] = own
    alone = [(member(params, k), member(state, k)) for k in range(N)]
    grads = stacks(2)
    actual = step(params, grads, state)

    assert state[0].count.tolist() == [1, 1, 0]
    expected = [fo.apply_gradients(tx, p, member(grads, k), s) for k, (p, s) in enumerate(alone)]
    assert_same_bits(actual, joined(expected))


def test_the_numbers_of_members_are_read_back() -> None:
    make: Any = lambda x: fo.adam(fo.linear_schedule(x, 0.0, 10))  # noqa: E731
    params = stacks(0)
    state = vmap(lambda x, p: make(x).init(p))(RATES, params)
    for _ in range(2):
        params, state = vmap(lambda x, p, s: fo.apply_gradients(make(x), p, p, s))(RATES, params, state)

    found = vmap(lambda x, s: fo.hyperparams(make(x), s)["learning_rate"])(RATES, state)

    torch.testing.assert_close(found, 0.8 * RATES, **DOUBLE)
    with pytest.raises(ValueError, match=r"the counter of .* has shape \(3,\): the state is that of several members"):
        fo.hyperparams(make(0.1), state)


def test_a_mask_sees_a_member() -> None:
    seen: list[tuple[str, int]] = []

    def mask(path: str, p: torch.Tensor) -> bool:
        seen.append((path, p.ndim))
        return p.ndim > 1

    tx = fo.masked(fo.sgd(1.0), mask)
    params = stacks(0)

    new, _ = vmap(lambda p: fo.apply_gradients(tx, p, p, tx.init(p)))(params)

    assert set(seen) == {(k, len(s)) for k, s in SHAPES.items()}
    assert_same_bits(new["weight"], torch.zeros(N, 4, 3))
    assert_same_bits(new["bias"], 2 * params["bias"])


def test_derivatives_of_steps_of_members() -> None:
    tx, w = fo.chain(fo.clip_by_global_norm(1.0), fo.adam(1e-1, eps_root=1e-8)), stacks(0, dtype=F64)["weight"]

    def score(w: torch.Tensor) -> torch.Tensor:
        return fo.apply_gradients(tx, w, w.sin(), tx.init(w))[0].square().sum()

    expected = torch.stack([grad(score)(x) for x in w])
    torch.testing.assert_close(vmap(grad(score))(w), expected, **DOUBLE)
    torch.testing.assert_close(grad(lambda w: vmap(score)(w).sum())(w), expected, **DOUBLE)
    recorded = w.clone().requires_grad_()
    vmap(score)(recorded).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(recorded.grad, expected, **DOUBLE)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_derivatives_by_numbers_of_members(chunk_size: int | None) -> None:
    """Nothing but the numbers requires a gradient: a learning rate, one that follows from it, an extra argument."""
    w = stacks(0, dtype=F64)["weight"]

    def score(rate: Any, value: Any, w: torch.Tensor) -> torch.Tensor:
        tx = fo.chain(scale_by_value(), fo.adamw(rate, weight_decay=1 - rate))
        return fo.apply_gradients(tx, w, w.sin(), tx.init(w), value=value)[0].square().sum()

    rates, values = RATES.clone().requires_grad_(), (1 + RATES).requires_grad_()
    vmap(score, chunk_size=chunk_size)(rates, values, w).sum().backward()  # type: ignore[no-untyped-call]

    alone = [grad(score, (0, 1))(*own) for own in zip(RATES, 1 + RATES, w, strict=True)]
    for x, expected in zip((rates, values), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(x.grad, torch.stack(expected), **DOUBLE)


# --- bad input


def test_hyper_parameters_that_are_not_mapped_are_refused() -> None:
    ones = torch.ones(5, 2)
    step = "to give each of 3 members its own, map a function that takes one over it by `torch.vmap`"
    for make, text in (
        (lambda: fo.adamw(RATES), "`learning_rate` of scale_by_learning_rate must be a number"),
        (lambda: fo.sgd(fo.constant_schedule(RATES)), "`value` of constant_schedule must be a number"),
    ):
        with pytest.raises(ValueError, match=f"{text}.*{step}"):
            vmap(lambda p: fo.apply_gradients(make(), p, p, ()))(ones)
    tx = fo.chain(scale_by_value())
    with pytest.raises(ValueError, match=f"the extra argument `value` is .*{step}"):
        vmap(lambda p: tx.update(p, tx.init(p), value=RATES))(ones)


def test_a_state_of_members_that_is_not_mapped_is_refused() -> None:
    tx, params = fo.adam(1e-2), stacks(0)
    state = vmap(tx.init)(params)
    with pytest.raises(ValueError, match=r"count .*; a state of 3 members is stepped in a function that `torch.vmap`"):
        fo.apply_gradients(tx, params, params, state)
    with pytest.raises(ValueError, match=r"scale_by_adam\.count is .* of shape \(3,\)"):
        vmap(lambda p: fo.apply_gradients(tx, p, p, state))(params)


def test_a_leaf_that_does_not_fit_is_refused_with_its_path() -> None:
    tx, params = fo.adam(1e-2), stacks(0)
    state = vmap(tx.init)(params)
    step = vmap(lambda p, g, s: fo.apply_gradients(tx, p, g, s))
    step(params, params, state)
    with pytest.raises(ValueError, match=r"updates at 'bias' has shape \(4,\)"):
        step(params, {**params, "bias": torch.ones(N, 4)}, state)
    with pytest.raises(RuntimeError, match="donate=True"):
        vmap(lambda p, g, s: fo.apply_gradients(tx, p, g, s, donate=True))(params, params, state)


@pytest.mark.parametrize("backend", ["c", "reference"])
def test_memory_that_was_freed_is_refused(backend: str) -> None:
    tx, params = fo.sgd(1e-2, 0.9), stacks(0)
    step, state = vmap(lambda p, g, s: fo.apply_gradients(tx, p, g, s)), vmap(tx.init)(params)
    with fo.use_backend(backend):
        step(params, params, state)
        grads = stacks(1)
        grads["weight"].untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=r"updates at 'weight'.* has no memory"):
            step(params, grads, state)
        state[0].trace["bias"].untyped_storage().resize_(8)
        with pytest.raises(ValueError, match=r"state trace.* at 'bias'.* has no memory"):
            step(params, params, state)


@pytest.mark.parametrize("inner", [False, True])
def test_a_tensor_of_another_call_is_refused(inner: bool) -> None:
    """It belongs to a level that is not active, or to fewer members."""
    tx, params = fo.sgd(1e-2), stacks(0)
    escaped: list[torch.Tensor] = []
    keep: Any = lambda x: (escaped.append(x), x)[1]  # noqa: E731
    vmap(vmap(keep) if inner else keep)(params["weight"][:2])
    vmap(lambda p: fo.apply_gradients(tx, p, p, tx.init(p)))(params)
    with pytest.raises((RuntimeError, ValueError)):
        vmap(lambda p: fo.apply_gradients(tx, p, {**p, "weight": escaped[0]}, tx.init(p)))(params)


# --- the example


def test_the_members_of_the_example_are_those_that_are_trained_alone() -> None:
    example = load_script("examples/ensemble_sweep.py")
    problem, rates = example.make_problem(), torch.tensor([1e-3, 1e-2], dtype=F64)

    sweep, alone = (train(problem, rates, 20) for train in (example.at_once, example.one_by_one))

    # twenty steps of at most 1e-2, whose gradients are sums of 64 products in another order: 64 * 2**-24 of each step,
    # which the moments of AdamW divide by numbers of its own size
    for name, p in alone.params.items():
        torch.testing.assert_close(sweep.params[name], p, rtol=0, atol=20 * 1e-2 * 64 * 2**-24 * 10)
    assert (sweep.losses < example.loss_of(problem, problem.params)).all()
