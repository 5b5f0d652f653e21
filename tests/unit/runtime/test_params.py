"""Steps over parameters with counters and options of their own, beside the pure API run for each one by itself."""

import contextlib
import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.backends import only
from _lib.chains import halving, scale_by_value
from _lib.compare import Snapshot
from _lib.marks import INTERPRETER
from functional_optim._compiler.rule import Option
from functional_optim._params.journal import Journal
from functional_optim._params.layout import ChainLayout
from functional_optim._params.step import ParamStep
from functional_optim._params.template import ParamList, Template, prefixes_of
from functional_optim._runtime.backend import BACKENDS
from functional_optim._walk import rules
from functional_optim.adapters import TransformOptimizer


pytestmark = INTERPRETER

SHAPES: tuple[tuple[int, ...], ...] = ((4, 3), (5,), (), (2, 0), (3, 2, 2))
RATES = [0.1, 0.01, 0.2]


def make_params(shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]


def gradients(params: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]


def step_with(opt: torch.optim.Optimizer, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()
    opt.step()


def in_groups(params: Sequence[torch.nn.Parameter], **options: Sequence[Any]) -> list[dict[str, Any]]:
    """Named parameters dealt out to as many groups as there are options."""
    n = len(next(iter(options.values())))
    return [
        {
            "params": [(f"p{k}", p) for k, p in enumerate(params) if k % n == g],
            **{name: x[g] for name, x in options.items()},
        }
        for g in range(n)
    ]


def on_the_host(count: Any) -> float:
    """A schedule that cannot be traced."""
    return [0.5, 0.4, 0.3, 0.2, 0.1][int(count) % 5]


# -- each parameter by itself -----------------------------------------------------------------------------------------


CHAINS: dict[str, Callable[[Any], fo.GradientTransformation]] = {
    "sgd": lambda lr: fo.sgd(lr),
    "momentum": lambda lr: fo.sgd(lr, momentum=0.9, nesterov=True),
    "adamw": lambda lr: fo.adamw(lr, weight_decay=0.1),
    "lamb, a norm of every leaf": lambda lr: fo.lamb(lr),
    "a traced schedule": lambda lr: fo.chain(fo.scale_by_schedule(halving), fo.adam(lr)),
    "a schedule on the host": lambda lr: fo.chain(fo.scale_by_schedule(on_the_host), fo.adam(lr)),
    "a mask": lambda lr: fo.adamw(lr, weight_decay=0.1, mask=re.compile("p[02]")),
    "a partition": lambda lr: fo.partition(
        {"a": fo.chain(fo.scale_by_adam()), "b": fo.chain(fo.trace(0.9))}, lambda path, p: "a" if p.ndim > 1 else "b"
    ),
    "averages": lambda lr: fo.chain(fo.lion(lr), fo.params_ema(0.9)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chain", CHAINS)
def test_each_parameter_is_as_if_it_were_alone(chain: str, backend: str) -> None:
    """They miss steps at different times, and have different learning rates, in one step over all of them."""
    make = CHAINS[chain]
    rates = [1.0] * 3 if chain == "a partition" else RATES  # its learning rate is the factor that it lacks itself
    params = make_params()
    alone = [{f"p{k}": p.detach().clone()} for k, p in enumerate(params)]
    txs = [make(rates[k % 3]) for k in range(len(SHAPES))]
    opt = TransformOptimizer(in_groups(params, lr=rates), make(rates[0]))
    unmatched = pytest.warns(UserWarning, match="matches no parameter")
    with unmatched if chain == "a mask" else contextlib.nullcontext():
        states = [tx.init(p) for tx, p in zip(txs, alone, strict=True)]
    for step in range(20):
        given = [None if (step + k) % 4 == 0 else g for k, g in enumerate(gradients(params, step))]
        with only(backend):
            step_with(opt, params, given)
        for k, g in enumerate(given):
            if g is not None:
                with fo.use_backend("reference"):
                    alone[k], states[k] = fo.apply_gradients(txs[k], alone[k], {f"p{k}": g}, states[k])
    for k, p in enumerate(params):
        # the same operations in the same order in double precision; norms are added up in another one, and Triton's
        # interpreter has its own powers: a few units of 2**-53 in each of twenty steps
        torch.testing.assert_close(p.detach(), alone[k][f"p{k}"], rtol=1e-13, atol=1e-14)
        if "step" in opt.state[p]:
            assert opt.state[p]["step"] == sum((step + k) % 4 != 0 for step in range(20))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_of_the_tree_spans_all_groups(backend: str) -> None:
    params = make_params()
    opt = TransformOptimizer(
        in_groups(params, lr=[1.0, 0.25]), fo.chain(fo.clip_by_global_norm(0.5), fo.scale_by_learning_rate(1.0))
    )
    before = [p.detach().clone() for p in params]
    grads = gradients(params, 1)
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]))
    with only(backend):
        step_with(opt, params, grads)
    # a norm of thirty numbers and five operations, in double precision
    for k, (p, g) in enumerate(zip(params, grads, strict=True)):
        torch.testing.assert_close(p.detach(), before[k] - (1.0, 0.25)[k % 2] * g * 0.5 / norm, rtol=1e-14, atol=1e-15)


