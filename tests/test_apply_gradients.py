"""One step: pure or in place, explained, differentiated, mapped, from several threads, and with tensors that change."""

import gc
import itertools
import re
import threading
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support import DOUBLE, Halve, Snapshot, assert_same_bits, clone, is_matrix, leaves, like, make_tree, train

import functional_optim as fo


STEPS = 20
BACKENDS = ["reference", "foreach", "c"]


def flip(updates: Any, params: Any) -> Any:
    """A barrier: what a kernel, which sees one element at a time, cannot do."""
    return {k: None if u is None else u.flip(0) if u.ndim else u for k, u in updates.items()}


CHAINS: dict[str, Any] = {
    "sgd": fo.sgd(0.1),
    "momentum": fo.sgd(0.1, momentum=0.9, nesterov=True),
    "clip, AdamW and average": fo.chain(
        fo.clip_by_global_norm(1.0), fo.adamw(1e-2, weight_decay=0.1, mask=is_matrix), fo.params_ema(0.9)
    ),
    "lamb with schedule": fo.chain(fo.zero_nans(), fo.lamb(fo.cosine_decay_schedule(1e-2, STEPS), weight_decay=0.1)),
    "host schedule": fo.sgd(lambda count: [0.1, 0.2][int(count) % 2]),
    "partition": fo.partition({True: fo.adam(1e-2), False: fo.sgd(0.1, 0.9)}, is_matrix),
    "barrier first": fo.chain(fo.stateless(flip), fo.adam(1e-2)),
    "barrier between": fo.chain(fo.trace(0.9), fo.stateless(flip), fo.scale_by_adam(), fo.scale(-1e-2)),
    "barrier last": fo.chain(fo.adam(1e-2), fo.stateless(flip)),
    "only a barrier": fo.chain(Halve()),
}


def mixed_tree() -> dict[str, torch.Tensor]:
    """Leaves of several dtypes and layouts."""
    tree = make_tree(0)
    return {
        "weight": tree["weight"],
        "bias": tree["bias"].float(),
        "scale": tree["scale"].bfloat16(),
        "columns": torch.ones(4, 6)[:, ::2],
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "empty": torch.zeros(0, 3),
    }


# --- pure


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHAINS)
def test_pure_steps_leave_what_they_are_given(name: str, backend: str) -> None:
    tx, params = CHAINS[name], mixed_tree()
    with fo.use_backend(backend):
        params, state = train(tx, params, [like(params, 1)])
        grads = like(params, 2)
        before = Snapshot(params, grads, state)

        tx.update(grads, state, params)
        fo.apply_gradients(tx, params, grads, state)

    before.check()


@pytest.mark.parametrize("name", CHAINS)
def test_results_are_new_tensors(name: str) -> None:
    tx, params = CHAINS[name], make_tree(0)
    grads, state = like(params, 1), tx.init(params)

    new_params, new_state = fo.apply_gradients(tx, params, grads, state)

    old = {x.data_ptr() for x in leaves((params, grads, state)) if isinstance(x, torch.Tensor)}
    assert not old & {x.data_ptr() for x in leaves((new_params, new_state)) if isinstance(x, torch.Tensor)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHAINS)
def test_a_step_is_update_and_apply_updates(name: str, backend: str) -> None:
    tx, params = CHAINS[name], make_tree(0)
    grads = [like(params, seed) for seed in range(1, STEPS + 1)]
    stepwise, state = params, tx.init(params)
    with fo.use_backend(backend):
        for g in grads:
            updates, state = tx.update(g, state, stepwise)
            stepwise = fo.apply_updates(stepwise, updates)

        actual = train(tx, params, grads)

    torch.testing.assert_close(actual, (stepwise, state), **DOUBLE)


# --- in place


# Triton's interpreter takes the numbers out of arrays of one element in a way that NumPy warns about
ignore_interpreter = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHAINS)
def test_donated_steps_write_in_place(name: str, backend: str) -> None:
    tx, params = CHAINS[name], mixed_tree()
    with fo.use_backend(backend):
        params, state = train(tx, params, [like(params, 1)])
        grads = like(params, 2)
        expected = fo.apply_gradients(tx, clone(params), grads, clone(state))
        tensors, versions, unused = leaves(params), [p._version for p in leaves(params)], Snapshot(grads)

        new_params, new_state = fo.apply_gradients(tx, params, grads, state, donate=True)

    unused.check()
    assert new_params is params
    assert list(map(id, leaves(params))) == list(map(id, tensors))
    assert all(p._version > v for p, v in zip(leaves(params), versions, strict=True) if p.numel())
    assert_same_bits((new_params, new_state), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in CHAINS if "barrier" not in name])
