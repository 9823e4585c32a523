"""Objects in a bucket or in a folder, with one set of methods."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

from bulk.errors import PictureError, WrongUsage
from bulk.objects.base import DEFAULT_MAX_WAIT_S, Objects, StoredObject, is_utf8
from bulk.objects.folder import FolderObjects
from bulk.objects.s3 import S3Objects

if TYPE_CHECKING:
    from typing import BinaryIO

__all__ = ["DEFAULT_MAX_WAIT_S", "Objects", "StoredObject", "is_utf8", "open_objects", "open_uri", "read_uri"]

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def open_objects(uri: str, max_wait_s: float = DEFAULT_MAX_WAIT_S) -> Objects:
    """The objects below `s3://bucket`, `s3://bucket/prefix` or a folder. Sends nothing yet.

    Args:
        uri: a prefix ends where a slash follows: `s3://bucket/user-1` does not hold `user-10/cat.png`.
        max_wait_s: how long the transient failures of one call are retried.

    Raises:
        WrongUsage: another scheme, no bucket, no name at all, or one that is not UTF-8.
    """
    if not is_utf8(uri):
        raise WrongUsage(f"the name {uri!r} is not UTF-8: rename it")
    if uri.startswith("s3://"):
        bucket, prefix = _parts(uri)
        return S3Objects(bucket, prefix.removesuffix("/"), max_wait_s)
    if not uri or "\0" in uri or _SCHEME.match(uri):
        raise WrongUsage(f"{uri!r} is not a place for objects: name s3://bucket/prefix or a folder")
    return FolderObjects(os.path.realpath(uri))


def read_uri(uri: str, max_bytes: int | None = None, max_wait_s: float = DEFAULT_MAX_WAIT_S) -> bytes:
    """A picture by its full URI: `s3://bucket/key` or an absolute path.

    Raises:
        PictureError: NOT_FOUND, TOO_LARGE, FORBIDDEN or REFUSED.
        RunError: the store failed.
    """
    objects, name = _located(uri, max_wait_s)
    return objects.read(name, max_bytes)


def open_uri(uri: str, max_wait_s: float = DEFAULT_MAX_WAIT_S) -> BinaryIO:
    """A seekable file for a large object: `s3://bucket/key` or an absolute path.

    Raises:
        PictureError: NOT_FOUND, FORBIDDEN or REFUSED.
        RunError: the store failed; reading the file may raise it too.
    """
    objects, name = _located(uri, max_wait_s)
    return objects.open(name)


def _located(uri: str, max_wait_s: float) -> tuple[Objects, str]:
    if uri.startswith("s3://"):
        bucket, key = _parts(uri)
        return S3Objects(bucket, "", max_wait_s), key
    folder, _, name = uri.rpartition("/")
    if name in {"", ".", ".."} or "\0" in uri:
        raise PictureError("NOT_FOUND", "no file is stored there")
    return FolderObjects(folder or "/"), name


def _parts(uri: str) -> tuple[str, str]:
    # Not a URL: keys are written as they are, with "?", "#" and "%".
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise WrongUsage(f"{uri!r} names no bucket: write s3://bucket/prefix")
    return bucket, key
