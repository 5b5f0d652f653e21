"""Train steps on packed trees inside `torch.compile`: their buffers cross the graph."""

import collections
import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import grad_and_value
from torch.utils import _pytree as pytree

import functional_optim as fo
from _lib.compiled import (
    CHAINS,
    MODEL,
    RATE,
    STEPS,
    assert_close,
    assert_equal,
    batch,
    counter,
    dynamo,
    loss,
    packed_start,
    start,
    train_step,
)


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own


def packed_loss(params: Any, x: torch.Tensor) -> torch.Tensor:
    return loss(fo.unpack(params), x)


def packed_step(tx: Any, form: str) -> Callable[..., Any]:
    """A train step over packed parameters; with `leaves`, gradients are a tree, which takes no packing."""

    def step(params: Any, state: Any, x: torch.Tensor) -> Any:
        if form == "leaves":
            grads, value = grad_and_value(loss)(fo.unpack(params), x)
        else:
            grads, value = grad_and_value(packed_loss)(params, x)
        if form == "update":
            updates, state = tx.update(grads, state, params)
            params = fo.apply_updates(params, updates)
        else:
            params, state = fo.apply_gradients(tx, params, grads, state, donate=form in ("donate", "leaves"))
        return params, state, value

    return step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(("schedule", form) for form in ("apply", "update", "donate", "leaves")),
        ("tensor", "apply"),
        ("partition", "leaves"),
        ("wrapping", "update"),
        ("opaque", "donate"),
        ("leafwise", "apply"),
    ],
)
def test_packed_train_steps_equal_eager_mode(name: str, form: str) -> None:
    """Bit by bit, packed and not, in one graph."""
    tx, backend = CHAINS[name](), counter()
    eager = packed_step(tx, form)
    compiled = torch.compile(eager, fullgraph=True, backend=backend)
    mine, theirs, tree = packed_start(tx), packed_start(tx), start(tx)
    with dynamo(error_on_recompile=True):
        for k in range(STEPS):
            RATE.fill_(0.1 * 0.9**k)
            mine, theirs = compiled(*mine[:2], batch(k)), eager(*theirs[:2], batch(k))
            tree = train_step(tx, "update" if form == "update" else "apply")(*tree[:2], batch(k))
            assert_equal(mine, theirs)
            assert_equal(fo.unpack(mine[0]), tree[0])
    assert backend.frame_count == 1


@pytest.mark.parametrize("packed", ["params", "grads", "state"])
@pytest.mark.parametrize("donate", [False, True])
def test_each_tree_keeps_its_own_form_in_a_graph(packed: str, donate: bool) -> None:
    tx = fo.chain(fo.clip_by_global_norm(0.5), fo.adamw(0.1))
    tree = {k: p.detach() for k, p in MODEL.named_parameters()}
    grads = {k: torch.ones_like(p) for k, p in tree.items()}

    def given() -> Any:
        params = copy.deepcopy(tree)
        state = tx.init(fo.pack(params) if packed == "state" else params)
        return fo.pack(params) if packed == "params" else params, fo.pack(grads) if packed == "grads" else grads, state

    step = torch.compile(fo.apply_gradients, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_equal(step(tx, *given(), donate=donate), fo.apply_gradients(tx, *given(), donate=donate))


@pytest.mark.parametrize("donate", [False, True])
def test_only_buffers_cross_the_graph(donate: bool) -> None:
    """The graph of a step is the same whatever the number of leaves."""
    tx = fo.adamw(0.1)
    sizes = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        sizes.append((len(graph.graph.nodes), len(inputs)))
        return graph

    for n in (3, 40):
        torch.compiler.reset()  # no sizes that are variables
        params = fo.pack({str(k): torch.ones(2, k + 1) for k in range(n)})
        step = torch.compile(fo.apply_gradients, fullgraph=True, backend=backend)
        step(tx, params, params.map(torch.ones_like), tx.init(params), donate=donate)
    assert len(set(sizes)) == 1
    assert sizes[0][1] == 5  # parameters, gradients, a count and two slots


def test_another_form_in_the_same_name_is_compiled_anew() -> None:
    """Buffers of the same length, with other leaves."""
    tx, backend = fo.chain(fo.clip_by_block_rms(0.1), fo.sgd(0.1)), counter("eager")
    step = torch.compile(lambda p, s: fo.apply_gradients(tx, p, p, s), fullgraph=True, backend=backend)
    for tree in ([torch.ones(8), 2 * torch.ones(8)], [torch.cat([torch.ones(8), 2 * torch.ones(8)])]):
        params = fo.pack(tree)
        state = tx.init(params)
        for _ in range(2):
            assert_equal(step(params, state), fo.apply_gradients(tx, params, params, state))
    assert backend.frame_count == 2


@pytest.mark.parametrize("container", ["list", "ordered", "absent", "two dtypes"])
def test_containers_of_packed_trees(container: str) -> None:
    """`unpack` inside of a graph gives the containers that were packed."""
    a, b = torch.ones(2, 3), torch.arange(2.0)
    params = fo.pack(
        {
            "list": [a, (b, {"z": a + 1, "y": b + 1})],
            "ordered": collections.OrderedDict(z=a, a=b),
            "absent": {"z": a, "b": None, "a": b.expand(3, 2).t()},
            "two dtypes": {"z": a, "a": b.double()},
        }[container]
    )
    tx = fo.adam(0.1)

    def step(params: Any, state: Any) -> Any:
        grads = pytree.tree_map(lambda x: None if x is None else x + 1, fo.unpack(params))
        new, state = fo.apply_gradients(tx, params, grads, state)
        return new, fo.unpack(new), state

    state = tx.init(params)
    assert_equal(torch.compile(step, fullgraph=True, backend="eager")(params, state), step(params, state))


def test_the_places_of_leaves_are_no_variables() -> None:
    """With `dynamic=True` a compiler takes the numbers that it finds in objects for variables."""
    tx, backend = fo.adamw(0.1), counter()
    params = fo.pack({"w": torch.linspace(-1, 1, 12).reshape(3, 4).t(), "n": None, "b": torch.ones(3)})

    def step(params: Any, state: Any) -> Any:
        grads = {k: None if x is None else 2 * x for k, x in fo.unpack(params).items()}
        return fo.apply_gradients(tx, params, grads, state)

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=True)
    mine, theirs = (params, tx.init(params)), (params, tx.init(params))
    for _ in range(3):
        mine, theirs = compiled(*mine), step(*theirs)
    assert_equal(mine, theirs)
    assert backend.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_averages_are_read_within_a_graph(dtype: torch.dtype) -> None:
    """As those of a tree are, in memory of their own; those of some leaves alone are read outside."""
    tree = {k: p.detach().to(dtype) for k, p in MODEL.named_parameters()}
    params = fo.pack(tree)
    some = fo.masked(
        fo.params_ema(0.9, accumulator_dtype=torch.float32), {**dict.fromkeys(tree, True), "0.bias": False}
    )
    for tx, fullgraph in ((fo.chain(fo.sgd(0.1), fo.params_ema(0.9)), True), (fo.chain(fo.sgd(0.1), some), False)):
        new, state = fo.apply_gradients(tx, params, tree, tx.init(params))
        plain, plain_state = fo.apply_gradients(tx, tree, tree, tx.init(tree))
        read = torch.compile(fo.eval_params, fullgraph=fullgraph, backend="eager")
        for found in (read(state, new), fo.eval_params(state, new)):
            assert_equal(fo.unpack(found), fo.eval_params(plain_state, plain))
            found.buffers[0].zero_()
        assert_equal(fo.unpack(fo.eval_params(state, new)), fo.eval_params(plain_state, plain))


