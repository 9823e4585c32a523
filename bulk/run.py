"""A bulk run from its settings to its report. Started again, it goes on where it stopped."""

from __future__ import annotations

import json
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bulk.cluster import Store, ray_session
from bulk.objects import open_objects, read_uri
from bulk.plan import JSON, done_shards, make_plan, read_if_there, read_part, read_plan, rows_file
from bulk.progress import LINE_INTERVAL_S, RunState, waiting_shown
from bulk.report import RunDescription
from bulk.run_results import COCO, REPORT, SUMMARY, write_results
from bulk.sources import Skipped, list_pictures
from bulk.stages.background import yield_to_others
from version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bulk.objects import Objects
    from bulk.plan import Plan
    from bulk.progress import Display, RunMetrics
    from bulk.settings import Run
    from bulk.summary import Summary
    from sam3_runner.weights.checkpoint import Checkpoint

RUN = "run.json"
RESULT_TYPES = {COCO: JSON, SUMMARY: JSON, REPORT: "text/html; charset=utf-8"}
READS_AHEAD = 16
"""Of rows, while the results are made: one read of a bucket takes tens of ms."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended.

    Attributes:
        plan: of the run.
        failed: error rows, those of earlier commands too.
        summary: None where the run was complete before, and nothing was done.
    """

    plan: Plan
    failed: int
    summary: Summary | None


def bulk_run(run: Run, checkpoint: Checkpoint, display: Display, metrics: RunMetrics) -> Ended:
    """Segment every picture of a run that is not done yet, then write its results.

    Args:
        run: what to do; its device, streams and batches are chosen here.
        checkpoint: the weights, as this machine finds them.
        display: shows how far it is.
        metrics: the same for Prometheus.

    Raises:
        RunError: the run cannot begin, or cannot go on. What is done stays done.
    """
    folder = open_objects(run.folder, run.max_wait_s)
    folder.create(RUN, _description_json(run, checkpoint), JSON)
    plan = read_plan(folder) or _list(run, folder, display)
    done = done_shards(folder)
    todo = [shard for shard in range(plan.shards) if shard not in done]
    if not todo and (failed := _known_failures(folder)) is not None:
        display.say(f"all {plan.pictures:,} pictures were done before")
        return Ended(plan, failed, None)
    kept = plan.pictures - sum(map(plan.pictures_in, todo))
    if kept:
        display.say(f"{kept:,} of {plan.pictures:,} pictures are done already")
    if todo:
        _segment(run, plan, todo, display, metrics)
    display.say("writing coco.json, summary.json and report.html")
    if run.background:  # not before: Ray's processes would have it from this one
        yield_to_others()
    summary = _write_results(run, folder, plan, checkpoint)
    return Ended(plan, summary.failed_pictures, summary)


def _description_json(run: Run, checkpoint: Checkpoint) -> bytes:
    return json.dumps(
        {
            "images": run.images,
            "settings": asdict(run.settings),
            "model": checkpoint.name,
            "version": VERSION,
        },
        indent=1,
    ).encode()


def _list(run: Run, folder: Objects, display: Display) -> Plan:
    """Make the plan."""
    display.say(f"listing {run.images}")
    skipped = Skipped()

    said_s = time.monotonic()

    def report(pictures: int) -> None:
        nonlocal said_s
        if time.monotonic() - said_s >= LINE_INTERVAL_S:
            said_s = time.monotonic()
            display.say(f"{pictures:,} pictures listed")

    pictures = list_pictures(run.images, skipped=skipped, max_wait_s=run.max_wait_s)
    plan = make_plan(folder, pictures, run.shard_pictures, report)
    display.say(". ".join([f"{plan.pictures:,} pictures", *skipped.sentences()]))
    return plan


def _segment(run: Run, plan: Plan, todo: Sequence[int], display: Display, metrics: RunMetrics) -> None:
    display.say("starting Ray")
    if run.ray_address is None and (warning := Store.of_this_machine().warning) is not None:
        display.say(warning)
    with ray_session(run) as sizes:
        from bulk.pipeline import segment_shards  # noqa: PLC0415 - imports Ray, which reads its settings then

        device = "cuda" if sizes.model_gpus else "cpu"
        placed = replace(run, device=device, streams=sizes.streams, max_batch=sizes.max_batch)
        kept = plan.pictures - sum(map(plan.pictures_in, todo))
        state = RunState(plan.pictures, sizes.models * sizes.streams, kept)
        display.say(f"loading the model ({sizes})")
        metrics.show(state)
        with waiting_shown(display) as shard_has_ended:
            for outcome in segment_shards(placed, plan, todo, sizes):
                shard_has_ended()
                state.add(outcome)
                metrics.show(state, outcome)
                display.show(state)


def _known_failures(folder: Objects) -> int | None:
    """Error rows of a run whose results are written; None: they are not."""
    data = read_if_there(folder, SUMMARY)
    if data is None or read_if_there(folder, REPORT) is None:
        return None
    failed: int = json.loads(data)["pictures"]["failed"]
    return failed


def _write_results(run: Run, folder: Objects, plan: Plan, checkpoint: Checkpoint) -> Summary:
    description = RunDescription(
        run.run_id,
        run.images,
        run.folder,
        run.settings.prompts,
        _shown_settings(run),
        checkpoint.name,
        run.settings.weights_sha256,
        VERSION,
    )

    def read_picture(uri: str) -> bytes:
        return read_uri(uri, run.settings.max_image_bytes, run.max_wait_s)

    with tempfile.TemporaryDirectory(prefix="sam3-bulk-") as temporary:
        summary = write_results(_parts(folder, plan), Path(temporary), description, read_picture)
        # The report is the last: it says that the others are there.
        for name, content_type in RESULT_TYPES.items():
            folder.upload(name, Path(temporary, name), content_type)
    return summary


def _shown_settings(run: Run) -> dict[str, str]:
    settings: dict[str, Any] = asdict(run.settings)
    shown = {**settings, **settings.pop("refinement")}
    hidden = {"prompts", "weights_sha256", "refinement"}
    return {name: str(value) for name, value in shown.items() if name not in hidden and value is not None}


def _parts(folder: Objects, plan: Plan) -> Iterator[bytes]:
    """The rows of each shard, in order; a few are read ahead."""
    with ThreadPoolExecutor(READS_AHEAD) as threads:
        ahead = deque[Any]()
        for shard in range(plan.shards):
            ahead.append(threads.submit(read_part, folder, rows_file(shard)))
            if len(ahead) == READS_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
