"""Measure the time to load the weights, the time to start the engine, and the memory that they take.

Each run is a new process. The file is read once before, so that it is in the page cache.

    python -m benchmarks.load --weights weights/sam3.pt    # or demo, or a transformers folder
    python -m benchmarks.load --weights random             # the full-size model, random weights
    --record appends to benchmarks/load.csv

load_s is the time of SAM3Predictor.load. ready_s is the time of the engine's start, with sha256 and warm-up,
without importing torch. host_peak_to_file is the increase of the peak resident memory while loading, divided
by the file's size (pages of a mapped file count). Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import platform
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

from benchmarks.table import machine_name, record
from sam3_runner import SAM3Error
from sam3_runner.serving.engine import Engine, EngineConfig
from sam3_runner.weights.checkpoint import find_checkpoint

RESULTS = Path(__file__).parent / "load.csv"
POLL_S = 0.01


def main() -> int:
    """Measure, print, and append to the CSV file if --record is given."""
    arguments = _parse()
    with tempfile.TemporaryDirectory() as folder:
        weights = arguments.weights
        if weights == "random":
            from benchmarks.parity import random_transformers_folder  # noqa: PLC0415 - imports torch

            weights = str(random_transformers_folder(Path(folder)))
        try:
            row = _measure(weights, arguments.device, arguments.runs)
        except SAM3Error as error:
            sys.exit(f"cannot load: {error}")
    row = {"measured": datetime.now(UTC).date().isoformat()} | row
    for name, value in row.items():
        sys.stdout.write(f"{name:20} {value}\n")
    if arguments.record:
        record(RESULTS, [row])
    return 0


def _measure(weights: str, device: str | None, runs: int) -> dict[str, object]:
    path = find_checkpoint(weights).weights_file
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")
    with ProcessPoolExecutor(
        max_workers=1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as new_process:
        loads = [new_process.submit(_load, weights, device).result() for _ in range(runs)]
        ready_s = [new_process.submit(_start_engine, weights, device).result() for _ in range(runs)]
    return {
        "device": loads[0]["device"],
        "host": machine_name(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "layout": loads[0]["layout"],
        "file_gb": round(path.stat().st_size / 1e9, 3),
        "runs": runs,
        "load_s": round(statistics.median(float(str(run["load_s"])) for run in loads), 2),
        "ready_s": round(statistics.median(ready_s), 2),
        "host_peak_to_file": round(max(float(str(run["peak"])) for run in loads) / path.stat().st_size, 3),
        "device_gb": loads[0]["device_gb"],
    }


def _load(weights: str, device: str | None) -> dict[str, object]:
    """Load once, in a new process."""
    import torch  # noqa: PLC0415 - in the child only

    from sam3_runner import SAM3Predictor  # noqa: PLC0415

    predictor = SAM3Predictor(weights, device)
    on_gpu = predictor.device.type == "cuda"
    if on_gpu:
        torch.zeros(1, device=predictor.device)  # creates the CUDA context before the measurement
    before = psutil.Process().memory_info().rss
    started_s = time.perf_counter()
    predictor.load()
    if on_gpu:
        torch.cuda.synchronize()
    load_s = time.perf_counter() - started_s
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "layout": predictor.layout,
        "load_s": load_s,
        "peak": _peak_bytes() - before,
        "device_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if on_gpu else "",
    }


def _peak_bytes() -> int:
    """Peak resident memory of this process; ru_maxrss starts from the parent's."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _start_engine(weights: str, device: str | None) -> float:
    import torch  # noqa: PLC0415 - imported before the clock starts

    import sam3_runner.predictor  # noqa: F401, PLC0415

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    engine = Engine(EngineConfig(weights, device))
    started_s = time.perf_counter()
    engine.start()
    while (status := engine.status()).state == "loading":
        time.sleep(POLL_S)
    if status.state == "error":
        raise SAM3Error(status.detail)
    return time.perf_counter() - started_s


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="demo", help="random, or as SAM3_WEIGHTS_PATH")
    parser.add_argument("--device", help="cuda or cpu; default: cuda if there is one")
    parser.add_argument("--runs", type=int, default=3, help="processes for each of the two measurements")
    parser.add_argument("--record", action="store_true", help=f"append to {RESULTS.name}")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
