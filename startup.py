"""What happens before the server serves: the checks before its first process, and each process' own start."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bentoml_patches import supervisor
from contract.requests import EXAMPLE_IMAGE_KEY
from observability.log_lines import log_as_json
from observability.metrics import PROCESS_STARTS
from observability.tracing import trace_to
from processes import data_lock, identity
from processes.lifecycle import end_server, end_with_supervisor
from processes.volumes import check_writable, unwritable
from results import ResultsError, salvage_attempts
from sam3_runner import WeightsError
from sam3_runner.errors import DeviceUnavailable
from sam3_runner.prompts import PromptTokenizer
from sam3_runner.serving.cpu_share import cpu_share
from sam3_runner.serving.gpu import count_gpus, take_gpu
from sam3_runner.serving.liveness import reserve
from sam3_runner.weights.checkpoint import Checkpoint, HubSource, find_checkpoint, is_missing
from sam3_runner.weights.header import check_header
from settings import (
    Settings,
    SettingsError,
    freeze_device,
    freeze_settings,
    limit_child_processes,
    load_log_settings,
    load_settings,
    make_demo_key,
    named_gpus,
    overlooked_variables,
)
from storage import LocalFolder, StorageError
from stores import open_results, open_storage, open_tasks, outbox_path, storage_folder
from version import VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from results import ResultStore
    from storage import ObjectStore

logger = logging.getLogger(__name__)

SAMPLE_FILE = Path(__file__).parent / "examples" / "sample.jpg"


def settings_or_defaults() -> tuple[Settings, SettingsError | None]:
    """The settings, or defaults with the error that they have.

    A Bento is built, and service.py imported, where no secret is. A process that serves calls
    `begin_process`, which refuses defaults.
    """
    try:
        return load_settings(), None
    except SettingsError as error:
        return Settings.model_construct(), error


def count_runners(settings: Settings) -> int:
    """How many runners the server has: `GPUS`, which `freeze_settings` makes a number for later processes."""
    if settings.gpus != "auto":
        return settings.gpus
    if settings.sam3_device == "cpu":
        return 1
    try:
        return count_gpus(named_gpus())
    except DeviceUnavailable:
        return 1


def threads_of_runner(settings: Settings, runners: int) -> int:
    """Threads of the model in each runner: the cores are divided among them."""
    return settings.sam3_cpu_threads or max(1, cpu_share().threads // runners)


def begin_process(name: str, settings: Settings, refusal: SettingsError | None, *, stop_first: bool) -> None:
    """Set up log, metrics and traces of a process that serves, and end it with its supervisor.

    Args:
        name: of the process, for metrics and traces.
        settings: of `settings_or_defaults`.
        refusal: the error in the settings; it ends the server.
        stop_first: whether a process whose supervisor has died begins a clean stop at once.
    """
    _set_up_log()
    PROCESS_STARTS.labels(name).inc()
    if settings.otel_exporter_otlp_endpoint is not None:
        trace_to(settings.otel_exporter_otlp_endpoint, process=name, version=VERSION)
    if refusal is not None:
        logger.error("cannot serve: %s", refusal)
        end_server()
    holder = data_lock.holder(settings.data_dir)
    if holder:
        end_with_supervisor(lambda: identity.is_parent(holder), stop_first=stop_first)


def begin_on_gpu(settings: Settings, index: int) -> None:
    """Give a runner's process its GPU, before it imports torch. Nothing changes where it has none."""
    if settings.sam3_device != "cpu":
        take_gpu(index, named_gpus())


def prepare_deployment(runner_files: Sequence[Path], runner_service: str) -> None:
    """Check settings, device, weights and stores once, before the first process starts; log what is used.

    It also holds the lock of DATA_DIR for the life of this process, takes over the attempts that an earlier
    server left, and patches the supervisor. What is wrong ends the process with a sentence.

    Args:
        runner_files: one for each of `count_runners`, in DATA_DIR: which process has the model.
        runner_service: begins the names of their services.
    """
    runners = len(runner_files)
    _set_up_log()
    try:
        settings = freeze_settings(runners)
        _check_device(settings)
        data_lock.hold(settings.data_dir)
        _reserve(runner_files)
        checkpoint = _check_weights(settings)
        asyncio.run(_prepare_stores(settings))
    except WeightsError as error:
        sys.exit(f"cannot start: SAM3_WEIGHTS_PATH: {error}")
    except (SettingsError, StorageError, ResultsError) as error:
        sys.exit(f"cannot start: {error}")
    for warning in overlooked_variables():
        logger.warning("%s", warning)
    supervisor.patch(interchangeable=runner_service)
    _limit_model_threads(settings, runners)
    _log_weights(settings, checkpoint)
    if not settings.api_keys:
        _print_demo_key(settings)


