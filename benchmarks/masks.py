"""Measure what the kept masks of a picture cost: from mask logits on the device to instances on the host.

Times `find_instances` alone, for objects of 100 x 100 px (discs at random places) and for full-frame masks
(smooth noise: half of each picture is positive, in many pieces). Every row is the median and the highest time
of several calls after a warm-up, with the device idle before each. GPU memory is the peak of torch's tensors
with the logits; host memory is the growth of the resident memory at its peak, plus pinned memory. No weights
are needed.

    python -m benchmarks.masks                     # table; the GPU if there is one
    python -m benchmarks.masks --device cpu        # fewer masks
    python -m benchmarks.masks --out masks.csv     # also appends to the CSV file
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual alias

from benchmarks.table import machine_name, record
from sam3_runner.instances import Instance
from sam3_runner.masks.draw import KeptMasks, find_instances
from sam3_runner.masks.windows import Size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

GRID = 288
"""Side of the mask grid at SAM 3's full size."""

OBJECT_PX = 100
NOISE_CELLS = 8
"""Cells of the mask grid by one of the noise's."""

CPU_MASKS = 50
REPEATS = {"cpu": 5, "cuda": 30}
SEED = 0
MIB = 2**20


class Case(NamedTuple):
    """One row of the table."""

    width: int
    height: int
    masks: int


CASES = [
    *(Case(1920, 1080, masks) for masks in (1, 5, 50, 200)),
    *(Case(3840, 2160, masks) for masks in (1, 100)),
]


def objects(case: Case, generator: torch.Generator) -> Tensor:
    """Logits of discs of OBJECT_PX, inside the picture: (masks, GRID, GRID) fp32."""
    size = torch.tensor([case.width, case.height])
    centres = OBJECT_PX / 2 + torch.rand(case.masks, 2, generator=generator) * (size - OBJECT_PX)
    cells = (torch.arange(GRID) + 0.5) / GRID
    x, y = cells * case.width - centres[:, :1], cells * case.height - centres[:, 1:]
    return (OBJECT_PX / 2 - torch.hypot(x[:, None, :], y[:, :, None])) / 10


def noise(case: Case, generator: torch.Generator) -> Tensor:
    """Logits of smooth noise: (masks, GRID, GRID) fp32."""
    coarse = torch.randn(case.masks, 1, GRID // NOISE_CELLS, GRID // NOISE_CELLS, generator=generator)
    return F.interpolate(coarse, (GRID, GRID), mode="bicubic")[:, 0]


LOGITS: dict[str, Callable[[Case, torch.Generator], Tensor]] = {"objects": objects, "full-frame": noise}


def measure(kind: str, case: Case, device: torch.device) -> dict[str, object]:
    """One row of the table."""
    generator = torch.Generator().manual_seed(SEED)
    logits = LOGITS[kind](case, generator).to(device)
    scores = torch.rand(case.masks, generator=generator).numpy()
    boxes = torch.rand(case.masks, 4, generator=generator).numpy()
    kept = KeptMasks(range(case.masks), scores, boxes, logits, [case.masks], [Size(case.width, case.height)])
    _reset_peaks(device)
    before_mib = _resident_mib("VmRSS")
    find_instances(kept, [True])  # Not timed: the first call allocates memory.
    times_ms, bits = [], 0
    for _ in range(REPEATS[device.type]):
        _synchronize(device)
        start_s = time.perf_counter()
        [found] = find_instances(kept, [True])
        times_ms.append((time.perf_counter() - start_s) * 1000)
        bits = sum(len(each.mask.bits) for each in found.instances if isinstance(each, Instance))
        del found
    on_gpu = device.type == "cuda"
    pinned_mib = torch.cuda.host_memory_stats()["allocated_bytes.peak"] / MIB if on_gpu else 0.0
    return {
        "picture": f"{case.width} x {case.height}",
        "masks": case.masks,
        "kind": kind,
        "median_ms": round(statistics.median(times_ms), 3),
        "max_ms": round(max(times_ms), 3),
        "bits_mib": round(bits / MIB, 2),
        "gpu_peak_mib": round(torch.cuda.max_memory_allocated(device) / MIB) if on_gpu else "",
        "host_peak_mib": round(_resident_mib("VmHWM") - before_mib + pinned_mib),
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peaks(device: torch.device) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # 5 resets VmHWM.
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.reset_peak_host_memory_stats()


def _resident_mib(key: str) -> float:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def main() -> None:
    """Measure, print, and append to the CSV file if --out is given."""
    arguments = _parse()
    device = torch.device(arguments.device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else machine_name()
    sys.stdout.write(f"{machine}, torch {torch.__version__}\n")
    rows: list[dict[str, object]] = []
    for kind, case in itertools.product(LOGITS, CASES):
        if device.type == "cpu" and case.masks > CPU_MASKS:
            continue
        row = measure(kind, case, device)
        if not rows:
            sys.stdout.write(_line(row.keys()))
        sys.stdout.write(_line(row.values()))
        rows.append(
            {"measured": datetime.now(UTC).date(), "machine": machine, "torch": torch.__version__} | row
        )
    if arguments.out:
        record(arguments.out, rows)


def _line(cells: Iterable[object]) -> str:
    return "".join(f"{cell!s:>14}" for cell in cells) + "\n"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="append to this CSV file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
