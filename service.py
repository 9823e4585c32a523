"""The Bento: the four routes, and the wiring of the three packages.

A request travels: key checked (gate.py) -> body validated (contract.py) -> pipeline.py: row claimed
(results), image fetched (storage), decoded, segmented (sam3_runner, in its own process), masks stored,
row settled -> answer. Errors climb untouched and become answers by one table (contract.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import bentoml
import stamina
from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import APIKeyHeader
from starlette.exceptions import HTTPException

import data_lock
import process_identity
from connections import Connections
from contract import (
    BatchRequest,
    BatchResponse,
    Failure,
    Health,
    Limits,
    ModelInfo,
    PredictRequest,
    PredictResponse,
    error_responses,
    framework_failure,
    invalid_request,
    unreadable_body,
)
from gate import Gate
from log_lines import escape_log_lines, log_as_json
from metrics import PROCESS_STARTS, count_by_route
from pipeline import Pipeline
from recovery import Recovery
from results import OUTBOX_FILE, ResultsError, SqliteResults, open_outbox, salvage_attempts
from sam3_runner import ModelNotLoaded, WeightsError
from sam3_runner.checkpoint import (
    SCORE_THRESHOLD,
    Checkpoint,
    HubSource,
    find_checkpoint,
    is_missing,
)
from sam3_runner.client import RunnerClient
from sam3_runner.cpu_share import cpu_share
from sam3_runner.engine import EngineConfig
from sam3_runner.errors import DeviceUnavailable
from sam3_runner.gpu import check_gpu
from sam3_runner.liveness import RunnerLife, leave_note
from sam3_runner.prompts import PromptTokenizer
from sam3_runner.runner import runner_service
from sam3_runner.supervision import end_server, leave_with, supervise, when_told_to_stop
from sam3_runner.weights_header import check_header
from settings import (
    Settings,
    SettingsError,
    freeze_settings,
    limit_threads,
    load_log_settings,
    load_settings,
    make_demo_key,
    overlooked_variables,
)
from storage import LocalFolder, StorageError
from tracing import trace_to
from version import VERSION
from volumes import check_writable

if TYPE_CHECKING:
    from pathlib import Path

    from results import Outbox, ResultStore
    from storage import ObjectStore

logger = logging.getLogger("bentoml.sam3")

STOP_MARGIN_S = 15.0
"""BentoML's own timeout lies this far behind ours, which settles the row and says what happened."""
RUNNER_NOTE = "runner.pid"
"""Says in DATA_DIR which process has the model."""


escape_log_lines()

# Retries are counted at /metrics; the stores log what fails in the end.
stamina.instrumentation.set_on_retry_hooks([stamina.instrumentation.PrometheusOnRetryHook])


def _settings_or_defaults() -> tuple[Settings, SettingsError | None]:
    """A Bento is built, and this module imported, where no secret is; who serves calls `_begin_to_serve`."""
    try:
        return load_settings(), None
    except SettingsError as error:
        return Settings.model_construct(), error


def _set_up_log() -> None:
    """In every process of the server, after BentoML's own, and before it can log anything of ours."""
    with contextlib.suppress(SettingsError):  # who reads all settings reports it
        if load_log_settings().logs_json:
            log_as_json()


def _begin_to_serve(process: str, *, stop_first: bool) -> None:
    """Never serve on defaults, nor without a supervisor. First of all in a process that serves."""
    _set_up_log()
    PROCESS_STARTS.labels(process).inc()
    if settings.otel_exporter_otlp_endpoint is not None:
        trace_to(settings.otel_exporter_otlp_endpoint, process=process, version=VERSION)
    if refusal is not None:
        logger.error("cannot serve: %s", refusal)
        end_server()
    supervisor = data_lock.holder(settings.data_dir)
    if supervisor:
        leave_with(lambda: process_identity.is_parent(supervisor), stop_first=stop_first)


def _begin_to_run_the_model() -> None:
    _begin_to_serve("runner", stop_first=False)
    leave_note(settings.data_dir / RUNNER_NOTE, process_identity.current())


def hub_source(settings: Settings) -> HubSource | None:
    """Where missing weights come from; None: no token, so nowhere."""
    token = settings.hf_token.get_secret_value() if settings.hf_token else ""
    return HubSource(settings.sam3_hf_repo, settings.sam3_hf_revision, token) if token else None


def expected_checkpoint(settings: Settings) -> Checkpoint:
    """What the runner has loaded or will load. Raises `WeightsError`."""
    return find_checkpoint(settings.sam3_weights_path, to_be_downloaded=hub_source(settings) is not None)


