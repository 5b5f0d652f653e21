"""Checks that two processes make together; `integration/test_fsdp_ddp_zero.py` reads their results."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as dsd

import functional_optim as fo
from _lib.compare import EXACT
from _lib.training import fit, make_batches, make_model, values
from functional_optim import adapters


WORLD = 2
STEPS = 4
Make = Callable[[Iterable[torch.nn.Parameter]], Any]
# A norm over the 212 elements of the model, summed in another order, is off by at most 212 units of 2**-53, and a step
# of at most 0.1 that it scales by 2e-15. That is also about how far the gradients of later steps are off. Adam divides
# them by their own size, which is 1e-5 or more in these runs: 2e-10 of its step of 0.05. A norm of a part in the
# place of that of the whole would change steps by a third.
SUMS: dict[str, Any] = {"rtol": 0.0, "atol": 1e-11}


def chain(*parts: fo.GradientTransformation) -> Make:
    return lambda params: adapters.TransformOptimizer(params, fo.chain(*parts))


EXACT_OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: adapters.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: adapters.AdamW(p, lr=0.05),
    "Lion": lambda p: adapters.Lion(p, lr=0.01),
    "schedule and average": chain(fo.adamw(fo.linear_schedule(0.05, 0.01, 10)), fo.params_ema(0.9)),
}
# transformations that look at whole tensors, or at the whole model
NORM_OPTIMIZERS: dict[str, Make] = {
    "clip": chain(fo.clip_by_global_norm(0.01), fo.sgd(1.0)),
    "clip, AdamW and average": chain(fo.clip_by_global_norm(0.1), fo.adamw(0.05), fo.params_ema(0.9)),
    "block rms": chain(fo.clip_by_block_rms(0.001), fo.sgd(1.0)),
    "LAMB": lambda p: adapters.LAMB(p, lr=0.05, weight_decay=0.1),
    "LARS": chain(fo.lars(0.05)),
}


def whole(x: torch.Tensor) -> torch.Tensor:
    """A copy of all of a tensor that is in parts."""
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def wholes(model: torch.nn.Module) -> list[torch.Tensor]:
    return [whole(p) for p in model.parameters()]


def uneven_model() -> torch.nn.Module:
    """Tensors of three rows, and of one, which leaves the second process nothing; and an odd number of biases."""
    generator = torch.Generator().manual_seed(3)
    layers = [torch.nn.Linear(8, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1), torch.nn.Linear(1, 4)]
    model = torch.nn.Sequential(*layers).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def sharded(model: torch.nn.Module) -> torch.nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for layer in model:  # type: ignore[attr-defined]
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def compare_with_one_process(
    make: Make, build: Callable[[], torch.nn.Module], tolerance: dict[str, Any], name: str
) -> None:
    """All processes have the same batch, so that the mean of their gradients is the gradient of each, to the bit."""
    model, alone = sharded(build()), build()
    optimizer, other = make(model.parameters()), make(alone.parameters())
    fit(model, optimizer, make_batches(STEPS))
    fit(alone, other, make_batches(STEPS))

    def state(o: Any) -> list[Any]:
        return [{k: whole(v) for k, v in o.state[p].items()} for g in o.param_groups for p in g["params"]]

    torch.testing.assert_close(wholes(model), wholes(alone), **tolerance, msg=lambda m: f"{name}: {m}")
    torch.testing.assert_close(state(optimizer), state(other), **tolerance, msg=lambda m: f"{name}, state: {m}")


def fsdp2_elementwise(rank: int, folder: Path) -> None:
    for name, make in EXACT_OPTIMIZERS.items():
        compare_with_one_process(make, make_model, EXACT, name)


def fsdp2_norms(rank: int, folder: Path) -> None:
    for name, make in NORM_OPTIMIZERS.items():
        compare_with_one_process(make, make_model, SUMS, name)


def fsdp2_uneven_elementwise(rank: int, folder: Path) -> None:
    for name, make in EXACT_OPTIMIZERS.items():
        compare_with_one_process(make, uneven_model, EXACT, name)


def fsdp2_uneven_norms(rank: int, folder: Path) -> None:
    for name, make in NORM_OPTIMIZERS.items():
        compare_with_one_process(make, uneven_model, SUMS, name)


def fsdp2_empty_shard(rank: int, folder: Path) -> None:
    """The process that has nothing of a parameter counts its steps all the same."""
    model = sharded(uneven_model())
    optimizer = adapters.AdamW(model.parameters(), lr=0.05)
    fit(model, optimizer, make_batches(STEPS))
    local = [p.to_local().numel() for p in model.parameters()]  # type: ignore[attr-defined]
    assert rank == 0 or 0 in local
    assert [int(optimizer.state[p]["step"]) for p in model.parameters()] == [STEPS] * len(local)


def fsdp2_versions(rank: int, folder: Path) -> None:
    """A write to a part counts as one to the whole, so that autograd notices."""
    model = sharded(make_model())
    optimizer = adapters.AdamW(model.parameters(), lr=0.05)
    fit(model, optimizer, make_batches(STEPS))
    before = [(p._version, p.to_local()._version) for p in model.parameters()]  # type: ignore[attr-defined]
    optimizer.step()
    after = [(p._version, p.to_local()._version) for p in model.parameters()]  # type: ignore[attr-defined]
    assert all(x > a and y > b for (a, b), (x, y) in zip(before, after, strict=True))


def fsdp2_clip_threshold(rank: int, folder: Path) -> None:
    """A norm just above that of any part and below that of the whole: only the whole model's is clipped."""
    model = sharded(make_model())
    grads = [torch.ones(p.shape, dtype=torch.float64) for p in make_model().parameters()]
    count = sum(g.numel() for g in grads)
    optimizer = adapters.TransformOptimizer(
        model.parameters(), fo.chain(fo.clip_by_global_norm(0.75 * count**0.5), fo.sgd(1.0))
    )
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = dist.tensor.distribute_tensor(g, p.device_mesh, p.placements)  # type: ignore[attr-defined]
    before = wholes(model)
    optimizer.step()
    # half of the elements have sqrt(1/2) = 0.71 of the norm, which would not be clipped
    torch.testing.assert_close(wholes(model), [p - 0.75 for p in before], **SUMS)


