"""Train steps of the pure API inside `torch.compile` and `torch.export`: one graph, and the numbers of eager mode."""

import collections
import contextlib
import copy
import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.func import functional_call, grad_and_value
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import functional_optim as fo
from _lib.chains import scale_by_value
from functional_optim._runtime.internals import MEMBERS_IN_GRAPHS


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own

AS_ONE_OPERATION = pytest.mark.skipif(
    not MEMBERS_IN_GRAPHS,
    reason="before torch 2.13 operations of torch compute members in a graph, and round otherwise",
)
ROOT = Path(__file__).parents[2]
STEPS = 20
MODEL = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


@fo.elementwise(extra=("lr",))
def scale_by_given_rate(u: Any, *, lr: Any) -> Any:
    return -lr * u


@fo.leafwise(state={"rows": fo.slot(shape=lambda p: p.shape[:1])})
def scale_rows(u: Any, rows: Any, *, decay: Any = 0.9) -> Any:
    rows = decay * rows + u.reshape(u.shape[0], -1).square().mean(1)
    return u / (rows.sqrt() + 1e-3).reshape(-1, *[1] * (u.ndim - 1)), rows


@fo.elementwise(state={"total": fo.slot(per="tree")})
def keep_direction(u: Any, before: Any, total: Any) -> Any:
    """A rule around another one, with a number that all leaves share."""
    total = total + fo.tree_sum(u * u)
    return torch.where(u * before > 0, u, 0.0) / (1 + total), total


@fo.elementwise(extra={"scale": "element"})
def scale_by_tree(u: Any, *, scale: Any) -> Any:
    return u * scale


def counting(params: Any) -> Any:
    return {"n": torch.zeros(())}


def halve(updates: Any, state: Any, params: Any = None) -> Any:
    """An opaque transformation: the first update is halved, the second divided by three."""
    n = state["n"] + 1
    return {k: u / (1 + n) for k, u in updates.items()}, {"n": n}


RATE = torch.tensor(0.1)  # tests change it between steps
CHAINS: dict[str, Callable[[], Any]] = {
    "schedule": lambda: fo.chain(
        fo.clip_by_global_norm(0.1),
        fo.adamw(fo.cosine_decay_schedule(0.1, STEPS), mask=lambda path, p: p.ndim > 1),
        fo.params_ema(0.9),
    ),
    "tensor": lambda: fo.sgd(RATE, momentum=0.9),
    "partition": lambda: fo.partition(
        {"a": fo.adam(1e-2), "b": fo.masked(fo.sgd(0.1), re.compile("0"))},
        {re.compile("bias"): "b", re.compile(""): "a"},
    ),
    "wrapping": lambda: fo.chain(keep_direction(fo.trace(0.9)), fo.scale_by_learning_rate(0.1)),
    "opaque": lambda: fo.chain(fo.trace(0.5), fo.GradientTransformation(counting, halve), fo.sgd(0.1, momentum=0.9)),
    "leafwise": lambda: fo.named_chain(("clip", fo.clip(0.1)), ("rows", scale_rows()), ("lr", fo.sgd(0.1))),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@contextlib.contextmanager
def dynamo(**config: Any) -> Iterator[None]:
    """Settings of the compiler, which takes seconds to import."""
    import torch._dynamo

    with torch._dynamo.config.patch(**config):
        yield


def counter(backend: str = "aot_eager") -> Any:
    """A backend that counts graphs."""
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend(backend)


def loss(params: Any, x: torch.Tensor) -> torch.Tensor:
    return functional_call(MODEL, params, (x,)).square().mean()


def train_step(tx: Any, form: str) -> Callable[..., Any]:
    """A train step in one of the forms of the pure API."""

    def step(params: Any, state: Any, x: torch.Tensor, **extra: Any) -> Any:
        grads, value = grad_and_value(loss)(params, x)
        if form == "update":
            updates, state = tx.update(grads, state, params, **extra)
            params = fo.apply_updates(params, updates)
        else:
            params, state = fo.apply_gradients(tx, params, grads, state, donate=form == "donate", **extra)
        return params, state, value

    return step


def start(tx: Any) -> Any:
    params = {k: p.detach().clone() for k, p in MODEL.named_parameters()}
    return params, tx.init(params)


def batch(k: int) -> torch.Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(k))


def assert_equal(actual: Any, expected: Any) -> None:
    """The same containers, and the same bits in every tensor."""
    assert pytree.tree_structure(actual) == pytree.tree_structure(expected)
    for x, y in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        if x is not y:
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