settings, refusal = _settings_or_defaults()

connections = Connections(settings.max_connections, settings.max_in_flight)
connections.install()

app = FastAPI(
    title="SAM3 inference backend",
    version=VERSION,
    description="Segments every instance of a text concept in an image, with Meta's SAM 3.",
    openapi_url="/docs.json",
    docs_url=None,
    redoc_url=None,
    # A redirect from /health/ to /health would name this host, by http, behind any proxy.
    redirect_slashes=False,
)

count_by_route(lambda: app.openapi()["paths"])

# Gate checks the key; this tells the documentation that there is one.
NEEDS_KEY = [Security(APIKeyHeader(name="X-API-Key", auto_error=False))]
PREDICT_ERRORS = error_responses(400, 401, 403, 404, 409, 413, 415, 429, 500, 502, 503, 504)

Sam3Runner = runner_service(
    EngineConfig(
        weights_path=settings.sam3_weights_path,
        device=settings.sam3_device,
        cpu_threads=settings.sam3_cpu_threads,
        max_batch=settings.sam3_max_batch,
        hub=hub_source(settings),
    ),
    timeout_s=settings.request_timeout_s + STOP_MARGIN_S,
    gpu=settings.wants_gpu,
    on_start=_begin_to_run_the_model,
)


@bentoml.service(
    name="sam3",
    workers=settings.api_workers,
    traffic={"timeout": settings.request_timeout_s + STOP_MARGIN_S},
    logging={"access": {"enabled": False}},
    # BentoML's probe asks the runner's socket, which is silent for minutes when the runner is dead.
    runner_probe={"enabled": False},
)
@bentoml.asgi_app(app)
class SegmentationService:
    """Text-prompted segmentation over HTTP."""

    runner = bentoml.depends(Sam3Runner)

    def __init__(self) -> None:
        _begin_to_serve("api_worker", stop_first=True)
        connections.apply()
        self._runner = RunnerClient(
            self.runner, RunnerLife(settings.data_dir / RUNNER_NOTE, process_identity.is_alive)
        )
        objects = open_storage(settings)
        self._outbox = outbox = open_tasks(settings, open_results(settings))
        self._pipeline = Pipeline(
            settings,
            expected_checkpoint(settings),
            objects=objects,
            outbox=outbox,
            runner=self._runner,
            model_version=VERSION,
        )
        self._recovery = Recovery(outbox, objects, self._runner, self._pipeline)

    @bentoml.on_deployment
    @staticmethod
    def announce() -> None:
        """Check everything once, before any process starts; say what will be used."""
        _set_up_log()
        try:
            checked = freeze_settings()
            check_device(checked)
            data_lock.hold(checked.data_dir)
            checkpoint = expected_checkpoint(checked)
            if is_missing(checked.sam3_weights_path):
                check_writable("SAM3_WEIGHTS_PATH", checkpoint.weights_file.parent)
            else:
                check_header(checkpoint.weights_file)
                PromptTokenizer(checkpoint.tokenizer_file)
            asyncio.run(check_stores(checked))
        except WeightsError as error:
            sys.exit(f"cannot start: SAM3_WEIGHTS_PATH: {error}")
        except (SettingsError, StorageError, ResultsError) as error:
            sys.exit(f"cannot start: {error}")
        for warning in overlooked_variables():
            logger.warning("%s", warning)
        supervise()
        share = cpu_share()
        threads = checked.sam3_cpu_threads or share.threads
        limit_threads(threads)
        logger.info("CPU: %s, threads of the model: %d", share, threads)
        if is_missing(checked.sam3_weights_path):
            logger.info(
                "weights: %s, to be downloaded from %s", checkpoint.weights_file, checked.sam3_hf_repo
            )
        else:
            logger.info("weights: %s", checkpoint.weights_file)
        if not checked.api_keys:
            # On stderr and not in the log: logs are shipped, and this is a secret, if a small one.
            sys.stderr.write(f"embedded demo: X-API-Key for this run is {make_demo_key()}\n")

    async def __is_ready__(self) -> bool:
        return (await self._runner.status()).state == "ok"

    @bentoml.on_startup
    async def start(self) -> None:
        """Get ready, and finish what an earlier server left behind."""
        # asyncio's own would have as many threads as the host has cores, and four.
        threads = ThreadPoolExecutor(cpu_share().threads + 4, thread_name_prefix="blocking")
        asyncio.get_running_loop().set_default_executor(threads)
        await self._pipeline.start()
        self._recovery.start()
        when_told_to_stop(self._begin_to_stop)

    async def _begin_to_stop(self) -> None:
        """At the signal, which is long before the last request has ended."""
        self._recovery.stop()
        await self._outbox.excuse()

    @bentoml.on_shutdown
    async def stop(self) -> None:
        """Finish what was claimed."""
        await self._begin_to_stop()
        await self._pipeline.close()

    @app.get("/health", tags=["state"], response_model_exclude_none=True)
    async def health(self) -> Health:
        """Is the model loaded, and how full is its GPU. Needs no key; always 200."""
        status = await self._runner.status()
        return Health(
            status=status.state,
            model_loaded=status.state == "ok",
            detail=status.detail,
            gpu_available=status.gpu_name is not None,
            gpu_name=status.gpu_name,
            vram_used_mb=_mb(status.vram_used_bytes),
            vram_total_mb=_mb(status.vram_total_bytes),
        )

    @app.post("/api/v1/predict", tags=["segmentation"], dependencies=NEEDS_KEY, responses=PREDICT_ERRORS)
    async def predict(self, body: PredictRequest, request: Request) -> PredictResponse:
        """Find every instance of one concept in an image; settle the task's row."""
        return (await self._pipeline.run(body, request.state.request_id)).results[0]

    @app.post(
        "/api/v1/predict/batch", tags=["segmentation"], dependencies=NEEDS_KEY, responses=PREDICT_ERRORS
    )
    async def predict_batch(self, body: BatchRequest, request: Request) -> BatchResponse:
        """Find several concepts in one image, which is fetched and encoded once; settle the task's row."""
        return await self._pipeline.run(body, request.state.request_id)

    @app.get(
        "/api/v1/model/info", tags=["state"], dependencies=NEEDS_KEY, responses=error_responses(401, 503)
    )
    async def model_info(self) -> ModelInfo:
        """What is loaded, and what requests may hold."""
        status = await self._runner.status()
        if status.state != "ok":
            raise Failure.of(ModelNotLoaded(status.detail or "the model is loading"))
        return ModelInfo(
            model_version=VERSION,
            checkpoint=status.checkpoint,
            checkpoint_layout=status.layout,
            weights_sha256=status.weights_sha256,
            demo=status.demo,
            parameters=status.parameters,
            weights_size_gb=round((status.weights_bytes or 0) / 1e9, 4),
            device=status.device,
            dtype=status.dtype,
            input_size=status.input_side_px,
            score_threshold=SCORE_THRESHOLD,
            limits=Limits(
                max_image_bytes=settings.max_image_bytes, max_image_pixels=settings.max_image_pixels
            ),
        )


