"""Optimizer states as safetensors files, which hold tensors and text and nothing that runs."""

import json
import os
from typing import Any

import torch


def save_safetensors(state_dict: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes what `Optimizer.state_dict` returned as a safetensors file.

    Args:
      state_dict: the state: tensors, numbers, strings, lists and dicts of them.
      path: the file.

    Raises:
      TypeError: the state holds something else.

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
    """Reads what `save_safetensors` wrote.

    Args:
      path: the file.

    Returns:
      The state, for `load_state_dict`.

    Raises:
      ValueError: another program wrote the file.
    """
    from safetensors import safe_open

    with safe_open(os.fspath(path), framework="pt") as file:
        text = (file.metadata() or {}).get("state_dict")
        if text is None:
            raise ValueError(f"{os.fspath(path)!r} holds no state of an optimizer written by `save_safetensors`.")
        state: dict[str, Any] = _decode(json.loads(text), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return state


def _encode(x: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Text for a nest of values; tensors are put aside, under their paths."""
    if isinstance(x, torch.Tensor):
        while path in tensors:  # a key may hold a dot, or be a number and another its text
            path += "'"
        tensors[path] = x.detach().clone().contiguous()
        return {"tensor": path}
    if isinstance(x, dict):
        # a key that is a number would come back as text
        return {"dict": [[k, _encode(v, f"{path}.{k}".lstrip("."), tensors)] for k, v in x.items()]}
    if isinstance(x, (list, tuple)):
        return {type(x).__name__: [_encode(v, f"{path}.{k}", tensors) for k, v in enumerate(x)]}
    if isinstance(x, torch.dtype):
        return {"dtype": str(x).removeprefix("torch.")}
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    raise TypeError(f"{path} is {type(x).__name__} {x!r:.60}, which a safetensors file cannot hold.")


def _decode(x: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(x, dict):
        return x
    [(kind, value)] = x.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dtype":
        return getattr(torch, value)
    if kind == "dict":
        return {k: _decode(v, tensors) for k, v in value}
    items = [_decode(v, tensors) for v in value]
    return tuple(items) if kind == "tuple" else items
