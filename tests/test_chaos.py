"""Three hundred tasks while everything is killed: no task is lost, stuck, or done twice."""

from __future__ import annotations

import contextlib
import io
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

import local_server
from local_server import clean_environment, server_command
from tests.drawn import iou, scene
from tests.edge import PREDICT, png_bytes
from tests.services import database as databases
from tests.services import objects
from tests.services.processes import free_ports, wait_until
from tests.tiers import need

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy.typing as npt

    from tests.services.database import Database
    from tests.services.objects import S3Service

pytestmark = pytest.mark.server

SEED = 20261122
TASKS = 300
SCENES = range(400, 406)
SENDERS = 10
API_KEY = "chaos-0123456789abcdef"
SETTLE_TIMEOUT_S = 240.0
CALL_TIMEOUT_S = 90.0
TRIES = 300
CALLERS_PAUSE_S = 0.5
PATIENT = 0.6
"""Part of the callers that send again until they have an answer, as a queue does; the others send once."""
TWICE = 0.3
"""Part of the tasks that two callers send at once."""
NOT_TAKEN = {"no connection", "MODEL_NOT_LOADED", "OVERLOADED"}
WORTH_ANOTHER_TRY = {"cut", "TASK_IN_PROGRESS", "STORAGE_UNAVAILABLE", "RESULTS_UNAVAILABLE"}

HISTORY = """
create table history (number bigint generated always as identity, id uuid, status text);
create function keep_history() returns trigger language plpgsql security definer as $$
begin
    insert into public.history (id, status) values (new.id, new.status);
    return new;
end $$;
create trigger keep_history after update on segmentation_results
    for each row execute function keep_history();
"""
"""Every state that a row was ever in, as the database saw it."""

TRUE_OF_BAD_IMAGES = {
    "missing": "no image is stored there",
    "corrupt": "the image is damaged",
    "foreign": "image_url is not below the user's uploads",
}


class KillableServer:
    """The real server in `data_dir`, started and killed as often as one likes, on one port."""

    def __init__(self, data_dir: Path, settings: dict[str, str]) -> None:
        self.data_dir = data_dir
        self.log_path = data_dir / "server.log"
        [self._port] = free_ports(1)
        self.url = f"http://127.0.0.1:{self._port}"
        self._environment = clean_environment(data_dir, API_KEY) | settings
        self._process: subprocess.Popen[bytes] | None = None
        data_dir.mkdir()

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                server_command(self._port),
                cwd=local_server.ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        local_server._wait_until_ready(self._process, self.url, self.log_path)

    def kill(self) -> None:
        """End all its processes by SIGKILL as if at one moment: none may see another die."""
        assert self._process is not None
        parent = psutil.Process(self._process.pid)
        processes = [parent, *parent.children(recursive=True)]
        for signal_number in (signal.SIGSTOP, signal.SIGKILL):
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal_number)
        self._process.wait()
        psutil.wait_procs(processes[1:], timeout=10)

    def post(self, body: dict[str, Any]) -> httpx.Response:
        """One request on a connection of its own."""
        headers = {"X-API-Key": API_KEY}
        return httpx.post(f"{self.url}{PREDICT}", json=body, headers=headers, timeout=CALL_TIMEOUT_S)


@dataclass(frozen=True)
class Case:
    """One task, how its image is bad, if it is, and how its callers behave."""

    body: dict[str, Any]
    picture: Picture | None
    fault: str | None
    patient: bool
    callers: int


