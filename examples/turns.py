"""The times of two ways to take the same step, for the other examples."""

import random
import time
from collections.abc import Callable
from statistics import median


Step = Callable[[], object]


def compare(ours: Step, theirs: Step, seconds: float = 2.0, rounds: int = 1000, other: str = "torch.optim") -> str:
    """A sentence about the times of two steps.

    The two take turns within each round, in an order drawn anew, so that other work on the machine disturbs both; what
    is said of them together is the median over the ratios of each round.

    Args:
      ours: a step of this package.
      theirs: the same step in another way, as in torch.optim.
      seconds: the time after which no new round begins.
      rounds: the most turns of each; a turn is one step.
      other: the way of the other step.
    """
    steps: dict[str, Step] = {"ours": ours, "theirs": theirs}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    order, shuffle = list(steps), random.Random(0)
    while not samples["ours"] or (len(samples["ours"]) < rounds and time.perf_counter() < end):
        shuffle.shuffle(order)
        for name in order:
            start = time.perf_counter()
            steps[name]()
            samples[name].append(time.perf_counter() - start)
    a, b = (1e6 * median(samples[name]) for name in ("ours", "theirs"))
    ratio = median(y / x for x, y in zip(samples["ours"], samples["theirs"], strict=True))
    return (
        f"median time of a step in {len(samples['ours'])} turns: {a:.0f} us here, {b:.0f} us in {other}, "
        f"which takes {ratio:.2f} times as long (median of the ratios)"
    )
