"""The benchmark of the table's rows, on a real PostgreSQL and PostgREST."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from benchmarks.row_updates import CONCURRENT, measure
from tests.services import database as databases
from tests.tiers import need

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.services, pytest.mark.slow]


def test_every_task_is_claimed_and_settled(tmp_path: Path) -> None:
    """After the measurement all rows are done."""
    need(databases.missing())
    with databases.database(tmp_path) as project:
        measured = asyncio.run(measure(project, 20))
        done = project.execute("select count(*) from segmentation_results where status = 'done'")
        left = project.execute("select count(*) from segmentation_results where status <> 'done'")
    assert [row["tasks_at_once"] for row in measured] == list(CONCURRENT)
    assert left == [(0,)]
    assert done == [(len(CONCURRENT) * (20 + 50),)]
