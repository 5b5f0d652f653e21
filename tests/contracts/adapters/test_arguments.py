"""Arguments and options of an optimizer that are of a wrong kind: refused by name and group, or as torch takes them."""

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import functional_optim as fo
from _lib.optimizers import NAMES, vectors
from functional_optim import adapters
from functional_optim.adapters import Adam, AdamW, TransformOptimizer, save_safetensors


@pytest.mark.parametrize("rate", [math.nan, math.inf, np.float64("nan"), np.float32("inf"), 10**400, "0.1"], ids=str)
def test_a_learning_rate_that_is_no_number(rate: Any) -> None:
    [p] = vectors(1)
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
    params = vectors(1)
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
        make(vectors(1)[0])


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

    assert Small(vectors(1)).param_groups[0]["lr"] == 1e-5
    assert inspect.signature(Alike) == inspect.signature(Adam) == inspect.signature(torch.optim.Adam)
    with pytest.raises(TypeError, match=r"`lr` is str '0\.1', expected a number"):
        Alike(vectors(1), lr="0.1")


@pytest.mark.parametrize("betas", [0.9, (0.9,), "text", None, {0: 0.9}])
def test_a_pair_of_numbers_is_one(betas: Any) -> None:
    with pytest.raises(TypeError, match=rf"`betas` is {re.escape(repr(betas))}, expected a pair of numbers"):
        AdamW(vectors(1), betas=betas)


READ_AT_A_STEP = [("Muon", option) for option in ("ns_steps", "eps")]


READ_AT_A_STEP += [("LBFGS", option) for option in ("max_iter", "tolerance_grad", "tolerance_change", "history_size")]


PAIRS = [
    (name, option)
    for name in [*NAMES, "Adafactor", "LAMB", "Lion", "Muon", "SparseAdam"]
    for option, x in inspect.signature(getattr(adapters, name)).parameters.items()
    if isinstance(x.default, tuple) and len(x.default) == 2
]


@pytest.mark.parametrize("in_group", [False, True], ids=["for all", "of a group"])
@pytest.mark.parametrize(("name", "option"), PAIRS)
def test_a_third_number_is_refused_where_two_are_read(name: str, option: str, in_group: bool) -> None:
    """Newer constructors of torch leave it out, so that a slip would change nothing, and nobody would know."""
    cls, p = getattr(adapters, name), torch.nn.Parameter(torch.ones(2, 2))
    given = {option: (*inspect.signature(cls).parameters[option].default, 0.5)}
    p.grad = torch.ones(2, 2).to_sparse() if name == "SparseAdam" else torch.ones(2, 2)
    with pytest.raises((ValueError, TypeError), match=rf"{option}.* expected (two|a pair of) numbers"):
        (cls([{"params": [p], **given}]) if in_group else cls([p], **given)).step()
    assert torch.equal(p, torch.ones(2, 2))


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
        ("betas", ("0.9", "0.99"), r"the option 'betas\[0\]' is '0.9', expected a number"),
        ("betas", (0.9, None), r"the option 'betas\[1\]' is None, expected a number"),
        ("eps", "1e-8", "the option 'eps' is '1e-8', expected a number"),
        ("eps", torch.tensor(1j), "the option 'eps' is a complex tensor, expected a number"),
    ],
)
def test_options_that_no_kernel_can_take(key: str, value: Any, message: str) -> None:
    [p] = vectors(1)
    opt = Adam([p], lr=0.1)
    opt.param_groups[0][key] = value
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert torch.equal(p, before)
    assert not opt.state


def test_static_option_that_is_a_list_is_refused() -> None:
    [p] = vectors(1)
    opt = TransformOptimizer([p], fo.sgd(0.1, momentum=0.9))
    opt.param_groups[0]["nesterov"] = [1]
    p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match=r"`nesterov` of parameter group 0 is list \[1\], expected True or False"):
        opt.step()


@fo.elementwise(static=("mode",))
def moded(u: Any, *, mode: str = "plain") -> Any:
    return u