def test_donated_states_are_the_same_objects(name: str, backend: str) -> None:
    tx, params = CHAINS[name], make_tree(0)
    with fo.use_backend(backend):
        params, state = train(tx, params, [like(params, 1)])
        before = leaves(state)
        versions = [x._version for x in before]

        _, new_state = fo.apply_gradients(tx, params, like(params, 2), state, donate=True)

    assert new_state is state
    assert list(map(id, leaves(state))) == list(map(id, before))
    assert all(x._version > v for x, v in zip(before, versions, strict=True))


def test_what_comes_before_a_barrier_is_returned_anew() -> None:
    tx, params = CHAINS["barrier between"], make_tree(0)
    params, state = train(tx, params, [like(params, 1)])
    trace, _, adam, _ = state
    untouched = Snapshot(trace)

    _, new_state = fo.apply_gradients(tx, params, like(params, 2), state, donate=True)

    untouched.check()
    assert not {x.data_ptr() for x in leaves(trace)} & {x.data_ptr() for x in leaves(new_state[0])}
    assert list(map(id, leaves(new_state[2]))) == list(map(id, leaves(adam)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_donated_steps_are_many_pure_steps(backend: str) -> None:
    params = make_tree(0, torch.float32)
    grads = [like(params, seed) for seed in range(STEPS)]
    tx = CHAINS["clip, AdamW and average"]
    with fo.use_backend(backend):
        expected = train(tx, params, grads)

        actual = train(tx, clone(params), grads, donate=True)

    assert_same_bits(actual, expected)


@ignore_interpreter
def test_donated_steps_in_the_interpreter_of_triton() -> None:
    params = make_tree(0, torch.float32)
    grads = [like(params, seed) for seed in range(2)]
    tx = CHAINS["clip, AdamW and average"]
    with fo.use_backend("triton"):
        expected = train(tx, params, grads)
        donated = clone(params)
        versions = [p._version for p in leaves(donated)]

        actual = train(tx, donated, grads, donate=True)

    assert_same_bits(actual, expected)
    assert all(p._version > v for p, v in zip(leaves(donated), versions, strict=True))


@ignore_interpreter
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_autograd_notices_a_donated_step(backend: str) -> None:
    tx, w = fo.sgd(0.1), torch.nn.Parameter(torch.ones(3))
    loss = (w * w).sum()

    with torch.no_grad(), fo.use_backend(backend):
        fo.apply_gradients(tx, {"w": w}, {"w": torch.ones(3)}, tx.init({"w": w}), donate=True)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_donated_module_trains() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1, dtype=torch.float64)
    reference = torch.nn.Linear(3, 1, dtype=torch.float64)
    reference.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    params = dict(model.named_parameters())
    tx = fo.sgd(0.1, momentum=0.9)
    state = tx.init(params)
    inputs = torch.randn(STEPS, 4, 3, dtype=torch.float64)

    for x in inputs:
        grads = torch.autograd.grad(model(x).square().mean(), list(params.values()))
        with torch.no_grad():
            params, state = fo.apply_gradients(tx, params, dict(zip(params, grads, strict=True)), state, donate=True)
        optimizer.zero_grad()
        reference(x).square().mean().backward()
        optimizer.step()

    assert all(p.requires_grad and p is params[k] for k, p in model.named_parameters())
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), **DOUBLE)


def test_donating_views_writes_to_their_base() -> None:
    base = torch.zeros(6)
    params = {"a": base[:2], "b": base[2:6].view(2, 2)}
    tx = fo.sgd(1.0)
    state, version = tx.init(params), base._version

    fo.apply_gradients(tx, params, {"a": torch.ones(2), "b": torch.full((2, 2), 2.0)}, state, donate=True)

    torch.testing.assert_close(base, torch.tensor([-1.0, -1, -2, -2, -2, -2]))
    assert base._version > version


@pytest.mark.parametrize("backend", BACKENDS)
def test_donation_under_inference_mode(backend: str) -> None:
    """Tensors of inference mode have no versions, wherever those of the steps before came from."""
    tx, expected = fo.adam(0.1), train(fo.adam(0.1), {"w": torch.zeros(3)}, [{"w": torch.ones(3)}])
    with fo.use_backend(backend):
        for mode in (False, True, False):
            with torch.inference_mode(mode):
                actual = train(tx, {"w": torch.zeros(3)}, [{"w": torch.ones(3)}], donate=True)

            # one step of Adam from zero; backends round its last bit differently
            torch.testing.assert_close(actual, expected, rtol=2**-22, atol=0)


