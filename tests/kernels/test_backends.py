"""Every backend against the reference and against plain torch: drawn chains, dtypes, layouts, rules of all kinds."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import optree
import pytest
import torch
from hypothesis import (
    Phase,
    given,
    settings,
    strategies as st,
)

import functional_optim as fo
from functional_optim.kernels import BACKENDS, launch
from functional_optim.kernels.launch import CHUNK


F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
STEPS = 3
OTHERS = [name for name in BACKENDS if name != "reference"]
# Triton's interpreter runs programs on NumPy, which warns where torch is silent, of overflow and of what is not a
# number; and it counts loops in a way that NumPy wants to forbid
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning")


@contextlib.contextmanager
def only(backend: str) -> Iterator[None]:
    """Uses a backend and refuses to fall back to another."""

    def refuse(calls: Any) -> Any:
        raise AssertionError(f"{backend} did not run")

    others = {name: refuse for name in BACKENDS if name != backend}
    with fo.use_backend(backend), mock.patch.dict(BACKENDS, others):
        yield


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors of a tree."""
    return [x for x in optree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


# Backends compute the same formula in the same order, so they differ where libraries do: a square root or a power by
# an ulp, a sum over many elements by its order, in double precision, which float32 rarely shows. A formula of this
# file hands on at most some ten of these, to which its own roundings add, over three steps. What is stored in a half
# type is rounded from float32: where both sides of a rounding boundary are met, values are one ulp apart, and the next
# step may round it once more.
TOLERANCE = {F32: 32 * 2**-24, F64: 32 * 2**-53, BF16: 2 * 2**-8, F16: 2 * 2**-11}


def assert_alike(actual: Any, expected: Any) -> None:
    """Compares trees of tensors, each dtype by its own tolerance, relative to the largest number in the trees.

    What is small may have been left by large numbers that cancel.
    """
    assert optree.tree_structure(actual) == optree.tree_structure(expected)
    numbers = torch.cat([torch.ones(1, dtype=F64), *(x.double().flatten() for x in tensors(expected))])
    scale = numbers.nan_to_num(0, 0, 0).abs().amax().item()
    for x, y in zip(tensors(actual), tensors(expected), strict=True):
        bound = TOLERANCE.get(y.dtype, 0)
        torch.testing.assert_close(x, y, rtol=bound, atol=bound * scale, equal_nan=True)


# -- drawn chains -------------------------------------------------------------------------------------------------


Params = dict[str, torch.Tensor]
NAMES = ("a", "b", "c", "d")


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides."""
    match layout:
        case "channels_last":
            return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        case "transposed":
            return x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim > 1 else x
        case "sliced":
            if not x.ndim:
                return x
            holes = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7.0, dtype=x.dtype)
            holes[..., ::2] = x
            return holes[..., ::2]
        case "expanded":
            return x[:1].expand(x.shape) if x.ndim and x.shape[0] else x
        case "offset":  # not at the start of its memory, nor where vectors are
            return torch.cat([torch.zeros(1, dtype=x.dtype), x.flatten()])[1:].view(x.shape)
    return x


SHAPES = [(), (1,), (0,), (3, 0, 2), (7,), (33,), (5, 9), (2, 3, 4, 5), (8, 3, 3, 3), (1023,), (17, 31)]
LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced", "offset"]
DTYPES = [F32, F64, BF16, F16]


class Leaf(NamedTuple):
    """What a drawn leaf is like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    grad_dtype: torch.dtype
    layout: str
    grad_layout: str


class Run(NamedTuple):
    """What is drawn.

    Args:
      tx: the transformation.
      leaves: what the parameters and gradients are like.
      seed: where their values come from.
      spoiled: whether some gradients are NaN.
      how: whether a step is "update", an "apply" of gradients, or one that may "donate" its arguments.
    """

    tx: fo.GradientTransformation
    leaves: tuple[Leaf, ...]
    seed: int
    spoiled: bool
    how: str

    def start(self) -> tuple[Params, list[Params]]:
        """The parameters, and the gradients of each step."""
        generator = torch.Generator().manual_seed(self.seed)

        def tree(dtypes: Sequence[torch.dtype], layouts: Sequence[str]) -> Params:
            return {
                name: laid_out(torch.randn(leaf.shape, generator=generator, dtype=F64).to(dtype), layout)
                for name, leaf, dtype, layout in zip(NAMES, self.leaves, dtypes, layouts, strict=False)
            }

        params = tree([x.dtype for x in self.leaves], [x.layout for x in self.leaves])
        grad_dtypes, grad_layouts = [x.grad_dtype for x in self.leaves], [x.grad_layout for x in self.leaves]
        grads = [tree(grad_dtypes, grad_layouts) for _ in range(STEPS)]
        if self.spoiled:
            for x in grads[1].values():
                x[(0,) * x.ndim if x.numel() else ...] = math.nan
        return params, grads


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    """Hyper-parameters. They are not part of a program, so drawing them costs nothing."""
    return st.floats(low, high)


decays = numbers(0.5, 0.99)
steps = st.one_of(
    numbers(0.01, 0.5),
    st.builds(fo.cosine_decay_schedule, numbers(0.01, 0.5), st.just(10)),
    st.builds(lambda x: lambda count: x / (1 + count), numbers(0.01, 0.5)),
    st.builds(torch.tensor, numbers(0.01, 0.5)),
)
stored = st.sampled_from([None, F32, BF16])
RULES = st.one_of(
    st.builds(fo.scale, numbers(-2, 2)),
    st.builds(fo.scale_by_schedule, steps),
    st.builds(fo.trace, decays, st.booleans(), stored),
    st.builds(fo.ema, decays, st.booleans(), stored),
    st.builds(fo.scale_by_adam, decays, decays, numbers(1e-8, 1e-2), mu_dtype=stored, nesterov=st.booleans()),
    st.builds(fo.scale_by_amsgrad, decays, decays, numbers(1e-8, 1e-2)),
    st.builds(fo.scale_by_rms, decays, numbers(1e-8, 1e-2), numbers(0, 1), st.booleans(), st.booleans()),
    # with its bias corrected, the first variance is zero but for what rounding leaves of it
    st.builds(fo.scale_by_stddev, decays, numbers(1e-4, 1e-2), numbers(0, 1), st.booleans()),
    st.builds(fo.scale_by_lion, decays, decays, stored, st.sampled_from(["hard", "smooth", "refined"])),
    st.builds(fo.scale_by_sign),
    st.builds(fo.scale_by_trust_ratio, numbers(0, 0.1), numbers(0.5, 2), numbers(0, 1e-2)),
    st.builds(fo.add_decayed_weights, numbers(0, 0.1)),
    st.builds(fo.clip, numbers(0.1, 2)),
    st.builds(fo.clip_by_global_norm, numbers(0.1, 10)),
    st.builds(fo.clip_by_block_rms, numbers(0.1, 2)),
    st.builds(fo.zero_nans),
)


class ByName(NamedTuple):
    """A mask or labels, by name, for however many leaves there are."""

    values: tuple[Any, ...]

    def __call__(self, path: str, p: torch.Tensor) -> Any:
        return self.values[NAMES.index(path)]


def wrapped(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Combinations of transformations."""
    some = st.tuples(*[st.booleans()] * len(NAMES)).filter(lambda bits: bits[0]).map(ByName)
    labels = st.tuples(*[st.sampled_from("xy")] * len(NAMES)).map(ByName)
    return st.one_of(
        st.lists(inner, max_size=2).map(lambda txs: fo.chain(*txs)),
        st.builds(fo.masked, inner, some),
        st.builds(lambda x, y, by: fo.partition({"x": x, "y": y}, by), inner, inner, labels),
    )


leaves = st.builds(
    Leaf,
    st.sampled_from(SHAPES),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
    st.sampled_from([*LAYOUTS, "expanded"]),
)
# leaves of the same dtypes are one program, which is what most trees are like
alike = st.tuples(st.lists(leaves, min_size=1, max_size=len(NAMES)), leaves).map(
    lambda x: tuple(leaf._replace(dtype=x[1].dtype, grad_dtype=x[1].grad_dtype) for leaf in x[0])
)
links = st.recursive(RULES, wrapped, max_leaves=3)
RUNS = st.builds(
    lambda txs, average, *rest: Run(fo.chain(*txs, *([fo.params_ema(0.9)] if average else [])), *rest),
    st.lists(links, min_size=1, max_size=3),
    st.booleans(),
    st.one_of(alike, st.lists(leaves, min_size=1, max_size=2).map(tuple)),
    st.integers(0, 2**16),
    st.booleans(),
    st.sampled_from(["update", "apply", "donate"]),
)


def steps_of(run: Run, backend: str) -> Any:
    """Parameters and state after some steps."""
    params, grads = run.start()
    with only(backend):
        state = run.tx.init(params)
        for g in grads:
            if run.how == "update":
                updates, state = run.tx.update(g, state, params)
                params = fo.apply_updates(params, updates)
            else:
                params, state = fo.apply_gradients(run.tx, params, g, state, donate=run.how == "donate")
    return params, state


# the same chains every time: what is drawn at random belongs on a developer's machine
# and a case that fails is shown as it was drawn: making it smaller can take minutes (add Phase.shrink to do so)
PHASES = (Phase.explicit, Phase.generate)
DRAWN = settings(derandomize=True, deadline=None, max_examples=25, database=None, phases=PHASES)
drawn = pytest.mark.filterwarnings("ignore:the mask:UserWarning")  # some match no leaf


@drawn
@pytest.mark.parametrize("backend", OTHERS)
@given(run=RUNS)
@DRAWN
def test_drawn_chains(backend: str, run: Run) -> None:
    assert_alike(steps_of(run, backend), steps_of(run, "reference"))


# transformations that look at many leaves at once, where it matters who sees which of them
REDUCING = st.one_of(
    st.builds(fo.clip_by_global_norm, numbers(0.1, 3)),
    st.builds(fo.clip_by_block_rms, numbers(0.1, 2)),
    st.builds(fo.trace, decays),
    st.builds(fo.set_to_zero),
)


def one_by_one(
    txs: Sequence[fo.GradientTransformation], params: Any, grads: Sequence[Any], backend: str = "reference"
) -> tuple[Any, Any]:
    """Last updates, and states, of a chain, and of its members called one after another by the reference."""
    chain = fo.chain(*txs)
    state, states = chain.init(params), [tx.init(params) for tx in txs]
    for g in grads:
        with only(backend):
            fused, state = chain.update(g, state, params)
        with only("reference"):
            for k, tx in enumerate(txs):
                g, states[k] = tx.update(g, states[k], params)
    return (fused, state), (g, tuple(states))


@drawn
@given(
    st.lists(st.one_of(links, wrapped(REDUCING)), min_size=2, max_size=4),
    st.lists(st.sampled_from(SHAPES), min_size=1, max_size=len(NAMES)),
)
@settings(DRAWN, max_examples=60)
def test_drawn_chains_are_their_members_one_by_one(
    txs: list[fo.GradientTransformation], shapes: list[tuple[int, ...]]
) -> None:
    """Whichever leaves each of them sees: fusing changes nothing but rounding, of which float64 shows little."""
    leaves = tuple(Leaf(x, F64, F64, "contiguous", "contiguous") for x in shapes)
    fused, apart = one_by_one(txs, *Run(fo.identity(), leaves, 0, False, "update").start())
    assert_alike(fused, apart)


ONLY_A, ONLY_B = {"a": True, "b": False}, {"a": False, "b": True}
ACROSS = {
    "a clip of some before a clip of all": [
        fo.masked(fo.clip_by_global_norm(1.0), ONLY_A),
        fo.clip_by_global_norm(2.0),
    ],
    "a leaf's norm for the first before a clip of all": [
        fo.masked(fo.clip_by_block_rms(0.5), ONLY_A),
        fo.clip_by_global_norm(2.0),
    ],
    "a leaf's norm for the last before a clip of all": [
        fo.masked(fo.clip_by_block_rms(0.5), ONLY_B),
        fo.clip_by_global_norm(2.0),
    ],
    "a clip of all before one of some": [
        fo.clip_by_global_norm(3.0),
        fo.masked(fo.clip_by_global_norm(1.0), ONLY_A),
        fo.scale(-0.1),
    ],
    "parts before a clip of all": [
        fo.partition(
            {"x": fo.chain(fo.clip_by_global_norm(1.0), fo.clip_by_block_rms(0.5)), "y": fo.scale(2.0)},
            {"a": "x", "b": "y"},
        ),
        fo.clip_by_global_norm(2.0),
        fo.trace(0.9),
    ],
    "a clip of all before some are frozen": [
        fo.clip_by_global_norm(1.0),
        fo.masked(fo.set_to_zero(), ONLY_B),
    ],
    "a clip of all after some are frozen": [
        fo.masked(fo.set_to_zero(), ONLY_B),
        fo.clip_by_global_norm(1.0),
    ],
    "a ratio of norms after all are frozen": [
        fo.set_to_zero(),
        fo.scale_by_trust_ratio(),
    ],
    "a clip in each part": [
        fo.partition(
            {"x": fo.clip_by_global_norm(1.0), "y": fo.chain(fo.scale(2.0), fo.clip_by_global_norm(0.5))},
            {"a": "x", "b": "y"},
        ),
        fo.scale(-0.1),
    ],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ACROSS)
def test_tree_reductions_across_leaves_with_other_rules_before(backend: str, name: str) -> None:
    """Every leaf that a clip sees counts, at the time when all that precedes the clip has happened to it."""
    params = {"a": torch.ones(3, dtype=F64), "b": torch.ones(2, dtype=F64)}
    grads = {"a": torch.tensor([3.0, 4.0, 0.0], dtype=F64), "b": torch.tensor([12.0, -1.0], dtype=F64)}
    fused, apart = one_by_one(ACROSS[name], params, [grads, grads], backend)
    assert_alike(fused, apart)


# -- rules of all kinds ---------------------------------------------------------------------------------------------


@fo.elementwise(state={"norm": fo.slot(0.0, per="leaf"), "mu": fo.zeros})
def novograd(u: Any, norm: Any, mu: Any, *, step: Any, b1: Any = 0.9, b2: Any = 0.25, eps: Any = 1e-8) -> Any:
    """One second moment per leaf, which starts as the first one seen."""
    square = fo.leaf_sum(u * u)
    norm = torch.where(step == 1, square, b2 * norm + (1 - b2) * square)
    mu = b1 * mu + u / (torch.sqrt(norm) + eps)
    return mu, norm, mu


@fo.elementwise(state={"product": fo.slot(1.0, per="leaf"), "mu": fo.zeros, "nu": fo.zeros})
def nadam(u: Any, product: Any, mu: Any, nu: Any, *, step: Any, b1: Any = 0.9, b2: Any = 0.999) -> Any:
    """A running product of momenta that change with the step, one for each leaf."""
    now, after = b1 * (1 - 0.5 * 0.96 ** (step * 0.004)), b1 * (1 - 0.5 * 0.96 ** ((step + 1) * 0.004))
    product = product * now
    mu, nu = torch.lerp(mu, u, 1 - b1), b2 * nu + (1 - b2) * u * u
    hat = after * mu / (1 - product * after) + (1 - now) * u / (1 - product)
    return hat / (torch.sqrt(nu / (1 - b2**step)) + 1e-8), product, mu, nu


@fo.elementwise(state={"mean": fo.slot("first_update"), "start": fo.slot("param")})
def centred(u: Any, p: Any, mean: Any, start: Any, *, decay: Any = 0.5) -> Any:
    """A mean that starts as the first update, and the parameter as it was."""
    mean = decay * mean + (1 - decay) * u
    return u - mean + 0.1 * (p - start), mean, start


@fo.elementwise(state={"best": fo.slot(math.inf, per="leaf")}, extra=("value",))
def by_value(u: Any, best: Any, *, value: Any, patience: Any = 2.0) -> Any:
    """Smaller updates where the loss has not become smaller."""
    return torch.where(value < best, u, u / patience), torch.minimum(best, value)


@fo.elementwise
def two_norms(u: Any, p: Any, *, k: Any = 0.5) -> Any:
    """Two numbers for the whole tree, in one pass."""
    return u * fo.tree_norm(p) / fo.tree_amax(torch.abs(u)) + k * fo.tree_sum(u * p)


@fo.elementwise
def nested(u: Any, p: Any) -> Any:
    """A reduction of what depends on a reduction that depends on a reduction."""
    u = u / (1 + fo.tree_norm(u))
    u = u * fo.leaf_norm(u + p)
    return u / fo.tree_amax(torch.abs(u))


@fo.elementwise(state={"mu": fo.zeros, "nu": fo.zeros})
def looks_back(u: Any, mu: Any, nu: Any) -> Any:
    """The first pass could store both moments, and save bytes, if the second did not need an old one."""
    new, nu = 0.9 * mu + u, 0.5 * nu + u * u
    return mu / (1 + fo.leaf_norm(new) + fo.leaf_mean(nu) + nu), new, nu


@fo.elementwise(state={"first": fo.zeros, "second": fo.zeros})
def crossed(u: Any, first: Any, second: Any) -> Any:
    """Slots that change places."""
    return u + first, second + fo.tree_norm(u), first


@fo.elementwise(state={"seen": fo.zeros, "copy": fo.zeros, "one": fo.slot(per="leaf")})
def copies(u: Any, seen: Any, copy: Any, one: Any) -> Any:
    """Values that are stored as they were read, or are truth values, or are the same for a leaf."""
    return seen, u, u > 0, 1.0


@fo.elementwise(state={"mu": fo.zeros})
def same_everywhere(u: Any, mu: Any, *, step: Any, k: Any = 0.25) -> Any:
    """Values that are the same for every element, and stored for each."""
    return k / step, -k


State = dict[str, list[Any]]
Tensors = list[torch.Tensor]
norm, total = torch.linalg.vector_norm, torch.cat


def plain_novograd(us: Tensors, ps: Tensors, s: State, step: int, value: float) -> Tensors:
    for k, u in enumerate(us):
        square = u.square().sum()
        s["norm"][k] = square if step == 1 else 0.25 * s["norm"][k] + 0.75 * square
        s["mu"][k] = 0.9 * s["mu"][k] + u / (s["norm"][k].sqrt() + 1e-8)
    return list(s["mu"])


def plain_nadam(us: Tensors, ps: Tensors, s: State, step: int, value: float) -> Tensors:
    now, after = (0.9 * (1 - 0.5 * 0.96 ** (t * 0.004)) for t in (step, step + 1))
    out = []
    for k, u in enumerate(us):
        s["product"][k] = s["product"][k] * now
        s["mu"][k] = 0.9 * s["mu"][k] + 0.1 * u
        s["nu"][k] = 0.999 * s["nu"][k] + 0.001 * u * u
        hat = after * s["mu"][k] / (1 - s["product"][k] * after) + (1 - now) * u / (1 - s["product"][k])
        out.append(hat / ((s["nu"][k] / (1 - 0.999**step)).sqrt() + 1e-8))
    return out


def plain_centred(us: Tensors, ps: Tensors, s: State, step: int, value: float) -> Tensors:
    s["mean"] = [u if step == 1 else 0.5 * m + 0.5 * u for u, m in zip(us, s["mean"], strict=True)]
    return [u - m + 0.1 * (p - start) for u, m, p, start in zip(us, s["mean"], ps, s["start"], strict=True)]


def plain_by_value(us: Tensors, ps: Tensors, s: State, step: int, value: float) -> Tensors:
    out = [u if value < best else u / 2 for u, best in zip(us, s["best"], strict=True)]
    s["best"] = [best.clamp(max=value) for best in s["best"]]
    return out


def plain_two_norms(us: Tensors, ps: Tensors, s: State, step: int, value: float) -> Tensors:
    u, p = total([x.flatten() for x in us]), total([x.flatten() for x in ps])
    return [x * norm(p) / u.abs().amax() + 0.5 * (u * p).sum() for x in us]


def plain_nested(us: Tensors, ps: Tensors, s: State, step: int, value: float) -> Tensors:
    clip = 1 + norm(total([x.flatten() for x in us]))
    us = [u / clip * norm(u / clip + p) for u, p in zip(us, ps, strict=True)]
    return [u / total([x.flatten() for x in us]).abs().amax() for u in us]


def plain_looks_back(us: Tensors, ps: Tensors, s: State, step: int, value: float) -> Tensors:
    old, s["mu"] = s["mu"], [0.9 * mu + u for u, mu in zip(us, s["mu"], strict=True)]
    s["nu"] = [0.5 * nu + u * u for u, nu in zip(us, s["nu"], strict=True)]
    return [mu / (1 + norm(new) + nu.mean() + nu) for mu, new, nu in zip(old, s["mu"], s["nu"], strict=True)]


def plain_crossed(us: Tensors, ps: Tensors, s: State, step: int, value: float) -> Tensors:
    first, s["first"] = s["first"], [x + norm(total([u.flatten() for u in us])) for x in s["second"]]
    s["second"] = first
    return [u + x for u, x in zip(us, first, strict=True)]


def plain_copies(us: Tensors, ps: Tensors, s: State, step: int, value: float) -> Tensors:
    seen, s["seen"], s["copy"] = s["seen"], us, [(u > 0).double() for u in us]
    s["one"] = [torch.ones((), dtype=F64)] * len(us)
    return seen


def plain_same_everywhere(us: Tensors, ps: Tensors, s: State, step: int, value: float) -> Tensors:
    s["mu"] = [torch.full_like(u, -0.25) for u in us]
    return [torch.full_like(u, 0.25 / step) for u in us]


class Kind(NamedTuple):
    """A rule, the same in plain torch, and how many passes over memory it takes."""

    tx: fo.GradientTransformation
    plain: Callable[[Tensors, Tensors, State, int, float], Tensors]
    passes: int


KINDS = {
    "novograd": Kind(novograd(), plain_novograd, 2),
    "nadam": Kind(nadam(), plain_nadam, 1),
    "centred": Kind(centred(), plain_centred, 1),
    "by_value": Kind(by_value(), plain_by_value, 1),
    "two_norms": Kind(two_norms(), plain_two_norms, 2),
    "nested": Kind(nested(), plain_nested, 4),
    "looks_back": Kind(looks_back(), plain_looks_back, 2),
    "crossed": Kind(crossed(), plain_crossed, 2),
    "copies": Kind(copies(), plain_copies, 1),
    "same_everywhere": Kind(same_everywhere(), plain_same_everywhere, 1),
}
SHORT = 1 << 14  # elements of a chunk, so that three of them are no longer sum than is needed
# a leaf of one element, one between blocks, and one of three chunks for C and for Triton
LARGE = {"c": 2 * SHORT + 5, "triton": 2 * 4096 + 5}


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donate"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", KINDS)
def test_rules_of_all_kinds(name: str, backend: str, donate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over three steps, in float64."""
    monkeypatch.setattr(launch, "CHUNK", SHORT)
    kind = KINDS[name]
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, generator=generator, dtype=F64) for n in (1, 1025, LARGE.get(backend, 40))]
    grads = [[torch.randn(x.shape, generator=generator, dtype=F64) for x in leaves] for _ in range(STEPS)]
    params, plain = [x.clone() for x in leaves], leaves
    state: Any = kind.tx.init(params)
    s: State = {k: [x.clone() for x in v] for k, v in state._asdict().items() if k != "count"}
    for step, g in enumerate(grads, 1):
        value = abs(step - 2.0)
        with only(backend):
            params, state = fo.apply_gradients(
                kind.tx, params, [x.clone() for x in g], state, donate=donate, value=value
            )
        plain = [p + u for p, u in zip(plain, kind.plain(g, plain, s, step, value), strict=True)]
    # sums over 33,000 numbers of the order of one, in another order: their roundings are random, and 200 of 2**-53
    # in all; what divides by them and what is divided, over three steps, adds some ten more
    actual = (params, {k: list(v) for k, v in state._asdict().items() if k != "count"})
    torch.testing.assert_close(actual, (plain, s), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_passes_of_rules_of_all_kinds(name: str) -> None:
    assert fo.explain(KINDS[name].tx, torch.zeros(3)).passes == KINDS[name].passes


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_hyper_parameters_are_rows_of_one_program(backend: str) -> None:
    """Numbers, 0-d tensors and schedules of their own, for leaves in any order."""
    rates: list[Any] = [0.5, torch.tensor(0.25), torch.tensor(2.0, dtype=F64), 1, torch.tensor(3, dtype=torch.int32)]
    tx = fo.partition({str(k): fo.sgd(x, momentum=0.5) for k, x in enumerate(rates)}, lambda path, p: path[-1])
    params = {f"{k}.{(7 * k) % 5}": torch.zeros(k % 4 + 1) for k in range(23)}
    grads = {name: torch.full_like(p, 1.0 + k) for k, (name, p) in enumerate(params.items())}
    expected = {name: -float(rates[int(name[-1])]) * g for name, g in grads.items()}

    with only(backend):
        updates, _ = tx.update(grads, tx.init(params), params)
    [kernel] = fo.explain(tx, params).kernels

    torch.testing.assert_close(updates, expected, rtol=0, atol=0)  # small whole numbers and powers of two
    assert kernel.rows == len(rates)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tree_reduction_spans_programs(backend: str) -> None:
    """Leaves of other dtypes are other programs, which meet in one norm."""
    params = {"a": torch.zeros(2), "b": torch.zeros(2).bfloat16(), "c": torch.zeros((), dtype=F64)}
    grads = {
        "a": torch.tensor([2.0, 4.0]),
        "b": torch.tensor([5.0, 6.0]).bfloat16(),
        "c": torch.tensor(12.0, dtype=F64),
    }
    tx = fo.clip_by_global_norm(7.5)
    with only(backend):
        updates, _ = tx.update(grads, tx.init(params), params)
    # the norm is 15, and a half of each number is exact
    torch.testing.assert_close(updates, {k: x / 2 for k, x in grads.items()}, rtol=0, atol=0)


# -- threads ------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


RECIPES: Mapping[str, fo.GradientTransformation] = {
    "clipped adamw with average": fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-2), fo.params_ema(0.9)),
    "lamb": fo.lamb(1e-2, weight_decay=0.1),
    "three reductions": nested(),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_c_gives_the_same_bits_for_any_number_of_threads(
    name: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    tx = RECIPES[name]
    generator = torch.Generator().manual_seed(0)
    sizes = (5 * CHUNK + 3, 7, CHUNK, 3 * CHUNK - 1)
    start = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
    grads = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
    results = []
    for n in (1, 2, 4):
        threads(n)
        params, state = start, tx.init(start)
        for _ in range(STEPS):
            with only("c"):
                params, state = fo.apply_gradients(tx, params, grads, state)
        results.append(tensors((params, state)))
    torch.testing.assert_close(results[1:], [results[0]] * 2, rtol=0, atol=0)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_c_takes_many_small_leaves_at_once(name: str, n_threads: int, threads: Callable[[int], None]) -> None:
    """A thread takes the chunks of several leaves, among them some of a leaf that has more than one."""
    tx = RECIPES[name]
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 200, (300,), generator=generator).tolist()
    sizes[100], sizes[299] = CHUNK + 70, 2 * CHUNK + 1
    start = [torch.randn(n, generator=generator, dtype=F64) for n in sizes]
    grads = [torch.randn(n, generator=generator, dtype=F64) for n in sizes]
    threads(n_threads)
    results = []
    for backend in ("reference", "c"):
        params, state = start, tx.init(start)
        for _ in range(STEPS):
            with only(backend):
                params, state = fo.apply_gradients(tx, params, grads, state)
        results.append((params, state))
    # norms of up to 130,000 numbers, added up in another order: 2**-53 for each of 360 roundings that do not cancel,
    # and some ten times that for what follows from them in three steps
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


