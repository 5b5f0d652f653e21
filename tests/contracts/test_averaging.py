"""Averages of parameters against torch's `AveragedModel`: in pure steps, in an optimizer, with buffers beside them."""

import copy
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

import functional_optim as fo
from _lib.compare import assert_same_bits
from _lib.scripts import load_script
from _lib.training import fit, make_batches, values
from _lib.trees import BF16, F32, F64, clone, like, make_tree
from functional_optim.adapters import TransformOptimizer


STEPS = 25
MIDDLE = 11
DECAY = 0.9
# Half a unit in the last place of numbers near one. One average is at most two products of numbers up to M, or a part
# of their difference, with a weight that is rounded: six roundings. Later steps shrink what earlier ones were off, or
# leave it as it is.
ROUNDING = {F32: 2.0**-24, F64: 2.0**-53, BF16: 2.0**-8}


@fo.elementwise(
    state={
        "average": fo.slot("param", dtype="accumulator_dtype", evaluate=True),
        "n_averaged": fo.slot(0.0, per="leaf"),
    },
    ranges={"eta": "[0, inf)"},
    final=True,
)
def params_average(
    u: torch.Tensor,
    p: torch.Tensor,
    average: torch.Tensor,
    n_averaged: Any,
    *,
    eta: Any = 3.0,
    accumulator_dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """An average of a user's own, Shamir & Zhang 2013, which weighs later parameters more."""
    n = n_averaged + 1
    return u, torch.lerp(average, p + u, (eta + 1) / (n + eta)), n


class Case(NamedTuple):
    """An average and the calls of `AveragedModel` that it stands for.

    Args:
      ours: the transformation, for a dtype that it stores.
      is_due: whether `update_parameters` is called after so many steps.
      theirs: the arguments of `AveragedModel`.
    """

    ours: Callable[[torch.dtype | None], Any]
    is_due: Callable[[int], bool]
    theirs: dict[str, Any] = {}  # noqa: RUF012


def warmed_up(average: Any, p: Any, n: Any) -> Any:
    return torch.lerp(p, average, min(DECAY, float(n) / (9 + float(n))))  # n - 1 decays before this one


def unbiased(average: Any, p: Any, n: Any) -> Any:
    return average + (p - average) * ((1 - DECAY) / (1 - DECAY ** (float(n) + 1)))


def every_third(count: Any) -> Any:
    return torch.where((count + 1) / 3 == torch.floor((count + 1) / 3), DECAY, 1.0)


CASES = {
    "equal": Case(lambda dtype: fo.params_swa(1, accumulator_dtype=dtype), lambda t: t > 0),
    "equal, the first parameters too": Case(lambda dtype: fo.params_swa(0, accumulator_dtype=dtype), lambda t: True),
    "SWA": Case(lambda dtype: fo.params_swa(6, 4, dtype), lambda t: t >= 6 and t % 4 == 2),
    "SWA, the first parameters too": Case(lambda dtype: fo.params_swa(0, 4, dtype), lambda t: t % 4 == 0),
    "SWA with a period that is not whole": Case(
        lambda dtype: fo.params_swa(6, 2.5, dtype), lambda t: t in (6, 9, 11, 14, 16, 19, 21, 24)
    ),
    "EMA": Case(
        lambda dtype: fo.params_ema(DECAY, dtype),
        lambda t: True,
        {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(DECAY)},
    ),
    "EMA, avg_fn": Case(
        lambda dtype: fo.params_ema(DECAY, dtype), lambda t: True, {"avg_fn": swa_utils.get_ema_avg_fn(DECAY)}
    ),
    "EMA without bias": Case(
        lambda dtype: fo.params_ema(fo.ema_debias_schedule(DECAY), dtype), lambda t: t > 0, {"avg_fn": unbiased}
    ),
    "EMA with a warm-up": Case(
        lambda dtype: fo.params_ema(fo.ema_warmup_schedule(DECAY), dtype), lambda t: True, {"avg_fn": warmed_up}
    ),
    "EMA at every third step": Case(
        lambda dtype: fo.params_ema(every_third, dtype),
        lambda t: t % 3 == 0,
        {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(DECAY)},
    ),
    "a rule of the user's": Case(
        lambda dtype: params_average(accumulator_dtype=dtype),
        lambda t: t > 0,
        {"avg_fn": lambda average, p, n: average + (p - average) * 4 / (n + 4)},
    ),
}
cases = pytest.mark.parametrize("name", CASES)
DTYPES = {"float32": (F32, None), "float64": (F64, None), "bfloat16": (BF16, None), "bfloat16 in float32": (BF16, F32)}
runs = pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in CASES), *((name, dtype) for name in ("SWA", "EMA") for dtype in [*DTYPES][1:])],
)


