"""Derivatives through steps that kernels compute: every rule, beside torch operations and central differences."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import functional_optim as fo
from _lib.marks import INTERPRETER
from _lib.scripts import load_script
from _lib.transforms import CASES, IDS, SPARE


F32, F64 = torch.float32, torch.float64
STEPS = 5
SHAPES = {"a": (2,), "b": (1, 2)}


def inputs(dtype: torch.dtype = F64) -> list[torch.Tensor]:
    """Parameters, and two gradients of each that steps take in turns; none is near a place without a derivative."""
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.rand(shape, generator=generator, dtype=F64) for shape in [*SHAPES.values()] * 3]
    signs = [torch.tensor([1.0, -1.0], dtype=F64).expand(x.shape) for x in drawn]
    return [((0.3 + x) * s).to(dtype).requires_grad_() for x, s in zip(drawn, signs, strict=True)]


def steps_of(tx: Any, n: int = STEPS) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A function of parameters and gradients: parameters after some steps, and the floating part of the state.

    States start without a gradient, so all runs start from one.
    """

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = {k: x.detach().to(tensors[0].dtype) for k, x in zip(SHAPES, inputs(), strict=False)}
        params, one, two = (dict(zip(SHAPES, tensors[k : k + 2], strict=True)) for k in (0, 2, 4))
        state = tx.init(first)
        for k in range(n):
            params, state = fo.apply_gradients(tx, params, two if k % 2 else one, state)
        kept = [x for x in torch.utils._pytree.tree_leaves(state) if isinstance(x, torch.Tensor)]
        return (*params.values(), *[x for x in kept if x.is_floating_point()])

    return run


# rows whose masks name other parameters; that store slots in a narrower dtype, whose rounding has no derivative; and
# that divide by the root of a variance that is 0 at the first step
LEFT_OUT = ("mask", "mu_dtype", "float32", "stddev-eps_in_sqrt=True-bias_correction=True-initial_scale=0.0")
LEFT_OUT += ("stddev-eps_in_sqrt=False-bias_correction=True-initial_scale=0.0",)
LEFT_OUT += tuple(name for name in SPARE if "stddev" not in name)
ROWS = [k for k, name in enumerate(IDS) if not any(word in name for word in LEFT_OUT)]


@pytest.mark.parametrize("row", ROWS, ids=[IDS[k] for k in ROWS])
def test_first_and_second_derivatives(row: int) -> None:
    """Against central differences of step 1e-6, whose error in double precision is far below the tolerances."""
    steps, tensors = steps_of(CASES[row].ours), inputs()

    def run(*tensors: torch.Tensor) -> torch.Tensor:  # one output is checked once, and not each tensor by itself
        return torch.cat([x.reshape(-1) for x in steps(*tensors)])

    assert gradcheck(run, tensors, fast_mode=True)
    assert gradgradcheck(run, tensors, fast_mode=True, atol=1e-4)


def number(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=F64, requires_grad=True)


# chains, made of hyper-parameters that have derivatives of their own
CHAINS: dict[str, tuple[Callable[..., Any], tuple[float, ...]]] = {
    "momentum": (lambda lr, m: fo.sgd(lr, m, nesterov=True), (0.1, 0.9)),
    "AdamW": (lambda lr, b, wd: fo.adamw(lr, b, weight_decay=wd), (0.1, 0.9, 0.1)),
    "clip, AdamW and average": (
        lambda norm, lr, d: fo.chain(
            # of an update that follows the size of gradients, or the derivative of the norm would be a rounding error
            fo.clip_by_global_norm(norm),
            fo.adamw(lr, eps=1.0, mask=lambda path, p: p.ndim > 1),
            fo.params_ema(d),
        ),
        (0.5, 0.1, 0.9),
    ),
    "two norms": (
        lambda x, lr: fo.chain(fo.clip_by_global_norm(x), fo.trace(0.9), fo.clip_by_global_norm(lr)),
        (2.0, 0.1),
    ),
    "LAMB": (lambda lr, wd: fo.lamb(lr, weight_decay=wd), (0.1, 0.1)),
    "a schedule": (lambda lr: fo.adam(fo.exponential_decay(lr, 3, 0.5)), (0.1,)),
    "a function": (lambda lr: fo.sgd(lambda count: lr * 0.5**count), (0.1,)),
    "a maximum": (lambda lr: fo.chain(fo.adamax(lr), fo.scale(-1.0)), (0.1,)),
}


