"""Packed trees: the numbers of the trees that they stand for, to the bit, in fewer tensors."""

import copy
import io
import itertools
import pickle
import re
from typing import Any

import optree
import pytest
import torch
from hypothesis import (
    given,
    settings,
    strategies as st,
)
from torch.func import vmap
from torch.utils import _pytree as pytree

import functional_optim as fo
from _lib.chains import CHAINS, cautious, halving, watch
from _lib.compare import Snapshot, assert_alike, assert_same_bits
from _lib.trees import BF16, F32, F64, Tree


STEPS = 5


@fo.elementwise(extra={"hessian": "element"})
def precondition(u: Any, *, hessian: Any) -> Any:
    """A rule with a tree as an extra argument."""
    return u / (1 + hessian * hessian)


SHAPES = {"embed": (7, 3), "bias": (5,), "gain": (), "kernel": (2, 3, 4), "empty": (0, 2), "head": (40, 8)}
MORE: dict[str, Any] = {
    "adafactor": fo.adafactor(1e-2, min_dim_size_to_factor=4),
    "lars": fo.lars(1e-2, weight_decay=0.1),
    "muon": fo.muon(1e-2),
    "moments in bfloat16": fo.adamw(halving, mu_dtype=BF16),
    "masked by a pattern": fo.masked(fo.adam(1e-2), "kernel|bias"),
    "clip in a part": fo.partition(
        {"a": fo.chain(fo.clip_by_global_norm(0.1), fo.sgd(0.1, 0.9)), "b": fo.rprop(1e-2)},
        {re.compile("bias|kernel"): "a", re.compile(""): "b"},
    ),
    "a number of the tree": fo.chain(fo.trace(0.9), watch(), fo.scale(-0.1)),
    "wrapped": cautious(fo.adam(1e-2)),
    "average of the last": fo.chain(fo.sgd(0.1), fo.params_swa(start=1)),
}
ALL = {name: tx for name, tx in (CHAINS | MORE).items() if "barrier" not in name} | {
    "barrier between": CHAINS["barrier between"]
}


