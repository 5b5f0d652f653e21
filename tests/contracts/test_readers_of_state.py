"""Reading or saving an optimizer changes nothing: no parameter, no counter, no later step."""

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict as dsd
from torch.optim import lr_scheduler, swa_utils

import functional_optim as fo
from _lib.chains import halving, is_matrix
from _lib.compare import assert_same_bits
from _lib.optimizers import content
from _lib.training import fit, make_batches, make_model
from functional_optim import adapters
from functional_optim.adapters import TransformOptimizer


Make = Callable[[nn.Module], Any]


def chain(*parts: Any, **kwargs: Any) -> Make:
    return lambda model: TransformOptimizer(model.named_parameters(), fo.chain(*parts), **kwargs)


def double(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    return type(updates)({k: None if u is None else u * 2 ** state["count"] for k, u in updates.items()}), {
        "count": state["count"] + 1,
        "seen": {k: x + 1 for k, x in state["seen"].items()},
    }


def start(params: Any) -> Any:
    return {"count": 0, "seen": {k: torch.zeros_like(p) for k, p in params.items()}}


def by_turns(count: Any) -> float:
    """A schedule that Python evaluates."""
    return [0.3, 0.1, 0.2][int(count) % 3]


def pull(updates: Any, params: Any) -> Any:
    """An update of parameters that have no gradient, in operations of torch."""
    return type(updates)({k: None if u is None else u + 0.01 * params[k] for k, u in updates.items()})


OPAQUE = fo.GradientTransformation(start, double)
MAKERS: dict[str, Make] = {
    "SGD": lambda m: adapters.SGD(m.parameters(), lr=0.1),
    "momentum": lambda m: adapters.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda m: adapters.AdamW(m.parameters(), lr=0.05, weight_decay=0.1, amsgrad=True),
    "AdamW with a tensor lr": lambda m: adapters.AdamW(m.parameters(), lr=torch.tensor(0.05, dtype=torch.float64)),
    "AdamW that unscales": lambda m: adapters.AdamW(m.parameters(), lr=0.05, fused=True),
    "RMSprop": lambda m: adapters.RMSprop(m.parameters(), lr=0.05, momentum=0.9, centered=True),
    "Adagrad": lambda m: adapters.Adagrad(m.parameters(), lr=0.05),
    "ASGD": lambda m: adapters.ASGD(m.parameters(), lr=0.05, lambd=0.1, t0=2),
    "Lion": lambda m: adapters.Lion(m.parameters(), lr=0.01, weight_decay=0.1),
    "LAMB": lambda m: adapters.LAMB(m.parameters(), lr=0.01, weight_decay=0.1),
    "a schedule": chain(fo.sgd(fo.linear_schedule(1.0, 0.0, 4))),
    "a schedule in Python": chain(fo.sgd(by_turns)),
    "a schedule of a schedule": chain(fo.adam(fo.linear_schedule(0.1, 0.0, 9)), fo.scale_by_schedule(halving)),
    "decay after the learning rate": chain(fo.sgd(0.1), fo.add_decayed_weights(-0.1)),
    "decay alone": chain(fo.add_decayed_weights(-0.1)),
    "a factor": chain(fo.scale_by_adam(), fo.scale(-0.1), fo.add_decayed_weights(-0.01)),
    "sign after the learning rate": chain(fo.adam(0.1), fo.scale_by_sign(), fo.scale(0.01)),
    "decay in torch after the learning rate": chain(fo.sgd(0.1), fo.stateless(pull)),
    "no state": chain(fo.scale_by_sign(), fo.sgd(0.01)),
    "an average": chain(fo.clip_by_global_norm(1.0), fo.adamw(0.05), fo.params_ema(0.9)),
    "a debiased average": chain(fo.ema(0.9), fo.sgd(0.1), fo.params_ema(0.5)),
    "an opaque transformation": chain(OPAQUE, fo.sgd(0.01)),
    "an opaque transformation at the end": chain(fo.adam(0.01), OPAQUE),
    "masked": chain(fo.masked(fo.adam(fo.linear_schedule(0.1, 0.0, 4)), is_matrix), fo.sgd(0.1)),
    "slots of some": chain(fo.partition({True: fo.adamw(0.05), False: fo.sgd(0.1, momentum=0.9)}, is_matrix)),
    "in groups": lambda m: TransformOptimizer(
        [{"params": [m[0].weight], "lr": 0.3}, {"params": [m[0].bias, *m[2].parameters()]}], fo.adam(0.1)
    ),
}


def read_file(model: nn.Module, opt: Any) -> None:
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    torch.load(buffer)


def wrap(model: nn.Module, opt: Any) -> None:
    """A wrapper that hands on to the optimizer, as those of training libraries do."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        state = property(lambda self: self.inner.state)  # type: ignore[assignment]
        param_groups = property(lambda self: self.inner.param_groups)  # type: ignore[assignment]
        defaults = property(lambda self: self.inner.defaults)  # type: ignore[assignment]

        def state_dict(self) -> Any:
            return self.inner.state_dict()

    wrapper = Wrapper(opt)
    repr(wrapper.param_groups), wrapper.state_dict(), dict(wrapper.state)
    for group in wrapper.param_groups:
        for p in group["params"]:
            wrapper.state.get(p)


def scheduler(make: Callable[[Any], Any]) -> Callable[[nn.Module, Any], None]:
    """A scheduler is made, and all that it and the optimizer have put into the groups is taken out again."""

    def read(model: nn.Module, opt: Any) -> None:
        groups = [dict(group) for group in opt.param_groups]
        rates = [g["lr"].clone() if isinstance(g["lr"], torch.Tensor) else g["lr"] for g in groups]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(opt, "step", opt.step)  # which schedulers replace
            made = make(opt)
            made.state_dict(), made.get_last_lr()
        opt.__dict__.pop("step", None)
        for group, before, rate in zip(opt.param_groups, groups, rates, strict=True):
            if isinstance(before["lr"], torch.Tensor):
                before["lr"].copy_(rate)
            group.clear()
            group.update(before)

    return read


def scale(model: nn.Module, opt: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))
    scaler.state_dict()
    assert not hasattr(opt, "found_inf")


def distributed(**options: Any) -> Callable[[nn.Module, Any], None]:
    def read(model: nn.Module, opt: Any) -> None:
        dsd.get_optimizer_state_dict(model, opt, options=dsd.StateDictOptions(**options))

    return read


def distributed_pair(model: nn.Module, opt: Any) -> None:
    dsd.get_state_dict(model, opt)


def average(model: nn.Module, opt: Any) -> None:
    swa_utils.AveragedModel(model).update_parameters(model)


READERS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "state_dict": lambda model, opt: opt.state_dict(),
    "state_dict twice": lambda model, opt: (opt.state_dict(), opt.state_dict()),
    "a file": read_file,
    "its own state": lambda model, opt: opt.load_state_dict(opt.state_dict()),
    "deepcopy": lambda model, opt: copy.deepcopy(opt),
    "deepcopy of the state": lambda model, opt: copy.deepcopy(opt.state_dict()),
    "copy": lambda model, opt: copy.copy(opt),
    "pickle": lambda model, opt: pickle.loads(pickle.dumps(opt)) if opt.state else None,
    "repr": lambda model, opt: repr(opt),
    "state by parameter": lambda model, opt: [opt.state.get(p) for p in model.parameters()],
    "a wrapper": wrap,
    "zero_grad": lambda model, opt: opt.zero_grad(),
    "distributed": distributed(),
    "distributed, flattened": distributed(flatten_optimizer_state_dict=True),
    "distributed, whole": distributed(full_state_dict=True, cpu_offload=True),
    "distributed, model and optimizer": distributed_pair,
    "an averaged model": average,
    "a scale": scale,
    "StepLR": scheduler(lambda opt: lr_scheduler.StepLR(opt, 2)),
    "LambdaLR": scheduler(lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 1.0)),
    "ReduceLROnPlateau": scheduler(lr_scheduler.ReduceLROnPlateau),
    "OneCycleLR": scheduler(lambda opt: lr_scheduler.OneCycleLR(opt, 1.0, total_steps=9, cycle_momentum=False)),
    "SWALR": scheduler(lambda opt: swa_utils.SWALR(opt, 0.1)),
}


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """A process that is alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


BATCHES = make_batches(5)


@functools.cache
def trained(maker: str) -> Any:
    """Parameters and state of an optimizer that nobody has read."""
    model = make_model()
    opt = MAKERS[maker](model)
    fit(model, opt, BATCHES)
    return content(opt)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("maker", MAKERS)
def test_reading_changes_nothing(maker: str, reader: str, steps: int) -> None:
    if (maker, reader) in {("SGD", "distributed, whole")}:
        pytest.skip("the library needs a tensor to find the device by, and torch.optim.SGD has none either")
    model = make_model()
    opt = MAKERS[maker](model)
    fit(model, opt, BATCHES[:steps])
    opt.zero_grad()
    before = content(opt)
    groups = [dict(g) for g in opt.param_groups]
    READERS[reader](model, opt)
    assert_same_bits(content(opt)["params"], before["params"])
    if steps:
        assert_same_bits(content(opt)["state"], before["state"])
    for g, own in zip(opt.param_groups, groups, strict=True):
        assert g.keys() == own.keys()
        assert all(g[k] == x for k, x in own.items() if k != "params")
    fit(model, opt, BATCHES[steps:])
    assert_same_bits(content(opt), trained(maker))