def derivatives(name: str, backend: str, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """Those of a loss after some steps, of parameters, gradients and hyper-parameters."""
    make, values = CHAINS[name]
    hypers, tensors = [number(x) for x in values], inputs(dtype)
    with fo.use_backend(backend):
        params = steps_of(make(*hypers))(*tensors)[: len(SHAPES)]
        loss = sum((x.double() * torch.sin(x.double())).sum() for x in params)
        return [loss.detach(), *torch.autograd.grad(loss, [*tensors, *hypers], allow_unused=True)]


BY_KERNELS = [(name, F64, "c") for name in CHAINS]
BY_KERNELS += [(name, F32, "c") for name in ("AdamW", "LAMB")]
BY_KERNELS += [pytest.param(name, F32, "triton", marks=INTERPRETER) for name in ("AdamW", "clip, AdamW and average")]


@pytest.mark.parametrize(("name", "dtype", "backend"), BY_KERNELS)
def test_derivatives_by_kernels_are_those_of_torch_operations(name: str, dtype: torch.dtype, backend: str) -> None:
    """To some roundings of each of five steps, which divide by roots of second moments and by norms."""
    eps = torch.finfo(dtype).eps
    found, expected = derivatives(name, backend, dtype), derivatives(name, "reference", dtype)
    for x, y in zip(found, expected, strict=True):
        assert y is None or x is not None
        if x is not None:  # a step is one node, so nothing that it reads is out of reach, as the decay of an average is
            y = torch.zeros_like(x) if y is None else y
            torch.testing.assert_close(x, y, rtol=200 * eps, atol=200 * eps * float(y.abs().max()))


def leaves_of(x: torch.Tensor) -> set[str]:
    """Names of the nodes of a graph."""
    found, stack = set(), [x.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found.add(node)
            stack += [after for after, _ in node.next_functions]
    return {node.name() for node in found}


def test_a_recorded_step_is_one_node_of_the_graph() -> None:
    params = {"w": torch.ones(3, requires_grad=True)}
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1))
    new, _ = fo.apply_gradients(tx, params, params, tx.init(params))
    assert leaves_of(new["w"]) == {"_StepBackward", "torch::autograd::AccumulateGrad"}


def test_a_rule_without_a_derivative_in_kernels_is_followed_by_torch() -> None:
    """A maximum over a leaf: half of its cotangent goes to either of two elements that are equal."""

    @fo.elementwise
    def scale_to_one(u):  # type: ignore[no-untyped-def]
        return u / fo.leaf_amax(torch.abs(u))

    u = torch.tensor([2.0, -2.0, 1.0], dtype=F64, requires_grad=True)
    tx = scale_to_one()
    updates, _ = tx.update({"w": u}, tx.init({"w": u}))
    assert "a parameter requires a gradient" in str(fo.explain(tx, {"w": u}))
    (d,) = torch.autograd.grad(updates["w"][2], u)
    torch.testing.assert_close(d, torch.tensor([-0.125, 0.125, 0.5], dtype=F64))


def test_explain_says_what_the_derivative_costs() -> None:
    params = {"w": torch.ones(4, requires_grad=True)}
    explained = fo.explain(fo.adamw(0.1), params)
    assert explained.backends == ("c",)
    assert any("its derivative, too, in 1 pass, 24 + 16 bytes" in note for note in explained.notes)


