"""Drawn sequences of steps of one transformation: every way of taking them comes to the same."""

import collections
import copy
import dataclasses
import io
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import optree
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import functional_optim as fo
from _lib import chains
from _lib.compare import Snapshot, assert_alike, assert_same_bits
from _lib.drawn import alike, laid_out, same_each_time
from _lib.trees import BF16, F16, F32, F64, NAMESPACE, clone, leaves, tree_map
from functional_optim._compiler import cache as kernel_cache


@dataclasses.dataclass
class Layer:
    """A node of a class of somebody's own."""

    weight: Any
    bias: Any


optree.register_pytree_node(Layer, lambda x: ((x.weight, x.bias), None), lambda _, x: Layer(*x), namespace=NAMESPACE)


class Pair(NamedTuple):
    """A named tuple of leaves."""

    weight: Any
    bias: Any


def packed(x: list[Any]) -> Any:
    return fo.pack(dict(zip("abcd", x, strict=True)))


FORMS: dict[str, Callable[[list[Any]], Any]] = {
    "dict": lambda x: dict(zip("abcd", x, strict=True)),
    "dict in another order": lambda x: dict(zip("dcba", reversed(x), strict=True)),
    "ordered dict": lambda x: collections.OrderedDict(zip("cadb", (x[2], x[0], x[3], x[1]), strict=True)),
    "lists": lambda x: [x[0], [x[1], (x[2], [x[3]])]],
    "dataclass": lambda x: {"first": Layer(x[0], x[1]), "second": [Layer(x[2], x[3])]},
    "named tuple": lambda x: (Pair(x[0], x[1]), Pair(weight=x[2], bias=x[3])),
    "packed": packed,
}


@fo.elementwise(state={"norm": fo.slot(per="tree"), "seen": fo.slot(1.0, per="leaf")})
def by_norm(u: Any, norm: Any, seen: Any, *, step: Any, keep: Any = 0.5) -> Any:
    """A rule with a number per tree, one per leaf, and the step."""
    norm = keep * norm + (1 - keep) * fo.tree_norm(u)
    return u / (norm + seen) / step, norm, seen * keep


CHAINS: dict[str, fo.GradientTransformation] = {
    **{
        name: chains.CHAINS[name]
        for name in (
            "momentum",
            "clip, AdamW and average",
            "lamb with schedule",
            "host schedule",
            "partition",
            "only a barrier",
        )
    },
    "tensor": fo.chain(fo.trace(0.9), fo.scale_by_learning_rate(torch.tensor(0.1, dtype=F64))),
    "first update": fo.chain(chains.remember_first(), fo.scale(-0.1)),
    "nested": fo.chain(chains.nested(), fo.scale(-0.1)),
    "by norm": fo.chain(by_norm(), fo.scale_by_learning_rate(0.5)),
    "factored": fo.chain(fo.scale_by_factored_rms(min_dim_size_to_factor=2), fo.scale(-0.1)),
    "masked": fo.masked(fo.adam(0.1), lambda path, p: p.ndim != 1),
    "mu in bfloat16": fo.adam(0.1, mu_dtype=BF16),
}
SHAPES: list[tuple[int, ...]] = [(), (3, 4), (5,), (0, 2), (2, 3, 2, 2), (4, 3)]
LAYOUTS = ["contiguous", "transposed", "sliced", "offset", "channels_last"]


class Way:
    """One way of taking steps, with trees of its own.

    Args:
      tx: the transformation, of which this way has a copy.
      name: the name of the way.
    """

    def __init__(self, tx: fo.GradientTransformation, name: str) -> None:
        self.tx, self.name = copy.deepcopy(tx), name
        self.trees: list[list[Any]] = []  # parameters and state of each
        self.memory: list[Any] = []

    @property
    def donates(self) -> bool:
        return self.name == "donate"

    def step(self, k: int, grads: Any, backend: str | None) -> None:
        """Takes a step of a tree."""
        params, state = self.trees[k]
        tx = copy.deepcopy(self.tx) if self.name == "fresh" else self.tx
        own = self.name if self.name in ("foreach", "reference") else backend
        before = Snapshot(grads) if self.donates else Snapshot(params, state, grads)
        with fo.use_backend(own) if own else fo.use_backend("c"):
            if self.name == "update":
                updates, state = tx.update(grads, state, params)
                new = fo.apply_updates(params, updates)
            else:
                new, state = fo.apply_gradients(tx, params, grads, state, donate=self.donates)
        before.check()
        if self.donates:
            assert new is params
        self.trees[k] = [new, state]

    def fail(self, grads: Any, state: Any, params: Any) -> None:
        """Takes a step that ought to be refused."""
        with torch.no_grad(), fo.use_backend(self.name if self.name in ("foreach", "reference") else "c"):
            if self.name == "update":
                self.tx.update(grads, state, params)
            else:
                fo.apply_gradients(self.tx, params, grads, state, donate=self.donates)