# --- hyper-parameters that change


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_as_hyper_parameter_is_read_at_every_step(backend: str) -> None:
    rate = torch.tensor(1.0)
    tx, params = fo.sgd(rate), {"w": torch.zeros(())}
    state = tx.init(params)
    with fo.use_backend(backend):
        for value in (1.0, 10.0, 100.0):
            rate.fill_(value)
            params, state = fo.apply_gradients(tx, params, {"w": torch.ones(())}, state)

    torch.testing.assert_close(params["w"], torch.tensor(-111.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_within_a_schedule_is_read_at_every_step(backend: str) -> None:
    rate = torch.tensor(1.0)
    tx, params = fo.sgd(lambda count: rate * 2.0**count), {"w": torch.zeros(())}
    state = tx.init(params)
    with fo.use_backend(backend):
        for value in (1.0, 10.0, 100.0):
            rate.fill_(value)
            params, state = fo.apply_gradients(tx, params, {"w": torch.ones(())}, state)

    torch.testing.assert_close(params["w"], torch.tensor(-(1.0 + 2 * 10.0 + 4 * 100.0)))


# --- choice of the backend


def backends(params: Any = None) -> tuple[str, ...]:
    return fo.explain(fo.sgd(0.1), {"w": torch.zeros(2)} if params is None else params).backends


def test_choices_nest() -> None:
    assert backends() == ("c",)
    with fo.use_backend("foreach"):
        assert backends() == ("foreach",)
        with fo.use_backend("reference"):
            assert backends() == ("reference",)
        assert backends() == ("foreach",)
        with pytest.raises(ValueError, match="unknown backend"), fo.use_backend("triton"), fo.use_backend("cuda"):
            pass
        assert backends() == ("foreach",)
    assert backends() == ("c",)


def test_each_thread_has_its_own_choice() -> None:
    meet = threading.Barrier(2, timeout=60)

    def work(name: str) -> tuple[str, ...]:
        with fo.use_backend(name):
            meet.wait()
            found = backends()
            meet.wait()
        return found

    with ThreadPoolExecutor(2) as pool, fo.use_backend("triton"):
        found = list(pool.map(work, ("foreach", "reference")))
        assert backends() == ("triton",)

    assert found == [("foreach",), ("reference",)]


# --- explain


RECIPE = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-3), fo.params_ema(0.99))

TEXT = """\
3,000 parameters in 2 tensors, computed by c
  2 launches in 2 passes over memory
  40 bytes per element: 24 read, 16 written
  12 bytes of state per parameter
kernel over 2 tensors, 3,000 elements, 1 row of scalars: 2 passes, 24 + 16 bytes
  reads updates, params, scale_by_adam.mu, scale_by_adam.nu, params_ema.ema; \
writes params, scale_by_adam.mu, scale_by_adam.nu, params_ema.ema"""


def test_the_text_of_explain() -> None:
    assert str(fo.explain(RECIPE, {"w": torch.zeros(50, 50), "b": torch.zeros(500)})) == TEXT


