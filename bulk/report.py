"""The report of a run: one HTML file that needs nothing else, for people who open it once or print it.

Names of pictures, prompts and messages come from elsewhere. `bulk.markup` escapes all of them, and the page's
policy allows no script and no request.
"""

from __future__ import annotations

import base64
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bulk.charts import Bar, Label, bar_chart
from bulk.coco_export import file_name
from bulk.markup import document, element
from bulk.samples import NOTHING_FOUND
from bulk.summary import SCORE_BINS
from outputs.palette import PALETTE, colour_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from bulk.finished_times import FinishedTimes, Stretch
    from bulk.markup import Child, Element
    from bulk.samples import Sample
    from bulk.summary import PromptSummary, Sum, Summary

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = Path(__file__).with_name("report.css")
MAX_INTERVALS = 120
"""Of the chart of the rate."""
MAX_CHARTS = 24
"""Histograms of scores: those of the prompts with the most instances."""
MAX_PROMPTS = 8
"""Of a sample, those with the most instances."""
SCORE_START = 0.5
"""Where the axis of scores begins, unless there are lower ones."""


@dataclass(frozen=True, slots=True)
class RunDescription:
    """What a report says about its run besides the numbers.

    Attributes:
        run_id: name of its folder.
        source: where its pictures are: a URI or a folder, or a manifest's place.
        out: where its results are.
        prompts: in the run's order.
        settings: name and value of each setting that a reader should know.
        model: name of the model.
        model_sha256: of its weights.
        version: of the program.
    """

    run_id: str
    source: str
    out: str
    prompts: Sequence[str]
    settings: Mapping[str, str]
    model: str
    model_sha256: str
    version: str


def report_html(run: RunDescription, summary: Summary, samples: Sequence[Sample]) -> str:
    """The report as one HTML document, below 3 MB with `bulk.samples.SAMPLES` samples."""
    title = f"Bulk run {run.run_id}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        # Without it a browser asks the host for an icon.
        element("link", rel="icon", href="data:,"),
        element("style", STYLE.read_text(encoding="utf-8")),
    )
    body = element(
        "body",
        element("header", element("h1", title), element("p", "Pictures of ", _name(run.source))),
        element(
            "main",
            _counts(summary),
            _prompts(summary),
            _samples(run, samples),
            _scores(summary),
            _rate(summary.finished),
            _time_and_size(summary),
            _failed(run, summary),
            _most_instances(run, summary),
            _settings(run, summary),
        ),
        element("footer", element("p", f"Made by sam3 bulk {run.version}. Times are in UTC.")),
    )
    return document(element("html", head, body, lang="en"))


def _counts(summary: Summary) -> Element:
    rate = summary.pictures_a_minute
    counts = [
        ("pictures done", f"{summary.done:,}", ""),
        ("failed", f"{summary.failed_pictures:,}", "wrong" if summary.failed else ""),
        ("instances", f"{summary.instances:,}", ""),
        ("pictures with any", f"{summary.done_with_any:,}", ""),
        ("pictures a minute", "–" if rate is None else _decimal(rate), ""),
        ("time at work", _duration(summary.finished.worked_s), ""),
    ]
    return element(
        "dl",
        *(
            element("div", element("dt", name), element("dd", value), class_=kind)
            for name, value, kind in counts
        ),
        class_="counts",
    )


def _prompts(summary: Summary) -> Element:
    rows = [
        [
            prompt,
            f"{found.instances:,}",
            f"{found.pictures:,}",
            f"{found.pictures / summary.done:.0%}" if summary.done else "–",
        ]
        for prompt, found in summary.prompts.items()
    ]
    return _section(
        "What was found",
        _cards(
            _table(
                "Instances by prompt",
                ["prompt", "#instances", "#pictures with any", "#share of pictures"],
                rows,
            )
        ),
    )


