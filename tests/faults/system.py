"""The system under test: the stores with their proxies, the servers, and queries of their state."""

from __future__ import annotations

import contextlib
import io
import json
import sqlite3
import threading
import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import numpy as np
from PIL import Image

from commands.local_server import reserved_ports
from tests import new_connection
from tests.drawn import scene
from tests.edge import png_bytes
from tests.faults.fault_log import FaultLog
from tests.faults.servers import API_KEY, Server
from tests.faults.tasks import Answer, BadKeys, Picture, Task
from tests.services.database import database
from tests.services.faults import fault_proxy
from tests.services.objects import seaweedfs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

    from tests.services.database import Database
    from tests.services.faults import FaultProxy
    from tests.services.objects import S3Service

REQUEST_TIMEOUTS_S = {"A": 20, "B": 35}
OUTAGE_LIMIT_S = 600
SCENES = range(400, 405)
USERS = 3
CALL_TIMEOUT_S = 120.0
STORE_TIMEOUT_S = 120.0

HISTORY = """
create table history (
    number bigint generated always as identity, id uuid, at timestamptz, who text, what text, status text,
    attempt_id text, content text
);
grant insert on history to public;
create function keep_history() returns trigger language plpgsql as $$
begin
    insert into public.history (id, at, who, what, status, attempt_id, content) values (
        coalesce(new.id, old.id), clock_timestamp(), current_user, tg_op, new.status, new.attempt_id,
        md5(concat(new.mask_image_url, new.labels, new.metadata))
    );
    return null;
end $$;
create trigger keep_history after insert or update or delete on segmentation_results
    for each row execute function keep_history();
"""
"""A table with every state of each row, written by a trigger, and the role that wrote it."""


@dataclass
class System:
    """All parts of a run.

    Attributes:
        tasks: all tasks that were sent.
        poisons: the tasks of this round that kill a process.
    """

    folder: Path
    database: Database
    objects: S3Service
    r2: FaultProxy
    rest: FaultProxy
    servers: dict[str, Server]
    fault_log: FaultLog
    users: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    bad: BadKeys = field(default_factory=lambda: BadKeys({}, {}, {}))
    tasks: list[Task] = field(default_factory=list)
    poisons: list[Task] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def active(self) -> list[Server]:
        """The servers that are restarted when they end."""
        return [server for server in self.servers.values() if server.is_wanted]

    def execute(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Run SQL as the database's superuser; retries while the database is unavailable."""
        until_s = time.monotonic() + STORE_TIMEOUT_S
        while True:
            try:
                return self.database.execute(sql, *values)
            except Exception:  # pg8000 raises many types
                if time.monotonic() > until_s:
                    raise
                time.sleep(0.2)

    def insert_row(self, task: Task) -> None:
        """Insert the pending row like the Edge."""
        self.execute(
            "insert into segmentation_results (id, user_id, source_image_url, text_prompt)"
            " values (%s, %s, %s, %s) on conflict do nothing",
            *(task.task_id, task.user_id, task.body["image_url"], ", ".join(task.prompts)),
        )

    def send(self, server: Server, task: Task, *, disconnect_s: float | None = None) -> Answer:
        """Send one request on a new connection; adds the answer to the task."""
        timeout = httpx.Timeout(CALL_TIMEOUT_S, connect=5.0)
        if disconnect_s is not None:
            timeout = httpx.Timeout(5.0, read=disconnect_s)
        headers = {"X-API-Key": API_KEY}
        try:
            response = new_connection.post(
                server.url + task.route, json=task.body, headers=headers, timeout=timeout
            )
            answer = _read(server.name, response)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            answer = Answer(time.time(), server.name, "no connection")
        except httpx.ReadTimeout:
            code = "cut" if disconnect_s is None else "disconnected"
            answer = Answer(time.time(), server.name, code)
        except httpx.TransportError:
            answer = Answer(time.time(), server.name, "cut")
        with self.lock:
            task.answers.append(answer)
        return answer

    def mask(self, url: str) -> npt.NDArray[np.bool_]:
        """Read the mask at a URL of a row or an answer."""
        with Image.open(io.BytesIO(self.objects.get(key_in(url)))) as image:
            return np.asarray(image) > 0

    def stored_masks(self) -> set[str]:
        """The keys of all masks in the bucket."""
        pages = self.objects.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.objects.bucket, Prefix="masks/"
        )
        return {each["Key"] for page in pages for each in page.get("Contents", [])}

    def rows(self) -> dict[str, dict[str, Any]]:
        """All rows, by id."""
        columns = "id, status, mask_image_url, labels, metadata, attempt_id, lease_until"
        found = self.execute(f"select {columns} from segmentation_results")  # noqa: S608 - ours
        names = columns.split(", ")
        return {str(row[0]): dict(zip(names, row, strict=True)) for row in found}

    def left_on_files(self) -> dict[str, list[str]]:
        """The content of the servers' outbox files: ids of tasks, and keys of masks to be deleted."""
        left: dict[str, list[str]] = {"attempts": [], "unneeded_masks": [], "set_aside": []}
        for server in self.servers.values():
            if server.outbox.exists():
                with closing(read_only(server.outbox)) as db:
                    left["attempts"] += [row[0] for row in db.execute("SELECT task_id FROM attempts")]
                    left["unneeded_masks"] += [row[0] for row in db.execute("SELECT key FROM unneeded_masks")]
                    left["set_aside"] += [row[0] for row in db.execute("SELECT reason FROM set_aside")]
        return left

    def heal(self) -> None:
        """Remove the proxies' faults, and wait until every server is ready."""
        self.r2.heal()
        self.rest.heal()
        for server in self.active:
            try:
                server.wait_until_ready()
            except TimeoutError as error:
                self.fault_log.violated(
                    "the server runs", f"{server.name} is not ready without faults: {error}"
                )

    def secrets(self) -> set[str]:
        """Texts that no log may contain."""
        prompts = {prompt for picture in self.pictures for prompt in picture.prompts}
        keys = {str(task.body["image_url"]) for task in self.tasks}
        stores = {
            self.database.secret_key,
            self.database.service_role_key,
            self.objects.secret_access_key,
            self.objects.access_key_id,
        }
        return {API_KEY, *stores, *self.users, *prompts, *keys}