F, D, B = torch.float32, torch.float64, torch.bfloat16
# passes, launches, bytes read per element, bytes written; counted by hand from the formulas
COUNTS: dict[str, tuple[Any, torch.dtype, tuple[int, int, int, int]]] = {
    "sgd": (fo.sgd(0.1), F, (1, 1, 8, 4)),  # u, p -> p
    "momentum": (fo.sgd(0.1, 0.9), F, (1, 1, 12, 8)),  # u, p, m -> p, m
    "adam": (fo.adam(0.1), F, (1, 1, 16, 12)),  # u, p, m, v -> p, m, v
    "adam in double": (fo.adam(0.1), D, (1, 1, 32, 24)),
    "adam in half": (fo.adam(0.1), B, (1, 1, 8, 6)),
    "adam with half a moment": (fo.adam(0.1, mu_dtype=B), F, (1, 1, 14, 10)),
    "adamw and average": (fo.chain(fo.adamw(0.1), fo.params_ema(0.9)), F, (1, 1, 20, 16)),
    "clip and adamw": (fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1)), F, (2, 2, 20, 12)),  # u, and all of adamw
    "clip, adamw and average": (RECIPE, F, (2, 2, 24, 16)),
    "empty": (fo.identity(), F, (1, 1, 8, 4)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_counts_of_explain(name: str) -> None:
    tx, dtype, (passes, launches, read, written) = COUNTS[name]

    e = fo.explain(tx, {"w": torch.zeros(50, 50, dtype=dtype), "b": torch.zeros(500, dtype=dtype)})

    assert (e.passes, e.launches, e.bytes_read, e.bytes_written) == (passes, launches, read, written)
    assert (e.bytes_per_element, e.parameters, e.leaves, e.notes) == (read + written, 3000, 2, ())


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("make", [make_tree, lambda seed: mixed_tree()], ids=["double", "mixed"])
def test_the_state_bytes_of_explain(name: str, make: Any) -> None:
    tx, params = CHAINS[name], make(0)
    state = [x for x in leaves(tx.init(params)) if isinstance(x, torch.Tensor)]

    e = fo.explain(tx, params)

    assert e.state_bytes == sum(x.nbytes for x in state) / sum(p.numel() for p in params.values())


class Own(torch.Tensor):
    """A class of tensors of which a kernel knows nothing."""


NOTES: dict[str, tuple[Any, Any, str]] = {
    "opaque": (fo.chain(fo.trace(0.9), Halve(), fo.scale(-1.0)), make_tree(0), r"Halve.* is not made of rules"),
    "opaque in a mask": (
        fo.masked(fo.chain(Halve(), fo.scale(-1.0)), is_matrix),
        make_tree(0),
        r"Halve.* is not made of",
    ),
    "host schedule": (CHAINS["host schedule"], make_tree(0), r"learning_rate cannot be traced.*every step"),
    "columns": (fo.sgd(0.1), {"w": torch.zeros(4, 6)[:, ::2]}, r"not laid out densely.*: w$"),
    "expanded": (fo.sgd(0.1), {"w": torch.zeros(1, 3).expand(4, 3)}, r"not laid out densely.*: w$"),
    "meta": (fo.sgd(0.1), {"w": torch.zeros(4, device="meta")}, r"on meta.*the reference"),
    "subclass": (
        fo.sgd(0.1),
        {"w": torch.zeros(4).as_subclass(Own)},
        r"a class of their own",
    ),
    "gradients wanted": (fo.sgd(0.1), {"w": torch.zeros(4, requires_grad=True)}, r"requires a gradient"),
}


@pytest.mark.parametrize("name", NOTES)
def test_the_notes_of_explain(name: str) -> None:
    tx, params, note = NOTES[name]

    e = fo.explain(tx, params)

    assert any(re.search(note, n) for n in e.notes), e.notes
    assert all(f"note: {n}" in str(e) for n in e.notes)


def test_the_kernels_of_explain() -> None:
    tx = fo.partition({"a": fo.adam(0.1), "b": fo.sgd(0.1), "c": fo.sgd(0.2)}, {"u": "a", "v": "b", "w": "c"})
    params = {"u": torch.zeros(10), "v": torch.zeros(20), "w": torch.zeros(30)}

    e = fo.explain(tx, params)

    found = {k.leaves: (k.elements, k.rows, k.passes, k.bytes_read, k.bytes_written, k.backend) for k in e.kernels}
    assert found == {("u",): (10, 1, 1, 16, 12, "c"), ("v", "w"): (50, 2, 1, 8, 4, "c")}
    assert (e.passes, e.launches) == (1, 2)
    # averaged over elements: 10 of 28 bytes, 50 of 12
    assert e.bytes_per_element == pytest.approx((10 * 28 + 50 * 12) / 60)
    assert all("pass_0" in k.source and "updates" in k.program for k in e.kernels)


def test_explain_touches_nothing() -> None:
    params = mixed_tree()
    before = Snapshot(params)

    fo.explain(RECIPE, params)

    before.check()


def test_explain_of_a_model_that_has_no_memory() -> None:
    """A model may be planned before it is allocated."""
    e = fo.explain(RECIPE, {"w": torch.empty(50_000, 50_000, device="meta")})

    assert (e.parameters, e.backends, e.bytes_per_element) == (2_500_000_000, ("reference",), 40)


def test_a_step_of_a_model_that_has_no_memory() -> None:
    params = {"w": torch.empty(5, 7, device="meta", dtype=torch.bfloat16)}

    new, (_, adam, *_) = train(RECIPE, params, [params, params])

    assert (new["w"].device.type, new["w"].shape, new["w"].dtype) == ("meta", (5, 7), torch.bfloat16)
    assert adam[0].mu["w"].device.type == "meta"


# --- gradients through steps


def unrolled(tx_of: Callable[..., Any], n: int = 3) -> Callable[..., torch.Tensor]:
    """A function of parameters and hyper-parameters: the loss after some steps of gradient descent on it."""

    def loss(w: torch.Tensor) -> torch.Tensor:
        return (w.sin() * torch.arange(1.0, 4.0, dtype=torch.float64)).sum() + w.prod()

    def run(w: torch.Tensor, *hypers: torch.Tensor) -> torch.Tensor:
        tx, params = tx_of(*hypers), {"w": w}
        state = tx.init(params)
        for _ in range(n):
            grads = torch.func.grad(lambda p: loss(p["w"]))(params)
            params, state = fo.apply_gradients(tx, params, grads, state)
        return loss(params["w"])

    return run


def weights() -> torch.Tensor:
    return torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)


