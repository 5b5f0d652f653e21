"""Descriptions of compiled steps: texts that any process can read, and operations that keep their promises."""

import base64
import collections
import copy
import gc
import os
import pickle
import re
import sys
import threading
import types
import weakref
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import functional_optim as fo
from functional_optim._graph import descriptions, operations
from functional_optim._graph.descriptions import (
    DESCRIBED,
    DescribedStep,
    Outline,
    Trees,
    describe,
    find_step,
    made_step,
)
from functional_optim._structures import read


PARAMS = {"w": torch.ones(2, 3), "b": torch.ones(2)}
CHAINS: dict[str, Callable[[], Any]] = {
    "numbers": lambda: fo.chain(fo.clip_by_global_norm(0.5), fo.adamw(0.1), fo.params_ema(0.9)),
    "schedules, tensors": lambda: fo.adam(
        fo.join_schedules([fo.constant_schedule(torch.tensor(0.1)), fo.cosine_decay_schedule(0.1, 9)], [3]),
        mu_dtype=torch.bfloat16,
    ),
    "masks": lambda: fo.partition(
        {"a": fo.masked(fo.sgd(0.1, momentum=0.9), {"w": True, "b": False}), "b": fo.lion(0.1)},
        {re.compile("b"): "b", re.compile(""): "a"},
    ),
    "matrices, opaque": lambda: fo.chain(fo.scale_by_lbfgs(3), fo.muon(0.1)),
    "function": lambda: fo.adamw(lambda count: 0.1 / (1 + count), mask=lambda path, p: p.ndim > 1),
    # a state in another layout than before, and updates that are views of it
    "layouts": lambda: fo.chain(
        fo.GradientTransformation(
            lambda params: torch.ones(2, 3), lambda u, m, p=None: ({**u, "w": m.view(2, 3)}, (m + 1).T.contiguous().T)
        ),
        fo.sgd(0.1),
    ),
    "opaque": lambda: fo.chain(fo.GradientTransformation(lambda params: (), lambda u, s, p=None: (u, s)), fo.sgd(0.1)),
}


def step_of(tx: Any, params: Any = PARAMS) -> tuple[str, list[list[torch.Tensor]]]:
    """The text of a step, and the arguments of its operation."""
    outlines, tensors = [], []
    for tree in (params, params, tx.init(params), {}):
        found = read(tree)
        outlines.append(Outline(found.structure, (True,) * len(found.leaves)))
        tensors.append(found.leaves)
    return describe(tx._serial, True, Trees(*outlines), None), [*tensors[:3], list(tx._tensors)]