class Twin:
    """Torch's average of parameters that it is shown, in double precision.

    Args:
      case: which average.
      params: the parameters before the first step.
    """

    def __init__(self, case: Case, params: dict[str, torch.Tensor]) -> None:
        self.case, self.calls, self.steps = case, 0, -1
        self.model = nn.ParameterDict({k: p.detach().double() for k, p in params.items()})
        self.averaged = swa_utils.AveragedModel(self.model, **case.theirs)
        self.largest = 0.0
        self.show(params)

    def show(self, params: dict[str, torch.Tensor]) -> None:
        """Shows it the parameters after one more step."""
        self.steps += 1
        self.largest = max(self.largest, *(float(p.detach().abs().max()) for p in params.values()))
        with torch.no_grad():
            for k, p in params.items():
                self.model[k].copy_(p)
        if self.case.is_due(self.steps):
            self.averaged.update_parameters(self.model)
            self.calls += 1

    def check(self, averages: dict[str, torch.Tensor], params: dict[str, torch.Tensor], dtype: str) -> None:
        """Asserts that averages are torch's or, before there is one, the parameters."""
        if not self.calls:
            assert_same_bits(averages, {k: p.detach() for k, p in params.items()})
            return
        own, stored = DTYPES[dtype]
        # the average is of numbers that have not been rounded to half types, and is rounded to them when it is read
        halves = 2 * ROUNDING[own] if own is BF16 else 0.0
        computed = ROUNDING[F64 if own is F64 else F32]
        bound = self.calls * (6 * computed + ROUNDING[stored or own]) + halves
        expected = {k: x.detach() for k, x in self.averaged.module.items()}
        got = {k: x.double() for k, x in averages.items()}
        torch.testing.assert_close(got, expected, rtol=0, atol=bound * self.largest)


def made(name: str, dtype: str) -> Any:
    return fo.chain(fo.adam(0.1), CASES[name].ours(DTYPES[dtype][1]))


@runs
def test_averages_of_pure_steps(name: str, dtype: str) -> None:
    tx, params = made(name, dtype), make_tree(0, DTYPES[dtype][0])
    twin, state = Twin(CASES[name], params), tx.init(params)
    for step in range(STEPS):
        params, state = fo.apply_gradients(tx, params, like(params, step), state, donate=step % 2 == 0)
        twin.show(params)
        twin.check(fo.eval_params(state, params), params, dtype)


@runs
def test_averages_of_an_optimizer(name: str, dtype: str) -> None:
    params = {k: nn.Parameter(p) for k, p in make_tree(0, DTYPES[dtype][0]).items()}
    opt = TransformOptimizer(params.items(), made(name, dtype))
    twin = Twin(CASES[name], params)
    for step in range(STEPS):
        for p, g in zip(params.values(), like(params, step).values(), strict=True):
            p.grad = g
        opt.step()
        twin.show(params)
        with opt.averaged_params():
            averages = {k: p.detach().clone() for k, p in params.items()}
        twin.check(averages, params, dtype)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", ["equal", "SWA", "EMA, avg_fn"])
def test_averages_have_the_bits_of_torch(name: str, dtype: torch.dtype) -> None:
    """Of `AveragedModel` on the CPU, in the dtype of the parameters."""
    tx, params = fo.chain(fo.adam(0.1), CASES[name].ours(None)), make_tree(0, dtype)
    model = nn.ParameterDict(clone(params))
    averaged, state = swa_utils.AveragedModel(model, **CASES[name].theirs), tx.init(params)
    if CASES[name].is_due(0):
        averaged.update_parameters(model)
    for step in range(1, STEPS + 1):
        params, state = fo.apply_gradients(tx, params, like(params, step), state)
        model.load_state_dict(params)
        if CASES[name].is_due(step):
            averaged.update_parameters(model)

    assert_same_bits(fo.eval_params(state, params), {k: x.detach() for k, x in averaged.module.items()})


