"""States in safetensors files: what goes in comes out, and what is no whole state is refused in one way."""

import collections
import copy
import enum
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import (
    HealthCheck,
    given,
    settings,
    strategies as st,
)

import functional_optim as fo
from _lib.compare import assert_same_bits
from _lib.optimizers import OURS, content, make_params, train
from functional_optim.adapters import SGD, AdamW, TransformOptimizer, load_safetensors, save_safetensors


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
)
ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)


def tensor(dtype: torch.dtype, shape: list[int], transposed: bool) -> torch.Tensor:
    x = torch.arange(max(torch.Size(shape).numel(), 1))[: torch.Size(shape).numel()].reshape(shape).to(dtype)
    return x.t().conj() if transposed and x.ndim == 2 else x


# floats are compared as text below, in which NaN is itself and -0.0 is not 0.0; keys are compared by type too
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text()
values = scalars | st.sampled_from(DTYPES) | st.builds(
    tensor, st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3), st.booleans()
)  # fmt: skip
nests = st.recursive(
    values,
    lambda x: (
        st.lists(x, max_size=4)
        | st.lists(x, max_size=4).map(tuple)
        | st.dictionaries(scalars.filter(lambda k: k == k), x, max_size=4)
    ),
    max_leaves=20,
)


def shown(x: Any) -> Any:
    """A nest as nests of types and texts, which are equal where the nests are the same."""
    if isinstance(x, torch.Tensor):
        return x.dtype, x.shape, repr(x.tolist())
    if isinstance(x, dict):
        return dict, [(shown(k), shown(v)) for k, v in x.items()]
    if isinstance(x, (list, tuple)):
        return type(x), [shown(v) for v in x]
    return type(x), repr(x)


@pytest.mark.slow
@ONE_FOLDER
@given(state=st.dictionaries(st.text() | st.just("__metadata__"), nests, max_size=4))
def test_what_is_saved_is_what_is_loaded(state: dict[str, Any], tmp_path: Path) -> None:
    save_safetensors(state, tmp_path / "state.safetensors")

    assert shown(load_safetensors(tmp_path / "state.safetensors")) == shown(state)


class Pair(NamedTuple):
    x: int
    y: int


class Mode(enum.Enum):
    ON = 1


UNSTORABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "a tuple for a key": (lambda: {"state": {("a", 1): 1}}, r"state has the key \('a', 1\)"),
    "a tensor for a key": (lambda: {"state": {torch.ones(()): 1}}, "state has the key tensor"),
    "an enumeration for a key": (lambda: {Mode.ON: 1}, "the state has the key <Mode.ON"),
    "a function": (lambda: {"hook": print}, "hook is builtin_function_or_method"),
    "a set": (lambda: {"state": {0: {1}}}, "state.0 is set"),
    "a named tuple": (lambda: {"state": [Pair(1, 2)]}, r"state\.0 is Pair Pair\(x=1, y=2\)"),
    "bytes": (lambda: {"x": b"1"}, "x is bytes"),
    "a complex number": (lambda: {"x": 1j}, "x is complex"),
    "a sparse tensor": (lambda: {"x": torch.ones(2).to_sparse()}, "x is a tensor .*torch.sparse_coo"),
    "a tensor on meta": (lambda: {"x": torch.ones(2, device="meta")}, "x is a tensor .*on meta"),
    "a quantized tensor": (lambda: {"x": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)}, "torch.qint8"),
    "no dict": (lambda: [1], "state_dict is list"),
}


@pytest.mark.parametrize("case", UNSTORABLE)
@pytest.mark.filterwarnings("ignore:.*quant")
def test_what_would_not_come_back_is_refused_by_its_path(case: str, tmp_path: Path) -> None:
    make, message = UNSTORABLE[case]

    with pytest.raises(TypeError, match=message):
        save_safetensors(make(), tmp_path / "state.safetensors")

    assert list(tmp_path.iterdir()) == []


def test_parts_of_distributed_tensors_are_refused(tmp_path: Path) -> None:
    dist, tensors = map(pytest.importorskip, ("torch.distributed", "torch.distributed.tensor"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        x = tensors.distribute_tensor(torch.ones(2), mesh, [tensors.Shard(0)])
        with pytest.raises(TypeError, match=r"state\.0\.x is a DTensor.*full_state_dict=True"):
            save_safetensors({"state": {0: {"x": x}}}, tmp_path / "state.safetensors")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict, lambda d: collections.defaultdict(int, d)])
def test_dicts_of_any_class_are_saved_as_dicts(kind: Any, tmp_path: Path) -> None:
    save_safetensors(kind({"a": 1}), tmp_path / "state.safetensors")

    assert load_safetensors(tmp_path / "state.safetensors") == {"a": 1}


def test_a_state_of_complex_parameters(tmp_path: Path) -> None:
    opts = [AdamW(make_params(torch.complex128, ((3,),))) for _ in range(2)]
    for opt in opts:
        [p] = opt.param_groups[0]["params"]
        p.grad = torch.full((3,), 1 + 2j, dtype=torch.complex128)
    opts[0].step()

    save_safetensors(opts[0].state_dict(), tmp_path / "state.safetensors")
    opts[1].load_state_dict(load_safetensors(tmp_path / "state.safetensors"))

    assert_same_bits(*[list(opt.state.values()) for opt in opts])


# --- files that are not whole


def write(path: Path, text: str, tensors: dict[str, Any] | None = None) -> Path:
    """A file of safetensors with some text in the place of a state, and a tensor `x` of one float32."""
    x = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": {"state_dict": text}, **({"x": x} if tensors is None else tensors)}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    return path


