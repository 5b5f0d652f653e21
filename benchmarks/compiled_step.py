"""The time to compile a whole train step with Inductor, and the time of a compiled step, by the form of the optimizer.

    python benchmarks/compiled_step.py
    python benchmarks/compiled_step.py --layers 2,24 --tiny
    python benchmarks/compiled_step.py --layers "" --packed "" --models

A model of linear layers of 16x16 (two tensors each) is trained by clip, AdamW and an average of the parameters. Forms:
loss and gradients alone; the step as one operation, pure, in place, and as `update` with `apply_updates`; and traced
into the graph, in place. Compile times are seconds of the processor, of this process and its children, without caches,
and what a step adds to those of loss and gradients, which differ by a second or two from run to run. Graphs are counted
over twenty steps of a schedule, and of an optimizer whose learning rate changes.

With `--packed`, that many tensors of 16x16 are packed, and a loss multiplies by all of them at once. With `--models`,
train steps of a small network on images of digits and of a small transformer follow: compiled whole, beside a compiled
loss, `backward`, and torch's fused AdamW, in turns.
"""

import argparse
import contextlib
import functools
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.func import functional_call, grad_and_value

import functional_optim as fo
from functional_optim.adapters import AdamW


ALONE, PURE, IN_PLACE, UPDATE, TRACED = "loss and gradients", "pure", "in place", "update", "traced, in place"
FORMS = (ALONE, PURE, IN_PLACE, UPDATE, TRACED)
# seconds that a step may add to the time to compile loss and gradients
GOALS = {("48 tensors", PURE): 2.0, ("48 tensors", IN_PLACE): 3.0}
GOALS |= {("1000 tensors, packed", form): 5.0 for form in (PURE, IN_PLACE)}


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


def graphs() -> dict[str, int]:
    """The numbers of graphs that are compiled for twenty steps whose learning rates differ."""
    made: dict[str, int] = {}

    def noting(name: str) -> Callable[..., Any]:
        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            made[name] = made.get(name, 0) + 1
            return graph

        return backend

    torch.compiler.reset()
    params, loss_of = layered(4)
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(fo.cosine_decay_schedule(1e-3, 20)))
    x = torch.randn(8, 16)
    for form in (PURE, IN_PLACE):
        step = torch.compile(train_step(form, loss_of, tx), fullgraph=True, backend=noting(f"schedule, {form}"))
        state = tx.init(params)
        for _ in range(20):
            params, state, _ = step(params, state, x)
    weights = [torch.nn.Parameter(p) for p in params.values()]
    optimizer = AdamW(weights, lr=1e-3)
    for p in weights:
        p.grad = torch.ones_like(p)
    run = torch.compile(optimizer.step, fullgraph=True, backend=noting("optimizer, a float that changes"))
    for k in range(20):
        optimizer.param_groups[0]["lr"] = 1e-3 / (k + 1)
        run()
    return made


class Transformer(torch.nn.Module):
    """Two blocks of 64 channels over 32 tokens of 128."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = torch.nn.Embedding(128, 64), torch.nn.Parameter(torch.zeros(32, 64))
        block = functools.partial(torch.nn.TransformerEncoderLayer, 64, 4, 256, 0.0, batch_first=True, norm_first=True)
        self.blocks = torch.nn.Sequential(block(), block())
        self.head = torch.nn.Linear(64, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.blocks(self.embed(x) + self.place))
        return logits.flatten(0, 1)


def digits() -> torch.nn.Module:
    """Two convolutions and a linear layer."""
    nn = torch.nn
    first = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*first, nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))


def compare(make: Callable[[], torch.nn.Module], x: torch.Tensor, y: torch.Tensor, rounds: int) -> tuple[float, float]:
    """Milliseconds of a whole compiled step, and of a compiled loss with torch's fused step: medians."""
    own, other = make(), make()
    tx = fo.adamw(1e-3, weight_decay=1e-2)
    params = {name: p.detach() for name, p in own.named_parameters()}
    state = tx.init(params)
    optimizer = torch.optim.AdamW(other.parameters(), 1e-3, fused=True)

    @torch.compile(fullgraph=True)
    def step(params: Any, state: Any) -> Any:
        def loss(params: Any) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(functional_call(own, params, (x,)), y)

        grads, value = grad_and_value(loss)(params)
        return *fo.apply_gradients(tx, params, grads, state, donate=True), value

    loss_of_other = torch.compile(lambda: torch.nn.functional.cross_entropy(other(x), y))

    def ours() -> None:
        nonlocal params, state
        params, state, _ = step(params, state)

    def theirs() -> None:
        optimizer.zero_grad()
        loss_of_other().backward()
        optimizer.step()

    samples: dict[Callable[[], None], list[float]] = {ours: [], theirs: []}
    for k in range(rounds + 5):
        for way, times in samples.items():
            start = time.perf_counter()
            way()
            if k >= 5:
                times.append(time.perf_counter() - start)
    mine, other_times = (1e3 * median(times) for times in samples.values())
    return mine, other_times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="4,24", help="numbers of layers")
    parser.add_argument("--packed", default="1000", help="numbers of packed tensors")
    parser.add_argument("--forms", default="", help="the beginnings of those forms that are measured, with commas")
    parser.add_argument("--steps", type=int, default=100, help="steps that are timed")
    parser.add_argument("--models", action="store_true", help="whole train steps of two models beside torch, too")
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
        alone = 0.0
        for form in FORMS:
            if (form == TRACED and make is packed) or not form.startswith(tuple(args.forms.split(","))):
                continue
            compiling, step = measure(form, *make(n), 3 if args.tiny else args.steps)
            alone = compiling if form == ALONE else alone
            added = f", {compiling - alone:4.1f} s more" if alone and form != ALONE else ""
            goal = f" (at most {GOALS[title, form]:g})" if added and (title, form) in GOALS else ""
            print(f"  {form:20} compiles in {compiling:5.1f} s{added}{goal}, then {step:6.3f} ms a step", flush=True)
    for name, n in graphs().items() if layers else ():
        print(f"twenty steps, {name}: {n} graph{'s' * (n > 1)} (at most 2)", flush=True)
    images, tokens = torch.randn(64, 1, 8, 8), torch.randint(128, (8, 32))
    models: dict[str, tuple[Callable[[], torch.nn.Module], torch.Tensor, torch.Tensor]] = {
        "digits": (digits, images, torch.randint(10, (64,))),
        "transformer": (Transformer, tokens, torch.randint(128, (256,))),
    }
    for name, (make_model, x, y) in models.items() if args.models else ():
        ours, theirs = compare(make_model, x, y, 3 if args.tiny else 60)
        print(
            f"{name}: whole step {ours:.2f} ms, torch {theirs:.2f} ms, {theirs / ours:.2f}x (at least 1x)", flush=True
        )


if __name__ == "__main__":
    main()
