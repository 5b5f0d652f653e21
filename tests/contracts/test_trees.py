"""Trees of every kind: what goes in comes out in the same containers; what is None stays where it is."""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import pytest
import torch

import functional_optim as fo
from _lib.compare import DOUBLE, Snapshot, assert_same_bits
from _lib.training import train
from _lib.trees import NAMESPACE, clone, leaves, like, make_tree, tree_map
from functional_optim.adapters import TransformOptimizer


STEPS = 20
Make = Callable[..., torch.Tensor]


class Layer(NamedTuple):
    weight: Any
    bias: Any


class Box:
    """A container of a user's own, registered for this package."""

    def __init__(self, content: Any, label: str) -> None:
        self.content, self.label = content, label


optree.register_pytree_node(
    Box, lambda x: ((x.content,), x.label), lambda label, xs: Box(*xs, label), namespace=NAMESPACE
)


class Model(torch.nn.Module):
    """Parameters under names that are not in alphabetical order."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.stem = torch.nn.Parameter(make(2, 3))
        self.blocks = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
        for block in self.blocks:
            block.weight = torch.nn.Parameter(make(3, 3))
            block.bias = torch.nn.Parameter(make(3))
        self.head = torch.nn.Parameter(make())


TREES: dict[str, Callable[[Make], Any]] = {
    "tensor": lambda make: make(3, 2),
    "number": lambda make: make(),
    "dict": lambda make: {"w": make(3, 2), "b": make(2)},
    "dict with integer keys": lambda make: {10: make(3), 2: make(2), 1: make()},
    "ordered dict": lambda make: collections.OrderedDict(w=make(3, 2), b=make(2)),
    "default dict": lambda make: collections.defaultdict(list, w=make(3, 2), b=make(2)),
    "list": lambda make: [make(3, 2), make(2)],
    "tuple": lambda make: (make(3, 2), make(2)),
    "tuple of one": lambda make: (make(3),),
    "deque": lambda make: collections.deque([make(3), make(2)]),
    "named tuple": lambda make: Layer(make(3, 2), make(2)),
    "nested": lambda make: {"layers": [Layer(make(3, 2), make(2)), (make(1), {"deep": [make(4)]})], "head": make(2, 2)},
    "empty containers": lambda make: {"w": make(3), "none": {}, "nothing": [(), {}]},
    "empty leaf": lambda make: {"w": make(3), "empty": make(0), "flat": make(3, 0, 2)},
    "registered class": lambda make: Box({"w": make(3), "b": [make(2)]}, "a label"),
    "class within": lambda make: [Box(make(3), "first"), {"box": Box((make(2), make()), "second")}],
    "named parameters": lambda make: dict(Model(make).named_parameters()),
    "one tensor thrice": lambda make: [make(2)] * 3,
}


# pure, and in place where leaves do not share memory
STEPPED = [(name, False) for name in TREES] + [(name, True) for name in TREES if name != "one tensor thrice"]


def maker(seed: int) -> Make:
    """A function of a shape that returns normal deviates."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def skeleton(tree: Any) -> Any:
    """The containers of a tree: types, and keys in their order."""
    if isinstance(tree, Box):
        return (Box, tree.label, skeleton(tree.content))
    if isinstance(tree, dict):
        return (type(tree), [(k, skeleton(v)) for k, v in tree.items()])
    if isinstance(tree, (list, tuple, collections.deque)):
        return (type(tree), [skeleton(x) for x in tree])
    return None if tree is None else torch.Tensor