@cases
def test_a_checkpoint_in_the_middle(name: str) -> None:
    """Pure steps: to the bit."""
    tx, params = made(name, "float32"), make_tree(0, F32)
    state = tx.init(params)
    for step in range(STEPS):
        if step == MIDDLE:
            file = io.BytesIO()
            torch.save((params, state), file)
        params, state = fo.apply_gradients(tx, params, like(params, step), state)
    file.seek(0)
    resumed, resumed_state = torch.load(file)
    for step in range(MIDDLE, STEPS):
        resumed, resumed_state = fo.apply_gradients(tx, resumed, like(resumed, step), resumed_state)

    assert_same_bits((resumed, resumed_state), (params, state))
    assert_same_bits(fo.eval_params(resumed_state, resumed), fo.eval_params(state, params))


@cases
def test_a_checkpoint_of_an_optimizer_in_the_middle(name: str) -> None:
    params = {k: nn.Parameter(p) for k, p in make_tree(0, F32).items()}
    opts = [TransformOptimizer(params.items(), made(name, "float32"))]
    pairs = [params]
    for step in range(STEPS):
        if step == MIDDLE:
            file = io.BytesIO()
            torch.save(opts[0].state_dict(), file)
            file.seek(0)
            pairs.append({k: nn.Parameter(p.detach().clone()) for k, p in params.items()})
            opts.append(TransformOptimizer(pairs[1].items(), made(name, "float32")))
            opts[1].load_state_dict(torch.load(file))
        for each, opt in zip(pairs, opts, strict=True):
            for p, g in zip(each.values(), like(each, step).values(), strict=True):
                p.grad = g
            opt.step()
    averages = []
    for each, opt in zip(pairs, opts, strict=True):
        with opt.averaged_params():
            averages.append({k: p.detach().clone() for k, p in each.items()})

    assert_same_bits(averages[1], averages[0])
    assert_same_bits(
        [dict(opts[1].state[p]) for p in pairs[1].values()], [dict(opts[0].state[p]) for p in params.values()]
    )


# ---- what a step costs


@pytest.mark.parametrize("average", ["params_swa", "params_ema"])
def test_an_average_takes_no_launch_of_its_own(average: str) -> None:
    """It reads and writes its slot, in the last pass of the chain, and nothing else."""
    params = make_tree(0, F32)
    before = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1))
    last = {"params_swa": fo.params_swa(6, 4), "params_ema": fo.params_ema(fo.ema_debias_schedule(DECAY))}[average]
    alone, averaged = (fo.explain(tx, params) for tx in (before, fo.chain(before, last)))

    assert (averaged.launches, averaged.passes) == (alone.launches, alone.passes)
    assert (averaged.bytes_read - alone.bytes_read, averaged.bytes_written - alone.bytes_written) == (4, 4)


# ---- which steps are averaged


def test_a_parameter_that_is_not_averaged_leaves_the_average_to_the_bit() -> None:
    """Steps between those of the average may diverge; before the first, the slot is the parameter."""
    tx, params = fo.params_swa(2, 3), torch.zeros(4)
    state = tx.init(params)
    for step, value in enumerate([torch.inf, 1.0, torch.nan, torch.inf, 3.0, torch.nan], start=1):
        now = torch.full((4,), value)
        state = fo.update_average(tx, now, state)
        expected = {1: torch.inf, 2: 1.0, 3: 1.0, 4: 1.0, 5: 2.0, 6: 2.0}[step]
        assert_same_bits(fo.eval_params(state, now), torch.full((4,), expected))


def test_a_leaf_that_misses_steps_is_averaged_over_its_own() -> None:
    """In pure steps they are counted for the tree; a leaf joins at step 4, and misses step 6."""
    tx, params = fo.chain(fo.scale(-1.0), fo.params_swa(2, 2)), {"old": torch.zeros(1), "new": torch.zeros(1)}
    state = tx.init(params)
    for step in range(1, 9):
        grads = {"old": torch.ones(1), "new": torch.ones(1) if step >= 4 and step != 6 else None}
        params, state = fo.apply_gradients(tx, params, grads, state)

    # after steps 2, 4, 6 and 8 the old one was at minus these; the new one was at -1 after step 4, at -4 after step 8
    assert_same_bits(fo.eval_params(state, params), {"old": torch.tensor([-5.0]), "new": torch.tensor([-2.5])})
    assert_same_bits(state[1].n_averaged, {"old": torch.tensor(4.0), "new": torch.tensor(2.0)})


