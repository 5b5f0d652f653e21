"""The backend that computes a step, and the text of `explain`."""

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.chains import CHAINS, Halve, is_matrix
from _lib.compare import Snapshot
from _lib.optimizers import OURS, fitting
from _lib.training import train
from _lib.trees import leaves, make_tree, mixed_tree
from functional_optim._runtime import backend
from functional_optim.adapters import SGD, Adam, AdamW, TransformOptimizer


# --- choice of the backend


def backends(params: Any = None) -> tuple[str, ...]:
    return fo.explain(fo.sgd(0.1), {"w": torch.zeros(2)} if params is None else params).backends


def test_use_backend_nests() -> None:
    assert backends() == ("c",)
    with fo.use_backend("foreach"):
        assert backends() == ("foreach",)
        with fo.use_backend("reference"):
            assert backends() == ("reference",)
        assert backends() == ("foreach",)
        with pytest.raises(ValueError, match="unknown backend"), fo.use_backend("triton"), fo.use_backend("cuda"):
            pass
        assert backends() == ("foreach",)
    assert backends() == ("c",)


def test_use_backend_is_per_thread() -> None:
    meet = threading.Barrier(2, timeout=60)

    def work(name: str) -> tuple[str, ...]:
        with fo.use_backend(name):
            meet.wait()
            found = backends()
            meet.wait()
        return found

    with ThreadPoolExecutor(2) as pool, fo.use_backend("triton"):
        found = list(pool.map(work, ("foreach", "reference")))
        assert backends() == ("triton",)

    assert found == [("foreach",), ("reference",)]


NEVER: dict[str, tuple[str, str]] = {
    "triton": ("triton", r"cannot compute the leaf at 'b' on cpu: Triton runs on CUDA devices, and on the CPU where"),
    "not installed": ("triton", r"on cpu: Triton is not installed\. Ask for 'reference' or 'foreach' or 'c', or leave"),
    "no compiler": ("c", r"on cpu: there is no C compiler: neither \$CC nor cc, gcc or clang is on the PATH\. Ask"),
}


# of a step of a vector: members, forward mode, and a derivative
FOLLOWED: tuple[Callable[[Any], Any], ...] = (
    lambda f: lambda x: torch.vmap(f)(x.expand(3, 2)),
    lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    lambda f: torch.func.grad(lambda x: f(x).sum()),
)


