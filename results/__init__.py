"""The task rows: the interface of their stores, the embedded store, the outbox and the errors.

Only users of Supabase import results.supabase: it takes 0.25 s and 20 MB per process.
"""

from results.attempts import Attempt
from results.base import Claim, ResultStore, Row, Status, StoredResult, Task
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
from results.given_up import GIVEN_UP_MESSAGE, GivenUpList, open_given_up
from results.outbox import Outbox, open_outbox
from results.salvage import salvage_attempts
from results.sqlite import SqliteResults

OUTBOX_FILE = "outbox.sqlite"
"""The name of the file of attempts, in DATA_DIR."""

__all__ = [
    "GIVEN_UP_MESSAGE",
    "OUTBOX_FILE",
    "AlreadySettled",
    "Attempt",
    "AttemptLost",
    "Claim",
    "GivenUpList",
    "MetadataInvalid",
    "Outbox",
    "ResultStore",
    "ResultsError",
    "ResultsMisconfigured",
    "ResultsUnavailable",
    "Row",
    "SqliteResults",
    "Status",
    "StoredResult",
    "Task",
    "TaskInProgress",
    "TaskNotFound",
    "open_given_up",
    "open_outbox",
    "salvage_attempts",
]
