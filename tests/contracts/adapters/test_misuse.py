"""Misuse of an optimizer: it goes on rightly, or says what is wrong and changes nothing."""

import copy
import inspect
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import functional_optim as fo
from _lib.optimizers import NAMES
from functional_optim import adapters
from functional_optim.adapters import SGD, Adam, AdamW, TransformOptimizer, load_safetensors, save_safetensors


def parameters(n: int = 2, size: int = 16) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64)) for _ in range(n)]


class Named(torch.nn.Parameter):
    """A class of parameters of somebody's own."""


@fo.stateless
def halved(updates: Any, params: Any) -> Any:
    return {k: None if u is None else u / 2 for k, u in updates.items()}


MAKERS: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: AdamW(params, lr=0.1),
    "a transformation between kernels": lambda params: TransformOptimizer(
        params, fo.chain(fo.scale(2.0), halved, fo.sgd(0.1, momentum=0.9))
    ),
}


@pytest.mark.parametrize("kind", ["one gradient for two", "a class of its own"])
@pytest.mark.parametrize("maker", MAKERS)
def test_shared_gradients_and_parameter_subclasses_step(maker: str, kind: str) -> None:
    """The slow check leaves out the addresses; several steps, because the first ones look at every tensor anew."""
    ours, plain = parameters(), parameters()
    if kind == "a class of its own":
        ours = [Named(p.detach()) for p in ours]
    opt, twin = MAKERS[maker](ours), MAKERS[maker](plain)
    for step in range(5):
        for k, (p, q) in enumerate(zip(ours, plain, strict=True)):
            p.grad = torch.full_like(p, 1.0 + step, requires_grad=False).as_subclass(torch.Tensor)
            q.grad = torch.full_like(q, 1.0 + step)
            if kind == "one gradient for two" and k:
                p.grad = ours[0].grad
        opt.step()
        twin.step()
    for p, q in zip(ours, plain, strict=True):
        assert torch.equal(p.detach().as_subclass(torch.Tensor), q.detach())


@pytest.mark.parametrize("donate", [False, True])
def test_one_gradient_for_two_parameters_in_the_pure_api(donate: bool) -> None:
    tx = fo.sgd(0.5, momentum=0.5)
    params = [torch.zeros(16), torch.zeros(16)]
    state = tx.init(params)
    for _ in range(4):
        g = torch.ones(16)
        params, state = fo.apply_gradients(tx, params, [g, g], state, donate=donate)
    assert torch.equal(params[0], params[1])
    assert params[0][0] == -0.5 * (1 + 1.5 + 1.75 + 1.875)


def test_a_first_step_that_overflowed_for_one_parameter_is_still_to_come() -> None:
    a, b = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    opt = SGD([a, b], lr=1.0, momentum=0.5, dampening=0.5, fused=True)
    for found, grads in ((1.0, (1, 1)), (0.0, (1, None)), (0.0, (1, 1))):
        for p, g in zip((a, b), grads, strict=True):
            p.grad = None if g is None else torch.ones(4)
        opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(found)  # type: ignore[attr-defined]
        opt.step()
    assert b.tolist() == [-1.0] * 4  # not dampened
    assert a.tolist() == [-2.0] * 4  # 1, then 0.5 + 0.5


def test_a_step_that_overflowed_leaves_no_state_to_copy() -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    opt = SGD([p], lr=1.0, momentum=0.5, dampening=0.5, fused=True)
    p.grad = torch.full((4,), torch.inf)
    opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(1.0)  # type: ignore[attr-defined]
    opt.step()
    assert not opt.state


