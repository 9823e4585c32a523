"""A run from the arguments of the command to its exit code: checks them, runs, and prints how it ended."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from stamina.instrumentation import set_on_retry_hooks

from bulk.errors import SOME_FAILED, UNAVAILABLE, RunError, WrongUsage
from bulk.objects import open_objects
from bulk.objects.s3 import warn_of_long_wait
from bulk.progress import RunMetrics, display_of
from bulk.run import bulk_run
from bulk.settings import MAX_SHARD_PICTURES, Run, RunSettings
from bulk.sources import source_of
from bulk.summary import summary_tables
from sam3_runner.errors import DecoderFailed, PromptTooLong, WeightsError
from sam3_runner.prompts import PromptTokenizer, clean_prompt
from sam3_runner.weights.checkpoint import DEFAULT_WEIGHTS_PATH, DEMO, Checkpoint, find_checkpoint

if TYPE_CHECKING:
    from bulk.command import Arguments
    from bulk.run import Ended


def run_to_exit_code(arguments: Arguments) -> int:
    """Run, print, and return the exit code: see `bulk.errors`. Raises KeyboardInterrupt after Ctrl-C."""
    set_on_retry_hooks([warn_of_long_wait])
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
    except (OSError, DecoderFailed) as error:  # no space, memory, descriptors or processes
        sys.stderr.write(f"sam3: this machine cannot go on: {error}; start the same command again later\n")
        return UNAVAILABLE
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
