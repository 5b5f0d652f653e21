"""Muon and Adafactor in the pure API, against optax, NumPy and singular values."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import functional_optim as fo


SHAPES = {"square": (6, 6), "wide": (4, 9), "high": (9, 4), "wide2": (4, 9), "vector": (5,), "number": ()}
MATRICES = {k: s for k, s in SHAPES.items() if len(s) == 2}


def numbers(seed: int, shapes: dict[str, Any] = SHAPES) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {k: generator.standard_normal(s) for k, s in shapes.items()}


def tensors(tree: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(np.array(x)) for k, x in tree.items()}


def turned(tree: Any) -> Any:
    """Matrices as optax has them: inputs are rows, outputs columns."""
    return {k: jnp.asarray(x).T for k, x in tree.items()}


def run(tx: Any, steps: int = 20, shapes: dict[str, Any] = SHAPES) -> dict[str, torch.Tensor]:
    params = tensors(numbers(0, shapes))
    state = tx.init(params)
    for step in range(1, steps + 1):
        params, state = fo.apply_gradients(tx, params, tensors(numbers(step, shapes)), state, donate=step % 2 == 0)
    return params


def run_optax(tx: Any, steps: int = 20, shapes: dict[str, Any] = SHAPES, turn: bool = True) -> dict[str, Any]:
    form: Any = turned if turn else lambda tree: {k: jnp.asarray(x) for k, x in tree.items()}
    params = form(numbers(0, shapes))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(1, steps + 1):
        updates, state = update(form(numbers(step, shapes)), state, params)
        params = optax.apply_updates(params, updates)
    return turned(params) if turn else params


def assert_near(ours: Any, theirs: Any, tolerance: float) -> None:
    for k in ours:
        np.testing.assert_allclose(ours[k].numpy(), np.asarray(theirs[k]), rtol=tolerance, atol=tolerance, err_msg=k)


OPTIONS: dict[str, Any] = {
    "default": {},
    "no nesterov, decay": {"nesterov": False, "weight_decay": 0.1},
    "three steps, adaptive": {"ns_steps": 3, "adaptive": True, "beta": 0.8},
    "consistent rms": {"consistent_rms": 0.2},
    "aol": {"preconditioning": "aol"},
    "schatten": {"preconditioning": "schatten"},
    "spectral": {"preconditioning": "spectral"},
}
DION = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_muon_is_that_of_optax(name: str) -> None:
    """In float64, through 20 steps of up to 15 products each; a spectral norm is computed in float32 here."""
    # rows are scaled one by one with "aol", and those of a square matrix are columns in optax
    shapes = {k: s for k, s in SHAPES.items() if not (k == "square" and name == "aol")}
    ours = run(fo.muon(0.02, **OPTIONS[name]), shapes=shapes)
    theirs = run_optax(optax.contrib.muon(0.02, **OPTIONS[name]), shapes=shapes)
    assert_near(ours, theirs, 1e-5 if name == "spectral" else 1e-10)


@pytest.mark.slow
def test_coefficients_may_differ_from_step_to_step() -> None:
    """optax takes the last of those that are given; here the last one is repeated if there are too few."""
    ours = run(fo.muon(0.02, DION, 3), shapes=MATRICES)
    theirs = run_optax(optax.contrib.muon(0.02, DION, 3), shapes=MATRICES)
    assert_near(ours, theirs, 1e-10)
    assert_near(run(fo.muon(0.02, "dion", 5)), run_optax(optax.contrib.muon(0.02, "dion", 5)), 1e-10)


@pytest.mark.parametrize(
    ("name", "steps", "dtype", "bound"),
    [
        ("standard", 5, None, 0.35),  # by design: singular values come to lie between 0.65 and 1.35
        ("polar_express", 5, None, 0.15),
        ("polar_express", 8, None, 1e-5),
        ("polar_express", 8, torch.bfloat16, 0.03),  # three products in numbers of eight bits per step
    ],
)
def test_singular_values_come_close_to_one(name: str, steps: int, dtype: Any, bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 16, generator=generator))[0] for n in (16, 40))
    matrix = u * torch.logspace(-2, 0, 16) @ v.T
    for x in (matrix, matrix.T):
        tx = fo.orthogonalize(name, steps, compute_dtype=dtype)
        updates, _ = tx.update({"w": x}, tx.init({"w": x}))
        values = torch.linalg.svdvals(updates["w"])
        assert (values - 1).abs().max() < bound


def test_gram_matrices_give_the_same_product() -> None:
    for name in ("standard", "polar_express"):
        assert_near(run(fo.muon(0.02, name, by_gram=True)), run(fo.muon(0.02, name)), 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "steps"), [("standard", 5), ("dion", 5), ("polar_express", 5), ("polar_express", 8)])
@pytest.mark.parametrize("rank", [4, 48, None])
@pytest.mark.parametrize("of_updates", [False, True], ids=["compute_dtype", "updates"])
def test_gram_matrices_in_half_types(
    name: str, steps: int, dtype: torch.dtype, rank: int | None, of_updates: bool
) -> None:
    """Gradients of batches that are smaller than a layer have a low rank: eigenvalues of 0, which rounding moves."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 160, generator=generator)
    if rank is not None:
        x = torch.randn(64, rank, generator=generator) @ torch.randn(rank, 160, generator=generator)
    x = (x / 100).to(dtype)
    given = x if of_updates else x.float()
    tx = fo.orthogonalize(name, steps, by_gram=True, compute_dtype=None if of_updates else dtype)
    exact = fo.orthogonalize(name, steps)

    found = tx.update({"w": given}, tx.init({"w": given}))[0]["w"].float()
    expected = exact.update({"w": x.double()}, exact.init({"w": x.double()}))[0]["w"].float()

    eps = torch.finfo(dtype).eps
    # singular values in a half type have errors of eps times the largest, which the polynomials take up by at most
    # the slope at 0 of all together; results are at most 1.2
    assert torch.linalg.matrix_norm(found, 2) < 1.2 + 2 * eps
    if rank is None:  # no singular value of x lies within those errors
        assert (found - expected).norm() < 8 * eps * expected.norm()