def test_names_follow_their_parameters() -> None:
    ps = dict(zip("abcd", parameters(4), strict=True))
    tx = fo.chain(fo.sgd(1.0), fo.masked(fo.set_to_zero(), re.compile("c")))
    groups: list[dict[str, Any]] = [{"params": [(k, ps[k]) for k in pair]} for pair in ("ab", "cd")]
    opt = TransformOptimizer(groups, tx)

    def moved() -> list[str]:
        before = {k: p.detach().clone() for k, p in ps.items()}
        for p in ps.values():
            p.grad = torch.ones_like(p)
        opt.step()
        return [k for k, p in ps.items() if not torch.equal(p, before[k])]

    assert moved() == ["a", "b", "d"]
    first, second = opt.param_groups
    first["param_names"], second["param_names"] = ["a", "c"], ["b", "d"]
    assert moved() == ["a", "c", "d"]  # the parameter b is called c now
    first["params"].append(second["params"].pop())
    with pytest.raises(ValueError, match="group 0 has 3 params but 2 param_names"):
        opt.step()


@pytest.mark.parametrize("rate", [math.nan, math.inf, np.float64("nan"), np.float32("inf"), 10**400, "0.1"], ids=str)
def test_a_learning_rate_that_is_no_number(rate: Any) -> None:
    [p] = parameters(1)
    opt = AdamW([p], lr=0.1)
    opt.param_groups[0]["lr"] = rate
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    with pytest.raises(ValueError, match="lr of parameter group 0 is"):
        opt.step()
    assert torch.equal(p, before)
    assert not opt.state


@fo.leafwise
def scaled(u: Any, *, rate: Any) -> Any:
    return -rate * u


def with_rate(opt: torch.optim.Optimizer, x: torch.Tensor) -> None:
    opt.param_groups[0]["rate" if "rate" in opt.param_groups[0] else "lr"] = x


def with_counter(opt: torch.optim.Optimizer, x: torch.Tensor) -> None:
    (state,) = opt.state.values()
    state["step"] = x


ON_META: dict[str, tuple[Callable[[list[Any]], torch.optim.Optimizer], Callable[..., None], str]] = {
    "a rate": (lambda p: AdamW(p, lr=0.1), with_rate, r"the option 'lr' is a tensor on meta.*move it to cpu"),
    "a rate of whole tensors": (
        lambda p: TransformOptimizer(p, scaled(0.1)),
        with_rate,
        r"scaled\.rate is a tensor on meta.*move it to cpu",
    ),
    "a counter": (lambda p: AdamW(p, lr=0.1), with_counter, r"state step at .*meta.*expected one number"),
}


@pytest.mark.parametrize("backend", ["c", "foreach", "reference"])
@pytest.mark.parametrize("name", ON_META)
def test_a_number_on_meta_is_refused_by_every_backend(name: str, backend: str) -> None:
    make, put, message = ON_META[name]
    params = parameters(1)
    opt = make(params)
    with fo.use_backend(backend):
        for step in range(2):
            params[0].grad = torch.full_like(params[0], 1.0 + step)
            opt.step()
        before = params[0].detach().clone()
        put(opt, torch.zeros((), device="meta"))
        with pytest.raises(ValueError, match=message):
            opt.step()
    assert torch.equal(params[0].detach(), before)


def test_safetensors_keys_that_look_alike(tmp_path: Path) -> None:
    state = {"b.c": torch.ones(2), "b": {"c": torch.zeros(2)}, 1: torch.full((2,), 2.0), "1": torch.full((2,), 3.0)}
    save_safetensors(state, tmp_path / "state.safetensors")  # type: ignore[arg-type]
    loaded: Any = load_safetensors(tmp_path / "state.safetensors")
    assert [loaded["b.c"][0], loaded["b"]["c"][0], loaded[1][0], loaded["1"][0]] == [1, 0, 2, 3]


