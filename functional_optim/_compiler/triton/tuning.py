"""Sizes of Triton programs, by kind of pass: a table of constants, with the card that each was tuned on.

A program of a pass that only streams has one block, for many small programs keep memory busiest. A program of a pass
that reduces has several, for each leaves a partial result that the next uniform kernel adds up.

A thread has as many elements as fill 16 bytes of the widest array. With more, Triton would store that array in another
layout than the others, and have its elements change threads by way of shared memory.
"""

from typing import NamedTuple

from ..passes import Pass, Signature
from ..program import Level


class Tuning(NamedTuple):
    """The size of a program.

    Args:
      block: elements of a block.
      warps: warps of a program, of 32 threads each.
      registers: most registers of a thread with which as many programs run at once as the constants were tuned for.
      card: the card that they were tuned on, or the reason for them.
    """

    block: int
    warps: int
    registers: int
    card: str


TUNED = {
    "stream": Tuning(1024, 8, 64, "H100 80GB HBM3: the best of 60 pairs for AdamW; longer programs lose up to 15%"),
    "stream, 16 bits": Tuning(
        2048, 8, 80, "H100: 97% of the copy bandwidth in AdamW; 16 bytes of an array for each thread"
    ),
    "stream, mixed": Tuning(
        1024, 8, 64, "H100: 99% of the copy bandwidth in AdamW; 16 bytes of the widest array, 8 of a half type"
    ),
    "stream, 64 bits": Tuning(
        512, 8, 64, "H200: 95% of the copy bandwidth in AdamW; 16 bytes of the widest array for each thread"
    ),
    "norm": Tuning(4096, 8, 128, "H100 80GB HBM3: the best of three for the norm of a clip"),
    "reduce": Tuning(
        1024, 8, 128, "H100: 97% of the copy bandwidth in LAMB; the block of `stream`, for it also stores much"
    ),
    "norm, 16 bits": Tuning(
        4096,
        4,
        128,
        "not measured: of six sizes one of two with most bytes on their way, by their registers on sm_90",
    ),
    "reduce, 16 bits": Tuning(
        1024,
        4,
        128,
        "not measured: of six sizes the one with most bytes on their way, by their registers in LAMB on sm_90",
    ),
}
LEAVES = 128  # leaves of a program of a uniform kernel, unless it ends reductions over leaves: then it has one
UNIFORM_WARPS = 4
CHUNK = 32768  # elements of a program that reduces, a multiple of every block
MAX_PARTIALS = 16384  # partial results of a reduction, because every program of a uniform kernel adds them up


def kind_of(signature: Signature, p: Pass) -> str:
    """The row of `TUNED` of a pass."""
    outputs = signature.program.outputs
    stored = [k for k in p.stores if outputs[k].level is Level.ELEMENT]
    is_norm = len(p.reductions) == 1 and not stored and len(p.inputs) + len(p.reloads) <= 2
    dtypes = [signature.dtypes[signature.program.values[i].name] for i in p.inputs]
    dtypes += [signature.outputs[k] for k in (*stored, *[k for _, k in p.reloads])]
    widths = {8 * dtype.itemsize for dtype in dtypes}
    kind = "norm" if is_norm else "reduce" if p.reductions else "stream"
    if widths == {16}:
        return f"{kind}, 16 bits"
    if p.reductions:
        return kind
    return "stream, 64 bits" if 64 in widths else "stream, mixed" if len(widths) > 1 else kind


def chunk_size(n_elements: int) -> int:
    """The number of elements of a program that reduces, for a number of elements in all."""
    longest = max(tuning.block for tuning in TUNED.values())
    return max(CHUNK, -(-n_elements // (MAX_PARTIALS * longest)) * longest)
