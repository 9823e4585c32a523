"""The invariants, checked once all is healed and settled."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError
from PIL import UnidentifiedImageError

from tests.drawn import iou
from tests.faults.diary import Violation
from tests.faults.stage import key_in
from tests.faults.tasks import TRUE_OF_BAD_IMAGES, TRUE_OF_POISON

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.faults.stage import Stage
    from tests.faults.tasks import Task

    Row = dict[str, Any]

SETTLE_WITHIN_S = 150.0
"""After the last fault every task has ended."""
CLEAN_WITHIN_S = 90.0
"""After that the masks that nobody needs are deleted."""
MOST_KILLS = 5
SAME = 0.99
TOO_LATE = ("the request took too long", "the model's process took too long", "waited too long")
TOLD = "told to nobody who sends again: its time was over, with a store or a process that hung"
MISSED = "poison that was done, since its kill came too late"
NAMED_TRACEBACKS: dict[str, str] = {
    "No space left on device": "no model's process starts while DATA_DIR is full",
}
"""Exceptions that the log may tell with a traceback, and why."""

_LINE_OF_ERROR = re.compile(r"^[\w.]+(Error|Exception|Exit|Interrupt|Cancelled\w*|Failure)\b.*")


@dataclass
class Checks:
    """Checks a run round by round.

    Attributes:
        ends: how many tasks of each kind ended how.
        exceptions: how many innocent tasks did not end as done, by the reason.
    """

    stage: Stage
    ends: Counter[str] = field(default_factory=Counter)
    exceptions: Counter[str] = field(default_factory=Counter)
    _logs_read: dict[str, int] = field(default_factory=dict)
    _history_read: int = 0
    _done: set[str] = field(default_factory=set)

    def after_round(self, tasks: Sequence[Task]) -> list[Violation]:
        """What is wrong after a round with these tasks."""
        rows = self.stage.rows()
        found = [wrong for task in tasks for wrong in self._of_task(task, rows.get(task.task_id))]
        return [*found, *self._of_history(), *self._of_what_is_left(rows), *self._of_logs()]

    def _of_task(self, task: Task, row: Row | None) -> list[Violation]:
        status = "gone" if row is None else str(row["status"])
        self.ends[f"{task.kind}{'' if task.edit == 'none' else f' ({task.edit})'}: {status}"] += 1
        wrongs = [*self._of_answers(task, row)]
        if task.edit == "delete" and task.edited:
            wrongs += [] if row is None else ["a row that was deleted is back"]
        elif row is None:
            wrongs += ["the row is gone"]
        elif task.is_forged:
            wrongs += ["a forged row was answered as done"] if _says_done(task) else []
        elif status == "done":
            wrongs += self._of_done(task, row)
        elif status == "error":
            wrongs += self._of_error(task, str(row["metadata"].get("error_message")))
        else:
            wrongs += [f"the row has not ended: {status}"]
        return [Violation("tasks end as they must", wrong, task.task_id) for wrong in wrongs]

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
                wrongs.append("it was answered as done, and is not")
            elif row["mask_image_url"] not in _masks_named(done[0]):
                # Of several prompts the row names the union, which no answer does.
                wrongs += [] if "results" in done[0] else ["its answer names another mask than its row"]
        return wrongs

    def _of_done(self, task: Task, row: Row) -> list[str]:
        if task.is_poison:
            self.exceptions[MISSED] += 1
            return [f"poison is done after {task.kills} kills"] if task.kills >= MOST_KILLS else []
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
            mask = self.stage.mask(url)
        except (ClientError, UnidentifiedImageError, OSError) as error:
            return f"its mask {key_in(url)} cannot be read: {type(error).__name__}"
        same = mask.shape == expected.shape and (
            iou(mask, expected) > SAME or not (mask.any() or expected.any())
        )
        return None if same else f"its mask {key_in(url)} is another than the quiet server's"

    def _of_error(self, task: Task, message: str) -> list[str]:
        if task.is_poison:
            wrongs = [] if TRUE_OF_POISON in message else [f"poison ended with: {message}"]
            return wrongs + ([f"poison has killed {task.kills} times"] if task.kills > MOST_KILLS else [])
        if task.kind in TRUE_OF_BAD_IMAGES and TRUE_OF_BAD_IMAGES[task.kind] in message:
            return []
        if any(late in message for late in TOO_LATE) and not task.has_patient_caller:
            self.exceptions[TOLD] += 1
            return []
        return [f"ended with: {message}"]

    def _of_history(self) -> list[Violation]:
        """Once the database saw a row done, only its user has changed it."""
        found = []
        for number, task_id, who, what, status in self.stage.execute(
            "select number, id, who, what, status from history where number > %s order by number",
            self._history_read,
        ):
            self._history_read = number
            key = str(task_id)
            if who == "service_role" and key in self._done:
                found.append(Violation("what is done stays", f"{what} to {status} after it was done", key))
            if who == "service_role" and status == "done":
                self._done.add(key)
        return found

    def _of_what_is_left(self, rows: dict[str, Row]) -> list[Violation]:
        left = self.stage.left_on_files()
        found = [
            Violation("nothing is left", f"{name} on the file: {len(what)}, {what[:3]}")
            for name, what in left.items()
            if what
        ]
        forged = {task.task_id for task in self.stage.tasks if task.is_forged}
        named = {key for task_id, row in rows.items() if task_id not in forged for key in _keys_of(row)}
        edited = {t.task_id for t in self.stage.tasks if t.edited and t.edit == "metadata of done"}
        for key in sorted(self.stage.stored_masks() - named):
            task_id = key.split("/")[2]
            if task_id not in edited:
                found.append(Violation("nothing is left", f"no row names the mask {key}", task_id))
        return found

    def _of_logs(self) -> list[Violation]:
        found = []
        secrets = self.stage.secrets()
        for server in self.stage.servers.values():
            if server.log_path.exists():
                text = server.log_path.read_text(errors="replace")
                new = text[self._logs_read.get(server.name, 0) :]
                self._logs_read[server.name] = len(text)
                told = [secret for secret in secrets if secret in new]
                found += [Violation("the log holds no secret", f"{server.name}: {each}") for each in told]
                for error, times in _tracebacks(new).items():
                    if not any(named in error for named in NAMED_TRACEBACKS):
                        text = f"{server.name}, {times} times: {error}"
                        found.append(Violation("no traceback without a name", text))
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
    """The exceptions that the log tells with a traceback, by their last line."""
    found: Counter[str] = Counter()
    inside = False
    for line in log.splitlines():
        if "Traceback (most recent call last)" in line:
            inside = True
        elif inside and _LINE_OF_ERROR.match(line.strip(" |")):
            found[line.strip(" |")[:200]] += 1
            inside = False
    if inside:
        found["(cut off)"] += 1
    return found
