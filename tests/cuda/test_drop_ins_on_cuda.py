"""Drop-in classes on CUDA beside torch's: the bits of its fused kernels, or the numbers of its foreach form."""

from typing import Any

import pytest
import torch
from torch import nn

from _lib.on_cuda import NEEDS_A_DEVICE, leaves, set_grads, side_stream
from functional_optim import adapters


pytestmark = NEEDS_A_DEVICE
STEPS = 20
DTYPES = [torch.float32, torch.float64]
# torch's power of a beta is off by a unit in one of fifteen steps; by none for these betas within these steps
BITS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.03}),
    "sgd, decay": ("SGD", {"lr": 0.03, "weight_decay": 0.07, "maximize": True}),
    "sgd, momentum": ("SGD", {"lr": 0.03, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.07}),
    "sgd, nesterov": ("SGD", {"lr": 0.03, "momentum": 0.9, "nesterov": True}),
    "adam": ("Adam", {"lr": 1.3e-3}),
    "adam, amsgrad": ("Adam", {"lr": 1.3e-3, "betas": (0.5, 0.25), "amsgrad": True}),
    "adamw": ("AdamW", {"lr": 1.3e-3, "weight_decay": 0.07}),
    "adamw, amsgrad": ("AdamW", {"lr": 1.3e-3, "weight_decay": 0.07, "amsgrad": True, "maximize": True}),
}
CLASSES: dict[str, dict[str, Any]] = {
    "Adadelta": {"weight_decay": 0.1},
    "Adafactor": {"weight_decay": 0.1},
    "Adagrad": {"lr_decay": 0.1},
    "Adam": {"weight_decay": 0.1},
    "AdamW": {"amsgrad": True},
    "Adamax": {"weight_decay": 0.1},
    "ASGD": {"t0": 3, "lambd": 0.1, "foreach": False},  # of which torch's foreach form is 1e-8 off in float64
    "NAdam": {"momentum_decay": 0.1},
    "RAdam": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "SGD": {"lr": 0.03, "momentum": 0.9, "nesterov": True},
}


def vectors(dtype: torch.dtype) -> list[nn.Parameter]:
    """Parameters of several lengths, some of which no block divides."""
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 7, 1024, 4096, 5000, 70000)
    return [nn.Parameter(torch.randn(n, generator=generator, dtype=dtype).cuda()) for n in sizes]


def run(opt: torch.optim.Optimizer, params: list[nn.Parameter]) -> dict[str, list[torch.Tensor]]:
    """Steps with gradients drawn for each; returns parameters and state, by name."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype).cuda()
        opt.step()
    found: dict[str, list[torch.Tensor]] = {"params": [p.detach() for p in params]}
    for name in opt.state[params[0]]:
        found[name] = [opt.state[p][name] for p in params]
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BITS)
def test_fused_kernels_of_torch_have_the_same_bits(case: str, dtype: torch.dtype) -> None:
    name, kwargs = BITS[case]
    ours, theirs = vectors(dtype), vectors(dtype)

    actual = run(getattr(adapters, name)(ours, **kwargs), ours)
    expected = run(getattr(torch.optim, name)(theirs, fused=True, **kwargs), theirs)

    assert list(actual) == list(expected)
    for key, column in expected.items():
        for x, y in zip(actual[key], column, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, check_device=False, msg=lambda m, key=key: f"{key}: {m}")


def test_adam_with_a_penalty_has_the_bits_of_three_elements_of_four() -> None:
    """torch's compiler rounds the product of the first element of each four apart."""
    params = [[nn.Parameter(torch.linspace(-1, 1, 4096, device="cuda"))] for _ in range(2)]
    kwargs: dict[str, Any] = {"lr": 1e-3, "betas": (0.5, 0.25), "weight_decay": 0.07}
    ours, theirs = adapters.Adam(params[0], **kwargs), torch.optim.Adam(params[1], fused=True, **kwargs)

    actual, expected = (run(opt, own)["params"][0].view(-1, 4) for opt, own in zip((ours, theirs), params, strict=True))

    torch.testing.assert_close(actual[:, 1:], expected[:, 1:], rtol=0, atol=0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_classes_have_the_numbers_of_torchs(name: str, dtype: torch.dtype) -> None:
    """Values are of order one, and each of the steps rounds a few times."""
    ours, theirs = (
        [p for p in leaves(0, dtype) if p.numel()] for _ in range(2)
    )  # torch's Adafactor takes no empty one
    opts = getattr(adapters, name)(ours, **CLASSES[name]), getattr(torch.optim, name)(theirs, **CLASSES[name])

    for step in range(STEPS):
        for own, opt in zip((ours, theirs), opts, strict=True):
            set_grads(own, step)
            opt.step()

    atol = 100 * STEPS * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, equal_nan=True)
    saved, expected = (opt.state_dict()["state"] for opt in opts)
    for k, state in expected.items():
        assert set(saved[k]) == set(state)
        for key, x in state.items():
            torch.testing.assert_close(
                saved[k][key],
                x,
                rtol=atol,
                atol=atol,
                check_device=False,
                check_dtype=False,
                msg=lambda m, key=key: f"{key}: {m}",
            )


