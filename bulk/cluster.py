"""Ray: one of this machine alone, or a cluster that exists; how many processes of each stage it can run."""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from bulk.errors import ClusterUnavailable
from sam3_runner.serving.cpu_share import cpu_share
from sam3_runner.serving.memory_limit import memory_limit_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bulk.settings import Run


ROOT = Path(__file__).parents[1]
STORE_BYTES_A_CPU = 2**28
"""Of Ray's store, for blocks of files and of results. Of 64 pictures of 1920 x 1080 px they have 30 and 17 MB
with one instance each; each further instance adds 17."""
MAX_STORE_SHARE = 0.3
"""Of the memory, as Ray's own default."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - Linux's, where Ray's store is if it fits
MAX_SHARED_SHARE = 0.9
"""Of the free shared memory: other programs use it too."""
LEAST_STORE_SHARE = 0.25
"""Shared memory must have room for this share of the wanted size; with less, the store is in /tmp."""
START_ATTEMPTS = 5
FETCH_A_GPU, DECODERS_A_GPU, WRITE_A_GPU = 2, 12, 8
"""Processes, at most. Together they may be more than there are CPUs: which of them has more to do depends on
the pictures and on what is found."""
CPUS_A_MODEL = 4
"""Where the model runs on CPUs."""
GPU_BATCH, CPU_BATCH = 8, 4
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
        decoders: processes that decode, of each model.
        fetch, write: processes.
        stage_cpus: of each of those.
    """

    models: int
    model_cpus: float
    model_gpus: int
    streams: int
    max_batch: int
    decoders: int
    fetch: int
    write: int
    stage_cpus: float

    def __str__(self) -> str:
        device = "GPU" if self.model_gpus else "CPU"
        return f"{self.models} on {device}, {self.models * self.decoders} decoding, {self.write} writing"

    @classmethod
    def of(cls, cpus: float, gpus: float) -> Sizes:
        """For a cluster of so many CPUs and GPUs."""
        if gpus >= 1:
            models = int(gpus)
            others = max(1, int(cpus) // models - 1)  # CPUs of each GPU
            fetch, write = FETCH_A_GPU * models, min(WRITE_A_GPU, others) * models
            decoders = min(DECODERS_A_GPU, others)
            stage_cpus = min(1.0, _share(cpus, fetch + write))
            return cls(models, 0.0, 1, 1, GPU_BATCH, decoders, fetch, write, stage_cpus)
        models = max(1, int(cpus // CPUS_A_MODEL))
        others = max(1, int(cpus) // 4)
        streams = max(1, int(cpus / models))
        stage_cpus, model_cpus = _share(cpus / 4, others), _share(cpus / 2, models)
        return cls(models, model_cpus, 0, streams, CPU_BATCH, 1, others, others, stage_cpus)


def _share(cpus: float, processes: int) -> float:
    """CPUs of each process, in the ten thousandths that Ray counts, rounded down: the last one would wait."""
    return math.floor(cpus / processes * 10_000) / 10_000


@dataclass(frozen=True, slots=True)
class Store:
    """Ray's store of blocks, on a machine without other nodes.

    Attributes:
        size_bytes: of the store.
        shared_bytes: free in shared memory; infinity where Ray does not use it.
    """

    size_bytes: int
    shared_bytes: float

    @classmethod
    def of(cls, cpus: int, memory_bytes: float, shared_bytes: float) -> Store:
        """For a machine of so many CPUs, so much memory, and so much room in /dev/shm."""
        wanted = int(min(cpus * STORE_BYTES_A_CPU, MAX_STORE_SHARE * memory_bytes))
        fits = shared_bytes >= LEAST_STORE_SHARE * wanted
        return cls(int(min(wanted, MAX_SHARED_SHARE * shared_bytes)) if fits else wanted, shared_bytes)

    @classmethod
    def of_this_machine(cls) -> Store:
        """For the CPUs and the memory that this process may use."""
        memory_bytes = min(psutil.virtual_memory().total, memory_limit_bytes())
        shared_bytes = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else math.inf
        return cls.of(cpu_share().threads, memory_bytes, shared_bytes)

    @property
    def warning(self) -> str | None:
        """What to change where blocks go through files; None: they are in memory."""
        if self.size_bytes <= self.shared_bytes:
            return None
        return (
            f"{SHARED_MEMORY} has room for {self.shared_bytes / 1e9:.1f} GB of {self.size_bytes / 1e9:.1f}: "
            "files and results go through /tmp, which may be slower; with Docker, --shm-size="
            f"{math.ceil(self.size_bytes / 1e9)}g makes room"
        )


@contextmanager
def ray_session(run: Run) -> Iterator[Sizes]:
    """Ray inside the block: the run's cluster, or one that ends with the block, or with this process.

    Raises:
        ClusterUnavailable: there is no Ray at the address, or none can be started.
    """
    # Before ray is imported: its processes have these. One arena and the system allocator keep less memory
    # that was freed: on two cores a run was 80 MB smaller, and no slower.
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    # Workers import our modules, and nothing is reported to anyone.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if run.ray_address is None:
        # Ray listens on all addresses: only processes of this user know its token. A cluster has its own way.
        os.environ["RAY_AUTH_MODE"] = "token"
    else:
        # Each try takes 40 s where no Ray answers, and Ray would try 20 times.
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Without it Ray does not start with more than 10 GB in /tmp. The run warns of a store there.
    os.environ["RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE"] = "1"
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

    attempts = START_ATTEMPTS if run.ray_address is None else 1
    for attempt in range(1, attempts + 1):
        try:
            _init_once(run)
        except Exception as error:  # Ray raises bare Exception too, after 30 s on a busy machine
            ray.shutdown()
            if attempt == attempts:
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
        object_store_memory=Store.of_this_machine().size_bytes,
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