def number(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64, requires_grad=True)


DIFFERENTIABLE: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "sgd": (lambda lr: fo.sgd(lr), (number(0.1),)),
    "momentum": (lambda lr, mu: fo.sgd(lr, mu, nesterov=True), (number(0.1), number(0.9))),
    "adam": (
        lambda lr, b1, b2, eps: fo.adam(lr, b1, b2, eps_root=eps),
        (number(0.1), number(0.9), number(0.99), number(1e-3)),
    ),
    "clip, decay and average": (
        lambda norm, wd, lr: fo.chain(fo.clip_by_global_norm(norm), fo.adamw(lr, weight_decay=wd), fo.params_ema(0.9)),
        (number(0.5), number(0.1), number(0.1)),
    ),
    "lamb": (lambda lr: fo.lamb(lr, weight_decay=0.1), (number(0.1),)),
    "mask and partition": (
        lambda lr: fo.masked(fo.partition({"a": fo.chain(fo.scale_by_rms(), fo.scale(-1.0 * lr))}, "a"), True),
        (number(0.1),),
    ),
    "schedule of a number": (lambda lr: fo.sgd(lambda count: lr * 0.5**count), (number(0.1),)),
    "barrier": (lambda lr: fo.chain(fo.trace(0.9), Halve(), fo.scale_by_learning_rate(lr)), (number(0.1),)),
}


# gradcheck's defaults compare with central differences of step 1e-6: in double precision their error is about
# eps / step = 1e-10 from rounding and step**2 = 1e-12 from truncation, far below its tolerances of 1e-5 and 1e-3
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_unrolled_steps(name: str) -> None:
    tx_of, hypers = DIFFERENTIABLE[name]

    assert torch.autograd.gradcheck(unrolled(tx_of), (weights(), *hypers))


# torch scripts some of its own forward derivatives when the first one is asked for
ignore_scripting = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@ignore_scripting
@pytest.mark.parametrize("name", ["momentum", "adam", "clip, decay and average"])
def test_forward_mode_of_unrolled_steps(name: str) -> None:
    tx_of, hypers = DIFFERENTIABLE[name]
    args = (weights().detach(), *(h.detach() for h in hypers))
    run = unrolled(tx_of)
    tangents = tuple(torch.ones_like(x) * k for k, x in enumerate(args, 1))
    gradients = torch.func.grad(run, argnums=tuple(range(len(args))))(*args)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))

    _, actual = torch.func.jvp(run, args, tangents)

    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)  # some hundred operations in another order


@ignore_scripting
def test_forward_mode_without_a_transformation() -> None:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones(2), torch.tensor([1.0, 2.0]))
        tx = fo.scale(-3.0)

        new, _ = fo.apply_gradients(tx, torch.zeros(2), dual, tx.init(torch.zeros(2)))
        tangent = torch.autograd.forward_ad.unpack_dual(new).tangent

    torch.testing.assert_close(tangent, torch.tensor([-3.0, -6.0]))


def test_the_gradient_of_a_learning_rate() -> None:
    """Hypergradient descent in one line: d loss / d lr = -g(w) . g(w - lr g(w)) for one step of plain descent."""
    w, lr = torch.tensor([1.0, -2.0], dtype=torch.float64), number(0.1)
    scale = torch.tensor([1.0, 3.0], dtype=torch.float64)  # loss = scale . w**2 / 2
    tx = fo.sgd(lr)

    params, _ = fo.apply_gradients(tx, {"w": w}, {"w": scale * w}, tx.init({"w": w}))
    (gradient,) = torch.autograd.grad((scale * params["w"] ** 2).sum() / 2, lr)

    torch.testing.assert_close(gradient, -(scale * w * scale * (w - 0.1 * scale * w)).sum(), **DOUBLE)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_parameters_that_require_gradients_are_differentiable(backend: str) -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    tx = fo.sgd(0.5)

    with fo.use_backend(backend):
        params, _ = fo.apply_gradients(tx, {"w": w}, {"w": w**2}, tx.init({"w": w}))
    (gradient,) = torch.autograd.grad(params["w"].sum(), w)

    torch.testing.assert_close(gradient, torch.tensor([0.0, -1.0]))  # d (w - w**2 / 2) / dw


