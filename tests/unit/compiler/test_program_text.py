"""Rules as text: programs, the plan of their passes, and what is counted in the emitted C.

The expected texts are part of this file. After a deliberate change, `EXPECTTEST_ACCEPT=1 pytest` writes them anew, and
the difference is what there is to review.
"""

import re
from typing import Any, NamedTuple

import expecttest
import pytest
import torch

import functional_optim as fo
from functional_optim._compiler.c.emit import emit_c
from functional_optim._compiler.passes import Signature, plan, read_bytes, written_bytes
from functional_optim._compiler.triton.emit import emit_triton


PARAMS = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}


def signature(tx: fo.GradientTransformation, params: Any = PARAMS) -> Signature:
    """The one program of a transformation."""
    [kernel] = fo.explain(tx, params).kernels
    return kernel.signature


def text(tx: fo.GradientTransformation, params: Any = PARAMS) -> str:
    return str(signature(tx, params).program)


# -- programs -----------------------------------------------------------------------------------------------------


@fo.elementwise(state={"norm": fo.slot(0.0, per="leaf"), "mu": fo.zeros})
def layerwise(u: Any, norm: Any, mu: Any, *, decay: float = 0.9) -> Any:
    """A rule with one number per leaf, as NovoGrad has."""
    norm = torch.lerp(fo.leaf_norm(u), norm, decay)
    mu = decay * mu + u / norm
    return mu, norm, mu


def test_sgd() -> None:
    expecttest.assert_expected_inline(
        text(fo.sgd(0.1)),
        """\
%0 = array updates
%1 = array params
%2 = scalar scale_by_learning_rate.learning_rate
%3 = neg(%2)  # row
%4 = mul(%3, %0)
%5 = add(%1, %4)
params <- %5""",
    )


def test_adamw() -> None:
    expecttest.assert_expected_inline(
        text(fo.adamw(1e-3)),
        """\
%0 = array updates
%1 = array params
%2 = leaf scale_by_adam.count
%3 = 1.0
%4 = add(%2, %3)  # leaf
%5 = scalar scale_by_adam.b1
%6 = scalar scale_by_adam.b2
%7 = scalar scale_by_adam.eps
%8 = scalar scale_by_adam.eps_root
%9 = array scale_by_adam.mu
%10 = array scale_by_adam.nu
%11 = mul(%5, %9)
%12 = sub(%3, %5)  # row
%13 = mul(%12, %0)
%14 = add(%11, %13)
%15 = mul(%6, %10)
%16 = sub(%3, %6)  # row
%17 = mul(%16, %0)
%18 = mul(%17, %0)
%19 = add(%15, %18)
%20 = pow(%5, %4)  # leaf
%21 = sub(%3, %20)  # leaf
%22 = div(%3, %21)  # leaf
%23 = mul(%14, %22)
%24 = pow(%6, %4)  # leaf
%25 = sub(%3, %24)  # leaf
%26 = div(%3, %25)  # leaf
%27 = mul(%19, %26)
%28 = add(%27, %8)
%29 = sqrt(%28)
%30 = add(%29, %7)
%31 = div(%23, %30)
%32 = scalar add_decayed_weights.weight_decay
%33 = mul(%32, %1)
%34 = add(%31, %33)
%35 = scalar scale_by_learning_rate.learning_rate
%36 = neg(%35)  # row
%37 = mul(%36, %34)
%38 = add(%1, %37)
params <- %38
scale_by_adam.mu <- %14
scale_by_adam.nu <- %19""",
    )


