"""Chains in place over leaves that each count their own steps and look up their own hyper-parameters.

This is what a stateful optimizer is made of. In the pure API a transformation counts steps for the whole tree and
its numbers are the same for every leaf; here a leaf brings a flat dict of state, its counter `step` among it, and
options, a mapping that `Option` looks things up in. All leaves still share one kernel per pass, whatever their
options are.
"""

from .._compiler.rule import Option as Option
from ..kernels.collect import (
    Contents as Contents,
    are_parts as are_parts,
)
from ..kernels.pack import (
    pack as pack,
    unpack as unpack,
)
from .layout import (
    Leaves as Leaves,
    view_of as view_of,
)
from .run import Leafwise as Leafwise
from .sharding import (
    MeshShard as MeshShard,
    local as local,
)
from .templates import (
    Keys as Keys,
    Path as Path,
    Template as Template,
    extras as extras,
    members as members,
    parts as parts,
    rewrite as rewrite,
    rules as rules,
    slots_of as slots_of,
)
