"""Train steps of the pure API inside `torch.compile`: one graph, and the numbers of eager mode."""

import collections
import copy
import io
import re
from typing import Any

import pytest
import torch

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
    counting,
    dynamo,
    start,
    train_step,
)


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own


@fo.elementwise(extra=("lr",))
def scale_by_given_rate(u: Any, *, lr: Any) -> Any:
    return -lr * u


@fo.elementwise(extra={"scale": "element"})
def scale_by_tree(u: Any, *, scale: Any) -> Any:
    return u * scale


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


@pytest.mark.slow
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


def momentum_rule(factor: float) -> Any:
    """A rule of a function, which has no address, and has other formulas each time that it is made."""

    @fo.elementwise(state={"m": fo.zeros, "size": fo.slot(per="leaf")})
    def momentum(u: Any, m: Any, size: Any, *, step: Any, decay: Any = 0.5) -> Any:
        m = decay * m + factor * u
        return m / (1 - decay**step), m, fo.leaf_norm(u)

    return momentum


@pytest.mark.slow
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: fo.chain(fo.masked(tx, {"w": True, "b": False}), tx)])
def test_a_rule_that_is_defined_within_a_function(wrap: Any, donate: bool) -> None:
    tx = wrap(momentum_rule(2.0)())
    params, grads = {"w": torch.ones(3), "b": torch.ones(2)}, {"w": torch.full((3,), 0.5), "b": torch.ones(2)}
    state = tx.init(params)
    expected = copy.deepcopy((params, state))
    compiled = torch.compile(lambda p, s: fo.apply_gradients(tx, p, grads, s, donate=donate), fullgraph=True)
    for _ in range(3):
        params, state = compiled(params, state)
        expected = fo.apply_gradients(tx, expected[0], grads, expected[1])
        assert_equal((params, state), expected)


@pytest.mark.slow
def test_a_state_of_a_rule_that_was_written_anew_since() -> None:
    first, second = momentum_rule(1.0)(), momentum_rule(3.0)()
    params, grads = {"w": torch.ones(3)}, {"w": torch.full((3,), 0.5)}
    params, state = fo.apply_gradients(first, params, grads, first.init(params))

    def step(params: Any, state: Any) -> Any:
        return fo.apply_gradients(second, params, grads, state)

    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"was written anew; take one step outside .* with `donate=False`"
    ):
        torch.compile(step, backend="eager", fullgraph=True)(params, state)
    found = torch.compile(step, backend="eager")(params, state)
    assert_equal(found, step(params, state))
    assert_equal(torch.compile(step, backend="eager", fullgraph=True)(*found), step(*found))


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
    with pytest.raises(Exception, match=r"Message: updates does not have the structure of params: it lacks '0.weight'"):
        apply(tx, params, {k: p for k, p in params.items() if k != "0.weight"}, state)
    for make in (lambda: fo.sgd(0.1), lambda: fo.lbfgs(0.1), lambda: fo.stateless(lambda u, p: u)):
        step: Any = lambda p, s, make=make: fo.apply_gradients(make(), p, p, s)  # noqa: E731
        with pytest.raises(Exception, match="the chain is made inside of the compiled function; make it outside"):
            torch.compile(step, fullgraph=True, backend="eager")(params, make().init(params))
    with pytest.raises(Exception, match="`init` is called inside of the compiled function; call it once, outside"):
        torch.compile(tx.init, fullgraph=True, backend="eager")(params)
    assert_equal(torch.compile(tx.init, backend="eager")(params), state)  # a break
    with pytest.raises(Exception, match="`pack` is called inside of the compiled function; pack once, outside"):
        torch.compile(fo.pack, fullgraph=True, backend="eager")(params)
    assert_equal(fo.unpack(torch.compile(fo.pack, backend="eager")(params)), params)
    wide = fo.chain(fo.GradientTransformation(counting, lambda u, s, params=None: (u, {"n": s["n"].double()})), tx)
    with pytest.raises(ValueError, match="returns updates and a state of the shapes and dtypes that it was given"):
        apply(wide, params, params, wide.init(params))


@pytest.mark.slow
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