def test_steps_that_are_computed_again_for_their_derivative() -> None:
    tx = fo.chain(fo.clip_by_global_norm(0.5), fo.adamw(0.1))
    run = steps_of(tx)

    def twice(checkpointed: bool) -> tuple[torch.Tensor, ...]:
        tensors = inputs()
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(run, *tensors, use_reentrant=False)
        else:
            out = run(*tensors)
        return torch.autograd.grad(sum(x.sum() for x in out), tensors)

    for x, y in zip(twice(True), twice(False), strict=True):
        assert torch.equal(x, y)


def test_some_leaves_only() -> None:
    """A loss of one leaf; its norm follows from the others, too."""
    tx = fo.chain(fo.clip_by_global_norm(0.5), fo.scale(-1.0))
    grads = {
        "a": torch.tensor([3.0, 4.0], dtype=F64, requires_grad=True),
        "b": torch.ones(2, dtype=F64, requires_grad=True),
    }
    updates, _ = tx.update(grads, tx.init(grads))
    found = torch.autograd.grad(updates["a"][0], [grads["a"], grads["b"]])

    def first(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return -a[0] * 0.5 / torch.sqrt((a * a).sum() + (b * b).sum())

    expected = torch.autograd.grad(first(grads["a"], grads["b"]), [grads["a"], grads["b"]])
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-14, atol=1e-16)


OUTER = torch.tensor(0.5, dtype=F64)  # a hyper-parameter that nothing differentiates


@fo.elementwise
def scale_by_amax(u: Any, *, eps: Any = 1.0) -> Any:
    """A rule whose derivative has no kernels."""
    return u / (eps + fo.leaf_amax(torch.abs(u)))


INNER: dict[str, Callable[[Any], Any]] = {
    "kernels": lambda rate: fo.chain(fo.clip_by_global_norm(OUTER), fo.adam(rate, eps=0.1)),
    "torch operations": lambda rate: fo.chain(scale_by_amax(eps=OUTER), fo.scale_by_learning_rate(rate)),
    "a maximum alone": lambda rate: scale_by_amax(),
}


def loss_of_chain(name: str) -> Callable[..., torch.Tensor]:
    """A loss after steps of a chain that is made inside of the function which is differentiated."""

    def loss_after(rate: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        tx = INNER[name](rate)
        params = {"w": w}
        state = tx.init(params)
        for _ in range(3):
            params, state = fo.apply_gradients(tx, params, {"w": g * params["w"]}, state)
        return (params["w"] * params["w"]).sum()

    return loss_after


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "grad": lambda f: torch.func.grad(f, argnums=(0, 1, 2)),
    "grad of grad": lambda f: torch.func.grad(
        lambda *args: sum(x.sum() for x in torch.func.grad(f, argnums=(0, 1))(*args)), argnums=(0, 1, 2)
    ),
    "jacrev": lambda f: torch.func.jacrev(lambda *args: f(*args)[None] * torch.ones(2, dtype=F64), argnums=(0, 1)),
    "vjp": lambda f: lambda *args: torch.func.vjp(f, *args)[1](torch.ones((), dtype=F64)),
    "hessian": lambda f: torch.func.hessian(f, argnums=1),
    "jacrev of grad": lambda f: torch.func.jacrev(torch.func.grad(f, argnums=(0, 1)), argnums=(0, 1, 2)),
    "jacfwd of grad": lambda f: torch.func.jacfwd(torch.func.grad(f, argnums=(0, 1)), argnums=(0, 1, 2)),
    "jacrev of grad of grad": lambda f: torch.func.jacrev(
        lambda *args: TRANSFORMS["grad of grad"](f)(*args)[1], argnums=(0, 1, 2)
    ),
    "jacrev of jacrev": lambda f: torch.func.jacrev(torch.func.jacrev(f, argnums=1), argnums=(0, 1)),
    "vmap of grad": lambda f: torch.vmap(torch.func.grad(f, argnums=1), in_dims=(None, 0, None)),
    "vmap of the vjp of grad": lambda f: (
        lambda *args: torch.vmap(torch.func.vjp(torch.func.grad(f, argnums=1), *args)[1])(torch.eye(4, dtype=F64))
    ),
}


