"""The image's variants: their build of PyTorch, and the index of its wheel."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PYTHON_VERSIONS = ("3.12", "3.11")
"""The locks have wheels for these; the image uses the first."""


_ENTRY = re.compile(r"^(?=\S)", re.MULTILINE)


def entries(lock: str) -> list[str]:
    """Split a lock into its packages, each with its hashes; joined they are the lock again."""
    return [entry for entry in _ENTRY.split(lock) if entry]


@dataclass(frozen=True, slots=True)
class Variant:
    """One variant of the image.

    Attributes:
        name: PyTorch's name of the build: cpu, cu130.
        cuda: the CUDA version of its PyTorch; None: CPU.
        torch: the version of its PyTorch, where it is not that of pyproject.toml.
        torch_index: the index of its torch wheel; None: that of the other packages, usually PyPI.
    """

    name: str
    cuda: str | None
    torch: str | None = None
    torch_index: str | None = None

    @property
    def lock(self) -> Path:
        """The file with its packages and hashes."""
        return HERE / f"requirements-{self.name}.lock"

    @property
    def device(self) -> str:
        """The device of the model: its default of SAM3_DEVICE."""
        return "cpu" if self.cuda is None else "cuda"


VARIANTS = {
    variant.name: variant
    for variant in (
        # PyPI's torch 2.13.0 is built for CUDA 13.0, which needs driver 580 or newer.
        Variant("cu130", "13.0"),
        # For hosts with an older driver: any CUDA 12 runs on driver 525 and newer. torch 2.10.0 is the last
        # version whose build on PyPI is for CUDA 12.
        Variant("cu128", "12.8", torch="2.10.0"),
        Variant("cpu", None, torch_index="https://download.pytorch.org/whl/cpu"),
    )
}
