"""Compiling hot loops where numba is installed; without it they run as they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

try:
    from numba import njit
except ImportError:
    njit = None

AVAILABLE = njit is not None
"""Whether `compiled` compiles."""


def compiled(function: F) -> F:
    """The function compiled at its first call, and kept beside its source where that is writable.

    Results are bit for bit those of the plain function.
    """
    if njit is None:
        return function
    try:
        return cast(F, njit(cache=True, error_model="numpy")(function))
    except RuntimeError:  # no folder to keep the compiled code in
        return cast(F, njit(error_model="numpy")(function))


def plain(module: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Functions of a module as they were written, calling each other as written too."""
    own = dict(module)
    for name, value in module.items():
        written = getattr(value, "py_func", None)
        if written is not None:
            own[name] = FunctionType(written.__code__, own, name, written.__defaults__)
    return {name: own[name] for name in names}
