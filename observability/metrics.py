"""Metrics of the API workers' tasks and of the server's processes.

sam3_runner/metrics.py has those of the model, results/outbox.py those of the outbox.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge

TASKS = Counter(
    "sam3_tasks",
    "Runs of tasks by how they ended: done, replayed, error, kept, given_up, or refused before they began; "
    "code is the error's",
    ["outcome", "code"],
)
TASKS_IN_FLIGHT = Gauge("sam3_tasks_in_flight", "Tasks in progress", multiprocess_mode="livesum")
TASKS_QUEUED = Gauge("sam3_tasks_queued", "Tasks that wait for a slot", multiprocess_mode="livesum")
QUEUE_SECONDS = Gauge(
    "sam3_queue_seconds",
    "Expected time until the tasks that wait or are in progress have the model's answer, of the slowest API "
    "worker; 0 until a rate is measured",
    multiprocess_mode="livemax",
)
OVERLOAD_REFUSALS = Counter(
    "sam3_overload_refusals",
    "Requests refused with 429 before they began: their deadline cannot be met, MAX_IN_FLIGHT is reached, or "
    "one user holds most of it",
    ["reason"],
)
DIRECT_REQUESTS = Counter(
    "sam3_direct_requests",
    "Requests to /v1/images/segmentations by the code of their error; empty for those that were answered",
    ["code"],
)
PROCESS_STARTS = Counter("sam3_process_starts", "Starts of the server's processes", ["process"])

# Series that alerts read begin at 0, so that the first event counts.
for _outcome in ("done", "replayed"):
    TASKS.labels(_outcome, "")
for _code in (
    *("INFERENCE_FAILED", "INTERNAL_ERROR", "DEADLINE_EXCEEDED"),
    *("STORAGE_UNAVAILABLE", "RESULTS_UNAVAILABLE"),
):
    TASKS.labels("error", _code)
TASKS.labels("refused", "OVERLOADED")
for _reason in ("deadline", "in_flight", "user_share"):
    OVERLOAD_REFUSALS.labels(_reason)
