"""The databases that the tests of the Supabase store use, each behind a proxy."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from tests.results.supabase_project import Project
from tests.services import database as databases
from tests.services.faults import fault_proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.services.database import Database


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def project(database: Database) -> AsyncIterator[Project]:
    with fault_proxy(database.url) as proxy:
        async with AsyncExitStack() as stores:
            yield Project(database, proxy, stores)


@pytest.fixture(scope="module")
def spare_database(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """A database whose table and roles a test may change; `database` says whether one can run."""
    del database
    with databases.database(tmp_path_factory.mktemp("spare")) as spare:
        yield spare


@pytest.fixture(scope="session")
def old_database(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """A project from before the columns of leases, and from before grants were needed."""
    del database
    with databases.database(
        tmp_path_factory.mktemp("old"), default_grants=True, migrations=databases.MIGRATIONS[:1]
    ) as old:
        yield old


@pytest.fixture
async def old(old_database: Database) -> AsyncIterator[Project]:
    with fault_proxy(old_database.url) as proxy:
        async with AsyncExitStack() as stores:
            yield Project(old_database, proxy, stores)


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.services) for name in ("project", "old")])
def either(request: pytest.FixtureRequest) -> Project:
    """A project with the columns of leases, and one without."""
    project: Project = request.getfixturevalue(request.param)
    return project


@pytest.fixture
async def spare(spare_database: Database) -> AsyncIterator[Project]:
    with fault_proxy(spare_database.url) as proxy:
        async with AsyncExitStack() as stores:
            yield Project(spare_database, proxy, stores)
