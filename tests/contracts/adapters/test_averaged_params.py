"""Averages that are swapped in: parameters come back, with their values, whatever happens in between."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import functional_optim as fo
from _lib.compare import assert_same_bits
from _lib.optimizers import (
    content,
    params_of as members,
    train,
)
from _lib.training import values
from functional_optim.adapters import TransformOptimizer, _averages


SHAPES = ((3, 4), (4,), (2, 3), ())


def averaging(params: list[Any] | None = None) -> TransformOptimizer:
    """An optimizer that averages, after some steps."""
    if params is None:
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]
    opt = TransformOptimizer(params, fo.chain(fo.adamw(0.1), fo.params_ema(0.9)))
    train([opt], range(3))
    return opt


def goes_on_like(opt: Any, twin: Any) -> None:
    """Asserts that parameters and state are those of an optimizer whose averages were never looked at."""
    assert torch.is_grad_enabled()
    assert_same_bits(content(opt), content(twin))
    train([opt, twin], range(3, 6))
    assert_same_bits(content(opt), content(twin))


def another_shape(p: Any) -> None:
    p.data = torch.zeros(7, dtype=p.dtype)


def another_dtype(p: Any) -> None:
    p.data = p.data.half()


def the_memory_of_another(p: Any) -> None:
    p.data = OTHER.expand(p.shape)


def other_strides(p: Any) -> None:
    p.data = p.data.reshape(-1).clone().reshape(p.shape[::-1]).t() if p.ndim == 2 else p.data.clone()


def freed_memory(p: Any) -> None:
    p.untyped_storage().resize_(0)


def other_values(p: Any) -> None:
    with torch.no_grad():
        p.fill_(torch.nan)


OTHER = torch.zeros((), dtype=torch.float64)
CHANGES: dict[str, Callable[[Any], None]] = {
    change.__name__: change
    for change in (another_shape, another_dtype, the_memory_of_another, other_strides, freed_memory, other_values)
}


@pytest.mark.parametrize("which", ["first", "last", "all"])
@pytest.mark.parametrize("change", CHANGES)
def test_parameters_come_back_whatever_the_block_made_of_them(change: str, which: str) -> None:
    OTHER.zero_()
    opt, twin = averaging(), averaging()
    params = members(opt)
    addresses = [p.data_ptr() for p in params]

    with opt.averaged_params():
        for p in {"first": params[:1], "last": params[-1:], "all": params}[which]:
            CHANGES[change](p)

    assert OTHER.item() == 0.0
    if change != "freed_memory":
        assert [p.data_ptr() for p in params] == addresses
    goes_on_like(opt, twin)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_parameters_come_back_after_an_exception(error: Any) -> None:
    opt, twin = averaging(), averaging()

    def evaluate() -> None:
        with opt.averaged_params():
            another_shape(members(opt)[0])
            raise error

    with pytest.raises(error):
        evaluate()

    goes_on_like(opt, twin)


class Stubborn(torch.Tensor):
    """A class of parameters that refuses to be copied to, by default never."""

    refusals = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_ and Stubborn.refusals:
            Stubborn.refusals -= 1
            raise RuntimeError("no")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("when", ["going in", "coming back"])
@pytest.mark.parametrize("position", range(3))
def test_one_parameter_that_cannot_be_written_does_not_keep_others(position: int, when: str) -> None:
    def make() -> list[Any]:
        made: list[Any] = [nn.Parameter(torch.full((3,), k + 1.0, dtype=torch.float64)) for k in range(3)]
        made[position] = Stubborn(made[position].detach())
        return made

    opt, twin = averaging(make()), averaging(make())
    try:
        if when == "going in":
            Stubborn.refusals = 1
            with pytest.raises(RuntimeError, match="no"), opt.averaged_params():
                pytest.fail("the block is not run")
        else:
            with opt.averaged_params():
                Stubborn.refusals = 1
    finally:
        Stubborn.refusals = 0

    goes_on_like(opt, twin)


@contextlib.contextmanager
def interrupted(at: int) -> Iterator[list[int]]:
    """Raises KeyboardInterrupt at one of the lines that the module of averages runs; the list has how many it ran."""
    count = [0]

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename != _averages.__file__:
            return None
        if event == "line":
            count[0] += 1
            if count[0] == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


@pytest.mark.slow
def test_an_interrupt_at_any_line_leaves_the_parameters() -> None:
    """On the way in and on the way out."""
    with interrupted(at=0) as lines, averaging().averaged_params():
        pass
    assert lines[0] > 30
    for at in range(1, lines[0] + 1):
        opt, twin = averaging(), averaging()
        with contextlib.suppress(KeyboardInterrupt), interrupted(at), opt.averaged_params():
            another_shape(members(opt)[1])
        goes_on_like(opt, twin)


def test_an_interrupt_at_any_line_leaves_the_buffers() -> None:
    net = nn.BatchNorm1d(3).double()
    opt, buffers = averaging(list(net.parameters())), {"running_mean": torch.ones(3)}
    tensors, before = dict(net.named_buffers()), values(net.state_dict())
    with interrupted(at=0) as lines, opt.averaged_params(net, buffers=buffers):
        pass
    for at in range(1, lines[0] + 1):
        with contextlib.suppress(KeyboardInterrupt), interrupted(at), opt.averaged_params(net, buffers=buffers):
            assert torch.equal(net.running_mean, torch.ones(3))
            net.running_var = torch.full((3,), torch.nan)
        assert all(b is tensors[name] for name, b in net.named_buffers())
        assert_same_bits(values(net.state_dict()), before)


def test_an_interrupt_of_the_system() -> None:
    opt, twin = averaging(), averaging()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let jobs in the background ignore it
    try:
        with pytest.raises(KeyboardInterrupt), opt.averaged_params():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)

    goes_on_like(opt, twin)


def test_a_block_that_is_never_left_puts_parameters_back_when_it_is_forgotten() -> None:
    opt, twin = averaging(), averaging()
    entered = opt.averaged_params()
    entered.__enter__()
    assert not torch.equal(members(opt)[0], members(twin)[0])

    del entered

    goes_on_like(opt, twin)


def test_averages_are_the_same_afterwards_and_the_state_in_the_block_is_that_outside() -> None:
    """A checkpoint that is written in the block has the averages twice, and no other state."""
    opt = averaging()
    before = content(opt)
    with opt.averaged_params():
        assert_same_bits(content(opt)["state"], before["state"])
        assert_same_bits(
            [p.detach() for p in members(opt)], [s["ema"] for s in before["state"]]
        )  # in float64 no rounding
    assert_same_bits(content(opt), before)


def test_tensors_over_the_memory_of_a_parameter_see_both_swaps() -> None:
    """A captured graph, or a buffer that parameters are views of, reads the memory that the parameter has."""
    flat = torch.ones(8, dtype=torch.float64)
    opt = averaging([nn.Parameter(flat[:3]), nn.Parameter(flat[3:])])
    trained = flat.clone()
    with opt.averaged_params():
        assert not torch.equal(flat, trained)
        assert torch.equal(flat, torch.cat([opt.state[p]["ema"] for p in members(opt)]))
    assert torch.equal(flat, trained)


@pytest.mark.parametrize("model", [None, "a module", "modules", "a generator"])
def test_modules_that_are_not_sharded_make_no_difference(model: str | None) -> None:
    net = nn.Linear(2, 2)
    models: dict[Any, Any] = {None: None, "a module": net, "modules": [net, net], "a generator": (m for m in (net,))}
    opt = averaging(list(net.parameters()))
    with opt.averaged_params(models[model]):
        assert torch.equal(net.weight, opt.state[net.weight]["ema"])


@pytest.mark.parametrize("model", [3, [torch.ones(1)], "net"])
def test_what_is_no_module_is_refused_and_nothing_is_swapped(model: Any) -> None:
    opt, twin = averaging(), averaging()
    with pytest.raises(TypeError), opt.averaged_params(model):
        pytest.fail("the block is not run")
    goes_on_like(opt, twin)
