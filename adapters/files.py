"""Optimizer states as safetensors files, which hold tensors and text and nothing that runs."""

import json
import os
from typing import Any

import torch


KEYS = (str, int, float, bool, type(None))  # types of keys; text keeps them apart
# dtypes that safetensors has a name for; complex numbers are stored as pairs
PAIRS = (torch.float64, torch.float32, torch.float16)
STORABLE = frozenset(
    getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    )
)


def save_safetensors(state_dict: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a state dict of an optimizer as a safetensors file.

    Args:
      state_dict: the state: dense tensors, numbers, text, dtypes and None, in lists, tuples and dicts. A dict of
        another class comes back as a plain one.
      path: the file.

    Raises:
      TypeError: the state holds something else; no file has been written.

    Example:
      >>> import os, tempfile, torch
      >>> from functional_optim.adapters import AdamW
      >>> p = torch.nn.Parameter(torch.ones(2))
      >>> opt = AdamW([p])
      >>> p.grad = torch.ones(2)
      >>> opt.step()
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_safetensors(opt.state_dict(), os.path.join(folder, "opt.safetensors"))
      ...     opt.load_state_dict(load_safetensors(os.path.join(folder, "opt.safetensors")))
    """
    from safetensors.torch import save_file

    if not isinstance(state_dict, dict):
        raise TypeError(f"state_dict is {type(state_dict).__name__}, expected what `optimizer.state_dict()` returns.")
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_encode(state_dict, "", tensors))
    save_file(tensors, os.fspath(path), metadata={"state_dict": text})


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a file of `save_safetensors`.

    Args:
      path: the file.

    Returns:
      The state, for `load_state_dict`.

    Raises:
      ValueError: another program wrote the file, or it is not whole.

    Example:
      >>> import os, tempfile, torch
      >>> from functional_optim.adapters import SGD
      >>> opt = SGD([torch.nn.Parameter(torch.ones(2))], lr=0.5)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_safetensors(opt.state_dict(), os.path.join(folder, "opt.safetensors"))
      ...     load_safetensors(os.path.join(folder, "opt.safetensors"))["param_groups"][0]["lr"]
      0.5
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            text = (file.metadata() or {}).get("state_dict")
            tensors = {name: file.get_tensor(name) for name in file.keys()} if text is not None else {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)!r} is not whole, or no safetensors file: {error}") from error
    if text is None:
        raise ValueError(f"{os.fspath(path)!r} holds no state of an optimizer written by `save_safetensors`.")
    try:
        state = _decode(json.loads(text), tensors)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)!r} is not whole: {error}") from error
    if not isinstance(state, dict) or tensors:
        found = f"tensors that it does not name, {', '.join(map(repr, list(tensors)[:5]))}" if tensors else "no dict"
        raise ValueError(f"{os.fspath(path)!r} is not whole: its text goes with {found}.")
    return state


def _encode(x: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Text for a nest of values; tensors are put aside, under their paths."""
    if isinstance(x, torch.Tensor):
        name = path.encode("utf-8", "backslashreplace").decode()
        while name in tensors or name == "__metadata__":  # a key may hold a dot, or be a number and another its text
            name += "'"
        tensors[name] = _storable(x, path)
        return {"complex" if x.is_complex() else "tensor": name}
    if isinstance(x, dict):
        odd = next((k for k in x if type(k) not in KEYS), None)
        if odd is not None:
            raise TypeError(f"{path or 'the state'} has the key {odd!r:.60}, expected text or numbers for keys.")
        # a key that is a number would come back as text
        return {"dict": [[k, _encode(v, f"{path}.{k}".lstrip("."), tensors)] for k, v in x.items()]}
    if type(x) in (list, tuple):
        return {type(x).__name__: [_encode(v, f"{path}.{k}", tensors) for k, v in enumerate(x)]}
    if isinstance(x, torch.dtype):
        return {"dtype": str(x).removeprefix("torch.")}
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    raise TypeError(f"{path} is {type(x).__name__} {x!r:.60}, which a safetensors file cannot hold.")


def _storable(x: torch.Tensor, path: str) -> torch.Tensor:
    """A copy of a tensor, if a file can hold it."""
    if hasattr(x, "device_mesh"):
        raise TypeError(
            f"{path} is a DTensor, of which this process has a part; gather the state first, with "
            f"`get_optimizer_state_dict(..., options=StateDictOptions(full_state_dict=True))`."
        )
    if x.layout is torch.strided and not x.is_meta:
        plain = x.detach().clone(memory_format=torch.contiguous_format)
        plain = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
        if plain.dtype in STORABLE:
            return plain.resolve_neg()
    raise TypeError(f"{path} is a tensor ({x.dtype}, {x.layout}, on {x.device}) that a safetensors file cannot hold.")


def _decode(x: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The values that `_encode` made a text of; tensors are taken out of `tensors`, each once.

    Raises:
      ValueError: `_encode` made no such text.
    """
    if not isinstance(x, dict):
        if isinstance(x, list):
            raise ValueError(f"there is a list, {x!r:.60}, in the place of a value.")
        return x
    if len(x) != 1:
        raise ValueError(f"there is {x!r:.60} in the place of a value.")
    [(kind, value)] = x.items()
    if kind in ("tensor", "complex") and isinstance(value, str) and value in tensors:
        tensor = tensors.pop(value)
        if kind == "tensor":
            return tensor
        if tensor.dtype in PAIRS and tensor.shape[-1:] == (2,):
            return torch.view_as_complex(tensor.clone())  # the memory of a file is not aligned to pairs
    if kind == "dtype" and isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype):
        return getattr(torch, value)
    if kind in ("list", "tuple") and isinstance(value, list):
        items = [_decode(v, tensors) for v in value]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict" and isinstance(value, list):
        pairs: dict[Any, Any] = {}
        for pair in value:
            if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) not in KEYS or pair[0] in pairs:
                raise ValueError(f"there is {pair!r:.60} in the place of a key and a value.")
            pairs[pair[0]] = _decode(pair[1], tensors)
        return pairs
    raise ValueError(f"there is {x!r:.60} in the place of a value.")
