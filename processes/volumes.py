"""Checks the folders that the server writes to, which are often volumes."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from typing import TYPE_CHECKING

from settings import SettingsError

if TYPE_CHECKING:
    from pathlib import Path


def check_writable(variable: str, folder: Path) -> None:
    """Create the folder where it is missing, and a temporary file in it.

    Args:
        variable: the setting that names the folder.
        folder: an absolute path.

    Raises:
        SettingsError: it is no folder, or this process cannot write there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise SettingsError(f"{variable}: {folder} is not a folder: move it away, or name another") from None
    except OSError as error:
        raise unwritable(variable, folder, error) from None


def unwritable(variable: str, path: Path, error: OSError) -> SettingsError:
    """The error for a folder, or a file in one, that could not be written."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        mend = "free some space there"
    else:
        mend = "mount it writable" if error.errno == errno.EROFS else _how_to_own(path)
    reason = error.strerror or error
    return SettingsError(f"{variable}: {path} cannot be written ({reason}): {mend}, or name another folder")


def _how_to_own(path: Path) -> str:
    if sys.platform == "win32":
        return "let this server's user write there"
    user = os.geteuid()
    if os.path.isfile(path):  # noqa: PTH113 - Path's raises where a folder above is closed
        command = f"chown -R {user} {path.parent}"  # others in the folder will be as this one
    elif os.path.exists(path):  # noqa: PTH110 - the same
        command = f"chown {user} {path}"
    else:
        command = f"mkdir -p {path} && chown {user} {path}"
    return f"this server runs as uid {user}, so run `{command}` as root"
