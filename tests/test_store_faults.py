"""The whole server while R2 or Supabase fail: the caller's answer, and the row's end."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from commands.local_server import LocalServer, local_server
from tests import new_connection
from tests.drawn import scene
from tests.edge import PREDICT, error_of, png_bytes, wait_for
from tests.server_processes import refused_start
from tests.services.faults import FaultProxy, fault_proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import httpx

    from tests.services.database import Database
    from tests.services.faults import Predicate, Seen
    from tests.services.objects import S3Service

pytestmark = pytest.mark.server

ALWAYS = 1000
PROMPT = scene(500).names[0]


@dataclass(frozen=True)
class Deployment:
    """The server with a proxy before each of its stores."""

    server: LocalServer
    r2: FaultProxy
    supabase: FaultProxy
    database: Database
    objects: S3Service
    user_id: str

    def new_task(self) -> dict[str, Any]:
        """Upload an image and insert its pending row; returns the request's body."""
        key, task_id = f"uploads/{self.user_id}/{uuid4()}", str(uuid4())
        self.objects.put(key, png_bytes(scene(500).image))
        self.database.execute(
            "insert into segmentation_results (id, user_id, source_image_url, text_prompt)"
            " values (%s, %s, %s, %s)",
            *(task_id, self.user_id, key, PROMPT),
        )
        return {"image_url": key, "text_prompt": PROMPT, "user_id": self.user_id, "task_id": task_id}

    def send(self, body: dict[str, Any]) -> httpx.Response:
        return new_connection.post(
            f"{self.server.url}{PREDICT}", json=body, headers=self.server.headers, timeout=90
        )

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
    """One server for all faults."""
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
    """The server; afterwards all faults are removed, and the log is checked for secrets."""
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


