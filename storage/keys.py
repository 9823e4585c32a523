"""The rules for object keys, the same for every store: pure functions, no I/O.

A key has the form that R2 accepts: NFC, at most 1024 bytes of UTF-8, segments joined by single slashes.
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable
from typing import Final
from urllib.parse import unquote_to_bytes

from storage.errors import ImageUrlForbidden, ImageUrlInvalid

MAX_KEY_BYTES: Final = 1024

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
CONTENT_TYPES: Final = {"png": "image/png", "jpg": "image/jpeg", "json": "application/json"}
"""Of the files of a result, by the suffix of their keys."""
_MASK_NAME = re.compile(rf"[A-Za-z0-9_-]{{1,64}}-[0-9a-f]{{16}}\.({'|'.join(CONTENT_TYPES)})")
_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
# Control characters, lone surrogates, and two separators that some log viewers show as a new line.
_REFUSED_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})


def image_key(
    image_url: str, user_id: str, *, key_in_url: Callable[[str], str], user_prefix_required: bool
) -> str:
    """The key in an image_url: a bare key (not decoded), or a URL (parsed by the store's `key_in_url`).

    `key_in_url` raises ValueError for a malformed URL and ImageUrlForbidden for a foreign one.
    Raises ImageUrlInvalid, or ImageUrlForbidden when the key is not below `uploads/{user_id}/`.
    """
    try:
        # Before any URL parser: urlsplit silently deletes tabs and line ends.
        refuse_control_characters(image_url)
        key = checked_key(key_in_url(image_url) if "://" in image_url else image_url)
    except ValueError as error:
        raise ImageUrlInvalid(f"image_url {error}") from None
    if user_prefix_required and not _is_upload_of(key, user_id):
        raise ImageUrlForbidden("image_url is not below the user's uploads")
    return key


def checked_key(key: str) -> str:
    """The key in NFC. Raises ValueError; its text continues a sentence, after the name of the input."""
    refuse_control_characters(key)
    key = unicodedata.normalize("NFC", key)
    if "\\" in key:
        raise ValueError("holds a backslash")
    if any(segment in {"", ".", ".."} for segment in key.split("/")):
        raise ValueError("is empty, or has an empty, '.' or '..' segment")
    if len(key.encode()) > MAX_KEY_BYTES:
        raise ValueError(f"has a key of more than {MAX_KEY_BYTES} bytes")
    return key


def refuse_control_characters(text: str) -> None:
    """Raises ValueError for control characters, line separators and lone surrogates."""
    if any(unicodedata.category(character) in _REFUSED_CATEGORIES for character in text):
        raise ValueError("holds a control character or broken Unicode")


def percent_decoded(text: str) -> str:
    """`text` with its %XX decoded exactly once; '+' stays '+'. Raises ValueError unless it is UTF-8."""
    if _BROKEN_ESCAPE.search(text):
        raise ValueError("has a '%' that is not followed by two hex digits")
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeError:
        raise ValueError("is not UTF-8 after percent-decoding") from None


def mask_key(
    user_id: str, task_id: str, name: str | int, content: bytes, *, attempt_id: str, suffix: str = "png"
) -> str:
    """The key for a mask, or another file of a result: `masks/{user_id}/{task_id}/{name}-{16 hex}.{suffix}`.

    The 16 digits are from the SHA-256 of the attempt's id and the content. So an attempt that repeats its
    work writes the same bytes to the same key, no stored mask is ever overwritten by another one, and the
    masks of a failed attempt can be deleted without those of another.
    Raises ValueError when a part is not 1 to 64 letters, digits, '-' or '_', and for a suffix that
    `CONTENT_TYPES` does not have.
    """
    if suffix not in CONTENT_TYPES:
        raise ValueError(f"suffix {suffix!r} has no content type: use one of {', '.join(CONTENT_TYPES)}")
    parts = (user_id, task_id, str(name))
    if not all(_NAME.fullmatch(part) for part in parts):
        raise ValueError("user_id, task_id and name are 1 to 64 letters, digits, '-' or '_'")
    digest = hashlib.sha256(attempt_id.encode() + b"\0" + content).hexdigest()
    return f"masks/{'/'.join(parts)}-{digest[:16]}.{suffix}"


def _is_mask_key(key: str, user_id: str, task_id: str) -> bool:
    """Whether `key` has the form that `mask_key` returns for this task."""
    folder, _, name = key.rpartition("/")
    return folder == f"masks/{user_id}/{task_id}" and _MASK_NAME.fullmatch(name) is not None


def content_type(key: str) -> str:
    """The content type of a result's file, by its key; of a key without a known suffix that of a mask."""
    return CONTENT_TYPES.get(key.rpartition(".")[2], CONTENT_TYPES["png"])


def answer_key(answer_url: str, user_id: str, task_id: str, *, key_in_url: Callable[[str], str]) -> str:
    """The key of a task's stored answer. Raises ImageUrlForbidden for a URL of anything else."""
    if not is_mask_url(answer_url, user_id, task_id, key_in_url=key_in_url):
        raise ImageUrlForbidden("the answer's URL is not of this task")
    key = checked_key(key_in_url(answer_url))
    if not key.endswith(".json"):
        raise ImageUrlForbidden("the answer's URL is not of an answer")
    return key


def is_mask_url(mask_url: str, user_id: str, task_id: str, *, key_in_url: Callable[[str], str]) -> bool:
    """Whether `mask_url`, parsed by the store's `key_in_url`, names a file of this task's result."""
    try:
        refuse_control_characters(mask_url)
        return _is_mask_key(checked_key(key_in_url(mask_url)), user_id, task_id)
    except (ValueError, ImageUrlForbidden):
        return False


def _is_upload_of(key: str, user_id: str) -> bool:
    # A user_id with a slash would extend the prefix.
    return _NAME.fullmatch(user_id) is not None and key.startswith(f"uploads/{user_id}/")