@pytest.mark.parametrize("offset", [1, 2, 5])
@pytest.mark.parametrize(
    "make", [fo.scale_by_factored_rms, lambda step_offset: fo.adafactor(0.1, decay_offset=step_offset)]
)
def test_steps_up_to_an_offset_are_as_the_first(make: Any, offset: int) -> None:
    """0 to a negative power, or a negative number to a fraction, would make all parameters NaN."""
    shapes = {"w": (130, 128), "b": (3,)}
    generator = torch.Generator().manual_seed(0)
    grads = [
        {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()} for _ in range(20)
    ]
    behind, usual = make(step_offset=offset), make(step_offset=0)
    params = {k: torch.ones(s, dtype=torch.float64) for k, s in shapes.items()}
    state, other = behind.init(params), usual.init(params)
    for k, g in enumerate(grads):
        if k <= offset:  # each forgets all before
            other = usual.init(params)
        updates, state = behind.update(g, state, params)
        expected, other = usual.update(g, other, params)
        if make is fo.scale_by_factored_rms:
            torch.testing.assert_close(updates, expected, rtol=1e-12, atol=0)
        assert all(x.isfinite().all() for x in updates.values())


def test_leaves_go_where_they_are_sent() -> None:
    shapes = {"embed": (6, 4), "layer.weight": (6, 4), "conv": (4, 3, 2, 2), "bias": (6,)}
    adam = run(fo.adamw(0.02, weight_decay=0.0, nesterov=True), 3, shapes)
    by_muon = run(fo.muon(0.02), 3, {k: s for k, s in shapes.items() if len(s) == 2})
    flat = run(fo.muon(0.02), 3, {k: (s[0], int(np.prod(s[1:]))) for k, s in shapes.items() if len(s) > 1})

    def sent(matrices: Any, expected: set[str]) -> None:
        tx = fo.muon(0.02, matrices=matrices)
        found = run(tx, 3, shapes)
        for k in shapes:
            if k not in expected:
                assert torch.equal(found[k], adam[k]), k
            elif k in by_muon:
                torch.testing.assert_close(found[k], by_muon[k])
            else:
                assert found[k].shape == shapes[k]
        explanation = fo.explain(tx, tensors(numbers(0, shapes)))
        routes = {("orthogonalize" in route.transformations): set(route.leaves) for route in explanation.routes}
        assert routes.get(True, set()) == expected
        assert routes.get(False, set()) == shapes.keys() - expected
        text = str(explanation)
        assert re.findall(r"orthogonalize computes whole tensors.*", text)[0].count("(") == len(
            {shapes[k] for k in expected}
        )
        assert all(k in text for k in expected)

    sent(None, {"embed", "layer.weight"})
    sent(lambda path, p: p.ndim > 1 and path != "embed", {"layer.weight", "conv"})
    sent("layer", {"layer.weight"})
    sent({k: k == "layer.weight" for k in shapes}, {"layer.weight"})
    alone = run(fo.muon(0.02, matrices=lambda path, p: p.ndim > 1), 1, {"conv": shapes["conv"]})["conv"]
    start, same = numbers(0, {"conv": (4, 12)})["conv"], run(fo.muon(0.02), 1, {"conv": (4, 12)})["conv"]
    assert flat["conv"].shape == (4, 12)
    torch.testing.assert_close(alone.reshape(4, 12) - torch.from_numpy(start), same - torch.from_numpy(start))


