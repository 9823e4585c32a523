"""The tasks of the fault test: how they are drawn, their callers and the answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from tests.edge import BATCH, PREDICT

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

Kind = Literal["good", "missing", "corrupt", "foreign", "runner poison", "server poison"]
Behaviour = Literal["retries", "sends once", "disconnects"]
Edit = Literal[
    "none",
    # After the claim; the task must be done nevertheless.
    "metadata",
    "large metadata",
    "pending",
    # The row is deleted after the claim.
    "delete",
    # After the row is done.
    "metadata of done",
    # At the insertion.
    "infinity",
    "forged done",
    "forged mask",
    "forged processing",
]

MESSAGES_OF_BAD_IMAGES: Mapping[str, str] = {
    "missing": "no image is stored there",
    "corrupt": "the image is damaged",
    "foreign": "image_url is not below the user's uploads",
}
MESSAGE_OF_POISON = "stopped 3 times"
FORGED: frozenset[Edit] = frozenset({"forged done", "forged mask", "forged processing"})
_EDITS: tuple[Edit, ...] = (
    *("metadata", "metadata", "large metadata", "pending", "pending", "delete", "delete"),
    *("metadata of done", "infinity", "forged done", "forged mask", "forged processing"),
)
EDITED = 0.15
"""Share of the valid tasks whose row is edited by its user."""
_BAD_KINDS: tuple[Kind, ...] = ("missing", "corrupt", "foreign")
_POISON_KINDS: tuple[Kind, ...] = ("runner poison", "server poison")
BAD_EVERY = 10
POISON_EVERY = 50
SEVERAL = 0.25
"""Share of the tasks with several callers."""
RETRIES_SHARE, ONCE_SHARE = 0.55, 0.25
"""Shares of the callers; the others disconnect."""

NO_ANSWER = frozenset({"no connection", "cut", "disconnected"})
NOT_ACCEPTED = frozenset({"OVERLOADED", "INVALID_REQUEST", "AUTH_REQUIRED", "AUTH_INVALID"})
ACCEPTED_IF_KEPT = frozenset({"MODEL_NOT_LOADED", "RESULTS_UNAVAILABLE"})


@dataclass(frozen=True)
class Picture:
    """A scene, prompts, and the results of the server without faults.

    Attributes:
        keys: the key of each user's upload.
        masks: one per prompt, then their union if there are several.
    """

    keys: Mapping[str, str]
    prompts: tuple[str, ...]
    labels: Sequence[str]
    masks: Sequence[npt.NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class Answer:
    """A caller's answer; `code` is "done", an error's code, or describes a failed request."""

    at_s: float
    server: str
    code: str
    message: str = ""
    content: Any = None
    retry_after_s: float = 0.0

    @property
    def says_accepted(self) -> bool:
        """Whether it means that this server, or another one, has accepted the task."""
        if self.code in ACCEPTED_IF_KEPT:
            return "kept" in self.message
        return self.code not in NO_ANSWER | NOT_ACCEPTED


@dataclass
class Task:
    """One task, and what was observed of it.

    Attributes:
        number: in its round.
        callers: the behaviour of each caller.
        server: the only server that gets this poison; other tasks go to any.
        edited: its user's edit has changed the row.
        kills: number of kills for it.
        last_kill: number of the row's last change before the last kill.
        seen_on_file: a server's outbox file contained it at some time.
    """

    number: int
    body: dict[str, Any]
    kind: Kind
    edit: Edit
    picture: Picture | None
    callers: tuple[Behaviour, ...]
    server: str | None = None
    answers: list[Answer] = field(default_factory=list)
    edited: bool = False
    kills: int = 0
    last_kill: int = 0
    seen_on_file: bool = False

    @property
    def task_id(self) -> str:
        return str(self.body["task_id"])

    @property
    def user_id(self) -> str:
        return str(self.body["user_id"])

    @property
    def route(self) -> str:
        """The route for its prompts."""
        return BATCH if "prompts" in self.body else PREDICT

    @property
    def prompts(self) -> list[str]:
        return list(self.body.get("prompts") or [self.body["text_prompt"]])

    @property
    def is_poison(self) -> bool:
        return self.kind in {"runner poison", "server poison"}

    @property
    def is_forged(self) -> bool:
        return self.edit in FORGED

    @property
    def has_retrying_caller(self) -> bool:
        return "retries" in self.callers

    def __str__(self) -> str:
        edit = "" if self.edit == "none" else f", {self.edit}{'' if self.edited else ' (missed)'}"
        return f"task {self.task_id} ({self.kind}{edit}, {'/'.join(self.callers)})"


@dataclass(frozen=True)
class BadKeys:
    """Keys of missing, corrupt and foreign images, for each user."""

    missing: Mapping[str, str]
    corrupt: Mapping[str, str]
    foreign: Mapping[str, str]


def draw_task(
    number: int,
    rng: random.Random,
    *,
    pictures: Sequence[Picture],
    bad: BadKeys,
    users: Sequence[str],
    servers: Sequence[str],
) -> Task:
    """Draw the task with this number."""
    picture, user = rng.choice(pictures), rng.choice(users)
    edit = rng.choice(_EDITS) if rng.random() < EDITED else "none"
    callers = tuple(_behaviour(rng.random()) for _ in range(4))[
        : rng.randint(2, 4) if rng.random() < SEVERAL else 1
    ]
    server, bad_kind = rng.choice(servers), rng.choice(_BAD_KINDS)
    kind: Kind = "good"
    if number % POISON_EVERY == 12:
        kind = _POISON_KINDS[number // POISON_EVERY % 2]
    elif number % BAD_EVERY == BAD_EVERY - 1:
        kind = bad_kind
    if kind != "good":
        edit = "none"
    if edit in FORGED:
        callers = ("sends once",)  # a forged lease lasts for 15 minutes
    is_bad = kind in MESSAGES_OF_BAD_IMAGES
    body = {
        "task_id": str(uuid4()),
        "user_id": user,
        "image_url": getattr(bad, kind)[user] if is_bad else picture.keys[user],
    }
    prompts = picture.prompts
    body |= {"text_prompt": prompts[0]} if len(prompts) == 1 else {"prompts": list(prompts)}
    poison = kind in {"runner poison", "server poison"}
    return Task(
        number, body, kind, edit, None if is_bad else picture, callers, server=server if poison else None
    )


def _behaviour(part: float) -> Behaviour:
    if part < RETRIES_SHARE:
        return "retries"
    return "sends once" if part < RETRIES_SHARE + ONCE_SHARE else "disconnects"
