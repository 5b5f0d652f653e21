"""Without a compiler small leaves are computed as vectors of many: no result tells."""

import pytest
import torch

import functional_optim as fo
from functional_optim.adapters import AdamW


SHAPES = [(32, 32)] * 70 + [(0,), (), (3, 5), (0, 4), (200, 100), (7,)]  # more than one vector, and one leaf alone


def draw(seed: int, small: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [shape for shape in SHAPES if not small or shape != (200, 100)]
    return {str(k): torch.randn(shape, generator=generator, dtype=torch.float64) for k, shape in enumerate(shapes)}


@pytest.mark.parametrize("small", [True, False], ids=["vectors", "a large leaf"])
@pytest.mark.parametrize("donate", [False, True])
def test_leaves_that_are_joined_have_the_values_of_the_reference(donate: bool, small: bool) -> None:
    tx = fo.chain(fo.clip(1.0), fo.adamw(1e-2, weight_decay=0.1))
    found = {}
    for backend in ("reference", "foreach"):
        params = draw(0, small)
        state = tx.init(params)
        with fo.use_backend(backend):
            for step in range(20):
                params, state = fo.apply_gradients(tx, params, draw(step + 1, small), state, donate=donate)
        found[backend] = params, state
    torch.testing.assert_close(found["foreach"], found["reference"], rtol=1e-13, atol=1e-15)
    params, state = found["foreach"]
    storages = {x.untyped_storage().data_ptr() for x in params.values() if x.numel()}
    assert len(storages) == sum(x.numel() > 0 for x in params.values())  # each leaf is a tensor of its own


def test_parameters_of_an_optimizer_that_count_other_steps_are_not_mixed_up() -> None:
    found = {}
    for backend in ("reference", "foreach"):
        params = [torch.nn.Parameter(x) for x in draw(0, True).values()]
        opt = AdamW(params, lr=1e-2)
        with fo.use_backend(backend):
            for step in range(20):
                for k, (p, g) in enumerate(zip(params, draw(step + 1, True).values(), strict=True)):
                    p.grad = None if step < 3 and k % 2 else g  # every other one begins late
                opt.step()
        found[backend] = [p.detach() for p in params]
    torch.testing.assert_close(found["foreach"], found["reference"], rtol=1e-13, atol=1e-15)


@fo.elementwise(state={"a": fo.zeros, "b": fo.zeros, "n": fo.zeros})
def alike(
    u: torch.Tensor, a: torch.Tensor, b: torch.Tensor, n: torch.Tensor, *, step: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    a = a + u
    return a, a, torch.full_like(b, 2.0), torch.zeros_like(n) + step


@pytest.mark.parametrize("sizes", [[(3,), (2, 2), ()], [(9000,), (), ()]], ids=["vectors", "large leaves"])
@pytest.mark.parametrize("backend", ["c", "foreach", "reference"])
def test_equal_results_are_tensors_of_their_own(backend: str, sizes: list[tuple[int, ...]]) -> None:
    params = [torch.zeros(size, dtype=torch.float64) for size in sizes]
    grads = [torch.ones_like(p) for p in params]
    tx = alike()
    with fo.use_backend(backend):
        updates, state = tx.update(grads, tx.init(params), params)
        for x in (*updates, *state.a, *state.b, *state.n):
            x.mul_(2.0)  # each once, all elements of it
        for x, expected in ((updates, 2.0), (state.a, 2.0), (state.b, 4.0), (state.n, 2.0)):
            torch.testing.assert_close(x, [torch.full_like(p, expected) for p in params], rtol=0, atol=0)
        fo.apply_gradients(tx, params, grads, state, donate=True)  # to memory that can be written to
    torch.testing.assert_close(state.a, [torch.full_like(p, 3.0) for p in params], rtol=0, atol=0)