@pytest.mark.slow
def test_derivatives_and_members_with_packed_trees() -> None:
    tx = fo.chain(fo.clip_by_global_norm(0.5), fo.adam(0.1))
    params = fo.pack([torch.ones(2, 3), torch.arange(2.0)])
    state = tx.init(params)

    def after(grads: Any) -> Any:
        new, _ = fo.apply_gradients(tx, params, grads, state)
        return sum(x.square().sum() for x in fo.unpack(new))

    grads = params.map(lambda x: x + 1)
    compiled = torch.compile(torch.func.grad(after), fullgraph=True, backend="aot_eager")
    assert_close(compiled(grads), torch.func.grad(after)(grads))
    members = params.map(lambda x: torch.stack([x, 2 * x]))
    mapped = torch.func.vmap(lambda p: fo.apply_gradients(tx, p, p, tx.init(p))[0])
    whole = torch.func.vmap(lambda p, s: fo.apply_gradients(tx, p, p, s)[0])
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    assert_close(compiled(members, torch.func.vmap(tx.init)(members)), mapped(members))
    with fo.use_backend("reference"):
        traced = torch.compile(lambda p, s: fo.apply_gradients(tx, p, p, s), fullgraph=True, backend="aot_eager")
        assert_close(traced(params, state), fo.apply_gradients(tx, params, params, state))


@pytest.mark.slow
def test_messages_about_packed_trees() -> None:
    """A leaf of another shape, buffers of another length, and updates that are packed in another way."""
    tx = fo.sgd(0.1)
    params, state = packed_start(tx)
    apply = torch.compile(fo.apply_gradients, fullgraph=True, backend="eager")
    before = params.buffers[0].clone()
    wrong = {**fo.unpack(params), "0.weight": torch.ones(3, 4)}
    for donate in (False, True):
        with pytest.raises(ValueError, match=r"0\.weight.*\(3, 4\).*\(4, 3\)"):
            apply(tx, params, wrong, state, donate=donate)
        with pytest.raises(ValueError, match=r"0\.weight"):
            apply(tx, params, fo.pack(wrong), state, donate=donate)
        with pytest.raises(ValueError, match="buffer 0 of a packed tree has shape"):
            apply(tx, params, params.map(lambda x: x[:8]), state, donate=donate)
    with pytest.raises(Exception, match="updates and parameters of `update` are packed alike"):
        torch.compile(tx.update, fullgraph=True, backend="eager")(fo.unpack(params), state, params)
    assert torch.equal(params.buffers[0], before)


@pytest.mark.slow
@pytest.mark.parametrize("donate", [False, True])
def test_inductor_compiles_steps_of_packed_trees_without_copies(donate: bool) -> None:
    from torch._inductor.utils import run_and_get_code

    tx = fo.chain(fo.clip_by_global_norm(0.5), fo.adamw(0.1), fo.params_ema(0.9))
    params, state = packed_start(tx)
    expected = fo.apply_gradients(tx, params, params.map(torch.ones_like), state)
    compiled = torch.compile(fo.apply_gradients, fullgraph=True)
    actual, sources = run_and_get_code(compiled, tx, params, params.map(torch.ones_like), state, donate=donate)
    assert_equal(actual, expected)
    code = "\n".join(sources)
    assert (
        code.count("functional_optim.donated_step.default(" if donate else "functional_optim.pure_step.default(") == 1
    )
    assert not re.search(r"copy_\(|empty_strided_cpu\(\(|cpp_fused", code.partition("def call(")[2])
