"""The Bento: the routes, and how the parts of the server are connected.

The path of a request through them: docs/architecture.md.
"""

from __future__ import annotations

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any
from uuid import uuid4

import bentoml
import stamina
from fastapi import FastAPI, Header, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import APIKeyHeader
from starlette.exceptions import HTTPException

import bentoml_patches
from bentoml_patches import (
    bento_services,
    dispatcher,
    gpu_count,
    protocols,
    route_metrics,
    runner_connections,
    swagger,
    timeouts,
)
from connections import Connections
from contract import (
    BatchRequest,
    BatchResponse,
    DeadlineMs,
    Failure,
    Health,
    Limits,
    ModelInfo,
    PredictRequest,
    PredictResponse,
    RunnerState,
    error_responses,
    framework_failure,
    invalid_request,
    unreadable_body,
)
from contract.description import drop_titles_of_fields
from contract.direct import DirectAnswer  # noqa: TC001 - FastAPI reads it
from contract.requests import EXAMPLE_OWNER, EXAMPLES
from direct import DirectPath
from direct_form import MAX_FORM_BYTES, form_schema, read_form
from direct_form import PATH as DIRECT_PATH
from gate import Gate
from observability.log_lines import escape_log_lines, log_info_of
from overload import OverloadCheck
from pipeline import Pipeline
from playground import FILES_LABEL, Playground
from playground import PATH as PLAYGROUND_PATH
from processes import identity
from processes.lifecycle import end_process_soon, end_server, on_stop_signal, outlive_siblings
from recovery import Recovery
from sam3_runner import ModelNotLoaded
from sam3_runner.images.decoders import ImageDecoders
from sam3_runner.instances import SCORE_THRESHOLD
from sam3_runner.prompts import PromptTokenizer
from sam3_runner.serving.client import RunnerClient
from sam3_runner.serving.cpu_share import cpu_share
from sam3_runner.serving.engine import EngineConfig, EngineStatus
from sam3_runner.serving.liveness import FAILED, RunnerLiveness, pids_in, write_identity
from sam3_runner.serving.pool import RunnerPool, overall_status
from sam3_runner.serving.runner import runner_service
from startup import (
    begin_on_gpu,
    begin_process,
    count_runners,
    expected_checkpoint,
    hub_source,
    prepare_deployment,
    settings_or_defaults,
    threads_of_runner,
)
from stores import open_results, open_storage, open_tasks
from version import VERSION

STOP_MARGIN_S = 15.0
"""BentoML's own timeout is so much longer than ours, which settles the row and says what happened."""
RUNNER_SERVICE = "sam3_runner_"
"""Begins the names of the runners' services, which end with their numbers."""

LOGGING_PARTS = (
    *(
        "bentoml_patches",
        "connections",
        "direct",
        "gate",
        "pipeline",
        "processes",
        "recovery",
        "results",
        "sam3_runner",
    ),
    *("startup", "storage"),
)
"""The parts whose log lines are shown from INFO on."""

bentoml_patches.check_versions()
escape_log_lines()
log_info_of(LOGGING_PARTS)
# Retries are counted at /metrics; the stores log what fails in the end.
stamina.instrumentation.set_on_retry_hooks([stamina.instrumentation.PrometheusOnRetryHook])

settings, refusal = settings_or_defaults()
runner_timeout_s = settings.request_timeout_s + STOP_MARGIN_S
connections = Connections(settings.max_connections, settings.max_in_flight)
overload = OverloadCheck()

bento_services.patch()
dispatcher.patch()
gpu_count.patch()
protocols.patch(connections.protocol)
timeouts.patch()

app = FastAPI(
    title="SAM3 inference backend",
    version=VERSION,
    description="Segments every instance of a text concept in an image, with Meta's SAM 3.",
    openapi_url="/docs.json",
    docs_url=None,
    redoc_url=None,
    # A redirect from /health/ to /health would name this host, by http, behind any proxy.
    redirect_slashes=False,
    # Generated clients name their operations by it.
    generate_unique_id_function=lambda route: route.name,
)

# The page is for people who send their own pictures: where that is off, there is no page.
page = Playground() if settings.serves_direct_api else None
if page is not None:
    app.router.routes.extend(page.routes)
page_labels = () if page is None else (PLAYGROUND_PATH, FILES_LABEL)

route_metrics.patch(lambda: [*app.openapi()["paths"], *page_labels])