@fo.elementwise(state={"sum": fo.slot(0.0)})
def later_ones_count_half(u: Any, sum: Any, *, first: Any) -> tuple[Any, Any]:
    """A rule whose first step differs."""
    sum = torch.where(first, u, sum + 0.5 * u)
    return sum, sum


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_step_is_each_parameters_own(backend: str) -> None:
    params = make_params(((2,), (2,)))
    opt = TransformOptimizer(params, fo.chain(later_ones_count_half(), fo.scale(-1.0)))
    ones = torch.ones(2, dtype=torch.float64)
    with only(backend):
        step_with(opt, params, [ones, None])
        step_with(opt, params, [ones, ones])
    assert [opt.state[p]["sum"].tolist() for p in params] == [[1.5, 1.5], [1.0, 1.0]]
    assert "step" not in opt.state[params[0]]


# -- guarded steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_guarded_step_with_an_infinite_gradient_changes_nothing(backend: str) -> None:
    tx = fo.chain(later_ones_count_half(), fo.clip_by_global_norm(10.0), fo.adam(0.1))
    params, twins = make_params(), make_params()
    opt, plain = TransformOptimizer(params, tx), TransformOptimizer(twins, tx)
    for step in range(4):
        grads = gradients(params, step)
        with only(backend):
            opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(1.0)
            before = copy.deepcopy(opt.state_dict()["state"]), [p.detach().clone() for p in params]
            step_with(opt, params, [torch.full_like(g, torch.inf) for g in grads])
            after = opt.state_dict()["state"], [p.detach() for p in params]
            torch.testing.assert_close(after, before, rtol=0, atol=0)
            opt.found_inf = torch.tensor(0.0)
            step_with(opt, params, [4 * g for g in grads])
            step_with(plain, twins, grads)
    # dividing by a power of two is exact
    torch.testing.assert_close([p.detach() for p in params], [p.detach() for p in twins], rtol=0, atol=0)
    torch.testing.assert_close(opt.state_dict()["state"], plain.state_dict()["state"], rtol=0, atol=0)


# -- lists and states that change -------------------------------------------------------------------------------------


def exchange(groups: list[dict[str, Any]]) -> None:
    """Two parameters change places, and so their groups."""
    a, b = groups[0]["params"], groups[1]["params"]
    a[0], b[0] = b[0], a[0]


def replace(groups: list[dict[str, Any]]) -> None:
    groups[0]["params"][0] = torch.nn.Parameter(groups[0]["params"][0].detach().clone())


def move(groups: list[dict[str, Any]]) -> None:
    groups[1]["params"].append(groups[0]["params"].pop())


IN_PLACE: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "nothing": lambda groups: None,
    "two parameters change groups": exchange,
    "one parameter changes groups": move,
    "a parameter is replaced": replace,
    "a parameter fewer": lambda groups: groups[1]["params"].pop(),
    "another order": lambda groups: groups[0]["params"].reverse(),
    "another momentum": lambda groups: groups[0].update(decay=0.1),
    "groups change options": lambda groups: [g.update(lr=0.4 - g["lr"]) for g in groups],
    "an object of its own as learning rate": lambda groups: groups[0].update(lr=torch.tensor(0.2)),
}


