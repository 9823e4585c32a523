"""The stores behind their proxies, the servers before them, and what is read from all of these."""

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
from tests.drawn import scene
from tests.edge import png_bytes
from tests.faults.diary import Diary
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
"""Every state that a row was ever in, as the database saw it, and who wrote it."""


@dataclass
class Stage:
    """Everything that takes part in a run.

    Attributes:
        tasks: all that were ever sent.
        poisons: those of this round whose work kills a process.
    """

    folder: Path
    database: Database
    objects: S3Service
    r2: FaultProxy
    rest: FaultProxy
    servers: dict[str, Server]
    diary: Diary
    users: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    bad: BadKeys = field(default_factory=lambda: BadKeys({}, {}, {}))
    tasks: list[Task] = field(default_factory=list)
    poisons: list[Task] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def active(self) -> list[Server]:
        """The servers that are kept running."""
        return [server for server in self.servers.values() if server.is_wanted]

    def execute(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """As the database's superuser, again and again while the database is away."""
        until_s = time.monotonic() + STORE_TIMEOUT_S
        while True:
            try:
                return self.database.execute(sql, *values)
            except Exception:  # pg8000 has many words for it
                if time.monotonic() > until_s:
                    raise
                time.sleep(0.2)

    def insert_row(self, task: Task) -> None:
        """The pending row, as the Edge inserts it."""
        self.execute(
            "insert into segmentation_results (id, user_id, source_image_url, text_prompt)"
            " values (%s, %s, %s, %s) on conflict do nothing",
            *(task.task_id, task.user_id, task.body["image_url"], ", ".join(task.prompts)),
        )

    def send(self, server: Server, task: Task, *, hang_up_s: float | None = None) -> Answer:
        """One request on a connection of its own; what came of it is noted at the task."""
        timeout = httpx.Timeout(CALL_TIMEOUT_S, connect=5.0)
        if hang_up_s is not None:
            timeout = httpx.Timeout(5.0, read=hang_up_s)
        headers = {"X-API-Key": API_KEY}
        try:
            response = httpx.post(server.url + task.route, json=task.body, headers=headers, timeout=timeout)
            answer = _read(server.name, response)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            answer = Answer(time.time(), server.name, "no connection")
        except httpx.ReadTimeout:
            code = "cut" if hang_up_s is None else "hung up"
            answer = Answer(time.time(), server.name, code)
        except httpx.TransportError:
            answer = Answer(time.time(), server.name, "cut")
        with self.lock:
            task.answers.append(answer)
        return answer

    def mask(self, url: str) -> npt.NDArray[np.bool_]:
        """The mask at a URL that a row or an answer names."""
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
        """What the servers' files hold: ids of tasks, and keys of masks to be deleted."""
        left: dict[str, list[str]] = {"attempts": [], "unneeded_masks": [], "set_aside": []}
        for server in self.servers.values():
            if server.outbox.exists():
                with closing(read_only(server.outbox)) as db:
                    left["attempts"] += [row[0] for row in db.execute("SELECT task_id FROM attempts")]
                    left["unneeded_masks"] += [row[0] for row in db.execute("SELECT key FROM unneeded_masks")]
                    left["set_aside"] += [row[0] for row in db.execute("SELECT reason FROM set_aside")]
        return left

    def heal(self) -> None:
        """No proxy fails, and every server is ready."""
        self.r2.heal()
        self.rest.heal()
        for server in self.active:
            try:
                server.wait_until_ready()
            except TimeoutError as error:
                self.diary.violated("the server runs", f"{server.name} is not ready {error}, with all healed")

    def secrets(self) -> set[str]:
        """What no log may hold."""
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
def stage(folder: Path) -> Iterator[Stage]:
    """Stores of their own, and two servers before them that do not run yet."""
    diary = Diary()
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
            own = {"API_SECRET_KEY": API_KEY, "REQUEST_TIMEOUT_S": str(timeout_s)}
            [port] = running.enter_context(reserved_ports(1))
            server = servers[name] = Server(name, folder, port, settings | own, diary)
            running.callback(server.release_disk)
            running.callback(server.end)
        yield Stage(folder, rows, bucket, r2, rest, servers, diary)


def prepare(stage: Stage, server: Server) -> None:
    """Users, their uploads, and what the quiet server finds in them."""
    stage.users = [stage.database.add_user() for _ in range(USERS)]
    whole = {seed: png_bytes(scene(seed).image) for seed in SCENES}
    stage.bad = BadKeys(
        missing={user: f"uploads/{user}/{uuid4()}" for user in stage.users},
        corrupt=_uploads(stage, whole[SCENES[0]][:1000]),
        foreign={user: f"uploads/{uuid4()}/cat" for user in stage.users},
    )
    for seed, data in whole.items():
        drawn, keys = scene(seed), _uploads(stage, data)
        for prompts in ((drawn.names[0],), (drawn.names[-1], drawn.absent), (drawn.absent,)):
            stage.pictures.append(_asked(stage, server, keys, prompts))


def _asked(stage: Stage, server: Server, keys: dict[str, str], prompts: tuple[str, ...]) -> Picture:
    user = stage.users[0]
    texts: dict[str, Any] = {"text_prompt": prompts[0]} if len(prompts) == 1 else {"prompts": list(prompts)}
    body = {"task_id": str(uuid4()), "user_id": user, "image_url": keys[user], **texts}
    task = Task(-1, body, "good", "none", None, ("patient",))
    stage.insert_row(task)
    answer = stage.send(server, task)
    assert answer.code == "done", (answer.code, answer.message)
    [[url, labels]] = stage.execute(
        "select mask_image_url, labels from segmentation_results where id = %s", task.task_id
    )
    results = answer.content.get("results", [answer.content])
    urls = [result["mask_url"] for result in results] + ([url] if len(results) > 1 else [])
    picture = Picture(keys, prompts, labels, [stage.mask(each) for each in urls])
    stage.tasks.append(Task(-1, body, "good", "none", picture, ("patient",), answers=task.answers))
    return picture


def _uploads(stage: Stage, data: bytes) -> dict[str, str]:
    keys = {user: f"uploads/{user}/{uuid4()}" for user in stage.users}
    for key in keys.values():
        stage.objects.put(key, data, "image/png")
    return keys


def key_in(url: str) -> str:
    """The key of a mask's URL."""
    return url[url.index("masks/") :]


def read_only(path: Path) -> sqlite3.Connection:
    """A server's file of attempts, to be looked at."""
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
        code, message = f"HTTP {response.status_code} without a body of ours", response.text[:200]
    retry_after_s = float(response.headers.get("Retry-After", 0))
    return Answer(now_s, server, code, message, content, retry_after_s)
