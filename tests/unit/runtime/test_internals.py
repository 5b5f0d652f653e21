"""The private names of torch and Triton in use: each is there, and answers as it is documented."""

import ctypes
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from functional_optim._runtime import pointers
from functional_optim._runtime.backend import _has_triton
from functional_optim._runtime.internals import (
    all_transformations,
    has_members,
    in_backward,
    is_mapped_by_autograd,
    is_wrapper_of_a_transformation,
    library_of_torch,
    map_levels,
    members_unwrapper,
    needs_dispatch,
    outside_transformations,
    registries,
    wrap_members,
)
from functional_optim._runtime.library import library, operations
from functional_optim._runtime.shard import is_fsdp1, local_tensor
from functional_optim._runtime.spec import TensorSpec


# Each name, the function that reads it, and the remedy if a version of torch lacks it.
NAMES = {
    "_C._functorch.peek_interpreter_stack": (
        "internals.needs_dispatch",
        "find out how `torch.func` tells that a transformation is entered",
    ),
    "_C._len_torch_dispatch_stack": (
        "internals.needs_dispatch",
        "see how `torch.utils._python_dispatch` counts the modes that are entered",
    ),
    "_C._dispatch_tls_is_dispatch_key_included": (
        "internals.needs_dispatch",
        "see how `torch._ops` counts the modes that are entered before autograd",
    ),
    "autograd.forward_ad._current_level": (
        "internals.needs_dispatch",
        "see how `forward_ad.enter_dual_level` counts open levels",
    ),
    "_C._current_graph_task_id": (
        "internals.in_backward",
        "see how `torch.utils.checkpoint` tells that a backward pass runs",
    ),
    "_C._AutoDispatchBelowAutograd": (
        "internals.below_autograd",
        "see how `torch.library` runs what stands below a kernel of autograd",
    ),
    "utils._pytree._register_namedtuple": (
        "internals.register_in_exports",
        "see how `torch.export.save` finds the names of NamedTuples",
    ),
    "utils._pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE": (
        "internals.register_in_exports",
        "see how `torch.utils._pytree` knows the classes that are registered",
    ),
    "_C._functorch.is_functorch_wrapped_tensor": (
        "internals.is_wrapper_of_a_transformation",
        "see how `torch._functorch` tells wrapped tensors",
    ),
    "Tensor._is_zerotensor": (
        "internals.is_zero_tensor",
        "see how the printing of tensors tells those that are zero without memory",
    ),
    "utils._pytree.register_pytree_node": (
        "internals.register_with_torch",
        "see how the documentation of `torch.export` registers containers",
    ),
    "Tensor._version": (
        "internals.version",
        "see how the notes on autograd tell that a tensor has been written to",
    ),
    "_C._functorch.get_interpreter_stack": (
        "internals.vmap_levels",
        "see how `torch._functorch.pyfunctorch` lists the transformations that are active",
    ),
    "_C._functorch.TransformType.Vmap": (
        "internals.vmap_levels",
        "see how `torch._functorch.pyfunctorch` tells `vmap` from others",
    ),
    "_C._functorch.CVmapInterpreterPtr.batchSize": (
        "internals.vmap_levels",
        "see how `torch._functorch.pyfunctorch.VmapInterpreter` tells the number of members",
    ),
    "_C._functorch._unwrap_batched": (
        "internals.members_unwrapper",
        "see how `torch._functorch.vmap.unwrap_batched` takes wrappers off",
    ),
    "_C._functorch._add_batch_dim": (
        "internals.wrap_members",
        "see how `torch._functorch.vmap` puts wrappers on",
    ),
    "_C._functorch.is_gradtrackingtensor": (
        "internals.without_wrappers",
        "see how `torch._tensor_str` prints wrapped tensors",
    ),
    "_C._functorch.get_unwrapped": (
        "internals.without_wrappers",
        "see how `torch._tensor_str` prints wrapped tensors",
    ),
    "_C._functorch.is_batchedtensor": (
        "internals.has_members",
        "see how `torch._tensor_str` prints wrapped tensors",
    ),
    "_C._ForceDispatchKeyGuard": (
        "internals.all_transformations",
        "see how `torch._dynamo.eval_frame` sets the keys that are excluded from dispatch",
    ),
    "_C._dispatch_tls_local_exclude_set": (
        "internals.all_transformations",
        "see how `torch._dynamo.eval_frame` reads the keys that are excluded from dispatch",
    ),
    "_functorch.pyfunctorch.temporarily_clear_interpreter_stack": (
        "internals.before_transformations",
        "see how `torch._dynamo` reads tensors outside of transformations",
    ),
    "_C._DisableFuncTorch": (
        "internals.outside_transformations",
        "see how `torch._tensor_str` prints wrapped tensors",
    ),
    "_C.__file__": (
        "internals.library_of_torch",
        "find the library that holds the stable C ABI in the package of torch",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_private_name_is_there(name: str) -> None:
    reader, remedy = NAMES[name]
    try:
        attrgetter(name)(torch)
    except AttributeError:
        pytest.fail(f"torch {torch.__version__} has no torch.{name}, which _runtime/{reader} reads: {remedy}.")


def test_private_names_of_optimizers() -> None:
    optimizer = torch.optim.SGD([torch.ones(1)])
    optimizer.register_load_state_dict_pre_hook(lambda optimizer, state: None)
    optimizer.register_load_state_dict_post_hook(lambda optimizer: None)
    for name in ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"):
        assert len(getattr(optimizer, name, ())) == 1, (
            f"torch {torch.__version__} keeps hooks in another place than Optimizer.{name}, which adapters/_loading.py "
            f"reads: see `Optimizer.load_state_dict`."
        )

    asked = inspect.getsource(torch.amp.GradScaler.step)
    assert '"_step_supports_amp_scaling"' in asked, (
        f"torch {torch.__version__}: GradScaler.step does not ask for _step_supports_amp_scaling, which adapters set: "
        f"see how fused optimizers are handed `found_inf`."
    )
    traced = Path(torch.__file__).parent / "_dynamo" / "variables" / "optimizer.py"  # imported, it takes seconds
    assert '"_init_group"' in traced.read_text(encoding="utf-8"), (
        f"torch {torch.__version__}: the compiler does not run Optimizer._init_group in Python, which "
        f"adapters/optimizer.py relies on: see how it traces the optimizers of torch."
    )


def test_private_names_of_triton() -> None:
    """The driver of a GPU has the name `get_current_stream` of an instance; `tests/cuda` calls it."""
    if not _has_triton():
        pytest.skip("Triton is not installed")
    import triton

    for name in ("runtime.driver.set_active", "runtime.JITFunction.warmup", "compiler.CompiledKernel.__getitem__"):
        try:
            attrgetter(name)(triton)
        except AttributeError:
            pytest.fail(
                f"triton {triton.__version__} has no triton.{name}: see _runtime/cuda/loaded.py and streams.py."
            )


def test_functions_of_the_c_abi_are_there() -> None:
    if operations() is None and not _compiles():
        pytest.skip("there is no C compiler")
    n = ctypes.c_int.in_dll(library(), "n_functions").value
    names = [name.decode() for name in (ctypes.c_char_p * n).in_dll(library(), "function_names")]
    torch_library = library_of_torch()
    libraries = {name: ctypes.pythonapi if name.startswith("Py") else torch_library for name in names}
    missing = [name for name, found in libraries.items() if not hasattr(found, name)]
    assert not missing, (
        f"torch {torch.__version__} or Python lacks {missing} of its C ABI, which pointers.c calls: see the headers of "
        f"torch/csrc/stable for their successors. Without them tensors are checked in Python, which is slower."
    )
    assert operations() is not None, "all functions are there, but torch did not register the operations"


def _compiles() -> bool:
    try:
        library()
    except pointers.BuildError:
        return False
    return True


# -- whether torch has to see each operation --------------------------------------------------------------------------


class Watching(TorchDispatchMode):
    """A dispatch mode that does nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def asked_inside(transform: Callable[[Callable[..., Any]], Callable[..., Any]]) -> list[bool]:
    """The answers of `needs_dispatch` within a transformed function, of a vector."""
    answers = []

    def function(x: torch.Tensor) -> torch.Tensor:
        answers.append(needs_dispatch())
        return (x * x).sum()

    transform(function)(torch.ones(3))
    return answers


TRANSFORMS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "vmap": torch.vmap,
    "grad": torch.func.grad,
    "vjp": lambda f: lambda x: torch.func.vjp(f, x),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    "jacrev": torch.func.jacrev,
    "functionalize": torch.func.functionalize,
    "make_fx before dispatch": lambda f: make_fx(f, pre_dispatch=True),
    "grad in vmap": lambda f: torch.vmap(torch.func.grad(lambda x: f(x[None]))),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, where it imports jvp
@pytest.mark.parametrize("name", TRANSFORMS)
def test_needs_dispatch_inside_a_transformation(name: str) -> None:
    assert not needs_dispatch()
    answers = asked_inside(TRANSFORMS[name])
    assert answers
    assert all(answers), f"torch {torch.__version__}: peek_interpreter_stack does not tell that {name} is entered"
    assert not needs_dispatch()


CONTEXTS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], bool]] = {
    "nothing": (nullcontext, False),
    "no_grad": (torch.no_grad, False),
    "inference_mode": (torch.inference_mode, False),
    "default device": (lambda: torch.device("cpu"), False),  # a mode of functions, not of operations
    "dispatch mode": (Watching, True),
    "dual level": (forward_ad.dual_level, True),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_needs_dispatch_inside_a_context(name: str) -> None:
    context, expected = CONTEXTS[name]
    with context():
        assert needs_dispatch() is expected
    assert not needs_dispatch()


# -- whether gradients are computed -----------------------------------------------------------------------------------


def test_in_backward_inside_of_hooks_only() -> None:
    x = torch.ones(2, requires_grad=True)
    answers = []
    x.register_hook(lambda g: answers.append(in_backward()))
    x.register_post_accumulate_grad_hook(lambda p: answers.append(in_backward()))
    assert not in_backward()
    (x * x).sum().backward()  # type: ignore[no-untyped-call]
    assert answers == [True, True]
    assert not in_backward()


# -- the form of a tensor ---------------------------------------------------------------------------------------------


@pytest.fixture
def escaped() -> dict[str, torch.Tensor]:
    """Tensors that have left the transformed function that they belong to."""
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: (kept.update({name: x}), x.sum())[1]

    torch.vmap(keep("vmap"))(torch.ones(2, 3))
    torch.func.grad(keep("grad"))(torch.ones(3))
    return kept


def test_wrappers_of_a_transformation(escaped: dict[str, torch.Tensor]) -> None:
    for name, x in escaped.items():
        assert type(x) is torch.Tensor, name
        assert is_wrapper_of_a_transformation(x), name
    assert not is_wrapper_of_a_transformation(torch.ones(3))
    assert not is_wrapper_of_a_transformation(torch.nn.Parameter(torch.ones(3)))


def test_members_of_nested_calls_of_vmap() -> None:
    found: list[Any] = []

    def inner(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        levels, unwrap = map_levels(), members_unwrapper()
        found.extend([level.size for level in levels])
        whole, dim = unwrap(x, levels[1].level)
        found.append((dim, unwrap(whole, levels[0].level)[1]))
        found.append(unwrap(y, levels[1].level)[1])
        with outside_transformations():
            plain = torch.arange(3.0)
        return wrap_members([plain], levels[1].level)[0] + y

    result = torch.vmap(lambda x, y: torch.vmap(inner, (0, None))(x, y))(torch.zeros(2, 3, 4), torch.ones(2))

    why = f"torch {torch.__version__} wraps tensors of `vmap` otherwise"
    assert found == [2, 3, (0, 0), None], why
    assert result.tolist() == [[1.0, 2.0, 3.0]] * 2, why


def test_members_behind_other_wrappers() -> None:
    answers: list[bool] = []

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        answers.extend([has_members(x), has_members(y)])
        return (x * y).sum()

    torch.vmap(torch.func.grad(function), (0, None))(torch.ones(2, 3), torch.ones(3))
    torch.func.grad(lambda x, y: torch.vmap(function, (0, None))(x, y).sum())(torch.ones(2, 3), torch.ones(3))
    torch.func.grad(function)(torch.ones(3), torch.ones(3))

    assert answers == [True, False, True, False, False, False], f"torch {torch.__version__} nests wrappers otherwise"


def test_registries_of_a_module() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU())
    found = registries(module)
    objects = [x for own in found for x in own.values()]

    assert list(map(id, objects)) == list(map(id, [*module, module[0].weight, module[0].bias])), (
        f"torch {torch.__version__} keeps parameters in other places: see how `torch.nn.Module.named_parameters` finds "
        f"them."
    )
    module[0].bias = None
    assert next(own for own in found if "bias" in own)["bias"] is None


def test_vmap_in_the_handler_of_a_mode() -> None:
    class Mapping(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with all_transformations():
                return torch.vmap(lambda x: x * x.sum())(*args)

    x = torch.ones(2, 3)
    with Mapping():
        found = x.exp()
    assert found.tolist() == [[3.0] * 3] * 2, f"torch {torch.__version__} excludes transformations in other ways"


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "vmap"])
def test_nothing_but_vmap_has_members(name: str) -> None:
    answers = []

    def function(x: torch.Tensor) -> torch.Tensor:
        answers.append(map_levels())
        return (x * x).sum()

    TRANSFORMS[name](function)(torch.ones(3))
    with Watching():
        torch.vmap(function)(torch.ones(2, 3))
    assert answers
    assert not any(answers)
    assert map_levels() == ()


def test_spec_of_a_tensor_that_is_zero_without_memory() -> None:
    """Forward-mode AD hands them out as tangents that nothing has been given for."""
    assert TensorSpec.of(torch._efficientzerotensor((3,))).lazy
    assert not TensorSpec.of(torch.zeros(3)).lazy


def test_local_tensor_of_a_dtensor() -> None:
    """`DTensor._local_tensor` is the very tensor that holds the elements, which `to_local` returns a view of."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x: Any = distribute_tensor(torch.arange(4.0), init_device_mesh("cpu", (1,)), [Replicate()])
        assert hasattr(x, "_local_tensor"), (
            f"torch {torch.__version__}: DTensor has no _local_tensor, which _runtime/shard.local_tensor reads: use "
            f"`to_local()`, which makes a view."
        )
        assert type(local_tensor(x)) is torch.Tensor
        assert local_tensor(x) is local_tensor(x)
        assert local_tensor(x).data_ptr() == x.to_local().data_ptr()
        assert local_tensor(x).tolist() == [0.0, 1.0, 2.0, 3.0]
        assert hasattr(x, "_spec"), (
            f"torch {torch.__version__}: DTensor has no _spec, which _runtime/shard.LocalTensors compares: compare "
            f"`placements`, `device_mesh` and `shape`."
        )
        spec = x._spec
        x.add_(1.0)
        assert x._spec is spec
        other = x.redistribute(placements=[Shard(0)])
        assert x._spec != other._spec
        assert (spec.placements, spec.mesh, spec.shape) == (x.placements, x.device_mesh, x.shape)
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP:UserWarning")
def test_mark_of_flattened_parameters() -> None:
    """FSDP1 marks the plain parameters that it makes with `use_orig_params=True`."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(torch.nn.Linear(2, 2), use_orig_params=True, device_id=torch.device("cpu"))
        marked = [is_fsdp1(p) for p in model.parameters()]
    finally:
        dist.destroy_process_group()
    assert marked
    assert all(marked), (
        f"torch {torch.__version__}: FSDP1 does not set _fsdp_flattened on parameters, which _runtime/shard.is_fsdp1 "
        f"reads: see `torch.distributed.fsdp._common_utils` for the mark."
    )
    assert not is_fsdp1(torch.nn.Parameter(torch.ones(2)))


def test_cotangents_that_autograd_maps() -> None:
    """`torch.autograd.grad(..., is_grads_batched=True)` hands wrappers of many cotangents to functions."""
    seen: list[bool] = []

    class Note(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, d: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            seen.append(is_mapped_by_autograd(d))
            return d

    x = torch.ones(2, requires_grad=True)
    y = Note.apply(x)  # type: ignore[no-untyped-call]
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y.sum(), x)
    assert seen == [True, False]