def test_what_is_no_matrix_is_refused() -> None:
    tx = fo.muon(0.1, matrices="bias")
    params = {"bias": torch.ones(3)}
    with pytest.raises(ValueError, match=r"a tensor of shape \(3,\) is no matrix"):
        fo.apply_gradients(tx, params, params, tx.init(params))
    with pytest.raises(ValueError, match="`ns_coeffs` is 'polar', expected one of"):
        fo.muon(0.1, "polar")
    with pytest.raises(ValueError, match="expected three numbers"):
        fo.muon(0.1, (1.0, 2.0))
    with pytest.raises(ValueError, match="`preconditioning` of orthogonalize must be one of"):
        fo.muon(0.1, preconditioning="none")


FACTORED: dict[str, Any] = {
    "default": {},
    "factored": {"min_dim_size_to_factor": 3},
    "everything": {
        "min_dim_size_to_factor": 2,
        "decay_rate": 0.7,
        "clipping_threshold": 0.5,
        "momentum": 0.9,
        "weight_decay_rate": 0.01,
        "eps": 1e-10,
    },
    "neither": {"clipping_threshold": None, "multiply_by_parameter_scale": False, "factored": False},
}
TENSORS = {**SHAPES, "cube": (3, 5, 4), "turned": (5, 3, 4)}


@pytest.mark.slow
@pytest.mark.parametrize("name", FACTORED)
def test_adafactor_is_that_of_optax(name: str) -> None:
    """Its decay is a power in float32, whose error of 6e-8 a few steps carry on."""
    options = {"learning_rate": 0.05, **FACTORED[name]}
    ours = run(fo.adafactor(**options), shapes=TENSORS)
    theirs = run_optax(optax.adafactor(**options), shapes=TENSORS, turn=False)
    assert_near(ours, theirs, 1e-6)


def test_a_threshold_may_be_a_tensor_and_a_leaf_may_be_empty() -> None:
    """The mean over no elements is no number, and touches no other leaf."""
    shapes = {"w": (3, 4), "empty": (0, 4), "none": (0,), "b": (5,)}
    options: dict[str, Any] = {"learning_rate": 0.05, "min_dim_size_to_factor": 2}
    thresholds = 0.5, torch.tensor(0.5, dtype=torch.float64)
    ours, same = (run(fo.adafactor(**options, clipping_threshold=x), shapes=shapes) for x in thresholds)
    theirs = run_optax(optax.adafactor(**options, clipping_threshold=0.5), shapes={"w": (3, 4), "b": (5,)}, turn=False)
    assert_near({k: ours[k] for k in theirs}, theirs, 1e-6)
    assert_near({k: same[k] for k in theirs}, {k: ours[k] for k in theirs}, 1e-15)
    assert [same[k].shape for k in ("empty", "none")] == [(0, 4), (0,)]