def _print_demo_key(settings: Settings) -> None:
    """Make the key of this run and print it, and the address of the page to try it on.

    On stderr and not in the log: logs are shipped to other hosts, and this is a secret.
    """
    key, port = make_demo_key(), supervisor.named_port()
    sys.stderr.write(f"embedded demo: X-API-Key for this run is {key}\n")
    if settings.serves_direct_api and port is not None:
        sys.stderr.write(f"embedded demo: try it at http://127.0.0.1:{port}/playground#key={key}\n")


def hub_source(settings: Settings) -> HubSource | None:
    """Where missing weights are downloaded from; None without a token."""
    source = settings.hub_source
    return source if source.token else None


def expected_checkpoint(settings: Settings) -> Checkpoint:
    """What the runner has loaded or will load. Raises `WeightsError`."""
    return find_checkpoint(settings.sam3_weights_path, to_be_downloaded=hub_source(settings) is not None)


def _set_up_log() -> None:
    """Write JSON where LOG_FORMAT says so. In every process, after BentoML has set up its own log."""
    with contextlib.suppress(SettingsError):  # the loading of all settings reports it
        if load_log_settings().logs_json:
            log_as_json()


def _reserve(runner_files: Sequence[Path]) -> None:
    """Make the files now, so that a disk that is full later keeps no runner from starting."""
    for file in runner_files:
        try:
            reserve(file)
        except OSError as error:
            raise unwritable("DATA_DIR", file, error) from None


def _check_device(settings: Settings) -> None:
    """Raise `SettingsError` for GPUs that are asked for and cannot be used; log why none will be used."""
    if settings.sam3_device == "cpu":
        return
    try:
        gpus = count_gpus(named_gpus())
    except DeviceUnavailable as error:
        if settings.sam3_device == "cuda":
            raise SettingsError(f"SAM3_DEVICE=cuda: {error}, or set SAM3_DEVICE=cpu") from None
        logger.info("the model runs on the CPU: %s", error)
        return
    if settings.gpus != "auto" and settings.gpus > gpus:
        raise SettingsError(
            f"GPUS={settings.gpus}, but the number of GPUs that this server may use is {gpus}: set "
            "GPUS=auto, or give it more (--gpus all, CUDA_VISIBLE_DEVICES)"
        )
    freeze_device("cuda")


def _check_weights(settings: Settings) -> Checkpoint:
    """The checkpoint, with a readable header and tokenizer, or a folder that it can be downloaded to."""
    checkpoint = expected_checkpoint(settings)
    if is_missing(settings.sam3_weights_path):
        check_writable("SAM3_WEIGHTS_PATH", checkpoint.weights_file.parent)
    else:
        check_header(checkpoint.weights_file)
        PromptTokenizer(checkpoint.tokenizer_file)
    return checkpoint


async def _prepare_stores(settings: Settings) -> None:
    """Check that the stores can be used, or are only away; take over the attempts that a dead server left.

    Raises `SettingsError`, `StorageError`, `ResultsError`.
    """
    if not settings.uses_r2:
        check_writable("DATA_DIR", storage_folder(settings))
    if settings.is_demo:
        _store_sample(settings)
    objects, rows = open_storage(settings), open_results(settings)
    logger.info("storage: %s", objects.describe())
    logger.info("results: %s", rows.describe())
    salvage_attempts(outbox_path(settings))
    outbox = open_tasks(settings, rows)
    undelivered, waiting = await outbox.reset_after_restart()
    if undelivered or waiting:
        logger.info("outbox: %d rows to be settled, %d tasks to be started again", undelivered, waiting)
    try:
        await _check_access(objects, rows)
    finally:
        await outbox.close()
        await objects.close()


def _store_sample(settings: Settings) -> None:
    """Store the image that the documentation's examples name. A Bento has no sample."""
    if SAMPLE_FILE.exists():
        folder = LocalFolder(storage_folder(settings))
        folder.put_upload(EXAMPLE_IMAGE_KEY, SAMPLE_FILE.read_bytes())


async def _check_access(objects: ObjectStore, rows: ResultStore) -> None:
    for warning in [*await objects.check(), *await rows.check()]:
        logger.warning("%s", warning)


def _limit_model_threads(settings: Settings, runners: int) -> None:
    threads = threads_of_runner(settings, runners)
    limit_child_processes(threads)
    logger.info("CPU: %s, threads of the model: %d, runners: %d", cpu_share(), threads, runners)


def _log_weights(settings: Settings, checkpoint: Checkpoint) -> None:
    if is_missing(settings.sam3_weights_path):
        logger.info("weights: %s, to be downloaded from %s", checkpoint.weights_file, settings.sam3_hf_repo)
    else:
        logger.info("weights: %s", checkpoint.weights_file)
