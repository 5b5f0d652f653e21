"""Every backend against plain torch: rules of all kinds, rows of one program, norms across programs."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import functional_optim as fo
from _lib.backends import STEPS, only
from _lib.chains import nested
from _lib.marks import INTERPRETER, OPTIMIZED
from _lib.trees import F64
from functional_optim._runtime import cpu
from functional_optim._runtime.backend import BACKENDS


pytestmark = [INTERPRETER, OPTIMIZED]


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
    monkeypatch.setattr(cpu, "CHUNK", SHORT)
    kind = KINDS[name]
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, generator=generator, dtype=F64) for n in (1, 1025, LARGE.get(backend, 40))]
    grads = [[torch.randn(x.shape, generator=generator, dtype=F64) for x in leaves] for _ in range(STEPS)]
    params, plain = [x.clone() for x in leaves], leaves
    state: Any = kind.tx.init(params)
    s: State = {k: [x.clone() for x in v] for k, v in state._asdict().items() if k != "count"}
    for step, g in enumerate(grads, 1):
        value = abs(step - 2.0)
        extra = {"value": value} if name == "by_value" else {}
        with only(backend):
            params, state = fo.apply_gradients(kind.tx, params, [x.clone() for x in g], state, donate=donate, **extra)
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
