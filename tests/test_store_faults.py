"""The whole server when R2 or Supabase fail: what the caller is told, and how the row ends."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest

from commands.local_server import LocalServer, local_server
from tests.drawn import scene
from tests.edge import PREDICT, error_of, png_bytes, wait_for
from tests.server_processes import refused_start
from tests.services.faults import FaultProxy, fault_proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.services.database import Database
    from tests.services.faults import Predicate, Seen
    from tests.services.objects import S3Service

pytestmark = pytest.mark.server

ALWAYS = 1000
PROMPT = scene(500).names[0]


@dataclass(frozen=True)
class Deployment:
    """The server between two proxies, as the Edge sees it."""

    server: LocalServer
    r2: FaultProxy
    supabase: FaultProxy
    database: Database
    objects: S3Service
    user_id: str

    def new_task(self) -> dict[str, Any]:
        """An uploaded image and its pending row; the request."""
        key, task_id = f"uploads/{self.user_id}/{uuid4()}", str(uuid4())
        self.objects.put(key, png_bytes(scene(500).image))
        self.database.execute(
            "insert into segmentation_results (id, user_id, source_image_url, text_prompt)"
            " values (%s, %s, %s, %s)",
            *(task_id, self.user_id, key, PROMPT),
        )
        return {"image_url": key, "text_prompt": PROMPT, "user_id": self.user_id, "task_id": task_id}

    def send(self, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.server.url}{PREDICT}", json=body, headers=self.server.headers, timeout=90)

    def row(self, body: dict[str, Any]) -> tuple[str, str | None, str | None]:
        """Status, mask URL and error message."""
        found = self.database.execute(
            "select status, mask_image_url, metadata ->> 'error_message' from segmentation_results"
            " where id = %s",
            body["task_id"],
        )
        return found[0] if found else ("gone", None, None)

    def settled(self, body: dict[str, Any]) -> tuple[str, str | None, str | None]:
        """The row once it has ended."""
        return wait_for(lambda: self.row(body), lambda row: row[0] in {"done", "error", "gone"})


@pytest.fixture(scope="module")
def deployed(
    tmp_path_factory: pytest.TempPathFactory, database: Database, seaweedfs: S3Service
) -> Iterator[Deployment]:
    """One server for all the faults."""
    with fault_proxy(seaweedfs.endpoint) as r2, fault_proxy(database.url) as supabase:
        settings = {
            **seaweedfs.settings(),
            **database.settings(),
            "R2_ENDPOINT": r2.url,
            "SUPABASE_URL": supabase.url,
            "API_WORKERS": "1",
        }
        with local_server(tmp_path_factory.mktemp("deployed"), settings) as server:
            yield Deployment(server, r2, supabase, database, seaweedfs, database.add_user())


@pytest.fixture
def deployment(deployed: Deployment) -> Iterator[Deployment]:
    """The server, with all well before and after."""
    yield deployed
    deployed.r2.heal()
    deployed.supabase.heal()
    log = deployed.server.log_path.read_text()
    for secret in (
        deployed.database.secret_key,
        deployed.objects.secret_access_key,
        deployed.user_id,
        PROMPT,
    ):
        assert secret not in log


def is_get(seen: Seen) -> bool:
    return seen.method == "GET"


def is_put(seen: Seen) -> bool:
    return seen.method == "PUT"


def is_claim(seen: Seen) -> bool:
    return seen.method == "PATCH" and json.loads(seen.body)["status"] == "processing"


def is_finish(seen: Seen) -> bool:
    return seen.method == "PATCH" and json.loads(seen.body)["status"] == "done"


PASSING: dict[str, Callable[[Deployment], None]] = {
    "R2 reads: 429": lambda on: on.r2.fail_next(status=429, when=is_get),
    "R2 reads: 500": lambda on: on.r2.fail_next(status=500, when=is_get),
    "R2 reads: cut": lambda on: on.r2.cut_next(when=is_get),
    "R2 reads: truncated": lambda on: on.r2.cut_next(after_bytes=100, when=is_get),
    "R2 reads: wrong length": lambda on: on.r2.wrong_length_next(when=is_get),
    "R2 writes: 429": lambda on: on.r2.fail_next(status=429, when=is_put),
    "R2 writes: 503": lambda on: on.r2.fail_next(status=503, when=is_put),
    "R2 writes: answer lost": lambda on: on.r2.lose_answer_next(when=is_put),
    "claim: 503": lambda on: on.supabase.fail_next(status=503, when=is_claim),
    "claim: cut": lambda on: on.supabase.cut_next(when=is_claim),
    "claim: answer lost": lambda on: on.supabase.lose_answer_next(when=is_claim),
    "finish: 500": lambda on: on.supabase.fail_next(status=500, when=is_finish),
    "finish: 429": lambda on: on.supabase.fail_next(status=429, when=is_finish),
    "finish: answer lost": lambda on: on.supabase.lose_answer_next(when=is_finish),
}


@pytest.mark.parametrize("fault", PASSING)
def test_fault_that_passes_is_not_noticed(deployment: Deployment, fault: str) -> None:
    """What goes wrong once is tried again: the caller gets the result, and the row is done."""
    body = deployment.new_task()
    PASSING[fault](deployment)
    response = deployment.send(body)
    assert response.is_success, response.text
    assert response.json()["labels"] == [PROMPT]
    assert deployment.row(body) == ("done", response.json()["mask_url"], None)


LASTING: dict[str, tuple[Callable[[FaultProxy, Predicate], None], Predicate, str]] = {
    "reads: 401": (lambda r2, when: r2.fail_next(ALWAYS, status=401, when=when), is_get, "refuses"),
    "reads: 403": (lambda r2, when: r2.fail_next(ALWAYS, status=403, when=when), is_get, "refuses"),
    "reads: 503": (lambda r2, when: r2.fail_next(ALWAYS, status=503, when=when), is_get, "does not answer"),
    "reads: hang": (lambda r2, when: r2.hang_next(ALWAYS, when=when), is_get, "does not answer"),
    "reads: trickle": (
        lambda r2, when: r2.slow_next(ALWAYS, bytes_per_s=20, when=when),
        is_get,
        "does not answer",
    ),
    "reads: truncated": (
        lambda r2, when: r2.cut_next(ALWAYS, after_bytes=100, when=when),
        is_get,
        "does not answer",
    ),
    "writes: 403": (lambda r2, when: r2.fail_next(ALWAYS, status=403, when=when), is_put, "refuses"),
    "writes: 500": (lambda r2, when: r2.fail_next(ALWAYS, status=500, when=when), is_put, "does not answer"),
}


@pytest.fixture(scope="module")
def lasting(deployed: Deployment) -> dict[str, tuple[httpx.Response, dict[str, Any]]]:
    """The answer to a task under each lasting fault of R2, all at once, and its request."""

    def meet(fault: str) -> tuple[httpx.Response, dict[str, Any]]:
        body = deployed.new_task()
        harm, kind, _ = LASTING[fault]
        ids = (body["image_url"], body["task_id"])
        harm(deployed.r2, lambda seen: kind(seen) and any(each in seen.path for each in ids))
        return deployed.send(body), body

    with ThreadPoolExecutor(len(LASTING)) as callers:
        met = dict(zip(LASTING, callers.map(meet, LASTING), strict=True))
    deployed.r2.heal()
    return met


@pytest.mark.parametrize("fault", LASTING)
def test_lasting_fault_of_r2(
    deployment: Deployment, lasting: dict[str, tuple[httpx.Response, dict[str, Any]]], fault: str
) -> None:
    """R2 that stays away or refuses is a 502; the task is kept, and done once R2 is back."""
    response, body = lasting[fault]
    status, code, message = error_of(response)
    assert (status, code) == (502, "STORAGE_UNAVAILABLE")
    assert LASTING[fault][2] in message
    assert "the task is kept" in message
    assert deployment.settled(body)[0] == "done"
    assert deployment.send(body).is_success


def test_row_is_processing_while_r2_is_away(deployment: Deployment) -> None:
    """Between the 502 and R2's return the row stays in the hands of its attempt."""
    body = deployment.new_task()
    deployment.r2.fail_next(
        ALWAYS, status=503, when=lambda seen: is_get(seen) and body["image_url"] in seen.path
    )
    assert error_of(deployment.send(body))[:2] == (502, "STORAGE_UNAVAILABLE")
    assert deployment.row(body)[0] == "processing"
    # Sent again it is tried at once, and still kept.
    assert error_of(deployment.send(body))[1] in {"STORAGE_UNAVAILABLE", "TASK_IN_PROGRESS"}
    assert deployment.row(body)[0] == "processing"
    deployment.r2.heal()
    assert deployment.settled(body)[0] == "done"


