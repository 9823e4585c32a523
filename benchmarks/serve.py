r"""Measure the server under load: whole requests over HTTP to the real server's processes.

    python -m benchmarks.serve                                          # demo checkpoint, every scenario
    python -m benchmarks.serve --weights random --record                # full size; needs a GPU
    python -m benchmarks.serve --scenarios closed --clients 1 8 --against ../other-checkout

Every request is about another 1920 x 1080 JPEG of about 370 KB: the drawings repeat, but a comment in the
file differs each time, so nothing that is kept by content helps. Texts repeat, and are cached by the server.
The stores are the embedded ones, on this machine. The client runs in a process of its own (load_client.py).

Scenarios:
    closed        --clients callers, each with one request at a time, one prompt
    same-picture  one caller, one picture, another prompt each time
    ten-prompts   one caller, ten prompts on one picture
    open          random arrivals at --shares of the throughput of the closed loops, then the highest rate
                  with p99 <= 500 ms, by bisection; latencies count from the scheduled arrival
    mixed         16 callers: 80 % one prompt, 20 % ten prompts
    overload      random arrivals at ten times that throughput: accepted and refused requests, and probes of
                  /health and /api/v1/model/info. Once with the server's own deadline, to which accepted
                  requests wait by design, and once with one of twice the p99 of the fastest closed loop
    crowded       one caller, about 100 kept masks a request (24 with the demo), by a threshold that the
                  server has no setting for (crowded_service.py)
    client        the same client against a server that answers at once: what the client alone reaches

With --against, a server of another checkout runs beside ours, and both are measured in turn in each closed
loop (A B A B), so that the ratio comes from one run on one machine. --peer-python adds the same model under
LitServe in the same way (peers/litserve_server.py says what it does not do).
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil

from benchmarks.load_client import COMMENT_BYTES, USER_ID, Kind, Measurement, Outcome, Plan, run_plan
from benchmarks.load_figures import ServerMetrics, figures, latencies, read_metrics, resident_mb, timeline
from benchmarks.pictures import FIRST_SEED, Scene, encode_jpeg
from benchmarks.process_tree import call_each, process_tree
from benchmarks.table import add_settings, machine_name, record
from commands.local_server import ROOT, SERVICE, local_server, reserved_ports, stop, wait_until_ready
from storage import LocalFolder
from version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

RESULTS = Path(__file__).parent / "serve.csv"
WIDTH_PX, HEIGHT_PX = 1920, 1080
FILE_BYTES = 370_000
DRAWINGS = 8
FILES = 256
"""A file is used again after so many requests, when the one before has ended."""

CLIENTS = (1, 4, 8, 16, 48)
RATE_SHARES = (0.5, 0.7, 0.9)
P99_LIMIT_MS = 500.0
BISECTIONS = 3
MIXED_CLIENTS, OVERLOAD = 16, 10.0
TOO_MANY_REQUESTS = 429
KEPT_MASKS = 100
PROMPT = "red circle"
RAMP_SHARE = 0.2
"""Of the measured time, in front of it."""

SCENARIOS = ("closed", "same-picture", "ten-prompts", "open", "mixed", "overload", "crowded", "client")
COLUMNS = (
    *("version", "scenario", "kind", "clients", "rate_per_s", "n", "p50_ms", "p95_ms", "p99_ms", "max_ms"),
    *("throughput_per_s", "inference_p50_ms", "rest_p50_ms", "masks_mean", "batch_mean", "device_share"),
    *("pss_mb", "client_cpu_share", "errors"),
)
"""Those that are printed."""


@dataclass(frozen=True, slots=True)
class Target:
    """A running server.

    Attributes:
        version: shown in the table.
        pid: of the process whose descendants are the server.
        files: of the pictures, and `keys` in the server's storage.
        has_metrics: it has our /metrics.
    """

    version: str
    url: str
    headers: dict[str, str]
    pid: int
    files: list[str]
    keys: list[str]
    has_metrics: bool = True


@dataclass(frozen=True, slots=True)
class Pictures:
    """The drawings: the file of each, the prompts of its objects, and ten prompts."""

    jpegs: list[bytes]
    objects: list[list[str]]
    ten_prompts: list[list[str]]

    @classmethod
    def draw(cls, count: int) -> Pictures:
        """Draw `count` of them; takes a second or two each."""
        pictures = cls([], [], [])
        seeds = itertools.count(FIRST_SEED)
        while len(pictures.jpegs) < count:
            scene = Scene(next(seeds), WIDTH_PX, HEIGHT_PX)
            jpeg = _file_of(scene)
            if scene.masks and len(jpeg) > 0.9 * FILE_BYTES:
                pictures.jpegs.append(jpeg)
                pictures.objects.append(list(scene.masks))
                pictures.ten_prompts.append(scene.ten_prompts)
        return pictures

    def write(self, storage: LocalFolder, folder: Path) -> tuple[list[str], list[str]]:
        """Store FILES uploads; returns their paths below `folder`, and their keys."""
        keys = [f"uploads/{USER_ID}/{number:04}" for number in range(FILES)]
        for number, key in enumerate(keys):
            storage.put_upload(key, self.jpegs[number % len(self.jpegs)])
        return [str(folder / key) for key in keys], keys

    @property
    def one(self) -> Kind:
        """One prompt, of which the picture has an object."""
        return Kind("one prompt", [[prompts[:1]] for prompts in self.objects])

    @property
    def ten(self) -> Kind:
        """Ten prompts."""
        return Kind("ten prompts", [[prompts] for prompts in self.ten_prompts])


def _file_of(scene: Scene) -> bytes:
    """The drawing at the highest quality that gives a file of at most FILE_BYTES."""
    comment = b"0" * COMMENT_BYTES
    files = (encode_jpeg(scene.image, quality, comment) for quality in range(94, 20, -2))
    return next(file for file in files if len(file) <= FILE_BYTES)


@dataclass
class Bench:
    """Runs scenarios on servers, in turn, and collects rows.

    Attributes:
        options: of the command line.
        pictures: what requests are about.
        common: columns that all rows share.
        rows: of the table.
        capacity: for each server, the highest throughput of the closed loops.
        loaded_p99_ms: and the p99 of that loop.
    """

    options: argparse.Namespace
    pictures: Pictures
    common: dict[str, object]
    rows: list[dict[str, object]] = field(default_factory=list)
    capacity: dict[str, float] = field(default_factory=dict)
    loaded_p99_ms: dict[str, float] = field(default_factory=dict)

    def closed(self, targets: list[Target]) -> None:
        """Closed loops of one prompt."""
        for clients in self.options.clients:
            self.closed_loop(targets, "closed", clients, self.pictures.one)

    def same_picture(self, targets: list[Target]) -> None:
        """One picture again and again, with other prompts."""
        prompts = [[prompt] for prompt in self.pictures.objects[0]]
        kind = Kind("one prompt", [prompts], same_picture=True)
        self.closed_loop(targets, "same-picture", 1, kind)

    def ten_prompts(self, targets: list[Target]) -> None:
        """Ten prompts on one picture."""
        self.closed_loop(targets, "ten-prompts", 1, self.pictures.ten)

    def mixed(self, targets: list[Target]) -> None:
        """One prompt beside ten prompts."""
        one, ten = self.pictures.one, self.pictures.ten
        kinds = [Kind(one.name, one.prompts, share=0.8), Kind(ten.name, ten.prompts, share=0.2)]
        self.closed_loop(targets, "mixed", MIXED_CLIENTS, *kinds)

    def crowded(self, targets: list[Target]) -> None:
        """Many kept masks, of one prompt."""
        self.closed_loop(targets, "crowded", 1, Kind("one prompt", [[[PROMPT]]]))

    def closed_loop(self, targets: list[Target], scenario: str, clients: int, *kinds: Kind) -> None:
        """One closed loop on each server; the servers take turns."""
        runs: dict[str, list[Run]] = {target.version: [] for target in targets}
        for _ in range(self.options.rounds):
            for target in targets:
                runs[target.version].append(self._run(target, list(kinds), clients=clients))
        for target in targets:
            for kind in kinds:
                row = self._add(target, runs[target.version], scenario, kind.name)
                if scenario == "closed":
                    rate = float(str(row["throughput_per_s"]))
                    if rate > self.capacity.get(target.version, 0.0):
                        self.capacity[target.version] = rate
                        self.loaded_p99_ms[target.version] = float(str(row["p99_ms"]))
            if clients == 1:
                self._print_timeline(runs[target.version])

    def open(self, targets: list[Target]) -> None:
        """Open loops at shares of the throughput, then the highest rate whose p99 is within the limit."""
        self._measure_capacity(targets)
        for target in targets:
            capacity = self.capacity[target.version]
            rates = [capacity * share for share in self.options.shares]
            measured = [(rate, self._open_loop(target, rate)) for rate in rates]
            for _ in range(BISECTIONS):
                fast = max((rate for rate, row in measured if _is_fast(row)), default=0.0)
                slow = min((rate for rate, row in measured if not _is_fast(row)), default=1.1 * capacity)
                rate = (fast + slow) / 2
                measured.append((rate, self._open_loop(target, rate)))
            fast_rows = [(rate, row) for rate, row in measured if _is_fast(row)]
            if fast_rows:
                _, fastest = max(fast_rows, key=lambda pair: pair[0])
                self._append(fastest | {"scenario": f"p99 <= {P99_LIMIT_MS:.0f} ms"})
            else:
                self._print(f"{target.version}: p99 > {P99_LIMIT_MS:.0f} ms at every rate")

    def overload(self, targets: list[Target]) -> None:
        """Ten times as many requests as the server can answer."""
        self._measure_capacity(targets)
        for target in targets:
            self._overload(target, "overload", None)
        for target in targets:
            deadline_ms = self.options.deadline_ms or round(2 * self.loaded_p99_ms[target.version])
            self._overload(target, f"overload {deadline_ms} ms", deadline_ms)

    def _overload(self, target: Target, scenario: str, deadline_ms: int | None) -> None:
        kind = self.pictures.one
        rate = self.capacity[target.version] * OVERLOAD
        probes = ["/health", "/api/v1/model/info"] if target.has_metrics else ["/health"]
        run = self._run(target, [kind], rate=rate, probes=probes, deadline_ms=deadline_ms)
        self._add(target, [run], scenario, kind.name)
        for name, refused in (("refused", True), ("failed", False)):
            times_ms = [
                each.latency_ms
                for each in run.outcomes(kind.name)
                if 0 <= each.due_s < run.plan.seconds
                and not each.is_ok
                and (each.status == str(TOO_MANY_REQUESTS)) == refused
            ]
            row = figures([[]], run.plan.seconds) | {"n": len(times_ms)} | latencies(times_ms)
            self._add_row(target, [run], row, scenario, name)
        for probe in probes:
            self._add(target, [run], scenario, probe)

    def client(self, _: list[Target]) -> None:
        """The client alone."""
        with trivial_server(self.pictures) as target:
            self.closed_loop([target], "client", max(CLIENTS), self.pictures.one)

    def warm_up(self, target: Target) -> None:
        """Requests of both kinds that are not measured, so that every process and cache has started.

        Lone requests come last: after a burst BentoML's batching delays them for a while.
        """
        seconds = min(2.0, self.options.seconds)
        for clients in (8, 1):
            self._run(target, [self.pictures.one, self.pictures.ten], clients=clients, seconds=seconds)

    def _measure_capacity(self, targets: list[Target]) -> None:
        missing = [target for target in targets if target.version not in self.capacity]
        if missing:
            self.closed_loop(missing, "closed", MIXED_CLIENTS, self.pictures.one)

    def _open_loop(self, target: Target, rate: float) -> dict[str, object]:
        run = self._run(target, [self.pictures.one], rate=rate)
        return self._add(target, [run], "open", self.pictures.one.name)

    def _run(
        self,
        target: Target,
        kinds: list[Kind],
        *,
        clients: int = 0,
        rate: float = 0.0,
        probes: Sequence[str] = (),
        deadline_ms: int | None = None,
        seconds: float | None = None,
    ) -> Run:
        seconds = seconds or self.options.seconds
        plan = Plan(
            url=target.url,
            headers=target.headers | ({"X-Deadline-Ms": str(deadline_ms)} if deadline_ms else {}),
            pictures=target.files,
            keys=target.keys,
            kinds=kinds,
            seconds=seconds,
            ramp_s=seconds * RAMP_SHARE,
            clients=clients,
            rate_per_s=rate,
            probes=list(probes),
        )
        pss_mb = resident_mb(target.pid)
        before = read_metrics(target.url, target.headers) if target.has_metrics else None
        measured = run_plan(plan)
        elapsed_s = plan.ramp_s + max((each.ended_s for each in measured.outcomes), default=seconds)
        if before is None:
            return Run(plan, measured, elapsed_s, pss_mb, ServerMetrics(), ServerMetrics())
        after = read_metrics(target.url, target.headers)
        return Run(plan, measured, elapsed_s, pss_mb, before, after)

    def _add(self, target: Target, runs: list[Run], scenario: str, kind: str) -> dict[str, object]:
        """A row of one kind's requests in several runs."""
        outcomes = [run.outcomes(kind) for run in runs]
        return self._add_row(target, runs, figures(outcomes, runs[0].plan.seconds), scenario, kind)

    def _add_row(
        self, target: Target, runs: list[Run], measured: dict[str, object], *names: str
    ) -> dict[str, object]:
        """A row of figures; `names` are its scenario and kind."""
        server = server_figures(runs)
        means_ms: dict[str, float] = server.pop("stage_means_ms")  # type: ignore[assignment]
        plan = runs[0].plan
        row: dict[str, object] = {
            **self.common,
            "version": target.version,
            **dict(zip(("scenario", "kind"), names, strict=True)),
            "clients": plan.clients or "",
            "rate_per_s": round(plan.rate_per_s, 2) or "",
            "seconds": plan.seconds * len(runs),
            **measured,
            **server,
            "stage_means_ms": " ".join(f"{stage}={ms:.2f}" for stage, ms in sorted(means_ms.items())),
            "pss_before_mb": runs[0].pss_mb,
            "pss_mb": resident_mb(target.pid),
            "client_cpu_share": max(run.measured.cpu_share for run in runs),
            "usd_per_1000": self._usd_per_1000(measured),
        }
        self._append(row)
        return row

    def _append(self, row: dict[str, object]) -> None:
        if not self.rows:
            self._print("  ".join(_cell(name, name) for name in COLUMNS))
        self._print("  ".join(_cell(name, row[name]) for name in COLUMNS))
        self.rows.append(row)
        if self.options.record:
            record(self.options.record, [row])

    def _usd_per_1000(self, measured: Mapping[str, object]) -> object:
        rate = float(str(measured["throughput_per_s"]))
        if not self.options.usd_per_hour or not rate:
            return ""
        return round(self.options.usd_per_hour / 3600 / rate * 1000, 4)

    def _print_timeline(self, runs: list[Run]) -> None:
        outcomes = [each for run in runs for each in run.measured.outcomes if each.is_ok]
        means_ms: dict[str, float] = server_figures(runs)["stage_means_ms"]  # type: ignore[assignment]
        if outcomes and means_ms:
            mean_ms = sum(each.latency_ms for each in outcomes) / len(outcomes)
            self._print("\n".join(timeline(means_ms, mean_ms)))

    @staticmethod
    def _print(text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def _is_fast(row: dict[str, object]) -> bool:
    return row["p99_ms"] != "" and float(str(row["p99_ms"])) <= P99_LIMIT_MS and not row["errors"]


@dataclass(frozen=True, slots=True)
class Run:
    """One measured load on one server.

    Attributes:
        elapsed_s: with the ramp, until the last answer.
        pss_mb: memory of the server before it.
        before, after: metrics of the server; empty where it has none.
    """

    plan: Plan
    measured: Measurement
    elapsed_s: float
    pss_mb: float
    before: ServerMetrics
    after: ServerMetrics

    def outcomes(self, kind: str) -> list[Outcome]:
        """The requests of one kind."""
        return [each for each in self.measured.outcomes if each.kind == kind]


def server_figures(runs: list[Run]) -> dict[str, object]:
    """What the server's own metrics say of several runs."""
    before, after = ServerMetrics(), ServerMetrics()
    for run in runs:
        before, after = before + run.before, after + run.after
    return after.since(before, sum(run.elapsed_s for run in runs))


def _cell(name: str, value: object) -> str:
    width = {"version": -14, "scenario": -16, "kind": -18, "errors": -20}.get(name, len(name))
    return f"{value!s:<{-width}}" if width < 0 else f"{value!s:>{width}}"


@contextmanager
def backend(
    root: Path, version: str, pictures: Pictures, options: argparse.Namespace, weights: str, *, crowded: bool
) -> Iterator[Target]:
    """The server of the checkout at `root`, with its uploads."""
    with tempfile.TemporaryDirectory(prefix="serve-") as name:
        folder = Path(name)
        environment = {"SAM3_WEIGHTS_PATH": weights, **dict(options.setting)}
        service = SERVICE
        if crowded:
            picture = folder / "picture.jpg"
            picture.write_bytes(pictures.jpegs[0])
            # Copied, so that a checkout without the file can be measured too.
            shutil.copy(Path(__file__).with_name("crowded_service.py"), folder)
            service = "crowded_service:SegmentationService"
            environment |= {
                "PYTHONPATH": os.pathsep.join([name, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
                "BENCHMARK_PICTURE": str(picture),
                "BENCHMARK_PROMPT": PROMPT,
                "BENCHMARK_KEPT_MASKS": str(KEPT_MASKS),
            }
        with local_server(
            folder / "data",
            environment,
            service=service,
            root=root,
            ready_timeout_s=options.ready_timeout_s,
        ) as server:
            storage = server.data_dir / "storage"
            files, keys = pictures.write(LocalFolder(storage), storage)
            sys.stdout.write(f"{version}: ready after {server.ready_s:.1f} s\n")
            yield Target(version, server.url, server.headers, server.pid, files, keys)


@contextmanager
def trivial_server(pictures: Pictures) -> Iterator[Target]:
    """The server that answers at once."""
    command = [sys.executable, "-m", "benchmarks.trivial_server"]
    with peer("answers at once", command, pictures, with_keys=True, ready_timeout_s=60) as target:
        yield target


@contextmanager
def litserve_server(
    python: Path, pictures: Pictures, weights: str, ready_timeout_s: float
) -> Iterator[Target]:
    """The same model under LitServe."""
    command = [str(python), "-m", "benchmarks.peers.litserve_server", "--weights", weights, "--port"]
    with peer("LitServe", command, pictures, with_keys=False, ready_timeout_s=ready_timeout_s) as target:
        yield target


@contextmanager
def peer(
    version: str, command: list[str], pictures: Pictures, *, with_keys: bool, ready_timeout_s: float
) -> Iterator[Target]:
    """Another server, whose command takes a port as its last argument.

    Without keys, its requests carry the file.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="serve-")))
        [port] = stack.enter_context(reserved_ports(1))
        files, keys = pictures.write(LocalFolder(folder), folder)
        log_path = folder / "server.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - our own command
                [*command, str(port)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )
        stack.callback(_stop_all, process)
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(process, url, log_path, ready_timeout_s, path="/health")
        yield Target(version, url, {}, process.pid, files, keys if with_keys else [], has_metrics=False)


def _stop_all(process: subprocess.Popen[bytes]) -> None:
    """Stop a server and its descendants: LitServe's do not end with it."""
    tree = process_tree(process.pid)
    stop(process)
    call_each(tree[1:], psutil.Process.kill)


def version_of(root: Path) -> str:
    """The commit of a checkout, marked if it has changes; outside git the version of this one."""
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    ended = subprocess.run(git, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    return ended.stdout.strip() if ended.returncode == 0 else VERSION


def main() -> None:
    """Measure, print, and append to the CSV file if --record is given."""
    options = _parse()
    checkouts = {options.label or version_of(ROOT): ROOT}
    if options.against:
        checkouts[options.against_label or version_of(options.against)] = options.against.resolve()
        if len(checkouts) == 1:
            sys.exit("both checkouts have the same version: name them with --label and --against-label")
    options.rounds = options.rounds or (2 if len(checkouts) == 2 or options.peer_python else 1)
    pictures = Pictures.draw(options.drawings)
    with tempfile.TemporaryDirectory(prefix="weights-") as folder:
        weights = options.weights
        if weights == "random":
            from benchmarks.parity import random_transformers_folder  # noqa: PLC0415 - imports transformers

            weights = str(random_transformers_folder(Path(folder)))
        bench = Bench(options, pictures, _common(options, pictures))
        for crowded in (False, True):
            chosen = [name for name in options.scenarios if (name == "crowded") == crowded]
            if chosen:
                _measure(bench, chosen, checkouts, weights, crowded=crowded)
    _print_ratios(bench)


def _measure(
    bench: Bench, scenarios: list[str], checkouts: dict[str, Path], weights: str, *, crowded: bool
) -> None:
    """Start the servers, and run scenarios on them."""
    with ExitStack() as servers:
        targets = [
            servers.enter_context(
                backend(root, version, bench.pictures, bench.options, weights, crowded=crowded)
            )
            for version, root in (checkouts.items() if scenarios != ["client"] else ())
        ]
        python = bench.options.peer_python
        if python and targets and not crowded:
            timeout_s = bench.options.ready_timeout_s
            targets.append(servers.enter_context(litserve_server(python, bench.pictures, weights, timeout_s)))
        for target in targets:
            bench.warm_up(target)
        if targets:
            health = httpx.get(f"{targets[0].url}/health", timeout=60).json()
            bench.common["hardware"] = " + ".join(filter(None, [machine_name(), health.get("gpu_name")]))
        for scenario in scenarios:
            getattr(bench, scenario.replace("-", "_"))(targets)


def _common(options: argparse.Namespace, pictures: Pictures) -> dict[str, object]:
    mean_kb = sum(map(len, pictures.jpegs)) / len(pictures.jpegs) / 1000
    return {
        "measured": datetime.now(UTC).date().isoformat(),
        "hardware": machine_name(),
        "python": platform.python_version(),
        "torch": installed_version("torch"),
        "weights": options.weights if options.weights in {"demo", "random"} else Path(options.weights).name,
        "picture": f"{WIDTH_PX}x{HEIGHT_PX}, {mean_kb:.0f} KB",
    }


def _print_ratios(bench: Bench) -> None:
    """Throughput and latencies of the first version by those of each other, in the closed loops."""
    loops: dict[str, dict[tuple[object, ...], dict[str, object]]] = {}
    for row in bench.rows:
        if row["clients"] and row["scenario"] != "client":
            loops.setdefault(str(row["version"]), {})[_loop(row)] = row
    for other in list(loops.items())[1:]:
        first = next(iter(loops.items()))
        sys.stdout.write(f"{first[0]} / {other[0]}\n")
        for loop in (each for each in first[1] if each in other[1]):
            texts = [f"{part!s:<16}" for part in loop]
            for name in ("throughput_per_s", "p50_ms", "p99_ms"):
                one, two = first[1][loop][name], other[1][loop][name]
                texts.append(f"{name} {float(str(one)) / float(str(two)):.2f}" if one and two else "")
            sys.stdout.write("  ".join(texts) + "\n")


def _loop(row: dict[str, object]) -> tuple[object, ...]:
    return row["scenario"], row["kind"], row["clients"]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="demo", help="demo, random (full size), or a path")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--seconds", type=float, default=3.0, help="measured time of each load")
    parser.add_argument("--drawings", type=int, default=DRAWINGS, help="which repeat in the files")
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS), help="of the closed loops")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=list(RATE_SHARES), help="of the open loops"
    )
    parser.add_argument(
        "--deadline-ms", type=int, help="of the second overload; default: twice the p99 of a closed loop"
    )
    parser.add_argument("--rounds", type=int, help="runs of each closed loop; default 1, with --against 2")
    parser.add_argument("--against", type=Path, help="folder of another checkout, measured in turn with this")
    add_settings(parser, "GPUS=2")
    parser.add_argument("--label", help="name of this version in the table; default: its commit")
    parser.add_argument("--against-label", help="name of the other version")
    parser.add_argument("--peer-python", type=Path, help="interpreter that has LitServe: measures it too")
    parser.add_argument("--usd-per-hour", type=float, help="price of this machine, for the cost of 1,000")
    parser.add_argument("--ready-timeout-s", type=float, default=300.0, help="longest start of a server")
    parser.add_argument(
        "--record",
        type=Path,
        nargs="?",
        const=RESULTS,
        help=f"append each row to a CSV file, by default {RESULTS.name}",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
