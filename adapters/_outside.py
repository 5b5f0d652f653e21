"""A step outside of a compiled graph. Imported while a compiler runs."""

from functional_optim._graph_breaks import outside


BREAK = (
    "a step of DTensors, of sparse gradients or with an extra argument that is no number is a graph break: operations "
    "are handed DTensors only if they can place their results, and sparse tensors and trees never"
)
RECORDED = (
    "a step with differentiable=True is a graph break: it writes in place and autograd records it, which an operation "
    "of a graph cannot do; for a whole graph differentiate a step of the pure API, `apply_gradients`"
)
step_outside, recorded_step_outside = outside(BREAK), outside(RECORDED)