def tree(seed: int, dtypes: tuple[torch.dtype, ...] = (F32, F32)) -> dict[str, torch.Tensor]:
    """Leaves of several shapes, one of them permuted in memory, in alternating dtypes."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for k, (name, shape) in enumerate(SHAPES.items()):
        x = (
            torch.randn(shape[::-1], generator=generator)
            if name == "kernel"
            else torch.randn(shape, generator=generator)
        )
        made[name] = (x.permute(2, 1, 0) if name == "kernel" else x).to(dtypes[k % 2])
    return made


def unpacked(x: Any) -> Any:
    """A tree or state with the trees that its packed trees stand for."""
    return pytree.tree_map(fo.unpack, x, is_leaf=lambda y: isinstance(y, fo.Packed))


def packed_parts(x: Any) -> list[fo.Packed]:
    return [y for y in pytree.tree_leaves(x, is_leaf=lambda y: isinstance(y, fo.Packed)) if isinstance(y, fo.Packed)]


def follow(tx: Any, donate: bool, missing: bool, pack_grads: bool, dtypes: tuple[torch.dtype, ...] = (F32, F32)) -> Any:
    """Steps of a tree and of the tree packed, compared after each; returns the packed parameters and state."""
    plain, packed = tree(0, dtypes), fo.pack(tree(0, dtypes))
    plain_state, state = tx.init(plain), tx.init(packed)
    for step in range(STEPS):
        grads: Tree = tree(step + 1, dtypes)
        if missing and step == 2:
            grads["bias"] = None
        plain, plain_state = fo.apply_gradients(tx, plain, grads, plain_state, donate=donate)
        before = packed
        packed, state = fo.apply_gradients(tx, packed, fo.pack(grads) if pack_grads else grads, state, donate=donate)
        assert (packed is before) is donate
        assert_same_bits(unpacked(packed), plain)
        assert_same_bits(unpacked(state), plain_state)
    return packed, state


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("name", ALL)
def test_steps_of_a_packed_tree_are_those_of_the_tree(name: str, donate: bool) -> None:
    packed, state = follow(ALL[name], donate, missing=not donate, pack_grads=not donate)

    assert len(packed.buffers) == 1
    slots = packed_parts(state)
    assert all(len(x.buffers) <= 1 for x in slots)
    assert slots or not [x for x in pytree.tree_leaves(state) if x.is_floating_point()]


LINKS = st.sampled_from(
    [
        fo.clip_by_global_norm(0.5),
        fo.clip_by_block_rms(0.1),
        fo.trace(0.9),
        fo.scale_by_adam(),
        fo.scale_by_trust_ratio(),
        fo.masked(fo.add_decayed_weights(0.1), re.compile("head|embed")),
        fo.scale_by_schedule(fo.cosine_decay_schedule(1.0, 4)),
    ]
)


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(st.lists(LINKS, min_size=1, max_size=3), st.booleans(), st.sampled_from([(F32, F64), (BF16, F32), (BF16, BF16)]))
def test_chains_of_any_links_and_dtypes(links: list[Any], donate: bool, dtypes: tuple[torch.dtype, ...]) -> None:
    packed, _ = follow(fo.chain(*links, fo.scale(-0.1)), donate, missing=True, pack_grads=donate, dtypes=dtypes)

    assert {x.dtype for x in packed.buffers} == set(dtypes)


UPDATES = {"scale": fo.scale(-1.0), "adam": fo.adam(0.1), "clip, trace": fo.chain(fo.clip(1.0), fo.trace(0.9))}


@pytest.mark.parametrize("mapped", [False, True], ids=["one tree", "members"])
@pytest.mark.parametrize("name", UPDATES)
def test_updates_are_as_wide_as_packed_parameters_that_nothing_reads(name: str, mapped: bool) -> None:
    """Dtypes of earlier trees do not matter: no program reads these, and the form of a packed tree has no dtype."""
    tx, kinds = UPDATES[name], list(itertools.product((F32, F64, BF16), repeat=2))
    for of_params, of_grads in [*kinds, *reversed(kinds)]:
        params, grads = ({"w": torch.ones((2, 3) if mapped else 3, dtype=dtype)} for dtype in (of_params, of_grads))
        pack, unpack = (vmap(fo.pack), vmap(fo.unpack)) if mapped else (fo.pack, fo.unpack)
        update: Any = lambda p, g: tx.update(g, tx.init(p), p)[0]  # noqa: E731
        found = unpack((vmap(update) if mapped else update)(pack(params), pack(grads)))
        assert found["w"].dtype is torch.promote_types(of_params, of_grads)


@pytest.mark.parametrize("backend", ["reference", "foreach", "c"])
def test_updates_are_packed_on_every_backend(backend: str) -> None:
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-2))
    params, grads = tree(0), tree(1)
    with fo.use_backend(backend):
        expected, _ = tx.update(grads, tx.init(params), params)
        updates, _ = tx.update(fo.pack(grads), tx.init(fo.pack(params)), fo.pack(params))
        without, _ = fo.trace(0.9).update(fo.pack(grads), fo.trace(0.9).init(fo.pack(params)))

    assert isinstance(updates, fo.Packed)
    assert isinstance(without, fo.Packed)
    assert_same_bits(updates.tree(), expected)
    assert_same_bits(without.tree(), grads)
    assert_same_bits(fo.apply_updates(fo.pack(params), updates).tree(), fo.apply_updates(params, expected))
    assert_same_bits(fo.apply_updates(fo.pack(params), expected).tree(), fo.apply_updates(params, expected))


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_extra_arguments_that_are_trees(donate: bool) -> None:
    tx = fo.chain(precondition(), fo.sgd(0.1, 0.9))
    plain, packed = tree(0), fo.pack(tree(0))
    expected, state = tx.init(plain), tx.init(packed)
    for k, form in enumerate((fo.pack, fo.unpack)):  # a packed one, and a plain one
        grads, hessian = tree(1 + k), tree(7 + k)
        plain, expected = fo.apply_gradients(tx, plain, grads, expected, donate=donate, hessian=hessian)
        packed, state = fo.apply_gradients(tx, packed, fo.pack(grads), state, donate=donate, hessian=form(hessian))
        assert_same_bits(unpacked((packed, state)), (plain, expected))


def test_averages_of_packed_parameters_are_packed() -> None:
    tx = fo.chain(fo.sgd(0.1), fo.params_ema(0.5))
    plain, packed = tree(0), fo.pack(tree(0))
    expected, state = tx.init(plain), tx.init(packed)
    plain, expected = fo.apply_gradients(tx, plain, tree(1), expected)
    packed, state = fo.apply_gradients(tx, packed, tree(1), state)

    average = fo.eval_params(state, packed)

    assert isinstance(average, fo.Packed)
    assert_same_bits(average.tree(), fo.eval_params(expected, plain))
    mean = fo.params_swa(start=1)
    assert_same_bits(
        unpacked(fo.update_average(mean, packed, mean.init(packed))),
        fo.update_average(mean, packed.tree(), mean.init(packed.tree())),
    )


def test_a_packed_tree_is_views_of_its_buffers() -> None:
    params = tree(0, (F32, F64))
    before = Snapshot(params)

    packed = fo.pack(params)

    before.check()
    assert_same_bits(packed.tree(), params)
    assert packed.tree()["kernel"].stride() == params["kernel"].stride()
    assert sorted(map(len, packed.buffers)) == [24 + 8, 8 + 24 + 320]  # each leaf takes a multiple of eight
    places = [x.data_ptr() for x in packed.buffers]
    assert {x.untyped_storage().data_ptr() for x in packed.tree().values()} == set(places)
    packed.tree()["head"].zero_()
    assert not packed.tree()["head"].any()
    assert fo.pack(packed) is packed
    assert fo.unpack(params) is params
    assert_same_bits(fo.unpack(fo.pack(torch.ones(3))), torch.ones(3))
    assert repr(packed).startswith("Packed(6 leaves in 2 buffers: ")
    nested = {"b": [torch.ones(1), None], "a": (torch.zeros(2),)}
    assert_same_bits(fo.pack(nested).tree(), nested)


def test_elements_between_leaves_are_zeros() -> None:
    tx = fo.chain(fo.scale_by_adam(mu_dtype=BF16), fo.scale(-0.1))
    packed = fo.pack(tree(0))
    state = tx.init(packed)
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        updates, _ = tx.update(fo.pack(tree(1)), state, packed)
        missing = fo.pack(tree(1) | {"bias": None})
        packed, state = fo.apply_gradients(tx, packed, missing, state)
    finally:
        torch.use_deterministic_algorithms(False)

    for x in (updates, *packed_parts((packed, state))):
        for buffer in x.buffers:
            assert buffer.count_nonzero() == sum(leaf.count_nonzero() for leaf in x.tree().values())


def test_memory_that_a_buffer_is_given_is_that_of_the_next_step() -> None:
    tx = fo.masked(fo.sgd(1.0), lambda path, p: p.ndim > 0)
    packed = fo.pack([torch.ones(3), torch.ones(())])
    state = tx.init(packed)
    packed, state = fo.apply_gradients(tx, packed, packed.map(torch.ones_like), state, donate=True)
    assert_same_bits(packed.tree()[0], torch.zeros(3))

    packed.buffers[0].data = torch.full((16,), 5.0)
    packed, state = fo.apply_gradients(tx, packed, packed.map(torch.ones_like), state, donate=True)

    assert_same_bits(packed.tree(), [torch.full((3,), 4.0), torch.tensor(6.0)])


def test_gradients_with_respect_to_a_packed_tree_are_packed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    params = dict(model.named_parameters())
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))

    def loss(params: Tree) -> torch.Tensor:
        return torch.func.functional_call(model, fo.unpack(params), (x,)).square().sum()

    packed = fo.pack(params)
    assert not packed.buffers[0].requires_grad
    plain = {k: p.detach() for k, p in params.items()}

    grads = torch.func.grad(loss)(packed)

    assert isinstance(grads, fo.Packed)
    expected = torch.func.grad(loss)(plain)
    assert_same_bits(grads.tree(), expected)
    with torch.no_grad():
        packed.tree()  # views that no graph knows
    packed.buffers[0].requires_grad_()
    loss(packed).backward()
    assert_same_bits(packed.map(lambda b: b.grad).tree(), expected)


def test_derivatives_and_batches_of_steps() -> None:
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-1))
    params, grads = tree(0, (F64, F64)), tree(1, (F64, F64))

    def after(params: Tree, grads: Tree) -> Tree:
        return fo.apply_gradients(tx, params, grads, tx.init(params))[0]

    def score(params: Tree, grads: Tree) -> torch.Tensor:
        return sum((x.square().sum() for x in fo.unpack(after(params, grads)).values()), torch.zeros((), dtype=F64))

    wanted = torch.func.grad(score)(params, grads)
    assert_alike(torch.func.grad(score)(fo.pack(params), fo.pack(grads)).tree(), wanted)

    stacked = fo.pack(params).map(lambda b: torch.stack([b, 2 * b]))
    batch = torch.func.vmap(after)(stacked, fo.pack(grads).map(lambda b: torch.stack([b, -b])))
    assert isinstance(batch, fo.Packed)
    for k, (p, g) in enumerate([(1, 1), (2, -1)]):
        alone = after({n: p * x for n, x in params.items()}, {n: g * x for n, x in grads.items()})
        assert_alike(batch.map(lambda b, k=k: b[k]).tree(), alone)


@pytest.mark.parametrize("chained", [False, True])
def test_a_transformation_that_is_not_made_of_rules_is_handed_views(chained: bool) -> None:
    """By each of its functions, as part of a chain and by itself; updates are packed as parameters are."""
    given: list[type] = []

    def init(params: Any) -> Any:
        given.append(type(params))
        return {k: torch.zeros_like(p) for k, p in params.items()}

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        given.extend((type(updates), type(params)))
        return {k: u + state[k] for k, u in updates.items()}, state

    own = fo.GradientTransformation(init, update)
    tx = fo.chain(own) if chained else own
    params = fo.pack({"w": torch.ones(3), "b": torch.ones(2)})
    updates, state = tx.update(params.map(torch.ones_like), tx.init(params), params)
    stepped, _ = fo.apply_gradients(tx, params, updates, state)
    assert set(given) == {dict}
    assert isinstance(updates, fo.Packed)
    torch.testing.assert_close(fo.unpack(stepped), {"w": torch.full((3,), 2.0), "b": torch.full((2,), 2.0)})


def test_views_that_a_transformation_made_are_not_kept() -> None:
    """Packed parameters that a transformed function finds around it, before anything else has looked at them."""
    tx = fo.sgd(0.1)
    params = fo.pack([torch.ones(2, 3), torch.arange(2.0)])
    state = tx.init(fo.pack([torch.ones(2, 3), torch.arange(2.0)]))

    def after(grads: Any) -> Any:
        new, _ = fo.apply_gradients(tx, params, grads, state)
        return sum(x.square().sum() for x in fo.unpack(new))

    torch.func.grad(after)(params.map(torch.ones_like))
    assert torch.equal(fo.unpack(params)[0], torch.ones(2, 3))
    fo.apply_gradients(tx, params, fo.unpack(params), state)


def test_pytrees_see_buffers() -> None:
    packed = fo.pack(tree(0, (F32, F64)))

    leaves, spec = pytree.tree_flatten(packed)

    assert list(map(id, leaves)) == list(map(id, packed.buffers))
    assert_same_bits(pytree.tree_unflatten(leaves, spec).tree(), packed.tree())
    assert len(optree.tree_leaves(packed, namespace="functional_optim")) == 2
    twice = pytree.tree_map(lambda b: 2 * b, packed)
    assert_same_bits(twice.tree()["head"], 2 * packed.tree()["head"])


@pytest.mark.parametrize("name", ["clip, AdamW and average", "partition", "adafactor"])
def test_packed_state_in_a_checkpoint(name: str) -> None:
    tx = ALL[name]
    packed, state = follow(tx, False, False, True)
    file = io.BytesIO()
    torch.save({"params": packed, "state": state}, file)
    file.seek(0)

    loaded = torch.load(file, weights_only=True)

    for found, other in (loaded["params"], loaded["state"]), (pickle.loads(pickle.dumps(packed)), copy.deepcopy(state)):
        assert_same_bits(unpacked((found, other)), unpacked((packed, state)))
        assert found.form is packed.form
        assert_same_bits(
            unpacked(fo.apply_gradients(tx, found, tree(9), other)),
            unpacked(fo.apply_gradients(tx, packed, tree(9), state)),
        )


def test_each_tree_keeps_its_own_form() -> None:
    tx = fo.adam(1e-2)
    params, grads = tree(0), tree(1)
    expected, expected_state = fo.apply_gradients(tx, params, grads, tx.init(params))

    of_packed, kept = fo.apply_gradients(tx, fo.pack(params), grads, tx.init(params))
    of_plain, kept_packed = fo.apply_gradients(tx, params, fo.pack(grads), tx.init(fo.pack(params)))

    assert isinstance(of_packed, fo.Packed)
    assert not packed_parts(kept)
    assert not packed_parts(of_plain)
    assert len(packed_parts(kept_packed)) == 2
    for params_after, state in ((of_packed, kept), (of_plain, kept_packed)):
        assert_same_bits(unpacked(params_after), expected)
        assert_same_bits(unpacked(state), expected_state)


def test_a_packed_tree_is_read_by_its_buffers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tx = fo.lamb(1e-2)
    packed = fo.pack(tree(0))
    state, grads = tx.init(packed), fo.pack(tree(1))
    for _ in range(2):
        packed, state = fo.apply_gradients(tx, packed, grads, state)
    monkeypatch.setattr(type(packed.layout), "views", None)

    packed, state = fo.apply_gradients(tx, packed, grads, state)

    assert len(packed.buffers) == 1


def other(**changes: Any) -> Tree:
    """A tree with some leaves replaced; None takes one away."""
    return {k: x for k, x in (tree(1) | changes).items() if x is not None}


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        (
            fo.pack(other(bias=torch.ones(6))),
            ValueError,
            "updates at 'bias' has shape (6,), but its parameter has (5,)",
        ),
        (fo.pack(other(bias=None)), ValueError, "updates does not have the structure of params: it lacks 'bias'"),
        (fo.pack(other(more=torch.ones(1))), ValueError, "it has the unknown 'more'"),
        (fo.pack(other(bias=torch.ones(5, dtype=torch.int64))), TypeError, "updates at 'bias' has dtype torch.int64"),
        (other(bias=fo.pack(torch.ones(5))), TypeError, "updates at 'bias' is packed, but not the whole tree"),
        (fo.pack(tree(1)).map(lambda b: b[1:]), ValueError, "buffer 0 of a packed tree has shape (383,)"),
        (fo.pack(tree(1)).map(lambda b: None), TypeError, "buffer 0 of a packed tree is NoneType None"),
    ],
)
@pytest.mark.parametrize("bound", [False, True], ids=["first", "later"])
def test_gradients_that_do_not_fit(grads: Tree, error: type[Exception], message: str, bound: bool) -> None:
    tx = fo.adam(1e-2)
    packed = fo.pack(tree(0))
    state = tx.init(packed)
    if bound:
        packed, state = fo.apply_gradients(tx, packed, fo.pack(tree(1)), state, donate=True)
    before = Snapshot(packed.buffers, pytree.tree_leaves(state))

    with pytest.raises(error, match=re.escape(message)):
        fo.apply_gradients(tx, packed, grads, state, donate=True)

    before.check()


def test_state_that_does_not_fit() -> None:
    tx = fo.scale_by_adam()
    packed = fo.pack(tree(0))
    state = tx.init(packed)

    for slot, message in (
        (fo.pack(other(head=torch.ones(8, 40))), "state scale_by_adam.mu at 'head' has shape (8, 40)"),
        (fo.pack(other(head=None)), "state scale_by_adam.mu does not have the structure of params: it lacks 'head'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            tx.update(fo.pack(tree(1)), state._replace(mu=slot), packed)
    with pytest.raises(
        ValueError, match=re.escape("scale_by_adam.mu at 'bias' and state scale_by_adam.nu at 'bias' share memory")
    ):
        fo.apply_gradients(tx, packed, fo.pack(tree(1)), state._replace(nu=state.mu), donate=True)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (1.0, "the leaf at 'a' is float 1.0, expected a tensor"),
        (torch.ones(2).to_sparse(), "the leaf at 'a' is sparse (torch.sparse_coo), expected a dense tensor"),
        (fo.pack(torch.ones(2)), "the tree at 'a' is packed already, but not the whole tree"),
    ],
)
def test_trees_that_cannot_be_packed(leaf: Any, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        fo.pack({"a": leaf})
    if isinstance(leaf, fo.Packed):
        with pytest.raises(TypeError, match="the tree at 'a' is packed, but not the whole tree"):
            fo.adam(1e-2).init({"a": leaf})


def test_a_module_is_no_tree() -> None:
    module = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"the leaf is Linear .*; `pack_module` packs a module"):
        fo.pack(module)
    with pytest.raises(TypeError, match=r"the leaf is generator .*; pass a dict of it"):
        fo.pack(module.named_parameters())


@pytest.mark.filterwarnings("ignore:the mask .* matches no parameter")
@pytest.mark.parametrize("donate", [False, True])
def test_packed_trees_in_which_nothing_takes_part(donate: bool) -> None:
    params = fo.pack({"a": torch.ones(3)})
    for tx, grads in ((fo.adam(0.1), {"a": None}), (fo.masked(fo.adam(0.1), {"a": False}), {"a": torch.zeros(3)})):
        new, _ = fo.apply_gradients(tx, params, grads, tx.init(params), donate=donate)
        assert_same_bits(new.tree(), {"a": torch.ones(3)})
