"""Bad input: each with its error, which names the leaf or the argument; afterwards everything is what it was."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import functional_optim as fo
from _lib.chains import Halve, is_matrix, scale_by_value
from _lib.compare import Snapshot
from _lib.training import train
from _lib.trees import like, make_tree, zeros


class Step(NamedTuple):
    """A step that cannot be made.

    Args:
      error: the class of the error.
      message: what its message must contain, as a regular expression.
      grads: changes to the gradients of `make_tree`; a callable makes them anew from the correct ones.
      params: changes to the parameters.
      state: makes a wrong state of the right one.
      tx: the transformation.
      extra: extra arguments.
      donate: with which values of `donate` it is an error.
    """

    error: type[Exception]
    message: str
    grads: Any = None
    params: Any = None
    state: Callable[[Any], Any] | None = None
    tx: Any = fo.adam(0.1)
    extra: dict[str, Any] = {}  # noqa: RUF012 -- never written
    donate: tuple[bool, ...] = (False, True)


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tree: {k: v for k, v in tree.items() if k != key}


def slot(**changes: Any) -> Callable[[Any], Any]:
    """Changes fields of the first member's state; a callable makes the new field of the old one."""

    def change(state: Any) -> Any:
        new = {k: v(getattr(state[0], k)) if callable(v) else v for k, v in changes.items()}
        return (state[0]._replace(**new), *state[1:])

    return change


SPARSE = torch.sparse_coo_tensor([[0], [1]], [1.0], (4, 3), dtype=torch.float64, check_invariants=True)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the first tensor of this kind announces that it is new
    CSR = torch.sparse_csr_tensor([0, 1, 1, 1, 1], [1], [1.0], (4, 3), dtype=torch.float64, check_invariants=True)