WAYS = ["plain", "fresh", "donate", "update", "foreach", "reference"]


class Ways(RuleBasedStateMachine):
    """The same steps by every way."""

    names: ClassVar[list[str]] = list(CHAINS)

    @initialize(data=st.data(), seed=st.integers(0, 9))
    def start(self, data: Any, seed: int) -> None:
        self.chain = data.draw(st.sampled_from(self.names))
        self.generator = torch.Generator().manual_seed(seed)
        self.ways = [Way(CHAINS[self.chain], name) for name in WAYS]
        self.forms: list[str] = []
        self.cleared = False
        self.add(form="dict", shapes=[1, 2, 0, 5], dtypes=[F64] * 4, layout="contiguous")

    def drawn(self, shape: Any, dtype: torch.dtype, layout: str = "contiguous") -> torch.Tensor:
        return laid_out(torch.randn(shape, generator=self.generator, dtype=F64).to(dtype), layout)

    def each(self, fn: Callable[[Way], Any]) -> None:
        for way in self.ways:
            fn(way)

    def compare(self, k: int) -> None:
        """Asserts that all ways have come to the same, and has those that round otherwise go on from there."""
        expected = next(w for w in self.ways if w.name == "fresh").trees[k]
        for way in self.ways:
            if way.name in ("plain", "donate"):
                assert_same_bits(plain(way.trees[k]), plain(expected))
            elif way.name != "fresh":
                assert_alike(plain(way.trees[k]), plain(expected))
                for x, y in zip(leaves(plain(way.trees[k])), leaves(plain(expected)), strict=True):
                    if isinstance(x, torch.Tensor) and not torch.equal(x, y):
                        x.copy_(y)

    # -- trees

    @rule(
        form=st.sampled_from(sorted(FORMS)),
        shapes=st.lists(st.integers(0, len(SHAPES) - 1), min_size=4, max_size=4),
        dtypes=st.sampled_from([[F64] * 4, [F64] * 4, [F32] * 4, [F64, F32, F64, F32], [BF16, F32, BF16, F16]]),
        layout=st.sampled_from(LAYOUTS),
    )
    def add(self, form: str, shapes: list[int], dtypes: list[torch.dtype], layout: str) -> None:
        """A tree more."""
        values = [self.drawn(SHAPES[k], dtype, layout) for k, dtype in zip(shapes, dtypes, strict=True)]
        if len(self.forms) > 2:
            self.forms.pop(0)
            self.each(lambda w: (w.trees.pop(0), setattr(w, "memory", [])))
        self.forms.append(form)
        for way in self.ways:
            params = FORMS[form]([alike(x) for x in values])
            way.trees.append([params, way.tx.init(params)])

    @rule(
        k=st.integers(0, 2),
        missing=st.sets(st.integers(0, 3)),
        layout=st.sampled_from([*LAYOUTS, "expanded"]),
        cast=st.sampled_from([None, None, None, F32, F64]),
        backend=st.sampled_from([None, None, None, "foreach", "reference"]),
        grad=st.booleans(),
        times=st.integers(1, 3),
    )
    def step(
        self, k: int, missing: set[int], layout: str, cast: Any, backend: str | None, grad: bool, times: int
    ) -> None:
        """A step of one tree, or some."""
        k %= len(self.forms)
        for _ in range(times):
            grads = self.gradients(k, missing, layout, cast)
            for way, g in zip(self.ways, grads, strict=True):
                with torch.set_grad_enabled(grad and not way.donates), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    way.step(k, g, backend)
                way.trees[k] = detached(way.trees[k])
            self.compare(k)

    def gradients(self, k: int, missing: set[int], layout: str, cast: Any) -> list[Any]:
        like = tensors_of(self.ways[0].trees[k][0])
        values = [
            None if x is None or i in missing else self.drawn(x.shape, cast or x.dtype, layout)
            for i, x in enumerate(like)
        ]
        made = []
        for way in self.ways:
            tree = way.trees[k][0]
            own = [None if x is None else alike(x) for x in values]
            if isinstance(tree, fo.Packed):
                tree = tree.tree()
            made.append(rebuilt(tree, own))
        return made

    @rule(
        k=st.integers(0, 2),
        where=st.integers(0, 3),
        how=st.sampled_from(["shape", "overlap", "same", "container", "integers", "state"]),
    )
    def failing_step(self, k: int, where: int, how: str) -> None:
        """A step that is refused changes nothing, and the next one is as if it had not been."""
        k %= len(self.forms)
        if self.forms[k] == "packed":
            return
        grads = self.gradients(k, set(), "contiguous", None)
        for way, g in zip(self.ways, grads, strict=True):
            params, state = way.trees[k]
            own, mine = leaves(params), leaves(g)
            x = own[where]
            if x is None or not x.numel():
                return
            match how:
                case "shape":
                    mine[where] = torch.ones(7, 2, dtype=x.dtype)
                case "integers":
                    mine[where] = torch.ones(x.shape, dtype=torch.int32)
                case "container":
                    mine[where] = [mine[where]]
                case "overlap":
                    both = torch.stack([x, x]).flatten()
                    own[where] = both[: x.numel()].view(x.shape)
                    other = (where + 1) % 4
                    own[other] = both[1 : x.numel() + 1].view(x.shape)
                    mine[other] = torch.ones_like(x)
                    if not way.donates or own[where].numel() < 2:
                        continue
                case "same":
                    own[(where + 1) % 4], mine[(where + 1) % 4] = x, torch.ones_like(x)
                    if not way.donates:
                        continue
                case "state":
                    state = state[:1] if isinstance(state, tuple) and len(state) > 1 else None
                    if state is None:
                        return
            changed, bad = rebuilt(params, own), rebuilt(g, mine)
            before, kept = Snapshot(changed, bad, params), copy.deepcopy(plain(way.trees[k][1]))
            with pytest.raises((ValueError, TypeError, RuntimeError)):
                way.fail(bad, state, changed)
            before.check()
            assert_same_bits(plain(way.trees[k][1]), kept)

    # -- leaves

    @rule(
        k=st.integers(0, 2),
        where=st.integers(0, 3),
        how=st.sampled_from(
            [
                "float32",
                "float64",
                "bfloat16",
                "transposed",
                "sliced",
                "offset",
                "side by side",
                "requires grad",
                "gone",
                "new memory",
                "data",
                "swap",
            ]
        ),
        of_state=st.booleans(),
    )
    def leaf(self, k: int, where: int, how: str, of_state: bool) -> None:
        """Makes something else of a leaf, and of its slots."""
        k %= len(self.forms)
        if self.forms[k] == "packed":
            return
        for way in self.ways:
            params, state = way.trees[k]
            own = leaves(params)
            x = own[where]
            if x is not None and how not in ("data", "swap", "requires grad", "gone"):
                x = x.detach()  # a view, in the place of a parameter
            if how == "gone":
                own[where] = None if x is not None else x
                if sum(y is not None for y in own) < 2:
                    return
            elif x is None:
                return
            elif how in ("float32", "float64", "bfloat16"):
                own[where] = x.to(getattr(torch, how))
            elif how in ("transposed", "sliced", "offset"):
                own[where] = laid_out(x, how)
            elif how == "side by side":
                for i, y in enumerate(own):
                    if i != where and y is not None and y.shape == x.shape and y.dtype == x.dtype:
                        own[where], own[i] = torch.stack([x, y.detach()]).unbind(0)
                        break
            elif how == "requires grad":
                own[where] = x.detach().clone().requires_grad_(not x.requires_grad)
            elif how == "new memory":
                own[where] = x.clone()
            elif how in ("data", "swap") and way.memory:
                continue
            elif how == "data":
                x.data = x.data.clone()
            elif how == "swap":
                torch.utils.swap_tensors(x, x.detach() * 1)
            if of_state and how in ("transposed", "sliced", "offset", "new memory"):
                state = optree.tree_map(
                    lambda s: (
                        laid_out(s, how)
                        if isinstance(s, torch.Tensor) and s.shape == x.shape and s.is_floating_point()
                        else s
                    ),
                    state,
                    namespace=NAMESPACE,
                )
            way.trees[k] = [rebuilt(params, own), state]

    @rule(k=st.integers(0, 2), how=st.sampled_from(["flatten", "pickle", "save", "deepcopy", "clone", "reorder"]))
    def carry(self, k: int, how: str) -> None:
        """Parameters and state by way of something else."""
        k %= len(self.forms)
        if self.forms[k] == "packed" and how in ("clone", "reorder"):
            return
        for way in self.ways:
            tree = way.trees[k]
            match how:
                case "flatten":
                    found, spec = optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)
                    tree = optree.tree_unflatten(spec, found)
                case "pickle":
                    tree = pickle.loads(pickle.dumps(tree))
                case "save":
                    file = io.BytesIO()
                    torch.save(tree, file)
                    file.seek(0)
                    tree = torch.load(file, weights_only=self.forms[k] not in ("dataclass", "named tuple", "packed"))
                case "deepcopy":
                    tree = copy.deepcopy(tree)
                case "clone":
                    tree = clone(tree)
                case "reorder" if type(tree[0]) is dict:
                    tree = [dict(reversed(tree[0].items())), tree[1]]
            way.trees[k] = list(tree)

    # -- the transformation

    @rule()
    def pickle_tx(self) -> None:
        if self.chain in ("host schedule", "masked"):
            return
        self.each(lambda w: setattr(w, "tx", pickle.loads(pickle.dumps(w.tx))))

    @rule(value=st.sampled_from([0.0, 0.05, 0.2]))
    def set_rate(self, value: float) -> None:
        if self.chain == "tensor":
            self.each(lambda w: [x.fill_(value) for x in w.tx._tensors])

    @rule()
    def clear(self) -> None:
        """Forgets kernels that are loaded, once."""
        if not self.cleared:
            kernel_cache.clear()
        self.cleared = True

    # -- memory

    @rule(k=st.integers(0, 2))
    def remember(self, k: int) -> None:
        k %= len(self.forms)
        for way in self.ways:
            tree = way.trees[k]
            kept = copy.deepcopy(tree) if way.donates else tree
            way.memory.append((k, kept, Snapshot(kept)))

    @rule()
    def rewind(self) -> None:
        """Goes back to trees of before, which no pure step has changed."""
        if not self.ways[0].memory:
            return
        for way in self.ways:
            k, kept, before = way.memory.pop()
            if way.name in ("plain", "fresh", "donate"):
                before.check()
            way.trees[k] = kept
        self.compare(k)

    @rule(missing=st.sets(st.integers(0, 3)))
    def threads(self, missing: set[int]) -> None:
        """Steps of all trees at once, each in a thread."""
        n = len(self.forms)
        grads = [self.gradients(k, missing, "contiguous", None) for k in range(n)]
        for i, way in enumerate(self.ways):
            errors: list[BaseException] = []

            def work(k: int, way: Way = way, i: int = i, errors: list[BaseException] = errors) -> None:
                try:
                    with torch.no_grad():
                        way.step(k, grads[k][i], None)
                except BaseException as error:
                    errors.append(error)

            if way.name in ("plain", "donate"):
                at_once = [threading.Thread(target=work, args=(k,)) for k in range(n)]
                for thread in at_once:
                    thread.start()
                for thread in at_once:
                    thread.join()
            else:
                for k in range(n):
                    work(k)
            if errors:
                raise errors[0]
            for k in range(n):
                way.trees[k] = detached(way.trees[k])
        for k in range(n):
            self.compare(k)


