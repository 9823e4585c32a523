"""The image's variants: which PyTorch they hold, and where its wheel comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PYTHON_VERSIONS = ("3.12", "3.11")
"""That the locks hold wheels for; the first one is the image's."""


_ENTRY = re.compile(r"^(?=\S)", re.MULTILINE)


def entries(lock: str) -> list[str]:
    """The packages of a lock, each with its hashes, as text that together is the lock again."""
    return [entry for entry in _ENTRY.split(lock) if entry]


@dataclass(frozen=True, slots=True)
class Variant:
    """One line of the image.

    Attributes:
        name: the variant, as PyTorch's wheels are called: cpu, cu130.
        cuda: the version of CUDA that its PyTorch is built for; None: for the CPU.
        torch_index: the index that has its torch wheel; None: the one that has all the rest, as a rule PyPI.
    """

    name: str
    cuda: str | None
    torch_index: str | None

    @property
    def lock(self) -> Path:
        """Its packages, with hashes."""
        return HERE / f"requirements-{self.name}.lock"

    @property
    def device(self) -> str:
        """What it runs the model on: its default of SAM3_DEVICE."""
        return "cpu" if self.cuda is None else "cuda"


VARIANTS = {
    variant.name: variant
    for variant in (
        # PyPI's torch 2.13.0 is built for CUDA 13.0, which needs driver 580 or newer.
        Variant("cu130", "13.0", None),
        # For hosts with an older driver: any CUDA 12 runs on driver 525 and newer.
        Variant("cu129", "12.9", "https://download.pytorch.org/whl/cu129"),
        Variant("cpu", None, "https://download.pytorch.org/whl/cpu"),
    )
}