@pytest.mark.parametrize("change", IN_PLACE)
def test_param_groups_changed_in_place_are_read_anew(change: str) -> None:
    """Beside an optimizer that is a new object at each step, over equal parameters and states."""
    results = []
    for anew in (False, True):
        params = make_params(((4,),) * 6)
        groups = [{"params": params[g::2], "lr": (0.1, 0.3)[g]} for g in range(2)]
        opt = TransformOptimizer(groups, fo.sgd(0.1, momentum=0.9))
        for step in range(8):
            if step == 5:
                IN_PLACE[change](opt.param_groups)
            opt = copy.copy(opt) if anew else opt
            own = [p for group in opt.param_groups for p in group["params"]]
            step_with(opt, own, gradients(own, step))
        results.append([[p.detach() for p in own], [dict(opt.state[p]) for p in own]])
    torch.testing.assert_close(*results, rtol=0, atol=0)


# Changes of a state by users and libraries, behind the optimizer's back; the next step starts from ones.
STATE_CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "fill": lambda state: state["mu"].fill_(1.0),
    "replace": lambda state: state.update(mu=torch.ones_like(state["mu"])),
    "set data": lambda state: setattr(state["mu"], "data", torch.ones_like(state["mu"])),
    "swap": lambda state: torch.utils.swap_tensors(state["mu"], torch.ones_like(state["mu"])),
    "set memory": lambda state: state["mu"].set_(torch.ones_like(state["mu"])),
    "fill a view": lambda state: state["mu"].view(-1).fill_(1.0),
}


@pytest.mark.parametrize(("size", "n"), [(4, 3), (4, 30), (200, 3)])
@pytest.mark.parametrize("change", STATE_CHANGES)
def test_state_changed_between_steps_is_read_anew(change: str, size: int, n: int) -> None:
    params = make_params(((size, size),) * n)
    opt = TransformOptimizer(params, fo.adam(0.1))
    for step in range(3):
        step_with(opt, params, gradients(params, step))
    with torch.no_grad():
        STATE_CHANGES[change](opt.state[params[1]])
    assert (opt.state[params[1]]["mu"] == 1).all()
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    again = TransformOptimizer(twins, fo.adam(0.1))
    again.load_state_dict(copy.deepcopy(opt.state_dict()))

    step_with(opt, params, gradients(params, 9))
    step_with(again, twins, gradients(params, 9))

    torch.testing.assert_close([p.detach() for p in params], [p.detach() for p in twins], rtol=0, atol=0)


TRANSPOSED: dict[str, Callable[[dict[str, Any]], object]] = {
    "in place": lambda state: state["mu"].t_(),
    "a view": lambda state: state.update(mu=state["mu"].t()),
}


@pytest.mark.parametrize("n", [2, 30])
@pytest.mark.parametrize("change", TRANSPOSED)
def test_transposed_state_is_refused(change: str, n: int) -> None:
    params = make_params(((4, 3),) * n)
    opt = TransformOptimizer([(f"p{k}", p) for k, p in enumerate(params)], fo.adam(0.1))
    for step in range(3):
        step_with(opt, params, gradients(params, step))
    TRANSPOSED[change](opt.state[params[0]])
    snapshot = Snapshot(params, [opt.state[p] for p in params])
    with pytest.raises(ValueError, match=r"state scale_by_adam.mu at 'p0' has shape \(3, 4\)"):
        step_with(opt, params, gradients(params, 9))
    snapshot.check()


COUNTERS: dict[str, Any] = {
    "float32": torch.tensor(3.0),
    "float64": torch.tensor(3.0, dtype=torch.float64),
    "int64": torch.tensor(3),
    "int32": torch.tensor(3, dtype=torch.int32),
    "a vector": torch.tensor([3.0]),
    "a float": 3.0,
    "an int": 3,
}


@pytest.mark.parametrize("kind", COUNTERS)
def test_counters_of_any_form_count_on(kind: str) -> None:
    """As other versions and libraries store them."""
    params, twins = make_params(), make_params()
    opt, plain = TransformOptimizer(params, fo.adam(0.1)), TransformOptimizer(twins, fo.adam(0.1))
    for step in range(6):
        if step == 3:
            opt.state[params[1]]["step"] = copy.deepcopy(COUNTERS[kind])
        step_with(opt, params, gradients(params, step))
        step_with(plain, twins, gradients(params, step))
    assert opt.state[params[1]]["step"] == 6
    torch.testing.assert_close([p.detach() for p in params], [p.detach() for p in twins], rtol=0, atol=0)


