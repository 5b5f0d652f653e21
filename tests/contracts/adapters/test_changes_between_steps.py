"""Changes of tensors, states and options between two steps: the next step is right, or refused."""

import copy
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import functional_optim as fo
from functional_optim import adapters
from functional_optim.adapters import SGD, AdamW, TransformOptimizer


N = 12


def masked() -> fo.GradientTransformation:
    return fo.partition(
        {"a": fo.adamw(0.1), "b": fo.sgd(0.1, momentum=0.9)}, lambda path, p: "a" if p.ndim > 1 else "b"
    )


def whole() -> fo.GradientTransformation:
    return fo.partition(
        {"a": fo.adafactor(0.1, min_dim_size_to_factor=2), "b": fo.adam(0.1)},
        lambda path, p: "a" if p.ndim > 1 else "b",
    )


MAKERS: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    "AdamW": lambda params: AdamW(params, lr=0.1),
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9),
    "no state": lambda params: SGD(params, lr=0.1),
    "groups": lambda params: AdamW([{"params": params[k::3], "lr": 0.1 * (k + 1)} for k in range(3)]),
    "named": lambda params: AdamW([(f"p{k}", p) for k, p in enumerate(params)], lr=0.1),
    "clip + AdamW + EMA": lambda params: TransformOptimizer(
        params, fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1), fo.params_ema(0.9))
    ),
    "state of some": lambda params: TransformOptimizer(
        params, fo.partition({"a": fo.adamw(0.1), "b": fo.sgd(0.1)}, lambda path, p: "a" if p.ndim > 1 else "b")
    ),
    "two programs": lambda params: TransformOptimizer(params, masked()),
    "a schedule on the host": lambda params: TransformOptimizer(
        params, fo.chain(fo.trace(0.9), fo.scale_by_schedule(lambda count: [-0.1, -0.2][int(count) % 2]))
    ),
    "whole tensors": lambda params: TransformOptimizer(params, whole()),
}


class Pair:
    """An optimizer, and one that is a new object at each step, over the same parameters and states.

    `copy.copy` copies what `Optimizer.__getstate__` names: defaults, state and parameter groups.
    """

    def __init__(self, maker: str) -> None:
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(3, 3 if k % 2 else 1, generator=generator).squeeze(1) for k in range(N)]
        self.params = [[torch.nn.Parameter(x.clone()) for x in values] for _ in range(2)]
        self.opts = [MAKERS[maker](params) for params in self.params]
        self.generator = generator
        self.steps = 0
        self.versions: dict[Any, int] = {}

    def draw(self) -> None:
        for p, q in zip(*self.params, strict=True):
            p.grad = None if p.grad is None and self.steps else torch.randn(p.shape, generator=self.generator)
            q.grad = None if p.grad is None else p.grad.clone()

    def step(self) -> None:
        """Takes a step with both, which do the same."""
        self.steps += 1
        self.opts[1] = copy.copy(self.opts[1])
        ours, theirs = self.opts
        try:
            theirs.step()
        except Exception as error:
            before = copy.deepcopy(ours.state_dict()), [p.detach().clone() for p in self.params[0]]
            with pytest.raises(type(error), match=re.escape(str(error))):
                ours.step()
            self.same(before[0], ours.state_dict())
            self.same(before[1], [p.detach() for p in self.params[0]])
            raise
        ours.step()
        self.same(ours.state_dict(), theirs.state_dict())
        self.same(*[[p.detach() for p in params] for params in self.params])
        counts = [[p._version - self.versions.get(p, 0) for p in params] for params in self.params]
        assert counts[0] == counts[1]
        self.versions = {p: p._version for params in self.params for p in params}

    def same(self, a: Any, b: Any) -> None:
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        elif isinstance(a, dict):
            assert list(a) == list(b)
            self.same(list(a.values()), list(b.values()))
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                self.same(x, y)
        else:
            assert a == b or a is b


def of_both(change: Callable[[torch.optim.Optimizer, list[Any]], object]) -> Callable[[Pair], None]:
    def both(pair: Pair) -> None:
        for opt, params in zip(pair.opts, pair.params, strict=True):
            change(opt, params)

    return both


def states(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Pair], None]:
    """Puts something else into the state of a parameter."""

    def one(opt: torch.optim.Optimizer, params: list[Any]) -> None:
        if params[7] in opt.state:
            state = opt.state[params[7]]
            key = next(k for k, x in state.items() if x.ndim)
            state[key] = change(state[key])

    return of_both(one)


