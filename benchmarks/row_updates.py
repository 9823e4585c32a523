"""Measure how many tasks a second a Supabase table takes: a claim and the settling of its row for each.

Real PostgreSQL and PostgREST behind a gateway, on this machine, with the server's own class for rows. Client
and servers share the cores, so the rate is not that of a database on its own; the CPU time of a task in each
says what one core of it could do. PostgreSQL runs without fsync, as in the tests: a disk that confirms
each commit comes on top.

    python -m benchmarks.row_updates --record
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from benchmarks.process_tree import call_each, process_tree
from benchmarks.table import machine_name, record
from results import Task
from results.supabase import SupabaseResults
from tests.services.database import database

if TYPE_CHECKING:
    from tests.services.database import Database

RESULTS = Path(__file__).parent / "row_updates.csv"
CONCURRENT = (1, 16, 64)
LEASE_S = 120.0
METADATA: dict[str, object] = {
    "confidence": 0.98,
    "inference_time_ms": 15.9,
    "prompts": ["red circle"],
    "instances": [
        {"label": "red circle", "score": 0.98, "box": [927.83, 364.4, 1064.49, 502.2], "area": 15457}
    ]
    * 5,
}
"""About what a row with five instances holds."""
PROGRAMS = ("postgrest", "postgres", "caddy")
"""Names of processes, as they begin."""


async def settle_all(rows: SupabaseResults, tasks: list[Task], concurrent: int) -> float:
    """Claim and settle every task, so many at once; returns the seconds."""
    waiting = iter(tasks)

    async def work() -> None:
        for task in waiting:
            attempt_id = str(uuid4())
            await rows.claim(task, attempt_id)
            url = f"https://images.example.com/masks/{task.user_id}/{task.task_id}/0-a9119941264b6aca.png"
            await rows.update_result(task.task_id, url, ["red circle"], METADATA, attempt_id=attempt_id)

    begun_s = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrent)))
    return time.perf_counter() - begun_s


def cpu_s() -> Counter[str]:
    """CPU time of this process and of the services that it has started, so far."""
    used = Counter[str]()
    tree = process_tree(os.getpid())
    for process, times in call_each(tree, lambda each: (each.name(), each.cpu_times())):
        name = next((program for program in PROGRAMS if process.startswith(program)), "client")
        used[name] += times.user + times.system  # type: ignore[assignment]
    return used


async def measure(project: Database, tasks_of_each: int) -> list[dict[str, object]]:
    """A row of figures for each number of tasks at once."""
    rows = SupabaseResults(project.url, project.secret_key, lease_s=LEASE_S, connections=max(CONCURRENT))
    measured = []
    try:
        for concurrent in CONCURRENT:
            await settle_all(rows, new_tasks(project, 50), concurrent)  # opens the connections
            tasks = new_tasks(project, tasks_of_each)
            before = cpu_s()
            elapsed_s = await settle_all(rows, tasks, concurrent)
            used = cpu_s() - before
            measured.append(
                {
                    "measured": datetime.now(UTC).date().isoformat(),
                    "machine": machine_name(),
                    "tasks_at_once": concurrent,
                    "tasks": len(tasks),
                    "tasks_per_s": round(len(tasks) / elapsed_s, 1),
                    "updates_per_s": round(2 * len(tasks) / elapsed_s, 1),
                    **{
                        f"{name}_ms_per_task": round(used[name] / len(tasks) * 1000, 2)
                        for name in ("client", *PROGRAMS)
                    },
                }
            )
    finally:
        await rows.close()
    return measured


def new_tasks(project: Database, count: int) -> list[Task]:
    """Pending rows of one user."""
    user_id = project.add_user()
    ids = project.execute(
        "insert into segmentation_results (user_id, source_image_url, text_prompt)"
        " select %s, 'uploads/' || number, 'red circle' from generate_series(1, %s) as number"
        " returning id::text",
        *(user_id, count),
    )
    return [Task(task_id, user_id, "uploads/1", ("red circle",)) for (task_id,) in ids]


def main() -> None:
    """Measure, print, and append to the CSV file if --record is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=2000, help="for each number of tasks at once")
    parser.add_argument("--record", action="store_true", help=f"append to {RESULTS.name}")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, database(Path(folder)) as project:
        measured = asyncio.run(measure(project, options.tasks))
    for row in measured:
        sys.stdout.write("  ".join(f"{name} {value}" for name, value in row.items()) + "\n")
    if options.record:
        record(RESULTS, measured)


if __name__ == "__main__":
    main()
