"""Promises about DTensors, through the public API; `integration/test_dtensor_contract.py` reads what processes found.

Each check does the same in one process's plain tensors, in float64, and compares whole tensors.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

import functional_optim as fo
from _lib.compare import EXACT
from _lib.shard_checks import PLACED, distributed, meshes, numbers, placements
from _lib.training import fit, make_batches, make_model
from functional_optim import adapters


STEPS = 20
Make = Callable[[Any], Any]


def chain(*parts: Any) -> Make:
    return lambda params: adapters.TransformOptimizer(params, fo.chain(*parts))


ELEMENTWISE: dict[str, Make] = {
    "SGD": lambda p: adapters.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: adapters.AdamW(p, lr=0.05),
}
NORMS: dict[str, Make] = {
    "clip": chain(fo.clip_by_global_norm(0.5), fo.sgd(1.0)),
    "LAMB": lambda p: adapters.LAMB(p, lr=0.05, weight_decay=0.1),
    "whole tensors": lambda p: adapters.Adafactor(p, lr=0.05),
}
BACKENDS = ("c", "foreach", "reference")
OPTIMIZERS = ELEMENTWISE | NORMS
# Norms over at most a few hundred elements, summed in another order, differ by 1e-13 of themselves at most, and scale
# steps below one; the gradients of later steps differ as little. Another norm changes 1e-3 or more.
SUMS: dict[str, Any] = {"rtol": 0.0, "atol": 1e-11}


def whole(x: torch.Tensor) -> torch.Tensor:
    """All of a tensor, which is the same in all processes."""
    full: torch.Tensor = (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()
    everyone = [torch.empty_like(full) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, full)
    torch.testing.assert_close(everyone, [full] * len(everyone), **EXACT, equal_nan=True)
    return full


def assert_same(params: Iterable[torch.Tensor], expected: Iterable[torch.Tensor], name: str) -> None:
    torch.testing.assert_close(
        [whole(p) for p in params],
        [p.detach() for p in expected],
        **(EXACT if name in ELEMENTWISE else SUMS),
        msg=lambda m: f"{name}: {m}",
    )


def layouts() -> list[tuple[DeviceMesh, tuple[Any, ...]]]:
    """Every placement of a parameter on every mesh."""
    return [(mesh, placed) for mesh in meshes() for placed in placements(mesh, PLACED)]


def value(k: int, seed: int = 0, shape: tuple[int, ...] = (5, 3)) -> torch.Tensor:
    return numbers(shape, seed=100 * k + seed) / 8.0


def gradients_of_any_placement(rank: int, folder: Path) -> None:
    """From step to step another placement, so that a step that is like the last one in all else is not taken for it.

    AdamW meets each pair of placements of a parameter and a gradient. A norm is of gradients that are placed already,
    so that others meet some pairs.
    """
    where = layouts()
    for name, make in OPTIMIZERS.items():
        steps = STEPS if name == "AdamW" else 5
        params = [torch.nn.Parameter(distributed(value(k), *layout)) for k, layout in enumerate(where)]
        alone = [torch.nn.Parameter(value(k)) for k in range(len(where))]
        optimizer, other = make(params), make(alone)
        for step in range(steps):
            for k, (mesh, _) in enumerate(where):
                among = list(placements(mesh, (*PLACED, Partial())))
                alone[k].grad = value(k, seed=1 + step)
                params[k].grad = distributed(value(k, seed=1 + step), mesh, among[(k + step) % len(among)])
            optimizer.step()
            other.step()
        assert_same(params, alone, name)


def partial_gradients_of_a_replicated_model(rank: int, folder: Path) -> None:
    """Autograd makes them where a batch is sharded, as under `SequenceParallel`."""
    mesh = meshes()[0]
    for name, make in OPTIMIZERS.items():
        p = torch.nn.Parameter(distribute_tensor(value(0, shape=(6,)), mesh, [Replicate()]))
        q = torch.nn.Parameter(value(0, shape=(6,)))
        optimizer, other = make([p]), make([q])
        for step in range(STEPS):
            x = value(1, seed=step, shape=(8, 6))
            for o, parameter, batch in (
                (optimizer, p, distribute_tensor(x, mesh, [Shard(0)])),
                (other, q, x),
            ):
                o.zero_grad()
                (batch * parameter).square().sum().backward()
                o.step()
            assert_same([p], [q], "sums")  # batches are summed in another order
        assert p.grad is not None
        assert p.grad.placements[0].is_partial(), name  # type: ignore[attr-defined]


def states_of_any_placement(rank: int, folder: Path) -> None:
    """A file of parameters that were placed otherwise."""
    for mesh in meshes():
        among = list(placements(mesh, PLACED))
        # along a dimension each placement meets each; of two, each pair meets three
        pairs = [(a, among[(i + 4 * j) % len(among)]) for i, a in enumerate(among) for j in range(3)]
        grads = [[value(k, seed=1 + step) for k in range(len(pairs))] for step in range(4)]
        make = OPTIMIZERS["AdamW"]
        alone = [torch.nn.Parameter(value(k)) for k in range(len(pairs))]
        other = make(alone)
        old = [torch.nn.Parameter(distributed(value(k), mesh, a)) for k, (a, _) in enumerate(pairs)]
        optimizer = make(old)
        for step in (0, 1):
            for k, (a, _) in enumerate(pairs):
                alone[k].grad, old[k].grad = grads[step][k], distributed(grads[step][k], mesh, a)
            optimizer.step()
            other.step()
        new = [torch.nn.Parameter(distributed(whole(p), mesh, b)) for p, (_, b) in zip(old, pairs, strict=True)]
        resumed = make(new)
        resumed.load_state_dict(optimizer.state_dict())
        for step in (2, 3):
            for k, (_, b) in enumerate(pairs):
                alone[k].grad, new[k].grad = grads[step][k], distributed(grads[step][k], mesh, b)
            resumed.step()
            other.step()
        assert_same(new, alone, "AdamW")


def states_that_are_replaced(rank: int, folder: Path) -> None:
    """Another placement, or a plain tensor: refused at the step, which changes nothing, until it is loaded."""
    for mesh in meshes():
        among = list(placements(mesh, PLACED))
        for a, b in [*zip(among, among[1:] + among[:1], strict=True), *((a, None) for a in among)]:
            p, q = torch.nn.Parameter(distributed(value(0), mesh, a)), torch.nn.Parameter(value(0))
            optimizer, other = ELEMENTWISE["AdamW"]([p]), ELEMENTWISE["AdamW"]([q])
            for step in range(4):
                p.grad, q.grad = distributed(value(0, seed=step), mesh, a), value(0, seed=step)
                if step == 2:
                    average = whole(optimizer.state[p]["exp_avg"])
                    optimizer.state[p]["exp_avg"] = average if b is None else distributed(average, mesh, b)
                    with pytest.raises(
                        ValueError, match=r"state .* at .* is a .*, but its parameter is a DTensor.*load_state_dict"
                    ):
                        optimizer.step()
                    assert_same([p], [q], "AdamW")
                    optimizer.load_state_dict(optimizer.state_dict())
                optimizer.step()
                other.step()
            assert_same([p], [q], "AdamW")


def sharded_model() -> torch.nn.Module:
    """A root with parameters of its own, which it keeps gathered after a forward pass, and layers in it."""
    model = make_model()
    fully_shard(model[0])  # type: ignore[index]
    return fully_shard(model)


def averages_are_seen_and_leave(rank: int, folder: Path) -> None:
    """By evaluation with and without averages, in both orders, and by the training that goes on."""
    batches = make_batches(STEPS)
    for plain_first in (False, True):
        losses: list[list[torch.Tensor]] = []
        models = []
        for build in (sharded_model, make_model):
            model = build()
            optimizer = adapters.TransformOptimizer(
                model.parameters(), fo.chain(fo.sgd(0.1, momentum=0.9), fo.params_ema(0.9))
            )
            seen = []

            def evaluate(m: Any = model) -> torch.Tensor:
                with torch.no_grad():
                    return torch.nn.functional.mse_loss(m(batches[0][0]), batches[0][1])

            for batch in batches:
                fit(model, optimizer, [batch])
                seen += [evaluate()] if plain_first else []
                with optimizer.averaged_params():
                    seen.append(evaluate())
            seen.append(evaluate())
            losses.append(seen)
            models.append(model)
        torch.testing.assert_close(*losses, **SUMS)
        assert_same(models[0].parameters(), models[1].parameters(), "averages")
        assert abs(losses[0][-1] - losses[0][-2]) > 1e-6  # averages are not the parameters


def unit(updates: Any, params: Any = None) -> Any:
    return {k: u / u.norm() for k, u in updates.items()}


def by_columns(updates: Any, params: Any) -> Any:
    return {k: u - u.mean(0, keepdim=True) - 0.01 * params[k].sum() for k, u in updates.items()}


def momentum() -> fo.GradientTransformation:
    """State of the parameters' shapes, numbers of each, and one of all of them."""

    def init(params: Any) -> Any:
        return {"m": {k: torch.zeros_like(p) for k, p in params.items()}, "seen": dict.fromkeys(params, 0.0)}

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        m = {k: 0.9 * state["m"][k] + u for k, u in updates.items()}
        seen = {k: state["seen"][k] + 1.0 for k in m}
        return {k: x / (x.norm() + seen[k]) for k, x in m.items()}, {"m": m, "seen": seen}

    return fo.GradientTransformation(init, update)