X = '["x", {"tensor": "x"}]'
TAMPERED: dict[str, str] = {
    "a module": f'{{"dict": [{X}, ["d", {{"dtype": "os"}}]]}}',
    "a class": f'{{"dict": [{X}, ["d", {{"dtype": "Tensor"}}]]}}',
    "a number for a dtype": f'{{"dict": [{X}, ["d", {{"dtype": 3}}]]}}',
    "a key that is a list": f'{{"dict": [{X}, [["a", 1], 1]]}}',
    "a key that occurs twice": f'{{"dict": [{X}, ["a", 1], ["a", 2]]}}',
    "a pair of three": f'{{"dict": [{X}, ["a", 1, 2]]}}',
    "no pair": f'{{"dict": [{X}, 3]}}',
    "a dict of a dict": '{"dict": {"x": {"tensor": "x"}}}',
    "a number for a list": f'{{"dict": [{X}, ["l", {{"list": 3}}]]}}',
    "a text for a list": f'{{"dict": [{X}, ["l", {{"list": "abc"}}]]}}',
    "a list without its name": f'{{"dict": [{X}, ["l", [1, 2]]]}}',
    "a kind that there is not": f'{{"dict": [{X}, ["l", {{"set": [1]}}]]}}',
    "two kinds": f'{{"dict": [{X}, ["l", {{"list": [], "tuple": []}}]]}}',
    "no kind": f'{{"dict": [{X}, ["l", {{}}]]}}',
    "a tensor that there is not": f'{{"dict": [{X}, ["y", {{"tensor": "y"}}]]}}',
    "a tensor that is there twice": f'{{"dict": [{X}, ["y", {{"tensor": "x"}}]]}}',
    "a tensor that is nowhere": '{"dict": []}',
    "a number for a tensor": '{"dict": [["x", {"tensor": 0}]]}',
    "pairs that are none": '{"dict": [["x", {"complex": "x"}]]}',
    "no dict": '{"tensor": "x"}',
    "text that is cut": '{"dict": [["x", {"tens',
    "no text": "",
    "a nest that is too deep": '{"list": [' * 100_000,
    "a nest that is whole and too deep": '{"list": [' * 3000 + "]}" * 3000,
    "a number that is too long": f'{{"dict": [{X}, ["n", {"1" * 5000}]]}}',
}


@pytest.mark.parametrize("case", TAMPERED)
def test_text_that_no_state_was_made_into(case: str, tmp_path: Path) -> None:
    path = write(tmp_path / "state.safetensors", TAMPERED[case])

    with pytest.raises(ValueError, match="is not whole"):
        load_safetensors(path)


jsons = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["x", "y", "float32", "os", "Tensor"]),
    lambda x: (
        st.lists(x, max_size=3)
        | st.dictionaries(st.sampled_from(["dict", "list", "tuple", "dtype", "tensor", "complex", "y"]), x, max_size=2)
    ),
    max_leaves=12,
)


def loads_or_is_refused(path: Path) -> None:
    """Nothing but a dict of what states are made of comes out, or ValueError."""
    try:
        state = load_safetensors(path)
    except ValueError:
        return
    assert type(state) is dict
    save_safetensors(state, path)  # which takes nothing else


@ONE_FOLDER
@given(text=jsons.map(json.dumps) | st.text())
def test_any_text(text: str, tmp_path: Path) -> None:
    loads_or_is_refused(write(tmp_path / "state.safetensors", text))


@pytest.mark.slow
@ONE_FOLDER
@given(text=jsons.map(lambda x: json.dumps({"dict": [["x", {"tensor": "x"}], ["a", x]]})))
def test_any_text_in_a_state(text: str, tmp_path: Path) -> None:
    loads_or_is_refused(write(tmp_path / "state.safetensors", text))


@ONE_FOLDER
@given(data=st.data())
def test_any_bytes_that_are_changed_or_missing(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_safetensors({"state": {0: {"x": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))])

    loads_or_is_refused(path)


def test_a_file_that_is_not_there_is_a_matter_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_safetensors(tmp_path / "state.safetensors")


# --- states that are loaded into an optimizer


edits = st.one_of(
    jsons,
    st.sampled_from([torch.ones(2), torch.ones(16), torch.ones(4, 8), torch.tensor(3), torch.ones(0), torch.float32]),
)


CHANGED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    **{name: (lambda params, cls=cls: cls(params, lr=0.01)) for name, cls in OURS.items()},
    "SGD": lambda params: SGD(params, lr=0.01, momentum=0.9),
    "chain": lambda params: TransformOptimizer(params, fo.chain(fo.adamw(0.01), fo.params_ema(0.9))),
}


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(name=st.sampled_from(sorted(CHANGED)), data=st.data())
def test_a_state_that_was_changed_loads_or_is_refused_and_changes_nothing(name: str, data: st.DataObject) -> None:
    """And the optimizer steps on in either case."""
    opt, other = (CHANGED[name](make_params(shapes=((4, 8), (16,)))) for _ in range(2))
    train([opt, other], range(2))
    saved = copy.deepcopy(opt.state_dict())
    places = [saved, saved["state"], *saved["state"].values(), *saved["param_groups"]]
    place = data.draw(st.sampled_from(places))
    key = data.draw(st.sampled_from([k for k in place if k != "foreach"]))
    place[key] = data.draw(edits)

    try:
        opt.load_state_dict(saved)
    except ValueError:
        assert_same_bits(content(opt), content(other))
        train([opt, other], range(2, 4))
        assert_same_bits(content(opt), content(other))
    else:
        with torch.no_grad():
            for group in opt.param_groups:
                group["lr"] = 0.01  # a learning rate that is NaN is refused by the step
        train([opt], range(2, 4))