# -- memory -------------------------------------------------------------------------------------------------------


RULED = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-2), fo.params_ema(0.9))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pure_step_leaves_its_arguments_alone(backend: str) -> None:
    params = [laid_out(torch.randn(3, 4), layout) for layout in LAYOUTS]
    grads = [laid_out(torch.randn(3, 4), layout) for layout in [*LAYOUTS[1:], "expanded"]]
    state = RULED.init(params)
    before = [x.clone() for x in tensors((params, grads, state))]
    with only(backend):
        fo.apply_gradients(RULED, params, grads, state)
    torch.testing.assert_close(tensors((params, grads, state)), before, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_donated_step_writes_where_its_arguments_are(backend: str) -> None:
    """And nowhere else: not between the elements of a slice, nor before and after it."""
    params = [laid_out(torch.randn(3, 4), layout) for layout in LAYOUTS]
    grads = [laid_out(torch.randn(3, 4), layout) for layout in [*LAYOUTS[1:], "expanded"]]
    state = RULED.init(params)
    expected = fo.apply_gradients(RULED, params, grads, state)
    places = [x.data_ptr() for x in tensors((params, state))]
    with only(backend):
        result = fo.apply_gradients(RULED, params, grads, state, donate=True)
    assert [x.data_ptr() for x in tensors(result)] == places
    holes = params[LAYOUTS.index("sliced")].as_strided((3, 4), (8, 2), 1)
    torch.testing.assert_close(holes, torch.full((3, 4), 7.0), rtol=0, atol=0)
    assert_alike(result, expected)
