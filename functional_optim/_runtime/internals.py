"""The private names of torch that the package reads, each with the reason. A test says which one is gone.

Nothing here is guessed: each is a name of a Python module, read and never written. Others stand where they belong:

- of DTensors and FSDP, in `shard.py`;
- of Dynamo: `graph_break`, in `_graph/trace.py`, which torch's documentation has under this name;
- of `torch.optim.Optimizer`, which the optimizers in `adapters/` extend: `_init_group`, which the compiler runs in
  Python, in `optimizer.py`; `_step_supports_amp_scaling`, which `GradScaler` asks for, in `classes.py` and
  `transform.py`; `_optimizer_load_state_dict_pre_hooks` and `..._post_hooks`, which torch registers, in `_loading.py`;
- of Triton: `ASTSource` and `GPUTarget`, which `triton.compile` takes, and of what it returns `asm` and three fields of
  `metadata`, in `_compiler/triton/cubin.py`.
"""

import ctypes
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch


F = TypeVar("F", bound=Callable[..., Any])


def needs_dispatch() -> bool:
    """Whether a `torch.func` transformation, forward-mode AD, a dispatch mode or the compiler is active.

    They follow operations of torch, and raw pointers would bypass them. The public API has no question for the first
    three: `torch._C._functorch.peek_interpreter_stack` (a transformation is entered), `forward_ad._current_level` (a
    level of dual numbers is open), `torch._C._len_torch_dispatch_stack` (modes that are entered) and
    `torch._C._dispatch_tls_is_dispatch_key_included` (modes before autograd, as of `make_fx(pre_dispatch=True)`).
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or _others_follow()


def followers() -> str:
    """The transformations of `torch.func` that are active, the innermost first, as messages call them; or forward AD.

    See `vmap_levels` for the names of torch.
    """
    stack = torch._C._functorch.get_interpreter_stack() or ()
    names = [f"`torch.func.{x.key().name.lower()}`" for x in reversed(stack)]
    return " within ".join(names) or "forward-mode AD"


def in_transformation() -> bool:
    """Whether a `torch.func` transformation is active; see `needs_dispatch`."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def uncompiled(fn: F) -> F:
    """A function that Dynamo does not look into where a transformation of `torch.func` is active.

    Where a graph breaks within a transformation, Dynamo gives up the whole caller, and then compiles the functions that
    it calls one by one, those of a step among them.
    """
    active = "torch._dynamo" in sys.modules and torch._C._functorch.peek_interpreter_stack() is not None
    return _disabled(fn) if active else fn


@functools.lru_cache(maxsize=8)
def _disabled(fn: F) -> F:
    return torch.compiler.disable(fn)  # type: ignore[no-any-return, no-untyped-call]


def may_have_tangents() -> bool:
    """Whether forward-mode AD is active; a compiler may have opened its level without the knowledge of `forward_ad`."""
    return torch.autograd.forward_ad._current_level >= 0 or in_transformation()


def has_tangent(x: torch.Tensor) -> bool:
    """Whether forward-mode AD, which has one level of dual numbers, carries a tangent along with a tensor."""
    forward_ad: Any = torch.autograd.forward_ad
    return forward_ad.unpack_dual(x, level=0).tangent is not None


def is_differentiated(x: torch.Tensor) -> bool:
    """Whether a transformation of `torch.func` but `vmap`, or forward-mode AD, follows a tensor."""
    if is_wrapper_of_a_transformation(x):
        return not vmap_levels()
    return torch.autograd.forward_ad._current_level >= 0 and has_tangent(x)


def below_autograd() -> Any:
    """A context in which operations are dispatched to what stands below autograd.

    `torch._C._AutoDispatchBelowAutograd`; C++ has it as `at::AutoDispatchBelowAutograd`, for kernels of autograd that
    call the operation that they belong to. In Python there is no public name.
    """
    return torch._C._AutoDispatchBelowAutograd()


def register_in_exports(cls: type) -> None:
    """Registers a NamedTuple, so that `torch.export.save` can write the structure of trees that it is in.

    `torch.utils._pytree._register_namedtuple` gives it a name in files; public names are there for dataclasses only.
    """
    fields = getattr(cls, "_fields", ())
    # a rule has a state with a counter and without; AOTInductor's code has names between `R"(` and `)"`
    name = f"{cls.__module__}.{cls.__qualname__}[{', '.join(fields)}]"
    known = torch.utils._pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
    names = (name if k == 1 else f"{name} #{k}" for k in itertools.count(1))  # a copy of a rule has a class of its own
    free = next(n for n in names if known.get(n, cls) is cls)
    if free not in known:
        torch.utils._pytree._register_namedtuple(cls, serialized_type_name=free)