def test_clipped_adam() -> None:
    expecttest.assert_expected_inline(
        text(fo.chain(fo.clip_by_global_norm(1.0), fo.adam(1e-3))),
        """\
%0 = array updates
%1 = array params
%2 = scalar clip_by_global_norm.max_norm
%3 = mul(%0, %0)  # wide
%4 = tree_sum(%3, over clip_by_global_norm@0)  # row, stage 1
%5 = sqrt(%4)  # row, stage 1
%6 = le(%5, %2)  # row, stage 1
%7 = 1.0
%8 = where(%6, %7, %5)  # row, stage 1
%9 = div(%2, %8)  # row, stage 1
%10 = where(%6, %7, %9)  # row, stage 1
%11 = mul(%0, %10)  # rounded, stage 1
%12 = leaf scale_by_adam.count
%13 = add(%12, %7)  # leaf
%14 = scalar scale_by_adam.b1
%15 = scalar scale_by_adam.b2
%16 = scalar scale_by_adam.eps
%17 = scalar scale_by_adam.eps_root
%18 = array scale_by_adam.mu
%19 = array scale_by_adam.nu
%20 = mul(%14, %18)
%21 = sub(%7, %14)  # row
%22 = mul(%21, %11)  # stage 1
%23 = add(%20, %22)  # stage 1
%24 = mul(%15, %19)
%25 = sub(%7, %15)  # row
%26 = mul(%25, %11)  # stage 1
%27 = mul(%26, %11)  # stage 1
%28 = add(%24, %27)  # stage 1
%29 = pow(%14, %13)  # leaf
%30 = sub(%7, %29)  # leaf
%31 = div(%7, %30)  # leaf
%32 = mul(%23, %31)  # stage 1
%33 = pow(%15, %13)  # leaf
%34 = sub(%7, %33)  # leaf
%35 = div(%7, %34)  # leaf
%36 = mul(%28, %35)  # stage 1
%37 = add(%36, %17)  # stage 1
%38 = sqrt(%37)  # stage 1
%39 = add(%38, %16)  # stage 1
%40 = div(%32, %39)  # stage 1
%41 = scalar scale_by_learning_rate.learning_rate
%42 = neg(%41)  # row
%43 = mul(%42, %40)  # stage 1
%44 = add(%1, %43)  # stage 1
params <- %44
scale_by_adam.mu <- %23
scale_by_adam.nu <- %28""",
    )


def test_lamb() -> None:
    expecttest.assert_expected_inline(
        text(fo.lamb(1e-3, weight_decay=0.1)),
        """\
%0 = array updates
%1 = array params
%2 = leaf scale_by_adam.count
%3 = 1.0
%4 = add(%2, %3)  # leaf
%5 = scalar scale_by_adam.b1
%6 = scalar scale_by_adam.b2
%7 = scalar scale_by_adam.eps
%8 = scalar scale_by_adam.eps_root
%9 = array scale_by_adam.mu
%10 = array scale_by_adam.nu
%11 = mul(%5, %9)
%12 = sub(%3, %5)  # row
%13 = mul(%12, %0)
%14 = add(%11, %13)
%15 = mul(%6, %10)
%16 = sub(%3, %6)  # row
%17 = mul(%16, %0)
%18 = mul(%17, %0)
%19 = add(%15, %18)
%20 = pow(%5, %4)  # leaf
%21 = sub(%3, %20)  # leaf
%22 = div(%3, %21)  # leaf
%23 = mul(%14, %22)
%24 = pow(%6, %4)  # leaf
%25 = sub(%3, %24)  # leaf
%26 = div(%3, %25)  # leaf
%27 = mul(%19, %26)
%28 = add(%27, %8)
%29 = sqrt(%28)
%30 = add(%29, %7)
%31 = div(%23, %30)
%32 = scalar add_decayed_weights.weight_decay
%33 = mul(%32, %1)
%34 = add(%31, %33)
%35 = scalar scale_by_trust_ratio.min_norm
%36 = scalar scale_by_trust_ratio.trust_coefficient
%37 = scalar scale_by_trust_ratio.eps
%38 = mul(%1, %1)  # wide
%39 = leaf_sum(%38)  # leaf, stage 1
%40 = sqrt(%39)  # leaf, stage 1
%41 = maximum(%40, %35)  # leaf, stage 1
%42 = mul(%34, %34)  # wide
%43 = leaf_sum(%42)  # leaf, stage 1
%44 = sqrt(%43)  # leaf, stage 1
%45 = maximum(%44, %35)  # leaf, stage 1
%46 = 0.0
%47 = eq(%45, %46)  # leaf, stage 1
%48 = mul(%36, %41)  # leaf, stage 1
%49 = where(%47, %3, %45)  # leaf, stage 1
%50 = add(%49, %37)  # leaf, stage 1
%51 = div(%48, %50)  # leaf, stage 1
%52 = eq(%41, %46)  # leaf, stage 1
%53 = logical_or(%47, %52)  # leaf, stage 1
%54 = where(%53, %3, %51)  # leaf, stage 1
%55 = mul(%34, %54)  # rounded, stage 1
%56 = scalar scale_by_learning_rate.learning_rate
%57 = neg(%56)  # row
%58 = mul(%57, %55)  # stage 1
%59 = add(%1, %58)  # stage 1
params <- %59
scale_by_adam.mu <- %14
scale_by_adam.nu <- %19""",
    )