STEPS: dict[str, Step] = {
    # trees
    "a gradient is missing": Step(
        ValueError, r"updates does not have the structure of params: it lacks 'bias'", without("bias")
    ),
    "a gradient too many": Step(ValueError, r"updates does not .*: it has the unknown 'more'", {"more": zeros(2)}),
    "a misnamed gradient": Step(
        ValueError,
        r"it lacks 'bias' and it has the unknown 'bais'",
        lambda g: {"bais" if k == "bias" else k: v for k, v in g.items()},
    ),
    "gradients in another container": Step(
        ValueError, r"updates does not have the structure of params", lambda g: list(g.values())
    ),
    "a leaf where a container should be": Step(
        ValueError,
        r"updates does not have the structure of params: it lacks 'scale\.a'",
        params={"scale": {"a": zeros(1)}},
    ),
    "a container where a leaf should be": Step(TypeError, r"updates at 'scale' is dict", {"scale": {"a": zeros()}}),
    "a tuple of the wrong length": Step(
        ValueError,
        r"updates does not have the structure of params",
        {"scale": (zeros(),)},
        {"scale": (zeros(), zeros())},
    ),
    "gradients are one tensor": Step(ValueError, r"updates does not have the structure of params", lambda g: zeros(2)),
    "gradients are None": Step(ValueError, r"updates does not have the structure of params", lambda g: None),
    # leaves
    "shapes differ": Step(
        ValueError, r"updates at 'weight' has shape \(3, 4\), but its parameter has \(4, 3\)", {"weight": zeros(3, 4)}
    ),
    "shapes that broadcast": Step(
        ValueError, r"updates at 'bias' has shape \(1,\), but its parameter has \(3,\)", {"bias": zeros(1)}
    ),
    "a number for a vector": Step(ValueError, r"updates at 'bias' has shape \(\), but", {"bias": zeros()}),
    "integer gradient": Step(
        TypeError,
        r"updates at 'bias' has dtype torch\.int64, expected float32",
        {"bias": torch.zeros(3, dtype=torch.int64)},
    ),
    "boolean gradient": Step(
        TypeError, r"updates at 'bias' has dtype torch\.bool, expected", {"bias": torch.zeros(3, dtype=torch.bool)}
    ),
    "complex gradient": Step(
        TypeError,
        r"updates at 'bias' has dtype torch\.complex64, expected.*view_as_real",
        {"bias": torch.zeros(3, dtype=torch.complex64)},
    ),
    "8-bit gradient": Step(
        TypeError,
        r"updates at 'bias' has dtype torch\.float8_e4m3fn, expected",
        {"bias": torch.zeros(3).to(torch.float8_e4m3fn)},
    ),
    "integer parameter": Step(
        TypeError,
        r"params at 'bias' has dtype torch\.int32, expected",
        params={"bias": torch.zeros(3, dtype=torch.int32)},
    ),
    "complex parameter": Step(
        TypeError,
        r"params at 'bias' has dtype torch\.complex128, expected",
        params={"bias": torch.zeros(3, dtype=torch.complex128)},
    ),
    "conjugated parameter": Step(
        TypeError,
        r"params at 'bias' has dtype torch\.complex128.*`torch\.view_as_real\(x\.resolve_conj\(\)\)`",
        params={"bias": torch.zeros(3, dtype=torch.complex128).conj()},
    ),
    "sparse gradient": Step(TypeError, r"updates at 'weight' is sparse .*to_dense", {"weight": SPARSE}),
    "compressed gradient": Step(
        TypeError,
        r"updates at 'weight' is sparse \(torch\.sparse_csr\)",
        lambda g: {**g, "weight": CSR},
    ),
    "sparse parameter": Step(TypeError, r"params at 'weight' is sparse", params={"weight": SPARSE}),
    "a gradient elsewhere": Step(
        ValueError,
        r"updates at 'weight' is on meta, but its parameter is on cpu",
        {"weight": zeros(4, 3, device="meta")},
    ),
    "a parameter elsewhere": Step(
        ValueError,
        r"updates at 'weight' is on cpu, but its parameter is on meta",
        params={"weight": zeros(4, 3, device="meta")},
    ),
    "a float for a gradient": Step(TypeError, r"updates at 'bias' is float 0\.5, expected a tensor", {"bias": 0.5}),
    "a string for a parameter": Step(
        TypeError, r"params at 'bias' is str 'w', expected a tensor", params={"bias": "w"}
    ),
    "a module for a parameter": Step(TypeError, r"params at 'bias' is Linear", params={"bias": torch.nn.Linear(1, 1)}),
    # states
    "no state": Step(
        TypeError,
        r"state is None, expected the tuple of 2 states of chain\(scale_by_adam.*`tx\.init\(params\)` of the same",
        state=lambda s: None,
    ),
    "a number for a state": Step(
        TypeError, r"state is int, expected the tuple of 2 states of chain", state=lambda s: 3
    ),
    "a tensor for a state": Step(TypeError, r"state is Tensor, expected the tuple of 2", state=lambda s: zeros(2)),
    "parameters for a state": Step(TypeError, r"state is dict, expected the tuple of 2", state=lambda s: make_tree(0)),
    "a pair that a step has returned": Step(
        TypeError, r"state\[0\] is dict, expected the ScaleByAdamState", state=lambda s: (make_tree(0), s)
    ),
    "state of another chain": Step(
        TypeError,
        r"state\[0\] is TraceState, expected the ScaleByAdamState of scale_by_adam",
        state=lambda s: fo.sgd(0.1, 0.9).init(make_tree(0)),
    ),
    "state of a member": Step(TypeError, r"state is ScaleByAdamState, expected the tuple of 2", state=lambda s: s[0]),
    "state of an empty chain": Step(
        TypeError, r"state is a tuple of 0 states, expected the tuple of 2 states of chain", state=lambda s: ()
    ),
    "state of a shorter chain": Step(
        TypeError,
        r"state is a tuple of 1 state, expected the tuple of 2 states",
        tx=fo.chain(fo.scale_by_adam(), fo.trace(0.9)),
        state=lambda s: s[:1],
    ),
    "state of a longer chain": Step(
        TypeError, r"state is a list of 3 states, expected the tuple of 2", state=lambda s: [*s, fo.EmptyState()]
    ),
    "state of a chain that begins with another member": Step(
        TypeError,
        r"state\[0\] is TraceState, expected the tuple of 0 states of chain\(\)",
        tx=fo.sgd(0.1),
        state=lambda s: fo.chain(fo.trace(0.9), fo.scale(0.1)).init(make_tree(0)),
    ),
    "a plain tuple": Step(
        TypeError, r"state\[0\] is tuple, expected the ScaleByAdamState", state=lambda s: (tuple(s[0]), s[1])
    ),
    "state of another optimizer with the same name of a member": Step(
        TypeError,
        r"state\['a'\] is TraceState, expected the ScaleByAdamState",
        tx=fo.named_chain(("a", fo.scale_by_adam())),
        state=lambda s: {"a": fo.trace(0.9).init(make_tree(0))},
    ),
    "state of fewer leaves": Step(
        ValueError,
        r"state scale_by_adam\.mu does not have the structure of params: it lacks 'bias'",
        state=slot(mu=without("bias")),
    ),
    "state of other shapes": Step(
        ValueError,
        r"state scale_by_adam\.nu at 'bias' has shape \(4,\), but its update has \(3,\)",
        state=slot(nu=lambda nu: {**nu, "bias": zeros(4)}),
    ),
    "state of integers": Step(
        TypeError,
        r"state scale_by_adam\.mu at 'bias' has dtype torch\.int64",
        state=slot(mu=lambda mu: {**mu, "bias": torch.zeros(3, dtype=torch.int64)}),
    ),
    "state elsewhere": Step(
        ValueError,
        r"state scale_by_adam\.mu at 'bias' is on meta, but its update is on cpu",
        state=slot(mu=lambda mu: {**mu, "bias": zeros(3, device="meta")}),
    ),
    "no state of a leaf": Step(
        TypeError,
        r"state scale_by_adam\.mu at 'bias' is NoneType None, expected a tensor",
        state=slot(mu=lambda mu: {**mu, "bias": None}),
    ),
    "a float in the state": Step(
        TypeError, r"state scale_by_adam\.mu at 'bias' is float", state=slot(mu=lambda mu: {**mu, "bias": 0.0})
    ),
    "a counter of two numbers": Step(
        (ValueError, TypeError), r"state scale_by_adam\.count", state=slot(count=torch.zeros(2, dtype=torch.int64))
    ),
    "an empty counter": Step(
        (ValueError, TypeError), r"state scale_by_adam\.count", state=slot(count=torch.zeros(0, dtype=torch.int64))
    ),
    **{
        f"a counter of {dtype}": Step(
            ValueError,
            rf"state scale_by_adam\.count is {dtype} of shape \(\), expected one integer of 32 or 64 bits",
            state=slot(count=torch.zeros((), dtype=dtype)),
        )
        for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16)
    },
    "no counter": Step((ValueError, TypeError), r"state scale_by_adam\.count", state=slot(count=None)),
    "a counter that is no tensor": Step(TypeError, r"state scale_by_adam\.count", state=slot(count=3)),
    "a counter that has no memory": Step(
        (ValueError, TypeError), r"state scale_by_adam\.count", state=slot(count=torch.zeros((), device="meta"))
    ),
    "a vector for a number per leaf": Step(
        ValueError,
        r"state zero_nans\.found_nan at 'bias' has shape \(3,\), expected one number",
        tx=fo.chain(fo.zero_nans()),
        state=slot(found_nan=lambda x: {**x, "bias": zeros(3)}),
    ),
    "state of another mask": Step(
        TypeError,
        r"state trace\.trace at 'weight' is MaskedNode",
        tx=fo.masked(fo.trace(0.9), is_matrix),
        state=lambda s: fo.masked(fo.trace(0.9), {"weight": False, "bias": True, "scale": True}).init(make_tree(0)),
    ),
    "state without the mask": Step(
        TypeError,
        r"state is TraceState, expected the MaskedState of masked\(trace",
        tx=fo.masked(fo.trace(0.9), is_matrix),
        state=lambda s: s.inner_state,
    ),
    "state of other labels": Step(
        TypeError,
        r"state\[0\] is a dict with the keys 'b', expected the dict with the keys 'a' of partition\(",
        tx=fo.partition({"a": fo.trace(0.9)}, "a"),
        state=lambda s: fo.PartitionState({"b": s.inner_states["a"]}),
    ),
    "state of a chain without names": Step(
        TypeError,
        r"state is tuple, expected the dict with the keys 'a' of named_chain",
        tx=fo.named_chain(("a", fo.scale_by_adam())),
        state=lambda s: tuple(s.values()),
    ),
    "no state of another member": Step(
        TypeError,
        r"state\['a'\] is None, expected the ScaleByAdamState of scale_by_adam\(\)",
        tx=fo.named_chain(("a", fo.scale_by_adam()), ("b", Halve())),
        state=lambda s: {**s, "a": None},
    ),
    "no state of opaque members": Step(
        TypeError, r"state is None, expected the tuple of 2 states", tx=fo.chain(Halve(), Halve()), state=lambda s: None
    ),
    "no state of a method of second order": Step(
        TypeError,
        r"state is tuple, expected the ScaleByLBFGSState of scale_by_lbfgs\(\)",
        tx=fo.scale_by_lbfgs(),
        state=lambda s: (s,),
    ),
    # arguments
    "an extra argument is missing": Step(
        TypeError, r"scale_by_value needs the extra argument `value`", tx=fo.chain(scale_by_value())
    ),
    "an extra argument of text": Step(
        ValueError,
        r"the extra argument `value` is 'low', expected a number",
        tx=fo.chain(scale_by_value()),
        extra={"value": "low"},
    ),
    "an extra argument of many numbers": Step(
        ValueError,
        r"the extra argument `value` is a tensor of shape \(2,\), expected a number",
        tx=fo.chain(scale_by_value()),
        extra={"value": zeros(2)},
    ),
    "an extra argument of a complex number": Step(
        ValueError,
        r"the extra argument `value` is a complex tensor, expected a number",
        tx=fo.chain(scale_by_value()),
        extra={"value": torch.tensor(1j)},
    ),
    # schedules
    "a schedule of a complex number": Step(
        ValueError,
        r"learning_rate returned a complex tensor, expected a number",
        tx=fo.sgd(lambda count: torch.tensor(1j)),
    ),
    "a schedule of a vector": Step(
        ValueError,
        r"scale_by_learning_rate\.learning_rate returned a tensor of shape \(2,\), expected a number",
        tx=fo.sgd(lambda count: torch.ones(2)),
    ),
    "a schedule of a vector of the step": Step(
        ValueError,
        r"learning_rate returned a tensor of shape \(2,\), expected a number",
        tx=fo.sgd(lambda count: torch.ones(2) * int(count)),
    ),
    "a schedule of a list": Step(
        ValueError, r"learning_rate returned \[0\.1, 0\.2\], expected a number", tx=fo.sgd(lambda count: [0.1, 0.2])
    ),
    "a schedule of None": Step(
        ValueError, r"learning_rate returned None, expected a number", tx=fo.sgd(lambda count: None)
    ),
    "a schedule that fails": Step(ZeroDivisionError, r"division", tx=fo.sgd(lambda count: 1 // int(0 * count))),
    # opaque members
    "an opaque member that returns another tree": Step(
        ValueError,
        r"the update that .* returned.* does not have the structure",
        tx=fo.chain(fo.trace(0.9), fo.stateless(lambda u, p: [1]), fo.scale(1.0)),
    ),
    "an opaque member that loses a leaf": Step(
        TypeError,
        r"the update that .* returned at 'bias' is NoneType",
        tx=fo.chain(fo.trace(0.9), fo.stateless(lambda u, p: {**u, "bias": None})),
    ),
    "an opaque member that returns another shape": Step(
        ValueError,
        r"the update that .* returned at 'bias' has shape \(2,\), but its parameter has \(3,\)",
        tx=fo.chain(fo.trace(0.9), fo.stateless(lambda u, p: {**u, "bias": u["bias"][:2]})),
    ),
    "an opaque member that returns integers": Step(
        TypeError,
        r"the update that .* returned at 'bias' has dtype torch\.int64",
        tx=fo.chain(fo.trace(0.9), fo.stateless(lambda u, p: {**u, "bias": u["bias"].long()})),
    ),
    "an opaque member that returns what is elsewhere": Step(
        ValueError,
        r"the update that .* returned at 'bias' is on meta, but its parameter is on cpu",
        tx=fo.chain(fo.trace(0.9), fo.stateless(lambda u, p: {**u, "bias": u["bias"].to("meta")})),
    ),
    "an opaque member that fails": Step(
        KeyError,
        r"nowhere",
        tx=fo.chain(fo.scale_by_adam(), fo.stateless(lambda u, p: {**u, "bias": u["nowhere"]}), fo.scale(-0.1)),
    ),
    "an opaque member that returns no pair": Step(
        TypeError,
        r"returned",
        tx=fo.chain(fo.trace(0.9), fo.GradientTransformation(lambda params: (), lambda u, s, p=None: None)),
    ),
    # masks and labels, once the tree is not the one that they were made for
    "a mask of another tree": Step(
        ValueError,
        r"the mask of .* neither like the parameters nor a prefix",
        tx=fo.masked(fo.trace(0.9), {"weight": True}),
    ),
}


def arrange(step: Step, used: bool) -> tuple[Any, Any, Any]:
    """Parameters, gradients and a state of which something is wrong.

    Args:
      step: what is wrong.
      used: whether correct steps have been made before.
    """
    params = make_tree(0)
    grads: Any = like(params, 1)
    try:
        state = step.tx.init(params)
    except ValueError:  # it is the transformation that is wrong
        state = fo.adam(0.1).init(params)
    if used:
        with contextlib.suppress(Exception):  # likewise
            params, state = train(step.tx, params, [grads], state, value=1.0)
    if step.grads is not None:
        grads = step.grads(grads) if callable(step.grads) else {**grads, **step.grads}
    if step.params is not None:
        params = {**params, **step.params}
    return params, grads, state if step.state is None else step.state(state)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_apply_gradients_refuses_bad_input(name: str, used: bool, donate: bool) -> None:
    step = STEPS[name]
    params, grads, state = arrange(step, used)
    before = Snapshot(params, grads, state)

    with pytest.raises(step.error, match=step.message):
        fo.apply_gradients(step.tx, params, grads, state, donate=donate, **step.extra)

    before.check()


@pytest.mark.parametrize("name", STEPS)
def test_update_refuses_bad_input(name: str) -> None:
    step = STEPS[name]
    params, grads, state = arrange(step, used=False)
    before = Snapshot(params, grads, state)

    with pytest.raises(step.error, match=step.message):
        step.tx.update(grads, state, params, **step.extra)

    before.check()


@pytest.mark.parametrize("backend", ["reference", "foreach", "c"])
@pytest.mark.parametrize(
    "name", ["shapes differ", "sparse gradient", "state of other shapes", "a counter that is no tensor"]
)
def test_each_backend_refuses_bad_input(name: str, backend: str) -> None:
    step = STEPS[name]
    params, grads, state = arrange(step, used=True)
    before = Snapshot(params, grads, state)

    with fo.use_backend(backend), pytest.raises(step.error, match=step.message):
        fo.apply_gradients(step.tx, params, grads, state, donate=True)

    before.check()


def test_step_after_a_refused_step() -> None:
    """An error leaves nothing behind in what the transformation remembers."""
    tx, params = fo.adam(0.1), make_tree(0)
    grads = [like(params, seed) for seed in range(3)]
    expected = train(tx, params, grads)
    actual, state = train(tx, params, grads[:1])

    for bad in ({**grads[1], "bias": zeros(4)}, {**grads[1], "weight": SPARSE}, {}, None):
        with pytest.raises((TypeError, ValueError)):
            fo.apply_gradients(tx, actual, bad, state)
    actual, state = train(tx, actual, grads[1:], state)

    torch.testing.assert_close((actual, state), expected, rtol=0, atol=0)


# --- initial states


INIT: dict[str, tuple[Any, type[Exception], str]] = {
    "integers": (
        {"a": [zeros(2, dtype=torch.int64)]},
        TypeError,
        r"params at 'a\.0' has dtype torch\.int64, expected float32.*leave it out",
    ),
    "booleans": ({"a": zeros(2, dtype=torch.bool)}, TypeError, r"params at 'a' has dtype torch\.bool"),
    "complex numbers": (
        {"a": zeros(2, dtype=torch.complex64)},
        TypeError,
        r"params at 'a' has dtype torch\.complex64.*view_as_real",
    ),
    "8-bit floats": ({"a": zeros(2).to(torch.float8_e5m2)}, TypeError, r"params at 'a' has dtype torch\.float8_e5m2"),
    "sparse": ({"a": SPARSE}, TypeError, r"params at 'a' is sparse"),
    "a number": ({"a": 1.0}, TypeError, r"params at 'a' is float 1\.0, expected a tensor"),
    "an array": ({"a": zeros(2).numpy()}, TypeError, r"params at 'a' is ndarray"),
    "a module": (torch.nn.Linear(1, 1), TypeError, r"params is Linear"),
    "a generator of parameters": (
        torch.nn.Linear(1, 1).named_parameters(),
        TypeError,
        r"params is generator .* of a known kind: a dict, such as `dict\(module\.named_parameters\(\)\)`",
    ),
}


@pytest.mark.parametrize("name", INIT)
@pytest.mark.parametrize("call", ["init", "explain"])
def test_init_and_explain_refuse_bad_params(name: str, call: str) -> None:
    params, error, message = INIT[name]
    tx = fo.chain(fo.scale_by_adam(), fo.scale(-0.1))

    with pytest.raises(error, match=message):
        tx.init(params) if call == "init" else fo.explain(tx, params)


NEED_PARAMS = {
    "add_decayed_weights": fo.add_decayed_weights(0.1),
    "scale_by_trust_ratio": fo.scale_by_trust_ratio(),
    "params_ema": fo.chain(fo.sgd(0.1), fo.params_ema(0.9)),
    "params_swa": fo.chain(fo.sgd(0.1), fo.params_swa(1)),
}


@pytest.mark.parametrize("rule", NEED_PARAMS)
def test_update_refuses_missing_params(rule: str) -> None:
    tx, params = NEED_PARAMS[rule], make_tree(0)
    grads, state = like(params, 1), tx.init(params)
    before = Snapshot(params, grads, state)

    with pytest.raises(ValueError, match=rf"{rule} needs the parameters"):
        tx.update(grads, state)

    before.check()


# --- apply_updates


UPDATES: dict[str, tuple[Any, type[Exception], str]] = {
    "a leaf is missing": ({"weight": zeros(4, 3), "bias": zeros(3)}, ValueError, r"scale"),
    "a leaf too many": ({**make_tree(0), "more": zeros()}, ValueError, r"more"),
    "another shape": ({**make_tree(0), "bias": zeros(4)}, ValueError, r"'bias'.*\(4,\).*\(3,\)"),
    "a shape that broadcasts": ({**make_tree(0), "bias": zeros(1)}, ValueError, r"'bias'.*\(1,\).*\(3,\)"),
    "a larger shape that broadcasts": ({**make_tree(0), "scale": zeros(5)}, ValueError, r"'scale'.*\(5,\).*\(\)"),
    "a number": ({**make_tree(0), "bias": 1.0}, TypeError, r"'bias'.*float"),
}


@pytest.mark.parametrize("name", UPDATES)
def test_apply_updates_refuses_mismatched_updates(name: str) -> None:
    updates, error, message = UPDATES[name]
    params = make_tree(0)
    before = Snapshot(params, updates)

    with pytest.raises(error, match=message):
        fo.apply_updates(params, updates)

    before.check()


def test_eval_params_refuses_params_of_another_structure() -> None:
    state = fo.params_ema(0.9).init({"x": zeros(2)})

    with pytest.raises(ValueError, match=r"structure|lacks|mismatch"):
        fo.eval_params(state, {"y": zeros(2)})


def test_opaque_transformation_refuses_bad_input() -> None:
    params = make_tree(0)

    with pytest.raises(ValueError, match=r"updates at 'bias' has shape \(4,\)"):
        fo.apply_gradients(Halve(), params, {**params, "bias": zeros(4)}, ())


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([zeros(3)], TypeError, "updates at .bias. is list"),
        (torch.ones(3, dtype=torch.int32), TypeError, "updates at 'bias'"),
        (zeros(4), ValueError, r"updates at 'bias' has shape \(4,\)"),
    ],
    ids=["a container", "integers", "another shape"],
)
def test_used_opaque_transformation_refuses_bad_input(
    bad: Any, error: type[Exception], message: str, donate: bool
) -> None:
    """As at its first step, and before its own code runs."""
    tx, params = fo.chain(Halve(), fo.stateless(lambda updates, params: updates)), make_tree(0)
    state = tx.init(params)
    fo.apply_gradients(tx, params, make_tree(1), state)

    with pytest.raises(error, match=message):
        fo.apply_gradients(tx, params, {**make_tree(1), "bias": bad}, state, donate=donate)
