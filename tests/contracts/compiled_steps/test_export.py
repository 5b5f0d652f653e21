"""Steps of the pure API that are traced, exported, saved, and compiled ahead of time."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import functional_optim as fo
from _lib.compiled import CHAINS, STEPS, assert_close, assert_equal, packed_start, start
from _lib.processes import run_program


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own


class Step(torch.nn.Module):
    """A step as a module, which is what can be exported."""

    def __init__(self, tx: Any, donate: bool = False) -> None:
        super().__init__()
        self.tx, self.donate = tx, donate

    def forward(self, params: Any, grads: Any, state: Any) -> Any:
        return fo.apply_gradients(self.tx, params, grads, state, donate=self.donate)


class Both(torch.nn.Module):
    """A step, and a donated one on other tensors."""

    def __init__(self, tx: Any) -> None:
        super().__init__()
        self.pure, self.donated = Step(tx), Step(tx, donate=True)

    def forward(self, given: Any, others: Any) -> Any:
        return self.pure(*given), self.donated(*others)


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_make_fx_traces_the_reference(mode: str, pre_dispatch: bool) -> None:
    tx = CHAINS["schedule"]()
    params, state = start(tx)
    step = make_fx(lambda *args: fo.apply_gradients(tx, *args), tracing_mode=mode, pre_dispatch=pre_dispatch)
    graph = step(params, {k: 3 * p for k, p in params.items()}, state)
    others = {k: 2 * p for k, p in params.items()}
    assert_close(graph(others, params, state), fo.apply_gradients(tx, others, params, state))


def test_make_fx_before_dispatch_refuses_donation() -> None:
    tx = fo.adam(0.1)
    params, state = start(tx)
    with pytest.raises(RuntimeError, match="a dispatch mode"):
        make_fx(lambda *args: fo.apply_gradients(tx, *args, donate=True), pre_dispatch=True)(params, params, state)


@pytest.mark.parametrize("tx", [fo.clip_by_block_rms(0.1), fo.scale_by_factored_rms()], ids=["kernels", "whole"])
def test_sizes_that_nothing_guards_are_refused(tx: Any) -> None:
    """A graph of operations that follow from sizes would compute with those of other tensors."""
    params = {"w": torch.ones(3, 4)}
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"sizes of a tensor are symbols.*tracing_mode='fake'"):
        make_fx(lambda *args: fo.apply_gradients(tx, *args), tracing_mode="symbolic")(params, params, state)


@pytest.mark.slow
def test_exported_steps_are_saved_and_loaded(tmp_path: Path) -> None:
    """In this process, and in one that knows nothing but the package and the classes of the state."""
    rules = fo.chain(fo.clip_by_global_norm(0.1), fo.adamw(fo.cosine_decay_schedule(0.1, STEPS)))
    matrices = fo.chain(fo.scale_by_lbfgs(2), fo.muon(0.1))
    names = []
    for tx, packed, donate, strict in (
        (rules, False, False, False),
        (rules, False, True, True),
        (rules, True, False, False),
        (rules, True, True, False),
        (matrices, False, True, False),
    ):
        given, again = [(packed_start if packed else start)(tx) for _ in range(2)]
        grads = pytree.tree_map(torch.ones_like, given[0])
        expected = fo.apply_gradients(tx, given[0], grads, given[1])
        program = torch.export.export(Step(tx, donate), (given[0], grads, given[1]), strict=strict)
        calls = [n.name for n in program.graph.nodes if n.op == "call_function" and "getitem" not in n.name]
        assert calls == ["donated_step" if donate else "pure_step"]
        assert_equal(program.module()(again[0], grads, again[1]), expected)
        assert donate is torch.equal(fo.unpack(again[0])["0.weight"], fo.unpack(expected[0])["0.weight"])
        names.append(f"{len(names)} {packed} {donate}")
        torch.export.save(program, tmp_path / f"{names[-1]}.pt2")
        torch.save((given[0], grads, given[1], expected), tmp_path / f"{names[-1]}.pt")
    code = f"""
import torch, functional_optim as fo
for tx in (fo.adamw(fo.constant_schedule(0.1)), fo.muon(0.1)):
    tx.init(torch.ones(1, 1))
for name in {names!r}:
    file = {str(tmp_path)!r} + "/" + name
    params, grads, state, expected = torch.load(file + ".pt")
    new = torch.export.load(file + ".pt2").module()(params, grads, state)
    assert all(torch.equal(fo.unpack(new[0])[k], x) for k, x in fo.unpack(expected[0]).items())
"""
    run_program(code, tmp_path, warnings=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the compiler's own
def test_steps_compiled_ahead_of_time(tmp_path: Path) -> None:
    """AOTInductor's code calls the operations of a step and of a donated one, also with an empty list of numbers."""
    import torch._inductor

    tx = fo.chain(fo.clip_by_global_norm(0.1), fo.adamw(fo.cosine_decay_schedule(0.1, STEPS)))
    params, state = start(tx)
    grads = {k: torch.ones_like(p) for k, p in params.items()}
    expected = fo.apply_gradients(tx, params, grads, state)
    given, others = (params, grads, state), copy.deepcopy((params, grads, state))
    before = copy.deepcopy(given)
    program = torch.export.export(Both(tx), (given, others))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "step.pt2"))
    for actual in torch._inductor.aoti_load_package(path)(given, others):
        assert_equal(actual[0], expected[0])
        assert_equal(pytree.tree_leaves(actual[1]), pytree.tree_leaves(expected[1]))
    assert_equal(pytree.tree_leaves(given), pytree.tree_leaves(before))
    assert_equal(others[0], expected[0])
