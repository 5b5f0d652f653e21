"""Numbers at the extremes of their dtypes, as updates and parameters, and the bounds of hyper-parameters."""

import math
from typing import Any

import optree
import torch

from _lib.records import tree_of
from _lib.transforms import CASES
from _lib.trees import Tree
from functional_optim._compiler.rule import NUMBER, Range


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def rules_of(tx: Any) -> list[Any]:
    """The rules of a transformation, inside a mask or not."""
    tx = getattr(tx, "inner", tx)
    return [tx._bound.rule] if tx._bound else []


def stores_squares(tx: Any) -> bool:
    return any(slot.square for rule in rules_of(tx) for slot in rule.slots.values())


def multiplies_by_a_norm(tx: Any) -> bool:
    """Whether updates become some twenty times as large, the norm of the largest leaf."""
    return any(rule.name == "scale_by_param_block_norm" for rule in rules_of(tx))


def magnitude(kind: str, tx: Any, dtype: torch.dtype) -> tuple[float, ...]:
    """The numbers that elements take in turn.

    A slot of squares is stored per element, so its numbers are those whose squares float32 holds. float16 has numbers
    that three steps of momentum do not carry out of its range, and whose squares are far outside of it.
    """
    huge = 1e4 if dtype is F16 else 1e18 if stores_squares(tx) else 1e37
    huge /= 100 if multiplies_by_a_norm(tx) else 1
    tiny = 1e-3 if dtype is F16 else 1 / huge
    return {"zero": (0.0,), "tiny": (tiny,), "huge": (huge,), "equal": (1.0,), "mixed": (0.0, tiny, 1.0, huge)}[kind]


KINDS = ("zero", "tiny", "huge", "equal", "mixed")


def tree(numbers: tuple[float, ...], dtype: torch.dtype) -> Tree:
    """A tree whose elements take numbers in turn; squares of 1e18 add up to more than float32 holds.

    Signs differ between leaves and nowhere else: no sum of the formulas cancels, and every element is compared.
    """
    signs = iter((1.0, -1.0, 1.0))

    def make(*shape: int) -> torch.Tensor:
        n = math.prod(shape)
        x = torch.tensor(numbers, dtype=F64).repeat(-(-n // len(numbers)))[-n:]
        return (next(signs) * x).reshape(shape).to(dtype)

    return tree_of(make)


def gradients(kind: str, tx: Any, dtype: torch.dtype, step: int) -> Tree:
    growth = 1.0 if kind == "equal" else 1 + step / 4
    return tree(tuple(growth * x for x in magnitude(kind, tx, dtype)), dtype)


def cast(x: Tree, dtype: torch.dtype) -> Tree:
    return optree.tree_map(lambda y: y.to(dtype) if y.is_floating_point() else y, x)


def cancels(case: Any) -> bool:
    """Whether formulas take a difference, of which rounding leaves another number than float64 does."""
    return case.id.startswith("scale_by_stddev")


def _is_bounded(interval: Any) -> bool:
    return isinstance(interval, Range) and interval.text != NUMBER


def at_bounds() -> dict[str, Any]:
    """The rules of the table with one number at a bound that it may have.

    Not `eps`: who sets it to 0 asks for 0 / 0 at a gradient of 0. Where any number is allowed there is no bound.
    """
    found: dict[str, Any] = {}
    for case in CASES:
        for rule in rules_of(case.ours) if case.ours._bound else []:
            for hyper in sorted({key.partition(" if ")[0] for key in rule.ranges} - {"eps"}):
                interval = rule.ranges.get(hyper)
                for x in (interval.low, interval.high) if _is_bounded(interval) else ():
                    try:
                        found[f"{case.id}-{hyper}={x:g}"] = case.ours.replace(**{hyper: x})
                    except ValueError:
                        continue  # an open end
    return found


BOUNDS = at_bounds()