@pytest.mark.parametrize("counter", ["three", torch.zeros(2), [3]], ids=str)
def test_a_counter_that_is_no_number_is_refused(counter: Any) -> None:
    params = make_params(((2,), (3,)))
    opt = TransformOptimizer([("a", params[0]), ("b", params[1])], fo.adam(0.1))
    step_with(opt, params, gradients(params, 0))
    opt.state[params[1]]["step"] = counter
    snapshot = Snapshot(params, [opt.state[p] for p in params])
    with pytest.raises(ValueError, match=r"state step at 'b' is .*, expected one number"):
        step_with(opt, params, gradients(params, 1))
    snapshot.check()


# -- opaque transformations -------------------------------------------------------------------------------------------


class Counting(fo.GradientTransformation):
    """Not made of rules: a sum per parameter, and a counter for all of them."""

    def __init__(self) -> None:
        super().__init__(self.start, self.run)

    @staticmethod
    def start(params: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "count": torch.zeros(()),
            "sums": {k: None if p is None else torch.zeros_like(p) for k, p in params.items()},
        }

    @staticmethod
    def run(updates: Mapping[str, Any], state: Any, params: Any = None) -> tuple[Any, Any]:
        sums = {k: s if updates[k] is None else s + updates[k] for k, s in state["sums"].items()}
        new = {k: None if u is None else sums[k] for k, u in updates.items()}
        return new, {"count": state["count"] + 1, "sums": sums}


def test_an_opaque_transformation_keeps_its_state_with_the_parameters() -> None:
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    opt = TransformOptimizer(params, fo.chain(fo.scale(2.0), Counting(), fo.trace(0.0), fo.scale(-1.0)))
    ones = torch.ones(2)
    for grads in ([ones, ones], [None, ones], [ones, ones]):
        step_with(opt, params, grads)
    # 2 + 4, and 2 + 4 + 6
    assert [p.tolist() for p in params] == [[-6.0, -6.0], [-12.0, -12.0]]
    assert [opt.state[p]["transformation_1.sums"].tolist() for p in params] == [[4.0, 4.0], [6.0, 6.0]]
    assert [opt.state[p].get("transformation_1:tree.count") for p in params] == [3.0, 3.0]


# -- ParamStep --------------------------------------------------------------------------------------------------------


def template(tx: fo.GradientTransformation) -> Template:
    """A template whose slots have their own names, each with its place in the chain."""
    keys = {(path, slot): slot for path, rule in rules(tx).items() for slot in rule._bound.rule.slots}
    return Template(tx, keys, prefixes_of(tx))