@pytest.mark.parametrize("name", CHAINS)
def test_operations_keep_their_promises(name: str) -> None:
    """torch's own checks: no argument is written that is not declared, and fake results are like real ones."""
    tx = CHAINS[name]()
    text, tensors = step_of(tx)
    for op in ("pure_step", "donated_step"):
        torch.library.opcheck(getattr(torch.ops.functional_optim, op).default, (text, *copy.deepcopy(tensors)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch 2.14's own check
@pytest.mark.parametrize("name", ["numbers", "schedules, tensors", "masks", "function"])
def test_the_operation_that_is_looked_into_keeps_its_promises(name: str) -> None:
    """It is traced, and differentiated; L-BFGS, which reads numbers of tensors, is neither."""
    tx = CHAINS[name]()
    text, tensors = step_of(tx)
    recorded = [[x.clone().requires_grad_(x.is_floating_point()) for x in own] for own in tensors]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.functional_optim.traced_step.default, (text, *recorded), test_utils=tests)


@pytest.mark.parametrize("name", ["numbers", "schedules, tensors", "masks"])
@pytest.mark.parametrize("counts", [False, True])
def test_the_operation_of_members_keeps_its_promises(name: str, counts: bool) -> None:
    """Gradients of 2x3 members, and the state of the three inner ones, their counters or not."""
    tx = CHAINS[name]()
    text, (updates, params, state, numbers) = step_of(tx)
    flags = [[True] * len(updates) + [False] * len(params + state + numbers) for _ in range(2)]
    updates = [x.expand(2, 3, *x.shape).contiguous() for x in updates]
    for k, x in enumerate(state):
        if counts or x.is_floating_point():
            state[k] = x.expand(3, *x.shape).clone()
            flags[1][len(updates) + len(params) + k] = True
    arguments = (text, [2, 3], [*flags[0], *flags[1]], updates, params, state, numbers)
    torch.library.opcheck(torch.ops.functional_optim.mapped_step.default, arguments)


@pytest.mark.parametrize("name", ["numbers", "schedules, tensors", "masks", "matrices, opaque"])
def test_a_description_stands_for_an_equal_chain(name: str) -> None:
    """The chain is made anew of the text alone: the one that it describes is gone."""
    tx = CHAINS[name]()
    expected, shown = fo.apply_gradients(tx, PARAMS, PARAMS, tx.init(PARAMS)), repr(tx)
    text, tensors = step_of(tx)
    del tx
    made_step.cache_clear()
    step = find_step(text)
    assert re.sub(r"tensor\([^)]*\)", "", repr(step.tx)) == re.sub(r"tensor\([^)]*\)", "", shown)
    results, _ = step.take(*tensors)
    for x, y in zip(results, expected[0].values(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["function", "opaque"])
def test_a_chain_with_functions_is_found_in_its_process_alone(name: str) -> None:
    tx = CHAINS[name]()
    text, _ = step_of(tx)
    assert find_step(text).tx is tx
    gone = weakref.ref(tx)
    del tx
    gc.collect()
    assert gone() is None  # the step that was found does not keep it, nor what its functions refer to
    with pytest.raises(RuntimeError, match="give masks as trees or regular expressions in place of functions"):
        find_step(text)


LINE_SEARCHES = {
    "backtracking": lambda: fo.scale_by_backtracking_linesearch(5),
    "zoom": lambda: fo.scale_by_zoom_linesearch(5),
    "strong Wolfe": fo.scale_by_strong_wolfe_linesearch,
}


@pytest.mark.parametrize("name", LINE_SEARCHES)
def test_line_searches_have_descriptions(name: str) -> None:
    tx = LINE_SEARCHES[name]()
    text, shown = step_of(tx)[0], repr(tx)
    del tx
    assert repr(find_step(text).tx) == shown


def test_a_description_with_another_number_of_tensors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files hold descriptions."""
    text, _ = step_of(fo.sgd(torch.tensor(0.1)))
    load = descriptions._Reader.load

    def with_one_more(self: Any) -> Any:
        digests, n, *rest = load(self)
        return digests, n + 1, *rest

    monkeypatch.setattr(descriptions._Reader, "load", with_one_more)
    made_step.cache_clear()
    with pytest.raises(RuntimeError, match="has 2 hyper-parameters that are tensors, but"):
        find_step(text)


@fo.elementwise(static=("kinds",))
def by_kinds(u: torch.Tensor, *, kinds: frozenset[int]) -> torch.Tensor:
    return u * len(kinds)


def test_sets_have_one_description() -> None:
    """The order of a set follows from the hashes of its entries, which differ in each process; those of 0 and 8 clash,
    so that it follows from the order in which they were added."""
    one, other = (frozenset(entries) for entries in ([0, 8], [8, 0]))
    assert list(one) != list(other)
    texts = {step_of(by_kinds(kinds))[0] for kinds in (one, other)}
    assert len(texts) == 1
    made_step.cache_clear()
    assert find_step(texts.pop()).tx == by_kinds(one)


def define(kind: str, factor: float) -> Any:
    """A rule, under the same name in the same module as others before it."""
    module = sys.modules.setdefault("edited_rules", types.ModuleType("edited_rules"))
    exec(f"import functional_optim as fo\n@fo.{kind}\ndef rule(u):\n    return u * {factor}", vars(module))
    return module.rule


@pytest.mark.parametrize("kind", ["elementwise", "leafwise"])
def test_a_step_is_not_made_of_a_rule_that_was_defined_anew(kind: str) -> None:
    """The old one is found as long as its chain is there: names lead to the new one."""
    tx = define(kind, 2.0)()
    text, tensors = step_of(tx)
    assert DESCRIBED[text] is tx
    define(kind, 3.0)
    made_step.cache_clear()
    assert find_step(text).take(*tensors)[0][0][0, 0] == 3.0  # 1 + 2 * 1
    made_step.cache_clear()
    del tx
    gc.collect()  # steps that are bound refer to their chain
    with pytest.raises(RuntimeError, match=r"rule\(\) is not what it was when this step was compiled"):
        find_step(text)
    define(kind, 2.0)
    if kind == "elementwise":  # the same formula; of other rules only the object is known
        assert find_step(text).take(*tensors)[0][0][0, 0] == 3.0


def test_containers_of_a_caller() -> None:
    """A NamedTuple that is defined in a function has no name that another process could know; this one finds it."""
    pair = collections.namedtuple("pair", ["w", "b"])
    pair.__qualname__ = "f.<locals>.pair"
    tx = fo.sgd(0.1)
    text, tensors = step_of(tx, pair(**PARAMS))
    assert torch.equal(find_step(text).take(*tensors)[0][0], torch.full((2, 3), 0.9))


HARMFUL = {
    "function": lambda: os.system,
    "function of the package": lambda: fo.use_backend,
    "call": lambda: Calling(os.getcwd),
}


class Calling:
    """An object whose unpickling calls a function."""

    def __init__(self, fn: Any) -> None:
        self.fn = fn

    def __reduce__(self) -> Any:
        return self.fn, ()


@pytest.mark.parametrize("name", HARMFUL)
def test_a_description_makes_nothing_but_parts_of_chains(name: str) -> None:
    """Texts stand in files, which may come from anywhere."""
    text = base64.b85encode(zlib.compress(pickle.dumps(HARMFUL[name](), protocol=4))).decode()
    with pytest.raises(pickle.UnpicklingError, match="is no part of a chain"):
        find_step(text)


def test_a_module_that_is_not_imported_is_named() -> None:
    payload = b"\x80\x04\x8c\x08no_suchm\x8c\x04rule\x93."
    with pytest.raises(RuntimeError, match="uses rule of the module no_suchm; import no_suchm before"):
        find_step(base64.b85encode(zlib.compress(payload)).decode())


def test_results_share_no_memory() -> None:
    """A transformation may return its arguments or views of them; an operation returns memory of its own."""
    given = torch.arange(6.0)
    own = operations._apart([given, given[2:], given.clone()], [given], views=True)
    places = {x.untyped_storage().data_ptr() for x in [*own, given]}
    assert len(places) == 4


def _scale_by_a_tensor() -> Any:
    """The step of a chain whose rate is an argument of the graph."""
    tx = fo.scale(torch.tensor(0.0, dtype=torch.float64))
    trees = [{"w": torch.ones(3)}, tx.init({"w": torch.ones(3)}), {}]
    contents = map(read, trees)
    outlines = [Outline(found.structure, tuple(x is not None for x in found.leaves)) for found in contents]
    return DescribedStep(tx, False, Trees(outlines[0], None, *outlines[1:]), None)


def _scaled(step: Any, rate: float) -> float:
    results, _ = step.take([torch.ones(3)], [], [], [torch.tensor(rate, dtype=torch.float64)])
    return float(results[0][0])


def test_numbers_of_a_graph_are_those_of_its_thread() -> None:
    step, found = _scale_by_a_tensor(), []
    rate = torch.tensor(1.0, dtype=torch.float64)
    first = step._chain_of([rate])
    thread = threading.Thread(target=lambda: found.append(_scaled(step, 2.0)))
    thread.start()
    thread.join()
    assert found == [2.0]
    assert first._tensors[0].item() == 1.0


def test_numbers_of_a_graph_after_a_first_call_under_inference_mode() -> None:
    step = _scale_by_a_tensor()
    with torch.inference_mode():
        assert _scaled(step, 2.0) == 2.0
    assert _scaled(step, 3.0) == 3.0
