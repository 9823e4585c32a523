"""The tasks that this server has given up: list them, or allow one again.

python -m commands.given_up_tasks            # DATA_DIR names the server's folder; the server may be running
python -m commands.given_up_tasks TASK_ID
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from uuid import UUID

from processes import identity
from results import OUTBOX_FILE, AttemptFile, ResultsError
from settings import SettingsError, load_data_settings


async def show(attempts: AttemptFile) -> int:
    """Print a line a task, the latest first."""
    for known in await attempts.all_given_up():
        print(f"{known.task.task_id}  {known.given_up_at} UTC  {known.error_message}")  # noqa: T201
    return 0


async def forgive(attempts: AttemptFile, task_id: str) -> int:
    """Forget that a task was given up."""
    if await attempts.forgive(task_id):
        print(f"task {task_id} is tried again when it is sent again")  # noqa: T201
        return 0
    sys.stderr.write(f"task {task_id} was not given up by this server\n")
    return 1


async def run(task_id: UUID | None) -> int:
    """Open the file of attempts, and do what the command line says."""
    path = load_data_settings().data_dir / OUTBOX_FILE
    if not path.exists():
        sys.stderr.write(f"there is no {path}: set DATA_DIR as the server has it\n")
        return 1
    attempts = AttemptFile(path, owner=identity.current(), is_alive=identity.is_alive, server_version="")
    try:
        return await (show(attempts) if task_id is None else forgive(attempts, str(task_id)))
    finally:
        await attempts.close()


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
