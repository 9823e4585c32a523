"""The invariants, checked after all faults have ended and all tasks have settled."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError
from PIL import UnidentifiedImageError

from tests.drawn import iou
from tests.faults.fault_log import Violation
from tests.faults.system import key_in
from tests.faults.tasks import MESSAGE_OF_POISON, MESSAGES_OF_BAD_IMAGES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.faults.system import System
    from tests.faults.tasks import Task

    Row = dict[str, Any]

SETTLE_LIMIT_S = 150.0
"""Time after the last fault within which every task must end."""
CLEAN_LIMIT_S = 90.0
"""Further time within which unneeded masks must be deleted."""
MAX_KILLS = 5
SAME = 0.99
TOO_LATE = ("the request took too long", "the model's process took too long", "waited too long")
TIMED_OUT = "timed out while a store or a process hung, without a retrying caller"
KILLED_TOO_LATE = "poison that was done, because its kill came too late"
EXPECTED_TRACEBACKS: dict[str, str] = {}
"""Exceptions that may be logged with a traceback, and why."""

_MARGIN = re.compile(r"^ *\| ")
"""Before each line of a traceback that is part of an exception group."""
_LINE_OF_ERROR = re.compile(r"[A-Za-z_][\w.]*(:|$)")
"""Not indented: frames and source lines are. Log records begin with a date."""


@dataclass
class Checks:
    """Checks a run round by round.

    Attributes:
        ends: number of tasks by kind and outcome.
        exceptions: number of valid tasks that did not end as done, by reason.
    """

    system: System
    ends: Counter[str] = field(default_factory=Counter)
    exceptions: Counter[str] = field(default_factory=Counter)
    _logs_read: dict[str, int] = field(default_factory=dict)
    _history_read: int = 0
    _done: set[str] = field(default_factory=set)

    def after_round(self, tasks: Sequence[Task]) -> list[Violation]:
        """Check a round with these tasks; returns violations."""
        rows = self.system.rows()
        found = [wrong for task in tasks for wrong in self._of_task(task, rows.get(task.task_id))]
        return [*found, *self._of_history(), *self._of_what_is_left(rows), *self._of_logs()]

    def _of_task(self, task: Task, row: Row | None) -> list[Violation]:
        status = "gone" if row is None else str(row["status"])
        self.ends[f"{task.kind}{'' if task.edit == 'none' else f' ({task.edit})'}: {status}"] += 1
        wrongs = [*self._of_answers(task, row)]
        if task.edit == "delete" and task.edited:
            wrongs += [] if row is None else ["a deleted row was inserted again"]
        elif row is None:
            wrongs += ["the row is missing"]
        elif task.is_forged:
            wrongs += ["a forged row was answered as done"] if _says_done(task) else []
        elif status == "done":
            wrongs += self._of_done(task, row)
        elif status == "error":
            wrongs += self._of_error(task, str(row["metadata"].get("error_message")))
        else:
            wrongs += [f"the row has not ended: {status}"]
        return [Violation("tasks end correctly", wrong, task.task_id) for wrong in wrongs]

    def _of_answers(self, task: Task, row: Row | None) -> list[str]:
        wrongs = [
            f"{answer.server} answered {answer.code} {answer.message}"
            for answer in task.answers
            if answer.code == "INTERNAL_ERROR" or answer.code.startswith("HTTP ")
        ]
        done = [answer.content for answer in task.answers if answer.code == "done"]
        by_user = task.edited and task.edit in {"pending", "delete"}
        if done and not by_user:
            if any(content != done[0] for content in done):
                wrongs.append("two answers differ")
            if row is None or row["status"] != "done":
                wrongs.append("it was answered as done, but the row is not done")
            elif row["mask_image_url"] not in _masks_named(done[0]):
                # With several prompts the row has the union's mask, which no answer has.
                wrongs += [] if "results" in done[0] else ["its answer has another mask than its row"]
        return wrongs

    def _of_done(self, task: Task, row: Row) -> list[str]:
        if task.is_poison:
            self.exceptions[KILLED_TOO_LATE] += 1
            return [f"poison is done after {task.kills} kills"] if task.kills >= MAX_KILLS else []
        if task.picture is None:
            return ["a task whose image cannot be read is done"]
        if row["labels"] != task.picture.labels:
            return [f"labels {row['labels']}, not {task.picture.labels}"]
        urls = [result["mask_url"] for result in row["metadata"].get("results", [])]
        if not (task.edit == "metadata of done" and task.edited):
            urls = [*urls, row["mask_image_url"]] if len(urls) > 1 else urls
            if len(urls) != len(task.picture.masks):
                return [f"{len(urls)} masks, not {len(task.picture.masks)}"]
        return [
            wrong
            for url, mask in zip(urls, task.picture.masks, strict=False)
            if (wrong := self._of_mask(url, mask))
        ]

    def _of_mask(self, url: str, expected: Any) -> str | None:
        try:
            mask = self.system.mask(url)
        except (ClientError, UnidentifiedImageError, OSError) as error:
            return f"its mask {key_in(url)} cannot be read: {type(error).__name__}"
        same = mask.shape == expected.shape and (
            iou(mask, expected) > SAME or not (mask.any() or expected.any())
        )
        return None if same else f"its mask {key_in(url)} differs from that of the server without faults"

    def _of_error(self, task: Task, message: str) -> list[str]:
        if task.is_poison:
            wrongs = [] if MESSAGE_OF_POISON in message else [f"poison ended with: {message}"]
            return wrongs + ([f"poison has killed {task.kills} times"] if task.kills > MAX_KILLS else [])
        if task.kind in MESSAGES_OF_BAD_IMAGES and MESSAGES_OF_BAD_IMAGES[task.kind] in message:
            return []
        if any(late in message for late in TOO_LATE) and not task.has_retrying_caller:
            self.exceptions[TIMED_OUT] += 1
            return []
        return [f"ended with: {message}"]

    def _of_history(self) -> list[Violation]:
        """After a row was done, only its user may have changed it."""
        found = []
        for number, task_id, who, what, status in self.system.execute(
            "select number, id, who, what, status from history where number > %s order by number",
            self._history_read,
        ):
            self._history_read = number
            key = str(task_id)
            if who == "service_role" and key in self._done:
                found.append(
                    Violation("a done row does not change", f"{what} to {status} after it was done", key)
                )
            if who == "service_role" and status == "done":
                self._done.add(key)
        return found

    def _of_what_is_left(self, rows: dict[str, Row]) -> list[Violation]:
        left = self.system.left_on_files()
        found = [
            Violation("nothing is left over", f"{name} in the outbox file: {len(what)}, {what[:3]}")
            for name, what in left.items()
            if what
        ]
        forged = {task.task_id for task in self.system.tasks if task.is_forged}
        named = {key for task_id, row in rows.items() if task_id not in forged for key in _keys_of(row)}
        edited = {t.task_id for t in self.system.tasks if t.edited and t.edit == "metadata of done"}
        for key in sorted(self.system.stored_masks() - named):
            task_id = key.split("/")[2]
            if task_id not in edited:
                found.append(Violation("nothing is left over", f"no row has the mask {key}", task_id))
        return found

    def _of_logs(self) -> list[Violation]:
        found = []
        secrets = self.system.secrets()
        for server in self.system.servers.values():
            if server.log_path.exists():
                text = server.log_path.read_text(errors="replace")
                new = text[self._logs_read.get(server.name, 0) :]
                self._logs_read[server.name] = len(text)
                leaked = [secret for secret in secrets if secret in new]
                found += [Violation("the log has no secret", f"{server.name}: {each}") for each in leaked]
                for error, times in _tracebacks(new).items():
                    if not any(named in error for named in EXPECTED_TRACEBACKS):
                        text = f"{server.name}, {times} times: {error}"
                        found.append(Violation("no unexpected traceback", text))
        return found


def _says_done(task: Task) -> bool:
    return any(answer.code == "done" for answer in task.answers)


def _masks_named(content: Any) -> list[str]:
    return [result["mask_url"] for result in content.get("results", [content])]


def _keys_of(row: Row) -> list[str]:
    metadata = row["metadata"] if isinstance(row["metadata"], dict) else {}
    urls = [row["mask_image_url"], *(each.get("mask_url") for each in metadata.get("results") or [])]
    return [key_in(url) for url in urls if url and "masks/" in url]


def _tracebacks(log: str) -> Counter[str]:
    """The exceptions that were logged with a traceback, by their last line.

    One without a last line is not counted: its process was killed while it wrote.
    """
    found: Counter[str] = Counter()
    inside = False
    for line in log.splitlines():
        text = _MARGIN.sub("", line)
        if "Traceback (most recent call last)" in line:
            inside = True
        elif inside and _LINE_OF_ERROR.match(text):
            found[text[:200]] += 1
            inside = False
    return found
