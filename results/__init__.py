"""Where task rows live: a ResultStore, the life of a row and its errors.

results.supabase is imported by who uses it: supabase-py takes 0.4 s and 43 MB a process.
"""

from results.attempt_file import GIVEN_UP_MESSAGE, AttemptFile
from results.attempts import Attempt
from results.base import Claim, ResultStore, Row, SettledStatus, Status, StoredResult, Task
from results.errors import (
    AlreadySettled,
    AttemptLost,
    MetadataInvalid,
    ResultsError,
    ResultsMisconfigured,
    ResultsUnavailable,
    TaskInProgress,
    TaskNotFound,
)
from results.outbox import Outbox, open_outbox
from results.salvage import salvage_attempts
from results.sqlite import SqliteResults

OUTBOX_FILE = "outbox.sqlite"
"""The name of the file of attempts, below DATA_DIR."""

__all__ = [
    "GIVEN_UP_MESSAGE",
    "OUTBOX_FILE",
    "AlreadySettled",
    "Attempt",
    "AttemptFile",
    "AttemptLost",
    "Claim",
    "MetadataInvalid",
    "Outbox",
    "ResultStore",
    "ResultsError",
    "ResultsMisconfigured",
    "ResultsUnavailable",
    "Row",
    "SettledStatus",
    "SqliteResults",
    "Status",
    "StoredResult",
    "Task",
    "TaskInProgress",
    "TaskNotFound",
    "open_outbox",
    "salvage_attempts",
]
