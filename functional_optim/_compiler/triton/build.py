"""From Triton source to a module: write it to the cache, where Triton reads it again, and run it."""

import hashlib
import os
from pathlib import Path
from types import ModuleType

from .. import cache
from ..cache import (
    BuildError as BuildError,
    KernelCache,
    ToolError,
)
from . import interpreted


def interprets() -> bool:
    """Whether Triton's interpreter runs kernels, on tensors of the CPU. Triton reads the variable alike."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def load_triton(source: str) -> ModuleType:
    """Writes Triton source to the cache and runs it.

    Args:
      source: text of a module.

    Returns:
      The module, the same one for the same source. It is in no other place than this: `sys.modules` lacks it.

    Raises:
      BuildError: Triton is not installed or does not take the source, or no folder can be written to.
    """
    return _modules.get(source)


def _build(source: str, folder: Path) -> ModuleType:
    try:
        with cache.forks_wait():
            import triton  # noqa: F401
    except Exception as error:  # Triton is missing, or broken: a library of it that cannot be loaded, say
        raise ToolError(f"Triton cannot be imported ({error})") from error
    content = source.encode()
    name = f"functional_optim_{hashlib.sha256(content).hexdigest()[:32]}"
    path = folder / f"{name}.py"
    if not path.is_file() or path.read_bytes() != content:
        cache.write(path, content)
    module = ModuleType(name)
    module.__file__ = str(path)  # Triton reads the source of a kernel from its file
    code = compile(source, str(path), "exec")
    try:
        with cache.forks_wait():
            exec(code, module.__dict__)  # not imported: no bytecode is trusted or left
    except OSError:  # the file is gone
        raise
    except Exception as error:
        raise ToolError(f"Triton does not take {path} ({type(error).__name__}: {error})") from error
    if interprets() and hasattr(module, "libdevice"):
        module.__dict__.update(libdevice=interpreted.libdevice(), _bf16=interpreted.to_bf16())
    return module


_modules = KernelCache(_build)