# Around BentoML's routes as well as ours; the first is the outermost, so that pages may read refusals too.
if settings.allowed_origins:
    SegmentationService.add_asgi_middleware(  # type: ignore[attr-defined]
        CORSMiddleware,
        allow_origins=list(settings.allowed_origins),
        allow_methods=["GET", "POST"],
        allow_headers=["X-API-Key", "X-Request-ID", "Content-Type"],
        expose_headers=["X-Request-ID", "Retry-After"],
    )
SegmentationService.add_asgi_middleware(  # type: ignore[attr-defined]
    Gate,
    api_keys=settings.api_keys,
    access=settings.metrics_and_docs_access,
    max_body_bytes=settings.max_body_bytes,
)


@app.get("/", include_in_schema=False)
async def swagger_page() -> HTMLResponse:
    """Swagger UI from the assets that BentoML serves; BentoML's own page loads a tag manager."""
    return get_swagger_ui_html(
        openapi_url="docs.json",
        title=app.title,
        swagger_js_url="static_content/swagger-ui-bundle.js",
        swagger_css_url="static_content/swagger-ui.css",
        swagger_favicon_url="static_content/favicon-light-32x32.png",
    )


@app.exception_handler(Failure)
async def answer_failure(request: Request, failure: Failure) -> JSONResponse:
    """The body of every error."""
    body = failure.body(request.state.request_id).model_dump()
    return JSONResponse(body, status_code=failure.status, headers=failure.headers)


@app.exception_handler(RequestValidationError)
async def answer_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """A body that does not fit its model."""
    return await answer_failure(request, invalid_request(iter(error.errors())))


