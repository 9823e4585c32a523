"""Who sends the tasks, and the users who write to their rows meanwhile."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import httpx

from tests.faults.diary import drawn
from tests.faults.tasks import draw_task

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from concurrent.futures import Future

    from tests.faults.stage import Stage
    from tests.faults.tasks import Answer, Mood, Task

CALLERS = 12
USERS_AT_ONCE = 2
MOST_OPEN = 16
"""Calls that wait or go on at once; no task is drawn beyond them."""
PAUSE_S = (0.1, 0.4)
RESEND_S = (0.3, 1.5)
LONGEST_RETRY_AFTER_S = 5.0
HANG_UP_S = (0.01, 0.4)
EDIT_POLL_S = 0.04
EDIT_LIMIT_S = 60.0
FINAL = ("done", "INVALID_REQUEST", "FORBIDDEN", "IMAGE_NOT_FOUND", "TASK_NOT_FOUND", "UNSUPPORTED_IMAGE")
"""What ends a patient caller's patience, beside the errors of a task that was given up."""
LARGE = "x" * 200_000


class Callers:
    """Draws tasks at a modest rate and has them sent, until it is told to stop.

    Args:
        stage: everything.
        seed: of the run.
        number: of the round.
    """

    def __init__(self, stage: Stage, seed: int, number: int) -> None:
        self._stage = stage
        self._rng = drawn(seed, number, "tasks")
        self._seeds = (seed, number)
        self._stopping = threading.Event()
        self._give_up = threading.Event()
        self._calls: list[Future[None]] = []
        self._edits: list[Future[None]] = []
        self.tasks: list[Task] = []

    def run(self) -> None:
        """Send tasks until `stop`."""
        with ThreadPoolExecutor(CALLERS, "caller") as callers, ThreadPoolExecutor(USERS_AT_ONCE) as users:
            while not self._stopping.wait(self._rng.uniform(*PAUSE_S)):
                if sum(not call.done() for call in self._calls) < MOST_OPEN:
                    self._send_next(callers, users)
            for job in (*self._calls, *self._edits):
                job.result()

    def stop(self) -> None:
        """Draw no more tasks; the patient callers go on."""
        self._stopping.set()

    def give_up(self) -> None:
        """The patient callers have waited long enough."""
        self._give_up.set()

    def wait_until_told(self, timeout_s: float) -> bool:
        """Whether all callers have ended within that time."""
        return not wait(self._calls, timeout_s).not_done

    def _send_next(self, callers: ThreadPoolExecutor, users: ThreadPoolExecutor) -> None:
        stage = self._stage
        servers = [server.name for server in stage.active]
        task = draw_task(
            len(self.tasks),
            self._rng,
            pictures=stage.pictures,
            bad=stage.bad,
            users=stage.users,
            servers=servers,
        )
        self.tasks.append(task)
        stage.tasks.append(task)
        if task.is_poison:
            stage.poisons.append(task)
        if task.is_forged or task.edit == "infinity":
            forge_row(stage, task)
        else:
            stage.insert_row(task)
        if task.edit in UNDER_CLAIM or task.edit == "metadata of done":
            self._edits.append(users.submit(edit_row, stage, task, self._give_up))
        for index, mood in enumerate(task.callers):
            rng = drawn(*self._seeds, "caller", task.number, index)
            self._calls.append(callers.submit(self._call, task, mood, rng))

    def _call(self, task: Task, mood: Mood, rng: random.Random) -> None:
        time.sleep(rng.choice((0.0, 0.0, 0.02, 0.2)))
        while not self._give_up.is_set():
            servers = [self._stage.servers[task.server]] if task.server else self._stage.active
            hang_up_s = rng.uniform(*HANG_UP_S) if mood == "hang-up" else None
            answer = self._stage.send(rng.choice(servers), task, hang_up_s=hang_up_s)
            # Nothing was sent where there was no connection, so nobody has sent it once.
            if answer.code != "no connection" and (mood != "patient" or _is_final(answer)):
                return
            pause_s = max(min(answer.retry_after_s, LONGEST_RETRY_AFTER_S), rng.uniform(*RESEND_S))
            self._give_up.wait(pause_s)


def _is_final(answer: Answer) -> bool:
    return answer.code in FINAL or (answer.code == "INFERENCE_FAILED" and "stopped" in answer.message)


UNDER_CLAIM: dict[str, Callable[[], dict[str, Any]]] = {
    "metadata": lambda: {"metadata": {"note": "mine"}},
    "large metadata": lambda: {"metadata": {"note": LARGE, "attempt": "0" * 36}},
    "pending": lambda: {"status": "pending", "metadata": {}},
    "delete": dict,
}


def edit_row(stage: Stage, task: Task, give_up: threading.Event) -> None:
    """What the task's user does to the row, as soon as it is in the state for it."""
    status = "done" if task.edit == "metadata of done" else "processing"
    path = f"segmentation_results?id=eq.{task.task_id}&status=eq.{status}&select=id"
    content = UNDER_CLAIM.get(task.edit, lambda: {"metadata": {"note": "mine"}})()
    method = "DELETE" if task.edit == "delete" else "PATCH"
    until_s = time.monotonic() + EDIT_LIMIT_S
    while time.monotonic() < until_s and not give_up.wait(EDIT_POLL_S):
        try:
            response = _as_user(stage, task, method, path, content)
        except httpx.TransportError:
            continue  # the database is away
        if response.is_success and response.json():
            task.edited = True
            stage.diary.fault(f"user: {task.edit}", task.task_id)
            return


def forge_row(stage: Stage, task: Task) -> None:
    """The task's user inserts the row, with what no Edge would write."""
    foreign = f"https://example.com/masks/{task.user_id}/{task.task_id}/0-0123456789abcdef.png"
    result = {"metadata": {"prompts": task.prompts, "inference_time_ms": 1.0, "results": []}}
    forged: dict[str, dict[str, Any]] = {
        "infinity": {"updated_at": "infinity"},
        "forged done": {"status": "done", **result},
        "forged mask": {"status": "done", "mask_image_url": foreign, **result},
        "forged processing": {"status": "processing", "metadata": {"attempt": LARGE}},
    }
    row = {
        "id": task.task_id,
        "user_id": task.user_id,
        "source_image_url": task.body["image_url"],
        "text_prompt": ", ".join(task.prompts),
        **forged[task.edit],
    }
    until_s = time.monotonic() + EDIT_LIMIT_S
    while time.monotonic() < until_s:
        try:
            response = _as_user(stage, task, "POST", "segmentation_results", row)
        except httpx.TransportError:
            response = None  # the database is away
        if response is not None and response.status_code in {httpx.codes.CREATED, httpx.codes.CONFLICT}:
            task.edited = True
            stage.diary.fault(f"user: {task.edit}", task.task_id)
            return
        time.sleep(0.2)
    raise TimeoutError(f"no row could be inserted for {task}")


def _as_user(stage: Stage, task: Task, method: str, path: str, content: dict[str, Any]) -> httpx.Response:
    """One call to PostgREST under row level security; it comes past the proxy that fails."""
    jwt = stage.database.user_jwt(task.user_id)
    headers = {"Prefer": "return=representation"}
    sent: dict[str, Any] = {} if method == "DELETE" else {"json": content}
    return stage.database.request(method, path, jwt=jwt, headers=headers, **sent)
