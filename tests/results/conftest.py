"""The host of the outbox's tests, and the databases of the Supabase store's tests, each behind a proxy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.results.outbox_host import Host
from tests.results.supabase_project import Project, open_project
from tests.services import database as databases

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.services.database import Database


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    host = Host(tmp_path)
    yield host
    for outbox in host.opened:
        await outbox.close()


@pytest.fixture
async def project(database: Database) -> AsyncIterator[Project]:
    async with open_project(database) as opened:
        yield opened


@pytest.fixture(scope="module")
def spare_database(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """A database whose table and roles a test may change; `database` skips where none can run."""
    del database
    with databases.database(tmp_path_factory.mktemp("spare")) as spare:
        yield spare


@pytest.fixture
async def spare(spare_database: Database) -> AsyncIterator[Project]:
    async with open_project(spare_database) as opened:
        yield opened


@pytest.fixture(scope="session")
def old_database(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """A project without the columns of leases, and with the default grants of its time."""
    del database
    with databases.database(
        tmp_path_factory.mktemp("old"), default_grants=True, migrations=databases.MIGRATIONS[:1]
    ) as old:
        yield old


@pytest.fixture
async def old(old_database: Database) -> AsyncIterator[Project]:
    async with open_project(old_database) as opened:
        yield opened


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.services) for name in ("project", "old")])
def either(request: pytest.FixtureRequest) -> Project:
    """A project with the columns of leases, and one without."""
    project: Project = request.getfixturevalue(request.param)
    return project