def test_a_number_per_leaf() -> None:
    expecttest.assert_expected_inline(
        text(fo.chain(layerwise(), fo.scale(-0.1))),
        """\
%0 = array updates
%1 = array params
%2 = scalar layerwise.decay
%3 = leaf layerwise.norm
%4 = array layerwise.mu
%5 = mul(%0, %0)  # wide
%6 = leaf_sum(%5)  # leaf, stage 1
%7 = sqrt(%6)  # leaf, stage 1
%8 = lerp(%7, %3, %2)  # leaf, stage 1
%9 = mul(%2, %4)
%10 = div(%0, %8)  # rounded, stage 1
%11 = add(%9, %10)  # stage 1
%12 = scalar scale.step_size
%13 = mul(%12, %11)  # stage 1
%14 = add(%1, %13)  # stage 1
params <- %14
layerwise.norm <- %8
layerwise.mu <- %11""",
    )


@fo.elementwise(state={"start": fo.slot("param"), "rate": fo.slot(0.5, per="leaf"), "mu": fo.zeros})
def pulled_back(u: Any, p: Any, start: Any, rate: Any, mu: Any) -> Any:
    """A rule that changes one of its slots."""
    mu = mu + u
    return mu + rate * (p - start), start, rate, mu


def test_a_slot_that_is_returned_unchanged_is_not_written() -> None:
    expecttest.assert_expected_inline(
        text(pulled_back()),
        """\
%0 = array updates
%1 = array params
%2 = array pulled_back.start
%3 = leaf pulled_back.rate
%4 = array pulled_back.mu
%5 = add(%4, %0)
%6 = sub(%1, %2)
%7 = mul(%3, %6)
%8 = add(%5, %7)
%9 = add(%1, %8)
params <- %9
pulled_back.mu <- %5""",
    )


@fo.elementwise(state={"square": fo.zeros})
def squares(u: Any, p: Any, square: Any) -> Any:
    """A rule that reduces what elements need too, and what they do not."""
    square = u * u
    return u / fo.leaf_sum(square) * fo.tree_norm(u + p), square


def test_values_that_are_reduced_are_wide() -> None:
    """The square is computed once for the sum, in double precision, and once for the slot."""
    expecttest.assert_expected_inline(
        text(squares()),
        """\
%0 = array updates
%1 = array params
%2 = mul(%0, %0)  # also wide
%3 = leaf_sum(%2)  # leaf, stage 1
%4 = add(%0, %1)  # wide
%5 = mul(%4, %4)  # wide
%6 = tree_sum(%5, over squares@0)  # row, stage 1
%7 = sqrt(%6)  # row, stage 1
%8 = div(%7, %3)  # leaf, stage 1
%9 = mul(%0, %8)  # rounded, stage 1
%10 = add(%1, %9)  # stage 1
params <- %10
squares.square <- %2""",
    )


def test_a_schedule_is_part_of_the_program() -> None:
    """Its own numbers are scalars, so that another schedule of the same kind is the same program."""
    expecttest.assert_expected_inline(
        text(fo.sgd(fo.linear_schedule(1.0, 0.0, 100))),
        """\
%0 = array updates
%1 = array params
%2 = leaf scale_by_learning_rate.count
%3 = scalar scale_by_learning_rate.learning_rate.init_value
%4 = scalar scale_by_learning_rate.learning_rate.end_value
%5 = 0.0
%6 = sub(%2, %5)  # leaf
%7 = maximum(%6, %5)  # leaf
%8 = 100.0
%9 = minimum(%7, %8)  # leaf
%10 = div(%9, %8)  # leaf
%11 = 1.0
%12 = sub(%11, %10)  # leaf
%13 = sub(%3, %4)  # row
%14 = mul(%13, %12)  # leaf
%15 = add(%14, %4)  # leaf
%16 = neg(%15)  # leaf
%17 = mul(%16, %0)
%18 = add(%1, %17)
params <- %18""",
    )


def test_equal_rules_of_other_numbers_are_one_program() -> None:
    assert signature(fo.adamw(1e-3, b1=0.9)) == signature(fo.adamw(1e-4, b1=0.8))