def test_outage_of_r2_has_a_limit(tmp_path: Path, database: Database, seaweedfs: S3Service) -> None:
    """A claimed task for which R2 does not come back ends as an error that says so."""
    with fault_proxy(seaweedfs.endpoint) as r2:
        settings = {**seaweedfs.settings(), **database.settings(), "R2_ENDPOINT": r2.url, "API_WORKERS": "1"}
        with local_server(tmp_path, {**settings, "OUTAGE_LIMIT_S": "0"}) as server:
            deployment = Deployment(server, r2, r2, database, seaweedfs, database.add_user())
            body = deployment.new_task()
            r2.fail_next(ALWAYS, status=503, when=is_get)
            assert error_of(deployment.send(body))[:2] == (502, "STORAGE_UNAVAILABLE")
            status, mask_url, message = deployment.settled(body)
            assert (status, mask_url) == ("error", None)
            assert "the object store does not answer" in str(message)


CLAIMS = {
    "503": lambda on: on.supabase.fail_next(ALWAYS, status=503),
    "hang": lambda on: on.supabase.hang_next(ALWAYS),
    "401": lambda on: on.supabase.fail_next(ALWAYS, status=401, body=b'{"message": "Invalid API key"}'),
}


@pytest.mark.parametrize("fault", CLAIMS)
def test_task_is_done_once_the_database_is_back(deployment: Deployment, fault: str) -> None:
    """A task that cannot be claimed is a 502 to its caller, who need not send it again."""
    body = deployment.new_task()
    CLAIMS[fault](deployment)
    status, code, message = error_of(deployment.send(body))
    assert (status, code) == (502, "RESULTS_UNAVAILABLE")
    assert "kept" in message
    assert deployment.row(body)[0] == "pending"
    deployment.supabase.heal()
    assert deployment.settled(body)[0] == "done"


