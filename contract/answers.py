"""The bodies of answers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sam3_runner.instances import SCORE_THRESHOLD
from sam3_runner.prompts import CONTEXT_TOKENS, MAX_PROMPT_CHARACTERS, MAX_PROMPTS


class InstanceModel(BaseModel):
    """One object that was found."""

    label: str = Field(description="the prompt that found it")
    score: float = Field(description=f"{SCORE_THRESHOLD} to 1")
    box: tuple[float, float, float, float] = Field(
        description="x0, y0, x1, y1 in px of the image", examples=[[102.4, 88.1, 230.9, 216.0]]
    )
    area: int = Field(description="px of its mask")


class PredictResponse(BaseModel):
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


class BatchResponse(BaseModel):
    """The results of several prompts, in their order."""

    task_id: str
    results: list[PredictResponse]
    total_inference_time_ms: float


class RunnerState(BaseModel):
    """The state of one of the model's processes and of its GPU."""

    state: Literal["ok", "loading", "error"]
    detail: str | None = Field(None, description="what is going on, or wrong, unless the state is ok")
    gpu_name: str | None = None
    vram_used_mb: int | None = None
    vram_total_mb: int | None = None


class Health(BaseModel):
    """The state of the model and of its GPUs; without `runners`, of the first process that is ready."""

    model_config = ConfigDict(protected_namespaces=())

    status: Literal["ok", "loading", "error"]
    model_loaded: bool
    detail: str | None = Field(None, description="what is going on, or wrong, unless the status is ok")
    gpu_available: bool
    gpu_name: str | None = None
    vram_used_mb: int | None = None
    vram_total_mb: int | None = None
    runners: list[RunnerState] = Field(description="one for each process of the model, on a GPU of its own")


class Limits(BaseModel):
    """What requests may hold."""

    max_image_bytes: int
    max_image_pixels: int
    max_prompts: int = MAX_PROMPTS
    max_prompt_characters: int = MAX_PROMPT_CHARACTERS
    max_prompt_tokens: int = CONTEXT_TOKENS
    image_formats: list[str] = ["image/png", "image/jpeg", "image/webp"]


class ModelInfo(BaseModel):
    """What is loaded."""

    model_config = ConfigDict(protected_namespaces=())

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
