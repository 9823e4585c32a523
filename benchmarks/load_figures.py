"""Figures of a load: percentiles and throughput of its requests, and what the server reports about itself."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.process_tree import call_each, process_tree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.load_client import Outcome

STAGE_OF_A_TASK = ("claim", "fetch", "decode", "segment", "encode_masks", "store", "settle")
"""In their order; `fetch` runs beside `claim`."""
STAGES_OF_A_PASS = ("queue", "encode_image", "encode_text", "decode_prompts", "draw_masks")
"""Inside `segment`, in the runner."""
STAGES_ON_THE_DEVICE = STAGES_OF_A_PASS[1:]


def figures(runs: Sequence[Sequence[Outcome]], seconds: float) -> dict[str, object]:
    """Figures of requests of one kind.

    Args:
        runs: for each run, the outcomes of all requests of the kind. Latencies are of those that were due
            within the measured time and that have an answer of status 200, wherever they ended.
        seconds: measured time of each run. The throughput counts the answers of status 200 that came in it.
    """
    measured = [each for run in runs for each in run if 0 <= each.due_s < seconds]
    good = [each for each in measured if each.is_ok]
    answered = sum(each.is_ok and 0 <= each.ended_s < seconds for run in runs for each in run)
    errors = Counter(each.status for each in measured if not each.is_ok)
    return {
        "n": len(measured),
        **latencies([each.latency_ms for each in good]),
        "throughput_per_s": round(answered / seconds / len(runs), 2),
        "errors": " ".join(f"{status}={count}" for status, count in sorted(errors.items())),
        "inference_p50_ms": _median([each.inference_ms for each in good]),
        "rest_p50_ms": _median([each.latency_ms - each.inference_ms for each in good]),
        "masks_mean": round(statistics.mean(each.masks for each in good), 1) if good else "",
    }


def latencies(times_ms: Sequence[float]) -> dict[str, object]:
    """Percentiles (linear between two neighbours) and the highest; empty without a value."""
    if not times_ms:
        return dict.fromkeys(("p50_ms", "p95_ms", "p99_ms", "max_ms"), "")
    p50, p95, p99 = np.percentile(times_ms, (50, 95, 99))
    return {
        "p50_ms": round(float(p50), 1),
        "p95_ms": round(float(p95), 1),
        "p99_ms": round(float(p99), 1),
        "max_ms": round(max(times_ms), 1),
    }


def _median(values: Sequence[float]) -> object:
    return round(statistics.median(values), 1) if values else ""


@dataclass(frozen=True, slots=True)
class ServerMetrics:
    """Sums of /metrics since the server's start.

    Attributes:
        stage_s, stage_count: by stage.
        batch_requests, batches: of the model's passes.
        caches: hits and misses, by the metric's name and `hit` or `miss`.
    """

    stage_s: Counter[str] = field(default_factory=Counter)
    stage_count: Counter[str] = field(default_factory=Counter)
    batch_requests: float = 0.0
    batches: float = 0.0
    caches: Counter[tuple[str, str]] = field(default_factory=Counter)

    @classmethod
    def of(cls, text: str) -> ServerMetrics:
        """Read them from the text of /metrics."""
        stage_s, stage_count, batch = Counter[str](), Counter[str](), Counter[str]()
        caches = Counter[tuple[str, str]]()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                match sample.name:
                    case "sam3_stage_seconds_sum":
                        stage_s[sample.labels["stage"]] += sample.value  # type: ignore[assignment]
                    case "sam3_stage_seconds_count":
                        stage_count[sample.labels["stage"]] += int(sample.value)
                    case "sam3_batch_requests_sum" | "sam3_batch_requests_count":
                        batch[sample.name] += int(sample.value)
                    case name if name.startswith("sam3_") and name.endswith("_total"):
                        if "cache" in sample.labels:
                            caches[name.removesuffix("_total"), sample.labels["cache"]] += int(sample.value)
                    case _:
                        pass
        requests, passes = batch["sam3_batch_requests_sum"], batch["sam3_batch_requests_count"]
        return cls(stage_s, stage_count, requests, passes, caches)

    def __add__(self, other: ServerMetrics) -> ServerMetrics:
        return ServerMetrics(
            self.stage_s + other.stage_s,
            self.stage_count + other.stage_count,
            self.batch_requests + other.batch_requests,
            self.batches + other.batches,
            self.caches + other.caches,
        )

    def since(self, before: ServerMetrics, elapsed_s: float) -> dict[str, object]:
        """What was added after `before`, in `elapsed_s`.

        `device_share` is the time of the model's stages by the elapsed time: of a GPU, the share in which it
        was busy with them.
        """
        counts = self.stage_count - before.stage_count
        seconds = {stage: self.stage_s[stage] - before.stage_s[stage] for stage in counts}
        batches = self.batches - before.batches
        on_device_s = sum(seconds.get(stage, 0.0) for stage in STAGES_ON_THE_DEVICE)
        caches = self.caches - before.caches
        batch_requests = self.batch_requests - before.batch_requests
        return {
            "stage_means_ms": {stage: seconds[stage] / counts[stage] * 1000 for stage in counts},
            "batch_mean": round(batch_requests / batches, 2) if batches else "",
            "device_share": round(on_device_s / elapsed_s, 3) if batches else "",
            "caches": " ".join(
                f"{name}_{kind}={count:.0f}" for (name, kind), count in sorted(caches.items())
            ),
        }


def read_metrics(url: str, headers: dict[str, str]) -> ServerMetrics:
    """Read the metrics of a server."""
    response = httpx.get(f"{url}/metrics", headers=headers, timeout=60).raise_for_status()
    return ServerMetrics.of(response.text)


def resident_mb(pid: int) -> float:
    """Memory of a process and its descendants (PSS): a page that several share counts once."""
    return round(sum(call_each(process_tree(pid), lambda each: each.memory_full_info().pss)) / 1e6)


def timeline(means_ms: dict[str, float], mean_ms: float) -> list[str]:
    """The stages of one request as lines of text, in their order.

    Args:
        means_ms: mean time of each stage.
        mean_ms: of a whole request. What no stage covers (HTTP, checks, waits between stages) is "other".
    """

    def line(name: str, ms: float, begin_ms: float) -> str:
        per_px = 60 / max(mean_ms, 1e-9)
        bar = " " * round(begin_ms * per_px) + "#" * max(1, round(ms * per_px))
        return f"  {name:<18}{ms:8.1f} ms  {bar}"

    lines, begin_ms = [], 0.0
    for stage in STAGE_OF_A_TASK:
        if stage not in means_ms:
            continue
        lines.append(line(stage, means_ms[stage], begin_ms))
        if stage == "segment":
            inner_ms = begin_ms
            for inner in STAGES_OF_A_PASS:
                if inner in means_ms:
                    lines.append(line(f"  {inner}", means_ms[inner], inner_ms))
                    inner_ms += means_ms[inner]
        # The image is fetched while the row is claimed.
        begin_ms += 0.0 if stage == "claim" else means_ms[stage]
        if stage == "fetch":
            begin_ms += max(0.0, means_ms.get("claim", 0.0) - means_ms["fetch"])
    others = sorted(means_ms.keys() - {*STAGE_OF_A_TASK, *STAGES_OF_A_PASS})
    lines += [line(stage, means_ms[stage], 0.0) for stage in others]
    return [
        *lines,
        line("other", max(0.0, mean_ms - begin_ms), begin_ms),
        f"  {'whole':<18}{mean_ms:8.1f} ms",
    ]
