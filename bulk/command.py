"""What `sam3 bulk` calls: checks its arguments, runs, and prints how it ended."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from rich.console import Console
from stamina.instrumentation import set_on_retry_hooks

from bulk.errors import SOME_FAILED, UNAVAILABLE, RunError, WrongUsage
from bulk.objects import open_objects
from bulk.objects.s3 import warn_of_long_wait
from bulk.progress import RunMetrics, display_of
from bulk.run import bulk_run
from bulk.settings import (
    DEFAULT_MAX_WAIT_S,
    DEFAULT_SHARD_PICTURES,
    MAX_SHARD_PICTURES,
    Run,
    RunSettings,
)
from bulk.sources import source_of
from bulk.summary import summary_tables
from outputs.refinement import Refinement
from sam3_runner.errors import PromptTooLong, WeightsError
from sam3_runner.prompts import PromptTokenizer, clean_prompt
from sam3_runner.weights.checkpoint import DEFAULT_WEIGHTS_PATH, DEMO, Checkpoint, find_checkpoint

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from bulk.run import Ended

INTERRUPTED = 130
CHILD_END_S = 30.0
"""For Ray to end its processes."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """Of the command line.

    Attributes:
        weights: as SAM3_WEIGHTS_PATH; None: weights/sam3.pt if it exists, else the demo checkpoint.
        ray_address: of a cluster, such as `auto`; None: a Ray of this machine.
        metrics_port: on loopback; None: no metrics.
        The others: see `Run` and `RunSettings`.
    """

    images: str
    prompts: tuple[str, ...]
    out: str
    weights: str | None = None
    score_threshold: float | None = None
    refinement: Refinement = field(default_factory=Refinement)
    write_masks: bool = True
    ray_address: str | None = None
    metrics_port: int | None = None
    shard_pictures: int = DEFAULT_SHARD_PICTURES
    max_wait_s: float = DEFAULT_MAX_WAIT_S
    background: bool = False


def run_command(arguments: Arguments) -> int:
    """Run, print, and return the exit code: see `bulk.errors`; 130 after Ctrl-C or SIGTERM.

    Ray ends the process that uses it without a word when its own processes are gone, so that is a child.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run_in_child, args=(arguments, sender), name="sam3 bulk")
    child.start()
    sender.close()

    def interrupt(*_: object) -> None:
        os.kill(child.pid or 0, signal.SIGINT)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        exit_code: int = receiver.recv()
    except EOFError:
        sys.stderr.write("sam3: Ray has ended unexpectedly; the same command goes on from here\n")
        return UNAVAILABLE
    child.join(CHILD_END_S)
    child.kill()  # Ray's threads may hold it; what counts is stored
    return exit_code


def _run_in_child(arguments: Arguments, sender: Connection) -> None:
    # A terminal's Ctrl-C reaches the parent alone, which sends it on once.
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(UNAVAILABLE)

    Thread(target=end_with_parent, daemon=True).start()
    set_on_retry_hooks([warn_of_long_wait])
    sender.send(_run_to_exit_code(arguments))


def _run_to_exit_code(arguments: Arguments) -> int:
    try:
        weights_path = _weights_path(arguments.weights)
        checkpoint = _checkpoint(weights_path)
        run = _run(arguments, weights_path, checkpoint)
        metrics = _metrics(arguments.metrics_port)
        try:
            with display_of() as display:
                if checkpoint.demo:
                    display.say("the demo checkpoint knows coloured shapes and nothing else")
                display.say(f"run {run.run_id}, results in {run.folder}")
                ended = bulk_run(run, checkpoint, display, metrics)
        finally:
            metrics.close()
    except RunError as error:
        sys.stderr.write(f"sam3: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("sam3: interrupted; the same command goes on from here\n")
        return INTERRUPTED
    _show(ended, run)
    return SOME_FAILED if ended.failed else 0


def _weights_path(weights: str | None) -> str:
    """Absolute: the processes of the stages have other working folders."""
    if weights is None:
        weights = DEFAULT_WEIGHTS_PATH if Path(DEFAULT_WEIGHTS_PATH).exists() else DEMO
    return weights if weights == DEMO else str(Path(weights).absolute())


def _checkpoint(weights_path: str) -> Checkpoint:
    try:
        return find_checkpoint(weights_path)
    except WeightsError as error:
        raise WrongUsage(str(error)) from error


def _run(arguments: Arguments, weights_path: str, checkpoint: Checkpoint) -> Run:
    if not 1 <= arguments.shard_pictures <= MAX_SHARD_PICTURES:
        raise WrongUsage(
            f"--shard-pictures is {arguments.shard_pictures}: it must be 1 to {MAX_SHARD_PICTURES}"
        )
    settings = RunSettings(
        _prompts(arguments.prompts, checkpoint),
        _sha256(checkpoint.weights_file),
        score_threshold=arguments.score_threshold,
        refinement=arguments.refinement,
        write_masks=arguments.write_masks,
    )
    return Run(
        settings,
        images=source_of(arguments.images).uri,
        out=open_objects(arguments.out).uri,
        weights_path=weights_path,
        side_px=checkpoint.input_side_px,
        ray_address=arguments.ray_address,
        shard_pictures=arguments.shard_pictures,
        max_wait_s=arguments.max_wait_s,
        background=arguments.background,
    )


def _prompts(texts: tuple[str, ...], checkpoint: Checkpoint) -> tuple[str, ...]:
    """The prompts, each once."""
    tokenizer = PromptTokenizer(checkpoint.tokenizer_file)
    for text in texts:
        if not clean_prompt(text):
            raise WrongUsage("a prompt of --prompts is empty")
        try:
            tokenizer.check_length(text, name=f"the prompt {text!r}")
        except PromptTooLong as error:
            raise WrongUsage(str(error)) from error
    if not texts:
        raise WrongUsage("--prompts is missing: name what to find")
    return tuple(dict.fromkeys(texts))


def _metrics(port: int | None) -> RunMetrics:
    try:
        return RunMetrics(port)
    except OSError as error:
        raise WrongUsage(f"port {port} of --metrics-port cannot be used: {error.strerror}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _show(ended: Ended, run: Run) -> None:
    console = Console(highlight=False)
    if ended.summary is not None:
        console.print(summary_tables(ended.summary))
    console.print(
        f"{ended.plan.pictures:,} pictures, {ended.failed:,} failed. Results: {run.folder}",
        markup=False,
        soft_wrap=True,
    )
