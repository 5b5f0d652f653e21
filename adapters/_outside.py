"""A step outside of a compiled graph. Imported while a compiler runs."""

from functional_optim._graph_breaks import outside


BREAK = (
    "a step of DTensors, of sparse gradients or with an extra argument that is no number is a graph break: operations "
    "are handed DTensors only if they can place their results, and sparse tensors and trees never"
)
step_outside = outside(BREAK)
