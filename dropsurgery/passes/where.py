"""The `where` of a pass: a pattern, several of them, or a callable."""

from __future__ import annotations

from typing import Any

from dropsurgery.errors import ArgumentTypeError


def check_where(where: object, what: str, fix: str) -> Any:
    """Return a `where`, lists as tuples, or raise where it is none.

    Args:
        where: what the caller was given.
        what: what it chooses, for the message: "sites".
        fix: examples of what it may be.

    Raises:
        ArgumentTypeError: neither None, nor a pattern, several, or a callable.
    """
    if isinstance(where, list):
        where = tuple(where)
    names = where if isinstance(where, tuple) else ()
    fits = where is None or isinstance(where, str | tuple) or callable(where)
    if not fits or not all(isinstance(name, str) for name in names):
        raise ArgumentTypeError(
            f"where chooses {what} by a pattern, several, or a callable, got {where!r}", fix=fix
        )
    return where
