"""The playground in a real browser: what a person does there, and the files that it is made of."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image, ImageChops
from playwright.sync_api import expect
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from commands.local_server import ROOT
from playground.files import FOLDER, TYPES
from tests import new_connection
from tests.edge import error_of
from tests.services import node
from tests.tiers import need

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt
    from playwright.sync_api import Browser, Download, Locator, Page, Route

    from commands.local_server import LocalServer

pytestmark = [
    pytest.mark.server,
    pytest.mark.browser,
    # pycocotools', with numpy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

SEGMENT: Final = "/v1/images/segmentations"
CIRCLES: Final = FOLDER / "sample-circles.jpg"
WAIT_MS: Final = 30_000
FAULTS: Final = {"error", "warning"}
CLIPBOARD: Final = ["clipboard-read", "clipboard-write"]
TSC: Final = ROOT / "typescript_client" / "node_modules" / "typescript" / "bin" / "tsc"
SCREENSHOTS: Final = ROOT / "docs" / "playground"
VIOLATIONS: Final = """
    document.addEventListener("securitypolicyviolation", (event) => console.error(event.violatedDirective));
"""
"""Run before the page's own scripts."""
HOSTILE: Final = "<img src=x onerror=alert(1)>\"' $(touch pwned); `touch pwned` #.jpg"
PATHS: Final = [
    f"/playground{'' if path.name == 'index.html' else '/' + path.name}"
    for path in sorted(FOLDER.iterdir())
    if path.suffix in TYPES
]


# The files.


@pytest.mark.parametrize("path", PATHS)
def test_file_is_served_with_strict_headers(server: LocalServer, path: str) -> None:
    """Each file needs no key, forbids what is not from this host, and is asked for again after a change."""
    answer = new_connection.get(f"{server.url}{path}")
    assert answer.status_code == 200
    policy = answer.headers["Content-Security-Policy"]
    wanted = {"default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'"}
    assert wanted <= set(policy.split("; "))
    assert "unsafe" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-cache"
    tag = answer.headers["ETag"]
    kept = new_connection.get(f"{server.url}{path}", headers={"If-None-Match": f'"other", W/{tag}'})
    assert (kept.status_code, kept.content) == (304, b"")
    assert new_connection.get(f"{server.url}{path}", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        *("/playground/", "/playground/index.html", "/playground/nothing.js", "/playground/app.js/"),
        *("/playground/../gate.py", "/playground/%2e%2e/gate.py", "/playground/..%2f..%2fgate.py"),
        *("/playground/%00", "/playground/static/app.js", "/playground//etc/passwd", "/Playground"),
    ],
)
def test_nothing_else_is_served(server: LocalServer, path: str) -> None:
    """Only the page's own files are there, at their own paths."""
    with httpx.Client(transport=httpx.HTTPTransport()) as client:
        url = httpx.URL(server.url).copy_with(raw_path=path.encode())
        assert error_of(client.get(url))[:2] == (404, "NOT_FOUND")


def test_page_has_no_inline_code() -> None:
    """The page's markup holds neither scripts nor styles, and names no other host."""
    markup = (FOLDER / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)", markup) == []
    assert re.findall(r"<style|\bstyle=|\bon\w+=|javascript:", markup) == []
    sources = [path.read_text() for path in FOLDER.iterdir() if path.suffix in {".js", ".css", ".html"}]
    assert not [text for text in sources if re.search(r"https?://", text)]