def test_momentum_that_is_a_tensor_may_be_switched_off() -> None:
    ours, theirs = parameters(1), parameters(1)
    a, b = SGD(ours, lr=0.1, momentum=0.5, fused=True), torch.optim.SGD(theirs, lr=0.1, momentum=0.5)
    for momentum in (0.5, 0.0, 0.5, 0.5):
        for opt, [p] in ((a, ours), (b, theirs)):
            opt.param_groups[0]["momentum"] = torch.tensor(momentum, dtype=torch.float64)
            p.grad = torch.ones_like(p)
            opt.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-15, atol=1e-15)  # a few roundings in double precision


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: TransformOptimizer([p], fo.sgd("0.1")), "`learning_rate` of scale_by_learning_rate must be"),  # type: ignore[arg-type]
        (lambda p: TransformOptimizer.factory(fo.adamw)([p], lr=0.1, learning_rate=0.2), "are one argument"),
        (lambda p: TransformOptimizer.factory(fo.adamw)([p], lr="0.1"), "^`lr` of adamw: `learning_rate` of scale_by_"),
        (lambda p: TransformOptimizer.factory(fo.asgd)([p], lr=[0.1]), "^`lr` of asgd: `learning_rate` of scale_by_as"),
        (lambda p: TransformOptimizer.factory(fo.lion)([p], lr=None), "^`lr` of lion: `learning_rate` of lion must be"),
        (
            lambda p: TransformOptimizer.factory(fo.scale_by_adam)([p], lr=0.1),
            "has no argument `learning_rate` or `lr`, .*fo.scale_by_learning_rate",
        ),
    ],
)
def test_arguments_that_make_no_optimizer(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make(parameters(1)[0])


NOT_NUMBERS: dict[str, Any] = {
    "None": None,
    "text": "0.1",
    "a list": [0.1],
    "a dict": {"a": 0.1},
    "a complex number": 1j,
    "a complex tensor": torch.tensor(1j),
    "a class": complex,
}


def places(parameter: inspect.Parameter, wrong: Any) -> dict[str, Any]:
    """The places of an argument where a number is due, and the argument with something else there."""
    default = parameter.default
    if isinstance(default, tuple):
        if None in default:  # and None as well
            return {}
        return {f"{parameter.name}[{k}]": (*default[:k], wrong, *default[k + 1 :]) for k in range(len(default))}
    return {parameter.name: wrong} if isinstance(default, (int, float)) and not isinstance(default, bool) else {}


def takes(name: str, arguments: dict[str, Any]) -> bool:
    """Whether the constructor of torch's class takes some arguments; such as no step reads may be anything."""
    if not hasattr(torch.optim, name):
        return False
    try:
        getattr(torch.optim, name)([torch.nn.Parameter(torch.ones(2, 2))], **arguments)
    except (TypeError, LookupError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", [*NAMES, "Adafactor", "LAMB", "LBFGS", "Lion", "Muon", "SparseAdam"])
def test_numbers_are_refused_by_their_names_where_torch_refuses_them(name: str) -> None:
    make = getattr(adapters, name)
    for parameter in inspect.signature(make).parameters.values():
        for wrong in NOT_NUMBERS.values():
            for place, argument in places(parameter, wrong).items():
                if not takes(name, {parameter.name: argument}):
                    with pytest.raises(TypeError, match=rf"`{re.escape(place)}` is .*, expected a number"):
                        make([torch.nn.Parameter(torch.ones(2, 2))], **{parameter.name: argument})


def test_a_subclass_has_the_constructor_that_it_is_given() -> None:
    class Small(Adam, torch.optim.Adam):  # type: ignore[misc]
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=1e-5)

    class Alike(Adam):
        pass

    assert Small(parameters(1)).param_groups[0]["lr"] == 1e-5
    assert inspect.signature(Alike) == inspect.signature(Adam) == inspect.signature(torch.optim.Adam)
    with pytest.raises(TypeError, match=r"`lr` is str '0\.1', expected a number"):
        Alike(parameters(1), lr="0.1")


@pytest.mark.parametrize("betas", [0.9, (0.9,), "text", None, {0: 0.9}])
def test_a_pair_of_numbers_is_one(betas: Any) -> None:
    with pytest.raises(TypeError, match=rf"`betas` is {re.escape(repr(betas))}, expected a pair of numbers"):
        AdamW(parameters(1), betas=betas)


READ_AT_A_STEP = [("Muon", option) for option in ("ns_steps", "eps")]
READ_AT_A_STEP += [("LBFGS", option) for option in ("max_iter", "tolerance_grad", "tolerance_change", "history_size")]


@pytest.mark.parametrize("kind", NOT_NUMBERS)
@pytest.mark.parametrize(("name", "option"), READ_AT_A_STEP)
def test_numbers_that_torch_reads_at_a_step(name: str, option: str, kind: str) -> None:
    p = torch.nn.Parameter(torch.ones(2, 2))
    opt = getattr(adapters, name)([p])
    opt.param_groups[0][option] = NOT_NUMBERS[kind]
    p.grad = torch.ones(2, 2)

    def closure() -> Any:
        p.grad = torch.ones(2, 2)
        return p.sum()

    with pytest.raises(TypeError, match=rf"`{option}` is .*, expected a number"):
        opt.step(closure)
    assert torch.equal(p, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("betas", (0.9,), "the option 'betas' is"),
        ("betas", 0.9, "the option 'betas' is"),
        ("betas", ("0.9", "0.99"), "the option 'betas' is '0.9', expected a number"),
        ("eps", "1e-8", "the option 'eps' is '1e-8', expected a number"),
        ("eps", torch.tensor(1j), "the option 'eps' is a complex tensor, expected a number"),
    ],
)
def test_options_that_no_kernel_can_take(key: str, value: Any, message: str) -> None:
    [p] = parameters(1)
    opt = Adam([p], lr=0.1)
    opt.param_groups[0][key] = value
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert torch.equal(p, before)
    assert not opt.state