# -- passes -------------------------------------------------------------------------------------------------------


def passes(tx: fo.GradientTransformation, params: Any = PARAMS) -> str:
    """The plan in words."""
    s = signature(tx, params)
    values, outputs = s.program.values, s.program.outputs
    lines = []
    for k, p in enumerate(plan(s)):
        lines.append(f"pass {k + 1}")
        for label, names in (
            ("load", [values[i].name for i in p.inputs]),
            ("reload", [outputs[o].name for _, o in p.reloads]),
            ("reduce", [f"%{i} = {values[i]}" for i in p.reductions]),
            ("store", [outputs[o].name for o in p.stores]),
        ):
            if names:
                lines.append(f"  {label} {', '.join(names)}")
    return "\n".join([*lines, f"{read_bytes(s)} + {written_bytes(s)} bytes"])


CLIPPED = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-3), fo.params_ema(0.999))


def test_passes_of_clipped_adamw_with_average() -> None:
    expecttest.assert_expected_inline(
        passes(CLIPPED),
        """\
pass 1
  load updates
  reduce %4 = tree_sum(%3, over clip_by_global_norm@0)
pass 2
  load updates, params, scale_by_adam.mu, scale_by_adam.nu, params_ema.ema
  store params, scale_by_adam.mu, scale_by_adam.nu, params_ema.ema
24 + 16 bytes""",
    )


def test_passes_of_lamb() -> None:
    """The moments are stored in the first pass and loaded again in the second, which then needs no gradient."""
    expecttest.assert_expected_inline(
        passes(fo.lamb(1e-3, weight_decay=0.1)),
        """\
pass 1
  load updates, params, scale_by_adam.mu, scale_by_adam.nu
  reduce %39 = leaf_sum(%38), %43 = leaf_sum(%42)
  store scale_by_adam.mu, scale_by_adam.nu
pass 2
  load params
  reload scale_by_adam.mu, scale_by_adam.nu
  store params
28 + 12 bytes""",
    )


def test_passes_of_lamb_with_rounded_moments() -> None:
    """A narrower store is not what the next pass may load again, for it has been rounded."""
    expecttest.assert_expected_inline(
        passes(fo.lamb(1e-3, weight_decay=0.1), {"w": torch.zeros(3).bfloat16()}),
        """\
pass 1
  load updates, params, scale_by_adam.mu, scale_by_adam.nu
  reduce %39 = leaf_sum(%38), %43 = leaf_sum(%42)
pass 2
  load updates, params, scale_by_adam.mu, scale_by_adam.nu
  store params, scale_by_adam.mu, scale_by_adam.nu
16 + 6 bytes""",
    )


def test_passes_of_nested_reductions() -> None:
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.clip_by_block_rms(1.0), fo.sgd(0.1, momentum=0.9))
    expecttest.assert_expected_inline(
        passes(tx),
        """\
pass 1
  load updates
  reduce %4 = tree_sum(%3, over clip_by_global_norm@0)
pass 2
  load updates
  reduce %14 = leaf_sum(%13)
pass 3
  load updates, params, trace.trace
  store params, trace.trace
20 + 8 bytes""",
    )


# -- counting in the emitted code -----------------------------------------------------------------------------------


class Counted(NamedTuple):
    """Counts in a text of C: launches, and bytes per element loaded and stored."""

    launches: int
    bytes_read: int
    bytes_written: int


C_TYPES = {"float": 4, "double": 8, "uint16_t": 2}


def count(source: str) -> Counted:
    """Counts loads `a3[i]` and stores `o1[i]` of each pass, by the types of the arrays."""
    read = written = 0
    works = re.findall(r"^static void work_\d+\([^)]*\) \{\n(.*?)^\}", source, re.DOTALL | re.MULTILINE)
    for work in works:
        arrays = {
            name: C_TYPES[ctype] for ctype, name in re.findall(r"(?:const )?(\w+) \*([ao]\d+) = l->addresses", work)
        }
        read += sum(arrays[name] for name in re.findall(r"\b(a\d+)\[i\]", work))
        written += sum(arrays[name] for name in re.findall(r"\b(o\d+)\[i\] = ", work))
    launches = re.findall(r"^void pass_\d+\(launch_t \*l\) \{", source, re.MULTILINE)
    assert len(launches) == len(works)
    return Counted(len(launches), read, written)