# For the documentation; Gate checks the key.
NEEDS_KEY = [Security(APIKeyHeader(name="X-API-Key", auto_error=False))]
PREDICT_ERRORS = error_responses(
    *("INVALID_REQUEST", "AUTH_REQUIRED", "AUTH_INVALID", "FORBIDDEN", "IMAGE_NOT_FOUND", "TASK_NOT_FOUND"),
    *("TASK_IN_PROGRESS", "FILE_TOO_LARGE", "UNSUPPORTED_IMAGE", "UNSUPPORTED_MEDIA_TYPE", "OVERLOADED"),
    *("INFERENCE_FAILED", "INTERNAL_ERROR", "STORAGE_UNAVAILABLE", "RESULTS_UNAVAILABLE"),
    *("MODEL_NOT_LOADED", "DEADLINE_EXCEEDED"),
)
DeadlineHeader = Annotated[DeadlineMs, Header(alias="X-Deadline-Ms")]
DIRECT_ERRORS = error_responses(
    *("INVALID_REQUEST", "AUTH_REQUIRED", "AUTH_INVALID", "FILE_TOO_LARGE", "UNSUPPORTED_IMAGE"),
    *("UNSUPPORTED_MEDIA_TYPE", "OVERLOADED", "INFERENCE_FAILED", "INTERNAL_ERROR", "MODEL_NOT_LOADED"),
    "DEADLINE_EXCEEDED",
)
INFO_ERRORS = error_responses("AUTH_REQUIRED", "AUTH_INVALID", "MODEL_NOT_LOADED")


runner_count = count_runners(settings)
# In DATA_DIR: which processes have the model.
runner_files = [settings.data_dir / f"runner_{index}.pid" for index in range(runner_count)]


def _begin_runner(index: int) -> None:
    begin_process("runner", settings, refusal, stop_first=False)
    begin_on_gpu(settings, index)
    write_identity(runner_files[index], identity.current())
    outlive_siblings(runner_timeout_s, except_for=lambda: pids_in(runner_files))


def _give_up_runner(index: int) -> None:
    """End a runner whose model cannot be loaded: without another one the server ends too."""
    try:
        write_identity(runner_files[index], FAILED)
    finally:
        end_server()


runner_services = [
    runner_service(
        EngineConfig(
            weights_path=settings.sam3_weights_path,
            device=settings.sam3_device,
            cpu_threads=threads_of_runner(settings, runner_count),
            max_batch=settings.sam3_max_batch,
            dtype=settings.sam3_dtype,
            max_feature_bytes=settings.max_feature_bytes,
            hub=hub_source(settings),
            kernel_cache=settings.kernel_cache,
        ),
        name=f"{RUNNER_SERVICE}{index}",
        timeout_s=runner_timeout_s,
        on_start=partial(_begin_runner, index),
        on_failure=partial(_give_up_runner, index),
        on_device_lost=end_process_soon,
    )
    for index in range(runner_count)
]