def adamw_of_torch(params: list[torch.Tensor], grads: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The parameters after torch's own AdamW."""
    params = [p.detach().clone().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, foreach=False)
    for gs in grads:
        for p, g in zip(params, gs, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize(("name", "donate"), STEPPED)
@torch.no_grad()
def test_leaves_train_as_in_torch(name: str, donate: bool) -> None:
    params = TREES[name](maker(0))
    grads = [like(params, seed) for seed in range(1, STEPS + 1)]
    expected = adamw_of_torch(leaves(params), list(map(leaves, grads)))

    params, _ = train(fo.adamw(1e-2, weight_decay=0.1), params, grads, donate=donate)

    torch.testing.assert_close(leaves(params), expected, **DOUBLE, check_layout=True)


@pytest.mark.parametrize(("name", "donate"), STEPPED)
@torch.no_grad()
def test_containers_of_params_and_state_are_kept(name: str, donate: bool) -> None:
    params = TREES[name](maker(0))
    expected = skeleton(params)
    tx = fo.chain(fo.scale_by_adam(), fo.scale(-0.1))

    first = tx.init(params)
    updates, second = tx.update(like(params, 1), first, params)
    new_params, third = fo.apply_gradients(tx, params, like(params, 2), second, donate=donate)

    trees = [
        first[0].mu,
        updates,
        second[0].mu,
        second[0].nu,
        fo.apply_updates(params, updates),
        new_params,
        third[0].nu,
    ]
    assert [skeleton(t) for t in trees] == [expected] * len(trees)


def test_new_params_of_a_module_are_plain_tensors() -> None:
    params = dict(Model(maker(0)).named_parameters())
    tx = fo.sgd(0.1)

    with torch.no_grad():
        new, _ = fo.apply_gradients(tx, params, like(params, 1), tx.init(params))

    assert not any(isinstance(x, torch.nn.Parameter) or x.requires_grad for x in new.values())


ALIKE: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "b before a": lambda a, b: {"b": b, "a": a},
    "a before b": lambda a, b: {"a": a, "b": b},
    "ordered dict": lambda a, b: collections.OrderedDict(a=a, b=b),
    "ordered dict, b before a": lambda a, b: collections.OrderedDict(b=b, a=a),
    "default dict": lambda a, b: collections.defaultdict(int, b=b, a=a),
}


@pytest.mark.parametrize("second", ALIKE)
@pytest.mark.parametrize("first", ALIKE)
def test_one_transformation_for_trees_in_other_containers(first: str, second: str) -> None:
    """Bindings of a transformation to one tree do not show in another."""
    tx = fo.chain(fo.trace(0.9), fo.scale(-1.0))
    zeros = ALIKE[first](torch.zeros(2), torch.zeros(2))
    fo.apply_gradients(tx, zeros, zeros, tx.init(zeros))
    params, grads = (ALIKE[second](torch.full((2,), x), torch.full((2,), 2 * x)) for x in (5.0, 1.0))

    new, state = fo.apply_gradients(tx, params, grads, tx.init(params))

    torch.testing.assert_close((new["a"], new["b"]), (torch.full((2,), 4.0), torch.full((2,), 8.0)))
    assert (skeleton(new), skeleton(state[0].trace)) == (skeleton(params),) * 2


def test_gradients_are_found_by_key_not_by_position() -> None:
    params = {"a": torch.zeros(2), "b": torch.zeros(2)}
    grads = {"b": torch.full((2,), 2.0), "a": torch.full((2,), 1.0)}
    tx = fo.sgd(1.0)

    new, _ = fo.apply_gradients(tx, params, grads, tx.init(params))

    torch.testing.assert_close(new, {"a": torch.full((2,), -1.0), "b": torch.full((2,), -2.0)})


def test_one_transformation_takes_any_number_of_trees() -> None:
    """More trees, in turns, than an executor remembers: each has its own plan and none is confused with another."""
    tx = fo.adamw(1e-2, weight_decay=0.1)
    trees = [{f"p{k}": maker(n)(n + 1) for k in range(n % 3 + 1)} for n in range(12)]
    grads = [[like(tree, 100 * n + step) for step in range(3)] for n, tree in enumerate(trees)]
    expected = [adamw_of_torch(leaves(tree), list(map(leaves, gs))) for tree, gs in zip(trees, grads, strict=True)]

    states = [tx.init(tree) for tree in trees]
    for step in range(3):
        for n, tree in enumerate(trees):
            trees[n], states[n] = fo.apply_gradients(tx, tree, grads[n][step], states[n])

    torch.testing.assert_close([leaves(tree) for tree in trees], expected, **DOUBLE)


# Gradients that are there: all, one, others, none at all, and back. "c" has none in the first steps.
PRESENT = [("a", "b"), ("a",), (), ("b", "c"), ("a", "b", "c"), (), ("c",), ("b",), ("a", "b", "c")] * 3


def adam_by_hand(params: dict[str, torch.Tensor], grads: list[dict[str, Any]]) -> tuple[Any, Any, Any, int]:
    """Adam where a leaf without a gradient stands still, and the counter does if there is no gradient at all."""
    p = {k: v.clone() for k, v in params.items()}
    mu, nu = ({k: torch.zeros_like(v) for k, v in params.items()} for _ in range(2))
    count = 0
    for gs in grads:
        count += any(g is not None for g in gs.values())
        for k, g in gs.items():
            if g is not None:
                mu[k] = 0.9 * mu[k] + 0.1 * g
                nu[k] = 0.999 * nu[k] + 0.001 * g**2
                p[k] = p[k] - 0.01 * (mu[k] / (1 - 0.9**count)) / ((nu[k] / (1 - 0.999**count)).sqrt() + 1e-8)
    return p, mu, nu, count


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("backend", ["reference", "foreach", "c"])
def test_leaves_without_a_gradient_stand_still(backend: str, donate: bool) -> None:
    params = {k: maker(seed)(3, 2) for seed, k in enumerate("abc")}
    grads: list[dict[str, Any]] = [
        {k: g if k in present else None for k, g in like(params, 10 + step).items()}
        for step, present in enumerate(PRESENT)
    ]
    p, mu, nu, count = adam_by_hand(params, grads)

    with fo.use_backend(backend):
        params, (state, _) = train(fo.adam(1e-2), clone(params), grads, donate=donate)

    torch.testing.assert_close((params, state.mu, state.nu, state.count), (p, mu, nu, torch.tensor(count)), **DOUBLE)


STATEFUL = {
    "adamw": fo.adamw(1e-2),
    "counter of a schedule": fo.chain(fo.scale_by_schedule(lambda count: 1.0 / (1.0 + count)), fo.scale(-1.0)),
    "number per leaf": fo.chain(fo.zero_nans(), fo.scale(-1.0)),
    "average": fo.chain(fo.scale(-1.0), fo.params_ema(0.9)),
    "reduction": fo.chain(fo.clip_by_global_norm(1.0), fo.lamb(1e-2)),
    "barrier": fo.chain(
        fo.trace(0.9), fo.stateless_with_tree_map(lambda u, p: 2 * u), fo.scale_by_adam(), fo.scale(-1.0)
    ),
    "masked": fo.masked(fo.adam(1e-2), lambda path, p: p.ndim > 0),
    "partition": fo.partition({True: fo.adam(1e-2), False: fo.sgd(0.1, 0.9)}, lambda path, p: p.ndim > 0),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", STATEFUL)
def test_params_and_state_are_unchanged_without_gradients(name: str, donate: bool) -> None:
    tx, params = STATEFUL[name], make_tree(0)
    params, state = train(tx, params, [like(params, 1)])
    before = Snapshot(params, state)

    new_params, new_state = fo.apply_gradients(tx, params, tree_map(lambda p: None, params), state, donate=donate)

    before.check()
    assert_same_bits((new_params, new_state), (params, state))


@pytest.mark.parametrize("name", STATEFUL)
def test_update_returns_none_for_none(name: str) -> None:
    tx, params = STATEFUL[name], make_tree(0)

    updates, _ = tx.update({**like(params, 1), "bias": None}, tx.init(params), params)

    assert {k: u is None for k, u in updates.items()} == {"weight": False, "bias": True, "scale": False}


def test_a_missing_gradient_is_no_part_of_the_global_norm() -> None:
    params = {"a": torch.zeros(1), "b": torch.zeros(1), "c": torch.zeros(1)}
    grads = {"a": torch.tensor([3.0]), "b": None, "c": torch.tensor([4.0])}
    tx = fo.clip_by_global_norm(1.0)

    updates, _ = tx.update(grads, tx.init(params))

    torch.testing.assert_close(updates, {"a": torch.tensor([0.6]), "b": None, "c": torch.tensor([0.8])})


@pytest.mark.parametrize("donate", [False, True])
def test_parameters_may_be_none(donate: bool) -> None:
    params = {"w": maker(0)(3), "absent": None, "inner": [None, maker(1)(2)]}
    grads = [like(params, seed) for seed in range(1, STEPS + 1)]
    expected = adamw_of_torch([params["w"], params["inner"][1]], [[g["w"], g["inner"][1]] for g in grads])

    params, state = train(fo.adamw(1e-2, weight_decay=0.1), params, grads, donate=donate)

    torch.testing.assert_close((params["w"], params["inner"][1]), tuple(expected), **DOUBLE)
    assert (params["absent"], params["inner"][0], state[0].mu["absent"], state[0].mu["inner"][0]) == (None,) * 4


def test_a_gradient_of_no_parameter_changes_nothing() -> None:
    params = {"w": torch.zeros(2), "absent": None}
    tx = fo.adam(0.1)
    state = tx.init(params)

    one, _ = fo.apply_gradients(tx, params, {"w": torch.ones(2), "absent": torch.ones(7)}, state)
    other, _ = fo.apply_gradients(tx, params, {"w": torch.ones(2), "absent": None}, state)

    assert_same_bits(one, other)


def test_empty_tree_steps_without_counting() -> None:
    tx = fo.adamw(1e-2)

    for empty in ({}, [], {"absent": None}, ((), {})):
        params, state = fo.apply_gradients(tx, empty, empty, tx.init(empty))

        assert params == empty
        assert state[0].count == 0


def test_apply_updates_leaves_what_has_no_update() -> None:
    params = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.bfloat16), "c": None}
    updates = {"a": None, "b": torch.full((2,), 2**-9), "c": None}

    new = fo.apply_updates(params, updates)

    # added in float32, where 1 + 2**-9 exists, and rounded once: to even, so to 1
    torch.testing.assert_close(new, {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.bfloat16), "c": None})
    assert new["a"] is params["a"]


