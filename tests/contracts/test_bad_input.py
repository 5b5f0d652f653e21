"""Bad input: each with its error, which names the leaf or the argument; afterwards everything is what it was."""

import contextlib
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import functional_optim as fo
from _lib.chains import Halve, is_matrix, scale_by_value
from _lib.compare import Snapshot
from _lib.training import train
from _lib.trees import like, make_tree


def zeros(*shape: int, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(shape, **kwargs)


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
    "no state": Step(TypeError, r"state\[0\] is NoneType, expected the ScaleByAdamState", state=lambda s: None),
    "state of another chain": Step(
        TypeError,
        r"state\[0\] is TraceState, expected the ScaleByAdamState of scale_by_adam",
        state=lambda s: fo.sgd(0.1, 0.9).init(make_tree(0)),
    ),
    "state of a member": Step(TypeError, r"state\[0\].* expected the ScaleByAdamState", state=lambda s: s[0]),
    "state of an empty chain": Step(
        TypeError, r"state\[0\] is NoneType, expected the ScaleByAdamState", state=lambda s: ()
    ),
    "state of a shorter chain": Step(
        TypeError, r"state\[1\] is NoneType", tx=fo.chain(fo.scale_by_adam(), fo.trace(0.9)), state=lambda s: s[:1]
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
        TypeError, r"state\[0\] is dict", tx=fo.masked(fo.trace(0.9), is_matrix), state=lambda s: s.inner_state
    ),
    "state of other labels": Step(
        TypeError,
        r"state\[0\]\['a'\]\[0\] is NoneType",
        tx=fo.partition({"a": fo.trace(0.9)}, "a"),
        state=lambda s: fo.PartitionState({"b": s.inner_states["a"]}),
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
    # schedules
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
    "a generator of parameters": (torch.nn.Linear(1, 1).parameters(), TypeError, r"params is generator"),
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


# --- arguments


RANGES: dict[str, tuple[Callable[[], Any], str]] = {
    "b1 of scale_by_adam": (lambda: fo.scale_by_adam(b1=1.0), r"`b1` of scale_by_adam must be in \[0, 1\), got 1\.0"),
    "b1 below": (lambda: fo.adam(0.1, b1=-0.1), r"`b1` of scale_by_adam must be in \[0, 1\), got -0\.1"),
    "b2 of scale_by_adam": (lambda: fo.adamw(0.1, b2=2), r"`b2` of scale_by_adam must be in \[0, 1\), got 2"),
    "eps of scale_by_adam": (
        lambda: fo.adam(0.1, eps=-1e-8),
        r"`eps` of scale_by_adam must be in \[0, inf\), got -1e-08",
    ),
    "infinite eps": (lambda: fo.adam(0.1, eps=float("inf")), r"`eps` of scale_by_adam must be in \[0, inf\), got inf"),
    "eps_root of scale_by_adam": (lambda: fo.nadam(0.1, eps_root=-1.0), r"`eps_root` of scale_by_adam .* got -1\.0"),
    "b1 of scale_by_amsgrad": (
        lambda: fo.amsgrad(0.1, b1=1.5),
        r"`b1` of scale_by_amsgrad must be in \[0, 1\), got 1\.5",
    ),
    "b2 of scale_by_amsgrad": (lambda: fo.amsgrad(0.1, b2=-1), r"`b2` of scale_by_amsgrad .* got -1"),
    "eps of scale_by_amsgrad": (lambda: fo.amsgrad(0.1, eps=-1.0), r"`eps` of scale_by_amsgrad .* got -1\.0"),
    "eps_root of scale_by_amsgrad": (
        lambda: fo.amsgrad(0.1, eps_root=-1.0),
        r"`eps_root` of scale_by_amsgrad .* got -1\.0",
    ),
    "b1 of scale_by_lion": (lambda: fo.lion(0.1, b1=1.01), r"`b1` of scale_by_lion must be in \[0, 1\], got 1\.01"),
    "b2 of scale_by_lion": (lambda: fo.lion(0.1, b2=-1.0), r"`b2` of scale_by_lion must be in \[0, 1\], got -1\.0"),
    "decay of trace": (lambda: fo.sgd(0.1, momentum=-0.9), r"`decay` of trace must be in \[0, inf\), got -0\.9"),
    "decay of ema": (lambda: fo.signum(0.1, beta=1.1), r"`decay` of ema must be in \[0, 1\], got 1\.1"),
    "decay if debias of ema": (
        lambda: fo.ema(1.0),
        r"`decay` of ema must be in \[0, 1\) if `debias` is True, got 1\.0",
    ),
    "decay and then debias": (
        lambda: fo.ema(1.0, debias=False).replace(debias=True),
        r"`decay` of ema must be in \[0, 1\) if `debias` is True, got 1\.0",
    ),
    "decay if bias_correction of scale_by_rms": (
        lambda: fo.rmsprop(0.1, decay=1.0, bias_correction=True),
        r"`decay` of scale_by_rms must be in \[0, 1\) if `bias_correction` is True, got 1\.0",
    ),
    "decay if bias_correction of scale_by_stddev": (
        lambda: fo.rmsprop(0.1, decay=1, centered=True, bias_correction=True),
        r"`decay` of scale_by_stddev must be in \[0, 1\) if `bias_correction` is True, got 1\.",
    ),
    **{
        f"{hyper} of reduce_on_plateau": (
            lambda hyper=hyper, bad=bad: fo.reduce_on_plateau(**{hyper: bad}),
            rf"`{hyper}` of reduce_on_plateau must be .*, got {bad!r}",
        )
        for hyper, bad in {
            "factor": 1.0,
            "patience": 0,
            "rtol": 1.1,
            "atol": -0.1,
            "cooldown": -1,
            "accumulation_size": 0,
            "min_scale": 1.1,
            "mode": "mean",
            "eps": -1e-8,
        }.items()
    },
    "decay of params_ema": (lambda: fo.params_ema(-0.1), r"`decay` of params_ema must be in \[0, 1\], got -0\.1"),
    "start of params_swa": (lambda: fo.params_swa(-1), r"`start` of params_swa must be in \[0, inf\), got -1"),
    "period of params_swa": (lambda: fo.params_swa(9, 0), r"`period` of params_swa must be in \[1, inf\), got 0"),
    "decay of scale_by_rms": (
        lambda: fo.rmsprop(0.1, decay=1.1),
        r"`decay` of scale_by_rms must be in \[0, 1\], got 1\.1",
    ),
    "eps of scale_by_rms": (lambda: fo.rmsprop(0.1, eps=-1.0), r"`eps` of scale_by_rms .* got -1\.0"),
    "initial_scale of scale_by_rms": (
        lambda: fo.rmsprop(0.1, initial_scale=-1.0),
        r"`initial_scale` of scale_by_rms .* got -1\.0",
    ),
    "decay of scale_by_stddev": (
        lambda: fo.rmsprop(0.1, decay=-1, centered=True),
        r"`decay` of scale_by_stddev .* got -1",
    ),
    "eps of scale_by_stddev": (lambda: fo.scale_by_stddev(eps=-1.0), r"`eps` of scale_by_stddev .* got -1\.0"),
    "initial_scale of scale_by_stddev": (
        lambda: fo.scale_by_stddev(initial_scale=-1.0),
        r"`initial_scale` of scale_by_stddev .* got -1\.0",
    ),
    "max_delta of clip": (lambda: fo.clip(-1.0), r"`max_delta` of clip must be in \[0, inf\], got -1\.0"),
    "max_norm of clip_by_global_norm": (
        lambda: fo.clip_by_global_norm(-1),
        r"`max_norm` of clip_by_global_norm must be in \[0, inf\], got -1",
    ),
    "threshold of clip_by_block_rms": (
        lambda: fo.clip_by_block_rms(0.0),
        r"`threshold` of clip_by_block_rms must be in \(0, inf\], got 0\.0",
    ),
    "min_norm of scale_by_trust_ratio": (
        lambda: fo.scale_by_trust_ratio(min_norm=-1.0),
        r"`min_norm` of scale_by_trust_ratio .* got -1\.0",
    ),
    "eps of scale_by_trust_ratio": (lambda: fo.lars(0.1, eps=-1.0), r"`eps` of scale_by_trust_ratio .* got -1\.0"),
    "beta of muon_momentum": (lambda: fo.muon(0.1, beta=1.0), r"`beta` of muon_momentum .* got 1\.0"),
    "preconditioning of orthogonalize": (
        lambda: fo.orthogonalize(preconditioning="no"),
        r"`preconditioning` of orthogonalize must be one of .* got 'no'",
    ),
    "decay_rate of scale_by_factored_rms": (
        lambda: fo.adafactor(decay_rate=-1.0),
        r"`decay_rate` of scale_by_factored_rms .* got -1\.0",
    ),
    "epsilon of scale_by_factored_rms": (
        lambda: fo.adafactor(eps=-1.0),
        r"`epsilon` of scale_by_factored_rms .* got -1\.0",
    ),
    "min_scale of scale_by_param_block_rms": (
        lambda: fo.scale_by_param_block_rms(-1.0),
        r"`min_scale` of scale_by_param_block_rms .* got -1\.0",
    ),
    "nan in a range": (lambda: fo.trace(float("nan")), r"`decay` of trace must be in \[0, inf\), got nan"),
    "nan": (lambda: fo.sgd(float("nan")), r"`learning_rate` of scale_by_learning_rate must be a number, got nan"),
    "nan in scale": (lambda: fo.scale(float("nan")), r"`step_size` of scale must be a number, got nan"),
    "a vector": (
        lambda: fo.sgd(zeros(2)),
        r"`learning_rate` of scale_by_learning_rate must be a number, a 0-d tensor or a schedule, got .* shape \(2,\)",
    ),
    "a vector of one": (lambda: fo.adam(0.1, b1=zeros(1)), r"`b1` of scale_by_adam must be a number.* shape \(1,\)"),
    "mode of scale_by_lion": (lambda: fo.scale_by_lion(mode="soft"), r"`mode` of scale_by_lion must be .* got 'soft'"),
    "decay of ema_debias_schedule": (
        lambda: fo.ema_debias_schedule(1.0),
        r"`decay` of ema_debias_schedule .* got 1\.0",
    ),
    "decay of ema_warmup_schedule": (
        lambda: fo.ema_warmup_schedule(1.1),
        r"`decay` of ema_warmup_schedule .* got 1\.1",
    ),
    "offset of ema_warmup_schedule": (
        lambda: fo.ema_warmup_schedule(0.9, 0.5),
        r"`offset` of ema_warmup_schedule .* got 0\.5",
    ),
    "transition_steps": (lambda: fo.linear_schedule(1.0, 0.0, -1), r"`transition_steps` of linear_schedule .* got -1"),
    "decay_steps": (lambda: fo.cosine_decay_schedule(1.0, 0), r"`decay_steps` of cosine_decay_schedule .* got 0"),
}


def outside(name: str, hyper: str, value: float, interval: str, **others: Any) -> dict[str, Any]:
    """A row: a transformation with a number outside of its interval."""
    message = f"`{hyper}` of {name} must be in {re.escape(interval)}, got {re.escape(str(value))}"
    return {f"{hyper} of {name}": (lambda: getattr(fo, name)(**{hyper: value}, **others), message)}


for _name in ("scale_by_adamax", "scale_by_nadam", "scale_by_radam"):
    RANGES |= outside(_name, "b1", 1.0, "[0, 1)") | outside(_name, "b2", -0.1, "[0, 1)")
    RANGES |= outside(_name, "eps", -1.0, "[0, inf)")
for _name in ("scale_by_nadam", "scale_by_radam"):
    RANGES |= outside(_name, "eps_root", -1.0, "[0, inf)")
RANGES |= outside("scale_by_nadam", "momentum_decay", -1.0, "[0, inf)")
RANGES |= outside("scale_by_radam", "threshold", 3.9, "[4, inf)")
RANGES |= outside("scale_by_rss", "initial_accumulator_value", -1.0, "[0, inf)")
RANGES |= outside("scale_by_rss", "eps", -1.0, "[0, inf)")
RANGES |= outside("scale_by_adadelta", "rho", 1.1, "[0, 1]") | outside("scale_by_adadelta", "eps", -1.0, "[0, inf)")
RANGES |= outside("scale_by_asgd", "lambd", -1.0, "[0, inf)", learning_rate=0.1)
RANGES |= outside("scale_by_rprop", "learning_rate", -1.0, "[0, inf)")
for _hyper, _value, _interval in (
    ("eta_minus", 1.0, "(0, 1)"),
    ("eta_plus", 1.0, "(1, inf)"),
    ("min_step_size", -1.0, "[0, inf)"),
    ("max_step_size", 0.0, "(0, inf)"),
):
    RANGES |= outside("scale_by_rprop", _hyper, _value, _interval, learning_rate=0.1)


@pytest.mark.parametrize("name", RANGES)
def test_hyper_parameters_out_of_range(name: str) -> None:
    make, message = RANGES[name]

    with pytest.raises(ValueError, match=message):
        make()


def test_every_declared_range_is_tested() -> None:
    factories = {x.rule.name: x.rule for k, x in vars(fo).items() if not k.startswith("_") and hasattr(x, "rule")}
    declared = {f"{hyper} of {rule.name}" for rule in factories.values() for hyper in rule.ranges}

    assert declared <= set(RANGES)


# What is no number may be found out when the formula is first read; the message names the rule and the value.
KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "a list": (lambda: fo.scale([0.1]), r"scale\b.*\[0\.1\]"),
    "text": (lambda: fo.scale("0.1"), r"scale\b.*'0\.1'"),
    "text for b1": (lambda: fo.scale_by_adam(b1="0.9"), r"scale_by_adam\b.*'0\.9'"),
    "None": (lambda: fo.scale(None), r"scale\b.*None"),
    "a schedule for a first value": (
        lambda: fo.rprop(fo.linear_schedule(0.1, 0.0, 9)),
        r"`learning_rate` of scale_by_rprop is where its state starts, so it must be a number, got the function",
    ),
    "a dict": (lambda: fo.adam({"lr": 0.1}), r"scale_by_learning_rate\b.*\{'lr': 0\.1\}"),
    "a complex number": (lambda: fo.scale(1j), r"scale\b.*1j"),
}


@pytest.mark.parametrize("name", KINDS)
def test_hyper_parameters_of_the_wrong_kind(name: str) -> None:
    make, message = KINDS[name]
    params = make_tree(0)

    with pytest.raises((TypeError, ValueError), match=message):
        train(make(), params, [params])


ARGUMENTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "unknown backend": (
        lambda: fo.use_backend("cuda").__enter__(),
        ValueError,
        r"unknown backend 'cuda'; there are 'reference', 'foreach', 'c', 'triton'",
    ),
    "unknown hyper-parameter": (
        lambda: fo.scale_by_adam(beta1=0.9),
        TypeError,
        r"scale_by_adam: .*'beta1'; its hyper-parameters are \(b1",
    ),
    "missing hyper-parameter": (lambda: fo.trace(), TypeError, r"trace: missing a required argument: 'decay'"),
    "too many hyper-parameters": (lambda: fo.scale(1.0, 2.0), TypeError, r"scale: too many positional arguments"),
    "unknown schedule argument": (lambda: fo.constant_schedule(rate=1.0), TypeError, r"constant_schedule: "),
    "tree reduction outside a rule": (lambda: fo.tree_sum(zeros(2)), TypeError, r"`tree_sum` spans every leaf"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_arguments(name: str) -> None:
    call, error, message = ARGUMENTS[name]

    with pytest.raises(error, match=message):
        call()


def test_an_unknown_backend_changes_nothing() -> None:
    with fo.use_backend("foreach"):
        with pytest.raises(ValueError, match="unknown backend"), fo.use_backend("numpy"):
            pass

        assert fo.explain(fo.sgd(0.1), make_tree(0)).backends == ("foreach",)


# --- masks and labels


def test_mask_without_a_match_warns() -> None:
    params = {"layer": {"weight": zeros(2), "bias": zeros(2)}}
    tx = fo.chain(fo.masked(fo.trace(0.9), re.compile("wieght")), fo.scale(-1.0))

    text = r"the mask re\.compile\('wieght'\) of trace\(decay=0\.9\) matches no parameter; there are layer\.bias"
    with pytest.warns(UserWarning, match=text):
        state = tx.init(params)

    new, _ = fo.apply_gradients(tx, params, {"layer": {"weight": torch.ones(2), "bias": torch.ones(2)}}, state)
    torch.testing.assert_close(new, {"layer": {"weight": -torch.ones(2), "bias": -torch.ones(2)}})


def test_label_pattern_without_a_match_warns() -> None:
    params = {"weight": zeros(2), "bias": zeros(2)}
    labels = {re.compile("wieght"): "a", re.compile("e"): "a", re.compile(""): "b"}
    tx = fo.partition({"a": fo.sgd(0.1), "b": fo.scale(-1.0)}, labels)

    with pytest.warns(UserWarning, match=r"the pattern 'wieght' of partition is found in no parameter's path; there"):
        tx.init(params)


def test_a_mask_function_of_the_wrong_arguments() -> None:
    tx = fo.adamw(0.1, mask=lambda p: p.ndim > 1)

    with pytest.raises(AttributeError) as caught:
        tx.init({"weight": zeros(2)})

    (note,) = caught.value.__notes__
    assert note.startswith("the mask of add_decayed_weights(")
    assert "takes two: the path and the parameter" in note


def test_a_module_instead_of_its_parameters() -> None:
    module = torch.nn.Linear(2, 2)

    with pytest.raises(TypeError, match=r"params is Linear, a module; pass `dict\(module.named_parameters\(\)\)`"):
        fo.sgd(0.1).init(module)
    with pytest.raises(TypeError, match=r"params is generator .*, expected a tensor or a tree of a known kind: a dict"):
        fo.sgd(0.1).init(module.parameters())


def test_mask_over_an_empty_tree_does_not_warn() -> None:
    """A label that no leaf has, and a tree without leaves, leave a mask within nothing to match."""
    tx = fo.partition({"a": fo.masked(fo.trace(0.9), re.compile("x")), "b": fo.identity()}, "b")

    tx.init({"w": zeros(2)})
    fo.masked(fo.trace(0.9), True).init({})


MASKS: dict[str, tuple[Any, type[Exception], str]] = {
    "label without transformation": (
        fo.partition({"a": fo.scale(1.0)}, {"weight": "a", "bias": "b", "scale": "a"}),
        ValueError,
        r"the parameter at 'bias' has the label 'b', which has no transformation; there are 'a'",
    ),
    "label from a function": (
        fo.partition({"a": fo.scale(1.0)}, lambda path, p: path),
        ValueError,
        r"has the label '(bias|weight|scale)', which has no transformation",
    ),
    "no expression matches": (
        fo.partition({"a": fo.scale(1.0)}, {re.compile("weight"): "a"}),
        ValueError,
        r"the parameter at 'bias' has the label None, which has no",
    ),
    "label of a list": (
        fo.partition({"a": fo.scale(1.0)}, lambda path, p: ["a"]),
        ValueError,
        r"has the label \['a'\], which has no",
    ),
    "labels of another tree": (
        fo.partition({"a": fo.scale(1.0)}, {"weight": "a"}),
        ValueError,
        r"the labels of partition (is|are) neither like the parameters nor a prefix of them",
    ),
    "mask of another tree": (
        fo.masked(fo.scale(1.0), {"weight": True, "bias": True, "other": True}),
        ValueError,
        r"the mask of scale\(step_size=1\.0\) is neither like the parameters nor a prefix",
    ),
    "mask of a longer tree": (
        fo.masked(fo.scale(1.0), {"weight": [True], "bias": True, "scale": True}),
        ValueError,
        r"the mask of .* is .*",
    ),
    "mask of text": (
        fo.masked(fo.scale(1.0), lambda path, p: "yes"),
        ValueError,
        r"the mask of .* is 'yes' at '(bias|weight|scale)', expected True or False",
    ),
    "mask of None": (
        fo.masked(fo.scale(1.0), lambda path, p: None),
        ValueError,
        r"the mask of .* is None at .* expected True or False",
    ),
    "mask of vectors": (
        fo.masked(fo.scale(1.0), lambda path, p: p > 0),
        ValueError,
        r"the mask of .* is tensor.* expected True or False",
    ),
    "mask by an incomplete mapping": (
        fo.masked(fo.scale(1.0), {re.compile("weight"): True}),
        ValueError,
        r"the mask of .* is None at 'bias', expected True or False",
    ),
}


MASK_CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "init": lambda tx, params: tx.init(params),
    "update": lambda tx, params: tx.update(params, fo.EmptyState(), params),
    "explain": fo.explain,
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("call", MASK_CALLS)
def test_bad_masks_and_labels(name: str, call: str) -> None:
    tx, error, message = MASKS[name]
    params = make_tree(0)
    before = Snapshot(params)

    with pytest.raises(error, match=message):
        MASK_CALLS[call](tx, params)

    before.check()


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


# --- rules


@fo.elementwise
def branches(u: torch.Tensor, *, limit: Any = 1.0) -> torch.Tensor:
    if u > limit:
        return u
    return -u


@fo.elementwise
def branches_on_a_number(u: torch.Tensor, *, limit: Any = 1.0) -> torch.Tensor:
    return u if limit > 0.5 else -u


@fo.elementwise
def takes_a_number_out(u: torch.Tensor, *, rate: Any = 1.0) -> torch.Tensor:
    return u * float(rate)


@fo.elementwise
def loops(u: torch.Tensor) -> torch.Tensor:
    return sum(u)  # type: ignore[call-overload,no-any-return]


@fo.elementwise
def sorts(u: torch.Tensor) -> torch.Tensor:
    return torch.sort(u).values


@fo.elementwise
def looks_at_the_shape(u: torch.Tensor) -> torch.Tensor:
    return u / u.shape[0]


@fo.elementwise
def multiplies_matrices(u: torch.Tensor) -> torch.Tensor:
    return u @ u


@fo.elementwise(state={"m": fo.zeros})
def forgets_its_state(u: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return u + m


@fo.elementwise
def returns_too_much(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return u, u


@fo.elementwise
def returns_nothing(u: torch.Tensor) -> None:
    u * 2


@fo.elementwise(state={"n": fo.slot(0.0, per="leaf")})
def stores_elements_in_a_number(u: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return u, n + u


CONSTANT = torch.ones(3)


@fo.elementwise
def captures_a_tensor(u: torch.Tensor) -> torch.Tensor:
    return u * CONSTANT


# The line that the message quotes, or else what it says; every message names the rule.
RULES: dict[str, tuple[Any, str]] = {
    "a branch on an element": (
        branches(),
        r"`branches` \(.*test_bad_input\.py:\d+: `if u > limit:`\) branches on a traced value",
    ),
    "a branch on a hyper-parameter": (branches_on_a_number(), r"`branches_on_a_number` .*`return u if limit.*static"),
    "a number taken out": (takes_a_number_out(), r"`takes_a_number_out` .*float\(rate\).* takes the number"),
    "a loop over elements": (loops(), r"`loops` .*iterates over a traced value"),
    "an operation without a row": (sorts(), r"`sorts` .*uses `sort`, which has no row in the operation table"),
    "a shape": (looks_at_the_shape(), r"`looks_at_the_shape` .*reads `\.shape` of a traced value"),
    "a product of matrices": (multiplies_matrices(), r"`?multiplies_matrices`?.*matmul"),
    "too few results": (forgets_its_state(), r"forgets_its_state .*returned 1 results, expected 2: \(u, m\)"),
    "too many results": (returns_too_much(), r"returns_too_much .*returned 2 results, expected 1"),
    "no result": (returns_nothing(), r"returns_nothing .*returned NoneType for `u`"),
    "elements in a number per leaf": (
        stores_elements_in_a_number(),
        r"stores_elements_in_a_number .*`n` differs per element",
    ),
    "a tensor from outside": (
        captures_a_tensor(),
        r"`captures_a_tensor` .*uses a tensor of shape \(3,\).*not an argument",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_that_cannot_become_kernels(name: str) -> None:
    rule, message = RULES[name]
    tx, params = fo.chain(fo.trace(0.9), rule), make_tree(0)
    grads, state = like(params, 1), tx.init(params)
    before = Snapshot(params, grads, state)

    for donate in (False, True):
        with pytest.raises(fo.RuleError, match=message):
            fo.apply_gradients(tx, params, grads, state, donate=donate)

    before.check()


def takes(*names: str) -> Any:
    """A function with positional arguments of these names."""
    return eval(f"lambda {', '.join(names)}: u")


DECLARATIONS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "the update is missing": (lambda: fo.elementwise(takes("p")), TypeError, r"takes \(p\), expected \(p?u"),
    "a slot is not an argument": (
        lambda: fo.elementwise(state={"m": fo.zeros})(takes("u")),
        TypeError,
        r"expected \(u, m, \*, \.\.\.\)",
    ),
    "an argument is no slot": (lambda: fo.elementwise(takes("u", "m")), TypeError, r"takes \(u, m\), expected \(u, \*"),
    "slots in another order": (
        lambda: fo.elementwise(state={"a": fo.zeros, "b": fo.zeros})(takes("u", "b", "a")),
        TypeError,
        r"expected \(u, a, b",
    ),
    "variable arguments": (lambda: fo.elementwise(takes("u", "*rest")), TypeError, r"takes \(u, rest\)"),
    "an extra argument that is none": (
        lambda: fo.elementwise(extra=("value",))(takes("u")),
        TypeError,
        r"`extra` of .* names \['value'\]",
    ),
    "a switch that is none": (
        lambda: fo.elementwise(static=("mode",))(takes("u")),
        TypeError,
        r"`static` of .* names \['mode'\]",
    ),
    "a range of nothing": (
        lambda: fo.elementwise(ranges={"b": "[0, 1]"})(takes("u")),
        TypeError,
        r"`ranges` of .* names \['b'\]",
    ),
    "a range that is no interval": (
        lambda: fo.elementwise(ranges={"b": "0..1"})(takes("u", "*", "b=1")),
        ValueError,
        r'written like "\[0, 1\)", got \'0\.\.1\'',
    ),
    "a slot from nowhere": (
        lambda: fo.elementwise(state={"m": fo.slot("start")})(takes("u", "m")),
        TypeError,
        r"the slot `m` of .* takes its start from `start`, which is no argument",
    ),
    "a dtype from nowhere": (
        lambda: fo.elementwise(state={"m": fo.slot(dtype="kind")})(takes("u", "m")),
        TypeError,
        r"takes its dtype from `kind`",
    ),
    "a number per leaf from the parameter": (
        lambda: fo.slot("param", per="leaf"),
        ValueError,
        r"starts from a number, got start='param'",
    ),
    "a slot per row": (lambda: fo.slot(per="row"), ValueError, r"`per` must be .* got 'row'"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", DECLARATIONS)
def test_bad_declarations_of_rules(name: str) -> None:
    declare, error, message = DECLARATIONS[name]

    with pytest.raises(error, match=message):
        declare()
