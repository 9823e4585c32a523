"""What a run did and found, in numbers, summed row by row. Memory does not grow with the run."""

from __future__ import annotations

import json
from bisect import insort
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from bulk.finished_times import FinishedTimes
from bulk.rows import SCORE_DIGITS, TimingsMs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from bulk.rows import PictureRow

SCORE_BINS = 50
"""Of a histogram of scores from 0 to 1. A score on an edge is in the bin above it; 1 is in the last bin."""
MAX_EXAMPLES = 5
"""Failed pictures that are named for each code: the first ones."""
MAX_MOST = 10
"""Pictures that are named for their many instances."""


@dataclass(slots=True)
class PromptSummary:
    """One prompt.

    Attributes:
        instances: found in all pictures.
        pictures: those with any.
        scores: instances in each of `SCORE_BINS`.
    """

    instances: int = 0
    pictures: int = 0
    scores: list[int] = field(default_factory=lambda: [0] * SCORE_BINS)


@dataclass(frozen=True, slots=True)
class FailedPicture:
    """A picture without a result."""

    image: str
    message: str


@dataclass(slots=True)
class FailedPictures:
    """All pictures with one error code."""

    pictures: int = 0
    examples: list[FailedPicture] = field(default_factory=list)


@dataclass(slots=True)
class Sum:
    """A quantity that pictures have; `smallest` and `largest` are 0 where no picture has it."""

    pictures: int = 0
    total: float = 0
    smallest: float = 0
    largest: float = 0

    def add(self, value: float) -> None:
        """Count a picture."""
        self.smallest = min(self.smallest, value) if self.pictures else value
        self.largest = max(self.largest, value) if self.pictures else value
        self.pictures += 1
        self.total += value

    @property
    def mean(self) -> float:
        """Of those pictures that have it; 0 where none has."""
        return self.total / self.pictures if self.pictures else 0.0


class Summary:
    """The numbers of a run.

    Args:
        prompts: of the run.

    Attributes:
        done: pictures that were segmented.
        done_with_any: those in which something was found.
        failed: by error code.
        prompts: by prompt, in the run's order.
        picture_bytes: size of the files that were read.
        picture_px: width x height of the pictures that were decoded.
        times_ms: by stage, of all pictures that reached it.
        finished: when pictures were finished, with a result or without.
        most_instances: how many, and in which picture; at most `MAX_MOST`, the most first.
    """

    def __init__(self, prompts: Sequence[str]) -> None:
        self.done = 0
        self.done_with_any = 0
        self.failed: dict[str, FailedPictures] = {}
        self.prompts = {prompt: PromptSummary() for prompt in prompts}
        self.picture_bytes = Sum()
        self.picture_px = Sum()
        self.times_ms = {stage: Sum() for stage in TimingsMs.__slots__}
        self.finished = FinishedTimes()
        self.most_instances: list[tuple[int, str]] = []

    def add(self, row: PictureRow) -> None:
        """Count a picture.

        Raises:
            KeyError: an instance has a prompt that is not of the run.
        """
        self.finished.add(row.finished_at)
        if row.image_bytes is not None:
            self.picture_bytes.add(row.image_bytes)
        if row.width is not None and row.height is not None:
            self.picture_px.add(row.width * row.height)
        for stage, time_ms in asdict(row.timings_ms).items():
            if time_ms is not None:
                self.times_ms[stage].add(time_ms)
        if row.status == "done":
            self._add_found(row)
        else:
            self._add_failed(row)

    @property
    def pictures(self) -> int:
        """All of the run."""
        return self.done + self.failed_pictures

    @property
    def failed_pictures(self) -> int:
        """Those without a result."""
        return sum(each.pictures for each in self.failed.values())

    @property
    def instances(self) -> int:
        """Of all prompts."""
        return sum(each.instances for each in self.prompts.values())

    @property
    def pictures_a_minute(self) -> float | None:
        """Mean rate from the first picture to the last, pauses left out; None where it has no meaning."""
        worked_s = self.finished.worked_s
        return 60 * (self.pictures - 1) / worked_s if worked_s > 0 else None

    def to_json(self) -> str:
        """The text of `summary.json`."""
        return json.dumps(self._document(), indent=1, ensure_ascii=False) + "\n"

    def _add_found(self, row: PictureRow) -> None:
        self.done += 1
        for instance in row.instances:
            prompt = self.prompts[instance.prompt]
            prompt.instances += 1
            prompt.scores[_score_bin(instance.score)] += 1
        for found in {each.prompt for each in row.instances}:
            self.prompts[found].pictures += 1
        if row.instances:
            self.done_with_any += 1
            insort(self.most_instances, (len(row.instances), row.image), key=lambda each: (-each[0], each[1]))
            del self.most_instances[MAX_MOST:]

    def _add_failed(self, row: PictureRow) -> None:
        failed = self.failed.setdefault(row.error_code or "", FailedPictures())
        failed.pictures += 1
        if len(failed.examples) < MAX_EXAMPLES:
            failed.examples.append(FailedPicture(row.image, row.error_message or ""))

    def _document(self) -> dict[str, Any]:
        return {
            "pictures": {
                "all": self.pictures,
                "done": self.done,
                "done_with_any_instance": self.done_with_any,
                "failed": self.failed_pictures,
            },
            "instances": self.instances,
            "prompts": [{"prompt": prompt, **asdict(each)} for prompt, each in self.prompts.items()],
            "score_bins": {"count": SCORE_BINS, "from": 0, "to": 1},
            "failed": [{"code": code, **asdict(each)} for code, each in sorted(self.failed.items())],
            "most_instances": [{"image": image, "instances": count} for count, image in self.most_instances],
            "picture_px": _sum_document(self.picture_px),
            "picture_bytes": _sum_document(self.picture_bytes),
            "timings_ms": {stage: _sum_document(each) for stage, each in self.times_ms.items()},
            "finished": {
                "first": _iso(self.finished.first),
                "last": _iso(self.finished.last),
                "pictures_a_minute": _rounded(self.pictures_a_minute),
            },
        }