def replace_param(opt: torch.optim.Optimizer, params: list[Any]) -> None:
    old, new = params[7], torch.nn.Parameter(params[7].detach() + 1)
    opt.state.pop(old, None)
    new.grad, params[7] = old.grad, new
    for group in opt.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]


def reload(opt: torch.optim.Optimizer, params: list[Any]) -> None:
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def freeze(opt: torch.optim.Optimizer, params: list[Any]) -> None:
    params[7].requires_grad_(False)
    params[7].grad = None


def overlap(opt: torch.optim.Optimizer, params: list[Any]) -> None:
    n, shape = params[7].numel(), params[7].shape
    both = params[7].detach().reshape(-1).repeat(2)
    params[7].data, params[9].data = both[:n].view(shape), both[1 : n + 1].view(shape)


def swap_names(opt: torch.optim.Optimizer, params: list[Any]) -> None:
    names = {"lr": "weight_decay", "weight_decay": "lr"}
    if names.keys() <= opt.param_groups[0].keys():
        opt.param_groups[0] = {names.get(k, k): x for k, x in opt.param_groups[0].items()}


def swap_names_in_place(opt: torch.optim.Optimizer, params: list[Any]) -> None:
    group = opt.param_groups[0]
    swap_names(opt, params)
    changed, opt.param_groups[0] = opt.param_groups[0], group
    if changed is not group:
        group.clear()
        group.update(changed)


def lose_counters(opt: torch.optim.Optimizer, params: list[Any]) -> None:
    for p in params[7:9]:
        if "step" in opt.state.get(p, {}) and not isinstance(opt, AdamW):  # which torch refuses to copy then
            opt.state[p]["step"] = None