def test_a_registered_class_names_its_leaves_in_messages() -> None:
    params = {"layers": [Layer(torch.zeros(2), torch.zeros(2, dtype=torch.int64))]}

    with pytest.raises(TypeError, match=r"params at 'layers\.0\.bias' has dtype torch\.int64"):
        fo.sgd(0.1).init(params)


@pytest.mark.parametrize("labels", [{"w": "a", "b": "b", "s": "b"}, {"s": "b", "b": "b", "w": "a"}])
def test_a_plain_dict_of_labels_for_an_ordered_one(labels: dict[str, str]) -> None:
    """optree sorts the keys of a plain dict, and keeps the order of others."""
    params = collections.OrderedDict(w=torch.ones(1), b=torch.ones(1), s=torch.ones(1))
    nested = collections.OrderedDict(layer=params)
    tx = fo.partition({"a": fo.scale(2.0), "b": fo.scale(3.0)}, labels)
    within = fo.partition({"a": fo.scale(2.0), "b": fo.scale(3.0)}, {"layer": labels})

    updates, _ = tx.update(params, tx.init(params))
    others, _ = within.update(nested, within.init(nested))

    assert {k: float(u) for k, u in updates.items()} == {"w": 2.0, "b": 3.0, "s": 3.0}
    assert {k: float(u) for k, u in others["layer"].items()} == {"w": 2.0, "b": 3.0, "s": 3.0}


def test_a_plain_dict_of_labels_in_an_optimizer() -> None:
    model = {k: torch.nn.Parameter(torch.ones(1)) for k in ("w", "b", "s")}
    opt = TransformOptimizer(list(model.items()), fo.masked(fo.scale(0.0), {"w": True, "b": False, "s": False}))
    for p in model.values():
        p.grad = torch.ones(1)

    opt.step()

    assert {k: p.item() for k, p in model.items()} == {"w": 1.0, "b": 2.0, "s": 2.0}
