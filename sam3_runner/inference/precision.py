"""Which precision a model runs in, and which one replaces it where its output is not finite. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["float16", "bfloat16", "float32"]
"""Of the large matrix products. Scores, boxes and positions are float32 in each."""
DTypeSetting = Literal["auto", "float16", "bfloat16", "float32"]


@dataclass(frozen=True, slots=True)
class Precision:
    """The precision of a model.

    Attributes:
        dtype: of every pass.
        fallback: of a second pass for requests whose output is not finite; None: they fail.
    """

    dtype: DType
    fallback: DType | None = None


def precision_of(setting: DTypeSetting, device_type: str) -> Precision:
    """The precision that `SAM3_DTYPE` means on a device.

    `auto` is float16 on a GPU, with bfloat16 as its fallback: float16 rounds eight times finer, but
    overflows at 65,504, bfloat16 at 3e38 as float32 does. On a CPU `auto` is float32. Any other setting is
    used on every device, without a fallback.
    """
    if setting == "auto":
        return Precision("float16", fallback="bfloat16") if device_type == "cuda" else Precision("float32")
    return Precision(setting)


def not_finite_message(dtype: DType, *, after: DType | None = None) -> str:
    """The sentence for an output that is not finite in `dtype`, and before in `after`."""
    remedy = {
        "float16": "set SAM3_DTYPE=auto or bfloat16",
        "bfloat16": "set SAM3_DTYPE=float32",
        "float32": "SAM3_DTYPE has no wider one, so check the weights of SAM3_WEIGHTS_PATH",
    }[dtype]
    tried = f"{after} or {dtype}" if after else dtype
    return f"the model's output is not finite in {tried}: {remedy}"