def assert_close(actual: Any, expected: Any) -> None:
    """The same but for rounding: a few units in the last place of float32, of numbers up to 1."""
    for x, y in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


# -- one graph, the same numbers ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", ["apply", "update", "donate"])
@pytest.mark.parametrize("name", CHAINS)
def test_a_train_step_is_one_graph_and_equals_eager_mode(name: str, form: str) -> None:
    """Bit by bit over a schedule, a tensor that changes, and a state that has been written to a file and read again."""
    tx, backend = CHAINS[name](), counter()
    eager = train_step(tx, form)
    compiled = torch.compile(eager, fullgraph=True, backend=backend)
    mine, theirs = start(tx), start(tx)
    with dynamo(error_on_recompile=True):
        for k in range(STEPS):
            RATE.fill_(0.1 * 0.9**k)
            mine, theirs = compiled(*mine[:2], batch(k)), eager(*theirs[:2], batch(k))
            assert_equal(mine, theirs)
            if k == STEPS // 2:
                file = io.BytesIO()
                torch.save(mine, file)
                file.seek(0)
                mine = torch.load(file)
    assert backend.frame_count == 1


@pytest.mark.parametrize("form", ["apply", "donate"])
def test_a_number_that_changes_is_compiled_twice_at_most(form: str) -> None:
    """An extra argument is compiled as a constant first, as Python's numbers are, and as a variable from then on."""
    tx, backend = fo.chain(fo.scale_by_adam(), scale_by_given_rate()), counter("eager")
    eager = train_step(tx, form)
    compiled = torch.compile(eager, fullgraph=True, backend=backend)
    mine, theirs = start(tx), start(tx)
    for k in range(STEPS):
        mine = compiled(*mine[:2], batch(k), lr=0.1 * 0.9**k)
        theirs = eager(*theirs[:2], batch(k), lr=0.1 * 0.9**k)
    assert_equal(mine, theirs)
    assert backend.frame_count == 2


def test_extra_arguments_that_are_trees() -> None:
    tx = fo.chain(scale_by_tree(), fo.sgd(0.1))
    params, state = start(tx)

    def step(params: Any, state: Any, scale: Any) -> Any:
        return fo.apply_gradients(tx, params, params, state, scale=scale, value=1.0)

    scale = {k: p + 1 for k, p in params.items()}
    actual = torch.compile(step, fullgraph=True, backend="eager")(params, state, scale)
    assert_equal(actual, step(params, state, scale))


def test_another_chain_in_the_same_name_is_compiled_anew() -> None:
    holder, backend = {"tx": fo.sgd(0.1)}, counter("eager")

    def step(params: Any, grads: Any, state: Any) -> Any:
        return fo.apply_gradients(holder["tx"], params, grads, state)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    params, state = start(holder["tx"])
    for tx in (fo.sgd(0.1), fo.sgd(0.5)):
        holder["tx"] = tx
        assert_equal(compiled(params, params, state), step(params, params, state))
    assert backend.frame_count == 2


def test_tensors_that_the_step_itself_changes() -> None:
    """A learning rate that is written to before and after the step, inside of the compiled function."""
    rate = torch.tensor(0.5)
    tx = fo.sgd(rate)

    def step(params: Any, state: Any) -> Any:
        rate.mul_(0.5)
        params, state = fo.apply_gradients(tx, params, params, state)
        rate.mul_(0.5)
        return fo.apply_gradients(tx, params, params, state)

    params, state = start(tx)
    expected = step(params, state)
    rate.fill_(0.5)
    assert_equal(torch.compile(step, fullgraph=True, backend="aot_eager")(params, state), expected)
    assert rate == 0.125


@pytest.mark.parametrize("donate", [False, True])
def test_gradients_that_are_none(donate: bool) -> None:
    tx = fo.adamw(0.1)
    grads = {k: None if "0" in k else torch.ones_like(p) for k, p in MODEL.named_parameters()}

    def step(params: Any, state: Any) -> Any:
        return fo.apply_gradients(tx, params, grads, state, donate=donate)

    given = start(tx)
    expected = step(*copy.deepcopy(given))
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*given)
    assert_equal(actual, expected)
    assert actual[0]["0.weight"] is given[0]["0.weight"]


