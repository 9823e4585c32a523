"""Where task rows live: a ResultStore, the life of a row and its errors.

results.supabase is imported by who uses it: supabase-py takes 0.4 s and 43 MB a process.
"""

from results.base import Claim, ResultStore, Row, SettledStatus, Status, StoredResult, Task
from results.errors import (
    AttemptLost,
    MetadataInvalid,
    ResultsError,
    ResultsMisconfigured,
    ResultsUnavailable,
    TaskInProgress,
    TaskNotFound,
)
from results.outbox import Outbox
from results.sqlite import SqliteResults

__all__ = [
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
]
