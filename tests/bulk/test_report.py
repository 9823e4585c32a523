"""The report of a run, made from the demo checkpoint's results and opened in a real browser."""

from __future__ import annotations

import io
import random
import re
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from bulk.errors import PictureError
from bulk.report import POLICY, RunDescription, report_html
from bulk.rows import write_part
from bulk.run_results import COCO, REPORT, SUMMARY, write_results
from bulk.samples import MAX_JPEG_BYTES, SAMPLES, Samples, results_of
from bulk.summary import Summary
from outputs.overlay import overlay_jpeg
from sam3_runner import SAM3Predictor
from sam3_runner.instances import Instance, MaskCrop, PredictResult
from tests.bulk.made_rows import FINISHED, MODEL_SHA256, Refused, done, failed
from tests.drawn import scene

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page

    from bulk.rows import PictureRow

pytestmark = [
    pytest.mark.browser,
    # pycocotools 2.0.11 converts its arrays in the way of numpy 1.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

HOSTILE = "<img src=x onerror=alert(1)>\"'&amp;<script>alert(2)<∕script>"
REVERSED = "invoice\u202egpj.exe"
PROMPTS = ["star", "triangles", "<i>red</i> circle"]
PICTURES = 16
WIDE = {"width": 1280, "height": 900}
NARROW = {"width": 360, "height": 760}


LIGHT_OF_PAPER = "rgb(255, 255, 255)"


class Run:
    """Drawn pictures in a folder, and their rows.

    Attributes:
        rows: of the drawn pictures.
        parts: the Parquet files of these and of failed pictures.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        predictor = SAM3Predictor("demo", device="cpu")
        predictor.load()
        self.results: dict[str, list[PredictResult]] = {}
        self.rows: list[PictureRow] = []
        drawn: list[tuple[bytes, list[PredictResult]]] = []
        for seed in range(3, 3 + PICTURES):
            file = io.BytesIO()
            scene(seed).image.save(file, "PNG")
            drawn.append((file.getvalue(), predictor.predict_batch(file.getvalue(), PROMPTS)))
        # The report shows the first one at any rate, which has the hostile name.
        drawn.sort(key=lambda each: -sum(len(result.instances) for result in each[1]))
        for number, (content, results) in enumerate(drawn):
            path = folder / f"{HOSTILE if number == 0 else number}.png"
            path.write_bytes(content)
            self.results[str(path)] = results
            finished_at = FINISHED + timedelta(seconds=number)
            self.rows.append(done(str(path), results, content=content, finished_at=finished_at))
        errors = [
            failed(f"{folder}/{HOSTILE}.jpg", Refused("NOT_FOUND", f"no object {HOSTILE}")),
            failed(f"{folder}/{REVERSED}", Refused("UNSUPPORTED_IMAGE", "it is damaged")),
        ]
        self.parts = [write_part(self.rows[:10]), write_part([*self.rows[10:], *errors])]

    @property
    def description(self) -> RunDescription:
        """With a setting that holds markup."""
        return RunDescription(
            run_id="0a1b2c3d4e5f",
            source=str(self.folder),
            out="s3://results/bulk",
            prompts=PROMPTS,
            settings={"score threshold": "0.5", "<u>note</u>": "<u>value</u>"},
            model="SAM 3 demo",
            model_sha256=MODEL_SHA256,
            version="1.2.3",
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def report(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report's file."""
    folder = tmp_path_factory.mktemp("results")
    write_results(run.parts, folder, run.description, read)
    assert {each.name for each in folder.iterdir()} == {COCO, SUMMARY, REPORT}
    return folder / REPORT


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page whose errors and requests, but for the file itself, fail the test."""
    page = browser.new_context(viewport=WIDE).new_page()  # type: ignore[arg-type]  # a ViewportSize
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: faults.append(dialog.message))
    page.on("request", lambda request: faults.append(request.url) if not is_local(request.url) else None)
    yield page
    page.context.close()
    assert faults == []


def is_local(url: str) -> bool:
    return url.startswith("data:") or url.endswith(f"/{REPORT}")


def read(uri: str) -> bytes:
    try:
        return Path(uri).read_bytes()
    except FileNotFoundError as error:
        raise PictureError("NOT_FOUND", "there is no such file") from error


def opened(page: Page, path: Path, **media: Any) -> Page:
    page.emulate_media(**media)
    page.goto(path.as_uri())
    return page


def html(path: Path, run: Run, rows: list[PictureRow]) -> Path:
    """A report of other rows, without samples."""
    summary = Summary(PROMPTS)
    for row in rows:
        summary.add(row)
    path = path / REPORT
    path.write_text(report_html(run.description, summary, []), encoding="utf-8")
    return path


def test_it_needs_nothing_else(page: Page, report: Path) -> None:
    """It opens without a request, an error or a script, and all its pictures are shown."""
    opened(page, report)
    assert report.stat().st_size < 3_000_000
    assert page.locator("script, iframe, object, form, link:not([href='data:,'])").count() == 0
    pictures = page.locator("img")
    assert pictures.count() == SAMPLES
    assert pictures.evaluate_all("all => all.every(each => each.complete && each.naturalWidth > 0)")


def test_its_policy_forbids_the_rest(browser: Browser, report: Path) -> None:
    """Whatever came into the page, the browser would load nothing and run nothing."""
    page = browser.new_page()
    page.goto(report.as_uri())
    assert page.locator("meta[http-equiv=Content-Security-Policy]").get_attribute("content") == POLICY
    forbidden = page.evaluate("""async () => {
        const found = [];
        document.addEventListener("securitypolicyviolation", event => found.push(event.effectiveDirective));
        for (const [tag, text] of [["script", "window.ran = true"], ["img", ""]]) {
            const made = document.createElement(tag);
            made.textContent = text;
            if (tag === "img") made.src = "https://example.invalid/pixel.png";
            document.body.append(made);
        }
        while (found.length < 2) await new Promise(requestAnimationFrame);
        return [...found.sort(), window.ran ?? false];
    }""")
    assert forbidden == ["img-src", "script-src-elem", False]
    page.close()


def test_names_are_text(page: Page, report: Path) -> None:
    """Markup in names, prompts, messages and settings is shown as it is, and no name runs backwards."""
    opened(page, report)
    texts = page.locator("main").inner_text()
    assert f"{HOSTILE}.png" in texts
    assert f"{HOSTILE}.jpg: no object {HOSTILE}" in texts
    assert "<i>red</i> circle" in texts
    assert "<u>value</u>" in texts
    assert "invoice\N{REPLACEMENT CHARACTER}gpj.exe: it is damaged" in texts
    assert page.locator("main i, main u, img[src=x], [onerror]").count() == 0
    alts = page.locator("img").evaluate_all("all => all.map(each => each.alt)")
    assert any(f"{HOSTILE}.png" in alt for alt in alts)


def test_its_numbers_are_those_of_the_run(page: Page, report: Path, run: Run) -> None:
    """Counts, instances by prompt, errors, the settings and the model."""
    opened(page, report)
    counts = dict(
        zip(page.locator("dt").all_inner_texts(), page.locator("dd").all_inner_texts(), strict=True)
    )
    instances = sum(len(row.instances) for row in run.rows)
    assert counts["pictures done"] == str(PICTURES)
    assert counts["failed"] == "2"
    assert counts["instances"] == str(instances)
    stars = [len([each for each in row.instances if each.prompt == "star"]) for row in run.rows]
    row = page.get_by_role("table", name="Instances by prompt").get_by_role("row").nth(1)
    assert row.inner_text().split() == [
        "star",
        str(sum(stars)),
        str(sum(map(bool, stars))),
        f"{sum(map(bool, stars)) / PICTURES:.0%}",
    ]
    errors = page.get_by_role("table", name="Pictures without a result").get_by_role("row")
    expect(errors).to_have_count(3)
    settings = page.get_by_role("table", name="What makes this run")
    for text in ("0.5", "SAM 3 demo", MODEL_SHA256, "s3://results/bulk"):
        expect(settings.get_by_text(text, exact=True)).to_be_visible()


def test_a_histogram_has_a_bar_for_each_score(page: Page, run: Run, tmp_path: Path) -> None:
    """Bars are as high as their counts, at the place of their score; a table has the numbers."""
    mask = MaskCrop(0, 0, 8, 1, b"\xff")
    scores = [0.55] * 4 + [0.99] * 8
    found = [Instance(score, (0, 0, 8, 1), 8, 0, mask) for score in scores]
    row = done("/a.png", [PredictResult("star", 0.9, 8, 1, found)])
    opened(page, html(tmp_path, run, [row]))
    chart = page.get_by_role("img", name=re.compile("Histogram of the scores of star: 12 instances"))
    assert "the highest bar has 8, from 0.98 to 1.00" in str(chart.get_attribute("aria-label"))
    area, (low, high) = chart.bounding_box(), [each.bounding_box() for each in chart.locator("rect").all()]
    assert area
    assert low
    assert high
    assert high["height"] == pytest.approx(2 * low["height"], abs=1)
    assert high["height"] == pytest.approx(area["height"], abs=1)
    bottoms = [bar["y"] + bar["height"] for bar in (low, high)]
    assert bottoms == pytest.approx([area["y"] + area["height"]] * 2, abs=1)
    # The axis is from 0.5 to 1.
    middle = (low["x"] + low["width"] / 2 - area["x"]) / area["width"]
    assert middle == pytest.approx((0.55 - 0.5) / 0.5, abs=0.01)
    assert chart.locator("text.end").all_text_contents() == ["0", "2", "4", "6", "8"]
    assert chart.locator("text.middle").all_text_contents() == ["0.5", "0.6", "0.7", "0.8", "0.9", "1.0"]
    page.locator("figure", has=chart).get_by_text("Numbers").click()
    rows = page.get_by_role("table", name="Scores of star").get_by_role("row").all_inner_texts()
    assert [each.split("\t") for each in rows[1:]] == [["0.54 to 0.56", "4"], ["0.98 to 1.00", "8"]]


def test_the_rate_has_a_bar_for_each_interval(page: Page, run: Run, tmp_path: Path) -> None:
    """Three times as many pictures in an interval are a bar three times as high; a pause is a line."""
    seconds = [*range(0, 300, 5), *range(300, 600, 15), *range(4200, 4500, 5)]
    rows = [failed("/a.png", finished_at=FINISHED + timedelta(seconds=second)) for second in seconds]
    opened(page, html(tmp_path, run, rows))
    chart = page.get_by_role("img", name=re.compile("Pictures finished a minute, from 2026-11-27 04:0"))
    assert page.get_by_text("1 pause is left out (dashed).").is_visible()
    assert chart.locator("line.mark").count() == 1
    heights = [float(str(bar.get_attribute("height"))[:-1]) for bar in chart.locator("rect").all()]
    assert chart.locator("text.end").all_text_contents()[:4] == ["0", "5", "10", "15"]
    # The first and the last interval are only partly of the run.
    early, middle, late = heights[1], heights[len(heights) // 2], heights[-2]
    assert early == pytest.approx(100 * 12 / 15)  # one picture in 5 s
    assert early == pytest.approx(3 * middle, abs=0.01)
    assert early == pytest.approx(late, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(page: Page, report: Path, scheme: str) -> None:
    """The text of the page, of notes and of charts has a contrast of 4.5 : 1 with its ground."""
    opened(page, report, color_scheme=scheme)
    for selector in ("body", ".note", ".card td", ".wrong dd", ".why", "figcaption p", ".chart text"):
        colours = page.locator(selector).first.evaluate("""each => {
            const style = getComputedStyle(each);
            let ground = each;
            while (/rgba\\(0, 0, 0, 0\\)/.test(getComputedStyle(ground).backgroundColor)) {
                ground = ground.parentElement;
            }
            const ink = each instanceof SVGElement ? style.fill : style.color;
            return [ink, getComputedStyle(ground).backgroundColor];
        }""")
        assert contrast(*colours) >= 4.5, (selector, colours)


def contrast(one: str, other: str) -> float:
    """Of two CSS colours, by WCAG 2."""
    lights = []
    for colour in (one, other):
        channels = np.array([int(each) for each in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        lights.append(float(linear @ (0.2126, 0.7152, 0.0722)) + 0.05)
    return max(lights) / min(lights)


def test_it_fits_a_telephone(page: Page, report: Path, run: Run, tmp_path: Path) -> None:
    """Nothing is wider than 360 px, however long names are."""
    page.set_viewport_size(NARROW)  # type: ignore[arg-type]  # a ViewportSize
    long = f"{run.folder}/{'long' * 60}.jpg"
    mask = MaskCrop(0, 0, 8, 1, b"\xff")
    found = PredictResult("star", 0.9, 8, 1, [Instance(0.9, (0, 0, 8, 1), 8, 0, mask)])
    rows = [done(long, [found]), failed(long, Refused("UNSUPPORTED_IMAGE", "very" * 60))]
    for path in (report, html(tmp_path, run, rows)):
        opened(page, path)
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        right = page.locator("main *").evaluate_all(
            "all => Math.max(...all.map(each => each.getBoundingClientRect().right))"
        )
        assert right <= NARROW["width"]
        assert page.evaluate("document.documentElement.scrollWidth") == NARROW["width"]


def test_it_prints_dark_on_white(page: Page, report: Path) -> None:
    """Even where the screen is dark; what one would have to click is left out."""
    opened(page, report, media="print", color_scheme="dark")
    colours = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.documentElement).backgroundColor]"
    )
    assert colours[1] == LIGHT_OF_PAPER
    assert contrast(*colours) > 10
    expect(page.locator("details").first).to_be_hidden()
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_it_is_described(page: Page, report: Path) -> None:
    """One title, headings without gaps, tables with captions, and pictures and charts with texts."""
    opened(page, report)
    assert page.locator("html").get_attribute("lang") == "en"
    levels = page.locator("h1, h2, h3").evaluate_all("all => all.map(each => Number(each.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.locator("table:not(:has(> caption))").count() == 0
    assert page.locator("img:not([alt]), img[alt=''], svg:not([aria-label])").count() == 0
    assert page.locator("th:not([scope])").count() == 0


def test_a_run_in_which_all_failed(page: Page, run: Run, tmp_path: Path) -> None:
    """The report says so, and has neither charts of scores nor samples."""
    opened(page, html(tmp_path, run, [failed("/a.jpg")]))
    assert page.get_by_text("There is no picture to show.").is_visible()
    assert page.get_by_text("No instance was found.").is_visible()
    assert page.get_by_role("img", name=re.compile("Histogram")).count() == 0


def test_a_run_without_pictures(page: Page, run: Run, tmp_path: Path) -> None:
    """Nothing is divided by the number of pictures."""
    opened(page, html(tmp_path, run, []))
    assert page.get_by_text("Every picture has a result.").is_visible()
    assert page.get_by_text("No picture was finished.").is_visible()


# The samples.


def samples_of(rows: list[PictureRow]) -> Samples:
    samples = Samples()
    for row in rows:
        samples.add(row)
    return samples


def test_a_row_gives_back_its_results(run: Run) -> None:
    """Masks, boxes and scores are those that the row was made of, but for digits; so is the overlay."""
    for row in run.rows:
        for again, result in zip(results_of(row), run.results[row.image], strict=True):
            masks = [each.mask for each in again.instances]
            assert masks == [each.mask for each in result.instances]
            assert again.prompt == result.prompt
            for one, other in zip(again.instances, result.instances, strict=True):
                assert one.area_px == other.area_px
                assert one.score == pytest.approx(other.score, abs=1e-4)
                assert one.box == pytest.approx(other.box, abs=0.01)


def test_samples_are_overlays_of_different_pictures(run: Run) -> None:
    """The most instances, the lowest scores, one without any; each is what overlay_jpeg draws."""
    drawn = samples_of(run.rows).draw(read)
    assert len({sample.row.image for sample in drawn}) == len(drawn) == SAMPLES
    by_why = {why: [each.row for each in drawn if each.why == why] for why in {each.why for each in drawn}}
    counts = sorted((len(row.instances) for row in run.rows), reverse=True)
    assert [len(row.instances) for row in by_why["most instances"]] == counts[:4]
    assert [row.instances for row in by_why["nothing found"]] == [()]
    shown_before = {row.image for row in by_why["most instances"]}
    lowest = sorted(
        min(each.score for each in row.instances)
        for row in run.rows
        if row.instances and row.image not in shown_before
    )
    assert [min(each.score for each in row.instances) for row in by_why["lowest scores"]] == lowest[:3]
    sample = drawn[0]
    with Image.open(sample.row.image) as image:
        expected = overlay_jpeg(image.convert("RGB"), results_of(sample.row))
    assert sample.jpeg == expected


def test_the_choice_does_not_depend_on_the_order(run: Run) -> None:
    """A report that is made again, of shards in another order, shows the same pictures."""
    rows = list(run.rows)
    first = [sample.row.image for sample in samples_of(rows).draw(read)]
    random.Random(0).shuffle(rows)  # noqa: S311 - no secret
    assert [sample.row.image for sample in samples_of(rows).draw(read)] == first


def test_a_picture_that_is_gone_or_changed_is_replaced(run: Run) -> None:
    """Masks are drawn only over the picture that they were found in."""
    gone, changed, damaged = (sample.row for sample in samples_of(run.rows).draw(read)[:3])

    def read_most(uri: str) -> bytes:
        if uri == gone.image:
            raise PictureError("NOT_FOUND", "there is no such object")
        return b"another picture" if uri == changed.image else read(uri)

    rows = [replace(row, image_sha256=None) if row == damaged else row for row in run.rows]
    shown = {sample.row.image for sample in samples_of(rows).draw(read_most)}
    assert len(shown) == SAMPLES
    assert not shown & {gone.image, changed.image, damaged.image}


def test_overlays_of_the_worst_pictures_are_small() -> None:
    """Noise, which JPEG cannot compress, is shown in fewer px; the report stays below 3 MB."""
    noise = np.random.default_rng(0).integers(0, 256, (640, 640, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    content = file.getvalue()
    mask = MaskCrop(0, 0, 320, 640, b"\xff" * (40 * 640))
    found = PredictResult("star", 0.9, 640, 640, [Instance(0.9, (0, 0, 320, 640), 320 * 640, 0, mask)])
    rows = [done(f"/{number}.png", [found], content=content) for number in range(SAMPLES)]
    drawn = samples_of(rows).draw(lambda _: content)
    assert len(drawn) == SAMPLES
    assert all(len(sample.jpeg) <= MAX_JPEG_BYTES for sample in drawn)
    with Image.open(io.BytesIO(drawn[0].jpeg)) as shown:
        assert shown.width == shown.height < 640
