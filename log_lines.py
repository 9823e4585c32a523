"""Log lines that no stranger can forge. Knows nothing of who logs what."""

from __future__ import annotations

import logging
import traceback
from typing import Any


def escape_log_lines() -> None:
    """Escape what every logger of this process is given, whatever handlers it has or gets.

    A record keeps to its line and gives a terminal no orders; a traceback's lines are indented, so that none
    of them looks like a record.
    """
    logging.setLogRecordFactory(_EscapedRecord)


def escaped(text: str) -> str:
    r"""`text` with what does not print as Python writes it: \n, \x1b, \u202e (right to left), \ud800."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


class _EscapedRecord(logging.LogRecord):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info:
            # A formatter takes this text as it is, and so does every handler after the first.
            lines = "".join(traceback.format_exception(*self.exc_info)).rstrip("\n").split("\n")
            self.exc_text = "\n".join(f"  {escaped(line)}" for line in lines)

    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return escaped(super().getMessage().rstrip("\n"))