@pytest.mark.parametrize("chain", INNER)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformations_of_steps_are_those_of_torch_operations(name: str, chain: str) -> None:
    generator = torch.Generator().manual_seed(3)
    w, g = (torch.randn(4, generator=generator, dtype=F64) for _ in range(2))
    w = torch.stack([w, 2 * w]) if name == "vmap of grad" else w
    args = torch.tensor(0.1, dtype=F64), w, g

    loss_after = loss_of_chain(chain)

    found = TRANSFORMS[name](loss_after)(*args)
    with fo.use_backend("reference"):
        expected = TRANSFORMS[name](loss_after)(*args)

    for x, y in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)


# --- leaves without elements, and without a gradient


@fo.elementwise(state={"seen": fo.slot(1.0, per="leaf"), "total": fo.slot(1.0, per="tree")})
def keep_numbers(u: Any, seen: Any, total: Any, *, rate: Any = 1.0) -> Any:
    norm = fo.tree_norm(u)
    return rate * u / fo.leaf_norm(u), seen * fo.leaf_mean(u * u) + rate * norm, total * rate * norm


@fo.elementwise(state={"own": fo.slot(1.0, per="leaf")})
def keep_own(u: Any, own: Any, *, rate: Any = 1.0) -> Any:
    return rate * u * own / fo.leaf_norm(u), 0.5 * own * rate + fo.tree_norm(u)


OF_LEAVES: dict[str, Callable[[Any], Any]] = {
    "a mean over a leaf": fo.clip_by_block_rms,
    "a norm of a leaf": lambda rate: fo.scale_by_trust_ratio(trust_coefficient=rate),
    "numbers of leaves and of the tree": lambda rate: keep_numbers(rate=rate),
    "numbers of leaves": lambda rate: keep_own(rate=rate),
    "a norm of the tree": fo.clip_by_global_norm,
    "no reduction": lambda rate: fo.adam(rate, eps=0.1),
}


@pytest.mark.parametrize("backend", [None, "reference"], ids=str)
@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("name", OF_LEAVES)
def test_a_leaf_without_elements_has_no_part_in_derivatives(name: str, first: bool, backend: str | None) -> None:
    """Not 0 times infinity: those of updates, and of numbers of the tree, are as if it were not there."""

    def found(with_empty: bool) -> list[torch.Tensor]:
        rate = torch.tensor(0.3, dtype=F64, requires_grad=True)
        tx = OF_LEAVES[name](rate)
        params = {"w": torch.tensor([1.0, -2.0, 0.5], dtype=F64), "x": torch.tensor([[0.3]], dtype=F64)}
        if with_empty:
            empty = torch.zeros(0, 3, dtype=F64)
            params = {"a": empty, **params} if first else {**params, "z": empty}
        params = {k: p.requires_grad_() for k, p in params.items()}
        state = tx.init({k: p.detach() for k, p in params.items()})
        new = params
        for _ in range(2):
            updates, state = tx.update({k: p * p for k, p in new.items()}, state, new)
            new = fo.apply_updates(new, updates)
        total = sum((x**2).sum() for x in new.values())
        if "tree" in name and hasattr(state, "total"):
            total = total + state.total
        if hasattr(state, "own") or hasattr(state, "seen"):
            numbers = state.own if hasattr(state, "own") else state.seen
            total = total + numbers["w"] * numbers["x"]
        return list(torch.autograd.grad(total, [rate, params["w"], params["x"]]))  # type: ignore[arg-type]

    with fo.use_backend(backend) if backend else contextlib.nullcontext():
        for x, y in zip(found(True), found(False), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-15)