def transformations_that_are_no_rules(rank: int, folder: Path) -> None:
    """Alone and between rules: norms, means along a dimension and state are those of whole tensors.

    The last has the others' ways; they take fewer steps.
    """
    where = layouts()
    kinds: dict[str, Callable[[], list[Any]]] = {
        "unit": lambda: [fo.stateless(unit)],
        "by columns": lambda: [fo.trace(0.5), fo.stateless(by_columns), fo.sgd(0.1)],
        "momentum": lambda: [momentum()],
        "momentum between rules": lambda: [fo.trace(0.5), momentum(), fo.sgd(0.1)],
    }
    for name, parts in kinds.items():
        named = [(f"w{k}", torch.nn.Parameter(distributed(value(k), *layout))) for k, layout in enumerate(where)]
        alone = [(f"w{k}", torch.nn.Parameter(value(k))) for k in range(len(where))]
        optimizer, other = chain(*parts())(named), chain(*parts())(alone)
        for step in range(STEPS if name == "momentum between rules" else 5):
            for k, layout in enumerate(where):
                alone[k][1].grad = value(k, seed=1 + step)
                named[k][1].grad = distributed(value(k, seed=1 + step), *layout)
            optimizer.step()
            other.step()
        assert_same([p for _, p in named], [p for _, p in alone], f"{name}, norms")


