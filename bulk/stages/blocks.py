"""What the stages hand on: one block of one row a shard, Python values pickled in a column.

Ray Data splits and joins blocks between rows, so that a shard stays whole.
"""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from bulk.errors import PictureError
    from bulk.rows import PictureRow
    from bulk.sources import Picture
    from sam3_runner.instances import PredictResult

Block = dict[str, "npt.NDArray[Any]"]

SHARD, PICTURES, FILES, OUTCOME = "shard", "pictures", "files", "outcome"


@dataclass(slots=True)
class PictureState:
    """One picture on its way through the stages.

    Attributes:
        size_bytes, sha256: of the object that was read.
        error: why it becomes an error row.
        results: one a prompt.
        timings_ms: by stage; of the model's pass, the picture's share.
    """

    picture: Picture
    size_bytes: int | None = None
    sha256: str | None = None
    error: PictureError | None = None
    results: Sequence[PredictResult] = ()
    timings_ms: dict[str, float] = field(default_factory=dict)


def block_of(
    shard: int, states: Sequence[PictureState], files: Sequence[bytes | None] | None = None
) -> Block:
    """The block of a shard; `files` are those of its pictures, None where one is yet to be read or failed."""
    block: Block = {SHARD: np.array([shard]), PICTURES: _pickled(list(states))}
    return block if files is None else block | {FILES: _pickled(list(files))}


def shard_of(block: Block) -> int:
    """The shard of a block."""
    return int(block[SHARD][0])


def states_of(block: Block) -> list[PictureState]:
    """The pictures of a block. Only our own stages write blocks."""
    states: list[PictureState] = pickle.loads(block[PICTURES][0])  # noqa: S301 - from our own processes
    return states


def files_of(block: Block) -> list[bytes | None]:
    """Their files."""
    files: list[bytes | None] = pickle.loads(block[FILES][0])  # noqa: S301 - from our own processes
    return files


@dataclass(frozen=True, slots=True)
class ShardOutcome:
    """What the command counts of a shard whose rows are stored.

    Attributes:
        inference_s: time in which the model's device had this shard's work.
        errors: how many pictures have each code.
    """

    pictures: int
    instances: int
    inference_s: float
    errors: dict[str, int]

    @classmethod
    def of(cls, rows: Sequence[PictureRow]) -> ShardOutcome:
        """The outcome of a shard's rows."""
        return cls(
            len(rows),
            sum(len(row.instances) for row in rows),
            sum(row.timings_ms.inference or 0.0 for row in rows) / 1000,
            dict(Counter(row.error_code for row in rows if row.error_code is not None)),
        )


def outcome_block(outcome: ShardOutcome) -> Block:
    """The block of an outcome."""
    return {OUTCOME: _pickled(outcome)}


def outcome_of(row: dict[str, Any]) -> ShardOutcome:
    """What `outcome_block` has written."""
    outcome: ShardOutcome = pickle.loads(row[OUTCOME])  # noqa: S301 - from our own processes
    return outcome


def _pickled(value: object) -> npt.NDArray[Any]:
    """A column of one value."""
    return np.array([pickle.dumps(value, pickle.HIGHEST_PROTOCOL)], dtype=object)
