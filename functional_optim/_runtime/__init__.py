"""The runtime: tensors and launches. It knows programs, not trees or optimizers.

leaves, a tensor per leaf and column
  |  plan.py        groups of leaves that share a program
Group
  |  step.py        BoundStep: launch structures filled once, checked and started at every step
launches            cpu.py, cuda/; evaluate.py where torch operations compute instead

`spec.py` describes a tensor, `pointers.py` reads and checks all tensors of a step in one operation, `overlap.py`
refuses memory that two leaves share, `shard.py` knows DTensors, `internals.py` lists the private names of torch in use.
"""