def test_calls_while_the_database_is_away_are_one_task(deployment: Deployment) -> None:
    """Six calls for one task that cannot be claimed keep one attempt, and the image is fetched once after."""
    body = deployment.new_task()
    deployment.supabase.fail_next(ALWAYS, status=503)
    with ThreadPoolExecutor(6) as callers:
        codes = {error_of(response)[1] for response in callers.map(deployment.send, [body] * 6)}
    assert codes <= {"RESULTS_UNAVAILABLE", "TASK_IN_PROGRESS"}
    before = len(deployment.r2.requests)
    deployment.supabase.heal()
    assert deployment.settled(body)[0] == "done"
    puts = [seen for seen in deployment.r2.requests[before:] if is_put(seen) and body["task_id"] in seen.path]
    assert len(puts) == 1


def test_result_waits_for_the_database(deployment: Deployment) -> None:
    """When only the last write fails, the caller has its answer and the row follows."""
    body = deployment.new_task()
    deployment.supabase.fail_next(ALWAYS, status=503, when=is_finish)
    response = deployment.send(body)
    assert response.is_success, response.text
    assert deployment.row(body)[0] == "processing"
    metrics = f"{deployment.server.url}/metrics"
    depth = [f"{suffix} 1.0" for suffix in ("}", "sam3_outbox_depth")]
    wait_for(
        lambda: [
            line for line in httpx.get(metrics).text.splitlines() if line.startswith("sam3_outbox_depth")
        ],
        lambda lines: any(line.endswith(each) for line in lines for each in depth),
    )
    deployment.supabase.heal()
    assert deployment.settled(body) == ("done", response.json()["mask_url"], None)


@pytest.mark.parametrize("answer", ["done", "error"])
def test_row_that_is_deleted_under_its_task(deployment: Deployment, answer: str) -> None:
    """A user who deletes the row in the middle of the work ends the task: 404, and no row comes back."""
    body = deployment.new_task()
    if answer == "error":
        deployment.r2.fail_next(ALWAYS, status=403, when=is_put)
    deployment.r2.slow_next(bytes_per_s=60_000, when=is_get)
    with ThreadPoolExecutor(1) as caller:
        sent = caller.submit(deployment.send, body)
        wait_for(lambda: deployment.row(body)[0], lambda status: status == "processing")
        deployment.database.execute("delete from segmentation_results where id = %s", body["task_id"])
        response = sent.result()
    expected = (404, "TASK_NOT_FOUND") if answer == "done" else (502, "STORAGE_UNAVAILABLE")
    assert error_of(response)[:2] == expected
    assert deployment.row(body)[0] == "gone"
    deployment.r2.heal()
    # What was stored for it is deleted in the background.
    folder = f"masks/{deployment.user_id}/{body['task_id']}/"
    wait_for(lambda: deployment.objects.keys(folder), lambda keys: keys == [])