@dataclass
class Chaos:
    """The servers, and what the callers saw."""

    database: Database
    objects: S3Service
    server: KillableServer
    random: random.Random = field(default_factory=lambda: random.Random(SEED))  # noqa: S311 - no secrets
    answers: Counter[str] = field(default_factory=Counter)
    answers_by_task: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def call(self, case: Case) -> None:
        """Be the Edge: send, and where the caller is patient send again until there is an answer."""
        for _ in range(TRIES):
            answer = self._send(case.body)
            # A server that was not there, or took nothing, is no delivery.
            if answer not in NOT_TAKEN and not (case.patient and answer in WORTH_ANOTHER_TRY):
                return
            time.sleep(CALLERS_PAUSE_S)

    def _send(self, body: dict[str, Any]) -> str:
        try:
            response = self.server.post(body)
            answer = "done" if response.is_success else str(response.json()["error"]["code"])
        except httpx.ConnectError:
            answer = "no connection"
        except httpx.TransportError:
            answer = "cut"
        with self.lock:
            self.answers[answer] += 1
            self.answers_by_task[body["task_id"]].add(answer)
        return answer

    def wait_until_settled(self, *open_states: str) -> None:
        """Wait until no row is in one of these states."""
        states = ", ".join(f"'{state}'" for state in open_states)
        query = f"select count(*) from segmentation_results where status in ({states})"  # noqa: S608 - ours
        wait_until(lambda: self.database.execute(query) == [(0,)], SETTLE_TIMEOUT_S)

    def settled(self) -> int:
        """How many rows have ended. Only to be asked while the database is there."""
        [[count]] = self.database.execute(
            "select count(*) from segmentation_results where status in ('done', 'error')"
        )
        return int(count)

    def settled_more(self, count: int, sending: threading.Event) -> bool:
        """Wait until `count` more rows have ended; False when the callers are through before that."""
        enough = self.settled() + count
        wait_until(lambda: self.settled() >= enough or not sending.is_set(), SETTLE_TIMEOUT_S)
        return sending.is_set()

    def kill_server(self) -> None:
        """SIGKILL to all processes of the server, then a fresh start."""
        self.server.kill()
        self.server.start()

    def database_outage(self) -> None:
        """The database is away until a few calls have met that."""
        self._outage(self.database.stop, self.database.start, "RESULTS_UNAVAILABLE")

    def objects_outage(self) -> None:
        """The object store is away until a few calls have met that."""
        self._outage(self.objects.stop, self.objects.start, "STORAGE_UNAVAILABLE")

    def _outage(self, stop: Callable[[], None], start: Callable[[], None], code: str) -> None:
        before = self.answers[code]
        stop()
        try:
            # The callers may all be waiting by chance: an outage has an end.
            until_s = time.monotonic() + 20
            wait_until(lambda: self.answers[code] >= before + 2 or time.monotonic() > until_s)
        finally:
            start()

    def kill_server_while_the_database_is_away(self) -> None:
        """Outcomes wait on disk, and the process that knows them is killed."""
        self.database.stop()
        try:
            self.kill_server()
        finally:
            self.database.start()


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    """A server with the demo checkpoint on real stores of its own."""
    need(databases.missing() or objects.missing_seaweedfs())
    folder = tmp_path_factory.mktemp("chaos")
    with databases.database(folder) as database, objects.seaweedfs(folder) as bucket:
        database.execute(HISTORY)
        settings = {**database.settings(), **bucket.settings()}
        server = KillableServer(folder / "data", {"API_SECRET_KEY": API_KEY, **settings})
        server.start()
        try:
            yield Chaos(database, bucket, server)
        finally:
            server.kill()


@dataclass(frozen=True)
class Picture:
    """An uploaded scene, a prompt, and what a quiet server finds for it."""

    key: str
    prompt: str
    labels: list[str]
    mask: npt.NDArray[np.bool_]


def upload(chaos: Chaos, user_id: str, data: bytes) -> str:
    key = f"uploads/{user_id}/{uuid4()}"
    chaos.objects.put(key, data, "image/png")
    return key


def insert_row(chaos: Chaos, user_id: str, key: str, prompt: str) -> dict[str, Any]:
    """The pending row, as the Edge inserts it; the request for it."""
    body = {"image_url": key, "text_prompt": prompt, "user_id": user_id, "task_id": str(uuid4())}
    chaos.database.execute(
        "insert into segmentation_results (id, user_id, source_image_url, text_prompt)"
        " values (%s, %s, %s, %s)",
        *(body["task_id"], user_id, key, prompt),
    )
    return body