def maxima_keep_nan(rank: int, folder: Path) -> None:
    """A NaN in the part of each process by itself, on each backend, in a reduction over a leaf and over the tree."""
    world = dist.get_world_size()
    mesh = meshes()[0]
    largest = {
        "leaf": fo.elementwise(lambda u: u / fo.leaf_amax(torch.abs(u))),
        "tree": fo.elementwise(lambda u: u / fo.tree_amax(torch.abs(u))),
    }
    for backend, (name, rule), bad in itertools.product(BACKENDS, largest.items(), range(world)):
        grads = [value(0, shape=(world, 3)), value(1, shape=(2 * world, 1))]
        grads[0][bad, 1] = torch.nan
        params = [torch.nn.Parameter(distributed(torch.zeros_like(g), mesh, (Shard(0),))) for g in grads]
        for p, g in zip(params, grads, strict=True):
            p.grad = distributed(g, mesh, (Shard(0),))
        optimizer = chain(rule(), fo.scale(-1.0))(params)
        with fo.use_backend(backend):
            optimizer.step()
        assert whole(params[0]).isnan().all(), (backend, name, bad)
        assert whole(params[1]).isnan().all() == (name == "tree"), (backend, name, bad)


def missing_gradients_differ(rank: int, folder: Path) -> None:
    """Another one is missing in each process, and all of them in one; of two dtypes. The others keep their norms."""
    world = dist.get_world_size()
    mesh = meshes()[0]
    unit_rules = {
        "leaf": fo.elementwise(lambda u: u / fo.leaf_norm(u)),
        "leaf amax": fo.elementwise(lambda u: u / fo.leaf_amax(torch.abs(u))),
        "tree": fo.elementwise(lambda u: u / fo.tree_norm(u)),
        "clip": lambda: fo.clip_by_global_norm(0.5),
    }
    dtypes = [torch.float64, torch.float32] * world
    absences: list[list[set[int]]] = [
        [{r, r + world} for r in range(world)],
        [set(range(2 * world)), *[set()] * (world - 1)],
    ]
    for turn, ((name, rule), missing) in enumerate(itertools.product(unit_rules.items(), absences)):
        backend = BACKENDS[turn % len(BACKENDS)]
        with fo.use_backend(backend):
            grads = [value(k, shape=(2 * world, 3)) for k in range(2 * world)]
            here = [torch.zeros_like(g) for g in grads]  # rows that some process has
            for r, k in itertools.product(range(world), range(2 * world)):
                if k not in missing[r]:
                    here[k][2 * r : 2 * r + 2] = grads[k][2 * r : 2 * r + 2]
            norms = [g.norm() for g in here]
            total = torch.stack(norms).norm()
            params = [
                torch.nn.Parameter(distributed(torch.zeros(2 * world, 3, dtype=d), mesh, (Shard(0),))) for d in dtypes
            ]
            for k, (p, g, d) in enumerate(zip(params, grads, dtypes, strict=True)):
                p.grad = None if k in missing[rank] else distributed(g.to(d), mesh, (Shard(0),))
            chain(rule(), fo.scale(1.0))(params).step()
            for k, (p, g_here, d) in enumerate(zip(params, here, dtypes, strict=True)):
                sizes = {"leaf": norms[k], "leaf amax": g_here.abs().max(), "tree": total, "clip": 2.0 * total}
                # one rounding to float32 of what is below one
                tolerance = SUMS if d == torch.float64 else {"rtol": 0.0, "atol": 2.0**-23}
                torch.testing.assert_close(
                    whole(p).double(), g_here / sizes[name], **tolerance, msg=lambda m, n=(name, backend): f"{n}: {m}"
                )


