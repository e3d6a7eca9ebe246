"""Ending in order: SIGTERM and Ctrl-C mean the same to a command that has servers to put away."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Interruption:
    """Which signal came: `code` is the exit code for it, 130 for Ctrl-C and 143 for SIGTERM."""

    code: int = 128 + signal.SIGINT


@contextmanager
def orderly_end() -> Iterator[Interruption]:
    """While this lasts, SIGTERM and SIGINT both raise KeyboardInterrupt in the main thread.

    Also where SIGINT was ignored: a shell script starts its background commands like that, and they must be able to
    end all the same.
    """
    interruption = Interruption()

    def interrupt(*_: object) -> None:
        interruption.code = 128 + signal.SIGTERM
        signal.raise_signal(signal.SIGINT)

    before_sigint = signal.signal(signal.SIGINT, signal.default_int_handler)
    before_sigterm = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGTERM, before_sigterm)
        signal.signal(signal.SIGINT, before_sigint)