@pytest.mark.parametrize("case", NEVER)
@pytest.mark.parametrize("donate", [False, True])
def test_a_backend_that_never_serves_is_an_error(case: str, donate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, the step and `explain` say which leaf and why, and nothing is written; without, another one serves."""
    name, message = NEVER[case]
    monkeypatch.delenv("TRITON_INTERPRET")
    if case == "not installed":
        monkeypatch.setattr(backend, "_has_triton", lambda: False)
    if case == "no compiler":
        monkeypatch.setattr(backend, "find_compiler", lambda: None)
    tx, params = fo.adam(0.1), {"n": None, "b": torch.ones(2), "w": torch.ones(3)}
    state = tx.init(params)

    with fo.use_backend(name):
        with pytest.raises(RuntimeError, match=f"the backend '{name}' is asked for, but .*{message}"):
            fo.apply_gradients(tx, params, params, state, donate=donate)
        with pytest.raises(RuntimeError, match=message):
            fo.explain(tx, params)
        for transform in FOLLOWED:
            with pytest.raises(RuntimeError, match=f"the backend '{name}' is asked for, but .*{message}"):
                transform(lambda x: fo.apply_gradients(tx, {**params, "b": x}, params, state)[0]["b"])(params["b"])
        optimizer = AdamW([torch.nn.Parameter(torch.ones(2))])
        optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
        with pytest.raises(RuntimeError, match=f"the backend '{name}'"):
            optimizer.step()
        assert not optimizer.state

    assert all(torch.equal(x, torch.ones_like(x)) for x in (params["b"], params["w"]))
    assert not any(x.any() for x in (*state[0].mu.values(), state[0].count) if x is not None)


def test_there_is_no_c_kernel_for_a_gpu() -> None:
    with fo.use_backend("c"), pytest.raises(RuntimeError, match="on cuda:0: there is no C kernel for cuda"):
        backend.choose_backend(torch.device("cuda", 0))


# --- explain


RECIPE = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-3), fo.params_ema(0.99))

TEXT = """\
3,000 parameters in 2 tensors, computed by c
  2 launches in 2 passes over memory
  40 bytes per element: 24 read, 16 written
  12 bytes of state per parameter
kernel over 2 tensors, 3,000 elements, 1 row of scalars: 2 passes, 24 + 16 bytes
  reads updates, params, scale_by_adam.mu, scale_by_adam.nu, params_ema.ema
  writes params, scale_by_adam.mu, scale_by_adam.nu, params_ema.ema
launch: one call of a kernel, which makes one pass over all of its tensors
row of scalars: the numbers (learning rate, decay, ...) that tensors with the same hyper-parameters share"""


def test_the_text_of_explain() -> None:
    assert str(fo.explain(RECIPE, {"w": torch.zeros(50, 50), "b": torch.zeros(500)})) == TEXT


def test_the_text_of_explain_for_triton() -> None:
    """The clip's pass, the numbers that follow from it, and the pass of all the rest."""
    with fo.use_backend("triton"):
        e = fo.explain(RECIPE, {"w": torch.zeros(50, 50), "b": torch.zeros(500)})
    assert (e.passes, e.launches) == (2, 3)
    assert "3 launches in 2 passes" in str(e)
    assert "before passes" in str(e)
    assert "def uniform_1(" in e.kernels[0].source


F, D, B = torch.float32, torch.float64, torch.bfloat16
# passes, launches, bytes read per element, bytes written; counted by hand from the formulas
COUNTS: dict[str, tuple[Any, torch.dtype, tuple[int, int, int, int]]] = {
    "sgd": (fo.sgd(0.1), F, (1, 1, 8, 4)),  # u, p -> p
    "momentum": (fo.sgd(0.1, 0.9), F, (1, 1, 12, 8)),  # u, p, m -> p, m
    "adam": (fo.adam(0.1), F, (1, 1, 16, 12)),  # u, p, m, v -> p, m, v
    "adam in double": (fo.adam(0.1), D, (1, 1, 32, 24)),
    "adam in half": (fo.adam(0.1), B, (1, 1, 8, 6)),
    "adam with half a moment": (fo.adam(0.1, mu_dtype=B), F, (1, 1, 14, 10)),
    "adamw and average": (fo.chain(fo.adamw(0.1), fo.params_ema(0.9)), F, (1, 1, 20, 16)),
    "adamax": (fo.adamax(0.1), F, (1, 1, 16, 12)),
    "nadam": (fo.nadam(0.1, momentum_decay=4e-3), F, (1, 1, 16, 12)),
    "radam": (fo.radam(0.1), F, (1, 1, 16, 12)),
    "adadelta": (fo.adadelta(), F, (1, 1, 16, 12)),
    "adagrad": (fo.adagrad(0.1), F, (1, 1, 12, 8)),
    "rprop": (fo.rprop(0.1), F, (1, 1, 16, 12)),
    "asgd": (fo.asgd(0.1), F, (1, 1, 12, 8)),
    "clip and adamw": (fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1)), F, (2, 2, 20, 12)),  # u, and all of adamw
    "clip, adamw and average": (RECIPE, F, (2, 2, 24, 16)),
    "empty": (fo.identity(), F, (1, 1, 8, 4)),
}


# numbers of a parameter's size in the state of a drop-in class; each is read and written once, as is the parameter
SLOTS = {"NAdam": 2, "RAdam": 2, "Adamax": 2, "Adagrad": 1, "Adadelta": 2, "ASGD": 1, "Rprop": 2}


@pytest.mark.parametrize("name", SLOTS)
@pytest.mark.parametrize("more", [{}, {"weight_decay": 0.1, "maximize": True}], ids=str)
def test_drop_in_classes_move_every_number_once(name: str, more: dict[str, Any]) -> None:
    params = [torch.nn.Parameter(torch.zeros(50, 50))]
    e = fo.explain(OURS[name](params, **fitting(name, **more)))
    assert (e.passes, e.launches) == (1, 1)
    assert (e.bytes_read, e.bytes_written) == (4 * (2 + SLOTS[name]), 4 * (1 + SLOTS[name]))


@pytest.mark.parametrize("name", COUNTS)
def test_the_counts_of_explain(name: str) -> None:
    tx, dtype, (passes, launches, read, written) = COUNTS[name]

    e = fo.explain(tx, {"w": torch.zeros(50, 50, dtype=dtype), "b": torch.zeros(500, dtype=dtype)})

    assert (e.passes, e.launches, e.bytes_read, e.bytes_written) == (passes, launches, read, written)
    assert (e.bytes_per_element, e.parameters, e.leaves, e.notes) == (read + written, 3000, 2, ())


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("make", [make_tree, lambda seed: mixed_tree()], ids=["double", "mixed"])
def test_the_state_bytes_of_explain(name: str, make: Any) -> None:
    tx, params = CHAINS[name], make(0)
    state = [x for x in leaves(tx.init(params)) if isinstance(x, torch.Tensor)]

    e = fo.explain(tx, params)

    assert e.state_bytes == sum(x.nbytes for x in state) / sum(p.numel() for p in params.values())


class Own(torch.Tensor):
    """A class of tensors of which a kernel knows nothing."""


