"""Reads what operators write, the lines of `.env` and values, and words the errors in them.

Knows no setting by name. No error holds a secret, nor what may be a secret in a wrong place.
"""

from __future__ import annotations

import io
import re
import unicodedata
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal, get_args, get_origin
from urllib.parse import urlsplit

from dotenv import dotenv_values
from dotenv.parser import parse_stream

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from dotenv.parser import Original
    from pydantic.fields import FieldInfo

SHOWN_CHARACTERS = 15
"""A longer value is not shown: it may be a secret in the wrong line."""

UNITS = {"_BYTES": " of bytes", "_PIXELS": " of pixels", "_S": " of seconds"}
_QUOTES = ("'", '"')
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")

_PLACEHOLDER = re.compile(r"<[^<>]*>|\.\.\.|…|\$\{\w+\}|\{\{.*?\}\}")
"""What a template leaves to be filled in: <ACCOUNT>, ..., ${KEY}, {{ key }}."""
_PLACEHOLDER_LABEL = re.compile(
    r"(?P<label>(account|project)([-_]?(id|ref|name))?)\.(.+\.)?(r2\.cloudflarestorage\.com|supabase\.co)"
    r"|(?P<yours>your[-_][\w-]+)\..*",
    re.IGNORECASE,
)
"""A placeholder as the first label of a host: ACCOUNT, project-ref, your-domain."""
_PLACEHOLDER_SECRET = re.compile(
    r"<.*>|\$\{.*\}|\{\{.*\}\}|.*(\.\.\.|…)|your[-_ ].*|(change|replace)[-_ ]?(me|this).*", re.IGNORECASE
)
"""A placeholder for a whole secret: a random one may hold a < and a > somewhere."""


class TextRefused(ValueError):
    """The message is the sentence to print."""


def read_env_file(path: Path, known: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """The values of a `.env`, empty ones included, by their names in capitals; and the errors of its lines.

    Of two lines with one name the last counts, as for every reader of such files.

    Args:
        path: of the file, which must be there.
        known: names in capitals; a line with any other is an error.

    Raises:
        TextRefused: it cannot be read, or is not UTF-8.
    """
    text = _utf8(path)
    values = {
        name.upper(): value or ""
        for name, value in dotenv_values(stream=io.StringIO(text)).items()
        if name.upper() in known
    }
    return values, list(_line_errors(text, path, known))


def _line_errors(text: str, path: Path, known: Collection[str]) -> Iterator[str]:
    for line in parse_stream(io.StringIO(text)):
        if line.error:
            place = _place(path, line.original)
            yield f"{place} cannot be read: write NAME=value there, and close each quote"
        elif line.key is not None and line.key.upper() not in known:
            # A text that is no variable's name may be a part of a secret with a line break.
            shown = f"{line.key} in " if _VARIABLE.fullmatch(line.key) and line.value is not None else ""
            yield (
                f"{shown}{_place(path, line.original)} is not a setting of this server"
                f"{hint(line.key.upper(), known)}"
            )


def hint(name: str, known: Collection[str]) -> str:
    """The end of the error for an unknown `name`: the name that is meant, or where all are listed."""
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else "; .env.example lists what there is"


def cleaned(name: str, raw: str, *, secret: bool) -> str:
    """A value without the white space around it. Raises `TextRefused`."""
    value = raw.strip()
    if len(value) > 1 and value[0] in _QUOTES and value[-1] == value[0]:
        raise TextRefused(f"{name} has quotes round its value, which count as a part of it: take them off")
    if any(unicodedata.category(each) == "Cc" for each in value):
        raise TextRefused(f"{name} holds a line break or another control character: set it again")
    if secret:
        for item in split_list(value):
            _check_secret(name, item)
    elif found := _PLACEHOLDER.search(value):
        raise TextRefused(f"{name} still has the placeholder {found[0]}: put the real value in its place")
    return value


def split_list(value: str) -> tuple[str, ...]:
    """The items of a comma-separated list."""
    return tuple(item.strip() for item in value.split(",") if item.strip())


def checked_url(value: str) -> str:
    """A URL without a slash at its end. Raises ValueError with a message to read after the setting's name."""
    if not value.lower().startswith(("https://", "http://")):
        raise ValueError("must start with https:// (http:// only for a local server)")
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        host = ""
    if not host:
        raise ValueError("is not a URL: it must name a host, as in https://images.example.com")
    if blank := _PLACEHOLDER_LABEL.fullmatch(host):
        label = (blank["label"] or blank["yours"]).upper()
        raise ValueError(f"still has the placeholder {label}: put the real value in its place")
    return value.rstrip("/")


def rule(name: str, field: FieldInfo) -> str:
    """What a field of numbers, choices, or true and false takes, to be read after "must be"."""
    choices = " or ".join(_choices(field.annotation))
    if choices:
        return f"a list of {choices}" if get_origin(field.annotation) is tuple else choices
    if field.annotation is bool:
        return "true or false"
    whole = field.annotation is int or int in get_args(field.annotation)
    unit = next((words for suffix, words in UNITS.items() if name.endswith(suffix)), "")
    limits = {
        key: getattr(limit, key)
        for limit in field.metadata
        for key in ("ge", "gt", "le")
        if hasattr(limit, key)
    }
    return f"a {'whole ' if whole else ''}number{unit}{_bounds(**limits)}"


def shown(value: str) -> str:
    """The end of the error for a value that is no secret."""
    return f", not {value!r}" if len(value) <= SHOWN_CHARACTERS else ""


def _utf8(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TextRefused(
            f"ENV_FILE {path} cannot be read ({error.strerror}): name a file that this server's user may read"
        ) from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
        raise TextRefused(f"ENV_FILE {path} is in UTF-16, or no text at all: save it in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TextRefused(f"ENV_FILE {path} is not in UTF-8 (line {line}): save it in UTF-8") from None


def _place(path: Path, original: Original) -> str:
    blank = original.string[: -len(original.string.lstrip())]  # empty lines before it count as its own
    return f"{path}, line {original.line + blank.count(chr(10))}"


def _check_secret(name: str, value: str) -> None:
    if _PLACEHOLDER_SECRET.fullmatch(value):
        raise TextRefused(f"{name} still has a placeholder for its value: put the real one in its place")
    if not value.isascii() or " " in value:
        raise TextRefused(f"{name} must be ASCII without spaces: it is sent in a header")


def _bounds(ge: float | None = None, gt: float | None = None, le: float | None = None) -> str:
    if ge is not None:
        return f", {ge} or more" if le is None else f" from {ge} to {le}"
    return f" above {gt}, at most {le}"


def _choices(annotation: object) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for part in get_args(annotation) for choice in _choices(part))
