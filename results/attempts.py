"""What the file of attempts holds: attempts and their outcomes, leases, and tasks that were given up."""

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
        mask_keys: the stored masks that the result names; others of the attempt are not needed.
    """

    status: Literal["done", "error"]
    error_message: str | None = None
    mask_url: str | None = None
    labels: list[str] | None = None
    metadata: dict[str, object] | None = None
    mask_keys: list[str] | None = None

    def to_json(self) -> str:
        """Raises MetadataInvalid for what JSON has no word for."""
        try:
            return json.dumps(asdict(self), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise MetadataInvalid("labels or metadata hold something that JSON has no word for") from error


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt on the file.

    Attributes:
        request_id: of the request that brought the task, for the log.
        suspect: a process died while it worked on this task; it is begun again alone.
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
        is_over: the task has waited as long as it may.
        reason: what it waits for, in words for its user.
    """

    attempt: Attempt
    is_over: bool
    reason: str


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A task that is not tried again, and of which image and version that is true."""

    task: Task
    image_sha256: str | None
    server_version: str
    error_message: str
    given_up_at: str = ""


def read_attempt(attempt_id: str, task: str, request_id: str, outcome: str | None, deaths: int) -> Attempt:
    """The attempt of a row of the file; raises what Python raises for a row that makes none."""
    return Attempt(
        task=read_task(task),
        attempt_id=attempt_id,
        request_id=request_id,
        outcome=None if outcome is None else Outcome(**json.loads(outcome)),
        suspect=deaths > 0,
    )


def read_task(text: str) -> Task:
    """The task that `json.dumps(asdict(task))` wrote."""
    fields = json.loads(text)
    return Task(**{**fields, "prompts": tuple(fields["prompts"])})