@fo.elementwise
def peak(u):  # type: ignore[no-untyped-def]
    """A rule without a derivative in kernels."""
    return u / fo.leaf_amax(torch.abs(u))


NOTES: dict[str, tuple[Any, Any, str]] = {
    "opaque": (fo.chain(fo.trace(0.9), Halve(), fo.scale(-1.0)), make_tree(0), r"Halve.* is not made of rules"),
    "opaque in a mask": (
        fo.masked(fo.chain(Halve(), fo.scale(-1.0)), is_matrix),
        make_tree(0),
        r"Halve.* is not made of",
    ),
    "host schedule": (CHAINS["host schedule"], make_tree(0), r"learning_rate cannot be traced.*every step"),
    "columns": (fo.sgd(0.1), {"w": torch.zeros(4, 6)[:, ::2]}, r"not laid out densely.*: w$"),
    "expanded": (fo.sgd(0.1), {"w": torch.zeros(1, 3).expand(4, 3)}, r"not laid out densely.*: w$"),
    "meta": (fo.sgd(0.1), {"w": torch.zeros(4, device="meta")}, r"on meta.*the reference"),
    "subclass": (
        fo.sgd(0.1),
        {"w": torch.zeros(4).as_subclass(Own)},
        r"a class of their own",
    ),
    "gradients wanted": (
        fo.sgd(0.1),
        {"w": torch.zeros(4, requires_grad=True)},
        r"kernels compute its derivative, too",
    ),
    "gradients wanted of a maximum": (peak(), {"w": torch.zeros(4, requires_grad=True)}, r"requires a gradient"),
}


@pytest.mark.parametrize("name", NOTES)
def test_the_notes_of_explain(name: str) -> None:
    tx, params, note = NOTES[name]

    e = fo.explain(tx, params)

    assert any(re.search(note, n) for n in e.notes), e.notes
    assert all(f"note: {n}" in str(e) for n in e.notes)


def test_the_kernels_of_explain() -> None:
    tx = fo.partition({"a": fo.adam(0.1), "b": fo.sgd(0.1), "c": fo.sgd(0.2)}, {"u": "a", "v": "b", "w": "c"})
    params = {"u": torch.zeros(10), "v": torch.zeros(20), "w": torch.zeros(30)}

    e = fo.explain(tx, params)

    found = {k.leaves: (k.elements, k.rows, k.passes, k.bytes_read, k.bytes_written, k.backend) for k in e.kernels}
    assert found == {("u",): (10, 1, 1, 16, 12, "c"), ("v", "w"): (50, 2, 1, 8, 4, "c")}
    assert (e.passes, e.launches) == (1, 2)
    # averaged over elements: 10 of 28 bytes, 50 of 12
    assert e.bytes_per_element == pytest.approx((10 * 28 + 50 * 12) / 60)
    assert all("pass_0" in k.source and "updates" in k.program for k in e.kernels)


def test_explain_touches_nothing() -> None:
    params = mixed_tree()
    before = Snapshot(params)

    fo.explain(RECIPE, params)

    before.check()


def test_explain_of_a_model_that_has_no_memory() -> None:
    """A model may be planned before it is allocated."""
    e = fo.explain(RECIPE, {"w": torch.empty(50_000, 50_000, device="meta")})

    assert (e.parameters, e.backends, e.bytes_per_element) == (2_500_000_000, ("reference",), 40)


def test_a_step_of_a_model_that_has_no_memory() -> None:
    params = {"w": torch.empty(5, 7, device="meta", dtype=torch.bfloat16)}

    new, (_, adam, *_) = train(RECIPE, params, [params, params])

    assert (new["w"].device.type, new["w"].shape, new["w"].dtype) == ("meta", (5, 7), torch.bfloat16)
    assert adam[0].mu["w"].device.type == "meta"


def test_one_parameter_that_requires_a_gradient_takes_the_others_along() -> None:
    params = {"w": torch.zeros(4, requires_grad=True), "b": torch.zeros(3).double()}

    assert fo.explain(peak(), params).backends == ("reference",)
    with torch.no_grad():
        assert fo.explain(peak(), params).backends == ("c",)


def a_transformation_whose_update_has_a_name_that_would_not_fit_into_one_line_of_an_explanation(
    updates: Any, state: Any, params: Any = None
) -> tuple[Any, Any]:
    return updates, state


def test_names_in_explain_are_whole() -> None:
    update = a_transformation_whose_update_has_a_name_that_would_not_fit_into_one_line_of_an_explanation
    tx = fo.chain(fo.GradientTransformation(lambda params: fo.EmptyState(), update), fo.sgd(0.1))

    assert f"{update.__name__})" in str(fo.explain(tx, {"w": torch.zeros(2)}))


