"""The services of the tests refuse what the real ones refuse, and keep their data across an outage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from tests.services import database as databases
from tests.services import objects
from tests.services.faults import fault_proxy
from tests.services.processes import wait_until
from tests.tiers import need

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from tests.services.database import Database
    from tests.services.objects import S3Service

pytestmark = pytest.mark.services

KEY = "uploads/user-1/caf\u00e9 a+b"
ROWS = "segmentation_results?select=id"
RIGHTS_MISSING = "42501"
S3_SERVERS = {
    "seaweedfs": (objects.missing_seaweedfs, objects.seaweedfs),
    "r2": (objects.missing_r2_emulator, objects.r2_emulator),
}


@pytest.fixture(params=["seaweedfs", "r2_emulator"])
def s3(request: pytest.FixtureRequest) -> S3Service:
    service: S3Service = request.getfixturevalue(request.param)
    return service


def test_wrong_secret_is_refused(s3: S3Service) -> None:
    """The server checks signatures: a client with another secret can neither read nor write."""
    s3.put(KEY, b"image")
    with objects.s3_client(s3.endpoint, s3.access_key_id, "another secret") as client:
        with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
            client.get_object(Bucket=s3.bucket, Key=KEY)
        with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
            client.put_object(Bucket=s3.bucket, Key=KEY, Body=b"forged")
    assert s3.get(KEY) == b"image"


def test_signatures_are_valid_through_the_proxy(s3: S3Service) -> None:
    """The server accepts signatures for the proxy's host and port."""
    with (
        fault_proxy(s3.endpoint) as proxy,
        objects.s3_client(proxy.url, s3.access_key_id, s3.secret_access_key) as client,
    ):
        client.put_object(Bucket=s3.bucket, Key=KEY, Body=b"through")
        assert client.get_object(Bucket=s3.bucket, Key=KEY)["Body"].read() == b"through"
    assert s3.get(KEY) == b"through"
    assert [seen.method for seen in proxy.requests] == ["PUT", "GET"]


def test_objects_are_public_at_the_emulators_base_url(r2_emulator: S3Service) -> None:
    """An object at the emulator's public base URL needs no credentials, and has its content type."""
    r2_emulator.put("masks/a.png", b"mask", "image/png")
    answer = httpx.get(f"{r2_emulator.public_base_url}/masks/a.png")
    assert (answer.content, answer.headers["Content-Type"]) == (b"mask", "image/png")


@pytest.mark.parametrize(("missing", "server"), S3_SERVERS.values(), ids=S3_SERVERS.keys())
def test_objects_survive_an_outage(
    tmp_path: Path,
    missing: Callable[[], str | None],
    server: Callable[[Path], AbstractContextManager[S3Service]],
) -> None:
    """A killed server refuses connections; after a restart on its port it has its objects."""
    need(missing())
    with server(tmp_path) as s3:
        s3.put(KEY, b"image")
        s3.stop()
        with pytest.raises(EndpointConnectionError):
            s3.get(KEY)
        s3.start()
        assert s3.get(KEY) == b"image"
        s3.put(KEY, b"again")
        assert s3.get(KEY) == b"again"


def test_gateway_accepts_only_its_keys(database: Database) -> None:
    """New and legacy keys work with their roles; a missing or wrong key gives 401 with Supabase's message."""
    database.execute(
        "insert into public.segmentation_results (user_id, source_image_url, text_prompt)"
        " values (%s, 'uploads/x', 'cat')",
        database.add_user(),
    )
    for key in (database.secret_key, database.service_role_key):
        assert database.request("GET", ROWS, apikey=key).json() != []
    for key in (database.publishable_key, database.anon_key):
        assert database.request("GET", ROWS, apikey=key).json()["code"] == RIGHTS_MISSING
    for key in ("sb_secret_wrong", database.role_jwt("service_role", iss="another")):
        answer = database.request("GET", ROWS, apikey=key)
        assert (answer.status_code, answer.json()["message"]) == (401, "Invalid API key")
    answer = httpx.get(f"{database.url}/rest/v1/{ROWS}")
    assert (answer.status_code, answer.json()["message"]) == (401, "No API key found in request")


def test_secret_key_is_refused_as_bearer_token(database: Database) -> None:
    """A new key in Authorization is refused, because it is not a JWT."""
    answer = database.request("GET", ROWS, apikey=database.secret_key, jwt=database.secret_key)
    assert (answer.status_code, answer.json()["code"]) == (401, "PGRST301")


def test_expired_and_forged_tokens_are_refused(database: Database) -> None:
    """A JWT needs a valid signature and must not be expired."""
    assert database.request("GET", ROWS, jwt=database.role_jwt("service_role", exp=1)).status_code == 401
    header, claims, signature = database.role_jwt("service_role").split(".")
    forged = f"{header}.{claims}.{signature[::-1]}"
    assert database.request("GET", ROWS, jwt=forged).status_code == 401


def test_rows_survive_an_outage(tmp_path: Path) -> None:
    """Without PostgreSQL the answer is 503, without the gateway none; later everything works again."""
    need(databases.missing())
    with databases.database(tmp_path) as own:
        user_id = own.add_user()
        own.stop()
        # PostgREST answers 400 with an empty code on a connection whose loss it has not detected.
        wait_until(lambda: own.request("GET", ROWS).status_code == 503, timeout_s=20.0)
        own.start()
        profiles = own.request("GET", "users_profile?select=id", jwt=own.user_jwt(user_id))
        assert profiles.json() == [{"id": user_id}]
        own.stop_gateway()
        with pytest.raises(httpx.ConnectError):
            own.request("GET", ROWS)
        own.start_gateway()
        assert own.request("GET", ROWS, apikey=own.secret_key).status_code == 200