@pytest.mark.parametrize("tree", ["one tensor", "list", "ordered", "other order"])
def test_trees(tree: str) -> None:
    """Containers of the parameters come back, whatever those of the gradients."""
    a, b = torch.ones(2, 3), torch.ones(2, dtype=torch.float64)
    params, grads = {
        "one tensor": (a, a + 1),
        "list": ([a, (b,)], [a, (b + 1,)]),
        "ordered": (collections.OrderedDict(a=a, b=b), {"a": a, "b": b + 1}),
        "other order": ({"b": b, "a": a}, {"a": a + 1, "b": b}),
    }[tree]
    tx = fo.adam(0.1)
    state = tx.init(params)
    assert_equal(
        torch.compile(fo.apply_gradients, fullgraph=True, backend="eager")(tx, params, grads, state),
        fo.apply_gradients(tx, params, grads, state),
    )


def test_layouts_and_dtypes_are_those_of_eager_mode() -> None:
    """Updates have the wider dtype of gradient and parameter, and results the layout of what they replace."""
    params = {"w": torch.randn(4, 3, dtype=torch.bfloat16).T, "v": torch.randn(3)}
    grads = {"w": torch.randn(3, 4), "v": torch.randn(3, dtype=torch.bfloat16)}
    tx = fo.chain(fo.scale_by_adam(), fo.masked(fo.scale(-0.1), re.compile("w")))
    state = tx.init(params)

    def both(params: Any, grads: Any, state: Any) -> Any:
        return tx.update(grads, state, params), fo.apply_gradients(tx, params, grads, state)

    actual = torch.compile(both, fullgraph=True, backend="aot_eager")(params, grads, state)
    assert_equal(actual, both(params, grads, state))
    assert actual[1][0]["w"].stride() == params["w"].stride()


@pytest.mark.parametrize("form", ["backward", "grad"])
@pytest.mark.parametrize("donate", [False, True])
def test_gradients_by_autograd(form: str, donate: bool) -> None:
    """`loss.backward()` and `autograd.grad` on leaf tensors, which the compiler follows with `trace_autograd_ops`."""
    import torch._dynamo.config

    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this version of torch does not trace `backward`")
    tx = fo.adamw(0.1)

    def step(w: Any, state: Any, x: Any) -> Any:
        value = (x @ w["w"]).square().mean()
        if form == "backward":
            value.backward()
            grads = {"w": w["w"].grad}
        else:
            grads = dict(zip(w, torch.autograd.grad(value, list(w.values())), strict=True))
        with torch.no_grad():
            new, state = fo.apply_gradients(tx, w, grads, state, donate=donate)
        return new, state, value.detach()

    results = []
    with dynamo(trace_autograd_ops=True):
        for run in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
            w = {"w": torch.ones(3, 2, requires_grad=True)}
            state = tx.init(w)
            for k in range(3):
                new, state, value = run(w, state, batch(k))
                w = {"w": new["w"].detach().requires_grad_()} if not donate else w
                w["w"].grad = None
            results.append((w, state, value))
    assert_equal(*results)


# -- the reference, derivatives, transformations ------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
def test_the_reference_is_traced_into_the_graph(inside: bool) -> None:
    """The graph that a compiler gets has the formulas in it, and one of its own as long as the backend is asked for."""
    sizes: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        def note(graph: Any, inputs: Any) -> Any:
            sizes.append(sum(n.op == "call_function" for n in graph.graph.nodes))
            return graph

        return aot_autograd(fw_compiler=note)(graph, inputs)

    tx = CHAINS["schedule"]()
    params, state = start(tx)

    def step(params: Any, state: Any) -> Any:
        with fo.use_backend("reference") if inside else contextlib.nullcontext():
            return fo.apply_gradients(tx, params, params, state)

    expected = fo.apply_gradients(tx, params, params, state)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    with fo.use_backend("reference"):
        assert_close(compiled(params, state), expected)
    assert sizes[0] > 50
    if not inside:
        assert_equal(compiled(params, state), expected)
        assert len(sizes) == 2


