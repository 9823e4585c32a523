"""The tasks that this server has given up: list them, or allow one again.

python -m commands.given_up_tasks            # DATA_DIR names the server's folder; the server may be running
python -m commands.given_up_tasks TASK_ID
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from uuid import UUID

from results import OUTBOX_FILE, GivenUpList, ResultsError, open_given_up
from settings import SettingsError, load_data_settings


async def show(given_up: GivenUpList) -> int:
    """Print one line per task, the latest first."""
    for entry in await given_up.list_all():
        print(f"{entry.task.task_id}  {entry.given_up_at} UTC  {entry.error_message}")  # noqa: T201
    return 0


async def remove(given_up: GivenUpList, task_id: str) -> int:
    """Remove a task from the list."""
    if await given_up.remove(task_id):
        print(f"task {task_id} is tried again when it is sent again")  # noqa: T201
        return 0
    sys.stderr.write(f"task {task_id} was not given up by this server\n")
    return 1


async def run(task_id: UUID | None) -> int:
    """Show the list, or remove a task from it."""
    path = load_data_settings().data_dir / OUTBOX_FILE
    if not path.exists():
        sys.stderr.write(f"there is no {path}: set DATA_DIR as the server has it\n")
        return 1
    given_up = open_given_up(path)
    try:
        return await (show(given_up) if task_id is None else remove(given_up, str(task_id)))
    finally:
        await given_up.close()


def main() -> int:
    """The command. Exit status 1: there is no such file or task; 2: wrong arguments or settings."""
    parser = argparse.ArgumentParser(
        prog="given_up_tasks", description="List the tasks that were given up, or let one be tried again."
    )
    parser.add_argument("task_id", nargs="?", type=UUID, help="let this task be tried again")
    arguments = parser.parse_args()
    try:
        return asyncio.run(run(arguments.task_id))
    except (SettingsError, ResultsError) as error:
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
