r"""The life of a task row, and what the service asks of the place where the rows are kept.

    pending or error --claim--> processing --update_result--> done
           ^                        |    \--update_status--> error
           '------update_status-----'

A claim names an attempt id. Every later write of the attempt names it too, and changes the row only while
that attempt holds it, so an attempt that was taken over cannot spoil its successor's row. `end_stale` ends
a row, but leaves it to its attempt, whose result is still taken; `refuse` ends a row that nobody has claimed.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Protocol
from uuid import UUID

Status = Literal["pending", "processing", "done", "error"]
# The two that end an attempt without a result.
SettledStatus = Literal["pending", "error"]


@dataclass(frozen=True, slots=True)
class Task:
    """A task as the caller names it. Raises ValueError for a task_id that is not a lower-case UUID."""

    task_id: str
    user_id: str
    source_image_url: str
    prompts: tuple[str, ...]

    def __post_init__(self) -> None:
        if str(UUID(self.task_id)) != self.task_id:
            raise ValueError("task_id is not a canonical lower-case UUID")

    @property
    def text_prompt(self) -> str:
        """The prompts as the row's one column holds them."""
        return ", ".join(self.prompts)


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to settle a task, until its lease runs out."""

    task_id: str
    attempt_id: str


@dataclass(frozen=True, slots=True)
class StoredResult:
    """What `update_result` was given for a task that is done."""

    task_id: str
    mask_url: str
    labels: list[str]
    metadata: dict[str, object]


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it stands; times are in UTC, and `attempt_id` is its latest attempt's."""

    status: Status
    attempt_id: str | None
    mask_url: str | None
    labels: list[str]
    metadata: dict[str, object]
    created_at: datetime
    updated_at: datetime


class ResultStore(Protocol):
    """Task rows. Any call may raise ResultsUnavailable, and may then be repeated as it was.

    One store serves all requests of a process at once; several processes may share the rows.
    """

    async def claim(self, task: Task, attempt_id: str) -> Claim | StoredResult:
        """Take a pending or failed task, or one whose lease ran out; a done one gives its result.

        `attempt_id` is new, or that of an attempt whose claim may have failed or whose process is gone:
        claiming again under the same id renews the lease. Raises TaskInProgress while another attempt's
        lease lasts, AttemptLost when this very attempt has ended the row as an error already, and
        TaskNotFound for another user's row or, where the Edge makes the rows, for a missing one.
        """
        ...

    async def update_result(
        self, task_id: str, mask_url: str, labels: list[str], metadata: dict[str, object], *, attempt_id: str
    ) -> None:
        """Settle the task as done.

        Raises AttemptLost, AlreadySettled for a row that was changed since this attempt settled it,
        TaskNotFound when the row is gone, and MetadataInvalid when it cannot be JSON.
        Repeating it is no error.
        """
        ...

    async def update_status(
        self, task_id: str, status: SettledStatus, *, attempt_id: str, error_message: str | None = None
    ) -> None:
        """End the attempt as "error", with a text for the user, or give the task back as "pending".

        Raises what `update_result` raises, and ValueError for any other status. Repeating it is no error.
        """
        ...

    async def refuse(self, task: Task, error_message: str) -> None:
        """End a task that is still "pending" as "error", without claiming it.

        Any other status is left as it is, and a missing row is no error.
        """
        ...

    async def end_stale(self, grace_s: float) -> int:
        """End as "error" the tasks whose lease has been over for `grace_s`; returns how many.

        A result that still comes from such an attempt is taken all the same.
        """
        ...

    async def check(self) -> list[str]:
        """Prove at the start that the rows can be used; what an operator should know, a sentence each.

        Rows that are only away for the moment are such a sentence. Raises ResultsMisconfigured, which says
        what to mend, when they cannot be used as they are.
        """
        ...

    async def close(self) -> None:
        """Finish what was begun and let go of the store; nothing else may be called after."""
        ...

    def describe(self) -> str:
        """One line for the start-up log, without secrets."""
        ...