def collectives_of_a_step(rank: int, folder: Path) -> None:
    """One all-reduce for each pass that ends in sums, whatever parameters, dtypes, groups and gradients."""
    mesh = meshes()[0]
    counts = {"AdamW": 0, "clip": 1, "LAMB": 1}
    for name, count in counts.items():
        dtypes = [torch.float64, torch.float32, torch.bfloat16] * 2
        params = [torch.nn.Parameter(distributed(value(k).to(d), mesh, (Shard(0),))) for k, d in enumerate(dtypes)]
        optimizer = OPTIMIZERS[name]([{"params": params[:4]}, {"params": params[4:]}])
        for missing in (None, rank):
            for k, (p, d) in enumerate(zip(params, dtypes, strict=True)):
                p.grad = None if k == missing else distributed(value(k, seed=1).to(d), mesh, (Shard(0),))
            with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
                optimizer.step()
            assert all_reduce.call_count == count, (name, missing)


def compiled_steps(rank: int, folder: Path) -> None:
    """From the first step on, and after one that was not compiled."""
    makes = [(name, OPTIMIZERS[name]) for name in ("AdamW", "LAMB", "whole tensors")]
    for (name, make), later in zip(makes, itertools.cycle((False, True)), strict=False):
        torch._dynamo.reset()
        model, alone = sharded_model(), make_model()
        optimizer, other = make(model.parameters()), make(alone.parameters())
        step = torch.compile(optimizer.step, backend="eager")
        for k, (x, y) in enumerate(make_batches(5)):
            for m, o, take in ((model, optimizer, optimizer.step if later and not k else step), (alone, other, None)):
                o.zero_grad()
                torch.nn.functional.mse_loss(m(x), y).backward()
                (take or o.step)()
        # the gradients of later steps are computed by the same operations in each process
        assert_same(model.parameters(), alone.parameters(), name)


def donated(rank: int, folder: Path) -> None:
    """The pure API with `donate=True`, which may write to what it is given."""
    chains = {
        "SGD": lambda: fo.sgd(0.1, momentum=0.9),
        "clip": lambda: fo.chain(fo.clip_by_global_norm(0.5), fo.adamw(0.05)),
    }
    for (name, make), mesh in itertools.product(chains.items(), meshes()):
        where = list(placements(mesh, PLACED))
        tx = make()
        params: Mapping[str, Any] = {f"w{k}": distributed(value(k), mesh, placed) for k, placed in enumerate(where)}
        alone: Mapping[str, Any] = {f"w{k}": value(k) for k in range(len(where))}
        state, other = tx.init(params), tx.init(alone)
        for step in range(STEPS):
            grads = {k: value(i, seed=step) for i, k in enumerate(alone)}
            parts = {k: distributed(g, mesh, placed) for (k, g), placed in zip(grads.items(), where, strict=True)}
            params, state = fo.apply_gradients(tx, params, parts, state, donate=True)
            alone, other = fo.apply_gradients(tx, alone, grads, other, donate=True)
        assert [p.placements for p in params.values()] == where
        assert_same(params.values(), alone.values(), f"{name}, norms")  # pure steps may be other operations