def test_types_of_the_scripts_fit() -> None:
    """TypeScript finds no fault in the page's scripts and their JSDoc types."""
    need(node.missing())
    if not TSC.is_file():
        need("typescript_client/node_modules is missing (make test installs it with npm)")
    checked = subprocess.run(
        [str(node.node()), str(TSC), "-p", "playground"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout


def test_requests_are_counted_under_two_labels(server: LocalServer) -> None:
    """The metrics name the page and its files together, whatever is asked for below it."""
    for path in ("/playground", "/playground/app.js", "/playground/made-up"):
        new_connection.get(f"{server.url}{path}")
    endpoints = set(
        re.findall(r'endpoint="(/playground[^"]*)"', new_connection.get(f"{server.url}/metrics").text)
    )
    assert endpoints == {"/playground", "/playground/"}


# The page.


@contextmanager
def opened_page(browser: Browser, server: LocalServer, fragment: str = "", **options: Any) -> Iterator[Page]:
    """The page; at the end: no fault of its scripts, no breach of its policy, no request to another host."""
    with browser.new_context(
        **{"viewport": {"width": 1280, "height": 900}, "permissions": CLIPBOARD, **options}
    ) as context:
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        expect.set_options(timeout=WAIT_MS)
        page.add_init_script(VIOLATIONS)
        faults: list[str] = []
        urls: list[str] = []
        page.on("console", lambda each: faults.append(each.text) if each.type in FAULTS else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: urls.append(request.url))
        page.goto(f"{server.url}/playground{fragment}")
        yield page
        # Chromium logs answers with an error's status; the tests of errors cause them.
        assert [fault for fault in faults if not fault.startswith("Failed to load resource")] == []
        hosts = {urlsplit(url).netloc for url in urls if not url.startswith(("data:", "blob:"))}
        assert hosts == {urlsplit(server.url).netloc}
        assert not [url for url in urls if server.api_key in url.partition("#")[0]]


@pytest.fixture
def page(browser: Browser, server: LocalServer) -> Iterator[Page]:
    """The page with the key in its address, as somebody is sent there."""
    with opened_page(browser, server, f"#key={server.api_key}") as page:
        expect(page.locator("#server")).to_contain_text("demo checkpoint")
        yield page


def concept_field(page: Page) -> Locator:
    return page.get_by_role("textbox", name="What to find")


def find(page: Page, *concepts: str, sample: str | None = "Circles") -> None:
    """Choose a sample and find these concepts; returns when all are answered."""
    if sample is not None:
        page.get_by_role("button", name=sample).click()
        expect(page.locator("#canvas")).to_be_visible()
    for concept in concepts:
        concept_field(page).fill(concept)
        concept_field(page).press("Enter")
        # The chip has a dashed line until its concept is answered.
        expect(page.locator(".chip:not(.open)").filter(has_text=concept)).to_have_count(1)


def set_threshold(page: Page, value: str) -> None:
    page.get_by_role("slider", name="Score threshold").fill(value)


def asked(server: LocalServer, image: bytes, **fields: str) -> list[dict[str, Any]]:
    """The server's own answer to a request."""
    answer = new_connection.post(
        f"{server.url}{SEGMENT}",
        headers=server.headers,
        files={"image": image},
        data={"mask_format": "rle", "score_threshold": "0.5", **fields},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


def shown_names(page: Page) -> list[str]:
    """How screen readers call the instances that are shown."""
    rows = page.locator(".row:not(.removed) .choose:visible").all()
    return [str(row.get_attribute("aria-label")) for row in rows]


def described(number: int, concept: str, instance: dict[str, Any]) -> str:
    """An instance of the server's answer as the page describes it."""
    x0, y0, x1, y1 = (int(side + 0.5) for side in instance["box"])
    area = f"{int(mask_of(instance).sum()):,}"
    score = f"{instance['score']:.2f}"
    return f"{number} · {concept} · score {score} · box {x0}, {y0} to {x1}, {y1} px · area {area} px"


def mask_of(instance: dict[str, Any]) -> npt.NDArray[np.bool_]:
    mask: npt.NDArray[np.bool_] = coco_mask.decode(instance["mask"]).astype(np.bool_)
    return mask


def screen_of(page: Page) -> Image.Image:
    return Image.open(BytesIO(page.locator("#frame").screenshot())).convert("RGB")


def test_sample_concepts_threshold_and_instances(page: Page, server: LocalServer) -> None:
    """Two concepts show the server's instances; threshold, pointer and list change what is shown, unasked."""
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url) if SEGMENT in request.url else None)
    find(page, "red circle", "circles")
    assert len(requests) == 2
    image = CIRCLES.read_bytes()
    red, either = (asked(server, image, prompt=prompt) for prompt in ("red circle", "circles"))
    wanted = [*(("red circle", each) for each in red), *(("circles", each) for each in either)]
    names = [described(number, *each) for number, each in enumerate(wanted, 1)]
    assert len(names) == 8
    assert shown_names(page) == names

    # The threshold, without a request.
    low = asked(server, image, prompt="circles", score_threshold="0.05")
    set_threshold(page, "0.05")
    expect(page.locator(".row .choose:visible")).to_have_count(len(red) + len(low))
    assert len(low) > len(either)
    set_threshold(page, "0.97")
    above = [each for _, each in wanted if each["score"] > 0.97]
    assert 0 < len(above) < len(wanted)
    expect(page.locator(".row .choose:visible")).to_have_count(len(above))
    set_threshold(page, "0.5")

    # One instance, by the pointer and by the list.
    page.get_by_role("checkbox", name="circles").last.uncheck()
    expect(page.locator(".row .choose:visible")).to_have_count(3)
    before = settled_screen(page)
    frame = page.locator("#canvas").bounding_box()
    assert frame is not None
    x0, y0, x1, y1 = red[1]["box"]
    scale = frame["width"] / 1280
    page.mouse.move(frame["x"] + (x0 + x1) / 2 * scale, frame["y"] + (y0 + y1) / 2 * scale)
    expect(page.locator("#caption")).to_have_text(names[1])
    lit = settled_screen(page)
    assert ImageChops.difference(before, lit).getbbox() is not None
    page.mouse.click(frame["x"] + (x0 + x1) / 2 * scale, frame["y"] + (y0 + y1) / 2 * scale)
    expect(page.get_by_role("button", name=names[1], exact=True)).to_be_focused()

    # Taken away and brought back.
    page.get_by_role("button", name=f"Take away {names[1]}").click()
    expect(page.locator(".row.removed")).to_have_count(1)
    assert len(shown_names(page)) == 2
    page.get_by_role("button", name="Bring back red circle").click()
    expect(page.locator(".row.removed")).to_have_count(0)
    assert shown_names(page) == names[:3]
    assert len(requests) == 2


def test_boxes_by_pointer(page: Page, server: LocalServer) -> None:
    """A box alone finds what is like it; a negative one leaves it out; they are asked as drawn."""
    find(page, sample="Circles")
    page.get_by_label("Box: more like it").check()
    draw(page, (770, 170, 990, 430))
    page.get_by_role("button", name="Find", exact=True).click()
    expect(page.locator(".chip.open")).to_have_count(0)
    boxes = corners_of(page)
    wanted = asked(server, CIRCLES.read_bytes(), boxes=json.dumps(boxes), box_labels="[1]")
    assert shown_names(page) == [described(n, "like the boxes", each) for n, each in enumerate(wanted, 1)]
    assert len(wanted) == 2
    expect(page.locator("#code #snippet")).to_contain_text(json.dumps(boxes, separators=(",", ":")))

    # The same with a text, and a red circle that is to be left out.
    find(page, "circles", sample=None)
    page.get_by_label("Box: not like it").check()
    draw(page, (130, 130, 370, 360))
    expect(page.locator(".chip.open")).to_have_count(1)
    page.get_by_role("button", name="Find", exact=True).click()
    expect(page.locator(".chip.open")).to_have_count(0)
    fields = {"prompt": "circles", "boxes": json.dumps(corners_of(page)), "box_labels": "[0]"}
    left = asked(server, CIRCLES.read_bytes(), **fields)
    assert 0 < len(left) < 5
    names = [described(len(wanted) + n, "circles", each) for n, each in enumerate(left, 1)]
    assert shown_names(page)[len(wanted) :] == names


def draw(page: Page, corners: tuple[float, float, float, float]) -> None:
    """Drag a box, in px of a picture of 1280 px."""
    frame = page.locator("#canvas").bounding_box()
    assert frame is not None
    x0, y0, x1, y1 = (side * frame["width"] / 1280 for side in corners)
    page.mouse.move(frame["x"] + x0, frame["y"] + y0)
    page.mouse.down()
    page.mouse.move(frame["x"] + x1, frame["y"] + y1, steps=4)
    page.mouse.up()
    expect(page.locator(".box:not(.of-other)")).to_have_count(1)


def corners_of(page: Page) -> list[list[int]]:
    """Of the boxes of the chosen concept, as they are announced."""
    found = []
    for box in page.locator(".box:not(.of-other)").all():
        numbers = re.findall(r"x (\d+) to (\d+), y (\d+) to (\d+)", str(box.get_attribute("aria-label")))
        x0, x1, y0, y1 = (int(number) for number in numbers[0])
        found.append([x0, y0, x1, y1])
    return found


def test_downloads_hold_what_is_shown(page: Page, server: LocalServer, tmp_path: Path) -> None:
    """Mask, label map, COCO and overlay hold the instances that are shown, equal to the server's masks."""
    find(page, "red circle", "star")
    page.get_by_role("button", name="Take away 2").click()
    image = CIRCLES.read_bytes()
    red, star = (asked(server, image, prompt=prompt) for prompt in ("red circle", "star"))
    kept = [red[0], red[2], *star]
    masks = [mask_of(each) for each in kept]

    mask = saved(page, "Mask", tmp_path)
    assert mask.name == "sample-circles-mask.png"
    with Image.open(mask) as opened:
        assert (opened.mode, opened.size) == ("L", (1280, 720))
        assert np.array_equal(np.asarray(opened), np.any(masks, axis=0) * np.uint8(255))

    numbers = np.zeros((720, 1280), np.uint8)
    for number in sorted(range(len(kept)), key=lambda index: (kept[index]["score"], -index)):
        numbers[masks[number]] = number + 1
    with Image.open(saved(page, "Label map", tmp_path)) as opened:
        assert opened.mode == "L"
        assert np.array_equal(np.asarray(opened), numbers)

    path = saved(page, "COCO", tmp_path)
    coco = COCO(str(path))
    document = json.loads(path.read_text())
    assert document["images"] == [{"id": 1, "file_name": "sample-circles.jpg", "width": 1280, "height": 720}]
    assert [each["name"] for each in document["categories"]] == ["red circle", "star"]
    assert [each["segmentation"] for each in document["annotations"]] == [each["mask"] for each in kept]
    for annotation, mask_px in zip(coco.loadAnns(coco.getAnnIds()), masks, strict=True):
        assert np.array_equal(coco.annToMask(annotation).astype(np.bool_), mask_px)
        assert annotation["area"] == mask_px.sum()
        assert annotation["bbox"] == list(coco_mask.toBbox(annotation["segmentation"]))

    with Image.open(saved(page, "Overlay", tmp_path)) as opened, Image.open(CIRCLES) as original:
        difference = np.asarray(ImageChops.difference(opened.convert("RGB"), original)).max(axis=2)
        assert opened.size == (1280, 720)
    assert difference[np.any(masks, axis=0)].mean() > 15
    assert np.median(difference[mask_of(red[1])]) < 12


def saved(page: Page, button: str, folder: Path) -> Path:
    """The file that a button of the downloads gives."""
    with page.expect_download() as waiting:
        page.get_by_role("button", name=button, exact=True).click()
    download: Download = waiting.value
    path = folder / download.suggested_filename
    download.save_as(path)
    return path


def test_label_map_of_many_has_16_bits(page: Page) -> None:
    """The page's PNG of more than 255 numbers has 16 bits a px, and Pillow reads the same numbers."""
    encoded = page.evaluate("""async () => {
        const { greyPng } = await import("./playground/png.js");
        const blob = await greyPng(Uint16Array.from({ length: 600 }, (_, index) => 7 * index), 20, 30);
        return [...new Uint8Array(await blob.arrayBuffer())];
    }""")
    with Image.open(BytesIO(bytes(encoded))) as opened:
        assert opened.mode == "I;16"
        assert np.array_equal(np.asarray(opened), (7 * np.arange(600)).reshape(30, 20))


def test_code_of_a_hostile_file_runs_as_shown(page: Page, server: LocalServer, tmp_path: Path) -> None:
    """Copied code finds what the page shows; a file's name and a prompt are text in all of it."""
    drop(page, {HOSTILE: CIRCLES.read_bytes()})
    expect(page.locator("#canvas")).to_be_visible()
    prompts = ["red circle", "@star' <b>$(touch pwned)</b>"]
    find(page, *prompts, sample=None)
    shutil.copy(CIRCLES, tmp_path / HOSTILE)
    expect(page.locator("img[src=x], b")).to_have_count(0)
    assert str(page.locator("#canvas").get_attribute("aria-label")).startswith(HOSTILE)
    environment = {"PATH": "/usr/bin:/bin", "SAM3_API_KEY": server.api_key, "PYTHONPATH": str(ROOT)}
    counts = [len(asked(server, CIRCLES.read_bytes(), prompt=prompt)) for prompt in prompts]
    assert counts[0] == 3

    curl = run(["bash", "-c", copied(page, "curl")], tmp_path, environment)
    answers = [json.loads(text) for text in re.split(r"(?<=\})(?=\{)", curl)]
    assert [len(answer["data"]) for answer in answers] == counts
    python = run([sys.executable, "-c", copied(page, "Python")], tmp_path, environment)
    assert python.count("red circle 0.9") == counts[0]
    assert len(python.splitlines()) == sum(counts)
    if program := node.node():
        (tmp_path / "request.mjs").write_text(copied(page, "TypeScript"))
        assert run([program, "request.mjs"], tmp_path, environment).count("red circle 0.9") == counts[0]
    assert not (tmp_path / "pwned").exists()


def copied(page: Page, language: str) -> str:
    """What the button copies."""
    page.get_by_label(language, exact=True).check()
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    text: str = page.evaluate("navigator.clipboard.readText()")
    expect(page.get_by_role("button", name="Copy", exact=True)).to_be_visible()
    return text


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def drop(page: Page, files: dict[str, bytes], event: str = "drop") -> None:
    """Drop files on the page, or paste them."""
    page.evaluate(
        """([files, type]) => {
            const data = new DataTransfer();
            for (const [name, bytes] of files) data.items.add(new File([new Uint8Array(bytes)], name));
            const event = type === "paste"
                ? new ClipboardEvent(type, { clipboardData: data, bubbles: true, cancelable: true })
                : new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true });
            document.body.dispatchEvent(event);
        }""",
        [[[name, list(content)] for name, content in files.items()], event],
    )


def test_pictures_are_pasted_dropped_and_turned(page: Page, server: LocalServer, tmp_path: Path) -> None:
    """A pasted picture with EXIF's orientation is shown and masked as the server turns it."""
    with Image.open(CIRCLES) as opened:
        turned = opened.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6
        content = BytesIO()
        turned.save(content, "JPEG", exif=exif, quality=90)
    drop(page, {"turned.jpg": content.getvalue()}, "paste")
    expect(page.locator("#canvas")).to_have_attribute("aria-label", re.compile("1280 by 720 px"))
    find(page, "red circle", sample=None)
    wanted = asked(server, content.getvalue(), prompt="red circle")
    assert shown_names(page) == [described(n, "red circle", each) for n, each in enumerate(wanted, 1)]
    assert len(wanted) == 3
    union = np.any([mask_of(each) for each in wanted], axis=0)
    with Image.open(saved(page, "Mask", tmp_path)) as mask:
        assert np.array_equal(np.asarray(mask), union * 255)
    with Image.open(saved(page, "Overlay", tmp_path)) as overlay:
        red, green, _ = np.asarray(overlay.convert("RGB")).astype(int)[union].T
    assert (red > green + 80).mean() > 0.9


def test_bad_files_are_refused_in_a_sentence(page: Page) -> None:
    """What is no picture, damaged or too large is refused before it is sent; what is shown stays."""
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url) if SEGMENT in request.url else None)
    find(page, sample="Circles")
    error = page.get_by_role("alert")
    for content, words in [
        (b"no picture at all", "no picture that the server reads"),
        (b"", "no picture that the server reads"),
        (b"\x89PNG\r\n\x1a\n and then nothing", "damaged"),
    ]:
        drop(page, {"file.png": content})
        expect(error).to_contain_text(words)
    page.evaluate("""() => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(10 * 2 ** 20 + 1)], "large.png"));
        document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
    }""")
    expect(error).to_contain_text("the server takes up to 10 MB")
    drop(page, {})
    expect(error).to_contain_text("no file")
    expect(page.locator("#canvas")).to_be_visible()
    assert requests == []