def test_a_parameter_that_joins_an_optimizer_counts_its_own_steps() -> None:
    old, new = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    opt = TransformOptimizer([old], fo.chain(fo.sgd(1.0), fo.params_swa(2, 2)))
    for step in range(1, 9):
        if step == 4:
            opt.add_param_group({"params": [new], "start": 1})
        for p in (old, new):
            p.grad = torch.ones(1)
        opt.step()

    with opt.averaged_params():
        assert old.item() == -5.0  # after steps 2, 4, 6, 8
        assert new.item() == -3.0  # after its own steps 1, 3 and 5
    assert [opt.state[p]["n_averaged"].item() for p in (old, new)] == [4.0, 3.0]


def test_options_of_an_average_change_between_steps() -> None:
    """Terms of the average are counted, so that it stays an equal one."""
    p = nn.Parameter(torch.zeros(1, dtype=F64))
    opt = TransformOptimizer([p], fo.chain(fo.sgd(1.0), fo.params_swa(2, 2)))
    for step in range(1, 13):
        if step == 7:
            opt.param_groups[0]["period"] = 5
        p.grad = torch.ones_like(p)
        opt.step()

    with opt.averaged_params():
        assert p.item() == pytest.approx(-(2 + 4 + 6 + 7 + 12) / 5, abs=2.0**-49)
    assert opt.state[p]["n_averaged"] == 5


def test_a_step_that_overflows_is_not_averaged() -> None:
    """With `fused=True` the kernel itself leaves everything as it was, the number of averaged values too."""
    p = nn.Parameter(torch.zeros(1))
    opt = TransformOptimizer([p], fo.chain(fo.sgd(1.0), fo.params_swa(2, 2)), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for gradient in (1.0, torch.inf, 1.0, torch.inf, 1.0, 1.0):
        opt.zero_grad()
        scaler.scale(p.sum() * gradient).backward()
        scaler.step(opt)
        scaler.update()

    assert (opt.state[p]["step"], opt.state[p]["n_averaged"]) == (4, 2)
    with opt.averaged_params():
        assert p.item() == -3.0


def test_averages_of_some_leaves_and_of_parts() -> None:
    params = make_tree(0)
    tx = fo.partition(
        {
            "a": fo.chain(fo.sgd(0.1), fo.params_swa(1)),
            "b": fo.chain(fo.sgd(0.1), fo.params_ema(0.5)),
            "c": fo.sgd(0.1),
        },
        {"weight": "a", "bias": "b", "scale": "c"},
    )
    state, seen = tx.init(params), [params]
    for step in range(2):
        params, state = fo.apply_gradients(tx, params, like(params, step), state)
        seen.append(params)

    expected = {
        "weight": (seen[1]["weight"] + seen[2]["weight"]) / 2,
        "bias": seen[0]["bias"] / 4 + seen[1]["bias"] / 4 + seen[2]["bias"] / 2,
        "scale": seen[2]["scale"],
    }
    torch.testing.assert_close(fo.eval_params(state, params), expected, rtol=0, atol=2.0**-50)


def test_two_averages_of_one_parameter_are_refused() -> None:
    tx = fo.chain(fo.sgd(1.0), fo.params_ema(0.5), fo.params_swa(1))
    with pytest.raises(ValueError, match="two averages of one parameter"):
        fo.eval_params(tx.init(torch.zeros(1)), torch.zeros(1))


def test_the_factor_of_a_chain_comes_before_an_average_at_its_end() -> None:
    """A chain without a learning rate has an `lr` that multiplies updates, which the average sees."""
    p = nn.Parameter(torch.zeros(1))
    opt = TransformOptimizer([p], fo.chain(fo.scale(-1.0), fo.params_swa(1)))
    opt.param_groups[0]["lr"] = 0.5
    p.grad = torch.ones(1)
    opt.step()
    with opt.averaged_params():
        assert p.item() == -0.5


def test_an_average_before_the_end_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"params_swa stands before .*put it at the end of the chain"):
        fo.chain(fo.params_swa(1), fo.scale(-1.0))


# ---- buffers