def fsdp2_average(rank: int, folder: Path) -> None:
    """Averages are swapped in where they are."""
    make = EXACT_OPTIMIZERS["schedule and average"]
    model, alone = sharded(make_model()), make_model()
    optimizer, other = make(model.parameters()), make(alone.parameters())
    for m, o in ((model, optimizer), (alone, other)):
        fit(m, o, make_batches(STEPS))
    with optimizer.averaged_params(), other.averaged_params():
        torch.testing.assert_close(wholes(model), wholes(alone), **EXACT)
    torch.testing.assert_close(wholes(model), wholes(alone), **EXACT)


def unsharded_root() -> torch.nn.Module:
    """A model whose first layer stays whole after a forward pass because it is the root's, FSDP2's default there."""
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    fully_shard(model[2], mesh=mesh)  # type: ignore[index]
    fully_shard(model, mesh=mesh)
    return model


def unsharded_layers() -> torch.nn.Module:
    """A model whose layers stay whole after a forward pass because that has been asked for."""
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for layer in (model[0], model[2]):  # type: ignore[index]
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    return model


def fsdp2_average_of_whole_copies(rank: int, folder: Path) -> None:
    """Evaluation reads the averages, and training the parameters, where FSDP2 keeps whole copies of either."""
    make = EXACT_OPTIMIZERS["schedule and average"]
    batches = make_batches(2 * STEPS)
    for build in (unsharded_root, unsharded_layers):
        for several in (False, True):
            model, alone = build(), make_model()
            optimizer, other = make(model.parameters()), make(alone.parameters())
            for batch in batches:
                seen = []
                for m, o in ((model, optimizer), (alone, other)):
                    fit(m, o, [batch])
                    with torch.no_grad():
                        plain = m(batch[0])
                        with o.averaged_params([m, torch.nn.Linear(1, 1)] if several else m):
                            seen.append((plain, m(batch[0]), m(batch[0])))
                        try:
                            with o.averaged_params(m):
                                m(batch[0])
                                raise KeyboardInterrupt
                        except KeyboardInterrupt:
                            pass
                torch.testing.assert_close(seen[0], seen[1], **SUMS)
                assert not torch.equal(seen[0][0], seen[0][1])
            torch.testing.assert_close(wholes(model), wholes(alone), **SUMS)


