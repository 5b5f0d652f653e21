"""Compiled steps in torch's caches on disk: another process finds them, and none is found for an edited formula."""

import json
from pathlib import Path
from typing import Any

import pytest

from _lib.processes import run_program


ROOT = Path(__file__).parents[2]
RULE = """
import functional_optim as fo

@fo.elementwise
def scale_twice(u, *, rate=0.5):
    return u * rate * {factor}

@fo.leafwise
def scale_whole(u):
    return u * {factor}
"""
PROGRAM = """
import json
import torch
import functional_optim as fo
from functional_optim.adapters import AdamW
import edited
import kept
from torch._dynamo.utils import counters
from torch._inductor import config

config.cpp.vec_isa_ok = True  # those of the CPU are not tried out, which a new cache would begin with

P = {"w": torch.arange(8.0).reshape(2, 4), "b": torch.ones(3)}
G = {k: torch.full_like(p, 0.5) for k, p in P.items()}

def pure(tx, params, grads):
    return fo.apply_gradients(tx, params, grads, tx_state[tx])[0]["b"]

def traced(tx, params, grads):
    with fo.use_backend("reference"):
        return pure(tx, params, grads)

def derivative(tx, params, grads):
    return torch.autograd.grad(pure(tx, params, grads).sum(), grads["b"])[0]

def adapter(tx, params, grads):
    opt.step()

def run(name, fn, tx):
    grads = {k: g.clone().requires_grad_(name == "derivative") for k, g in G.items()}
    torch.compiler.reset()
    for group in ("aot_autograd", "inductor"):
        counters[group].clear()
    result = torch.compile(lambda: fn(tx, P, grads))()
    result = p.detach() if result is None else result
    expected = fn(tx, P, grads) if fn is not adapter else result
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)
    return result.tolist(), counters["aot_autograd"]["autograd_cache_miss"]

p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.full_like(p, 0.5)
opt = AdamW([p], lr=0.25)
rules, same = (fo.chain(module.scale_twice(0.25), fo.sgd(0.5, momentum=0.5)) for module in (edited, kept))
own = fo.chain(fo.scale_by_schedule(fo.cosine_decay_schedule(1.0, 10)), fo.adamw(0.1))
whole = fo.chain(kept.scale_whole(), fo.sgd(0.5))
called = fo.chain(fo.GradientTransformation(lambda p: (), lambda u, s, p=None: (u, s)), fo.sgd(0.5))
matrices = fo.chain(fo.scale_by_lbfgs(3), fo.muon(0.1))
tx_state = {tx: tx.init(P) for tx in (rules, same, own, whole, called, matrices)}
print(json.dumps({
    "own, pure": run("pure", pure, own),
    "matrices, pure": run("matrices", pure, matrices),
    "optimizer": run("optimizer", adapter, own),
    "kept, traced": run("traced", traced, same),
    "kept, derivative": run("derivative", derivative, same),
    "edited, pure": run("pure", pure, rules),
    "edited, traced": run("traced", traced, rules),
    "edited, derivative": run("derivative", derivative, rules),
    "whole, traced": run("traced", traced, whole),
    "called, pure": run("pure", pure, called),
}))
"""


def run(folder: Path, factor: float) -> dict[str, tuple[list[float], int]]:
    """The results of compiled steps in a process of their own, and how many graphs were in no cache."""
    for module, number in (("kept", 2.0), ("edited", factor)):
        (folder / f"{module}.py").write_text(RULE.format(factor=number))
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    # two edits within a second look alike to Python's own cache
    head = f"import sys\nsys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\nsys.dont_write_bytecode = True\n"
    out = run_program(head + PROGRAM, folder, warnings=False, environment=environment)
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return {name: (result, misses) for name, (result, misses) in found.items()}


@pytest.mark.slow
def test_another_process_finds_a_compiled_step_and_none_of_an_edited_formula(tmp_path: Path) -> None:
    first, second = run(tmp_path, 2.0), run(tmp_path, 4.0)
    assert all(misses for _, misses in first.values())
    assert {name for name, (_, misses) in second.items() if not misses} == {
        "own, pure",
        "matrices, pure",
        "optimizer",
        "kept, traced",
        "kept, derivative",
    }
    differ = {name for name in first if first[name][0] != second[name][0]}
    assert differ == {"edited, pure", "edited, traced", "edited, derivative"}
