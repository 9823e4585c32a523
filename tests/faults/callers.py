"""Callers that send tasks, and users who edit their rows meanwhile."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import httpx

from tests.faults.fault_log import rng_for
from tests.faults.tasks import draw_task

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from concurrent.futures import Future

    from tests.faults.system import System
    from tests.faults.tasks import Answer, Behaviour, Task

CALLERS = 12
USERS_AT_ONCE = 2
MAX_OPEN = 16
"""Maximum number of open requests; no task is drawn beyond it."""
PAUSE_S = (0.1, 0.4)
RESEND_S = (0.3, 1.5)
MAX_RETRY_AFTER_S = 5.0
DISCONNECT_S = (0.01, 0.4)
EDIT_POLL_S = 0.04
EDIT_LIMIT_S = 60.0
FINAL = ("done", "INVALID_REQUEST", "FORBIDDEN", "IMAGE_NOT_FOUND", "TASK_NOT_FOUND", "UNSUPPORTED_IMAGE")
"""Answers after which a retrying caller stops, in addition to the errors of given-up tasks."""
LARGE = "x" * 200_000


class Callers:
    """Draws tasks at a moderate rate and sends them, until it is stopped.

    Args:
        system: everything.
        seed: of the run.
        number: of the round.
    """

    def __init__(self, system: System, seed: int, number: int) -> None:
        self._system = system
        self._rng = rng_for(seed, number, "tasks")
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
                if sum(not call.done() for call in self._calls) < MAX_OPEN:
                    self._send_next(callers, users)
            for job in (*self._calls, *self._edits):
                job.result()

    def stop(self) -> None:
        """Draw no more tasks; the retrying callers continue."""
        self._stopping.set()

    def give_up(self) -> None:
        """End the retrying callers."""
        self._give_up.set()

    def wait_until_answered(self, timeout_s: float) -> bool:
        """Wait for all callers; returns whether they have ended within the timeout."""
        return not wait(self._calls, timeout_s).not_done

    def _send_next(self, callers: ThreadPoolExecutor, users: ThreadPoolExecutor) -> None:
        system = self._system
        servers = [server.name for server in system.active]
        task = draw_task(
            len(self.tasks),
            self._rng,
            pictures=system.pictures,
            bad=system.bad,
            users=system.users,
            servers=servers,
        )
        self.tasks.append(task)
        system.tasks.append(task)
        if task.is_poison:
            system.poisons.append(task)
        if task.is_forged or task.edit == "infinity":
            forge_row(system, task)
        else:
            system.insert_row(task)
        if task.edit in EDITS_AFTER_CLAIM or task.edit == "metadata of done":
            self._edits.append(users.submit(edit_row, system, task, self._give_up))
        for index, behaviour in enumerate(task.callers):
            rng = rng_for(*self._seeds, "caller", task.number, index)
            self._calls.append(callers.submit(self._call, task, behaviour, rng))

    def _call(self, task: Task, behaviour: Behaviour, rng: random.Random) -> None:
        time.sleep(rng.choice((0.0, 0.0, 0.02, 0.2)))
        while not self._give_up.is_set():
            servers = [self._system.servers[task.server]] if task.server else self._system.active
            disconnect_s = rng.uniform(*DISCONNECT_S) if behaviour == "disconnects" else None
            answer = self._system.send(rng.choice(servers), task, disconnect_s=disconnect_s)
            # Without a connection nothing was sent, so this does not count as a request.
            if answer.code != "no connection" and (behaviour != "retries" or _is_final(answer)):
                return
            pause_s = max(min(answer.retry_after_s, MAX_RETRY_AFTER_S), rng.uniform(*RESEND_S))
            self._give_up.wait(pause_s)


def _is_final(answer: Answer) -> bool:
    return answer.code in FINAL or (answer.code == "INFERENCE_FAILED" and "stopped" in answer.message)


EDITS_AFTER_CLAIM: dict[str, Callable[[], dict[str, Any]]] = {
    "metadata": lambda: {"metadata": {"note": "mine"}},
    "large metadata": lambda: {"metadata": {"note": LARGE, "attempt": "0" * 36}},
    "pending": lambda: {"status": "pending", "metadata": {}},
    "delete": dict,
}


def edit_row(system: System, task: Task, give_up: threading.Event) -> None:
    """Do the user's edit of the row, as soon as the row has the right status."""
    status = "done" if task.edit == "metadata of done" else "processing"
    path = f"segmentation_results?id=eq.{task.task_id}&status=eq.{status}&select=id"
    content = EDITS_AFTER_CLAIM.get(task.edit, lambda: {"metadata": {"note": "mine"}})()
    method = "DELETE" if task.edit == "delete" else "PATCH"
    until_s = time.monotonic() + EDIT_LIMIT_S
    while time.monotonic() < until_s and not give_up.wait(EDIT_POLL_S):
        try:
            response = _as_user(system, task, method, path, content)
        except httpx.TransportError:
            continue  # the database is unavailable
        if response.is_success and response.json():
            task.edited = True
            system.fault_log.fault(f"user: {task.edit}", task.task_id)
            return


def forge_row(system: System, task: Task) -> None:
    """Insert the row as the task's user, with content that no Edge would write."""
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
            response = _as_user(system, task, "POST", "segmentation_results", row)
        except httpx.TransportError:
            response = None  # the database is unavailable
        if response is not None and response.status_code in {httpx.codes.CREATED, httpx.codes.CONFLICT}:
            task.edited = True
            system.fault_log.fault(f"user: {task.edit}", task.task_id)
            return
        time.sleep(0.2)
    raise TimeoutError(f"no row could be inserted for {task}")


def _as_user(system: System, task: Task, method: str, path: str, content: dict[str, Any]) -> httpx.Response:
    """Send one request to PostgREST under row level security, without the fault proxy."""
    jwt = system.database.user_jwt(task.user_id)
    headers = {"Prefer": "return=representation"}
    sent: dict[str, Any] = {} if method == "DELETE" else {"json": content}
    return system.database.request(method, path, jwt=jwt, headers=headers, **sent)