def test_no_grad_means_no_gradient() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    tx = fo.sgd(torch.tensor(0.5, requires_grad=True), 0.9)

    with torch.no_grad():
        params, state = fo.apply_gradients(tx, {"w": w}, {"w": w}, tx.init({"w": w}))

    assert not any(x.requires_grad for x in leaves((params, state)))


def test_a_state_starts_without_a_gradient() -> None:
    params = {"w": torch.ones(2, requires_grad=True)}

    state = fo.chain(fo.scale_by_adam(), fo.zero_nans(), fo.params_ema(0.9)).init(params)

    assert not any(x.requires_grad for x in leaves(state))


# --- torch.func.vmap


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "clip, decay and average", "lamb"])
def test_an_ensemble_with_hyper_parameters_of_its_own(name: str) -> None:
    tx_of, hypers = DIFFERENTIABLE[name]
    members = [[h.detach() * (1 - 0.1 * k) for h in hypers] for k in range(4)]
    starts = torch.stack([weights().detach() + 0.1 * k for k in range(4)])
    run = unrolled(tx_of)
    expected = torch.stack([run(w, *hs) for w, hs in zip(starts, members, strict=True)])

    actual = torch.func.vmap(run)(starts, *map(torch.stack, zip(*members, strict=True)))

    torch.testing.assert_close(actual, expected, **DOUBLE)


def test_an_ensemble_with_states() -> None:
    """States are trees that vmap takes and returns."""
    tx = fo.chain(fo.clip_by_global_norm(0.5), fo.adam(0.1))
    params = {"w": torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    rates = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

    def step(rate: torch.Tensor, p: Any, state: Any) -> Any:
        return fo.apply_gradients(tx, p, {"w": rate * p["w"]}, state)

    states = torch.func.vmap(tx.init)(params)
    actual = params
    for _ in range(3):
        actual, states = torch.func.vmap(step)(rates, actual, states)

    for k in range(4):
        p = {"w": params["w"][k]}
        state = tx.init(p)
        for _ in range(3):
            p, state = step(rates[k], p, state)
        torch.testing.assert_close(actual["w"][k], p["w"], **DOUBLE)


def test_gradients_per_example() -> None:
    """vmap over grad over a step."""
    run = unrolled(lambda lr: fo.sgd(lr, 0.9))
    rates = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    w = weights().detach()
    expected = torch.stack([torch.func.grad(run, argnums=1)(w, rate) for rate in rates])

    actual = torch.func.vmap(torch.func.grad(run, argnums=1), (None, 0))(w, rates)

    torch.testing.assert_close(actual, expected, **DOUBLE)


# --- threads


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("same_shapes", [False, True])
def test_threads_share_a_transformation(same_shapes: bool, donate: bool) -> None:
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-2, weight_decay=0.1), fo.params_ema(0.9))
    n_threads, n_steps = 4, 50
    trees = [
        {f"p{k}": torch.ones(7 + (0 if same_shapes else t), dtype=torch.float64) * t for k in range(5)}
        for t in range(n_threads)
    ]
    grads = [[like(tree, 100 * t + s) for s in range(n_steps)] for t, tree in enumerate(trees)]
    expected = [train(tx, clone(tree), gs) for tree, gs in zip(trees, grads, strict=True)]
    meet = threading.Barrier(n_threads, timeout=60)

    def work(t: int) -> Any:
        params, state = trees[t], tx.init(trees[t])
        meet.wait()
        return train(tx, params, grads[t], state, donate=donate)

    with ThreadPoolExecutor(n_threads) as pool:
        actual = list(pool.map(work, range(n_threads)))

    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)


# --- tensors that change between steps


def replace_data(p: torch.Tensor, new: torch.Tensor) -> None:
    p.data = new