class Bench:
    """Parameters with their states, and steps on them.

    Args:
      templates: the chains.
      of: the chain of each parameter.
      shapes: the shapes of the parameters.
    """

    def __init__(self, templates: Sequence[Template], of: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> None:
        self.tensors = [p.detach() for p in make_params(shapes)]
        n = len(self.tensors)
        self.params = ParamList([f"p{k}" for k in range(n)], self.tensors, of, [0] * n)
        self.templates, self.states = templates, [{} for _ in range(n)]  # type: ignore[var-annotated]
        self.journal = Journal()

    def bind(self, grads: Sequence[torch.Tensor | None]) -> ParamStep:
        return ParamStep(ChainLayout(self.templates, self.params, False, warn=False), grads, torch.float32, warn=False)

    def take(self, step: ParamStep, grads: Sequence[torch.Tensor | None], options: Any = None, **extra: Any) -> str:
        """Takes a step that has been bound, with state that is made if need be."""
        options = [options or {}]
        if step.state.columns(self.states) is None:
            step.state.make(self.tensors, self.states, options, self.journal)
        columns = step.state.columns(self.states)
        assert columns is not None
        return step.take(
            columns, self.tensors, grads, self.states, options, extra, first=frozenset(), journal=self.journal
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_different_chains_share_one_step(backend: str) -> None:
    templates = [template(fo.adam(Option("lr"))), template(fo.sgd(Option("lr"), momentum=0.9))]
    bench = Bench(templates, [0, 1, 0, 1, 0], SHAPES)
    alone = [p.clone() for p in bench.tensors]
    txs = [fo.adam(0.1), fo.sgd(0.1, momentum=0.9)]
    states = [txs[k % 2].init(p) for k, p in enumerate(alone)]
    step = bench.bind(gradients(alone, 0))
    for turn in range(20):
        grads = gradients(alone, turn)
        with only(backend):
            assert bench.take(step, grads, {"lr": 0.1}) == "taken"
        for k, g in enumerate(grads):
            with fo.use_backend("reference"):
                alone[k], states[k] = fo.apply_gradients(txs[k % 2], alone[k], g, states[k])
    # the same operations in double precision, but for the powers of Triton's interpreter
    torch.testing.assert_close(bench.tensors, alone, rtol=1e-13, atol=1e-14)


def test_options_that_change_leave_the_step_bound() -> None:
    tx = fo.adamw(Option("lr"), b1=Option("betas", 0), b2=Option("betas", 1), weight_decay=Option("decay"))
    bench = Bench([template(tx)], [0] * 5, SHAPES)
    step = bench.bind(gradients(bench.tensors, 0))
    for k in range(4):
        options = {"lr": torch.tensor(0.1) if k % 2 else 0.1 * k, "betas": (0.9 - k / 10, 0.99), "decay": k / 100}
        assert bench.take(step, gradients(bench.tensors, k), options) == "taken"
    assert [len(region.bound_steps) for region in step.regions] == [1]


def test_gradients_that_are_gone_or_sparse_are_said_before_anything_is_done() -> None:
    bench = Bench([template(fo.adam(0.1))], [0, 0], ((3,), (3,)))
    grads = gradients(bench.tensors, 0)
    step = bench.bind(grads)
    assert bench.take(step, grads) == "taken"
    snapshot = Snapshot(bench.tensors, bench.states)
    step.begin()
    assert bench.take(step, [grads[0], None]) == "gone"
    assert bench.take(step, [grads[0], grads[1].to_sparse()]) == "sparse"
    assert not step.completed
    snapshot.check()
    assert bench.take(step, grads) == "taken"
    assert step.completed


def test_a_step_is_for_the_gradients_that_it_was_bound_to() -> None:
    templates = [template(fo.adam(0.1))]
    bench = Bench(templates, [0, 0], ((3,), (3,)))
    a, b = gradients(bench.tensors, 0)
    step = bench.bind([a, None])
    assert step.is_for(templates, [b, None], False, True)
    assert not step.is_for(templates, [a, b], False, True)
    assert not step.is_for(templates, [None, None], False, True)
    assert step.is_for(templates, [None, None], False, False)  # found when tensors are read
    assert not step.is_for(templates, [b, None], True, True)
    assert not step.is_for([template(fo.adam(0.1))], [b, None], False, True)
    assert not step.is_for([*templates, *templates], [b, None], False, True)


def test_an_option_that_is_not_there() -> None:
    bench = Bench([template(fo.sgd(Option("lr")))], [0], ((2,),))
    grads = gradients(bench.tensors, 0)
    with pytest.raises(KeyError, match=r"lacks 'lr', which scale_by_learning_rate.* there are \['rate'\]"):
        bench.take(bench.bind(grads), grads, {"rate": 0.1})


def test_an_option_that_is_too_short() -> None:
    bench = Bench([template(fo.adam(0.1, b2=Option("betas", 1)))], [0], ((2,),))
    grads = gradients(bench.tensors, 0)
    with pytest.raises(ValueError, match=r"'betas' is .*, expected at least 2 numbers"):
        bench.take(bench.bind(grads), grads, {"betas": (0.9,)})


def test_a_failed_step_leaves_no_state_behind() -> None:
    params = make_params(((2,), (2,)))
    opt = TransformOptimizer(params, fo.chain(fo.trace(0.9), scale_by_value()))
    snapshot = Snapshot(params)
    for grads in ([None, torch.ones(2, dtype=torch.float64)], gradients(params, 0)):
        with pytest.raises(TypeError, match="value"):
            step_with(opt, params, grads)
        assert not opt.state
        snapshot.check()


def test_journal_takes_back_what_was_put_last_first() -> None:
    a, b, state = object(), object(), {"kept": 1}
    journal = Journal()
    journal.set(state, "kept", a)
    journal.set(state, "kept", b)
    journal.set(state, "new", a)
    assert state == {"kept": b, "new": a}
    state.pop("new")  # by somebody else
    journal.undo()
    assert state == {"kept": 1}
