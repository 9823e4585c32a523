"""The models that parity.py compares ours with: Meta's code, and transformers.

Both are imported only when they are used. Meta's code is the PyPI package sam3, under the SAM License; this
repository contains none of it. It needs a CUDA GPU, and CLIP's vocabulary, which its wheel does not include;
our tokenizer.json contains it.
"""

from __future__ import annotations

import copy
import gzip
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's usual name
from PIL import Image

from sam3_runner import SAM3Predictor
from sam3_runner.images.decoded import MAX_STORED_PX
from sam3_runner.images.square import from_pillow
from sam3_runner.inference.staging import Stager
from sam3_runner.prompts import ConceptPrompt, PromptTokenizer
from sam3_runner.weights.checkpoint import CLIP_TOKENIZER_FILE

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Kept:
    """One kept query: its score, box x0 y0 x1 y1 in px, and mask (H, W) bool of the image."""

    score: float
    box: tuple[float, ...]
    mask: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer for one prompt in one image.

    Attributes:
        kept: the kept queries, by their number.
        scores: (Q,), of all queries; empty for our model, which returns the kept ones only.
    """

    kept: dict[int, Kept]
    scores: list[float] = field(default_factory=list)


class Model(Protocol):
    """A model that answers prompts on an image, in one precision."""

    name: str
    dtype: Dtype

    def segment(self, image: Image.Image, prompt: ConceptPrompt, threshold: float) -> Answer:
        """Find `prompt` in the RGB `image`; keeps queries with a score above `threshold`."""
        ...


class Ours:
    """Our model, called through SAM3Predictor."""

    name = "ours"

    def __init__(self, weights: str, device: str, dtype: Dtype) -> None:
        self.dtype = dtype
        self.predictor = SAM3Predictor(weights, device, dtype=dtype)
        self.predictor.load()

    def segment(self, image: Image.Image, prompt: ConceptPrompt, threshold: float) -> Answer:
        """See `Model`."""
        self.predictor.score_threshold = threshold
        [result] = self.predictor.predict_batch(image, [prompt])
        kept = {}
        for instance in result.instances:
            mask = np.zeros((result.image_height, result.image_width), dtype=bool)
            mask[instance.mask.window] = instance.mask.array()
            kept[instance.query] = Kept(instance.score, instance.box, mask)
        return Answer(kept)


class Official:
    """Meta's Sam3Processor with Meta's model.

    Args:
        weights_file: a `sam3.pt`; None: the model's initial weights.
        device: `cuda`.
        compile: Meta's option to compile the model.

    Attributes:
        dtype: float32; bfloat16 is autocast over fp32 weights, as in Meta's notebooks.
        own_resize: True: Meta's code resizes the image. False: it gets our model's square, so that only the
            models differ.
    """

    name = "official"
    dtype: Dtype = "float32"
    own_resize = False

    def __init__(self, weights_file: Path | None, device: str, *, compile: bool = False) -> None:  # noqa: A002 - Meta's name
        from sam3.model.sam3_image_processor import Sam3Processor  # noqa: PLC0415 - an optional package
        from sam3.model_builder import build_sam3_image_model  # noqa: PLC0415

        self._device = device
        self.model: Any = build_sam3_image_model(
            bpe_path=str(_vocabulary_file()),
            device=device,
            checkpoint_path=None if weights_file is None else str(weights_file),
            load_from_HF=False,
            compile=compile,
        )
        # Importing it enables TF32 for the whole process.
        exact_float32()
        self._processor = Sam3Processor(self.model, device=device)

    def variant(self, *, dtype: Dtype = "float32", own_resize: bool = False) -> Official:
        """The same model with another precision or resize."""
        other = copy.copy(self)
        other.dtype, other.own_resize = dtype, own_resize
        return other

    def segment(self, image: Image.Image, prompt: ConceptPrompt, threshold: float) -> Answer:
        """See `Model`."""
        self._processor.confidence_threshold = threshold
        side_px: int = self._processor.resolution
        seen = (
            image
            if self.own_resize
            else Image.fromarray(our_square(image, side_px, self._device).cpu().numpy())
        )
        with _autocast(self._device, self.dtype):
            state = self._processor.set_image(seen)
            state["original_width"], state["original_height"] = image.size
            with _Outputs(self.model) as outputs:
                if prompt.text is not None:
                    state = self._processor.set_text_prompt(prompt.text, state)
                # Each call runs the model; the last one has all boxes.
                for box, label in zip(_centred(prompt, image), prompt.labels, strict=True):
                    state = self._processor.add_geometric_prompt(box, label, state)
        return _answer_of_official(outputs.last, state, threshold)


class Transformers:
    """transformers' `Sam3Model`, with the pre- and postprocessing of Meta's code.

    It runs its geometry encoder only if there are boxes. So a prompt without one gets one box, whose tokens
    are then removed; this equals the official model without a box. Boxes need torchvision. It gets our square
    and tokens, and its mask logits are upsampled before the threshold.

    Args:
        folder: contains config.json, model.safetensors and tokenizer.json.
        device: `cuda` or `cpu`.
        dtype: bfloat16 is autocast over fp32 weights.
    """

    name = "transformers"

    def __init__(self, folder: Path, device: str, dtype: Dtype) -> None:
        from transformers.models.sam3.modeling_sam3 import Sam3Model  # noqa: PLC0415 - slow to import

        self.dtype = dtype
        self._device = device
        self._tokenizer = PromptTokenizer(folder / "tokenizer.json")
        model: Any = Sam3Model.from_pretrained(folder, dtype=torch.float32)
        self.model = model.to(device).eval()
        self._encode_boxes = self.model.geometry_encoder._encode_boxes  # noqa: SLF001 - there is no public way

    @torch.inference_mode()
    def segment(self, image: Image.Image, prompt: ConceptPrompt, threshold: float) -> Answer:
        """See `Model`."""
        side_px: int = self.model.config.vision_config.backbone_config.image_size
        pixels = our_square(image, side_px, self._device)
        tokens = self._tokenizer.encode([prompt.model_text])
        boxes = torch.tensor([_centred(prompt, image) or [[0.0] * 4]], device=self._device)
        labels = torch.tensor([prompt.labels or [True]], device=self._device).long()
        encoder = self.model.geometry_encoder
        encoder._encode_boxes = self._encode_boxes if prompt.boxes else _encode_no_boxes  # noqa: SLF001
        with _autocast(self._device, self.dtype):
            outputs: Any = self.model(
                pixel_values=pixels.permute(2, 0, 1)[None] / 127.5 - 1.0,
                input_ids=torch.from_numpy(tokens.ids).to(self._device),
                attention_mask=torch.from_numpy(tokens.valid).long().to(self._device),
                input_boxes=boxes,
                input_boxes_labels=labels,
            )
        scores = outputs.pred_logits[0].float().sigmoid() * outputs.presence_logits[0].float().sigmoid()
        queries = (scores > threshold).nonzero().flatten()
        masks = F.interpolate(
            outputs.pred_masks[0, queries].float()[:, None], (image.height, image.width), mode="bilinear"
        )
        boxes = outputs.pred_boxes[0, queries].float() * scores.new_tensor([*image.size, *image.size])
        return Answer(_kept(queries, scores[queries], boxes, masks[:, 0] > 0), scores.tolist())


def our_square(image: Image.Image, side_px: int, device: str) -> Tensor:
    """The square that `SAM3Predictor` makes of an image on this device, (side, side, 3) uint8 there."""
    kind = torch.device(device)
    decoded = from_pillow(image, side_px, MAX_STORED_PX if kind.type == "cuda" else 0)
    square = Stager(kind, side_px).stage(decoded).square
    assert square is not None
    return square


def exact_float32() -> None:
    """Disable TF32 in matrix products and convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


