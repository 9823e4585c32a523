"""Training batches: scenes, their prompts, and the wear that real uploads show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch reader knows

from training.architecture import SIDE_PX
from training.concepts import PROMPT_UNIFORMS, PROMPTS_PER_SCENE, PromptTokens, ask
from training.scenes import paint, render, sample_noise, sample_scenes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from training.scenes import Painter

_UNKNOWN_SHARE = 0.2
"""Of the absent prompts, the share that are words without meaning here."""

_WEAR_UNIFORMS = 4
_BLOCK = 8


@dataclass(frozen=True, slots=True)
class Batch:
    """B scenes with P = 4B prompts; prompt p belongs to scene p // 4.

    Attributes:
        pixels: (B, 3, S, S) uint8.
        owner: (B, S, S) uint8, see `Pictures`.
        boxes: (B, 7, 4), x0 y0 x1 y1 in 0..1.
        ids, ids_valid: (P, L) int64 and bool.
        wanted: (P, 7) bool, objects to match with queries.
        counted: (P, 7) bool, those of them that are to be learnt; the others are left out of the loss.
        valid: (P,) bool, False for prompts to be left out altogether.
    """

    pixels: Tensor
    owner: Tensor
    boxes: Tensor
    ids: Tensor
    ids_valid: Tensor
    wanted: Tensor
    counted: Tensor
    valid: Tensor


class BatchMaker:
    """Makes the batch of any step of a training run from the run's seed and the step's number alone."""

    def __init__(self, *, scenes: int, seed: int, device: str, compiled: bool) -> None:
        self._scenes, self._seed, self._device = scenes, seed, device
        self._tokens = PromptTokens(device)
        self._generator = torch.Generator(device)
        self._paint: Painter = torch.compile(paint, dynamic=False) if compiled else paint
        self._wear_out: Callable[..., Tensor] = (
            torch.compile(wear_out, dynamic=False) if compiled else wear_out
        )

    def make(self, step: int) -> Batch:
        """The batch of one step."""
        generator = self._generator.manual_seed(self._seed * 1_000_003 + step)
        scenes = sample_scenes(self._scenes, generator, frame=None)
        noise = sample_noise(self._scenes, SIDE_PX, SIDE_PX, generator)
        wear = torch.rand(self._scenes, _WEAR_UNIFORMS, generator=generator, device=self._device)
        pictures = render(scenes, *noise, paint=self._paint)
        pixels = self._wear_out(pictures.pixels, noise[1], wear).to(torch.uint8)
        lots = torch.rand(self._scenes, PROMPT_UNIFORMS, generator=generator, device=self._device)
        asked = ask(scenes, pictures, lots)
        prompts = self._scenes * PROMPTS_PER_SCENE
        words = torch.rand(prompts, 7, generator=generator, device=self._device)
        ids, ids_valid = self._tokens.encode(asked.concept.flatten(), words)
        unknown, unknown_valid = self._tokens.encode_unknown(words)
        last = torch.arange(prompts, device=self._device) % PROMPTS_PER_SCENE == PROMPTS_PER_SCENE - 1
        strange = (last & (words[:, 6] < _UNKNOWN_SHARE))[:, None]
        wanted = asked.wanted.flatten(0, 1)
        return Batch(
            pixels=pixels,
            owner=pictures.owner,
            boxes=pictures.boxes,
            ids=torch.where(strange, unknown, ids),
            ids_valid=torch.where(strange, unknown_valid, ids_valid),
            wanted=wanted,
            counted=wanted & pictures.counted.repeat_interleave(PROMPTS_PER_SCENE, dim=0),
            valid=asked.valid.flatten(),
        )


def wear_out(pixels: Tensor, noise: Tensor, uniforms: Tensor) -> Tensor:
    """Blur, grain and the blocks of JPEG, each on some of the (B, 3, S, S) pictures; whole levels 0..255."""
    blur, grain, block, strength = uniforms.unbind(dim=1)
    # Three taps, (w, 1 - 2w, w): up to a third each way, none for two pictures in five.
    side = ((blur - 0.4).clamp(min=0.0) / 0.6 * 0.33)[:, None, None, None]
    for dims in ((0, 0, 1, 1), (1, 1, 0, 0)):
        padded = F.pad(pixels, dims, mode="replicate")
        height, width = pixels.shape[-2:]
        before, after = padded[..., :height, :width], padded[..., -height:, -width:]
        pixels = pixels * (1.0 - 2.0 * side) + (before + after) * side
    # The same noise as the background's, shifted: fresh enough, and one field less to draw.
    shifted = noise.roll((37, 91), dims=(-2, -1)) - 0.5
    pixels = pixels + shifted * ((grain - 0.5).clamp(min=0.0) * 40.0)[:, None, None, None]
    squeezed = _squeeze_blocks(pixels, 4.0 + 36.0 * strength**2)
    return torch.where((block < 0.4)[:, None, None, None], squeezed, pixels).round().clamp(0.0, 255.0)


def _squeeze_blocks(pixels: Tensor, step: Tensor) -> Tensor:
    """Quantise the cosine transform of 8 x 8 blocks, coarser for finer detail, as JPEG does."""
    index = torch.arange(_BLOCK, device=pixels.device, dtype=torch.float32)
    basis = (math.pi / _BLOCK * (index[None] + 0.5) * index[:, None]).cos() * math.sqrt(2.0 / _BLOCK)
    basis = torch.cat([basis[:1] / math.sqrt(2.0), basis[1:]])
    count, channels, height, width = pixels.shape
    grid = (height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK)
    blocks = pixels.reshape(count, channels, *grid).transpose(3, 4)
    waves = basis @ blocks @ basis.T
    quantum = step[:, None, None, None, None, None] * (0.4 + 0.2 * (index[:, None] + index[None]))
    restored = basis.T @ ((waves / quantum).round() * quantum) @ basis
    squeezed: Tensor = restored.transpose(3, 4).reshape(pixels.shape)
    return squeezed
