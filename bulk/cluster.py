"""Ray: one of this machine alone, or a cluster that exists; how many processes of each stage it can run."""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bulk.errors import ClusterUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bulk.settings import Run


ROOT = Path(__file__).parents[1]
BLOCKS_A_MODEL = 8
"""Blocks of squares that may wait for one model, by their bytes."""
LEAST_STORE_BYTES = 160 * 2**20
START_ATTEMPTS = 5
PREPARE_SHARE = 0.75
"""Of the CPUs beside the models: decoding takes three times as long as the masks and rows."""
CPUS_A_MODEL = 4
"""Where the model runs on CPUs."""
GPU_BATCH, CPU_BATCH = 8, 2
"""Most pictures in one pass: on a CPU larger ones gain nothing, and take more memory."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many processes of each stage, and how many of Ray's CPUs each of them takes.

    Attributes:
        models: one a GPU; without a GPU, one for each few CPUs.
        model_cpus, model_gpus: of each.
        streams: batches that one model computes at once, on a CPU with one thread each: two threads for one
            operation wait for each other while another process has one of the cores.
        max_batch: most pictures in one pass.
        prepare, write: most processes; there is at least one.
        stage_cpus: of each of those.
    """

    models: int
    model_cpus: float
    model_gpus: int
    streams: int
    max_batch: int
    prepare: int
    write: int
    stage_cpus: float

    def __str__(self) -> str:
        device = "GPU" if self.model_gpus else "CPU"
        return f"{self.models} on {device}, up to {self.prepare} decoding, {self.write} writing"

    @classmethod
    def of(cls, cpus: float, gpus: float) -> Sizes:
        """For a cluster of so many CPUs and GPUs."""
        if gpus >= 1:
            models = int(gpus)
            others = max(2, int(cpus) - models)
            prepare = max(1, int(PREPARE_SHARE * others))
            return cls(
                models, 0.0, 1, 1, GPU_BATCH, prepare, max(1, others - prepare), min(1.0, cpus / others)
            )
        models = max(1, int(cpus // CPUS_A_MODEL))
        others = max(1, int(cpus) // 4)
        streams = max(1, int(cpus / models))
        return cls(models, cpus / 2 / models, 0, streams, CPU_BATCH, others, others, cpus / 4 / others)


@contextmanager
def ray_session(run: Run) -> Iterator[Sizes]:
    """Ray inside the block: the run's cluster, or one that ends with the block, or with this process.

    Raises:
        ClusterUnavailable: there is no Ray at the address, or none can be started.
    """
    # Before ray is imported. Workers import our modules, and nothing is reported to anyone.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray listens on all addresses: only processes of this user know its token.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Ray's own default is 15, so that any other program would slow a run down.
    os.environ["RAY_worker_niceness"] = "19" if run.background else "0"  # noqa: SIM112 - Ray's spelling
    import ray  # noqa: PLC0415 - takes seconds, and reads the environment

    with _ray_log() as log:
        _init(run, log)
        try:
            resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
            yield Sizes.of(resources.get("CPU", 1.0), resources.get("GPU", 0.0))
        finally:
            ray.shutdown()


def _init(run: Run, log: Path) -> None:
    import ray  # noqa: PLC0415 - see above

    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            _init_once(run)
        except Exception as error:  # Ray raises bare Exception too, after 30 s on a busy machine
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                where = "on this machine" if run.ray_address is None else f"at {run.ray_address}"
                reason = str(error).partition("\n")[0]
                raise ClusterUnavailable(
                    f"Ray cannot be used {where}: {reason} ({log} has its log)"
                ) from error
        else:
            return


def _init_once(run: Run) -> None:
    import ray  # noqa: PLC0415 - see above

    if run.ray_address is not None:
        ray.init(address=run.ray_address, log_to_driver=False, logging_level=logging.ERROR)
        return
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=max(LEAST_STORE_BYTES, BLOCKS_A_MODEL * run.block_bytes),
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


@contextmanager
def _ray_log() -> Iterator[Path]:
    """A file for what Ray prints, from C++ too; what we write to stderr goes on to the terminal."""
    with ExitStack() as stack:
        log = stack.enter_context(
            tempfile.NamedTemporaryFile("w", prefix="sam3-bulk-ray-", suffix=".log", delete=False)
        )
        terminal = stack.enter_context(os.fdopen(os.dup(2), "w", buffering=1))
        stack.callback(os.dup2, terminal.fileno(), 2)
        stack.enter_context(redirect_stderr(terminal))
        stack.enter_context(redirect_stdout(log))
        os.dup2(log.fileno(), 2)
        yield Path(log.name)
        Path(log.name).unlink()  # it is kept where the run has failed
