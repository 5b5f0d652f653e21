"""Hyper-parameters that are refused where they are given: out of range, no numbers, no switches, no dtypes."""

import inspect
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.func import vmap

import functional_optim as fo
from _lib.training import train
from _lib.trees import make_tree, zeros


COMPLEX = torch.tensor(1j)
DTYPES: dict[str, Any] = {"text": "bfloat16", "numpy": np.float32, "jax": jnp.bfloat16, "python": float, "number": 2}
SWITCHES: dict[str, Callable[[Any], Any]] = {
    "nesterov of sgd": lambda x: fo.sgd(0.1, momentum=0.9, nesterov=x),
    "nesterov of trace": lambda x: fo.trace(0.9, nesterov=x),
    "eps_in_sqrt of scale_by_rms": lambda x: fo.scale_by_rms(eps_in_sqrt=x),
    "adaptive of muon": lambda x: fo.muon(0.1, adaptive=x),
    "adaptive of orthogonalize": lambda x: fo.orthogonalize(adaptive=x),
}
NO_SWITCHES: dict[str, Any] = {
    "text": "False",
    "a number": 1,
    "zero": 0.0,
    "None": None,
    "a list": [True],
    "a tensor": torch.tensor(True),
    "a vector": torch.ones(2),
    "a function": lambda count: True,
}


