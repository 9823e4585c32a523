"""Does the runner's process live? It leaves a note of its identity; the API workers read it.

The socket cannot tell: the supervisor holds it open, so that calls to a dead runner connect and wait.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger("bentoml.sam3")

LOOK_S = 0.1
"""A process that was seen alive is believed to be so for this long."""
DYING_S = 3.0
"""A process that cut off a call is taken for dead this long: one with a GPU's memory takes its time to go."""


def leave_note(note: Path, identity: str) -> None:
    """Say in the file `note` which process the runner is; whoever reads it sees the old note or the new."""
    unfinished = note.with_name(f"{note.name}.{os.getpid()}")
    try:
        unfinished.write_text(identity)
        unfinished.replace(note)
    except OSError:
        unfinished.unlink(missing_ok=True)
        # A full disk still takes what fits into the old note's place.
        with note.open("r+") as file:
            file.write(identity.ljust(len(note.read_text())))


class RunnerLife:
    """The life of the runner's process, seen from another process.

    Args:
        note: the file of `leave_note`.
        is_alive: does the process of this identity run.
    """

    def __init__(self, note: Path, is_alive: Callable[[str], bool]) -> None:
        self._note = note
        self._is_alive = is_alive
        self._identity: str | None = None
        self._believed_until_s = 0.0
        self._has_died = False
        self._dying: str | None = None
        self._dying_until_s = 0.0

    def look(self) -> str | None:
        """The identity of the process that lives now, or None. Cheap: once a call is no waste."""
        if self._identity is not None and time.monotonic() < self._believed_until_s:
            return self._identity
        if self._identity is not None and not self._is_alive(self._identity):
            self._bury()
        if self._identity is None:
            self._identity = self._read_living()
        self._believed_until_s = time.monotonic() + LOOK_S
        return self._identity

    def cut_off(self, identity: str) -> None:
        """This process cut off a call: it dies, even where it is not gone yet."""
        if identity == self._identity:
            self._dying, self._dying_until_s = identity, time.monotonic() + DYING_S
            self._bury()

    @property
    def absence(self) -> str:
        """The sentence that says why there is no process."""
        if self._has_died:
            return "the model's process has stopped and is being started anew"
        return "the model's process is starting"

    def _read_living(self) -> str | None:
        try:
            identity = self._note.read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
        dying = identity == self._dying and time.monotonic() < self._dying_until_s
        return identity if not dying and self._is_alive(identity) else None

    def _bury(self) -> None:
        logger.warning("the model's process has stopped (%s)", self._identity)
        self._identity, self._has_died = None, True