def plain(tree: Any) -> Any:
    """A tree with views in the place of packed parts, whose memory may be in another order, and without history."""
    opened = optree.tree_map(
        lambda x: x.tree() if isinstance(x, fo.Packed) else x,
        tree,
        is_leaf=lambda x: isinstance(x, fo.Packed),
        none_is_leaf=True,
        namespace=NAMESPACE,
    )
    return tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, opened)


def tensors_of(tree: Any) -> list[Any]:
    return leaves(fo.unpack(tree) if isinstance(tree, fo.Packed) else tree)


def rebuilt(tree: Any, own: list[Any]) -> Any:
    """A tree of the same structure with other leaves."""
    spec = optree.tree_structure(tree, none_is_leaf=True, namespace=NAMESPACE)
    return optree.tree_unflatten(spec, own)


def detached(tree: list[Any]) -> list[Any]:
    """A tree whose leaves have no history; those without one stay the objects that they are."""
    found = leaves(tree)
    own = [
        x.detach().requires_grad_()
        if isinstance(x, torch.Tensor) and x.grad_fn is not None and i < 4
        else (x.detach() if isinstance(x, torch.Tensor) and x.grad_fn is not None else x)
        for i, x in enumerate(found)
    ]
    if all(a is b for a, b in zip(own, found, strict=True)):
        return tree
    return rebuilt(tree, own)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_drawn_sequences_of_steps_come_to_the_same_by_every_way() -> None:
    run_state_machine_as_test(Ways, settings=same_each_time(14, stateful_step_count=25))