def test_the_factored_moment_is_that_of_the_paper() -> None:
    """Algorithm 4 in NumPy, in float64."""
    tx = fo.scale_by_factored_rms(min_dim_size_to_factor=2, epsilon=1e-12)
    state = tx.init({"w": torch.zeros(4, 9, dtype=torch.float64)})
    row, column = np.zeros(4), np.zeros(9)
    for t in range(1, 21):
        g = numbers(t, {"w": (4, 9)})["w"]
        updates, state = tx.update({"w": torch.from_numpy(g)}, state)
        decay = 1 - t**-0.8
        square = g * g + 1e-12
        row, column = decay * row + (1 - decay) * square.mean(1), decay * column + (1 - decay) * square.mean(0)
        expected = g / np.sqrt(np.outer(row, column) / row.mean())
        np.testing.assert_allclose(updates["w"].numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(state.v_row["w"].numpy(), row, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_types_keep_to_float64(dtype: torch.dtype) -> None:
    """A few roundings per step of numbers of about 1, in the dtype of parameters and state."""
    for tx, bound in ((fo.adafactor(0.05, 3), 40), (fo.muon(0.02, "polar_express", 8), 400)):
        expected = run(tx, 5)
        params = {k: x.to(dtype) for k, x in tensors(numbers(0)).items()}
        state = tx.init(params)
        for step in range(1, 6):
            grads = {k: x.to(dtype) for k, x in tensors(numbers(step)).items()}
            params, state = fo.apply_gradients(tx, params, grads, state)
        for k, p in params.items():
            assert p.dtype is dtype
            far = (p.double() - expected[k]).abs().max() / expected[k].abs().max().clamp(min=1)
            assert far < bound * torch.finfo(dtype).eps, (k, float(far / torch.finfo(dtype).eps))


IN_FLOAT32: dict[str, Any] = {
    "rows and columns": fo.scale_by_factored_rms(min_dim_size_to_factor=2),
    "a moment per element": fo.scale_by_factored_rms(factored=False),
    **{x: fo.orthogonalize(preconditioning=x) for x in ("frobenius", "spectral", "aol", "schatten")},
}


@pytest.mark.parametrize("size", [0.0, 1e-4, 300.0])
@pytest.mark.parametrize("name", IN_FLOAT32)
def test_float16_is_widened_and_rounded_once(name: str, size: float) -> None:
    """In it 1e-8 and the square of 1e-4 are 0, and the square of 300 is infinite."""
    tx, updates = IN_FLOAT32[name], (size * tensors({"w": numbers(0)["wide"]})["w"]).half()
    zeros = {"w": torch.zeros_like(updates)}
    ours, _ = tx.update({"w": updates}, tx.init(zeros), zeros)
    wide = {"w": zeros["w"].float()}
    expected, _ = tx.update({"w": updates.float()}, tx.init(wide), wide)
    assert expected["w"].isfinite().all()
    torch.testing.assert_close(ours["w"], expected["w"].half(), rtol=0, atol=0)


def test_arguments_of_muon_are_checked_where_it_is_made() -> None:
    refused: dict[str, tuple[Any, dict[str, Any]]] = {
        r"`ns_steps` of orthogonalize must be in \[1, inf\), got 0": (ValueError, {"ns_steps": 0}),
        "`compute_dtype` is 'bf16'": (TypeError, {"compute_dtype": "bf16"}),
        "`compute_dtype` is torch.int32": (TypeError, {"compute_dtype": torch.int32}),
        "`consistent_rms` is -0.2": (ValueError, {"consistent_rms": -0.2}),
        "`consistent_rms` is 'a'": (ValueError, {"consistent_rms": "a"}),
        "`matrices` of muon is 3": (TypeError, {"matrices": 3}),
    }
    for message, (kind, arguments) in refused.items():
        with pytest.raises(kind, match=message):
            fo.muon(0.1, **arguments)
    with pytest.raises(TypeError, match="`matrices` of muon returned 'w' for 'w'"):
        fo.muon(0.1, matrices=lambda path, p: path).init({"w": torch.ones(2, 2)})


@pytest.mark.parametrize(("clamped", "tall", "wide"), [(True, 2.0, 1.0), (False, 2.0, 0.5)])
def test_factors_of_shapes(clamped: bool, tall: float, wide: float) -> None:
    tx = fo.scale_by_shape(clamped=clamped)
    ones = {"tall": torch.ones(8, 2), "wide": torch.ones(2, 8)}
    updates, _ = tx.update(ones, tx.init(ones))
    assert updates["tall"].unique().tolist() == [tall]
    assert updates["wide"].unique().tolist() == [wide]


@pytest.mark.parametrize("tx", [fo.adafactor(0.1), fo.scale_by_factored_rms(), fo.muon(0.1)], ids=repr)
def test_a_default_device_does_not_reach_into_a_step(tx: fo.GradientTransformation) -> None:
    def run() -> torch.Tensor:
        params = {"w": torch.ones(130, 130, device="cpu")}
        state = tx.init(params)
        for k in range(3):
            params, state = fo.apply_gradients(tx, params, {"w": params["w"] * (k + 1)}, state)
        return params["w"]

    expected = run()
    with torch.device("meta"):
        found = run()

    torch.testing.assert_close(found, expected, rtol=0, atol=0)
