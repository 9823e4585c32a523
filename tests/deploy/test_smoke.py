"""The smoke script against real servers: a working one passes; otherwise the script names the failed step."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from commands.local_server import LocalServer, local_server
from results import SqliteResults
from tests.deploy.smoke_run import Ended, smoke
from tests.drawn import scene
from tests.edge import Edge, png_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.services.database import Database
    from tests.services.objects import S3Service

pytestmark = pytest.mark.server

STEPS = ["health", "model", "picture", "pending row", "predict", "settled row", "mask", "clean up"]


def embedded(server: LocalServer, **changes: str) -> dict[str, str]:
    """The script's variables for a server with embedded stores."""
    return {"API_SECRET_KEY": server.api_key, "DATA_DIR": str(server.data_dir), **changes}


def files_of(user_id: str, server: LocalServer) -> list[Path]:
    """The user's images and masks."""
    found = (server.data_dir / "storage").glob(f"*/{user_id}/**/*")
    return [path for path in found if path.is_file()]


def test_server_with_embedded_stores_passes(server: LocalServer) -> None:
    """Every step passes in order, with a note; only the server's row remains."""
    ended = smoke(server.url, embedded(server), "--user-id", "smoke-1")
    assert ended.status == 0, ended.output
    assert [(outcome, name) for outcome, name, _ in ended.steps] == [("ok", name) for name in STEPS]
    notes = {name: note for _, name, note in ended.steps}
    assert notes["health"] == "model loaded on the CPU"
    assert notes["model"].startswith("SAM3 ")
    assert float(notes["mask"].split("IoU ")[1].split()[0]) > 0.9
    assert re.fullmatch(r"PASSED in [\d.]+ s: task [0-9a-f-]{36}", ended.verdict)
    assert files_of("smoke-1", server) == []


def test_keep_deletes_nothing(server: LocalServer) -> None:
    """--keep deletes neither image nor mask."""
    ended = smoke(server.url, embedded(server), "--user-id", "smoke-2", "--keep")
    assert ended.status == 0
    assert len(files_of("smoke-2", server)) == 2


def test_environment_overrides_the_file(server: LocalServer, tmp_path: Path) -> None:
    """The environment overrides the file; of two keys the first is used."""
    file = tmp_path / "smoke.env"
    file.write_text(f"API_SECRET_KEY='{server.api_key}, another-key-0123456'\nDATA_DIR=/nowhere\n")
    variables = {"DATA_DIR": str(server.data_dir)}
    assert smoke(server.url, variables, "--env-file", str(file)).status == 0
    assert smoke(server.url, {}, "--env-file", str(file)).status == 1, "DATA_DIR was the environment's"


def test_stored_image_is_used_and_kept(server: LocalServer, edge: Edge) -> None:
    """A stored image is used and not deleted; without an instance in it the script fails."""
    picture = scene(500)
    key = edge.upload(png_bytes(picture.image))
    stored = ["--user-id", edge.user_id, "--image-key", key, "--prompt"]
    found = smoke(server.url, embedded(server), *stored, picture.names[0])
    assert found.status == 0, found.output
    assert (server.data_dir / "storage" / key).exists()
    step, note = smoke(server.url, embedded(server), *stored, picture.absent).failure
    assert step == "predict"
    assert note.startswith("found nothing for ")


def test_wrong_key_fails_without_printing_it(server: LocalServer) -> None:
    """The output has the API's error, but not the key."""
    wrong = "a-wrong-key-0123456789"
    ended = smoke(server.url, embedded(server, API_SECRET_KEY=wrong))
    assert ended.failure == ("model", "401 AUTH_INVALID: the key in X-API-Key is not valid")
    assert wrong not in ended.output


def test_unreachable_server_fails(server: LocalServer) -> None:
    """A server that does not listen fails the first step."""
    step, note = smoke("http://127.0.0.1:9", embedded(server)).failure
    assert (step, note.partition(":")[0]) == ("health", "ConnectError")


def test_server_without_model_fails(server_without_model: LocalServer) -> None:
    """A server without a model fails after the wait, and the note has its reason."""
    variables = embedded(server_without_model)
    step, note = smoke(server_without_model.url, variables, "--wait-s", "1.5").failure
    assert step == "health"
    assert note.startswith("status loading, the model is not loaded: ")


def test_missing_row_fails(server: LocalServer, tmp_path: Path) -> None:
    """A server with other rows than the script's fails, even with a correct answer."""
    (tmp_path / "storage").symlink_to(server.data_dir / "storage")
    other = SqliteResults(tmp_path / "results.sqlite", lease_s=1.0)
    asyncio.run(other.get(str(uuid4())))
    asyncio.run(other.close())
    step, note = smoke(server.url, embedded(server, DATA_DIR=str(tmp_path))).failure
    assert step == "settled row"
    assert note.startswith("the task's row is missing")


def test_pending_row_fails(server: LocalServer, database: Database) -> None:
    """A server with another database leaves the script's row pending, which fails."""
    user_id = database.add_user()
    variables = embedded(server, **database.settings())
    step, note = smoke(server.url, variables, "--user-id", user_id).failure
    assert step == "settled row"
    assert note == "the row differs from the answer: status pending, mask None"


def test_unreadable_mask_fails(server: LocalServer, tmp_path: Path) -> None:
    """A server that stores its masks elsewhere fails."""
    (tmp_path / "storage").mkdir()
    (tmp_path / "storage" / "uploads").symlink_to(server.data_dir / "storage" / "uploads")
    (tmp_path / "results.sqlite").symlink_to(server.data_dir / "results.sqlite")
    step, note = smoke(server.url, embedded(server, DATA_DIR=str(tmp_path))).failure
    assert (step, note.partition(":")[0]) == ("mask", "FileNotFoundError")