TRANSIENT: dict[str, Callable[[Deployment], None]] = {
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


@pytest.mark.parametrize("fault", TRANSIENT)
def test_transient_fault_is_retried(deployment: Deployment, fault: str) -> None:
    """An operation that fails once is retried: the caller gets the result, and the row is done."""
    body = deployment.new_task()
    TRANSIENT[fault](deployment)
    response = deployment.send(body)
    assert response.is_success, response.text
    assert response.json()["labels"] == [PROMPT]
    assert deployment.row(body) == ("done", response.json()["mask_url"], None)


PERSISTENT: dict[str, tuple[Callable[[FaultProxy, Predicate], None], Predicate, str]] = {
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
def persistent(deployed: Deployment) -> dict[str, tuple[httpx.Response, dict[str, Any]]]:
    """For each persistent fault of R2, all concurrently, the answer to a task and its request."""

    def send(fault: str) -> tuple[httpx.Response, dict[str, Any]]:
        body = deployed.new_task()
        inject, kind, _ = PERSISTENT[fault]
        ids = (body["image_url"], body["task_id"])
        inject(deployed.r2, lambda seen: kind(seen) and any(each in seen.path for each in ids))
        return deployed.send(body), body

    with ThreadPoolExecutor(len(PERSISTENT)) as callers:
        answers = dict(zip(PERSISTENT, callers.map(send, PERSISTENT), strict=True))
    deployed.r2.heal()
    return answers


@pytest.mark.parametrize("fault", PERSISTENT)
def test_task_is_kept_during_a_persistent_fault_of_r2(
    deployment: Deployment, persistent: dict[str, tuple[httpx.Response, dict[str, Any]]], fault: str
) -> None:
    """If R2 stays unavailable or refuses, the answer is 502; the task is kept, and done once R2 works."""
    response, body = persistent[fault]
    status, code, message = error_of(response)
    assert (status, code) == (502, "STORAGE_UNAVAILABLE")
    assert PERSISTENT[fault][2] in message
    assert "the task is kept" in message
    assert deployment.settled(body)[0] == "done"
    assert deployment.send(body).is_success


def test_row_is_processing_while_r2_is_unavailable(deployment: Deployment) -> None:
    """After the 502 the row stays processing until R2 works again."""
    body = deployment.new_task()
    deployment.r2.fail_next(
        ALWAYS, status=503, when=lambda seen: is_get(seen) and body["image_url"] in seen.path
    )
    assert error_of(deployment.send(body))[:2] == (502, "STORAGE_UNAVAILABLE")
    assert deployment.row(body)[0] == "processing"
    # Sent again, the task is retried immediately, and still kept.
    assert error_of(deployment.send(body))[1] in {"STORAGE_UNAVAILABLE", "TASK_IN_PROGRESS"}
    assert deployment.row(body)[0] == "processing"
    deployment.r2.heal()
    assert deployment.settled(body)[0] == "done"


CLAIMS = {
    "503": lambda on: on.supabase.fail_next(ALWAYS, status=503),
    "hang": lambda on: on.supabase.hang_next(ALWAYS),
    "401": lambda on: on.supabase.fail_next(ALWAYS, status=401, body=b'{"message": "Invalid API key"}'),
}


@pytest.mark.parametrize("fault", CLAIMS)
def test_task_is_done_after_a_database_outage(deployment: Deployment, fault: str) -> None:
    """A task that cannot be claimed gives 502, and is done later without another request."""
    body = deployment.new_task()
    CLAIMS[fault](deployment)
    status, code, message = error_of(deployment.send(body))
    assert (status, code) == (502, "RESULTS_UNAVAILABLE")
    assert "kept" in message
    assert deployment.row(body)[0] == "pending"
    deployment.supabase.heal()
    assert deployment.settled(body)[0] == "done"


def test_requests_for_one_task_during_an_outage_are_done_once(deployment: Deployment) -> None:
    """After six requests for one task during a database outage, one mask is stored."""
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


def test_undelivered_outcome_is_delivered_later(deployment: Deployment) -> None:
    """If only the last write fails, the caller gets its answer, and the row is done later."""
    body = deployment.new_task()
    deployment.supabase.fail_next(ALWAYS, status=503, when=is_finish)
    response = deployment.send(body)
    assert response.is_success, response.text
    assert deployment.row(body)[0] == "processing"
    metrics = f"{deployment.server.url}/metrics"
    depth = [f"{suffix} 1.0" for suffix in ("}", "sam3_outbox_depth")]
    wait_for(
        lambda: [
            line
            for line in new_connection.get(metrics).text.splitlines()
            if line.startswith("sam3_outbox_depth")
        ],
        lambda lines: any(line.endswith(each) for line in lines for each in depth),
    )
    deployment.supabase.heal()
    assert deployment.settled(body) == ("done", response.json()["mask_url"], None)


@pytest.mark.parametrize("answer", ["done", "error"])
def test_deleted_row_ends_its_task(deployment: Deployment, answer: str) -> None:
    """If a user deletes the row during the work, the answer is an error, and no row is inserted again."""
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
    # Its stored masks are deleted in the background.
    folder = f"masks/{deployment.user_id}/{body['task_id']}/"
    wait_for(lambda: deployment.objects.keys(folder), lambda keys: keys == [])


def test_forged_result_is_refused(deployment: Deployment) -> None:
    """A done row whose owner has changed its result gives 400."""
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
    """A task without a row, or of another user, gives 404, and no row is inserted."""
    body = deployment.new_task()
    for wrong in (
        {"task_id": str(uuid4())},
        {"user_id": deployment.database.add_user()},
        {"user_id": "user-1"},
    ):
        assert error_of(deployment.send(body | wrong))[:2] == (404, "TASK_NOT_FOUND")
    assert deployment.row(body)[0] == "pending"


def test_concurrent_tasks_share_few_connections(deployment: Deployment) -> None:
    """50 concurrent tasks do not open more connections than the pools allow."""
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
    """A permanent fault stops the start with one sentence that names the variable, without a secret."""
    changes, sentence = STARTS[case]
    settings = {**seaweedfs.settings(), **database.settings(), **changes(database)}
    refusal = refused_start(tmp_path, settings)
    assert refusal.status != 0
    [line] = [line for line in refusal.output.splitlines() if "cannot start: " in line]
    assert sentence in line
    assert "Traceback" not in refusal.output
    for name in ("SUPABASE_SERVICE_KEY", "R2_SECRET_ACCESS_KEY"):
        assert settings[name] not in refusal.output


@pytest.fixture(scope="module")
def impatient(
    tmp_path_factory: pytest.TempPathFactory, database: Database, seaweedfs: S3Service
) -> Iterator[Deployment]:
    """A server that was started while no store was available, and that keeps a task for no outage of R2."""
    with fault_proxy(seaweedfs.endpoint) as r2, fault_proxy(database.url) as supabase:
        r2.fail_next(ALWAYS, status=503)
        supabase.fail_next(ALWAYS, status=503)
        settings = {
            **seaweedfs.settings(),
            **database.settings(),
            "R2_ENDPOINT": r2.url,
            "SUPABASE_URL": supabase.url,
            "OUTAGE_LIMIT_S": "0",
            "API_WORKERS": "1",
        }
        with local_server(tmp_path_factory.mktemp("impatient"), settings) as server:
            r2.heal()
            supabase.heal()
            yield Deployment(server, r2, supabase, database, seaweedfs, database.add_user())


def test_start_while_both_stores_are_unavailable(impatient: Deployment) -> None:
    """Unavailable stores do not stop the start: the log reports them, and tasks work once they are back."""
    log = impatient.server.log_path.read_text()
    assert "R2 could not be checked" in log
    assert "the results database failed" in log
    assert impatient.send(impatient.new_task()).is_success


def test_outage_of_r2_has_a_limit(impatient: Deployment) -> None:
    """A claimed task that waits for R2 longer than OUTAGE_LIMIT_S ends as error with the reason."""
    body = impatient.new_task()
    impatient.r2.fail_next(ALWAYS, status=503, when=is_get)
    assert error_of(impatient.send(body))[:2] == (502, "STORAGE_UNAVAILABLE")
    status, mask_url, message = impatient.settled(body)
    assert (status, mask_url) == ("error", None)
    assert "the object store does not answer" in str(message)
