"""Ends a long computation between two of its steps, once nobody waits for it any more.

Work that tells how far it is can simply be asked no further. What runs for long without telling calls `go_on` every
now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_unwanted: ContextVar[Callable[[], bool] | None] = ContextVar("unwanted", default=None)


class Interrupted(BaseException):
    """Nobody waits for the result any more; no error, hence not to be caught as one."""


@contextmanager
def until(unwanted: Callable[[], bool]) -> Iterator[None]:
    """Let what is computed here, in this thread, end with `Interrupted` as soon as ``unwanted`` says so."""
    before = _unwanted.set(unwanted)
    try:
        yield
    finally:
        _unwanted.reset(before)


def go_on(*_: object) -> None:
    """Raise `Interrupted` if that is wanted; arguments are ignored, so that it can be a hook on a gradient."""
    unwanted = _unwanted.get()
    if unwanted is not None and unwanted():
        raise Interrupted
