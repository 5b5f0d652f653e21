"""Donation that is refused: shared memory, and tensors that autograd or torch.func follow."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import functional_optim as fo
from _lib.compare import Snapshot
from _lib.training import train
from _lib.trees import like


# --- memory that is shared


class Alias(NamedTuple):
    """Tensors that share memory: what a donated step must not write.

    Args:
      message: what the message must name.
      make: makes parameters, gradients, and the first moment.
    """

    message: str
    make: Callable[[], tuple[Any, Any, Any]]


def moment(params: Any, **changes: Any) -> Any:
    return {**{k: torch.zeros_like(p) for k, p in params.items()}, **changes}


def tied() -> tuple[Any, Any, Any]:
    w = torch.ones(3)
    params = {"a": w, "b": torch.ones(2), "c": w}
    return params, like(params, 1), moment(params)


def overlapping() -> tuple[Any, Any, Any]:
    base = torch.arange(5.0)
    params = {"a": base[:3], "b": torch.ones(2), "c": base[2:]}
    return params, like(params, 1), moment(params)


def nested_views() -> tuple[Any, Any, Any]:
    base = torch.arange(20.0)
    params = {"a": base, "b": base[3:5], "c": torch.ones(2)}
    return params, like(params, 1), moment(params)


def transposed_twins() -> tuple[Any, Any, Any]:
    w = torch.ones(2, 3)
    params = {"a": w, "b": w.t()}
    return params, {"a": torch.ones(2, 3), "b": torch.ones(3, 2)}, {"a": torch.zeros(2, 3), "b": torch.zeros(3, 2)}


def expanded() -> tuple[Any, Any, Any]:
    params = {"a": torch.ones(1, 3).expand(4, 3), "b": torch.ones(2)}
    return params, {"a": torch.ones(4, 3), "b": torch.ones(2)}, {"a": torch.zeros(4, 3), "b": torch.zeros(2)}


def windows() -> tuple[Any, Any, Any]:
    params = {"a": torch.ones(6).as_strided((3, 2), (1, 1)), "b": torch.ones(2)}
    return params, {"a": torch.ones(3, 2), "b": torch.ones(2)}, {"a": torch.zeros(3, 2), "b": torch.zeros(2)}


def expanded_state() -> tuple[Any, Any, Any]:
    params = {"a": torch.ones(4, 3), "b": torch.ones(2)}
    return params, like(params, 1), moment(params, a=torch.zeros(()).expand(4, 3))


def state_is_params() -> tuple[Any, Any, Any]:
    params = {"a": torch.ones(3), "b": torch.ones(2)}
    return params, like(params, 1), moment(params, a=params["a"])


def state_is_state() -> tuple[Any, Any, Any]:
    params = {"a": torch.ones(3), "b": torch.ones(3)}
    shared = torch.zeros(3)
    return params, like(params, 1), {"a": shared, "b": shared}


def grads_are_params() -> tuple[Any, Any, Any]:
    params = {"a": torch.ones(3), "b": torch.ones(2)}
    return params, {"a": params["a"], "b": torch.ones(2)}, moment(params)


def grads_are_a_part_of_params() -> tuple[Any, Any, Any]:
    base = torch.ones(10)
    params = {"a": base[:6], "b": torch.ones(2)}
    return params, {"a": base[4:], "b": torch.ones(2)}, moment(params)


def grads_are_state() -> tuple[Any, Any, Any]:
    params = {"a": torch.ones(3), "b": torch.ones(2)}
    grads = like(params, 1)
    return params, grads, moment(params, b=grads["b"])


def grads_are_other_params() -> tuple[Any, Any, Any]:
    params = {"a": torch.ones(3), "b": torch.ones(3)}
    return params, {"a": params["b"], "b": torch.ones(3)}, moment(params)


ALIASES = {
    "one parameter twice": Alias(r"params at 'a' and params at 'c' share memory.*donate=False", tied),
    "overlapping views": Alias(r"params at 'a' and params at 'c' share memory", overlapping),
    "a view within another": Alias(r"params at 'a' and params at 'b' share memory", nested_views),
    "a parameter and its transpose": Alias(r"params at '[ab]' and params at '[ab]' share memory", transposed_twins),
    "an expanded parameter": Alias(r"params at 'a' is an expanded tensor", expanded),
    "a parameter of sliding windows": Alias(r"params at 'a' ", windows),
    "an expanded state": Alias(r"state scale_by_adam\.mu at 'a' is an expanded tensor", expanded_state),
    "a state that is a parameter": Alias(
        r"(params|state scale_by_adam\.mu) at 'a' and (params|state scale_by_adam\.mu) at 'a' share memory",
        state_is_params,
    ),
    "a state of two leaves": Alias(
        r"state scale_by_adam\.mu at 'a' and state scale_by_adam\.mu at 'b' share memory", state_is_state
    ),
    "a gradient that is its parameter": Alias(r"updates at 'a' and params at 'a' share memory", grads_are_params),
    "a gradient that overlaps its parameter": Alias(
        r"updates at 'a' and params at 'a' share memory", grads_are_a_part_of_params
    ),
    "a gradient that is a state": Alias(
        r"updates at 'b' and state scale_by_adam\.mu at 'b' share memory", grads_are_state
    ),
    "a gradient that is another parameter": Alias(
        r"updates at 'a' and params at 'b' share memory", grads_are_other_params
    ),
}


@pytest.mark.parametrize("backend", ["reference", "foreach", "c"])
@pytest.mark.parametrize("name", ALIASES)
def test_aliased_memory_under_donation(name: str, backend: str) -> None:
    message, make = ALIASES[name]
    tx = fo.adam(0.1)
    params, grads, mu = make()
    state = tx.init({k: p.contiguous() for k, p in params.items()})
    state = (state[0]._replace(mu=mu), state[1])
    before = Snapshot(params, grads, state)

    with fo.use_backend(backend), pytest.raises(ValueError, match=message):
        fo.apply_gradients(tx, params, grads, state, donate=True)

    before.check()


@pytest.mark.parametrize("name", ALIASES)
def test_aliased_memory_without_donation(name: str) -> None:
    """It is read only, so it does no harm: the result is that of copies."""
    _, make = ALIASES[name]
    tx = fo.adam(0.1)
    params, grads, mu = make()
    state = tx.init({k: p.contiguous() for k, p in params.items()})
    copies = [
        {k: x.clone(memory_format=torch.contiguous_format) for k, x in tree.items()} for tree in (params, grads, mu)
    ]
    expected = fo.apply_gradients(tx, copies[0], copies[1], (state[0]._replace(mu=copies[2]), state[1]))
    before = Snapshot(params, grads, mu)

    actual = fo.apply_gradients(tx, params, grads, (state[0]._replace(mu=mu), state[1]))

    before.check()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_donation_refuses_aliases_in_later_steps() -> None:
    """The check is made again whenever the memory is not that of the last step."""
    tx, params = fo.sgd(0.1, momentum=0.9), {"a": torch.ones(3), "b": torch.ones(3)}
    params, state = train(tx, params, [like(params, seed) for seed in range(3)], donate=True)
    grads = like(params, 4)

    for bad_params, bad_grads in (({**params, "b": params["a"]}, grads), (params, {**grads, "a": params["b"]})):
        before = Snapshot(bad_params, bad_grads, state)
        with pytest.raises(ValueError, match="share memory"):
            fo.apply_gradients(tx, bad_params, bad_grads, state, donate=True)
        before.check()
    fo.apply_gradients(tx, params, grads, state, donate=True)


class Own(torch.Tensor):
    """A class of tensors of which a kernel knows nothing, so that the reference computes them."""


def test_aliased_memory_of_a_class_of_its_own() -> None:
    w = torch.ones(3).as_subclass(Own)
    params = {"a": w, "b": w}
    tx = fo.sgd(0.1)
    before = Snapshot(params)

    with pytest.raises(ValueError, match="params at 'a' and params at 'b' share memory"):
        fo.apply_gradients(tx, params, {"a": torch.ones(3), "b": torch.ones(3)}, tx.init(params), donate=True)

    before.check()


def test_donation_refuses_a_step_counter_shared_by_two_states() -> None:
    """One tensor that two members count with would count twice."""
    tx, params = fo.chain(fo.scale_by_adam(), fo.scale_by_schedule(lambda count: count + 1.0)), {"w": torch.ones(3)}
    adam, schedule = tx.init(params)
    state = (adam, schedule._replace(count=adam.count))
    before = Snapshot(params, state)

    with pytest.raises(ValueError, match=r"count.*share memory"):
        fo.apply_gradients(tx, params, {"w": torch.ones(3)}, state, donate=True)

    before.check()


# --- donation where something is being recorded


def test_parameters_that_require_gradients_cannot_be_donated() -> None:
    params = {"a": torch.ones(3), "w": torch.ones(3, requires_grad=True)}
    tx = fo.adam(0.1)
    grads, state = like(params, 1), tx.init(params)
    before = Snapshot(params, grads, state)

    with pytest.raises(RuntimeError, match=r"params at 'w' or its update requires a gradient.*no_grad"):
        fo.apply_gradients(tx, params, grads, state, donate=True)

    before.check()
    with torch.no_grad():
        fo.apply_gradients(tx, params, grads, state, donate=True)


def test_gradients_that_require_gradients_cannot_be_donated() -> None:
    params = {"a": torch.ones(3), "w": torch.ones(3)}
    grads = {"a": torch.ones(3), "w": torch.ones(3, requires_grad=True)}
    tx = fo.sgd(0.1)
    before = Snapshot(params, grads)

    with pytest.raises(RuntimeError, match=r"params at 'w' or its update requires a gradient.*no_grad"):
        fo.apply_gradients(tx, params, grads, tx.init(params), donate=True)

    before.check()


def test_states_that_require_gradients_cannot_be_donated() -> None:
    params = {"w": torch.ones(3)}
    tx = fo.trace(0.9)
    state = tx.init(params)._replace(trace={"w": torch.ones(3, requires_grad=True)})
    grads, before = like(params, 1), Snapshot(params, state)

    with pytest.raises(RuntimeError, match="requires a gradient"):
        fo.apply_gradients(tx, params, grads, state, donate=True)

    before.check()


def test_hyper_parameters_that_require_gradients_cannot_be_donated_to() -> None:
    """The result would have to be written where nothing is recorded."""
    params = {"w": torch.ones(3)}
    tx = fo.sgd(torch.tensor(0.1, requires_grad=True))
    grads, before = like(params, 1), Snapshot(params)

    with pytest.raises(RuntimeError, match="requires a gradient"):
        fo.apply_gradients(tx, params, grads, tx.init(params), donate=True)

    before.check()


def test_a_requires_grad_leaf_behind_a_barrier() -> None:
    """A barrier may return what requires a gradient although nothing that went in does."""
    factor = torch.tensor(2.0, requires_grad=True)
    params = {"w": torch.ones(3)}
    tx = fo.chain(fo.trace(0.9), fo.stateless_with_tree_map(lambda u, p: u * factor), fo.scale(-1.0))
    state = tx.init(params)
    grads, before = like(params, 1), Snapshot(params, state)

    with pytest.raises(RuntimeError, match="requires a gradient"):
        fo.apply_gradients(tx, params, grads, state, donate=True)

    before.check()


@pytest.mark.parametrize(
    "transform", [torch.func.vmap, torch.func.grad, torch.func.functionalize], ids=lambda f: f.__name__
)
def test_donation_under_torch_func(transform: Any) -> None:
    tx = fo.sgd(0.1)

    def step(p: torch.Tensor) -> torch.Tensor:
        new, _ = fo.apply_gradients(tx, p, p, tx.init(p), donate=True)
        return new.sum()

    w = torch.ones(3)
    before = Snapshot(w)

    with pytest.raises(RuntimeError, match="donate=True writes in place"):
        transform(step)(w)

    before.check()


@pytest.mark.parametrize("written", ["state", "params", "donated"])
def test_what_a_derivative_still_needs_is_named(written: str) -> None:
    """Leaves and slots of the shape of the tensor that was written, and the cure."""
    tx = fo.chain(fo.scale_by_adam(), fo.scale(-0.1))
    params, g = {"w": torch.ones(3), "b": torch.ones(2)}, torch.ones(3, requires_grad=True)
    state = tx.init(params)
    new, _ = fo.apply_gradients(tx, params, {"w": g, "b": torch.ones(2)}, state)
    if written == "state":
        state[0].mu["w"].mul_(2)
    elif written == "params":
        params["w"].mul_(2)
    else:
        fo.apply_gradients(tx, {"w": params["w"]}, {"w": torch.ones(3)}, tx.init({"w": params["w"]}), donate=True)

    names = "updates at 'w', params at 'w', scale_by_adam.mu at 'w', scale_by_adam.nu at 'w'"
    with pytest.raises(RuntimeError, match=rf"written in place, .* one of: {names}\. Take steps with donate=False"):
        new["w"].sum().backward()


def test_tensors_without_elements_share_none() -> None:
    """Whatever their strides: those of NumPy's empty arrays are 0."""
    tx = fo.sgd(0.1, momentum=0.9)
    empty = torch.from_numpy(np.zeros((0, 4))), torch.zeros(1, 4).expand(1, 0, 4)
    params = {"a": torch.ones(3), **{str(k): x for k, x in enumerate(empty)}}
    updates = {k: torch.ones_like(x) for k, x in params.items()}
    params, _ = fo.apply_gradients(tx, params, updates, tx.init(params), donate=True)
    assert torch.equal(params["a"], torch.full((3,), 1 - 0.1))
    assert [params[k].shape for k in "01"] == [(0, 4), (1, 0, 4)]
