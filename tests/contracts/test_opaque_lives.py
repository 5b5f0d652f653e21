"""Opaque transformations in the lives of optimizers: they go the way of rules with the same formula.

Groups with switches of their own, other orders, files, restarts, parameters that come and go.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.twins import by_norm, doubled, kept, momentum, opaque_by_norm, opaque_momentum
from functional_optim.adapters import TransformOptimizer


STEPS = 20


@fo.elementwise(state={"total": fo.slot(0.0)})
def and_entered(u: Any, before: Any, total: Any) -> Any:
    """The updates of the inner transformations, and a share of a sum of the updates that entered."""
    total = total + before
    return u + 0.1 * total, total


class Life:
    """An optimizer over two groups of two parameters, in float64, with an entry of a log for each step.

    Args:
      tx: the chain.
      **options: options of the second group.
    """

    def __init__(self, tx: fo.GradientTransformation, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tx, self.options = tx, options
        draw = lambda *shape: torch.nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))  # noqa: E731
        self.params = {"a": draw(3, 2), "b": draw(3), "c": draw(2, 2), "d": draw(4)}
        self.opt = self.make(("ab", "cd"))

    def make(self, groups: Iterable[str]) -> TransformOptimizer:
        """An optimizer over groups of parameters."""
        made = [{"params": [(k, self.params[k]) for k in names]} for names in groups]
        made[1] |= self.options
        return TransformOptimizer(made, self.tx)

    def run(self, event: Callable[["Life", int], None]) -> list[torch.Tensor]:
        """All parameters, after steps with events before them."""
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(1 + step)
            for p in self.params.values():
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            event(self, step)
            self.opt.step()
        return [p.detach() for p in self.params.values()]


def flip(option: str, group: int, value: Any) -> Callable[[Life, int], None]:
    """An option of a group that changes before the sixth step, and back before the eleventh."""

    def event(life: Life, step: int) -> None:
        if step == 5:
            life.before = life.opt.param_groups[group][option]  # type: ignore[attr-defined]
            life.opt.param_groups[group][option] = value
        elif step == 10:
            life.opt.param_groups[group][option] = life.before  # type: ignore[attr-defined]

    return event


def reverse(life: Life, step: int) -> None:
    if step == 5:
        life.opt.param_groups.reverse()


def load_in_another_order(life: Life, step: int) -> None:
    if step in (5, 10):
        saved = copy.deepcopy(life.opt.state_dict())
        life.opt = life.make(("dc", "ba") if step == 5 else ("ba", "cd"))
        life.opt.load_state_dict(saved, by_name=True)


def add_late(life: Life, step: int) -> None:
    if step == 0:
        life.opt.param_groups.pop(0)
    elif step == 5:
        life.opt.add_param_group({"params": [(k, life.params[k]) for k in "ab"]})


def some_absent(life: Life, step: int) -> None:
    for k, name in enumerate("abcd"):
        if step % 4 == k:
            life.params[name].grad = None


def remove_first(life: Life, step: int) -> None:
    if step == 10:
        for p in life.opt.param_groups.pop(0)["params"]:
            del life.opt.state[p]


def restart_one(life: Life, step: int) -> None:
    if step == 10:
        del life.opt.state[life.params["a"]]


def copied(life: Life, step: int) -> None:
    if step == 5:
        grads = {k: p.grad for k, p in life.params.items()}  # which copies of parameters lack
        life.opt, life.params = copy.deepcopy((life.opt, life.params))
        for k, p in life.params.items():
            p.grad = grads[k]


EVENTS: dict[str, Callable[[Life, int], None]] = {
    "none": lambda life, step: None,
    "maximize": flip("maximize", 0, True),
    "maximize, second group": flip("maximize", 1, True),
    "a switch": flip("nesterov", 0, True),
    "a switch, second group": flip("nesterov", 1, True),
    "groups in another order": reverse,
    "a file in another order": load_in_another_order,
    "a group that comes late": add_late,
    "gradients that are absent": some_absent,
    "a group that goes": remove_first,
    "one that restarts": restart_one,
    "a copy": copied,
}
TRACE = fo.trace(0.5, nesterov=False)
CHAINS: dict[str, Callable[[Any, Any], fo.GradientTransformation]] = {
    "alone": lambda sums, norm: fo.chain(sums, fo.scale(-0.1)),
    "with a switch": lambda sums, norm: fo.chain(sums, TRACE, fo.scale(-0.1)),
    "behind a switch": lambda sums, norm: fo.chain(TRACE, sums, fo.scale(-0.1)),
    "of the tree": lambda sums, norm: fo.chain(TRACE, norm, fo.scale(-0.1)),
    "two": lambda sums, norm: fo.chain(TRACE, sums, fo.ema(0.2), norm, fo.scale(-0.1)),
    "behind a partition": lambda sums, norm: fo.chain(
        fo.partition(
            {"x": fo.chain(fo.scale(2.0), fo.scale(0.7)), "y": fo.trace(0.5)},
            lambda path, p: "x" if path == "a" else "y",
        ),
        sums,
        fo.scale(-0.1),
    ),
    "masked": lambda sums, norm: fo.chain(TRACE, fo.masked(fo.chain(norm, sums), "a|c|d"), fo.scale(-0.1)),
    "inside a rule": lambda sums, norm: fo.chain(and_entered(fo.chain(TRACE, sums, norm)), fo.scale(-0.1)),
}


OPTIONS: dict[str, dict[str, Any]] = {"alike": {}, "maximize": {"maximize": True}, "nesterov": {"nesterov": True}}
WITHOUT_SWITCH = {"alone", "behind a partition"}
LIVES = [
    (chain, options, event)
    for chain in CHAINS
    for options in OPTIONS
    for event in EVENTS
    if chain not in WITHOUT_SWITCH or not (options == "nesterov" or "switch" in event)
]


@pytest.mark.parametrize(("chain", "options", "event"), LIVES)
def test_it_goes_the_way_of_a_rule(chain: str, options: str, event: str) -> None:
    ways = [CHAINS[chain](momentum(), by_norm()), CHAINS[chain](opaque_momentum(), opaque_by_norm())]

    expected, found = (Life(tx, **OPTIONS[options]).run(EVENTS[event]) for tx in ways)

    # a norm adds up in another order
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_lbfgs_over_groups_with_switches() -> None:
    """Where a decay is 0, both forms of momentum are one."""
    matrix = torch.diag(torch.arange(1.0, 18.0, dtype=torch.float64))

    def descend(life: Life, step: int) -> None:
        x = torch.cat([p.detach().flatten() for p in life.params.values()])
        for p, g in zip(life.params.values(), (matrix @ x).split([6, 3, 4, 4]), strict=True):
            p.grad = g.view_as(p)

    tx = fo.chain(fo.trace(0.0, nesterov=False), fo.scale_by_lbfgs(memory_size=3), fo.scale(-0.3))
    expected, found = Life(tx).run(descend), Life(tx, nesterov=True).run(descend)

    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# -- reductions in front ----------------------------------------------------------------------------------------------


CLIP = fo.clip_by_global_norm(0.5)
REDUCED: dict[str, Callable[[], fo.GradientTransformation]] = {
    "between rules for whole tensors": lambda: fo.chain(doubled(), CLIP, doubled(), fo.clip_by_global_norm(0.9)),
    "between opaque ones": lambda: fo.chain(opaque_momentum(), CLIP, opaque_by_norm(), fo.clip_by_global_norm(0.9)),
    "inside, opaque behind it": lambda: kept(fo.chain(CLIP, opaque_momentum())),
    "inside, whole tensors behind it": lambda: kept(fo.chain(CLIP, doubled())),
    "inside, whole tensors in front": lambda: kept(fo.chain(doubled(), CLIP)),
    "inside twice": lambda: kept(fo.chain(CLIP, kept(fo.chain(fo.clip_by_global_norm(0.3), opaque_momentum())), CLIP)),
    "inside and behind": lambda: fo.chain(CLIP, kept(fo.chain(doubled(), momentum())), fo.clip_by_global_norm(0.7)),
    "of rules alone": lambda: fo.chain(kept(fo.chain(CLIP, momentum())), fo.clip_by_global_norm(0.7)),
    "in a partition": lambda: fo.chain(
        fo.partition({"x": fo.chain(doubled(), CLIP), "y": CLIP}, lambda path, p: "x" if path in "ac" else "y"), CLIP
    ),
}


@pytest.mark.parametrize("reduced", REDUCED)
@pytest.mark.parametrize("event", ["none", "a switch", "gradients that are absent", "groups in another order"])
def test_reductions_over_the_tree_are_those_of_all_groups(reduced: str, event: str) -> None:
    """The pure functions know no groups; a switch without effect makes other chains of them."""
    same = fo.trace(0.0, nesterov=False)  # both forms are one where the decay is 0
    chain = fo.chain(same, REDUCED[reduced](), fo.scale(-0.1))
    alike, others = Life(chain), Life(chain, nesterov=True)
    pure = {k: p.detach().clone() for k, p in alike.params.items()}
    state = chain.init(pure)
    found, expected = others.run(EVENTS[event]), alike.run(EVENTS["none" if "switch" in event else event])

    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if event != "gradients that are absent":
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(1 + step)
            grads = {k: torch.randn(p.shape, generator=generator, dtype=torch.float64) for k, p in pure.items()}
            pure, state = fo.apply_gradients(chain, pure, grads, state)
        torch.testing.assert_close(found, list(pure.values()), rtol=1e-12, atol=1e-12)