@pytest.mark.slow
def test_derivatives_and_members_of_an_ensemble() -> None:
    """Reverse mode, forward mode, an argument that is differentiated by autograd, and `vmap`, as in eager mode."""
    rate = torch.tensor(0.1, requires_grad=True)
    tx = fo.chain(fo.clip_by_global_norm(0.5), fo.scale_by_adam(), fo.scale_by_learning_rate(rate))
    params = {"w": torch.linspace(-1, 1, 6).reshape(2, 3)}
    state = tx.init(params)

    def meta_loss(g: torch.Tensor) -> torch.Tensor:
        return fo.apply_gradients(tx, params, {"w": g}, state)[0]["w"].square().sum()

    def by_rate(g: torch.Tensor) -> torch.Tensor:
        rate.grad = None
        torch.compile(meta_loss, fullgraph=True, backend="aot_eager")(g).backward()
        return rate.grad  # type: ignore[return-value]

    g = torch.full((2, 3), 0.3)
    stack = torch.stack([g, 2 * g])
    for transformed in (torch.func.grad(meta_loss), lambda g: torch.func.jvp(meta_loss, (g,), (g,))[1]):
        assert_close(torch.compile(transformed, fullgraph=True, backend="aot_eager")(g), transformed(g))
    members = torch.vmap(meta_loss)
    in_turn = lambda stack: torch.func.grad(lambda x: members(x).sum())(stack)  # noqa: E731
    for transformed in (torch.vmap(torch.func.grad(meta_loss)), in_turn):
        assert_close(torch.compile(transformed, fullgraph=True, backend="aot_eager")(stack), transformed(stack))
    assert_close(torch.compile(members, fullgraph=True, backend="aot_eager")(stack), members(stack))
    actual = by_rate(g)
    (expected,) = torch.autograd.grad(meta_loss(g), rate)
    assert_close(actual, expected)


@AS_ONE_OPERATION
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["noted", "inductor"])
def test_members_of_an_ensemble_are_one_operation(backend: str) -> None:
    """The bits of eager mode, for calls that are nested, and a counter that members share or have."""
    tx = fo.chain(fo.clip_by_global_norm(0.5), fo.adamw(fo.cosine_decay_schedule(1e-2, 10)), scale_by_value())
    params = {"w": torch.linspace(-1, 1, 12).reshape(2, 3, 2), "b": torch.ones(2, 3)}
    shared = tx.init({"w": torch.zeros(3, 2), "b": torch.zeros(3)})
    values = torch.tensor([0.5, 1.0, 2.0])

    def step(p: Any, state: Any, value: Any) -> Any:
        return fo.apply_gradients(tx, p, p, state, value=value)

    grid = torch.vmap(torch.vmap(step, (None, None, 0)), (0, None, None))
    seen: list[Any] = []

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(
        grid, fullgraph=True, backend=backend if backend != "noted" else aot_autograd(fw_compiler=note)
    )
    assert_equal(compiled(params, shared, values), grid(params, shared, values))
    assert backend != "noted" or seen.count(torch.ops.functional_optim.mapped_step.default) == 1
    members = torch.vmap(step, (0, 0, None))
    state = torch.vmap(tx.init)(params)
    mine, theirs = (params, state), (params, state)
    compiled = torch.compile(members, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        mine, theirs = compiled(*mine, values[0]), members(*theirs, values[0])
    assert_equal(mine, theirs)


@AS_ONE_OPERATION
def test_members_of_a_graph_that_runs_within_vmap() -> None:
    """The backend "eager" leaves `vmap` in the graph, and the operation is called within it."""
    tx, params = fo.chain(fo.clip_by_global_norm(0.5), fo.adam(1e-2)), torch.linspace(-1, 1, 12).reshape(2, 3, 2)
    state = torch.vmap(torch.vmap(tx.init))(params)

    def step(p: Any, s: Any) -> Any:
        return fo.apply_gradients(tx, p, p.sin(), s)

    expected = torch.vmap(torch.vmap(step))(params, state)
    inside = torch.compile(torch.vmap(torch.vmap(step)), fullgraph=True, backend="eager")
    assert_equal(inside(params, state), expected)
    assert_equal(torch.vmap(torch.vmap(torch.compile(step, backend="eager")))(params, state), expected)


# -- donation -----------------------------------------------------------------------------------------------------


def test_donated_tensors_are_written_and_their_versions_counted() -> None:
    """Results that were read before the step have old numbers, those after it new ones, as in eager mode."""
    tx = CHAINS["opaque"]()

    def step(params: Any, state: Any) -> Any:
        before = params["0.bias"] * 1
        fo.apply_gradients(tx, params, params, state, donate=True)
        return before, params["0.bias"] * 1, params["0.bias"]

    mine, theirs = start(tx), start(tx)
    versions = [p._version for p in mine[0].values()]
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*mine)
    assert_equal(actual, step(*theirs))
    assert_equal(mine[0], theirs[0])
    assert actual[2] is mine[0]["0.bias"]
    assert all(p._version > old for p, old in zip(mine[0].values(), versions, strict=True))
    assert mine[1][1]["n"] == 1  # in place, which eager mode returns anew