def a_process_outside_of_the_mesh(rank: int, folder: Path) -> None:
    """Nothing to do, and nothing to wait for."""
    count = dist.get_world_size() // 2
    mesh = DeviceMesh("cpu", list(range(count)))
    for name, make in OPTIMIZERS.items():
        p = torch.nn.Parameter(distribute_tensor(value(0), mesh, [Shard(0)], src_data_rank=None))
        q = torch.nn.Parameter(value(0))
        optimizer, other = make([p]), make([q])
        for step in range(STEPS):
            q.grad = value(0, seed=step)
            p.grad = distribute_tensor(value(0, seed=step), mesh, [Shard(0)], src_data_rank=None)
            optimizer.step()
            other.step()
        if rank < count:
            tolerance = EXACT if name in ELEMENTWISE else SUMS
            torch.testing.assert_close(p.full_tensor().detach(), q.detach(), **tolerance)  # type: ignore[attr-defined]


def whole_states_for_parts(rank: int, folder: Path) -> None:
    """Each process keeps its part of them, and training goes on as in one process."""
    for name in ("SGD", "AdamW", "LAMB"):
        make = OPTIMIZERS[name]
        model, alone = sharded_model(), make_model()
        optimizer, other = make(model.parameters()), make(alone.parameters())
        batches = make_batches(4)
        for m, o in ((model, optimizer), (alone, other)):
            fit(m, o, batches[:2])
        resumed = make(model.parameters())
        resumed.load_state_dict(other.state_dict())
        for m, o in ((model, resumed), (alone, other)):
            fit(m, o, batches[2:])
        assert_same(model.parameters(), alone.parameters(), name)


def first_steps_of_a_warmup(rank: int, folder: Path) -> None:
    """At a learning rate of 0, where the gradients of some processes are zeros, and their parts empty."""
    world, mesh = dist.get_world_size(), meshes()[0]
    decaying = chain(fo.clip_by_global_norm(0.5), fo.adamw(0.1, weight_decay=0.1))
    for (name, make), rows in itertools.product((OPTIMIZERS | {"clip and AdamW": decaying}).items(), (1, world)):
        p = torch.nn.Parameter(distributed(value(0, shape=(rows, 3)), mesh, (Shard(0),)))
        q = torch.nn.Parameter(value(0, shape=(rows, 3)))
        optimizer, other = make([p]), make([q])
        for step in range(STEPS):
            gradient = value(step, seed=1, shape=(rows, 3))
            gradient[1 + step :] = 0.0
            p.grad, q.grad = distributed(gradient, mesh, (Shard(0),)), gradient
            for o in (optimizer, other):
                for group in o.param_groups:
                    group["lr"] = 0.01 * step
                o.step()
        assert_same([p], [q], name)
        for key, x in other.state[q].items():
            if key == "step":
                assert float(optimizer.state[p][key]) == float(x) == STEPS, name


def reading_the_state_in_one_process(rank: int, folder: Path) -> None:
    """Of an optimizer that has taken no step, and of one that has; nothing is changed by it."""
    for name, make in OPTIMIZERS.items():
        model, alone = sharded_model(), make_model()
        optimizer, other = make(model.parameters()), make(alone.parameters())
        for batches in (make_batches(3), make_batches(3, seed=5)):
            if rank == 0:
                optimizer.zero_grad()
                get_optimizer_state_dict(model, optimizer)
            dist.barrier()
            for m, o in ((model, optimizer), (alone, other)):
                fit(m, o, batches)
        assert_same(model.parameters(), alone.parameters(), name)


# each process compiles for itself, so that four processes tell no more than two
COMPILED = {compiled_steps.__name__: compiled_steps}
CHECKS = {
    check.__name__: check
    for check in (
        gradients_of_any_placement,
        partial_gradients_of_a_replicated_model,
        states_of_any_placement,
        states_that_are_replaced,
        averages_are_seen_and_leave,
        transformations_that_are_no_rules,
        maxima_keep_nan,
        missing_gradients_differ,
        collectives_of_a_step,
        donated,
        a_process_outside_of_the_mesh,
        whole_states_for_parts,
        first_steps_of_a_warmup,
        reading_the_state_in_one_process,
    )
}
