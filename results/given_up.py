"""The list of given-up tasks: each has killed processes of the server, and is refused when sent again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from results.attempt_schema import MIGRATIONS
from results.attempts import read_task
from results.sqlite_file import SqliteFile

if TYPE_CHECKING:
    from pathlib import Path

    from results.base import Task

MAX_EXCLUSIVE_DEATHS: Final = 3
"""A task is given up after this many process deaths during its work while no other task was at work."""
GIVEN_UP_MESSAGE: Final = (
    f"the server's process stopped {MAX_EXCLUSIVE_DEATHS} times while it worked on this task alone; "
    "it is not tried again until its image or the server's version changes"
)

_COLUMNS: Final = "task, image_sha256, server_version, error_message, given_up_at"


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A task that is not attempted again.

    Attributes:
        image_sha256: of the image with which it was given up; None when that is not known.
        server_version: that gave it up.
        given_up_at: UTC, as `YYYY-MM-DD HH:MM:SS`.
    """

    task: Task
    image_sha256: str | None
    server_version: str
    error_message: str
    given_up_at: str


class GivenUpList:
    """The table `given_up` of the file of attempts.

    Args:
        file: of attempts.
        server_version: an entry of another version no longer holds; None: `find` is not used.

    Any method raises ResultsUnavailable when the file fails.
    """

    def __init__(self, file: SqliteFile, server_version: str | None = None) -> None:
        self._file = file
        self._server_version = server_version

    async def find(self, task: Task) -> GivenUp | None:
        """The entry of a task; None when it has none, or none that holds for this request.

        An entry of other prompts or options, or of another server version, is removed. The image's URL is
        not compared: the caller compares the SHA-256 of the image's bytes.
        """
        rows = await self._file.execute(
            f"SELECT {_COLUMNS} FROM given_up WHERE task_id = :task_id AND user_id = :user_id",
            {"task_id": task.task_id, "user_id": task.user_id},
        )
        for row in rows:
            entry = _read(*row)
            known = entry.task
            if (known.prompts, known.options, entry.server_version) == (
                *(task.prompts, task.options, self._server_version),
            ):
                return entry
            await self.remove(task.task_id)
        return None

    async def list_all(self) -> list[GivenUp]:
        """All entries, the latest first."""
        rows = await self._file.execute(f"SELECT {_COLUMNS} FROM given_up ORDER BY given_up_at DESC", {})
        return [_read(*row) for row in rows]

    async def count(self) -> int:
        """The number of entries."""
        [[count]] = await self._file.execute("SELECT count(*) FROM given_up", {})
        return int(count)

    async def remove(self, task_id: str) -> bool:
        """Remove a task's entry, so that the task is attempted when it is sent again; False: it has none."""
        return bool(
            await self._file.execute(
                "DELETE FROM given_up WHERE task_id = :task_id RETURNING 1", {"task_id": task_id}
            )
        )

    async def close(self) -> None:
        """Close the file."""
        await self._file.close()

    def add(self, attempt_id: str) -> None:
        """Add an attempt's task; call it inside a transaction of the file, on the file's thread."""
        self._file.db.execute(
            """INSERT OR REPLACE INTO given_up
            SELECT task_id, user_id, task, image_sha256, ?, ?, datetime() FROM attempts
            WHERE attempt_id = ?""",
            (self._server_version, GIVEN_UP_MESSAGE, attempt_id),
        )


def open_given_up(path: Path) -> GivenUpList:
    """The list in the file of attempts `path`, to show and to edit. Raises ResultsMisconfigured."""
    return GivenUpList(SqliteFile(path, MIGRATIONS))


def _read(task: str, *rest: str) -> GivenUp:
    return GivenUp(read_task(task), *rest)