@app.exception_handler(HTTPException)
async def answer_http_error(request: Request, error: HTTPException) -> JSONResponse:
    """What the framework refuses by itself: a body that it cannot read (the cause says why), a method."""
    if error.status_code == HTTPStatus.BAD_REQUEST:
        return await answer_failure(request, unreadable_body(error.__cause__))
    allow = (error.headers or {}).get("Allow")
    return await answer_failure(request, framework_failure(error.status_code, allow))


def _openapi() -> dict[str, Any]:
    """FastAPI's description, without the 422 that this server never sends."""
    schema = FastAPI.openapi(app)
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    return schema


app.openapi = _openapi  # type: ignore[method-assign]


def check_device(settings: Settings) -> None:
    """Refuse a GPU that is asked for and cannot be used, with `SettingsError`; log why none will be used."""
    if settings.sam3_device == "cpu":
        return
    try:
        check_gpu()
    except DeviceUnavailable as error:
        if settings.sam3_device == "cuda":
            raise SettingsError(f"SAM3_DEVICE=cuda: {error}, or set SAM3_DEVICE=cpu") from None
        logger.info("the model runs on the CPU: %s", error)


async def check_stores(settings: Settings) -> None:
    """Prove that the stores can be used, or are only away; take up what a dead server left behind.

    Raises `SettingsError`, `StorageError`, `ResultsError`.
    """
    if not settings.uses_r2:
        check_writable("DATA_DIR", storage_folder(settings))
    objects, rows = open_storage(settings), open_results(settings)
    logger.info("storage: %s", objects.describe())
    logger.info("results: %s", rows.describe())
    salvage_attempts(outbox_path(settings))
    outbox = open_tasks(settings, rows)
    undelivered, waiting = await outbox.start_over()
    if undelivered or waiting:
        logger.info("outbox: %d rows to be settled, %d tasks to be begun again", undelivered, waiting)
    try:
        for warning in [*await objects.check(), *await rows.check()]:
            logger.warning("%s", warning)
    finally:
        await outbox.close()
        await objects.close()


def storage_folder(settings: Settings) -> Path:
    """Of images and masks, where no R2 is set."""
    return settings.data_dir / "storage"


def open_storage(settings: Settings) -> ObjectStore:
    """The store that the settings name. Raises `SettingsError`, `StorageError`."""
    if settings.r2_endpoint is None:
        return LocalFolder(storage_folder(settings), user_prefix_required=settings.user_prefix_required)
    from storage.r2 import R2Bucket  # noqa: PLC0415 - 22 MB a process, for who uses R2

    assert settings.r2_access_key_id is not None
    assert settings.r2_secret_access_key is not None
    try:
        return R2Bucket(
            endpoint=settings.r2_endpoint,
            bucket=settings.r2_bucket,
            access_key_id=settings.r2_access_key_id.get_secret_value(),
            secret_access_key=settings.r2_secret_access_key.get_secret_value(),
            public_base_url=settings.r2_public_base_url,
            image_url_bases=settings.r2_image_url_bases,
            user_prefix_required=settings.user_prefix_required,
        )
    except ValueError as error:
        raise SettingsError(str(error)) from None


def open_results(settings: Settings) -> ResultStore:
    """The rows that the settings name. Raises `SettingsError`, `ResultsError`."""
    if settings.supabase_url is None:
        return SqliteResults(settings.data_dir / "results.sqlite", lease_s=settings.lease_s)
    from results.supabase import SupabaseResults  # noqa: PLC0415 - 43 MB a process, for who uses Supabase

    assert settings.supabase_service_key is not None
    publishable_key = settings.supabase_publishable_key
    return SupabaseResults(
        settings.supabase_url,
        settings.supabase_service_key.get_secret_value(),
        lease_s=settings.lease_s,
        mask_column=settings.supabase_mask_column,
        publishable_key=publishable_key.get_secret_value() if publishable_key else None,
    )


def outbox_path(settings: Settings) -> Path:
    """The file of attempts."""
    return settings.data_dir / OUTBOX_FILE


def open_tasks(settings: Settings, rows: ResultStore) -> Outbox:
    """The rows, behind the file of attempts. Raises `ResultsError`."""
    return open_outbox(
        outbox_path(settings),
        rows,
        owner=process_identity.current(),
        is_alive=process_identity.is_alive,
        server_version=VERSION,
        lease_s=settings.lease_s,
        outage_limit_s=settings.outage_limit_s,
    )


def _mb(size_bytes: int | None) -> int | None:
    return None if size_bytes is None else size_bytes // 2**20
