"""Steps on a CUDA device: numbers, capture, streams, freed memory, threads.

They need a device, and kernels that are compiled. With one:

    TRITON_INTERPRET=0 python -m pytest -n 6 --dist=load tests/cuda
    TRITON_INTERPRET=0 python -m pytest -n 6 --dist=load tests/unit/compiler -m triton

The second command runs the tests of operations on the device, which Triton's interpreter runs elsewhere.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import nn

import functional_optim as fo
from _lib.on_cuda import NEEDS_A_DEVICE, Tree, draw, leaves, set_grads, side_stream
from functional_optim import adapters
from functional_optim._runtime.cuda.capture import CaptureError


pytestmark = NEEDS_A_DEVICE
STEPS = 20
CHAINS: dict[str, Callable[[], fo.GradientTransformation]] = {
    "sgd": lambda: fo.sgd(1e-2, momentum=0.9, nesterov=True),
    "adamw": lambda: fo.adamw(1e-2, weight_decay=0.1),
    "lion": lambda: fo.lion(1e-2, weight_decay=0.1),
    "lamb": lambda: fo.lamb(1e-2, weight_decay=0.1),
    "clip, schedule, average": lambda: fo.chain(
        fo.clip_by_global_norm(1.0),
        fo.adamw(fo.warmup_cosine_decay_schedule(0.0, 1e-2, 3, STEPS)),
        fo.params_ema(0.9),
    ),
}
# A step moves a value of order one by 1e-2 and rounds it once to its dtype; moments round once each. Both sides do
# so, and half precision doubles a difference where they round to neighbours: eps of the dtype, times steps.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.16, torch.float16: 0.1}


def shifted(tree: Tree) -> Tree:
    """The same tensors, each one element behind a multiple of 16 bytes."""
    found = {}
    for k, x in tree.items():
        memory = x.new_empty(x.numel() + 1)
        found[k] = memory.as_strided(x.shape, x.stride(), 1).copy_(x)
    return found


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_chains_against_the_reference_on_the_cpu(name: str, dtype: torch.dtype, donate: bool) -> None:
    results = []
    for device in ("cpu", "cuda"):
        tx, params = CHAINS[name](), draw(0, dtype, device)
        state = tx.init(params)
        with fo.use_backend("reference") if device == "cpu" else contextlib.nullcontext():
            for step in range(STEPS):
                grads = draw(1 + step, dtype, device)
                params, state = fo.apply_gradients(tx, params, grads, state, donate=donate)
        results.append(params)
    for k, expected in results[0].items():
        torch.testing.assert_close(results[1][k].cpu(), expected, rtol=0, atol=TOLERANCES[dtype], msg=k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_addresses_that_are_not_aligned(dtype: torch.dtype) -> None:
    """Kernels have a variant for them, which a step chooses by the tensors that it is given."""
    results = []
    for change in (lambda tree, step: tree, lambda tree, step: shifted(tree) if step % 3 else tree):
        tx, params = CHAINS["adamw"](), change(draw(0, dtype, "cuda"), 1)
        state = tx.init(params)
        for step in range(6):
            grads = change(draw(1 + step, dtype, "cuda"), step)
            params, state = fo.apply_gradients(tx, params, grads, state, donate=step < 4)
        results.append(params)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_leaves_that_are_not_laid_out_alike() -> None:
    """Kernels are handed contiguous copies of them."""
    results = []
    for device in ("cpu", "cuda"):
        base, small = torch.ones(6, 8, device=device), torch.ones(5, device=device)
        tx, params = CHAINS["clip, schedule, average"](), {"columns": base[:, ::2], "small": small}
        state = tx.init(params)
        with fo.use_backend("reference") if device == "cpu" else contextlib.nullcontext():
            for step in range(STEPS):
                grads = {k: torch.full(x.shape, 1.0 + step, device=device) for k, x in params.items()}
                params, state = fo.apply_gradients(tx, params, grads, state, donate=True)
        results.append((base.cpu(), small.cpu()))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=TOLERANCES[torch.float32])
    assert (results[1][0][:, 1::2] == 1).all()


@pytest.mark.parametrize("donate", [False, True])
def test_packed_trees(donate: bool) -> None:
    tx, params = CHAINS["adamw"](), draw(0, device="cuda")
    packed = fo.pack(params)
    state, packed_state = tx.init(params), tx.init(packed)
    for step in range(STEPS):
        grads = draw(1 + step, device="cuda")
        params, state = fo.apply_gradients(tx, params, grads, state, donate=donate)
        packed, packed_state = fo.apply_gradients(tx, packed, fo.pack(grads), packed_state, donate=donate)
    torch.testing.assert_close(fo.unpack(packed), params, rtol=0, atol=0)


@pytest.mark.parametrize("fused", [False, True], ids=["unscaled before", "unscaled by the step"])
def test_a_grad_scaler_skips_a_step(fused: bool) -> None:
    """The scale is a power of two, so that the numbers are those without it."""
    params, expected = leaves(), leaves()
    opt, other = adapters.AdamW(params, lr=1e-2, fused=fused), adapters.AdamW(expected, lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    for step in range(6):
        scale = scaler.scale(torch.ones((), device="cuda"))
        set_grads(params, step)
        for p in params:
            assert p.grad is not None
            p.grad.mul_(scale).add_(float("inf") if step in (0, 3) else 0.0)
        scaler.step(opt)
        scaler.update()
        if step not in (0, 3):
            set_grads(expected, step)
            other.step()
    torch.testing.assert_close(params, expected, rtol=0, atol=0)


def test_steps_wait_for_nothing() -> None:
    params = leaves()
    lr = torch.tensor(1e-2, device="cuda")
    opt = adapters.AdamW(params, lr=lr)
    tx, tree = CHAINS["clip, schedule, average"](), draw(0, device="cuda")
    state = tx.init(tree)
    for step in range(6):
        set_grads(params, step)
        grads = draw(step, device="cuda")
        torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")
        try:
            opt.step()
            tree, state = fo.apply_gradients(tx, tree, grads, state)
            tree, state = fo.apply_gradients(tx, tree, grads, state, donate=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# -- capture ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "Adafactor"])
def test_a_captured_optimizer_replays(name: str) -> None:
    """Counters and a tensor that is the learning rate go on; gradients are those of the moment."""
    runs = []
    for capture in (False, True):
        params, lr = leaves(), torch.tensor(1e-2, device="cuda")
        opt = getattr(adapters, name)(params, lr=lr)
        with side_stream():
            for step in range(3):
                set_grads(params, step)
                opt.step()
        go: Callable[[], Any] = opt.step
        if capture:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                opt.step()
            go = graph.replay
        for step in range(5):
            set_grads(params, 10 + step)
            lr.fill_(1e-2 / (1 + step))
            go()
        assert {opt.state[p]["step"].item() for p in params} == {8.0}
        runs.append(params)
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("backward", [False, True])
def test_a_captured_donated_step_replays(backward: bool) -> None:
    """Also with gradients that are made within the graph."""
    runs = []
    for capture in (False, True):
        tx, params, target = CHAINS["clip, schedule, average"](), draw(0, device="cuda"), draw(1, device="cuda")
        state = tx.init(params)

        def step(tx: Any = tx, params: Tree = params, target: Tree = target, state: Any = state) -> None:
            grads = {k: params[k] - target[k] for k in params} if backward else target
            fo.apply_gradients(tx, params, grads, state, donate=True)

        with side_stream():
            for _ in range(3):
                step()
        go: Callable[[], Any] = step
        if capture:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            go = graph.replay
        for _ in range(5):
            go()
        runs.append(params)
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_a_captured_pure_step_replays() -> None:
    """Its results are new at each replay, whatever steps there are outside of the graph."""
    tx, params, grads = CHAINS["clip, schedule, average"](), draw(0, device="cuda"), draw(1, device="cuda")
    state = tx.init(params)
    with side_stream():
        for _ in range(3):
            fo.apply_gradients(tx, params, grads, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = fo.apply_gradients(tx, params, grads, state)
    for step in range(3):
        for k, x in draw(10 + step, device="cuda").items():
            grads[k].copy_(x)
        graph.replay()
        expected = fo.apply_gradients(tx, params, grads, state)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_graphs_and_steps_in_turns() -> None:
    (params, expected), graphs = (leaves(), leaves()), [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
    opt, other = adapters.AdamW(params, lr=1e-2), adapters.AdamW(expected, lr=1e-2)
    with side_stream():
        for step in range(2):
            for own, o in ((params, opt), (expected, other)):
                set_grads(own, step)
                o.step()
    for graph in graphs:
        with torch.cuda.graph(graph):
            opt.step()
    for step, go in enumerate((graphs[0].replay, opt.step, graphs[1].replay, graphs[0].replay, opt.step)):
        for own, run in ((params, go), (expected, other.step)):
            set_grads(own, 10 + step)
            run()
    torch.testing.assert_close(params, expected, rtol=0, atol=0)


def test_a_step_in_graphed_callables() -> None:
    tx, params, grads = CHAINS["clip, schedule, average"](), draw(0, device="cuda"), draw(1, device="cuda")
    state = tx.init(params)

    def step(*updates: torch.Tensor) -> tuple[torch.Tensor, ...]:
        new, _ = fo.apply_gradients(tx, params, dict(zip(params, updates, strict=True)), state)
        return tuple(new.values())

    graphed = torch.cuda.make_graphed_callables(step, tuple(grads.values()))
    for k in range(3):
        updates = tuple(draw(10 + k, device="cuda").values())
        torch.testing.assert_close(graphed(*updates), step(*updates), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")  # of Inductor, about what it could do
@pytest.mark.parametrize("live", [False, True], ids=["a number", "a tensor"])
def test_a_step_compiled_with_reduced_overhead(live: bool) -> None:
    """Compiled once, run once, captured, and then replayed; state is what the last replay has left."""
    lr = torch.tensor(1e-2, device="cuda") if live else 1e-2
    tx, params = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(lr)), draw(0, device="cuda")
    state = tx.init(params)
    expected, kept = params, state
    step = torch.compile(lambda *given: fo.apply_gradients(tx, *given), mode="reduce-overhead")
    for k in range(6):
        if isinstance(lr, torch.Tensor):
            lr.fill_(1e-2 / (1 + k))
        grads = draw(1 + k, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        params, state = optree.tree_map(torch.clone, step(params, grads, state))
        expected, kept = fo.apply_gradients(tx, expected, grads, kept)
        torch.testing.assert_close(params, expected, rtol=0, atol=0)


def test_a_first_step_is_refused_while_capturing() -> None:
    params = leaves()
    set_grads(params, 0)
    opt = adapters.AdamW(params)
    before = [p.detach().clone() for p in params]
    torch.cuda.synchronize()
    with pytest.raises(CaptureError, match="take two such steps before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()
    torch.testing.assert_close([p.detach() for p in params], before, rtol=0, atol=0)


# -- streams, memory, threads -----------------------------------------------------------------------------------------


def by_streams(streams: list[torch.cuda.Stream | None]) -> list[nn.Parameter]:
    """The parameters after steps on some streams, each with gradients that are freed right after it."""
    params = leaves()
    opt = adapters.AdamW(params, lr=1e-2)
    for step, stream in enumerate(streams):
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for p, g in zip(params, draw(step, device="cuda").values(), strict=True):
                p.grad = g
            opt.step()
            opt.zero_grad(set_to_none=True)
            for p in params:  # takes the memory that has just been freed
                torch.full_like(p, float("nan"))
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return params


def test_any_stream_and_freed_gradients() -> None:
    expected = by_streams([None] * STEPS)
    a, b = torch.cuda.Stream(), torch.cuda.Stream()
    actual = by_streams([a, b, None, a] * (STEPS // 4))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_memory_that_runs_out_is_torchs_error() -> None:
    """New tensors that find no room leave the step undone; it can be taken again when there is some."""
    tx, params, grads = (
        CHAINS["adamw"](),
        {"w": torch.ones(1 << 26, device="cuda")},
        {"w": torch.ones(1 << 26, device="cuda")},
    )
    state = tx.init(params)
    fo.apply_gradients(tx, params, grads, state)
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + (1 << 28)  # for one of three new tensors
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            fo.apply_gradients(tx, params, grads, state)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    new, _ = fo.apply_gradients(tx, params, grads, state)
    small, _ = fo.apply_gradients(tx, {"w": params["w"][:8]}, {"w": grads["w"][:8]}, tx.init({"w": params["w"][:8]}))
    torch.testing.assert_close(new["w"], small["w"][0].expand(1 << 26), rtol=0, atol=0)


def test_threads_on_streams_of_their_own() -> None:
    """They share a transformation, whose binding they share, too."""
    tx = CHAINS["clip, schedule, average"]()
    results: list[Tree] = []

    def work(use_stream: bool) -> None:
        with torch.cuda.stream(torch.cuda.Stream() if use_stream else None):
            params = draw(0, device="cuda")
            state = tx.init(params)
            for step in range(STEPS):
                grads = draw(step, device="cuda")
                params, state = fo.apply_gradients(tx, params, grads, state, donate=True)
            torch.cuda.current_stream().synchronize()
            results.append(params)

    work(False)
    threads = [threading.Thread(target=work, args=(True,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected, *actual = results
    torch.testing.assert_close(actual, [expected] * 4, rtol=0, atol=0)


def test_a_thread_whose_first_work_is_a_step() -> None:
    """It has no context of the driver yet, which torch's own operations make when they run."""
    params, grads = draw(0, device="cuda"), draw(1, device="cuda")
    tx = CHAINS["adamw"]()
    state, expected = tx.init(params), {k: x.clone() for k, x in params.items()}
    fo.apply_gradients(tx, params, grads, state, donate=True)
    torch.cuda.synchronize()
    thread = threading.Thread(target=lambda: fo.apply_gradients(tx, params, grads, state, donate=True))
    thread.start()
    thread.join()
    other = tx.init(expected)
    for _ in range(2):
        fo.apply_gradients(tx, expected, grads, other, donate=True)
    torch.testing.assert_close(params, expected, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices")
@pytest.mark.parametrize("missing", [None, "a"])
def test_a_tree_on_two_devices(missing: str | None) -> None:
    """Leaves beside the counter read it, those on the other device a copy, which may come first."""
    places = {"a": "cuda:0", "b": "cuda:1", "c": "cuda:0"}
    params = {name: torch.ones(5 + k, device=place) for k, (name, place) in enumerate(places.items())}
    tx = fo.adamw(1e-2)
    state = tx.init(params)
    for step in range(STEPS):
        grads = {k: None if k == missing else torch.full_like(x, 1.0 + step) for k, x in params.items()}
        params, state = fo.apply_gradients(tx, params, grads, state, donate=True)
    firsts = [p[0].cpu() for name, p in params.items() if name != missing]
    torch.testing.assert_close(firsts, [firsts[0]] * len(firsts), rtol=0, atol=0)
