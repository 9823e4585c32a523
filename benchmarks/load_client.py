"""A load client in a process of its own: closed loops and open loops of requests over HTTP.

`run_plan` starts the process, which reads a `Plan` as JSON from stdin and writes a `Measurement` to stdout.

- Closed loop: each of `clients` sends its next request when the answer to the one before has arrived.
- Open loop: requests are sent at random times, whatever the server does: a Poisson process, given how many
  requests it has, so that a short load has exactly `rate_per_s`. A latency counts from the scheduled time: a
  server that stalls delays every request that was due meanwhile.

Requests that are due before `ramp_s` has passed are sent, and not measured. After `seconds` nothing more is
sent, and every answer is waited for. So no slow request is left out.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).parent.parent
COMMENT_BYTES = 16
"""Length of the comment in each picture's file. It is rewritten before a request, so that every request has a
file of other bytes, which costs as much to decode."""
COMMENT_HEAD = b"\xff\xfe" + (COMMENT_BYTES + 2).to_bytes(2, "big")
"""Marker and length of a JPEG's comment segment."""

TIMEOUT_S = 120.0
PROBE_INTERVAL_S = 0.1
USER_ID = "bench"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of request.

    Attributes:
        name: in the results.
        share: of all requests, relative to the other kinds.
        prompts: for each picture of the plan, the prompts that a request about it takes in turn: each element
            is a list of prompts of one request. A list of one prompt goes to the route for one prompt.
        same_picture: always the first picture, unchanged, instead of a new file for each request.
    """

    name: str
    prompts: list[list[list[str]]]
    share: float = 1.0
    same_picture: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send.

    Attributes:
        url: base URL of the server.
        headers: of every request.
        pictures: files of the pictures, which the process rewrites; distinct requests use them in turn.
        keys: for each picture, its key in the server's storage; empty: the file and its prompts are sent as a
            form, to a peer without storage.
        kinds: what is sent, drawn at random by their shares.
        seconds: measured time.
        ramp_s: time before it, in which requests are sent too.
        clients: of a closed loop; 0: an open loop.
        rate_per_s: of an open loop.
        probes: paths that are read every PROBE_INTERVAL_S meanwhile; the path is their kind.
        seed: of the kinds and the arrivals.
    """

    url: str
    headers: dict[str, str]
    pictures: list[str]
    keys: list[str]
    kinds: list[Kind]
    seconds: float
    ramp_s: float = 0.0
    clients: int = 0
    rate_per_s: float = 0.0
    probes: list[str] = field(default_factory=list)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request, and how it ended.

    Attributes:
        kind: the name of its kind.
        due_s: when it was to be sent: in a closed loop when its client was free, in an open loop the
            scheduled time; from the begin of the measured time.
        sent_s, ended_s: on the same clock.
        status: of HTTP; the name of the exception where there was no answer.
        masks: instances in the answer.
        inference_ms: of the answer.
    """

    kind: str
    due_s: float
    sent_s: float
    ended_s: float
    status: str
    masks: int = 0
    inference_ms: float = 0.0

    @property
    def latency_ms(self) -> float:
        """From the time when it was due to the end of the answer."""
        return (self.ended_s - self.due_s) * 1000

    @property
    def is_ok(self) -> bool:
        """Whether the answer is 200."""
        return self.status == "200"


@dataclass(frozen=True, slots=True)
class Measurement:
    """Outcome of a plan.

    Attributes:
        outcomes: of all requests, those of the ramp too.
        cpu_share: CPU time of the client's process by the time it ran: at 1 the client is the bottleneck.
    """

    outcomes: list[Outcome]
    cpu_share: float


def arrivals_s(plan: Plan) -> list[float]:
    """The scheduled times of an open loop, from the begin of the measured time; negative in the ramp.

    Given their number, the arrivals of a Poisson process are independent and uniform.
    """
    uniform = random.Random(plan.seed)  # noqa: S311 - not a secret
    count = round(plan.rate_per_s * (plan.ramp_s + plan.seconds))
    return sorted(uniform.uniform(-plan.ramp_s, plan.seconds) for _ in range(count))


class _Client:
    """Sends the requests of one plan."""

    def __init__(self, plan: Plan, session: aiohttp.ClientSession, files: list[int]) -> None:
        self._plan = plan
        self._session = session
        self._files = files
        self._comments = [os.pread(file, 4096, 0).index(COMMENT_HEAD) + len(COMMENT_HEAD) for file in files]
        self._random = random.Random(plan.seed)  # noqa: S311 - not a secret
        self._number = 0
        self._begin_s = time.perf_counter() + plan.ramp_s
        self.outcomes: list[Outcome] = []

    def now_s(self) -> float:
        """Time since the begin of the measured time; negative in the ramp."""
        return time.perf_counter() - self._begin_s

    async def send(self, due_s: float) -> None:
        """One request of a random kind, measured from `due_s`."""
        kinds = self._plan.kinds
        [kind] = self._random.choices(kinds, [each.share for each in kinds])
        number, self._number = self._number, self._number + 1
        picture = 0 if kind.same_picture else number % len(self._plan.pictures)
        of_picture = kind.prompts[picture % len(kind.prompts)]
        prompts = of_picture[number % len(of_picture)]
        if not kind.same_picture:
            os.pwrite(
                self._files[picture], uuid.uuid4().hex[:COMMENT_BYTES].encode(), self._comments[picture]
            )
        is_batch = len(prompts) > 1 and self._plan.keys
        path = "/api/v1/predict/batch" if is_batch else "/api/v1/predict"
        sent_s = self.now_s()
        status, masks, inference_ms = await self._exchange(path, self._content(picture, prompts))
        self.outcomes.append(
            Outcome(kind.name, due_s, sent_s, self.now_s(), status, masks, round(inference_ms, 3))
        )

    def _content(self, picture: int, prompts: list[str]) -> dict[str, Any]:
        """The body, as arguments of aiohttp."""
        if not self._plan.keys:
            form = aiohttp.FormData()
            form.add_field("image", os.pread(self._files[picture], 2**24, 0), filename="picture.jpg")
            for prompt in prompts:
                form.add_field("prompt", prompt)
            return {"data": form}
        wanted = {"text_prompt": prompts[0]} if len(prompts) == 1 else {"prompts": prompts}
        task = {"image_url": self._plan.keys[picture], "user_id": USER_ID, "task_id": str(uuid.uuid4())}
        return {"json": task | wanted}

    async def _exchange(self, path: str, content: dict[str, Any]) -> tuple[str, int, float]:
        try:
            async with self._session.post(self._plan.url + path, **content) as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return type(error).__name__, 0, 0.0
        if response.status != 200 or response.content_type != "application/json":
            return str(response.status), 0, 0.0
        answer = json.loads(body)
        results = answer.get("results", [answer])
        masks = sum(len(result.get("instances", ())) for result in results)
        inference_ms = answer.get("total_inference_time_ms", answer.get("inference_time_ms", 0.0))
        return "200", masks, inference_ms

    async def closed_loop(self) -> None:
        async def one_client() -> None:
            while (due_s := self.now_s()) < self._plan.seconds:
                await self.send(due_s)

        await asyncio.gather(*(one_client() for _ in range(self._plan.clients)))

    async def open_loop(self) -> None:
        async with asyncio.TaskGroup() as requests:
            for due_s in arrivals_s(self._plan):
                await asyncio.sleep(due_s - self.now_s())
                requests.create_task(self.send(due_s))

    async def probe(self, path: str) -> None:
        """Read `path` until cancelled."""
        while True:
            sent_s = self.now_s()
            try:
                async with self._session.get(self._plan.url + path) as response:
                    await response.read()
                status = str(response.status)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                status = type(error).__name__
            self.outcomes.append(Outcome(path, sent_s, sent_s, self.now_s(), status))
            await asyncio.sleep(PROBE_INTERVAL_S)


async def send_load(plan: Plan) -> Measurement:
    """Send the requests of `plan` from this process."""
    with ExitStack() as opened:
        files = [os.open(path, os.O_RDWR) for path in plan.pictures]
        for file in files:
            opened.callback(os.close, file)
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            headers=plan.headers, timeout=timeout, connector=connector
        ) as session:
            cpu_s, began_s = time.process_time(), time.perf_counter()
            client = _Client(plan, session, files)
            probing = [asyncio.create_task(client.probe(path)) for path in plan.probes]
            await (client.closed_loop() if plan.clients else client.open_loop())
            for each in probing:
                each.cancel()
                with suppress(asyncio.CancelledError):
                    await each
            cpu_share = (time.process_time() - cpu_s) / (time.perf_counter() - began_s)
    return Measurement(client.outcomes, round(cpu_share, 3))


def run_plan(plan: Plan) -> Measurement:
    """Send the requests of `plan` from a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.load_client"],
        cwd=ROOT,
        input=json.dumps(asdict(plan)).encode(),
        stdout=subprocess.PIPE,
        check=True,
    )
    answer = json.loads(ended.stdout)
    return Measurement([Outcome(*each) for each in answer["outcomes"]], answer["cpu_share"])


def main() -> None:
    """Read a plan, send its requests, write what was measured."""
    text = json.load(sys.stdin)
    plan = Plan(**text | {"kinds": [Kind(**kind) for kind in text["kinds"]]})
    measured = asyncio.run(send_load(plan))
    rows = [
        (each.kind, each.due_s, each.sent_s, each.ended_s, each.status, each.masks, each.inference_ms)
        for each in measured.outcomes
    ]
    json.dump({"outcomes": rows, "cpu_share": measured.cpu_share}, sys.stdout)


if __name__ == "__main__":
    main()