RANGES: dict[str, tuple[Callable[[], Any], str]] = {
    "compute_dtype of orthogonalize": (
        lambda: fo.orthogonalize(compute_dtype="bfloat16"),
        r"`compute_dtype` of orthogonalize must be one of \[None, torch.float64, .*\], got 'bfloat16'",
    ),
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
    "variant of scale_by_polyak": (
        lambda: fo.scale_by_polyak(variant="mps"),
        r"`variant` of scale_by_polyak must be .* got 'mps'",
    ),
    "a complex number": (
        lambda: fo.sgd(COMPLEX),
        r"`learning_rate` of scale_by_learning_rate must be a number.* complex tensor",
    ),
    "a complex number in a rule for whole tensors": (
        lambda: fo.scale_by_factored_rms(decay_rate=COMPLEX),
        r"`decay_rate` of scale_by_factored_rms must be a number.* complex tensor",
    ),
    "a complex number in a schedule": (
        lambda: fo.piecewise_constant_schedule(1.0, {2: COMPLEX}),
        r"`boundaries_and_scales` of piecewise_constant_schedule .* complex tensor at 2",
    ),
    "a complex factor": (
        lambda: fo.constant_schedule(1.0) * COMPLEX,
        r"`factors` of multiply_schedules .* complex tensor at 1",
    ),
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
for _name in ("scale_by_belief", "scale_by_yogi", "scale_by_adan", "scale_by_novograd"):
    RANGES |= outside(_name, "b1", 1.0, "[0, 1)") | outside(_name, "b2", -0.1, "[0, 1)")
    RANGES |= outside(_name, "eps", -1.0, "[0, inf)") | outside(_name, "eps_root", -1.0, "[0, inf)")
RANGES |= outside("scale_by_adan", "b3", 1.0, "[0, 1)")
RANGES |= outside("scale_by_yogi", "initial_accumulator_value", -1.0, "[0, inf)")
RANGES |= outside("scale_by_polyak", "max_learning_rate", 0.0, "(0, inf]")
RANGES |= outside("scale_by_polyak", "eps", -1.0, "[0, inf)")
RANGES |= outside("scale_by_param_block_norm", "min_scale", -1.0, "[0, inf)")
RANGES |= outside("fromage", "min_norm", -1.0, "[0, inf)", learning_rate=0.1)
RANGES |= outside("normalize_by_update_norm", "eps", -1.0, "[0, inf)")
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
RANGES |= outside("orthogonalize", "ns_steps", 0, "[1, inf)") | outside("orthogonalize", "eps", -1.0, "[0, inf)")
RANGES |= outside("scale_by_shape", "consistent_rms", -1.0, "[0, inf)")
RANGES |= outside("scale_by_factored_rms", "min_dim_size_to_factor", -1, "[0, inf]")
for _name, _hyper, _others in (
    ("fromage", "learning_rate", {}),
    ("normalize_by_update_norm", "scale_factor", {}),
    ("scale", "step_size", {}),
    ("scale_by_asgd", "alpha", {"learning_rate": 0.1}),
    ("scale_by_asgd", "learning_rate", {}),
    ("scale_by_factored_rms", "step_offset", {}),
    ("scale_by_learning_rate", "learning_rate", {}),
    ("scale_by_lion", "smooth_beta", {}),
    ("scale_by_novograd", "weight_decay", {}),
    ("scale_by_optimistic_gradient", "alpha", {}),
    ("scale_by_optimistic_gradient", "beta", {}),
    ("scale_by_polyak", "f_min", {}),
    ("scale_by_schedule", "step_size_fn", {}),
    ("scale_by_trust_ratio", "trust_coefficient", {}),
):
    RANGES[f"{_hyper} of {_name}"] = (
        lambda name=_name, hyper=_hyper, others=_others: getattr(fo, name)(**{hyper: math.nan}, **others),
        f"`{_hyper}` of {_name} must be a number, got nan",
    )


@pytest.mark.parametrize("name", RANGES)
def test_hyper_parameters_out_of_range(name: str) -> None:
    make, message = RANGES[name]

    with pytest.raises(ValueError, match=message):
        make()


def test_every_declared_range_is_tested() -> None:
    factories = {x.rule.name: x.rule for k, x in vars(fo).items() if not k.startswith("_") and hasattr(x, "rule")}
    declared = {f"{hyper} of {rule.name}" for rule in factories.values() for hyper in rule.ranges}

    assert declared <= set(RANGES)


NEEDED: dict[str, Any] = {  # required arguments that are no numbers
    "boundaries": [3],
    "boundaries_and_values": {0: 1.0},
    "cosine_kwargs": [{"init_value": 0.0, "peak_value": 1.0, "warmup_steps": 1, "decay_steps": 2}],
    "factor_fn": lambda count: 0.5,
    "factors": [0.5],
    "interpolate_type": "linear",
    "schedules": [fo.constant_schedule(1.0), fo.constant_schedule(0.5)],
}
BY_DEFAULT_NONE = {"adam_learning_rate", "consistent_rms", "end_value", "learning_rate", "max_learning_rate"}
BY_DEFAULT_NONE |= {"momentum", "momentum_decay", "step_size_down", "weight_decay_rate"}
OR_NONE = {("adafactor", "clipping_threshold"), ("scale_by_zoom_linesearch", "approx_dec_rtol")}
NOT_NUMBERS: dict[str, Any] = {
    "None": None,
    "text": "0.1",
    "a list": [0.1],
    "a tuple": (0.1,),
    "a dict": {"a": 0.1},
    "a set": {0.1},
    "a complex number": 1j,
    "a class": complex,
    "a bool": True,
    "a bool of numpy": np.True_,
    "a tensor of a bool": torch.tensor(True),
}


def factories() -> list[str]:
    """The public functions that make transformations and schedules of numbers."""
    listed = str(fo.__doc__).partition("\nTransformations\n")[2].partition("\nTypes\n")[0].split()
    others = {"from_torch_scheduler", "schedule", "value_and_grad_from_state"}
    return [name for name in listed if name in fo.__all__ and name not in others]


def needed(parameters: Iterable[inspect.Parameter]) -> dict[str, Any]:
    """Values of the arguments that have no default."""
    names = [p.name for p in parameters if p.default is p.empty]
    numbers = {
        name: 9 if name == "decay_steps" else 2 if "steps" in name or name == "period" else 0.5 for name in names
    }
    return numbers | {name: NEEDED[name] for name in names if name in NEEDED}


def is_number(p: inspect.Parameter) -> bool:
    """Whether an argument is a number."""
    if p.default is p.empty:
        return p.name not in NEEDED
    if p.default is None:
        return p.name in BY_DEFAULT_NONE
    return isinstance(p.default, (int, float)) and not isinstance(p.default, bool)


@pytest.mark.parametrize("name", factories())
def test_a_number_is_one_when_it_is_given(name: str) -> None:
    factory = getattr(fo, name)
    parameters = inspect.signature(factory).parameters.values()
    given = needed(parameters)
    factory(**given)

    for p in filter(is_number, parameters):
        none = p.default is None or (name, p.name) in OR_NONE
        for kind, value in NOT_NUMBERS.items():
            if none and value is None:
                continue
            with pytest.raises((TypeError, ValueError)) as info:
                factory(**given | {p.name: value})
            shown = (
                re.escape(repr(value)) if "bool" not in kind else r"((np\.)?True_?|tensor\(True\)|.*bool)"
            )  # a tensor by its dtype
            message = str(info.value)
            # by the caller's name; the rule within an optimizer may have another one, as the `decay` of `trace`
            said = re.search(rf"`{p.name}`.* (must be|expected) .*{shown}|`{p.name}`.* is {shown}, expected", message)
            if isinstance(value, torch.Tensor):
                said = said or re.search(rf"`{p.name}` of \w+ .*, so it must be no tensor", message)
            assert said, (p.name, kind, message)


# A value that is no number may be found out when the formula is first read; the message names the rule and the value.
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
    "a tensor for a switch": (
        lambda: fo.sgd(0.1, 0.9, nesterov=torch.tensor(False)),
        r"`nesterov` of sgd is a switch.* must be no tensor: pass nesterov\.item\(\)",
    ),
    "a tensor for a switch that a range depends on": (
        lambda: vmap(lambda x: fo.ema(0.9, debias=x).init(x))(torch.ones(2)),
        r"`debias` of ema is a switch.* must be no tensor",
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_hyper_parameters_of_the_wrong_kind(name: str) -> None:
    make, message = KINDS[name]
    params = make_tree(0)

    with pytest.raises((TypeError, ValueError), match=message):
        train(make(), params, [params])


def is_switch(p: inspect.Parameter) -> bool:
    """Whether an argument is True or False; masks may be trees of them."""
    return isinstance(p.default, bool) and not p.name.endswith("mask")


@pytest.mark.parametrize("kind", NO_SWITCHES)
@pytest.mark.parametrize("name", factories())
def test_a_switch_is_true_or_false(name: str, kind: str) -> None:
    factory = getattr(fo, name)
    parameters = inspect.signature(factory).parameters.values()
    given = needed(parameters)
    for p in filter(is_switch, parameters):
        factory(**given | {p.name: np.bool_(p.default)})
        with pytest.raises(TypeError, match=rf"`{p.name}` of \w+ is a switch"):
            factory(**given | {p.name: NO_SWITCHES[kind]})


def test_a_switch_that_is_named_may_have_other_values() -> None:
    """Unless it is annotated."""

    @fo.elementwise(static=("mode", "on"))
    def moded(u: Any, *, mode: bool | str = False, on: bool = True) -> Any:
        return u * {False: 1.0, "slow": 0.5}[mode]

    assert moded("slow").update(torch.ones(1), fo.EmptyState())[0] == 0.5
    with pytest.raises(TypeError, match="`on` of moded is a switch: pass True or False, got 'no'"):
        moded(on="no")


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("mu_dtype of scale_by_adam", lambda x: fo.adamw(0.1, mu_dtype=x)),
        ("nu_dtype of scale_by_adam", lambda x: fo.adam(0.1, nu_dtype=x)),
        ("accumulator_dtype of ema", lambda x: fo.adafactor(0.1, momentum=0.9, dtype_momentum=x)),
        ("accumulator_dtype of params_ema", lambda x: fo.params_ema(0.9, x)),
    ],
)
def test_dtypes_are_those_of_torch(name: str, make: Callable[[Any], Any], kind: str) -> None:
    argument, _, rule = name.partition(" ")
    with pytest.raises(TypeError, match=f"`{argument}` {rule} must be a dtype of torch, such as torch.bfloat16"):
        make(DTYPES[kind])


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_no_schedule(name: str) -> None:
    argument, _, rule = name.partition(" ")
    for function in (lambda count: count > 5, fo.constant_schedule(1.0)):
        with pytest.raises(TypeError, match=f"`{argument}` {rule} is a switch.*pass True or False"):
            SWITCHES[name](function)


