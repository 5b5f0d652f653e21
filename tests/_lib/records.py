"""Trees, gradients and step-by-step records, for comparing implementations of the same formula.

A record holds the values of every step stacked along a new first dimension, so that one comparison covers a whole
run and its message names the leaf and, as the first index, the step.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
import optree
import torch

import functional_optim as fo
from _lib.trees import Tree, clone


STEPS = 25
BACKENDS = ("reference", "foreach", "c", "triton")

# Triton's interpreter takes 10 ms per leaf and step, hundreds of times what the others take. It computes the first
# and the last step, where the step number is small and large, and the C kernel carries its state from one to the
# other. Every step is compared.
INTERPRETED = frozenset({0, STEPS - 1})

# Two computations in double precision that order the same operations differently are a few units of 2**-53 apart in
# each operation. The largest magnifier is 1 - b2**t, which loses three of the sixteen digits at t = 1 and
# b2 = 0.999: 2**-53 / 1e-3 = 1.1e-13. So 1e-12 relative.
RTOL = 1e-12
# Where terms of order one cancel, what remains carries their rounding errors, however small it is itself: 8 of them.
ATOL = 2.0**-50


@contextlib.contextmanager
def use(backend: str, step: int = 0) -> Iterator[None]:
    """Chooses the backend of a step: the one asked for, unless it is too slow to compute them all.

    Triton's interpreter works with NumPy, which warns of what a GPU does silently: 1 / 0, log(0), 0 * inf.
    """
    chosen = fo.use_backend("c" if backend == "triton" and step not in INTERPRETED else backend)
    with chosen, np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="triton")
        yield


def to_tensor(x: Any) -> torch.Tensor:
    """An array as a tensor, with truth values and counters as this package stores them."""
    x = np.array(x)
    return torch.from_numpy(x.astype({"b": np.float64, "i": np.int64}.get(x.dtype.kind, x.dtype)))


def to_tensors(tree: Tree) -> Tree:
    """A tree of arrays as a tree of tensors."""
    return jax.tree.map(to_tensor, tree)


def to_arrays(tree: Tree) -> Tree:
    """A tree of tensors as a tree of JAX's arrays."""
    return jax.tree.map(lambda x: jax.numpy.asarray(x.numpy()), tree)


def stack(records: Sequence[Tree]) -> Tree:
    """Trees of the same structure as one tree, with the step as the first dimension of every leaf."""
    return optree.tree_map(lambda *xs: torch.stack(xs), *records)


def tree_of(make: Callable[..., torch.Tensor]) -> Tree:
    """A tree of every kind of container, with a 0-d leaf and one of a few hundred elements."""
    return {"layers": [make(29, 13), (make(5),)], "scale": make()}


def normal(seed: int, dtype: torch.dtype = torch.float64) -> Tree:
    """A tree of normal deviates."""
    generator = torch.Generator().manual_seed(seed)
    return tree_of(lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))


@functools.cache
def parameters(step: int) -> Tree:
    """Parameters as they might be before a step; the 0-d one vanishes in every fourth."""
    tree = normal(1000 + step)
    return {**tree, "scale": tree["scale"] * (step % 4 != 0)}


@functools.cache
def gradients(kind: str, step: int) -> Tree:
    """The gradients of a step.

    Args:
      kind: "normal" deviates; the same "with_zeros", where one leaf vanishes in every third step; "with_nans", where
        some elements are NaN or infinite; or "alternating" in sign, between 1/2 and 2 in size and multiples of 1/64.
      step: 0-based.
    """
    tree = normal(step)
    if kind == "with_zeros":
        weight, (bias,) = tree["layers"]
        tree["layers"] = [weight, (bias * (step % 3 != 0),)]
    elif kind == "with_nans":
        for x in optree.tree_leaves(tree):
            x.view(-1)[step % 4 :: 7] = torch.nan
            x.view(-1)[step % 4 + 1 :: 7] = torch.inf
    elif kind == "alternating":
        tree = optree.tree_map(lambda x: (-1) ** step * torch.round(64 * (0.5 + 1.5 * torch.sigmoid(x))) / 64, tree)
    else:
        assert kind == "normal"
    return tree


def fields(state: Any) -> dict[str, Tree]:
    """The fields of a state of either package, inside a mask or not."""
    return getattr(state, "inner_state", state)._asdict()


def run_updates(tx: Any, kind: str, backend: str = "reference") -> Tree:
    """Records updates and states of one of our transformations, over steps whose parameters are given."""
    state, records = tx.init(parameters(0)), []
    for step in range(STEPS):
        with use(backend, step):
            updates, state = tx.update(gradients(kind, step), state, parameters(step))
        records.append({"updates": updates, "state": fields(state)})
    return stack(records)


def run_optax_updates(tx: Any, kind: str) -> Tree:
    """The same record of a transformation of optax."""
    state, records = tx.init(to_arrays(parameters(0))), []
    for step in range(STEPS):
        updates, state = tx.update(to_arrays(gradients(kind, step)), state, to_arrays(parameters(step)))
        records.append(to_tensors({"updates": updates, "state": fields(state)}))
    return stack(records)


def run_params(tx: Any, backend: str = "reference", donate: bool = False, steps: int = STEPS) -> Tree:
    """Records parameters under one of our optimizers."""
    params, records = normal(1000), []
    state = tx.init(params)
    for step in range(steps):
        with use(backend, step):
            params, state = fo.apply_gradients(tx, params, gradients("normal", step), state, donate=donate)
        records.append(clone(params))
    return stack(records)


def run_optax_params(tx: Any) -> Tree:
    """The same record of an optimizer of optax."""
    params, records = to_arrays(normal(1000)), []
    state = tx.init(params)
    for step in range(STEPS):
        updates, state = tx.update(to_arrays(gradients("normal", step)), state, params)
        params = optax.apply_updates(params, updates)
        records.append(to_tensors(params))
    return stack(records)


def double(schedule: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A schedule of optax in double precision; its counters are int32, whose quotients JAX rounds to float32."""
    return lambda count: schedule(jax.numpy.float64(count))
