"""What the rules with moments share."""

from .._compiler.rule import Leaf, Scalar


def unbiased(moment: Leaf, decay: Scalar, step: Scalar) -> Leaf:
    r"""A moment corrected for its start at 0, $m_t / (1 - \beta^t)$.

    The reciprocal is the same for all elements and computed once; a division per element would cost more than the
    rest of the update.
    """
    return moment * (1 / (1 - decay**step))
