"""The list of stored masks that no row refers to: they are deleted from the object store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from results.sqlite_file import SqliteFile

DELETE_AFTER_S: Final = 30.0
"""An abandoned upload may still arrive for this long, and would restore a mask that was deleted before."""


class UnneededMasks:
    """The table `unneeded_masks` of the file of attempts.

    Args:
        file: of attempts.
        now: the clock, in s.

    Any method raises ResultsUnavailable when the file fails.
    """

    def __init__(self, file: SqliteFile, now: Callable[[], float]) -> None:
        self._file = file
        self._now = now

    async def acquire_due(self, hold_s: float) -> str | None:
        """The key of a mask to delete now; due again in `hold_s` unless removed. None: none is due."""
        rows = await self._file.execute(
            """UPDATE unneeded_masks SET due_s = :now + :hold_s WHERE key = (
                SELECT key FROM unneeded_masks WHERE due_s <= :now ORDER BY due_s LIMIT 1) RETURNING key""",
            {"now": self._now(), "hold_s": hold_s},
        )
        return rows[0][0] if rows else None

    async def remove(self, key: str) -> None:
        """Remove the key of a mask that has been deleted."""
        await self._file.execute("DELETE FROM unneeded_masks WHERE key = :key", {"key": key})

    async def make_all_due(self) -> None:
        """Make all masks due now: after a restart the clock may have another origin."""
        await self._file.execute("UPDATE unneeded_masks SET due_s = :now", {"now": self._now()})

    def add(self, attempt_id: str, referenced: str) -> None:
        """Add an attempt's masks whose keys `referenced` does not contain.

        Where it contains the key of the attempt's answer document, none is added: the document refers to
        the others.

        Call it inside a transaction of the file, on the file's thread.
        """
        self._file.db.execute(
            """INSERT OR IGNORE INTO unneeded_masks
            SELECT value, :due_s FROM attempts, json_each(mask_keys)
            WHERE attempt_id = :attempt_id AND instr(:referenced, value) = 0
                AND NOT EXISTS (SELECT 1 FROM json_each(attempts.mask_keys) AS known
                    WHERE known.value LIKE '%/answer-%.json' AND instr(:referenced, known.value) > 0)""",
            {
                "due_s": self._now() + DELETE_AFTER_S,
                "attempt_id": attempt_id,
                "referenced": referenced,
            },
        )