COUNTED = {
    "clipped adamw with average": (CLIPPED, torch.float32),
    "sgd": (fo.sgd(0.1), torch.float32),
    "adamw": (fo.adamw(1e-3), torch.float32),
    "adamw in float64": (fo.adamw(1e-3), torch.float64),
    "adamw of bfloat16": (fo.adamw(1e-3, mu_dtype=torch.float32), torch.bfloat16),
    "lamb": (fo.lamb(1e-3, weight_decay=0.1), torch.float32),
    "lamb of float16": (fo.lamb(1e-3, weight_decay=0.1), torch.float16),
    "a number per leaf": (layerwise(), torch.float32),
    "three passes": (fo.chain(fo.clip_by_global_norm(1.0), fo.clip_by_block_rms(1.0)), torch.float32),
}


@pytest.mark.parametrize("name", COUNTED)
def test_emitted_c_does_what_explain_says(name: str) -> None:
    tx, dtype = COUNTED[name]
    said = fo.explain(tx, {k: x.to(dtype) for k, x in PARAMS.items()})
    [kernel] = said.kernels
    assert count(emit_c(kernel.signature)) == Counted(said.launches, int(said.bytes_read), int(said.bytes_written))


def test_clipped_adamw_with_average_takes_2_launches_and_40_bytes() -> None:
    """Gradients twice; parameters, both moments and the average once, in and out."""
    said, counted = fo.explain(CLIPPED, PARAMS), count(emit_c(signature(CLIPPED)))
    assert (said.launches, said.bytes_per_element) == (2, 40)
    assert (counted.launches, counted.bytes_read + counted.bytes_written) == (2, 40)


@pytest.mark.parametrize("name", COUNTED)
def test_emitted_triton_has_a_kernel_for_each_pass(name: str) -> None:
    tx, dtype = COUNTED[name]
    [kernel] = fo.explain(tx, {k: x.to(dtype) for k, x in PARAMS.items()}).kernels
    assert len(re.findall(r"^def pass_\d+\(", emit_triton(kernel.signature), re.MULTILINE)) == kernel.passes


LINKS = {
    "clip_by_global_norm": lambda: fo.clip_by_global_norm(1.0),
    "clip_by_block_rms": lambda: fo.clip_by_block_rms(1.0),
    "scale_by_trust_ratio": lambda: fo.scale_by_trust_ratio(),
    "clip and momentum": lambda: fo.chain(fo.clip_by_global_norm(1.0), fo.trace(0.9)),
    "lamb": lambda: fo.lamb(1e-3, weight_decay=0.1),
    "division": lambda: divided(),
}


@fo.elementwise
def divided(u: Any) -> Any:
    """A rule that divides by what follows from a reduction."""
    return u / (1 + fo.leaf_norm(u))


@pytest.mark.parametrize("emit", [emit_c, emit_triton])
@pytest.mark.parametrize("name", LINKS)
def test_text_grows_with_the_length_of_a_chain_and_not_its_square(name: str, emit: Any) -> None:
    """Twice as many links add twice as much text, and a little for longer names; a square would add four times."""
    a, b, c = (len(emit(signature(fo.chain(*[LINKS[name]() for _ in range(n)], fo.sgd(0.1))))) for n in (8, 16, 32))
    assert c - b < 2.2 * (b - a)


def test_groups_are_launched_one_by_one() -> None:
    """Leaves of another dtype are another program, in the same passes over memory."""
    said = fo.explain(CLIPPED, {"a": torch.zeros(3), "b": torch.zeros(5).bfloat16()})
    assert (said.passes, said.launches) == (2, 4)
    assert [count(emit_c(k.signature)).launches for k in said.kernels] == [2, 2]


@pytest.mark.parametrize("tx", [fo.adamw(0.1), fo.chain(fo.clip_by_global_norm(1.0), fo.lamb(0.1))], ids=["1", "3"])
def test_kernels_allocate_nothing(tx: Any) -> None:
    """Memory that one pass takes and another gives back would be lost where the steps between them fail."""
    params = {"w": torch.ones(3)}
    with fo.use_backend("c"):
        kernels = fo.explain(tx, params).kernels
    assert kernels
    assert not [x for kernel in kernels for x in re.findall(r"\b(?:malloc|calloc|realloc|free)\b", kernel.source)]