def test_static_option_that_has_no_hash_is_refused() -> None:
    [p] = vectors(1)
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
                getattr(adapters, name)(vectors(1), **{option: wrong})


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
            make(vectors(1), **momentum, **{flag: wrong})
        for fine in (1, 0, np.True_, torch.tensor(False)) if flag in ("maximize", "nesterov", "amsgrad") else ():
            make([{"params": vectors(1), **momentum, flag: fine}])


FLAGS = {"maximize", "nesterov", "amsgrad", "centered", "foreach", "fused", "capturable", "differentiable"}


FLAGS |= {"decoupled_weight_decay"}


@pytest.mark.parametrize("wrong", ["False", 1, [True], torch.tensor(True)], ids=str)
@pytest.mark.parametrize("flag", ["maximize", "fused", "differentiable"])
def test_flags_of_a_chain_are_true_or_false(flag: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=rf"`{flag}` of TransformOptimizer is a switch"):
        TransformOptimizer(vectors(1), fo.sgd(0.1), **{flag: wrong})
    assert TransformOptimizer(vectors(1), fo.sgd(0.1), maximize=np.True_).defaults["maximize"] is True  # type: ignore[arg-type]


def stepped() -> Any:
    opt = TransformOptimizer(vectors(1), fo.chain(fo.sgd(0.1), fo.params_ema(0.9)))
    opt.param_groups[0]["params"][0].grad = torch.ones(16, dtype=torch.float64)
    opt.step()
    return opt


STATE_DICT = "`state_dict` of load_state_dict is .*, expected what `optimizer.state_dict"


CALLS: dict[str, tuple[Callable[[Any], Any], str, tuple[str, ...]]] = {  # calls, their messages, kinds that fit
    "tx": (lambda x: TransformOptimizer(vectors(1), x), "`tx` of TransformOptimizer: expected a gradient", ()),
    "tx_function": (TransformOptimizer.factory, "`tx_function` of TransformOptimizer.factory is", ("a function",)),
    "state_dict": (lambda x: stepped().load_state_dict(x), STATE_DICT, ("a dict",)),
    "state_dict of LBFGS": (lambda x: adapters.LBFGS(vectors(1)).load_state_dict(x), STATE_DICT, ("a dict",)),
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
    "closure of LBFGS": (lambda x: adapters.LBFGS(vectors(1)).step(x), "call `step.closure.` with", ("a function",)),
    "a saved state": (lambda x: save_safetensors(x, "nowhere"), "state_dict is .*, expected what", ("a dict",)),
    "model": (lambda x: stepped().averaged_params(x).__enter__(), "model", ()),
    "buffers": (lambda x: stepped().averaged_params(torch.nn.Linear(1, 1), buffers=x).__enter__(), "buffer", ()),
    "slot": (lambda x: stepped().averaged_params(slot=x).__enter__(), "no slot .* is called", ()),
    "params of a chain": (lambda x: TransformOptimizer(x, fo.sgd(0.1)), "param", ()),
    "params of a class": (lambda x: AdamW(x), "param", ()),
    "params of LBFGS": (lambda x: adapters.LBFGS(x), "param", ()),
    "a parameter group": (lambda x: stepped().add_param_group(x), "param", ("a dict",)),
}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in CALLS for kind in WRONG_OPTIONS if kind not in CALLS[name][2]]
)
def test_an_argument_of_a_wrong_kind_is_refused_by_its_name(name: str, kind: str) -> None:
    call, message, _ = CALLS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call(WRONG_OPTIONS[kind])


def test_arguments_of_a_step_that_nothing_takes() -> None:
    [p] = vectors(1)
    opt = AdamW([p])
    p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match="unexpected keyword argument 'valeu'; this chain takes none"):
        opt.step(valeu=1.0)
    opt.step(lambda: torch.tensor(1.0))  # a closure's loss is offered, and may be left


def test_a_parameter_group_without_parameters() -> None:
    for opt in (stepped(), AdamW(vectors(1))):
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