def test_bad_file_does_not_end_the_reading_of_a_picture(page: Page) -> None:
    """A sample that arrives slowly is shown, though a file was refused meanwhile."""
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/playground/sample-stars.jpg", hold)
    stars = page.get_by_role("button", name="Stars")
    with page.expect_request("**/playground/sample-stars.jpg"):
        stars.click()
    drop(page, {"file.png": b"no picture at all"})
    error = page.get_by_role("alert")
    expect(error).to_contain_text("no picture that the server reads")
    held.pop().continue_()
    expect(page.locator("#canvas")).to_be_visible()
    expect(error).to_contain_text("no picture that the server reads")


def test_wrong_key_busy_server_and_cancel(browser: Browser, server: LocalServer) -> None:
    """A wrong key leads to its field, a busy server is asked again after its wait, a request is cancelled."""
    with opened_page(browser, server) as page:
        find(page, sample="Circles")
        concept_field(page).fill("star")
        concept_field(page).press("Enter")
        key = page.get_by_label("API key")
        expect(key).to_be_focused()
        expect(page.locator("#key-help")).to_have_text("Type the API key first.")
        key.fill("wrong")
        page.get_by_role("button", name="Find", exact=True).click()
        expect(page.locator("#key-help")).to_have_text("The server does not know this key.")
        expect(key).to_be_focused()

        answers = iter([429, 503])

        def busy(route: Route) -> None:
            status = next(answers, None)
            if status is None:
                route.continue_()
                return
            body = {"error": {"code": "OVERLOADED", "message": "the queue is full"}, "request_id": "1"}
            route.fulfill(status=status, headers={"Retry-After": "1"}, json=body)

        page.route(f"**{SEGMENT}", busy)
        key.fill(server.api_key)
        key.press("Enter")
        expect(page.locator("#progress")).to_contain_text("The queue is full. Trying again in 1 s.")
        expect(page.locator(".row")).to_have_count(1)

        def hold(_route: Route) -> None:
            """Leave the request without an answer."""

        page.unroute(f"**{SEGMENT}")
        page.route(f"**{SEGMENT}", hold)
        concept_field(page).fill("triangle")
        concept_field(page).press("Enter")
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#progress")).to_be_hidden()
        expect(page.get_by_role("status")).to_have_text("Cancelled")
        page.unroute(f"**{SEGMENT}")
        concept_field(page).fill("zq " * 60)
        page.get_by_role("button", name="Find", exact=True).click()
        expect(page.get_by_role("alert")).to_contain_text("INVALID_REQUEST")
        expect(page.locator(".row")).to_have_count(2)


