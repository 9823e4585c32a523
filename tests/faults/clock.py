"""Changes a running server's wall clock; libfaketime would also change the server's sleeps."""

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
    """The wall clock of one server; does nothing if it cannot be changed.

    Attributes:
        wrong_until_s: monotonic time when it last differed from this machine's clock; infinity while it
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
        """The environment variables of a server with this clock."""
        if not self._library.exists():
            return {}
        return {"LD_PRELOAD": str(self._library), "WRONG_CLOCK": str(self._file)}

    @contextlib.contextmanager
    def wrong_by(self, offset_s: int) -> Iterator[None]:
        """Set the clock forward by `offset_s` until the end of the block."""
        self.wrong_until_s = math.inf
        self._set(offset_s)
        try:
            yield
        finally:
            self._set(0)
            self.wrong_until_s = time.monotonic()

    def _set(self, offset_s: int) -> None:
        with self._file.open("r+b") as file:  # in place, because the processes have mapped the file
            file.write(struct.pack("l", offset_s))


def missing() -> str | None:
    """Why clocks cannot be changed here; None if they can."""
    if not sys.platform.startswith("linux"):
        return "clocks can be changed on Linux only"
    return None if _compiler() else "no C compiler"


def _compiler() -> str | None:
    return shutil.which("cc")