def loaded_for_parts(rank: int, folder: Path) -> None:
    """Whole tensors, and parts in other places, are placed as the parameters are, and training goes on."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    def as_they_are(x: torch.Tensor, p: Any) -> torch.Tensor:
        return x

    def replicated(x: torch.Tensor, p: Any) -> torch.Tensor:
        return distribute_tensor(x, p.device_mesh, [Replicate()])

    def by_columns(x: torch.Tensor, p: Any) -> torch.Tensor:
        return distribute_tensor(x, p.device_mesh, [Shard(x.ndim - 1)])

    def of_another_mesh(x: torch.Tensor, p: Any) -> torch.Tensor:
        return distribute_tensor(x, dist.init_device_mesh("cpu", (WORLD, 1)), [Shard(0), Replicate()])

    makes = {
        "AdamW": EXACT_OPTIMIZERS["AdamW"],
        "Lion": EXACT_OPTIMIZERS["Lion"],
        "chain": EXACT_OPTIMIZERS["schedule and average"],
    }
    batches = make_batches(2 * STEPS)
    for build in (make_model, uneven_model):
        for name, make in makes.items():
            alone = build()
            other = make(alone.parameters())
            fit(alone, other, batches[:STEPS])
            saved = values(other.state_dict())
            weights = {k: v.clone() for k, v in alone.state_dict().items()}
            fit(alone, other, batches[STEPS:])
            for place in (as_they_are, replicated, by_columns, of_another_mesh):
                model = build()
                model.load_state_dict(weights)
                model = sharded(model)
                optimizer = make(model.parameters())
                params = list(model.parameters())
                state = {
                    k: {key: place(x, params[k]) if x.ndim else x for key, x in slots.items()}
                    for k, slots in saved["state"].items()
                }
                optimizer.load_state_dict({**saved, "state": state})
                for p in params:
                    for key, x in optimizer.state[p].items():
                        assert isinstance(x, DTensor) == (key != "step"), (name, key)
                        assert key == "step" or x.placements == p.placements, (name, key)  # type: ignore[attr-defined]
                fit(model, optimizer, batches[STEPS:])
                torch.testing.assert_close(
                    wholes(model), wholes(alone), **EXACT, msg=lambda m, name=name: f"{name}, {place.__name__}: {m}"
                )
            # and parts are put together for parameters that are whole
            model = sharded(build())
            optimizer = make(model.parameters())
            fit(model, optimizer, batches[:STEPS])
            whole_optimizer = make(build().parameters())
            whole_optimizer.load_state_dict(optimizer.state_dict())
            states = [list(o.state.values()) for o in (whole_optimizer, optimizer)]
            torch.testing.assert_close(states[0], [{k: whole(x) for k, x in s.items()} for s in states[1]], **EXACT)


def fsdp2_checkpoint(rank: int, folder: Path) -> None:
    """The whole state, and the parts in a folder, come back; training goes on as if it had not been interrupted."""
    import torch.distributed.checkpoint as dcp

    batches = make_batches(2 * STEPS)
    make = NORM_OPTIMIZERS["clip, AdamW and average"]
    expected = sharded(make_model())
    fit(expected, make(expected.parameters()), batches)
    model = sharded(make_model())
    optimizer = make(model.parameters())
    fit(model, optimizer, batches[:STEPS])

    options = dsd.StateDictOptions(full_state_dict=True)
    weights, state = dsd.get_state_dict(model, optimizer, options=options)
    assert all(not hasattr(x, "full_tensor") for s in state["state"].values() for x in s.values())
    resumed = sharded(make_model(seed=5))
    resumed_optimizer = make(resumed.parameters())
    dsd.set_state_dict(resumed, resumed_optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
    fit(resumed, resumed_optimizer, batches[STEPS:])
    torch.testing.assert_close(wholes(resumed), wholes(expected), **EXACT)

    # a whole state goes into a process of its own
    weights, state = dsd.get_state_dict(model, optimizer, options=options)
    alone = make_model(seed=5)
    alone_optimizer = make(alone.parameters())
    dsd.set_state_dict(alone, alone_optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
    fit(alone, alone_optimizer, batches[STEPS:])
    torch.testing.assert_close(wholes(alone), wholes(expected), **SUMS)

    weights, state = dsd.get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "parts")
    resumed = sharded(make_model(seed=5))
    resumed_optimizer = make(resumed.parameters())
    weights, state = dsd.get_state_dict(resumed, resumed_optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / "parts")
    dsd.set_state_dict(resumed, resumed_optimizer, model_state_dict=weights, optim_state_dict=state)
    fit(resumed, resumed_optimizer, batches[STEPS:])
    torch.testing.assert_close(wholes(resumed), wholes(expected), **EXACT)


def ddp(rank: int, folder: Path) -> None:
    """Each process has half of every batch; together they are one process with all of it."""
    for name, make in {"SGD": EXACT_OPTIMIZERS["SGD"], "clip": NORM_OPTIMIZERS["clip"]}.items():
        alone = make_model()
        model = torch.nn.parallel.DistributedDataParallel(make_model())
        optimizer, other = make(model.parameters()), make(alone.parameters())
        batches = make_batches(STEPS, rows=16)
        fit(model, optimizer, [(x[rank::WORLD], y[rank::WORLD]) for x, y in batches])
        fit(alone, other, batches)
        torch.testing.assert_close(wholes(model), wholes(alone), **SUMS, msg=lambda m, name=name: f"{name}: {m}")


def ddp_same_everywhere(rank: int, folder: Path) -> None:
    """Processes that have different batches keep the same bits."""
    for make in (*EXACT_OPTIMIZERS.values(), *NORM_OPTIMIZERS.values()):
        model = torch.nn.parallel.DistributedDataParallel(make_model())
        fit(model, make(model.parameters()), make_batches(STEPS, seed=rank))
        for p in wholes(model):
            others = [torch.empty_like(p) for _ in range(WORLD)]
            dist.all_gather(others, p)
            torch.testing.assert_close(others, [others[0]] * WORLD, **EXACT)


def zero(rank: int, folder: Path) -> None:
    """`ZeroRedundancyOptimizer`, with all processes and with one: each steps its part and sends it to the others."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    # as everyone must take part in making a group, each makes that of each
    alone_groups = [dist.new_group([r]) for r in range(WORLD)]
    makes = {
        "AdamW": (adapters.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
        "chain": (adapters.TransformOptimizer.factory(fo.adamw), {"lr": 0.05, "weight_decay": 0.1}),
    }
    batches = make_batches(2 * STEPS)
    for name, (cls, options) in makes.items():
        for group in (None, alone_groups[rank]):
            holds = rank == 0 or group is not None
            alone = make_model()
            fit(alone, cls(alone.parameters(), **options), batches)
            expected = values(list(alone.parameters()))

            def make(model: torch.nn.Module, cls: Any = cls, options: Any = options, group: Any = group) -> Any:
                return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=cls, process_group=group, **options)

            model = make_model()
            optimizer = make(model)
            fit(model, optimizer, batches[:STEPS])
            optimizer.consolidate_state_dict(to=0)  # the first of its group
            saved = [values(optimizer.state_dict()) if holds else None]
            weights = {k: v.clone() for k, v in model.state_dict().items()}
            fit(model, optimizer, batches[STEPS:])
            torch.testing.assert_close(wholes(model), expected, **EXACT, msg=lambda m, name=name: f"{name}: {m}")

            if group is None:
                dist.broadcast_object_list(saved, src=0)
            resumed = make_model(seed=5)
            resumed.load_state_dict(weights)
            resumed_optimizer = make(resumed)
            resumed_optimizer.load_state_dict(saved[0])
            fit(resumed, resumed_optimizer, batches[STEPS:])
            torch.testing.assert_close(wholes(resumed), expected, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


def fsdp1(rank: int, folder: Path) -> None:
    """Flat parameters; asking for the state by the model's own names does not disturb training.

    The state is not loaded again: on a CPU torch returns one moment in the place of all, also of its own classes.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    batches = make_batches(2 * STEPS)
    alone = make_model()
    fit(alone, adapters.AdamW(alone.parameters(), lr=0.05), batches)
    model = FullyShardedDataParallel(make_model(), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = adapters.AdamW(model.parameters(), lr=0.05)
    fit(model, optimizer, batches[:STEPS])
    state = FullyShardedDataParallel.optim_state_dict(model, optimizer)["state"]
    assert {k: v["exp_avg"].shape for k, v in state.items()} == {k: p.shape for k, p in alone.named_parameters()}
    assert [int(v["step"]) for v in state.values()] == [STEPS] * len(state)
    fit(model, optimizer, batches[STEPS:])
    with FullyShardedDataParallel.summon_full_params(model):
        torch.testing.assert_close(wholes(model), wholes(alone), **EXACT)


def fsdp1_norms(rank: int, folder: Path) -> None:
    """Those of parts, which is said; nothing is said where there are none (see `fsdp1`)."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for original in (False, True):
        model = FullyShardedDataParallel(make_model(), device_id=torch.device("cpu"), use_orig_params=original)
        for make in (
            chain(fo.clip_by_global_norm(0.5), fo.sgd(0.1)),
            lambda params: adapters.LAMB(params, lr=0.05),
        ):
            with pytest.warns(UserWarning, match="a part of a flat parameter.*use `fully_shard`"):
                fit(model, make(model.parameters()), make_batches(1))


CHECKS = {
    check.__name__: check
    for check in (
        fsdp2_elementwise,
        fsdp2_norms,
        fsdp2_uneven_elementwise,
        fsdp2_uneven_norms,
        fsdp2_empty_shard,
        fsdp2_versions,
        fsdp2_clip_threshold,
        fsdp2_average,
        fsdp2_average_of_whole_copies,
        loaded_for_parts,
        fsdp2_checkpoint,
        ddp,
        ddp_same_everywhere,
        zero,
        fsdp1,
        fsdp1_norms,
    )
}