def test_matrices_have_the_numbers_of_muon() -> None:
    """Both iterate in bfloat16, of which a step of 1e-2 keeps some 8 bits."""
    shapes = ((48, 32), (48, 32), (20, 64), (64, 64))
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [[torch.randn(shape, generator=generator).cuda() for shape in shapes] for _ in range(STEPS)]
    results = []
    for cls in (adapters.Muon, torch.optim.Muon):
        params = [nn.Parameter(x.cuda()) for x in start]
        opt = cls(params, lr=1e-2)
        for own in grads:
            for p, g in zip(params, own, strict=True):
                p.grad = g.clone()
            opt.step()
        results.append([p.detach() for p in params])
    torch.testing.assert_close(*results, rtol=0, atol=STEPS * 1e-2 * 2**-6)


@pytest.mark.parametrize("name", [*CLASSES, "Muon"])
def test_a_capturable_class_replays(name: str) -> None:
    """A graph of a step has the numbers of as many steps; counters and averages go on."""
    runs = []
    for capture in (False, True):
        params = leaves() if name != "Muon" else leaves()[:1]
        kwargs = CLASSES.get(name, {})
        if name not in ("SGD", "Adagrad", "Adafactor", "Muon"):
            kwargs = {**kwargs, "capturable": True}
        opt = getattr(adapters, name)(params, **kwargs)

        def draw_grads(step: int, params: list[nn.Parameter] = params) -> None:
            if name != "Muon":
                return set_grads(params, step)
            g = torch.randn(33, 17, generator=torch.Generator().manual_seed(step)).cuda()
            params[0].grad = g if params[0].grad is None else params[0].grad.copy_(g)

        with side_stream():
            for step in range(3):
                draw_grads(step)
                opt.step()
        graph = torch.cuda.CUDAGraph()
        if capture:
            with torch.cuda.graph(graph):
                opt.step()
        for step in range(5):
            draw_grads(10 + step)
            graph.replay() if capture else opt.step()
        runs.append([p.detach() for p in params])
    torch.testing.assert_close(*runs, rtol=0, atol=0, equal_nan=True)


def test_checkpoints_go_both_ways_with_fused_kernels() -> None:
    """Five steps by each, with a checkpoint between: the bits of ten by torch's."""
    expected = vectors(torch.float32)
    reference = torch.optim.AdamW(expected, fused=True)
    run(reference, expected)
    for first, second in ((adapters.AdamW, torch.optim.AdamW), (torch.optim.AdamW, adapters.AdamW)):
        params = vectors(torch.float32)
        opt = first(params, fused=True)
        generator = torch.Generator().manual_seed(1)
        for step in range(STEPS):
            if step == STEPS // 2:
                saved = opt.state_dict()
                opt = second(params, fused=True)
                opt.load_state_dict(saved)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).cuda()
            opt.step()
        torch.testing.assert_close(params, expected, rtol=0, atol=0)


def test_more_elements_than_32_bits_count() -> None:
    """Both ends of a leaf of 2**31 + 1000 elements move."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("it takes 20 GiB of device memory")
    n = 2**31 + 1000
    p = nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.ones_like(p)
    adapters.SGD([p], lr=0.5).step()
    assert all((x == 0.5).all() for x in p.detach().split(2**28))
