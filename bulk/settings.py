"""What a run is: its settings, its identity, and where its parts are."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field

from outputs.refinement import Refinement

DEFAULT_SHARD_PICTURES = 64
"""Pictures that are written together: about a second of one H100."""
MAX_SHARD_PICTURES = 256
"""Their results are one block in Ray's object store."""
DEFAULT_MAX_IMAGE_BYTES = 64 * 2**20
DEFAULT_MAX_IMAGE_PIXELS = 2**26
DEFAULT_MAX_WAIT_S = 300.0
RUN_ID_LETTERS = 12


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What the results depend on, besides the pictures: other settings make another run.

    Attributes:
        prompts: noun phrases, each with results of its own.
        score_threshold: instances with a higher score are kept; None: the model's default, 0.5.
        refinement: of the instances of each prompt.
        write_masks: each prompt's mask is stored as a PNG.
        max_image_bytes, max_image_pixels: larger pictures become error rows.
        weights_sha256: of the weights' file.
    """

    prompts: tuple[str, ...]
    weights_sha256: str
    score_threshold: float | None = None
    refinement: Refinement = field(default_factory=Refinement)
    write_masks: bool = True
    max_image_bytes: int = DEFAULT_MAX_IMAGE_BYTES
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS

    def digest(self) -> str:
        """SHA-256, in hexadecimal."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def picture_key(self, image_sha256: str) -> str:
        """Names what is stored of a picture: equal for equal content and settings, whatever its name."""
        return hashlib.sha256(f"{image_sha256} {self.digest()}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Run:
    """One run, as every process of it needs to know it.

    Attributes:
        images: as of `--images`.
        out: URI of the folder of runs.
        weights_path: as SAM3_WEIGHTS_PATH, the same on every machine.
        side_px: of the model's square.
        ray_address: of a cluster; None: a Ray of this machine.
        device: `cuda` or `cpu`; chosen when the cluster is known.
        streams: batches that one model computes at once; chosen with the device.
        max_batch: most pictures in one pass of the model; chosen with the device.
        shard_pictures: pictures that are written together.
        max_wait_s: how long a store that is away or refuses requests for a while is retried.
        background: leave the machine to others where they need it.
    """

    settings: RunSettings
    images: str
    out: str
    weights_path: str
    side_px: int
    ray_address: str | None = None
    device: str = "cpu"
    streams: int = 1
    max_batch: int = 1
    shard_pictures: int = DEFAULT_SHARD_PICTURES
    max_wait_s: float = DEFAULT_MAX_WAIT_S
    background: bool = False

    @property
    def run_id(self) -> str:
        """Names the run's folder: equal for the same source and settings."""
        return hashlib.sha256(f"{self.images} {self.settings.digest()}".encode()).hexdigest()[:RUN_ID_LETTERS]

    @property
    def folder(self) -> str:
        """URI of the run's folder."""
        return f"{self.out.rstrip('/')}/{self.run_id}"
