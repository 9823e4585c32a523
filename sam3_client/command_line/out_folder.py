"""The folder of a run's outputs: what is done in it, and with which settings.

Everything is written to a file beside its place and then moved there. A picture counts as done when its
record is there, which is written last; so a run may be killed at any time.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import filelock

from sam3_client.command_line.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from sam3_client.command_line.pictures import Source

OWN = ".sam3"
"""The subfolder of records. An output's name is never in it: hidden folders are not searched."""
MODEL = "model"
"""The one setting that the server tells."""


@dataclass(frozen=True, slots=True)
class Record:
    """One picture that is done.

    Attributes:
        file_bytes, modified_ns: of the picture's file: one that has changed is done again.
        outputs: names in the folder.
        found: instances of each prompt.
        coco: the picture's document, if the run has one.
    """

    file_bytes: int
    modified_ns: int
    outputs: list[str]
    found: dict[str, int]
    coco: dict[str, Any] | None = None


def stamp(source: Source) -> tuple[int, int]:
    """Size in bytes and time of the last change, in ns, of a picture's file. Raises OSError."""
    found = source.path.stat()
    return found.st_size, found.st_mtime_ns


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, so that there is never a part of it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_bytes(data)
    unfinished.replace(path)


class OutFolder:
    """One run's folder; use it inside `opened`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._settings_file = path / OWN / "run.json"
        self._records = path / OWN / "records"

    @contextmanager
    def opened(self, settings: Mapping[str, Any], *, overwrite: bool) -> Iterator[None]:
        """Hold the folder for this run inside the block.

        Args:
            settings: what the outputs depend on; JSON values.
            overwrite: remove what an earlier run wrote, and begin anew.

        Raises:
            CommandError: it has the outputs of other settings, files of someone else, or another run.
        """
        if not overwrite:
            self._refuse_foreign_files()
        try:
            (self.path / OWN).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from None
        try:
            with filelock.FileLock(self.path / OWN / "lock", blocking=False):
                self._begin(dict(settings), overwrite=overwrite)
                yield
        except filelock.Timeout:
            raise CommandError(
                f"another run writes into {self.path}: wait for it, or choose another --out"
            ) from None

    def _kept_settings(self) -> dict[str, Any] | None:
        try:
            kept: dict[str, Any] = json.loads(self._settings_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CommandError(
                f"{self._settings_file} cannot be read ({error}): choose another --out"
            ) from None
        return kept

    def _begin(self, settings: dict[str, Any], *, overwrite: bool) -> None:
        kept = self._kept_settings()
        if kept is not None and not overwrite and self._has_records():
            self._refuse_others(kept, settings)
            return
        if overwrite:
            self._remove_outputs()
        self._write_settings(settings)

    def _has_records(self) -> bool:
        return next(self._records.rglob("*.json"), None) is not None

    def _refuse_foreign_files(self) -> None:
        try:
            is_foreign = not (self.path / OWN).exists() and any(self.path.iterdir())
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._unusable(error) from None
        if is_foreign:
            raise CommandError(
                f"{self.path} is not empty, and holds no run of sam3: choose another --out, or write into it "
                "with --overwrite"
            )

    def _unusable(self, error: OSError) -> CommandError:
        return CommandError(f"{self.path} cannot be used ({error.strerror}): choose another --out")

    def _write_settings(self, settings: dict[str, Any]) -> None:
        write_whole(self._settings_file, json.dumps(settings, indent=1).encode())

    def _refuse_others(self, kept: dict[str, Any], settings: dict[str, Any]) -> None:
        names = sorted((kept.keys() | settings.keys()) - {MODEL})
        others = [name for name in names if kept.get(name) != settings.get(name)]
        if others:
            raise CommandError(
                f"{self.path} has outputs of other settings ({', '.join(others)}): choose another --out, or "
                "replace them with --overwrite"
            )

    def check_model(self, model: Mapping[str, Any]) -> None:
        """Note the model of this run. Raises `CommandError` if pictures were done with another."""
        kept = self._kept_settings() or {}
        if MODEL not in kept:
            self._write_settings(kept | {MODEL: dict(model)})
        elif kept[MODEL] != model:
            raise CommandError(
                f"{self.path} has outputs of the model {kept[MODEL].get('checkpoint')}, and this is "
                f"{model.get('checkpoint')} or other weights: choose another --out, or replace them with "
                "--overwrite"
            )

    def _remove_outputs(self) -> None:
        """Remove the files that records name, and the records."""
        for file in sorted(self._records.rglob("*.json")):
            try:
                outputs = json.loads(file.read_text(encoding="utf-8"))["outputs"]
            except (OSError, ValueError, KeyError):
                outputs = []
            name = file.relative_to(self._records).as_posix().removesuffix(".json")
            for output in outputs:
                # Only what is named after the picture: a record is a file that someone may have changed.
                if output.startswith(f"{name}.") and ".." not in output.split("/"):
                    (self.path / output).unlink(missing_ok=True)
            file.unlink()

    def record_of(self, source: Source) -> Record | None:
        """The record of a picture that is done, has not changed since, and whose outputs are there."""
        try:
            record = Record(**json.loads(self._record_file(source).read_text(encoding="utf-8")))
            is_same = (record.file_bytes, record.modified_ns) == stamp(source)
        except (OSError, ValueError, TypeError):
            return None
        is_whole = all(os.path.exists(self.path / output) for output in record.outputs)  # noqa: PTH110 - as fast
        return record if is_same and is_whole else None

    def write_record(self, source: Source, record: Record) -> None:
        """Let the picture count as done. Raises OSError."""
        write_whole(self._record_file(source), json.dumps(asdict(record)).encode())

    def _record_file(self, source: Source) -> Path:
        return self._records / f"{source.name}.json"