def with_statistics() -> nn.Module:
    """A network with batch norm, in double precision."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4)).double()


def floating(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b for name, b in model.named_buffers() if b.is_floating_point()}


SWA = (lambda: fo.params_swa(3, 2), lambda: fo.params_swa(1), {})
EMA = (
    lambda: fo.params_ema(fo.ema_debias_schedule(DECAY)),
    lambda: fo.params_ema(fo.ema_debias_schedule(DECAY)),
    {"avg_fn": unbiased},
)


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize(("average", "of_buffers", "theirs"), [SWA, EMA], ids=["SWA", "EMA"])
def test_buffers_are_averaged_or_the_models_own(average: Any, of_buffers: Any, theirs: Any, use_buffers: bool) -> None:
    """Those of `AveragedModel(use_buffers=...)`; counters are the model's own, where torch averages integers."""
    model, tx = with_statistics(), of_buffers()
    opt = TransformOptimizer(model.parameters(), fo.chain(fo.adam(0.05), average()))
    averaged, state = swa_utils.AveragedModel(model, use_buffers=use_buffers, **theirs), tx.init(floating(model))
    for step, batch in enumerate(make_batches(STEPS), start=1):
        fit(model, opt, [batch])
        if theirs or (step >= 3 and step % 2):
            averaged.update_parameters(model)
            state = fo.update_average(tx, floating(model), state)
    before = values(model.state_dict())
    buffers = fo.eval_params(state, floating(model)) if use_buffers else None
    x = torch.cat([x for x, _ in make_batches(3, seed=7)])
    with opt.averaged_params(model, buffers=buffers):
        inside = values(model.state_dict())
        output = model.eval()(x)

    expected = {k: x for k, x in averaged.module.state_dict().items() if "num" not in k or not use_buffers}
    # averages of at most 25 numbers up to 4, twice; see above
    torch.testing.assert_close({k: inside[k] for k in expected}, expected, rtol=0, atol=2 * STEPS * 7 * 4 * 2.0**-53)
    assert inside["1.num_batches_tracked"] == STEPS
    # statistics near 1 are divided by, and a layer sums 16 numbers: some hundred times as much
    torch.testing.assert_close(output, averaged.module.eval()(x), rtol=0, atol=1e-10)
    assert_same_bits(values(model.state_dict()), before)


def test_update_bn_within_averaged_params() -> None:
    """Statistics are those of the averaged model, and the model has its own again afterwards."""
    model, batches = with_statistics(), make_batches(STEPS)
    opt = TransformOptimizer(model.parameters(), fo.chain(fo.adam(0.05), fo.params_swa(1)))
    averaged = swa_utils.AveragedModel(model)
    for batch in batches:
        fit(model, opt, [batch])
        averaged.update_parameters(model)
    before, tensors = values(model.state_dict()), [id(b) for b in model.buffers()]
    swa_utils.update_bn(batches, averaged)
    with opt.averaged_params(model):
        swa_utils.update_bn(batches, model)
        inside = values(model.state_dict())

    torch.testing.assert_close(inside, dict(averaged.module.state_dict()), rtol=0, atol=1e-12)
    assert_same_bits(values(model.state_dict()), before)
    assert [id(b) for b in model.buffers()] == tensors


def test_update_bn_of_a_copy_with_averages_of_pure_steps() -> None:
    model, batches = with_statistics(), make_batches(STEPS)
    tx, averaged = fo.chain(fo.adam(0.05), fo.params_swa(3, 2)), swa_utils.AveragedModel(model)
    params = dict(model.named_parameters())
    state = tx.init(params)
    for step, (x, y) in enumerate(batches, start=1):
        loss = nn.functional.mse_loss(model(x), y)
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
        with torch.no_grad():
            _, state = fo.apply_gradients(tx, params, grads, state, donate=True)
        if step >= 3 and step % 2:
            averaged.update_parameters(model)
    shipped = copy.deepcopy(model)
    shipped.load_state_dict(fo.eval_params(state, params), strict=False)
    for each in (shipped, averaged):
        swa_utils.update_bn(batches, each)

    torch.testing.assert_close(dict(shipped.state_dict()), dict(averaged.module.state_dict()), rtol=0, atol=1e-12)


def test_a_buffer_that_the_block_replaces_is_put_back() -> None:
    model = with_statistics()
    opt = TransformOptimizer(model.parameters(), fo.chain(fo.adam(0.05), fo.params_swa(1)))
    fit(model, opt, make_batches(1))
    before, mean = values(model.state_dict()), model[1].running_mean

    def spoil() -> None:
        model[1].running_mean.fill_(torch.nan)
        model[1].running_mean = torch.ones(16)
        model[1].running_var.data = torch.zeros(3)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), opt.averaged_params(model):
        spoil()

    assert model[1].running_mean is mean
    assert_same_bits(values(model.state_dict()), before)


