"""One predictor inside a server: it loads in the background and runs batches, with one outcome per request.

Does not import BentoML. Only the loading thread imports torch.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sam3_runner.errors import (
    DeadlineExceeded,
    DeviceFull,
    FeaturesNotHeld,
    HubUnavailable,
    InferenceFailed,
    ModelNotLoaded,
    RunnerStopped,
    SAM3Error,
)
from sam3_runner.images.decoded import DecodedImage
from sam3_runner.inference.device_errors import is_out_of_memory, out_of_memory_as, release_memory
from sam3_runner.inference.fitting_size import REDUCED_TIME_S, FittingSize
from sam3_runner.metrics import (
    BATCH_FALLBACKS,
    BATCH_REQUESTS,
    BATCH_SECONDS,
    StageTime,
    add_spans,
    observe,
)
from sam3_runner.serving.cpu_share import cpu_share
from sam3_runner.serving.kernel_cache import keep_kernels_in
from sam3_runner.weights.checkpoint import find_checkpoint, is_missing

if TYPE_CHECKING:
    from collections.abc import Callable

    from sam3_runner.inference.precision import DTypeSetting, Precision
    from sam3_runner.inference.staging import StagedImage
    from sam3_runner.instances import Results
    from sam3_runner.predictor import SAM3Predictor
    from sam3_runner.prompts import ConceptPrompt
    from sam3_runner.weights.checkpoint import HubSource

logger = logging.getLogger(__name__)

LOADING = "the model is loading"
DEVICE_LOST = "the model's device has failed: its process ends, and is started anew"
MAX_MASK_BYTES = 128 * 2**20
"""Of the masks of one prompt's instances, which are copied to the API worker: 200 that fill 5 MP each."""
FIRST_RETRY_WAIT_S, MAX_RETRY_WAIT_S = 1.0, 30.0
"""Between attempts to load where a retry may succeed: each wait is twice the one before."""
FULL_MEMORY_RETRY_S = 300.0
"""Attempts continue this long while the GPU's memory is full: a server may be about to stop and free it."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Configuration of the engine.

    Attributes:
        weights_path: as for `SAM3Predictor`.
        device: `cuda`, `cpu`, or None for cuda if there is one.
        cpu_threads: threads of one operation where the model runs on the CPU; None: one per core that this
            process may use.
        max_batch: most requests in one pass.
        dtype: as for `SAM3Predictor`.
        hub: source of the weights if nothing exists at their path; None: that is an error.
        kernel_cache: folder of the compiled kernels; None: Triton's default.
        max_feature_bytes: as for `SAM3Predictor`; None: `MAX_FEATURE_BYTES` of the device.
    """

    weights_path: str
    device: str | None = None
    cpu_threads: int | None = None
    max_batch: int = 8
    dtype: DTypeSetting | Precision = "auto"
    hub: HubSource | None = None
    kernel_cache: Path | None = None
    max_feature_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class SegmentRequest:
    """One image and its prompts.

    Attributes:
        prompts: whose texts have at most 32 tokens.
        deadline_s: on the clock of `time.monotonic`, which all processes of a host share.
        with_masks: the results are to hold each mask, in place of their union.
        sent_s: time of sending, on that clock.
        log_ids: fields for log lines about this request.
        trace_parent: context of its trace; empty where there is no trace.
    """

    image: DecodedImage | StagedImage
    prompts: list[ConceptPrompt]
    deadline_s: float
    with_masks: bool = False
    sent_s: float = field(default_factory=time.monotonic)
    log_ids: dict[str, str] = field(default_factory=dict)
    trace_parent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SegmentOutcome:
    """Exactly one of `results` and `error` is set.

    Attributes:
        results: one per prompt, in their order.
        error: a `SAM3Error`.
        inference_ms: time of the pass that this request shared.
        images: of that pass.
        is_held: the features of the image are held: a further request needs no pixels of it.
        stages_s: times of the request's wait and of the stages of its pass, in s.
    """

    results: Results | None = None
    error: SAM3Error | None = None
    inference_ms: float = 0.0
    images: int = 1
    is_held: bool = False
    stages_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Content of `/health` and `/api/v1/model/info`; the model's fields are None until it is loaded.

    Attributes:
        detail: a sentence unless the state is ok: the current step, or the error.
        max_stored_px: images of so many px are resized by the model's process; 0: none.
    """

    state: Literal["loading", "ok", "error"]
    detail: str | None = None
    checkpoint: str | None = None
    layout: Literal["official", "transformers"] | None = None
    demo: bool | None = None
    parameters: int | None = None
    weights_bytes: int | None = None
    weights_sha256: str | None = None
    input_side_px: int | None = None
    device: str | None = None
    dtype: str | None = None
    gpu_name: str | None = None
    vram_used_bytes: int | None = None
    vram_total_bytes: int | None = None
    max_stored_px: int = 0


class Engine:
    """One predictor, from loading to the last batch. On a GPU, `segment` runs in one thread at a time.

    Args:
        config: what to load, and how to run it.
        make_predictor: called as `SAM3Predictor` is; None: `SAM3Predictor`.
    """

    def __init__(
        self, config: EngineConfig, make_predictor: Callable[..., SAM3Predictor] | None = None
    ) -> None:
        self._config = config
        self._make_predictor = make_predictor
        self._fitting_batch = FittingSize(config.max_batch)
        self._on_device_lost: Callable[[], None] | None = None
        self._predictor: SAM3Predictor | None = None
        self._error: str | None = None
        self._progress = LOADING
        self._model_facts: dict[str, Any] = {}

    def start(
        self,
        on_failure: Callable[[], None] | None = None,
        on_device_lost: Callable[[], None] | None = None,
    ) -> None:
        """Load and warm up in the background; `ready` becomes true at the end.

        While the hub is unavailable, attempts continue without limit; while the GPU's memory is full, for
        five minutes. Any other error is final.

        Args:
            on_failure: called in the loading thread after a final error.
            on_device_lost: called once, when the device no longer works in this process. Nothing but a new
                process mends that.
        """
        self._on_device_lost = on_device_lost
        threading.Thread(target=self._load, args=(on_failure,), name="load-weights", daemon=True).start()

    @property
    def ready(self) -> bool:
        """The weights are loaded, the warm-up is done, and the device works."""
        return self._predictor is not None and self._error is None

    def status(self) -> EngineStatus:
        """The current state. Cheap: does not wait for a running batch."""
        if self._error is not None:
            return EngineStatus(state="error", detail=self._error)
        if self._predictor is None:
            return EngineStatus(state="loading", detail=self._progress)
        try:
            vram = _vram(self._predictor)
        except RuntimeError as error:
            # Between two batches as well: without this call no request would come, and nothing notice it.
            if not self._is_device_lost(self._predictor, error):
                raise
            return EngineStatus(state="error", detail=self._error)
        return EngineStatus(state="ok", **self._model_facts, **vram)

    def stage(self, request: SegmentRequest) -> SegmentRequest | SegmentOutcome:
        """Bring a request's image to the device. Runs in any thread, beside a batch. Never raises.

        Returns the request for `segment`, or its outcome if it cannot be run.
        """
        predictor = self._predictor
        if predictor is None or self._error is not None or not isinstance(request.image, DecodedImage):
            return request  # `segment` answers it
        try:
            return replace(request, image=predictor.stage(request.image))
        except OSError as error:
            logger.warning("the pixels of a request cannot be read: %s", error, extra=request.log_ids)
            return SegmentOutcome(error=InferenceFailed("the pixels of the image cannot be read"))
        except Exception as error:  # noqa: BLE001 - as in a pass: it is logged, or is the outcome
            if self._is_device_lost(predictor, error):
                return SegmentOutcome(error=RunnerStopped(DEVICE_LOST))
            return _failed(request, error, predictor)

    def segment(self, requests: list[SegmentRequest]) -> list[SegmentOutcome]:
        """One outcome per request, in their order. Never raises."""
        predictor = self._predictor
        if predictor is None:
            error = ModelNotLoaded(self._error or self._progress)
            return [SegmentOutcome(error=error) for _ in requests]
        refusals = _refusals(requests, predictor)
        pending = [request for request, refusal in zip(requests, refusals, strict=True) if refusal is None]
        outcomes = iter(self._run_batch(predictor, pending))
        return [refusal or next(outcomes) for refusal in refusals]

    def _run_batch(self, predictor: SAM3Predictor, requests: list[SegmentRequest]) -> list[SegmentOutcome]:
        """Run a batch, in passes of a size that fits in the memory."""
        outcomes: list[SegmentOutcome] = []
        while len(outcomes) < len(requests):
            part = requests[len(outcomes) : len(outcomes) + self._fitting_batch.current]
            part_outcomes, fitted = self._run_part(predictor, part)
            outcomes += part_outcomes
            if 0 < fitted < len(part):
                logger.warning(
                    "a batch of %d does not fit in the memory of %s: batches of %d for %.0f s; set "
                    "SAM3_MAX_BATCH=%d, or free the memory",
                    *(len(part), predictor.device, fitted, REDUCED_TIME_S, max(2, fitted)),
                )
                self._fitting_batch.reduce_to(fitted)
        return outcomes

    def _run_part(
        self, predictor: SAM3Predictor, requests: list[SegmentRequest]
    ) -> tuple[list[SegmentOutcome], int]:
        """Run requests in one pass, or in several where that fails, so that only the faulty one fails.

        Where the memory is full, in halves; after another error, each request separately; after the
        device has failed, no more. Returns the outcomes, and how many requests fitted in one pass: 0 where
        one of them does not fit alone, which says nothing of others.
        """
        if self._error is not None:
            return [SegmentOutcome(error=ModelNotLoaded(self._error)) for _ in requests], len(requests)
        try:
            return _run_pass(predictor, requests), len(requests)
        # torch raises any kind, and the other requests of the batch must not fail.
        except Exception as error:  # noqa: BLE001 - it is logged, or is the outcome
            if self._is_device_lost(predictor, error):
                # Each of them may be the cause: their tasks are retried alone, and not for ever.
                return [SegmentOutcome(error=RunnerStopped(DEVICE_LOST)) for _ in requests], len(requests)
            is_full = is_out_of_memory(error)
            if len(requests) == 1:
                return [_failed(requests[0], error, predictor)], 0 if is_full else 1
            logger.warning("a batch of %d failed (%s)", len(requests), type(error).__name__)
        # Outside of the handler, whose error holds the tensors of the failed pass.
        BATCH_FALLBACKS.inc()
        if is_full:
            release_memory()
        size = (len(requests) + 1) // 2 if is_full else 1
        parts = [
            self._run_part(predictor, requests[start : start + size])
            for start in range(0, len(requests), size)
        ]
        outcomes = [outcome for part_outcomes, _ in parts for outcome in part_outcomes]
        sizes = [fitted for _, fitted in parts]
        return outcomes, (max(sizes) if all(sizes) else 0) if is_full else len(requests)

    def _is_device_lost(self, predictor: SAM3Predictor, error: Exception) -> bool:
        """Whether the device no longer works after `error`; then this engine is not ready any more."""
        if isinstance(error, SAM3Error) or predictor.device_works():
            return False
        if self._error is None:
            self._error = DEVICE_LOST
            logger.critical(
                "%s has failed in this process: %s", predictor.device, str(error).partition("\n")[0]
            )
            if self._on_device_lost is not None:
                self._on_device_lost()
        return True

    def _load(self, on_failure: Callable[[], None] | None) -> None:
        try:
            self._predictor = self._load_with_retries()
        except SAM3Error as error:
            self._error = str(error)
            logger.error("the model cannot be loaded: %s", error)  # noqa: TRY400 - the message is complete
        except Exception as error:  # the thread ends here: the status must report any error
            self._error = f"the model cannot be loaded: {type(error).__name__}"
            logger.exception("the model cannot be loaded")
        if self._error is not None and on_failure is not None:
            on_failure()

    def _load_with_retries(self) -> SAM3Predictor:
        if self._config.kernel_cache is not None and self._config.device != "cpu":
            keep_kernels_in(self._config.kernel_cache)
        started_s = time.monotonic()
        wait_s = FIRST_RETRY_WAIT_S
        while True:
            try:
                return self._load_once()
            except HubUnavailable as error:
                self._progress = str(error)
            except DeviceFull as error:
                if time.monotonic() - started_s > FULL_MEMORY_RETRY_S:
                    raise
                self._progress = str(error)
            release_memory()
            logger.warning("the model is not loaded yet: %s; next attempt in %.0f s", self._progress, wait_s)
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, MAX_RETRY_WAIT_S)

    def _load_once(self) -> SAM3Predictor:
        import torch  # noqa: PLC0415 - only the runner's process may load it

        from sam3_runner.predictor import SAM3Predictor  # noqa: PLC0415

        torch.set_num_threads(self._config.cpu_threads or cpu_share().threads)
        if self._config.hub is not None and is_missing(self._config.weights_path):
            self._download(self._config.hub)
        self._report(LOADING)
        started_s = time.monotonic()
        checkpoint = find_checkpoint(self._config.weights_path)
        predictor = (self._make_predictor or SAM3Predictor)(
            self._config.weights_path,
            self._config.device,
            dtype=self._config.dtype,
            max_images=self._config.max_batch,
            max_feature_bytes=self._config.max_feature_bytes,
            max_mask_bytes=MAX_MASK_BYTES,
        )
        # The checksum of 3.4 GB takes seconds, so it is computed while the model loads.
        with ThreadPoolExecutor(max_workers=1) as executor:
            digest = executor.submit(_sha256, checkpoint.weights_file)
            predictor.load(self._report)
            self._model_facts = {
                "checkpoint": checkpoint.name,
                "layout": predictor.layout,
                "demo": checkpoint.demo,
                "parameters": predictor.parameters,
                "weights_bytes": checkpoint.weights_file.stat().st_size,
                "input_side_px": checkpoint.input_side_px,
                "device": str(predictor.device),
                "max_stored_px": predictor.max_stored_px,
            }
            self._report("the model is warming up")
            self._warm_up(predictor)
            self._model_facts["dtype"] = predictor.dtype
            self._model_facts["weights_sha256"] = digest.result()
        # What lives as long as the process is left out of later collections, which would stop a pass.
        gc.collect()
        gc.freeze()
        logger.info(
            "checkpoint %s (%s layout, sha256 %s) is ready on %s in %s after %.1f s%s",
            checkpoint.name,
            predictor.layout,
            self._model_facts["weights_sha256"],
            predictor.device,
            predictor.dtype,
            time.monotonic() - started_s,
            ": a demo, which knows coloured shapes and nothing else" if checkpoint.demo else "",
        )
        return predictor

    def _report(self, progress: str) -> None:
        self._progress = progress
        logger.info("%s", progress)

    def _download(self, hub: HubSource) -> None:
        from sam3_runner.weights.download import download  # noqa: PLC0415 - loads the hub's client, used once

        def report_progress(done_bytes: int, total_bytes: int) -> None:
            self._progress = (
                f"the weights are being downloaded: {done_bytes / 1e9:.2f} of {total_bytes / 1e9:.2f} GB"
            )

        download(Path(self._config.weights_path), hub, report_progress)

    def _warm_up(self, predictor: SAM3Predictor) -> None:
        """Run the smallest and the largest batch once, so that the first request is as fast as later ones.

        On a CPU only the smallest: a largest batch of the full-size model takes minutes there.

        Raises:
            DeviceFull: the memory has room for the weights, but not for such a batch.
            InferenceFailed: the output is not finite in any precision that may be used.
        """
        for images in (1, self._config.max_batch) if predictor.device.type == "cuda" else (1,):
            with out_of_memory_as(
                f"the memory of {predictor.device} is too full for a batch of {images} requests: free it, or "
                "set SAM3_MAX_BATCH lower"
            ):
                predictor.warm_up(images, self._report)


def _refusals(requests: list[SegmentRequest], predictor: SAM3Predictor) -> list[SegmentOutcome | None]:
    """The outcome of each request that cannot be run: one of them would fail the pass of all; else None."""
    now_s = time.monotonic()
    timely = [request for request in requests if request.deadline_s > now_s]
    with_pixels = {request.image.key for request in timely if request.image.has_pixels}

    def refusal(request: SegmentRequest) -> SegmentOutcome | None:
        if request.deadline_s <= now_s:
            return SegmentOutcome(error=DeadlineExceeded("the deadline passed while the request waited"))
        image = request.image
        if image.has_pixels or image.key in with_pixels or predictor.holds(image.key):
            return None
        return SegmentOutcome(error=FeaturesNotHeld("the features of this image are not held"))

    return [refusal(request) for request in requests]


def _run_pass(predictor: SAM3Predictor, requests: list[SegmentRequest]) -> list[SegmentOutcome]:
    """Run one pass. Raises what the predictor raises."""
    from sam3_runner.inference.pass_clock import PassClock  # noqa: PLC0415 - imports torch

    started_s = time.monotonic()
    clock = PassClock(predictor.device)
    results = predictor.segment_mixed(
        [(request.image, request.prompts) for request in requests],
        [request.with_masks for request in requests],
        clock,
        log_ids=[request.log_ids for request in requests],
    )
    elapsed_s = time.monotonic() - started_s
    BATCH_REQUESTS.observe(len(requests))
    BATCH_SECONDS.observe(elapsed_s)
    stages_s = _record_stages(requests, started_s, clock.times())
    return [
        SegmentOutcome(
            results=result,
            inference_ms=elapsed_s * 1000,
            images=len(requests),
            is_held=predictor.holds(request.image.key),
            stages_s=own_s,
        )
        for request, result, own_s in zip(requests, results, stages_s, strict=True)
    ]


def _failed(request: SegmentRequest, error: Exception, predictor: SAM3Predictor) -> SegmentOutcome:
    """The outcome of a request that failed alone."""
    if isinstance(error, SAM3Error):
        return SegmentOutcome(error=error)
    if is_out_of_memory(error):
        logger.error(
            "a request of %d prompts does not fit in the memory of %s",
            *(len(request.prompts), predictor.device),
            extra=request.log_ids,
        )
        return SegmentOutcome(
            error=InferenceFailed("the request does not fit in the memory of the model's device")
        )
    logger.error("inference failed", exc_info=error, extra=request.log_ids)
    return SegmentOutcome(error=InferenceFailed("the model failed on this image"))


def _record_stages(
    requests: list[SegmentRequest], started_s: float, times: list[StageTime]
) -> list[dict[str, float]]:
    """Observe the stages of a pass once, and add them to the trace of each request of the batch.

    Returns the times of each request: its own wait, and the stages of the pass, in s.
    """
    pass_s, stages_s = observe(times), []
    for request in requests:
        queue = StageTime("queue", request.sent_s, started_s)
        stages_s.append(observe([queue]) | pass_s)
        add_spans(request.trace_parent, [queue, *times], len(requests))
    return stages_s


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _vram(predictor: SAM3Predictor) -> dict[str, Any]:
    if predictor.device.type != "cuda":
        return {}
    import torch  # noqa: PLC0415 - loaded already

    free_bytes, total_bytes = torch.cuda.mem_get_info(predictor.device)
    return {
        "gpu_name": torch.cuda.get_device_name(predictor.device),
        "vram_used_bytes": total_bytes - free_bytes,
        "vram_total_bytes": total_bytes,
    }
