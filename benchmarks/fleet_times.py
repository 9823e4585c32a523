"""The service times of the simulation (fleet.py), from measured closed loops of the server.

A lone caller shows what is around the model's pass, and a loaded server what a pass takes with all that comes
between two passes.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.fleet_plan import ServiceTimes
from benchmarks.load_figures import STAGES_ON_THE_DEVICE

if TYPE_CHECKING:
    from collections.abc import Mapping

SERVE_CSV = Path(__file__).parent / "serve.csv"
MODEL_CSV = Path(__file__).parent / "model.csv"
H100_VERSION, H100_LOADED_S = "this version", "5.0"
"""In serve.csv, the version and the seconds of the loops of the host whose open loops are recorded too."""
H100_TECHNIQUE = "kernel: group_norm"
"""The last technique of model.csv, with which the server runs."""


def times_of(
    lone: Mapping[str, object], loaded: Mapping[str, object], *, pass_share: float, slots: int = 24
) -> ServiceTimes:
    """The times of a server by two rows of closed loops, with the columns of serve.csv.

    Args:
        lone: one caller.
        loaded: enough callers that the model never waits.
        pass_share: constant time of a pass, in times of an image.
        slots: of all API workers.
    """
    stages_ms = _stages_ms(lone)
    device_ms = sum(stages_ms.get(stage, 0.0) for stage in STAGES_ON_THE_DEVICE)
    fetched_ms = max(stages_ms["claim"], stages_ms["fetch"])
    ended_ms = stages_ms["encode_masks"] + stages_ms["store"] + stages_ms["settle"]
    known_ms = fetched_ms + stages_ms["decode"] + stages_ms["segment"] + ended_ms
    # HTTP and the outbox, of which half is taken to be before the model.
    other_ms = max(0.0, float(str(lone["p50_ms"])) - known_ms)
    before_ms = fetched_ms + stages_ms["decode"] + stages_ms["segment"] - device_ms + other_ms / 2
    images = float(str(loaded["batch_mean"]))
    image_s = images / float(str(loaded["throughput_per_s"])) / (images + pass_share)
    return ServiceTimes(
        before_s=before_ms / 1000,
        pass_s=pass_share * image_s,
        image_s=image_s,
        after_s=(ended_ms + other_ms / 2) / 1000,
        slots=slots,
    )


def h100_rows() -> list[dict[str, str]]:
    """The loops in serve.csv of the host whose times are used: one caller, 16 callers, and the open loops."""
    with SERVE_CSV.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["version"] == H100_VERSION]
    loops = [row for row in rows if "H100" in row["hardware"] and row["scenario"] in {"closed", "open"}]
    of_host = [row for row in loops if row["seconds"] == H100_LOADED_S]
    return [next(row for row in loops if row["clients"] == "1"), *of_host]


def h100_times() -> ServiceTimes:
    """The times of one H100 host, random weights of the full size, 1920 x 1080 pictures, embedded stores."""
    lone, loaded, *_ = h100_rows()
    with MODEL_CSV.open(newline="", encoding="utf-8") as file:
        [model] = [row for row in csv.DictReader(file) if row["technique"] == H100_TECHNIQUE]
    one_ms, eight_ms = float(model["whole_1_ms"]), float(model["whole_8_ms"])
    # whole(n) = constant + n x image
    image_ms = (eight_ms - one_ms) / 7
    return times_of(lone, loaded, pass_share=(one_ms - image_ms) / image_ms)


def _stages_ms(row: Mapping[str, object]) -> dict[str, float]:
    pairs = (text.split("=") for text in str(row["stage_means_ms"]).split())
    return {stage: float(ms) for stage, ms in pairs}
