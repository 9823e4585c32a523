"""Finds the pictures that a user named, and names their outputs."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sam3_client.command_line.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}
"""Of the files that are taken from a folder; a file that is named itself may have any."""


@dataclass(frozen=True, slots=True)
class Source:
    """One picture.

    Attributes:
        path: absolute.
        name: its path below the pictures' common folder, with "/": outputs are named after it.
    """

    path: Path
    name: str


@dataclass(slots=True)
class Sources:
    """All pictures of a run.

    Attributes:
        root: the folder that names are relative to.
        pictures: sorted by name.
        left_out: how many files of the folders have another ending than a picture's.
    """

    root: Path
    pictures: list[Source] = field(default_factory=list)
    left_out: int = 0


def find_pictures(arguments: Sequence[str], out: Path) -> Sources:
    """The pictures that folders, patterns and paths name, each once.

    A folder is searched with its subfolders, without hidden files and without `out`. Names are relative to
    the one folder that was given, or else to the common folder of everything that was.

    Raises:
        CommandError: something is not there, or there is no picture.
    """
    out = _absolute(out)
    bases: list[Path] = []
    files: dict[Path, bool] = {}  # and whether the file was named itself
    for argument in arguments:
        base, found = _named_by(argument)
        if base == out:
            raise CommandError(f"{argument} is the folder of the outputs too: choose another --out")
        bases.append(base)
        for path in found:
            if path.is_dir():
                files.update(dict.fromkeys(_inside(path, out), False) | files)
            else:
                files[path] = files.get(path, False) or path == _absolute(argument)
    root = _common(bases)
    sources = Sources(root)
    for path, is_named in files.items():
        if is_named or path.suffix.lower() in ENDINGS:
            sources.pictures.append(Source(path, path.relative_to(root).as_posix()))
        else:
            sources.left_out += 1
    if not sources.pictures:
        others = f" ({sources.left_out} other files)" if sources.left_out else ""
        raise CommandError(
            f"no picture in {' '.join(arguments)}{others}: pictures end in {' '.join(sorted(ENDINGS))}; "
            "a file that is named itself may have any ending"
        )
    sources.pictures.sort(key=lambda source: source.name)
    return sources


def _named_by(argument: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files and folders: one, or a pattern's matches."""
    path = _absolute(argument)
    if path.is_dir():
        return path, [path]
    if path.exists():
        return path.parent, [path]
    if not glob.has_magic(argument):
        raise CommandError(f"{argument} is not there: name a folder, a file or a pattern in quotes")
    # Path.glob takes no absolute pattern.
    matches = sorted(map(_absolute, glob.glob(argument, recursive=True)))  # noqa: PTH207
    if not matches:
        raise CommandError(f"{argument} matches no file")
    before = Path(argument).parts
    fixed = next(index for index, part in enumerate(before) if glob.has_magic(part))
    return _absolute(Path(*before[:fixed])), matches


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve would follow links, which names keep


def _inside(folder: Path, out: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [each for each in folders if each[0] != "." and Path(parent, each) != out]
        yield from (Path(parent, name) for name in names if name[0] != ".")


def _common(folders: list[Path]) -> Path:
    try:
        return Path(os.path.commonpath(folders))
    except ValueError:  # of different drives
        raise CommandError("the pictures have no folder in common: give them in several runs") from None
