"""The values in the file of attempts: an attempt, its outcome, and the lease of its claim."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from results.base import Task
from results.errors import MetadataInvalid


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended; the last four fields belong to `done`.

    Attributes:
        mask_keys: the stored masks that the result refers to; the attempt's other masks are not needed.
    """

    status: Literal["done", "error"]
    error_message: str | None = None
    mask_url: str | None = None
    labels: list[str] | None = None
    metadata: dict[str, object] | None = None
    mask_keys: list[str] | None = None

    def to_json(self) -> str:
        """Raises MetadataInvalid for a value that JSON cannot represent."""
        try:
            return json.dumps(asdict(self), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise MetadataInvalid("labels or metadata hold a value that JSON cannot represent") from error


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt in the file.

    Attributes:
        request_id: of the request that brought the task, for the log.
        suspect: a process died while it worked on this task; the retry runs exclusively.
    """

    task: Task
    attempt_id: str
    request_id: str = "-"
    outcome: Outcome | None = None
    suspect: bool = False


@dataclass(frozen=True, slots=True)
class Lease:
    """The lease of a claimed task that waits.

    Attributes:
        is_over_limit: the task has waited for the longest time allowed.
        reason: what the task waits for, in words for its user.
    """

    attempt: Attempt
    is_over_limit: bool
    reason: str


def read_attempt(attempt_id: str, task: str, request_id: str, outcome: str | None, deaths: int) -> Attempt:
    """The attempt in a row of the file; raises Python's own errors for a row that is not readable."""
    return Attempt(
        task=read_task(task),
        attempt_id=attempt_id,
        request_id=request_id,
        outcome=None if outcome is None else Outcome(**json.loads(outcome)),
        suspect=deaths > 0,
    )


def task_text(task: Task) -> str:
    """The task as JSON; without options, the text that earlier versions of the server wrote and can read."""
    return json.dumps({name: value for name, value in asdict(task).items() if name != "options" or value})


def read_task(text: str) -> Task:
    """The task that `task_text` wrote."""
    fields = json.loads(text)
    return Task(**{**fields, "prompts": tuple(fields["prompts"])})
