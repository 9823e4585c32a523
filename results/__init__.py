"""Where task rows live: a ResultStore, the life of a row and its errors."""

from results.base import Claim, ResultStore, Row, SettledStatus, Status, StoredResult, Task
from results.errors import (
    AttemptLost,
    MetadataInvalid,
    ResultsError,
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