# What may happen to a parameter "p", its gradient "g" or its momentum "m", all square matrices, after some steps.
CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "nothing": lambda x: None,
    "parameter: new memory": lambda x: replace_data(x["p"], x["p"].data * 2),
    "parameter: double": lambda x: replace_data(x["p"], x["p"].data.double()),
    "parameter: half": lambda x: replace_data(x["p"], x["p"].data.bfloat16()),
    "parameter: other layout": lambda x: replace_data(x["p"], x["p"].data.t().contiguous().t()),
    "parameter: not dense": lambda x: replace_data(x["p"], x["p"].data.repeat_interleave(2, 1)[:, ::2]),
    "parameter: transposed in place": lambda x: x["p"].t_(),
    "parameter: smaller": lambda x: replace_data(x["p"], x["p"].data[:2, :2].clone()),
    "parameter: a view of fewer rows": lambda x: replace_data(x["p"], x["p"].data[:2]),
    "parameter: integers": lambda x: replace_data(x["p"], x["p"].data.to(torch.int32)),
    "parameter: set to another storage": lambda x: x["p"].data.set_(torch.ones(3, 3).storage(), 0, (3, 3), (3, 1)),
    "parameter: swapped": lambda x: torch.utils.swap_tensors(x["p"], torch.full((3, 3), 7.0)),
    "all smaller": lambda x: [replace_data(v, v.data[:2, :2].clone()) for v in x.values()],
    "all double": lambda x: [replace_data(v, v.data.double()) for v in x.values()],
    "all transposed in place": lambda x: [v.t_() for v in x.values()],
    "gradient: double": lambda x: replace_data(x["g"], x["g"].data.double()),
    "gradient: other layout": lambda x: replace_data(x["g"], x["g"].data.t().contiguous().t()),
    "gradient: larger": lambda x: replace_data(x["g"], torch.ones(4, 4)),
    "momentum: new memory": lambda x: replace_data(x["m"], x["m"].data * 2),
    "momentum: double": lambda x: replace_data(x["m"], x["m"].data.double()),
    "momentum: half": lambda x: replace_data(x["m"], x["m"].data.half()),
    "momentum: transposed in place": lambda x: x["m"].t_(),
    "momentum: other layout": lambda x: replace_data(x["m"], x["m"].data.t().contiguous().t()),
    "momentum: smaller": lambda x: replace_data(x["m"], x["m"].data[:2]),
    "momentum: resized": lambda x: x["m"].resize_(2, 3),
    "momentum: memory read as integers": lambda x: replace_data(x["m"], x["m"].data.view(torch.int32)),
    "momentum: swapped": lambda x: torch.utils.swap_tensors(x["m"], torch.full((3, 3), 7.0)),
    "momentum: swapped with another shape": lambda x: torch.utils.swap_tensors(x["m"], torch.ones(4, 4)),
    "momentum: swapped with a sparse one": lambda x: torch.utils.swap_tensors(x["m"], torch.ones(3, 3).to_sparse()),
}