def summary_tables(summary: Summary) -> Group:
    """The summary for a terminal: what failed, what was found, and a sentence."""
    parts: list[Table | Text] = []
    if summary.failed:
        parts.append(_failed_table(summary))
    if summary.prompts:
        parts.append(_prompt_table(summary))
    counts = [f"{summary.done} of {summary.pictures} pictures done"]
    if summary.failed:
        counts.append(f"{summary.failed_pictures} failed")
    counts.append(f"{summary.instances} instances in {summary.done_with_any} pictures")
    return Group(*parts, Text(f"{', '.join(counts)}."))


def _prompt_table(summary: Summary) -> Table:
    table = Table("prompt")
    table.add_column("instances", justify="right")
    table.add_column("pictures with any", justify="right")
    for prompt, found in summary.prompts.items():
        table.add_row(_shown(prompt), str(found.instances), str(found.pictures))
    return table


def _failed_table(summary: Summary) -> Table:
    table = Table("why", title="failed", title_justify="left")
    table.add_column("pictures", justify="right")
    table.add_column("for example", overflow="fold")
    for code, failed in sorted(summary.failed.items()):
        example = failed.examples[0]
        table.add_row(_shown(code), str(failed.pictures), _shown(f"{example.image}: {example.message}"))
    return table


def _shown(text: str) -> Text:
    """A name or a message from elsewhere, without what could control a terminal."""
    return Text("".join(letter if letter.isprintable() else "?" for letter in text))


def _score_bin(score: float) -> int:
    """By the score's digits: 0.58 * 50 is 28.999..."""
    digits = int(10**SCORE_DIGITS)
    return min(round(score * digits) * SCORE_BINS // digits, SCORE_BINS - 1)


def _sum_document(values: Sum) -> dict[str, float | None]:
    return {
        "pictures": values.pictures,
        "total": _rounded(values.total),
        "mean": _rounded(values.mean),
        "smallest": _rounded(values.smallest),
        "largest": _rounded(values.largest),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _iso(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat(timespec="milliseconds")
