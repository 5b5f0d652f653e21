"""The compiler: a rule becomes a program, a program passes, a pass text. It knows dtypes, not tensors.

rule, a Python function of one leaf
  |  symbols.py, trace.py, fuse.py   symbols record the operations of a chain of rules;
  |  rewrites.py                     functions of torch in terms of the table's, ops.py
Program                     program.py: values, levels, stages; print it
  |  passes.py              passes over memory, split at reductions
Pass
  |  c/emit.py, triton/emit.py      text, one statement per value
  |  c/build.py, triton/build.py    text -> kernel; cache.py keeps it, on disk and in memory
kernel

`c/kernel.h` is the start of every C text; `c/threads.py` finds torch's threads. `reference.py` and `foreach.py`
evaluate a program with torch operations, without a compiler.
"""
