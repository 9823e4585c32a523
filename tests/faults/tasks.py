"""The tasks of the fault test: how each is drawn, who sends it, what its callers were told."""

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
Mood = Literal["patient", "impatient", "hang-up"]
Edit = Literal[
    "none",
    # Under the claim; the result must come all the same.
    "metadata",
    "large metadata",
    "pending",
    # The row goes under the claim.
    "delete",
    # The row is done.
    "metadata of done",
    # At the insert.
    "infinity",
    "forged done",
    "forged mask",
    "forged processing",
]

TRUE_OF_BAD_IMAGES: Mapping[str, str] = {
    "missing": "no image is stored there",
    "corrupt": "the image is damaged",
    "foreign": "image_url is not below the user's uploads",
}
TRUE_OF_POISON = "stopped 3 times"
FORGED: frozenset[Edit] = frozenset({"forged done", "forged mask", "forged processing"})
_EDITS: tuple[Edit, ...] = (
    *("metadata", "metadata", "large metadata", "pending", "pending", "delete", "delete"),
    *("metadata of done", "infinity", "forged done", "forged mask", "forged processing"),
)
EDITED = 0.15
"""Part of the good tasks whose row its user writes to."""
_BAD_KINDS: tuple[Kind, ...] = ("missing", "corrupt", "foreign")
_POISON_KINDS: tuple[Kind, ...] = ("runner poison", "server poison")
BAD_EVERY = 10
POISON_EVERY = 50
SEVERAL = 0.25
"""Part of the tasks that several callers send."""
PATIENT, IMPATIENT = 0.55, 0.25
"""Parts of the callers; the others hang up."""

NO_ANSWER = frozenset({"no connection", "cut", "hung up"})
NEVER_TAKEN = frozenset({"OVERLOADED", "INVALID_REQUEST", "AUTH_REQUIRED", "AUTH_INVALID"})
KEPT_OR_NOT_TAKEN = frozenset({"MODEL_NOT_LOADED", "RESULTS_UNAVAILABLE"})


@dataclass(frozen=True)
class Picture:
    """A scene, prompts, and what a quiet server finds for them.

    Attributes:
        keys: of each user's upload.
        masks: one a prompt, then their union if there are several.
    """

    keys: Mapping[str, str]
    prompts: tuple[str, ...]
    labels: Sequence[str]
    masks: Sequence[npt.NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a caller was told; `code` is "done", an error's code, or what happened instead."""

    at_s: float
    server: str
    code: str
    message: str = ""
    content: Any = None
    retry_after_s: float = 0.0

    @property
    def says_taken(self) -> bool:
        """Whether it says that the server, or another, has the task."""
        if self.code in KEPT_OR_NOT_TAKEN:
            return "kept" in self.message
        return self.code not in NO_ANSWER | NEVER_TAKEN


@dataclass
class Task:
    """One task, and all that is known of it.

    Attributes:
        number: of its round.
        callers: the mood of each.
        server: whose poison it is; other tasks go to any.
        edited: its user's edit has met the row.
        kills: how often a process was killed for it.
        last_kill: the number of the last change of its row before that.
        seen_on_file: a server's file held it at some time.
    """

    number: int
    body: dict[str, Any]
    kind: Kind
    edit: Edit
    picture: Picture | None
    callers: tuple[Mood, ...]
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
    def has_patient_caller(self) -> bool:
        return "patient" in self.callers

    def __str__(self) -> str:
        edit = "" if self.edit == "none" else f", {self.edit}{'' if self.edited else ' (missed)'}"
        return f"task {self.task_id} ({self.kind}{edit}, {'/'.join(self.callers)})"


@dataclass(frozen=True)
class BadKeys:
    """What names no good image, for each user."""

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
    """The task of this number."""
    picture, user = rng.choice(pictures), rng.choice(users)
    edit = rng.choice(_EDITS) if rng.random() < EDITED else "none"
    callers = tuple(_mood(rng.random()) for _ in range(4))[
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
        callers = ("impatient",)  # a lease that was forged lasts for 15 minutes
    is_bad = kind in TRUE_OF_BAD_IMAGES
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


def _mood(part: float) -> Mood:
    if part < PATIENT:
        return "patient"
    return "impatient" if part < PATIENT + IMPATIENT else "hang-up"