REFUSED: dict[str, tuple[bool, Any, type[Exception], str]] = {
    "no such buffer": (True, {"mean": torch.ones(16)}, ValueError, r"'mean', which is no buffer .*1\.running_mean"),
    "another shape": (True, {"1.running_mean": torch.ones(3)}, ValueError, r"\(3,\) for '1\.running_mean'.* \(16,\)"),
    "no model": (False, {"1.running_mean": torch.ones(16)}, TypeError, r"`buffers` are those of one module"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_buffers_that_do_not_fit_are_refused_and_nothing_is_swapped(name: str) -> None:
    given, buffers, error, message = REFUSED[name]
    model = with_statistics()
    opt = TransformOptimizer(model.parameters(), fo.chain(fo.adam(0.05), fo.params_swa(1)))
    fit(model, opt, make_batches(2))
    before = values(model.state_dict())
    with pytest.raises(error, match=message), opt.averaged_params(model if given else None, buffers=buffers):
        pytest.fail("the block is not run")
    assert_same_bits(values(model.state_dict()), before)
    with opt.averaged_params():
        pass


def test_counters_are_left_out_of_an_average() -> None:
    with pytest.raises(TypeError, match=r"dtype torch\.int64.* leave it out of the tree"):
        fo.params_swa(1).init(dict(with_statistics().named_buffers()))


def test_averages_of_the_parameters_of_another_optimizer() -> None:
    """Parameters of a module need no `detach`, and the average is not recorded."""
    model, tx = with_statistics(), fo.params_swa(1)
    opt, averaged = torch.optim.SGD(model.parameters(), 0.1), swa_utils.AveragedModel(model)
    params = dict(model.named_parameters())
    state = tx.init(params)
    for batch in make_batches(STEPS):
        fit(model, opt, [batch])
        state = fo.update_average(tx, params, state)
        averaged.update_parameters(model)
    averages = fo.eval_params(state, params)

    assert not any(x.requires_grad for x in averages.values())
    expected = {k: p.detach() for k, p in averaged.module.named_parameters()}
    torch.testing.assert_close(averages, expected, rtol=0, atol=2 * STEPS * 7 * 4 * 2.0**-53)


def test_update_average_leaves_its_arguments_alone() -> None:
    tx, tree = fo.params_ema(0.5), {"a": torch.ones(2), "b": None}
    state = tx.init(tree)
    before = clone((tree, state))
    after = fo.update_average(tx, {"a": torch.zeros(2), "b": None}, state)

    assert_same_bits((tree, state), before)
    assert_same_bits(fo.eval_params(after, tree), {"a": torch.full((2,), 0.5), "b": None})


# ---- the example


@pytest.mark.parametrize("recipe", ["swa", "ema"])
@pytest.mark.parametrize("form", ["an_optimizer", "functions"])
def test_the_recipes_of_the_example_are_those_of_torch(recipe: str, form: str) -> None:
    example = load_script("examples/averaging.py")

    result = getattr(example, f"{recipe}_with_{form}")(example.make_data(), 6)

    # 96 averages of numbers up to 4, in float32 on both sides
    assert result.difference <= 2 * 96 * 7 * 4 * 2.0**-24
    assert min(result.trained, result.averaged) > 0.7  # half are right by chance


def test_an_average_begins_where_that_of_torch_does() -> None:
    """The recipe of the page: a first decay of 0, since `AveragedModel` copies the parameters of its first update."""
    ours, theirs = (nn.Linear(3, 2).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    tx = fo.chain(fo.sgd(0.1), fo.params_ema(lambda count: torch.where(count < 1, 0.0, 0.9)))
    opts = TransformOptimizer(ours.parameters(), tx), torch.optim.SGD(theirs.parameters(), lr=0.1)
    averaged = swa_utils.AveragedModel(theirs, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(20):
        for model, opt in zip((ours, theirs), opts, strict=True):
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
        averaged.update_parameters(theirs)
    with opts[0].averaged_params(ours):
        torch.testing.assert_close(list(ours.parameters()), list(averaged.module.parameters()), rtol=1e-13, atol=1e-15)
