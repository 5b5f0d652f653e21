"""Memory that tensors of a step share, or no longer have, on every backend."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

import functional_optim as fo
from _lib.compare import Snapshot, assert_same_bits
from _lib.marks import INTERPRETER
from functional_optim import adapters
from functional_optim.adapters import TransformOptimizer


pytestmark = INTERPRETER
STEPS = 20
BACKENDS = ["reference", "foreach", "c", "triton"]


# -- views that share no element --------------------------------------------------------------------------------------


def columns(base: torch.Tensor) -> list[torch.Tensor]:
    return [base[:, 0], base[:, 1], base[:, 2:]]


def every_other(base: torch.Tensor) -> list[torch.Tensor]:
    return [base.reshape(-1)[::2], base.reshape(-1)[1::2]]


def blocks(base: torch.Tensor) -> list[torch.Tensor]:
    return [base[:2, :2], base[:2, 2:], base[2:, :2], base[2:, 2:]]


def of_a_complex_tensor(base: torch.Tensor) -> list[torch.Tensor]:
    pairs = torch.view_as_complex(base.reshape(-1, 2))
    return [pairs.real, pairs.imag]


def rows_backwards(base: torch.Tensor) -> list[torch.Tensor]:
    return [base[3], base[2], base[1], base[0]]


def a_number_beside_a_row(base: torch.Tensor) -> list[torch.Tensor]:
    return [base[0, 0], base[0, 1:], base[1:].t()]


VIEWS: dict[str, Callable[[torch.Tensor], list[torch.Tensor]]] = {
    view.__name__: view
    for view in (columns, every_other, blocks, of_a_complex_tensor, rows_backwards, a_number_beside_a_row)
}
MAKERS: dict[str, Callable[[Any], Any]] = {
    "momentum": lambda params: adapters.SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: adapters.AdamW(params, lr=0.1),
    "LAMB": lambda params: adapters.LAMB(params, lr=0.1),
    "clip": lambda params: TransformOptimizer(params, fo.chain(fo.clip_by_global_norm(0.5), fo.sgd(0.1))),
}


def base(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.linspace(-1.0, 1.0, 16, dtype=torch.float64).to(dtype).reshape(4, 4)


def grads_like(params: Any, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("maker", MAKERS)
def test_parameters_that_lie_between_each_other(maker: str, view: str, dtype: torch.dtype) -> None:
    """They step as tensors of their own do, and write nothing else."""
    whole = base(dtype)
    params = [nn.Parameter(x) for x in VIEWS[view](whole)]
    own = [nn.Parameter(x.clone()) for x in VIEWS[view](base(dtype))]
    assert all(p.data_ptr() == x.data_ptr() for p, x in zip(params, VIEWS[view](whole), strict=True))
    opt, other = MAKERS[maker](params), MAKERS[maker](own)
    for step in range(STEPS):
        for o, tensors in ((opt, params), (other, own)):
            for p, g in zip(tensors, grads_like(tensors, step), strict=True):
                p.grad = g
            o.step()
        torch.testing.assert_close(params, own, rtol=0, atol=0)
        assert_same_bits(list(VIEWS[view](whole)), [p.detach() for p in own])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", VIEWS)
def test_donated_parameters_that_lie_between_each_other(view: str, backend: str) -> None:
    tx = fo.sgd(0.125, momentum=0.5)
    with fo.use_backend(backend):
        runs = []
        for share in (True, False):
            params = {str(k): x if share else x.clone() for k, x in enumerate(VIEWS[view](base()))}
            state = tx.init(params)
            for step in range(3 if backend == "triton" else STEPS):
                grads = dict(zip(params, grads_like(list(params.values()), step), strict=True))
                params, state = fo.apply_gradients(tx, params, grads, state, donate=True)
            runs.append({k: x.clone() for k, x in params.items()})
    assert_same_bits(runs[0], runs[1])


SHARED: dict[str, Callable[[torch.Tensor], list[torch.Tensor]]] = {
    "a row and a column": lambda x: [x[1], x[:, 1]],
    "rows that overlap": lambda x: [x[:3], x[2:]],
    "a part": lambda x: [x, x[3, 3:]],
    "other strides": lambda x: [x, x.t()],
}


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("maker", MAKERS)
def test_parameters_with_a_common_element_are_refused(maker: str, case: str, steps: int) -> None:
    """Also if they came to have one after some steps, as with `head.weight.data = embedding.weight.data`."""
    params = [nn.Parameter(x if not steps else x.clone()) for x in SHARED[case](base())]
    opt = MAKERS[maker](params)
    for step in range(steps):
        for p, g in zip(params, grads_like(params, step), strict=True):
            p.grad = g
        opt.step()
    if steps:
        for p, x in zip(params, SHARED[case](base()), strict=True):
            p.data = x
    for p, g in zip(params, grads_like(params, 9), strict=True):
        p.grad = g
    before = Snapshot(params, [dict(opt.state[p]) for p in params if p in opt.state])
    with pytest.raises(ValueError, match="memory"):
        opt.step()
    before.check()


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_parameters_that_are_the_same_memory_are_stepped_in_turns(name: str, steps: int) -> None:
    """As torch steps them, one after the other, each with its own gradient and state."""
    options: dict[str, Any] = {"momentum": 0.9} if name == "SGD" else {}
    made = []
    for module in (adapters, torch.optim):
        params = [nn.Parameter(base()[0]) for _ in range(3)]
        opt = getattr(module, name)(params, lr=0.1, foreach=False, **options)
        for step in range(steps + 20):
            if step == steps:
                params[2].data = params[0].data
            for p, g in zip(params, grads_like(params, step), strict=True):
                p.grad = g
            opt.step()
        made.append([p.detach() for p in params])
    torch.testing.assert_close(*made, rtol=1e-12, atol=1e-12)
    assert torch.equal(made[0][0], made[0][2])
    assert not torch.equal(made[0][0], made[0][1])


# -- state that is a parameter's memory --------------------------------------------------------------------------------


def the_parameters(params: Any) -> Any:
    return {"slow": dict(params)}


def views_of_them(params: Any) -> Any:
    return {"slow": {k: p.detach().reshape(-1) for k, p in params.items()}}


KEPT: dict[str, fo.GradientTransformation] = {
    f"{form.__name__}, made by {maker}": fo.GradientTransformation(
        form if maker == "init" else views_of_them,
        (lambda u, s, p=None, **_: (u, s)) if maker == "init" else (lambda u, s, p=None, f=form, **_: (u, f(p))),
    )
    for form in (the_parameters, views_of_them)
    for maker in ("init", "update")
    if form is views_of_them or maker == "init"
}


@pytest.mark.parametrize("name", KEPT)
def test_a_state_that_is_a_parameter_does_not_move_with_it(name: str) -> None:
    """Slow weights, anchors: the entries are those of the pure step, which writes to nothing."""
    tx = fo.chain(KEPT[name], fo.sgd(0.1))
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = adapters.TransformOptimizer([("w", p)], tx)
    params = {"w": torch.ones(3, dtype=torch.float64)}
    state = tx.init(params)
    for _ in range(20):
        p.grad = torch.ones_like(p)
        opt.step()
        params, state = fo.apply_gradients(tx, params, {"w": torch.ones_like(p)}, state)
        (kept,) = opt.state[p].values()
        torch.testing.assert_close(p.detach(), params["w"], rtol=0.0, atol=0.0)
        torch.testing.assert_close(kept, state[0]["slow"]["w"], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", KEPT)
def test_a_donated_step_refuses_a_state_that_is_a_parameter(name: str) -> None:
    tx = fo.chain(KEPT[name], fo.sgd(0.1))
    params = {"w": torch.ones(3)}
    state = tx.init(params)
    before = Snapshot(params)
    with pytest.raises(ValueError, match=r"slow\.w' shares memory with a parameter.*clone"):
        fo.apply_gradients(tx, params, {"w": torch.ones(3)}, state, donate=True)
    before.check()


# -- memory that is gone ----------------------------------------------------------------------------------------------


def free(x: torch.Tensor) -> None:
    x.untyped_storage().resize_(0)


def cut(x: torch.Tensor) -> None:
    x.untyped_storage().resize_(x.untyped_storage().nbytes() // 2)


def layout(name: str, values: torch.Tensor) -> torch.Tensor:
    """A tensor as kernels can walk it, or with gaps, so that they get a copy."""
    return values if name == "dense" else torch.stack([values, values], -1)[..., 0]


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("gone", [free, cut])
@pytest.mark.parametrize("what", ["params", "updates", "momentum"])
@pytest.mark.parametrize("form", ["dense", "with gaps"])
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_that_is_gone_is_refused(
    backend: str, donate: bool, form: str, what: str, gone: Callable[[Any], None], used: bool
) -> None:
    """Before anything is written; with the path of the leaf."""
    tx = fo.sgd(0.5, momentum=0.5)
    params = {k: layout(form, torch.ones(4, 4)) for k in "abc"}
    grads = {k: layout(form, torch.ones(4, 4)) for k in "abc"}
    state = tx.init(params)
    with fo.use_backend(backend):
        if used:
            params, state = fo.apply_gradients(tx, params, grads, state, donate=donate)
        x = {"params": params, "updates": grads, "momentum": state[0].trace}[what]["b"]
        gone(x)
        others = Snapshot([tree[k] for tree in (params, grads, state[0].trace) for k in "ac"])
        with pytest.raises(ValueError, match=r"b.* has no memory"):
            fo.apply_gradients(tx, params, grads, state, donate=donate)
        others.check()


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("gone", [free, cut])
@pytest.mark.parametrize("what", ["parameter", "gradient", "state"])
@pytest.mark.parametrize("form", ["dense", "with gaps"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("maker", ["momentum", "LAMB"])
def test_memory_of_an_optimizer_that_is_gone_is_refused(
    maker: str, backend: str, form: str, what: str, gone: Callable[[Any], None], steps: int
) -> None:
    if what == "state" and not steps:
        pytest.skip("there is none yet")
    params = [nn.Parameter(layout(form, torch.ones(4, 4))) for _ in range(3)]
    opt = MAKERS[maker](params)
    with fo.use_backend(backend):
        for _ in range(steps):
            for p in params:
                p.grad = layout(form, torch.ones(4, 4))
            opt.step()
        for p in params:
            p.grad = layout(form, torch.ones(4, 4))
        p = params[1]
        if what == "state":
            gone(next(x for x in opt.state[p].values() if x.ndim))
        else:
            gone(p.detach() if what == "parameter" else p.grad)
        others = Snapshot([[q, q.grad, dict(opt.state.get(q, {}))] for q in (params[0], params[2])])
        with pytest.raises(ValueError, match="has no memory"):
            opt.step()
        others.check()


def double(updates: Any, params: Any = None) -> Any:
    return {k: 2 * u for k, u in updates.items()}


BY_TORCH: dict[str, Callable[[], Any]] = {
    "opaque": lambda: fo.stateless(double),
    "opaque, then rules": lambda: fo.chain(fo.stateless(double), fo.sgd(0.1, 0.9)),
    "rules, then opaque": lambda: fo.chain(fo.sgd(0.1, 0.9), fo.stateless(double)),
    "L-BFGS": fo.scale_by_lbfgs,
    "whole tensors": lambda: fo.adafactor(0.1),
}


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("gone", [free, cut])
@pytest.mark.parametrize("what", ["params", "updates"])
@pytest.mark.parametrize("name", BY_TORCH)
def test_memory_that_is_gone_is_refused_before_torch_operations_read_it(
    name: str, what: str, gone: Callable[[Any], None], used: bool
) -> None:
    """They do not look, so a process would end, or go on with garbage."""
    tx = BY_TORCH[name]()
    params, grads = ({k: torch.ones(4, 4) for k in "abc"} for _ in range(2))
    state = tx.init(params)
    if used:
        params, state = fo.apply_gradients(tx, params, grads, state)
    gone((params if what == "params" else grads)["b"])
    others = Snapshot([tree[k] for tree in (params, grads) for k in "ac"])
    with pytest.raises(ValueError, match=rf"{what} at 'b' .* has no memory"):
        fo.apply_gradients(tx, params, grads, state)
    others.check()


@pytest.mark.parametrize("gone", [free, cut])
@pytest.mark.parametrize("what", ["params", "updates"])
def test_memory_of_an_optimizer_that_is_gone_is_refused_before_its_functions_run(
    what: str, gone: Callable[[Any], None]
) -> None:
    params = {k: nn.Parameter(torch.ones(4, 4)) for k in "abc"}
    opt = adapters.TransformOptimizer(params.items(), fo.stateless(double))
    for step in range(2):
        for p in params.values():
            p.grad = torch.ones(4, 4)
        if not step:
            opt.step()
    gone(params["b"].detach() if what == "params" else params["b"].grad)
    with pytest.raises(ValueError, match=rf"{what} at 'b' .* has no memory"):
        opt.step()


@pytest.mark.parametrize("gone", [free, cut])
@pytest.mark.parametrize("what", ["parameter", "state"])
def test_rows_of_memory_that_is_gone_are_refused(what: str, gone: Callable[[Any], None]) -> None:
    params = {k: nn.Parameter(torch.ones(4, 4)) for k in "ab"}
    opt = adapters.Adagrad(params.items())
    for step in range(2):
        for p in params.values():
            p.grad = torch.ones(4, 4).to_sparse(1)
        if not step:
            opt.step()
    gone(params["b"].detach() if what == "parameter" else opt.state[params["b"]]["sum"])
    others = Snapshot([params["a"], dict(opt.state[params["a"]])])
    with pytest.raises(ValueError, match=r"at 'b' .* has no memory"):
        opt.step()
    others.check()


@pytest.mark.parametrize("gone", [free, cut])
def test_averages_and_starts_of_memory_that_is_gone_are_refused(gone: Callable[[Any], None]) -> None:
    p = nn.Parameter(torch.ones(4, 4))
    opt = adapters.TransformOptimizer([("w", p)], fo.chain(fo.sgd(0.1), fo.params_ema(0.9)))
    p.grad = torch.ones(4, 4)
    opt.step()
    gone(opt.state[p]["ema"])
    with pytest.raises(ValueError, match="has no memory"), opt.averaged_params():
        pass
    gone(p.detach())
    with pytest.raises(ValueError, match=r"params at 'w' .* has no memory"):
        fo.params_ema(0.9).init({"w": p})


def loads(tree: Any) -> None:
    """Loads a state dict, a tensor of which has no memory."""
    p = nn.Parameter(torch.ones(4, 4))
    opt = adapters.AdamW([("b", p)])
    p.grad = torch.ones(4, 4)
    opt.step()
    saved = deepcopy(opt.state_dict())
    saved["state"][0]["exp_avg"] = tree["b"]
    before = Snapshot(dict(opt.state[p]))
    try:
        opt.load_state_dict(saved)
    finally:
        before.check()


READERS: dict[str, Callable[[Any], Any]] = {
    "apply_updates, updates": lambda tree: fo.apply_updates({k: torch.ones(4, 4) for k in tree}, tree),
    "apply_updates, params": lambda tree: fo.apply_updates(tree, {k: torch.ones(4, 4) for k in tree}),
    "pack": fo.pack,
    "pack_module": lambda tree: fo.pack_module(nn.ParameterDict(tree)),
    "load_state_dict": loads,
}


@pytest.mark.parametrize("gone", [free, cut])
@pytest.mark.parametrize("reader", READERS)
def test_functions_that_read_tensors_refuse_those_whose_memory_is_gone(
    reader: str, gone: Callable[[Any], None]
) -> None:
    tree = {k: torch.ones(4, 4) for k in "abc"}
    gone(tree["b"])
    with pytest.raises(ValueError, match=r"at 'b' .* has no memory"):
        READERS[reader](tree)


def lbfgs_step(opt: Any, p: torch.Tensor) -> None:
    def closure() -> torch.Tensor:
        p.grad = 2 * p.detach() if p.grad is None else p.grad
        return torch.tensor(1.0)

    opt.step(closure)


@pytest.mark.parametrize("gone", [free, cut])
@pytest.mark.parametrize("what", ["parameter", "gradient", "direction", "history", "saved"])
def test_memory_of_lbfgs_that_is_gone_is_refused(what: str, gone: Callable[[Any], None]) -> None:
    p = nn.Parameter(torch.linspace(1.0, 2.0, 16))
    opt = adapters.LBFGS([p], lr=0.1, max_iter=4)
    for _ in range(2):
        p.grad = None
        lbfgs_step(opt, p)
    saved = deepcopy(opt.state_dict())
    p.grad = torch.ones(16)
    state = saved["state"][0] if what == "saved" else opt.state[p]
    gone(
        {
            "parameter": p.detach(),
            "gradient": p.grad,
            "history": (state["old_dirs"] or [state["d"]])[0],
        }.get(what, state["d"])
    )
    with pytest.raises(ValueError, match="has no memory"):
        opt.load_state_dict(saved) if what == "saved" else lbfgs_step(opt, p)


@pytest.mark.parametrize("gone", [free, cut])
def test_a_state_of_lbfgs_that_is_gone_is_refused(gone: Callable[[Any], None]) -> None:
    tx, params, grads = fo.scale_by_lbfgs(), {"w": torch.ones(16)}, {"w": torch.ones(16)}
    state = tx.init(params)
    _, state = tx.update(grads, state, params)
    gone(state.params["w"])
    with pytest.raises(ValueError, match=r"at 'w' .* has no memory"):
        tx.update(grads, state, params)