def test_static_option_that_is_a_list_is_refused() -> None:
    [p] = parameters(1)
    opt = TransformOptimizer([p], fo.sgd(0.1, momentum=0.9))
    opt.param_groups[0]["nesterov"] = [1]
    p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match=r"`nesterov` of parameter group 0 is list \[1\], expected True or False"):
        opt.step()


@fo.elementwise(static=("mode",))
def moded(u: Any, *, mode: str = "plain") -> Any:
    return u


def test_static_option_that_has_no_hash_is_refused() -> None:
    [p] = parameters(1)
    opt = TransformOptimizer([p], fo.chain(moded(), fo.sgd(0.1)))
    opt.param_groups[0]["mode"] = [1]
    p.grad = torch.ones_like(p)
    with pytest.raises(
        TypeError, match=r"'mode' of parameter group 0: .* must be a bool, a number or a string, got \[1"
    ):
        opt.step()


CLASSES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    **{name: getattr(adapters, name) for name in (*NAMES, "Adafactor", "LAMB", "Lion", "Muon", "SparseAdam")},
    "a chain": lambda groups: TransformOptimizer(groups, several()),
    "a scheduled chain": lambda groups: TransformOptimizer(groups, fo.adam(fo.constant_schedule(0.1))),
}
WRONG_OPTIONS: dict[str, Any] = {
    "text": "x",
    "a list": [1],
    "a list of text": ["a", "b"],
    "a dict": {"a": 1},
    "a function": len,
    "an object": object(),
    "a complex number": 1j,
    "a vector": torch.ones(3),
}


def several() -> fo.GradientTransformation:
    return fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1), fo.trace(0.9), fo.params_ema(0.9))


def changed(make: Any, option: str, wrong: Any, given: bool, kind: str) -> torch.Tensor:
    """The parameter of a second group after a step, whose option is another one: given with the group, or set later."""
    ps = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    opt = make([{"params": ps[:1]}, {"params": ps[1:], **({option: wrong} if given else {})}])
    opt.param_groups[1][option] = wrong
    for p in ps:
        p.grad = torch.ones(2, 2).to_sparse(1) if kind == "SparseAdam" else torch.ones(2, 2)
    before = [p.detach().clone() for p in ps]
    try:
        opt.step()
    except (TypeError, ValueError):
        assert all(map(torch.equal, ps, before))
        raise
    return ps[1].detach()