def momentum_as(name: str) -> Any:
    """Descent with momentum that no other test has used: names are part of what a transformation is."""
    return fo.named_chain((name, fo.trace(0.5)), ("rate", fo.scale_by_learning_rate(0.1)))


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_change_between_steps(change: str, donate: bool) -> None:
    """Whatever becomes of a tensor, the next step is the one that a transformation never used before would make."""
    generator = torch.Generator().manual_seed(0)
    x = {k: torch.randn(3, 3, generator=generator) for k in "pgm"}
    names = [f"{change}, {donate}, {use}" for use in ("used", "fresh")]
    used, fresh = map(momentum_as, names)

    def step(tx: Any, name: str, p: Any, g: Any, m: Any, donate: bool) -> tuple[Any, Any]:
        state = tx.init(torch.zeros(3, 3))
        state[name] = state[name]._replace(trace=m)
        p, state = fo.apply_gradients(tx, p, g, state, donate=donate)
        return p, state[name].trace

    for _ in range(3):
        x["p"], x["m"] = step(used, names[0], **x, donate=donate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about typed storages and resizing
        CHANGES[change](x)
    try:
        expected = step(fresh, names[1], **clone(x), donate=False)
    except (TypeError, ValueError, RuntimeError) as error:
        before = Snapshot(x)
        with pytest.raises(type(error)):
            step(used, names[0], **x, donate=donate)
        before.check()
        return

    actual = step(used, names[0], **x, donate=donate)

    assert_same_bits(actual, expected)


@pytest.mark.parametrize("change", CHANGES)
def test_one_of_many_small_tensors_that_changes_between_steps(change: str) -> None:
    names = [f"{change}, one of many, {use}" for use in ("used", "fresh")]
    used, fresh = map(momentum_as, names)
    params, grads = ({str(k): torch.arange(9.0).view(3, 3) + x for k in range(30)} for x in (1.0, 2.0))
    state = used.init(params)
    for _ in range(3):
        fo.apply_gradients(used, params, grads, state, donate=True)
    untouched = clone(params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about typed storages and resizing
        CHANGES[change]({"p": params["7"], "g": grads["7"], "m": state[names[0]].trace["7"]})
    p, m = clone((params, state[names[0]].trace))
    start = fresh.init(untouched)
    start[names[1]] = start[names[1]]._replace(trace=m)
    try:
        expected, after = fo.apply_gradients(fresh, p, grads, start)
    except (TypeError, ValueError, RuntimeError) as error:
        before = Snapshot((params, grads, state))
        with pytest.raises(type(error)):
            fo.apply_gradients(used, params, grads, state, donate=True)
        before.check()
        return

    fo.apply_gradients(used, params, grads, state, donate=True)

    assert_same_bits(params, expected)
    assert_same_bits(state[names[0]].trace, after[names[1]].trace)


def small_leaves(n: int = 30) -> tuple[Any, Any, Any, Any]:
    """A transformation that no other test has used, parameters, gradients, and a state that has made three steps."""
    tx = momentum_as(f"small leaves {next(NUMBERS)}")
    params = {str(k): torch.full((3, 3), float(k)) for k in range(n)}
    grads = {k: torch.ones_like(p) for k, p in params.items()}
    state = tx.init(params)
    for _ in range(3):
        fo.apply_gradients(tx, params, grads, state, donate=True)
    return tx, params, grads, state


NUMBERS = itertools.count()


def trace_of(state: Any) -> Any:
    return next(iter(state.values())).trace


def test_a_stored_tensor_that_was_swapped_is_still_seen_to_be_written_to() -> None:
    tx, params, grads, state = small_leaves()
    m = trace_of(state)["7"]
    torch.utils.swap_tensors(m, torch.zeros(3, 3))
    for _ in range(3):
        version = m._version

        fo.apply_gradients(tx, params, grads, state, donate=True)

        assert m._version > version
    m.resize_(2, 2)
    with pytest.raises(ValueError, match=r"state trace.trace at '7' has shape \(2, 2\)"):
        fo.apply_gradients(tx, params, grads, state, donate=True)


def test_nothing_keeps_a_state_alive() -> None:
    *_, state = small_leaves()
    references = [weakref.ref(x) for x in (*trace_of(state).values(), trace_of(state)["0"]._base)]

    del state
    gc.collect()

    assert [r() for r in references] == [None] * len(references)


def test_a_large_tensor_among_small_ones_is_looked_at() -> None:
    """Its memory is its own, so another tensor may get it when it is given up, as by moving it away and back."""
    tx = momentum_as("large among small")
    params = {**{str(k): torch.ones(3) for k in range(30)}, "large": torch.ones(100_000)}
    grads = {k: torch.ones_like(p) for k, p in params.items()}
    state = tx.init(params)
    for _ in range(2):
        fo.apply_gradients(tx, params, grads, state, donate=True)
    m = trace_of(state)["large"]
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        away = m.data.to(dtype)
        m.data = torch.empty(0)
        m.data = away.clone()
        expected = (m.to(torch.float32) * 0.5 + 1).to(dtype)

        fo.apply_gradients(tx, params, grads, state, donate=True)

        assert_same_bits(m, expected)


@pytest.mark.parametrize("what", ["parameter", "momentum"])
def test_a_tensor_that_has_left_a_function_transformation(what: str) -> None:
    tx, params, grads, state = small_leaves(12)
    found: list[torch.Tensor] = []
    torch.vmap(lambda x: (found.append(x), x * 1)[1])(torch.ones(2, 3, 3))
    (params if what == "parameter" else trace_of(state))["3"] = found[0]

    for _ in range(3):
        with pytest.raises(RuntimeError):
            fo.apply_gradients(tx, params, grads, state)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("what", ["params", "updates", "momentum"])
def test_a_storage_that_has_been_freed(what: str, donate: bool) -> None:
    tx, params, grads, state = small_leaves()
    x = {"params": params, "updates": grads, "momentum": trace_of(state)}[what]["3"]
    x.data = torch.ones(3, 3)
    for _ in range(2):
        fo.apply_gradients(tx, params, grads, state, donate=donate)
    x.untyped_storage().resize_(0)

    with pytest.raises(ValueError, match=r"of a leaf of shape \(3, 3\) has no memory: its storage has been freed"):
        fo.apply_gradients(tx, params, grads, state, donate=donate)


@pytest.mark.parametrize("repeated", [False, True])
def test_a_gradient_that_is_negated_lazily(repeated: bool) -> None:
    """Such as the imaginary part of a conjugate: a view of memory with a sign still to be applied."""
    params, tx = {"v": torch.zeros(2), "w": torch.zeros(2)}, fo.chain(fo.identity(), fo.sgd(1.0))
    state, g = tx.init(params), torch.tensor([1.0, 2.0])
    fo.apply_gradients(tx, params, {"v": g, "w": g if repeated else g.clone()}, state)

    new, _ = fo.apply_gradients(tx, params, {"v": torch._neg_view(g), "w": torch._neg_view(g)}, state)

    torch.testing.assert_close(new, {"v": g, "w": g})