def test_forged_result_is_not_answered(deployment: Deployment) -> None:
    """A done row whose owner has put another mask in it is a 400, not a 200 that names it."""
    body = deployment.new_task()
    assert deployment.send(body).is_success
    for change in (
        """metadata = jsonb_set(metadata, '{results}', '[]')""",
        """metadata = jsonb_set(metadata, '{results,0,mask_url}', '"https://evil.example/x.png"')""",
    ):
        update = f"update segmentation_results set {change} where id = %s"  # noqa: S608 - ours
        deployment.database.execute(update, body["task_id"])
        assert error_of(deployment.send(body))[:2] == (400, "INVALID_REQUEST")


def test_unknown_task_is_not_found(deployment: Deployment) -> None:
    """A task without a row, or of another user, is 404, and no row is made."""
    body = deployment.new_task()
    for wrong in (
        {"task_id": str(uuid4())},
        {"user_id": deployment.database.add_user()},
        {"user_id": "user-1"},
    ):
        assert error_of(deployment.send(body | wrong))[:2] == (404, "TASK_NOT_FOUND")
    assert deployment.row(body)[0] == "pending"


def test_many_tasks_share_few_connections(deployment: Deployment) -> None:
    """50 tasks at once never open more connections than the pools have."""
    bodies = [deployment.new_task() for _ in range(50)]
    with ThreadPoolExecutor(50) as callers:
        assert all(response.is_success for response in callers.map(deployment.send, bodies))
    for proxy in (deployment.r2, deployment.supabase):
        assert 1 < proxy.max_connections_open <= 16


STARTS: dict[str, tuple[Callable[[Database], dict[str, str]], str]] = {
    "wrong key": (
        lambda _: {"SUPABASE_SERVICE_KEY": "sb_secret_wrong"},
        "SUPABASE_SERVICE_KEY is refused",
    ),
    "key of the browser": (
        lambda db: {"SUPABASE_SERVICE_KEY": db.anon_key},
        "SUPABASE_SERVICE_KEY is a key for users",
    ),
    "wrong column": (lambda _: {"SUPABASE_MASK_COLUMN": "picture"}, "has no column picture"),
    "wrong secret": (lambda _: {"R2_SECRET_ACCESS_KEY": "wrong"}, "R2_SECRET_ACCESS_KEY"),
    "wrong bucket": (lambda _: {"R2_BUCKET": "elsewhere"}, "R2_BUCKET"),
}


@pytest.mark.parametrize("case", STARTS)
def test_start_is_refused(tmp_path: Path, database: Database, seaweedfs: S3Service, case: str) -> None:
    """What can never work stops the start with one sentence that names the variable, and no secret."""
    changes, sentence = STARTS[case]
    settings = {**seaweedfs.settings(), **database.settings(), **changes(database)}
    refusal = refused_start(tmp_path, settings)
    assert refusal.status != 0
    [line] = [line for line in refusal.output.splitlines() if "cannot start: " in line]
    assert sentence in line
    assert "Traceback" not in refusal.output
    for name in ("SUPABASE_SERVICE_KEY", "R2_SECRET_ACCESS_KEY"):
        assert settings[name] not in refusal.output


def test_start_while_both_are_away(tmp_path: Path, database: Database, seaweedfs: S3Service) -> None:
    """Services that are only away do not stop the start: it says so, and works once they are there."""
    with fault_proxy(seaweedfs.endpoint) as r2, fault_proxy(database.url) as supabase:
        r2.fail_next(ALWAYS, status=503)
        supabase.fail_next(ALWAYS, status=503)
        settings = {
            **seaweedfs.settings(),
            **database.settings(),
            "R2_ENDPOINT": r2.url,
            "SUPABASE_URL": supabase.url,
            "API_WORKERS": "1",
        }
        with local_server(tmp_path, settings) as server:
            log = server.log_path.read_text()
            assert "R2 could not be checked" in log
            assert "the results database failed" in log
            r2.heal()
            supabase.heal()
            deployment = Deployment(server, r2, supabase, database, seaweedfs, database.add_user())
            assert deployment.send(deployment.new_task()).is_success