def _samples(run: RunDescription, samples: Sequence[Sample]) -> Element:
    if not samples:
        return _section("Samples", _note("There is no picture to show."))
    return _section(
        "Samples",
        _note(
            "Chosen by rule: the most instances, the lowest scores, one where nothing was found, and some at "
            "random. Labels have the number, the prompt and the score of an instance."
        ),
        _legend(run.prompts) if len(run.prompts) > 1 else None,
        element("div", *(_sample(run, sample) for sample in samples), class_="samples"),
    )


def _legend(prompts: Sequence[str]) -> Element:
    """The colours of the overlays; ten colours repeat."""
    items = []
    for number, prompt in enumerate(prompts, 1):
        colour = PALETTE[colour_of(number, number, len(prompts))]
        swatch = element("span", class_="swatch", style=f"background: rgb{colour}")
        items.append(element("li", swatch, element("bdi", prompt)))
    return element("ul", *items, class_="prompts legend")


def _sample(run: RunDescription, sample: Sample) -> Element:
    row = sample.row
    counts = Counter(each.prompt for each in row.instances).most_common()
    name = file_name(row.image, run.source)
    found = [f"{prompt} {_times(count)}" for prompt, count in counts] or [NOTHING_FOUND]
    image = element(
        "img",
        src=f"data:image/jpeg;base64,{base64.b64encode(sample.jpeg).decode()}",
        alt=f"Overlay of {name}: {', '.join(found)}",
        width=str(row.width),
        height=str(row.height),
    )
    facts = f"{row.width} x {row.height} px"
    if row.instances:
        scores = [each.score for each in row.instances]
        facts += f", scores {min(scores):.2f} to {max(scores):.2f}"
    elif sample.why != NOTHING_FOUND:
        facts += f", {NOTHING_FOUND}"
    caption = element(
        "figcaption",
        element("span", sample.why, class_="why"),
        element("p", _name(name)),
        _found(counts) if counts else None,
        element("p", facts),
    )
    return element("figure", image, caption, class_="card")


def _found(counts: Sequence[tuple[str, int]]) -> Element:
    """How many instances of which prompts, the most first."""
    items = [
        element("li", element("bdi", prompt), element("span", _times(count)))
        for prompt, count in counts[:MAX_PROMPTS]
    ]
    more = len(counts) - len(items)
    return element(
        "ul", *items, element("li", f"and {more} more prompts") if more else None, class_="prompts"
    )


def _times(count: int) -> str:
    return f"× {count}"


def _scores(summary: Summary) -> Element:
    found = {prompt: each for prompt, each in summary.prompts.items() if each.instances}
    if not found:
        return _section("Scores", _note("No instance was found."))
    most = sorted(found, key=lambda prompt: -found[prompt].instances)[:MAX_CHARTS]
    charts = [
        _histogram(prompt, each, _first_bin(found.values()))
        for prompt, each in found.items()
        if prompt in most
    ]
    left_out = len(found) - len(charts)
    return _section(
        "Scores",
        _note("How many instances have which score, in steps of 0.02."),
        element("div", *charts, class_="charts"),
        _note(f"{left_out} prompts with fewer instances are in summary.json.") if left_out else None,
    )