def test_key_leaves_the_address(page: Page, server: LocalServer) -> None:
    """A key in the fragment is used and removed from the address; this tab keeps it, another one has none."""
    assert page.url == f"{server.url}/playground"
    page.reload()
    expect(page.locator("#server")).to_contain_text("demo checkpoint")
    expect(page.get_by_label("API key")).to_have_value(server.api_key)
    other = page.context.new_page()
    other.goto(f"{server.url}/playground")
    expect(other.get_by_label("API key")).to_have_value("")
    assert page.evaluate("document.cookie + localStorage.length") == "0"


def test_by_keyboard_alone(browser: Browser, server: LocalServer) -> None:
    """From the key to a result, a box and a download without a pointer."""
    with opened_page(browser, server) as page:
        keyboard = page.keyboard
        tab_to(page, "#key")
        keyboard.insert_text(server.api_key)
        keyboard.press("Enter")
        expect(page.locator("#server")).to_contain_text("demo checkpoint")
        tab_to(page, "#samples button")
        keyboard.press("Enter")
        expect(concept_field(page)).to_be_focused()
        keyboard.insert_text("circles")
        keyboard.press("Enter")
        expect(page.locator(".row")).not_to_have_count(0)
        expect(page.get_by_role("status")).to_have_text("5 of circles")

        tab_to(page, "input[name=mode]:checked", back=True)
        keyboard.press("ArrowRight")
        keyboard.press("ArrowRight")
        tab_to(page, "#add-box")
        keyboard.press("Enter")
        expect(page.locator(".box.negative")).to_be_focused()
        [[x0, y0, x1, y1]] = corners_of(page)
        keyboard.press("ArrowLeft")
        keyboard.press("ArrowDown")
        keyboard.press("Shift+ArrowRight")
        moved = re.compile(f"x {x0 - 13} to {x1}, y {y0 + 13} to {y1 + 13}")
        expect(page.locator(".box")).to_have_attribute("aria-label", moved)
        keyboard.press("Delete")
        expect(page.locator(".box")).to_have_count(0)
        expect(page.locator("#add-box")).to_be_focused()

        tab_to(page, ".row .choose")
        expect(page.locator("#caption")).to_contain_text("1 · circles · score 0.9")
        keyboard.press("Delete")
        expect(page.locator(".row.removed")).to_have_count(1)
        tab_to(page, "[data-download=mask]")
        with page.expect_download():
            keyboard.press("Enter")


