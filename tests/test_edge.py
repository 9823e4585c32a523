"""The example Edge, called by users, with a real bucket, queue, database and backend."""

from __future__ import annotations

import io
import subprocess
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import numpy as np
import pytest
from PIL import Image

from commands.local_server import local_server, reserved_ports
from tests.drawn import iou
from tests.edge import wait_for
from tests.edge_worker import (
    EDGE,
    MAX_RETRIES,
    PICTURE,
    User,
    Worker,
    missing,
    program,
    shipped_config,
    workerd,
)
from tests.services.faults import fault_proxy
from tests.tiers import need

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from tests.services.database import Database
    from tests.services.faults import Seen

pytestmark = pytest.mark.server

API_KEY = "key-of-the-edge-0123456789"
PROMPT = PICTURE.names[0]


@pytest.fixture(scope="module")
def worker(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """`wrangler dev` and a backend with the same bucket, and a proxy between the two."""
    need(missing())
    folder = tmp_path_factory.mktemp("edge")
    config = shipped_config()
    own = {"API_SECRET_KEY": API_KEY, "API_WORKERS": "1"}
    with ExitStack() as running:
        edge_port, inspector_port, backend_port = running.enter_context(reserved_ports(3))
        url = f"http://127.0.0.1:{edge_port}"
        bucket = bucket_settings(config, url)
        backend = running.enter_context(fault_proxy(f"http://127.0.0.1:{backend_port}"))
        variables = {
            "SUPABASE_URL": database.url,
            "SUPABASE_PUBLISHABLE_KEY": database.publishable_key,
            "SUPABASE_SECRET_KEY": database.secret_key,
            "BACKEND_URL": backend.url,
            "BACKEND_API_KEY": API_KEY,
            "R2_PUBLIC_BASE_URL": bucket["R2_PUBLIC_BASE_URL"],
        }
        running.enter_context(workerd(folder, (edge_port, inspector_port), config, variables))
        environment = bucket | database.settings() | own
        running.enter_context(local_server(folder / "backend", environment, port=backend_port))
        yield Worker(url, database, backend, bucket)


def bucket_settings(config: dict[str, Any], url: str) -> dict[str, str]:
    """The backend's settings for the bucket of the Worker at `url`."""
    [bucket] = config["r2_buckets"]
    credentials = bucket["local_dev"]["experimental_s3_credentials"]
    return {
        "R2_ENDPOINT": f"{url}/cdn-cgi/local/r2/s3",
        "R2_BUCKET": bucket["bucket_name"],
        "R2_PUBLIC_BASE_URL": f"{url}/cdn-cgi/local/r2/public/{bucket['bucket_name']}",
        "R2_ACCESS_KEY_ID": credentials["accessKeyId"],
        "R2_SECRET_ACCESS_KEY": credentials["secretAccessKey"],
    }


@pytest.fixture
def sign_in(worker: Worker) -> Iterator[Callable[..., User]]:
    """A function that creates users of `worker`."""
    with ExitStack() as signed_in:

        def make(token: str | None = None) -> User:
            user = User(worker, token)
            signed_in.enter_context(user.http)
            return user

        yield make


@pytest.fixture(autouse=True)
def _faults_removed(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "worker" in request.fixturenames:
        request.getfixturevalue("worker").backend.heal()


def truth(*prompts: str) -> npt.NDArray[np.bool_]:
    """The union of the masks of the things that the prompts name."""
    union: npt.NDArray[np.bool_] = np.zeros((PICTURE.image.height, PICTURE.image.width), dtype=np.bool_)
    for prompt in prompts:
        for thing in PICTURE.named(prompt):
            union |= thing.mask
    return union


def about(image_key: str) -> Callable[[Seen], bool]:
    """Matches the requests for one image."""
    return lambda seen: image_key.encode() in seen.body


def test_worker_passes_the_type_check() -> None:
    """TypeScript in strict mode reports no error."""
    need(missing())
    command = [program(), str(EDGE / "node_modules" / "typescript" / "bin" / "tsc")]
    checked = subprocess.run(command, cwd=EDGE, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("via", "prompts"),
    [
        ("waitUntil", PICTURE.names[:1]),
        ("queue", PICTURE.names[:2]),
        ("waitUntil", [PICTURE.names[0].replace(" ", "\u00a0")]),
    ],
    ids=["waitUntil", "queue", "pasted"],
)
def test_user_gets_the_mask(sign_in: Callable[..., User], via: str, prompts: list[str]) -> None:
    """A task is done from upload to mask, both ways, for one prompt and for several."""
    user = sign_in()
    task_id = user.begin(via, *prompts)
    task = user.ended(task_id)
    assert (task["status"], task["labels"]) == ("done", prompts)
    assert iou(user.mask(task_id), truth(*prompts)) >= 0.9


@pytest.mark.parametrize("via", ["waitUntil", "queue"])
def test_user_gets_what_a_box_finds(sign_in: Callable[..., User], via: str) -> None:
    """A box without a text finds its object; overlay and label map come back as files."""
    user = sign_in()
    rows, columns = np.nonzero(truth(PROMPT))
    box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
    task_id = user.begin(via, box=box, outputs=["overlay", "label_map"])
    task = user.ended(task_id)
    assert (task["status"], task["labels"]) == ("done", ["visual"])
    mask = user.mask(task_id)
    assert mask[truth(PROMPT)].mean() >= 0.9

    overlay = user.http.get(f"/tasks/{task_id}/overlay")
    assert overlay.headers["Content-Type"] == "image/jpeg"
    with Image.open(io.BytesIO(overlay.content)) as picture:
        assert (picture.format, picture.size) == ("JPEG", PICTURE.image.size)
    with Image.open(io.BytesIO(user.http.get(f"/tasks/{task_id}/label_map").content)) as numbers:
        assert np.array_equal(np.asarray(numbers) > 0, mask)


def test_other_users_data_is_not_accessible(worker: Worker, sign_in: Callable[..., User]) -> None:
    """A user cannot read another user's row, mask or image, even with a forged row."""
    user, other = sign_in(), sign_in()
    image_key = user.upload_key()
    task_id = user.begin("waitUntil", PROMPT, image_key=image_key)
    assert user.ended(task_id)["status"] == "done"

    not_asked_for = user.http.get(f"/tasks/{task_id}/overlay")
    assert not_asked_for.status_code == httpx.codes.NOT_FOUND
    for path in (f"/tasks/{task_id}", f"/tasks/{task_id}/mask", f"/tasks/{task_id}/overlay"):
        assert other.http.get(path).status_code == httpx.codes.NOT_FOUND

    theft = other.begin("waitUntil", PROMPT, image_key=image_key)
    stolen = other.ended(theft)
    assert stolen["status"] == "error"
    assert stolen["metadata"]["error_message"] == "image_url is not below the user's uploads"

    # Row level security allows users to write anything into their own rows.
    [(mask_url,)] = worker.database.execute(
        "select mask_image_url from segmentation_results where id = %s", task_id
    )
    key = {"apikey": worker.database.publishable_key, "Authorization": f"Bearer {other.token}"}
    rows = f"{worker.database.url}/rest/v1/segmentation_results?id=eq.{theft}"
    forged = {"mask_image_url": mask_url, "status": "done", "metadata": {"outputs": {"overlay": mask_url}}}
    httpx.patch(rows, headers=key, json=forged).raise_for_status()
    for name in ("mask", "overlay"):
        assert other.http.get(f"/tasks/{theft}/{name}").status_code == httpx.codes.NOT_FOUND


def test_invalid_tokens_are_refused(worker: Worker, sign_in: Callable[..., User]) -> None:
    """A forged, an expired and an anonymous token get 401, and nothing is stored."""
    victim = worker.database.add_user()
    head, claims, _ = worker.database.user_jwt(victim).split(".")
    expired = worker.database.role_jwt("authenticated", sub=victim, exp=1)
    for token in (f"{head}.{claims}.{'A' * 43}", expired, worker.database.anon_key, "no-token"):
        assert sign_in(token).upload().status_code == httpx.codes.UNAUTHORIZED
    assert worker.keys(f"uploads/{victim}/") == []


@pytest.mark.parametrize("via", ["waitUntil", "queue"])
def test_task_is_retried_while_the_backend_is_unavailable(
    worker: Worker, sign_in: Callable[..., User], via: str
) -> None:
    """After failed connections and a loading backend the task is retried and done."""
    user = sign_in()
    image_key = user.upload_key()
    worker.backend.cut_next(2, when=about(image_key))
    worker.backend.fail_next(
        when=about(image_key),
        status=503,
        headers={"Retry-After": "1", "Content-Type": "application/json"},
        body=b'{"error": {"code": "MODEL_NOT_LOADED", "message": "the model is loading"}, "request_id": "1"}',
    )
    task_id = user.begin(via, PROMPT, image_key=image_key)
    assert user.ended(task_id)["status"] == "done"
    # The row is done shortly before the answer.
    calls = wait_for(lambda: worker.calls(task_id), lambda calls: len(calls) == 4 and calls[3].done)
    assert [seen.status for seen in calls] == [None, None, 503, 200]


def test_message_delivered_twice_has_one_result(worker: Worker, sign_in: Callable[..., User]) -> None:
    """If the answer is lost and the message is delivered again, the row does not change, with one mask."""
    user = sign_in()
    image_key = user.upload_key()
    worker.backend.lose_answer_next(when=about(image_key))
    task_id = user.begin("queue", PROMPT, image_key=image_key)
    first = user.ended(task_id)

    calls = wait_for(lambda: worker.calls(task_id), lambda calls: len(calls) == 2 and calls[1].done)
    assert [seen.status for seen in calls] == [None, 200]
    assert user.http.get(f"/tasks/{task_id}").json() == first
    assert len(worker.keys(f"masks/{user.id}/{task_id}/")) == 1


def test_refused_and_failed_tasks_end_as_error(worker: Worker, sign_in: Callable[..., User]) -> None:
    """A task that is refused before its claim, and one whose retries all failed, end as error in the row."""
    user = sign_in()
    image_key = user.upload_key()
    refused = user.begin("queue", " ".join("abcdefgh" * 9), image_key=image_key)
    task = user.ended(refused)
    assert task["status"] == "error"
    assert "tokens" in task["metadata"]["error_message"]

    worker.backend.fail_next(MAX_RETRIES + 1, status=502, when=about(image_key))
    failed = user.begin("queue", PROMPT, image_key=image_key)
    task = user.ended(failed)
    assert task["status"] == "error"
    assert task["metadata"]["error_message"] == "the service could not be reached; try again later"
    assert len(worker.calls(failed)) == MAX_RETRIES + 1
    # By now a wrong retry of the refused task would have happened.
    assert len(worker.calls(refused)) == 1


def test_invalid_requests_are_refused_immediately(worker: Worker, sign_in: Callable[..., User]) -> None:
    """Invalid uploads and tasks are refused before a row or an object is stored."""
    user = sign_in()
    assert user.upload(content_type="image/svg+xml").status_code == httpx.codes.UNSUPPORTED_MEDIA_TYPE
    too_large = user.upload(bytes(10 * 1024 * 1024 + 1))
    assert too_large.status_code == httpx.codes.REQUEST_ENTITY_TOO_LARGE
    assert worker.keys(f"uploads/{user.id}/") == []
    for body in (
        {},
        {"image_key": "k"},
        {"image_key": "k", "prompts": []},
        {"image_key": "k", "text_prompt": " "},
        {"image_key": "k", "text_prompt": "\u200b\u3000"},
        {"image_key": "k", "text_prompt": "circle\n"},
        {"image_key": "k", "box": [5, 0, 5, 9]},
        {"image_key": "k", "box": [0, 0, 5]},
        {"image_key": "k", "prompts": ["circle", "star"], "box": [0, 0, 5, 9]},
        {"image_key": "k", "text_prompt": "circle", "outputs": ["masks"]},
        {"image_key": "k", "text_prompt": "circle", "outputs": ["overlay", "overlay"]},
    ):
        assert user.http.post("/tasks", json=body).status_code == httpx.codes.BAD_REQUEST
    assert user.http.get(f"/tasks/{uuid4()}").status_code == httpx.codes.NOT_FOUND
