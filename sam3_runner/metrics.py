"""Metrics of the model's side and of its callers, and the stages of a task as spans of its trace.

Every label has few values, all listed here. Each series starts at 0, so that rates are right from the start.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from opentelemetry import propagate, trace
from prometheus_client import Counter, Gauge, Histogram

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

STAGES: Final = (
    *("claim", "wait", "fetch", "decode", "preview", "segment", "merge_tiles", "refine"),  # in an API worker
    *("encode_masks", "render", "store", "settle"),
    *("queue", "encode_image", "encode_text", "decode_prompts", "draw_masks"),  # in the runner
)
"""`segment` is the call of the runner: it includes the runner's five stages."""

_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

STAGE_SECONDS = Histogram("sam3_stage_seconds", "Time of one stage of a task", ["stage"], buckets=_BUCKETS_S)
BATCH_REQUESTS = Histogram(
    "sam3_batch_requests", "Requests that shared one pass of the model", buckets=(1, 2, 4, 8, 16, 32, 64)
)
BATCH_SECONDS = Histogram(
    "sam3_batch_seconds", "Time of one pass of the model, masks included", buckets=_BUCKETS_S
)
BATCH_FALLBACKS = Counter(
    "sam3_batch_fallbacks", "Batches that failed, and were run again in halves or request by request"
)
PRECISION_FALLBACKS = Counter(
    "sam3_precision_fallbacks",
    "Requests whose output was not finite in float16, and that ran again in bfloat16",
)
TEXTS = Counter("sam3_texts", "Distinct prompts of passes, by whether their encoding was cached", ["cache"])
FEATURES = Counter("sam3_features", "Images of passes, by whether their features were held", ["cache"])
FEATURE_EVICTIONS = Counter("sam3_feature_evictions", "Images whose features made room for those of others")
FEATURE_BYTES = Gauge(
    "sam3_feature_bytes", "Memory of the features that are held", multiprocess_mode="livesum"
)
DECODER_KILLS = Counter("sam3_decoder_kills", "Image decoders that were killed, by a limit or by a crash")

# "mostrecent": every API worker reports the same of a runner. Runners are counted from 0.
MODEL_READY = Gauge(
    "sam3_model_ready", "1 while the model answers, else 0", ["runner"], multiprocess_mode="mostrecent"
)
GPU_MEMORY_BYTES = Gauge(
    "sam3_gpu_memory_bytes",
    "Memory of a runner's GPU: used by all processes, and in total; 0 on a CPU, and without a model",
    ["runner", "kind"],
    multiprocess_mode="mostrecent",
)

for _stage in STAGES:
    STAGE_SECONDS.labels(_stage)
for _cache in ("hit", "miss"):
    TEXTS.labels(_cache)
    FEATURES.labels(_cache)

_tracer: trace.Tracer = trace.NoOpTracer()
_request_s: ContextVar[dict[str, float] | None] = ContextVar("request_s", default=None)
"""The time of each stage of the request that is served, in s."""


@dataclass(frozen=True, slots=True)
class StageTime:
    """Start and end of a stage, on the clock of `time.monotonic`."""

    stage: str
    begin_s: float
    end_s: float


def trace_with(tracer: trace.Tracer) -> None:
    """Create spans for the stages from now on; without a tracer there are none."""
    global _tracer  # noqa: PLW0603 - one per process, as OpenTelemetry's own provider
    _tracer = tracer


def collect_request_s() -> dict[str, float]:
    """The time of each stage by its name, in s, of what the current asyncio task does from now on.

    The stages of tasks that it creates count too. A stage that is entered again adds its time.
    """
    collected: dict[str, float] = {}
    _request_s.set(collected)
    return collected


def add_request_s(stages_s: Mapping[str, float]) -> None:
    """Add times that another process has measured for the request that is served."""
    collected = _request_s.get()
    if collected is not None:
        for name, seconds in stages_s.items():
            collected[name] = collected.get(name, 0.0) + seconds


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Measure a stage of a task: one observation, and one span where the task is traced."""
    span = _tracer.start_span(name)
    begun_s = time.monotonic()
    # An error's message may hold private data; its type does not.
    with (
        STAGE_SECONDS.labels(name).time(),
        trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False),
    ):
        try:
            yield
        except Exception as error:
            span.set_status(trace.StatusCode.ERROR, type(error).__name__)
            raise
        finally:
            add_request_s({name: time.monotonic() - begun_s})


def trace_parent() -> dict[str, str]:
    """Context of the caller's trace, to send to another process; empty where there is no trace."""
    carrier: dict[str, str] = {}
    if trace.get_current_span().is_recording():
        propagate.inject(carrier)
    return carrier


def observe(times: Iterable[StageTime]) -> dict[str, float]:
    """Observe each stage of one pass of the model once, with the sum of its parts; returns these, in s."""
    totals: dict[str, float] = {}
    for each in times:
        totals[each.stage] = totals.get(each.stage, 0.0) + each.end_s - each.begin_s
    for name, seconds in totals.items():
        STAGE_SECONDS.labels(name).observe(seconds)
    return totals


def add_spans(parent: Mapping[str, str], times: Iterable[StageTime], batch_requests: int) -> None:
    """Add finished stages to the trace of a `trace_parent` that another process sent.

    Args:
        parent: its context; nothing is added to an empty one.
        times: of the stages.
        batch_requests: how many requests shared the pass.
    """
    if not parent:
        return
    context = propagate.extract(parent)
    epoch_s = time.time() - time.monotonic()
    for each in times:
        span = _tracer.start_span(
            each.stage,
            context,
            attributes={"sam3.batch_requests": batch_requests},
            start_time=round((each.begin_s + epoch_s) * 1e9),
        )
        span.end(round((each.end_s + epoch_s) * 1e9))