def test_the_number_of_a_leaf_without_elements_follows_the_tree() -> None:
    """Its cotangent goes to the elements of other leaves."""
    params = {"a": torch.zeros(0, dtype=F64), "w": torch.tensor([3.0, 4.0], dtype=F64, requires_grad=True)}
    tx = keep_own()
    _, state = tx.update(params, tx.init({k: p.detach() for k, p in params.items()}), params)
    (found,) = torch.autograd.grad(state.own["a"], params["w"])
    torch.testing.assert_close(found, torch.tensor([0.6, 0.8], dtype=F64), rtol=1e-14, atol=0)


def quadratic(params: Any) -> torch.Tensor:
    return (params["w"] * params["b"] + params["w"] ** 2).sum() + (params["b"] ** 3).sum()  # type: ignore[no-any-return]


STEPPED: dict[str, Callable[..., Any]] = {
    "apply_gradients": fo.apply_gradients,
    "update": lambda tx, p, g, s: (lambda u, new: (fo.apply_updates(p, u), new))(*tx.update(g, s, p)),
    "compiled": lambda *args: torch.compile(fo.apply_gradients, fullgraph=True, backend="eager")(*args),
    "compiled, update": lambda *args: torch.compile(STEPPED["update"], fullgraph=True, backend="eager")(*args),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("backend", ["c", "reference"])
@pytest.mark.parametrize("form", STEPPED)
def test_inner_gradients_where_some_leaves_have_none(form: str, backend: str) -> None:
    """A leaf without a gradient is another tensor after the step, lest the next gradient follow it through the step."""
    torch.compiler.reset()

    def trained(rate: torch.Tensor, by_autograd: bool) -> torch.Tensor:
        tx = fo.chain(fo.trace(0.9), fo.scale_by_learning_rate(rate))
        params = {k: torch.tensor([0.5, -0.3], dtype=F64, requires_grad=True) for k in ("w", "b")}
        state = tx.init({k: p.detach() for k, p in params.items()})
        for k in range(4):
            if by_autograd:
                found = torch.autograd.grad(quadratic(params), [*params.values()], create_graph=True)
                grads: Any = dict(zip(params, found, strict=True))
                params, state = STEPPED[form](tx, params, {**grads, "b": grads["b"] if k % 2 else None}, state)
            else:
                grads = torch.func.grad(quadratic)(params)
                params, state = fo.apply_gradients(tx, params, {**grads, "b": grads["b"] if k % 2 else None}, state)
        return quadratic(params)

    rate = torch.tensor(0.05, dtype=F64, requires_grad=True)
    with fo.use_backend(backend):
        loss = trained(rate, True)
        expected = trained(rate, False)
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
        derivatives = [torch.autograd.grad(x, rate)[0] for x in (loss, expected)]
    torch.testing.assert_close(*derivatives, rtol=1e-12, atol=0)


@pytest.mark.parametrize("hidden", [False, True], ids=["seen", "hidden"])
@pytest.mark.parametrize("stepped", ["update", "apply_gradients"])
def test_a_leaf_that_a_rule_does_not_see_may_have_no_gradient_in_a_recorded_step(stepped: str, hidden: bool) -> None:
    """Its state is no tensor."""
    tx = fo.chain(fo.masked(fo.trace(0.9), {"w": True, "b": not hidden}), fo.scale(-0.1))
    params = {k: torch.ones(2, dtype=F64).requires_grad_() for k in ("w", "b")}
    state = tx.init({k: p.detach() for k, p in params.items()})
    now = params
    for _ in range(2):
        now, state = STEPPED[stepped](tx, now, {"w": now["w"] ** 2, "b": None}, state)
    found = torch.autograd.grad(now["w"].sum() + now["b"].sum(), [params["w"], params["b"]])

    w = torch.ones(2, dtype=F64).requires_grad_()
    first = w - 0.1 * w**2
    second = first - 0.1 * (first**2 + 0.9 * w**2)
    torch.testing.assert_close(found[0], torch.autograd.grad(second.sum(), w)[0], rtol=1e-14, atol=0)
    assert torch.equal(found[1], torch.ones(2, dtype=F64))


PACKED: dict[str, Callable[[Any, Any], Any]] = {
    "grad": lambda f, w: torch.func.grad(f)(w),
    "vjp": lambda f, w: torch.func.vjp(f, w)[1](torch.ones((), dtype=F64))[0],
    "jacrev": lambda f, w: torch.func.jacrev(f)(w),
    "jacfwd": lambda f, w: torch.func.jacfwd(f)(w),
    "vmap of grad": lambda f, w: torch.vmap(torch.func.grad(f))(w[None])[0],
    "grad of vmap": lambda f, w: torch.func.grad(lambda w: torch.vmap(f)(w[None]).sum())(w),
    "grad within grad": lambda f, w: torch.func.grad(lambda w: f(w) + 0 * torch.func.grad(f)(w).sum())(w),
}


@pytest.mark.parametrize("name", PACKED)
def test_an_argument_of_a_transformation_that_is_packed_is_followed(name: str) -> None:
    w = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    found = PACKED[name](lambda w: (fo.unpack(fo.pack({"w": w}))["w"] ** 2).sum(), w)
    assert torch.equal(found, 2 * w)


# by kernels, with leaves that take no part; by torch operations; and through a region of whole tensors
OF_PACKED: dict[str, Callable[[Any], Any]] = {
    "clip, AdamW and average": lambda rate: fo.chain(
        fo.clip_by_global_norm(0.5), fo.adamw(rate, weight_decay=0.1), fo.params_ema(0.9)
    ),
    "masked": lambda rate: fo.chain(fo.masked(fo.adam(rate, eps=0.1), lambda path, p: p.ndim > 1), fo.scale(0.5)),
    "a rule without a derivative in kernels": lambda rate: fo.chain(scale_by_amax(), fo.scale_by_learning_rate(rate)),
    "Muon": lambda rate: fo.muon(rate, compute_dtype=F64),
}


@pytest.mark.parametrize("name", OF_PACKED)
def test_packed_trees_have_the_derivatives_of_the_trees(name: str) -> None:
    """Of parameters, gradients and a rate, through five steps; to the roundings of sums over leaves."""
    drawn = inputs()
    trees = [dict(zip(SHAPES, drawn[k : k + 2], strict=True)) for k in (0, 2, 4)]

    def derivatives_of(params: Any, one: Any, two: Any, given: Sequence[torch.Tensor]) -> tuple[set[str], Any]:
        rate = number(0.1)
        tx = OF_PACKED[name](rate)
        state = tx.init(fo.pack(trees[0]) if isinstance(params, fo.Packed) else trees[0])
        for k in range(STEPS):
            params, state = fo.apply_gradients(tx, params, two if k % 2 else one, state)
        loss = sum((x * x).sum() for x in fo.unpack(params).values())
        return leaves_of(loss), [loss.detach(), *torch.autograd.grad(loss, [*given, rate])]

    packed = [fo.pack(tree).map(lambda x: x.requires_grad_()) for tree in trees]
    nodes, found = derivatives_of(*packed, [tree.buffers[0] for tree in packed])
    expected_nodes, (loss, *by_leaf, rate) = derivatives_of(*trees, drawn)
    by_tree = [fo.pack(dict(zip(SHAPES, by_leaf[k : k + 2], strict=True))) for k in (0, 2, 4)]
    expected = [loss, *[tree.buffers[0] for tree in by_tree], rate]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert ("_StepBackward" in nodes) == ("_StepBackward" in expected_nodes)
    assert "_StepBackward" in nodes or name == "a rule without a derivative in kernels"


@pytest.mark.parametrize("recorded", [False, True])
def test_a_leaf_without_a_gradient_is_the_same_tensor_unless_autograd_follows(recorded: bool) -> None:
    tx = fo.sgd(0.1, momentum=0.9)
    params = {k: torch.ones(2).requires_grad_(recorded) for k in ("w", "b")}
    grads = {"w": torch.ones(2), "b": None}
    new, _ = fo.apply_gradients(tx, params, grads, tx.init(params))
    assert (new["b"] is params["b"]) is not recorded
    assert new["b"].data_ptr() == params["b"].data_ptr()
    added = fo.apply_updates(params, grads)
    assert (added["b"] is params["b"]) is not recorded
    with torch.no_grad():
        assert fo.apply_gradients(tx, params, grads, tx.init(params))[0]["b"] is params["b"]
        assert fo.apply_updates(params, grads)["b"] is params["b"]


# --- the examples


@pytest.mark.slow
def test_meta_learning_makes_adaptation_better() -> None:
    example = load_script("examples/maml_sinusoid.py")
    model = example.make_model()
    _, first = example.losses(model)
    example.meta_train(model, 15)
    before, after = example.losses(model)
    assert after < before
    assert after < first


def test_hyper_parameters_that_are_learned_lower_the_loss() -> None:
    example = load_script("examples/hypergradient.py")
    rounds = example.learn(example.make_problem(), 10)
    assert rounds[-1].test_loss < rounds[0].test_loss
    assert all(x != y for x, y in zip(rounds[0][:3], rounds[-1][:3], strict=True))


# --- what happens between a step and its derivative


def test_many_cotangents_at_once() -> None:
    """And the derivative of what they give, which follows the tensors of the step, too."""
    w = torch.tensor([1.0, -2.0, 0.5], dtype=F64, requires_grad=True)
    tx = fo.chain(fo.clip_by_global_norm(0.5), fo.adam(0.1, eps=0.1))
    new, _ = fo.apply_gradients(tx, {"w": w}, {"w": w**2}, tx.init({"w": w}))
    eye = torch.eye(3, dtype=F64)
    (found,) = torch.autograd.grad(new["w"], w, eye, is_grads_batched=True, create_graph=True)
    rows = [torch.autograd.grad(new["w"], w, row, create_graph=True)[0] for row in eye]
    expected = torch.stack(rows)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    again = [torch.autograd.grad((x**2).sum(), w, retain_graph=True)[0] for x in (found, expected)]
    torch.testing.assert_close(*again, rtol=1e-12, atol=1e-14)
    (found,) = torch.autograd.grad(new["w"], w, eye, is_grads_batched=True)
    assert not found.requires_grad


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "with holes": lambda x: torch.stack([x, x], -1)[..., 0],
}
COTANGENTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "expanded": lambda p, w: p.sum(),
    "transposed": lambda p, w: (p.t() * w.t().contiguous()).sum(),
    "of a part": lambda p, w: (p[1:, ::2] * w[1:, ::2]).sum(),
    "a view of a larger one": lambda p, w: (torch.cat([p, p]) * torch.cat([w, -0.5 * w])).sum(),
}


