"""Train steps whose formulas, derivatives or members are computed inside `torch.compile`: the numbers of eager mode."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import functional_optim as fo
from _lib.chains import scale_by_value
from _lib.compiled import CHAINS, assert_close, assert_equal, counting, start
from functional_optim._runtime.internals import MEMBERS_IN_GRAPHS


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own

AS_ONE_OPERATION = pytest.mark.skipif(
    not MEMBERS_IN_GRAPHS,
    reason="before torch 2.13 operations of torch compute members in a graph, and round otherwise",
)


# -- the reference, derivatives, transformations ------------------------------------------------------------------


@pytest.mark.slow
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


@fo.elementwise(state={"seen": fo.slot(1.0, per="leaf"), "total": fo.slot(1.0, per="tree")})
def keep_numbers(u: Any, seen: Any, total: Any) -> Any:
    return u, 0.5 * seen + fo.leaf_norm(u), 0.5 * total + fo.tree_norm(u)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_are_donated_to_the_reference_that_is_traced(dtype: torch.dtype) -> None:
    """0-d parameters and slots, to which a compiler may lose writes."""
    tx = fo.chain(keep_numbers(), fo.sgd(0.1, momentum=0.9), fo.params_ema(0.5))
    compiled = torch.compile(partial(fo.apply_gradients, donate=True), fullgraph=True, backend="aot_eager")
    mine, theirs = ({"a": torch.tensor(2.0, dtype=dtype), "b": torch.ones(3, dtype=dtype)} for _ in range(2))
    state, expected = tx.init(mine), tx.init(theirs)
    given = dict(mine)
    for k in range(3):
        grads = {"a": torch.tensor(1.0 + k, dtype=dtype), "b": torch.ones(3, dtype=dtype)}
        with fo.use_backend("reference"):
            mine, state = compiled(tx, mine, grads, state)
        theirs, expected = fo.apply_gradients(tx, theirs, grads, expected)
    assert all(mine[name] is given[name] for name in mine)
    assert_close((mine, state), (theirs, expected))


def by_a_number(updates: Any, state: Any, params: Any = None) -> Any:
    """An opaque transformation that Python decides."""
    n = float(state["n"])
    return {k: u / (1 + n) if n < 2 else u for k, u in updates.items()}, {"n": state["n"] + 1}


READING: dict[str, Callable[[], Any]] = {
    "L-BFGS": lambda: fo.chain(fo.scale_by_lbfgs(), fo.scale(-0.1)),
    "opaque": lambda: fo.chain(fo.GradientTransformation(counting, by_a_number), fo.scale(-0.1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", READING)
def test_a_step_that_reads_numbers_breaks_the_graph_of_the_reference(name: str, donate: bool) -> None:
    """And is not looked into, function by function."""
    torch.compiler.reset()
    tx = READING[name]()

    def step(params: Any, state: Any) -> Any:
        return fo.apply_gradients(tx, params, {"w": params["w"] ** 3 - 1}, state, donate=donate)

    compiled = torch.compile(step, backend="eager")
    mine, theirs = ({"w": torch.tensor([2.0, -1.0, 0.5])} for _ in range(2))
    state, expected = tx.init(mine), tx.init(theirs)
    for _ in range(4):
        with fo.use_backend("reference"):
            mine, state = compiled(mine, state)
        theirs, expected = step(theirs, expected)
    assert_close((mine, state), (theirs, expected))


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of each function of its own that breaks the graph
def test_steps_within_a_transformation_where_the_graph_breaks() -> None:
    """`init` breaks the graph, and the rest of the function runs outside of it, the derivative of its steps too."""
    tx = fo.chain(fo.adam(0.1, eps_root=1e-8), fo.params_ema(0.5))

    def loss(w: torch.Tensor) -> torch.Tensor:
        params = {"w": w}
        state = tx.init(params)
        for _ in range(2):
            params, state = fo.apply_gradients(tx, params, {"w": params["w"] ** 3}, state)
        averages: torch.Tensor = fo.eval_params(state, params)["w"]
        return averages.sum()

    w = torch.tensor([0.5, -1.0], dtype=torch.float64)
    found = torch.compile(torch.func.grad(loss), backend="aot_eager")(w)
    torch.testing.assert_close(found, torch.func.grad(loss)(w), rtol=1e-12, atol=0)


OF_MEMBERS: dict[str, Callable[[Any], Any]] = {
    "vmap": lambda step: torch.vmap(step),
    "vmap of vmap": lambda step: lambda *args: torch.vmap(torch.vmap(step))(*(x[:, None] for x in args)),
    "gradient of vmap": lambda step: torch.func.grad(lambda *args: torch.vmap(step)(*args).sum()),
    "vmap of gradient": lambda step: torch.vmap(torch.func.grad(lambda *args: step(*args).sum())),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", OF_MEMBERS)
@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_members_of_the_reference_that_is_traced(name: str, form: str) -> None:
    """A rate per member, by the reference that is asked for: the numbers of eager mode."""
    tx = fo.chain(fo.clip_by_global_norm(1.0), {"AdamW": fo.adamw, "Muon": fo.muon}[name](0.1), scale_by_value())
    state = tx.init({"w": torch.zeros(3, 2)})

    def step(w: Any, g: Any, rate: Any) -> Any:
        return fo.apply_gradients(tx, {"w": w}, {"w": g}, state, value=rate)[0]["w"]

    generator = torch.Generator().manual_seed(0)
    w, g = (torch.randn(4, 3, 2, generator=generator) for _ in range(2))
    arguments = (w, g, torch.tensor([0.5, 1.0, 2.0, 3.0]))
    run = OF_MEMBERS[form](step)
    with fo.use_backend("reference"):
        assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments), run(*arguments))


FOLLOWED: dict[str, Callable[[Any], Any]] = {
    "gradient": torch.func.grad,
    "forward mode": lambda loss: lambda g: torch.func.jvp(loss, (g,), (g,)),
    "vmap": lambda loss: lambda g: torch.vmap(loss)(g[None]),
    "vmap of gradient": lambda loss: lambda g: torch.vmap(torch.func.grad(loss))(g[None]),
    "gradient of vmap": lambda loss: torch.func.grad(lambda g: torch.vmap(loss)(g[None]).sum()),
    "autograd": lambda loss: loss,
}


# torch 2.14 quotes messages of a graph within its own
NEVER = r"the backend \\?'triton\\?' is asked for, but cannot compute the leaf"


@pytest.mark.parametrize("form", FOLLOWED)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_backend_that_never_computes_is_no_other_one_where_torch_follows(
    compiled: bool, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    tx, params = fo.adam(0.1), {"w": torch.ones(4)}
    state = tx.init(params)

    def loss(g: Any) -> Any:
        return fo.apply_gradients(tx, params, {"w": g}, state)[0]["w"].sum()

    run = FOLLOWED[form](loss)
    run = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    with (
        fo.use_backend("triton"),
        pytest.raises(RuntimeError, match=NEVER + r" at \\?'w\\?' on cpu"),
    ):
        run(torch.rand(4, requires_grad=form == "autograd"))


# transformations without a program for "w" on the CPU, or at all: no backend is needed but for the addition of updates
WITHOUT_PROGRAMS: dict[str, fo.GradientTransformation] = {
    "nothing": fo.identity(),
    "a mask of nothing": fo.masked(fo.adam(0.1), {"w": False, "other": False}),
    "whole tensors": fo.chain(fo.orthogonalize()),
}


@pytest.mark.filterwarnings("ignore:the mask .* matches no parameter")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", WITHOUT_PROGRAMS)
def test_a_backend_is_asked_for_by_programs_only(name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    tx, tree = WITHOUT_PROGRAMS[name], {"w": torch.eye(2), "other": torch.eye(2, 3)}
    state = tx.init(tree)

    def updated(g: Any) -> Any:
        return tx.update({"w": g, "other": g[:, :1].expand(2, 3)}, state, tree)[0]["w"].sum()

    def applied(g: Any) -> Any:
        return fo.apply_gradients(tx, tree, {"w": g, "other": g[:, :1].expand(2, 3)}, state)[0]["w"].sum()

    make = partial(torch.compile, fullgraph=True, backend="aot_eager") if compiled else lambda f: f
    expected = torch.func.grad(updated)(torch.eye(2))
    with fo.use_backend("triton"):
        assert_close(make(torch.func.grad(updated))(torch.eye(2)), expected)
        with pytest.raises(RuntimeError, match=NEVER):
            make(torch.func.grad(applied))(torch.eye(2))


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


@pytest.mark.slow
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


# torch 2.11 has symbols where formulas are traced, and the step is refused
SIZES_ARE_COMPILED_IN = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < "2.13", reason="older torch compiles no sizes in"
)


@pytest.mark.parametrize(
    "form",
    [
        "an operation",
        pytest.param("traced", marks=SIZES_ARE_COMPILED_IN),
        pytest.param("derivative", marks=SIZES_ARE_COMPILED_IN),
    ],
)
def test_sizes_of_parameters_that_are_variables(form: str) -> None:
    """Compiled in where the formulas of a step are, whose means follow from them."""
    tx = fo.chain(fo.clip_by_block_rms(0.1), fo.scale_by_factored_rms(min_dim_size_to_factor=2), fo.scale(-1.0))

    def step(p: torch.Tensor, state: Any) -> torch.Tensor:
        with fo.use_backend("reference" if form == "traced" else "c"):
            return fo.apply_gradients(tx, {"w": p}, {"w": p * p}, state)[0]["w"].square().sum()

    step = torch.func.grad(step) if form == "derivative" else step
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 5, 4):
        p = torch.linspace(0.5, 2.0, 2 * n, dtype=torch.float64).reshape(2, n)
        state = tx.init({"w": p})
        torch.testing.assert_close(compiled(p, state), step(p, state), rtol=1e-12, atol=0)


# -- tensors that a compiler cannot follow -------------------------------------------------------------------------


FACTOR = torch.tensor(2.0)


@fo.elementwise
def by_a_tensor(u: torch.Tensor) -> torch.Tensor:
    return u * FACTOR


@fo.leafwise
def whole_by_a_tensor(u: torch.Tensor) -> torch.Tensor:
    return _times(u)


def _times(u: torch.Tensor) -> torch.Tensor:
    return u * FACTOR


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "backend"), [(by_a_tensor, "inductor"), (whole_by_a_tensor, "eager")])
def test_a_tensor_that_a_rule_refers_to_is_named_where_a_compiler_cannot_follow_it(rule: Any, backend: str) -> None:
    tx = rule()

    @torch.compile(backend=backend, fullgraph=True)
    def step(params: Any) -> Any:
        with fo.use_backend("reference"):
            return fo.apply_gradients(tx, params, params, state)

    params = {"w": torch.ones(2, 3)}
    state = tx.init(params)
    with pytest.raises(Exception, match=rf"{rule.__name__} refers to `FACTOR`, a tensor that is no argument"):
        step(params)
