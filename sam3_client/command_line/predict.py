"""`sam3 predict`: many pictures, some at a time; what is done is kept, and a later run goes on."""

from __future__ import annotations

import asyncio
import errno
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sam3_client import (
    DirectApiOff,
    InvalidRequest,
    ModelLoading,
    Overloaded,
    Sam3Error,
    ServerUnreachable,
    Unauthorized,
)
from sam3_client.command_line.errors import INTERRUPTED, SERVER, SOME_FAILED, USAGE, CommandError
from sam3_client.command_line.formats import write_coco, write_formats
from sam3_client.command_line.out_folder import OutFolder, Record, stamp
from sam3_client.command_line.progress import report_of, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sam3_client import Result
    from sam3_client.command_line.pictures import Source, Sources
    from sam3_client.command_line.progress import Report
    from sam3_client.command_line.segmenters import Segmenter

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
OF_THIS_PICTURE = ("boxes", "image")
"""Begin the messages of requests that are refused for one picture, and not for every one."""


@dataclass(slots=True)
class Summary:
    """How a run ended.

    Attributes:
        done: pictures of this run; kept: of earlier ones.
        failed: the reason by the picture's name.
        found, found_in: by prompt, the instances, and the pictures that have any; of all that are done.
        stopped: why the run ended before its end; empty if it did not.
    """

    total: int
    done: int = 0
    kept: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    found: Counter[str] = field(default_factory=Counter)
    found_in: Counter[str] = field(default_factory=Counter)
    time_s: float = 0.0
    stopped: str = ""
    exit_code: int = 0

    @property
    def not_done(self) -> int:
        """Pictures that were not tried."""
        return self.total - self.done - self.kept - len(self.failed)


@dataclass(frozen=True, slots=True)
class Run:
    """The settings of a run that are not the segmenter's.

    Attributes:
        formats: of `formats.FORMATS`.
        jobs: pictures at a time.
    """

    sources: Sources
    out: OutFolder
    prompts: Sequence[str]
    formats: Sequence[str]
    jobs: int


def predict(run: Run, make_segmenter: Callable[[], Segmenter]) -> Summary:
    """Segment every picture that is not done yet, inside `run.out.opened`.

    Args:
        run: what to do.
        make_segmenter: is called where there is something to do.

    Raises:
        CommandError: the server or the model cannot be used from the start.
    """
    start_s = time.monotonic()
    todo = [source for source in run.sources.pictures if run.out.record_of(source) is None]
    kept = len(run.sources.pictures) - len(todo)
    failed: dict[str, str] = {}
    stopped, exit_code = "", 0
    if todo:
        try:
            with report_of(len(todo)) as report:
                if kept:
                    report.say(f"{kept} of {len(run.sources.pictures)} pictures are done already")
                asyncio.run(_segment_all(run, todo, make_segmenter, failed, report))
        except KeyboardInterrupt:
            stopped, exit_code = "interrupted", INTERRUPTED
        except CommandError as error:
            stopped, exit_code = str(error), error.exit_code
    summary = _count(run)
    summary.failed = failed
    summary.kept = kept
    summary.done -= kept
    summary.stopped = stopped
    summary.exit_code = exit_code or (SOME_FAILED if failed else 0)
    summary.time_s = time.monotonic() - start_s
    return summary


async def _segment_all(
    run: Run,
    todo: Sequence[Source],
    make_segmenter: Callable[[], Segmenter],
    failed: dict[str, str],
    report: Report,
) -> None:
    """Raises `CommandError` for what every picture would fail with."""
    try:
        async with make_segmenter() as segmenter:
            run.out.check_model(await segmenter.model())
            queue = iter(todo)
            async with asyncio.TaskGroup() as group:
                for _ in range(run.jobs):
                    group.create_task(_work(run, queue, segmenter, failed, report))
    except ExceptionGroup as group_of_errors:
        error = group_of_errors.exceptions[0]
        raise (_ending(error) if isinstance(error, Sam3Error) else error) from None
    except Sam3Error as error:
        raise _ending(error) from error


async def _work(
    run: Run, queue: Iterator[Source], segmenter: Segmenter, failed: dict[str, str], report: Report
) -> None:
    for source in queue:
        try:
            file_bytes, modified_ns = stamp(source)
            result = await segmenter.segment(source.path)
            # In a thread of its own it is finished when the run is interrupted.
            await asyncio.to_thread(_keep, run, source, (file_bytes, modified_ns), result)
        except Sam3Error as error:
            if _ends_run(error):
                raise
            failed[source.name] = _reason(error, source)
        except OSError as error:
            if error.errno in FULL_DISK:
                raise CommandError(
                    f"{run.out.path} cannot be written: {error.strerror}", SOME_FAILED
                ) from error
            failed[source.name] = f"{error.filename or source.path}: {error.strerror or error}"
        if source.name in failed:
            report.say(f"failed: {shown(source.name)}: {shown(failed[source.name])}")
        report.advance()


def _keep(run: Run, source: Source, file_stamp: tuple[int, int], result: Result) -> None:
    outputs = write_formats(result, source.name, run.formats, run.out.path)
    found = {prompt: result.labels.count(prompt) for prompt in result.prompts}
    coco = result.to_coco(source.name) if "coco" in run.formats else None
    run.out.write_record(source, Record(*file_stamp, outputs, found, coco))


def _ends_run(error: Sam3Error) -> bool:
    """Whether the next picture would fail in the same way."""
    if isinstance(error, InvalidRequest):
        return not str(error).startswith(OF_THIS_PICTURE)
    is_busy = isinstance(error, Overloaded) and error.code != "DEADLINE_EXCEEDED"
    return is_busy or isinstance(error, DirectApiOff | ModelLoading | ServerUnreachable | Unauthorized)


def _ending(error: Sam3Error) -> CommandError:
    """The sentence for an error that ends the run: the client's, in words of the command line."""
    fault = str(error).partition(";")[0]  # what follows is advice for callers in Python
    if error.code == "BAD_KEY":
        return CommandError(f"{fault}: correct --key or SAM3_API_KEY", SERVER)
    if isinstance(error, Unauthorized):
        return CommandError(
            "the server refuses the key: give --key, or set SAM3_API_KEY, to a key of its API_SECRET_KEY "
            "(the embedded demo prints one at its start)",
            SERVER,
        )
    if error.code == "BAD_URL":
        return CommandError(f"{fault}: correct --url or SAM3_URL")
    if error.code == "TIMEOUT":
        return CommandError(f"{fault}: see the server's log, or send fewer at a time with --jobs", SERVER)
    if error.code == "UNREACHABLE":
        return CommandError(
            f"{fault}: start a server with `sam3 serve`, name another with --url or SAM3_URL, or run the "
            "model in this process with --local",
            SERVER,
        )
    return CommandError(str(error), USAGE if isinstance(error, InvalidRequest) else SERVER)


def _reason(error: Sam3Error, source: Source) -> str:
    text = str(error).removeprefix(f"{source.path} ")
    return f"{text} (request {error.request_id})" if error.request_id else text


def _count(run: Run) -> Summary:
    """Count what is done, by its records; write the COCO document of it."""
    summary = Summary(len(run.sources.pictures))
    documents: list[dict[str, Any]] = []
    for source in run.sources.pictures:
        record = run.out.record_of(source)
        if record is not None:
            summary.done += 1
            summary.found.update(record.found)
            summary.found_in.update(prompt for prompt, count in record.found.items() if count)
            if record.coco is not None:
                documents.append(record.coco)
    if documents:
        write_coco(documents, run.out.path)
    return summary