DONATED = {
    "grad": (torch.func.grad, "torch.func transformation cannot follow; use donate=False"),
    "vmap": (torch.vmap, "torch.func transformation cannot follow; use donate=False"),
    "recorded": (lambda f: f, r"wrap the step in `torch.no_grad\(\)`"),
}


@pytest.mark.parametrize("case", DONATED)
def test_donation_is_refused_where_derivatives_are_followed(case: str) -> None:
    transform, message = DONATED[case]
    tx = fo.sgd(0.1)
    state = tx.init(torch.ones(2))
    step = transform(lambda g: fo.apply_gradients(tx, torch.ones(2), g, state, donate=True)[0].sum())
    with pytest.raises(Exception, match=message):
        torch.compile(step, fullgraph=True, backend="aot_eager")(torch.ones(2, requires_grad=case == "recorded"))


# -- refusals -----------------------------------------------------------------------------------------------------


def test_a_number_in_a_state_stays_outside_of_the_graph() -> None:
    """With `fullgraph=True` the reason is said; without, the step runs as ever."""
    tx = fo.GradientTransformation(lambda params: {"n": 0}, lambda u, s, params=None: (u, {"n": s["n"] + 1}))
    params, state = start(chained := fo.chain(tx, fo.sgd(0.1)))

    def step(params: Any, state: Any) -> Any:
        return fo.apply_gradients(chained, params, params, state)

    with pytest.raises(Exception, match="such as a number in a state, runs outside of the graph"):
        torch.compile(step, fullgraph=True, backend="eager")(params, state)
    assert torch.compile(step, backend="eager")(params, state)[1][0] == {"n": 1}


def test_messages() -> None:
    tx = fo.sgd(0.1)
    params, state = start(tx)
    apply = torch.compile(fo.apply_gradients, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"updates does not have the structure of params: it lacks '0.weight'"):
        apply(tx, params, {k: p for k, p in params.items() if k != "0.weight"}, state)
    with pytest.raises(Exception, match="the chain is made inside of the compiled function; make it outside"):
        torch.compile(lambda p, s: fo.apply_gradients(fo.sgd(0.1), p, p, s), fullgraph=True, backend="eager")(
            params, state
        )
    with pytest.raises(Exception, match="`init` is called inside of the compiled function; call it once, outside"):
        torch.compile(tx.init, fullgraph=True, backend="eager")(params)
    assert_equal(torch.compile(tx.init, backend="eager")(params), state)  # a break
    with pytest.raises(Exception, match="`pack` is called inside of the compiled function; pack once, outside"):
        torch.compile(fo.pack, fullgraph=True, backend="eager")(params)
    assert_equal(fo.unpack(torch.compile(fo.pack, backend="eager")(params)), params)
    wide = fo.chain(fo.GradientTransformation(counting, lambda u, s, params=None: (u, {"n": s["n"].double()})), tx)
    with pytest.raises(ValueError, match="returns updates and a state of the shapes and dtypes that it was given"):
        apply(wide, params, params, wide.init(params))


# -- packed trees ---------------------------------------------------------------------------------------------------


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


def packed_start(tx: Any) -> Any:
    params = fo.pack({k: p.detach() for k, p in MODEL.named_parameters()})
    return params, tx.init(params)


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


# -- graphs that are kept -----------------------------------------------------------------------------------------


class Step(torch.nn.Module):
    """A step as a module, which is what can be exported."""

    def __init__(self, tx: Any, donate: bool = False) -> None:
        super().__init__()
        self.tx, self.donate = tx, donate

    def forward(self, params: Any, grads: Any, state: Any) -> Any:
        return fo.apply_gradients(self.tx, params, grads, state, donate=self.donate)


class Both(torch.nn.Module):
    """A step, and a donated one on other tensors."""

    def __init__(self, tx: Any) -> None:
        super().__init__()
        self.pure, self.donated = Step(tx), Step(tx, donate=True)

    def forward(self, given: Any, others: Any) -> Any:
        return self.pure(*given), self.donated(*others)


def test_make_fx_traces_the_reference() -> None:
    tx = CHAINS["schedule"]()
    params, state = start(tx)
    graph = make_fx(lambda *args: fo.apply_gradients(tx, *args), tracing_mode="fake")(params, params, state)
    assert_close(graph(params, params, state), fo.apply_gradients(tx, params, params, state))


