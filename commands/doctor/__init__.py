"""Checks this machine and the server's settings, and says how to mend what is wrong: `sam3 doctor`.

`python -m commands.doctor` is the same without the client, as in the image. It changes nothing: a bucket and
a table are asked as at the start of the server. No secret is shown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from commands.doctor.check import Check
from commands.doctor.machine import machine_checks

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Check", "all_checks"]


def all_checks(port: int) -> Iterator[Check]:
    """Every check, one after another; those of stores that do not answer take up to 25 s.

    Args:
        port: of 127.0.0.1, that the server is to listen on.
    """
    yield from machine_checks()
    try:
        from commands.doctor.server import server_checks  # noqa: PLC0415 - its packages may be missing
    except ImportError as error:
        yield Check(
            "settings",
            "failed",
            f"the server's code cannot be imported ({error})",
            "install what it needs: pip install -r requirements.lock",
        )
        return
    yield from server_checks(port)
