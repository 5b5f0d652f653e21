"""The time to compile a whole train step with Inductor, and the time of a compiled step, by the form of the optimizer.

    python benchmarks/compiled_step.py
    python benchmarks/compiled_step.py --layers 2,24 --tiny
    python benchmarks/compiled_step.py --layers "" --packed 1000

A model of linear layers of 16x16 (two tensors each) is trained by clip, AdamW and an average of the parameters. Forms:
loss and gradients alone; the step as one operation, pure, in place, and as `update` with `apply_updates`; and traced
into the graph, in place. Compile times are seconds of the processor, of this process and its children, without caches.

With `--packed`, that many tensors of 16x16 are packed, and a loss multiplies by all of them at once.
"""

import argparse
import contextlib
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.func import functional_call, grad_and_value

import functional_optim as fo


ALONE, PURE, IN_PLACE, UPDATE, TRACED = "loss and gradients", "pure", "in place", "update", "traced, in place"
FORMS = (ALONE, PURE, IN_PLACE, UPDATE, TRACED)


def train_step(form: str, loss_of: Callable[..., torch.Tensor], tx: fo.GradientTransformation) -> Callable[..., Any]:
    """A train step in one form."""

    def step(params: Any, state: Any, x: torch.Tensor) -> Any:
        grads, loss = grad_and_value(loss_of)(params, x)
        if form == ALONE:
            return grads, state, loss
        if form == UPDATE:
            updates, state = tx.update(grads, state, params)
            return fo.apply_updates(params, updates), state, loss
        params, state = fo.apply_gradients(tx, params, grads, state, donate=form in (IN_PLACE, TRACED))
        return params, state, loss

    return step


def seconds() -> float:
    """Time of the processor that this process and its children have taken."""
    return sum(os.times()[:4])


def layered(layers: int) -> tuple[Any, Callable[..., torch.Tensor]]:
    """Parameters of linear layers, and a loss."""
    model = torch.nn.Sequential(*[x for _ in range(layers) for x in (torch.nn.Linear(16, 16), torch.nn.Tanh())])
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    return params, lambda params, x: functional_call(model, params, (x,)).square().mean()


def packed(n: int) -> tuple[Any, Callable[..., torch.Tensor]]:
    """Packed matrices, and a loss."""
    params = fo.pack({f"matrix{k}": torch.randn(16, 16) for k in range(n)})
    return params, lambda params, x: torch.tanh(x @ params.buffers[0].view(n, 16, 16)).square().mean()


def measure(form: str, params: Any, loss_of: Callable[..., torch.Tensor], steps: int) -> tuple[float, float]:
    """Seconds to compile, and milliseconds of a step."""
    torch.compiler.reset()
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-3), fo.params_ema(0.9))
    state, x = tx.init(params), torch.randn(8, 16)
    compiled = torch.compile(train_step(form, loss_of, tx), fullgraph=True)
    with fo.use_backend("reference") if form == TRACED else contextlib.nullcontext():
        before = seconds()
        compiled(params, state, x)
        spent, times = seconds() - before, []
        for _ in range(steps):
            start = time.perf_counter()
            compiled(params, state, x)
            times.append(time.perf_counter() - start)
    return spent, 1e3 * median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="4,24", help="numbers of layers")
    parser.add_argument("--packed", default="1000", help="numbers of packed tensors")
    parser.add_argument("--forms", default="", help="the beginnings of those forms that are measured, with commas")
    parser.add_argument("--steps", type=int, default=100, help="steps that are timed")
    parser.add_argument("--tiny", action="store_true", help="one layer and three steps, to see that it runs")
    args = parser.parse_args()
    import torch._inductor.config

    torch._inductor.config.force_disable_caches = True
    torch.set_num_threads(1)
    torch.compile(torch.sin)(torch.ones(3))  # the compiler starts
    layers, sizes = [list(map(int, filter(None, text.split(",")))) for text in (args.layers, args.packed)]
    if args.tiny:
        layers, sizes = [1], [2]
    cases = [(f"{2 * n} tensors", n, layered) for n in layers] + [(f"{n} tensors, packed", n, packed) for n in sizes]
    for title, n, make in cases:
        print(title)
        for form in FORMS:
            if (form == TRACED and make is packed) or not form.startswith(tuple(args.forms.split(","))):
                continue
            compiling, step = measure(form, *make(n), 3 if args.tiny else args.steps)
            print(f"  {form:20} compiles in {compiling:5.1f} s, then {step:6.3f} ms a step", flush=True)


if __name__ == "__main__":
    main()