@pytest.mark.slow
def test_exported_steps_are_saved_and_loaded(tmp_path: Path) -> None:
    """In this process, and in one that knows nothing but the package and the classes of the state."""
    tx = fo.chain(fo.clip_by_global_norm(0.1), fo.adamw(fo.cosine_decay_schedule(0.1, STEPS)))
    names = []
    for packed, donate, strict in (
        (False, False, False),
        (False, True, True),
        (True, False, False),
        (True, True, False),
    ):
        given, again = [(packed_start if packed else start)(tx) for _ in range(2)]
        grads = pytree.tree_map(torch.ones_like, given[0])
        expected = fo.apply_gradients(tx, given[0], grads, given[1])
        program = torch.export.export(Step(tx, donate), (given[0], grads, given[1]), strict=strict)
        calls = [n.name for n in program.graph.nodes if n.op == "call_function" and "getitem" not in n.name]
        assert calls == ["donated_step" if donate else "pure_step"]
        assert_equal(program.module()(again[0], grads, again[1]), expected)
        assert donate is torch.equal(fo.unpack(again[0])["0.weight"], fo.unpack(expected[0])["0.weight"])
        names.append(f"{packed} {donate}")
        torch.export.save(program, tmp_path / f"{names[-1]}.pt2")
        torch.save((given[0], grads, given[1], expected), tmp_path / f"{names[-1]}.pt")
    code = f"""
import torch, functional_optim as fo
fo.adamw(fo.constant_schedule(0.1)).init(torch.ones(1))
for name in {names!r}:
    file = {str(tmp_path)!r} + "/" + name
    params, grads, state, expected = torch.load(file + ".pt")
    new = torch.export.load(file + ".pt2").module()(params, grads, state)
    assert all(torch.equal(fo.unpack(new[0])[k], x) for k, x in fo.unpack(expected[0]).items())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False
    )
    assert not done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the compiler's own
def test_steps_compiled_ahead_of_time(tmp_path: Path) -> None:
    """AOTInductor's code calls the operations of a step and of a donated one, also with an empty list of numbers."""
    import torch._inductor

    tx = fo.chain(fo.clip_by_global_norm(0.1), fo.adamw(fo.cosine_decay_schedule(0.1, STEPS)))
    params, state = start(tx)
    grads = {k: torch.ones_like(p) for k, p in params.items()}
    expected = fo.apply_gradients(tx, params, grads, state)
    given, others = (params, grads, state), copy.deepcopy((params, grads, state))
    before = copy.deepcopy(given)
    program = torch.export.export(Both(tx), (given, others))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "step.pt2"))
    for actual in torch._inductor.aoti_load_package(path)(given, others):
        assert_equal(actual[0], expected[0])
        assert_equal(pytree.tree_leaves(actual[1]), pytree.tree_leaves(expected[1]))
    assert_equal(pytree.tree_leaves(given), pytree.tree_leaves(before))
    assert_equal(others[0], expected[0])


def test_the_size_of_a_batch_is_a_variable() -> None:
    tx, backend = CHAINS["schedule"](), counter("eager")
    eager = train_step(tx, "donate")
    compiled = torch.compile(eager, fullgraph=True, backend=backend, dynamic=True)
    mine, theirs = start(tx), start(tx)
    for n in range(5, 10):  # sizes that are no other one's of the model, which the compiler takes for the same
        x = torch.ones(n, 3)
        mine, theirs = compiled(*mine[:2], x), eager(*theirs[:2], x)
        assert_close(mine, theirs)
    assert backend.frame_count == 1


@pytest.mark.slow
def test_inductor_compiles_donation_without_copies() -> None:
    """The generated code calls the operation on the arguments themselves: it allocates and copies no parameter."""
    from torch._inductor.utils import run_and_get_code

    tx = fo.chain(fo.clip_by_global_norm(0.5), fo.adamw(0.1), fo.params_ema(0.9))

    def step(params: Any, grads: Any, state: Any) -> Any:
        return fo.apply_gradients(tx, params, grads, state, donate=True)

    mine, theirs = start(tx), start(tx)
    grads = {k: torch.ones_like(p) for k, p in mine[0].items()}
    compiled = torch.compile(step, fullgraph=True)
    actual, sources = run_and_get_code(compiled, mine[0], grads, mine[1])
    assert_equal(actual, step(theirs[0], grads, theirs[1]))
    code = "\n".join(sources)
    assert code.count("functional_optim.donated_step.default(") == 1
    assert not re.search(r"copy_\(|empty_strided_cpu\(\(|cpp_fused", code.partition("def call(")[2])
