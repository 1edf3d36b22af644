"""Compiling hot loops where numba is installed; without it they run as they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    return _compiled(function)


def inlined(function: F) -> F:
    """As `compiled`, and made part of whatever calls it: a call hands over every array anew.

    Leave it and its loops at one place only, or references to every array are counted each time.
    """
    return _compiled(function, forceinline=True)


def _compiled(function: F, **more: bool) -> F:
    if njit is None:
        return function
    options = {"error_model": "numpy", **more}
    try:
        return cast(F, njit(cache=True, **options)(function))
    except RuntimeError:  # no folder to keep the compiled code in
        return cast(F, njit(**options)(function))


def plain(module: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Functions of a module as they were written, calling each other as written too.

    Those it imported from elsewhere are taken as they were written there.
    """
    copies: dict[int, dict[str, Any]] = {}

    def written_in(origin: dict[str, Any]) -> dict[str, Any]:
        own = copies.get(id(origin))
        if own is None:
            own = copies[id(origin)] = dict(origin)
            for name, value in origin.items():
                written = getattr(value, "py_func", None)
                if written is not None:
                    place = written_in(written.__globals__)
                    own[name] = FunctionType(written.__code__, place, name, written.__defaults__)
        return own

    own = written_in(module)
    return {name: own[name] for name in names}