@contextmanager
def system(folder: Path) -> Iterator[System]:
    """Start new stores, and create two servers that do not run yet."""
    fault_log = FaultLog()
    with ExitStack() as running:
        rows = running.enter_context(database(folder / "database"))
        bucket = running.enter_context(seaweedfs(folder))
        r2 = running.enter_context(fault_proxy(bucket.endpoint))
        rest = running.enter_context(fault_proxy(rows.url))
        rows.execute(HISTORY)
        settings = bucket.settings() | rows.settings()
        settings |= {
            "R2_ENDPOINT": r2.url,
            "SUPABASE_URL": rest.url,
            "API_WORKERS": "2",
            "OUTAGE_LIMIT_S": str(OUTAGE_LIMIT_S),
            "SAM3_CPU_THREADS": "1",
        }
        servers = {}
        for name, timeout_s in REQUEST_TIMEOUTS_S.items():
            own = {
                "API_SECRET_KEY": API_KEY,
                "REQUEST_TIMEOUT_S": str(timeout_s),
                "DEFAULT_DEADLINE_S": str(timeout_s),
            }
            [port] = running.enter_context(reserved_ports(1))
            server = servers[name] = Server(name, folder, port, settings | own, fault_log)
            running.callback(server.release_disk)
            running.callback(server.end)
        yield System(folder, rows, bucket, r2, rest, servers, fault_log)


def prepare(system: System, server: Server) -> None:
    """Create users and uploads, and the expected results from the server without faults."""
    system.users = [system.database.add_user() for _ in range(USERS)]
    whole = {seed: png_bytes(scene(seed).image) for seed in SCENES}
    system.bad = BadKeys(
        missing={user: f"uploads/{user}/{uuid4()}" for user in system.users},
        corrupt=_uploads(system, whole[SCENES[0]][:1000]),
        foreign={user: f"uploads/{uuid4()}/cat" for user in system.users},
    )
    for seed, data in whole.items():
        drawn, keys = scene(seed), _uploads(system, data)
        for prompts in ((drawn.names[0],), (drawn.names[-1], drawn.absent), (drawn.absent,)):
            system.pictures.append(_asked(system, server, keys, prompts))


def _asked(system: System, server: Server, keys: dict[str, str], prompts: tuple[str, ...]) -> Picture:
    user = system.users[0]
    texts: dict[str, Any] = {"text_prompt": prompts[0]} if len(prompts) == 1 else {"prompts": list(prompts)}
    body = {"task_id": str(uuid4()), "user_id": user, "image_url": keys[user], **texts}
    task = Task(-1, body, "good", "none", None, ("retries",))
    system.insert_row(task)
    answer = system.send(server, task)
    assert answer.code == "done", (answer.code, answer.message)
    [[url, labels]] = system.execute(
        "select mask_image_url, labels from segmentation_results where id = %s", task.task_id
    )
    results = answer.content.get("results", [answer.content])
    urls = [result["mask_url"] for result in results] + ([url] if len(results) > 1 else [])
    picture = Picture(keys, prompts, labels, [system.mask(each) for each in urls])
    system.tasks.append(Task(-1, body, "good", "none", picture, ("retries",), answers=task.answers))
    return picture


def _uploads(system: System, data: bytes) -> dict[str, str]:
    keys = {user: f"uploads/{user}/{uuid4()}" for user in system.users}
    for key in keys.values():
        system.objects.put(key, data, "image/png")
    return keys


def key_in(url: str) -> str:
    """The key of a mask's URL."""
    return url[url.index("masks/") :]


def read_only(path: Path) -> sqlite3.Connection:
    """Open a server's outbox file read-only."""
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None, timeout=2.0)


def _read(server: str, response: httpx.Response) -> Answer:
    now_s = time.time()
    content: Any = None
    with contextlib.suppress(json.JSONDecodeError):
        content = response.json()
    if response.is_success:
        return Answer(now_s, server, "done", content=content)
    try:
        error = content["error"]
        code, message = str(error["code"]), str(error["message"])
    except (KeyError, TypeError):
        code, message = f"HTTP {response.status_code} without our error body", response.text[:200]
    retry_after_s = float(response.headers.get("Retry-After", 0))
    return Answer(now_s, server, code, message, content, retry_after_s)
