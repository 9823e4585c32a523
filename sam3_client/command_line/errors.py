"""What ends a command: a sentence, and an exit code."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

SOME_FAILED = 1
USAGE = 2
SERVER = 3
INTERRUPTED = 130


class CommandError(Exception):
    """Ends the command.

    Args:
        message: one sentence.
        exit_code: `USAGE`, `SERVER` or `SOME_FAILED`.
    """

    def __init__(self, message: str, exit_code: int = USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn what ends a command into its sentence and its exit code."""
    try:
        yield
    except CommandError as error:
        sys.stderr.write(f"sam3: {error}\n")
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        sys.stderr.write("sam3: interrupted\n")
        raise typer.Exit(INTERRUPTED) from None