WHOLE: dict[str, Callable[[Any], Any]] = {
    "ns_steps of orthogonalize": lambda x: fo.orthogonalize(ns_steps=x),
    "min_dim_size_to_factor of scale_by_factored_rms": lambda x: fo.scale_by_factored_rms(min_dim_size_to_factor=x),
    "ns_steps of muon": lambda x: fo.muon(0.1, ns_steps=x),
    "memory_size of lbfgs": lambda x: fo.lbfgs(memory_size=x),
    "max_backtracking_steps of a search": lambda x: fo.scale_by_backtracking_linesearch(max_backtracking_steps=x),
    "max_linesearch_steps of zoom": lambda x: fo.scale_by_zoom_linesearch(max_linesearch_steps=x),
    "max_linesearch_steps of strong Wolfe": lambda x: fo.scale_by_strong_wolfe_linesearch(max_linesearch_steps=x),
    "n of a user's rule": lambda x: fo.leafwise(static=("n",))(repeated)(x),
}


def repeated(u: torch.Tensor, *, n: int = 2) -> torch.Tensor:
    return u * n


@pytest.mark.parametrize("wrong", [2.5, 3.0, True, "3", [3], lambda count: 3])
@pytest.mark.parametrize("name", WHOLE)
def test_a_number_that_python_counts_with_is_whole(name: str, wrong: Any) -> None:
    WHOLE[name](3)
    WHOLE[name](np.int64(3))
    with pytest.raises(TypeError, match=rf"`{name.split()[0]}` of \w+ must be a whole number, got"):
        WHOLE[name](wrong)
