"""The runtime: tensors and launches. It knows programs, not trees or optimizers.

leaves, a tensor per leaf and column
  |  groups.py      groups of leaves that share a program
Group
  |  programs.py    programs, and the cells that their tensors are in
  |  step.py        BoundStep: launch structures filled once, checked and started at every step
launches            cpu.py, cuda/; evaluate.py where torch operations compute instead

Steps of other kinds are bound alike: `packed_step.py` reads buffers, `members.py` the stacks (`stacks.py`) of an
ensemble. `recording.py` has the derivative of a step.

`spec.py` describes a tensor, `pointers.py` reads and checks all tensors of a step in one operation, `overlap.py`
refuses memory that two leaves share, `shard.py` knows DTensors, `internals.py` lists the private names of torch in use.
"""
