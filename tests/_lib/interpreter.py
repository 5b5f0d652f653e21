"""Triton's interpreter, which looks for the functions to replace in `triton.language` once, and for dtypes once.

It looks for functions at each launch, and again at each call of a function within a kernel: a quarter of its time. The
replacements are the same each time, but for the modules that a function knows. A dtype of NumPy it finds in a table
that it makes for each look: a tenth.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any


def patch_once() -> None:
    """Keeps the replacements, for this process. An interpreter without these names, of another release, is left."""
    try:
        from triton import language
        from triton.runtime import interpreter

        scope, patch, dtype = interpreter._LangPatchScope, interpreter._patch_lang, interpreter._get_np_dtype
    except (ImportError, AttributeError):
        return
    interpreter._patch_lang = _keeping(patch, scope, (language, language.core))
    interpreter._get_np_dtype = _keeping_dtypes(dtype, language.pointer_type, language.block_type)


def _keeping(patch: Callable[[Any], Any], new_scope: Callable[[], Any], modules: tuple[Any, ...]) -> Callable[..., Any]:
    """The function that replaces the language for a function of a kernel, and returns a scope that restores it."""
    kept: dict[Hashable, list[tuple[Any, str, Any]]] = {}

    def patched(function: Any) -> Any:
        known = function.__globals__.values()
        key = tuple(any(x is module for x in known) for module in modules)
        if key not in kept:
            scope = patch(function)
            kept[key] = [(owner, name, getattr(owner, name)) for owner, name, _ in scope._changes]
            return scope
        scope = new_scope()
        owner, name, value = kept[key][0]
        if getattr(owner, name) is not value:  # in a function that a kernel calls they are in place
            for owner, name, value in kept[key]:
                scope.set_attr(owner, name, value)
        return scope

    return patched


def _keeping_dtypes(find: Callable[[Any], Any], pointer: type, block: type) -> Callable[[Any], Any]:
    """The function that finds the dtype of NumPy; pointers and blocks have no hash, and those of elements are kept."""
    of_element = functools.cache(find)

    def found(dtype: Any) -> Any:
        element = dtype.element_ty if isinstance(dtype, block) else dtype
        return find(dtype) if isinstance(element, pointer) else of_element(element)

    return found