def mask_at(chaos: Chaos, url: str, user_id: str, task_id: str) -> npt.NDArray[np.bool_]:
    """The mask that a row names; checks that it is the task's own."""
    key = url[url.index("masks/") :]
    assert key.startswith(f"masks/{user_id}/{task_id}/")
    with Image.open(io.BytesIO(chaos.objects.get(key))) as image:
        assert image.format == "PNG"
        return np.asarray(image) > 0


def quiet_pictures(chaos: Chaos, user_id: str) -> list[Picture]:
    """What the server answers before anything is killed."""
    pictures = []
    for seed in SCENES:
        drawn = scene(seed)
        key = upload(chaos, user_id, png_bytes(drawn.image))
        for prompt in (drawn.names[0], drawn.absent):
            body = insert_row(chaos, user_id, key, prompt)
            response = chaos.server.post(body)
            assert response.is_success, response.text
            answer = response.json()
            mask = mask_at(chaos, answer["mask_url"], user_id, body["task_id"])
            pictures.append(Picture(key, prompt, answer["labels"], mask))
    return pictures


def planned_cases(chaos: Chaos, user_id: str, pictures: list[Picture]) -> list[Case]:
    """Every tenth task has an image that must fail; the rest are good ones."""
    corrupt = upload(chaos, user_id, png_bytes(scene(SCENES[0]).image)[:1000])
    bad = {
        "missing": f"uploads/{user_id}/{uuid4()}",
        "corrupt": corrupt,
        "foreign": f"uploads/{uuid4()}/cat",
    }
    cases = []
    for number in range(TASKS):
        picture = None if number % 10 == 9 else pictures[number % len(pictures)]
        fault = None if picture else list(bad)[number // 10 % len(bad)]
        key, prompt = (picture.key, picture.prompt) if picture else (bad[str(fault)], "red circle")
        cases.append(
            Case(
                body=insert_row(chaos, user_id, key, prompt),
                picture=picture,
                fault=fault,
                patient=chaos.random.random() < PATIENT,
                callers=2 if chaos.random.random() < TWICE else 1,
            )
        )
    return cases


def do_harm(chaos: Chaos, sending: threading.Event) -> Counter[str]:
    """Kill and stop things, in an order that the seed gives, until the callers are through."""
    harms = [
        *[chaos.kill_server] * 3,
        *[chaos.database_outage] * 2,
        *[chaos.objects_outage] * 2,
        chaos.kill_server_while_the_database_is_away,
    ]
    chaos.random.shuffle(harms)
    done: Counter[str] = Counter()
    for harm in harms:
        if not chaos.settled_more(TASKS // 20, sending):
            break
        harm()
        done[harm.__name__] += 1
    return done


def send_all(chaos: Chaos, cases: list[Case]) -> Counter[str]:
    """Every task to the server while it is harmed; which harm was done."""
    sending = threading.Event()
    sending.set()
    with ThreadPoolExecutor(1) as harming, ThreadPoolExecutor(SENDERS) as callers:
        harm = harming.submit(do_harm, chaos, sending)
        calls = [callers.submit(chaos.call, case) for case in cases for _ in range(case.callers)]
        try:
            for call in calls:
                call.result()
        finally:
            sending.clear()
        return harm.result()


def send_what_was_never_taken(chaos: Chaos, cases: list[Case]) -> None:
    """A row that is still pending was never taken: its only caller's connection was cut too early."""
    by_id = {case.body["task_id"]: case for case in cases}
    pending = chaos.database.execute("select id from segmentation_results where status = 'pending'")
    for (task_id,) in pending:
        assert "cut" in chaos.answers_by_task[str(task_id)], "a task was taken, and is pending"
        chaos.call(replace(by_id[str(task_id)], patient=True))


@pytest.fixture(scope="module")
def aftermath(chaos: Chaos) -> list[tuple[Case, dict[str, Any]]]:
    """Every case, and its row once nothing is open any more."""
    user_id = chaos.database.add_user()
    cases = planned_cases(chaos, user_id, quiet_pictures(chaos, user_id))
    harm = send_all(chaos, cases)
    sys.stdout.write(f"harm {dict(harm)}; answers {dict(chaos.answers)}\n")
    assert sum(harm.values()) >= 6, "too little happened: more tasks, or a slower server, are needed"
    chaos.wait_until_settled("processing")
    send_what_was_never_taken(chaos, cases)
    chaos.wait_until_settled("processing", "pending")
    rows = {
        str(task_id): {"status": status, "mask_image_url": mask_url, "labels": labels, "metadata": metadata}
        for task_id, status, mask_url, labels, metadata in chaos.database.execute(
            "select id, status, mask_image_url, labels, metadata from segmentation_results"
        )
    }
    return [(case, rows[case.body["task_id"]]) for case in cases]


def test_every_done_task_has_its_mask(chaos: Chaos, aftermath: list[tuple[Case, dict[str, Any]]]) -> None:
    """Every done row names a mask that can be read and is the one that a quiet server draws."""
    done = [(case, row) for case, row in aftermath if row["status"] == "done"]
    assert len(done) > TASKS / 2
    for case, row in done:
        assert case.picture is not None, "a task whose image cannot be read is done"
        assert row["labels"] == case.picture.labels
        mask = mask_at(chaos, row["mask_image_url"], case.body["user_id"], case.body["task_id"])
        nothing = not mask.any() and not case.picture.mask.any()
        assert nothing or iou(mask, case.picture.mask) > 0.99


def test_every_error_is_true(aftermath: list[tuple[Case, dict[str, Any]]]) -> None:
    """An error row says why: the image is bad, or the store was away. Patient callers met only the former."""
    for case, row in aftermath:
        if row["status"] == "done":
            continue
        assert row["status"] == "error"
        message = row["metadata"]["error_message"]
        if case.fault is not None:
            assert TRUE_OF_BAD_IMAGES[case.fault] in message or "object store" in message
        else:
            assert "object store" in message
            assert not case.patient


def test_no_task_is_done_twice(chaos: Chaos, aftermath: list[tuple[Case, dict[str, Any]]]) -> None:
    """Once a row was done the database never saw it change again."""
    history = chaos.database.execute("select id, status from history order by number")
    seen: dict[str, list[str]] = {}
    for task_id, status in history:
        seen.setdefault(str(task_id), []).append(status)
    for case, row in aftermath:
        states = seen[case.body["task_id"]]
        assert states.count("done") == (row["status"] == "done")
        assert "done" not in states[:-1], states


def test_nothing_is_left_behind(chaos: Chaos, aftermath: list[tuple[Case, dict[str, Any]]]) -> None:
    """The outbox is empty, and says so in the metrics."""
    assert len(aftermath) == TASKS
    metrics = httpx.get(f"{chaos.server.url}/metrics").text
    assert re.search(r"^sam3_outbox_depth(\{.*\})? 0.0$", metrics, re.MULTILINE)
    with closing(sqlite3.connect(chaos.server.data_dir / "outbox.sqlite")) as db:
        assert db.execute("SELECT * FROM attempts").fetchall() == []


def test_log_tells_no_secret(chaos: Chaos, aftermath: list[tuple[Case, dict[str, Any]]]) -> None:
    """Whatever went wrong, no key, secret, URL, prompt or user is in the log."""
    log = chaos.server.log_path.read_text()
    assert "is begun again" in log, "not the log of this server"
    private = {
        API_KEY,
        chaos.database.secret_key,
        chaos.database.service_role_key,
        chaos.objects.secret_access_key,
        chaos.objects.access_key_id,
        *(str(case.body[name]) for case, _ in aftermath for name in ("image_url", "user_id", "text_prompt")),
    }
    assert [secret for secret in private if secret in log] == []
