"""The address in pickles of classes and functions that are not public, wherever they are defined.

A name of this module stays as long as its pickles are to be read. What moves is imported from elsewhere.
"""

from ._addresses import publish
from ._chain import Chain as Chain
from ._compiler import rule, states
from ._compiler.slots import Slot as Slot
from ._compiler.states import (
    restore_slots as restore_slots,
    restore_state as restore_state,
)
from ._fusible import (
    RuleTransformation as RuleTransformation,
    Wrapping as Wrapping,
)
from ._masking import (
    Masked as Masked,
    Partition as Partition,
)
from ._optimizers.matrices import _IsMatrix as _IsMatrix
from ._runtime.internals import register_in_exports
from ._transforms.decay import _add_decayed_weights as _add_decayed_weights
from ._transforms.lbfgs import ScaleByLBFGSState as ScaleByLBFGSState
from ._transforms.linesearch import (
    BacktrackingLinesearchInfo as BacktrackingLinesearchInfo,
    ScaleByBacktrackingLinesearchState as ScaleByBacktrackingLinesearchState,
    ScaleByZoomLinesearchState as ScaleByZoomLinesearchState,
    ZoomLinesearchInfo as ZoomLinesearchInfo,
)
from ._tree import restore_packed as restore_packed


publish(__name__, [x for x in list(globals().values()) if x not in (publish, register_in_exports)])
for _cls in (
    ScaleByLBFGSState,
    ScaleByBacktrackingLinesearchState,
    ScaleByZoomLinesearchState,
    BacktrackingLinesearchInfo,
    ZoomLinesearchInfo,
):
    register_in_exports(_cls)  # by this address, as those of rules are by that of the rule
# the first files of states hold the address of a definition, before it moved
vars(rule).update(EmptyState=states.EmptyState, restore_state=states.restore_state)
