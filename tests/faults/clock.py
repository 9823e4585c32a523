"""A wall clock that is set while the server runs; libfaketime would bend the server's sleeps as well."""

from __future__ import annotations

import contextlib
import math
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_SOURCE = Path(__file__).parent / "wrong_clock.c"


class Clock:
    """The wall clock of one server; does nothing where it cannot be set.

    Attributes:
        wrong_until_s: when it last differed from this machine's, by the monotonic clock; infinity while it
            does.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.wrong_until_s = -math.inf
        self._file = folder / f"clock-{name}"
        self._file.write_bytes(struct.pack("l", 0))
        self._library = folder / f"wrong-clock-{name}.so"
        if missing() is None:
            command = ["-shared", "-fPIC", "-O1", "-o", str(self._library), str(_SOURCE)]
            subprocess.run([str(_compiler()), *command], check=True)

    def environment(self) -> Mapping[str, str]:
        """What the server needs that is to have this clock."""
        if not self._library.exists():
            return {}
        return {"LD_PRELOAD": str(self._library), "WRONG_CLOCK": str(self._file)}

    @contextlib.contextmanager
    def wrong_by(self, offset_s: int) -> Iterator[None]:
        """The clock is that much ahead until the end of the block."""
        self.wrong_until_s = math.inf
        self._set(offset_s)
        try:
            yield
        finally:
            self._set(0)
            self.wrong_until_s = time.monotonic()

    def _set(self, offset_s: int) -> None:
        with self._file.open("r+b") as file:  # the same file: the processes have mapped it
            file.write(struct.pack("l", offset_s))


def missing() -> str | None:
    """Why no clock can be set here; None when one can."""
    if not sys.platform.startswith("linux"):
        return "the clocks of Linux alone are set"
    return None if _compiler() else "no C compiler"


def _compiler() -> str | None:
    return shutil.which("cc")