def in_checkpoint() -> bool:
    """Whether torch's checkpoints take a step for the sake of the state that it makes.

    They step an optimizer without state, all gradients and learning rates zero, and rely on that changing nothing else;
    with counters and with other chains it would. Processes do not communicate then, and a step of training may have the
    same zeros in one of them, so the module `torch.distributed.checkpoint.state_dict` among the callers is the sign.
    """
    module = sys.modules.get("torch.distributed.checkpoint.state_dict")
    if module is None:
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals is not vars(module):
        frame = frame.f_back
    return frame is not None


def current_raw_stream(index: int) -> int:
    """The current stream of a CUDA device, as the driver knows it.

    `torch._C._cuda_getCurrentRawStream`, which the code that torch's compiler writes imports. The public
    `torch.cuda.current_stream` makes an object for it, and takes thirty times as long.
    """
    return torch._C._cuda_getCurrentRawStream(index)


def in_backward() -> bool:
    """Whether this thread computes gradients right now, as it does in a hook of `backward`.

    `torch._C._current_graph_task_id` is -1 outside of the autograd engine; there is no public question.
    """
    return torch._C._current_graph_task_id() >= 0


def is_wrapper_of_a_transformation(x: Any) -> bool:
    """Whether a tensor is a wrapper that `torch.func` made, which may have left the function that it belongs to.

    It has torch's own class and no memory. `torch._C._functorch.is_functorch_wrapped_tensor` tells; `torch.func` has
    no public question.
    """
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


class MapLevel(NamedTuple):
    """A `torch.vmap` that is active.

    Args:
      level: its number among the transformations that are active, by which wrappers name it.
      size: number of members.
    """

    level: int
    size: int


def vmap_levels() -> tuple[MapLevel, ...]:
    """The calls of `torch.vmap` that are active, outermost first; none if other transformations are active, too.

    `torch._C._functorch.get_interpreter_stack` lists the transformations; each has a `key`, a `level`, and for `vmap`,
    seen as a `CVmapInterpreterPtr`, a `batchSize`. `torch._functorch.pyfunctorch` reads the same.
    """
    functorch: Any = torch._C._functorch
    levels = []
    for x in functorch.get_interpreter_stack() or ():
        if x.key() != functorch.TransformType.Vmap:
            return ()
        levels.append(MapLevel(x.level(), functorch.CVmapInterpreterPtr(x).batchSize()))
    return tuple(levels)


def map_levels() -> tuple[MapLevel, ...]:
    """The calls of `torch.vmap` that are active, outermost first; none if there is something else that follows too."""
    return () if _others_follow() else vmap_levels()