def tab_to(page: Page, selector: str, *, back: bool = False) -> None:
    """Press Tab until an element that fits has the focus, which must be visible."""
    for _ in range(60):
        page.keyboard.press("Shift+Tab" if back else "Tab")
        if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            return
    pytest.fail(f"Tab does not reach {selector}")


def test_comparison_divides_the_picture(page: Page) -> None:
    """Two concepts, one on each side of a line that keys and pointer move."""
    find(page, "red circle", "blue circle")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#left-name")).to_have_text("red circle")
    expect(page.locator("#right-name")).to_have_text("blue circle")
    swipe = page.get_by_role("slider", name="Where the picture is divided")
    swipe.fill("100")
    page.wait_for_function("document.getElementById('swipe').value === '100'")
    all_left = settled_screen(page)
    page.get_by_label("Left").select_option("blue circle")
    assert ImageChops.difference(all_left, settled_screen(page)).getbbox() is not None
    frame = page.locator("#canvas").bounding_box()
    assert frame is not None
    page.mouse.click(frame["x"] + frame["width"] / 4, frame["y"] + 10)
    expect(swipe).to_have_value("25")


def settled_screen(page: Page) -> Image.Image:
    """The picture after the changes up to now are drawn."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return screen_of(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_in_light_and_dark(browser: Browser, server: LocalServer, scheme: str) -> None:
    """At 360 px nothing is scrolled sideways, in both colour schemes, with a result of a long name."""
    options = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme, "has_touch": True}
    with opened_page(browser, server, f"#key={server.api_key}", **options) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        find(page, "red circle", "a" * 60)
        page.get_by_label("Box: more like it").check()
        page.get_by_role("button", name="Add a box").click()
        page.get_by_role("button", name="Compare").click()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        background = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        levels = [int(level) for level in re.findall(r"\d+", background)[:3]]
        assert (max(levels) < 60) if scheme == "dark" else (min(levels) > 200)


@pytest.mark.parametrize("name", ["start", "light", "dark", "narrow"])
def test_screenshots_are_kept(name: str) -> None:
    """The pictures of docs/playground.md exist and are small; tests/playground_screenshots.py makes them."""
    path = SCREENSHOTS / f"{name}.png"
    assert path.stat().st_size < 300_000
    with Image.open(path) as opened:
        assert opened.format == "PNG"
        assert opened.width >= 360
