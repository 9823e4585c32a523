r"""The life of a task row, and the interface of the stores that hold the rows.

    pending or error --claim--> processing --update_result--> done
                                    \--------update_status--> error

A claim names an attempt id. Every later write of the attempt names it too, and changes the row only while
that attempt holds it. So an attempt whose row was taken over cannot overwrite its successor's row.
`end_stale` ends a row and leaves it to its attempt, whose late result is still stored. `refuse` ends a row
that nobody has claimed.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Protocol
from uuid import UUID

Status = Literal["pending", "processing", "done", "error"]


@dataclass(frozen=True, slots=True)
class Task:
    """A task as its caller sent it. Raises ValueError for a task_id that is not a lower-case UUID.

    Attributes:
        options: what is asked for besides the prompts, in a canonical text; empty where nothing is.
    """

    task_id: str
    user_id: str
    source_image_url: str
    prompts: tuple[str, ...]
    options: str = ""

    def __post_init__(self) -> None:
        if str(UUID(self.task_id)) != self.task_id:
            raise ValueError("task_id is not a canonical lower-case UUID")

    @property
    def text_prompt(self) -> str:
        """The prompts as the row's single column holds them."""
        return ", ".join(self.prompts)


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to settle a task, until its lease expires."""

    task_id: str
    attempt_id: str


@dataclass(frozen=True, slots=True)
class StoredResult:
    """What `update_result` stored for a task that is done."""

    task_id: str
    mask_url: str
    labels: list[str]
    metadata: dict[str, object]


@dataclass(frozen=True, slots=True)
class Row:
    """The current content of a row; times are in UTC, `attempt_id` is that of its latest attempt."""

    status: Status
    attempt_id: str | None
    mask_url: str | None
    labels: list[str]
    metadata: dict[str, object]
    created_at: datetime
    updated_at: datetime


class ResultStore(Protocol):
    """Task rows. Any call may raise ResultsUnavailable; repeating the same call is then safe.

    One store serves all concurrent requests of a process; several processes may share the rows.
    """

    async def claim(self, task: Task, attempt_id: str) -> Claim | StoredResult:
        """Claim a pending or failed task, or one whose lease has expired; return the result of a done one.

        `attempt_id` is new, or that of an attempt whose claim may have failed or whose process has ended:
        claiming again under the same id renews the lease. Raises TaskInProgress while another attempt's
        lease lasts, AttemptLost when this same attempt has already ended the row as an error, and
        TaskNotFound for another user's row or, where the Edge inserts the rows, for a missing one.
        """
        ...

    async def update_result(
        self, task_id: str, mask_url: str, labels: list[str], metadata: dict[str, object], *, attempt_id: str
    ) -> None:
        """Settle the task as done. Repeating the call is no error.

        Raises AttemptLost, AlreadySettled for a row that was changed since this attempt settled it,
        TaskNotFound when the row is gone, and MetadataInvalid when the values are not JSON.
        """
        ...

    async def update_status(
        self, task_id: str, status: Status, *, attempt_id: str, error_message: str | None = None
    ) -> None:
        """Settle the task as "error", with a message for the user. Repeating the call is no error.

        Raises what `update_result` raises, and ValueError for any other status.
        """
        ...

    async def refuse(self, task: Task, error_message: str) -> None:
        """End a task that is still "pending" as "error", without claiming it.

        A row of any other status stays as it is, and a missing row is no error.
        """
        ...

    async def end_stale(self, grace_s: float) -> int:
        """End as "error" the tasks whose lease expired more than `grace_s` ago; return their number.

        A late result of such an attempt is still stored.
        """
        ...

    async def check(self) -> list[str]:
        """Verify at the start that the rows can be used; return warnings for the operator, a sentence each.

        A store that is temporarily unavailable is a warning. Raises ResultsMisconfigured, which says what
        to change, when the store cannot be used as configured.
        """
        ...

    async def close(self) -> None:
        """Finish running calls and close the store; no other call may follow."""
        ...

    def describe(self) -> str:
        """One line for the start-up log, without secrets."""
        ...