def _others_follow() -> bool:
    """Whether something follows operations that is no transformation; see `needs_dispatch`."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
        or torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
    )


def takes_gradients() -> bool:
    """Whether `torch.func.grad` and its like are active, which `torch.autograd.Function` serves, and nothing else.

    See `vmap_levels` for the names of torch.
    """
    functorch: Any = torch._C._functorch
    stack = functorch.get_interpreter_stack()
    return bool(stack) and all(x.key() == functorch.TransformType.Grad for x in stack) and not _others_follow()


def without_wrappers(x: Any) -> Any:
    """The tensor that a wrapper of `torch.func.grad` stands for; anything else as it is.

    `torch._C._functorch.is_gradtrackingtensor` and `get_unwrapped`, by which torch prints such tensors.
    """
    functorch: Any = torch._C._functorch
    while isinstance(x, torch.Tensor) and functorch.is_gradtrackingtensor(x):
        x = functorch.get_unwrapped(x)
    return x


def innermost(x: torch.Tensor) -> torch.Tensor:
    """The tensor that wrappers of `torch.func`, of any kind, stand for; see `without_wrappers`."""
    while is_wrapper_of_a_transformation(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def has_members(x: Any) -> bool:
    """Whether a tensor stands for those of several members of `torch.vmap`, so that Python cannot read its numbers.

    `torch._C._functorch.is_batchedtensor` and `get_unwrapped`; see `without_wrappers`.
    """
    functorch: Any = torch._C._functorch
    while is_wrapper_of_a_transformation(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def members_unwrapper() -> Callable[[torch.Tensor, int], tuple[torch.Tensor, int | None]]:
    """The function of a wrapper of `vmap` and a level that returns the tensor of all members, and their dimension.

    Of a tensor that is no wrapper of the level it returns the tensor and None. It is
    `torch._C._functorch._unwrap_batched`. A rule of `torch.library.register_vmap` is given the same, but only as an
    operation, and a call of one costs more than a step of a small ensemble.
    """
    return torch._C._functorch._unwrap_batched


def wrap_members(tensors: Sequence[torch.Tensor], level: int) -> list[torch.Tensor]:
    """Wrappers for tensors of all members, whose dimension is the first; `torch._C._functorch._add_batch_dim`."""
    wrap = torch._C._functorch._add_batch_dim
    return [wrap(x, 0, level) for x in tensors]


def outside_transformations() -> Any:
    """A context in which no transformation of `torch.func` follows operations on tensors that are not wrapped.

    `torch._C._DisableFuncTorch`, with which torch prints wrapped tensors.
    """
    return torch._C._DisableFuncTorch()


def before_transformations() -> Any:
    """A context in which no transformation of `torch.func` is entered, so that others may be.

    `torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack`, with which the compiler reads tensors. Within
    the kernel that an operation has for `vmap`, that call of `vmap` is at work and cannot follow another one.
    """
    return torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack()


# whether the kernel that an operation has for `vmap` may call another operation in a graph; before, torch's fallback
# for Python finds no snapshot of its thread-local state there, and fails an assertion
MEMBERS_IN_GRAPHS = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"


def all_transformations() -> Any:
    """A context in which functions of `torch.func` work, also in a kernel that a dispatch mode has called.

    A mode excludes the keys of all that is above it from the dispatch of operations, those of `vmap` among them, until
    its handler returns. `torch._C._ForceDispatchKeyGuard` sets them, as it does in `torch._dynamo.eval_frame`.
    """
    excluded: Any = torch._C._dispatch_tls_local_exclude_set()
    for name in ("Batched", "VmapMode", "DynamicLayerFrontMode", "DynamicLayerBackMode"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, f"FuncTorch{name}"))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def is_mapped_by_autograd(x: Any) -> bool:
    """Whether a cotangent stands for many, as with `torch.autograd.grad(..., is_grads_batched=True)`.

    `torch._C._functorch.is_legacy_batchedtensor`: autograd maps by a mechanism that is older than `torch.func`, and
    knows no functions.
    """
    return torch._C._functorch.is_legacy_batchedtensor(x)


def register_with_torch(
    cls: type,
    flatten: Callable[[Any], tuple[list[Any], Any]],
    unflatten: Callable[[Any, Any], Any],
    write: Callable[[Any], Any],
    read: Callable[[Any], Any],
) -> None:
    """Registers a container with torch's own pytrees, which `torch.func` works on.

    Args:
      cls: the container.
      flatten: a function that returns its children and the rest.
      unflatten: a function that makes it of both.
      write: a function of the rest that returns an object that JSON knows, for files of `torch.export`.
      read: the inverse of `write`.

    There is no public name: `torch.utils._pytree.register_pytree_node` is the one that torch's documentation of
    `torch.export` has for user classes; `SequenceKey` is how it names a child by its position.
    """

    def flatten_with_keys(x: Any) -> tuple[list[Any], Any]:
        children, rest = flatten(x)
        return [(torch.utils._pytree.SequenceKey(k), child) for k, child in enumerate(children)], rest

    torch.utils._pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"functional_optim.{cls.__name__}",
        to_dumpable_context=write,
        from_dumpable_context=read,
        flatten_with_keys_fn=flatten_with_keys,
    )


def structure_as_text(tree: Any) -> str:
    """The structure of a tree as `torch.export` writes it; there is no public name."""
    return torch.utils._pytree.treespec_dumps(torch.utils._pytree.tree_structure(tree))


def tree_from_text(text: str, leaves: Iterable[Any]) -> Any:
    """The tree of a structure that `structure_as_text` wrote, with these leaves."""
    return torch.utils._pytree.tree_unflatten(leaves, torch.utils._pytree.treespec_loads(text))


def leaves_as_written(tree: Any) -> list[Any]:
    """The leaves of a tree in the order of `structure_as_text`."""
    leaves: list[Any] = torch.utils._pytree.tree_leaves(tree)
    return leaves


def registries(module: torch.nn.Module) -> list[Mapping[str, Any]]:
    """The dicts in which a module, and each module within it, have their parameters and their children.

    `torch.nn.Module._parameters` and `_modules`. The public names walk them anew, a generator in a generator, which
    takes longer than the step of a packed module.
    """
    return [own for part in module.modules() for own in (part._parameters, part._modules)]


# whether a tensor is zero everywhere and stores nothing, as derivatives may be; torch prints tensors by it
is_zero_tensor = torch.Tensor._is_zerotensor


def library_of_torch() -> ctypes.CDLL:
    """The library that holds the stable C ABI of torch, which is linked to that of its Python module, `torch._C`."""
    return ctypes.CDLL(torch._C.__file__)


def version(x: Any) -> int:
    """The version counter of a tensor, which tells whether it has been written to; 0 for one that keeps none.

    `Tensor._version` is described in torch's notes on autograd; there is no public name.
    """
    return 0 if not isinstance(x, torch.Tensor) or x.is_inference() else x._version