@pytest.mark.parametrize("cotangent", COTANGENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_leaves_of_many_chunks_and_cotangents_of_any_layout(layout: str, cotangent: str) -> None:
    """A derivative reads cotangents that autograd makes: expanded, transposed, parts of others."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (300, 400), "b": (7, 5)}  # four chunks, whose last is a part of one; and less than one
    drawn = [{k: torch.randn(shape, generator=generator, dtype=F64) for k, shape in shapes.items()} for _ in range(3)]
    found = {}
    for backend in ("c", "reference"):
        rate = number(0.1)
        tx = fo.chain(fo.clip_by_global_norm(50.0), fo.adam(rate, eps=0.1))
        params, grads = (
            {k: LAYOUTS[layout](x).detach().requires_grad_() for k, x in tree.items()} for tree in drawn[:2]
        )
        with fo.use_backend(backend):
            now, state = params, tx.init(params)
            for _ in range(3):
                now, state = fo.apply_gradients(tx, now, grads, state)
        loss = torch.stack([COTANGENTS[cotangent](now[k], drawn[2][k]) for k in shapes]).sum()
        found[backend] = torch.autograd.grad(loss, [*params.values(), *grads.values(), rate])
    for x, y in zip(found["c"], found["reference"], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11 * float(y.abs().max()))