@pytest.mark.parametrize("kind", WRONG_OPTIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_an_option_of_a_wrong_kind_is_refused_with_its_group(name: str, kind: str) -> None:
    """Unless torch's class, of which no step may read it, takes the step."""
    groups = CLASSES[name]([torch.nn.Parameter(torch.ones(2, 2))]).param_groups
    for option in groups[0].keys() - {"params", "chain"}:
        for given in (True, False):
            error = error_of(lambda: changed(CLASSES[name], option, WRONG_OPTIONS[kind], given, name))
            if error is None:
                changed(getattr(torch.optim, name), option, WRONG_OPTIONS[kind], given, name)
                continue
            said = {"betas": "beta", "ns_coefficients": "[Cc]oefficients"}.get(option, rf"\b{option}\b")
            assert re.search(said, error), (option, error)
            assert re.search("(of|in) parameter group 1|^parameter group 1: ", error), (option, error)


def error_of(call: Callable[[], Any]) -> str | None:
    """The message of the error of a call, if there is one."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    return None


BOOLS = {"a bool": True, "a bool of numpy": np.True_, "a tensor of a bool": torch.tensor(True)}


@pytest.mark.parametrize("kind", BOOLS)
@pytest.mark.parametrize("name", ["LAMB", "Lion", "a chain", "a scheduled chain"])
def test_a_bool_is_no_number_of_a_chain(name: str, kind: str) -> None:
    group = CLASSES[name]([torch.nn.Parameter(torch.ones(2, 2))]).param_groups[0]
    numbers = [k for k, x in group.items() if isinstance(x, (float, tuple)) and not isinstance(x, bool)]
    for option in numbers:
        wrong = (0.9, BOOLS[kind]) if isinstance(group[option], tuple) else BOOLS[kind]
        for given in (True, False):
            with pytest.raises((TypeError, ValueError), match=rf"\b{option}\b.* of parameter group 1"):
                changed(CLASSES[name], option, wrong, given, name)
        if name in ("LAMB", "Lion"):
            with pytest.raises(TypeError, match=rf"`{option}.*` is .*, expected a number"):
                getattr(adapters, name)(parameters(1), **{option: wrong})


@pytest.mark.parametrize("name", [*NAMES, "Adafactor", "Muon"])
def test_a_bool_is_a_number_of_torchs_classes_as_it_is_there(name: str) -> None:
    ours, theirs = (changed(getattr(where, name), "lr", True, True, name) for where in (adapters, torch.optim))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # some roundings of one step in float32


@pytest.mark.parametrize("wrong", ["False", [True], {"a": True}, len], ids=str)
@pytest.mark.parametrize("name", [*NAMES, "Adafactor", "LAMB", "Lion"])
def test_flags_are_true_or_false(name: str, wrong: Any) -> None:
    make = getattr(adapters, name)
    for flag in FLAGS & inspect.signature(make).parameters.keys():
        # torch asks for a momentum first, if it takes the flag for true
        momentum = {"momentum": 0.9} if flag == "nesterov" and name == "SGD" else {}
        with pytest.raises(TypeError, match=rf"`{flag}` is .*, expected True or False"):
            make(parameters(1), **momentum, **{flag: wrong})
        for fine in (1, 0, np.True_, torch.tensor(False)) if flag in ("maximize", "nesterov", "amsgrad") else ():
            make([{"params": parameters(1), **momentum, flag: fine}])


FLAGS = {"maximize", "nesterov", "amsgrad", "centered", "foreach", "fused", "capturable", "differentiable"}
FLAGS |= {"decoupled_weight_decay"}


@pytest.mark.parametrize("wrong", ["False", 1, [True], torch.tensor(True)], ids=str)
@pytest.mark.parametrize("flag", ["maximize", "fused", "differentiable"])
def test_flags_of_a_chain_are_true_or_false(flag: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=rf"`{flag}` of TransformOptimizer is a switch"):
        TransformOptimizer(parameters(1), fo.sgd(0.1), **{flag: wrong})
    assert TransformOptimizer(parameters(1), fo.sgd(0.1), maximize=np.True_).defaults["maximize"] is True  # type: ignore[arg-type]


def stepped() -> Any:
    opt = TransformOptimizer(parameters(1), fo.chain(fo.sgd(0.1), fo.params_ema(0.9)))
    opt.param_groups[0]["params"][0].grad = torch.ones(16, dtype=torch.float64)
    opt.step()
    return opt


STATE_DICT = "`state_dict` of load_state_dict is .*, expected what `optimizer.state_dict"
CALLS: dict[str, tuple[Callable[[Any], Any], str, tuple[str, ...]]] = {  # with what their messages say, and what fits
    "tx": (lambda x: TransformOptimizer(parameters(1), x), "`tx` of TransformOptimizer: expected a gradient", ()),
    "tx_function": (TransformOptimizer.factory, "`tx_function` of TransformOptimizer.factory is", ("a function",)),
    "state_dict": (lambda x: stepped().load_state_dict(x), STATE_DICT, ("a dict",)),
    "state_dict of LBFGS": (lambda x: adapters.LBFGS(parameters(1)).load_state_dict(x), STATE_DICT, ("a dict",)),
    "by_name": (
        lambda x: stepped().load_state_dict(stepped().state_dict(), by_name=x),
        "`by_name` of load_state_dict is a switch",
        (),
    ),
    "strict": (
        lambda x: stepped().load_state_dict(stepped().state_dict(), strict=x),
        "`strict` of load_state_dict is a switch",
        (),
    ),
    "closure": (lambda x: stepped().step(x), "`closure` of step is .*, expected a function", ("a function",)),
    "closure of LBFGS": (lambda x: adapters.LBFGS(parameters(1)).step(x), "call `step.closure.` with", ("a function",)),
    "a saved state": (lambda x: save_safetensors(x, "nowhere"), "state_dict is .*, expected what", ("a dict",)),
    "model": (lambda x: stepped().averaged_params(x).__enter__(), "model", ()),
    "buffers": (lambda x: stepped().averaged_params(torch.nn.Linear(1, 1), buffers=x).__enter__(), "buffer", ()),
    "slot": (lambda x: stepped().averaged_params(slot=x).__enter__(), "no slot .* is called", ()),
    "params of a chain": (lambda x: TransformOptimizer(x, fo.sgd(0.1)), "param", ()),
    "params of a class": (lambda x: AdamW(x), "param", ()),
    "params of LBFGS": (lambda x: adapters.LBFGS(x), "param", ()),
    "a parameter group": (lambda x: stepped().add_param_group(x), "param", ("a dict",)),
}


@pytest.mark.parametrize("kind", WRONG_OPTIONS)
@pytest.mark.parametrize("name", CALLS)
def test_an_argument_of_a_wrong_kind_is_refused_by_its_name(name: str, kind: str) -> None:
    call, message, fits = CALLS[name]
    if kind not in fits:
        with pytest.raises((TypeError, ValueError), match=message):
            call(WRONG_OPTIONS[kind])


def test_arguments_of_a_step_that_nothing_takes() -> None:
    [p] = parameters(1)
    opt = AdamW([p])
    p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match="unexpected keyword argument 'valeu'; this chain takes none"):
        opt.step(valeu=1.0)
    opt.step(lambda: torch.tensor(1.0))  # a closure's loss is offered, and may be left


def test_averaged_params_refuses_to_nest() -> None:
    [p] = parameters(1)
    opt = TransformOptimizer([p], fo.chain(fo.sgd(0.1), fo.params_ema(0.5)))
    p.grad = torch.ones_like(p)
    opt.step()
    before = p.detach().clone()
    with opt.averaged_params():
        with pytest.raises(RuntimeError, match="called inside itself"), opt.averaged_params():
            pass
        with pytest.raises(RuntimeError, match="step was called inside"):
            opt.step()
    assert torch.equal(p, before)


class Mine(TransformOptimizer.factory(fo.lion)):  # type: ignore[misc]
    """A class of somebody's own, made of one that was made."""


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_optimizer_copies_have_its_class(copied: Callable[[Any], Any]) -> None:
    [p] = parameters(1)
    for cls in (Mine, TransformOptimizer.factory(fo.lion)):
        opt = cls([p], lr=0.1)
        p.grad = torch.ones_like(p)
        opt.step()
        twin = copied(opt)
        assert type(twin) is cls
        assert twin.param_groups[0]["b1"] == opt.param_groups[0]["b1"]
        [q] = twin.param_groups[0]["params"]
        q.grad = torch.ones_like(q)
        twin.step()
        opt.step()
        assert torch.equal(p, q)


def test_names_that_occur_twice_match_nothing() -> None:
    layers = [torch.nn.Linear(2, 2) for _ in range(2)]
    opt = AdamW([{"params": list(layer.named_parameters())} for layer in layers])
    with pytest.raises(ValueError, match="this optimizer has 'weight' twice"):
        opt.load_state_dict(opt.state_dict(), by_name=True)


def test_a_chain_that_differs_in_what_is_not_made_of_rules() -> None:
    [p] = parameters(1)
    a = TransformOptimizer([p], fo.chain(halved, fo.sgd(0.1)))
    b = TransformOptimizer([p], fo.chain(fo.sgd(0.1)))
    with pytest.raises(ValueError, match="the state was saved by another chain"):
        b.load_state_dict(a.state_dict())


def test_a_gradient_that_is_its_parameter() -> None:
    [p] = parameters(1)
    opt = SGD([p], lr=0.1)
    p.grad = p.detach()
    with pytest.raises(ValueError, match="share memory, so a step, which writes in place, would corrupt them"):
        opt.step()


@pytest.mark.parametrize("named", [False, True])
def test_a_mask_that_matches_no_parameter_is_warned_of_once(named: bool) -> None:
    model = torch.nn.Linear(2, 2)
    mask = "wieght" if named else "weight"
    opt = TransformOptimizer(
        model.named_parameters() if named else model.parameters(), fo.adamw(0.1, weight_decay=0.5, mask=mask)
    )
    model(torch.ones(1, 2)).sum().backward()

    with pytest.warns(UserWarning, match=f"the mask .*{mask}.* matches no parameter; there are ") as caught:
        opt.step()
    opt.step()

    assert len(caught) == 1
    assert ("weight" if named else "param_groups[0].params[0]") in str(caught[0].message).partition("there are")[2]


class MainGrad(torch.Tensor):
    """Its gradient is somewhere else, as some libraries for large models have it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.grad.__get__:  # type: ignore[attr-defined]
            return args[0].__dict__.get("main_grad")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_parameter_class_with_its_own_grad_attribute() -> None:
    p = torch.ones(3).as_subclass(MainGrad).requires_grad_()
    p.__dict__["main_grad"] = torch.ones(3)

    SGD([p], lr=0.5).step()

    assert p.detach().tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("what", ["parameter", "gradient"])
@pytest.mark.parametrize("offset", [0, 8])
def test_freed_storage_of_params_or_gradients_is_refused(offset: int, what: str, steps: int) -> None:
    flat = {"parameter": torch.ones(16), "gradient": torch.ones(16)}
    p = torch.nn.Parameter(flat["parameter"][offset : offset + 8])
    p.grad = flat["gradient"][offset : offset + 8]
    opt = SGD([p, torch.nn.Parameter(torch.ones(2))], lr=0.5)
    for _ in range(steps):
        opt.step()
    flat[what].untyped_storage().resize_(0)

    with pytest.raises(ValueError, match=r"of shape \(8,\) has no memory: its storage has been freed"):
        opt.step()


@pytest.mark.parametrize("steps", [0, 4])
def test_a_gradient_that_is_zero_and_has_no_memory(steps: int) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    opt = SGD([p], lr=0.5, momentum=0.5)
    for _ in range(steps):
        p.grad = torch.zeros(3)
        opt.step()
    p.grad = torch._efficientzerotensor((3,))

    opt.step()

    p.grad = torch.ones(3)
    opt.step()
    assert p.detach().tolist() == [0.5, 0.5, 0.5]


def test_options_changed_while_other_params_have_gradients() -> None:
    """Options that are remembered belong to the parameters that took part then."""
    ours, theirs = [[torch.nn.Parameter(torch.ones(16)) for _ in range(4)] for _ in range(2)]
    opts = [
        cls([{"params": ps[:2], "lr": 0.1}, {"params": ps[2:], "lr": 0.2}])
        for cls, ps in ((AdamW, ours), (torch.optim.AdamW, theirs))
    ]
    for step in range(40):
        for opt, ps in zip(opts, (ours, theirs), strict=True):
            if step % 7 == 3:
                opt.param_groups[step % 2]["lr"] = 0.01 * step
            if step % 11 == 5:
                opt.param_groups[1]["betas"] = (0.5 + 0.01 * step, 0.9)
            for k, p in enumerate(ps):
                p.grad = None if (step // 2) % 3 == 1 and k % 2 else torch.full((16,), 1.0 + 0.1 * k - 0.05 * step)
            opt.step()
    # a stale rate would be off by tenths; 40 steps of at most 0.2, each of which differs by some ulp
    torch.testing.assert_close(ours, theirs, rtol=0, atol=40 * 0.2 * 2**-20)


@pytest.mark.parametrize("bad", [{0}, {0, 1}, {3}, {3, 4}], ids=str)
@pytest.mark.parametrize("at_end", [False, True])
def test_updates_of_a_transformation_that_do_not_fit_at_some_steps(bad: set[int], at_end: bool) -> None:
    """They are refused at each of these steps, which change nothing; the others are those of a run without them."""
    calls = iter(range(100))

    def cut(updates: Any, params: Any) -> Any:
        return {k: u[:2] for k, u in updates.items()} if next(calls) in bad else updates

    rules = (fo.trace(0.9), fo.stateless(cut)) if at_end else (fo.trace(0.9), fo.stateless(cut), fo.scale(-0.1))
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = TransformOptimizer([p], fo.chain(*rules))
    other = TransformOptimizer([q], fo.chain(*(rule for rule in rules if rule is not rules[1])))
    for step in range(8):
        p.grad = torch.full((3,), 1.0 + step)
        q.grad = p.grad.clone()
        if step in bad:
            with pytest.raises(ValueError, match=r"the update that .* returned at .* has shape \(2,\)"):
                optimizer.step()
        else:
            optimizer.step()
            other.step()
        assert torch.equal(p, q)


def test_a_parameter_group_without_parameters() -> None:
    for opt in (stepped(), AdamW(parameters(1))):
        with pytest.raises(KeyError, match="a parameter group lacks 'params', its parameters; it has"):
            opt.add_param_group({"lr": 0.1})


class TheirError(ValueError):
    """An error of a user's factory, whose class has a constructor of its own."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"`learning_rate` of theirs: {reason} ({code})")
        self.code = code


def test_errors_of_a_factory_are_its_own() -> None:
    """A name is put in front of messages of ours alone, and notes stay."""

    def theirs(learning_rate: float) -> fo.GradientTransformation:
        raise TheirError(3, "no")

    def with_note(learning_rate: float) -> fo.GradientTransformation:
        error = ValueError("`learning_rate` of with_note is odd.")
        error.add_note("it has a note")
        raise error

    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(TheirError, match=r"^`learning_rate` of theirs: no") as caught:
        TransformOptimizer.factory(theirs)([p], lr=0.1)
    assert caught.value.code == 3
    with pytest.raises(ValueError, match="`learning_rate` of with_note is odd") as noted:
        TransformOptimizer.factory(with_note)([p], lr=0.1)
    assert noted.value.__notes__ == ["it has a note"]
