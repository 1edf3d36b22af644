"""Compiling hot loops where numba is installed; without it they run as they are written."""

from __future__ import annotations

from collections.abc import Callable
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

    The plain function is its `py_func`. Results are bit for bit those of the plain function.
    """
    if njit is None:
        return function
    try:
        return cast(F, njit(cache=True, error_model="numpy")(function))
    except RuntimeError:  # no folder to keep the compiled code in
        return cast(F, njit(error_model="numpy")(function))


def plain(function: F) -> F:
    """The function as it was written."""
    return cast(F, getattr(function, "py_func", function))