# --- explain of an optimizer


def parameters(*shapes: tuple[int, ...], grad: bool = True) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(shape), requires_grad=grad) for shape in shapes]


def test_the_text_of_explain_for_an_optimizer() -> None:
    weights, biases = parameters((50, 50)), parameters((300,), (200,))
    opt = TransformOptimizer([{"params": weights}, {"params": biases, "lr": 0.5}], RECIPE)

    lines = str(fo.explain(opt)).splitlines()
    head, chain, options, *kernels = [
        line for k, line in enumerate(lines) if not k or line.startswith(("chain", "  options", "kernel"))
    ]

    assert head == "3,000 parameters in 3 tensors, computed by c"
    assert chain == (
        "chain of parameter groups 0, 1, 3 tensors: "
        "clip_by_global_norm > scale_by_adam > add_decayed_weights > scale_by_learning_rate > params_ema"
    )
    assert options == "  options max_norm, b1, b2, eps, eps_root, weight_decay, lr, decay"
    assert kernels == ["kernel over 3 tensors, 3,000 elements, 2 rows of scalars: 2 passes, 24 + 16 bytes"]


def test_explain_has_a_chain_for_each_set_of_switches() -> None:
    groups = [{"params": parameters((4, 4))}, {"params": parameters((4,)), "amsgrad": True}]
    opt = Adam([*groups, {"params": parameters((3,), (2,)), "lr": 0.1}])

    e = fo.explain(opt)

    found = [(c.groups, c.leaves, c.transformations, c.options) for c in e.chains]
    assert found == [
        ((0, 2), 3, ("adam_step",), ("lr", "betas", "eps")),
        ((1,), 1, ("amsgrad_step",), ("lr", "betas", "eps")),
    ]
    assert sorted((len(k.leaves), k.rows) for k in e.kernels) == [(1, 1), (3, 2)]


OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda params: SGD(params, 0.1, momentum=0.9),
    "AdamW": AdamW,
    "average": lambda params: TransformOptimizer(params, RECIPE),
    "nothing": lambda params: TransformOptimizer(params, fo.sgd(0.1)),
    "opaque": lambda params: TransformOptimizer(params, fo.chain(fo.trace(0.9), Halve(), fo.scale(-1.0))),
    "host schedule": lambda params: TransformOptimizer(params, CHAINS["host schedule"]),
    "per leaf": lambda params: TransformOptimizer(params, fo.chain(fo.zero_nans(), fo.lamb(0.1))),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_explain_of_an_optimizer_is_what_its_step_does(name: str) -> None:
    """The state that it counts is the state that a step makes, for parameters that have gradients; it makes none."""
    params = [*parameters((5, 7), (3,)), torch.nn.Parameter(torch.ones(4, dtype=torch.complex64))]
    opt = OPTIMIZERS[name]([*params, *parameters((6,), grad=False)])
    before = Snapshot(params)

    e = fo.explain(opt)

    before.check()
    assert not opt.state
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    state = [x for p in params for x in opt.state[p].values()]
    assert e.state_bytes * e.parameters == pytest.approx(sum(x.nbytes for x in state))
    assert (e.leaves, e.parameters, e.backends) == (3, 35 + 3 + 8, ("c",))


def test_explain_of_an_optimizer_that_records() -> None:
    assert fo.explain(Adam(parameters((2,)), differentiable=True)).backends == ("reference",)


REFUSED: dict[str, tuple[Any, str]] = {
    "a transformation alone": (lambda: fo.explain(fo.sgd(0.1)), r"needs the parameters.*explain\(tx, params\)"),
    "an optimizer and parameters": (lambda: fo.explain(AdamW(parameters((2,))), {}), "AdamW has its own"),
    "an optimizer of torch": (lambda: fo.explain(torch.optim.AdamW(parameters((2,)))), "gradient transformation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_arguments_of_explain(name: str) -> None:
    call, message = REFUSED[name]

    with pytest.raises(TypeError, match=message):
        call()


def test_routes_of_an_optimizer_are_shown_where_they_are_not_its_chain() -> None:
    bias = torch.nn.Parameter(torch.ones(3))
    tx = fo.adamw(0.1, weight_decay=0.1, mask=lambda path, p: p.ndim > 1)
    text = str(fo.explain(TransformOptimizer([("b", bias)], tx)))
    assert "route of 1 tensor (b)\n  scale_by_adam > scale_by_learning_rate\n" in text
    assert "route" not in str(fo.explain(TransformOptimizer([("b", bias)], fo.adamw(0.1))))
    with pytest.warns(UserWarning, match="matches no parameter"):
        nothing = str(fo.explain(fo.masked(fo.trace(0.9), False), {"w": torch.ones(2)}))
    assert "route of 1 tensor (w)\n  no transformation" in nothing
