"""`pack` and `unpack`: a tree as views of one buffer per dtype and device, and back."""

from collections.abc import Iterator

import torch

from ._packed import Packed
from ._runtime.checks import at, check_stored
from ._runtime.internals import without_wrappers
from ._runtime.spec import PLAIN
from ._tree import Tree, flatten, packed_inside, paths, unpacked


def pack(tree: Tree) -> Packed:
    """Copies a tree into one buffer per dtype and device.

    Every function of the package takes the result in place of the tree: `init` makes packed state for it, updates of
    it are packed, and masks, labels and messages go by the paths of the tree. A step reads its few buffers and not
    its many tensors.

    Args:
      tree: a tree of dense tensors. None stays an absent leaf. A tensor that occurs twice is copied twice. Parameters
        that require a gradient are copied without their graph; for results of operations autograd records the copy,
        and for arguments of functions that `torch.func` differentiates.

    Returns:
      The packed tree. A packed tree is returned as it is.

    Raises:
      TypeError: a leaf is no dense tensor, or one of a class of its own.
      ValueError: a leaf has no memory.

    Example:
      >>> import functional_optim as fo, torch
      >>> params = pack({"w": torch.ones(2, 2), "b": torch.zeros(2)})
      >>> grads = {"w": torch.ones(2, 2), "b": torch.ones(2)}
      >>> tx = fo.sgd(learning_rate=0.5)
      >>> params, state = fo.apply_gradients(tx, params, grads, tx.init(params))
      >>> params
      Packed(2 leaves in 1 buffer: 16 of torch.float32 on cpu)
      >>> params.tree()["b"]
      tensor([-0.5000, -0.5000])
    """
    if isinstance(tree, Packed):
        return tree
    if torch.compiler.is_dynamo_compiling():
        from ._traced import pack_outside  # an import of the compiler, which takes seconds

        return pack_outside(pack, tree)
    inside = packed_inside(tree)
    if inside is not None:
        raise TypeError(f"the tree{at(inside)} is packed already, but not the whole tree; unpack it first.")
    leaves, spec = flatten(tree)
    for path, x in zip(paths(spec), leaves, strict=True):
        if x is not None:
            _check(path, x)
    return Packed.of(spec, [x.detach() if _is_parameter(x) else x for x in leaves])


def _is_parameter(x: object) -> bool:
    """Whether an object is a leaf of autograd's graph; the argument of `torch.func.grad` is one too, but followed."""
    return isinstance(x, torch.Tensor) and x.requires_grad and x.is_leaf and without_wrappers(x) is x


def _check(path: str, x: object) -> None:
    if not isinstance(x, torch.Tensor):
        hint = ""
        if isinstance(x, torch.nn.Module):
            hint = (
                "; `pack_module` packs a module, and `pack(dict(module.named_parameters()))` a copy of its parameters"
            )
        elif isinstance(x, Iterator):
            hint = "; pass a dict of it, such as `dict(module.named_parameters())`"
        raise TypeError(f"the leaf{at(path)} is {type(x).__name__} {x!r:.60}, expected a tensor{hint}.")
    if type(x) not in PLAIN:
        raise TypeError(
            f"the leaf{at(path)} is {type(x).__name__}, whose memory is not that of a tensor; pass the tree as it is."
        )
    if x.layout is not torch.strided:
        raise TypeError(f"the leaf{at(path)} is sparse ({x.layout}), expected a dense tensor; pass `x.to_dense()`.")
    check_stored("the tree", path, x)


def unpack(tree: Tree) -> Tree:
    """The tree that a packed tree stands for, whose leaves are views of its buffers.

    Args:
      tree: a packed tree; any other is returned as it is.

    Returns:
      The tree. To write to a leaf is to write to the packed tree.

    Example:
      >>> unpack(pack([torch.ones(2), torch.zeros(1)]))
      [tensor([1., 1.]), tensor([0.])]
    """
    return unpacked(tree)