@pytest.mark.parametrize(
    ("variables", "arguments", "sentence"),
    [
        ({}, [], "API_SECRET_KEY, DATA_DIR missing"),
        (
            {"API_SECRET_KEY": "k", "R2_ENDPOINT": "http://r2"},
            [],
            "R2_ACCESS_KEY_ID, R2_SECRET_ACCESS_KEY, DATA_DIR",
        ),
        (
            {
                "API_SECRET_KEY": "k",
                "DATA_DIR": "/d",
                "SUPABASE_URL": "http://s",
                "SUPABASE_SERVICE_KEY": "k",
            },
            ["--user-id", "me"],
            "--user-id must be the id (a UUID)",
        ),
        (
            {"API_SECRET_KEY": "k", "DATA_DIR": "/d"},
            ["--prompt", "cat"],
            "--image-key and --prompt must be used together",
        ),
        ({}, ["--env-file", "/nowhere.env"], "--env-file /nowhere.env does not exist"),
    ],
)
def test_wrong_arguments_are_refused(variables: dict[str, str], arguments: list[str], sentence: str) -> None:
    """The error names what is missing, before any request is sent."""
    ended = smoke("http://127.0.0.1:9", variables, *arguments)
    assert ended.status == 2
    assert sentence in ended.errors


class Deployment:
    """A server with real stores, and the script's variables for a new user."""

    def __init__(self, server: LocalServer, objects: S3Service, database: Database) -> None:
        self.server = server
        self.objects = objects
        self.database = database
        self.user_id = database.add_user()
        self.variables = {
            "API_SECRET_KEY": server.api_key,
            **objects.settings(),
            **database.settings(),
        }

    def smoke(self, *arguments: str, **changes: str | None) -> Ended:
        """Run the script with changed variables; None removes one."""
        changed = {**self.variables, **changes}
        variables = {name: value for name, value in changed.items() if value is not None}
        return smoke(self.server.url, variables, "--user-id", self.user_id, *arguments)

    def rows(self) -> list[str]:
        """The status of each of the user's rows."""
        sql = "select status from segmentation_results where user_id = %s"
        return [status for (status,) in self.database.execute(sql, self.user_id)]

    def keys(self) -> list[str]:
        """The keys of the user's images and masks."""
        return [key for kind in ("uploads", "masks") for key in self.objects.keys(f"{kind}/{self.user_id}/")]


@pytest.fixture(scope="module")
def server_with_real_stores(
    r2_emulator: S3Service, database: Database, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    """A server with Cloudflare's local R2, and PostgreSQL behind PostgREST."""
    settings = {**r2_emulator.settings(), **database.settings(), "API_WORKERS": "1"}
    with local_server(tmp_path_factory.mktemp("smoke"), settings) as server:
        yield server


@pytest.fixture
def deployment(
    server_with_real_stores: LocalServer, r2_emulator: S3Service, database: Database
) -> Deployment:
    """That server, with a user of this test."""
    return Deployment(server_with_real_stores, r2_emulator, database)


@pytest.mark.parametrize("public", [True, False], ids=["public bucket", "S3 API only"])
def test_server_with_real_stores_passes(deployment: Deployment, public: bool) -> None:  # noqa: FBT001
    """With R2 and Supabase every step passes, and image, mask and row are deleted afterwards."""
    changes = {} if public else {"R2_PUBLIC_BASE_URL": None}
    ended = deployment.smoke(**changes)
    assert ended.status == 0, ended.output
    assert [name for _, name, _ in ended.steps] == STEPS
    assert deployment.rows() == []
    assert deployment.keys() == []


def test_private_masks_fail(deployment: Deployment) -> None:
    """If masks cannot be read at the public URL, the script fails, because browsers could not read them."""
    other = f"{deployment.objects.public_base_url}-of-another-name"
    step, note = deployment.smoke(R2_PUBLIC_BASE_URL=other).failure
    assert step == "mask"
    assert re.match(r"4\d\d for masks/.* at R2_PUBLIC_BASE_URL", note)


def test_keep_leaves_the_done_row(deployment: Deployment) -> None:
    """--keep does not delete the row, which is done."""
    assert deployment.smoke("--keep").status == 0
    assert deployment.rows() == ["done"]


def test_task_without_a_row_fails(deployment: Deployment, tmp_path: Path) -> None:
    """A task without a row in the server's database fails with the server's message."""
    without = dict.fromkeys(("SUPABASE_URL", "SUPABASE_SERVICE_KEY"))
    step, note = deployment.smoke(DATA_DIR=str(tmp_path), **without).failure
    assert step == "predict"
    assert note.startswith("404 TASK_NOT_FOUND: ")


def test_key_that_may_not_insert_fails(deployment: Deployment) -> None:
    """The database refuses a key of the server's least-privilege role, and the script prints its error."""
    role = deployment.database.role_jwt("sam3_worker")
    step, note = deployment.smoke(
        SUPABASE_SERVICE_KEY=role, SUPABASE_PUBLISHABLE_KEY=deployment.database.publishable_key
    ).failure
    assert step == "pending row"
    assert note.startswith("Supabase answered 403 42501: ")
    assert role not in note


def test_wrong_r2_secret_fails_without_printing_it(deployment: Deployment) -> None:
    """The output has R2's error, but not the secret."""
    ended = deployment.smoke(R2_SECRET_ACCESS_KEY="not-the-secret")
    step, note = ended.failure
    assert step == "picture"
    assert note.startswith("ClientError: ")
    assert "not-the-secret" not in ended.output
