"""One step: pure or in place, and hyper-parameters that change."""

import pytest
import torch

import functional_optim as fo
from _lib.chains import CHAINS, STEPS
from _lib.compare import DOUBLE, Snapshot, assert_same_bits
from _lib.training import train
from _lib.trees import clone, leaves, like, make_tree, mixed_tree


BACKENDS = ["reference", "foreach", "c"]


# --- pure


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHAINS)
def test_pure_step_leaves_its_arguments_unchanged(name: str, backend: str) -> None:
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


def test_donated_state_before_an_opaque_transformation_is_new() -> None:
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


@pytest.mark.triton
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


@ignore_interpreter
@pytest.mark.parametrize(
    ("form", "backend"),
    [
        (form, backend)
        for form in ("tree", "packed", "members")
        for backend in (*BACKENDS, "triton")
        if (form, backend) != ("members", "foreach")  # which cannot serve them
    ],
)
def test_steps_after_one_in_inference_mode(form: str, backend: str) -> None:
    """Memory that a transformation keeps from step to step is no tensor of inference mode."""
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adam(0.1))
    params = {"a": torch.zeros(2, 3), "b": torch.zeros(2)}
    grads = [like(params, seed) for seed in range(3)]
    if form == "packed":
        params, grads = fo.pack(params), [fo.pack(g) for g in grads]
    wrap = torch.vmap if form == "members" else lambda f: f
    state = wrap(tx.init)(params)
    step = wrap(lambda p, g, s: fo.apply_gradients(tx, p, g, s))
    with fo.use_backend(backend):
        expected = [step(params, g, state) for g in grads]
        tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adam(0.1))  # bound anew
        with torch.inference_mode():
            first = step(params, grads[0], state)
        assert_same_bits([first, *[step(params, g, state) for g in grads[1:]]], expected)


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


def test_an_update_that_an_opaque_transformation_makes_up_leaves_a_leaf_without_a_gradient_alone() -> None:
    ones = {"a": torch.ones(2), "b": torch.ones(2)}
    tx = fo.chain(
        fo.GradientTransformation(lambda p: fo.EmptyState(), lambda u, s, params=None: (ones, s)), fo.scale(-1.0)
    )
    params = {"a": torch.zeros(2), "b": torch.zeros(2)}
    for _ in range(2):
        new, _ = fo.apply_gradients(tx, params, {"a": torch.ones(2), "b": None}, tx.init(params))
        torch.testing.assert_close(new, {"a": -torch.ones(2), "b": torch.zeros(2)})


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("order", ["ab", "ba", "aba", "bab"])
def test_leaves_on_several_devices_share_a_counter(order: str, donate: bool) -> None:
    """Each counts as if it were alone; meta stands for another device than that of the counter."""
    tx, places = fo.adamw(fo.linear_schedule(0.1, 0.0, 9)), {"a": "cpu", "b": "meta"}
    params = {f"{k}{name}": torch.ones(3, device=places[name]) for k, name in enumerate(order)}
    alone = {"a": torch.ones(3)}
    count = torch.zeros((), dtype=torch.int64)
    state = tuple(
        x._replace(count=count.clone()) if "count" in getattr(x, "_fields", ()) else x for x in tx.init(params)
    )
    expected = tx.init(alone)
    for step in range(4):
        grads = {k: torch.full_like(p, 1.0 + step) for k, p in params.items()}
        params, state = fo.apply_gradients(tx, params, grads, state, donate=donate)
        alone, expected = fo.apply_gradients(tx, alone, {"a": torch.full((3,), 1.0 + step)}, expected)
        assert {int(x.count) for x in state if "count" in getattr(x, "_fields", ())} == {step + 1}
        for name, p in params.items():
            if name.endswith("a"):  # not by a kernel, beside one on meta: some roundings of each step are others
                torch.testing.assert_close(p, alone["a"], rtol=4 * 2.0**-23, atol=0)
