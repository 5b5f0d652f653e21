"""The compiler: programs over lists of tensors. It knows nothing of optimizers or pytrees.

rule, a Python function of one leaf
  |  trace.py      symbols record what the rule does
Program            program.py: values, levels, stages; print it
  |  plan.py       passes over memory, split at reductions
Pass
  |  emit_c.py, emit_triton.py     text, one statement per value
  |  cache.py, c/build.py, triton/build.py   text -> kernel, cached on disk
kernel
  |  launch.py     tables of addresses and numbers
new values         reference.py and foreach.py get here from the Program, without a compiler

Before a kernel is handed an address: layout.py says which tensors it can walk, guard.py whether those of this step are
like those that tables were made for (alike.py in Python, scan.py in C), versions.py tells autograd what was written.
pack.py lays small state side by side, collect.py reads thousands of Python objects at once. native.c is the C of that
and of scan.py; native.py puts it to use, interior.py finds out what it must know of torch.
"""

from collections.abc import Callable, Sequence

from .._compiler.cache import BuildError as BuildError
from .._compiler.foreach import run_foreach
from .._compiler.reference import run_reference
from .call import (
    Call as Call,
    Column as Column,
    LeafTable as LeafTable,
    Part as Part,
    Shard as Shard,
)
from .launch import run_c, run_triton


BACKENDS: dict[str, Callable[[Sequence[Call]], list[list[Column]]]] = {
    "reference": run_reference,
    "foreach": run_foreach,
    "c": run_c,
    "triton": run_triton,
}
