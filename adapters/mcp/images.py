"""Reads the image of a call: a file below one folder, or base64."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MAX_FILE_BYTES = 50_000_000
"""A SAM 3 server takes 10 MB by default; this bounds what is read before it is asked."""


class ImageRefused(Exception):
    """The image of a call is not read; the message is a sentence that says why."""


class ImageFolder:
    """The only folder whose files are read.

    Args:
        root: an existing folder.

    Raises:
        NotADirectoryError: `root` is none.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise NotADirectoryError(f"{root} is no folder")
        self._root = root.resolve()

    def read(self, path: str) -> bytes:
        """A file's bytes.

        Args:
            path: relative to the root, or absolute. Where it leads in the end, through links too, must be
                below the root; outside of it this does not tell which files exist.

        Raises:
            ImageRefused: it is outside, is no file, is too large or cannot be read.
        """
        try:
            resolved = (self._root / path).resolve()
            if not resolved.is_relative_to(self._root):
                raise ImageRefused(
                    f"{path} is outside of the folder {self._root}; only pictures below it may be read"
                )
            if not resolved.is_file():  # a pipe or a device would be read for ever
                raise ImageRefused(f"there is no file {path} in the folder {self._root}; check the path")
            with resolved.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except (OSError, ValueError, RuntimeError) as error:  # a byte 0 in the path; a link to itself
            reason = getattr(error, "strerror", None) or "it is no path of a file"
            raise ImageRefused(f"the path cannot be read: {reason}") from error
        if len(content) > MAX_FILE_BYTES:
            raise ImageRefused(
                f"{path} has more than {MAX_FILE_BYTES // 1_000_000} MB; use a smaller picture"
            )
        return content


def decode_base64(text: str) -> bytes:
    """A file's bytes.

    Args:
        text: standard base64, line breaks allowed, with or without the beginning `data:image/...;base64,`.

    Raises:
        ImageRefused: it is no base64, or more than MAX_FILE_BYTES.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    if len(text) > MAX_FILE_BYTES * 4 // 3:
        raise ImageRefused(f"the image has more than {MAX_FILE_BYTES // 1_000_000} MB; use a smaller picture")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageRefused("image_base64 is not base64 of a picture's file; or pass its path") from error