@bentoml.service(
    name="sam3",
    workers=settings.api_worker_count,
    traffic={"timeout": runner_timeout_s},
    logging={"access": {"enabled": False}},
    # observability/tracing.py has ours. BentoML's are never exported, and took a quarter of a refusal's time.
    tracing={"excluded_urls": ".*"},
    # BentoML's probe calls the runner's socket, which does not answer for minutes when the runner is dead.
    runner_probe={"enabled": False},
)
@bentoml.asgi_app(app)
class SegmentationService:
    """Text-prompted segmentation over HTTP."""

    # BentoML finds what a service depends on by its attributes: runner_0, runner_1, ...
    locals().update({f"runner_{index}": bentoml.depends(each) for index, each in enumerate(runner_services)})

    def __init__(self) -> None:
        begin_process("api_worker", settings, refusal, stop_first=True)
        connections.apply()
        self._runner = RunnerPool([self._client_of(index) for index in range(runner_count)])
        objects = open_storage(settings)
        self._outbox = outbox = open_tasks(settings, open_results(settings))
        checkpoint = expected_checkpoint(settings)
        self._pipeline = Pipeline(
            settings,
            tokenizer=PromptTokenizer(checkpoint.tokenizer_file),
            objects=objects,
            outbox=outbox,
            runner=self._runner,
            decoders=ImageDecoders(side_px=checkpoint.input_side_px),
            model_version=VERSION,
            runners=runner_count,
        )
        self._direct = DirectPath(self._pipeline, outbox, VERSION)
        overload.pipeline, overload.direct = self._pipeline, self._direct
        self._recovery = Recovery(outbox, objects, self._runner, self._pipeline)

    def _client_of(self, index: int) -> RunnerClient:
        proxy = getattr(self, f"runner_{index}")
        runner_connections.patch(proxy)
        return RunnerClient(proxy, RunnerLiveness(runner_files[index], identity.is_alive), str(index))

    @bentoml.on_deployment
    @staticmethod
    def prepare() -> None:
        """Before any process starts."""
        prepare_deployment(runner_files, RUNNER_SERVICE)

    async def __is_ready__(self) -> bool:
        return (await self._runner.status()).state == "ok"

    @bentoml.on_startup
    async def start(self) -> None:
        """Start what tasks need, and finish what an earlier server left."""
        # asyncio's own executor would have as many threads as the host has cores, and four.
        threads = ThreadPoolExecutor(cpu_share().threads + 4, thread_name_prefix="blocking")
        asyncio.get_running_loop().set_default_executor(threads)
        await self._pipeline.start()
        app.openapi()  # is kept; the first request would wait 0.15 s for it
        # A full collection would visit all modules' objects each time, and hold all requests for 70 ms.
        gc.collect()
        gc.freeze()
        self._recovery.start()
        on_stop_signal(self._begin_to_stop)

    async def _begin_to_stop(self) -> None:
        """At the signal, long before the last request has ended."""
        self._recovery.stop()
        await self._outbox.prepare_stop()

    @bentoml.on_shutdown
    async def stop(self) -> None:
        """Finish what was claimed."""
        await self._begin_to_stop()
        await self._pipeline.close()

    @app.get("/health", tags=["state"], response_model_exclude_none=True)
    async def health(self) -> Health:
        """Is the model loaded, and how full are its GPUs. Needs no key; always 200."""
        statuses = await self._runner.statuses()
        status = overall_status(statuses)
        return Health(
            status=status.state,
            model_loaded=status.state == "ok",
            detail=status.detail,
            gpu_available=status.gpu_name is not None,
            gpu_name=status.gpu_name,
            vram_used_mb=_mb(status.vram_used_bytes),
            vram_total_mb=_mb(status.vram_total_bytes),
            runners=_runner_states(statuses),
        )

    @app.post(
        "/api/v1/predict",
        tags=["segmentation"],
        dependencies=NEEDS_KEY,
        responses=PREDICT_ERRORS,
        response_model_exclude_none=True,
    )
    async def predict(
        self, body: PredictRequest, request: Request, deadline_ms: DeadlineHeader = None
    ) -> PredictResponse:
        """Find every instance of one concept in an image; settle the task's row."""
        answer = await self._pipeline.run(body, request.state.request_id, deadline_ms)
        return answer.of_only_prompt()

    @app.post(
        "/api/v1/predict/batch",
        tags=["segmentation"],
        dependencies=NEEDS_KEY,
        responses=PREDICT_ERRORS,
        response_model_exclude_none=True,
    )
    async def predict_batch(
        self, body: BatchRequest, request: Request, deadline_ms: DeadlineHeader = None
    ) -> BatchResponse:
        """Find several concepts in one image, which is fetched and encoded once; settle the task's row."""
        return await self._pipeline.run(body, request.state.request_id, deadline_ms)

    @app.post(
        DIRECT_PATH,
        tags=["segmentation"],
        dependencies=NEEDS_KEY,
        responses=DIRECT_ERRORS,
        response_model_exclude_none=True,
        openapi_extra=form_schema(),
        include_in_schema=settings.serves_direct_api,
    )
    async def segment_directly(self, request: Request, deadline_ms: DeadlineHeader = None) -> DirectAnswer:
        """Find every instance of one concept in the image of the body; nothing is stored."""
        form, image = await read_form(request, settings.max_image_bytes)
        return await self._direct.run(form, image, request.state.request_id, deadline_ms)

    @app.get(
        "/api/v1/model/info",
        tags=["state"],
        dependencies=NEEDS_KEY,
        responses=INFO_ERRORS,
        response_model_exclude_none=True,
    )
    async def model_info(self) -> ModelInfo:
        """What is loaded, and what requests may hold."""
        statuses = await self._runner.statuses()
        status = overall_status(statuses)
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
            runners=_runner_states(statuses),
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
        allow_headers=["X-API-Key", "X-Request-ID", "X-Deadline-Ms", "Content-Type"],
        expose_headers=["X-Request-ID", "Retry-After"],
    )
SegmentationService.add_asgi_middleware(  # type: ignore[attr-defined]
    Gate,
    api_keys=settings.api_keys,
    access=settings.metrics_and_docs_access,
    max_body_bytes=settings.max_body_bytes,
    large_bodies={DIRECT_PATH: settings.max_image_bytes + MAX_FORM_BYTES},
    absent=() if settings.serves_direct_api else (DIRECT_PATH,),
    open_paths=() if page is None else page.paths,
    find_refusal=overload.find_refusal,
)


@app.get("/", include_in_schema=False)
async def swagger_ui() -> HTMLResponse:
    """Swagger UI over /docs.json."""
    return swagger.swagger_page("docs.json", app.title)


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
    for path, examples in EXAMPLES.items():
        content = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        # Fresh ids for each reader: a task is done once.
        content["examples"] = {
            name: {"value": {**EXAMPLE_OWNER, **fields, "task_id": str(uuid4())}}
            for name, fields in examples.items()
        }
    drop_titles_of_fields(schema)
    return schema


app.openapi = _openapi  # type: ignore[method-assign]


def _runner_states(statuses: list[EngineStatus]) -> list[RunnerState]:
    return [
        RunnerState(
            state=status.state,
            detail=status.detail,
            gpu_name=status.gpu_name,
            vram_used_mb=_mb(status.vram_used_bytes),
            vram_total_mb=_mb(status.vram_total_bytes),
        )
        for status in statuses
    ]


def _mb(size_bytes: int | None) -> int | None:
    return None if size_bytes is None else size_bytes // 2**20
