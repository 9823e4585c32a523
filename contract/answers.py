"""The bodies of answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from contract.options import Output, Segmentation
from sam3_runner.instances import SCORE_THRESHOLD
from sam3_runner.metrics import STAGES
from sam3_runner.prompts import CONTEXT_TOKENS, MAX_PROMPT_CHARACTERS, MAX_PROMPTS


def _known_stage(name: str) -> str:
    if name not in STAGES:
        raise ValueError("is no stage")
    return name


StageName = Annotated[str, AfterValidator(_known_stage)]


Present = SkipJsonSchema[None]
"""A field of this type is left out of the answer rather than null."""

ALWAYS_PRESENT = ConfigDict(json_schema_serialization_defaults_required=True)
"""For an answer whose defaults are sent: the description says that its fields are never left out."""


class CocoRle(BaseModel):
    """A mask in COCO's compressed run lengths: column by column, zeros first."""

    size: tuple[int, int] = Field(description="height and width of the image, px")
    counts: str = Field(pattern=r"^[0-o]*$")


Polygons = list[list[list[tuple[float, float]]]]
"""Parts of a mask, each its outer ring and then its holes, as x, y in px."""


class InstanceModel(BaseModel):
    """One object that was found."""

    label: str = Field(description="the prompt that found it")
    score: float = Field(description=f"above the threshold, {SCORE_THRESHOLD} by default, to 1")
    box: tuple[float, float, float, float] = Field(
        description="x0, y0, x1, y1 in px of the image", examples=[[102.4, 88.1, 230.9, 216.0]]
    )
    area: int = Field(description="px of its mask")
    number: int | Present = Field(
        None, description="through all results of the answer, from 1; names it in label map, overlay and COCO"
    )
    segmentation: CocoRle | Polygons | Present = Field(None, description="as asked for by `segmentation`")
    mask_url: str | Present = Field(None, description="PNG of its mask alone, cropped to it")
    mask_offset: tuple[int, int] | Present = Field(
        None, description="left, top: place of this PNG in the image, px"
    )


class OutputUrls(BaseModel):
    """Where the files are that were asked for by `outputs`."""

    label_map: str | Present = Field(
        None,
        description="PNG of 8 or 16 bit: px are numbers of instances, 0 for none; higher score on top",
    )
    overlay: str | Present = Field(None, description="JPEG: a preview with outlines, boxes and scores")
    coco: str | Present = Field(None, description="JSON: COCO annotations of all instances")


class ModelFacts(BaseModel):
    """Which model answered."""

    checkpoint: str = Field(pattern=r"^[\w.@+-]{1,128}$", description="`demo`, or the name of the weights")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the file of the weights")
    version: str = Field(pattern=r"^[0-9A-Za-z.+-]{1,64}$", description="of the server")


class SettingsModel(BaseModel):
    """The settings that applied; those that are off are left out."""

    outputs: list[Output]
    tiles: int | Present = Field(None, description="tiles that were segmented besides the whole image")
    score_threshold: float
    score_thresholds: list[float] | Present = Field(None, description="of each prompt, where they differ")
    nms_iou: float | Present = None
    max_instances: int | Present = None
    min_area: int | Present = None
    fill_holes: int | Present = None
    remove_islands: int | Present = None
    segmentation: Segmentation | Present = None
    polygon_tolerance: float | Present = None


class AnswerFacts(BaseModel):
    """What the outermost part of an answer says beside its results."""

    outputs: OutputUrls | Present = Field(None, description="URLs of the files that were asked for")
    model: ModelFacts | Present = Field(None, description="which model answered")
    timings_ms: dict[StageName, float] | Present = Field(
        None,
        description="time of each stage of this request until its files were stored, ms. Stages may overlap; "
        "`segment` includes those of the model's process: `queue`, the wait for the pass, and of the pass, "
        "which requests may share, `encode_image`, `encode_text`, `decode_prompts`, `draw_masks`",
        examples=[{"claim": 1.2, "fetch": 0.6, "segment": 43.1, "queue": 1.4, "encode_image": 13.2}],
    )
    settings: SettingsModel | Present = Field(None, description="those that applied")
    left_out: list[Literal["segmentation"]] | Present = Field(
        None, description="what was asked for and exceeds the limit of an answer"
    )