CHANGES: dict[str, Callable[[Pair], object]] = {
    "nothing": of_both(lambda opt, params: None),
    "new gradients": Pair.draw,
    "a gradient without an object": of_both(
        lambda opt, params: (params[7].grad.zero_(), torch.autograd.backward(params[7].sum()))
    ),
    "a gradient that is gone": of_both(lambda opt, params: setattr(params[7], "grad", None)),
    "no gradients": of_both(lambda opt, params: opt.zero_grad()),
    "a gradient that is not dense": of_both(lambda opt, params: setattr(params[7], "grad", torch.ones(3, 6)[:, ::2])),
    "a double gradient": of_both(lambda opt, params: setattr(params[7].grad, "data", params[7].grad.double())),
    "other memory": of_both(lambda opt, params: setattr(params[7], "data", params[7].data.clone())),
    "memory side by side": of_both(lambda opt, params: setattr(params[7], "data", torch.ones(2, 3, 3)[1])),
    "a parameter that is replaced": of_both(replace_param),
    "a frozen parameter": of_both(freeze),
    "another state": states(lambda x: x + 1),
    "a state that is a view": states(lambda x: torch.cat([x, x])[len(x) :]),
    "a double state": states(torch.Tensor.double),
    "a state on its side": states(lambda x: x.t().clone(memory_format=torch.contiguous_format).t()),
    "a state that is gone": of_both(lambda opt, params: opt.state.get(params[7], {}).clear()),
    "all states gone": of_both(lambda opt, params: opt.state.clear()),
    "a dict that is replaced": of_both(
        lambda opt, params: opt.state.__setitem__(params[7], dict(opt.state.get(params[7], {})))
    ),
    "counters that are gone": of_both(lose_counters),
    "more in a state": of_both(lambda opt, params: opt.state.get(params[7], {}).update(mine=1)),
    "another learning rate": of_both(lambda opt, params: opt.param_groups[0].update(lr=0.05)),
    "a tensor as learning rate": of_both(lambda opt, params: opt.param_groups[0].update(lr=torch.tensor(0.05))),
    "another weight decay": of_both(
        lambda opt, params: opt.param_groups[0].update({k: 0.5 for k in ("weight_decay",) if k in opt.param_groups[0]})
    ),
    "the same options by other names": of_both(swap_names),
    "the same options by other names, in the same dict": of_both(swap_names_in_place),
    "maximize": of_both(lambda opt, params: opt.param_groups[0].update(maximize=True)),
    "a group more": of_both(lambda opt, params: opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})),
    "a loaded state": of_both(reload),
    "parameters in another order": of_both(lambda opt, params: opt.param_groups[0]["params"].reverse()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("maker", MAKERS)
def test_step_after_a_change_of_params_grads_state_or_options(maker: str, change: str) -> None:
    pair = Pair(maker)
    for _ in range(3):
        pair.draw()
        pair.step()
    if maker == "no state" and ("state" in change or "dict" in change) and change != "a loaded state":
        pytest.skip("there is none")
    if maker == "named" and change in ("a group more", "parameters in another order"):
        pytest.skip("torch asks for names; names stay with their places")

    CHANGES[change](pair)

    pair.step()
    for _ in range(3):
        pair.draw()
        pair.step()


ERRORS: dict[str, Callable[[Pair], object]] = {
    "a gradient of another shape": of_both(lambda opt, params: setattr(params[7].grad, "data", torch.ones(5))),
    "a state of another shape": states(lambda x: torch.ones(5)),
    "a gradient that shares memory": of_both(lambda opt, params: setattr(params[7], "grad", params[7].detach())),
    "parameters that overlap": of_both(overlap),
    "a storage that is freed": of_both(lambda opt, params: params[7].grad.untyped_storage().resize_(0)),
    "an infinite learning rate": of_both(lambda opt, params: opt.param_groups[0].update(lr=float("inf"))),
}


@pytest.mark.parametrize("change", ERRORS)
@pytest.mark.parametrize("maker", ["AdamW", "groups", "two programs", "whole tensors"])
def test_step_refuses_a_bad_change_of_params_grads_state_or_options(maker: str, change: str) -> None:
    if maker == "two programs" and "rate" in change:
        pytest.skip("its learning rate is no option of all groups")
    if maker == "whole tensors" and "gradient that shares" in change:
        pytest.skip("the gradient has been read when the parameter is written")
    pair = Pair(maker)
    for _ in range(4):
        pair.draw()
        pair.step()

    ERRORS[change](pair)

    with pytest.raises((ValueError, TypeError, RuntimeError)):
        pair.step()


@pytest.mark.parametrize("maker", MAKERS)
def test_first_gradients_after_many_steps(maker: str) -> None:
    pair = Pair(maker)

    def step(missing: set[int]) -> None:
        for k, (p, q) in enumerate(zip(*pair.params, strict=True)):
            p.grad = None if k in missing else torch.randn(p.shape, generator=pair.generator)
            q.grad = None if p.grad is None else p.grad.clone()
        pair.step()

    for missing in ({3, 7, 8}, {8}, set(), {7}):
        before = [p.detach().clone() for p in pair.params[0]]
        for _ in range(5):
            step(missing)
        assert {k for k, p in enumerate(pair.params[0]) if torch.equal(p, before[k])} == missing
    with_state = {id(p) for p in pair.opts[0].state}
    assert not with_state or {id(p) for p in pair.params[0]} == with_state


@pytest.mark.parametrize("maker", MAKERS)
def test_gradients_that_are_missing_by_turns(maker: str) -> None:
    pair = Pair(maker)
    for step in range(18):
        for k, (p, q) in enumerate(zip(*pair.params, strict=True)):
            p.grad = None if k % 3 == step % 3 else torch.randn(p.shape, generator=pair.generator)
            q.grad = None if p.grad is None else p.grad.clone()
        pair.step()


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("removed", ["all", "one"])
@pytest.mark.parametrize("maker", [name for name in MAKERS if name != "no state"])
def test_removed_state_starts_anew(maker: str, removed: str, steps: int) -> None:
    """Not even right after the step that made them."""
    pair = Pair(maker)
    for _ in range(steps):
        pair.draw()
        pair.step()
    for opt, params in zip(pair.opts, pair.params, strict=True):
        if removed == "all":
            opt.state.clear()
        else:
            opt.state.pop(params[7])

    for _ in range(3):
        pair.draw()
        pair.step()

    counts = [pair.opts[0].state[p].get("step") for p in pair.params[0]]
    fresh = 7 if removed == "one" else 1
    assert counts[fresh] is None or counts[fresh] == 3


def test_step_under_a_default_device() -> None:
    pair = Pair("AdamW")
    with torch.device("cpu"):
        for _ in range(5):
            pair.draw()
            pair.step()


class Listening(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.grad.__get__:
            return torch.ones_like(args[0])
        return func(*args, **(kwargs or {}))


def test_torch_function_mode_replaces_gradients() -> None:
    pair = Pair("SGD")
    for _ in range(4):
        pair.draw()
        pair.step()
    before = pair.params[0][0].detach().clone()
    momentum = pair.opts[0].state[pair.params[0][0]]["momentum_buffer"].clone()

    with Listening():
        pair.step()

    torch.testing.assert_close(pair.params[0][0].detach(), before - 0.1 * (0.9 * momentum + 1), rtol=1e-6, atol=1e-7)


def test_replaced_gradients_and_state_are_freed() -> None:
    pair = Pair("AdamW")
    for _ in range(4):
        pair.draw()
        pair.step()
    tensors = [pair.params[0][7].grad, pair.opts[0].state[pair.params[0][7]]["exp_avg"]]
    seen = [weakref.ref(x) for x in tensors]
    del tensors

    pair.params[0][7].grad = None
    pair.opts[0].state[pair.params[0][7]]["exp_avg"] = torch.zeros(3, 3)

    assert [x() for x in seen] == [None, None]


# -- what is remembered beyond its time -------------------------------------------------------------------------------


def test_options_of_a_group_that_another_dict_has_replaced_are_not_read() -> None:
    """Not even where the old dict has other values by then, and the new one those of the last step."""
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    opt = SGD(params, lr=1.0)
    params[0].grad = torch.ones(2)
    opt.step()
    old = opt.param_groups[0]
    opt.param_groups[0] = dict(old)
    old["lr"] = 100.0
    params[1].grad = torch.ones(2)  # so that options are read anew
    opt.step()
    assert [p.tolist() for p in params] == [[-2.0] * 2, [-1.0] * 2]


@pytest.mark.parametrize("maker", ["two programs", "whole tensors"])
def test_a_failed_step_leaves_no_answers_of_masks(maker: str) -> None:
    """A function that is a mask has been asked about a shape that the next step does not have."""
    pair = Pair(maker)
    pair.draw()
    k = next(k for k, p in enumerate(pair.params[0]) if p.ndim > 1)
    p = pair.params[0][k]
    whole = p.data
    p.data = torch.ones(5)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        pair.opts[0].step()
    p.data = whole
    for _ in range(3):
        pair.step()
        pair.draw()


@fo.elementwise(state={"norm": fo.slot(per="tree")})
def over_norm(u: Any, norm: Any) -> Any:
    """A rule that keeps one number for all parameters."""
    norm = 0.5 * norm + 0.5 * fo.tree_norm(u)
    return u / (norm + 1), norm


def test_a_step_without_gradients_makes_no_number_of_the_tree() -> None:
    pair = Pair("SGD")
    pair.opts = [TransformOptimizer(params, fo.chain(over_norm(), fo.sgd(0.1))) for params in pair.params]
    assert pair.opts[0].step() is None
    assert not pair.opts[0].state
    for _ in range(3):
        pair.draw()
        pair.step()
        pair.opts[0].zero_grad()
        pair.opts[1].zero_grad()
        pair.step()
        pair.steps = 0  # all have gradients again


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "ASGD"])
def test_state_that_is_made_after_a_change_of_the_default_dtype_has_it(name: str) -> None:
    """As in torch, also where a step with the same gradients has been taken before."""
    cls, params = getattr(adapters, name), [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    opt = cls(params, lr=0.1)
    params[0].grad = params[1].grad = torch.ones(2)
    opt.step()
    del opt.state[params[1]]
    torch.set_default_dtype(torch.float64)
    try:
        opt.step()
    finally:
        torch.set_default_dtype(torch.float32)
    kinds = [{x.dtype for x in opt.state[p].values() if not x.ndim} for p in params]
    assert kinds == [{torch.float32}, {torch.float64}]


def test_step_beside_parameters_that_have_no_shape_yet() -> None:
    """Those of a lazy module that has not run have no gradient either, and take part when they have one."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LazyLinear(3))
    twin = copy.deepcopy(module)
    opt, other = AdamW(module.parameters(), lr=0.1), torch.optim.AdamW(twin.parameters(), lr=0.1)
    for step in range(20):
        x = torch.ones(4, 2) * (1 + step)
        if step == 5:
            module(x), twin(x)
            twin[1].load_state_dict(module[1].state_dict())
        for m, o in ((module, opt), (twin, other)):
            o.zero_grad()
            (m(x) if step >= 5 else m[0](x)).square().sum().backward()
            o.step()
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_rate_that_is_sparse_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    opt = AdamW([p], lr=0.1)
    p.grad = torch.ones(2)
    opt.param_groups[0]["lr"] = torch.tensor([0.1]).to_sparse()
    with pytest.raises(ValueError, match="lr of parameter group 0 is a sparse tensor, expected a number"):
        opt.step()


def test_sparse_gradients_before_a_transformation_that_is_called_are_refused() -> None:
    keep = fo.GradientTransformation(lambda params: (), lambda updates, state, params=None: (updates, state))
    p = torch.nn.Parameter(torch.ones(4, 2))
    opt = TransformOptimizer([("w", p)], fo.chain(keep, fo.scale(-0.1)))
    for _ in range(2):
        p.grad = torch.ones(4, 2).to_sparse(1)
        with pytest.raises((TypeError, RuntimeError), match="sparse"):
            opt.step()
        p.grad = torch.ones(4, 2)
        opt.step()