class _Outputs(AbstractContextManager["_Outputs"]):
    """Keeps the return value of the official model's forward; its processor returns only the kept queries."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.last: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        forward = self._model.forward_grounding

        def keeping_forward(*args: Any, **options: Any) -> dict[str, Tensor]:
            self.last = forward(*args, **options)
            return self.last

        self._model.forward_grounding = keeping_forward
        return self

    def __exit__(self, *_: object) -> None:
        del self._model.forward_grounding


def _encode_no_boxes(
    boxes: Tensor, valid: Tensor, _labels: Tensor, features: Tensor
) -> tuple[Tensor, Tensor]:
    """Return no tokens (1, 0, D) for the box."""
    return features.new_zeros(len(boxes), 0, features.shape[1]), valid[:, :0]


def _centred(prompt: ConceptPrompt, image: Image.Image) -> list[list[float]]:
    """The boxes of a prompt, cx cy w h in shares of the image."""
    width, height = image.size
    return [
        [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
        for x0, y0, x1, y1 in prompt.boxes
    ]


def _answer_of_official(outputs: dict[str, Tensor], state: dict[str, Any], threshold: float) -> Answer:
    """The queries that Meta's processor kept, with their numbers."""
    presence = outputs["presence_logit_dec"].sigmoid().unsqueeze(1)
    scores = (outputs["pred_logits"].sigmoid() * presence)[0, :, 0]
    queries = (scores > threshold).nonzero().flatten()
    if len(queries) != len(state["scores"]):
        raise RuntimeError("the official processor's kept queries do not match its scores")
    kept = _kept(queries, state["scores"], state["boxes"], state["masks"][:, 0])
    return Answer(kept, scores.float().tolist())


def _kept(queries: Tensor, scores: Tensor, boxes: Tensor, masks: Tensor) -> dict[int, Kept]:
    return {
        # Ours are clamped to the image too.
        query: Kept(score, _clamped(box, mask), mask)
        for query, score, box, mask in zip(
            queries.tolist(),
            scores.float().tolist(),
            boxes.float().tolist(),
            masks.cpu().numpy(),
            strict=True,
        )
    }


def _clamped(box: list[float], mask: npt.NDArray[np.bool_]) -> tuple[float, ...]:
    """The box, x0 y0 x1 y1 in px, clamped to the image of the mask (H, W)."""
    height, width = mask.shape
    limits = (width, height, width, height)
    return tuple(min(max(side, 0.0), float(limit)) for side, limit in zip(box, limits, strict=True))


def _autocast(device: str, dtype: Dtype) -> AbstractContextManager[object]:
    return torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def _vocabulary_file() -> Path:
    """Write CLIP's merges for the official tokenizer: a header line, then one merge per line."""
    merges = json.loads(CLIP_TOKENIZER_FILE.read_text(encoding="utf-8"))["model"]["merges"]
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    path = Path("data/parity/bpe_simple_vocab_16e6.txt.gz")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(["#version", *lines, ""]).encode()))
    return path