class PromptAnswer(BaseModel):
    """Every instance of one prompt."""

    task_id: str
    mask_url: str = Field(description="PNG of the image's size, 0 or 255: the union of the instances")
    labels: list[str] = Field(description="the prompt if it was found, else nothing")
    inference_time_ms: float = Field(
        description="time of the model's pass that held this image; in a batch, the prompt's equal share"
    )
    confidence: float = Field(description="the best score, 0.0 when nothing was found")
    instances: list[InstanceModel] = Field(description="best score first")
    image_width: int = Field(description="px, as a viewer shows the image (EXIF orientation applied)")
    image_height: int
    presence: float | Present = Field(
        None, description="probability that the concept is in the image at all, whatever the threshold"
    )


class PredictResponse(AnswerFacts, PromptAnswer):
    """Every instance of one prompt, with the facts of its request unless it is part of a batch."""


class BatchAnswer(BaseModel):
    """The results of several prompts, in their order."""

    task_id: str
    results: list[PredictResponse]
    total_inference_time_ms: float


class BatchResponse(AnswerFacts, BatchAnswer):
    """The results of several prompts, in their order."""

    def of_only_prompt(self) -> PredictResponse:
        """The answer of predict: the only result, with the facts of the request."""
        facts = {name: getattr(self, name) for name in AnswerFacts.model_fields}
        return self.results[0].model_copy(update=facts)


class RunnerState(BaseModel):
    """The state of one of the model's processes and of its GPU."""

    state: Literal["ok", "loading", "error"]
    detail: str | Present = Field(None, description="what is going on, or wrong, unless the state is ok")
    gpu_name: str | Present = None
    vram_used_mb: int | Present = None
    vram_total_mb: int | Present = None


class Health(BaseModel):
    """The state of the model and of its GPUs; without `runners`, of the first process that is ready."""

    model_config = ConfigDict(protected_namespaces=())

    status: Literal["ok", "loading", "error"]
    model_loaded: bool
    detail: str | Present = Field(None, description="what is going on, or wrong, unless the status is ok")
    gpu_available: bool
    gpu_name: str | Present = None
    vram_used_mb: int | Present = None
    vram_total_mb: int | Present = None
    runners: list[RunnerState] = Field(description="one for each process of the model, on a GPU of its own")


class Limits(BaseModel):
    """What requests may hold."""

    model_config = ALWAYS_PRESENT

    max_image_bytes: int
    max_image_pixels: int
    max_prompts: int = MAX_PROMPTS
    max_prompt_characters: int = MAX_PROMPT_CHARACTERS
    max_prompt_tokens: int = CONTEXT_TOKENS
    image_formats: list[str] = ["image/png", "image/jpeg", "image/webp"]


class ModelInfo(BaseModel):
    """What is loaded."""

    model_config = ConfigDict(protected_namespaces=(), **ALWAYS_PRESENT)

    model_name: Literal["SAM3"] = "SAM3"
    model_version: str = Field(description="of this server")
    checkpoint: str = Field(description="`demo`, or the name of the weights")
    checkpoint_layout: Literal["official", "transformers"] = Field(
        description="of its file: official (`sam3.pt`) or transformers (`model.safetensors`)"
    )
    weights_sha256: str = Field(description="of the file that was loaded")
    demo: bool = Field(description="the embedded demo checkpoint: it knows coloured shapes only")
    parameters: int = Field(description="counted")
    weights_size_gb: float
    device: str
    dtype: str = Field(description="of the large matrix products; scores and boxes are float32")
    input_size: int = Field(description="side of the square that the model sees, px")
    score_threshold: float
    limits: Limits
    runners: list[RunnerState] = Field(description="one for each process of the model, on a GPU of its own")