def _first_bin(found: Iterable[PromptSummary]) -> int:
    """The bin where the axis of all histograms begins: at a multiple of 0.1."""
    lowest = min(next(number for number, count in enumerate(each.scores) if count) for each in found)
    bins_a_label = SCORE_BINS // 10
    return min(lowest // bins_a_label * bins_a_label, round(SCORE_START * SCORE_BINS))


def _histogram(prompt: str, found: PromptSummary, first: int) -> Element:
    shown = range(first, SCORE_BINS)
    width = 1 / len(shown)
    bars = [
        Bar(
            start=(index + 0.06) * width,
            end=(index + 0.94) * width,
            value=found.scores[number],
            text=f"{_bin_name(number)}: {found.scores[number]:,}",
        )
        for index, number in enumerate(shown)
    ]
    labels = [
        Label(index * width, f"{number / SCORE_BINS:.1f}")
        for index, number in enumerate([*shown, SCORE_BINS])
        if number % (SCORE_BINS // 10) == 0
    ]
    highest = max(shown, key=lambda number: found.scores[number])
    instances = "1 instance" if found.instances == 1 else f"{found.instances:,} instances"
    description = (
        f"Histogram of the scores of {prompt}: {instances} from {first / SCORE_BINS:.1f} to 1; "
        f"the highest bar has {found.scores[highest]:,}, from {_bin_name(highest)}."
    )
    table = _table(
        f"Scores of {prompt}",
        ["score", "#instances"],
        [[_bin_name(number), f"{found.scores[number]:,}"] for number in shown if found.scores[number]],
    )
    return element(
        "figure",
        element("figcaption", element("h3", element("bdi", prompt)), instances),
        bar_chart(bars, labels, description=description, least_step=1),
        _numbers(table),
        class_="card",
    )


def _bin_name(number: int) -> str:
    return f"{number / SCORE_BINS:.2f} to {(number + 1) / SCORE_BINS:.2f}"


def _rate(finished: FinishedTimes) -> Element:
    stretches = finished.stretches(MAX_INTERVALS)
    if not stretches:
        return _section("Rate", _note("No picture was finished."))
    width_s = stretches[0].width_s
    pauses = len(stretches) - 1
    caption = f"Pictures finished a minute, in intervals of {_duration(width_s)}."
    if pauses:
        caption += f" {'1 pause is' if pauses == 1 else f'{pauses} pauses are'} left out (dashed)."
    intervals = [
        (stretch.start_s + index * width_s, count)
        for stretch in stretches
        for index, count in enumerate(stretch.counts)
    ]
    return _section(
        "Rate",
        element(
            "figure",
            element("figcaption", caption),
            _rate_chart(stretches, intervals),
            _numbers(
                _table(
                    "Pictures finished in each interval",
                    ["from", "#pictures"],
                    [[_time(start_s), f"{count:,}"] for start_s, count in intervals],
                )
            ),
            class_="card",
        ),
    )


def _rate_chart(stretches: Sequence[Stretch], intervals: Sequence[tuple[int, int]]) -> Element:
    width_s = stretches[0].width_s
    share = 1 / len(intervals)
    bars = [
        Bar(
            start=(index + 0.06) * share,
            end=(index + 0.94) * share,
            value=count * 60 / width_s,
            text=f"{_time(start_s)}: {_decimal(count * 60 / width_s)} a minute",
        )
        for index, (start_s, count) in enumerate(intervals)
    ]
    start, end = _time(stretches[0].start_s), _time(stretches[-1].end_s)
    day = start.partition(" ")[0]
    labels = [Label(0, start, "start"), Label(1, end.removeprefix(f"{day} "), "end")]
    ends, marks = 0, []
    for stretch in stretches[:-1]:
        ends += len(stretch.counts)
        marks.append(ends * share)
    highest = max(bar.value for bar in bars)
    description = f"Pictures finished a minute, from {start} to {end}; at most {_decimal(highest)}."
    return bar_chart(bars, labels, description=description, marks=marks)


def _time_and_size(summary: Summary) -> Element:
    stages = [
        [
            stage,
            f"{times.pictures:,}",
            _decimal(times.mean),
            _decimal(times.largest),
            _duration(times.total / 1000),
        ]
        for stage, times in summary.times_ms.items()
        if times.pictures
    ]
    sizes = zip(
        ["mean", "smallest", "largest", "sum"],
        _sizes(summary.picture_bytes, _bytes),
        _sizes(summary.picture_px, lambda px: f"{px / 1e6:,.2f}"),
        strict=True,
    )
    return _section(
        "Time and size",
        _cards(
            _table(
                "Time of each stage, summed over all workers",
                ["stage", "#pictures", "#mean, ms", "#longest, ms", "#sum"],
                stages,
            ),
            _table("Pictures that were read", ["", "#file", "#megapixels"], list(sizes)),
        ),
    )


def _failed(run: RunDescription, summary: Summary) -> Element:
    if not summary.failed:
        return _section("Errors", _note("Every picture has a result."))
    by_count = sorted(summary.failed.items(), key=lambda item: (-item[1].pictures, item[0]))
    rows: list[list[Child]] = []
    for code, failed in by_count:
        examples = [
            element("li", _name(file_name(each.image, run.source)), ": ", element("bdi", each.message))
            for each in failed.examples
        ]
        more = failed.pictures - len(examples)
        last = element("li", f"and {more:,} more") if more else None
        rows.append([_code(code), f"{failed.pictures:,}", element("ul", *examples, last)])
    table = _table("Pictures without a result", ["code", "#pictures", "examples"], rows)
    return _section("Errors", _cards(table, kind="wide"))


def _most_instances(run: RunDescription, summary: Summary) -> Element | None:
    if not summary.most_instances:
        return None
    rows: list[list[Child]] = [
        [_name(file_name(image, run.source)), f"{count:,}"] for count, image in summary.most_instances
    ]
    table = _table("Pictures with the most", ["picture", "#instances"], rows)
    return _section("Most instances", _cards(table))


def _settings(run: RunDescription, summary: Summary) -> Element:
    finished = summary.finished
    facts: list[tuple[str, Child]] = [
        ("source", _name(run.source)),
        ("results", _name(run.out)),
        ("prompts", _list_of(run.prompts)),
        *run.settings.items(),
        ("model", run.model),
        ("sha256 of the weights", element("code", run.model_sha256)),
    ]
    if finished.first is not None and finished.last is not None:
        facts.append(("first picture finished", _time(finished.first.timestamp())))
        facts.append(("last picture finished", _time(finished.last.timestamp())))
    rows = [
        element("tr", element("th", name, scope="row"), element("td", _isolated(value)))
        for name, value in facts
    ]
    table = element(
        "table", element("caption", "What makes this run"), element("tbody", *rows), class_="facts"
    )
    return _section("Settings", _cards(table, kind="wide"))


def _section(title: str, *parts: Child) -> Element:
    number = title.lower().replace(" ", "-")
    return element("section", element("h2", title, id=number), *parts, aria_labelledby=number)


def _cards(*tables: Element, kind: str = "") -> Element:
    """Tables beside each other where there is room."""
    return element("div", *(element("div", each, class_=f"card {kind}") for each in tables), class_="tables")


def _list_of(prompts: Sequence[str]) -> Element:
    return element("ul", *(element("li", element("bdi", prompt)) for prompt in prompts), class_="prompts")


def _note(text: str) -> Element:
    return element("p", text, class_="note")


def _name(text: str) -> Element:
    """A name from elsewhere: its direction does not change the text around it."""
    return element("bdi", text, class_="name")


def _code(text: str) -> Element:
    """An error code, which may be broken after each underscore."""
    first, *others = text.split("_")
    return element("code", first, *(part for each in others for part in ("_", element("wbr"), each)))


def _isolated(value: Child) -> Child:
    return element("bdi", value) if isinstance(value, str) else value


def _numbers(table: Element) -> Element:
    """The numbers of a chart, which a reader may open."""
    return element("details", element("summary", "Numbers"), table)


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Child]]) -> Element:
    """A table whose first column names the row; a column of numbers begins with #."""
    kinds = ["number" if column.startswith("#") else "" for column in columns]
    head = [
        element("th", column.removeprefix("#"), scope="col", class_=kind)
        for column, kind in zip(columns, kinds, strict=True)
    ]
    body = [
        element(
            "tr",
            element("th", _isolated(row[0]), scope="row"),
            *(element("td", cell, class_=kind) for cell, kind in zip(row[1:], kinds[1:], strict=True)),
        )
        for row in rows
    ]
    return element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *head)),
        element("tbody", *body),
    )


def _sizes(values: Sum, shown: Callable[[float], str]) -> list[str]:
    if not values.pictures:
        return ["–"] * 4
    return [shown(value) for value in (values.mean, values.smallest, values.largest, values.total)]


def _time(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _duration(seconds: float) -> str:
    """In the largest unit of which there is one at least."""
    for unit, length_s in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length_s:
            return f"{seconds / length_s:.3g} {unit}"
    return f"{seconds:.3g} s"


def _decimal(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
